"""Do plans run as they say? Eight models, five budgets each, real steps.

profile (no step is run) ─▶ tightest and plain peak ─▶ five budgets between them ─▶ five plans
each plan, on the model as it is:  gradients against the plain step's, bit for bit, dropout on
                                   the allocator's peak against the budget
                                   how often each stage runs forward against the plan

python -m studies.execution
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torchvision
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from executor.engine import apply_checkpoints
from planner.cost import index_segments
from planner.plan import NoFeasiblePlan, Plan
from planner.search import optimize
from profiler.allocator import measure_step
from profiler.freed_memory import keep_freed_memory
from profiler.profile_record import Profile
from profiler.timing import stepper_for
from profiler.unmeasured import profile_unmeasured, target_of
from profiler.workload import Workload
from studies.runs import provenance, write
from studies.workloads import classifier, language_model, mlp, unet

CPU = torch.device("cpu")
BUDGETS = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen of one plan."""

    budget_bytes: int
    peak_bytes: int
    equal_bits: bool
    runs_as_planned: bool
    plan: Plan

    @property
    def good(self) -> bool:
        return self.equal_bits and self.runs_as_planned and self.peak_bytes <= self.budget_bytes


def gpt2() -> Workload:
    """Six blocks of GPT-2 that know few words, so that blocks and not logits are most of the memory."""
    config = GPT2Config(
        n_layer=6, n_embd=192, n_head=4, vocab_size=2000, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return language_model(GPT2LMHeadModel(config), config.vocab_size, 128)


def bert() -> Workload:
    """Four layers of BERT."""
    config = BertConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    return language_model(BertForMaskedLM(config), config.vocab_size, 64)


def t5() -> Workload:
    """Three layers each way."""
    config = T5Config(num_layers=3, d_model=256, d_ff=1024, num_heads=4)
    config.decoder_start_token_id = 0
    return language_model(T5ForConditionalGeneration(config), config.vocab_size, 64)


def vit() -> Workload:
    """Six layers of a vision transformer, with dropout."""
    model = torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=8,
        num_layers=6,
        num_heads=4,
        hidden_dim=192,
        mlp_dim=768,
        dropout=0.1,
        num_classes=10,
    )
    return classifier(model, 3, 64, 64)


MODELS: dict[str, tuple[Callable[[], Workload], int]] = {
    "gpt2": (gpt2, 16),
    "bert": (bert, 8),
    "t5": (t5, 8),
    "vit": (vit, 16),
    "resnet50": (lambda: classifier(torchvision.models.resnet50(num_classes=10), 3, 64, 64), 16),
    "convnext": (lambda: classifier(torchvision.models.convnext_tiny(num_classes=10), 3, 64, 64), 8),
    "unet": (unet, 8),
    "mlp": (mlp, 4096),
}


def profiled(workload: Workload, size: int) -> Profile:
    """Of this machine's CPU, without running a step. The loss stays whole: in chunks it adds up in another order."""
    profile = profile_unmeasured(
        workload, (size,), ("fp32",), target_of("cpu", ("fp32",)), optimizer="adamw", watts=None, spec=None,
        progress=lambda message: None, trying_bytes=2**30,
    )  # fmt: skip
    whole = tuple(msgspec.structs.replace(each, chunked_head=None) for each in profile.precisions)
    return msgspec.structs.replace(profile, precisions=whole)


def plans(profile: Profile, size: int) -> list[tuple[int, Plan]]:
    """Budgets from the tightest that can be met to the plain peak, and the plan for each."""
    tightest = _tightest(profile, size)
    plain = optimize(profile, size).baselines.plain.prediction
    highest = int(plain.peak_memory_bytes * (1 + plain.error.peak_memory_bytes)) + 1
    steps = (tightest + (highest - tightest) * n // BUDGETS for n in range(BUDGETS))
    return [(budget, optimize(profile, size, budget)) for budget in steps]


def _tightest(profile: Profile, size: int) -> int:
    try:
        optimize(profile, size, 1)
    except NoFeasiblePlan as refused:
        found = refused.tightest
        return int(found.peak_memory_bytes * (1 + found.error.peak_memory_bytes)) + 1
    raise AssertionError("a byte was enough")


def executed(workload: Workload, size: int) -> list[Outcome]:
    """What each plan of a model does."""
    model = workload.model
    profile = profiled(workload, size)
    batch = workload.batch(size)
    stages = {profile.stages[i].name: i for i in _countable(model, profile)}
    plain, once = _step(workload, batch, tuple(stages))
    counted = tuple(name for name in stages if once[name] == 1)
    outcomes = []
    for budget, plan in plans(profile, size):
        checkpoints = apply_checkpoints(model, plan)
        try:
            placed = index_segments(profile, plan.checkpoint)
            around = [*placed.segments, *((stage, stage + 1) for stage in placed.keeping)]
            expected = {
                name: 1 + sum(start <= stages[name] < stop for start, stop in around) for name in counted
            }
            gradients, runs = _step(workload, batch, counted)
            stepper = stepper_for(workload, "adamw", "fp32", CPU)
            stepper.step([batch], 1)
            peak = measure_step(lambda: stepper.step([batch], 1), model, stepper.optimizer, [batch], CPU)  # noqa: B023
        finally:
            checkpoints.remove()
        outcomes.append(
            Outcome(budget, peak.peak_bytes, all(map(torch.equal, plain, gradients)), runs == expected, plan)
        )
    return outcomes


def _step(
    workload: Workload, batch: Any, entries: tuple[str, ...]
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Gradients of one micro-batch, and how often each stage's first layer that is called at all ran forward."""
    model = workload.model
    runs = dict.fromkeys(entries, 0)

    def count(entry: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[entry] += 1

        return hook

    handles = [
        _first_layer(model.get_submodule(entry)).register_forward_pre_hook(count(entry)) for entry in entries
    ]
    buffers = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(3)
    model.zero_grad()
    workload.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients, runs


def _countable(model: nn.Module, profile: Profile) -> Iterator[int]:
    """Stages whose main module is theirs alone, so that its first layer runs when the stage does."""
    modules = dict(model.named_modules())
    places = [place for stage in profile.stages for place in (stage.name, stage.entry)]
    for i, stage in enumerate(profile.stages):
        inside = any(place.startswith(f"{stage.name}.") for place in places)
        again = any(place.startswith(f"{stage.name}#") for place in places)
        if stage.recomputable and stage.name in modules and not inside and not again:
            yield i


def _first_layer(module: nn.Module) -> nn.Module:
    """Attention of torch's own calls none of its layers, so it counts itself."""
    if isinstance(module, nn.MultiheadAttention):
        return module
    return next(layer for layer in module.modules() if not list(layer.children()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Plans of eight models, run for real.")
    parser.add_argument("--only", choices=sorted(MODELS))
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name, (build, size) in MODELS.items():
        if options.only not in (None, name):
            continue
        torch.manual_seed(0)
        workload = build()
        workload.model.train()
        for outcome in executed(workload, size):
            counts = Counter(segment.mode for segment in outcome.plan.checkpoint)
            kept = counts["selective"] + counts["selective_narrow"]
            deepest = max((s.depth for s in outcome.plan.checkpoint), default=0)
            rows.append(
                {
                    "model": name,
                    "budget_bytes": outcome.budget_bytes,
                    "peak_memory_bytes": outcome.peak_bytes,
                    "predicted_peak_memory_bytes": outcome.plan.prediction.peak_memory_bytes,
                    "gradients_equal": outcome.equal_bits,
                    "runs_as_planned": outcome.runs_as_planned,
                    "within_budget": outcome.peak_bytes <= outcome.budget_bytes,
                    "good": outcome.good,
                    "segments": counts["recompute"],
                    "selective": counts["selective"],
                    "selective_narrow": counts["selective_narrow"],
                    "depth": deepest,
                }
            )
            print(
                f"{name:9} budget {outcome.budget_bytes / 2**20:8.1f} MiB  peak {outcome.peak_bytes / 2**20:8.1f} MiB  "
                f"{counts['recompute']:2} segments, {kept:2} selective, depth {deepest}  "
                f"{'good' if outcome.good else f'BAD {outcome.equal_bits=} {outcome.runs_as_planned=}'}",
                flush=True,
            )
    good = sum(bool(row["good"]) for row in rows)
    print(f"{good} of {len(rows)} plans: equal gradients, within budget, run as planned")
    if options.only is None:
        print(f"written to {write('execution', provenance('python -m studies.execution') | {'rows': rows})}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

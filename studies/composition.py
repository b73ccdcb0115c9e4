"""How far is a composed peak from the executed one?

A profile holds curves of single windows, traced from one plain step; planner/memory.py composes the peak of
any plan from them. Here random plans are composed, and then run with their segments under fake tensors, which
needs no memory:

    random segments, b, k, precision ──▶ timeline ──▶ predicted peak ─┐
                        │                                             ├──▶ relative error
                        └──▶ Checkpoints, two fake steps ──▶ executed ┘

The largest error over all plans is what ``planner.cost.COMPOSITION_ERROR`` states.

    python -m studies.composition --plans 20
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from executor.recompute import Checkpoints, Stretch
from planner.cost import COMPOSITION_ERROR
from planner.memory import peak_window, timeline
from planner.placement import Segments
from profiler.chain import Call, Stage, discover, recomputable_stages
from profiler.fake import RealIntegers, fake_batch, fake_parameters
from profiler.live import LiveStorages
from profiler.measure import FAKE_BATCH_SIZES
from profiler.memory import MemoryTracer
from profiler.profile_record import Precision, PrecisionMemory
from profiler.step import Stepper, build_optimizer
from profiler.workload import Workload

TRACED_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The knobs of a plan that its peak depends on."""

    segments: Segments
    micro_batch_size: int
    gradient_accumulation_steps: int
    precision: Precision


def predicted_peak_bytes(memory: PrecisionMemory, setting: Setting) -> int:
    """The peak of a step as composed from curves, with all micro-batches of the step resident."""
    return peak_window(
        timeline(
            memory,
            setting.segments,
            micro_batch_size=setting.micro_batch_size,
            gradient_accumulation_steps=setting.gradient_accumulation_steps,
            resident_batches=setting.gradient_accumulation_steps,
        )
    ).total_bytes


def executed_peak_bytes(
    workload: Workload,
    stages: Sequence[Stage],
    setting: Setting,
    *,
    optimizer: str = "adamw",
    fake: bool = True,
) -> int:
    """The peak of the second step when the plan is run on the CPU, under fake tensors or for real.

    The first step makes the optimizer's state. A real run has a learning rate of zero.
    """
    model, k = workload.model, setting.gradient_accumulation_steps
    batches = [workload.batch(setting.micro_batch_size) for _ in range(k)]
    checkpoints = Checkpoints(model, stretches(stages, setting.segments))
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.remove)
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            batches = [fake_batch(mode, batch) for batch in batches]
            stack.enter_context(fake_parameters(model, mode))
            stack.enter_context(mode)
            stack.enter_context(RealIntegers())
        stepper = Stepper(
            model=model,
            loss=workload.loss,
            optimizer=build_optimizer(optimizer, model, learning_rate=0.0, weight_decay=0.0),
            precision=setting.precision,
            device_type="cpu",
        )
        live = LiveStorages()
        stack.enter_context(live)
        live.track(model.parameters())
        live.track(model.buffers())
        live.track(leaf for leaf in tree_leaves(batches) if isinstance(leaf, torch.Tensor))
        stepper.step(batches, k)
        live.peak_bytes = live.live_bytes
        stepper.step(batches, k)
        return live.peak_bytes


def stretches(stages: Sequence[Stage], segments: Segments) -> tuple[Stretch, ...]:
    """Half-open ranges of stages as what the executor's hooks understand."""
    entries = [Call.parse(stage.entry) for stage in stages]
    return tuple(
        Stretch(entries[start], entries[stop] if stop < len(entries) else None) for start, stop in segments
    )


def random_segments(recomputable: Sequence[bool], generator: random.Random) -> Segments:
    """Runs of stages: from each stage on, as likely kept as not, one to six long."""
    segments: list[tuple[int, int]] = []
    start = 0
    while start < len(recomputable):
        stop = start
        longest = start + generator.randint(1, 6)
        while stop < min(longest, len(recomputable)) and recomputable[stop]:
            stop += 1
        if stop > start and generator.random() < 0.5:
            segments.append((start, stop))
        start = max(stop, start + 1)
    return tuple(segments)


def random_settings(
    stages: Sequence[Stage], batch_sizes: Sequence[int], count: int, seed: int
) -> Iterator[Setting]:
    """The plain plan first, then random ones."""
    generator = random.Random(seed)
    allowed = recomputable_stages(stages)
    for index in range(count):
        yield Setting(
            segments=random_segments(allowed, generator) if index else (),
            micro_batch_size=generator.choice(batch_sizes),
            gradient_accumulation_steps=generator.choice((1, 2, 3)),
            precision=generator.choice(TRACED_PRECISIONS),
        )


def gpt2_of_three_blocks() -> Workload:
    """GPT-2's smallest with three of its twelve blocks, at 256 tokens."""
    config = GPT2Config(n_layer=3, use_cache=False)

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(config.vocab_size, (size, 256))
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = model(**batch).loss
        return value

    return Workload(model=GPT2LMHeadModel(config).train(), batch=batch, loss=loss)


def classifier(model: nn.Module, *shape: int) -> Workload:
    """Ten classes of random inputs of one shape."""

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, *shape), torch.randint(10, (size,))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Workload(model=model.train(), batch=batch, loss=loss)


def mlp() -> Workload:
    """Five hidden layers of 512 for images of 28 x 28."""
    hidden = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.GELU())]
    return classifier(nn.Sequential(nn.Linear(784, 512), nn.GELU(), *hidden, nn.Linear(512, 10)), 784)


MODELS: dict[str, Callable[[], Workload]] = {
    "gpt2, 3 blocks": gpt2_of_three_blocks,
    "resnet50": lambda: classifier(torchvision.models.resnet50(num_classes=10), 3, 64, 64),
    "vit_b_16": lambda: classifier(torchvision.models.vit_b_16(num_classes=10), 3, 224, 224),
    "mlp": mlp,
}
BATCH_SIZES = (1, 2, 3, 5, 16)


def errors_of(workload: Workload, plans: int, seed: int) -> list[tuple[Setting, int, int]]:
    """``(setting, predicted bytes, executed bytes)`` of random plans of one workload."""
    stages = discover(workload, FAKE_BATCH_SIZES[0])
    tracer = MemoryTracer(workload, stages, "adamw")
    memory = {
        (precision, at_one): tracer.memory(precision, (1, 1) if at_one else FAKE_BATCH_SIZES)
        for precision in TRACED_PRECISIONS
        for at_one in (True, False)
    }
    return [
        (
            setting,
            predicted_peak_bytes(memory[setting.precision, setting.micro_batch_size == 1], setting),
            executed_peak_bytes(workload, stages, setting),
        )
        for setting in random_settings(stages, BATCH_SIZES, plans, seed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against executed peaks of random plans.")
    parser.add_argument("--plans", type=int, default=20, help="random plans per model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    errors: list[float] = []
    for name, build in MODELS.items():
        for setting, predicted, executed in errors_of(build(), options.plans, options.seed):
            errors.append(predicted / executed - 1)
            print(
                f"{name:15} {setting.precision} b={setting.micro_batch_size:<3} "
                f"k={setting.gradient_accumulation_steps} predicted {predicted / 2**20:9.2f} MiB, "
                f"executed {executed / 2**20:9.2f} MiB, error {errors[-1]:+.4%}  {setting.segments}",
                flush=True,
            )
    sizes = [abs(error) for error in errors]
    print(
        f"{len(errors)} plans: largest error {max(sizes):.4%}, mean {sum(sizes) / len(sizes):.4%}, "
        f"exact to the byte in {sizes.count(0.0)}; stated as COMPOSITION_ERROR: {COMPOSITION_ERROR:.2%}"
    )


if __name__ == "__main__":
    main()

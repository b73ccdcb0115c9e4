"""Where to recompute: plans of ours beside what else one can do, side by side in one process.

    plain                   nothing is recomputed
    every block             transformers' gradient_checkpointing_enable(), or torch's checkpoint around each block
    sqrt(L)                 the classic prior, of blocks
    sequential n            torch.utils.checkpoint.checkpoint_sequential over the blocks, n of 2 .. 8
    sac_milp x              torch's planner of selective checkpoints, for x of the peak that it expects
    compiler x              activation_memory_budget = x of the min-cut partitioner, kernels as in eager mode
    ours                    planner.optimize at 80, 65 and 50% of the plain peak, and at every rival's peak (those that
                            are the same within a thousandth once)

Each runs real steps. Its peak is the allocator's; its time is that of steps that take turns, round after round, so the
machine's moods meet all of them: the median over the rounds of its time over that of the plain steps around it. What
is compiled takes its turns apart, with plain steps as well.

    python -m studies.placement             # --device cuda on a GPU
    python -m studies.placement --chunks    # what the loss in chunks is worth, without running a step
    python -m studies.placement --ways      # what the second kind of selective segment is worth, the same
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import GPT2Config, GPT2LMHeadModel

from executor.engine import apply_checkpoints
from executor.verification import Clocks
from planner.cost import instead
from planner.plan import NoFeasiblePlan, Plan, Weights
from planner.search import optimize
from profiler import device as devices
from profiler.allocator import measure_step
from profiler.fake import without_memory
from profiler.measure import profile as profile_workload
from profiler.profile_record import PrecisionMemory, Profile
from profiler.timing import stepper_for, to_device
from profiler.unmeasured import profile_unmeasured, target_of
from profiler.workload import Workload
from studies import sac
from studies.runs import RESULTS, name_on, provenance, write
from studies.turns import in_turns
from studies.workloads import classifier, gpt2_medium, language_model

BUDGETS = (0.8, 0.65, 0.5)
"""Shares of the plain peak."""

COMPILER_BUDGETS = (0.8, 0.5, 0.2)
SAC_BUDGETS = (0.85, 0.7)
SEQUENTIAL_SEGMENTS = (2, 3, 4, 6, 8)
ROUNDS = 3

VERSIONS_COMPILED = 64
"""Of a function, for all budgets, each with and without hooks."""

Row = dict[str, Any]
Applied = contextlib.AbstractContextManager[nn.Module]
"""The model with a strategy on it, while the context is open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, its micro-batch size, and where its blocks are: a ModuleList or Sequential that the forward walks."""

    name: str
    build: Callable[[], Workload]
    size: int
    blocks: Callable[[Any], nn.ModuleList | nn.Sequential]


class Flat(nn.Module):
    """ResNet-50 as one sequence of pieces, which checkpoint_sequential asks for."""

    def __init__(self, model: torchvision.models.ResNet) -> None:
        super().__init__()
        layers = (*model.layer1, *model.layer2, *model.layer3, *model.layer4)
        self.stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(model.avgpool, nn.Flatten(), model.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.blocks(self.stem(x)))
        return scores


def gpt2(sequence_length: int, **shape: Any) -> Workload:
    """GPT-2 small, or of another shape."""
    config = GPT2Config(use_cache=False, **shape)
    return language_model(GPT2LMHeadModel(config), config.vocab_size, sequence_length)


def narrow_gpt2() -> Workload:
    """Small enough for a CPU that most of a step's memory are activations: 6 layers, 384 wide, 8,192 tokens."""
    return gpt2(256, n_layer=6, n_embd=384, n_head=6, vocab_size=8192)


def resnet50(image_size: int) -> Workload:
    """ResNet-50 with ten classes."""
    return classifier(Flat(torchvision.models.resnet50(num_classes=10)), 3, image_size, image_size)


ON_CPU = (
    Case(name="gpt2-6x384", build=narrow_gpt2, size=4, blocks=lambda model: model.transformer.h),
    Case(name="resnet50", build=lambda: resnet50(64), size=64, blocks=lambda model: model.blocks),
)
ON_CUDA = (
    Case(name="gpt2-medium", build=gpt2_medium, size=8, blocks=lambda model: model.transformer.h),
    Case(name="resnet50", build=lambda: resnet50(224), size=64, blocks=lambda model: model.blocks),
)


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextlib.contextmanager
def every_block(model: Any, blocks: nn.ModuleList | nn.Sequential) -> Iterator[nn.Module]:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
        try:
            yield model
        finally:
            model.gradient_checkpointing_disable()
        return
    with _replaced_forwards(
        {block: functools.partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}
    ):
        yield model


@contextlib.contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            del module.forward


@contextlib.contextmanager
def sequential(model: nn.Module, blocks: nn.Sequential, segments: int) -> Iterator[nn.Module]:
    """torch's own, over a model's nn.Sequential of blocks."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        pieces = list(blocks)
        y: torch.Tensor = checkpoint_sequential(pieces, segments, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return y

    with _replaced_forwards({blocks: forward}):
        yield model


@contextlib.contextmanager
def planned(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    checkpoints = apply_checkpoints(model, plan)
    try:
        yield model
    finally:
        checkpoints.remove()


class Compiled:
    """The model compiled once with a budget of the partitioner; its parameters are the model's own.

    Each budget has a backend of its own: that is what the compiler tells compiled code apart by. With more versions of
    one function than its limit it would run the model as it is, and say so in a warning only.
    """

    def __init__(self, model: nn.Module, budget: float) -> None:
        import torch._dynamo.config as versions
        from torch._dynamo.backends.debugging import aot_eager_decomp_partition
        from torch._functorch import config

        versions.recompile_limit = VERSIONS_COMPILED
        versions.fail_on_recompile_limit_hit = True

        def partitioned(graph: Any, inputs: Any) -> Any:
            with config.patch(activation_memory_budget=budget):
                return aot_eager_decomp_partition(graph, inputs)

        self._compiled: Any = torch.compile(model, backend=partitioned)

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self._compiled


class Steps:
    """Plain optimizer steps of one micro-batch on a model that somebody has changed."""

    def __init__(self, workload: Workload, size: int, device: torch.device) -> None:
        self._workload = workload
        self._device = device
        self._batch = to_device(workload.batch(size), device)
        self._stepper = stepper_for(workload, "adamw", "fp32", device)

    def run(self, applied: Applied) -> float:
        """Seconds of one step: of the CPU's own clock, or on CUDA of the wall's."""
        clocks = Clocks()
        with applied as model, clocks.timing(self._device):
            self._step(model)
        return (clocks.cpu if self._device.type == "cpu" else clocks.wall)[0]

    def peak_bytes(self, applied: Applied) -> int:
        """The allocator's, over one step."""
        with applied as model:
            return measure_step(
                lambda: self._step(model),
                self._workload.model,
                self._stepper.optimizer,
                [self._batch],
                self._device,
            ).peak_bytes

    def _step(self, model: nn.Module) -> None:
        dataclasses.replace(self._stepper, model=model).step([self._batch], 1)


def strategies(case: Case, workload: Workload, device: torch.device) -> dict[str, Callable[[], Applied]]:
    """What else one can do, by name."""
    model, blocks = workload.model, case.blocks(workload.model)
    found: dict[str, Callable[[], Applied]] = {
        "plain": lambda: plain(model),
        "every block": lambda: every_block(model, blocks),
    }
    if isinstance(blocks, nn.Sequential):
        for n in SEQUENTIAL_SEGMENTS:
            found[f"sequential {n}"] = functools.partial(sequential, model, blocks, n)
    found |= _of_sac(case, model, device)
    for budget in COMPILER_BUDGETS:
        found[f"compiler {budget:g}"] = functools.partial(Compiled(model, budget), model)
    return found


def _of_sac(case: Case, model: nn.Module, device: torch.device) -> dict[str, Callable[[], Applied]]:
    """What torch's planner finds for shares of the peak that it expects."""
    try:
        planner = sac.SacPlanner(case.build, case.size, device)
    except AssertionError:  # torch.distributed._tools.ilp_utils.parse_module_info, of a model in its own way.
        print(f"{case.name:12} sac_milp: torch's own tools fail on this model's modules", flush=True)
        return {}
    found: dict[str, Callable[[], Applied]] = {}
    for share in SAC_BUDGETS:
        began = time.perf_counter()
        policies = planner.policies(int(share * planner.plain_bytes))
        seconds = time.perf_counter() - began
        outcome = "no plan" if policies is None else f"{len(policies)} modules"
        print(f"{case.name:12} sac_milp {share:g}: {outcome} after {seconds:.0f} s", flush=True)
        if policies is not None:
            found[f"sac_milp {share:g}"] = functools.partial(sac.applied, model, policies)
    return found


def measured(case: Case, device: torch.device) -> list[Row]:
    """Every strategy's peak and time, and our plans at the budgets and at each rival's peak."""
    torch.manual_seed(0)
    workload = case.build()
    workload.model.to(device)
    size = case.size
    profile = profile_workload(
        workload, batch_sizes=(size,), precisions=("fp32",), device=str(device),
        progress=lambda message: print(f"  {case.name}: {message}", file=sys.stderr, flush=True),
    )  # fmt: skip
    steps = Steps(workload, size, device)
    profile = _whole_loss(profile)
    without_limit = optimize(profile, size)
    run = strategies(case, workload, device)
    sqrt = instead(without_limit, without_limit.baselines.sqrt)
    run["sqrt(L)"] = functools.partial(planned, workload.model, sqrt)
    rows: dict[str, Row] = {}
    for name, make in list(run.items()):
        try:
            steps.run(make())
        except RuntimeError as refusal:  # Of the rival's own code; ours must run.
            print(f"{case.name:12} {name:16} does not run: {refusal}", flush=True)
            del run[name]
            if name in ("plain", "sqrt(L)"):
                raise
            continue
        rows[name] = {"model": case.name, "strategy": name, "peak_memory_bytes": steps.peak_bytes(make())}
        print(f"{case.name:12} {name:16} peak {rows[name]['peak_memory_bytes'] / 2**20:9.1f} MiB", flush=True)
    whole = rows["plain"]["peak_memory_bytes"]
    budgets = {f"ours, {share:.0%}": int(share * whole) for share in BUDGETS}
    for name, row in rows.items():
        peak = row["peak_memory_bytes"]
        if name != "plain" and all(abs(peak / budget - 1) > 0.001 for budget in budgets.values()):
            budgets[f"ours for {name}"] = peak
    for name, budget in budgets.items():
        try:
            error = without_limit.prediction.error.peak_memory_bytes
            plan = optimize(profile, size, int(budget * (1 + error)) + 1)
        except NoFeasiblePlan:
            rows[name] = {"model": case.name, "strategy": name, "budget_bytes": budget, "plan": None}
            continue
        run[name] = functools.partial(planned, workload.model, plan)
        steps.run(run[name]())
        rows[name] = {
            "model": case.name, "strategy": name, "budget_bytes": budget,
            "peak_memory_bytes": steps.peak_bytes(run[name]()),
            "predicted_peak_memory_bytes": plan.prediction.peak_memory_bytes,
            "segments": [[s.first, s.last, s.mode] for s in plan.checkpoint],
        }  # fmt: skip
    compiled = {name: make for name, make in run.items() if name.startswith("compiler")}
    others = {name: make for name, make in run.items() if name not in compiled}
    timed = _in_turns(others, steps)
    # By themselves: what others put on the model makes the compiler start again, half a minute a step.
    for make in compiled.values():
        steps.run(make())
    timed |= _in_turns({"plain": run["plain"], **compiled}, steps) if compiled else {}
    for name, ratios in timed.items():
        rows[name] |= {
            "relative_step_seconds": statistics.median(ratios),
            "spread": (max(ratios) - min(ratios)) / 2,
        }
    return list(rows.values())


def _in_turns(run: dict[str, Callable[[], Applied]], steps: Steps) -> dict[str, list[float]]:
    """Of each strategy the step's time over the plain one's, round after round."""

    def seconds_of(name: str) -> float:
        gc.collect()
        return steps.run(run[name]())

    ratios, _ = in_turns(seconds_of, list(run), "plain", ROUNDS)
    return dict(zip(run, ratios, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Placements of ours beside what else one can do.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="one model")
    parser.add_argument(
        "--chunks", action="store_true", help="the tightest peaks with and without, no step is run"
    )
    parser.add_argument(
        "--ways", action="store_true", help="times with and without selective_narrow, no step is run"
    )
    options = parser.parse_args()
    if options.chunks:
        return chunks()
    if options.ways:
        return ways()
    device = devices.resolve(options.device)
    cases = ON_CUDA if device.type == "cuda" else ON_CPU
    rows: list[Row] = []
    name = name_on("placement", devices.describe(device))
    head = provenance(f"python -m studies.placement --device {options.device}")
    for case in cases:
        if options.only not in (None, case.name):
            continue
        of_case = measured(case, device)
        for row in of_case:
            print(line(row), flush=True)
        rows += of_case
        print(f"written to {write(name, head | {'device': devices.describe(device).name, 'rows': rows})}")
        draw(rows, name)
    worse = [each for each in beside_rivals(rows) if each.worse]
    for each in beside_rivals(rows):
        print(each.text)
    return 1 if worse else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A rival beside the plan of ours for its peak: of those within it the one that needs most."""

    model: str
    rival: str
    ours: str
    difference: float
    """Of their times over the plain one, ours less the rival's."""
    noise: float
    """Both half ranges over the rounds together."""

    @property
    def worse(self) -> bool:
        return self.difference > self.noise

    @property
    def text(self) -> str:
        verdict = "WORSE" if self.worse else "better" if self.difference < -self.noise else "as fast"
        return (
            f"{self.model:12} {self.ours:28} beside {self.rival:14} "
            f"{self.difference:+.3f} of a plain step (noise {self.noise:.3f}): {verdict}"
        )


def beside_rivals(rows: Sequence[Row]) -> list[Beside]:
    """Every rival that recomputes beside ours at its peak."""
    timed = [row for row in rows if "relative_step_seconds" in row]
    found = []
    for rival in timed:
        if rival["strategy"] == "plain" or rival["strategy"].startswith("ours"):
            continue
        within = [
            row
            for row in timed
            if row["model"] == rival["model"]
            and row["strategy"].startswith("ours")
            and row["peak_memory_bytes"] <= 1.001 * rival["peak_memory_bytes"]
        ]
        if not within:
            continue
        ours = max(within, key=lambda row: row["peak_memory_bytes"])
        found.append(
            Beside(
                model=rival["model"],
                rival=rival["strategy"],
                ours=ours["strategy"],
                difference=ours["relative_step_seconds"] - rival["relative_step_seconds"],
                noise=ours["spread"] + rival["spread"],
            )
        )
    return found


def chunks(size: int = 8, sequence_length: int = 1024) -> int:
    """The least that GPT-2 small needs for a large micro-batch, with the loss whole and in chunks."""
    gains = []
    for device in ("h200-141gb", "cpu"):
        profile = unmeasured(device, size, sequence_length)
        least = Weights(time=0.0, memory=1.0)
        whole = optimize(_whole_loss(profile), size, weights=least).prediction
        in_chunks = optimize(profile, size, weights=least)
        peak = in_chunks.prediction.peak_memory_bytes
        gains.append(1 - peak / whole.peak_memory_bytes)
        tightest = in_chunks.prediction
        print(
            f"GPT-2 small, {size} x {sequence_length:,} tokens, fp32, {device}: the tightest plan needs "
            f"{whole.peak_memory_bytes / 2**30:.2f} GiB with the loss whole ({whole.peak_at}), {peak / 2**30:.2f} GiB "
            f"in {in_chunks.loss_chunks} chunks ({tightest.peak_at}): {gains[-1]:.0%} less"
        )
    return 0 if max(gains) >= 0.4 else 1


def unmeasured(device: str, size: int, sequence_length: int) -> Profile:
    """GPT-2 small for a device without running it."""
    with without_memory():
        workload = gpt2(sequence_length)
    return profile_unmeasured(
        workload, (size,), ("fp32",), target_of(device, ("fp32",)), optimizer="adamw", watts=None, spec=None,
        progress=lambda message: None, trying_bytes=0,
    )  # fmt: skip


def ways(size: int = 8, sequence_length: int = 1024) -> int:
    """How much longer than the plain step the plans of GPT-2 small take at shares of its peak."""
    for device in ("h200-141gb", "cpu"):
        profile = _whole_loss(unmeasured(device, size, sequence_length))
        plain = optimize(profile, size).prediction
        for share in (0.9, 0.8, 0.7, 0.6, 0.5):
            budget = int(share * plain.peak_memory_bytes * (1 + plain.error.peak_memory_bytes))
            longer = [
                optimize(each, size, budget).prediction.step_seconds / plain.step_seconds - 1
                for each in (_without_narrow(profile), profile)
            ]
            print(
                f"GPT-2 small, {size} x {sequence_length:,} tokens, fp32, {device}, {share:.0%} of the plain peak: "
                f"{longer[0]:+.2%} with one kind of selective segment, {longer[1]:+.2%} with both"
            )
    return 0


def _without_narrow(profile: Profile) -> Profile:
    def stripped(memory: PrecisionMemory | None) -> PrecisionMemory | None:
        if memory is None:
            return None
        stages = (msgspec.structs.replace(stage, selective_narrow=None) for stage in memory.stages)
        return msgspec.structs.replace(memory, stages=tuple(stages))

    return msgspec.structs.replace(
        profile,
        precisions=tuple(
            msgspec.structs.replace(
                each, memory=stripped(each.memory), memory_at_one=stripped(each.memory_at_one)
            )
            for each in profile.precisions
        ),
    )


def _whole_loss(profile: Profile) -> Profile:
    """A loss in chunks is another model to the rivals' eyes."""
    precisions = tuple(msgspec.structs.replace(each, chunked_head=None) for each in profile.precisions)
    return msgspec.structs.replace(profile, precisions=precisions)


def line(row: Row) -> str:
    if row.get("plan", ...) is None:
        return f"{row['model']:12} {row['strategy']:28} no plan within {row['budget_bytes'] / 2**20:.1f} MiB"
    return (
        f"{row['model']:12} {row['strategy']:28} peak {row['peak_memory_bytes'] / 2**20:9.1f} MiB   "
        f"time {row['relative_step_seconds']:.3f} of plain (± {row['spread']:.3f})"
    )


def draw(rows: Sequence[Row], name: str) -> None:
    """Memory on one axis, time on the other."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.2), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        of_model = [row for row in rows if row["model"] == model and "relative_step_seconds" in row]
        kinds: dict[str, list[Row]] = {
            "ours": [],
            "compiler": [],
            "sequential": [],
            "sac_milp": [],
            "other": [],
        }
        for row in of_model:
            kind = next((k for k in kinds if row["strategy"].startswith(k)), "other")
            kinds[kind].append(row)
        for kind, marker in (
            ("ours", "o-"),
            ("compiler", "s"),
            ("sequential", "^"),
            ("sac_milp", "v"),
            ("other", "D"),
        ):
            points = sorted((r["peak_memory_bytes"] / 2**20, r["relative_step_seconds"]) for r in kinds[kind])
            if points:
                panel.plot(*zip(*points, strict=True), marker, label=kind, markersize=5, linewidth=1)
        for row in kinds["other"]:
            panel.annotate(
                row["strategy"], (row["peak_memory_bytes"] / 2**20, row["relative_step_seconds"]),
                textcoords="offset points", xytext=(4, 4), fontsize=8,
            )  # fmt: skip
        panel.set_title(model)
        panel.set_xlabel("peak memory, MiB")
        panel.set_ylabel("step time over the plain step's")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())

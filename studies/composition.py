"""How far is a composed peak from the executed one?

A profile holds curves of single windows, traced from one plain step; planner/memory.py composes the peak of
any plan from them. Here random plans are composed, and then run with their segments while the allocator tells its
peak:

    random placement, b, k, precision ──▶ timeline ──▶ predicted peak ─┐
                        │                                             ├──▶ relative error
                        └──▶ Checkpoints, two real steps ─▶ allocator ┘

The largest error over all plans is what ``planner.cost.COMPOSITION_ERROR`` states.

    python -m studies.composition --plans 20
    python -m studies.composition --only resnet50
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torchvision

from executor.recompute import Checkpoints, Stretch, nest
from planner.cost import COMPOSITION_ERROR
from planner.memory import peak_window, timeline
from planner.nested import PLAIN, Placed, depths
from profiler.allocator import measure_step
from profiler.chain import Call, Stage, discover, recomputable_stages
from profiler.memory import MemoryTracer
from profiler.profile_record import Precision, PrecisionMemory
from profiler.timing import stepper_for
from profiler.workload import Workload
from profiler.workspaces import Workspaces
from studies.accuracy import random_placed, selectable
from studies.runs import picked
from studies.workloads import classifier, gpt2_of_three_blocks, mlp

TRACED_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


Curves = Callable[[Precision, bool], PrecisionMemory]
"""What is known at a precision, for micro-batches of one sample or for larger ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The knobs of a plan that its peak depends on."""

    placed: Placed
    micro_batch_size: int
    gradient_accumulation_steps: int
    precision: Precision


def predicted_peak_bytes(memory: PrecisionMemory, setting: Setting) -> int:
    """The peak of a step as composed from curves, with all micro-batches of the step resident."""
    return peak_window(
        timeline(
            memory,
            setting.placed,
            micro_batch_size=setting.micro_batch_size,
            gradient_accumulation_steps=setting.gradient_accumulation_steps,
            resident_batches=setting.gradient_accumulation_steps,
        )
    ).total_bytes


def executed_peak_bytes(
    workload: Workload, stages: Sequence[Stage], setting: Setting, *, optimizer: str = "adamw"
) -> int:
    """The allocator's peak over the second step of the plan on the CPU; the first makes the optimizer's state.

    The learning rate is zero.
    """
    model, k = workload.model, setting.gradient_accumulation_steps
    batches = [workload.batch(setting.micro_batch_size) for _ in range(k)]
    checkpoints = Checkpoints(model, stretches(stages, setting.placed))
    try:
        stepper = stepper_for(workload, optimizer, setting.precision, torch.device("cpu"))
        stepper.step(batches, k)
        step = functools.partial(stepper.step, batches, k)
        return measure_step(step, model, stepper.optimizer, batches, torch.device("cpu")).peak_bytes
    finally:
        checkpoints.remove()


def tracer_of(
    workload: Workload, stages: Sequence[Stage], batch_sizes: Sequence[int], optimizer: str = "adamw"
) -> MemoryTracer:
    """A tracer that knows the scratch memory of real steps at these micro-batch sizes, at every precision."""
    workspaces = Workspaces(torch.device("cpu"))
    for precision, size in itertools.product(TRACED_PRECISIONS, batch_sizes):
        stepper = stepper_for(workload, optimizer, precision, torch.device("cpu"))
        with workspaces.watching():
            stepper.step([workload.batch(size) for _ in range(2)], 2)
    return MemoryTracer(workload, stages, optimizer, workspaces=workspaces)


def stretches(stages: Sequence[Stage], placed: Placed) -> tuple[Stretch, ...]:
    """A placement on stages as what the executor's hooks understand."""
    entries = [Call.parse(stage.entry) for stage in stages]
    ends = [*entries, None]
    segments = nest(
        (depth, Stretch(entries[start], ends[stop]))
        for depth, (start, stop) in zip(depths(placed.segments), placed.segments, strict=True)
    )
    selective = (Stretch(entries[i], ends[i + 1], keeping=how) for i, how in placed.keeping.items())
    return (*segments, *selective)


def random_settings(
    stages: Sequence[Stage], curves: Curves, batch_sizes: Sequence[int], count: int, seed: int
) -> Iterator[Setting]:
    """The plain plan first, then random ones."""
    generator = random.Random(seed)
    allowed = recomputable_stages(stages)
    for index in range(count):
        b, precision = generator.choice(batch_sizes), generator.choice(TRACED_PRECISIONS)
        selective = selectable(curves(precision, b == 1))
        yield Setting(
            placed=random_placed(allowed, selective, generator) if index else PLAIN,
            micro_batch_size=b,
            gradient_accumulation_steps=generator.choice((1, 2, 3)),
            precision=precision,
        )


MODELS: dict[str, Callable[[], Workload]] = {
    "gpt2, 3 blocks": gpt2_of_three_blocks,
    "resnet50": lambda: classifier(torchvision.models.resnet50(num_classes=10), 3, 64, 64),
    "vit_b_16": lambda: classifier(torchvision.models.vit_b_16(num_classes=10), 3, 224, 224),
    "mlp": mlp,
}
BATCH_SIZES = (1, 2, 3, 4, 8)
TRACED_SIZES = (2, 8)


def errors_of(workload: Workload, plans: int, seed: int) -> list[tuple[Setting, int, int]]:
    """``(setting, predicted bytes, executed bytes)`` of random plans of one workload."""
    stages = discover(workload)
    tracer = tracer_of(workload, stages, (1, *TRACED_SIZES))

    @functools.cache
    def curves(precision: Precision, at_one: bool) -> PrecisionMemory:
        return tracer.memory(precision, (1, 1) if at_one else TRACED_SIZES)

    return [
        (
            setting,
            predicted_peak_bytes(curves(setting.precision, setting.micro_batch_size == 1), setting),
            executed_peak_bytes(workload, stages, setting),
        )
        for setting in random_settings(stages, curves, BATCH_SIZES, plans, seed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against executed peaks of random plans.")
    parser.add_argument("--plans", type=int, default=20, help="random plans per model")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    errors: list[float] = []
    for name in picked(parser, MODELS, str, options.only):
        build = MODELS[name]
        for setting, predicted, executed in errors_of(build(), options.plans, options.seed):
            errors.append(predicted / executed - 1)
            print(
                f"{name:15} {setting.precision} b={setting.micro_batch_size:<3} "
                f"k={setting.gradient_accumulation_steps} predicted {predicted / 2**20:9.2f} MiB, "
                f"executed {executed / 2**20:9.2f} MiB, error {errors[-1]:+.4%}  {setting.placed}",
                flush=True,
            )
    sizes = [abs(error) for error in errors]
    print(
        f"{len(errors)} plans: largest error {max(sizes):.4%}, mean {sum(sizes) / len(sizes):.4%}, "
        f"exact to the byte in {sizes.count(0.0)}; stated as COMPOSITION_ERROR: {COMPOSITION_ERROR:.2%}"
    )


if __name__ == "__main__":
    main()

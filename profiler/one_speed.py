"""Times of several micro-batch sizes and precisions, as of one speed of the device.

They are measured one after the other, and meanwhile a shared machine's speed changes. A plan chooses among them, so
what counts is how they compare. Each was measured beside a yardstick of its own, a forward pass (yardstick.py);
at the end all yardsticks run once more, in turns, where whatever the speed is by then is the same for all:

    fp32 x 1 │ 0.30 s  yardstick 0.10   ─▶  in turns 0.10  ─▶  0.30 s
    fp32 x 4 │ 1.60 s  yardstick 0.56   ─▶  in turns 0.38  ─▶  1.09 s      other work ran while this was timed

What differs by less than the yardstick's own noise stays as it was measured.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec
import torch

from profiler.profile_record import ChunkedHead, Precision, PrecisionProfile, StageTime, StepTime
from profiler.timing import stepper_for
from profiler.workload import Workload
from profiler.yardstick import Yardstick

ROUNDS = 3

STEP_SECONDS = 0.25
"""In each round a yardstick runs as long as beside a step of this length, and once at least."""

NOISE = 0.05
"""A yardstick says nothing about speeds that differ by less."""


class Seconds(NamedTuple):
    """Of a yardstick, on the wall clock and on the process's own."""

    wall: float
    cpu: float


Clock = Literal["wall", "cpu"]

Timed = tuple[Precision, int]
"""A precision and a micro-batch size."""


def in_turns(
    workload: Workload, timed: Sequence[Timed], optimizer: str, device: torch.device
) -> dict[Timed, Seconds]:
    """The yardsticks of all that was timed, round after round, as the median of the rounds."""
    found: dict[Timed, list[Seconds]] = defaultdict(list)
    for _ in range(ROUNDS):
        for precision, size in timed:
            stepper = stepper_for(workload, optimizer, precision, device)
            yardstick = Yardstick.of(stepper, workload.batch(size), device)
            yardstick.beside(STEP_SECONDS)
            found[precision, size].append(Seconds(yardstick.wall_seconds(), yardstick.cpu_seconds()))
    return {
        each: Seconds(*(statistics.median(clock) for clock in zip(*seconds, strict=True)))
        for each, seconds in found.items()
    }


def at_one_speed(measured: PrecisionProfile, yardsticks: Mapping[Timed, Seconds]) -> PrecisionProfile:
    """The times of a precision as they would be at the speed that the device had for ``yardsticks``."""

    def factors(clock: Clock, steps: Sequence[StepTime]) -> list[float]:
        found = ((step, yardsticks[measured.precision, step.micro_batch_size]) for step in steps)
        return [_factor(step, getattr(seconds, clock)) for step, seconds in found]

    wall = factors("wall", measured.wall)
    cpu = [] if measured.process_cpu is None else factors("cpu", measured.process_cpu)
    head = measured.chunked_head
    return msgspec.structs.replace(
        measured,
        wall=_times(measured.wall, wall),
        process_cpu=None if measured.process_cpu is None else _times(measured.process_cpu, cpu),
        chunked_head=None if head is None else _head(head, wall, cpu),
    )


def _factor(step: StepTime, yardstick_seconds: float) -> float:
    """By how much slower than when the step was timed; 1 where that is not known, or noise."""
    if step.yardstick_seconds is None:
        return 1.0
    factor = yardstick_seconds / step.yardstick_seconds
    return factor if abs(factor - 1) > NOISE else 1.0


Times = TypeVar("Times", StepTime, StageTime)


def _times(steps: Sequence[Times], factors: Sequence[float]) -> tuple[Times, ...]:
    return tuple(_scaled(step, factor) for step, factor in zip(steps, factors, strict=True))


def _scaled(times: Times, factor: float) -> Times:
    """All that is in seconds, multiplied."""
    changes: dict[str, object] = {
        name: value * factor
        for name in times.__struct_fields__
        if name.endswith("_seconds") and (value := getattr(times, name)) is not None
    }
    if isinstance(times, StepTime):
        changes["stages"] = tuple(_scaled(stage, factor) for stage in times.stages)
    return msgspec.structs.replace(times, **changes)


def _head(head: ChunkedHead, wall: Sequence[float], cpu: Sequence[float]) -> ChunkedHead:
    """It was timed at the speed of the whole step that it belongs to."""
    return msgspec.structs.replace(
        head,
        wall=_times(head.wall, wall),
        process_cpu=None if head.process_cpu is None else _times(head.process_cpu, cpu),
    )

"""The best plan, with the proof that it is.

    for every micro-batch b with b * k == global batch, for every profiled precision:
        placement frontier: all (peak, time) worth having, exact          (planner/placement.py)
    the cheapest point of all of them under C that fits the budget

Every plan of the space is on one of these frontiers or beaten by a point of it in both peak and time, and C
rises with both, so the scan's minimum is the minimum over all plans: ``lower_bound == cost``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from planner.cost import (
    memory_error,
    name_segments,
    objective,
    predict,
    resident_batches,
)
from planner.memory import optimizer_peak_bytes, plan_units
from planner.placement import Frontier, Segments, pareto, sqrt_segments
from planner.plan import Baselines, Choice, NoFeasiblePlan, Objective, Plan, Weights
from planner.time import at_micro_batch, segment_nanoseconds, step_parts
from profiler import records
from profiler.profile_record import PRECISIONS, Precision, PrecisionProfile, Profile

FRONT_POINTS = 24
"""How many plans of the front a plan document carries at most, spread evenly over memory."""

ROUNDING = 1e-6
"""Relative difference that comes from searching in whole nanoseconds and reporting in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """One (b, k, precision) with its whole placement frontier."""

    measured: PrecisionProfile
    micro_batch_size: int
    gradient_accumulation_steps: int
    base_seconds: float
    floor_bytes: int
    frontier: Frontier

    def points(self) -> Iterator[tuple[float, int, int]]:
        """``(step_seconds, peak_bytes, index)`` of every placement worth having."""
        k = self.gradient_accumulation_steps
        for index, (peak, nanoseconds) in enumerate(self.frontier.points):
            yield self.base_seconds + k * nanoseconds / 1e9, max(int(peak), self.floor_bytes), index


def optimize(
    profile: Profile,
    global_batch_size: int,
    memory_budget_bytes: int | None = None,
    weights: Weights | None = None,
    world_size: int = 1,
    *,
    precisions: Sequence[Precision] | None = None,
    zero_stages: Sequence[int] = (0,),
) -> Plan:
    """The plan that minimises C among all that fit ``memory_budget_bytes`` (None: no limit).

    A plan fits when its predicted peak plus the stated error is within the budget. Raises ``NoFeasiblePlan``
    when none does, ValueError for bad arguments.
    """
    weights = weights or Weights()
    _check_arguments(profile, global_batch_size, memory_budget_bytes, weights, world_size, zero_stages)
    chosen = _precisions(profile, precisions)
    candidates = [
        _candidate(profile, measured, b, global_batch_size // b)
        for measured in chosen
        for b in _micro_batch_sizes(profile, global_batch_size)
    ]
    limit = _limit(profile, memory_budget_bytes)
    baselines = _baselines(profile, chosen[0], global_batch_size, limit)
    reference = baselines.plain.prediction

    def cost(seconds: float, peak: int) -> float:
        value = weights.time * seconds / reference.step_seconds
        return value + weights.memory * peak / reference.peak_memory_bytes

    rows = [
        (cost(seconds, peak), candidate.gradient_accumulation_steps, seconds, peak, candidate, index)
        for candidate in candidates
        for seconds, peak, index in candidate.points()
    ]
    feasible = [row for row in rows if row[3] <= limit]
    if not feasible:
        raise _infeasible(profile, min(rows, key=lambda row: (row[3], row[2])), limit, memory_budget_bytes)
    lower_bound, _, _, _, best, index = min(feasible, key=lambda row: row[:4])
    choice = _choice(profile, best, index, limit)
    value = objective(choice.prediction, reference, weights)
    proven = abs(value - lower_bound) <= ROUNDING * value
    return Plan(
        model=profile.model,
        workload=profile.workload,
        profile_sha256=records.sha256(profile),
        device=profile.device,
        optimizer=profile.optimizer,
        micro_batch_size=choice.micro_batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        world_size=world_size,
        global_batch_size=global_batch_size,
        precision=choice.precision,
        zero_stage=choice.zero_stage,
        checkpoint=choice.checkpoint,
        memory_budget_bytes=memory_budget_bytes,
        prediction=choice.prediction,
        objective=Objective(
            cost=value,
            weights=weights,
            lower_bound=value if proven else lower_bound,
            optimal=proven,
            plans_considered=len(rows),
        ),
        baselines=baselines,
        front=tuple(_choice(profile, row[4], row[5], limit) for row in _front(rows)),
    )


def _check_arguments(
    profile: Profile,
    global_batch_size: int,
    memory_budget_bytes: int | None,
    weights: Weights,
    world_size: int,
    zero_stages: Sequence[int],
) -> None:
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}.")
    if memory_budget_bytes is not None and memory_budget_bytes < 1:
        raise ValueError(f"memory_budget_bytes must be at least 1, got {memory_budget_bytes}.")
    if world_size != 1:
        raise ValueError(
            f"world_size must be 1, got {world_size}: this profile holds no measurement of communication."
        )
    if tuple(zero_stages) != (0,):
        raise ValueError(
            f"zero_stages must be 0 with world_size 1, got {', '.join(map(str, zero_stages))}: "
            "there is nothing to shard."
        )
    if weights.energy:
        raise ValueError(
            "A positive energy weight needs a source of energy, and this profile has none: no NVML counter, "
            "no readable RAPL, no stated watts. Set --energy-weight 0, or profile on a device where one can "
            "be read."
        )


def _precisions(profile: Profile, wanted: Sequence[Precision] | None) -> list[PrecisionProfile]:
    names = tuple(wanted) if wanted is not None else tuple(p.precision for p in profile.precisions)
    missing = [name for name in names if profile.at(name) is None]
    if missing or not names:
        hopeless = {h.precision: h.slowdown for h in profile.hopeless}
        reasons = [
            f"{name} ({hopeless[name]:.1f} times slower than fp32 here)" if name in hopeless else name
            for name in missing
        ]
        there = ", ".join(p.precision for p in profile.precisions)
        raise PrecisionNotProfiled(
            f"The profile holds {there}, not {', '.join(reasons) or 'no precision at all'}. "
            "Profile again with --precision, or leave it out."
        )
    return [measured for name in PRECISIONS if name in names and (measured := profile.at(name)) is not None]


class PrecisionNotProfiled(ValueError):
    """The profile does not hold a precision that was asked for."""


def _micro_batch_sizes(profile: Profile, global_batch_size: int) -> list[int]:
    low, high = profile.micro_batch_sizes[0], profile.micro_batch_sizes[-1]
    sizes = [b for b in range(low, min(high, global_batch_size) + 1) if global_batch_size % b == 0]
    if not sizes:
        raise ValueError(
            f"global_batch_size must be a multiple of a micro-batch size between {low} and {high}, the "
            f"profiled range, got {global_batch_size}. Profile other sizes with --batch."
        )
    return sizes


def _limit(profile: Profile, memory_budget_bytes: int | None) -> float:
    """The largest predicted peak that still fits when the stated error is added."""
    return np.inf if memory_budget_bytes is None else memory_budget_bytes / (1 + memory_error(profile))


def _candidate(profile: Profile, measured: PrecisionProfile, b: int, k: int) -> _Candidate:
    times = at_micro_batch(measured.wall, b)
    resident = resident_batches(profile, k)
    memory = measured.memory_at(b)
    units = plan_units(
        memory,
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        resident_batches=resident,
        keep_cost=np.zeros(len(profile.stages), dtype=np.int64),
        segment_cost=segment_nanoseconds(times),
        recomputable=np.array([stage.recomputable for stage in profile.stages]),
    )
    return _Candidate(
        measured=measured,
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        base_seconds=sum(step_parts(times, k, ()).values()),
        floor_bytes=optimizer_peak_bytes(memory, b, resident),
        frontier=pareto(units),
    )


def _choice(profile: Profile, candidate: _Candidate, index: int, limit: float) -> Choice:
    return _describe(
        profile, candidate.measured, candidate.micro_batch_size, candidate.gradient_accumulation_steps,
        candidate.frontier.segments(index), limit,
    )  # fmt: skip


def _describe(
    profile: Profile, measured: PrecisionProfile, b: int, k: int, segments: Segments, limit: float
) -> Choice:
    prediction = predict(
        profile, measured, micro_batch_size=b, gradient_accumulation_steps=k, segments=segments
    )
    return Choice(
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        precision=measured.precision,
        zero_stage=0,
        checkpoint=name_segments(profile, segments),
        prediction=prediction,
        fits=prediction.peak_memory_bytes <= limit,
    )


def _baselines(
    profile: Profile, measured: PrecisionProfile, global_batch_size: int, limit: float
) -> Baselines:
    """What one would do by hand: the largest micro-batch, the first precision, the well-known placements."""
    b = _micro_batch_sizes(profile, global_batch_size)[-1]

    def baseline(segments: Segments) -> Choice:
        return _describe(profile, measured, b, global_batch_size // b, segments, limit)

    spans = blocks(profile)
    grouped = sqrt_segments(len(spans)) if spans else ()
    sqrt = tuple((spans[i][0], spans[j - 1][1]) for i, j in grouped)
    return Baselines(plain=baseline(()), sqrt=baseline(sqrt), every_block=baseline(tuple(spans)))


def blocks(profile: Profile) -> list[tuple[int, int]]:
    """The recomputable stages grouped as a person would: the stages of ``transformer.h.3`` are one block."""
    allowed = [i for i, stage in enumerate(profile.stages) if stage.recomputable]
    groups = (
        list(group)
        for _, group in groupby(allowed, key=lambda i: _block_name(profile.stages[i].name) or str(i))
    )
    return [(group[0], group[-1] + 1) for group in groups]


def _block_name(stage: str) -> str | None:
    """The longest leading part of a module's name that ends in a number."""
    found = re.match(r"(?:[^.]+\.)*[^.]*\d(?=\.|$|#|@)", stage)
    return found.group(0) if found else None


Row = tuple[float, int, float, int, _Candidate, int]


def _front(rows: list[Row]) -> list[Row]:
    """The rows that no other beats in both time and peak, thinned to ``FRONT_POINTS``, by rising peak."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[3], row[2], row[1])):
        if not front or row[2] < front[-1][2]:
            front.append(row)
    if len(front) <= FRONT_POINTS:
        return front
    low, high = front[0][3], front[-1][3]
    steps = [low + (high - low) * n / (FRONT_POINTS - 1) for n in range(FRONT_POINTS)]
    picked = {max(i for i, row in enumerate(front) if row[3] <= step) for step in steps}
    return [front[i] for i in sorted(picked)]


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.3f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"


def _infeasible(profile: Profile, row: Row, limit: float, budget: int | None) -> NoFeasiblePlan:
    choice = _choice(profile, row[4], row[5], limit)
    margin = memory_error(profile)
    count = len(choice.checkpoint)
    recomputed = f"{count} segments recomputed" if count else "nothing recomputed"
    return NoFeasiblePlan(
        f"No plan fits {_size(budget or 0)}: the tightest needs "
        f"{_size(choice.prediction.peak_memory_bytes * (1 + margin))} "
        f"({choice.precision}, micro-batch {choice.micro_batch_size}, "
        f"k = {choice.gradient_accumulation_steps}, {recomputed}; {margin:.1%} margin included). "
        "Raise --memory-budget, or profile smaller micro-batches or other precisions.",
        choice.prediction,
    )

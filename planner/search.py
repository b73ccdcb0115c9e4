"""The best plan, with the proof that it is.

    for every micro-batch b with b * k * world == global batch, every profiled precision, every ZeRO stage:
        placement frontier: all (peak, time) worth having, exact          (planner/placement.py)
    the cheapest point of all of them under C that fits the budget
    where none fits: the same with segments inside segments               (planner/nested.py)

Every plan of the space is on one of these frontiers or beaten by a point of it in both peak and time. Within a
frontier energy is a constant plus watts of the forward pass times recomputed seconds, so it rises exactly with time,
and what is beaten in peak and time is beaten in energy too. C rises with all three, so the scan's minimum is the
minimum over all plans: ``lower_bound == cost``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.calibration import Calibration
from planner.communication import ALONE, Distribution, catalogue_link
from planner.cost import (
    course_of,
    instead,
    memory_error,
    memory_of_process,
    name_segments,
    objective,
    predict,
    resident_batches,
    seconds_by_kind,
    stages_of,
    weighed,
)
from planner.energy import step_joules, watts_at
from planner.memory import constant_bytes, optimizer_peak_bytes, plan_nest, plan_units
from planner.nested import PLAIN, Placed, Segments, Solution, nested
from planner.placement import Frontier, Units, pareto, sqrt_segments
from planner.plan import Asked, Baselines, Choice, Cost, NoFeasiblePlan, Objective, Plan, Prediction, Weights
from planner.sizes import size_text
from planner.time import at_micro_batch, segment_nanoseconds, selective_seconds
from planner.zero import SEVERAL_PRECISIONS, ZERO_STAGES
from profiler import records
from profiler.profile_record import (
    KEEPINGS,
    PRECISIONS,
    Link,
    Precision,
    PrecisionMemory,
    PrecisionProfile,
    Profile,
    StageRecord,
    StepTime,
    bytes_at,
)

FRONT_POINTS = 24
"""How many plans of the front a plan document carries at most, spread evenly over memory."""

CHUNKS_ERROR = 0.02
"""To state of a peak with the loss in chunks: a small model was 1.1% above its prediction (tests/test_chunked.py)."""

ROUNDING = 1e-6
"""Relative difference that comes from searching in whole nanoseconds and reporting in seconds."""


@dataclass(frozen=True, slots=True)
class _SingleLevel:
    """The frontier over all placements without segments inside segments, which leaves out what is constant."""

    units: Units
    frontier: Frontier
    constant_bytes: int

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        return tuple((need + self.constant_bytes, cost) for need, cost in self.frontier.points)

    def placed(self, index: int) -> Placed:
        """The placement behind a point."""
        options = (self.units.options[number] for number in self.frontier.options(index))
        return Placed.of(self.frontier.segments(index), ((option.stage, option.way) for option in options))


class _Searched:
    """Every frontier so far: candidates that differ in what is constant, as ZeRO stages 0 and 1 do, share theirs."""

    def __init__(self) -> None:
        self._found: list[tuple[Units, Frontier]] = []

    def frontier(self, units: Units) -> Frontier:
        """That of ``planner.placement.pareto``."""
        for known, frontier in self._found:
            if known.same_as(units):
                return frontier
        frontier = pareto(units)
        self._found.append((units, frontier))
        return frontier


@dataclass(frozen=True, slots=True)
class _Nested:
    """The frontier over all placements; its tables leave out what is constant."""

    solution: Solution
    constant_bytes: int

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        return tuple((need + self.constant_bytes, cost) for need, cost in self.solution.points)

    def placed(self, index: int) -> Placed:
        """The placement behind a point."""
        return self.solution.placed(self.solution.points[index][0])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """One (b, k, precision, ZeRO stage) with its whole placement frontier."""

    distribution: Distribution
    measured: PrecisionProfile
    loss_chunks: int | None
    micro_batch_size: int
    gradient_accumulation_steps: int
    base_seconds: float
    floor_bytes: int
    placements: _SingleLevel | _Nested
    memory: PrecisionMemory
    base_joules: float | None
    recompute_watts: float

    @property
    def knobs(self) -> Knobs:
        return Knobs(
            self.gradient_accumulation_steps,
            self.measured.precision,
            self.distribution.zero_stage,
            self.loss_chunks,
        )

    def points(self) -> Iterator[tuple[float, int, float | None, int]]:
        """``(step_seconds, peak_bytes, step_joules, index)`` of every placement worth having."""
        k = self.gradient_accumulation_steps
        for index, (peak, nanoseconds) in enumerate(self.placements.points):
            recompute = k * nanoseconds / 1e9
            joules = None if self.base_joules is None else self.base_joules + self.recompute_watts * recompute
            yield self.base_seconds + recompute, max(int(peak), self.floor_bytes), joules, index


def optimize(
    profile: Profile,
    global_batch_size: int,
    memory_budget_bytes: int | None = None,
    weights: Weights | None = None,
    world_size: int = 1,
    *,
    precisions: Sequence[Precision] | None = None,
    zero_stages: Sequence[int] = (0,),
    link: Link | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan that minimises C among all that fit ``memory_budget_bytes`` (None: no limit).

    A plan fits when its predicted peak plus the stated error is within the budget. ``link`` is how fast
    ``world_size`` processes reach each other: if not given, as the profile measured it, or as the catalogue has it.
    ``calibration`` is what verifications taught about the profile's device (planner/calibration.py) and decides on
    stated errors.
    Raises ``NoFeasiblePlan`` when none does, ValueError for bad arguments.
    """
    return space(
        profile, global_batch_size, memory_budget_bytes, weights, world_size, precisions=precisions,
        zero_stages=zero_stages, link=link, calibration=calibration,
    ).plan()  # fmt: skip


def space(
    profile: Profile,
    global_batch_size: int,
    memory_budget_bytes: int | None = None,
    weights: Weights | None = None,
    world_size: int = 1,
    *,
    precisions: Sequence[Precision] | None = None,
    zero_stages: Sequence[int] = (0,),
    link: Link | None = None,
    calibration: Calibration | None = None,
) -> Space:
    """All plans that ``optimize`` would choose from, for who wants more of them than the best."""
    weights = weights or Weights()
    _check_arguments(profile, global_batch_size, memory_budget_bytes, weights)
    distributions = _distributions(profile, world_size, zero_stages, link)
    chosen = _within(memory_budget_bytes, _precisions(profile, precisions, world_size))
    plainest, largest = _plainest(profile, chosen, global_batch_size, world_size)
    candidates = _Candidates(profile, global_batch_size)
    ways = candidates.ways(distributions, chosen)
    terms = _Terms.of(profile, memory_budget_bytes, calibration, world_size)
    by_hand = replace(distributions[0], zero_stage=0)
    baselines = _baselines(profile, plainest, global_batch_size, largest, by_hand, terms)
    return Space(
        profile,
        global_batch_size,
        world_size,
        memory_budget_bytes,
        weights,
        candidates,
        ways,
        terms,
        baselines,
    )


class Knobs(NamedTuple):
    """All of a plan but where it recomputes."""

    gradient_accumulation_steps: int
    precision: Precision
    zero_stage: int
    loss_chunks: int | None

    @classmethod
    def of(cls, choice: Choice) -> Knobs:
        """Those of a plan."""
        return cls(
            choice.gradient_accumulation_steps, choice.precision, choice.zero_stage, choice.loss_chunks
        )


_Way = tuple[Distribution, Precision, int | None, int]
"""How a step is spread, its precision, the chunks of its loss, its micro-batch."""


class _Candidates:
    """The candidates of one profile and global batch, each found when it is first asked for and then kept."""

    def __init__(self, profile: Profile, global_batch_size: int) -> None:
        self._profile = profile
        self._global_batch_size = global_batch_size
        self._found: dict[tuple[_Way, bool], _Candidate] = {}
        self._searched = _Searched()

    def ways(
        self,
        distributions: Sequence[Distribution],
        precisions: Sequence[PrecisionProfile],
        chunked: bool = True,
    ) -> tuple[_Way, ...]:
        """All that there are for these distributions and precisions; ``chunked``: the loss in chunks as well."""
        return tuple(
            (distribution, measured.precision, loss_chunks, b)
            for distribution in distributions
            for measured in precisions
            for loss_chunks in (_loss_chunks(measured, distribution) if chunked else (None,))
            for b in _micro_batch_sizes(measured, self._global_batch_size, distribution.world_size)
        )

    def at(self, way: _Way, *, deeper: bool = False) -> _Candidate:
        """The candidate; ``deeper``: with segments inside segments."""
        if (way, deeper) not in self._found:
            if deeper:
                self._found[way, deeper] = _deeper(self._profile, self.at(way))
            else:
                distribution, precision, loss_chunks, b = way
                (measured,) = _precisions(self._profile, (precision,), distribution.world_size)
                k = self._global_batch_size // (b * distribution.world_size)
                self._found[way, deeper] = _candidate(
                    self._profile, measured, loss_chunks, b, k, distribution, self._searched
                )
        return self._found[way, deeper]


class Space:
    """Every candidate with its frontier, and on what terms plans are compared.

    Where no placement fits, segments inside segments are considered as well, unless ``deeper`` is False.
    """

    def __init__(
        self, profile: Profile, global_batch_size: int, world_size: int, memory_budget_bytes: int | None,
        weights: Weights, candidates: _Candidates, ways: tuple[_Way, ...], terms: _Terms, baselines: Baselines,
        *, deeper: bool = True,
    ) -> None:  # fmt: skip
        self.profile = profile
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.memory_budget_bytes = memory_budget_bytes
        self.weights = weights
        self.baselines = baselines
        self._terms = terms
        self._shared = candidates
        self._ways = ways
        found = [candidates.at(way) for way in ways]
        self._rows = self._rows_of(found)
        if deeper and not any(map(self._fits, self._rows)):
            found = [candidates.at(way, deeper=True) for way in ways]
            self._rows += self._rows_of(found)
        self._candidates = {candidate.knobs: candidate for candidate in found}

    def _rows_of(self, candidates: Sequence[_Candidate]) -> list[Row]:
        reference = self.baselines.plain.prediction
        return [
            (
                weighed(seconds, peak, joules, reference, self.weights), candidate.gradient_accumulation_steps,
                seconds, peak, candidate, index, joules,
            )
            for candidate in candidates
            for seconds, peak, joules, index in candidate.points()
        ]  # fmt: skip

    def _fits(self, row: Row) -> bool:
        return row[3] <= self._terms.limit(row[4].loss_chunks)

    def plan(self) -> Plan:
        """The one that costs least. Raises NoFeasiblePlan when none fits."""
        profile, rows, weights = self.profile, self._rows, self.weights
        row = self._cheapest()
        if row is None:
            raise _infeasible(profile, self._tightest(), self._terms, self.memory_budget_bytes)
        lower_bound, _, _, _, best, index, _ = row
        choice = _choice(profile, best, index, self._terms)
        value = self.cost(choice.prediction)
        proven = abs(value - lower_bound) <= ROUNDING * value
        return Plan(
            model=profile.model,
            workload=profile.workload,
            profile_sha256=records.sha256(profile),
            device=profile.device,
            optimizer=profile.optimizer,
            micro_batch_size=choice.micro_batch_size,
            gradient_accumulation_steps=choice.gradient_accumulation_steps,
            world_size=self.world_size,
            global_batch_size=self.global_batch_size,
            precision=choice.precision,
            zero_stage=choice.zero_stage,
            checkpoint=choice.checkpoint,
            loss_chunks=choice.loss_chunks,
            memory_budget_bytes=self.memory_budget_bytes,
            prediction=choice.prediction,
            objective=Objective(
                cost=value,
                weights=weights,
                lower_bound=value if proven else lower_bound,
                optimal=proven,
                plans_considered=len(rows),
            ),
            baselines=self.baselines,
            front=tuple(_choice(profile, row[4], row[5], self._terms) for row in _front(rows)),
            time_source=profile.time_source,
            noise_scale=profile.noise_scale,
            course=course_of(profile, best.measured, choice, best.distribution),
            stages=stages_of(profile, best.measured, choice, best.distribution),
            asked=self.asked,
        )

    def _cheapest(self) -> Row | None:
        """The row that costs least of those that fit."""
        return min((row for row in self._rows if self._fits(row)), key=lambda row: row[:4], default=None)

    def _tightest(self) -> Row:
        return min(self._rows, key=lambda row: (self._terms.needed(row[3], row[4].loss_chunks), row[2]))

    def best(self) -> Choice:
        """What ``plan`` chooses; where nothing fits, what needs least."""
        row = self._cheapest() or self._tightest()
        return _choice(self.profile, row[4], row[5], self._terms)

    @property
    def asked(self) -> Asked:
        """What there was to choose from."""
        return Asked(
            precisions=tuple(dict.fromkeys(precision for _, precision, _, _ in self._ways)),
            zero_stages=tuple(dict.fromkeys(distribution.zero_stage for distribution, *_ in self._ways)),
            link=self._ways[0][0].link,
        )

    def otherwise(
        self, memory_budget_bytes: int | None, world_size: int, asked: Asked, *, chunked: bool, deeper: bool
    ) -> Space:
        """The space of another question about the same global batch, with the costs of its plans on this one's scale.

        What both have in common is not searched again. ``chunked``: the loss may run in chunks; ``deeper``: segments
        may lie inside segments where nothing else fits. Raises ValueError as ``optimize`` does.
        """
        profile = self.profile
        distributions = _distributions(profile, world_size, asked.zero_stages, asked.link)
        terms = _Terms.of(profile, memory_budget_bytes, self._terms.calibration, world_size)
        chosen = _within(memory_budget_bytes, _precisions(profile, asked.precisions, world_size))
        ways = self._shared.ways(distributions, chosen, chunked)
        return Space(
            profile, self.global_batch_size, world_size, memory_budget_bytes, self.weights, self._shared, ways,
            terms, self.baselines, deeper=deeper,
        )  # fmt: skip

    def cost(self, cost: Cost) -> float:
        """C, predicted or measured, relative to the plain plan's prediction."""
        return objective(cost, self.baselines.plain.prediction, self.weights)

    def candidates(self) -> tuple[Knobs, ...]:
        """All knobs that were profiled and asked for."""
        return tuple(self._candidates)

    def instead(self, plan: Plan, choice: Choice) -> Plan:
        """Another plan of this space in the place of the one that costs least."""
        candidate = self._candidates[Knobs.of(choice)]
        return msgspec.structs.replace(
            instead(plan, choice),
            memory_budget_bytes=self.memory_budget_bytes,
            course=course_of(self.profile, candidate.measured, choice, candidate.distribution),
            stages=stages_of(self.profile, candidate.measured, choice, candidate.distribution),
        )

    def knobs(self) -> tuple[Knobs, ...]:
        """Those with which at least one placement fits."""
        return tuple(knobs for knobs in self._candidates if self.fitting(knobs))

    def fitting(self, knobs: Knobs) -> list[tuple[float, int, float | None, int]]:
        """``(step_seconds, peak_bytes, step_joules, index)`` of the placements that fit, by rising peak."""
        candidate = self._candidates[knobs]
        limit = self._terms.limit(knobs.loss_chunks)
        return [point for point in candidate.points() if point[1] <= limit]

    def choice(self, knobs: Knobs, index: int) -> Choice:
        """The plan with these knobs and the placement of this number."""
        return _choice(self.profile, self._candidates[knobs], index, self._terms)

    def tightest(self, knobs: Knobs) -> Choice:
        """The plan with these knobs that needs least memory, whether or not it fits."""
        _, _, _, index = min(self._candidates[knobs].points(), key=lambda point: point[1])
        return self.choice(knobs, index)

    def by_hand(self, knobs: Knobs, baseline: str) -> Choice:
        """The plan with these knobs and the placement of a baseline: plain, sqrt or every_block."""
        candidate = self._candidates[knobs]
        return _describe(
            self.profile, candidate.measured, candidate.micro_batch_size, knobs.gradient_accumulation_steps,
            Placed(segments=_segments_by_hand(self.profile, baseline)), candidate.distribution, self._terms,
            knobs.loss_chunks,
        )  # fmt: skip


def _check_arguments(
    profile: Profile,
    global_batch_size: int,
    memory_budget_bytes: int | None,
    weights: Weights,
) -> None:
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}.")
    if memory_budget_bytes is not None and memory_budget_bytes < 1:
        raise ValueError(f"memory_budget_bytes must be at least 1, got {memory_budget_bytes}.")
    if weights.energy and profile.energy is None:
        raise ValueError(
            "A positive energy weight needs a source of energy, and this profile has none: no NVML counter, "
            "no readable RAPL, no stated watts. Set --energy-weight 0, or profile with --watts, or where one of "
            "the counters can be read."
        )


def _distributions(
    profile: Profile, world_size: int, zero_stages: Sequence[int], link: Link | None
) -> list[Distribution]:
    """Every way to spread a step over the processes that was asked for, the one that deals out least first."""
    if link is None and world_size > 1:
        link = profile.link or catalogue_link(profile.device, world_size)
    stages = sorted(set(zero_stages))
    asked = ", ".join(map(str, zero_stages))
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}.")
    if not stages or not set(stages) <= set(ZERO_STAGES):
        raise ValueError(f"zero_stages must be of 0, 1, 2 and 3, got {asked or 'none'}.")
    if world_size == 1:
        if stages != [0]:
            raise ValueError(
                f"zero_stages must be 0 with world_size 1, got {asked}: there is nothing to shard."
            )
        return [ALONE]
    if link is None:
        raise ValueError(
            f"world_size must be 1 for a profile without a measured link between processes, got {world_size}. "
            f"Profile with --world-size {world_size}, or pass link= to planner.optimize."
        )
    if link.world_size != world_size:
        raise ValueError(
            f"world_size must be {link.world_size}, the number of processes that the link was measured between, "
            f"got {world_size}. "
            f"Profile with --world-size {world_size}, or pass link= to planner.optimize."
        )
    return [Distribution(world_size=world_size, zero_stage=stage, link=link) for stage in stages]


def _precisions(
    profile: Profile, wanted: Sequence[Precision] | None, world_size: int
) -> list[PrecisionProfile]:
    """What was asked for, or all that was profiled and several processes can run in (planner/zero.py)."""
    names = tuple(wanted) if wanted is not None else tuple(p.precision for p in profile.precisions)
    if world_size > 1 and wanted is None:
        names = tuple(name for name in names if name in SEVERAL_PRECISIONS)
    missing = [name for name in names if profile.at(name) is None]
    if missing or not names:
        why = {each.precision: " (its smallest micro-batch was refused memory)" for each in profile.too_large}
        why |= {h.precision: f" ({h.slowdown:.1f} times slower than fp32 here)" for h in profile.hopeless}
        reasons = [f"{name}{why.get(name, '')}" for name in missing]
        there = ", ".join(p.precision for p in profile.precisions)
        raise PrecisionNotProfiled(
            f"The profile holds {there}, not {', '.join(reasons) or 'no precision at all'}. "
            "Profile again with --precision, or leave it out."
        )
    return [measured for name in PRECISIONS if name in names and (measured := profile.at(name)) is not None]


class PrecisionNotProfiled(ValueError):
    """The profile does not hold a precision that was asked for."""


def _within(budget_bytes: int | None, chosen: Sequence[PrecisionProfile]) -> list[PrecisionProfile]:
    """With a budget all sizes that were timed; without one those whose plain step fits, and so every plan.

    Raises ValueError where that leaves nothing.
    """
    if budget_bytes is not None:
        return list(chosen)
    found = []
    for measured in chosen:
        count = len(measured.plain_sizes)  # Once a size is refused, all larger ones are kept elsewhere.
        cpu = measured.process_cpu
        if count:
            shorter = msgspec.structs.replace(
                measured, wall=measured.wall[:count], process_cpu=None if cpu is None else cpu[:count]
            )
            found.append(shorter)
    if not found:
        sizes = sorted({measured.micro_batch_sizes[0] for measured in chosen})
        raise ValueError(
            f"memory_budget_bytes must be given (--memory-budget): a plain step of micro-batch {sizes[0]}, the "
            "smallest that was profiled, does not fit on the device, so which plans do must be judged by their peak. "
            "Give what the device has free, such as 70GiB."
        )
    return found


def _micro_batch_sizes(measured: PrecisionProfile, global_batch_size: int, world_size: int) -> list[int]:
    """Those in a precision's profiled range that divide the global batch, rising."""
    low, high = measured.micro_batch_sizes[0], measured.micro_batch_sizes[-1]
    return [
        b for b in range(low, min(high, global_batch_size) + 1) if global_batch_size % (b * world_size) == 0
    ]


def _plainest(
    profile: Profile, chosen: Sequence[PrecisionProfile], global_batch_size: int, world_size: int
) -> tuple[PrecisionProfile, int]:
    """The first of the precisions with a micro-batch for the global batch, and the largest that it has.

    One whose plain step does not fit on the device is nobody's baseline, unless there is no other.
    """
    for measured in chosen:
        sizes = _micro_batch_sizes(measured, global_batch_size, world_size)
        fitting = [b for b in sizes if b <= max(measured.plain_sizes, default=0)]
        if sizes:
            return measured, (fitting or sizes)[-1]
    low, high = profile.micro_batch_sizes[0], profile.micro_batch_sizes[-1]
    times = "" if world_size == 1 else f"{world_size} times "
    raise ValueError(
        f"global_batch_size must be a multiple of {times}a micro-batch size between {low} and {high}, the "
        f"profiled range, got {global_batch_size}. Profile other sizes with --batch."
    )


@dataclass(frozen=True, slots=True)
class _Terms:
    """On what terms a plan is described: the largest predicted peak that fits with the stated error added to it,
    that error, and what is known of the device."""

    limit_bytes: float
    memory_error: float
    calibration: Calibration | None

    @classmethod
    def of(
        cls, profile: Profile, budget_bytes: int | None, calibration: Calibration | None, world_size: int
    ) -> _Terms:
        """Those of a budget, None for no limit."""
        margin = memory_error(profile, calibration, world_size)
        return cls(np.inf if budget_bytes is None else budget_bytes / (1 + margin), margin, calibration)

    def error(self, loss_chunks: int | None) -> float:
        """The error of a peak, which is wider with the loss in chunks."""
        return self.memory_error if loss_chunks is None else max(self.memory_error, CHUNKS_ERROR)

    def needed(self, peak_bytes: int, loss_chunks: int | None) -> float:
        """The memory that a predicted peak asks for, with its error."""
        return peak_bytes * (1 + self.error(loss_chunks))

    def limit(self, loss_chunks: int | None) -> float:
        """The largest predicted peak that fits."""
        return self.limit_bytes * (1 + self.memory_error) / (1 + self.error(loss_chunks))


def _candidate(
    profile: Profile,
    as_profiled: PrecisionProfile,
    loss_chunks: int | None,
    b: int,
    k: int,
    distribution: Distribution,
    searched: _Searched,
) -> _Candidate:
    measured = as_profiled.with_chunks(loss_chunks)
    times = at_micro_batch(measured.wall, b)
    resident = resident_batches(profile, k)
    memory = memory_of_process(profile, measured, b, k, distribution)
    base_seconds, base_joules = _base(profile, measured, times, k, distribution)
    watts = watts_at(profile, measured.precision)
    units = plan_units(
        memory,
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        keep_cost=np.zeros(len(profile.stages), dtype=np.int64),
        segment_cost=segment_nanoseconds(times),
        recomputable=np.array([_recomputable(stage, distribution) for stage in profile.stages]),
        selective_cost={
            (stage, how): round(selective_seconds(times, stage, how) * 1e9)
            for stage, measured_time in enumerate(times.stages)
            for how in KEEPINGS
            if measured_time.keeping(how) is not None
        },
    )
    return _Candidate(
        distribution=distribution,
        measured=measured,
        loss_chunks=loss_chunks,
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        base_seconds=base_seconds,
        floor_bytes=optimizer_peak_bytes(memory, b, resident),
        placements=_SingleLevel(units, searched.frontier(units), constant_bytes(memory, b, resident)),
        memory=memory,
        base_joules=base_joules,
        recompute_watts=0.0
        if watts is None
        else sum(step_joules({"recompute": 1.0}, watts, distribution.world_size).values()),
    )


def _base(
    profile: Profile, measured: PrecisionProfile, times: StepTime, k: int, distribution: Distribution
) -> tuple[float, float | None]:
    """Seconds and joules of a step that recomputes nothing."""
    parts = seconds_by_kind(profile, times, k, PLAIN, distribution)
    watts = watts_at(profile, measured.precision)
    joules = None if watts is None else sum(step_joules(parts, watts, distribution.world_size).values())
    return sum(parts.values()), joules


def _loss_chunks(measured: PrecisionProfile, distribution: Distribution) -> tuple[int | None, ...]:
    """The loss as it is, or in chunks where that was profiled; for several processes nobody has measured it."""
    if measured.chunked_head is None or distribution.world_size > 1:
        return (None,)
    return (None, measured.chunked_head.chunks)


def _deeper(profile: Profile, candidate: _Candidate) -> _Candidate:
    """The same with segments inside segments: seldom faster, but they need less memory."""
    assert isinstance(candidate.placements, _SingleLevel)
    b, k = candidate.micro_batch_size, candidate.gradient_accumulation_steps
    resident = resident_batches(profile, k)
    nest = plan_nest(
        candidate.memory, candidate.placements.units, micro_batch_size=b, gradient_accumulation_steps=k
    )
    return replace(candidate, placements=_Nested(nested(nest), constant_bytes(candidate.memory, b, resident)))


def _recomputable(stage: StageRecord, distribution: Distribution) -> bool:
    """ZeRO stage 3 recomputes nothing here: the executor could, and what gathering again costs nobody has measured."""
    return stage.recomputable and distribution.zero_stage < 3


def _choice(profile: Profile, candidate: _Candidate, index: int, terms: _Terms) -> Choice:
    return _describe(
        profile, candidate.measured, candidate.micro_batch_size, candidate.gradient_accumulation_steps,
        candidate.placements.placed(index), candidate.distribution, terms, candidate.loss_chunks,
    )  # fmt: skip


def _describe(
    profile: Profile, measured: PrecisionProfile, b: int, k: int, placed: Placed, distribution: Distribution,
    terms: _Terms, loss_chunks: int | None = None,
) -> Choice:  # fmt: skip
    prediction = predict(
        profile, measured, micro_batch_size=b, gradient_accumulation_steps=k, placed=placed,
        distribution=distribution, calibration=terms.calibration,
    )  # fmt: skip
    if loss_chunks is not None:
        error = msgspec.structs.replace(prediction.error, peak_memory_bytes=terms.error(loss_chunks))
        prediction = msgspec.structs.replace(prediction, error=error)
    return Choice(
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        precision=measured.precision,
        zero_stage=distribution.zero_stage,
        checkpoint=name_segments(profile, placed),
        loss_chunks=loss_chunks,
        prediction=prediction,
        fits=prediction.peak_memory_bytes <= terms.limit(loss_chunks),
    )


def _baselines(
    profile: Profile, measured: PrecisionProfile, global_batch_size: int, b: int, distribution: Distribution,
    terms: _Terms,
) -> Baselines:  # fmt: skip
    """What one would do by hand: the largest micro-batch, the first precision, the well-known placements."""
    k = global_batch_size // (b * distribution.world_size)

    def baseline(name: str) -> Choice:
        placed = Placed(segments=_segments_by_hand(profile, name))
        return _describe(profile, measured, b, k, placed, distribution, terms)

    return Baselines(plain=baseline("plain"), sqrt=baseline("sqrt"), every_block=baseline("every_block"))


def _segments_by_hand(profile: Profile, baseline: str) -> Segments:
    spans = blocks(profile)
    if baseline == "plain" or not spans:
        return ()
    if baseline == "every_block":
        return tuple(spans)
    return tuple((spans[i][0], spans[j - 1][1]) for i, j in sqrt_segments(len(spans)))


def blocks(profile: Profile) -> list[tuple[int, int]]:
    """The recomputable stages grouped as a person would: the stages of ``transformer.h.3`` are one block."""
    allowed = [i for i, stage in enumerate(profile.stages) if stage.recomputable]
    groups = (
        list(group)
        for _, group in groupby(allowed, key=lambda i: block_name(profile.stages[i].name) or str(i))
    )
    return [(group[0], group[-1] + 1) for group in groups]


def block_name(stage: str) -> str | None:
    """The module that a stage's block is: the longest leading part of a module's name that ends in a number."""
    found = re.match(r"(?:[^.]+\.)*[^.]*\d(?=\.|$|#|@)", stage)
    return found.group(0) if found else None


Row = tuple[float, int, float, int, _Candidate, int, float | None]


def _front(rows: list[Row]) -> list[Row]:
    """The rows that no other beats in time, peak and energy, thinned to ``FRONT_POINTS``, by rising peak.

    Where energy is not known it does not count. Of the rows so far, all with lower peaks, the stairs keep those that
    matter: with their seconds, rising, their joules fall.
    """
    front: list[Row] = []
    stairs: list[tuple[float, float]] = []
    known = all(row[6] is not None for row in rows)

    def joules_of(row: Row) -> float:
        return row[6] if known and row[6] is not None else 0.0

    for row in sorted(rows, key=lambda row: (row[3], row[2], joules_of(row), row[1])):
        seconds, joules = row[2], joules_of(row)
        above = bisect_right(stairs, seconds, key=lambda stair: stair[0])
        if above and stairs[above - 1][1] <= joules:
            continue
        end = above
        while end < len(stairs) and stairs[end][1] >= joules:
            end += 1
        stairs[above:end] = [(seconds, joules)]
        front.append(row)
    if len(front) <= FRONT_POINTS:
        return front
    low, high = front[0][3], front[-1][3]
    steps = [low + (high - low) * n / (FRONT_POINTS - 1) for n in range(FRONT_POINTS)]
    picked = {max(i for i, row in enumerate(front) if row[3] <= step) for step in steps}
    return [front[i] for i in sorted(picked)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """Every placement worth having of one micro-batch size, precision and ZeRO stage, as arrays of equal length."""

    micro_batch_size: int
    step_seconds: NDArray[np.float64]
    peak_bytes: NDArray[np.int64]
    step_joules: NDArray[np.float64] | None
    fits: NDArray[np.bool_]


class Batches:
    """The space of ``optimize`` for one global batch after another.

    From the second micro-batch on each is like the one before, so how often they accumulate changes what is constant
    and no placement: a frontier is found once for k = 1 and once for every higher k. Raises ValueError as
    ``optimize`` does.
    """

    def __init__(
        self, profile: Profile, memory_budget_bytes: int | None, weights: Weights, world_size: int,
        precisions: Sequence[Precision] | None, zero_stages: Sequence[int], link: Link | None,
        calibration: Calibration | None,
    ) -> None:  # fmt: skip
        _check_arguments(profile, 1, memory_budget_bytes, weights)
        self._profile = profile
        self._world_size = world_size
        self._distributions = _distributions(profile, world_size, zero_stages, link)
        self._precisions = _within(memory_budget_bytes, _precisions(profile, precisions, world_size))
        self._terms = _Terms.of(profile, memory_budget_bytes, calibration, world_size)
        self._ways = [
            (distribution, measured, loss_chunks)
            for distribution in self._distributions
            for measured in self._precisions
            for loss_chunks in _loss_chunks(measured, distribution)
        ]
        self._frontiers: dict[tuple[int, int, bool, bool], _Frontier] = {}
        self._searched = _Searched()

    def runnable(self, global_batch_sizes: Sequence[int]) -> list[int]:
        """Those of the sizes that some profiled micro-batch and the number of processes divide."""
        sizes = np.asarray(global_batch_sizes)
        low = min(measured.micro_batch_sizes[0] for measured in self._precisions)
        high = max(measured.micro_batch_sizes[-1] for measured in self._precisions)
        found = np.zeros(len(sizes), dtype=np.bool_)
        for b in range(low, high + 1):
            found |= sizes % (b * self._world_size) == 0
        return [int(size) for size in sizes[found]]

    def plain(self, global_batch_size: int) -> Prediction:
        """The plan that recomputes nothing, the baseline of a global batch."""
        plainest, largest = _plainest(self._profile, self._precisions, global_batch_size, self._world_size)
        by_hand = replace(self._distributions[0], zero_stage=0)
        found = _baselines(self._profile, plainest, global_batch_size, largest, by_hand, self._terms)
        return found.plain.prediction

    def points(self, global_batch_size: int) -> list[Points]:
        """All placements of a global batch; where none of a single level fits, segments inside segments as well."""
        keys = [
            (way, b)
            for way, (_, measured, _) in enumerate(self._ways)
            for b in _micro_batch_sizes(measured, global_batch_size, self._world_size)
        ]
        found = [self._points(way, b, global_batch_size, deeper=False) for way, b in keys]
        if not any(points.fits.any() for points in found):
            found += [self._points(way, b, global_batch_size, deeper=True) for way, b in keys]
        return found

    def _points(self, way: int, b: int, global_batch_size: int, *, deeper: bool) -> Points:
        k = global_batch_size // (b * self._world_size)
        frontier = self._frontier(way, b, k > 1, deeper=deeper)
        candidate = frontier.candidate
        more = resident_batches(self._profile, k) - resident_batches(self._profile, frontier.k)
        seconds, joules = _base(self._profile, candidate.measured, frontier.times, k, candidate.distribution)
        recompute = k * frontier.nanoseconds / 1e9
        peaks = frontier.peak_bytes + more * bytes_at(candidate.memory.batch, b)
        return Points(
            micro_batch_size=b,
            step_seconds=seconds + recompute,
            peak_bytes=peaks,
            step_joules=None if joules is None else joules + candidate.recompute_watts * recompute,
            fits=peaks <= self._terms.limit(candidate.loss_chunks),
        )

    def _frontier(self, way: int, b: int, accumulates: bool, *, deeper: bool) -> _Frontier:
        key = (way, b, accumulates, deeper)
        if key not in self._frontiers:
            distribution, measured, loss_chunks = self._ways[way]
            if deeper:
                candidate = _deeper(
                    self._profile, self._frontier(way, b, accumulates, deeper=False).candidate
                )
            else:
                k = 1 + accumulates
                candidate = _candidate(
                    self._profile, measured, loss_chunks, b, k, distribution, self._searched
                )
            self._frontiers[key] = _Frontier.of(candidate)
        return self._frontiers[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frontier:
    """A candidate's placements as arrays; ``nanoseconds`` are those that a micro-batch recomputes."""

    candidate: _Candidate
    times: StepTime
    nanoseconds: NDArray[np.int64]
    peak_bytes: NDArray[np.int64]

    @classmethod
    def of(cls, candidate: _Candidate) -> _Frontier:
        peaks, nanoseconds = np.array(candidate.placements.points, dtype=np.int64).T
        return cls(
            candidate=candidate,
            times=at_micro_batch(candidate.measured.wall, candidate.micro_batch_size),
            nanoseconds=nanoseconds,
            peak_bytes=np.maximum(peaks, candidate.floor_bytes),
        )

    @property
    def k(self) -> int:
        return self.candidate.gradient_accumulation_steps


def _infeasible(profile: Profile, row: Row, terms: _Terms, budget: int | None) -> NoFeasiblePlan:
    choice = _choice(profile, row[4], row[5], terms)
    margin = terms.error(choice.loss_chunks)
    count = len(choice.checkpoint)
    recomputed = f"{count} segments recomputed" if count else "nothing recomputed"
    world_size = row[4].distribution.world_size
    spread = f", ZeRO stage {choice.zero_stage} on {world_size} processes" if world_size > 1 else ""
    return NoFeasiblePlan(
        f"No plan fits {size_text(budget or 0)}: the tightest needs "
        f"{size_text(terms.needed(choice.prediction.peak_memory_bytes, choice.loss_chunks))} "
        f"({choice.precision}, micro-batch {choice.micro_batch_size}, "
        f"k = {choice.gradient_accumulation_steps}, {recomputed}{spread}; {margin:.1%} margin included). "
        "Raise --memory-budget, or profile smaller micro-batches or other precisions.",
        choice.prediction,
    )

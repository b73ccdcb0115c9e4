"""The global batch as well: the plan that reaches a target first.

A larger global batch B takes fewer steps and each of them longer. With a noise scale phi and one run that is known to
reach the target, S steps at a global batch R, both sides of it are known (planner/convergence.py):

    T(B) = steps(B) * step_seconds(B),    steps(B) = S * (1 + phi / B) / (1 + phi / R)

    steps |*                 step    |         *        T |*
          | *                seconds |      *             |  *          *
          |   *                      |   *                |     *    *
          |        *      *          |*                   |       *  <- this batch
          +------------ B            +------------ B      +------------ B

Every global batch of the range is searched, exactly: C is that of planner/cost.py with T and the energy of all steps in
place of a step's, relative to the plain plan of the batch nearest to R. At one global batch that is the C of a step
with other weights, so the plan of the best batch is ``optimize``'s own, proof included.

The formula holds while phi does, and where the learning rate follows the batch, ``eps(B) = eps_max / (1 + phi / B)``
(McCandlish et al. 2018, equation 2.7); ``python -m studies.convergence`` trains to see whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from planner.calibration import Calibration
from planner.convergence import steps_beside
from planner.cost import weighed
from planner.plan import BatchToTarget, Convergence, Cost, NoFeasiblePlan, Plan, Reference, Weights
from planner.search import Batches, Points, optimize
from profiler.profile_record import Link, Precision, Profile

MOST_SIZES = 2**20
"""How many global batches may be asked for. A batch of a million samples is larger than any noise scale known."""

MOST_BATCHES = 1024
"""How many global batches are searched at most, evenly spread by their ratio where there are more."""

NEIGHBOURS = 12
"""How many global batches a plan shows besides the chosen one and the reference, evenly spread by their ratio."""


def optimize_to_target(
    profile: Profile,
    global_batch_sizes: Sequence[int],
    reference: Reference,
    memory_budget_bytes: int | None = None,
    weights: Weights | None = None,
    world_size: int = 1,
    *,
    noise_scale_samples: float | None = None,
    precisions: Sequence[Precision] | None = None,
    zero_stages: Sequence[int] = (0,),
    link: Link | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan, its global batch among ``global_batch_sizes``, that minimises C on the way to the target.

    ``noise_scale_samples``: if not given, as the profile measured it. Of the sizes those count that some profiled
    micro-batch and ``world_size`` divide. Everything else is as in ``planner.optimize``.
    Raises ``NoFeasiblePlan`` when no size has a plan that fits, ValueError for bad arguments.
    """
    weights = weights or Weights()
    noise = _Noise.of(profile, noise_scale_samples)
    asked = _checked(global_batch_sizes)
    batches = Batches(
        profile, memory_budget_bytes, weights, world_size, precisions, zero_stages, link, calibration
    )
    in_range = batches.runnable(asked)
    if not in_range:
        sizes, times = profile.micro_batch_sizes, "" if world_size == 1 else f"{world_size} times "
        raise ValueError(
            f"A global batch must be a multiple of {times}a micro-batch size between {sizes[0]} and {sizes[-1]}, the "
            f"profiled range, and from {asked[0]} to {asked[-1]} there is none. Widen --global-batch-range, or profile "
            "other sizes with --batch."
        )
    considered = spread(in_range, MOST_BATCHES)
    plain_at = min(considered, key=lambda size: (abs(size - reference.global_batch_size), size))
    plain = batches.plain(plain_at)
    scales = {phi: _Scale.of(phi, reference, plain_at, plain) for phi in noise.all_samples}
    least_bytes: dict[int, int] = {}
    plans_considered = 0
    found: dict[float, dict[int, BatchToTarget]] = {phi: {} for phi in scales}
    for size in considered:
        points = batches.points(size)
        plans_considered += sum(len(each.fits) for each in points)
        least_bytes[size] = min(int(each.peak_bytes.min()) for each in points)
        for phi, scale in scales.items():
            best = scale.best(size, points, weights)
            if best is not None:
                found[phi][size] = best

    def at(global_batch_size: int, weights: Weights) -> Plan:
        return optimize(
            profile, global_batch_size, memory_budget_bytes, weights, world_size,
            precisions=precisions, zero_stages=zero_stages, link=link, calibration=calibration,
        )  # fmt: skip

    fitting = found[noise.samples]
    if not fitting:
        tightest = min(least_bytes, key=lambda size: (least_bytes[size], size))
        try:
            return at(tightest, weights)
        except NoFeasiblePlan as none:
            raise NoFeasiblePlan(
                f"No global batch from {asked[0]} to {asked[-1]} has a plan that fits; the one that needs least is "
                f"{tightest}. {none}",
                none.tightest,
            ) from none
    size = _cheapest(fitting)
    scale = scales[noise.samples]
    plan = at(size, scale.of_a_step(size, batches.plain(size), weights))
    steps = scale.steps(size)
    chosen = BatchToTarget(
        global_batch_size=size,
        micro_batch_size=plan.micro_batch_size,
        step_seconds=plan.prediction.step_seconds,
        peak_memory_bytes=plan.prediction.peak_memory_bytes,
        steps=steps,
        seconds=steps * plan.prediction.step_seconds,
        joules=None if plan.prediction.step_joules is None else steps * plan.prediction.step_joules,
        cost=plan.objective.cost,
    )
    shown = {*spread(list(fitting), NEIGHBOURS), size, plain_at} & fitting.keys()
    convergence = Convergence(
        global_batch_range=(asked[0], asked[-1]),
        batches_in_range=len(in_range),
        batches_considered=len(considered),
        batches_fitting=len(fitting),
        noise_scale_samples=noise.samples,
        noise_scale_source=noise.source,
        best_at_low=None if noise.low is None else _cheapest(found[noise.low]),
        best_at_high=None if noise.high is None else _cheapest(found[noise.high]),
        reference=reference,
        weights=weights,
        chosen=chosen,
        neighbours=tuple(chosen if each == size else fitting[each] for each in sorted(shown)),
    )
    objective = msgspec.structs.replace(plan.objective, plans_considered=plans_considered)
    return msgspec.structs.replace(plan, convergence=convergence, objective=objective)


def spread(sizes: Sequence[int], most: int) -> list[int]:
    """At most so many of some rising sizes, evenly spread by their ratio, the first and the last among them."""
    if len(sizes) <= most:
        return list(sizes)
    wanted = np.geomspace(sizes[0], sizes[-1], most)
    above = np.searchsorted(sizes, wanted).clip(1, len(sizes) - 1)
    there = np.asarray(sizes)
    nearest = np.where(wanted - there[above - 1] < there[above] - wanted, above - 1, above)
    return [int(size) for size in there[np.unique(nearest)]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Noise:
    """The noise scale in samples, where it comes from, and the interval that was measured."""

    samples: float
    source: Literal["profile", "stated"]
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, profile: Profile, stated: float | None) -> _Noise:
        """The stated one or, with none, the profile's."""
        if stated is not None:
            if not 0 <= stated < math.inf:
                raise ValueError(
                    f"noise_scale_samples must be a finite number of at least 0, got {stated}. "
                    "planner profile --noise-scale measures it."
                )
            return cls(samples=stated, source="stated")
        measured = profile.noise_scale
        if measured is None or measured.noise_scale_samples is None:
            there = (
                "has none" if measured is None else f"lost it in noise after {measured.steps} probing steps"
            )
            more = "STEPS" if measured is None else f"{4 * measured.steps}"
            raise ValueError(
                f"Choosing the global batch needs the gradient noise scale, and this profile {there}. Profile with "
                f"--noise-scale {more}, or state it with --noise-scale-samples, or give --global-batch-size."
            )
        return cls(
            samples=measured.noise_scale_samples,
            source="profile",
            low=measured.low_samples,
            high=measured.high_samples,
        )

    @property
    def all_samples(self) -> tuple[float, ...]:
        return tuple({phi: None for phi in (self.samples, self.low, self.high) if phi is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """What the way to the target is measured by at one noise scale: its steps, and what the plain plan takes for it."""

    noise_scale_samples: float
    reference: Reference
    plain: Cost

    @classmethod
    def of(cls, noise_scale_samples: float, reference: Reference, plain_at: int, plain: Cost) -> _Scale:
        """``plain``: a step of the plain plan of the global batch ``plain_at``."""
        count = steps_beside(plain_at, noise_scale_samples, reference)
        return cls(
            noise_scale_samples=noise_scale_samples, reference=reference, plain=_all_steps(plain, count)
        )

    def steps(self, global_batch_size: int) -> float:
        return steps_beside(global_batch_size, self.noise_scale_samples, self.reference)

    def best(self, size: int, points: Sequence[Points], weights: Weights) -> BatchToTarget | None:
        """The cheapest way to the target with this global batch; None where nothing fits."""
        count = self.steps(size)
        best: BatchToTarget | None = None
        for each in points:
            if not each.fits.any():
                continue
            joules = None if each.step_joules is None else count * each.step_joules
            costs = weighed(
                count * each.step_seconds, each.peak_bytes.astype(np.float64), joules, self.plain, weights
            )
            index = int(np.where(each.fits, costs, np.inf).argmin())
            if best is None or costs[index] < best.cost:
                best = BatchToTarget(
                    global_batch_size=size,
                    micro_batch_size=each.micro_batch_size,
                    step_seconds=float(each.step_seconds[index]),
                    peak_memory_bytes=int(each.peak_bytes[index]),
                    steps=count,
                    seconds=count * float(each.step_seconds[index]),
                    joules=None if joules is None else float(joules[index]),
                    cost=float(costs[index]),
                )
        return best

    def of_a_step(self, size: int, plain: Cost, weights: Weights) -> Weights:
        """The weights that make the C of one step at this global batch, ``plain`` its plain plan, the C of the way."""
        own = _all_steps(plain, self.steps(size))
        energy = 0.0
        if weights.energy and own.step_joules is not None and self.plain.step_joules is not None:
            energy = weights.energy * own.step_joules / self.plain.step_joules
        return Weights(
            time=weights.time * own.step_seconds / self.plain.step_seconds,
            memory=weights.memory * own.peak_memory_bytes / self.plain.peak_memory_bytes,
            energy=energy,
        )


def _all_steps(step: Cost, count: float) -> Cost:
    """The cost of so many steps, as if they were one."""
    return Cost(
        step_seconds=count * step.step_seconds,
        step_cpu_seconds=None,
        peak_memory_bytes=step.peak_memory_bytes,
        peak_reserved_bytes=None,
        step_joules=None if step.step_joules is None else count * step.step_joules,
    )


def _cheapest(found: Mapping[int, BatchToTarget]) -> int:
    return min(found, key=lambda size: (found[size].cost, size))


def _checked(global_batch_sizes: Sequence[int]) -> Sequence[int]:
    """The sizes, rising. Raises ValueError for none, for too many, and for sizes below one."""
    count = len(global_batch_sizes)
    if not 1 <= count <= MOST_SIZES:
        raise ValueError(
            f"global_batch_sizes must be between 1 and {MOST_SIZES} sizes, got {count}. "
            "Narrow --global-batch-range to where the noise scale lies."
        )
    rising = sorted(set(global_batch_sizes))
    if rising[0] < 1:
        raise ValueError(f"global_batch_sizes must be at least 1, got {rising[0]}.")
    return rising

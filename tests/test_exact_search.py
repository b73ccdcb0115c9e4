"""The search finds what brute force over all plans finds, on profiles small enough for it.

Brute force knows no frontier and no solver. It lists every placement, has ``planner.cost.predict`` say what each plan
costs, and takes the least C of those that fit. The search adds up whole nanoseconds, hence the tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.communication import ALONE, Distribution
from planner.cost import predict
from planner.nested import PLAIN
from planner.plan import NoFeasiblePlan, Prediction, Weights
from planner.search import CHUNKS_ERROR, optimize
from profiler.profile_record import PrecisionProfile, Profile
from studies.accuracy import selectable
from tests.profiles import SIZES, every_nested_placement, every_placement, profiles

GLOBAL_BATCH = 8
TOLERANCE = 1e-6
WEIGHTS = (
    Weights(time=1.0),
    Weights(time=0.0, memory=1.0),
    Weights(time=0.0, energy=1.0),
    Weights(time=1.0, memory=0.7, energy=0.4),
)


@dataclass(frozen=True)
class Tried:
    """One plan: what it is predicted to cost, and the memory it asks for with its stated error."""

    prediction: Prediction
    needed_bytes: float


@dataclass(frozen=True)
class Space:
    """What is asked of a profile, and all plans that answer it."""

    profile: Profile
    world_size: int
    zero_stages: tuple[int, ...]

    def distributions(self) -> list[Distribution]:
        if self.world_size == 1:
            return [ALONE]
        return [
            Distribution(world_size=self.world_size, zero_stage=stage, link=self.profile.link)
            for stage in self.zero_stages
        ]

    def precisions(self) -> list[PrecisionProfile]:
        found = self.profile.precisions
        return [each for each in found if self.world_size == 1 or each.precision in ("fp32", "bf16")]

    def plans(self, *, deeper: bool) -> Iterator[Tried]:
        """Every micro-batch, precision, ZeRO stage, chunks or not, and placement; ``deeper``: nested ones as well."""
        largest = SIZES[-1]
        for distribution, precision in itertools.product(self.distributions(), self.precisions()):
            head = precision.chunked_head
            chunks = (None,) if head is None or self.world_size > 1 else (None, head.chunks)
            for loss_chunks, b in itertools.product(chunks, range(1, largest + 1)):
                if GLOBAL_BATCH % (b * self.world_size) == 0:
                    measured = precision.with_chunks(loss_chunks)
                    yield from self._placed(measured, loss_chunks, b, distribution, deeper)

    def _placed(
        self,
        measured: PrecisionProfile,
        loss_chunks: int | None,
        b: int,
        distribution: Distribution,
        deeper: bool,
    ) -> Iterator[Tried]:
        recomputable = [each.recomputable and distribution.zero_stage < 3 for each in self.profile.stages]
        ways = [
            tuple(how for how in found if all(time.keeping(how) is not None for time in times))
            for times, found in zip(stage_times(measured, b), selectable(measured.memory_at(b)), strict=True)
        ]
        for outer in every_placement(recomputable, ways):
            for placed in every_nested_placement(outer) if deeper else (outer,):
                prediction = predict(
                    self.profile, measured, micro_batch_size=b, placed=placed, distribution=distribution,
                    gradient_accumulation_steps=GLOBAL_BATCH // (b * self.world_size),
                )  # fmt: skip
                error = prediction.error.peak_memory_bytes
                if loss_chunks is not None:
                    error = max(error, CHUNKS_ERROR)
                yield Tried(prediction, prediction.peak_memory_bytes * (1 + error))

    def plain(self) -> Prediction:
        """Of the largest micro-batch at the first precision, with nothing recomputed and nothing dealt out."""
        b = max(b for b in range(1, SIZES[-1] + 1) if GLOBAL_BATCH % (b * self.world_size) == 0)
        distribution = ALONE
        if self.world_size > 1:
            distribution = Distribution(world_size=self.world_size, zero_stage=0, link=self.profile.link)
        return predict(
            self.profile, self.profile.precisions[0], micro_batch_size=b, placed=PLAIN, distribution=distribution,
            gradient_accumulation_steps=GLOBAL_BATCH // (b * self.world_size),
        )  # fmt: skip


def stage_times(measured: PrecisionProfile, b: int) -> list[tuple]:
    """Of each stage, the times that those at a micro-batch size are made of."""
    used = [time for time in measured.wall if time.micro_batch_size == b] or measured.wall
    return list(zip(*(time.stages for time in used), strict=True))


def least_cost(
    plans: Sequence[Tried], budget_bytes: int, plain: Prediction, weights: Weights
) -> float | None:
    """The least C of the plans that fit."""
    return min(
        (
            weights.time * each.prediction.step_seconds / plain.step_seconds
            + weights.memory * each.prediction.peak_memory_bytes / plain.peak_memory_bytes
            + weights.energy * each.prediction.step_joules / plain.step_joules
            for each in plans
            if each.needed_bytes <= budget_bytes
        ),
        default=None,
    )


def above(needed_bytes: float, plans: Sequence[Tried]) -> int:
    """A budget that a plan just fits, and that no plan needs to the last digit."""
    budget = int(needed_bytes) + 1
    while any(abs(each.needed_bytes - budget) < 1e-6 for each in plans):
        budget += 1
    return budget


@given(
    profiles(),
    st.sampled_from((1, 1, 2)),
    st.sets(st.sampled_from((0, 1, 2, 3)), min_size=1),
    st.sampled_from(WEIGHTS),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_the_search_finds_what_brute_force_over_all_plans_finds(
    profile: Profile, world_size: int, zero_stages: set[int], weights: Weights, shares: list[float]
) -> None:
    """With budgets that all plans fit, that some fit, that only segments inside segments fit, and that none fits."""
    space = Space(profile, world_size, tuple(sorted(zero_stages)) if world_size > 1 else (0,))
    plain = space.plain()
    plans = list(space.plans(deeper=False))
    deeper = list(space.plans(deeper=True))
    needed = sorted(each.needed_bytes for each in plans)
    tightest = min(deeper, key=lambda each: each.needed_bytes)
    budgets = {
        above(needed[-1], plans),
        *(above(needed[int(share * (len(needed) - 1))], plans) for share in shares),
        above(needed[0], plans),
        above(tightest.needed_bytes, deeper),
        max(1, int(tightest.needed_bytes) - 1),
    }
    for budget in budgets:
        best = least_cost(plans, budget, plain, weights)
        if best is None:
            best = least_cost(deeper, budget, plain, weights)

        def search(budget: int = budget) -> float:
            plan = optimize(profile, GLOBAL_BATCH, budget, weights, world_size, zero_stages=space.zero_stages)
            assert plan.objective.lower_bound == plan.objective.cost
            assert plan.objective.optimal
            assert least_cost([Tried(plan.prediction, 0)], budget, plain, weights) == plan.objective.cost
            error = plan.prediction.error.peak_memory_bytes
            assert plan.prediction.peak_memory_bytes * (1 + error) <= budget
            return plan.objective.cost

        if best is None:
            with pytest.raises(NoFeasiblePlan) as refused:
                search()
            found = refused.value.tightest
            assert found.peak_memory_bytes == tightest.prediction.peak_memory_bytes
        else:
            assert search() == pytest.approx(best, rel=TOLERANCE)

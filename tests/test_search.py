"""The search against brute force: every segmentation, micro-batch and precision of small random profiles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import pytest

from planner.cost import COMPOSITION_ERROR, index_segments, memory_error, name_segments
from planner.memory import peak_window, timeline
from planner.nested import PLAIN, Placed, Segments
from planner.plan import NoFeasiblePlan, Plan, Weights
from planner.search import PrecisionNotProfiled, blocks, optimize
from planner.time import at_micro_batch, step_parts
from profiler.profile_record import Precision, PrecisionProfile, Profile, StageRecord
from tests.profiles import every_nested_placement, placements_of, random_profile

GLOBAL_BATCH = 8
SEEDS = range(50)
WEIGHTS = (Weights(), Weights(time=0.0, memory=1.0), Weights(time=1.0, memory=0.7))


def every_plan(profile: Profile) -> list[tuple[float, int]]:
    """(step_seconds, peak_bytes) of every plan of the global batch."""
    return [
        seconds_and_peak(profile, measured, b, placed)
        for measured, b in itertools.product(profile.precisions, (1, 2, 4))
        for placed in placements_of(profile, measured.memory_at(b))
    ]


def seconds_and_peak(
    profile: Profile, measured: PrecisionProfile, b: int, placed: Placed
) -> tuple[float, int]:
    k = GLOBAL_BATCH // b
    windows = timeline(
        measured.memory_at(b), placed, micro_batch_size=b, gradient_accumulation_steps=k, resident_batches=k
    )
    seconds = sum(step_parts(at_micro_batch(measured.wall, b), k, placed).values())
    return seconds, peak_window(windows).total_bytes


@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_finds_what_brute_force_finds(seed: int) -> None:
    """For a slack budget and three binding ones."""
    profile = random_profile(seed)
    plans = every_plan(profile)
    peaks = sorted({peak for _, peak in plans})
    margin = 1 + memory_error(profile)
    plain = seconds_and_peak(profile, profile.precisions[0], 4, PLAIN)
    for peak in (peaks[0], peaks[len(peaks) // 3], peaks[len(peaks) // 2], peaks[-1]):
        for weights in WEIGHTS:
            plan = optimize(profile, GLOBAL_BATCH, math.ceil(peak * margin), weights)
            best = min(
                weights.time * seconds / plain[0] + weights.memory * bytes_ / plain[1]
                for seconds, bytes_ in plans
                if bytes_ <= peak
            )
            assert plan.objective.cost == pytest.approx(best, rel=1e-9)
            assert plan.objective.optimal
            assert plan.prediction.peak_memory_bytes <= peak


def test_where_no_single_level_fits_the_search_goes_deeper_and_finds_the_tightest_plan_of_all() -> None:
    deeper = 0
    for profile in map(random_profile, SEEDS):
        tightest, seconds = min(
            seconds_and_peak(profile, measured, b, nested)[::-1]
            for measured, b in itertools.product(profile.precisions, (1, 2, 4))
            for placed in placements_of(profile, measured.memory_at(b))
            for nested in every_nested_placement(placed)
        )
        with pytest.raises(NoFeasiblePlan) as refused:
            optimize(profile, GLOBAL_BATCH, 1)
        found = refused.value.tightest
        assert found.peak_memory_bytes == tightest
        assert found.step_seconds == pytest.approx(seconds)
        deeper += tightest < min(peak for _, peak in every_plan(profile))
    assert deeper >= 2


def test_a_budget_that_only_segments_inside_segments_fit_gets_them() -> None:
    """One level needs 195."""
    profile = random_profile(25)
    plan = optimize(profile, GLOBAL_BATCH, math.ceil(192 * (1 + memory_error(profile))))
    assert [(s.first, s.last, s.depth, s.mode) for s in plan.checkpoint] == [
        ("h.1", "h.3", 0, "recompute"),
        ("h.1", "h.1", 1, "recompute"),
        ("h.2", "h.2", 1, "recompute"),
        ("h.4", "h.4", 0, "selective"),
    ]
    assert plan.prediction.peak_memory_bytes == 192


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_the_front_holds_only_plans_that_no_plan_beats(seed: int) -> None:
    profile = random_profile(seed)
    plans = every_plan(profile)
    front = [(c.prediction.step_seconds, c.prediction.peak_memory_bytes) for c in optimize(profile, 8).front]
    assert [peak for _, peak in front] == sorted({peak for _, peak in front})
    for seconds, peak in front:
        assert not any(s < seconds - 1e-6 and p <= peak for s, p in plans)
    assert front[0][1] == min(peak for _, peak in plans)
    assert front[-1][0] == pytest.approx(min(seconds for seconds, _ in plans))


def test_a_plan_says_the_same_as_the_timeline_and_the_times_of_its_own_knobs() -> None:
    profile = random_profile(3)
    tight = optimize(profile, GLOBAL_BATCH, weights=Weights(time=0.0, memory=1.0))
    measured = profile.at(tight.precision)
    assert measured is not None
    seconds, peak = seconds_and_peak(
        profile, measured, tight.micro_batch_size, index_segments(profile, tight.checkpoint)
    )
    assert tight.prediction.step_seconds == pytest.approx(seconds)
    assert (
        tight.prediction.peak_memory_bytes == peak == sum(tight.prediction.parts.peak_memory_bytes.values())
    )
    assert sum(tight.prediction.parts.step_seconds.values()) == tight.prediction.step_seconds
    assert tight.front[0].prediction.peak_memory_bytes == peak


def test_a_plan_fits_only_when_its_stated_error_fits_as_well() -> None:
    """The profile's check was off by 4%: a peak of p needs a budget of 1.04 p."""
    profile = random_profile(5, share_predicted=0.96)
    margin = memory_error(profile)
    assert margin == pytest.approx(0.04, rel=0.05)
    tightest = optimize(profile, GLOBAL_BATCH).front[0].prediction.peak_memory_bytes
    needed = math.ceil(tightest * (1 + margin) - 1e-9)
    assert optimize(profile, GLOBAL_BATCH, needed).prediction.peak_memory_bytes == tightest
    with pytest.raises(NoFeasiblePlan, match=rf"the tightest needs .*{margin:.1%} margin included"):
        optimize(profile, GLOBAL_BATCH, needed - 1)


def test_the_stated_error_of_memory_is_never_below_that_of_composition() -> None:
    assert memory_error(random_profile(0)) == COMPOSITION_ERROR


def test_micro_batch_and_accumulation_always_make_the_global_batch() -> None:
    for seed, size in itertools.product(SEEDS[:5], (1, 2, 3, 6, 8, 12)):
        plan = optimize(random_profile(seed), size)
        assert plan.micro_batch_size * plan.gradient_accumulation_steps == plan.global_batch_size == size
        assert 1 <= plan.micro_batch_size <= 4


def test_a_plan_that_does_not_make_its_global_batch_cannot_be_built() -> None:
    plan = optimize(random_profile(0), 8)
    fields: dict[str, Any] = {name: getattr(plan, name) for name in plan.__struct_fields__}
    with pytest.raises(ValueError, match=r"must be global_batch_size, got .* and 9"):
        Plan(**fields | {"global_batch_size": 9})


def test_segments_are_named_by_their_stages_and_by_the_module_calls_around_them() -> None:
    """Stages 1 to 3, of which 2 and 3 within, then 4 by itself with its products kept."""
    profile = next(p for p in map(random_profile, SEEDS) if len(p.stages) == 6)
    placed = Placed(segments=((1, 4), (2, 4)), selective=(4,))
    named = name_segments(profile, placed)
    assert [(s.first, s.last, s.enter, s.leave, s.mode, s.depth) for s in named] == [
        ("h.1", "h.3", "h.1", "h.4", "recompute", 0),
        ("h.2", "h.3", "h.2", "h.4", "recompute", 1),
        ("h.4", "h.4", "h.4", "h.5", "selective", 0),
    ]
    assert index_segments(profile, named) == placed


def test_baselines_are_the_largest_micro_batch_with_nothing_every_block_and_every_sqrt_block() -> None:
    """Six stages, the four inner ones blocks of their own: sqrt(4) = 2 segments of 2."""
    profile = next(
        p
        for p in map(random_profile, SEEDS)
        if [s.recomputable for s in p.stages] == [False, *[True] * 4, False]
    )
    baselines = optimize(profile, GLOBAL_BATCH).baselines
    expected: dict[str, Segments] = {
        "plain": (), "sqrt": ((1, 3), (3, 5)), "every_block": ((1, 2), (2, 3), (3, 4), (4, 5)),
    }  # fmt: skip
    for name, segments in expected.items():
        choice = getattr(baselines, name)
        placed = Placed(segments=segments)
        seconds, peak = seconds_and_peak(profile, profile.precisions[0], 4, placed)
        assert index_segments(profile, choice.checkpoint) == placed
        assert (choice.micro_batch_size, choice.gradient_accumulation_steps, choice.precision) == (
            4,
            2,
            "fp32",
        )
        assert choice.prediction.step_seconds == pytest.approx(seconds)
        assert choice.prediction.peak_memory_bytes == peak


def test_a_model_without_recomputable_stages_has_the_plain_plan_only() -> None:
    profile = random_profile(0)
    stages = tuple(msgspec.structs.replace(stage, recomputable=False) for stage in profile.stages)
    plan = optimize(msgspec.structs.replace(profile, stages=stages), GLOBAL_BATCH)
    assert plan.checkpoint == plan.baselines.sqrt.checkpoint == plan.baselines.every_block.checkpoint == ()


def test_half_blocks_of_one_number_are_one_block() -> None:
    profile = random_profile(0)
    names = ("wte", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "layer4.0", "layer4.1", "avgpool", "fc")
    stages = tuple(
        StageRecord(name=name, entry=name, recomputable=name not in ("wte", "fc"), parameter_count=1)
        for name in names
    )
    assert blocks(msgspec.structs.replace(profile, stages=stages)) == [(1, 3), (3, 5), (5, 6), (6, 7), (7, 8)]


def test_only_the_precisions_asked_for_are_considered() -> None:
    for seed in SEEDS[:10]:
        assert optimize(random_profile(seed), 8, precisions=("bf16",)).precision == "bf16"


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        (("fp16",), r"holds fp32, bf16, not fp16 \(7\.5 times slower than fp32 here\)"),
        ((), "no precision at all"),
    ],
)
def test_a_precision_that_was_not_profiled_is_refused(
    precisions: tuple[Precision, ...], message: str
) -> None:
    with pytest.raises(PrecisionNotProfiled, match=message):
        optimize(random_profile(0), 8, precisions=precisions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, got 0"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes must be at least 1, got 0"),
        ({"weights": Weights(energy=1.0)}, "needs a source of energy"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(random_profile(0), **{"global_batch_size": 8} | arguments)


def test_a_global_batch_without_a_divisor_in_the_profiled_range_is_refused() -> None:
    profile = msgspec.structs.replace(
        (made := random_profile(0)), micro_batch_sizes=(2, 4),
        precisions=tuple(
            msgspec.structs.replace(p, wall=(msgspec.structs.replace(p.wall[0], micro_batch_size=2), p.wall[1]))
            for p in made.precisions
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="between 2 and 4, the profiled range, got 7"):
        optimize(profile, 7)


def test_weights_that_weigh_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0, 0 and 0"):
        Weights(time=0.0)


def test_weights_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be negative, got -1\.0, 1\.0 and 0\.0"):
        Weights(time=-1.0, memory=1.0)

"""Why a plan won, and how few words say what it recomputes; expectations worked out by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import planner
from planner.cost import instead
from planner.explain import budget_for, checkpoint_text, explain, segment_runs, stage_groups
from profiler import records
from profiler.profile_record import Profile
from tests.plans import plan, segment, with_weights


@pytest.fixture(scope="module")
def gpt2() -> Profile:
    return records.read(Path(__file__).parent / "data" / "gpt2.profile.json", Profile)


def test_a_budget_binds_when_a_cheaper_plan_does_not_fit() -> None:
    why = explain(plan(700))
    assert why.binding
    assert (why.needed_bytes, why.headroom_bytes) == (661, 39)  # 600 bytes, a tenth more, and the next byte


def test_a_budget_that_all_plans_fit_does_not_bind() -> None:
    why = explain(plan(1200))
    assert not why.binding
    assert why.headroom_bytes == 99  # of 1200, beside the 1101 that 1000 bytes and a tenth need
    assert why.next_faster is None
    assert why.without_limit.same


def test_without_a_budget_there_is_no_headroom_to_speak_of() -> None:
    why = explain(plan(None))
    assert (why.memory_budget_bytes, why.headroom_bytes, why.binding) == (None, None, False)


def test_the_plain_plan_loses_by_not_fitting_and_the_others_by_their_time() -> None:
    plain, sqrt, every_block = explain(plan(700)).baselines
    assert (plain.fits, sqrt.fits, every_block.fits) == (False, True, True)
    assert plain.budget_bytes == 1101
    assert sqrt.relative_step_seconds == pytest.approx(14 / 12 - 1)
    assert every_block.relative_step_seconds == pytest.approx(13 / 12 - 1)
    assert sqrt.relative_peak_memory_bytes == pytest.approx(400 / 600 - 1)


def test_costs_are_those_of_the_plans_own_weights() -> None:
    why = explain(with_weights(time=1, memory=0.5))
    assert why.baselines[0].cost == pytest.approx(1.5)  # plain: 10/10 + 0.5 * 1000/1000
    assert why.baselines[1].cost == pytest.approx(1.6)  # sqrt: 14/10 + 0.5 * 400/1000
    assert why.baselines[1].relative_cost == pytest.approx(1.6 / 1.5 - 1)  # the plan: 12/10 + 0.5 * 600/1000


def test_the_chosen_plan_counts_where_the_front_in_the_file_leaves_it_out() -> None:
    made = with_weights(time=1, memory=0.8)
    ends = msgspec.structs.replace(made, front=(made.front[0], made.front[-1]))
    why = explain(ends)
    # It costs 1.2 + 0.48 = 1.68; the ends of the front 1.5 + 0.24 and 1 + 0.8.
    assert why.without_limit.same
    assert not why.binding


def test_a_faster_plan_that_fits_is_not_what_more_memory_buys() -> None:
    why = explain(with_weights(time=1, memory=2))
    # The tightest is chosen, for 1.5 + 0.6; the next faster takes 12 s and fits, the one of 11 s does not.
    assert why.tightest.same
    assert why.next_faster is not None
    assert why.next_faster.step_seconds == 11


def test_a_baseline_can_take_the_place_of_the_plan() -> None:
    made = instead(plan(700), plan(700).baselines.plain)
    assert (made.checkpoint, made.prediction.step_seconds) == ((), 10)
    assert (made.objective.cost, made.objective.optimal) == (1.0, False)
    assert made.memory_budget_bytes is None


def test_the_tightest_the_next_and_the_last_plan_of_the_front_show_what_memory_buys() -> None:
    why = explain(plan(700))
    assert why.tightest.budget_bytes == 331
    assert why.tightest.segments == 3
    assert why.next_faster is not None
    assert why.next_faster.budget_bytes == 881
    assert why.without_limit.relative_step_seconds == pytest.approx(10 / 12 - 1)


def test_the_largest_part_of_the_peak_is_named_first() -> None:
    assert list(explain(plan(700)).peak_parts.items()) == [("activations", 500), ("parameters", 100)]


def test_the_tightest_budget_is_feasible_and_two_bytes_less_are_not(gpt2: Profile) -> None:
    tightest = explain(planner.optimize(gpt2, 8, 3 * 2**30)).tightest.budget_bytes
    assert budget_for(planner.optimize(gpt2, 8, tightest).prediction) == tightest
    with pytest.raises(planner.NoFeasiblePlan):
        planner.optimize(gpt2, 8, tightest - 2)


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        ((), "nothing recomputed"),
        ((segment("drop"),), "drop (1 segment of one stage)"),
        ((segment("h.0.attn", "h.2.mlp"),), "h.0.attn .. h.2.mlp (1 segment)"),
        (tuple(segment(f"h.{i}.mlp") for i in range(9)), "h.0.mlp .. h.8.mlp (9 segments of one stage)"),
        (
            tuple(segment(f"h.{i}.mlp") for i in (0, 1, 3)),
            "h.0.mlp .. h.1.mlp (2 segments of one stage); h.3.mlp (1 segment of one stage)",
        ),
        (
            (segment("h.0"), segment("h.2")),
            "h.0 (1 segment of one stage); h.2 (1 segment of one stage)",
        ),
        (
            tuple(segment(f"h.{i}.attn", f"h.{i + 2}.mlp") for i in (0, 3, 6)),
            "h.0.attn .. h.8.mlp (3 segments, the first up to h.2.mlp)",
        ),
        (
            (segment("h.0.attn"), segment("h.0.mlp"), segment("h.1.attn"), segment("h.1.mlp")),
            "h.0.attn .. h.1.attn (2 segments of one stage); h.0.mlp .. h.1.mlp (2 segments of one stage)",
        ),
        (
            (segment("layer1.1"), segment("layer2.0"), segment("layer2.1")),
            "layer1.1 (1 segment of one stage); layer2.0 .. layer2.1 (2 segments of one stage)",
        ),
    ],
)
def test_segments_that_count_upwards_are_said_in_one_breath(checkpoint: tuple, text: str) -> None:
    assert checkpoint_text(checkpoint) == text


def test_no_segment_is_lost_in_runs(gpt2: Profile) -> None:
    for point in planner.optimize(gpt2, 8).front:
        found = [each for run in segment_runs(point.checkpoint) for each in run.segments]
        assert sorted(each.first for each in found) == sorted(each.first for each in point.checkpoint)


def test_stages_alike_but_for_their_numbers_are_one_row(gpt2: Profile) -> None:
    groups = stage_groups(gpt2, "fp32")
    assert [(group.name, group.count) for group in groups] == [
        ("transformer.wte", 1),
        ("transformer.drop", 1),
        ("transformer.h.*.attn", 12),
        ("transformer.h.*.mlp", 12),
        ("transformer.ln_f", 1),
        ("lm_head", 1),
    ]
    assert groups[2].parameter_count == 12 * 2_363_904
    assert sum(group.count for group in groups) == len(gpt2.stages)

"""What would change a plan: every answer is what the search finds when it is asked that question itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner.search
from planner.explain import answers, budget_for, chosen, explain, outcome_text
from planner.plan import Choice, NoFeasiblePlan, Plan, Weights, WhatIf
from planner.search import Space, optimize, space
from planner.what_if import (
    NOT_SEARCHED,
    OtherProfile,
    memory_step_bytes,
    ways_out,
    ways_out_text,
    what_ifs,
    what_ifs_of,
)
from profiler import catalogue, records
from profiler.profile_record import Profile
from studies.deciding import longer
from tests import plans
from tests.profiles import profiles, random_profile
from tests.test_zero import linked

BATCH = 8
EVERY = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def gpt2() -> Profile:
    return records.read(Path(__file__).parent / "data" / "gpt2.profile.json", Profile)


def asked(
    profile: Profile, budget: int | None = None, **more: object
) -> tuple[Space, Plan, dict[str, WhatIf]]:
    """A question with its answer, and what else could be asked by how it is told."""
    searched = space(profile, BATCH, budget, **more)  # type: ignore[arg-type]
    plan = searched.plan()
    return searched, plan, {each.change: each for each in what_ifs(searched, plan)}


def middle_budget(profile: Profile, **more: object) -> int:
    """One that some plans fit and others do not."""
    front = optimize(profile, BATCH, **more).front  # type: ignore[arg-type]
    return (budget_for(front[0].prediction) + budget_for(front[-1].prediction)) // 2


def unchunked(profile: Profile) -> Profile:
    precisions = tuple(msgspec.structs.replace(each, chunked_head=None) for each in profile.precisions)
    return msgspec.structs.replace(profile, precisions=precisions)


def unrecomputable(profile: Profile) -> Profile:
    stages = tuple(msgspec.structs.replace(stage, recomputable=False) for stage in profile.stages)
    return msgspec.structs.replace(profile, stages=stages)


def directly(profile: Profile, searched: Space, what_if: WhatIf) -> Choice:
    """The same question, typed out; where nothing fits, what is said to need least."""
    before = searched.asked
    precisions, zero_stages = list(before.precisions), list(before.zero_stages)
    match what_if.knob:
        case "precision":
            precisions.append(what_if.change.split()[0])  # type: ignore[arg-type]
        case "recomputation":
            profile = unrecomputable(profile)
        case "loss_chunks":
            profile = unchunked(profile)
        case "devices":
            zero_stages = list(EVERY)
        case "zero_stage":
            zero_stages.append(int(what_if.change.split()[2]))
        case _:
            pass
    return chosen(
        optimize(
            profile, BATCH, what_if.memory_budget_bytes, searched.weights, what_if.world_size,
            precisions=precisions, zero_stages=zero_stages,
        )
    )  # fmt: skip


@settings(max_examples=10)
@given(profile=profiles(), where=st.floats(0.0, 1.2), world_size=st.sampled_from((1, 2)), both=st.booleans())
def test_every_answer_is_what_the_search_says_when_asked_itself(
    profile: Profile, where: float, world_size: int, both: bool
) -> None:
    more: dict[str, object] = {"world_size": world_size, "precisions": ("fp32",)}
    if world_size == 2:
        more["zero_stages"] = EVERY if both else (0,)
    elif both:
        del more["precisions"]
    front = optimize(profile, BATCH, **more).front  # type: ignore[arg-type]
    low, high = (budget_for(end.prediction) for end in (front[0], front[-1]))
    searched, _, found = asked(profile, round(low + where * (high - low)), **more)
    for each in found.values():
        if each.choice is None:
            assert each.reason
        elif each.choice.fits:
            assert directly(profile, searched, each) == each.choice, each.change
        else:
            with pytest.raises(NoFeasiblePlan):
                directly(profile, searched, each)


def test_a_little_more_memory_and_a_little_less_are_other_budgets(gpt2: Profile) -> None:
    budget = middle_budget(gpt2)
    _, plan, found = asked(gpt2, budget)
    more, less = found["256 MiB more"], found["256 MiB less"]
    assert (more.memory_budget_bytes, less.memory_budget_bytes) == (budget + 2**28, budget - 2**28)
    assert more.choice == chosen(optimize(gpt2, BATCH, budget + 2**28))
    assert less.choice == chosen(optimize(gpt2, BATCH, budget - 2**28))
    assert more.choice.prediction.step_seconds < plan.prediction.step_seconds
    assert less.choice.prediction.step_seconds > plan.prediction.step_seconds
    assert found["no memory limit"].choice == chosen(optimize(gpt2, BATCH))


def test_where_less_memory_fits_nothing_the_tightest_plan_is_told(gpt2: Profile) -> None:
    _, _, found = asked(gpt2, 2400 * 2**20)
    less = found["256 MiB less"]
    with pytest.raises(NoFeasiblePlan) as none:
        optimize(gpt2, BATCH, less.memory_budget_bytes)
    assert less.choice is not None
    assert not less.choice.fits
    assert less.choice.prediction == none.value.tightest


def test_without_a_limit_less_is_less_than_the_plan_needs(gpt2: Profile) -> None:
    _, plan, found = asked(gpt2)
    less = found["256 MiB less than it needs"]
    assert less.memory_budget_bytes == budget_for(plan.prediction) - 2**28
    assert less.choice == chosen(optimize(gpt2, BATCH, less.memory_budget_bytes))
    assert not any("more" in change or "limit" in change for change in found)


@pytest.mark.parametrize("seed", [3, 13, 25])
def test_the_least_memory_is_what_fits_and_no_byte_less(seed: int) -> None:
    """Segments inside segments count: those of seed 25 need less than all others."""
    profile = random_profile(seed)
    _, _, found = asked(profile)
    least = found["the least memory"]
    assert least.memory_budget_bytes is not None
    assert chosen(optimize(profile, BATCH, least.memory_budget_bytes)) == least.choice
    with pytest.raises(NoFeasiblePlan):
        optimize(profile, BATCH, least.memory_budget_bytes - 2)
    front = optimize(profile, BATCH).front
    assert (budget_for(front[0].prediction) > least.memory_budget_bytes) == (seed == 25)


@pytest.mark.parametrize(("memory", "step"), [(8, 1), (80, 1), (4, 0.5), (2600 / 1024, 0.25), (3.9, 0.25)])
def test_a_little_memory_is_a_round_number_an_eighth_or_less(memory: float, step: float) -> None:
    assert memory_step_bytes(int(memory * 2**30)) == step * 2**30
    assert [memory_step_bytes(size) for size in (1, 700, 2**20)] == [1, 64, 2**17]


def test_a_precision_that_was_not_asked_for_is_allowed(gpt2: Profile) -> None:
    budget = middle_budget(gpt2)
    for own, other in (("fp32", "bf16"), ("bf16", "fp32")):
        _, _, found = asked(gpt2, budget, precisions=(own,))
        assert found[f"{other} as well"].choice == chosen(optimize(gpt2, BATCH, budget))
        assert found["fp16 as well"].reason == "not profiled: planner profile --precision fp32,bf16,fp16"
    assert "bf16 as well" not in asked(gpt2, budget)[2]


def test_a_hopeless_precision_is_told_by_how_much() -> None:
    _, _, found = asked(random_profile(1))
    assert found["fp16 as well"].reason == "7.5 times slower than fp32 on this device"


def test_costs_are_on_the_scale_of_the_plan_that_was_chosen() -> None:
    """Over its own plain plan's, where that of two processes has another time and peak."""
    profile = linked(8)
    weights = Weights(time=1.0, memory=1.0)
    _, plan, found = asked(profile, weights=weights)
    choice = found["2 devices"].choice
    assert choice is not None
    plain = plan.baselines.plain.prediction

    def scaled(predicted: planner.plan.Prediction) -> float:
        time = predicted.step_seconds / plain.step_seconds
        return time + predicted.peak_memory_bytes / plain.peak_memory_bytes

    together = space(profile, BATCH, world_size=2, zero_stages=EVERY)
    every = [
        together.choice(knobs, point[3])
        for knobs in together.candidates()
        for point in together.fitting(knobs)
    ]
    assert scaled(choice.prediction) == pytest.approx(
        min(scaled(each.prediction) for each in every), abs=1e-9
    )
    (answer,) = (
        each for each in answers(msgspec.structs.replace(plan, what_ifs=(found["2 devices"],))) or ()
    )
    assert answer.plan is not None
    assert answer.plan.cost == pytest.approx(scaled(choice.prediction))


def test_recomputation_and_the_loss_in_chunks_are_forbidden_where_the_plan_has_them(gpt2: Profile) -> None:
    searched, plan, found = asked(gpt2, middle_budget(gpt2))
    assert plan.checkpoint
    plain = found["nothing recomputed"].choice
    assert plain == chosen(optimize(unrecomputable(gpt2), BATCH, searched.memory_budget_bytes))
    assert "nothing recomputed" not in asked(gpt2)[2]
    assert "the loss in one piece" not in found


def test_more_devices_are_the_next_that_divide_the_batch_and_have_a_link(gpt2: Profile) -> None:
    profile = linked(3)
    found = asked(profile)[2]["2 devices"]
    assert found.choice == chosen(optimize(profile, BATCH, world_size=2, zero_stages=EVERY))
    unlinked = msgspec.structs.replace(profile, link=None)
    assert asked(unlinked)[2]["2 devices"].reason == "their link is not known: planner profile --world-size 2"
    known = catalogue.devices()[0]
    device = msgspec.structs.replace(profile.device, name=known.title, kind="cuda")
    catalogued = msgspec.structs.replace(unlinked, device=device)
    found = asked(catalogued)[2]["2 devices"]
    assert found.choice == chosen(optimize(catalogued, BATCH, world_size=2, zero_stages=EVERY))
    assert asked(profile, world_size=2)[2]["4 devices"].reason is not None
    assert asked(gpt2)[2]["2 devices"].reason == (
        "the profile does not hold the model's parameters: profile again"
    )
    only = space(gpt2, 1)
    assert {each.change: each.reason for each in what_ifs(only, only.plan())}["more devices"] == (
        "no larger number of them divides a global batch of 1"
    )


def test_each_stage_of_zero_that_was_not_asked_for_is_allowed() -> None:
    profile = linked(5)
    _, _, found = asked(profile, world_size=2, zero_stages=(1,))
    assert [change for change in found if "ZeRO" in change] == [f"ZeRO stage {n} as well" for n in (0, 2, 3)]
    for stage in (0, 2, 3):
        direct = optimize(profile, BATCH, world_size=2, zero_stages=(1, stage))
        assert found[f"ZeRO stage {stage} as well"].choice == chosen(direct)
    assert found["fp16 as well"].reason == "several processes run in fp32 or bf16 only"


def test_several_processes_are_offered_the_other_precision_that_they_run_in() -> None:
    profile = linked(5)
    _, _, found = asked(profile, world_size=2, precisions=("fp32",))
    direct = optimize(profile, BATCH, world_size=2, precisions=("fp32", "bf16"))
    assert found["bf16 as well"].choice == chosen(direct)


def test_a_plan_with_the_largest_micro_batch_says_how_to_look_further(gpt2: Profile) -> None:
    assert asked(gpt2)[2]["larger micro-batches"].reason == (
        "2 is the largest that was profiled: planner profile --batch 1,2,4"
    )
    whole = space(gpt2, 2)  # of which a micro-batch of 2 is all
    assert "larger micro-batches" not in [each.change for each in what_ifs(whole, whole.plan())]


def test_another_budget_looks_at_the_same_frontiers(gpt2: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = planner.search.pareto

    def counted(units):  # type: ignore[no-untyped-def]
        solved.append(1)
        return solve(units)

    monkeypatch.setattr(planner.search, "pareto", counted)
    searched = space(gpt2, BATCH, 2600 * 2**20)
    plan, before = searched.plan(), len(solved)
    found = what_ifs(searched, plan)
    assert len([each for each in found if each.choice is not None]) == 5
    assert before == len(solved) == 4  # two precisions, two micro-batches


def test_in_a_long_chain_nobody_waits_for_segments_inside_segments(gpt2: Profile) -> None:
    profile = longer(gpt2, 36)
    tightest = budget_for(optimize(profile, BATCH, precisions=("bf16",)).front[0].prediction)
    _, _, found = asked(profile, tightest, precisions=("bf16",))
    (less,) = (each for change, each in found.items() if change.endswith(" less"))
    assert (less.choice, less.reason) == (None, NOT_SEARCHED)
    assert found["the least memory, no segment in another"].memory_budget_bytes == tightest


# Where nothing fits


@pytest.mark.parametrize(("seed", "precision_fits"), [(6, True), (7, False)])
def test_where_nothing_fits_the_ways_out_are_those_that_fit(seed: int, precision_fits: bool) -> None:
    profile = linked(seed)
    needs = [
        asked(profile, precisions=("fp32",), **more)[2]["the least memory"].memory_budget_bytes
        for more in ({}, {"world_size": 2, "zero_stages": EVERY})
    ]
    assert needs[0] is not None
    assert needs[1] is not None
    assert needs[1] < needs[0] - 2
    searched = space(profile, BATCH, needs[0] - 2, precisions=("fp32",))
    with pytest.raises(NoFeasiblePlan):
        searched.plan()
    ways = ways_out(searched)
    assert ways[0].memory_budget_bytes == needs[0]
    assert [way.knob for way in ways[1:]] == ["precision"] * precision_fits + ["devices"]
    for way in ways[1:]:
        assert directly(profile, searched, way) == way.choice
    devices = ways[-1]
    assert devices.choice is not None
    assert ways_out_text(ways).endswith(f"or with --world-size 2 --zero-stage {devices.choice.zero_stage}.")
    assert ways_out_text(ways).startswith(f"A plan fits with --memory-budget {needs[0]}, ")


# Of a plan from a file


def test_a_plan_made_in_python_is_asked_about_with_its_profile(gpt2: Profile) -> None:
    budget = middle_budget(gpt2)
    plan = optimize(gpt2, BATCH, budget, precisions=("fp32",))
    assert plan.what_ifs is None
    searched = space(gpt2, BATCH, budget, precisions=("fp32",))
    assert what_ifs_of(plan, gpt2) == what_ifs(searched, plan)
    with pytest.raises(OtherProfile, match=r"made from profile \w{12}, and this is \w{12}\. Give the one"):
        what_ifs_of(plan, random_profile(1))
    old = msgspec.structs.replace(plan, asked=None)
    with pytest.raises(ValueError, match="does not say what it was chosen from: an older version wrote it"):
        what_ifs_of(old, gpt2)


# The explanation: the plan by hand takes 12 s and 600 bytes and has a budget of 700


def with_what_if(budget_bytes: int | None, seconds: float, peak: int, fits: bool = True) -> Plan:
    choice = msgspec.structs.replace(plans.choice(seconds, peak, 10**9), fits=fits)
    found = WhatIf(
        knob="memory_budget", change="changed", memory_budget_bytes=budget_bytes, world_size=1, choice=choice
    )
    return msgspec.structs.replace(plans.plan(700), what_ifs=(found,))


def test_an_answer_is_beside_the_plan() -> None:
    (answer,) = explain(with_what_if(900, 11, 800)).what_ifs or ()
    assert answer.plan is not None
    assert answer.feasible
    assert answer.plan.relative_step_seconds == pytest.approx(11 / 12 - 1)
    assert answer.plan.relative_peak_memory_bytes == pytest.approx(800 / 600 - 1)
    assert answer.plan.cost == pytest.approx(1.1)
    assert answer.plan.relative_cost == pytest.approx(1.1 / 1.2 - 1)
    assert outcome_text(answer) == "fp32, 2 x 4, no segments"


def test_the_price_of_memory_is_in_seconds_per_gib() -> None:
    """A second for 200 bytes more; three for 400 less; none where the plan stays or the budget has no end."""
    for budget, seconds, rate in ((900, 11, 1 / 200), (300, 15, 3 / 400), (900, 12, None), (None, 10, None)):
        (answer,) = explain(with_what_if(budget, seconds, 600)).what_ifs or ()
        assert answer.seconds_per_gib == (None if rate is None else pytest.approx(rate * 2**30))


def test_an_answer_that_fits_nothing_or_is_not_known_says_so() -> None:
    (answer,) = explain(with_what_if(200, 15, 300, fits=False)).what_ifs or ()
    assert (answer.feasible, answer.seconds_per_gib) == (False, None)
    assert outcome_text(answer) == "nothing fits: the tightest needs 331 B"
    unknown = WhatIf(
        knob="devices", change="2 devices", memory_budget_bytes=700, world_size=2, choice=None, reason="why"
    )
    (answer,) = answers(msgspec.structs.replace(plans.plan(700), what_ifs=(unknown,))) or ()
    assert (answer.feasible, answer.plan, outcome_text(answer)) == (None, None, "why")


def test_the_same_knobs_on_more_devices_are_another_plan() -> None:
    own = chosen(plans.plan(700))
    for world_size, text in ((1, "this very plan"), (2, "fp32, 2 x 4, ZeRO stage 0, 2 segments")):
        found = WhatIf(knob="devices", change="x", memory_budget_bytes=700, world_size=world_size, choice=own)
        (answer,) = answers(msgspec.structs.replace(plans.plan(700), what_ifs=(found,))) or ()
        assert outcome_text(answer) == text


def test_the_tightest_budget_is_the_least_of_all_answers() -> None:
    """The front's tightest plan needs 331 bytes."""
    assert explain(with_what_if(221, 20, 200)).tightest.budget_bytes == 221
    assert explain(with_what_if(221, 20, 200, fits=False)).tightest.budget_bytes == 331
    assert explain(with_what_if(900, 11, 800)).tightest.budget_bytes == 331

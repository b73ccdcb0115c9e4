"""The placement solver against published optima, an interpreter that executes its plans, and brute force.

`execute` walks a schedule one operation at a time under the rules written in data/chains.json: it keeps the
set of held items, refuses an operation whose operands are gone, and knows nothing of units or recursions.
`every_plan` lists all single-level plans of a short chain, the useless ones as well.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import kernels, nested
from planner import placement as placement_module
from planner.placement import (
    Chain,
    Units,
    chain_units,
    exactly_summable,
    frontier,
    pareto,
    place,
    ruled_out,
    sqrt_segments,
)
from studies.solver import chain_of

PUBLISHED = {
    entry["name"]: entry
    for entry in json.loads((Path(__file__).parent / "data" / "chains.json").read_text())["chains"]
}
THREE_STAGES = Chain(
    forward=(1, 2, 4),
    backward=(2, 4, 8),
    input=(1, 2, 1, 1),
    kept=(5, 6, 3),
    forward_transient=(0, 0, 0),
    backward_transient=(0, 0, 0),
)


def published_chain(name: str) -> Chain:
    return chain_of(PUBLISHED[name])


def execute(chain: Chain, schedule: Iterable[tuple[str, int]]) -> tuple[float, float]:
    """Peak and cost of a schedule; an AssertionError where it asks for what is not there."""
    held: dict[tuple[str, int], float] = {("x", 0): chain.input[0]}
    peak = cost = 0.0

    def add(item: tuple[str, int], size: float, transient: float = 0) -> None:
        nonlocal peak
        assert item not in held, f"{item} is held already"
        held[item] = size
        peak = max(peak, sum(held.values()) + transient)

    def holder_of_input(stage: int) -> tuple[str, int]:
        holder = ("x", stage) if ("x", stage) in held else ("xb", stage - 1)
        assert holder in held, f"x_{stage} is gone"
        return holder

    for operation, i in schedule:
        if operation == "Loss":
            holder_of_input(i)
            add(("y", i), chain.input[i])
        elif operation == "B":
            assert ("y", i + 1) in held, f"no gradient of x_{i + 1}"
            assert ("xb", i) in held, f"stage {i} was not run with gradients"
            holder_of_input(i)
            add(("y", i), chain.input[i], chain.backward_transient[i])
            del held["y", i + 1], held["xb", i]
            held.pop(("x", i), None)
            cost += chain.backward[i]
        else:
            holder = holder_of_input(i)
            item, size = (
                (("xb", i), chain.kept[i]) if operation == "Fe" else (("x", i + 1), chain.input[i + 1])
            )
            add(item, size, chain.forward_transient[i])
            if operation == "Fn":
                del held[holder]
            cost += chain.forward[i]
    assert ("y", 0) in held
    return peak, cost


def operations(plan: Sequence[tuple[int, int, bool]]) -> list[tuple[str, int]]:
    """The grammar of single-level plans, read literally; a plan lists (start, stop, is recomputed)."""
    if not plan:
        return []
    (start, stop, recomputed), rest = plan[0], plan[1:]
    with_gradients = [("Fe", k) for k in range(start, stop)]
    backward = [("B", k) for k in range(stop - 1, start - 1, -1)]
    inner = operations(rest) or [("Loss", stop)]
    if recomputed:
        return [
            ("Fc", start),
            *[("Fn", k) for k in range(start + 1, stop)],
            *inner,
            *with_gradients,
            *backward,
        ]
    return with_gradients + inner + backward


def plan_of(length: int, segments: Iterable[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    inside = {stage for start, stop in segments for stage in range(start, stop)}
    kept = [(stage, stage + 1, False) for stage in range(length) if stage not in inside]
    return sorted(kept + [(start, stop, True) for start, stop in segments])


def every_plan(length: int, start: int = 0) -> Iterator[list[tuple[int, int, bool]]]:
    if start == length:
        yield []
    for stop in range(start + 1, length + 1):
        for rest in every_plan(length, stop):
            yield [(start, stop, True), *rest]
            if stop == start + 1:
                yield [(start, stop, False), *rest]


def every_nested_plan(length: int, start: int, stop: int) -> Iterator[list[tuple[str, int]]]:
    """The grammar of nested plans, read literally: the operations of every way to work off [start, stop)."""
    if start == stop:
        yield [("Loss", length)] if stop == length else []
        return
    for rest in every_nested_plan(length, start + 1, stop):
        yield [("Fe", start), *rest, ("B", start)]
    for middle in range(start + 1, stop):
        dropping = [("Fc", start), *[("Fn", k) for k in range(start + 1, middle)]]
        for rest in every_nested_plan(length, middle, stop):
            for again in every_nested_plan(length, start, middle):
                yield [*dropping, *rest, *again]


def best_of(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    best: list[tuple[float, float]] = []
    for peak, cost in sorted(points):
        if not best or cost < best[-1][1]:
            best.append((peak, cost))
    return tuple(best)


@st.composite
def chains(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Chain:
    length = draw(st.integers(1, 6))
    per_stage = st.tuples(*[values] * length)
    return Chain(
        forward=draw(per_stage),
        backward=draw(per_stage),
        input=draw(st.tuples(*[values] * (length + 1))),
        kept=draw(per_stage),
        forward_transient=draw(per_stage),
        backward_transient=draw(per_stage),
    )


@st.composite
def random_units(draw: st.DrawFn) -> Units:
    length = draw(st.integers(0, 5))
    dtype = np.dtype(draw(st.sampled_from(["int64", "float64"])))

    def table(*shape: int) -> np.ndarray[Any, Any]:
        size = math.prod(shape)
        # Quarters are exact in binary, so the floats must agree to the last bit as well.
        values = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
        return (np.array(values).reshape(shape) / (4 if dtype.kind == "f" else 1)).astype(dtype)

    need = table(length, length + 1)
    need[table(length, length + 1) < draw(st.integers(0, 2))] = ruled_out(dtype)
    return Units(
        need=need,
        hold=table(length, length + 1),
        cost=table(length, length + 1),
        keep_need=table(length),
        keep_hold=table(length),
        keep_cost=table(length),
        terminal_need=table(1)[0].item(),
    )


def peak_and_cost(units: Units, plan: Iterable[tuple[int, int, bool]]) -> tuple[float, float]:
    held = cost = 0
    peak = -math.inf
    for start, stop, recomputed in plan:
        peak = max(peak, held + (units.need[start, stop] if recomputed else units.keep_need[start]))
        held += units.hold[start, stop] if recomputed else units.keep_hold[start]
        cost += units.cost[start, stop] if recomputed else units.keep_cost[start]
    return max(peak, held + units.terminal_need), cost


def test_three_stages_have_the_frontier_worked_out_by_hand() -> None:
    # Nothing recomputed: 1 + 5 + 6 + 3 and the gradients 1 + 1 in B(2). Stage 0 recomputed holds 2 in place
    # of 5. Stages 0 and 1 recomputed apart: the worst is B(1), 1 + 2 + 6 and the gradients 1 + 2.
    assert frontier(THREE_STAGES) == ((12, 24), (14, 22), (17, 21))


def test_the_schedule_recomputes_a_segment_right_before_its_backward() -> None:
    placement = place(THREE_STAGES, 14)
    assert placement is not None
    assert placement.segments == ((0, 1),)
    assert placement.schedule == (
        ("Fc", 0),
        ("Fe", 1),
        ("Fe", 2),
        ("Loss", 3),
        ("B", 2),
        ("B", 1),
        ("Fe", 0),
        ("B", 0),
    )


def test_a_longer_segment_drops_what_lies_inside_it() -> None:
    # B(2) comes to 1 + 9 + 1 + 20 + 2 wherever x_1 is held, plain or kept, and to 9 less where it is not.
    chain = replace(THREE_STAGES, input=(1, 9, 1, 1), kept=(9, 1, 20))
    assert frontier(chain) == ((24, 24), (33, 21))
    placement = place(chain, 24)
    assert placement is not None
    assert placement.segments == ((0, 2),)
    assert placement.schedule == (
        ("Fc", 0),
        ("Fn", 1),
        ("Fe", 2),
        ("Loss", 3),
        ("B", 2),
        ("Fe", 0),
        ("Fe", 1),
        ("B", 1),
        ("B", 0),
    )


def test_a_budget_buys_the_fastest_plan_that_fits_it() -> None:
    bought = [place(THREE_STAGES, budget) for budget in (12, 13, 14, 16, 17, math.inf)]
    assert [(placement.peak, placement.cost) for placement in bought if placement] == [
        (12, 24),
        (12, 24),
        (14, 22),
        (14, 22),
        (17, 21),
        (17, 21),
    ]


@pytest.mark.parametrize("budget", [-1, 0, 11, 11.999, math.nan])
def test_no_plan_is_given_for_an_impossible_budget(budget: float) -> None:
    assert place(THREE_STAGES, budget) is None


def test_a_single_stage_can_only_be_kept() -> None:
    chain = Chain(
        forward=(3,),
        backward=(5,),
        input=(2, 1),
        kept=(4,),
        forward_transient=(10,),
        backward_transient=(1,),
    )
    # Fe(0): 2 + 4 + 10 while it runs; B(0): 2 + 4 + 1 + 2 + 1 is less.
    assert frontier(chain) == ((16, 8),)


def test_a_segment_may_be_at_its_worst_on_the_way_forward() -> None:
    chain = Chain(
        forward=(1, 1, 1),
        backward=(2, 2, 2),
        input=(0, 9, 0, 0),
        kept=(4, 2, 15),
        forward_transient=(0, 9, 0),
        backward_transient=(0, 0, 0),
    )
    # Nothing recomputed: Fe(2), 4 + 2 + 15. Stage 1: Fe(2), 4 + 0 + 15, while Fc(1) took 4 + 0 + 9.
    # Stages 0 and 1 in one: Fn(1), where x_1 is still there, 9 + 0 + 9.
    assert frontier(chain) == ((18, 11), (19, 10), (21, 9))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_frontier_equals_the_published_one(name: str) -> None:
    started = time.perf_counter()
    found = frontier(published_chain(name))
    print(f"\n{name}: {len(found)} points in {1e3 * (time.perf_counter() - started):.1f} ms")
    assert found == tuple(map(tuple, PUBLISHED[name]["single_frontier"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_point_of_the_frontier_executes_to_its_peak_and_cost(name: str) -> None:
    chain = published_chain(name)
    solved = pareto(chain_units(chain))
    executed = tuple(
        execute(chain, operations(plan_of(len(chain.forward), solved.segments(index))))
        for index in range(len(solved.points))
    )
    assert executed == solved.points


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_budget_gets_its_optimum_and_a_schedule_that_keeps_to_it(name: str) -> None:
    chain = published_chain(name)
    for budget in PUBLISHED[name]["budgets"]:
        placement = place(chain, budget["M"])
        if budget["single_opt"] is None:
            assert placement is None
        else:
            assert placement is not None
            assert placement.cost == placement.lower_bound == budget["single_opt"]
            assert placement.peak <= budget["single_plan_peak"] <= budget["M"]
            assert execute(chain, placement.schedule) == (placement.peak, placement.cost)
            assert list(placement.schedule) == operations(plan_of(len(chain.forward), placement.segments))


@pytest.mark.parametrize("in_steps", [False, True])
def test_a_nested_plan_may_be_at_its_worst_while_it_drops(
    in_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 takes 20 while it runs. Kept: x_0, xb_0 and 3 + 20. Dropped first, x_1 and x_2 beside it: 2 + 2 + 20."""
    if in_steps:
        monkeypatch.setattr(nested, "MOST_SLOTS", 0)
    chain = Chain(
        forward=(1, 1, 1), backward=(1, 1, 1), input=(1, 2, 2, 30), kept=(9, 3, 30), forward_transient=(0, 20, 0),
        backward_transient=(0, 0, 0),
    )  # fmt: skip
    length = len(chain.forward)
    plans = every_nested_plan(length, 0, length)
    assert frontier(chain, nested=True) == best_of(execute(chain, plan) for plan in plans)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_nested_frontier_equals_the_published_one(name: str) -> None:
    assert frontier(published_chain(name), nested=True) == tuple(
        map(tuple, PUBLISHED[name]["nested_frontier"])
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"rand200"}))
def test_every_point_of_the_nested_frontier_executes_to_its_peak_and_cost(name: str) -> None:
    chain = published_chain(name)
    for point in frontier(chain, nested=True):
        placement = place(chain, point[0], nested=True)
        assert placement is not None
        assert (placement.peak, placement.cost) == point == execute(chain, placement.schedule)


def test_a_deep_plan_of_two_hundred_stages_executes_to_its_peak_and_cost() -> None:
    chain = published_chain("rand200")
    tightest = place(chain, PUBLISHED["rand200"]["min_M_nested"], nested=True)
    assert tightest is not None
    assert execute(chain, tightest.schedule) == (tightest.peak, tightest.cost)
    assert place(chain, PUBLISHED["rand200"]["min_M_nested"] - 1, nested=True) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_budget_gets_its_nested_optimum(name: str) -> None:
    points = frontier(published_chain(name), nested=True)
    for budget in PUBLISHED[name]["budgets"]:
        fitting = [cost for peak, cost in points if peak <= budget["M"]]
        assert (fitting[-1] if fitting else None) == budget["nested_opt"]


@pytest.mark.parametrize("name", ["rand16", "homog32", "resnet50_b32_fp32"])
def test_sizes_without_a_common_unit_have_the_same_nested_plans(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nested, "MOST_SLOTS", 0)
    chain = published_chain(name)
    assert frontier(chain, nested=True) == tuple(map(tuple, PUBLISHED[name]["nested_frontier"]))
    for point in frontier(chain, nested=True)[::4]:
        placement = place(chain, point[0], nested=True)
        assert placement is not None
        assert execute(chain, placement.schedule) == point


def test_long_chains_have_the_same_single_level_frontier_with_and_without_a_common_unit() -> None:
    stages = [stage % 7 for stage in range(placement_module.COMPILED_FROM_STAGES)]
    chain = Chain(
        forward=tuple(3 + stage for stage in stages),
        backward=tuple(5 + stage for stage in stages),
        input=(*(1 + stage % 3 for stage in stages), 2),
        kept=tuple(4 + stage for stage in stages),
        forward_transient=tuple(stage % 2 for stage in stages),
        backward_transient=tuple(stage % 4 for stage in stages),
    )
    assert frontier(chain) == pareto(chain_units(chain)).points
    for peak, cost in frontier(chain):
        placement = place(chain, peak)
        assert placement is not None
        assert (placement.peak, placement.cost) == (peak, cost) == execute(chain, placement.schedule)
        assert list(placement.schedule) == operations(plan_of(len(stages), placement.segments))


@given(chains(st.one_of(st.integers(0, 9), st.floats(0, 1))))
def test_a_frontier_is_the_same_before_and_after_the_compiled_loops_are_loaded(chain: Chain) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "planner.kernels", raising=False)
        before = frontier(chain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "planner.kernels", kernels)
        assert frontier(chain) == before


@settings(max_examples=1000)
@given(chains(st.integers(0, 9)), st.booleans())
def test_the_nested_frontier_is_the_best_of_all_nested_plans(chain: Chain, in_steps: bool) -> None:
    length = len(chain.forward)
    best = best_of(execute(chain, plan) for plan in every_nested_plan(length, 0, length))
    with pytest.MonkeyPatch.context() as patch:
        if in_steps:
            patch.setattr(nested, "MOST_SLOTS", 0)
        assert frontier(chain, nested=True) == best


@given(chains(st.floats(0, 1)))
def test_no_nested_plan_of_floats_beats_the_frontier_by_more_than_rounding(chain: Chain) -> None:
    length = len(chain.forward)
    found = frontier(chain, nested=True)
    for plan in every_nested_plan(length, 0, length):
        peak, cost = execute(chain, plan)
        assert any(p <= peak + 1e-13 and c <= cost + 1e-13 for p, c in found)
    for p, c in found:
        placement = place(chain, p, nested=True)
        assert placement is not None
        assert execute(chain, placement.schedule) == pytest.approx((p, c), rel=1e-13, abs=1e-13)


@settings(max_examples=1000)
@given(chains(st.integers(0, 9)))
def test_the_frontier_is_the_best_of_all_plans(chain: Chain) -> None:
    plans = every_plan(len(chain.forward))
    assert frontier(chain) == best_of(execute(chain, operations(plan)) for plan in plans)


@given(chains(st.floats(0, 1)))
def test_no_plan_beats_the_frontier_of_a_chain_of_floats_by_more_than_rounding(chain: Chain) -> None:
    found = frontier(chain)
    for plan in every_plan(len(chain.forward)):
        peak, cost = execute(chain, operations(plan))
        assert any(p <= peak + 1e-13 and c <= cost + 1e-13 for p, c in found)
    for p, c in found:
        placement = place(chain, p)
        assert placement is not None
        assert (placement.peak, placement.cost) == (p, c)
        assert execute(chain, placement.schedule) == pytest.approx((p, c), rel=1e-13, abs=1e-13)


@given(random_units())
def test_the_frontier_of_any_units_is_the_best_of_all_allowed_plans(units: Units) -> None:
    length = len(units.keep_need)
    barred = ruled_out(units.need.dtype)
    solved = pareto(units)
    assert solved.points == best_of(
        peak_and_cost(units, plan)
        for plan in every_plan(length)
        if not any(recomputed and units.need[start, stop] == barred for start, stop, recomputed in plan)
    )
    for index, point in enumerate(solved.points):
        assert peak_and_cost(units, plan_of(length, solved.segments(index))) == point


def test_of_equal_plans_the_one_with_fewer_recomputed_stages_then_fewer_segments_is_chosen() -> None:
    # Time is nothing here, every segment needs 5, and a kept stage what is listed: 6 where keeping is worse.
    def chosen(*keep_need: int) -> tuple[tuple[int, int], ...]:
        length = len(keep_need)
        units = Units(
            need=np.full((length, length + 1), 5),
            hold=np.zeros((length, length + 1), int),
            cost=np.zeros((length, length + 1), int),
            keep_need=np.array(keep_need),
            keep_hold=np.zeros(length, int),
            keep_cost=np.zeros(length, int),
            terminal_need=0,
        )
        return pareto(units).segments(0)

    assert chosen(5, 5) == ()
    assert chosen(6, 5) == ((0, 1),)
    assert chosen(5, 6) == ((1, 2),)
    assert chosen(6, 6) == ((0, 2),)
    assert chosen(6, 5, 6) == ((0, 1), (2, 3))


def test_whole_numbers_beyond_the_53_bits_of_a_float_stay_exact() -> None:
    unit = 2**50 + 1
    scaled = {
        name: tuple(unit * size for size in getattr(published_chain("rand8"), name))
        for name in ("input", "kept", "forward_transient", "backward_transient")
    }
    expected = tuple((unit * peak, cost) for peak, cost in PUBLISHED["rand8"]["single_frontier"])
    assert frontier(replace(published_chain("rand8"), **scaled)) == expected


def test_whole_numbers_too_large_to_sum_become_floats_and_do_not_wrap_around() -> None:
    # Beside these forwards the backwards, 14 in all, are lost in rounding.
    long = replace(THREE_STAGES, forward=(2**60, 2**61, 2**62))
    assert frontier(long) == ((12, 10 * 2**60), (14, 8 * 2**60), (17, 7 * 2**60))


def test_rounding_makes_no_points_of_its_own() -> None:
    whole = published_chain("homog32")
    thirds = replace(whole, forward=(1 / 3,) * 32, backward=(2 / 3,) * 32)
    assert [peak for peak, _ in frontier(thirds)] == [peak for peak, _ in frontier(whole)]


@given(st.lists(st.floats(0, 1e12), max_size=20), st.lists(st.integers(0, 10**6), max_size=20))
def test_sums_of_summable_floats_do_not_depend_on_their_order(some: list[float], more: list[int]) -> None:
    values = np.concatenate(exactly_summable(some, more)).tolist()
    assert sum(values) == sum(reversed(values)) == sum(sorted(values)) == math.fsum(values)
    assert values == pytest.approx([*some, *more], rel=0, abs=2**-51 * sum([*some, *more]))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, ((0, 1),)),
        (2, ((0, 2),)),
        (5, ((0, 3), (3, 5))),
        (10, ((0, 4), (4, 8), (8, 10))),
        (12, ((0, 4), (4, 8), (8, 12))),
        (13, ((0, 4), (4, 8), (8, 12), (12, 13))),
    ],
)
def test_sqrt_segments_are_round_sqrt_l_runs_of_equal_length_but_the_last(
    length: int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert sqrt_segments(length) == expected


@given(st.integers(1, 5000))
def test_sqrt_segments_number_the_rounded_root_and_cover_every_stage_once(length: int) -> None:
    segments = sqrt_segments(length)
    assert len(segments) == round(math.sqrt(length))
    assert [stage for start, stop in segments for stage in range(start, stop)] == list(range(length))


def test_a_chain_of_wrong_lengths_is_refused_with_the_rule_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"input must have 4 values for 3 stages, got 3\. Give one"):
        replace(THREE_STAGES, input=(1, 2, 1))
    with pytest.raises(ValueError, match=r"kept must have 3 values for 3 stages, got 4\."):
        replace(THREE_STAGES, kept=(5, 6, 3, 0))
    with pytest.raises(ValueError, match="at least one stage"):
        replace(THREE_STAGES, forward=())


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_size_or_time_that_is_negative_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"kept must be finite and not negative, got kept\[1\] = "):
        replace(THREE_STAGES, kept=(5, value, 3))


def test_units_of_mismatched_shapes_or_without_a_way_to_keep_a_stage_are_refused() -> None:
    units = chain_units(THREE_STAGES)
    with pytest.raises(ValueError, match=r"hold of 3 stages must have the shape \(3, 4\), got \(3, 3\)"):
        replace(units, hold=units.hold[:, 1:])
    with pytest.raises(ValueError, match="a stage can always be kept"):
        replace(units, keep_need=np.array([1, math.inf, 1]))


def test_a_square_root_of_no_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage, got length 0"):
        sqrt_segments(0)

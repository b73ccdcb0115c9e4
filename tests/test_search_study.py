"""What studies.search concludes from what was found and measured. No tool runs here, and no model."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.brute_force import Way, close, lasting, spread
from studies.search import (
    BRUTE_FORCE,
    CASES,
    EVERY_BLOCK,
    PLAIN,
    Decision,
    Finals,
    Measured,
    Row,
    divisors,
    draw,
    line,
    missed,
    rows_of,
    settled,
)
from studies.turns import standard_error

CASE = CASES["gpt2-tight"]
"""A global batch of 16."""

MIB = 2**20


def way(size: int, placement: str, ratio: float | None, mebibytes: int = 90) -> Measured:
    """One that came to the finals, or for None one that does not run."""
    if ratio is None:
        return Measured(micro_batch_size=size, placement=placement)
    return Measured(
        micro_batch_size=size, placement=placement, sieve=ratio, ratio=ratio, noise=0.004,
        peak_memory_bytes=mebibytes * MIB,
    )  # fmt: skip


def finals(*others: Measured, ours: float | None = 1.0) -> Finals:
    return Finals(
        ways=(way(4, "ours", ours), *others), plans={"ours": (4, "ours")}, reference_seconds=2.0, seconds=60.0
    )


def rows(
    found: Finals, tools: dict[tuple[str, bool], int | None] | None = None, events: int = 0
) -> list[Row]:
    decisions = {("ours", False): Decision(found=4, seconds=9.0, out_of_memory_events=0)}
    for key, size in (tools or {}).items():
        decisions[key] = Decision(found=size, seconds=5.0, out_of_memory_events=events)
    return rows_of(CASE, 100 * MIB, decisions, found)


def row(found: list[Row], tool: str) -> Row:
    return next(each for each in found if each["tool"] == tool)


def test_a_size_that_does_not_divide_the_global_batch_is_lowered_to_one_that_does() -> None:
    assert settled(11, 16, PLAIN, {(8, PLAIN), (4, PLAIN)}) == (8, 0)
    assert settled(16, 16, PLAIN, {(16, PLAIN)}) == (16, 0)
    assert settled(32, 16, PLAIN, {(16, PLAIN)}) == (16, 0)


def test_what_does_not_fit_once_it_accumulates_is_an_event_and_the_next_size_is_taken() -> None:
    running = {(2, PLAIN), (16, EVERY_BLOCK)}
    assert settled(8, 16, PLAIN, running) == (2, 2)
    assert settled(8, 16, EVERY_BLOCK, running) == (None, 4)


def test_a_tool_that_found_nothing_has_nothing_to_train_with() -> None:
    assert settled(None, 16, PLAIN, {(16, PLAIN)}) == (None, 0)


def test_divisors_rise() -> None:
    assert divisors(12) == (1, 2, 3, 4, 6, 12)


def test_a_row_has_samples_per_second_and_how_they_compare_with_ours() -> None:
    found = row(rows(finals(way(8, PLAIN, 1.25)), {("accelerate", False): 11}), "accelerate")
    assert (found["micro_batch_size"], found["gradient_accumulation_steps"]) == (8, 2)
    assert found["samples_per_second"] == pytest.approx(16 / 2.5)
    assert found["relative"] == pytest.approx(0.8)
    assert found["noise"] == pytest.approx(0.008)


def test_events_on_the_way_and_events_of_training_add_up() -> None:
    found = rows(finals(way(8, PLAIN, None), way(2, PLAIN, 1.1)), {("trainer", False): 8}, events=3)
    # Size 8 was found after three refusals; accumulating it is refused, and 4 with nothing on it was never run.
    assert row(found, "trainer")["out_of_memory_events"] == 5
    assert row(found, "trainer")["micro_batch_size"] == 2


def test_ours_comes_first_and_brute_force_has_the_fastest_of_all() -> None:
    found = rows(finals(way(2, "front 1", 0.99), way(1, PLAIN, 1.2), way(16, PLAIN, None)))
    assert [each["tool"] for each in found] == ["ours", BRUTE_FORCE]
    assert found[1]["placement"] == "front 1"
    assert found[1]["relative"] == pytest.approx(1 / 0.99)
    assert found[1]["out_of_memory_events"] == 1


def test_nothing_is_missed_when_the_plan_is_as_fast_as_it_has_to_be() -> None:
    found = finals(way(2, "front 1", 0.975), way(8, PLAIN, 0.995))
    # The tool is faster by half a percent, and each of the two is known to 0.4%.
    assert missed(rows(found, {("accelerate", False): 8})) == []


def test_a_plan_more_than_three_percent_behind_the_best_misses() -> None:
    (said,) = missed(rows(finals(way(2, "front 1", 0.96))))
    assert said == "gpt2-tight: ours reaches 96.0% of the best of brute force"


def test_a_tool_that_is_faster_by_more_than_the_noise_is_named() -> None:
    found = rows(finals(way(8, EVERY_BLOCK, 0.98)), {("lightning", True): 8})
    assert missed(found) == ["gpt2-tight: lightning + checkpointing reaches 1.020 of ours"]


def test_a_plan_that_does_not_run_or_needs_more_than_the_budget_misses() -> None:
    assert "ours has no plan that runs" in missed(rows(finals(way(2, PLAIN, 1.0), ours=None)))[0]
    over = Finals(
        ways=(way(4, "ours", 1.0, 101),), plans={"ours": (4, "ours")}, reference_seconds=2.0, seconds=1.0
    )
    assert "ours needs" in missed(rows(over))[0]


def test_a_tool_without_a_plan_is_no_bar_and_says_how_it_ended() -> None:
    found = rows(finals(), {("trainer", False): None}, events=12)
    assert missed(found) == []
    assert "no plan: nothing fits" in line(row(found, "trainer"))
    assert "12 out of memory" in line(row(found, "trainer"))


def test_the_sieve_lets_pass_what_is_close_to_the_best() -> None:
    sieve = {(1, PLAIN): 1.5, (2, PLAIN): 0.95, (4, "ours"): 1.0, (8, PLAIN): 1.07}
    assert close(sieve) == [(2, PLAIN), (4, "ours")]


def test_of_a_frontier_the_ends_and_points_between_are_tried() -> None:
    assert spread([9, 8, 7, 6, 5, 4, 3], 4) == [9, 7, 5, 3]
    assert spread([9, 8], 4) == [9, 8]


def test_the_error_of_a_median_falls_with_the_rounds() -> None:
    assert standard_error([1.0] * 9) == 0.0
    assert standard_error([0.9, 1.0, 1.1] * 12) < standard_error([0.9, 1.0, 1.1])


def test_the_picture_is_drawn_where_a_tool_has_no_plan(tmp_path: Path) -> None:
    draw(rows(finals(), {("trainer", False): None}), tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 1000


def test_a_way_that_is_refused_memory_later_is_left_out_and_the_others_begin_again() -> None:
    first, second, third = (Way(micro_batch_size=size, placement=PLAIN) for size in (1, 2, 4))
    steps: list[Way] = []

    def seconds_of(way: Way) -> float | None:
        steps.append(way)
        # The first is refused at its second step, the second at its first, the third never.
        return None if (way is first and steps.count(first) == 2) or way is second else 3.0

    ratios, seconds = lasting(seconds_of, [first, second, third], rounds=2)
    assert ratios == {third.key: [1.0, 1.0]}
    assert seconds == [3.0, 3.0, 3.0]

"""Seconds of a step from seconds of its stages; all figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.nested import PLAIN, Placed
from planner.time import (
    RECOMPUTE_ERROR,
    at_micro_batch,
    expected_error,
    segment_nanoseconds,
    segment_seconds,
    selective_seconds,
    step_parts,
)
from profiler.profile_record import StageTime, StepTime


def stage(forward: float, recompute: float, first: float, later: float) -> StageTime:
    return StageTime(
        forward_seconds=forward,
        recompute_seconds=recompute,
        backward_first_seconds=first,
        backward_later_seconds=later,
    )


def step(
    *stages: StageTime, size: int = 2, update: float = 0.5, host: float = 0.125, whole: float = 40.0,
    spread: float = 0.01,
) -> StepTime:  # fmt: skip
    return StepTime(
        micro_batch_size=size, stages=stages, update_seconds=update, host_seconds=host, step_seconds=whole,
        steps_timed=4, spread=spread,
    )  # fmt: skip


TIMES = step(stage(1, 0.5, 2, 3), stage(4, 3, 8, 9), stage(2, 1, 4, 5))


def test_a_step_is_the_sum_of_its_parts() -> None:
    """k = 3: forward 3 * 7; backward 14 + 2 * 17; the update once; host time three times."""
    assert step_parts(TIMES, 3, PLAIN) == {
        "forward": 21,
        "backward": 48,
        "recompute": 0,
        "optimizer": 0.5,
        "host": 0.375,
    }


def test_recomputation_is_paid_in_every_micro_batch() -> None:
    """Stages 0 and 1 as one segment: 1 + 3; stage 2 alone: 1; twice."""
    assert step_parts(TIMES, 2, Placed(segments=((0, 2), (2, 3))))["recompute"] == 2 * (4 + 1)


def test_a_segment_stops_at_the_last_saved_tensor_of_its_last_stage() -> None:
    assert segment_seconds(TIMES, 0, 3) == 1 + 4 + 1
    assert segment_seconds(TIMES, 1, 2) == 3


def test_where_the_device_waits_for_its_host_a_segment_costs_what_recording_and_replaying_takes() -> None:
    """In dispatches of 1 us: 180 a segment and 140 a stage of it; 840 a stage that keeps something."""
    times = replace(TIMES, dispatch_seconds=1e-6)
    assert segment_seconds(times, 0, 3) == pytest.approx(1 + 4 + 1 + 600e-6)
    assert segment_nanoseconds(times)[1, 2] == 3_000_320_000
    kept = replace(times.stages[1], kept_seconds=2.0)
    times = replace(times, stages=(times.stages[0], kept, times.stages[2]))
    assert selective_seconds(times, 1) == pytest.approx(3 - 2 + 840e-6)
    placed = Placed.of(((0, 1), (2, 3)), [(1, 0)])
    assert step_parts(times, 2, placed)["recompute"] == pytest.approx(2 * (0.5 + 1 + 1 + 2 * 320e-6 + 840e-6))
    assert step_parts(times, 2, PLAIN) == step_parts(TIMES, 2, PLAIN)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)).map(lambda pair: (max(pair), min(pair))),
        min_size=1,
        max_size=8,
    )
)
def test_whole_nanoseconds_of_every_segment_are_those_of_its_seconds(stages: list[tuple[int, int]]) -> None:
    times = step(*(stage(forward / 1e9, recompute / 1e9, 0, 0) for forward, recompute in stages))
    nanoseconds = segment_nanoseconds(times)
    assert nanoseconds.dtype == np.int64
    for start in range(len(stages)):
        for stop in range(start + 1, len(stages) + 1):
            assert nanoseconds[start, stop] == round(segment_seconds(times, start, stop) * 1e9)


def test_a_profiled_micro_batch_size_is_taken_as_measured() -> None:
    other = step(stage(9, 9, 9, 9), size=4)
    assert at_micro_batch((other, TIMES), 2) is TIMES


def test_between_two_profiled_sizes_every_time_is_on_the_line_between_them() -> None:
    """A quarter of the way from 4 to 8."""
    low = step(stage(1, 0.5, 2, 3), size=4, update=1, host=2, whole=10, spread=0.01)
    high = step(stage(5, 2.5, 10, 7), size=8, update=2, host=4, whole=20, spread=0.03)
    assert at_micro_batch((high, low), 5) == step(
        stage(2, 1, 4, 4), size=5, update=1.25, host=2.5, whole=12.5, spread=0.03
    )


def test_the_yardstick_is_on_the_line_between_them_too_and_unknown_where_one_is() -> None:
    low, high = (
        replace(step(stage(1, 1, 1, 1), size=b), yardstick_seconds=y) for b, y in ((4, 1.0), (8, 2.0))
    )
    assert at_micro_batch((low, high), 5).yardstick_seconds == 1.25
    assert at_micro_batch((low, replace(high, yardstick_seconds=None)), 5).yardstick_seconds is None


def test_of_three_profiled_sizes_the_two_around_are_used() -> None:
    times = [step(stage(value, 0, 0, 0), size=size) for size, value in ((1, 0), (2, 10), (4, 100))]
    assert at_micro_batch(times, 3).stages[0].forward_seconds == 55


@pytest.mark.parametrize("size", [1, 9])
def test_nothing_is_said_outside_of_the_profiled_range(size: int) -> None:
    times = (step(stage(1, 1, 1, 1), size=2), step(stage(1, 1, 1, 1), size=8))
    with pytest.raises(ValueError, match=f"profiled range 2 to 8, got {size}"):
        at_micro_batch(times, size)


def test_the_stated_error_is_at_least_the_method_s_own() -> None:
    assert expected_error(step(*TIMES.stages, spread=RECOMPUTE_ERROR / 2)) == RECOMPUTE_ERROR


def test_the_stated_error_is_the_noise_when_that_is_more() -> None:
    assert expected_error(step(*TIMES.stages, spread=0.125)) == 0.125

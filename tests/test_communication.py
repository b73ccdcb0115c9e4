"""Links between processes: the line through measured all-reduces, and what a step sends."""

from __future__ import annotations

import pytest

from planner.communication import ALONE, Distribution, messages, step_seconds, volume
from planner.zero import BUCKET_ELEMENTS, PERSISTENCE_ELEMENTS
from profiler.communication import fit, measure_link
from profiler.profile_record import Link, ParameterRecord


def test_a_line_through_exact_samples_is_found() -> None:
    """4 processes, 2 ms and 1 GB/s: an all-reduce of m bytes moves 1.5 m of them."""
    samples = [(size, 0.002 + 1.5 * size / 1e9) for size in (1_000, 1_000_000, 100_000_000)]
    link = fit(4, "gloo", samples)
    assert link.latency_seconds == pytest.approx(0.002)
    assert link.bytes_per_second == pytest.approx(1e9)
    assert link.error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_link_is_its_largest_relative_residual() -> None:
    """Two sizes that take 1 s and one that takes 2 s: a constant of 4/3 ... is off by less, no line by none."""
    link = fit(2, "gloo", [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)])
    assert 0.2 < link.error < 1


def test_no_latency_is_below_zero() -> None:
    """Twice the bytes in four times the time would need a negative one."""
    link = fit(2, "gloo", [(100, 1.0), (200, 4.0)])
    assert link.latency_seconds == 0
    assert 25 < link.bytes_per_second < 200


def test_an_all_reduce_that_gets_faster_with_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more bytes must take longer"):
        fit(2, "gloo", [(100, 4.0), (200, 1.0)])


@pytest.mark.parametrize(
    ("zero_stage", "k", "expected"),
    [(0, 1, 2), (0, 8, 2), (1, 8, 3), (2, 1, 3), (2, 4, 9), (3, 1, 3), (3, 4, 12)],
)
def test_the_volume_of_a_step_in_units_of_all_parameters(zero_stage: int, k: int, expected: int) -> None:
    assert volume(zero_stage, k) == expected


def test_gradients_go_bucket_by_bucket_and_parameters_by_module() -> None:
    """Two and a half buckets of gradients; one large parameter, used in two stages, and one that stays everywhere."""
    parameters = (
        ParameterRecord(module="wte", count=5 * BUCKET_ELEMENTS // 2 - 10, stages=(0, 3)),
        ParameterRecord(module="norm", count=PERSISTENCE_ELEMENTS, stages=(1,)),
    )
    assert messages(0, 4, parameters) == 3
    assert messages(1, 4, parameters) == 3 + 1
    assert messages(2, 4, parameters) == 4 * 3 + 1
    assert messages(3, 4, parameters) == 4 * (3 + 2 * 2)


def test_the_seconds_of_a_step_by_hand() -> None:
    """Ten fp32 parameters, 40 bytes; 4 processes; stage 1 moves 3 x 40 x 3/4 = 90 bytes in two messages."""
    link = Link(world_size=4, backend="gloo", latency_seconds=0.5, bytes_per_second=9.0, error=0.0)
    spread = Distribution(world_size=4, zero_stage=1, link=link)
    parameters = (ParameterRecord(module="a", count=10, stages=(0,)),)
    assert step_seconds(spread, 2, parameters) == pytest.approx(2 * 0.5 + 90 / 9)


def test_one_process_sends_nothing() -> None:
    assert step_seconds(ALONE, 4, (ParameterRecord(module="a", count=10, stages=(0,)),)) == 0


def test_two_processes_of_this_machine_have_a_link() -> None:
    link = measure_link(2, sizes_bytes=(2**12, 2**20, 2**24))
    assert (link.world_size, link.backend) == (2, "gloo")
    assert 1e6 < link.bytes_per_second < 1e12
    assert 0 <= link.latency_seconds < 1


def test_one_process_has_no_link() -> None:
    with pytest.raises(ValueError, match="at least 2 to measure a link, got 1"):
        measure_link(1)

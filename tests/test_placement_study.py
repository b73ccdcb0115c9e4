"""What studies.placement concludes from what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from studies.placement import beside_rivals


def row(strategy: str, peak: int, time: float, spread: float = 0.01) -> dict[str, Any]:
    return {
        "model": "m", "strategy": strategy, "peak_memory_bytes": peak, "relative_step_seconds": time,
        "spread": spread,
    }  # fmt: skip


def test_a_rival_stands_beside_the_plan_for_its_peak_and_not_beside_the_luckiest_measurement() -> None:
    rows = [
        row("plain", 1000, 1.0), row("every block", 500, 1.3), row("ours, 80%", 800, 1.1),
        row("ours for every block", 500, 1.32), row("ours, 40%", 400, 1.2),
    ]  # fmt: skip
    [found] = beside_rivals(rows)
    assert (found.rival, found.ours) == ("every block", "ours for every block")
    assert found.difference == pytest.approx(0.02)
    assert found.noise == pytest.approx(0.02)


@pytest.mark.parametrize(("time", "worse"), [(1.33, True), (1.31, False), (1.2, False)])
def test_worse_is_what_noise_does_not_explain(time: float, worse: bool) -> None:
    [found] = beside_rivals([row("sqrt(L)", 500, 1.3), row("ours for sqrt(L)", 500, time)])
    assert found.worse is worse


def test_what_could_not_be_timed_and_what_nothing_of_ours_reaches_is_left_out() -> None:
    unreached = row("sequential 2", 300, 1.5)
    assert (
        beside_rivals([unreached, row("ours, 50%", 500, 1.2), {"model": "m", "strategy": "x", "plan": None}])
        == []
    )

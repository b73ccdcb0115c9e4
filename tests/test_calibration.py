"""What verifications teach: residuals by device, and the error that they make later plans state."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import calibration
from planner.calibration import Calibration, Residual, stated_error
from profiler.profile_record import DeviceRecord
from profiler.records import RecordError

DEVICE = DeviceRecord(kind="cpu", name="A (TM) CPU / 2", memory_bytes=2**30, threads=2)


def residual(plan: str, seconds: float = 0.0, peak: float = 0.0) -> Residual:
    return Residual(plan_sha256=plan, step_seconds=seconds, peak_memory_bytes=peak)


def test_a_few_residuals_can_only_widen_the_stated_error() -> None:
    assert stated_error(0.05, []) == 0.05
    assert stated_error(0.05, [0.01, -0.02]) == 0.05
    assert stated_error(0.05, [0.01, -0.08]) == 0.08


def test_nine_small_residuals_tighten_it_to_the_largest_of_them() -> None:
    # rank ceil(0.9 * 10) = 9 of 9
    assert stated_error(0.05, [0.001 * n for n in range(1, 10)]) == pytest.approx(0.009)


def test_of_nineteen_the_eighteenth_is_stated() -> None:
    # rank ceil(0.9 * 20) = 18 of 19: one in ten may lie outside
    assert stated_error(0.05, [0.001 * n for n in range(1, 20)]) == pytest.approx(0.018)


@given(st.integers(0, 40), st.integers(0, 2**32))
def test_nine_of_ten_residuals_of_any_one_distribution_are_covered(count: int, seed: int) -> None:
    generator = random.Random(seed)
    seen = [generator.gauss(0, 0.03) for _ in range(count)]
    covered = sum(abs(r) <= stated_error(0.05, seen) for r in seen)
    assert covered >= math.floor(0.9 * count)


def test_the_error_of_memory_never_falls_below_the_worst_case_that_was_measured() -> None:
    known = Calibration(device=DEVICE, residuals=tuple(residual(f"{n}", 0.001, 0.0) for n in range(20)))
    assert known.memory_error(0.002) == 0.002
    assert known.time_error(0.05) == 0.001
    wide = Calibration(device=DEVICE, residuals=(residual("a", 0.0, -0.01),))
    assert wide.memory_error(0.002) == 0.01


def test_a_device_learns_and_remembers_and_does_not_learn_the_same_plan_twice() -> None:
    assert calibration.load(DEVICE).residuals == ()
    calibration.learn(DEVICE, residual("a", 0.01))
    calibration.learn(DEVICE, residual("b", 0.02))
    calibration.learn(DEVICE, residual("a", 0.03))
    assert [(r.plan_sha256, r.step_seconds) for r in calibration.load(DEVICE).residuals] == [
        ("b", 0.02),
        ("a", 0.03),
    ]


def test_only_the_newest_are_kept() -> None:
    known = Calibration(device=DEVICE)
    for n in range(calibration.KEPT + 5):
        known = known.with_residual(residual(str(n)))
    assert len(known.residuals) == calibration.KEPT
    assert known.residuals[0].plan_sha256 == "5"


def test_devices_do_not_learn_from_each_other() -> None:
    calibration.learn(DEVICE, residual("a"))
    assert calibration.load(msgspec.structs.replace(DEVICE, threads=4)).residuals == ()


def test_a_damaged_file_is_refused_by_name() -> None:
    path = calibration.path_of(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(RecordError, match=r"a--tm--cpu---2-2\.json is not a calibration"):
        calibration.load(DEVICE)

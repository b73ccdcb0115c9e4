"""Micro-batches that the device refuses memory, in a process that really is refused it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import planner
from executor import Verification
from planner.cli.profile import show
from planner.cost import TRIED_KERNELS_ERROR
from planner.plan import load_plan
from planner.search import PrecisionNotProfiled, space
from planner.time import ELSEWHERE_ERROR, RECOMPUTE_ERROR
from planner.what_if import what_ifs
from profiler import records
from profiler.profile_record import Profile, TooLarge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests/profiled.py left what it found."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux keeps a process's memory within a limit")
    found = tmp_path_factory.mktemp("profiled")
    # With blocks given back when they are freed, as a device's allocator reuses them, no holes count as taken.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
    subprocess.run(
        [sys.executable, "-m", "tests.profiled", str(found)], env=environment, check=True, timeout=300
    )
    return found


@pytest.fixture(scope="module")
def profile(folder: Path) -> Profile:
    return records.read(folder / "profile.json", Profile)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Profile:
    """Of one micro-batch size, whose plain step does not fit."""
    return records.read(folder / "alone.json", Profile)


def test_what_fits_in_no_way_is_left_out_and_the_rest_is_timed(profile: Profile) -> None:
    assert profile.micro_batch_sizes == (2, 4, 8)
    (fp32,) = profile.precisions
    assert fp32.micro_batch_sizes == (2, 4, 8)
    assert fp32.plain_sizes == (2, 4)
    assert profile.too_large == (TooLarge(precision="fp32", micro_batch_size=256),)
    assert profile.memory_check is not None
    assert profile.memory_check.micro_batch_size == 4


def test_a_step_that_kept_what_it_saves_elsewhere_takes_as_long_as_its_operations(profile: Profile) -> None:
    """In terms of a forward pass, which keeps nothing, as long as the plain step of 4."""
    (fp32,) = profile.precisions
    times = fp32.process_cpu
    assert times is not None
    _, four, eight = times
    assert four.yardstick_seconds is not None
    assert eight.yardstick_seconds is not None
    plain = four.step_seconds / four.yardstick_seconds
    assert 0.5 < eight.step_seconds / eight.yardstick_seconds / plain < 2


def test_without_a_budget_only_what_fits_as_a_plain_step_is_planned(folder: Path, profile: Profile) -> None:
    plan = load_plan(folder / "plan.json")
    assert plan.micro_batch_size <= 4
    assert {64 // knobs.gradient_accumulation_steps for knobs in space(profile, 64).candidates()} == {2, 4}
    within = space(profile, 64, memory_budget_bytes=2**30)
    assert {64 // knobs.gradient_accumulation_steps for knobs in within.candidates()} == {2, 4, 8}
    assert within.baselines.plain.micro_batch_size == 4


def test_a_plan_explains_why_it_goes_no_further(profile: Profile) -> None:
    within = space(profile, 64, memory_budget_bytes=2**30)
    largest = msgspec.structs.replace(within.plan(), micro_batch_size=8, gradient_accumulation_steps=8)
    (larger,) = (each for each in what_ifs(within, largest) if each.knob == "micro_batch")
    assert larger.reason is not None
    assert larger.reason.startswith("256 was refused memory when it was profiled, however little was kept")


def test_where_no_plain_step_fits_a_plan_does_and_holds(folder: Path, alone: Profile) -> None:
    (fp32,) = alone.precisions
    assert (fp32.micro_batch_sizes, fp32.plain_sizes) == ((8,), ())
    assert alone.memory_check is None
    assert alone.time_source == "measured"
    plan = load_plan(folder / "alone.plan.json")
    assert plan.micro_batch_size == 8
    assert plan.checkpoint
    assert plan.prediction.error.peak_memory_bytes == TRIED_KERNELS_ERROR
    assert plan.prediction.error.step_seconds >= RECOMPUTE_ERROR + ELSEWHERE_ERROR
    found = msgspec.json.decode((folder / "verified.json").read_bytes(), type=Verification)
    assert found.within["peak_memory_bytes"], found.relative_error
    assert found.within["memory_budget"]


def test_a_baseline_that_does_not_fit_says_so_when_it_is_verified(folder: Path) -> None:
    said = (folder / "out-of-memory.txt").read_text()
    assert said.startswith("Tower was refused memory on")
    assert "the plan's peak is predicted as 240.24 MiB ± 1.0%" in said
    assert "smaller --memory-budget" in said


def test_where_no_plain_step_fits_a_budget_has_to_be_given(alone: Profile) -> None:
    with pytest.raises(ValueError, match=r"--memory-budget.*micro-batch 8"):
        planner.optimize(alone, 32)


def test_the_page_of_a_profile_without_a_plain_step(
    folder: Path, alone: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    show(alone, folder / "alone.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "fp32: a plain step of micro-batch 8 was refused memory; 8 ran with what" in said
    assert "no plain step fits, so peaks are stated ± 1%" in said


def test_a_precision_has_a_range_of_its_own(profile: Profile) -> None:
    """As where bf16 fits at 4 and fp32 does not."""
    (fp32,) = profile.precisions
    bf16 = msgspec.structs.replace(fp32, precision="bf16")
    narrower = msgspec.structs.replace(
        fp32, wall=fp32.wall[:1], process_cpu=fp32.process_cpu and fp32.process_cpu[:1]
    )
    mixed = msgspec.structs.replace(profile, precisions=(narrower, bf16))
    searched = space(mixed, 64)
    sizes = {(knobs.precision, 64 // knobs.gradient_accumulation_steps) for knobs in searched.candidates()}
    assert sizes == {("fp32", 2), ("bf16", 2), ("bf16", 4)}, "8 needs a budget"
    assert searched.baselines.plain.micro_batch_size == 2
    # Of 9 samples in micro-batches of 3, which only bf16 has, the plain baseline is one in bf16.
    assert space(mixed, 9).baselines.plain.precision == "bf16"


def test_a_precision_that_does_not_fit_at_all_is_named(profile: Profile) -> None:
    alone = msgspec.structs.replace(
        profile,
        precisions=profile.precisions[:1],
        too_large=(TooLarge(precision="bf16", micro_batch_size=2),),
    )
    with pytest.raises(
        PrecisionNotProfiled, match=r"not bf16 \(its smallest micro-batch was refused memory\)"
    ):
        planner.optimize(alone, 64, precisions=("bf16",))


def test_the_page_says_what_was_refused(
    profile: Profile, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(profile, folder / "profile.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "fp32: micro-batch 256 was refused memory, however little was kept" in said
    assert "One micro-batch of 8 in fp32" in said


def test_where_not_even_the_smallest_fits_the_ways_out_are_said(folder: Path) -> None:
    said = (folder / "refused.txt").read_text()
    assert said.startswith(
        "--batch must begin with a micro-batch that fits on the cpu device, and 256 was refused"
    )
    assert "--fake" in said

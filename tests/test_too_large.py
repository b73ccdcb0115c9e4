"""Micro-batches whose plain step the device refuses memory, in a process that really is refused it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import planner
from planner.cli.profile import show
from planner.plan import load_plan
from planner.search import PrecisionNotProfiled, space
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


def test_what_does_not_fit_is_left_out_and_the_rest_is_timed(profile: Profile) -> None:
    assert profile.micro_batch_sizes == (2, 8)
    assert [each.micro_batch_sizes for each in profile.precisions] == [(2, 8)]
    assert profile.too_large == (TooLarge(precision="fp32", micro_batch_size=64),)
    assert profile.memory_check is not None
    assert profile.memory_check.micro_batch_size == 8


def test_a_plan_keeps_to_what_was_timed_and_explains_why_it_goes_no_further(
    folder: Path, profile: Profile
) -> None:
    plan = load_plan(folder / "plan.json")
    assert plan.micro_batch_size <= 8
    largest = planner.optimize(profile, 64, precisions=("fp32",))
    largest = msgspec.structs.replace(largest, micro_batch_size=8, gradient_accumulation_steps=8)
    (larger,) = (each for each in what_ifs(space(profile, 64), largest) if each.knob == "micro_batch")
    assert larger.reason is not None
    assert larger.reason.startswith("a plain step of 64 was refused memory when it was profiled")


def test_a_precision_has_a_range_of_its_own(profile: Profile) -> None:
    """As where bf16 fits at 8 and fp32 does not."""
    (fp32,) = profile.precisions
    bf16 = msgspec.structs.replace(fp32, precision="bf16")
    narrower = msgspec.structs.replace(
        fp32, wall=fp32.wall[:1], process_cpu=fp32.process_cpu and fp32.process_cpu[:1]
    )
    mixed = msgspec.structs.replace(profile, precisions=(narrower, bf16))
    searched = space(mixed, 64)
    sizes = {(knobs.precision, 64 // knobs.gradient_accumulation_steps) for knobs in searched.candidates()}
    assert sizes == {("fp32", 2), ("bf16", 2), ("bf16", 4), ("bf16", 8)}
    assert searched.baselines.plain.micro_batch_size == 2
    # Of 20 samples in micro-batches of 5, which only bf16 has, the plain baseline is one in bf16.
    threes = msgspec.structs.replace(narrower.wall[0], micro_batch_size=3)
    odd = msgspec.structs.replace(mixed, precisions=(msgspec.structs.replace(narrower, wall=(threes,)), bf16))
    assert space(odd, 4 * 5).baselines.plain.precision == "bf16"


def test_a_precision_that_does_not_fit_at_all_is_named(profile: Profile) -> None:
    alone = msgspec.structs.replace(
        profile,
        precisions=profile.precisions[:1],
        too_large=(TooLarge(precision="bf16", micro_batch_size=2),),
    )
    with pytest.raises(
        PrecisionNotProfiled, match=r"not bf16 \(its smallest plain step was refused memory\)"
    ):
        planner.optimize(alone, 64, precisions=("bf16",))


def test_the_page_says_what_was_refused(
    profile: Profile, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(profile, folder / "profile.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "fp32: a plain step of micro-batch 64 was refused memory" in said
    assert "One micro-batch of 8 in fp32" in said


def test_where_not_even_the_smallest_fits_the_ways_out_are_said(folder: Path) -> None:
    said = (folder / "refused.txt").read_text()
    assert said.startswith(
        "--batch must begin with a micro-batch whose plain step fits on the cpu device, and 64 was"
    )
    assert "--fake" in said

"""What studies.recipes and studies.training conclude from what was measured. Nothing is run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.plan import Cost
from planner.search import space
from profiler.profile_record import HopelessPrecision, Profile
from studies import recipes, training
from studies.recipes import PLAN, RECIPES, Recipe, by_hand
from tests.profiles import random_profile

MIB = 2**20


def measured(seconds: float, mebibytes: float, joules: float | None = None) -> dict[str, Any]:
    return {"step_seconds": seconds, "peak_memory_bytes": mebibytes * MIB, "step_joules": joules}


def recipe_row(name: str, seconds: float, mebibytes: float) -> dict[str, Any]:
    return {
        "recipe": name, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "precision": "fp32",
        "segments": 0, "loss_chunks": None, "predicted": measured(seconds, mebibytes),
        "measured": measured(seconds, mebibytes, 12.0), "rounds": [seconds, seconds],
    }  # fmt: skip


@pytest.fixture
def profile() -> Profile:
    """In fp32 and fp16, micro-batches of 1 to 4; bf16 was hopeless."""
    found = random_profile(1)
    fp32 = found.precisions[0]
    return msgspec.structs.replace(
        found,
        precisions=(fp32, msgspec.structs.replace(fp32, precision="fp16")),
        hopeless=(HopelessPrecision(precision="bf16", slowdown=9.5),),
    )


def test_a_recipe_takes_the_largest_micro_batch_that_fits_or_the_accumulation_it_names(
    profile: Profile,
) -> None:
    everything = space(profile, 8)
    plain, biggest, of_paper, _ = RECIPES
    found = by_hand(plain, profile, everything, 2**60)
    largest = profile.precisions[0].micro_batch_sizes[-1]
    assert not isinstance(found, str)
    assert (found.micro_batch_size, found.precision, found.checkpoint) == (largest, "fp32", ())
    tight = by_hand(plain, profile, everything, found.prediction.peak_memory_bytes - 1)
    assert not isinstance(tight, str)
    assert tight.micro_batch_size < largest
    paper = by_hand(of_paper, profile, everything, 1)
    assert not isinstance(paper, str)
    assert (paper.gradient_accumulation_steps, paper.precision) == (4, "fp16")
    assert by_hand(biggest, profile, everything, 2**60) == "bf16 is 9.5 times slower than fp32 here"


def test_a_recipe_that_there_is_not_says_so(profile: Profile) -> None:
    everything = space(profile, 8)
    odd = Recipe(name="odd", precision="fp16", placement="sqrt", gradient_accumulation_steps=7)
    assert by_hand(odd, profile, everything, 2**60) == "no such micro-batch was profiled, or none fits"


def test_the_plan_must_be_as_fast_as_every_recipe_within_the_budget_and_keep_it() -> None:
    plan, slower = recipe_row(PLAN, 1.0, 90), recipe_row("plain fp32", 1.2, 99)
    assert recipes.missed([slower, plan], 100 * MIB) == []
    faster_but_too_large = recipe_row("bf16", 0.5, 101)
    assert recipes.missed([faster_but_too_large, plan], 100 * MIB) == []
    faster = recipe_row("bf16", 0.5, 99)
    assert recipes.missed([faster, plan], 100 * MIB) == ["the plan is 100.0% slower than bf16"]
    close = recipe_row("bf16", 0.9, 99)
    assert recipes.missed([close, plan], 100 * MIB) == ["the plan is 11.1% slower than bf16"]
    assert recipes.missed([close | {"rounds": [0.8, 1.0]}, plan], 100 * MIB) == []
    assert recipes.missed([plan], 80 * MIB) == ["the plan's peak is 10 MiB over the budget"]
    died = {"recipe": PLAN, "why": "out of memory"}
    assert recipes.missed([slower, died], 100 * MIB) == ["the plan did not run: out of memory"]


def test_of_rounds_the_median_of_times_and_the_highest_peak_count() -> None:
    rounds = [
        Cost(
            step_seconds=seconds, step_cpu_seconds=None, peak_memory_bytes=peak, peak_reserved_bytes=None,
            step_joules=None,
        )
        for seconds, peak in ((1.0, 10), (3.0, 30), (2.0, 20))
    ]  # fmt: skip
    found = recipes.median_of(rounds)
    assert (found["step_seconds"], found["peak_memory_bytes"], found["step_joules"]) == (2.0, 30, None)


def test_recipes_are_told_and_drawn(tmp_path: Path) -> None:
    rows = [recipe_row("plain fp32", 2.0, 99), {"recipe": "bf16", "why": "out of memory"}]
    assert "( 2.00 x plain)" in recipes.line(recipe_row(PLAN, 1.0, 90), 2.0)
    assert recipes.line(rows[1], 2.0).split(maxsplit=1)[1] == "out of memory"
    recipes.draw([*rows, recipe_row(PLAN, 1.0, 90)], 100 * MIB, "gpt2", tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").stat().st_size > 5000


def run_row(name: str, **other: Any) -> dict[str, Any]:
    losses = [5.0, 4.0, 3.0, 2.0]
    found = {
        "model": "gpt2", "run": name, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "precision": "fp32",
        "segments": 0, "memory_budget_bytes": 100 * MIB if name == training.PLAN else None,
        "samples_per_second": 8.0, "model_flops_utilisation": 0.5, "fallbacks": [],
        "predicted": measured(1.0, 90), "measured": measured(1.0, 90, 7.0), "losses": losses,
        "last_loss": training.at_last(losses),
    }  # fmt: skip
    return found | other


def test_a_run_must_keep_its_budget_its_plan_and_the_loss() -> None:
    plain = run_row(training.PLAIN, measured=measured(1.0, 300))

    def bars(**other: Any) -> list[str]:
        return training.missed({training.PLAIN: plain, training.PLAN: run_row(training.PLAN, **other)})

    assert bars() == []
    assert bars(measured=measured(1.0, 101)) == ["gpt2: the plan's run is 1.0 MiB over the budget"]
    assert bars(fallbacks=["out of memory"]) == ["gpt2: the plan's run fell back: out of memory"]
    assert bars(last_loss=2.1) == ["gpt2: the plan's last loss is 5.0% higher than the plain run's"]
    assert bars(last_loss=float("nan")) != []
    assert bars(last_loss=1.0) == []


def test_the_last_loss_is_the_mean_of_the_last_tenth() -> None:
    assert training.at_last([9.0] * 18 + [1.0, 3.0]) == 2.0
    assert training.at_last([4.0]) == 4.0


def test_runs_are_told_and_drawn(tmp_path: Path) -> None:
    rows = {
        training.PLAIN: run_row(training.PLAIN),
        training.PLAN: run_row(training.PLAN, samples_per_second=16.0, model_flops_utilisation=None),
    }
    plain, plan = training.lines(rows)
    assert "MFU 50.0%" in plain
    assert "7.0 J a step" in plain
    assert "(2.00 x)" in plan
    assert "MFU unknown" in plan
    training.draw({"gpt2": rows, "resnet50": rows}, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 5000

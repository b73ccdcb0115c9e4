"""What a whole run takes: worked out by hand from a step of 12 s, a batch of 8 and a price; and what is not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.data import TensorDataset

import planner
from executor.data import TrainingData
from executor.training import _steps_of
from planner.cli import main
from planner.cost import instead
from planner.plan import Plan, load_plan
from planner.run_cost import run_of
from profiler import energy, records
from profiler.profile_record import Profile
from tests.plans import plan

GPT2 = Path(__file__).parent / "data" / "gpt2.profile.json"


def with_energy(step_joules: float) -> Plan:
    """The plan of tests/plans.py where a step is known to take so much, the plain one half of it."""
    made = plan()

    def known(prediction: planner.plan.Prediction, joules: float) -> planner.plan.Prediction:
        return msgspec.structs.replace(prediction, step_joules=joules)

    plain = made.baselines.plain
    cheaper = msgspec.structs.replace(plain, prediction=known(plain.prediction, step_joules / 2))
    return msgspec.structs.replace(
        made,
        prediction=known(made.prediction, step_joules),
        baselines=msgspec.structs.replace(made.baselines, plain=cheaper),
    )


def test_samples_take_their_steps_and_hours_and_the_price_of_them() -> None:
    """3,000 samples are 375 steps of 12 s: 4,500 s, an hour and a quarter."""
    run = planner.with_run_cost(plan(), samples=3000, price_per_hour=2.0).run
    assert run is not None
    assert (run.length, run.samples, run.steps, run.seconds) == ("samples", 3000, 375, 4500.0)
    assert run.price == pytest.approx(2.5)


def test_what_no_source_tells_is_unknown_and_not_nothing() -> None:
    run = planner.with_run_cost(plan(), samples=8, carbon_grams_per_kilowatt_hour=400).run
    assert run is not None
    assert (run.joules, run.carbon_grams, run.price, run.price_per_hour) == (None, None, None, None)


def test_energy_and_carbon_follow_from_the_joules_of_a_step() -> None:
    """375 steps of 96 kJ are 36 MJ, ten kilowatt-hours, at 400 g each."""
    run = planner.with_run_cost(with_energy(96e3), samples=3000, carbon_grams_per_kilowatt_hour=400).run
    assert run is not None
    assert run.joules == pytest.approx(36e6)
    assert run.carbon_grams == pytest.approx(4000)
    without = planner.with_run_cost(with_energy(96e3), samples=3000).run
    assert without is not None
    assert without.joules == pytest.approx(36e6)
    assert without.carbon_grams is None


def test_every_device_is_paid_for_and_the_joules_are_of_all_of_them_already() -> None:
    four = msgspec.structs.replace(with_energy(96e3), world_size=4, global_batch_size=32)
    run = planner.with_run_cost(four, samples=12000, price_per_hour=2.0).run
    assert run is not None
    assert (run.steps, run.price) == (375, pytest.approx(4 * 2.5))
    assert run.joules == pytest.approx(36e6)


def test_a_broken_global_batch_is_run_whole() -> None:
    run = planner.with_run_cost(plan(), samples=9).run
    assert run is not None
    assert (run.steps, run.samples) == (2, 16)


def test_epochs_are_as_long_as_planner_train_makes_them() -> None:
    """100 samples hold 12 batches of 8; the last four samples of an epoch are left out."""
    run = planner.with_run_cost(plan(), epochs=3, dataset_size=100).run
    data = TrainingData(dataset=TensorDataset(torch.zeros(100, 1)), description="zeros")
    assert run is not None
    assert (run.length, run.steps, run.samples) == ("epochs", 36, 288)
    assert run.steps == _steps_of(data, plan(), 3)


def test_a_price_alone_is_that_of_a_thousand_steps() -> None:
    """12,000 s are three hours and a third."""
    run = planner.with_run_cost(plan(), price_per_hour=3.0).run
    assert run is not None
    assert (run.length, run.steps, run.samples) == ("1000 steps", 1000, 8000)
    assert run.price == pytest.approx(10.0)


def test_a_baseline_is_on_the_same_scale() -> None:
    """Every block: 13 s a step, for as many steps, at the same price."""
    made = planner.with_run_cost(
        with_energy(96e3), samples=3000, price_per_hour=2.0, carbon_grams_per_kilowatt_hour=400
    )
    other = run_of(made, made.baselines.every_block)
    assert (other.steps, other.seconds, other.joules) == (375, 375 * 13, None)
    assert other.price == pytest.approx(375 * 13 / 3600 * 2)
    assert run_of(made, made.baselines.plain).carbon_grams == pytest.approx(2000)
    with pytest.raises(ValueError, match="has no run"):
        run_of(plan(), plan().baselines.plain)


def test_a_baseline_in_place_of_the_plan_does_not_keep_the_plans_run() -> None:
    made = planner.with_run_cost(plan(), samples=3000)
    assert instead(made, made.baselines.plain).run is None


def test_a_plan_keeps_its_run_in_its_file(tmp_path: Path) -> None:
    made = planner.with_run_cost(plan(), samples=3000, price_per_hour=2.0)
    assert load_plan(made.save(tmp_path / "a.plan.json")) == made
    assert plan().run is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"samples": 8, "epochs": 1, "dataset_size": 8}, "give one or the other"),
        ({"samples": 8, "dataset_size": 8}, "give one or the other"),
        ({"epochs": 1}, "--epochs needs --dataset-size as well"),
        ({"dataset_size": 8}, "--dataset-size needs --epochs as well"),
        ({"epochs": 1, "dataset_size": 7}, "must hold a global batch of 8, the data has 7 samples"),
        ({"price_per_hour": -1.0}, "--price-per-hour must be a finite number of at least 0, got -1"),
        ({"carbon_grams_per_kilowatt_hour": float("nan")}, "--carbon-intensity must be a finite number"),
    ],
)
def test_arguments_that_contradict_each_other_or_lack_others_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planner.with_run_cost(plan(), **arguments)


# The command


@pytest.fixture(scope="module")
def with_watts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's profile where a device is stated to draw 100 W."""
    path = tmp_path_factory.mktemp("watts") / "gpt2.profile.json"
    profile = records.read(GPT2, Profile)
    stated = energy.stated(100.0, ("fp32", "bf16"))
    records.write(path, msgspec.structs.replace(profile, energy=stated))
    return path


def optimize(*words: str | Path) -> int:
    flags = ("--global-batch-size", "32", "--memory-budget", "2600MiB", "--storage", "none")
    return main(["optimize", *map(str, words), *flags])


def test_the_command_shows_the_run_and_what_the_plan_saves(
    with_watts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """37,500 steps at 100 W, in kWh a tenth of the hours, and 400 g for each."""
    path = tmp_path / "a.plan.json"
    words = ("--samples", "1200000", "--price-per-hour", "2.50", "--carbon-intensity", "400", "-o", path)
    assert optimize(with_watts, *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    run = load_plan(path).run
    assert run is not None
    hours = run.seconds / 3600
    assert (run.steps, run.samples) == (37_500, 1_200_000)
    assert run.price == pytest.approx(2.5 * hours)
    assert run.joules == pytest.approx(100 * run.seconds)
    assert run.carbon_grams == pytest.approx(0.1 * hours * 400)
    assert f"whole run 1.20 M samples, 37,500 steps, {hours:.0f} h ± 5.0%" in said
    assert f"{run.price:.2f} at 2.50 per hour, {hours / 10:.1f} kWh, {hours * 0.04:.2f} kg CO2" in said
    blocks = run_of(load_plan(path), load_plan(path).baselines.every_block)
    assert blocks.price is not None
    assert f"{blocks.seconds / 3600 - hours:.0f} h, {blocks.price - run.price:.2f}" in said
    assert "The whole run beside what one would do by hand" in said


def test_the_command_says_why_kilowatt_hours_are_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimize(GPT2, "--price-per-hour", "2.5", "-o", tmp_path / "a.json") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1,000 steps 32.0 k samples, 1,000 steps," in said
    assert "kWh unknown: the profile has no source of energy." in said
    assert optimize(GPT2, "--samples", "64", "--carbon-intensity", "1", "-o", tmp_path / "a.json") == 0
    assert "kWh and CO2 unknown: the profile has no source" in " ".join(capsys.readouterr().out.split())
    assert optimize(GPT2, "-o", tmp_path / "a.json") == 0
    said = capsys.readouterr().out
    assert "whole run" not in said
    assert "kWh" not in said


def test_the_document_carries_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize(GPT2, "--epochs", "2", "--dataset-size", "65", "--json", "-o", tmp_path / "a.json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"]["steps"] == 4
    assert document["run"]["price"] is None
    assert document["run"]["seconds"] == pytest.approx(4 * document["prediction"]["step_seconds"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--samples", "9", "--epochs", "1"), "give one or the other"),
        (("--epochs", "1"), "--epochs needs --dataset-size as well"),
        (("--dataset-size", "9"), "--dataset-size needs --epochs as well"),
    ],
)
def test_contradictory_flags_exit_2_with_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimize(GPT2, *words, "-o", tmp_path / "a.json") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("flag", ["--price-per-hour", "--carbon-intensity"])
def test_a_price_below_zero_is_no_price(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        optimize(GPT2, flag, "-1")
    assert ended.value.code == 2
    assert f"{flag}: must be a number of at least 0, got '-1'" in capsys.readouterr().err

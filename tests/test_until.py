"""Training on folders until data held out says that it is enough; and data that will not do, refused before a step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import executor
import planner
import profiler
from executor.evaluation import evaluate
from executor.order import Epoch
from executor.stream import Stream
from executor.training import TrainingReport
from planner.cli import main
from planner.plan import Plan, Segment
from profiler.step import Loss, Stepper
from tests import datafiles
from tests.test_run import Acting

Refused = Callable[..., str]


def plan_of(name: str) -> Plan:
    spec = profiler.WorkloadSpec(name=f"tests.workloads.learners:{name}")
    profile = profiler.profile(
        profiler.build(spec), batch_sizes=(8,), precisions=("fp32",), device="cpu", steps=2, spec=spec
    )
    return planner.optimize(profile, global_batch_size=16)


@pytest.fixture(scope="module")
def speller() -> Plan:
    return plan_of("speller")


@pytest.fixture(scope="module")
def painter() -> Plan:
    return plan_of("painter")


def test_a_language_model_stops_at_its_perplexity(speller: Plan, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text(datafiles.VERSE * 200)
    (text / "valid.txt").write_text(datafiles.VERSE * 20)
    report = executor.train(
        speller,
        text,
        tmp_path / "run",
        steps=400,
        learning_rate=2e-2,
        until="perplexity=3",
        evaluate_every=10,
    )
    reached = report.reached
    assert reached is not None
    assert reached.target == "perplexity=3"
    assert reached.value is not None
    assert reached.value <= 3
    assert reached.step == report.steps
    assert report.steps < 400
    assert [each.step for each in report.evaluations] == list(range(10, report.steps + 1, 10))
    assert all(each.value > 3 for each in report.evaluations[:-1])
    assert reached.samples == report.samples == 16 * report.steps
    # The perplexity of what it trains on and of the same text held out are alike.
    assert reached.value == pytest.approx(math.exp(report.final_loss), rel=0.3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["evaluation_perplexity"] for line in lines if "evaluation_perplexity" in line]
    assert values == [each.value for each in report.evaluations]


def test_an_image_classifier_stops_at_its_accuracy_and_a_run_goes_on_to_it(
    painter: Plan, tmp_path: Path
) -> None:
    images = tmp_path / "cifar"
    images.mkdir()
    for number, name in enumerate(datafiles.BATCHES):
        made = datafiles.batch(40, seed=number)
        # A class is a brightness, which a crop and a mirror leave as it is.
        made[b"data"] = np.array([[20 + 22 * label] * 3072 for label in made[b"labels"]], np.uint8)
        (images / name).write_bytes(datafiles.python2_pickle(made))

    def trained(folder: str, steps: int, resume: bool = False) -> TrainingReport:
        return executor.train(
            painter, images, tmp_path / folder, steps=steps, learning_rate=1e-2, until="accuracy=0.9",
            evaluate_every=20, save_every=20, resume=resume,
        )  # fmt: skip

    whole = trained("whole", 600)
    assert whole.reached is not None
    assert whole.reached.value is not None
    assert whole.reached.value >= 0.9
    assert whole.steps < 600
    short = trained("parts", 20)
    assert short.reached is not None
    assert short.reached.step is None
    again = trained("whole", 600, resume=True)
    assert again.reached == whole.reached


def test_a_budget_with_room_for_one_batch_ahead_gets_one_and_is_told(
    painter: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []

    class Noted(Stream):
        def __init__(self, *given: Any, **named: Any) -> None:
            ahead.append(named["ahead"])
            super().__init__(*given, **named)

    monkeypatch.setattr("executor.run.Stream", Noted)
    images = datafiles.write_cifar(tmp_path / "cifar", images=16)
    found = painter.prediction
    peak_bytes = found.peak_memory_bytes * (1 + found.error.peak_memory_bytes)
    budget = int(peak_bytes + 1.5 * found.parts.peak_memory_bytes["inputs"])
    said, losses = [], []
    for plan in (painter, msgspec.structs.replace(painter, memory_budget_bytes=budget)):
        heard = Acting()
        losses.append(executor.train(plan, images, steps=3, progress=heard).final_loss)
        said.append(heard.said)
    assert ahead == [4, 1]
    assert said[0] == []
    assert said[1][0].startswith("batches prepared ahead: 1 instead of 4, as many as the memory budget of ")
    assert losses[0] == losses[1]


def test_a_model_is_as_it_was_after_it_was_evaluated(painter: Plan, tmp_path: Path) -> None:
    images = datafiles.write_cifar(tmp_path / "cifar", images=16)
    runs = [
        executor.train(painter, images, tmp_path / name, steps=6, evaluate_every=every)
        for name, every in (("often", 1), ("never", None))
    ]
    assert runs[0].final_loss == runs[1].final_loss
    assert len(runs[0].evaluations) == 6
    assert (tmp_path / "often" / "model.safetensors").read_bytes() == (
        tmp_path / "never" / "model.safetensors"
    ).read_bytes()


class Points:
    """Sample n is n, and of class n % 2."""

    def __len__(self) -> int:
        return 5

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        assert epoch is None  # Nothing is random about a sample that is evaluated.
        return {"x": torch.from_numpy(indices).float()[:, None], "labels": torch.from_numpy(indices % 2)}


def test_what_is_evaluated_is_the_model_without_dropout_over_every_sample() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2).eval(), nn.Dropout(0.5))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([2.5, 0.0]))  # Class 1 from 3 on: right about 0, 2 and 3 of five.

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.rand(3)  # A loss may draw random numbers, too.
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    def stepper(loss: Loss) -> Stepper:
        return Stepper(
            model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters()), precision="fp32",
            device_type="cpu",
        )  # fmt: skip

    everything = Points().gather(np.arange(5))
    scores = model[1](model[0](everything["x"]))
    expected = F.cross_entropy(scores, everything["labels"]).item()
    torch.manual_seed(4)
    after = torch.rand(())
    torch.manual_seed(4)
    assert evaluate(stepper(loss), Points(), "loss", 2) == pytest.approx(expected)
    assert evaluate(stepper(loss), Points(), "perplexity", 2) == pytest.approx(math.exp(expected))
    assert evaluate(stepper(loss), Points(), "accuracy", 2) == 3 / 5
    assert torch.equal(torch.rand(()), after)
    assert [module.training for module in model] == [True, False, True]
    assert evaluate(stepper(lambda model, batch: torch.tensor(1e4)), Points(), "perplexity", 2) == math.inf


@pytest.fixture
def refused(speller: Plan, painter: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What the command says when it refuses; nothing was trained by then."""

    def said(model: str, data: Path, *words: str, code: int = 2) -> str:
        file = tmp_path / f"{model}.plan.json"
        {"speller": speller, "painter": painter}[model].save(file)
        run = tmp_path / "run"
        capsys.readouterr()
        assert main(["train", str(file), "--data", str(data), "--output-dir", str(run), *words]) == code
        assert not run.exists()
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    return said


def test_bad_data_is_refused_before_any_training(refused: Refused, tmp_path: Path) -> None:
    assert "absent: nothing there" in refused("speller", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "found none below" in refused("speller", tmp_path / "empty")
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("the cat")
    assert "at least one sequence of 16 tokens" in refused("speller", short)
    cut = datafiles.write_cifar(tmp_path / "cut", images=4)
    whole = (cut / "data_batch_3").read_bytes()
    (cut / "data_batch_3").write_bytes(whole[: len(whole) // 2])
    assert "data_batch_3 must be a batch of CIFAR-10 for Python, whole" in refused("painter", cut)
    sizes = datafiles.write_cifar(tmp_path / "sizes", images=16)
    (sizes / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    assert "for each of the 3 channels of the images, got 1" in refused("painter", sizes)
    assert "must be CIFAR-10's batches for Python, or a table" in refused("painter", short)
    assert "must be at most the" in refused("painter", datafiles.write_cifar(tmp_path / "few", images=3))


def test_a_plan_for_another_model_is_refused_before_any_training(
    speller: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Segment(first="9", last="9", enter="9", leave="10")
    file = msgspec.structs.replace(speller, checkpoint=(elsewhere,)).save(tmp_path / "wrong.plan.json")
    assert main(["train", str(file), "--steps", "1", "--output-dir", str(tmp_path / "run")]) == 4
    assert "recomputes a segment at module '9', which Sequential has not" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

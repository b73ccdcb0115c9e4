"""Why runs stop: signals, targets, numbers that are none; and what is written down on the way."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from executor.fallback import NoFallback, described, next_plan
from executor.metrics import Metrics
from executor.stopping import NOT_FINITE_STEPS, OVERFLOW_STEPS, Target, Watch, first_not_finite, listening
from planner.cost import instead
from tests.plans import plan


def test_a_signal_is_noted_and_a_second_one_does_what_it_always_does() -> None:
    # A shell's background jobs ignore Ctrl-C.
    here = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    with listening() as requests:
        assert requests.signal_number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
    with listening() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, here)


@pytest.mark.parametrize(
    ("text", "reached", "short"),
    [("accuracy=0.85", 0.85, 0.84), ("perplexity=45", 44.9, 45.1), ("loss = 3.2", 3.2, 3.3)],
)
def test_accuracy_rises_to_its_target_and_the_others_fall_to_theirs(
    text: str, reached: float, short: float
) -> None:
    target = Target.parse(text)
    assert target.is_reached(reached)
    assert not target.is_reached(short)


@pytest.mark.parametrize("text", ["accuracy", "accuracy=", "bleu=3", "accuracy=85", "loss=-1", "loss=nan"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Target.parse(text)


def test_a_run_stops_after_steps_in_a_row_without_numbers_and_a_scaler_gets_its_time() -> None:
    watch = Watch()
    for _ in range(NOT_FINITE_STEPS - 1):
        assert not watch.stepped(applied=False, loss=math.nan, scaled=False)
    assert not watch.stepped(applied=True, loss=1.0, scaled=False)
    for _ in range(NOT_FINITE_STEPS - 1):
        assert not watch.stepped(applied=False, loss=math.nan, scaled=False)
    assert watch.stepped(applied=False, loss=math.nan, scaled=False)
    assert watch.skipped == 2 * NOT_FINITE_STEPS - 1
    watch = Watch()
    overflows = [watch.stepped(applied=False, loss=1.0, scaled=True) for _ in range(OVERFLOW_STEPS)]
    assert overflows == [False] * (OVERFLOW_STEPS - 1) + [True]


def test_the_first_module_that_makes_no_number_is_named() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Identity(), Root(), nn.Identity())
    batch = torch.tensor([[-1.0]])
    assert first_not_finite(model, lambda: model(batch), [batch]) == "the output of 1 (Root) is not finite"
    assert "every module's output is finite" in first_not_finite(model, lambda: model(-batch), [-batch])
    assert "batch itself" in first_not_finite(model, lambda: None, [batch / 0])
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(math.inf)
    assert first_not_finite(linear, lambda: None, [batch]) == "parameter weight is not finite"
    assert not any(module._forward_hooks for module in model.modules())


def test_what_was_written_after_the_step_that_a_run_goes_on_from_is_dropped(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path)) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": step / 2, "unknown": None, "norm": math.inf})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # Killed while it wrote.
    with closing(Metrics(tmp_path, after_step=2)) as metrics:
        metrics.write(3, {"loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "norm": "inf"}, {"step": 2, "loss": 1.0, "norm": "inf"}, {"step": 3, "loss": 9.0},
    ]  # fmt: skip
    with closing(Metrics(tmp_path)):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_reads_what_is_written_for_it(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2

    with closing(Metrics(tmp_path)) as metrics:
        metrics.write(7, {"loss": 2.5, "words": "left out"})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # Length, its checksum, the event, its checksum.
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
        data = data[16 + length :]
    assert found == [("loss", 2.5, 7)]


def test_out_of_memory_goes_on_with_the_fastest_plan_that_needs_clearly_less() -> None:
    first = instead(plan(None), plan(None).front[-1])
    peaks = []
    current = first
    for _ in range(3):
        current = next_plan(current)
        peaks.append(current.prediction.peak_memory_bytes)
        assert current.global_batch_size == first.global_batch_size
    assert peaks == [800, 600, 300]
    with pytest.raises(NoFallback, match="no plan of the front needs less than"):
        next_plan(current)
    assert described(current) == "micro-batch 2 x 4, 3 segments recomputed"

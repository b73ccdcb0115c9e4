"""The gradient noise scale where it is known, what measuring it leaves behind, and what follows from it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import profiler
from planner import optimize
from planner.cli import main
from planner.convergence import steps, steps_saved
from planner.explain import explain
from profiler import noise
from profiler.allocator import AllocatorMeter
from profiler.profile_record import NoiseScale
from profiler.workload import Workload
from tests.models import cnn, mlp
from tests.plans import plan

DIMENSIONS = 8
TRUE_NOISE_SCALE = 17.0
"""Samples x of 8 standard normal numbers, y = w x + a standard normal error, |w| = 1, half the squared error, at
weights of zero. One sample's gradient is -y x. Its mean is -w, so |G|^2 = 1. E|y x|^2 = E (w x)^2 |x|^2 + E|x|^2,
which is (8 + 2) + 8 = 18 by the fourth moments of a normal, so tr(Sigma) = 18 - 1."""


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIMENSIONS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def regression() -> Workload:
    truth = F.one_hot(torch.tensor(3), DIMENSIONS).float()

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, DIMENSIONS)
        return x, x @ truth + torch.randn(size)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    return Workload(model=Line(), batch=batch, loss=loss)


@pytest.mark.parametrize(("micro_batch_size", "micro_batches", "steps"), [(4, 8, 500), (16, 2, 1000)])
def test_the_noise_scale_of_a_regression_is_found_within_five_percent(
    micro_batch_size: int, micro_batches: int, steps: int
) -> None:
    torch.manual_seed(1)
    found = noise.measure(
        regression(), micro_batch_size=micro_batch_size, micro_batches=micro_batches, steps=steps
    )
    assert found.noise_scale_samples == pytest.approx(TRUE_NOISE_SCALE, rel=0.05)
    assert found.gradient_norm_squared == pytest.approx(1.0, rel=0.05)
    assert found.gradient_variance_trace == pytest.approx(17.0, rel=0.05)
    assert found.low_samples is not None
    assert found.high_samples is not None
    assert found.low_samples < TRUE_NOISE_SCALE < found.high_samples < 1.5 * found.low_samples


def test_the_interval_of_eight_steps_holds_the_truth_about_as_often_as_it_says() -> None:
    """It says 95 of 100; of 40, fewer than 32 would be a chance of one in ten thousand."""
    torch.manual_seed(2)
    workload, held = regression(), 0
    for _ in range(40):
        found = noise.measure(workload, micro_batch_size=2, micro_batches=8, steps=8)
        if found.low_samples is not None and found.high_samples is not None:
            held += found.low_samples <= TRUE_NOISE_SCALE <= found.high_samples
    assert held >= 32


def test_an_estimate_worked_out_by_hand() -> None:
    """Gradients (3, 0) and (1, 2) of 5 samples each: the mean is (2, 1). |G|^2 = 2 * 5 - 7, their inner product; and
    tr(Sigma) = (7 - 5) * 5 * 2."""
    parts, whole = (9 + 5) / 2, 5.0
    found = noise.estimate([(parts, whole)] * 3, micro_batch_size=5, micro_batches=2)
    assert found.gradient_norm_squared == pytest.approx(3.0)
    assert found.gradient_variance_trace == pytest.approx(20.0)
    assert found.noise_scale_samples == pytest.approx(20 / 3)
    assert found.low_samples == found.high_samples == pytest.approx(20 / 3)


def probe(signal: float, variance: float) -> tuple[float, float]:
    """Of two micro-batches of one sample: ``(mean |g_j|^2, |g|^2)`` with these estimates."""
    return signal + variance, signal + variance / 2


def test_signal_and_noise_are_averaged_apart_so_one_weak_step_changes_little() -> None:
    """The mean of the ratios 10/0.01, 10/2 and 10/2 would be 337."""
    found = noise.estimate([probe(0.01, 10), probe(2, 10), probe(2, 10)], micro_batch_size=1, micro_batches=2)
    assert found.noise_scale_samples == pytest.approx(30 / 4.01)


def test_a_gradient_lost_in_noise_has_no_noise_scale_and_one_that_hangs_on_a_step_no_bounds() -> None:
    lost = noise.estimate([probe(1, 90), probe(-2, 90)], micro_batch_size=1, micro_batches=2)
    assert (lost.noise_scale_samples, lost.low_samples, lost.high_samples) == (None, None, None)
    assert lost.gradient_norm_squared == pytest.approx(-0.5)
    weak = noise.estimate([probe(5, 90), probe(-2, 90)], micro_batch_size=1, micro_batches=2)
    assert weak.noise_scale_samples == pytest.approx(60.0)
    assert (weak.low_samples, weak.high_samples) == (None, None)


def test_samples_that_are_all_the_same_are_refused() -> None:
    workload = mlp(1)
    x, y = workload.batch(1)
    same = Workload(
        model=workload.model, loss=workload.loss, batch=lambda size: (x.repeat(size, 1), y.repeat(size))
    )
    with pytest.raises(
        ValueError, match="needs samples that differ, got 16 micro-batches with one and the same"
    ):
        noise.measure(same, micro_batch_size=1, steps=2)


def test_a_batch_that_is_seeded_at_every_call_gives_different_samples_all_the_same() -> None:
    workload = mlp(1)

    def batch(size: int) -> Any:
        torch.manual_seed(0)
        return workload.batch(size)

    seeded = Workload(model=workload.model, loss=workload.loss, batch=batch)
    assert noise.measure(seeded, micro_batch_size=1, steps=2).gradient_variance_trace > 0


def test_parameters_that_have_no_part_in_the_loss_do_not_matter() -> None:
    workload = regression()
    workload.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    assert noise.measure(workload, micro_batch_size=2, steps=2).gradient_variance_trace > 0


def test_the_probed_model_is_left_as_it_was() -> None:
    """Weights, batch norm's running statistics, and no gradients."""
    workload = cnn(1)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    profile = profiler.profile(workload, (2,), ("fp32",), "cpu", steps=1, noise_steps=2)
    assert all(torch.equal(before[name], value) for name, value in workload.model.state_dict().items())
    assert all(parameter.grad is None for parameter in workload.model.parameters())
    assert profile.noise_scale is not None
    assert (profile.noise_scale.steps, profile.noise_scale.micro_batch_size) == (2, 2)
    assert optimize(profile, 4).noise_scale == profile.noise_scale


def test_the_noise_scale_is_measured_on_request_only() -> None:
    assert profiler.profile(mlp(1), (2,), ("fp32",), "cpu", steps=1).noise_scale is None


@pytest.mark.parametrize("too_few", [1, -3])
def test_too_few_steps_are_refused_before_anything_runs(too_few: int) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=f"must be at least 2 steps, got {too_few}"):
        profiler.profile(mlp(1), (2,), ("fp32",), "cpu", noise_steps=too_few, progress=said.append)
    assert said == []


def test_probing_holds_one_gradient_and_one_sum_at_a_time() -> None:
    """Of eight micro-batches, each with a gradient as large as the model."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    workload = Workload(
        model=model, batch=lambda size: torch.randn(size, 256), loss=lambda model, x: model(x).square().mean()
    )
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    with AllocatorMeter() as meter:
        noise.measure(workload, micro_batch_size=1, micro_batches=8, steps=2)
    assert 2 * model_bytes <= meter.peak_bytes < 2.5 * model_bytes


def test_a_batch_as_large_as_the_noise_scale_takes_twice_the_fewest_steps() -> None:
    assert steps(400, 400, least_steps=1000) == 2000
    assert steps(100, 400, least_steps=1000) == 5000
    assert steps(1e12, 400, least_steps=1000) == pytest.approx(1000)


def test_doubling_saves_half_of_the_steps_far_below_the_noise_scale_and_nothing_far_above() -> None:
    assert steps_saved(400, batch_size=400, larger=800) == pytest.approx(1 - 1.5 / 2)
    assert steps_saved(400, batch_size=0.001, larger=0.002) == pytest.approx(0.5, abs=1e-5)
    assert steps_saved(400, batch_size=4e8, larger=8e8) == pytest.approx(0, abs=1e-5)


KNOWN = NoiseScale(
    noise_scale_samples=24, low_samples=20, high_samples=30, gradient_norm_squared=1.0,
    gradient_variance_trace=24.0, micro_batch_size=1, micro_batches=8, steps=8,
)  # fmt: skip


def test_explain_says_what_twice_the_global_batch_would_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """phi = 24 at a global batch of 8: 1 + 24/8 against 1 + 24/16."""
    made = msgspec.structs.replace(plan(), noise_scale=KNOWN)
    assert explain(made).saved_by_doubling == pytest.approx(1 - 2.5 / 4)
    assert main(["explain", str(made.save(tmp_path / "a.plan.json"))]) == 0
    said = capsys.readouterr().out
    assert "phi = 24 samples [20 to 30]" in said
    assert "doubling the global batch from 8 to 16 saves 37.5% of the steps" in said


def test_explain_says_that_noise_hides_the_gradient_and_nothing_where_it_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = msgspec.structs.replace(KNOWN, noise_scale_samples=None, low_samples=None, high_samples=None)
    made = msgspec.structs.replace(plan(), noise_scale=hidden)
    assert explain(made).saved_by_doubling is None
    assert main(["explain", str(made.save(tmp_path / "a.plan.json"))]) == 0
    assert "the noise hides the gradient" in capsys.readouterr().out
    assert main(["explain", str(plan().save(tmp_path / "b.plan.json"))]) == 0
    assert "noise" not in capsys.readouterr().out


LAYOUTS: dict[str, torch.Tensor] = {
    "one number": torch.tensor(-3.0),
    "none": torch.ones(0, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "channels last": torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "expanded": torch.tensor(2.0).expand(5, 7),
    "bf16": torch.arange(16.0).bfloat16() * 1e10,
    "fp16 whose norm is not one": torch.full((9, 9), 6e4, dtype=torch.float16),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_squared_norm_of_any_layout_is_that_in_float64(tensor: torch.Tensor) -> None:
    expected = tensor.double().square().sum()
    assert float(noise.squared_norm([tensor])) == pytest.approx(float(expected), rel=1e-6)
    twice = noise.squared_norm([tensor, torch.ones(4), tensor])
    assert float(twice) == pytest.approx(float(2 * expected + 4), rel=1e-6)


def test_the_squared_norm_of_millions_is_exact_to_six_digits_and_takes_no_copy() -> None:
    """In fp32 alone the sum of five million is off by more than 1e-4."""
    torch.manual_seed(3)
    tensor = torch.randn(20, 2**18)
    gc.collect()
    with AllocatorMeter() as meter:
        found = float(noise.squared_norm([tensor]))
    assert found == pytest.approx(float(tensor.double().square().sum()), rel=1e-5)
    assert abs(float(torch.linalg.vector_norm(tensor)) ** 2 / found - 1) > 5e-5
    assert meter.peak_bytes < 4096


def test_nothing_has_no_length() -> None:
    assert float(noise.squared_norm([])) == 0.0

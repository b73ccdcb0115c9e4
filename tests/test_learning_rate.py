"""The learning rate over samples: its course by hand, and that no change of the batch bends it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.learning_rate import LearningRate, Scaling, beta2_at


def rates(rate: LearningRate, batch_sizes: Sequence[int]) -> list[float]:
    """Of steps on these batches, one after another."""
    seen = itertools.accumulate(batch_sizes, initial=0)
    return [rate.at(before, size) for before, size in zip(seen, batch_sizes, strict=False)]


def test_the_course_by_hand() -> None:
    """A tenth of 1,000 samples rises; 550 is half way down from 100, where a cosine is half way too."""
    rate = LearningRate(peak=2.0, total_samples=1000, reference_batch_size=10, warm_up_share=0.1)
    assert rate.at(0, 10) == pytest.approx(0.2)
    assert rate.at(40, 10) == pytest.approx(1.0)
    assert rate.at(90, 10) == rate.at(100, 10) == 2.0
    assert rate.at(325, 10) == pytest.approx(1 + math.sqrt(0.5))
    assert rate.at(550, 10) == pytest.approx(1.0)
    assert rate.at(990, 10) > 0
    assert rate.at(1000, 10) == rate.at(5000, 10) == 0.0


def test_it_falls_to_its_share_of_the_peak_and_stays_there() -> None:
    rate = LearningRate(
        peak=2.0, total_samples=1000, reference_batch_size=10, warm_up_share=0.1, final_share=0.2
    )
    assert rate.at(100, 10) == 2.0
    assert rate.at(550, 10) == pytest.approx(1.2)
    assert rate.at(1000, 10) == rate.at(5000, 10) == pytest.approx(0.4)


def test_a_constant_rate_stays_at_its_peak_after_its_warm_up() -> None:
    rate = LearningRate(
        peak=2.0, total_samples=1000, reference_batch_size=10, warm_up_share=0.1, schedule="constant"
    )
    assert rates(rate, [10] * 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate.at(100, 10) == rate.at(990, 10) == rate.at(5000, 10) == 2.0


def test_without_warm_up_the_first_step_is_at_the_peak_and_so_is_a_batch_larger_than_the_warm_up() -> None:
    assert LearningRate(peak=3.0, total_samples=10, reference_batch_size=1, warm_up_share=0).at(0, 1) == 3.0
    rate = LearningRate(peak=3.0, total_samples=1000, reference_batch_size=64, warm_up_share=0.05)
    assert rate.at(0, 64) == 3.0


def test_with_a_fixed_batch_it_is_the_cosine_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.03)
    rate = LearningRate(
        peak=0.3, total_samples=40 * 8, reference_batch_size=8, warm_up_share=0, final_share=0.1
    )
    for step in range(41):
        assert rate.at(step * 8, 8) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("scaling", "times"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
@pytest.mark.parametrize("seen", [0, 300, 5000])
def test_a_batch_four_times_the_reference_is_followed_as_far_as_its_scaling_says(
    scaling: Scaling, times: float, seen: int
) -> None:
    rate = LearningRate(
        peak=1.0,
        total_samples=1000,
        reference_batch_size=8,
        scaling=scaling,
        warm_up_share=0,
        final_share=0.1,
    )
    assert rate.at(seen, 32) == pytest.approx(times * rate.at(seen, 8))


batches = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(batches, st.sampled_from(["linear", "sqrt", "none"]), st.floats(0, 0.9), st.floats(0, 1))
def test_whatever_the_batches_the_course_is_that_of_steps_of_one_sample(
    sizes: list[int], scaling: Scaling, warm_up_share: float, final_share: float
) -> None:
    """While it rises, that of the step's last sample; afterwards, that of its first."""
    settings: dict[str, Any] = {
        "peak": 1.0, "total_samples": sum(sizes), "reference_batch_size": 7,
        "warm_up_share": warm_up_share, "final_share": final_share,
    }  # fmt: skip
    rate, course = LearningRate(**settings, scaling=scaling), LearningRate(**settings, scaling="none")
    seen = 0
    for size in sizes:
        scale = {"linear": size / 7, "sqrt": math.sqrt(size / 7), "none": 1.0}[scaling]
        rising = seen + size < warm_up_share * sum(sizes)
        alone = course.at(seen + size - 1 if rising else seen, 1)
        if rising or seen >= warm_up_share * sum(sizes):
            assert rate.at(seen, size) == pytest.approx(scale * alone)
        else:
            assert rate.at(seen, size) == pytest.approx(scale)
        seen += size
    assert rate.at(seen, 7) == pytest.approx(final_share)


@given(batches, st.floats(0, 0.9), st.sampled_from(["cosine", "constant"]))
def test_it_begins_above_zero_rises_and_falls_only_once(
    sizes: list[int], warm_up_share: float, schedule: Any
) -> None:
    rate = LearningRate(
        peak=1.0, total_samples=sum(sizes), reference_batch_size=1, warm_up_share=warm_up_share,
        scaling="none", schedule=schedule,
    )  # fmt: skip
    course = rates(rate, sizes)
    assert min(course) > 0
    assert max(course) <= 1.0
    top = course.index(max(course))
    assert course[: top + 1] == sorted(course[: top + 1])
    assert course[top:] == sorted(course[top:], reverse=True)


def test_in_proportion_a_run_goes_as_far_in_all_whatever_its_batches() -> None:
    """The sum of the rates is an integral over the samples, in pieces of one size or another."""
    rate = LearningRate(peak=1.0, total_samples=9600, reference_batch_size=8)
    fixed = sum(rates(rate, [8] * 1200))
    growing = sum(rates(rate, [8] * 400 + [16] * 200 + [32] * 100))
    assert growing == pytest.approx(fixed, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peak": 0.0}, "peak of the learning rate must be positive and finite, got 0.0"),
        ({"peak": math.inf}, "positive and finite, got inf"),
        ({"peak": math.nan}, "positive and finite, got nan"),
        ({"total_samples": 0}, "total_samples must be at least 1, got 0"),
        ({"reference_batch_size": 0}, "reference_batch_size must be at least 1, got 0"),
        ({"warm_up_share": 1.0}, "warm_up_share must be at least 0 and below 1, got 1.0.*0.05 for 5%"),
        ({"warm_up_share": -0.1}, "got -0.1"),
        ({"final_share": 1.5}, "final_share must be from 0 to 1, got 1.5.*0.1 for a tenth"),
        ({"scaling": "log"}, "scaling must be one of linear, sqrt, none, got 'log'"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant, got 'step'"),
        ({"schedule": "constant", "final_share": 0.1}, "must have no final_share, got 0.1.*choose cosine"),
    ],
)
def test_what_is_no_learning_rate_is_refused(wrong: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"peak": 1.0, "total_samples": 100, "reference_batch_size": 8}
    with pytest.raises(ValueError, match=message):
        LearningRate(**{**right, **wrong})


@pytest.mark.parametrize(("seen", "batch"), [(-1, 8), (0, 0)])
def test_a_step_that_cannot_be_is_refused(seen: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"got {seen} and {batch}"):
        LearningRate(peak=1.0, total_samples=100, reference_batch_size=8).at(seen, batch)


def test_a_step_on_twice_the_samples_forgets_as_much_as_two_steps() -> None:
    """Of a gradient that adam saw once, after as many samples without any."""

    def remembered(beta2: float, steps: int) -> float:
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=0.0, betas=(0.9, 0.95))
        weight.grad = torch.ones(1)
        optimizer.step()
        first = float(optimizer.state[weight]["exp_avg_sq"])
        optimizer.param_groups[0]["betas"] = (0.9, beta2)
        weight.grad = torch.zeros(1)
        for _ in range(steps):
            optimizer.step()
        return float(optimizer.state[weight]["exp_avg_sq"]) / first

    assert remembered(beta2_at(0.95, 2.0), 10) == pytest.approx(remembered(0.95, 20), rel=1e-5)
    assert remembered(beta2_at(0.95, 0.5), 40) == pytest.approx(remembered(0.95, 20), rel=1e-5)
    assert beta2_at(0.95, 1.0) == 0.95


@pytest.mark.parametrize(
    ("beta2", "ratio", "message"),
    [
        (1.0, 2.0, "reference_beta2 must be at least 0 and below 1, got 1.0"),
        (0.9, 0.0, "batch_ratio must be positive and finite, got 0.0"),
        (0.9, math.inf, "batch_ratio must be positive and finite, got inf"),
    ],
)
def test_a_beta2_that_cannot_be_is_refused(beta2: float, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beta2_at(beta2, ratio)

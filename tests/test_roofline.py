"""Operations counted and timed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from profiler.absent import AbsentCuda
from profiler.chain import discover
from profiler.roofline import (
    Efficiency,
    Measured,
    Operation,
    Rates,
    StepCosts,
    between,
    calibrate,
    seconds,
    step_costs,
    step_time,
)
from profiler.selective import NOWHERE
from profiler.workload import Workload
from tests import models

PERFECT = Efficiency(compute=1.0, memory=1.0, operation_seconds=0.0, time_error=0.5)
RATES = Rates(flops_per_second={"fp32": 100.0, "bf16": 400.0, "fp16": 400.0}, memory_bytes_per_second=10.0)


def linear(bias: bool = False) -> Workload:
    model = nn.Sequential(nn.Linear(3, 5, bias=bias), nn.ReLU())
    return Workload(
        model=model, batch=lambda size: torch.randn(size, 3), loss=lambda model, batch: model(batch).sum()
    )


def costs(workload: Workload, size: int, absent: AbsentCuda | None = None) -> StepCosts:
    return step_costs(workload, discover(workload, absent=absent), "sgd", "fp32", size, absent)


def found(costs: StepCosts, phase: str) -> list[Operation]:
    return [o for window, made in costs.windows.items() if window[:2] == (phase, 0) for o in made]


def test_a_product_is_two_operations_per_weight_and_sample_and_moves_each_matrix_once() -> None:
    """7 samples x (3 x 5 weights): 210 flops; 21 + 15 numbers read and 35 written, 4 bytes each."""
    forward = found(costs(linear(), 7), "forward")
    product = next(o for o in forward if o.name == "mm")
    assert (product.flops, product.moved_bytes) == (2 * 7 * 3 * 5, 4 * (21 + 15 + 35))
    relu = next(o for o in forward if o.name == "relu")
    assert (relu.flops, relu.moved_bytes) == (0, 4 * (35 + 35))


def test_views_and_memory_that_nobody_writes_cost_nothing() -> None:
    assert not {o.name for o in found(costs(linear(), 7), "forward")} & {"t", "view", "detach", "transpose"}
    scratch = Workload(
        model=nn.Linear(3, 5),
        batch=lambda size: torch.randn(size, 3),
        loss=lambda model, batch: model(torch.empty_like(batch).copy_(batch)).sum(),
    )
    assert "empty_like" not in {o.name for o in found(costs(scratch, 7), "forward")}


def test_the_backward_of_a_first_layer_is_one_product() -> None:
    """No gradient of the input is asked for: 5 x 7 times 7 x 3."""
    backward = found(costs(linear(), 7), "backward")
    assert sum(o.flops for o in backward) == 2 * 7 * 3 * 5


def test_an_embedding_reads_the_rows_that_it_returns_and_no_others() -> None:
    """2 rows of 4 numbers read and written, 2 indices of 8 bytes."""
    workload = Workload(
        model=nn.Embedding(1000, 4),
        batch=lambda size: torch.zeros(size, dtype=torch.int64),
        loss=lambda model, batch: model(batch).sum(),
    )
    lookup = next(o for o in found(costs(workload, 2), "forward") if o.name == "embedding")
    assert lookup.moved_bytes == 2 * 4 * 4 * 2 + 2 * 8


def test_an_update_in_place_reads_all_and_writes_what_it_changes() -> None:
    """SGD with momentum on 15 weights: weights, gradients and momentum are read, and by its schema all are written."""
    update = next(o for o in found(costs(linear(), 2), "optimizer") if o.name == "_fused_sgd_")
    assert update.moved_bytes == 4 * 15 * (3 + 3)


def test_the_slower_of_computing_and_moving_counts() -> None:
    """300 flops at 100 a second are 3 s, 20 bytes at 10 a second 2 s; then 4 s of moving against 1 s."""
    operations = (Operation("a", 300, 20, "fp32", NOWHERE), Operation("b", 400, 40, "bf16", NOWHERE))
    assert seconds(operations, RATES, PERFECT) == pytest.approx(3 + 4)
    half = Efficiency(compute=0.5, memory=1.0, operation_seconds=0.25, time_error=0.5)
    assert seconds(operations, RATES, half) == pytest.approx(6 + 4 + 2 * 0.25)
    assert seconds((), RATES, half) == 0


def test_a_step_time_says_that_nothing_was_timed_and_how_wide_it_is() -> None:
    workload = models.mlp()
    stages = discover(workload)
    counted = step_costs(workload, stages, "adamw", "fp32", 4)
    made = step_time(counted, RATES, PERFECT)
    assert (made.steps_timed, made.spread, made.micro_batch_size) == (0, 0.5, 4)
    whole = sum(s.forward_seconds + s.backward_first_seconds for s in made.stages)
    whole += sum(s.forward_seconds + s.backward_later_seconds for s in made.stages)
    assert made.step_seconds == pytest.approx(whole + made.update_seconds + 2 * made.host_seconds)
    assert all(s.recompute_seconds <= s.forward_seconds for s in made.stages)


@pytest.mark.parametrize("absent", [None, AbsentCuda((8, 0))])
def test_costs_between_two_sizes_are_those_that_a_fake_step_of_that_size_has(
    absent: AbsentCuda | None,
) -> None:
    workload = models.cnn(blocks=1)
    stages = discover(workload, absent=absent)
    two, three, four = (step_costs(workload, stages, "sgd", "fp32", b, absent) for b in (2, 3, 4))
    middle = between(two, four, 3)
    assert middle is not None
    for window, operations in three.windows.items():
        for exact, made in zip(operations, middle.windows[window], strict=True):
            assert made.flops == pytest.approx(exact.flops)
            assert made.moved_bytes == pytest.approx(exact.moved_bytes)


def test_efficiencies_that_times_were_made_with_are_found_again() -> None:
    """Windows that are bound by products, by memory, and by the number of operations."""
    true = Efficiency(compute=0.4, memory=0.7, operation_seconds=0.02, time_error=0.0)
    windows = [
        [Operation("mm", 1000 * n, 1, "fp32", NOWHERE) for n in range(1, 5)],
        [Operation("add", 1, 300 * n, "fp32", NOWHERE) for n in range(1, 5)],
        [Operation("tiny", 0, 0.01, "fp32", NOWHERE)] * 50,
    ]
    measured = [Measured(operations=tuple(w), seconds=seconds(w, RATES, true)) for w in windows]
    assert calibrate(measured, RATES) == pytest.approx((0.4, 0.7, 0.02), rel=0.05)

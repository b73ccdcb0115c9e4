"""Sizes that were timed while the device ran at different speeds, compared at one."""

from __future__ import annotations

import time

import msgspec
import pytest
import torch
from torch import nn

import profiler
from profiler.one_speed import NOISE, Seconds, at_one_speed
from profiler.profile_record import ChunkedHead, PrecisionProfile
from tests.profiles import random_profile


def with_yardsticks(*seconds: float | None) -> PrecisionProfile:
    """Micro-batches of 1 and 4, timed beside yardsticks of so many seconds."""
    fp32 = random_profile(3).precisions[0]
    wall = tuple(
        msgspec.structs.replace(step, yardstick_seconds=each)
        for step, each in zip(fp32.wall, seconds, strict=True)
    )
    cpu = tuple(msgspec.structs.replace(step, yardstick_seconds=2.0) for step in wall)
    last = ChunkedHead(
        chunks=2,
        memory=fp32.memory.stages[-1],
        memory_at_one=None,
        wall=tuple(step.stages[-1] for step in wall),
        process_cpu=tuple(step.stages[-1] for step in wall),
    )
    return msgspec.structs.replace(fp32, wall=wall, process_cpu=cpu, chunked_head=last)


def test_what_was_timed_while_the_device_was_slow_becomes_faster() -> None:
    given = with_yardsticks(1.0, 2.0)
    found = at_one_speed(given, {("fp32", 1): Seconds(1.0, 2.0), ("fp32", 4): Seconds(1.0, 2.0)})
    assert found.wall[0] == given.wall[0]
    before, after = given.wall[1], found.wall[1]
    assert after.step_seconds == before.step_seconds / 2
    assert after.update_seconds == before.update_seconds / 2
    assert after.host_seconds == before.host_seconds / 2
    assert after.yardstick_seconds == 1.0
    assert after.spread == before.spread
    for a, b in zip(after.stages, before.stages, strict=True):
        assert a.forward_seconds == b.forward_seconds / 2
        assert a.backward_later_seconds == b.backward_later_seconds / 2
        assert a.kept_seconds == (None if b.kept_seconds is None else b.kept_seconds / 2)
    assert found.process_cpu == given.process_cpu
    assert found.chunked_head is not None
    assert given.chunked_head is not None
    head, own = found.chunked_head, given.chunked_head
    assert [stage.forward_seconds for stage in head.wall] == [
        own.wall[0].forward_seconds,
        own.wall[1].forward_seconds / 2,
    ]
    assert head.process_cpu == own.process_cpu


def test_noise_changes_nothing_and_neither_does_what_has_no_yardstick() -> None:
    given = with_yardsticks(1.0, None)
    little = 1.0 + 0.9 * NOISE
    assert at_one_speed(given, {("fp32", 1): Seconds(little, 2.0), ("fp32", 4): Seconds(9.0, 2.0)}) == given


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class Slow(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds  # type: ignore[attr-defined]
        spin(seconds)
        return x.clone()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        spin(2 * ctx.seconds)  # type: ignore[attr-defined]
        return gradients[0], None


class Machine(nn.Module):
    """10 ms a sample, and three times that while ``busy``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.busy = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seconds = 0.01 * len(x) * (3 if self.busy else 1)
        found: torch.Tensor = Slow.apply(self.linear(x), seconds)
        return found


def test_other_work_while_one_size_is_timed_leaves_how_sizes_compare() -> None:
    model = Machine()

    def tell(message: str) -> None:
        model.busy = message.endswith("timing micro-batch 2")

    workload = profiler.Workload(
        model=model,
        batch=lambda size: torch.randn(size, 8),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    found = profiler.profile(workload, (2, 4), ("fp32",), "cpu", steps=2, progress=tell)
    two, four = found.precisions[0].wall
    assert four.step_seconds / two.step_seconds == pytest.approx(2.0, rel=0.5)  # 0.67 as they were timed.

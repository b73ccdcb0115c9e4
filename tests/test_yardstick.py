"""Work that is timed between the steps, which tells how fast the device is meanwhile."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

import executor
import planner
import profiler
from profiler.timing import stepper_for
from profiler.yardstick import SHARE, Yardstick
from tests.models import cnn

CPU = torch.device("cpu")
NAP_SECONDS = 0.01


class Work:
    """Takes a while on a clock of its own, and none of the processor."""

    def __init__(self) -> None:
        self.times = 0
        self.now = 0.0
        self.nap_seconds = NAP_SECONDS

    def __call__(self) -> None:
        self.times += 1
        self.now += self.nap_seconds

    def yardstick(self) -> Yardstick:
        return Yardstick(self, CPU, wall=lambda: self.now, cpu=lambda: 0.0)


def test_it_runs_for_its_share_of_the_steps_that_it_runs_beside() -> None:
    work = Work()
    yardstick = work.yardstick()
    before = work.times
    yardstick.beside(1.0)
    assert work.times - before == pytest.approx(SHARE / NAP_SECONDS, abs=1)
    assert yardstick.wall_seconds() == pytest.approx(NAP_SECONDS)
    assert yardstick.cpu_seconds() == 0


def test_it_is_read_on_the_clocks_of_the_wall_and_of_the_process() -> None:
    yardstick = Yardstick(lambda: time.sleep(NAP_SECONDS), CPU)
    yardstick.beside(1.0)
    assert yardstick.wall_seconds() >= NAP_SECONDS
    assert yardstick.cpu_seconds() < NAP_SECONDS


def test_short_steps_share_a_run() -> None:
    work = Work()
    yardstick = work.yardstick()
    before = work.times
    for _ in range(20):
        yardstick.beside(NAP_SECONDS)
    assert work.times - before == pytest.approx(20 * SHARE, abs=1)


def test_a_step_that_was_hit_alone_does_not_count_and_one_beside_a_slow_yardstick_does() -> None:
    work = Work()
    yardstick = work.yardstick()
    for step_seconds, nap_seconds in ((1.0, 1), (1.6, 1), (1.0, 1), (2.0, 2), (1.5, 1), (1.0, 1)):
        work.nap_seconds = nap_seconds * NAP_SECONDS
        yardstick.beside(step_seconds * 0.1)
    assert yardstick.undisturbed() == [0, 2, 3, 4, 5]


def test_among_two_steps_nobody_can_tell_which_was_disturbed() -> None:
    yardstick = Work().yardstick()
    for step_seconds in (0.1, 0.5):
        yardstick.beside(step_seconds)
    assert yardstick.undisturbed() == [0, 1]


def test_it_leaves_no_gradients_and_keeps_the_precision_of_the_steps() -> None:
    workload = cnn()
    stepper = stepper_for(workload, "sgd", "bf16", CPU)
    seen: list[tuple[bool, bool]] = []
    plain = stepper.loss

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return plain(model, batch)

    Yardstick.of(replace(stepper, loss=loss), workload.batch(2), CPU)
    assert seen == [(False, True)] * 2
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_a_plan_on_a_device_that_became_slower_is_judged_at_that_speed() -> None:
    """Every module does ten milliseconds of useless work more than it did in the profile."""
    workload = cnn(blocks=4)
    profile = profiler.profile(workload, (2, 4), ("fp32",), "cpu", optimizer="sgd", steps=3)
    plan = planner.optimize(profile, 4)

    def tired(*_: object) -> None:
        begin = time.process_time()
        while time.process_time() - begin < NAP_SECONDS:
            pass

    slow = [m.register_forward_pre_hook(tired) for m in workload.model.modules() if not list(m.children())]
    found = executor.verify(plan, workload, steps=3)
    for hook in slow:
        hook.remove()
    assert found.device_speed is not None
    assert found.device_speed < 0.5
    off, steady = (found.relative_error[name] for name in ("step_cpu_seconds", "steady_seconds"))
    assert off is not None
    assert steady is not None
    assert off < -0.4
    assert steady > off + 0.1


@pytest.mark.parametrize("size", [2, 4])
def test_a_profile_has_one_for_every_micro_batch_size_and_clock(size: int) -> None:
    profile = profiler.profile(cnn(), (2, 4), ("fp32",), "cpu", optimizer="sgd", steps=1)
    measured = profile.precisions[0]
    assert measured.process_cpu is not None
    for times in (measured.wall, measured.process_cpu):
        at_size = next(t for t in times if t.micro_batch_size == size)
        assert at_size.yardstick_seconds is not None
        assert 0 < at_size.yardstick_seconds < at_size.step_seconds

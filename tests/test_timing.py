"""Measuring times on the device, and leaving the model as it was."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import planner
import profiler
from planner.cost import checked_peak_bytes
from planner.nested import PLAIN
from planner.search import PrecisionNotProfiled
from planner.time import step_parts
from profiler import device as devices
from profiler.chain import discover
from profiler.timing import measure_times, on_device, to_device
from profiler.workspaces import Workspaces

CPU = torch.device("cpu")


class Tired(nn.Module):
    """A block that naps in its forward pass, for longer under autocast."""

    def __init__(self, plain_seconds: float, autocast_seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.plain_seconds = plain_seconds
        self.autocast_seconds = autocast_seconds
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.autocast_seconds if torch.is_autocast_enabled("cpu") else self.plain_seconds)
        return torch.tanh(self.linear(x))


def workload_of(model: nn.Module) -> profiler.Workload:
    return profiler.Workload(
        model=model,
        batch=lambda size: torch.ones(size, 16),
        loss=lambda model, batch: model(batch).square().mean(),
    )


def naps(*seconds: tuple[float, float]) -> nn.Sequential:
    return nn.Sequential(*(Tired(plain, autocast) for plain, autocast in seconds))


def test_a_stage_that_naps_is_timed_as_napping_and_the_windows_make_up_the_step() -> None:
    workload = workload_of(naps((0.01, 0), (0.05, 0), (0.02, 0)))
    stages = discover(workload)
    timing = measure_times(
        workload, stages, optimizer="sgd", precision="fp32", micro_batch_size=2, device=CPU, steps=3,
        workspaces=Workspaces(CPU),
    )  # fmt: skip
    forward = [stage.forward_seconds for stage in timing.wall.stages]
    for seconds, nap in zip(forward, (0.01, 0.05, 0.02), strict=True):
        assert nap <= seconds < nap + 0.03
    # The product of each is what a selective segment keeps, and next to nothing beside the nap.
    assert all(0 < (stage.kept_seconds or 0.0) < stage.forward_seconds / 2 for stage in timing.wall.stages)
    assert sum(step_parts(timing.wall, 2, PLAIN).values()) == pytest.approx(timing.wall.step_seconds)
    assert all(stage.recompute_seconds <= stage.forward_seconds for stage in timing.wall.stages)
    assert timing.process_cpu is not None
    assert timing.process_cpu.step_seconds < timing.wall.step_seconds
    assert timing.wall.dispatch_seconds is not None
    assert 1e-7 < timing.wall.dispatch_seconds <= (timing.process_cpu.dispatch_seconds or 0.0) < 1e-3


def test_a_recompute_ends_at_the_last_tensor_that_is_saved() -> None:
    class NapsAfterwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.linear(x))
            time.sleep(0.06)
            return x

    workload = workload_of(nn.Sequential(nn.Linear(16, 16), NapsAfterwards(), nn.Linear(16, 16)))
    stages = discover(workload)
    timing = measure_times(
        workload, stages, optimizer="sgd", precision="fp32", micro_batch_size=2, device=CPU, steps=3,
        workspaces=Workspaces(CPU),
    )  # fmt: skip
    stage = timing.wall.stages[1]
    assert stage.forward_seconds > 0.06
    assert stage.recompute_seconds < 0.03


def test_a_hopeless_precision_is_recorded_with_its_slowdown_and_not_timed() -> None:
    workload = workload_of(naps((0.02, 0.08), (0.02, 0.08), (0.02, 0.08)))
    profile = profiler.profile(workload, batch_sizes=(2,), device="cpu", optimizer="sgd", steps=1)
    assert [measured.precision for measured in profile.precisions] == ["fp32"]
    (hopeless,) = profile.hopeless
    assert hopeless.precision == "bf16"
    assert 2.0 < hopeless.slowdown < 20.0
    with pytest.raises(PrecisionNotProfiled, match=r"bf16 \(\d+\.\d times slower than fp32 here\)"):
        planner.optimize(profile, 2, precisions=("bf16",))


def test_a_precision_that_is_worse_than_hopeless_is_broken_off_between_two_stages() -> None:
    model = naps(*((0.005, 0.3) for _ in range(10)))
    profile = profiler.profile(workload_of(model), batch_sizes=(2,), device="cpu", optimizer="sgd", steps=1)
    assert profile.hopeless[0].slowdown > 10
    first, last = model[0], model[9]
    assert isinstance(first, Tired)
    assert isinstance(last, Tired)
    assert first.calls == last.calls + 1


def test_a_loss_that_is_not_finite_is_refused_with_the_call() -> None:
    workload = profiler.Workload(
        model=nn.Linear(16, 1),
        batch=lambda size: torch.ones(size, 16),
        loss=lambda model, batch: model(batch).mean() * float("nan"),
    )
    with pytest.raises(ValueError, match=r"batch\(2\)\) must be finite, got nan"):
        profiler.profile(workload, batch_sizes=(2,), precisions=("fp32",), device="cpu", steps=1)


def test_measuring_leaves_weights_buffers_gradients_mode_and_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).eval()
    model[0].weight.grad = torch.full((16, 16), 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with on_device(workload_of(model), CPU) as placed:
        assert model.training
        assert model[0].weight.grad is None
        placed.loss(placed.model, placed.batch(4)).backward()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not model.training
    assert torch.equal(model[0].weight.grad, torch.full((16, 16), 3.0))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_profile_changes_no_weight_by_a_single_bit() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ran: list[bool] = []
    model[0].register_forward_hook(lambda module, *_: ran.append(isinstance(module.weight, FakeTensor)))
    profile = profiler.profile(
        workload_of(model), batch_sizes=(2, 4), precisions=("fp32",), device="cpu", steps=1
    )
    assert checked_peak_bytes(profile) == pytest.approx(profile.memory_check.measured_bytes, rel=0.01)
    assert profile.cost.micro_batches_run == ran.count(False) > 2 * 2 * 2 + 4 + 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", r"--device cuda:99 is not here: this machine has \d+ CUDA devices"),
        ("tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("cpu:1", "--device must be auto, cpu, cuda or cuda:N, got 'cpu:1'"),
    ],
)
def test_a_device_that_is_not_here_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devices.resolve(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": ()}, "--batch must be micro-batch sizes of at least 1"),
        ({"batch_sizes": (0, 2)}, "--batch must be micro-batch sizes of at least 1"),
        ({"precisions": ("fp8",)}, "--precision must be of fp32, bf16, fp16, got fp8"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, .*, got 'lion'"),
    ],
)
def test_bad_arguments_of_a_profile_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profiler.profile(workload_of(nn.Linear(16, 1)), device="cpu", **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_profile_on_cuda_predicts_the_allocators_peak() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    workload = profiler.Workload(
        model=model,
        batch=lambda size: torch.ones(size, 1024),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    profile = profiler.profile(workload, batch_sizes=(256, 512), device="cuda", steps=3)
    check = profile.memory_check
    assert check.measured_reserved_bytes is not None
    assert checked_peak_bytes(profile) == pytest.approx(check.measured_bytes, rel=0.03)


class Pair(NamedTuple):
    x: torch.Tensor
    label: str


def test_a_batch_on_its_way_to_the_device_keeps_its_containers_and_what_is_no_tensor() -> None:
    x = torch.ones(2)
    batch = {"a": x, "b": (x, [x, 3, None]), "c": Pair(x, "cat"), "d": OrderedDict(e=x)}
    moved = to_device(batch, torch.device("meta"))
    assert list(moved) == ["a", "b", "c", "d"]
    assert type(moved["b"]) is tuple
    assert type(moved["b"][1]) is list
    assert moved["b"][1][1:] == [3, None]
    assert type(moved["c"]) is Pair
    assert moved["c"].label == "cat"
    assert type(moved["d"]) is OrderedDict
    tensors = (moved["a"], moved["b"][0], moved["b"][1][0], moved["c"].x, moved["d"]["e"])
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert x.device == CPU

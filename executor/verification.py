"""Hold a plan against reality: run it for a few steps and measure what it predicted.

    warm up ─▶ n timed steps, nothing watching ─▶ one step under a meter of live tensor bytes (CPU)
                                                  or with the allocator's own peak (CUDA)

Time on a CPU is read from two clocks: the wall's, which is what one waits for, and the process's own, which does
not count what others on the machine took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from executor.engine import PreparedStep, apply_checkpoints, split
from executor.errors import PlanDoesNotFit
from planner.plan import Cost, Plan
from profiler import device as devices
from profiler.live import LiveStorages
from profiler.records import Record
from profiler.registry import build
from profiler.timing import on_device, stepper_for
from profiler.workload import Workload

CURVE_POINTS = 600
"""How many points of the memory curve a verification keeps."""

Progress = Callable[[str], None]


class Verification(Record):
    """What a plan predicted and what was measured; ``relative_error`` is (predicted - measured) / measured.

    ``within``: whether each lies within the error that the plan states; time when either clock does.
    ``memory_curve`` (CPU): live tensor bytes over one step, as (share of the step's operations, bytes).
    """

    plan_sha256: str
    predicted: Cost
    measured: Cost
    relative_error: dict[str, float | None]
    within: dict[str, bool]
    passed: bool
    steps: int
    memory_curve: tuple[tuple[float, int], ...] | None


def verify(
    plan: Plan,
    workload: Workload | None = None,
    *,
    steps: int = 5,
    progress: Progress = lambda message: None,
) -> Verification:
    """Run the plan for ``steps`` timed optimizer steps on its device and compare.

    ``workload`` is needed for plans made from a workload in Python; others are built from the plan. Raises
    PlanDoesNotFit for another model or device. A model that is passed in is left as it was.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}.")
    device = device_of(plan)
    workload = workload or build_workload(plan)
    progress("building the model")
    with on_device(workload, device) as placed:
        checkpoints = apply_checkpoints(placed.model, plan)
        try:
            stepper = stepper_for(placed, plan.optimizer, plan.precision, device)
            step = PreparedStep(stepper, plan, checkpoints)
            batch = placed.batch(plan.global_batch_size)
            progress("warming up")
            step(batch)
            clocks = Clocks()
            for index in range(steps):
                progress(f"timing step {index + 1} of {steps}")
                with clocks.timing(device):
                    step(batch)
            progress("measuring peak memory")
            peak, reserved, curve = _measure_memory(step, plan, batch, device)
        finally:
            checkpoints.remove()
    measured = Cost(
        step_seconds=statistics.median(clocks.wall),
        step_cpu_seconds=statistics.median(clocks.cpu) if device.type == "cpu" else None,
        peak_memory_bytes=peak,
        peak_reserved_bytes=reserved,
        step_joules=None,
    )
    return compare(plan, measured, steps, curve)


def compare(
    plan: Plan, measured: Cost, steps: int, curve: tuple[tuple[float, int], ...] | None
) -> Verification:
    """The verdict on a measured cost."""
    predicted = plan.prediction
    errors = {
        name: _relative(getattr(predicted, name), getattr(measured, name)) for name in Cost.__struct_fields__
    }
    time_errors = [abs(e) for name in ("step_seconds", "step_cpu_seconds") if (e := errors[name]) is not None]
    memory_error = errors["peak_memory_bytes"]
    within = {
        "step_seconds": min(time_errors) <= predicted.error.step_seconds,
        "peak_memory_bytes": memory_error is not None
        and abs(memory_error) <= predicted.error.peak_memory_bytes,
    }
    if plan.memory_budget_bytes is not None:
        within["memory_budget"] = measured.peak_memory_bytes <= plan.memory_budget_bytes
    return Verification(
        plan_sha256=plan.sha256,
        predicted=Cost(**{name: getattr(predicted, name) for name in Cost.__struct_fields__}),
        measured=measured,
        relative_error=errors,
        within=within,
        passed=all(within.values()),
        steps=steps,
        memory_curve=curve,
    )


def _relative(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else (predicted - measured) / measured


def device_of(plan: Plan) -> torch.device:
    """The plan's device, when it is here. Raises PlanDoesNotFit otherwise."""
    if plan.device.kind == "cuda" and not torch.cuda.is_available():
        raise PlanDoesNotFit(
            f"The plan was made for {plan.device.name}, and this machine has no CUDA device. "
            "Profile here, or run it there."
        )
    device = torch.device(plan.device.kind)
    here = devices.describe(device)
    if (here.name, here.threads) != (plan.device.name, plan.device.threads):
        raise PlanDoesNotFit(
            f"The plan was made for {_device_text(plan.device.name, plan.device.threads)}, this is "
            f"{_device_text(here.name, here.threads)}. Profile here, or run it there."
        )
    return device


def _device_text(name: str, threads: int | None) -> str:
    return name if threads is None else f"{name} with {threads} threads"


def build_workload(plan: Plan) -> Workload:
    """The workload that the plan names. Raises PlanDoesNotFit when it was made from an object in Python."""
    if plan.workload is None:
        raise PlanDoesNotFit(
            f"The plan for {plan.model} was made from a Workload object, which a file cannot hold. "
            "Pass it: executor.verify(plan, workload)."
        )
    return build(plan.workload)


@dataclass(slots=True)
class Clocks:
    """Wall and CPU seconds of steps."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def timing(self, device: torch.device) -> _Timing:
        """A context that adds the seconds spent inside, the device's work included."""
        return _Timing(self, device)


class _Timing:
    def __init__(self, clocks: Clocks, device: torch.device) -> None:
        self._clocks = clocks
        self._device = device

    def __enter__(self) -> None:
        devices.synchronize(self._device)
        self._began = time.perf_counter(), devices.process_cpu_seconds()

    def __exit__(self, *exception: object) -> None:
        devices.synchronize(self._device)
        wall, cpu = self._began
        self._clocks.wall.append(time.perf_counter() - wall)
        self._clocks.cpu.append(devices.process_cpu_seconds() - cpu)


def _measure_memory(
    step: PreparedStep, plan: Plan, batch: object, device: torch.device
) -> tuple[int, int | None, tuple[tuple[float, int], ...] | None]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(batch)
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), None
    meter = LiveMeter(step, split(batch, plan.global_batch_size, plan.gradient_accumulation_steps))
    with meter:
        step(iter(meter.micro_batches))
    return meter.peak_bytes, None, meter.curve()


class LiveMeter:
    """Peak and course of the live tensor bytes of the steps that run inside, on a CPU."""

    def __init__(self, step: PreparedStep, micro_batches: object) -> None:
        self.micro_batches = list(micro_batches)  # type: ignore[call-overload]
        self._points: list[int] = []
        self._live = LiveStorages(observe=lambda event, key, size: self._points.append(self._live.live_bytes))
        self._step = step

    def __enter__(self) -> None:
        model, optimizer = self._step.stepper.model, self._step.stepper.optimizer
        self._live.track(model.parameters())
        self._live.track(model.buffers())
        self._live.track(
            leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)
        )
        self._live.track(leaf for leaf in tree_leaves(self.micro_batches) if isinstance(leaf, torch.Tensor))
        self._points.clear()
        self._live.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: object) -> None:
        self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @property
    def peak_bytes(self) -> int:
        return self._live.peak_bytes

    def curve(self) -> tuple[tuple[float, int], ...]:
        """The course in at most ``CURVE_POINTS`` points, each the highest of its stretch of operations."""
        count = len(self._points)
        width = -(-count // CURVE_POINTS)
        return tuple(
            (start / count, max(self._points[start : start + width])) for start in range(0, count, width)
        )

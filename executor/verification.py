"""Hold a plan against reality: run it for a few steps and measure what it predicted.

    warm up ─▶ n timed steps and their mean, nothing watching ─▶ one step whose peak the allocator itself reports

Time on a CPU is read from two clocks: the wall's, which is what one waits for, and the process's own, which does
not count what others on the machine took. What is judged is the prediction on the steadier clock, at the speed that the
device has now: a yardstick beside every step tells how it compares with the profile's (profiler/yardstick.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from executor.engine import PreparedStep, apply_checkpoints, check_one_process
from executor.errors import OutOfMemory, PlanDoesNotFit
from planner.calibration import Residual
from planner.plan import Cost, Plan
from planner.sizes import size_text
from profiler import device as devices
from profiler import energy
from profiler.allocator import StepPeak, measure_step
from profiler.records import Record
from profiler.registry import build
from profiler.timing import MOST_STEPS, SHORTEST_SECONDS, on_device, stepper_for
from profiler.workload import Workload, split
from profiler.yardstick import Yardstick

Progress = Callable[[str], None]


class Verification(Record):
    """What a plan predicted and what was measured; ``relative_error`` is (predicted - measured) / measured.

    ``device_speed``: how fast the device was, 1 being as fast as in the profile; None for a plan that does not know.
    ``steady_seconds`` of ``relative_error``: of the time on the steadiest clock, predicted for a device of that speed.
    ``within``: whether each lies within the error that the plan states; time by ``steady_seconds``, energy only
    when its watts were measured, not stated by the user.
    ``memory_curve`` (CPU): memory in use over one step, as (share of the allocator's events, bytes).
    """

    plan_sha256: str
    predicted: Cost
    measured: Cost
    relative_error: dict[str, float | None]
    within: dict[str, bool]
    passed: bool
    steps: int
    device_speed: float | None
    memory_curve: tuple[tuple[float, int], ...] | None

    @property
    def residual(self) -> Residual:
        """What this teaches about the device: how far peak and time were off."""
        seconds, peak = self.relative_error["steady_seconds"], self.relative_error["peak_memory_bytes"]
        if seconds is None or peak is None:
            raise ValueError("A verification must have measured time and peak to teach anything, got None.")
        return Residual(plan_sha256=self.plan_sha256, step_seconds=seconds, peak_memory_bytes=peak)


def verify(
    plan: Plan,
    workload: Workload | None = None,
    *,
    steps: int = 5,
    progress: Progress = lambda message: None,
) -> Verification:
    """Run the plan for ``steps`` timed optimizer steps, more where they are short, on its device and compare.

    ``workload`` is needed for plans made from a workload in Python; others are built from the plan. Raises
    PlanDoesNotFit for another model or device, OutOfMemory where memory is refused. A model that is passed in stays as
    it was.

    A plan of several processes is verified in as many, started by torchrun: each calls this, and all get one verdict.
    DeepSpeed keeps the model that is passed in.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}.")
    if plan.world_size > 1 and "RANK" in os.environ:
        from executor.verified_ranks import verify_as_rank

        return verify_as_rank(plan, workload, steps=steps, progress=progress)
    device = device_of(plan)
    try:
        return _verified(plan, workload or build_workload(plan), device, steps, progress)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise _refused(plan) from error


def _refused(plan: Plan) -> OutOfMemory:
    predicted = plan.prediction
    return OutOfMemory(
        f"{plan.model} was refused memory on {plan.device.name}: the plan's peak is predicted as "
        f"{size_text(predicted.peak_memory_bytes)} ± {predicted.error.peak_memory_bytes:.1%}, and the device has "
        f"{size_text(plan.device.memory_bytes)} for all that runs there. Free some, or optimise with a smaller "
        "--memory-budget."
    )


def _verified(
    plan: Plan, workload: Workload, device: torch.device, steps: int, progress: Progress
) -> Verification:
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
            yardstick = Yardstick.of(stepper, placed.batch(plan.micro_batch_size), device)
            while len(clocks.wall) < steps or (
                sum(clocks.wall) < SHORTEST_SECONDS and len(clocks.wall) < MOST_STEPS
            ):
                progress(f"timing step {len(clocks.wall) + 1} of {max(steps, len(clocks.wall) + 1)}")
                with clocks.timing(device):
                    step(batch)
                yardstick.beside(clocks.wall[-1])
            yardstick_seconds = yardstick.cpu_seconds() if device.type == "cpu" else yardstick.wall_seconds()
            counted = yardstick.undisturbed()
            del yardstick
            joules = _step_joules(lambda: step(batch), device, progress)
            progress("measuring peak memory")
            peak, _ = measured_peak(step, plan, placed.worst_batch(plan.global_batch_size), device)
        finally:
            checkpoints.remove()
    measured = Cost(
        step_seconds=statistics.mean(clocks.wall[index] for index in counted),
        step_cpu_seconds=(
            statistics.mean(clocks.cpu[index] for index in counted) if device.type == "cpu" else None
        ),
        peak_memory_bytes=peak.peak_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
        step_joules=joules,
    )
    return compare(plan, measured, len(counted), peak.course, yardstick_seconds)


def _step_joules(step: Callable[[], object], device: torch.device, progress: Progress) -> float | None:
    """Joules of one step; None without a counter. A counter moves in ticks, so steps are repeated for a window."""
    counter = energy.find_counter(device)
    if counter is None:
        return None
    progress(f"measuring energy ({counter.source})")
    began, before, steps = time.perf_counter(), counter.joules(), 0
    while time.perf_counter() - began < energy.WINDOW_SECONDS:
        step()
        devices.synchronize(device)
        steps += 1
    return (counter.joules() - before) / steps


def compare(
    plan: Plan,
    measured: Cost,
    steps: int,
    curve: tuple[tuple[float, int], ...] | None,
    yardstick_seconds: float | None = None,
) -> Verification:
    """The verdict on a measured cost; ``yardstick_seconds`` were measured beside it, on the steadiest clock."""
    predicted = plan.prediction
    errors = {
        name: _relative(getattr(predicted, name), getattr(measured, name)) for name in Cost.__struct_fields__
    }
    speed = None
    if predicted.yardstick_seconds is not None and yardstick_seconds is not None:
        speed = predicted.yardstick_seconds / yardstick_seconds
    steady_error = (
        predicted.steady_seconds / (speed or 1.0) - measured.steady_seconds
    ) / measured.steady_seconds
    memory_error = errors["peak_memory_bytes"]
    within = {
        "step_seconds": abs(steady_error) <= predicted.error.step_seconds,
        "peak_memory_bytes": memory_error is not None
        and abs(memory_error) <= predicted.error.peak_memory_bytes,
    }
    joules_error = errors["step_joules"]
    if joules_error is not None and predicted.error.step_joules is not None:
        within["step_joules"] = abs(joules_error) <= predicted.error.step_joules
    if plan.memory_budget_bytes is not None:
        within["memory_budget"] = measured.peak_memory_bytes <= plan.memory_budget_bytes
    return Verification(
        plan_sha256=plan.sha256,
        predicted=Cost(**{name: getattr(predicted, name) for name in Cost.__struct_fields__}),
        measured=measured,
        relative_error=errors | {"steady_seconds": steady_error},
        within=within,
        passed=all(within.values()),
        steps=steps,
        device_speed=speed,
        memory_curve=curve,
    )


def _relative(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else (predicted - measured) / measured


def device_of(plan: Plan) -> torch.device:
    """The plan's device, when it is here. Raises PlanDoesNotFit otherwise, and for a plan of several processes."""
    check_one_process(plan)
    return device_here(plan)


def device_here(plan: Plan) -> torch.device:
    """The same in one of several processes, which has joined the others: it took the plan's threads, or its own GPU."""
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


def measured_peak(
    step: PreparedStep, plan: Plan, batch: object, device: torch.device
) -> tuple[StepPeak, torch.Tensor]:
    """Run one step on a global batch; its peak as the allocator reports it, and its loss."""
    micro_batches = list(split(batch, plan.global_batch_size, plan.gradient_accumulation_steps))
    stepper = step.stepper
    losses: list[torch.Tensor] = []
    peak = measure_step(
        lambda: losses.append(step(iter(micro_batches))),
        stepper.model,
        stepper.optimizer,
        micro_batches,
        device,
    )
    return peak, losses[0]

"""How long a step would take on a device, from what it computes and what it moves.

A fake step names every operation with its shapes, so its floating-point operations and the bytes of its inputs
and outputs are known. A device can do no better than its peak rates, and reaches a part of them:

    seconds of an operation = max(flops / (peak * compute), bytes / (bandwidth * memory)) + overhead

             rate ▲      ________  peak * compute
                  |     /
                  |    /  bandwidth * memory
                  +---------------▶ flops per byte

The two efficiencies and the overhead are calibrated where steps were measured (``calibrate``), or come from a
source that is named with them. Every window of a step is the sum of its operations. What this leaves out (caches,
launches that hide behind work, skipped halves of causal attention) is why its stated error is wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch.utils.flop_counter import flop_registry

from profiler.absent import AbsentCuda
from profiler.chain import Stage
from profiler.events import Window
from profiler.live import is_mutable, tensors_in
from profiler.memory import MemoryTracer
from profiler.profile_record import Keeping, Precision, StageTime, StepTime
from profiler.selective import keepers
from profiler.workload import Workload

MICRO_BATCHES = 2
"""The first micro-batch makes gradients, the second adds to them."""

SHORT_NAMES: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Operation:
    """What one operation computes and moves. ``precision``: of its products. ``kept``: see profiler/selective.py."""

    name: str
    flops: float
    moved_bytes: float
    precision: Precision
    kept: frozenset[Keeping]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """The operations of a step by window. ``until_saved``: of a stage's forward, those up to its last saved tensor."""

    micro_batch_size: int
    stages: int
    windows: dict[Window, tuple[Operation, ...]]
    until_saved: dict[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a device does at best. A precision that is not there has no products."""

    flops_per_second: dict[Precision, float]
    memory_bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Which part of its rates a device reaches in a step, and what each operation costs on top.

    ``time_error``: the relative error of a step's time to state with it.
    """

    compute: float
    memory: float
    operation_seconds: float
    time_error: float


CUDA_EFFICIENCY = Efficiency(compute=0.79, memory=0.90, operation_seconds=3.8e-6, time_error=0.5)
"""What a CUDA device reaches. ``compute`` and ``memory``: one H200 in 2026-11 ran a bf16 product of 8,192 x 8,192
matrices at 769-798 of its 989 TFLOP/s and copied at 4.3 of its 4.8 TB/s. ``operation_seconds``: short kernels launched
one after the other took 3.8 us each (A. Gray, "Getting Started with CUDA Graphs", NVIDIA developer blog, 2019).
``time_error``: products in a model are smaller and kernels are rarely this good: published steps of tuned transformers
on A100 reach 41.5-56% of the peak (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", table 5), where these numbers allow up to 79%, so a step may well take half as long again."""

CPU_EFFICIENCY = Efficiency(compute=0.40, memory=0.45, operation_seconds=1.1e-3, time_error=0.75)
"""What a CPU reaches of rates that were measured on it: calibrated by ``python -m studies.roofline`` on a perceptron, a
convolutional network and an encoder, on two cores that others used as well (which an operation's overhead shows: the
least of the three models is taken). Predicted from the other two, each step was 34% off in the median, 75% at worst."""


def step_costs(
    workload: Workload,
    stages: Sequence[Stage],
    optimizer: str,
    precision: Precision,
    batch_size: int,
    absent: AbsentCuda | None = None,
) -> StepCosts:
    """Run one fake step of two micro-batches and note what every operation costs."""
    counter = OperationCounter()
    device_type = "cuda" if absent else "cpu"
    tracer = MemoryTracer(workload, stages, optimizer, device_type=device_type, absent=absent)
    tracer.trace(precision, batch_size, "plain", counter, longest=False)
    return counter.costs(batch_size, len(stages))


def between(small: StepCosts, large: StepCosts, micro_batch_size: int) -> StepCosts | None:
    """The costs at a size between two others: each operation's grow affinely. None where the operations differ."""
    if small.micro_batch_size == large.micro_batch_size:
        return small
    share = (micro_batch_size - small.micro_batch_size) / (large.micro_batch_size - small.micro_batch_size)
    windows: dict[Window, tuple[Operation, ...]] = {}
    for window, found in small.windows.items():
        other = large.windows.get(window, ())
        if [o.name for o in found] != [o.name for o in other]:
            return None
        windows[window] = tuple(
            Operation(
                a.name,
                a.flops + share * (b.flops - a.flops),
                a.moved_bytes + share * (b.moved_bytes - a.moved_bytes),
                a.precision,
                a.kept,
            )
            for a, b in zip(found, other, strict=True)
        )
    return StepCosts(
        micro_batch_size=micro_batch_size,
        stages=small.stages,
        windows=windows,
        until_saved=small.until_saved,
    )


GATHERS = ("embedding", "index_select", "gather", "index")
"""Operations that read as many elements of their first input as they return, not all of it."""


class OperationCounter:
    """Notes what every operation of a step costs, in the window it falls in."""

    def __init__(self) -> None:
        self._windows: dict[Window, list[Operation]] = {}
        self._until_saved: dict[int, int] = {}
        self._window: Window = ("between", 0, 0)

    def entered(self, window: Window) -> None:
        """What is called from now on belongs to this window."""
        self._window = window
        self._windows.setdefault(window, [])

    def saved(self) -> None:
        """A tensor was saved for the backward pass."""
        phase, micro_batch, stage = self._window
        if phase == "forward" and micro_batch == 0:
            self._until_saved[stage] = len(self._windows[self._window])

    def called(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """An operation has run."""
        if func.namespace != "prim" and self._window in self._windows:
            made = operation_of(func, args, kwargs, outputs)
            if made is not None:
                self._windows[self._window].append(made)

    def costs(self, micro_batch_size: int, stages: int) -> StepCosts:
        """All that was noted."""
        return StepCosts(
            micro_batch_size=micro_batch_size,
            stages=stages,
            windows={window: tuple(found) for window, found in self._windows.items()},
            until_saved=self._until_saved,
        )


def operation_of(func: Any, args: Any, kwargs: Any, outputs: Any) -> Operation | None:
    """What a call costs; None where nothing is computed: views and uninitialised memory."""
    name = func._schema.name.partition("::")[2]
    read = [*tensors_in(args), *tensors_in(kwargs)]
    written = [*tensors_in(outputs)]
    inputs = {id(tensor) for tensor in read}
    storages = {tensor.untyped_storage() for tensor in read}
    mutates = is_mutable(func)
    if func.is_view or name.startswith(("empty", "new_empty")):
        return None
    if not mutates and written and all(tensor.untyped_storage() in storages for tensor in written):
        return None  # a view under another name, such as _unsafe_view or detach
    moved = sum(map(_moved, written))
    if name in GATHERS and read:
        moved += sum(map(_moved, written)) + sum(map(_moved, read[1:]))
    else:
        moved += sum(map(_moved, read))
    if mutates:
        changed = tensors_in([value for value, info in _arguments(func, args, kwargs) if info.is_write])
        moved += sum(_moved(tensor) for tensor in changed if id(tensor) in inputs)
        moved -= sum(_moved(tensor) for tensor in written if id(tensor) in inputs)
    formula = flop_registry.get(func._overloadpacket)
    flops = float(formula(*args, **kwargs, out_val=outputs)) if formula is not None else 0.0
    floats = (tensor.dtype for tensor in read if tensor.is_floating_point())
    precision = SHORT_NAMES.get(next(floats, torch.float32), "fp32")
    return Operation(name, flops, float(moved), precision, keepers(func, args, kwargs))


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterable[tuple[Any, Any]]:
    """The values of a call with what the schema says of each."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        if index < len(args):
            yield args[index], argument.alias_info
        elif argument.name in kwargs:
            yield kwargs[argument.name], argument.alias_info


def _moved(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one are fewer than it shows."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def seconds(operations: Sequence[Operation], rates: Rates, efficiency: Efficiency) -> float:
    """The time of operations, one after the other."""
    computing = np.array([o.flops / rates.flops_per_second[o.precision] for o in operations])
    moving = np.array([o.moved_bytes / rates.memory_bytes_per_second for o in operations])
    return float(_sum(computing, moving, efficiency.compute, efficiency.memory, efficiency.operation_seconds))


def _sum(
    computing: npt.NDArray[np.float64],
    moving: npt.NDArray[np.float64],
    compute: float,
    memory: float,
    operation_seconds: float,
) -> float:
    return float(np.maximum(computing / compute, moving / memory).sum() + operation_seconds * len(computing))


def step_time(costs: StepCosts, rates: Rates, efficiency: Efficiency) -> StepTime:
    """A step's times as a measurement would give them, with the stated error in the place of noise."""
    times = {window: seconds(found, rates, efficiency) for window, found in costs.windows.items()}

    def of(phase: str, micro_batch: int, stage: int) -> float:
        return times.get((phase, micro_batch, stage), 0.0)

    def stage(i: int) -> StageTime:
        again = costs.windows.get(("forward", 0, i), ())[: costs.until_saved.get(i, 0)]
        return StageTime(
            forward_seconds=of("forward", 0, i),
            recompute_seconds=seconds(again, rates, efficiency),
            kept_seconds=seconds([o for o in again if "selective" in o.kept], rates, efficiency),
            kept_narrow_seconds=seconds(
                [o for o in again if "selective_narrow" in o.kept], rates, efficiency
            ),
            backward_first_seconds=of("backward", 0, i),
            backward_later_seconds=of("backward", 1, i),
        )

    return StepTime(
        micro_batch_size=costs.micro_batch_size,
        stages=tuple(stage(i) for i in range(costs.stages)),
        update_seconds=of("optimizer", 0, 0),
        host_seconds=sum(of("between", m, 0) for m in range(MICRO_BATCHES)) / MICRO_BATCHES,
        step_seconds=sum(times.values()),
        steps_timed=0,
        spread=efficiency.time_error,
    )


RESTARTS = 3
"""A simplex that has shrunk on a slope of the maximum is spread out again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Operations of a window beside the seconds that it took."""

    operations: tuple[Operation, ...]
    seconds: float


def windows_of(costs: StepCosts, times: StepTime) -> list[Measured]:
    """The windows of a measured step with their operations."""
    found = []
    for i, stage in enumerate(times.stages):
        for window, taken in (
            (("forward", 0, i), stage.forward_seconds),
            (("backward", 0, i), stage.backward_first_seconds),
            (("backward", 1, i), stage.backward_later_seconds),
        ):
            found.append(Measured(operations=costs.windows.get(window, ()), seconds=taken))
    update = costs.windows.get(("optimizer", 0, 0), ())
    return [*found, Measured(operations=update, seconds=times.update_seconds)]


def calibrate(measured: Sequence[Measured], rates: Rates) -> tuple[float, float, float]:
    """``(compute, memory, operation_seconds)`` with which windows come closest to what they took.

    Minimises the sum of absolute differences, so that long windows count most and single outliers little.
    """
    computing, moving, owner = [], [], []
    for index, window in enumerate(measured):
        for operation in window.operations:
            computing.append(operation.flops / rates.flops_per_second[operation.precision])
            moving.append(operation.moved_bytes / rates.memory_bytes_per_second)
            owner.append(index)
    flop_times, byte_times, windows = np.array(computing), np.array(moving), np.array(owner)
    taken = np.array([window.seconds for window in measured])

    def difference(logarithms: npt.NDArray[np.float64]) -> float:
        compute, memory, overhead = np.exp(logarithms)
        each = np.maximum(flop_times / compute, byte_times / memory) + overhead
        return float(np.abs(np.bincount(windows, each, len(taken)) - taken).sum() / taken.sum())

    counts = np.bincount(windows, minlength=len(taken))
    least_overhead = (taken[counts > 0] / counts[counts > 0]).min()
    best = np.log([0.5, 0.5, least_overhead])
    for _ in range(RESTARTS):
        best = minimize(difference, best, method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-4}).x
    compute, memory, overhead = np.exp(best)
    return float(compute), float(memory), float(overhead)

"""The profile of a model on a device where nothing runs: one of the catalogue, or this machine's.

    without_memory(): build   weights have shapes, no bytes
    fake steps                memory curves, exact but for what kernels take for themselves
    fake steps                operations with their flops and bytes ──▶ roofline ──▶ times

A 7 B model is profiled in half a minute and less than a gigabyte. What it says is marked: no step was timed
(``steps_timed`` 0), the memory was not checked (``memory_check`` None), and both errors are stated wider. On this
machine a small model's operations are tried out one by one, which shows what their kernels take (``kernels_tried``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch

from profiler import catalogue, energy
from profiler import device as devices
from profiler.absent import AbsentCuda, blas_workspace_bytes
from profiler.catalogue import CatalogueDevice
from profiler.chain import Stage, discover, recomputable_stages
from profiler.chunked import can_be_chunked, chunks_for, in_chunks
from profiler.live import CUDA_BLOCK_BYTES
from profiler.memory import MemoryTracer
from profiler.parameters import parameter_records
from profiler.profile_record import (
    PRECISIONS,
    ChunkedHead,
    DeviceRecord,
    HopelessPrecision,
    Precision,
    PrecisionProfile,
    Profile,
    ProfileCost,
    StageRecord,
    StepTime,
)
from profiler.roofline import (
    CPU_EFFICIENCY,
    CUDA_EFFICIENCY,
    Efficiency,
    OperationCounter,
    Rates,
    StepCosts,
    between,
    step_costs,
    step_time,
)
from profiler.timing import HOPELESS_SLOWDOWN
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec
from profiler.workspaces import Workspaces

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A device by what is known of it. ``absent``: how its fakes behave; None is this machine's CPU."""

    record: DeviceRecord
    rates: Rates
    efficiency: Efficiency
    absent: AbsentCuda | None

    @property
    def other_bytes(self) -> int:
        return 0 if self.absent is None else blas_workspace_bytes(self.absent.capability)


def target_of(
    name: str, precisions: Sequence[Precision], progress: Progress = lambda message: None
) -> Target:
    """A device of the catalogue, or the one that is here (``auto``, ``cpu``, ``cuda``, ``cuda:N``) as it is known.

    A CUDA device that is here is looked up in the catalogue by its title; the rates of a CPU are measured, which
    takes about a second and runs nothing of the model.
    """
    if catalogue.has(name):
        return _of_catalogue(catalogue.find(name))
    here = devices.resolve(name)
    record = devices.describe(here)
    if here.type == "cuda":
        known = catalogue.titled(record.name)
        if known is None:
            raise ValueError(
                f"--fake needs the rates of the device, and the catalogue has no {record.name}. "
                "Leave --fake out, or give a device of `planner devices`."
            )
        return replace(_of_catalogue(known), record=record)
    progress("measuring what this CPU does at best")
    return Target(record=record, rates=cpu_rates(precisions), efficiency=CPU_EFFICIENCY, absent=None)


def _of_catalogue(device: CatalogueDevice) -> Target:
    rates = {p: rate for p in PRECISIONS if (rate := device.flops_per_second(p)) is not None}
    return Target(
        record=DeviceRecord(
            kind="cuda", name=device.title, memory_bytes=device.memory_bytes, catalogue=device.name
        ),
        rates=Rates(flops_per_second=rates, memory_bytes_per_second=device.memory_bytes_per_second),
        efficiency=CUDA_EFFICIENCY,
        absent=AbsentCuda(device.capability),
    )


def profile_unmeasured(
    workload: Workload,
    sizes: Sequence[int],
    precisions: Sequence[Precision],
    target: Target,
    *,
    optimizer: str,
    watts: float | None,
    spec: WorkloadSpec | None,
    progress: Progress,
    all_precisions: bool = False,
    trying_bytes: int | None = None,
) -> Profile:
    """The profile of a workload without running a step of it. The model is left as it was.

    ``trying_bytes``: on a device that is here, every kind of operation whose inputs take no more than this is run once
    on zeros, for what its kernel takes; None: ``TRYING_BYTES`` for a model that is small enough for it.
    """
    if trying_bytes is None:
        small = sum(p.numel() * p.element_size() for p in workload.model.parameters()) <= SMALL_MODEL_BYTES
        trying_bytes = TRYING_BYTES if small else 0
    workspaces = None
    if target.absent is None and trying_bytes:
        workspaces = Workspaces(torch.device(target.record.kind), trying_bytes)
    began = time.perf_counter()
    model, absent, rates = workload.model, target.absent, target.rates
    training = model.training
    hopeless: list[HopelessPrecision] = []
    found: list[PrecisionProfile] = []
    model.train()
    try:
        with torch.random.fork_rng(devices=()):
            progress("finding the chain of stages")
            stages = discover(workload, absent=absent)
            parameters = parameter_records(workload, stages, sizes[-1], absent)
            tracer = MemoryTracer(
                workload,
                stages,
                optimizer,
                device_type="cpu" if absent is None else "cuda",
                block_bytes=1 if absent is None else CUDA_BLOCK_BYTES,
                absent=absent,
                workspaces=workspaces,
            )
            for precision in precisions:
                rate = rates.flops_per_second.get(precision)
                if rate is None:
                    progress(f"{precision}: {target.record.name} has none, left out")
                    continue
                slowdown = rates.flops_per_second["fp32"] / rate
                if slowdown > HOPELESS_SLOWDOWN and not all_precisions:
                    hopeless.append(HopelessPrecision(precision=precision, slowdown=slowdown))
                    progress(f"{precision}: {slowdown:.1f} times slower than fp32 here, left out")
                    continue
                progress(f"{precision}: tracing memory and counting operations")
                counters = {size: OperationCounter() for size in {sizes[0], *traced_sizes(sizes)}}
                shared = counters if workload.longest_batch is None else {}
                memory = tracer.memory(precision, traced_sizes(sizes), shared)
                at_one = tracer.memory(precision, (1, 1), shared) if sizes[0] == 1 else None
                if not shared:
                    for size, counter in counters.items():
                        tracer.trace(precision, size, "plain", counter, longest=False)
                costs = [counter.costs(size, len(stages)) for size, counter in counters.items()]
                head = None
                if can_be_chunked(model):
                    chunks = chunks_for(workload.batch(sizes[-1]))
                    progress(f"{precision}: the same for the loss in {chunks} chunks")
                    head = _chunked_head(
                        workload, stages, tracer, precision, sizes, optimizer, target, chunks
                    )
                found.append(
                    PrecisionProfile(
                        precision=precision,
                        memory=msgspec.structs.replace(memory, other_bytes=target.other_bytes),
                        memory_at_one=at_one
                        and msgspec.structs.replace(at_one, other_bytes=target.other_bytes),
                        wall=_times(workload, stages, optimizer, precision, sizes, target, costs),
                        process_cpu=None,
                        chunked_head=head,
                    )
                )
    finally:
        model.train(training)
    if workspaces is not None and workspaces.refused:
        names = sorted({str(kind.function) for kind in workspaces.refused})
        progress(
            f"{len(workspaces.refused)} operations could not be tried alone ({', '.join(names[:3])}"
            f"{' ...' if len(names) > 3 else ''}): what their kernels take is unknown, and the stated error stays wide"
        )
    return Profile(
        model=workload.label,
        workload=spec,
        parameter_count=sum(parameter.numel() for parameter in model.parameters()),
        optimizer=optimizer,
        device=target.record,
        versions=devices.versions(),
        micro_batch_sizes=tuple(sizes),
        stages=stage_records(stages),
        precisions=tuple(found),
        hopeless=tuple(hopeless),
        memory_check=None,
        cost=ProfileCost(seconds=time.perf_counter() - began, micro_batches_run=0),
        energy=None if watts is None else energy.stated(watts, [p.precision for p in found]),
        parameters=parameters,
        kernels_tried=workspaces is not None and not workspaces.refused,
    )


def _chunked_head(
    workload: Workload,
    stages: Sequence[Stage],
    tracer: MemoryTracer,
    precision: Precision,
    sizes: Sequence[int],
    optimizer: str,
    target: Target,
    chunks: int,
) -> ChunkedHead:
    """The last stage with the loss in chunks."""
    with in_chunks(workload.model, chunks):
        counters = {size: OperationCounter() for size in traced_sizes(sizes)}
        memory = tracer.last_stage(precision, traced_sizes(sizes), counters)
        at_one = None
        if sizes[0] == 1:
            counters[1] = OperationCounter()
            at_one = tracer.last_stage(precision, (1, 1), counters)
        costs = [counter.costs(size, len(stages)) for size, counter in counters.items()]
        times = _times(workload, stages, optimizer, precision, sizes, target, costs)
    return ChunkedHead(
        chunks=chunks, memory=memory, memory_at_one=at_one, wall=tuple(step.stages[-1] for step in times),
        process_cpu=None,
    )  # fmt: skip


def stage_records(stages: Sequence[Stage]) -> tuple[StageRecord, ...]:
    """What a profile keeps of the stages."""
    return tuple(
        StageRecord(name=s.name, entry=s.entry, recomputable=ok, parameter_count=s.parameter_count)
        for s, ok in zip(stages, recomputable_stages(stages), strict=True)
    )


def traced_sizes(sizes: Sequence[int]) -> tuple[int, int]:
    """The micro-batch sizes that memory is traced at: the ends of the profiled range.

    Micro-batch 1 is traced apart (kernels skip copies of a dimension of one, which is off the line of the others).
    """
    return (max(2, sizes[0]), max(2, sizes[-1]))


def _times(
    workload: Workload,
    stages: Sequence[Stage],
    optimizer: str,
    precision: Precision,
    sizes: Sequence[int],
    target: Target,
    counted: Sequence[StepCosts],
) -> tuple[StepTime, ...]:
    """Times at every size: operations lie on a line between those counted at the ends, else are counted at each.

    Those of one sample, which take other paths, are no end of the line.
    """
    known = {costs.micro_batch_size: costs for costs in counted}
    low, high = (known[size] for size in traced_sizes(sizes))
    times = []
    for size in sizes:
        costs = known.get(size) or between(low, high, size)
        if costs is None:
            costs = step_costs(workload, stages, optimizer, precision, size, target.absent)
        times.append(step_time(costs, target.rates, target.efficiency))
    return tuple(times)


SMALL_MODEL_BYTES = 2**30
"""A model with larger parameters is meant for another machine, and its operations take too long on this one."""

TRYING_BYTES = 2**28

PRODUCT_SIZES = (256, 512, 1024, 2048)
"""Rows and columns of the matrices that a CPU's rate is measured with; the larger, the less it costs to start."""

LONGEST_SECONDS = 1.0
"""A larger product that would take longer than this is not tried: that precision has no units here."""

COPIED_BYTES = 2**26
"""Beyond the caches of most CPUs, and little beside the process itself."""

REPEATS = 3
"""The best of these counts: whatever else runs on the machine only makes it slower."""


Clock = Callable[[], float]


def cpu_rates(precisions: Sequence[Precision], clock: Clock = time.perf_counter) -> Rates:
    """What this machine's CPU does at best: products of matrices at each precision, and a copy of memory.

    Beside other work the process's own clock is steadier than the wall's; rates are then per second of all threads.
    """
    flops = {p: _product_rate(DTYPES[p], clock) for p in precisions}
    source = torch.ones(COPIED_BYTES // 4)
    copy = torch.empty_like(source)
    return Rates(
        flops_per_second=flops,
        memory_bytes_per_second=2 * COPIED_BYTES / _best_seconds(lambda: copy.copy_(source), clock),
    )


def _product_rate(dtype: torch.dtype, clock: Clock) -> float:
    rate = 0.0
    for size in PRODUCT_SIZES:
        flops = 2 * size**3
        if rate and flops / rate > LONGEST_SECONDS:
            break
        rate = max(rate, flops / _best_seconds(_product(torch.ones(size, size, dtype=dtype)), clock))
    return rate


def _product(matrix: torch.Tensor) -> Callable[[], object]:
    return lambda: matrix @ matrix


def _best_seconds(work: Callable[[], object], clock: Clock) -> float:
    work()
    taken = []
    for _ in range(REPEATS):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)


DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

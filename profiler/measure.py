"""``profiler.profile``: one workload on one device, measured.

Fake steps give the chain and the memory curves, real ones the times and one peak to check the curves:

    chain of stages ─▶ per precision: memory curves ─▶ per micro-batch size: times ─▶ one real step's peak
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch.utils._pytree import tree_leaves

from profiler import device as devices
from profiler.chain import discover, recomputable_stages
from profiler.live import CUDA_BLOCK_BYTES, LiveStorages
from profiler.memory import MemoryTracer
from profiler.profile_record import (
    PRECISIONS,
    HopelessPrecision,
    MemoryCheck,
    Precision,
    PrecisionProfile,
    Profile,
    ProfileCost,
    StageRecord,
)
from profiler.timing import (
    MICRO_BATCHES_PER_STEP,
    HopelessPrecisionError,
    Timing,
    check_worthwhile,
    measure_times,
    on_device,
    stepper_for,
)
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec

Progress = Callable[[str], None]

FAKE_BATCH_SIZES = (2, 4)
"""Micro-batch sizes of the fake steps. Not 1: kernels skip copies of a dimension of one, off the line."""


def profile(
    workload: Workload,
    batch_sizes: Sequence[int] = (1, 2, 4),
    precisions: Sequence[Precision] = ("fp32", "bf16"),
    device: str = "auto",
    *,
    optimizer: str = "adamw",
    steps: int = 4,
    spec: WorkloadSpec | None = None,
    progress: Progress = lambda message: None,
) -> Profile:
    """Measure a workload: memory curves and times per stage, at every precision and micro-batch size.

    ``steps`` optimizer steps are timed per combination after one that warms up. fp32 is always measured: it
    is what other precisions are compared with. Raises ValueError for bad arguments and for a workload that
    cannot be profiled; the model is left as it was.
    """
    sizes = _checked_sizes(batch_sizes)
    wanted = _checked_precisions(precisions)
    target = devices.resolve(device)
    began = time.perf_counter()
    block_bytes = CUDA_BLOCK_BYTES if target.type == "cuda" else 1
    micro_batches = 0
    hopeless: list[HopelessPrecision] = []
    measured: list[PrecisionProfile] = []
    with on_device(workload, target) as placed:
        progress("finding the chain of stages")
        stages = discover(placed, batch_size=FAKE_BATCH_SIZES[0])
        tracer = MemoryTracer(placed, stages, optimizer, device_type=target.type, block_bytes=block_bytes)
        unseen = _unseen_bytes(placed, tracer, optimizer, sizes[0], target)
        for precision in wanted:
            progress(f"{precision}: tracing memory")
            if precision != "fp32":
                micro_batches += 4
                try:
                    check_worthwhile(placed, stages, precision, placed.batch(sizes[0]), target)
                except HopelessPrecisionError as error:
                    hopeless.append(HopelessPrecision(precision=precision, slowdown=error.slowdown))
                    progress(f"{precision}: {error.slowdown:.1f} times slower than fp32 here, left out")
                    continue
            memory = msgspec.structs.replace(tracer.memory(precision, FAKE_BATCH_SIZES), other_bytes=unseen)
            at_one = tracer.memory(precision, (1, 1)) if sizes[0] == 1 else None
            timings: list[Timing] = []
            for size in sizes:
                progress(f"{precision}: timing micro-batch {size}")
                timings.append(
                    measure_times(
                        placed,
                        stages,
                        optimizer=optimizer,
                        precision=precision,
                        micro_batch_size=size,
                        device=target,
                        steps=steps,
                    )
                )
                micro_batches += (steps + 1) * MICRO_BATCHES_PER_STEP
            cpu = [timing.process_cpu for timing in timings if timing.process_cpu is not None]
            measured.append(
                PrecisionProfile(
                    precision=precision,
                    memory=memory,
                    memory_at_one=at_one and msgspec.structs.replace(at_one, other_bytes=unseen),
                    wall=tuple(timing.wall for timing in timings),
                    process_cpu=tuple(cpu) if len(cpu) == len(timings) else None,
                )
            )
        progress("measuring one real step's peak memory")
        check = _check_memory(placed, tracer, optimizer, sizes, unseen, target)
        micro_batches += 2 * MICRO_BATCHES_PER_STEP
    allowed = recomputable_stages(stages)
    return Profile(
        model=workload.label,
        workload=spec,
        parameter_count=sum(parameter.numel() for parameter in workload.model.parameters()),
        optimizer=optimizer,
        device=devices.describe(target),
        versions=devices.versions(),
        micro_batch_sizes=sizes,
        stages=tuple(
            StageRecord(name=s.name, entry=s.entry, recomputable=ok, parameter_count=s.parameter_count)
            for s, ok in zip(stages, allowed, strict=True)
        ),
        precisions=tuple(measured),
        hopeless=tuple(hopeless),
        memory_check=check,
        cost=ProfileCost(seconds=time.perf_counter() - began, micro_batches_run=micro_batches),
    )


def _checked_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sorted(set(batch_sizes)))
    if not sizes or sizes[0] < 1:
        raise ValueError(
            f"--batch must be micro-batch sizes of at least 1, such as 1,2,4, got {tuple(batch_sizes)}."
        )
    return sizes


def _checked_precisions(precisions: Sequence[Precision]) -> tuple[Precision, ...]:
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown or not precisions:
        raise ValueError(
            f"--precision must be of {', '.join(PRECISIONS)}, got {', '.join(precisions) or 'none'}."
        )
    return tuple(p for p in PRECISIONS if p in precisions or p == "fp32")


def _unseen_bytes(
    workload: Workload, tracer: MemoryTracer, optimizer: str, micro_batch_size: int, device: torch.device
) -> int:
    """What the allocator holds for kernels' workspaces, which no fake step shows: measured on CUDA, none on a CPU."""
    if device.type != "cuda":
        return 0
    measured, _ = measure_peak(workload, optimizer, "fp32", micro_batch_size, device)
    return max(0, measured - tracer.plain_peak_bytes("fp32", micro_batch_size))


def _check_memory(
    workload: Workload,
    tracer: MemoryTracer,
    optimizer: str,
    sizes: Sequence[int],
    unseen_bytes: int,
    device: torch.device,
) -> MemoryCheck:
    """A real plain step in fp32 beside a fake one; on CUDA at the largest size, the smallest told the workspaces."""
    size = sizes[-1] if device.type == "cuda" else sizes[0]
    measured, reserved = measure_peak(workload, optimizer, "fp32", size, device)
    return MemoryCheck(
        precision="fp32",
        micro_batch_size=size,
        gradient_accumulation_steps=MICRO_BATCHES_PER_STEP,
        predicted_bytes=tracer.plain_peak_bytes("fp32", size) + unseen_bytes,
        measured_bytes=measured,
        measured_reserved_bytes=reserved,
    )


def measure_peak(
    workload: Workload, optimizer: str, precision: Precision, micro_batch_size: int, device: torch.device
) -> tuple[int, int | None]:
    """Peak of live tensor bytes over one steady optimizer step, and on CUDA what the allocator reserved."""
    stepper = stepper_for(workload, optimizer, precision, device)
    batches = [workload.batch(micro_batch_size) for _ in range(MICRO_BATCHES_PER_STEP)]
    if device.type == "cuda":
        stepper.step(batches, MICRO_BATCHES_PER_STEP)
        torch.cuda.reset_peak_memory_stats(device)
        stepper.step(batches, MICRO_BATCHES_PER_STEP)
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    with LiveStorages() as live:
        live.track(workload.model.parameters())
        live.track(workload.model.buffers())
        live.track(leaf for leaf in tree_leaves(batches) if isinstance(leaf, torch.Tensor))
        stepper.step(batches, MICRO_BATCHES_PER_STEP)
        live.peak_bytes = live.live_bytes
        stepper.step(batches, MICRO_BATCHES_PER_STEP)
    return live.peak_bytes, None

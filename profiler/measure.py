"""``profiler.profile``: one workload on one device, measured.

Fake steps give the chain and the memory curves, real ones the times and one peak to check the curves:

    chain of stages ─▶ per precision: memory curves ─▶ per micro-batch size: times ─▶ one real step's peak
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensor

from profiler import catalogue, energy, noise, one_speed
from profiler import device as devices
from profiler.allocator import measure_step
from profiler.chain import discover
from profiler.chunked import can_be_chunked, chunks_for, in_chunks
from profiler.communication import measure_link
from profiler.elsewhere import Elsewhere
from profiler.freed_memory import release_freed_memory
from profiler.live import CUDA_BLOCK_BYTES, storage_bytes
from profiler.memory import MemoryTracer
from profiler.parameters import parameter_records
from profiler.profile_record import (
    PRECISIONS,
    ChunkedHead,
    EnergyProfile,
    HopelessPrecision,
    MemoryCheck,
    Precision,
    PrecisionProfile,
    Profile,
    ProfileCost,
    StageTime,
    TooLarge,
)
from profiler.rehearsal import calling, rehearse
from profiler.step import Loss
from profiler.timing import (
    MICRO_BATCHES_PER_STEP,
    HopelessPrecisionError,
    Timing,
    check_worthwhile,
    measure_last_stage,
    measure_times,
    on_device,
    stepper_for,
)
from profiler.unmeasured import profile_unmeasured, stage_records, target_of, traced_sizes
from profiler.workload import Workload
from profiler.workload_spec import WorkloadError, WorkloadSpec
from profiler.workspaces import Workspaces

Progress = Callable[[str], None]

STEPS_ELSEWHERE = 2
"""Timed steps where what they save is copied away and back, which takes far longer than the step."""

DISCOVERY_BATCH_SIZE = 2
"""Micro-batch size of the fake step that finds the chain. Not 1: a dimension of one takes other paths."""

LEAVE_OUT = "Leave this precision out, as with --precision fp32, or have the loss computed in fp32."


def profile(
    workload: Workload,
    batch_sizes: Sequence[int] = (1, 2, 4),
    precisions: Sequence[Precision] = ("fp32", "bf16"),
    device: str = "auto",
    *,
    optimizer: str = "adamw",
    steps: int = 4,
    all_precisions: bool = False,
    watts: float | None = None,
    noise_steps: int = 0,
    fake: bool = False,
    world_size: int = 1,
    spec: WorkloadSpec | None = None,
    progress: Progress = lambda message: None,
) -> Profile:
    """Measure a workload: memory curves and times per stage, at every precision and micro-batch size.

    ``steps`` optimizer steps are timed per combination after one that warms up. fp32 is always measured: it
    is what other precisions are compared with; those that turn out hopeless are left out unless ``all_precisions``.
    ``watts``: what the device draws, where no counter tells or against the one that does. ``noise_steps``: steps
    to probe the gradient noise scale with, 0 for not at all. ``world_size``: how many processes the link is measured
    between, 1 for not at all. Raises ValueError for bad arguments and for a workload
    that cannot be profiled; the model is left as it was. ``fake``, and a ``device`` of the catalogue: nothing is run.
    A micro-batch whose plain step is refused memory, and every larger one, is timed with what the step saves kept
    elsewhere (profiler/elsewhere.py). What is refused memory even so is left out (``Profile.too_large``), and it is a
    ValueError where that is the smallest.
    """
    sizes = _checked_sizes(batch_sizes)
    wanted = _checked_precisions(precisions)
    if watts is not None:
        energy.check_watts(watts)
    if noise_steps:
        noise.check_steps(noise_steps)
    if world_size < 1:
        raise ValueError(f"--world-size must be at least 1, got {world_size}.")
    if fake or catalogue.has(device):
        if world_size > 1:
            raise ValueError(
                f"The link between processes is measured by running {world_size} of them, and nothing is run for "
                f"{device} as asked. Leave --world-size out: planner optimize takes the catalogue's link, where it has "
                "the device."
            )
        if noise_steps:
            raise ValueError(
                f"The noise scale is measured by running steps, and nothing is run for {device} as asked. "
                "Leave --noise-scale out, or profile on the device."
            )
        return profile_unmeasured(
            workload, sizes, wanted, target_of(device, wanted, progress),
            optimizer=optimizer, watts=watts, spec=spec, progress=progress, all_precisions=all_precisions,
        )  # fmt: skip
    target = devices.resolve(device)
    began = time.perf_counter()
    other_work = devices.OtherWork()
    block_bytes = CUDA_BLOCK_BYTES if target.type == "cuda" else 1
    hopeless: list[HopelessPrecision] = []
    too_large: list[TooLarge] = []
    measured: list[PrecisionProfile] = []
    with on_device(workload, target) as given:
        counted = _CountedLoss(given.loss)
        placed = replace(given, loss=counted)
        progress("trying every call once")
        fits = _rehearsed(placed, sizes, target, progress)
        progress("finding the chain of stages")
        stages = discover(placed, batch_size=DISCOVERY_BATCH_SIZE)
        parameters = parameter_records(placed, stages, DISCOVERY_BATCH_SIZE)
        workspaces = Workspaces(target)
        tracer = MemoryTracer(
            placed,
            stages,
            optimizer,
            device_type=target.type,
            block_bytes=block_bytes,
            workspaces=workspaces,
        )
        unseen = 0
        for precision in wanted:
            if precision != "fp32" and not all_precisions:
                try:
                    with calling(f"loss(model, batch({sizes[0]})) in {precision}", placed.model, LEAVE_OUT):
                        check_worthwhile(
                            placed, stages, precision, placed.batch(sizes[0]), target, saving=fits
                        )
                except HopelessPrecisionError as error:
                    hopeless.append(HopelessPrecision(precision=precision, slowdown=error.slowdown))
                    progress(f"{precision}: {error.slowdown:.1f} times slower than fp32 here, left out")
                    continue
            timings: list[Timing] = []
            elsewhere = False
            for size in sizes:
                measure = functools.partial(
                    measure_times, placed, stages, optimizer=optimizer, precision=precision,
                    micro_batch_size=size, device=target, workspaces=workspaces,
                )  # fmt: skip
                timing = None
                if not elsewhere:
                    progress(f"{precision}: timing micro-batch {size}")
                    timing = _unless_refused(functools.partial(measure, steps=steps), placed.model, target)
                if timing is None:
                    elsewhere = True
                    progress(f"{precision}: timing micro-batch {size}, what it saves kept elsewhere")
                    away = functools.partial(measure, steps=min(steps, STEPS_ELSEWHERE), elsewhere=True)
                    timing = _unless_refused(away, placed.model, target)
                if timing is None and precision == "fp32" and not timings:
                    raise _nothing_fits(target, size)
                if timing is None:
                    too_large.append(TooLarge(precision=precision, micro_batch_size=size))
                    progress(
                        f"{precision}: micro-batch {size} was refused memory, left out like all larger ones"
                    )
                    break
                timings.append(timing)
            if not timings:
                continue
            chunked: list[tuple[StageTime, StageTime | None]] = []
            chunks = chunks_for(placed.batch(sizes[-1])) if can_be_chunked(placed.model) else None
            if chunks is not None:
                with in_chunks(placed.model, chunks):
                    for size, timing in zip(sizes[: len(timings)], timings, strict=True):
                        progress(f"{precision}: timing micro-batch {size} with the loss in {chunks} chunks")
                        last = measure_last_stage(
                            placed, stages, timing, optimizer=optimizer, precision=precision,
                            micro_batch_size=size, device=target, workspaces=workspaces,
                        )  # fmt: skip
                        chunked.append(last)
            progress(f"{precision}: tracing memory")
            if precision == "fp32":
                unseen = _unseen_bytes(placed, tracer, optimizer, sizes[0], target, plain=fits)
            memory = msgspec.structs.replace(
                tracer.memory(precision, traced_sizes(sizes)), other_bytes=unseen
            )
            at_one = tracer.memory(precision, (1, 1)) if sizes[0] == 1 else None
            cpu = [timing.process_cpu for timing in timings if timing.process_cpu is not None]
            measured.append(
                PrecisionProfile(
                    precision=precision,
                    memory=memory,
                    memory_at_one=at_one and msgspec.structs.replace(at_one, other_bytes=unseen),
                    wall=tuple(timing.wall for timing in timings),
                    process_cpu=tuple(cpu) if len(cpu) == len(timings) else None,
                    chunked_head=None
                    if chunks is None
                    else _chunked_head(placed, tracer, precision, sizes, chunks, chunked),
                )
            )
        timed = [(each.precision, size) for each in measured for size in each.micro_batch_sizes]
        if len(timed) > 1:
            progress("comparing what was timed at one speed of the device")
            yardsticks = one_speed.in_turns(placed, timed, optimizer, target)
            measured = [one_speed.at_one_speed(each, yardsticks) for each in measured]
        check = None
        if measured[0].plain_sizes:
            progress("measuring one real step's peak memory")
            check = _check_memory(placed, optimizer, measured[0].plain_sizes, target)
        others = other_work.share() if target.type == "cpu" else None
        drawn = _energy(placed, measured, optimizer, target, watts, progress)
        noise_scale = None
        if noise_steps:
            progress(f"probing gradients: {noise_steps} steps of {noise.MICRO_BATCHES} micro-batches")
            with contextlib.nullcontext() if fits else Elsewhere(placed.model, target).holding():
                noise_scale = noise.measure(placed, micro_batch_size=sizes[0], steps=noise_steps)
    link = None
    if world_size > 1:
        progress(f"measuring all-reduces between {world_size} processes")
        link = measure_link(world_size, "cuda" if target.type == "cuda" else "cpu")
    return Profile(
        model=workload.label,
        workload=spec,
        parameter_count=sum(parameter.numel() for parameter in workload.model.parameters()),
        optimizer=optimizer,
        device=devices.describe(target),
        versions=devices.versions(),
        micro_batch_sizes=max((each.micro_batch_sizes for each in measured), key=len),
        stages=stage_records(stages),
        precisions=tuple(measured),
        hopeless=tuple(hopeless),
        memory_check=check,
        cost=ProfileCost(
            seconds=time.perf_counter() - began, micro_batches_run=counted.calls, other_work_share=others
        ),
        energy=drawn,
        noise_scale=noise_scale,
        parameters=parameters,
        link=link,
        too_large=tuple(too_large),
    )


def _nothing_fits(device: torch.device, smallest: int) -> ValueError:
    return ValueError(
        f"--batch must begin with a micro-batch that fits on the {device.type} device, and {smallest} was refused "
        "memory, although all that a step saves was kept elsewhere: weights, gradients, optimizer and one operation "
        "at a time are too much, so no plan can train with it. Take a smaller one or shorter samples, free memory "
        "there, or run nothing (--fake), as for several processes that share what one cannot hold."
    )


def _rehearsed(workload: Workload, sizes: Sequence[int], device: torch.device, progress: Progress) -> bool:
    """Try every call once; whether the passes of the smallest micro-batch fit with what they save.

    Raises WorkloadError for a call that fails, ValueError where the smallest micro-batch does not fit either way.
    """
    others = (*sizes[1:], DISCOVERY_BATCH_SIZE)
    try:
        rehearse(workload, sizes[0], others)
    except WorkloadError as error:
        if not devices.is_out_of_memory(error):
            raise
    else:
        return True
    _let_go(workload.model, device)
    progress("trying every call once, what is saved kept elsewhere")
    try:
        with Elsewhere(workload.model, device).holding():
            rehearse(workload, sizes[0], others)
    except WorkloadError as error:
        if not devices.is_out_of_memory(error):
            raise
        raise _nothing_fits(device, sizes[0]) from error
    return False


def _unless_refused(
    measure: Callable[[], Timing], model: torch.nn.Module, device: torch.device
) -> Timing | None:
    """What is measured, or None where it is refused memory; nothing of the failed step stays."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
    # Out of the handler, which holds the frames of the step and with them its tensors.
    _let_go(model, device)
    return None


def _let_go(model: torch.nn.Module, device: torch.device) -> None:
    """Of all that is left of a step that was refused memory."""
    gc.collect()
    model.zero_grad(set_to_none=True)
    release_freed_memory(device)


def _chunked_head(
    workload: Workload,
    tracer: MemoryTracer,
    precision: Precision,
    sizes: Sequence[int],
    chunks: int,
    times: Sequence[tuple[StageTime, StageTime | None]],
) -> ChunkedHead:
    """The last stage with the loss in chunks, which took ``times`` on the wall and on the process's clock."""
    with in_chunks(workload.model, chunks):
        memory = tracer.last_stage(precision, traced_sizes(sizes))
        at_one = tracer.last_stage(precision, (1, 1)) if sizes[0] == 1 else None
    cpu = [of_cpu for _, of_cpu in times if of_cpu is not None]
    return ChunkedHead(
        chunks=chunks,
        memory=memory,
        memory_at_one=at_one,
        wall=tuple(wall for wall, _ in times),
        process_cpu=tuple(cpu) if len(cpu) == len(times) else None,
    )


class _CountedLoss:
    """A workload's loss, and how often it ran for real: fake steps cost no micro-batch."""

    def __init__(self, loss: Loss) -> None:
        self.calls = 0
        self._loss = loss

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if not isinstance(next(model.parameters()), FakeTensor):
            self.calls += 1
        return self._loss(model, batch)


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


def _energy(
    workload: Workload,
    measured: Sequence[PrecisionProfile],
    optimizer: str,
    device: torch.device,
    watts: float | None,
    progress: Progress,
) -> EnergyProfile | None:
    """What the device draws: as stated, else as a counter tells, else unknown. A counter needs plain steps to watch."""
    precisions = [each.precision for each in measured]
    counter = energy.find_counter(device)
    if watts is not None:
        instead = "" if counter is None else f", and not as the {counter.source} counter here tells"
        progress(f"energy: {watts:g} W in every phase, as stated{instead}")
        return energy.stated(watts, precisions)
    if counter is None:
        return None
    if not all(each.plain_sizes for each in measured):
        progress("energy: unknown, since no plain step fits whose watts could be measured")
        return None
    progress(f"measuring watts of every phase ({counter.source})")
    return energy.measure(
        workload,
        counter,
        precisions=precisions,
        optimizer=optimizer,
        micro_batch_size=min(each.plain_sizes[-1] for each in measured),
        device=device,
        window_seconds=energy.WINDOW_SECONDS,
    )


def _unseen_bytes(
    workload: Workload,
    tracer: MemoryTracer,
    optimizer: str,
    micro_batch_size: int,
    device: torch.device,
    *,
    plain: bool,
) -> int:
    """What the allocator holds for kernels' workspaces, which no fake step shows: measured on CUDA, none on a CPU.

    Where no plain step fits, it is all that is left on the device beside the model once steps have run.
    """
    if device.type != "cuda":
        return 0
    if not plain:
        _let_go(workload.model, device)
        own = dict.fromkeys(
            tensor.untyped_storage() for tensor in (*workload.model.parameters(), *workload.model.buffers())
        )
        return max(
            0,
            torch.cuda.memory_allocated(device) - sum(storage_bytes(each, CUDA_BLOCK_BYTES) for each in own),
        )
    measured, _ = measure_peak(workload, optimizer, "fp32", micro_batch_size, device)
    return max(0, measured - tracer.plain_peak_bytes("fp32", micro_batch_size))


def _check_memory(
    workload: Workload, optimizer: str, sizes: Sequence[int], device: torch.device
) -> MemoryCheck:
    """A real plain step in fp32 at a size in the middle of the profiled range, where curves are interpolated."""
    size = sizes[len(sizes) // 2]
    measured, reserved = measure_peak(workload, optimizer, "fp32", size, device)
    return MemoryCheck(
        precision="fp32",
        micro_batch_size=size,
        gradient_accumulation_steps=MICRO_BATCHES_PER_STEP,
        measured_bytes=measured,
        measured_reserved_bytes=reserved,
    )


def measure_peak(
    workload: Workload, optimizer: str, precision: Precision, micro_batch_size: int, device: torch.device
) -> tuple[int, int | None]:
    """The allocator's peak over one steady optimizer step, and on CUDA what it reserved."""
    stepper = stepper_for(workload, optimizer, precision, device)
    batches = [workload.worst_batch(micro_batch_size) for _ in range(MICRO_BATCHES_PER_STEP)]
    stepper.step(batches, MICRO_BATCHES_PER_STEP)
    peak = measure_step(
        lambda: stepper.step(batches, MICRO_BATCHES_PER_STEP),
        workload.model,
        stepper.optimizer,
        batches,
        device,
    )
    return peak.peak_bytes, peak.reserved_bytes

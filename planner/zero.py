"""Data parallelism in the stages of ZeRO: what one of N processes holds.

Every process has the whole model's work for its own micro-batches. What need not be held N times is dealt out (ZeRO,
Rajbhandari et al. 2020), one thing more with each stage:

    stage   parameters   gradients   optimizer states   7.5 B parameters, 64 devices, 2 + 2 + 12 bytes each
    0       all          all         all                120 GB
    1       all          all         1/N                 31.4 GB
    2       all          1/N         1/N                 16.6 GB
    3       1/N          1/N         1/N                  1.9 GB

``model_state_bytes`` is that table. A real process holds more, and ``sharded`` follows DeepSpeed (0.19) in it:

* stages 1 to 3 update a copy of their share of the parameters, so that share is there twice;
* gradients wait in a bucket until it is full, and are put one after the other into a fresh buffer to be summed;
* stage 1 and 2 keep the *whole* gradient of a parameter of which a part is theirs, and both hold gradients and their
  flat copy when the update begins; stage 3 keeps its gradients' buffer all the time;
* the norm for clipping is taken in fp64: twice the largest gradient's size, one gradient at a time;
* stage 3 gathers the large parameters of a module for its forward and again for its backward; small ones it never
  gives away;
* gloo, which sums on CPUs, gathers into a buffer of its own.

A process's share is a stretch of all parameters in the model's order, so processes differ: gradients arrive from the
last parameter to the first. Without a ``rank``, ``sharded`` describes the process that needs most in every window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from profiler.profile_record import (
    AffineBytes,
    Curve,
    ParameterRecord,
    Precision,
    PrecisionMemory,
    StageMemory,
)

ZERO_STAGES = (0, 1, 2, 3)

SEVERAL_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""What several processes run in: weights, gradients and all that is dealt out in fp32, products under autocast.

Not fp16: DeepSpeed clips gradients before it takes their scale out of them.
"""

FP32_BYTES = 4
FP64_BYTES = 8

BUCKET_ELEMENTS = 25 * 2**20 // FP32_BYTES
"""Gradients are summed 25 MiB at a time, as PyTorch's own data parallelism does (``bucket_cap_mb``, Li et al. 2020)."""

PERSISTENCE_ELEMENTS = 100_000
"""Stage 3 leaves parameters up to this size everywhere: DeepSpeed's default, biases and norms of common models."""

PREFETCH_ELEMENTS = 0
REUSE_ELEMENTS = 0
"""Stage 3 gathers a module's parameters when it is entered and lets them go when it is left, nothing ahead of time.

DeepSpeed's defaults (5e7 and 1e9 elements) keep any model below a billion parameters whole, which saves no memory.
"""

ALIGNMENT_ELEMENTS = 2
"""A process's stretch of the flat buffer begins at a multiple of this (``nccl_start_alignment_factor``)."""

MAX_GRADIENT_NORM = 1.0

Collectives = Literal["gloo", "nccl"]


class _Shares(NamedTuple):
    """Between how many processes each kind of model state is dealt out."""

    parameters: int
    gradients: int
    optimizer: int


def check(zero_stage: int, world_size: int) -> None:
    """Raise ValueError for a stage or a number of processes that there is not."""
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage}.")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}.")


def _shares(zero_stage: int, world_size: int) -> _Shares:
    check(zero_stage, world_size)
    return _Shares(*(world_size if zero_stage >= first else 1 for first in (3, 2, 1)))


def model_state_bytes(
    parameter_count: int,
    zero_stage: int,
    world_size: int,
    *,
    parameter_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: int = 12,
) -> int:
    """Parameters, gradients and optimizer states of one process, by the paper; the defaults are mixed-precision Adam.

    12 bytes: a copy of the parameter, its momentum and its variance, all in fp32.
    """
    shares = _shares(zero_stage, world_size)
    return (
        parameter_bytes * math.ceil(parameter_count / shares.parameters)
        + gradient_bytes * math.ceil(parameter_count / shares.gradients)
        + optimizer_bytes * math.ceil(parameter_count / shares.optimizer)
    )


def sharded(
    memory: PrecisionMemory,
    parameters: Sequence[ParameterRecord],
    *,
    zero_stage: int,
    world_size: int,
    gradient_accumulation_steps: int,
    precision: Precision = "fp32",
    rank: int | None = None,
    collectives: Collectives = "gloo",
    bucket_elements: int = BUCKET_ELEMENTS,
) -> PrecisionMemory:
    """The memory of one of ``world_size`` DeepSpeed processes, from that of a process that trains alone.

    ``rank`` None: of the process that needs most. The result goes where any PrecisionMemory goes, for this
    ``gradient_accumulation_steps`` only. Raises ValueError for what DeepSpeed would run otherwise than it was profiled.
    """
    shares = _shares(zero_stage, world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}.")
    if world_size == 1:
        return memory
    if precision not in SEVERAL_PRECISIONS:
        raise ValueError(
            f"precision must be fp32 or bf16 with several processes, got {precision}: DeepSpeed's own {precision} "
            "casts the whole model, another memory course than the profiled autocast. Use --precision fp32,bf16."
        )
    trainable = [p for p in parameters if p.trainable]
    if not trainable:
        raise ValueError(
            "The profile must hold the model's parameters to deal them out, and it holds none. Profile again."
        )
    settings = _Settings(
        shares, world_size, gradient_accumulation_steps, collectives == "gloo", bucket_elements
    )
    match zero_stage:
        case 0:
            return _whole(memory, trainable, settings)
        case 1 | 2:
            ranks = range(world_size) if rank is None else (rank,)
            owners = {_Partition.of(trainable, world_size, r) for r in ranks}
            return _worst([_flat(memory, trainable, settings, own) for own in owners])
        case _:
            return _scattered(memory, parameters, settings)


@dataclass(frozen=True, slots=True)
class _Settings:
    shares: _Shares
    world_size: int
    gradient_accumulation_steps: int
    copies_gathered: bool
    bucket_elements: int


@dataclass(frozen=True, slots=True)
class _Partition:
    """The stretch of the flat buffer that is one process's: its size, and how much of each parameter lies in it."""

    elements: int
    total: int
    overlaps: tuple[int, ...]

    @classmethod
    def of(cls, parameters: Sequence[ParameterRecord], world_size: int, rank: int) -> _Partition:
        alignment = ALIGNMENT_ELEMENTS * world_size
        total = math.ceil(sum(p.count for p in parameters) / alignment) * alignment
        size = total // world_size
        first, last = rank * size, (rank + 1) * size
        overlaps, at = [], 0
        for parameter in parameters:
            overlaps.append(max(0, min(last, at + parameter.count) - max(first, at)))
            at += parameter.count
        return cls(size, total, tuple(overlaps))

    def owned(self, parameters: Sequence[ParameterRecord]) -> int:
        """Bytes of the whole gradients of which a part is this process's."""
        return FP32_BYTES * sum(
            p.count for p, overlap in zip(parameters, self.overlaps, strict=True) if overlap
        )


@dataclass(slots=True)
class _Bucket:
    """Gradients that wait to be summed, in elements; told of each that arrives, it says what a flush needs."""

    limit: int
    waiting: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def elements(self) -> int:
        return sum(count for count, _ in self.waiting)

    @property
    def flush_elements(self) -> int:
        """The fresh buffer that a flush fills; a gradient on its own is summed where it is."""
        return self.elements if len(self.waiting) > 1 else 0

    def flush(self) -> int:
        """Empty it; what stays of it, because it is this process's."""
        kept = sum(count for count, owned in self.waiting if owned)
        self.waiting.clear()
        return kept


@dataclass(frozen=True, slots=True)
class _Arrivals:
    """What gradients do to memory while the backward pass sheds them, in bytes.

    ``standing[i]``: gradients alive when the backward of stage i begins. ``kept[i]``: of these, those that stay until
    the update. ``rise[i]``: how far memory in stage i is above its course in a process alone with none of the later
    stages' gradients.
    """

    standing: list[int]
    kept: list[int]
    rise: list[int]
    kept_at_end: int
    flush_at_end: int


def _arrivals(
    memory: PrecisionMemory,
    parameters: Sequence[ParameterRecord],
    owned: Sequence[bool],
    settings: _Settings,
    *,
    extra_per_flush: int = 0,
) -> _Arrivals:
    """Follow the gradients of one micro-batch into the bucket and out of it.

    ``extra_per_flush``: further buffers of the flushed size that the sum takes. A gradient arrives when the first
    stage that uses its parameter has run backward; the curves may count one of several uses before, and that part of
    it waits for the rest. When it arrives, the gradients of the single uses are gone, which the curves' peak still has.
    """
    length = len(memory.stages)
    arriving: list[list[tuple[ParameterRecord, bool]]] = [[] for _ in range(length)]
    for parameter, is_owned in reversed(list(zip(parameters, owned, strict=True))):
        arriving[min(parameter.stages, default=0)].append((parameter, is_owned))
    bucket = _Bucket(settings.bucket_elements)
    standing, kept, rise = [0] * length, [0] * length, [0] * length
    retained = counted = arrived = 0

    def flush_elements(waiting: _Bucket) -> int:
        return waiting.flush_elements + extra_per_flush * waiting.elements

    for stage in reversed(range(length)):
        early = max(0, counted - FP32_BYTES * arrived)
        standing[stage] = FP32_BYTES * (retained + bucket.elements) + early
        kept[stage] = FP32_BYTES * retained
        level = retained + bucket.elements
        own = 0
        for parameter, is_owned in arriving[stage]:
            count = parameter.count
            own += count
            if bucket.elements + count > bucket.limit:
                gone = count * (len(parameter.stages) - 1)
                at_flush = retained + bucket.elements + count + flush_elements(bucket)
                level = max(level, at_flush - own - gone)
                retained += bucket.flush()
            bucket.waiting.append((count, is_owned))
        rise[stage] = FP32_BYTES * level + early
        arrived += own
        counted += round(memory.stages[stage].gradient[0])
    at_end = retained + bucket.elements + flush_elements(bucket)
    return _Arrivals(standing, kept, rise, FP32_BYTES * (retained + bucket.flush()), FP32_BYTES * at_end)


def _later_gradients(memory: PrecisionMemory) -> list[int]:
    """Per stage, the gradients of later stages that its backward's curve counts."""
    sizes = [round(stage.gradient[0]) for stage in memory.stages]
    return [sum(sizes[i + 1 :]) for i in range(len(sizes))]


def _raised(curve: Curve, by: float) -> Curve:
    return tuple((fixed + by, per_sample) for fixed, per_sample in curve)


def _flushes_in_order(parameters: Iterable[ParameterRecord], limit: int, *, after: bool) -> int:
    """The largest buffer, in bytes, when all gradients are summed one bucket after the other.

    ``after``: a bucket is flushed once it holds more than the limit, rather than before it would.
    """
    bucket, largest = _Bucket(limit), 0
    for parameter in parameters:
        if not after and bucket.elements + parameter.count > limit:
            largest = max(largest, bucket.flush_elements)
            bucket.flush()
        bucket.waiting.append((parameter.count, False))
        if after and bucket.elements > limit:
            largest = max(largest, bucket.flush_elements)
            bucket.flush()
    return FP32_BYTES * max(largest, bucket.flush_elements)


def _all_gradients(memory: PrecisionMemory) -> int:
    return sum(round(stage.gradient[0]) for stage in memory.stages)


def _whole(
    memory: PrecisionMemory, parameters: Sequence[ParameterRecord], settings: _Settings
) -> PrecisionMemory:
    """Stage 0: everything is everywhere; the gradients are summed when all are there."""
    flush = _flushes_in_order(parameters, settings.bucket_elements, after=True)
    return msgspec.structs.replace(
        memory, optimizer=(*memory.optimizer, (float(_all_gradients(memory) + flush), 0.0))
    )


def _update(memory: PrecisionMemory, gradient_bytes: int, share: float) -> Iterator[AffineBytes]:
    """The optimizer's own course over a share of the parameters whose gradients are in one flat buffer."""
    everything = _all_gradients(memory)
    for fixed, per_sample in memory.optimizer:
        yield gradient_bytes + max(0.0, fixed - everything) * share, per_sample


def _flat(
    memory: PrecisionMemory, parameters: Sequence[ParameterRecord], settings: _Settings, own: _Partition
) -> PrecisionMemory:
    """Stages 1 and 2: all parameters are one flat buffer, of which a stretch is this process's to update."""
    count = sum(p.count for p in parameters)
    padding = FP32_BYTES * (own.total - count)
    share = own.elements / count
    flat_bytes = FP32_BYTES * own.elements
    owned_bytes = own.owned(parameters)
    update = [
        (float(owned_bytes + FP64_BYTES * max(own.overlaps)), 0.0),
        (float(owned_bytes + flat_bytes), 0.0),
        *_update(memory, flat_bytes, share),
    ]
    if settings.copies_gathered:
        update.append((float(FP32_BYTES * own.total), 0.0))
    if settings.shares.gradients == 1:
        flush = _flushes_in_order(parameters, settings.bucket_elements, after=False)
        stages = memory.stages
        update.append((float(_all_gradients(memory) + flush), 0.0))
    else:
        arrivals = _arrivals(memory, parameters, [bool(part) for part in own.overlaps], settings)
        again = settings.gradient_accumulation_steps > 1
        stages = _shedding(memory, arrivals, again=again)
        update.append((float(arrivals.flush_at_end + again * owned_bytes), 0.0))
    return msgspec.structs.replace(
        memory,
        parameter_bytes=memory.parameter_bytes + padding,
        optimizer_state_bytes=math.ceil(memory.optimizer_state_bytes * share),
        other_bytes=memory.other_bytes + flat_bytes,
        stages=stages,
        optimizer=tuple(update),
    )


def _shedding(memory: PrecisionMemory, arrivals: _Arrivals, *, again: bool) -> tuple[StageMemory, ...]:
    """Stages whose backward sheds gradients that are not this process's.

    ``again``: there are further micro-batches, in which what was kept of the earlier ones stands beside the new
    gradients. They are made anew each time, so a later backward has the first one's course.
    """
    later = _later_gradients(memory)
    stages = []
    for i, stage in enumerate(memory.stages):
        kept_before = arrivals.kept[i]
        kept_after = arrivals.kept[i - 1] if i else arrivals.kept_at_end
        course = _raised(stage.backward_first, arrivals.rise[i] - later[i])
        waiting = arrivals.standing[i] - (0 if again else kept_before)
        stages.append(
            msgspec.structs.replace(
                stage,
                carry=(stage.carry[0] + max(0, waiting), stage.carry[1]),
                gradient=(float(kept_after - kept_before), 0.0),
                backward_first=course,
                backward_later=_raised(course, arrivals.kept_at_end),
            )
        )
    return tuple(stages)


def _worst(memories: Sequence[PrecisionMemory]) -> PrecisionMemory:
    """Window by window the process that needs most: never below the highest peak of all processes, and equal to it
    where nothing is recomputed.

    Constants are equal among processes. Gradients are not: those of the process that keeps them earliest.
    """
    first = memories[0]
    if len(memories) == 1:
        return first
    kept = [[round(stage.gradient[0]) for stage in memory.stages] for memory in memories]
    length = len(first.stages)
    later = [max(sum(row[i:]) for row in kept) for i in range(length)]

    def merged(curves: Iterable[Curve]) -> Curve:
        return tuple({point for curve in curves for point in curve})

    stages = []
    for i, column in enumerate(zip(*(memory.stages for memory in memories), strict=True)):
        after = later[i + 1] if i + 1 < length else 0
        stages.append(
            msgspec.structs.replace(
                column[0],
                carry=max(stage.carry for stage in column),
                gradient=(float(later[i] - after), 0.0),
                backward_first=merged(stage.backward_first for stage in column),
                backward_later=merged(stage.backward_later for stage in column),
            )
        )
    return msgspec.structs.replace(
        first, stages=tuple(stages), optimizer=merged(memory.optimizer for memory in memories)
    )


def _scattered(
    memory: PrecisionMemory, parameters: Sequence[ParameterRecord], settings: _Settings
) -> PrecisionMemory:
    """Stage 3: a part of every parameter is this process's; modules gather theirs for as long as they run."""
    world_size = settings.world_size
    trainable = [p for p in parameters if p.trainable]
    part = sum(math.ceil(p.count / world_size) for p in trainable)
    frozen_part = sum(math.ceil(p.count / world_size) for p in parameters if not p.trainable)
    share = part / sum(p.count for p in trainable)
    persistent = sum(p.count for p in parameters if p.count <= PERSISTENCE_ELEMENTS)
    part_bytes = FP32_BYTES * part
    copies = 1 + settings.copies_gathered
    arrivals = _arrivals(
        memory, trainable, [False] * len(trainable), settings, extra_per_flush=int(settings.copies_gathered)
    )
    later = _later_gradients(memory)
    # A module whose input has no gradient is not told that its backward is over: it lets go after the last sum.
    first = FP32_BYTES * sum(p.count for p in parameters if 0 in p.stages and p.count > PERSISTENCE_ELEMENTS)
    stages = []
    for i, stage in enumerate(memory.stages):
        held, moving = _gathered(parameters, i, copies)
        below = _raised(
            stage.backward_first, arrivals.rise[i] - later[i] - _summed_in_place(memory, trainable, i)
        )
        entering = (stage.input[0] + moving, stage.input[1])
        back = (stage.carry[0] + arrivals.standing[i] + moving, stage.carry[1])
        course = (*_raised(below, held if i else first), back)
        stages.append(
            msgspec.structs.replace(
                stage,
                carry=(stage.carry[0] + arrivals.standing[i], stage.carry[1]),
                gradient=(0.0, 0.0),
                forward=(*_raised(stage.forward, held), entering),
                recompute=(*_raised(stage.recompute, held), entering),
                rebuild_first=(*_raised(stage.rebuild_first, held), entering),
                rebuild_single=(*_raised(stage.rebuild_single, held), entering),
                dropped=(*_raised(stage.dropped, held), entering),
                dropped_first=(*_raised(stage.dropped_first, held), entering),
                backward_first=course,
                backward_later=course,
            )
        )
    largest = max(math.ceil(p.count / world_size) for p in trainable)
    most = max(_gathered(parameters, i, copies)[1] for i in range(len(memory.stages)))
    update = [
        (float(arrivals.flush_at_end + first), 0.0),
        (float(FP64_BYTES * largest), 0.0),
        *_update(memory, part_bytes, share),
    ]
    return msgspec.structs.replace(
        memory,
        parameter_bytes=FP32_BYTES * (part + frozen_part + persistent),
        optimizer_state_bytes=math.ceil(memory.optimizer_state_bytes * share),
        other_bytes=memory.other_bytes + 2 * part_bytes,
        stages=tuple(stages),
        optimizer=tuple(update),
        evaluation=_raised(memory.evaluation, most),
    )


def _gathered(parameters: Sequence[ParameterRecord], stage: int, copies: int) -> tuple[int, int]:
    """``(held, moving)`` bytes of the module of a stage that gathers most: while it runs, while they arrive.

    Several parameters arrive in one buffer and are then copied out of it; a single one is used where it arrives.
    """
    modules: dict[str, list[int]] = {}
    for parameter in parameters:
        if stage in parameter.stages and parameter.count > PERSISTENCE_ELEMENTS:
            modules.setdefault(parameter.module, []).append(parameter.count)
    held = max((sum(counts) for counts in modules.values()), default=0)
    moving = max(
        (sum(counts) * (copies if len(counts) == 1 else 2) for counts in modules.values()), default=0
    )
    return FP32_BYTES * held, FP32_BYTES * moving


def _summed_in_place(memory: PrecisionMemory, parameters: Sequence[ParameterRecord], stage: int) -> int:
    """What stage 3 saves where a parameter's several uses are summed.

    A plain linear layer's gradient is a view, and autograd makes a third tensor to add to it. DeepSpeed puts its own
    linear function in place, whose gradient is no view. The curves say which it was: the sum counts as a gradient
    where it is made.
    """
    arriving = FP32_BYTES * sum(p.count for p in parameters if min(p.stages, default=0) == stage)
    shared = FP32_BYTES * sum(p.count for p in parameters if len(p.stages) > 1 and min(p.stages) == stage)
    return shared if round(memory.stages[stage].gradient[0]) >= arriving else 0

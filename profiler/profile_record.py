"""What a profile records, and nothing that needs torch.

Memory is kept as *curves*: the live bytes after every allocation inside a window of the step (the forward of
a stage, its backward, the optimizer step). Each point is affine in the micro-batch size b, ``fixed +
per_sample * b``, which is exact wherever the sequence of operations does not depend on b; the peak of a
window is the maximum of its points, and only points that are the maximum for some b >= 1 are kept. Curves
leave out what *earlier* stages hold, so a plan's peak is composed by adding that back (planner/memory.py).

Time is kept as measured, per precision and micro-batch size.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from profiler.records import Document, Record
from profiler.workload_spec import WorkloadSpec

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]

AffineBytes = tuple[float, float]
"""``(fixed, per_sample)``: fixed + per_sample * micro_batch_size bytes."""

Curve = tuple[AffineBytes, ...]
"""The points of a window that are its maximum for some micro-batch size."""


def bytes_at(affine: AffineBytes, micro_batch_size: int) -> int:
    """The value of an affine size, rounded to whole bytes."""
    fixed, per_sample = affine
    return round(fixed + per_sample * micro_batch_size)


def peak_at(curve: Curve, micro_batch_size: int) -> int:
    """The highest point of a curve."""
    return max(bytes_at(point, micro_batch_size) for point in curve)


class StageMemory(Record):
    """The memory of one stage; see planner/memory.py for how the pieces are composed.

    ``input``: its input tensor. ``hold``: what it keeps from its forward to its backward when not recomputed,
    its input included if it saves it. ``dropped_hold``: what stays alive even when its saved tensors are
    dropped. ``carry``: the gradient that arrives when its backward begins. ``gradient``: parameter gradients
    that its backward leaves behind. ``forward`` keeps saved tensors, ``recompute`` is the same up to the last
    saved tensor, ``dropped`` drops them, ``dropped_first`` drops them and keeps its input. ``rebuild_first`` and
    ``rebuild_single`` are ``forward`` and ``recompute`` without what local variables of the forward pass still
    hold of the stage before: a replay that begins here holds none of it. ``backward_first`` makes gradients,
    ``backward_later`` adds to them.
    """

    input: AffineBytes
    saves_input: bool
    hold: AffineBytes
    dropped_hold: AffineBytes
    carry: AffineBytes
    gradient: AffineBytes
    forward: Curve
    recompute: Curve
    rebuild_first: Curve
    rebuild_single: Curve
    dropped: Curve
    dropped_first: Curve
    backward_first: Curve
    backward_later: Curve


class PrecisionMemory(Record):
    """The memory of a step at one precision: what is always there, the optimizer's window, the stages."""

    parameter_bytes: int
    buffer_bytes: int
    optimizer_state_bytes: int
    other_bytes: int
    batch: AffineBytes
    optimizer: Curve
    stages: tuple[StageMemory, ...]


class StageTime(Record):
    """Seconds of one stage for one micro-batch. ``recompute``: its forward up to the last saved tensor."""

    forward_seconds: Seconds
    recompute_seconds: Seconds
    backward_first_seconds: Seconds
    backward_later_seconds: Seconds


class StepTime(Record):
    """A step as measured: stages in order, and what is not in any stage.

    ``update_seconds``: clipping, optimizer, gradients to None. ``host_seconds``: per micro-batch, between the
    windows. ``spread``: relative half-width of the middle half of the measured step times, the noise of this
    measurement.
    """

    micro_batch_size: Positive
    stages: tuple[StageTime, ...]
    update_seconds: Seconds
    host_seconds: Seconds
    step_seconds: Seconds
    steps_timed: Positive
    spread: Annotated[float, Meta(ge=0)]


class PrecisionProfile(Record):
    """One precision: its memory, its times on the wall clock and, on a CPU, on the process's own clock.

    ``memory_at_one`` is traced apart: with one sample some tensors are views that are copies with two.
    """

    precision: Precision
    memory: PrecisionMemory
    memory_at_one: PrecisionMemory | None
    wall: tuple[StepTime, ...]
    process_cpu: tuple[StepTime, ...] | None

    def memory_at(self, micro_batch_size: int) -> PrecisionMemory:
        """The curves that hold at a micro-batch size. Raises ValueError for 1 when it was not profiled."""
        if micro_batch_size > 1:
            return self.memory
        if self.memory_at_one is None:
            raise ValueError(
                "Micro-batch size 1 was not profiled. Profile again with --batch 1,2 or the like."
            )
        return self.memory_at_one


class HopelessPrecision(Record):
    """A precision that a short window showed to be slower than fp32 by ``slowdown``, so was not timed."""

    precision: Precision
    slowdown: Annotated[float, Meta(gt=0)]


class StageRecord(Record):
    """A stage of the chain; ``entry`` is the module call it begins at (empty: the forward pass's start)."""

    name: str
    entry: str
    recomputable: bool
    parameter_count: int


class DeviceRecord(Record):
    """The device that was measured: what a plan's time is true for."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: Positive
    threads: Positive | None = None


class MemoryCheck(Record):
    """One real plain step on the device, beside what the curves say of it. ``reserved`` only on CUDA."""

    precision: Precision
    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    predicted_bytes: Positive
    measured_bytes: Positive
    measured_reserved_bytes: Positive | None = None


class ProfileCost(Record):
    """What the profile itself took: seconds in all, and micro-batches run on the device."""

    seconds: Seconds
    micro_batches_run: Positive


class Profile(Document, tag="profile"):
    """All that planning needs to know of a model on a device. ``workload`` None: made by the Python API."""

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    model: str
    workload: WorkloadSpec | None
    parameter_count: Positive
    optimizer: str
    device: DeviceRecord
    versions: dict[str, str]
    micro_batch_sizes: tuple[Positive, ...]
    stages: tuple[StageRecord, ...]
    precisions: tuple[PrecisionProfile, ...]
    hopeless: tuple[HopelessPrecision, ...]
    memory_check: MemoryCheck
    cost: ProfileCost

    def at(self, precision: Precision) -> PrecisionProfile | None:
        """The measurements at a precision, or None when it was not profiled."""
        return next((p for p in self.precisions if p.precision == precision), None)

"""What a profile records, and nothing that needs torch.

Memory is kept as *curves*: the live bytes after every allocation inside a window of the step (the forward of
a stage, its backward, the optimizer step). Each point is affine in the micro-batch size b, ``fixed +
per_sample * b``, which is exact wherever the sequence of operations does not depend on b; the peak of a
window is the maximum of its points, and only points that are the maximum for some b >= 1 are kept. Curves
leave out what *earlier* stages hold, so a plan's peak is composed by adding that back (planner/memory.py).

Time is kept as measured, per precision and micro-batch size.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from profiler.records import Document, Record
from profiler.workload_spec import WorkloadSpec

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

OPTIMIZERS = ("adamw", "adamw-foreach", "adamw-loop", "sgd", "adafactor")
"""What ``profiler.step.build_optimizer`` can build."""

TimeSource = Literal["measured", "roofline"]
"""Where times come from: steps that were timed, or rates and what operations compute and move."""

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


Keeping = Literal["selective", "selective_narrow"]
"""What a selective segment keeps: all products and attention, or those no larger than what they are made from."""

KEEPINGS: tuple[Keeping, ...] = get_args(Keeping)


class SelectiveMemory(Record):
    """The memory of one stage that keeps the outputs of its products and attention and runs the rest again.

    ``hold``: these outputs. ``forward``: they and its input are kept, its saved tensors dropped. ``rebuild``: its
    second run, with these outputs there from the beginning.
    """

    hold: AffineBytes
    forward: Curve
    rebuild: Curve


class StageMemory(Record):
    """The memory of one stage; see planner/memory.py for how the pieces are composed.

    ``input``: its input tensor. ``hold``: what it keeps from its forward to its backward when not recomputed,
    its input included if it saves it. ``dropped_hold``: what stays alive even when its saved tensors are
    dropped. ``carry``: the gradient that arrives when its backward begins. ``gradient``: parameter gradients
    that its backward leaves behind. ``forward`` keeps saved tensors, ``recompute`` is the same up to the last
    saved tensor, ``dropped`` drops them, ``dropped_first`` drops them and keeps its input. ``rebuild_first`` and
    ``rebuild_single`` are ``forward`` and ``recompute`` without what local variables of the forward pass still
    hold of the stage before: a replay that begins here holds none of it. ``backward_first`` makes gradients,
    ``backward_later`` adds to them. ``selective``: None where nothing would be kept, or could not be;
    ``selective_narrow``: also where it would be the same.
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
    selective: SelectiveMemory | None = None
    selective_narrow: SelectiveMemory | None = None

    def keeping(self, how: Keeping) -> SelectiveMemory | None:
        """The stage as a selective segment."""
        return self.selective if how == "selective" else self.selective_narrow


class PrecisionMemory(Record):
    """The memory of a step at one precision: what is always there, the optimizer's window, the stages.

    ``evaluation``: a forward pass and loss without gradients. ``segment_bytes``: what a recomputed segment keeps
    besides its input, the random state it began with.
    """

    parameter_bytes: int
    buffer_bytes: int
    optimizer_state_bytes: int
    other_bytes: int
    batch: AffineBytes
    optimizer: Curve
    stages: tuple[StageMemory, ...]
    evaluation: Curve = ((0.0, 0.0),)
    segment_bytes: int = 0


class StageTime(Record):
    """Seconds of one stage for one micro-batch. ``recompute``: its forward up to the last saved tensor.

    ``kept``: of that, what a selective segment would not run again, and ``kept_narrow`` what one that keeps narrow
    products only would not. None: not known.
    """

    forward_seconds: Seconds
    recompute_seconds: Seconds
    backward_first_seconds: Seconds
    backward_later_seconds: Seconds
    kept_seconds: Seconds | None = None
    kept_narrow_seconds: Seconds | None = None

    def keeping(self, how: Keeping) -> float | None:
        """The seconds that a selective segment would not run again."""
        return self.kept_seconds if how == "selective" else self.kept_narrow_seconds


class StepTime(Record):
    """A step as measured: stages in order, and what is not in any stage.

    ``update_seconds``: clipping, optimizer, gradients to None. ``host_seconds``: per micro-batch, between the
    windows. ``spread``: relative half-width of the middle half of the measured step times, the noise of this
    measurement. ``steps_timed`` 0: nothing was run, the times are a roofline's and ``spread`` is the error it states.
    ``yardstick_seconds``: how fast the device was meanwhile, see profiler/yardstick.py. ``kept_elsewhere``: the device
    refused memory for a plain step, so one ran with what it saves kept elsewhere (profiler/elsewhere.py).
    ``dispatch_seconds``: how long this host takes to lead one operation through a mode written in Python, the unit of
    what recomputing costs beside the operations; None where the device does not wait for its host, or nothing was run.
    """

    micro_batch_size: Positive
    stages: tuple[StageTime, ...]
    update_seconds: Seconds
    host_seconds: Seconds
    step_seconds: Seconds
    steps_timed: Annotated[int, Meta(ge=0)]
    spread: Annotated[float, Meta(ge=0)]
    yardstick_seconds: Annotated[float, Meta(gt=0)] | None = None
    kept_elsewhere: bool = False
    dispatch_seconds: Annotated[float, Meta(gt=0)] | None = None


class ChunkedHead(Record):
    """The last stage with the loss in ``chunks`` (profiler/chunked.py); its times in the order of the step's."""

    chunks: Annotated[int, Meta(ge=2)]
    memory: StageMemory
    memory_at_one: StageMemory | None
    wall: tuple[StageTime, ...]
    process_cpu: tuple[StageTime, ...] | None


class PrecisionProfile(Record):
    """One precision: its memory, its times on the wall clock and, on a CPU, on the process's own clock.

    ``memory_at_one`` is traced apart: with one sample some tensors are views that are copies with two.
    ``chunked_head`` None: the loss cannot run in chunks, or nobody looked.
    """

    precision: Precision
    memory: PrecisionMemory
    memory_at_one: PrecisionMemory | None
    wall: tuple[StepTime, ...]
    process_cpu: tuple[StepTime, ...] | None
    chunked_head: ChunkedHead | None = None

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Those that were timed, rising."""
        return tuple(step.micro_batch_size for step in self.wall)

    @property
    def plain_sizes(self) -> tuple[int, ...]:
        """Those whose plain step fits on the device, or nothing was run to see."""
        return tuple(step.micro_batch_size for step in self.wall if not step.kept_elsewhere)

    def with_chunks(self, loss_chunks: int | None) -> PrecisionProfile:
        """As it is, or with its last stage as in ``chunked_head``. Raises ValueError for other numbers of chunks."""
        if loss_chunks is None:
            return self
        head = self.chunked_head
        if head is None or head.chunks != loss_chunks:
            raise ValueError(f"The loss in {loss_chunks} chunks was not profiled. Profile again.")
        at_one = None
        if self.memory_at_one is not None and head.memory_at_one is not None:
            at_one = _with_last(self.memory_at_one, head.memory_at_one)
        cpu = None
        if self.process_cpu is not None and head.process_cpu is not None:
            pairs = zip(self.process_cpu, head.process_cpu, strict=True)
            cpu = tuple(_with_last(step, last) for step, last in pairs)
        return msgspec.structs.replace(
            self,
            memory=_with_last(self.memory, head.memory),
            memory_at_one=at_one,
            wall=tuple(_with_last(step, last) for step, last in zip(self.wall, head.wall, strict=True)),
            process_cpu=cpu,
        )

    def memory_at(self, micro_batch_size: int) -> PrecisionMemory:
        """The curves that hold at a micro-batch size. Raises ValueError for 1 when it was not profiled."""
        if micro_batch_size > 1:
            return self.memory
        if self.memory_at_one is None:
            raise ValueError(
                "Micro-batch size 1 was not profiled. Profile again with --batch 1,2 or the like."
            )
        return self.memory_at_one


WithStages = TypeVar("WithStages", PrecisionMemory, StepTime)


def _with_last(whole: WithStages, last: StageMemory | StageTime) -> WithStages:
    return msgspec.structs.replace(whole, stages=(*whole.stages[:-1], last))


class HopelessPrecision(Record):
    """A precision that a short window showed to be slower than fp32 by ``slowdown``, so was not timed."""

    precision: Precision
    slowdown: Annotated[float, Meta(gt=0)]


class TooLarge(Record):
    """The smallest micro-batch of a precision that was refused memory even with what a step saves kept elsewhere.

    Larger ones were not tried.
    """

    precision: Precision
    micro_batch_size: Positive


class StageRecord(Record):
    """A stage of the chain; ``entry`` is the module call it begins at (empty: the forward pass's start)."""

    name: str
    entry: str
    recomputable: bool
    parameter_count: int


class ParameterRecord(Record):
    """A parameter in the model's order: its module, its elements, and the stages whose module calls use it.

    Two modules that share a parameter have one record with the first one's name.
    """

    module: str
    count: Positive
    stages: tuple[int, ...]
    trainable: bool = True


class Link(Record):
    """How fast ``world_size`` processes move data between them: ``latency + bytes / rate`` seconds a message.

    ``bytes_per_second``: what one process sends (and receives) of it, as collectives are compared by. ``error``: of
    these seconds, relative. ``source``: measured between processes, or what the catalogue says of the device.
    """

    world_size: Annotated[int, Meta(ge=2)]
    backend: Literal["gloo", "nccl"]
    latency_seconds: Seconds
    bytes_per_second: Annotated[float, Meta(gt=0)]
    error: Annotated[float, Meta(ge=0)]
    source: Literal["measured", "catalogue"] = "measured"


class DeviceRecord(Record):
    """The device that was measured: what a plan's time is true for. ``catalogue``: its name there, if only named."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: Positive
    threads: Positive | None = None
    catalogue: str | None = None


class MemoryCheck(Record):
    """The allocator's peak over one real plain step on the device. ``reserved`` only on CUDA."""

    precision: Precision
    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    measured_bytes: Positive
    measured_reserved_bytes: Positive | None = None


EnergySource = Literal["nvml", "rapl", "stated"]
"""Who says what a device draws: NVML's counter, RAPL's, or the user."""

Watts = Annotated[float, Meta(gt=0)]


class PhaseWatts(Record):
    """What one device draws at one precision, by kind of work. ``host``: between the windows, as when it waits."""

    precision: Precision
    forward_watts: Watts
    backward_watts: Watts
    optimizer_watts: Watts
    host_watts: Watts


class EnergyProfile(Record):
    """Watts at every profiled precision. ``error``: their relative error as measured, None for stated ones."""

    source: EnergySource
    error: Annotated[float, Meta(ge=0)] | None
    phases: tuple[PhaseWatts, ...]

    def at(self, precision: Precision) -> PhaseWatts | None:
        """The watts at a precision, or None when they are not known."""
        return next((p for p in self.phases if p.precision == precision), None)


class NoiseScale(Record):
    """The gradient noise scale at the weights that were profiled, in samples; see profiler/noise.py.

    ``noise_scale_samples`` is ``gradient_variance_trace / gradient_norm_squared``, None when the noise hides the
    gradient. ``low`` and ``high``: its 95% interval, None where the steps do not bound it.
    """

    noise_scale_samples: Annotated[float, Meta(ge=0)] | None
    low_samples: Annotated[float, Meta(ge=0)] | None
    high_samples: Annotated[float, Meta(ge=0)] | None
    gradient_norm_squared: float
    gradient_variance_trace: float
    micro_batch_size: Positive
    micro_batches: Annotated[int, Meta(ge=2)]
    steps: Annotated[int, Meta(ge=2)]


class ProfileCost(Record):
    """What the profile itself took: seconds in all, and forward passes run on the device, most with a backward one.

    ``other_work_share``: of the machine's processors, meanwhile; None for a GPU, or where the system does not say.
    """

    seconds: Seconds
    micro_batches_run: Annotated[int, Meta(ge=0)]
    other_work_share: Annotated[float, Meta(ge=0, le=1)] | None = None


class Profile(Document, tag="profile"):
    """All that planning needs to know of a model on a device. ``workload`` None: made by the Python API.

    ``memory_check`` None: nothing was run (profiler/unmeasured.py). ``parameters``: what several processes deal out.
    ``link`` None: it was not measured how processes reach each other, so nothing is planned for more than one.
    ``kernels_tried``: no step was run, but every operation of one by itself, for what its kernel takes.
    ``micro_batch_sizes``: those that some precision was timed at.
    """

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
    memory_check: MemoryCheck | None
    cost: ProfileCost
    energy: EnergyProfile | None = None
    noise_scale: NoiseScale | None = None
    parameters: tuple[ParameterRecord, ...] = ()
    link: Link | None = None
    kernels_tried: bool = False
    too_large: tuple[TooLarge, ...] = ()

    @property
    def time_source(self) -> TimeSource:
        """Whether steps were timed."""
        timed = all(step.steps_timed for precision in self.precisions for step in precision.wall)
        return "measured" if timed else "roofline"

    def at(self, precision: Precision) -> PrecisionProfile | None:
        """The measurements at a precision, or None when it was not profiled."""
        return next((p for p in self.precisions if p.precision == precision), None)

"""The plan: what to run, what it is expected to cost, and why it was chosen.

A plan is data. The executor walks it, the command line prints it, and a file holds it; nothing in it refers
back to how it was found.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from planner import export
from profiler import records
from profiler.profile_record import DeviceRecord, Keeping, Link, NoiseScale, Positive, Precision, TimeSource
from profiler.records import Document, Record
from profiler.workload_spec import WorkloadSpec

Seconds = Annotated[float, Meta(ge=0)]
Joules = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0)]

Phase = Literal["forward", "recompute", "backward", "optimizer"]
"""What a window of a step does."""


Mode = Literal["recompute", Keeping]
"""What becomes of a segment."""


class Segment(Record):
    """Stages ``first`` to ``last`` (both included) run forward again in the backward pass.

    For the executor the segment begins where the module call ``enter`` begins and ends where ``leave``
    begins. ``mode``: all of it runs again, all but its products and attention, or all but those of them that are no
    larger than what they are made from. ``depth``: in how many segments it
    lies, which come before it in the plan; it is recomputed as they run again.
    """

    first: str
    last: str
    mode: Mode = "recompute"
    depth: Annotated[int, Meta(ge=0)] = 0
    enter: str
    leave: str


class Cost(Record):
    """What one optimizer step takes, predicted or measured. ``None`` is: not known on this device."""

    step_seconds: Seconds
    step_cpu_seconds: Seconds | None
    peak_memory_bytes: Positive
    peak_reserved_bytes: Positive | None
    step_joules: Joules | None

    @property
    def steady_seconds(self) -> float:
        """A step's time on the steadiest clock there is: a CPU's own, which no other process's work counts on."""
        return self.step_seconds if self.step_cpu_seconds is None else self.step_cpu_seconds


class Parts(Record):
    """What a prediction is made of: seconds and joules by kind of work, and bytes alive at the highest moment."""

    step_seconds: dict[str, Seconds]
    peak_memory_bytes: dict[str, int]
    step_joules: dict[str, Joules] | None = None


class Error(Record):
    """Relative error to be expected of each prediction, from measurements; None where nobody measured."""

    step_seconds: Share
    peak_memory_bytes: Share
    step_joules: Share | None = None


class Prediction(Cost):
    """A predicted cost with its parts, its error, and the moment of its peak in words.

    ``evaluation_peak_bytes``: of a forward pass without gradients on one micro-batch, between two steps.
    ``yardstick_seconds``: how fast the device was in the profile, on the clock of ``steady_seconds``.
    """

    evaluation_peak_bytes: Positive | None = None
    yardstick_seconds: Annotated[float, Meta(gt=0)] | None = None
    parts: Parts
    error: Error
    peak_at: str


class Choice(Record):
    """The knobs of one plan and what they are predicted to cost.

    ``loss_chunks``: a language model's head and loss run on so many chunks of the tokens, one after the other.
    """

    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    precision: Precision
    zero_stage: Annotated[int, Meta(ge=0, le=3)]
    checkpoint: tuple[Segment, ...]
    loss_chunks: Annotated[int, Meta(ge=2)] | None = None
    prediction: Prediction
    fits: bool


class Weights(Record):
    """The weights of ``C = time * T/T0 + memory * M/M0 + energy * E/E0``; the plain plan has T0, M0, E0."""

    time: Share = 1.0
    memory: Share = 0.0
    energy: Share = 0.0

    def __post_init__(self) -> None:
        if min(self.time, self.memory, self.energy) < 0:
            raise ValueError(
                "The weights of time, memory and energy must not be negative, "
                f"got {self.time}, {self.memory} and {self.energy}."
            )
        if not (self.time or self.memory or self.energy):
            raise ValueError(
                "At least one of the weights of time, memory and energy must be positive, got 0, 0 and 0."
            )


class Objective(Record):
    """The plan's cost under its weights. ``lower_bound`` equal to ``cost``: proven optimal."""

    cost: float
    weights: Weights
    lower_bound: float
    optimal: bool
    plans_considered: int


class Baselines(Record):
    """What people do by hand, on the same scale: no checkpoints, every sqrt(L) blocks, every block."""

    plain: Choice
    sqrt: Choice
    every_block: Choice


class TrialsSummary(Record):
    """What real trials of the search's plans said. ``measured`` and ``steady_error`` are of this plan's own trial.

    ``saved_by_trials``: by how much less this plan was measured to cost than the model's best; 0 where it is that.
    """

    study: str
    outcomes: dict[str, int]
    measured: Cost | None
    steady_error: float | None
    saved_by_trials: float | None


class Reference(Record):
    """A run that is known to reach the target: its global batch and how many optimizer steps it took."""

    global_batch_size: Positive
    steps: Positive

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.steps) < 1:
            raise ValueError(
                "The global batch and the steps of a reference must be at least 1, "
                f"got {self.global_batch_size} and {self.steps}."
            )


class BatchToTarget(Record):
    """The best plan of one global batch, on the whole way to the target. ``steps`` as the formula gives them."""

    global_batch_size: Positive
    micro_batch_size: Positive
    step_seconds: Seconds
    peak_memory_bytes: Positive
    steps: Annotated[float, Meta(gt=0)]
    seconds: Seconds
    joules: Joules | None
    cost: float


class Convergence(Record):
    """How the global batch was chosen: for the least time to a target (planner/target.py).

    Of ``batches_in_range`` global batches that can be run, ``batches_considered`` were searched, all but where they
    are too many, and ``batches_fitting`` have a plan within the memory limit. ``noise_scale_source``: measured in the
    profile, or stated; ``best_at_low`` and ``best_at_high``: the global batch that would be best at the ends of the
    measured interval. ``weights``: as they were asked for, of the whole way to the target; those in the plan's
    objective are the same for one step. ``neighbours``: some of the global batches that were considered.
    """

    mode: Literal["time_to_target"] = "time_to_target"
    global_batch_range: tuple[Positive, Positive]
    batches_in_range: Positive
    batches_considered: Positive
    batches_fitting: Positive
    noise_scale_samples: Share
    noise_scale_source: Literal["profile", "stated"]
    best_at_low: Positive | None
    best_at_high: Positive | None
    reference: Reference
    weights: Weights
    chosen: BatchToTarget
    neighbours: tuple[BatchToTarget, ...]


Length = Literal["samples", "epochs", "target", "1000 steps"]
"""What says how long a run is: samples, epochs, or a target to reach; where nothing does, it is 1,000 steps."""


class RunCost(Record):
    """What a whole run takes. ``price`` is in the unit of ``price_per_hour``, which is of one device.

    ``joules`` and ``carbon_grams`` are of all devices; None where no source of energy was profiled, or no intensity
    given.
    """

    length: Length
    samples: Positive
    steps: Positive
    seconds: Seconds
    price_per_hour: Share | None
    price: Share | None
    joules: Joules | None
    carbon_grams_per_kilowatt_hour: Share | None
    carbon_grams: Share | None


class Window(Record):
    """The highest moment of one window of a step: what is alive of what comes and goes.

    ``micro_batch``: 0 for the first, 1 for a later one. ``stage``: its place in the chain. The optimizer's window has
    neither.
    """

    phase: Phase
    micro_batch: Annotated[int, Meta(ge=0, le=1)] | None
    stage: Annotated[int, Meta(ge=0)] | None
    gradient_bytes: int
    activation_bytes: int
    working_bytes: int

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Its bytes by the names that a prediction gives to its parts."""
        return {
            "gradients": self.gradient_bytes,
            "activations": self.activation_bytes,
            "working": self.working_bytes,
        }


class Course(Record):
    """The memory of a step as it runs: what stands throughout, and every window in order.

    The windows are those of the first micro-batch, of a later one if there is one, and of the optimizer.
    """

    standing_bytes: dict[str, int]
    windows: Annotated[tuple[Window, ...], Meta(min_length=1)]

    def bytes_by_part(self, window: Window) -> dict[str, int]:
        """All that is alive in a window."""
        return {**self.standing_bytes, **window.bytes_by_part}


class Stage(Record):
    """What a stage of the chain takes for one micro-batch of the plan, before anything is recomputed.

    ``backward_seconds``: of a micro-batch that adds to gradients, where there is one. ``kept_bytes``: what it keeps
    from its forward to its backward.
    """

    name: str
    parameter_count: Annotated[int, Meta(ge=0)]
    forward_seconds: Seconds
    backward_seconds: Seconds
    kept_bytes: int


class Asked(Record):
    """What the search could choose from, besides the budget: precisions, stages of ZeRO, and over which link."""

    precisions: tuple[Precision, ...]
    zero_stages: tuple[Annotated[int, Meta(ge=0, le=3)], ...]
    link: Link | None


Knob = Literal[
    "memory_budget", "precision", "recomputation", "loss_chunks", "devices", "zero_stage", "micro_batch"
]
"""What a question can be changed in."""


class WhatIf(Record):
    """What the search answers when one thing of the question is otherwise (planner/what_if.py).

    ``memory_budget_bytes`` and ``world_size`` are those of the changed question. ``choice``: its cheapest plan; where
    none fits, the one that needs least. None: it cannot be told, and ``reason`` says why.
    """

    knob: Knob
    change: str
    memory_budget_bytes: Positive | None
    world_size: Positive
    choice: Choice | None
    reason: str | None = None


class Plan(Document, tag="plan"):
    """One plan. ``micro_batch_size * gradient_accumulation_steps * world_size == global_batch_size``.

    ``noise_scale``: as the profile measured it, where it did. ``time_source``: what its times are made from.
    ``convergence`` None: the global batch was given, and plans were ordered by the time of a step. ``run``: what the
    whole run takes, where someone asked.
    ``course`` and ``stages``: None in a file of an older version, and for a plan that took the place of the chosen one.
    ``asked``: None in a file of an older version. ``what_ifs``: what other questions would have found, where asked.
    """

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    model: str
    workload: WorkloadSpec | None
    profile_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    device: DeviceRecord
    optimizer: str
    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    world_size: Positive
    global_batch_size: Positive
    precision: Precision
    zero_stage: Annotated[int, Meta(ge=0, le=3)]
    checkpoint: tuple[Segment, ...]
    loss_chunks: Annotated[int, Meta(ge=2)] | None = None
    memory_budget_bytes: Positive | None
    prediction: Prediction
    objective: Objective
    baselines: Baselines
    front: tuple[Choice, ...]
    noise_scale: NoiseScale | None = None
    time_source: TimeSource = "measured"
    trials: TrialsSummary | None = None
    convergence: Convergence | None = None
    run: RunCost | None = None
    course: Course | None = None
    stages: tuple[Stage, ...] | None = None
    asked: Asked | None = None
    what_ifs: tuple[WhatIf, ...] | None = None

    def __post_init__(self) -> None:
        b, k, world = self.micro_batch_size, self.gradient_accumulation_steps, self.world_size
        if b * k * world != self.global_batch_size:
            raise ValueError(
                "micro_batch_size * gradient_accumulation_steps * world_size must be global_batch_size, "
                f"got {b} * {k} * {world} = {b * k * world} and {self.global_batch_size}"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file, whole or not at all."""
        records.write(path, self)
        return Path(path)

    def to_deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration. These five warn (``NotExpressed``) of what an engine's settings cannot say."""
        return export.to_deepspeed(self).said()

    def to_training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' ``TrainingArguments``."""
        return export.to_transformers(self).said()

    def to_accelerate(self) -> dict[str, Any]:
        """What a file for ``accelerate launch --config_file`` holds."""
        return export.to_accelerate(self).said()

    def to_lightning(self) -> dict[str, Any]:
        """Keyword arguments for Lightning's ``Trainer``."""
        return export.to_lightning(self).said()

    def to_torchtitan(self) -> dict[str, Any]:
        """Fields of torchtitan's ``Trainer.Config``, by section."""
        return export.to_torchtitan(self).said()

    @property
    def sha256(self) -> str:
        """The identity of the plan: of the bytes of its file."""
        return records.sha256(self)


class NoFeasiblePlan(Exception):
    """No plan fits the memory budget; ``tightest`` is the prediction of the plan that needs least."""

    def __init__(self, message: str, tightest: Prediction) -> None:
        super().__init__(message)
        self.tightest = tightest


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file; RecordError says in one line what is wrong with it."""
    return records.read(path, Plan)

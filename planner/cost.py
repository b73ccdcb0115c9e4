"""What a plan costs: predictions with their parts and errors, and the one number that orders plans.

``C = w1 * T/T0 + w2 * M/M0 + w3 * E/E0``, where T0, M0 and E0 are the plain plan's (design equation 3 with
its units made equal: in seconds and bytes the bytes would drown the seconds).
"""

from __future__ import annotations

import functools
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner import communication, energy
from planner.calibration import Calibration
from planner.communication import ALONE, Distribution
from planner.memory import MemoryWindow, constant_bytes, peak_window, timeline
from planner.nested import PLAIN, Placed, depths
from planner.plan import (
    Choice,
    Cost,
    Course,
    Error,
    Mode,
    Parts,
    Plan,
    Prediction,
    Segment,
    Stage,
    Weights,
    Window,
)
from planner.time import at_micro_batch, expected_error, step_parts
from planner.zero import sharded
from profiler.profile_record import (
    KEEPINGS,
    Precision,
    PrecisionMemory,
    PrecisionProfile,
    Profile,
    StepTime,
    bytes_at,
    peak_at,
)

COMPOSITION_ERROR = 0.002
"""Largest error seen when composing random plans; ``python -m studies.composition`` prints it again."""

ZERO_ERROR = 0.01
"""To state of a process among several. Two DeepSpeed processes were at most 0.2% off (``python -m studies.zero``), in
fp32, over gloo; more processes and other models were not measured."""

UNCHECKED_MEMORY_ERROR = 0.16
"""Of a peak that nothing was run for: scratch memory inside kernels is not in it. On a CPU such peaks were 5.1% too low
for GPT-2 at 64 tokens (``python -m studies.roofline``) and 16% for ResNet-50 at 64 x 64 (studies/LOG.md)."""


TRIED_KERNELS_ERROR = 0.01
"""To state of a peak for which no step was run, but every operation of one by itself (``profile.kernels_tried``). The
models of ``python -m studies.kernels`` are exact to the byte or nearly so."""


def predict(
    profile: Profile,
    measured: PrecisionProfile,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    placed: Placed,
    distribution: Distribution = ALONE,
    calibration: Calibration | None = None,
) -> Prediction:
    """The cost of one optimizer step of a plan on the profile's device; errors as ``calibration`` taught, if given.

    With several processes the peak is that of the one that needs most, and the energy that of all.
    """
    b, k = micro_batch_size, gradient_accumulation_steps
    times = at_micro_batch(measured.wall, b)
    parts = seconds_by_kind(profile, times, k, placed, distribution)
    cpu_seconds, yardstick_seconds = None, times.yardstick_seconds
    if measured.process_cpu is not None and distribution.world_size == 1:
        cpu_times = at_micro_batch(measured.process_cpu, b)
        cpu_seconds = sum(step_parts(cpu_times, k, placed).values())
        yardstick_seconds = cpu_times.yardstick_seconds
    memory = memory_of_process(profile, measured, b, k, distribution)
    peak = peak_window(
        timeline(
            memory, placed, micro_batch_size=b, gradient_accumulation_steps=k,
            resident_batches=resident_batches(profile, k),
        )
    )  # fmt: skip
    time_error = expected_error(times)
    if calibration is not None:
        time_error = calibration.time_error(time_error)
    if distribution.link is not None:
        share = parts["communication"] / sum(parts.values())
        time_error = share * distribution.link.error + (1 - share) * time_error
    watts = energy.watts_at(profile, measured.precision)
    joules = None if watts is None else energy.step_joules(parts, watts, distribution.world_size)
    return Prediction(
        step_seconds=sum(parts.values()),
        step_cpu_seconds=cpu_seconds,
        peak_memory_bytes=peak.total_bytes,
        peak_reserved_bytes=_reserved(profile, peak.total_bytes),
        step_joules=None if joules is None else sum(joules.values()),
        evaluation_peak_bytes=_evaluation_peak_bytes(memory, b),
        yardstick_seconds=yardstick_seconds,
        parts=Parts(
            step_seconds=parts,
            peak_memory_bytes=_memory_parts(memory, peak, distribution),
            step_joules=joules,
        ),
        error=Error(
            step_seconds=time_error,
            peak_memory_bytes=memory_error(profile, calibration, distribution.world_size),
            step_joules=None if joules is None else energy.expected_error(profile, time_error),
        ),
        peak_at=f"{peak.phase} of {profile.stages[peak.stage].name}"
        if peak.phase != "optimizer"
        else "optimizer step",
    )


def _evaluation_peak_bytes(memory: PrecisionMemory, micro_batch_size: int) -> int:
    """The peak of a forward pass and loss on one micro-batch without gradients, between two optimizer steps."""
    return constant_bytes(memory, micro_batch_size, 1) + peak_at(memory.evaluation, micro_batch_size)


def resident_batches(profile: Profile, gradient_accumulation_steps: int) -> int:
    """How many micro-batches of input are on the device: all on a CPU, elsewhere the one being worked on."""
    return gradient_accumulation_steps if profile.device.kind == "cpu" else 1


def checked_peak_bytes(profile: Profile) -> int | None:
    """What the curves say of the step that the profile ran for its memory check, composed as any plan's peak is.

    None for a profile that ran nothing.
    """
    check = profile.memory_check
    if check is None:
        return None
    return plain_peak_bytes(
        profile, check.precision, check.micro_batch_size, check.gradient_accumulation_steps
    )


def plain_peak_bytes(
    profile: Profile, precision: Precision, micro_batch_size: int, micro_batches: int
) -> int:
    """The peak of a step that recomputes nothing, with all of its micro-batches on the device."""
    measured = profile.at(precision)
    if measured is None:
        raise ValueError(f"The profile must hold the precision asked for, got {precision}.")
    windows = timeline(
        measured.memory_at(micro_batch_size), PLAIN, micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=micro_batches, resident_batches=micro_batches,
    )  # fmt: skip
    return peak_window(windows).total_bytes


def memory_error(profile: Profile, calibration: Calibration | None = None, world_size: int = 1) -> float:
    """Relative error of a predicted peak: composition's, the profile's own check, and what verifications taught.

    Of several processes it is at least ``ZERO_ERROR``. Steps that ran with what they save kept elsewhere show what
    kernels take, and check no peak; how far CUDA's allocator is off without a check nobody has measured.
    """
    check, composed_bytes = profile.memory_check, checked_peak_bytes(profile)
    if check is None or composed_bytes is None:
        watched = profile.kernels_tried or (
            profile.time_source == "measured" and profile.device.kind == "cpu"
        )
        error = TRIED_KERNELS_ERROR if watched else UNCHECKED_MEMORY_ERROR
    else:
        residual = abs(composed_bytes - check.measured_bytes) / check.measured_bytes
        error = max(COMPOSITION_ERROR, residual)
    if world_size > 1:
        error = max(error, ZERO_ERROR)
    return error if calibration is None else calibration.memory_error(error)


def _reserved(profile: Profile, peak_bytes: int) -> int | None:
    """CUDA: the allocator's reserve in the same proportion as in the profile's own check."""
    check = profile.memory_check
    if check is None or check.measured_reserved_bytes is None:
        return None
    return round(peak_bytes * check.measured_reserved_bytes / check.measured_bytes)


def seconds_by_kind(
    profile: Profile,
    times: StepTime,
    gradient_accumulation_steps: int,
    placed: Placed,
    distribution: Distribution,
) -> dict[str, float]:
    """The seconds of a step of one process by kind of work, its communication included.

    From ZeRO stage 1 on a process updates its own share of the parameters only.
    """
    k = gradient_accumulation_steps
    parts = step_parts(times, k, placed)
    if distribution.world_size > 1:
        parts["communication"] = communication.step_seconds(distribution, k, profile.parameters)
        if distribution.zero_stage:
            parts["optimizer"] /= distribution.world_size
    return parts


def memory_of_process(
    profile: Profile,
    measured: PrecisionProfile,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    distribution: Distribution,
) -> PrecisionMemory:
    """The curves of the process that needs most; of the only one, as they were profiled."""
    memory = measured.memory_at(micro_batch_size)
    if distribution.world_size == 1:
        return memory
    return sharded_once(
        memory,
        profile.parameters,
        zero_stage=distribution.zero_stage,
        world_size=distribution.world_size,
        gradient_accumulation_steps=min(gradient_accumulation_steps, 2),  # Beyond that they change nothing.
        precision=measured.precision,
        collectives=distribution.collectives,
    )


sharded_once = functools.lru_cache(maxsize=32)(sharded)
"""Remembered, since a search asks for the same curves at every micro-batch and for every plan that it describes."""


def _memory_parts(memory: PrecisionMemory, peak: MemoryWindow, distribution: Distribution) -> dict[str, int]:
    return {**_standing_parts(memory, peak.constant_bytes, distribution), **_window(peak).bytes_by_part}


def _standing_parts(
    memory: PrecisionMemory, constant_bytes: int, distribution: Distribution
) -> dict[str, int]:
    fixed = memory.parameter_bytes + memory.buffer_bytes + memory.optimizer_state_bytes
    # With one process the rest is inputs, and on CUDA kernels' workspaces; with several, also copies of parameters.
    copies = {} if distribution.world_size == 1 else {"parameter_copies": memory.other_bytes}
    return {
        "parameters": memory.parameter_bytes,
        "buffers": memory.buffer_bytes,
        "optimizer_state": memory.optimizer_state_bytes,
        **copies,
        "inputs": constant_bytes - fixed - sum(copies.values()),
    }


def _window(window: MemoryWindow) -> Window:
    update = window.phase == "optimizer"
    return Window(
        phase=window.phase,
        micro_batch=None if update else window.micro_batch,
        stage=None if update else window.stage,
        gradient_bytes=window.gradient_bytes,
        activation_bytes=window.held_bytes,
        working_bytes=window.own_bytes,
    )


def course_of(
    profile: Profile, measured: PrecisionProfile, choice: Choice, distribution: Distribution = ALONE
) -> Course:
    """The memory of a step of a choice, window by window; its highest is the choice's predicted peak.

    ``measured``: at the choice's precision, with the loss in the choice's chunks.
    """
    b, k = choice.micro_batch_size, choice.gradient_accumulation_steps
    memory = memory_of_process(profile, measured, b, k, distribution)
    resident = resident_batches(profile, k)
    windows = timeline(
        memory, index_segments(profile, choice.checkpoint), micro_batch_size=b,
        gradient_accumulation_steps=k, resident_batches=resident,
    )  # fmt: skip
    return Course(
        standing_bytes=_standing_parts(memory, constant_bytes(memory, b, resident), distribution),
        windows=tuple(_window(window) for window in windows),
    )


def stages_of(
    profile: Profile, measured: PrecisionProfile, choice: Choice, distribution: Distribution = ALONE
) -> tuple[Stage, ...]:
    """What each stage takes for one micro-batch of a choice, measured as for ``course_of``."""
    b, k = choice.micro_batch_size, choice.gradient_accumulation_steps
    memory = memory_of_process(profile, measured, b, k, distribution)
    times = at_micro_batch(measured.wall, b)
    return tuple(
        Stage(
            name=stage.name,
            parameter_count=stage.parameter_count,
            forward_seconds=time.forward_seconds,
            backward_seconds=time.backward_later_seconds if k > 1 else time.backward_first_seconds,
            kept_bytes=bytes_at(curves.hold, b),
        )
        for stage, time, curves in zip(profile.stages, times.stages, memory.stages, strict=True)
    )


def objective(cost: Cost, reference: Cost, weights: Weights) -> float:
    """``C`` of a plan relative to the plain plan. Raises ValueError when energy counts and is not known."""
    return weighed(cost.step_seconds, cost.peak_memory_bytes, cost.step_joules, reference, weights)


Number = TypeVar("Number", float, NDArray[np.float64])


def weighed(
    step_seconds: Number,
    peak_memory_bytes: Number,
    step_joules: Number | None,
    reference: Cost,
    weights: Weights,
) -> Number:
    """``C`` of a time, a peak and an energy, or of many at once; see ``objective``."""
    value = weights.time * step_seconds / reference.step_seconds
    value = value + weights.memory * peak_memory_bytes / reference.peak_memory_bytes
    if weights.energy:
        if step_joules is None or reference.step_joules is None:
            raise ValueError(
                "--energy-weight is positive but nothing tells the energy of this device: no NVML, no "
                "RAPL, no stated watts in the profile. Set --energy-weight 0, or profile with --watts, or where one "
                "of the counters can be read."
            )
        value = value + weights.energy * step_joules / reference.step_joules
    return value


def instead(plan: Plan, choice: Choice) -> Plan:
    """A plan of the search, such as a baseline, in place of the chosen one: to run it, whether or not it fits.

    It says nothing of a target or a whole run, which were the chosen plan's.
    """
    cost = objective(choice.prediction, plan.baselines.plain.prediction, plan.objective.weights)
    return msgspec.structs.replace(
        plan,
        micro_batch_size=choice.micro_batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        precision=choice.precision,
        zero_stage=choice.zero_stage,
        checkpoint=choice.checkpoint,
        loss_chunks=choice.loss_chunks,
        memory_budget_bytes=None,
        prediction=choice.prediction,
        objective=msgspec.structs.replace(
            plan.objective, cost=cost, lower_bound=min(cost, plan.objective.lower_bound), optimal=False
        ),
        course=None,
        stages=None,
        convergence=None,
        run=None,
        what_ifs=None,
    )


def name_segments(profile: Profile, placed: Placed) -> tuple[Segment, ...]:
    """A placement by stage names and module entries, as a plan has it."""
    stages = profile.stages

    def named(start: int, stop: int, mode: Mode, depth: int) -> Segment:
        return Segment(
            first=stages[start].name,
            last=stages[stop - 1].name,
            mode=mode,
            depth=depth,
            enter=stages[start].entry,
            leave=stages[stop].entry,
        )

    segments = [
        (start, named(start, stop, "recompute", depth))
        for depth, (start, stop) in zip(depths(placed.segments), placed.segments, strict=True)
    ]
    selective = [(stage, named(stage, stage + 1, how, 0)) for stage, how in placed.keeping.items()]
    return tuple(segment for _, segment in sorted([*segments, *selective], key=lambda pair: pair[0]))


def index_segments(profile: Profile, segments: tuple[Segment, ...]) -> Placed:
    """The plan's segments by the numbers of the profile's stages."""
    position = {stage.name: index for index, stage in enumerate(profile.stages)}
    return Placed(
        segments=tuple((position[s.first], position[s.last] + 1) for s in segments if s.mode == "recompute"),
        **{how: tuple(position[s.first] for s in segments if s.mode == how) for how in KEEPINGS},
    )

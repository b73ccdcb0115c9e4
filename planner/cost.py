"""What a plan costs: predictions with their parts and errors, and the one number that orders plans.

``C = w1 * T/T0 + w2 * M/M0 + w3 * E/E0``, where T0, M0 and E0 are the plain plan's (design equation 3 with
its units made equal: in seconds and bytes the bytes would drown the seconds).
"""

from __future__ import annotations

import msgspec

from planner.memory import MemoryWindow, peak_window, timeline
from planner.placement import Segments
from planner.plan import Choice, Cost, Error, Parts, Plan, Prediction, Segment, Weights
from planner.time import at_micro_batch, expected_error, step_parts
from profiler.profile_record import PrecisionProfile, Profile

COMPOSITION_ERROR = 0.002
"""Largest error seen when composing random plans; ``python -m studies.composition`` prints it again."""


def predict(
    profile: Profile,
    measured: PrecisionProfile,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    segments: Segments,
) -> Prediction:
    """The cost of one optimizer step of a plan on the profile's device."""
    b, k = micro_batch_size, gradient_accumulation_steps
    times = at_micro_batch(measured.wall, b)
    parts = step_parts(times, k, segments)
    cpu_seconds = None
    if measured.process_cpu is not None:
        cpu_seconds = sum(step_parts(at_micro_batch(measured.process_cpu, b), k, segments).values())
    peak = peak_window(
        timeline(
            measured.memory_at(b), segments, micro_batch_size=b, gradient_accumulation_steps=k,
            resident_batches=resident_batches(profile, k),
        )
    )  # fmt: skip
    return Prediction(
        step_seconds=sum(parts.values()),
        step_cpu_seconds=cpu_seconds,
        peak_memory_bytes=peak.total_bytes,
        peak_reserved_bytes=_reserved(profile, peak.total_bytes),
        step_joules=None,
        parts=Parts(step_seconds=parts, peak_memory_bytes=_memory_parts(measured, peak, b, profile, k)),
        error=Error(step_seconds=expected_error(times), peak_memory_bytes=memory_error(profile)),
        peak_at=f"{peak.phase} of {profile.stages[peak.stage].name}"
        if peak.phase != "optimizer"
        else "optimizer step",
    )


def resident_batches(profile: Profile, gradient_accumulation_steps: int) -> int:
    """How many micro-batches of input are on the device: all on a CPU, elsewhere the one being worked on."""
    return gradient_accumulation_steps if profile.device.kind == "cpu" else 1


def memory_error(profile: Profile) -> float:
    """Relative error of a predicted peak: the profile's own check against a real step, and composition's."""
    check = profile.memory_check
    residual = abs(check.predicted_bytes - check.measured_bytes) / check.measured_bytes
    return max(COMPOSITION_ERROR, residual)


def _reserved(profile: Profile, peak_bytes: int) -> int | None:
    """CUDA: the allocator's reserve in the same proportion as in the profile's own check."""
    check = profile.memory_check
    if check.measured_reserved_bytes is None:
        return None
    return round(peak_bytes * check.measured_reserved_bytes / check.measured_bytes)


def _memory_parts(
    measured: PrecisionProfile, peak: MemoryWindow, b: int, profile: Profile, k: int
) -> dict[str, int]:
    memory = measured.memory_at(b)
    fixed = memory.parameter_bytes + memory.buffer_bytes + memory.optimizer_state_bytes
    return {
        "parameters": memory.parameter_bytes,
        "buffers": memory.buffer_bytes,
        "optimizer_state": memory.optimizer_state_bytes,
        "inputs": peak.constant_bytes - fixed,
        "gradients": peak.gradient_bytes,
        "activations": peak.held_bytes,
        "working": peak.own_bytes,
    }


def objective(cost: Cost, reference: Cost, weights: Weights) -> float:
    """``C`` of a plan relative to the plain plan. Raises ValueError when energy counts and is not known."""
    value = weights.time * cost.step_seconds / reference.step_seconds
    value += weights.memory * cost.peak_memory_bytes / reference.peak_memory_bytes
    if weights.energy:
        if cost.step_joules is None or reference.step_joules is None:
            raise ValueError(
                "--energy-weight is positive but nothing tells the energy of this device: no NVML, no "
                "RAPL, no stated watts in the profile. Set --energy-weight 0, or profile where one of these "
                "can be read."
            )
        value += weights.energy * cost.step_joules / reference.step_joules
    return value


def instead(plan: Plan, choice: Choice) -> Plan:
    """A plan of the search, such as a baseline, in place of the chosen one: to run it, whether or not it fits."""
    cost = objective(choice.prediction, plan.baselines.plain.prediction, plan.objective.weights)
    return msgspec.structs.replace(
        plan,
        micro_batch_size=choice.micro_batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        precision=choice.precision,
        zero_stage=choice.zero_stage,
        checkpoint=choice.checkpoint,
        memory_budget_bytes=None,
        prediction=choice.prediction,
        objective=msgspec.structs.replace(
            plan.objective, cost=cost, lower_bound=min(cost, plan.objective.lower_bound), optimal=False
        ),
    )


def name_segments(profile: Profile, segments: Segments) -> tuple[Segment, ...]:
    """Index ranges as the plan's segments, by stage names and module entries."""
    stages = profile.stages
    return tuple(
        Segment(
            first=stages[start].name,
            last=stages[stop - 1].name,
            enter=stages[start].entry,
            leave=stages[stop].entry,
        )
        for start, stop in segments
    )


def index_segments(profile: Profile, segments: tuple[Segment, ...]) -> Segments:
    """The plan's segments as index ranges of the profile's stages."""
    position = {stage.name: index for index, stage in enumerate(profile.stages)}
    return tuple((position[segment.first], position[segment.last] + 1) for segment in segments)

"""Why a plan is what it is, read from the plan alone.

A memory budget is either slack, and the plan is simply the cheapest there is, or it binds. Then two questions
matter, and the plan's front answers both: what would a little more memory buy, and how little would still do?

    step time
      |  *                    tightest        the smallest budget for which any plan exists
      |    *
      |       * <- chosen     next            the nearest faster plan that does not fit
      |          |  *
      |   budget |      *     without limit   the fastest plan of all
      +----------+----------- peak memory

What people do by hand (the baselines) loses for one of two reasons: it does not fit, or it costs more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import msgspec

from planner.convergence import steps_saved
from planner.cost import objective
from planner.plan import Choice, Convergence, Knob, Objective, Plan, Prediction, Segment, WhatIf
from planner.words import of_bytes
from profiler.profile_record import (
    NoiseScale,
    Precision,
    Profile,
    TimeSource,
    bytes_at,
)
from profiler.records import Document, Record

Number = TypeVar("Number", int, float)

KEPT_TEXT: dict[str, str] = {
    "selective": "products and attention",
    "selective_narrow": "narrow products and attention",
}
"""What a selective segment does not run again."""


class Alternative(Record):
    """Another plan beside the chosen one; ``relative_*`` are its value over the chosen plan's, minus one.

    ``budget_bytes`` is the smallest memory budget that lets it in, its stated error included. ``same``: it
    makes the very choices of the chosen plan.
    """

    name: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    precision: Precision
    segments: int
    checkpoint: str
    loss_chunks: int | None
    zero_stage: int
    fits: bool
    same: bool
    step_seconds: float
    peak_memory_bytes: int
    budget_bytes: int
    cost: float
    relative_step_seconds: float
    relative_peak_memory_bytes: float
    relative_cost: float


class Answer(Record):
    """What changing one thing of the question would buy.

    ``feasible`` None: it cannot be told, and ``reason`` says why. ``plan``: the cheapest then; where none fits, the one
    that needs least. ``seconds_per_gib``: of a limited change of the memory budget that changes the plan, how much
    faster a step gets by one GiB more, at that rate.
    """

    knob: Knob
    change: str
    memory_budget_bytes: int | None
    world_size: int
    feasible: bool | None
    reason: str | None
    plan: Alternative | None
    seconds_per_gib: float | None


class Explanation(Document, tag="explanation"):
    """What binds a plan, why others lose, and what other budgets would give.

    ``headroom_bytes``: what the budget leaves above the predicted peak and its error; None without a budget.
    ``binding``: whether a plan on the front costs less, which then does not fit. ``next_faster``: the first
    faster plan on the front that does not fit. The front in a plan is thinned: between two of its points
    there may be others. ``saved_by_doubling``: the share of the steps to a target that twice the global batch
    would save; None where the noise scale is not known. ``convergence``: how the global batch was chosen, if it was.
    ``what_ifs``: what else could be asked, None where nobody did; ``tightest`` is from there, else from the front,
    which has no segments inside segments unless nothing else fitted.
    """

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    plan_sha256: str
    model: str
    memory_budget_bytes: int | None
    needed_bytes: int
    headroom_bytes: int | None
    binding: bool
    peak_at: str
    peak_parts: dict[str, int]
    step_parts: dict[str, float]
    energy_parts: dict[str, float] | None
    global_batch_size: int
    noise_scale: NoiseScale | None
    saved_by_doubling: float | None
    baselines: tuple[Alternative, ...]
    tightest: Alternative
    next_faster: Alternative | None
    without_limit: Alternative
    time_source: TimeSource = "measured"
    convergence: Convergence | None = None
    what_ifs: tuple[Answer, ...] | None = None


def explain(plan: Plan) -> Explanation:
    """Hold a plan against its baselines and its front."""
    baselines = plan.baselines
    budget, needed = plan.memory_budget_bytes, budget_for(plan.prediction)
    without_limit = min((chosen(plan), *plan.front), key=lambda choice: _cost(plan, choice.prediction))
    faster = (
        choice
        for choice in plan.front
        if not choice.fits and choice.prediction.step_seconds < plan.prediction.step_seconds
    )
    next_faster = next(faster, None)
    return Explanation(
        plan_sha256=plan.sha256,
        model=plan.model,
        memory_budget_bytes=budget,
        needed_bytes=needed,
        headroom_bytes=None if budget is None else budget - needed,
        binding=_cost(plan, without_limit.prediction) < plan.objective.cost,
        peak_at=plan.prediction.peak_at,
        peak_parts=_falling(plan.prediction.parts.peak_memory_bytes),
        step_parts=_falling(plan.prediction.parts.step_seconds),
        energy_parts=None if (joules := plan.prediction.parts.step_joules) is None else _falling(joules),
        global_batch_size=plan.global_batch_size,
        noise_scale=plan.noise_scale,
        saved_by_doubling=_saved_by_doubling(plan),
        baselines=(
            _beside(plan, "plain", baselines.plain),
            _beside(plan, "sqrt", baselines.sqrt),
            _beside(plan, "every_block", baselines.every_block),
        ),
        tightest=_beside(plan, "tightest", _tightest(plan)),
        next_faster=None if next_faster is None else _beside(plan, "next_faster", next_faster),
        without_limit=_beside(plan, "without_limit", without_limit),
        time_source=plan.time_source,
        convergence=plan.convergence,
        what_ifs=answers(plan),
    )


def answers(plan: Plan) -> tuple[Answer, ...] | None:
    """The plan's what-ifs beside it."""
    return None if plan.what_ifs is None else tuple(_answer(plan, each) for each in plan.what_ifs)


def _answer(plan: Plan, what_if: WhatIf) -> Answer:
    choice = what_if.choice
    other = None if choice is None else _beside(plan, what_if.knob, choice)
    if other is not None and what_if.world_size != plan.world_size:
        other = msgspec.structs.replace(other, same=False)
    return Answer(
        knob=what_if.knob,
        change=what_if.change,
        memory_budget_bytes=what_if.memory_budget_bytes,
        world_size=what_if.world_size,
        feasible=None if choice is None else choice.fits,
        reason=what_if.reason,
        plan=other,
        seconds_per_gib=_seconds_per_gib(plan, what_if),
    )


def outcome_text(answer: Answer) -> str:
    """What the answer is, in one line."""
    other = answer.plan
    if other is None:
        return answer.reason or ""
    if not answer.feasible:
        return f"nothing fits: the tightest needs {of_bytes(other.budget_bytes)}"
    if other.same:
        return "this very plan"
    counted = "1 segment" if other.segments == 1 else f"{other.segments or 'no'} segments"
    words = [
        other.precision,
        f"{other.micro_batch_size} x {other.gradient_accumulation_steps}",
        *([f"ZeRO stage {other.zero_stage}"] if answer.world_size > 1 else []),
        counted,
        *([f"the loss in {other.loss_chunks} chunks"] if other.loss_chunks else []),
    ]
    return ", ".join(words)


def _seconds_per_gib(plan: Plan, what_if: WhatIf) -> float | None:
    choice, budget = what_if.choice, what_if.memory_budget_bytes
    if what_if.knob != "memory_budget" or budget is None or choice is None or not choice.fits:
        return None
    more = budget - (plan.memory_budget_bytes or budget_for(plan.prediction))
    saved = plan.prediction.step_seconds - choice.prediction.step_seconds
    return saved * 2**30 / more if more and saved else None


def _tightest(plan: Plan) -> Choice:
    """What needs least of the front and of all that fits another question about the same devices."""
    alike = (
        each.choice
        for each in plan.what_ifs or ()
        if each.knob == "memory_budget" and each.choice is not None and each.choice.fits
    )
    return min((plan.front[0], *alike), key=lambda choice: budget_for(choice.prediction))


def chosen(plan: Plan) -> Choice:
    """The plan's own knobs, as one choice among others."""
    return Choice(
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        precision=plan.precision,
        zero_stage=plan.zero_stage,
        checkpoint=plan.checkpoint,
        loss_chunks=plan.loss_chunks,
        prediction=plan.prediction,
        fits=True,
    )


def budget_for(prediction: Prediction) -> int:
    """The smallest memory budget, in bytes, that the plan with this prediction fits."""
    return math.floor(prediction.peak_memory_bytes * (1 + prediction.error.peak_memory_bytes)) + 1


def proof_text(objective: Objective) -> str:
    """What is known of plans that cost less."""
    if objective.optimal:
        return f"proven optimal under the model ({objective.plans_considered} plans considered)"
    return f"no plan costs less than {objective.lower_bound:.4f}"


def _beside(plan: Plan, name: str, choice: Choice) -> Alternative:
    prediction, own = choice.prediction, plan.prediction
    cost = _cost(plan, prediction)
    knobs = (
        choice.micro_batch_size, choice.precision, choice.zero_stage, choice.loss_chunks, choice.checkpoint
    )  # fmt: skip
    return Alternative(
        name=name,
        micro_batch_size=choice.micro_batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        precision=choice.precision,
        segments=len(choice.checkpoint),
        checkpoint=checkpoint_text(choice.checkpoint, choice.loss_chunks),
        loss_chunks=choice.loss_chunks,
        zero_stage=choice.zero_stage,
        fits=choice.fits,
        same=knobs
        == (plan.micro_batch_size, plan.precision, plan.zero_stage, plan.loss_chunks, plan.checkpoint),
        step_seconds=prediction.step_seconds,
        peak_memory_bytes=prediction.peak_memory_bytes,
        budget_bytes=budget_for(prediction),
        cost=cost,
        relative_step_seconds=prediction.step_seconds / own.step_seconds - 1,
        relative_peak_memory_bytes=prediction.peak_memory_bytes / own.peak_memory_bytes - 1,
        relative_cost=cost / plan.objective.cost - 1,
    )


def _saved_by_doubling(plan: Plan) -> float | None:
    phi = None if plan.noise_scale is None else plan.noise_scale.noise_scale_samples
    batch = plan.global_batch_size
    return None if phi is None else steps_saved(phi, batch_size=batch, larger=2 * batch)


def _cost(plan: Plan, prediction: Prediction) -> float:
    return objective(prediction, plan.baselines.plain.prediction, plan.objective.weights)


def _falling(parts: dict[str, Number]) -> dict[str, Number]:
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRun:
    """Segments alike but for one number in their names that counts upwards: ``h.0.mlp``, ``h.1.mlp``."""

    segments: tuple[Segment, ...]

    @property
    def span(self) -> str:
        """From where to where the run goes."""
        first, last = self.segments[0], self.segments[-1]
        return first.first if first.first == last.last else f"{first.first} .. {last.last}"

    @property
    def shape(self) -> str:
        """How many segments, and what each of them is."""
        count, first = len(self.segments), self.segments[0]
        number = "1 segment" if count == 1 else f"{count} segments"
        if first.depth:
            number += " inside others"
        if first.mode != "recompute":
            return f"{number} of one stage, but for {KEPT_TEXT[first.mode]}"
        if first.first == first.last:
            return f"{number} of one stage"
        return number if count == 1 else f"{number}, the first up to {first.last}"


def segment_runs(checkpoint: Sequence[Segment]) -> tuple[SegmentRun, ...]:
    """A plan's segments in as few runs as a person would name, in the order in which each begins."""
    alike: dict[tuple[str, str, str, int], list[list[Segment]]] = {}
    for segment in checkpoint:
        kind = (_pattern(segment.first), _pattern(segment.last), segment.mode, segment.depth)
        runs = alike.setdefault(kind, [])
        if runs and _continues(runs[-1], segment):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    position = {id(segment): index for index, segment in enumerate(checkpoint)}
    found = [SegmentRun(segments=tuple(run)) for runs in alike.values() for run in runs]
    return tuple(sorted(found, key=lambda run: position[id(run.segments[0])]))


def checkpoint_text(checkpoint: Sequence[Segment], loss_chunks: int | None = None) -> str:
    """A plan's segments in one line."""
    runs = [f"{run.span} ({run.shape})" for run in segment_runs(checkpoint)]
    if loss_chunks:
        runs.append(f"the loss in {loss_chunks} chunks")
    return "; ".join(runs) or "nothing recomputed"


def _continues(run: Sequence[Segment], segment: Segment) -> bool:
    """Whether one number alone grows: by one for single stages, else by the run's own step."""
    step = _step(run[-1], segment)
    if step is None:
        return False
    if len(run) > 1:
        return step == _step(run[-2], run[-1])
    return max(step) == 1 or segment.first != segment.last


def _step(before: Segment, after: Segment) -> tuple[int, ...] | None:
    """By how much each number of the first stage's name grows; None unless one does and no other changes."""
    steps = tuple(b - a for a, b in zip(_numbers(before.first), _numbers(after.first), strict=True))
    return steps if sorted(steps)[:-1] == [0] * (len(steps) - 1) and max(steps, default=0) > 0 else None


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def alike(names: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Stages alike but for numbers in their names, ``h.*.mlp``: what to call them, and where in the chain they are."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(_pattern(name), []).append(index)
    return tuple(
        (_group_name(pattern, names[members[0]], names[members[-1]]), tuple(members))
        for pattern, members in groups.items()
    )


def _group_name(pattern: str, first: str, last: str) -> str:
    """The pattern, unless it says nothing: for a single stage, and where names are all numbers."""
    if first == last:
        return first
    return pattern if re.search("[a-z]", pattern, re.IGNORECASE) else f"{first} .. {last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageGroup:
    """Stages alike but for numbers in their names, ``h.*.mlp``, at one precision and micro-batch size.

    Sums over the stages: seconds of one micro-batch (the backward that adds to gradients), and bytes kept
    for the backward.
    """

    name: str
    count: int
    parameter_count: int
    forward_seconds: float
    backward_seconds: float
    kept_bytes: int


def stage_groups(profile: Profile, precision: Precision) -> tuple[StageGroup, ...]:
    """A profile's stages in few rows, at its largest micro-batch size."""
    measured = profile.at(precision)
    if measured is None:
        raise ValueError(f"The profile must hold the precision asked for, got {precision}.")
    times = measured.wall[-1]
    memories = measured.memory_at(times.micro_batch_size).stages
    return tuple(
        StageGroup(
            name=name,
            count=len(members),
            parameter_count=sum(profile.stages[i].parameter_count for i in members),
            forward_seconds=sum(times.stages[i].forward_seconds for i in members),
            backward_seconds=sum(times.stages[i].backward_later_seconds for i in members),
            kept_bytes=sum(bytes_at(memories[i].hold, times.micro_batch_size) for i in members),
        )
        for name, members in alike([stage.name for stage in profile.stages])
    )

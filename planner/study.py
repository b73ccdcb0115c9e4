"""A search as an Optuna study, so that Optuna's dashboard can show it.

The search itself is exact and does not sample; what it leaves behind is a set of plans, and each becomes one
trial with the predicted step time and peak memory as its two objectives and "fits the budget" as its
constraint:

    placement    position   what it is
    sqrt             -      every sqrt(L) blocks recomputed
    every_block      -      every block recomputed
    plain            -      nothing recomputed
    chosen           -      the plan
    front          0, 1 ..  the trade-off, by rising peak

The first four are enqueued and taken from the queue, as priors that a sampler would start from.

A study holds one plan's search: recording it again adds nothing, and what an interrupted recording left out
is added. The name a study gets by itself ends in the digits of the profile and of the plan, so another
budget, other weights or other precisions make another study; a name that was given and holds something else
is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from planner.explain import budget_for, checkpoint_text, chosen
from planner.plan import Choice, Plan
from planner.storage import open_storage, opened, where
from profiler import records
from profiler.profile_record import PRECISIONS

METRICS = ("step_seconds", "peak_memory_bytes")
PRIORS = ("sqrt", "every_block", "plain", "chosen")
PLAN_SHA256 = "plan_sha256"
"""The user attribute of a study that says whose search it holds."""

NAMED = 12
"""How many studies are named to who asks for one that is not there, the newest."""

PLAN = "plan"
"""That with the plan itself, as its file has it. The dashboard shows the beginning of it."""


def record(plan: Plan, storage_url: str, study_name: str | None = None) -> str:
    """Write the plan's search into a study and return the study's name.

    ValueError when the storage does not open, or when a study of this name holds another search.
    """
    name = study_name or default_name(plan)
    with quiet():
        study = optuna.create_study(
            study_name=name,
            storage=open_storage(storage_url),
            directions=["minimize"] * len(METRICS),
            load_if_exists=True,
        )
        _claim(study, plan, storage_url)
        points = _points(plan)
        missing = [point for point in points if point.key not in _recorded(study)]
        _take_from_queue(study, [point for point in missing if point.placement in PRIORS], points)
        study.add_trials(
            [
                optuna.trial.create_trial(
                    values=point.values,
                    params=point.params,
                    distributions=_distributions(points, point.params),
                    user_attrs=point.attributes,
                    constraints=point.constraints,
                )
                for point in missing
                if point.placement not in PRIORS
            ]
        )
    return name


def keep_plan(study: optuna.Study, plan: Plan) -> None:
    """Make the plan the study's own, in the place of an earlier one."""
    study.set_user_attr(PLAN, msgspec.to_builtins(plan))


def replace_plan(plan: Plan, storage_url: str, study_name: str) -> None:
    """The same for a study of this name."""
    with quiet(), opened(storage_url) as storage:
        keep_plan(optuna.load_study(study_name=study_name, storage=storage), plan)


def plan_of(study_name: str, storage_url: str) -> Plan:
    """The plan of a study. ValueError where there is no such study, or where it holds none."""
    with quiet(), opened(storage_url) as storage:
        names = optuna.get_all_study_names(storage)
        if study_name not in names:
            more = f" and {len(names) - NAMED} older ones" if len(names) > NAMED else ""
            there = f"the studies {', '.join(names[-NAMED:])}{more}" if names else "no study"
            raise ValueError(
                f"{study_name} is neither a plan file nor a study: there is no such file, and {where(storage_url)} "
                f"holds {there}. Give a plan file, the name of a study, or its storage with --storage."
            )
        held = optuna.load_study(study_name=study_name, storage=storage).user_attrs.get(PLAN)
    if held is None:
        raise ValueError(
            f"The study {study_name} holds no plan: an older version wrote it, or something else. Give the plan file, "
            "or make the study again with planner optimize."
        )
    return records.decode(msgspec.json.encode(held), Plan, source=f"the plan in the study {study_name}")


def default_name(plan: Plan) -> str:
    """What was planned, for where, within what, and the first digits of the profile and of the plan."""
    slug = slug_of(plan.model, plan.device.name, plan.global_batch_size, plan.memory_budget_bytes)
    return f"{slug}-{plan.profile_sha256[:8]}-{plan.sha256[:8]}"


def slug_of(model: str, device: str, global_batch_size: int, budget_bytes: int | None) -> str:
    """The part of a study's name that a person reads."""
    within = "no-limit" if budget_bytes is None else f"{budget_bytes / 2**20:.0f}mib"
    words = f"{model} {device} batch {global_batch_size} {within}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """One plan of the search as a trial."""

    placement: str
    position: int | None
    params: dict[str, Any]
    values: tuple[float, float]
    constraints: dict[str, float]
    attributes: dict[str, Any]

    @property
    def key(self) -> tuple[str, int | None]:
        return self.placement, self.position


def _points(plan: Plan) -> list[_Point]:
    baselines = plan.baselines
    priors = (baselines.sqrt, baselines.every_block, baselines.plain, chosen(plan))
    return [
        *(_point(plan, name, None, choice) for name, choice in zip(PRIORS, priors, strict=True)),
        *(_point(plan, "front", position, choice) for position, choice in enumerate(plan.front)),
    ]


def _point(plan: Plan, placement: str, position: int | None, choice: Choice) -> _Point:
    prediction = choice.prediction
    params: dict[str, Any] = {
        "placement": placement,
        "micro_batch_size": choice.micro_batch_size,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "precision": choice.precision,
        "zero_stage": choice.zero_stage,
    }
    if position is not None:
        params["position"] = position
    budget = plan.memory_budget_bytes
    return _Point(
        placement=placement,
        position=position,
        params=params,
        values=(prediction.step_seconds, float(prediction.peak_memory_bytes)),
        constraints={} if budget is None else {"bytes_over_budget": float(budget_for(prediction) - budget)},
        attributes={
            "checkpoint": checkpoint_text(choice.checkpoint, choice.loss_chunks),
            "peak_at": prediction.peak_at,
            "step_parts_seconds": prediction.parts.step_seconds,
            "peak_parts_bytes": prediction.parts.peak_memory_bytes,
            "expected_error": {
                "step_seconds": prediction.error.step_seconds,
                "peak_memory_bytes": prediction.error.peak_memory_bytes,
            },
        },
    )


def _distributions(points: list[_Point], params: dict[str, Any]) -> dict[str, BaseDistribution]:
    """The space that these parameters come from: of numbers, the range that the search's plans span."""
    choices: dict[str, BaseDistribution] = {
        "placement": CategoricalDistribution((*PRIORS, "front")),
        "precision": CategoricalDistribution(PRECISIONS),
        "zero_stage": IntDistribution(0, 3),
    }
    for name in params.keys() - choices.keys():
        values = [point.params[name] for point in points if name in point.params]
        choices[name] = IntDistribution(min(values), max(values))
    return {name: choices[name] for name in params}


def _claim(study: optuna.Study, plan: Plan, storage_url: str) -> None:
    """Make the study this plan's own. ValueError when it is another's."""
    owner = study.user_attrs.get(PLAN_SHA256)
    if owner == plan.sha256:
        if PLAN not in study.user_attrs:
            keep_plan(study, plan)
        return
    if owner is not None or study.get_trials(deepcopy=False):
        held = "other trials" if owner is None else f"that of plan {owner[:8]}"
        raise ValueError(
            f"A study holds the search of one plan, and {study.study_name} holds {held}, not that of plan "
            f"{plan.sha256[:8]}. Give another --study-name, or leave it out."
        )
    study.set_metric_names(list(METRICS))
    study.set_user_attr("model", plan.model)
    study.set_user_attr("device", plan.device.name)
    study.set_user_attr("global_batch_size", plan.global_batch_size)
    study.set_user_attr("memory_budget_bytes", plan.memory_budget_bytes)
    study.set_user_attr("profile_sha256", plan.profile_sha256)
    keep_plan(study, plan)
    study.set_user_attr(PLAN_SHA256, plan.sha256)


def _recorded(study: optuna.Study) -> set[tuple[str, int | None]]:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {(trial.params["placement"], trial.params.get("position")) for trial in complete}


def _take_from_queue(study: optuna.Study, missing: list[_Point], points: list[_Point]) -> None:
    """Enqueue the points, unless they wait already, and complete what waits."""
    for point in missing:
        study.enqueue_trial(point.params, skip_if_exists=True)
    priors = {point.placement: point for point in points if point.placement in PRIORS}
    space = _distributions(points, priors["chosen"].params)
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        trial = study.ask(space)
        point = priors[trial.params["placement"]]
        for key, value in point.attributes.items():
            trial.set_user_attr(key, value)
        for key, value in point.constraints.items():
            trial.set_constraint(key, value)
        study.tell(trial, point.values)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna tells of every trial, and that naming metrics is an experiment; neither is news here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)

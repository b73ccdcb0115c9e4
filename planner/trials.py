"""Real trials of plans, as an Optuna study: for what a model of the cost cannot know.

The search is exact under the model, and the model has errors. So the plans that it thinks best, and others that a
sampler thinks worth a look, are run, each in a process of its own, behind a wall of memory and a time limit:

    ask ──▶ k, precision, ZeRO stage, loss, place on the frontier ──▶ a plan that should fit
    tell ◀── C from the measured time, peak and energy ◀── python -m executor.trial

Asked first are the model's best plan and what one would do by hand; then, in turn, the best plan under the model as the
trials so far correct it, and Optuna's sampler. A plan that is predicted not to fit is never run. Every trial carries
the prediction beside the measurement.

A study may be interrupted at any time, by whatever, and goes on when the same command is given again: a trial whose
process died with its parent is found (it is still called running, by a process that is no more) and run again. Several
processes may work on one study.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import socket
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import optuna
from optuna.trial import FrozenTrial, TrialState

from planner.calibration import Residual
from planner.explain import checkpoint_text, chosen
from planner.outcome import RAN, Outcome, TrialResult
from planner.plan import Choice, Cost, Plan, TrialsSummary
from planner.search import Knobs, Space
from planner.storage import opened
from planner.study import PLAN, keep_plan, quiet, slug_of
from planner.trial_process import STARTING_SECONDS, Ended, TrialTerms, is_alive, myself, run_in_process
from profiler import records

BY_HAND = ("plain", "sqrt", "every_block")
FRONT = "front"

WORTH_CHANGING = 0.02
"""A plan replaces the model's best when it was measured to cost this much less; with less, noise would choose."""

DECIDING_SECONDS = 10.0
"""How long to wait for another process that has asked for a trial to say which plan it will run."""

NOTHING_NEW = 20
"""So many plans in a row that are not worth running: the space is exhausted."""

Progress = Callable[[str], None]


Run = Callable[[Plan, TrialTerms], Ended]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A finished trial of a study."""

    number: int
    placement: str
    choice: Choice
    outcome: Outcome
    cost: float | None
    result: TrialResult | None
    message: str | None

    @property
    def residual(self) -> Residual | None:
        """What this teaches about the device; nothing where it was not measured."""
        result = self.result
        if result is None or result.measured is None or result.steady_error is None:
            return None
        predicted, measured = self.choice.prediction.peak_memory_bytes, result.measured.peak_memory_bytes
        return Residual(
            plan_sha256=result.plan_sha256, step_seconds=result.steady_error,
            peak_memory_bytes=(predicted - measured) / measured,
        )  # fmt: skip


def run_trials(
    space: Space,
    terms: TrialTerms,
    storage_url: str,
    study_name: str | None = None,
    *,
    progress: Progress = lambda message: None,
    run: Run | None = None,
) -> tuple[Plan, list[Tried]]:
    """Run trials until the study has ``terms.trials``; return the best plan and all trials of the study.

    The best plan is the model's, unless another was measured to cost less by more than noise explains. Raises
    NoFeasiblePlan when nothing fits, ValueError for a storage or study that is not to be used.
    """
    plan = space.plan()
    _check(plan, terms)
    name = study_name or default_name(space)
    with quiet(), opened(storage_url) as storage:
        study = optuna.create_study(
            study_name=name, storage=storage, load_if_exists=True, sampler=_sampler(terms)
        )
        _claim(study, space)
        if PLAN not in study.user_attrs:
            keep_plan(study, plan)
        _take_back_the_dead(study, terms, progress)
        _enqueue_priors(study, space, plan)
        worker = _Worker(study, space, terms, run or run_in_process, progress)
        with _stopping_on_sigterm():
            worker.work()
        tried = _tried(study)
        best = _best(space, plan, tried, name)
        keep_plan(study, best)
    return best, tried


def trials_of(storage_url: str, study_name: str) -> list[Tried] | None:
    """The trials of a study, in their order; None where the storage has no such study."""
    with quiet(), opened(storage_url) as storage:
        if study_name not in optuna.get_all_study_names(storage):
            return None
        return _tried(optuna.load_study(study_name=study_name, storage=storage))


def default_name(space: Space) -> str:
    """What is planned, for where, within what, and the first digits of the profile and of the question."""
    profile = space.profile
    slug = slug_of(profile.model, profile.device.name, space.global_batch_size, space.memory_budget_bytes)
    return f"{slug}-{records.sha256(profile)[:8]}-{_question(space)[:8]}-trials"


def _question(space: Space) -> str:
    """What was asked, whatever is known by now about errors: the same for a study that goes on."""
    asked = (
        records.sha256(space.profile), space.global_batch_size, space.world_size, space.memory_budget_bytes,
        space.weights, sorted(map(str, space.candidates())),
    )  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()


def _check(plan: Plan, terms: TrialTerms) -> None:
    if terms.trials < 1:
        raise ValueError(f"--trials must be at least 1 to run any, got {terms.trials}.")
    if terms.steps < 1:
        raise ValueError(f"--trial-steps must be at least 1, got {terms.steps}.")
    if terms.timeout_seconds is not None and not terms.timeout_seconds > 0:
        raise ValueError(f"--trial-timeout must be positive, got {terms.timeout_seconds:g}.")
    if plan.world_size > 1:
        raise ValueError(
            f"--trials runs plans in one process, and these are for {plan.world_size}. Leave --trials out, or "
            "optimise with --world-size 1."
        )
    if plan.workload is None:
        raise ValueError(
            f"--trials runs plans in processes of their own, which need a workload that has a name; {plan.model} was "
            "profiled from an object in Python. Profile package.module:function."
        )


def _sampler(terms: TrialTerms) -> optuna.samplers.BaseSampler:
    if terms.sampler == "gp":
        return optuna.samplers.GPSampler(seed=terms.seed, n_startup_trials=len(BY_HAND) + 1)
    return optuna.samplers.TPESampler(
        seed=terms.seed, n_startup_trials=len(BY_HAND) + 1, multivariate=True, group=True
    )


QUESTION = "question_sha256"
"""The user attribute of a study that says what was asked."""

AGAIN = "again"
"""That of a trial which runs an interrupted one again: its number."""

WORKER = "worker"
"""That of a trial which says what process runs it. One that failed and has no ``outcome`` was interrupted."""

MEASURED = ("step_seconds", "peak_memory_bytes", "step_joules")


def _claim(study: optuna.Study, space: Space) -> None:
    """Make the study this question's own. ValueError when it is another's."""
    question, held = _question(space), study.user_attrs.get(QUESTION)
    if held == question:
        return
    if held is not None or study.get_trials(deepcopy=False):
        raise ValueError(
            f"A study holds the trials of one question, and {study.study_name} holds others. Give another "
            "--study-name, or leave it out."
        )
    study.set_metric_names(["cost"])
    for key, value in (
        ("model", space.profile.model),
        ("device", space.profile.device.name),
        ("global_batch_size", space.global_batch_size),
        ("memory_budget_bytes", space.memory_budget_bytes),
        ("weights", msgspec.to_builtins(space.weights)),
        (QUESTION, question),
    ):
        study.set_user_attr(key, value)


def _enqueue_priors(study: optuna.Study, space: Space, plan: Plan) -> None:
    knobs = Knobs.of(chosen(plan))
    fitting = space.fitting(knobs)
    place = next(i for i, point in enumerate(fitting) if space.choice(knobs, point[3]) == chosen(plan))
    best = _params(knobs) | {"placement": FRONT, "position": _position(place, len(fitting))}
    by_hand = (
        _params(Knobs.of(getattr(space.baselines, name))) | {"placement": name}
        for name in BY_HAND
    )  # fmt: skip
    for params in (best, *by_hand):
        study.enqueue_trial(params, skip_if_exists=True)


def _params(knobs: Knobs) -> dict[str, Any]:
    return knobs._asdict()


def _position(place: int, length: int) -> float:
    """Where on its frontier a plan lies: 0 is the tightest, 1 the fastest that fits."""
    return 1.0 if length == 1 else place / (length - 1)


class _Worker:
    """Asks, runs and tells until the study has what it should have."""

    def __init__(
        self, study: optuna.Study, space: Space, terms: TrialTerms, run: Run, progress: Progress
    ) -> None:
        self._study = study
        self._space = space
        self._terms = terms
        self._run = run
        self._progress = progress
        self._plan = space.plan()

    def work(self) -> None:
        in_vain = 0
        while in_vain < NOTHING_NEW and self._missing() > 0:
            tried = _tried(self._study)
            if not self._waiting() and len(tried) % 2:
                self._propose(tried)
            trial = self._study.ask()
            placement, choice = self._suggested(trial, tried)
            reason = self._not_worth_running(trial, choice, tried)
            if choice is not None and reason is None:
                in_vain = 0
                self._tell(trial, placement, choice)
            else:
                in_vain += 1
                trial.set_user_attr("not_run", reason)
                if choice is not None:
                    self._constrain(trial, choice.prediction)
                self._study.tell(trial, state=TrialState.PRUNED)

    def _missing(self) -> int:
        return self._terms.trials - sum(map(_counts, self._study.get_trials(deepcopy=False)))

    def _waiting(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _suggested(self, trial: optuna.Trial, tried: list[Tried]) -> tuple[str, Choice | None]:
        space = self._space
        trial.set_user_attr(WORKER, myself())
        placement = trial.suggest_categorical("placement", (FRONT, *BY_HAND))
        wanted = Knobs(
            *(
                trial.suggest_categorical(
                    name, sorted({getattr(k, name) for k in space.candidates()}, key=str)
                )
                for name in Knobs._fields
            )
        )
        if wanted not in space.candidates():
            return placement, None
        if placement != FRONT:
            return placement, self._predicted(trial, space.by_hand(wanted, placement))
        position = trial.suggest_float("position", 0.0, 1.0)
        if wanted not in space.knobs():
            return placement, self._predicted(trial, space.tightest(wanted))
        # The position is a wish: the nearest plan is taken that was not measured yet.
        known = {_key(t.choice) for t in tried}
        fitting = space.fitting(wanted)
        places = sorted(range(len(fitting)), key=lambda i: abs(_position(i, len(fitting)) - position))
        choices = (space.choice(wanted, fitting[place][3]) for place in places)
        first = space.choice(wanted, fitting[places[0]][3])
        choice = next((choice for choice in choices if _key(choice) not in known), first)
        return placement, self._predicted(trial, choice)

    def _predicted(self, trial: optuna.Trial, choice: Choice) -> Choice:
        """Note what a trial's plan is, and is predicted to be."""
        trial.set_user_attr("choice", msgspec.to_builtins(choice))
        trial.set_user_attr("micro_batch_size", choice.micro_batch_size)
        trial.set_user_attr("checkpoint", checkpoint_text(choice.checkpoint, choice.loss_chunks))
        for name in MEASURED:
            trial.set_user_attr(f"predicted_{name}", getattr(choice.prediction, name))
        return choice

    def _not_worth_running(
        self, trial: optuna.Trial, choice: Choice | None, tried: list[Tried]
    ) -> str | None:
        if choice is None:
            return "nothing was profiled with these knobs together"
        if not choice.fits:
            return "predicted not to fit"
        for earlier in tried:
            if _key(earlier.choice) == _key(choice):
                return f"the same plan as trial {earlier.number}"
        for other in self._earlier_ones(trial):
            if _key(msgspec.convert(other.user_attrs["choice"], Choice)) == _key(choice):
                return f"the same plan as trial {other.number}, which runs elsewhere"
        trials = self._study.get_trials(deepcopy=False)
        before = [t for t in trials if t.number < trial.number and _counts(t)]
        if len(before) >= self._terms.trials:
            return "the study has all its trials"
        again = [t for t in trials if t.state is TrialState.WAITING and AGAIN in t.user_attrs]
        if AGAIN not in trial.user_attrs and len(before) + len(again) >= self._terms.trials:
            return f"the last of the study's trials is for trial {again[0].user_attrs[AGAIN]}, which was interrupted"
        return None

    def _earlier_ones(self, trial: optuna.Trial) -> list[FrozenTrial]:
        """The earlier trials that run in other processes, once these have said what they run."""
        deadline = time.monotonic() + DECIDING_SECONDS
        while True:
            running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            earlier = [each for each in running if each.number < trial.number]
            if all("choice" in each.user_attrs for each in earlier) or time.monotonic() > deadline:
                return [each for each in earlier if "choice" in each.user_attrs]
            time.sleep(0.05)

    def _propose(self, tried: list[Tried]) -> None:
        """Enqueue the best plan under the model as the trials correct it, first of knobs that none has tried."""
        space = self._space
        corrections = _Corrections(tried)
        known = {_key(t.choice) for t in tried}
        seen = {Knobs.of(t.choice) for t in tried if t.placement == FRONT}
        best: tuple[bool, float, Knobs, int] | None = None
        for knobs in space.knobs():
            fitting = space.fitting(knobs)
            slower = corrections.of(knobs)
            order = sorted(range(len(fitting)), key=lambda i: self._corrected_cost(fitting[i], slower))
            place = next((i for i in order if _key(space.choice(knobs, fitting[i][3])) not in known), None)
            if place is None:
                continue
            rank = (knobs in seen, self._corrected_cost(fitting[place], slower))
            if best is None or rank < best[:2]:
                best = (*rank, knobs, place)
        if best is not None:
            _, _, knobs, place = best
            position = _position(place, len(space.fitting(knobs)))
            self._study.enqueue_trial(_params(knobs) | {"placement": FRONT, "position": position})

    def _corrected_cost(self, point: tuple[float, int, float | None, int], slower: float) -> float:
        seconds, peak, joules, _ = point
        return self._space.cost(
            Cost(
                step_seconds=slower * seconds, step_cpu_seconds=None, peak_memory_bytes=peak,
                peak_reserved_bytes=None, step_joules=joules,
            )
        )  # fmt: skip

    def _tell(self, trial: optuna.Trial, placement: str, choice: Choice) -> None:
        of = self._terms.trials
        done = sum(map(_counts, self._study.get_trials(deepcopy=False)))
        words = f"trial {done} of {of}: {description(placement, choice)}"
        self._progress(words)
        plan = self._space.instead(self._plan, choice)
        ended = None
        try:
            ended = self._run(plan, self._terms)
        finally:
            if ended is None:
                self._study.tell(trial, state=TrialState.FAIL)
                self._study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
        trial.set_user_attr("outcome", ended.outcome)
        if ended.message is not None:
            trial.set_user_attr("message", ended.message)
        if ended.result is None or ended.result.measured is None:
            self._constrain(trial, choice.prediction)
            self._study.tell(trial, state=TrialState.FAIL)
            self._progress(f"{words}: {ended.outcome.replace('_', ' ')}")
            return
        measured = ended.result.measured
        trial.set_user_attr("result", msgspec.to_builtins(ended.result))
        for name in MEASURED:
            trial.set_user_attr(f"measured_{name}", getattr(measured, name))
        self._constrain(trial, measured)
        self._study.tell(trial, measured_cost(self._space, choice, ended.result))
        error = ended.result.steady_error
        self._progress(
            f"{words}: {measured.step_seconds:.3g} s"
            + ("" if error is None else f" ({error:+.1%})")
            + f", {measured.peak_memory_bytes / 2**20:,.1f} MiB"
        )

    def _constrain(self, trial: optuna.Trial, cost: Cost) -> None:
        """Memory is a limit: positive is over it."""
        budget = self._space.memory_budget_bytes
        if budget is not None:
            trial.set_constraint("bytes_over_budget", float(cost.peak_memory_bytes - budget))


def measured_cost(space: Space, choice: Choice, result: TrialResult) -> float:
    """C of what a trial measured, its time taken at the speed that the device had in the profile.

    Where watts were stated and no counter tells joules, these are what the stated watts draw in the measured time.
    """
    assert result.measured is not None
    assert result.steady_seconds is not None
    reference, predicted = space.baselines.plain.prediction, choice.prediction
    steady = result.steady_seconds / reference.steady_seconds * reference.step_seconds
    joules = result.measured.step_joules
    if joules is None and predicted.step_joules is not None:
        joules = predicted.step_joules * result.steady_seconds / predicted.steady_seconds
    return space.cost(msgspec.structs.replace(result.measured, step_seconds=steady, step_joules=joules))


def description(placement: str, choice: Choice) -> str:
    """A trial in a few words."""
    b, k = choice.micro_batch_size, choice.gradient_accumulation_steps
    where = "" if placement == FRONT else f" ({placement.replace('_', ' ')})"
    return f"{b} x {k}, {choice.precision}, {_short(choice)}{where}"


def _short(choice: Choice) -> str:
    count = len(choice.checkpoint)
    text = "nothing recomputed" if not count else f"{count} segment{'s' if count > 1 else ''}"
    return text + (f", loss in {choice.loss_chunks} chunks" if choice.loss_chunks else "")


class _Corrections:
    """How many times as long steps took as was predicted: of these knobs, or of all where none of theirs ran."""

    def __init__(self, tried: list[Tried]) -> None:
        ratios: dict[Knobs, list[float]] = defaultdict(list)
        for each in tried:
            if each.result is not None and each.result.steady_error is not None:
                ratios[Knobs.of(each.choice)].append(-math.log1p(each.result.steady_error))
        self._of = {knobs: math.exp(statistics.mean(found)) for knobs, found in ratios.items()}
        everything = [ratio for found in ratios.values() for ratio in found]
        self._otherwise = math.exp(statistics.mean(everything)) if everything else 1.0

    def of(self, knobs: Knobs) -> float:
        return self._of.get(knobs, self._otherwise)


def _key(choice: Choice) -> str:
    """Two choices with the same key run the same plan."""
    return str((Knobs.of(choice), choice.micro_batch_size, msgspec.json.encode(choice.checkpoint)))


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that were asked for: it runs or ran."""
    if trial.state is TrialState.RUNNING:
        return True
    return trial.user_attrs.get("outcome") in RAN


def _tried(study: optuna.Study) -> list[Tried]:
    """The study's trials that ran, in their order."""
    return [
        Tried(
            number=trial.number,
            placement=trial.params["placement"],
            choice=msgspec.convert(trial.user_attrs["choice"], Choice),
            outcome=trial.user_attrs["outcome"],
            cost=trial.value if trial.state is TrialState.COMPLETE else None,
            result=msgspec.convert(result, TrialResult)
            if (result := trial.user_attrs.get("result"))
            else None,
            message=trial.user_attrs.get("message"),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and _counts(trial)
    ]


def _best(space: Space, plan: Plan, tried: list[Tried], study_name: str) -> Plan:
    """The model's best plan, unless trials say otherwise."""
    budget = space.memory_budget_bytes

    def measured_cost_of(each: Tried | None) -> float:
        if each is None or each.cost is None or each.result is None or each.result.measured is None:
            return math.inf
        within = budget is None or each.result.measured.peak_memory_bytes <= budget
        return each.cost if within else math.inf

    own = next((each for each in tried if _key(each.choice) == _key(chosen(plan))), None)
    best = min(tried, key=measured_cost_of, default=None)
    taken = own
    enough = (1 - WORTH_CHANGING) * measured_cost_of(
        own
    )  # Infinite where it was not measured within the budget.
    if own is not None and best is not None and measured_cost_of(best) < enough:
        taken = best
        plan = space.instead(plan, best.choice)
    found = None if taken is None else taken.result
    own_cost = measured_cost_of(own)
    saved = 1 - measured_cost_of(taken) / own_cost if math.isfinite(own_cost) else None
    return msgspec.structs.replace(
        plan,
        trials=TrialsSummary(
            study=study_name,
            outcomes=dict(Counter(each.outcome for each in tried)),
            measured=None if found is None else found.measured,
            steady_error=None if found is None else found.steady_error,
            saved_by_trials=saved,
        ),
    )


def _take_back_the_dead(study: optuna.Study, terms: TrialTerms, progress: Progress) -> None:
    """Trials that nobody runs any more are told so, and wait to be run again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get(WORKER)
        if worker is None or worker["host"] != socket.gethostname():
            choice = trial.user_attrs.get("choice")
            limit = terms.time_limit(msgspec.convert(choice, Choice)) if choice else STARTING_SECONDS
            if trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() < 2 * limit:
                continue
        elif is_alive(worker):
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
        progress(f"trial {trial.number} was interrupted and is run again")


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a trial as Ctrl-C does: the study says that it was interrupted."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

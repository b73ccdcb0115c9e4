"""Train with a plan: what a run is made from, and what is left of it.

    output directory
      metrics.jsonl        one line a step                                executor/metrics.py
      tensorboard/         the same for TensorBoard
      checkpoints/         the newest states, to go on from               executor/snapshots.py
      model.safetensors    the weights at the end
      report.json          what was predicted, and what was measured

The loop itself is executor/run.py. Learning rate: linear warm-up over the first 5% of the samples, then cosine to zero.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import ClassVar, Final

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from executor import data as training_data
from executor import snapshots
from executor.accumulation import AdaptiveAccumulation
from executor.data import TrainingData
from executor.learning_rate import LearningRate, Scaling, Schedule
from executor.metrics import Metrics
from executor.order import OwnBatches, check_size
from executor.prefetch import AHEAD, batches_ahead
from executor.run import Evaluation, Progress, Run, Terms
from executor.stopping import Target, listening
from executor.verification import build_workload, device_here, device_of
from planner.plan import Cost, Plan
from planner.sizes import size_text
from profiler import catalogue, records
from profiler.pretend import pretending
from profiler.records import Document, Record
from profiler.registry import seeded
from profiler.step import build_optimizer
from profiler.workload import Workload

__all__ = ["Progress", "Reached", "TrainingReport", "train"]

DEFAULT_STEPS: Final = 20
STEPS_TO_A_TARGET: Final = 1000
"""At most, for a run that is to reach a target and was given no length."""

EVALUATIONS_OF_A_RUN: Final = 20
"""On the way to a target, where it was not said how often."""

REPORT: Final = "report.json"
CHECKPOINTS: Final = "checkpoints"
WEIGHTS: Final = "model.safetensors"


class Reached(Record):
    """The target of a run: its value at the last evaluation, and how long it took. None: it was not reached."""

    target: str
    value: float | None
    step: int | None
    samples: int | None
    seconds: float | None


class TrainingReport(Document, tag="training_report"):
    """What a run did, over all processes that it was killed in and resumed by.

    ``final_loss`` is the mean loss of the last step's micro-batches. ``predicted`` is of the plan that the run ended
    with: see ``fallbacks``. ``skipped_steps`` updated nothing, because gradients overflowed or were not finite.
    ``waiting_share``: of the time, that steps waited for data. ``model_flops_per_second``: of forward passes and twice
    as much for backward, without what is recomputed (Chowdhery et al. 2022, appendix B); ``model_flops_utilisation``
    in terms of what the device's maker states.
    """

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    plan_sha256: str
    model: str
    data: str
    steps: int
    samples: int
    first_loss: float
    final_loss: float
    seconds: float
    samples_per_second: float
    predicted: Cost
    measured: Cost
    gradient_accumulation_steps: int = 1
    skipped_steps: int = 0
    loss_scale: float | None = None
    noise_scale_samples: float | None = None
    waiting_share: float | None = None
    model_flops_per_second: float | None = None
    model_flops_utilisation: float | None = None
    evaluations: tuple[Evaluation, ...] = ()
    reached: Reached | None = None
    fallbacks: tuple[str, ...] = ()
    resumed_after_steps: tuple[int, ...] = ()


def train(
    plan: Plan,
    data: Path | str | None = None,
    output_dir: Path | str | None = None,
    *,
    workload: Workload | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 1e-4,
    schedule: Schedule = "cosine",
    scaling: Scaling = "linear",
    seed: int = 0,
    save_every: int | None = None,
    keep: int = snapshots.KEPT,
    resume: bool = False,
    until: Target | str | None = None,
    evaluate_every: int | None = None,
    adaptive: AdaptiveAccumulation | None = None,
    progress: Progress | None = None,
) -> TrainingReport:
    """Train the plan's model for ``steps`` optimizer steps or ``epochs`` passes over the data, or ``until`` a target.

    ``data`` is a folder or file; without it the built-in workloads use data that every machine has. ``save_every``
    steps, or every ten minutes, the state goes to ``output_dir/checkpoints``, of which the newest ``keep`` stay.
    ``resume`` goes on from the newest whole one, or begins where there is none. ``until`` is like ``accuracy=0.85``, on
    data held out, looked at every ``evaluate_every`` steps. ``adaptive``: the micro-batches of a step follow the noise
    of the gradient, and ``scaling`` says how the learning rate follows them; the length of the run, in samples, stays.

    SIGTERM and SIGINT end the run after the step that is running, with its state saved. Raises ValueError for
    contradictory arguments and bad data, PlanDoesNotFit for another device and for checkpoints of another run,
    Interrupted after a signal, NotFinite for a run that diverged, OutOfMemory where no plan of the front is left.

    A plan for several processes is trained by as many, each of which has called ``executor.distributed.join`` and then
    this, with the same arguments; ``planner train`` starts them.
    """
    target = Target.parse(until) if isinstance(until, str) else until
    _check_arguments(steps, epochs, save_every, evaluate_every, keep)
    directory = None if output_dir is None else Path(output_dir)
    if resume and directory is None:
        raise ValueError("--resume needs the folder of the run that it goes on with. Give --output-dir.")
    several = torch.distributed.is_initialized()
    device = device_here(plan) if several else device_of(plan)
    workload = workload or build_workload(plan)
    source = _load(plan, workload, data)
    check_size(source.dataset, plan.global_batch_size)
    if (target is not None or evaluate_every is not None) and source.evaluation is None:
        raise ValueError(
            f"--until and --evaluate-every need data that is held out, and {source.description} has none. "
            "Leave them out."
        )
    count = steps or _steps_of(source, plan, epochs, target)
    terms = Terms(
        total_samples=count * plan.global_batch_size,
        seed=seed,
        learning_rate=LearningRate(
            peak=learning_rate,
            total_samples=count * plan.global_batch_size,
            reference_batch_size=plan.global_batch_size,
            scaling=scaling,
            schedule=schedule,
        ),
        save_every=save_every,
        keep=keep,
        evaluate_every=_evaluations(evaluate_every, target, count),
        until=target,
        adaptive=adaptive,
    )
    if directory is not None:
        _prepare(directory, resume)
        if several:
            torch.distributed.barrier()  # Nobody writes checkpoints before all have seen that there are none.
    progress = progress or Progress()
    flops = _model_flops_per_sample(workload, plan)
    with seeded(seed), contextlib.ExitStack() as stack:
        model = workload.model.to(device).train()
        listed = catalogue.titled(plan.device.name)
        run = Run(
            plan,
            workload,
            build_optimizer(plan.optimizer, model, learning_rate=learning_rate),
            source,
            terms,
            device=device,
            directory=None if directory is None else directory / CHECKPOINTS,
            identity=_identity(plan, model, source, terms),
            progress=progress,
            model_flops_per_sample=flops,
            peak_flops_per_second=None if listed is None else listed.flops_per_second(plan.precision),
        )
        stack.callback(run.close)
        if resume:
            run.resume()
        progress.begins(source.description, run.steps_in_all)
        if not isinstance(source.dataset, OwnBatches) and (ahead := batches_ahead(plan)) < AHEAD:
            progress.announced(
                f"batches prepared ahead: {ahead} instead of {AHEAD}, as many as the memory budget of "
                f"{size_text(plan.memory_budget_bytes or 0)} has room for beside the plan's peak"
            )
        metrics = None
        if directory is not None and run.engine.is_first:
            metrics = stack.enter_context(contextlib.closing(Metrics(directory, run.state.step)))
        run.go(stack.enter_context(listening()), metrics)
        report = _report(plan, run, source, terms)
        weights = None if directory is None else run.engine.whole_weights()
    if directory is not None and weights is not None:
        _write_weights(directory / WEIGHTS, weights)
        records.write(directory / REPORT, report)
    return report


def _evaluations(every: int | None, target: Target | None, steps: int) -> int | None:
    """Steps between two evaluations; None for none."""
    return max(1, steps // EVALUATIONS_OF_A_RUN) if every is None and target is not None else every


def _check_arguments(
    steps: int | None, epochs: int | None, save_every: int | None, evaluate_every: int | None, keep: int
) -> None:
    if steps is not None and epochs is not None:
        raise ValueError("--steps and --epochs contradict each other: give one of them.")
    counts = {
        "--steps": steps, "--epochs": epochs, "--save-every": save_every, "--evaluate-every": evaluate_every,
        "--keep": keep,
    }  # fmt: skip
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}.")


def _prepare(directory: Path, resume: bool) -> None:
    """Make the folder. Raises ValueError rather than write over the states of another run."""
    if not resume and snapshots.steps_kept(directory / CHECKPOINTS):
        raise ValueError(
            f"--output-dir {directory} holds checkpoints of a run, and a new one must not write over them. "
            "--resume goes on with it; else give another folder or remove this one."
        )
    directory.mkdir(parents=True, exist_ok=True)


def _identity(plan: Plan, model: torch.nn.Module, source: TrainingData, terms: Terms) -> dict[str, str]:
    """What two processes must have in common to be of one run. The length may differ: a run may be made longer."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    rate = terms.learning_rate
    return {
        "plan": plan.sha256[:16],
        "model": f"{type(model).__name__} {digest.hexdigest()[:16]}",
        "data": source.description,
        "seed": str(terms.seed),
        "learning rate": f"{rate.peak!r} {rate.schedule} {rate.scaling}",
        "adaptive": repr(terms.adaptive),
        "processes": str(plan.world_size),
    }


def _load(plan: Plan, workload: Workload, data: Path | str | None) -> TrainingData:
    if plan.workload is None:
        if data is not None:
            raise ValueError(
                f"--data needs a plan that names its workload, and that for {plan.model} was made from an object. "
                "Leave it out, or use executor.prepare in your own loop."
            )
        return TrainingData(
            description=f"batches that {plan.model} makes itself", dataset=OwnBatches(batch=workload.batch)
        )
    return training_data.load(plan.workload, workload, None if data is None else Path(data))


def _steps_of(source: TrainingData, plan: Plan, epochs: int | None, target: Target | None = None) -> int:
    if epochs is None:
        return DEFAULT_STEPS if target is None else STEPS_TO_A_TARGET
    if isinstance(source.dataset, OwnBatches):
        raise ValueError(
            f"--epochs needs data of a known length, and {source.description} has none. Give --steps."
        )
    return epochs * (len(source.dataset) // plan.global_batch_size)


def _model_flops_per_sample(workload: Workload, plan: Plan) -> float:
    """Of a forward pass and twice as much for backward, counted on shapes alone."""
    size = plan.micro_batch_size
    with (
        seeded(0),
        pretending(workload.model, [workload.batch(size)]) as (batch,),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        workload.loss(workload.model, batch)
    return 3.0 * float(counter.get_total_flops()) / size


def _report(plan: Plan, run: Run, source: TrainingData, terms: Terms) -> TrainingReport:
    state, used = run.state, run.plan
    if state.loss is None or state.first_loss is None or state.peak_bytes is None:
        raise AssertionError("a run has at least one step")
    cpu = plan.device.kind == "cpu"
    wall_seconds, cpu_seconds = state.steady_seconds()
    samples_per_second = used.global_batch_size / wall_seconds
    if terms.adaptive is not None:
        samples_per_second = state.samples / state.seconds
    return TrainingReport(
        plan_sha256=plan.sha256,
        model=plan.model,
        data=source.description,
        steps=state.step,
        samples=state.samples,
        first_loss=state.first_loss,
        final_loss=state.loss,
        seconds=state.seconds,
        samples_per_second=samples_per_second,
        predicted=Cost(**{name: getattr(used.prediction, name) for name in Cost.__struct_fields__}),
        measured=Cost(
            step_seconds=wall_seconds,
            step_cpu_seconds=cpu_seconds if cpu else None,
            peak_memory_bytes=state.peak_bytes,
            peak_reserved_bytes=None if cpu else torch.cuda.max_memory_reserved(),
            step_joules=state.joules / state.step if run.measures_energy else None,
        ),
        gradient_accumulation_steps=state.gradient_accumulation_steps,
        skipped_steps=state.watch.skipped,
        loss_scale=run.loss_scale,
        noise_scale_samples=state.noise_scale_samples,
        waiting_share=state.waiting_seconds / state.seconds if state.seconds else None,
        model_flops_per_second=run.model_flops_per_second(samples_per_second),
        model_flops_utilisation=run.model_flops_utilisation(samples_per_second),
        evaluations=tuple(state.evaluations),
        reached=None if terms.until is None else _reached(terms.until, state.evaluations),
        fallbacks=tuple(state.fallbacks),
        resumed_after_steps=tuple(state.resumed_from),
    )


def _reached(target: Target, evaluations: list[Evaluation]) -> Reached:
    hit = next((each for each in evaluations if target.is_reached(each.value)), None)
    last = evaluations[-1].value if evaluations else None
    if hit is None:
        return Reached(target=str(target), value=last, step=None, samples=None, seconds=None)
    return Reached(
        target=str(target), value=hit.value, step=hit.step, samples=hit.samples, seconds=hit.seconds
    )


def _write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Train with a plan: data, schedule, metrics, report.

Learning rate: linear warm-up over the first 5% of the run, then cosine to zero. Metrics go to ``metrics.jsonl``
in the output directory, one line a step; the report and the final weights follow at the end.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_model

from executor.data import TrainingData, batches, load
from executor.engine import PreparedStep, prepare
from executor.verification import Clocks, build_workload, device_of, measured_peak
from planner.plan import Cost, Plan
from profiler import records
from profiler.records import Document
from profiler.registry import seeded
from profiler.step import build_optimizer
from profiler.workload import Workload

WARM_UP_SHARE = 0.05
DEFAULT_STEPS = 20
METERED_STEP = 1
"""The second step runs under the memory meter on a CPU: the optimizer's state exists by then."""


class Progress:
    """Told what a run is doing. The base class says nothing."""

    def begins(self, data: str, steps: int) -> None: ...

    def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None: ...


class TrainingReport(Document, tag="training_report"):
    """What a run did. ``final_loss`` is the mean loss of the last step's micro-batches."""

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


def train(
    plan: Plan,
    data: Path | str | None = None,
    output_dir: Path | str | None = None,
    *,
    workload: Workload | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Train the plan's model for ``steps`` optimizer steps or ``epochs`` passes over the data.

    ``data`` is a folder of text for language models; without it the built-in workloads use data that every
    machine has. Raises ValueError for contradictory arguments and bad data, PlanDoesNotFit for another device.
    """
    if steps is not None and epochs is not None:
        raise ValueError("--steps and --epochs contradict each other: give one of them.")
    for flag, value in (("--steps", steps), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}.")
    device = device_of(plan)
    workload = workload or build_workload(plan)
    source = _load(plan, workload, data)
    count = steps or _steps_of(source, plan, epochs)
    directory = None if output_dir is None else Path(output_dir)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    model = workload.model.to(device).train()
    optimizer = build_optimizer(plan.optimizer, model, learning_rate=learning_rate)
    schedule = warm_up_and_cosine(optimizer, count)
    step = prepare(model, optimizer, plan, workload.loss)
    progress = progress or Progress()
    progress.begins(source.description, count)
    run = _Run(plan, device, directory, metered=min(METERED_STEP, count - 1))
    stream = batches(source.dataset, plan.global_batch_size, seed)
    try:
        with seeded(seed):
            for index in range(count):
                loss = run.step(index, step, next(stream), optimizer.param_groups[0]["lr"])
                schedule.step()
                progress.stepped(index + 1, count, loss, plan.global_batch_size / run.clocks.wall[-1])
    finally:
        step.remove()
    report = run.report(source)
    if directory is not None:
        save_model(model, str(directory / "model.safetensors"))
        records.write(directory / "report.json", report)
    return report


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over the first 5% of the steps, then cosine to zero."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warm_up))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warm_up])


def _load(plan: Plan, workload: Workload, data: Path | str | None) -> TrainingData:
    if plan.workload is None:
        raise ValueError(
            f"The plan for {plan.model} names no workload to load data for. Use executor.prepare in your own loop."
        )
    return load(plan.workload, workload, None if data is None else Path(data))


def _steps_of(source: TrainingData, plan: Plan, epochs: int | None) -> int:
    if epochs is None:
        return DEFAULT_STEPS
    try:
        samples = len(source.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"--epochs needs data of a known length, and {source.description} has none. Give --steps."
        ) from None
    if samples < plan.global_batch_size:
        raise ValueError(
            f"One epoch must hold a global batch of {plan.global_batch_size}, the data has {samples} samples."
        )
    return epochs * (samples // plan.global_batch_size)


class _Run:
    """The measurements of one run as it goes."""

    def __init__(self, plan: Plan, device: torch.device, directory: Path | None, metered: int) -> None:
        self.clocks = Clocks()
        self._plan = plan
        self._device = device
        self._directory = directory
        self._losses: list[float] = []
        self._metered = metered
        self._peak_bytes = 0
        self._began = time.perf_counter()
        if directory is not None:
            (directory / "metrics.jsonl").write_text("")

    def step(self, index: int, step: PreparedStep, batch: Any, learning_rate: float) -> float:
        with self.clocks.timing(self._device):
            if index == self._metered and self._device.type == "cpu":
                value = self._metered_step(step, batch)
            else:
                value = step(batch)
        loss = float(value)
        self._losses.append(loss)
        self._log(index, loss, learning_rate)
        return loss

    def _metered_step(self, step: PreparedStep, batch: Any) -> torch.Tensor:
        peak, value = measured_peak(step, self._plan, batch, self._device)
        self._peak_bytes = peak.peak_bytes
        return value

    def _log(self, index: int, loss: float, learning_rate: float) -> None:
        if self._directory is None:
            return
        line = {
            "step": index + 1,
            "samples": (index + 1) * self._plan.global_batch_size,
            "loss": loss,
            "learning_rate": learning_rate,
            "step_seconds": self.clocks.wall[-1],
        }
        with (self._directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def report(self, source: TrainingData) -> TrainingReport:
        plan, count = self._plan, len(self._losses)
        steady = [i for i in range(1, count) if i != self._metered] or [0]
        peak, reserved = self._peak_bytes, None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        step_seconds = statistics.mean(self.clocks.wall[i] for i in steady)
        cpu_seconds = statistics.mean(self.clocks.cpu[i] for i in steady)
        return TrainingReport(
            plan_sha256=plan.sha256,
            model=plan.model,
            data=source.description,
            steps=count,
            samples=count * plan.global_batch_size,
            first_loss=self._losses[0],
            final_loss=self._losses[-1],
            seconds=time.perf_counter() - self._began,
            samples_per_second=plan.global_batch_size / step_seconds,
            predicted=Cost(**{name: getattr(plan.prediction, name) for name in Cost.__struct_fields__}),
            measured=Cost(
                step_seconds=step_seconds,
                step_cpu_seconds=cpu_seconds if self._device.type == "cpu" else None,
                peak_memory_bytes=peak,
                peak_reserved_bytes=reserved,
                step_joules=None,
            ),
        )

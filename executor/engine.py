"""Run a plan on a model: one process, PyTorch alone.

``prepare`` turns an existing loop into the planned one without changing its shape:

    step = executor.prepare(model, optimizer, plan, loss=loss)
    for batch in loader:                 # one global batch, or an iterable of its micro-batches
        value = step(batch)              # k micro-batches, autocast, recomputed segments, clipping, update
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from executor.errors import PlanDoesNotFit
from executor.recompute import Checkpoints, Stretch, nest
from planner.plan import Plan
from profiler.chain import Call
from profiler.chunked import ChunkedLoss, ChunkedLossError
from profiler.device import keep_freed_memory
from profiler.step import SILENT, Loss, StepObserver, Stepper, build_scaler
from profiler.timing import to_device
from profiler.workload import split


def check_one_process(plan: Plan) -> None:
    """Raise PlanDoesNotFit for a plan of several processes, which one process would run with too small a batch."""
    if plan.world_size > 1:
        raise PlanDoesNotFit(
            f"The plan for {plan.model} is for {plan.world_size} processes, and this runs one. Use "
            "executor.distributed under torchrun, or optimise with --world-size 1."
        )


def apply_checkpoints(model: nn.Module, plan: Plan) -> Checkpoints:
    """Put the plan's recomputed segments on the model; ``remove()`` of what is returned takes them off.

    Raises PlanDoesNotFit, before anything changes, when the model has not the modules that the plan names.
    """
    modules = {name for name, _ in model.named_modules()}
    stretches = []
    for segment in plan.checkpoint:
        stretch = Stretch(
            Call.parse(segment.enter),
            Call.parse(segment.leave),
            keeping=None if segment.mode == "recompute" else segment.mode,
        )
        for call in (stretch.enter, stretch.leave):
            if call is not None and call.module not in modules:
                raise PlanDoesNotFit(
                    f"The plan for {plan.model} recomputes a segment at module {call.module!r}, which "
                    f"{type(model).__name__} has not. Profile and optimise this model."
                )
        stretches.append((segment.depth, stretch))
    chunked = None
    if plan.loss_chunks is not None:
        try:
            chunked = ChunkedLoss(model, plan.loss_chunks)
        except ChunkedLossError as error:
            raise PlanDoesNotFit(f"The plan for {plan.model} has the loss in chunks. {error}") from error
    return Checkpoints(model, nest(stretches), chunked)


class PreparedStep:
    """One planned optimizer step at a call; see ``prepare``."""

    def __init__(self, stepper: Stepper, plan: Plan, checkpoints: Checkpoints) -> None:
        self.stepper = stepper
        self.checkpoints = checkpoints
        self._plan = plan
        self._device = next(stepper.model.parameters()).device

    def __call__(self, batch: Any, observer: StepObserver = SILENT) -> torch.Tensor:
        """Run one step on a global batch (or an iterable of its micro-batches); return the mean loss, detached.

        Raises ValueError when the batch does not hold ``global_batch_size`` samples.
        """
        k = self._plan.gradient_accumulation_steps
        micro_batches = (
            batch if isinstance(batch, Iterator) else split(batch, self._plan.global_batch_size, k)
        )
        return self.stepper.step((to_device(mb, self._device) for mb in micro_batches), k, observer)

    def remove(self) -> None:
        """Take the plan's segments off the model."""
        self.checkpoints.remove()


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    loss: Loss,
    *,
    max_gradient_norm: float | None = 1.0,
) -> PreparedStep:
    """Make ``step(batch)`` of a plan for a model and optimizer of yours; ``loss(model, micro_batch)`` is a scalar.

    The learning-rate schedule stays yours: step it after ``step``. On a CPU the process keeps freed memory from now
    on, as it did while it was profiled. Raises PlanDoesNotFit for another model's plan.
    """
    check_one_process(plan)
    checkpoints = apply_checkpoints(model, plan)
    device_type = next(model.parameters()).device.type
    if device_type == "cpu":
        keep_freed_memory()
    stepper = Stepper(
        model=model,
        loss=loss,
        optimizer=optimizer,
        precision=plan.precision,
        device_type=device_type,
        scaler=build_scaler(plan.precision, device_type),
        max_gradient_norm=max_gradient_norm,
    )
    return PreparedStep(stepper, plan, checkpoints)

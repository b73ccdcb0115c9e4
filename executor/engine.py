"""Run a plan on a model: one process, PyTorch alone.

``prepare`` turns an existing loop into the planned one without changing its shape:

    step = executor.prepare(model, optimizer, plan, loss=loss)
    for batch in loader:                 # one global batch, or an iterable of its micro-batches
        value = step(batch)              # k micro-batches, autocast, recomputed segments, clipping, update
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from executor import state
from executor.errors import PlanDoesNotFit
from executor.recompute import Checkpoints, Stretch, nest
from executor.state import Tree
from planner.plan import Plan
from profiler.chain import Call
from profiler.chunked import ChunkedLoss, ChunkedLossError
from profiler.freed_memory import FreedMemoryGuard, keep_freed_memory
from profiler.step import Loss, StepObserver, Stepper, build_scaler
from profiler.timing import to_device
from profiler.workload import split


def check_one_process(plan: Plan) -> None:
    """Raise PlanDoesNotFit for a plan of several processes, which one process would run with too small a batch."""
    if plan.world_size > 1:
        raise PlanDoesNotFit(
            f"The plan for {plan.model} is for {plan.world_size} processes, and this is one. planner train and planner "
            "verify start as many; otherwise use executor.distributed under torchrun, or optimise with --world-size 1."
        )


def apply_checkpoints(model: nn.Module, plan: Plan, *, hooked: bool = False) -> Checkpoints:
    """Put the plan's recomputed segments on the model; ``remove()`` of what is returned takes them off.

    ``hooked``: the model has hooks that replace tensors, as ``Checkpoints`` says.

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
    return Checkpoints(model, nest(stretches), chunked, hooked=hooked)


class _Norm(StepObserver):
    """Keeps the gradient norm of the last step, where it was made."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def updated(self, gradient_norm: torch.Tensor | None, applied: bool | None) -> None:
        self.value = gradient_norm


class PreparedStep:
    """One planned optimizer step at a call; see ``prepare``. It is an ``Engine`` (executor/engines.py)."""

    rank = 0
    world_size = 1
    is_first = True

    def __init__(
        self, stepper: Stepper, plan: Plan, checkpoints: Checkpoints, guard: FreedMemoryGuard | None = None
    ) -> None:
        self.stepper = stepper
        self.checkpoints = checkpoints
        self._plan = plan
        self._device = next(stepper.model.parameters()).device
        self._norm = _Norm()
        self._guard = guard

    def __call__(
        self,
        batch: Any,
        observer: StepObserver | None = None,
        gradient_accumulation_steps: int | None = None,
    ) -> torch.Tensor:
        """Run one step on a global batch (or an iterable of its micro-batches); return the mean loss, detached.

        ``gradient_accumulation_steps``: micro-batches of this step, where they are not the plan's; memory is the same.
        Raises ValueError when the batch does not hold as many samples.
        """
        k = gradient_accumulation_steps or self._plan.gradient_accumulation_steps
        micro_batches = (
            batch if isinstance(batch, Iterator) else split(batch, k * self._plan.micro_batch_size, k)
        )
        self._norm.value = None
        on_device = (to_device(mb, self._device) for mb in micro_batches)
        value = self.stepper.step(on_device, k, observer or self._norm)
        if self._guard is not None:
            self._guard.stepped()
        return value

    def step(self, batch: Any) -> torch.Tensor:
        """A call, by the name that all engines have for it."""
        return self(batch)

    @property
    def model(self) -> nn.Module:
        return self.stepper.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.stepper.optimizer

    @property
    def gradient_norm(self) -> float | None:
        """Of the last step, before clipping; None before the first, without clipping, and under an observer."""
        return None if self._norm.value is None else float(self._norm.value)

    @property
    def skipped(self) -> bool | None:
        """Whether the last step changed nothing because scaled fp16 gradients overflowed; None: not known."""
        if self.stepper.scaler is None:
            return False
        norm = self.gradient_norm
        return None if norm is None else not math.isfinite(norm)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """There is one process: its own."""
        return value

    def agree(self, flag: bool) -> bool:
        """There is one process: its own."""
        return flag

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def state(self) -> Tree:
        """Weights, the optimizer's state, and the loss scaler where there is one."""
        scaler = self.stepper.scaler
        return {
            "engine": "torch",
            "weights": dict(state.detached(state.weights(self.model))),
            "optimizer": state.optimizer_tree(self.optimizer.state_dict()),
            "scaler": None if scaler is None else state.plain(scaler.state_dict(), "scaler"),
        }

    def load_state(self, tree: Any) -> None:
        """Go on from a state. ValueError, before anything changes, when it is another model's."""
        scaler = self.stepper.scaler
        state.check_made_by(tree, engine="torch")
        if (scaler is None) != (tree["scaler"] is None):
            raise ValueError(
                f"The state must be of the plan's precision, {self._plan.precision}, and only one of fp16 has a loss "
                "scaler. Resume with the plan that it was saved with."
            )
        state.fill(state.weights(self.model), tree["weights"])
        self.optimizer.load_state_dict(state.optimizer_state_dict(tree["optimizer"]))
        if scaler is not None:
            scaler.load_state_dict(tree["scaler"])

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The model's parameters and buffers, each once, under the first of its names."""
        return state.detached(state.weights(self.model))

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
    skip_not_finite: bool = False,
) -> PreparedStep:
    """Make ``step(batch)`` of a plan for a model and optimizer of yours; ``loss(model, micro_batch)`` is a scalar.

    The learning-rate schedule stays yours: step it after ``step``. ``skip_not_finite``: gradients that are not finite
    update nothing. On a CPU the process keeps freed memory from now on, as it did while it was profiled, unless that
    makes it grow (``FreedMemoryGuard``). Raises PlanDoesNotFit for another model's plan.
    """
    check_one_process(plan)
    checkpoints = apply_checkpoints(model, plan)
    device_type = next(model.parameters()).device.type
    keeps = device_type == "cpu" and keep_freed_memory()
    stepper = Stepper(
        model=model,
        loss=loss,
        optimizer=optimizer,
        precision=plan.precision,
        device_type=device_type,
        scaler=build_scaler(plan.precision, device_type),
        max_gradient_norm=max_gradient_norm,
        skip_not_finite=skip_not_finite,
    )
    return PreparedStep(stepper, plan, checkpoints, FreedMemoryGuard() if keeps else None)

"""What a run loop asks of whatever takes its steps: the same few verbs, and two engines behind them.

    one process       executor.engine.PreparedStep             PyTorch alone
    one of several    executor.distributed.DistributedStep     DeepSpeed, on this process's share of every batch

A loop that knows only these verbs trains under both, and neither asks anywhere how many processes there are:

    engine = engines.prepare(model, optimizer, plan, loss)
    for batch in loader:                                   # this process's share of a global batch
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss = engine.mean(engine.step(batch))             # of all processes
        if engine.agree(stop_was_asked_for):               # by one of them
            break

What says "all processes at once" waits for the others: a process that leaves it out stops all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from executor import distributed, engine
from executor.state import Tree
from planner.plan import Plan
from profiler.step import Loss


class Engine(Protocol):
    """One process's part in planned optimizer steps."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_first(self) -> bool: ...

    @property
    def model(self) -> nn.Module:
        """As the loss calls it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What is written into its ``param_groups`` counts from the next step on."""

    def step(self, batch: Any) -> torch.Tensor:
        """Take one step on this process's samples; the mean loss of its micro-batches, detached, not waited for."""

    @property
    def gradient_norm(self) -> float | None:
        """Of the last step's whole gradient, before clipping; None where there was none. Reading waits for the step."""

    @property
    def skipped(self) -> bool | None:
        """Whether the last step changed nothing because gradients were not finite; None: not known."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar's mean over all processes. All processes at once."""

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. All processes at once."""

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def state(self) -> Tree:
        """All that this process has to remember between two steps. Its tensors are not copies."""

    def load_state(self, tree: Any) -> None:
        """Go on from a state of this rank's, bit for bit. ValueError when it is another's. All processes at once."""

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The whole model's parameters and buffers, each under one name, in the first process; None in the others.

        All processes at once.
        """

    def remove(self) -> None:
        """Take what was put on the model off again."""


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, loss: Loss) -> Engine:
    """The engine of a plan: DeepSpeed for one of several processes, which has joined the others, else PyTorch alone.

    Gradients that are not finite update nothing. Raises PlanDoesNotFit for another model, another number of processes,
    or what DeepSpeed runs otherwise.
    """
    if torch.distributed.is_initialized():
        return distributed.prepare(model, optimizer, plan, loss)
    return engine.prepare(model, optimizer, plan, loss, skip_not_finite=True)

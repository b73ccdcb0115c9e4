"""What is measured, planned for and trained: a model, where its batches come from, and its loss.

Three things say all that a profile has to know of a training job, for any ``torch.nn.Module``:

    batch(size) ──▶ one micro-batch of ``size`` samples, on the CPU
                         │
    model ───────────────┴──▶ loss(model, batch) ──▶ a scalar to call ``backward`` on

A batch is a tensor, or dicts, lists and tuples of tensors nested as the loss wants them, with the samples
along the first dimension of each. The profiler calls ``batch`` with several sizes and never looks at the
values, so random ones will do; it relies on the same size giving the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """A model with its batches and its loss; ``loss(model, batch(n))`` is a forward pass of n samples.

    ``name`` is what reports call it; ``label`` falls back on the name of the model's class.
    """

    model: torch.nn.Module
    batch: Callable[[int], Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_found(self.model)}.")
        for argument, call in (("batch", "batch(size)"), ("loss", "loss(model, batch)")):
            value = getattr(self, argument)
            if not callable(value):
                raise TypeError(
                    f"{argument} must be callable as {call}, got {_found(value)}. "
                    f"Give a function or a lambda."
                )
        parameters = list(self.model.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                f"model must have a parameter to train, got {type(self.model).__name__} with "
                f"{len(parameters)} parameters, none of which requires a gradient. "
                f"Unfreeze what is to be trained."
            )

    @property
    def label(self) -> str:
        return self.name or type(self.model).__name__


def _found(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself (call it: {value.__name__}(...))"
    return type(value).__name__

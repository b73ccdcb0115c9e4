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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """A model with its batches and its loss; ``loss(model, batch(n))`` is a forward pass of n samples.

    ``name`` is what reports call it; ``label`` falls back on the name of the model's class. ``longest_batch(n)`` is
    the largest batch of n samples that can come (the longest sequences), where sizes differ: memory is planned for
    it, time for ``batch``.
    """

    model: torch.nn.Module
    batch: Callable[[int], Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    name: str = ""
    longest_batch: Callable[[int], Any] | None = None

    def worst_batch(self, size: int) -> Any:
        """The batch of ``size`` samples that needs the most memory."""
        return (self.longest_batch or self.batch)(size)

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


def split(batch: Any, global_batch_size: int, gradient_accumulation_steps: int) -> Sequence[Any]:
    """Cut a global batch into micro-batches along the first dimension of every tensor in it."""
    leaves, shape = tree_flatten(batch)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
    if sizes != {global_batch_size}:
        raise ValueError(
            f"A step takes a batch of global_batch_size = {global_batch_size} samples in the first dimension of every "
            f"tensor, got {', '.join(map(str, sorted(sizes))) or 'no tensors'}. Drop the last, ragged batch."
        )
    size = global_batch_size // gradient_accumulation_steps

    def piece(leaf: Any, index: int) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf[index * size : (index + 1) * size]
        return leaf

    return [
        tree_unflatten([piece(leaf, index) for leaf in leaves], shape)
        for index in range(gradient_accumulation_steps)
    ]


def _found(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself (call it: {value.__name__}(...))"
    return type(value).__name__

"""``planner.auto_checkpoint``: one line between a model that does not fit and one that does.

    model, checkpointed = planner.auto_checkpoint(model, batch, memory_budget="8GB")

The model is profiled for this batch without running a step of it (profiler/unmeasured.py), the fastest placement within
the budget is found, and its segments are put on the model, whose ``state_dict`` stays as it is. The loop around it
needs no change. The budget is for all of a step: parameters, gradients, optimizer state, the batch, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from executor.engine import apply_checkpoints
from executor.recompute import Checkpoints
from planner.explain import checkpoint_text
from planner.plan import Plan
from planner.search import optimize
from planner.sizes import parse_size, size_text
from profiler.profile_record import Precision
from profiler.unmeasured import TRYING_BYTES, profile_unmeasured, target_of
from profiler.workload import Workload

PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}

TRYING_SHARE = 8
"""Operations are tried out that take up to one in so many bytes of the budget."""


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """What was done to a model: ``str()`` says it in a line, ``remove()`` undoes it."""

    plan: Plan
    checkpoints: Checkpoints

    def remove(self) -> None:
        """Take the segments off the model."""
        self.checkpoints.remove()

    def __str__(self) -> str:
        plan, plain = self.plan, self.plan.baselines.plain.prediction
        slower = plan.prediction.step_seconds / plain.step_seconds - 1
        return (
            f"{plan.model}: peak {size_text(plan.prediction.peak_memory_bytes)} "
            f"(at most {plan.prediction.error.peak_memory_bytes:.0%} off) of {size_text(plain.peak_memory_bytes)}, "
            f"about {slower:.0%} slower: {checkpoint_text(plan.checkpoint, plan.loss_chunks)}"
        )


def auto_checkpoint(
    model: nn.Module,
    batch: Any,
    memory_budget: str | int,
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    optimizer: str = "adamw",
    gradient_accumulation_steps: int = 1,
) -> tuple[nn.Module, Checkpointed]:
    """Make training steps on batches like ``batch`` fit into ``memory_budget``, as fast as that allows.

    ``memory_budget``: ``"8GB"``, ``"512MiB"``, bytes, or ``"60%"`` of the peak without recomputation. ``loss(model,
    batch)`` is a scalar; by default the model is called with the batch (a mapping as keywords, a list or tuple as
    arguments) and its ``loss`` is taken, or the mean of its first output. ``optimizer``: the one that is trained with,
    by the names of ``planner profile --optimizer``. Under ``torch.autocast`` the plan is for its precision. Returns the
    model itself and what was done. Raises ``planner.NoFeasiblePlan`` with the tightest plan, ValueError for bad
    arguments; the model is then as it was.
    """
    samples = _samples(batch)
    device = next(model.parameters()).device
    workload = Workload(model=model, batch=lambda size: batch, loss=loss or default_loss)
    precision: Precision = "fp32"
    if torch.is_autocast_enabled(device.type):
        precision = PRECISIONS[torch.get_autocast_dtype(device.type)]
    share, limit_bytes = _budget(memory_budget)
    profile = profile_unmeasured(
        workload, (samples,), (precision,), target_of(str(device), (precision, "fp32")),
        optimizer=optimizer, watts=None, spec=None, progress=lambda message: None, all_precisions=True,
        trying_bytes=min(limit_bytes // TRYING_SHARE, TRYING_BYTES) if limit_bytes else TRYING_BYTES,
    )  # fmt: skip
    # With the loss in chunks a model's outputs have no logits, and somebody's loop may read them.
    precisions = tuple(msgspec.structs.replace(each, chunked_head=None) for each in profile.precisions)
    profile = msgspec.structs.replace(profile, precisions=precisions)
    global_batch_size = samples * gradient_accumulation_steps
    if limit_bytes is None:
        plain = optimize(profile, global_batch_size, precisions=(precision,)).baselines.plain.prediction
        limit_bytes = int(share * plain.peak_memory_bytes)
    plan = optimize(profile, global_batch_size, limit_bytes, precisions=(precision,))
    return model, Checkpointed(plan, apply_checkpoints(model, plan))


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model's own loss on a batch, or the mean of its first output of floats."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple | list):
        output = model(*batch)
    else:
        output = model(batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    floats = (
        leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    first = next(floats, None)
    if first is None:
        raise ValueError(
            f"The model must return a loss or a tensor of floats, got {type(output).__name__}. "
            "Give loss=lambda model, batch: ..."
        )
    return first if first.dim() == 0 else first.mean()


def _samples(batch: Any) -> int:
    """The first dimension of the batch's first tensor."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if first is None:
        raise ValueError(
            f"batch must hold a tensor with its samples in the first dimension, got {type(batch).__name__}."
        )
    return first.shape[0]


def _budget(memory_budget: str | int) -> tuple[float, int | None]:
    """A share of the plain peak, or bytes."""
    if isinstance(memory_budget, int):
        return 1.0, memory_budget
    if not memory_budget.strip().endswith("%"):
        return 1.0, parse_size(memory_budget)
    try:
        percent = float(memory_budget.strip().removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise ValueError(f'memory_budget must be like "60%", between 0 and 100, got {memory_budget!r}.')
    return percent / 100, None

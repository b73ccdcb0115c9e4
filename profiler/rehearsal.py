"""Try a workload once before anything is measured, and say which call fails.

A profile runs a workload hundreds of times in unusual surroundings. Whatever is wrong with it would come up
deep inside one of them, so each call is made once by itself first:

    batch(n)                 tensors, with n samples in their first dimension
    loss(model, batch(n))    a finite scalar that depends on a parameter; then its backward pass
    the same without memory  what works for real may still ask a fake tensor for its value

What the user's code raises becomes one line: the call, the module inside it, file and line, and the error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import site
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import keystr, tree_flatten_with_path

from profiler.pretend import pretending
from profiler.workload import Workload
from profiler.workload_spec import WorkloadError, described

_OURS: Final = frozenset({"planner", "profiler", "executor"})
_NOT_THE_USERS: Final = _OURS | {"torch"} | sys.stdlib_module_names

_SHAPES_ONLY: Final = (
    "A profile works out memory from shapes alone, so a forward pass must not depend on the values of "
    "floating-point tensors: no .item(), .tolist(), .numpy() or `if` on them. Use torch.where, or decide by "
    "shapes or by the batch's integers."
)


def rehearse(workload: Workload, micro_batch_size: int, other_sizes: Sequence[int]) -> None:
    """Make every call of a profile once; raises WorkloadError for the first that fails.

    The model is where it is to be measured. Its gradients are gone afterwards; its buffers and torch's random
    state are the caller's to restore.
    """
    _check_initialised(workload.model)
    for size in (micro_batch_size, *other_sizes):
        _check_batch(_batch(workload, size), size)
    call = f"loss(model, batch({micro_batch_size}))"
    _check_gradients(workload, micro_batch_size, call)
    _check_without_memory(workload, micro_batch_size, call)


@contextlib.contextmanager
def calling(call: str, model: nn.Module, way_out: str = "") -> Iterator[None]:
    """What this block raises is the user's: say so, by the call. Errors of ours pass through."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _OURS:
            raise
        raise WorkloadError(
            f"{call} raised {described(error)}{_place(error, model)}.{way_out and f' {way_out}'}"
        ) from error


def _check_initialised(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
            raise WorkloadError(
                f"model must have its parameters, but {name} gets a shape in the first forward pass only. "
                f"Run the model once before it is given to Workload."
            )


def _batch(workload: Workload, size: int) -> Any:
    with calling(f"batch({size})", workload.model, _another_size(size)):
        return workload.batch(size)


def _another_size(size: int) -> str:
    """A batch norm over single values, a contrastive loss: one sample is the size that models reject."""
    return "If one sample is too few for this model, profile larger micro-batches (--batch 2,4)." * (
        size == 1
    )


def _check_batch(batch: Any, size: int) -> None:
    leaves, _ = tree_flatten_with_path(batch)
    tensors = {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    if not tensors:
        inside = ", ".join(sorted({type(leaf).__name__ for _, leaf in leaves} - {type(batch).__name__}))
        raise WorkloadError(
            f"batch({size}) must return a tensor, or dicts, lists and tuples of tensors, got "
            f"{type(batch).__name__}{inside and f' of {inside}'}. "
            f"Convert it inside batch, for example with torch.tensor or dict(...)."
        )
    wrong = {path: tuple(t.shape) for path, t in tensors.items() if t.dim() and t.shape[0] != size}
    if wrong or not any(tensor.dim() for tensor in tensors.values()):
        found = ", ".join(f"batch{path} of shape {shape}" for path, shape in wrong.items())
        raise WorkloadError(
            f"batch({size}) must return tensors with {size} samples in their first dimension, got "
            f"{found or 'only scalars'}. Put the samples first; what is no sample belongs into the model."
        )


def _check_gradients(workload: Workload, size: int, call: str) -> None:
    model = workload.model
    batch = _batch(workload, size)
    with calling(call, model, _another_size(size)):
        loss: object = workload.loss(model, batch)
    if not isinstance(loss, torch.Tensor):
        raise WorkloadError(
            f"{call} must return a scalar tensor to call backward on, got {type(loss).__name__}. "
            f"Return the loss itself, such as output.loss, or compute it with torch's functions."
        )
    if loss.numel() != 1:
        raise WorkloadError(
            f"{call} must return one number, got a tensor of shape {tuple(loss.shape)}. "
            f"Return its mean: .mean()."
        )
    if loss.requires_grad:
        with calling(f"{call}.backward()", model):
            loss.backward()  # type: ignore[no-untyped-call]
    reached = any(parameter.grad is not None for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad = None
    if not reached:
        raise WorkloadError(
            f"{call} must depend on a parameter of model that requires a gradient, got a tensor that "
            f"backward reaches none from. Is there a .detach(), .item() or torch.no_grad() on the way?"
        )
    if not bool(loss.isfinite()):
        raise WorkloadError(
            f"{call} must be finite, got {loss.item()}. Check the batch and the initial weights."
        )


def _check_without_memory(workload: Workload, size: int, call: str) -> None:
    """The call has worked for real, so what fails now fails for want of values."""
    model = workload.model
    call = f"{call} works, but under fake tensors, which have shapes and no values, it"
    with (
        pretending(model, [workload.batch(size)]) as (batch,),
        calling(call, model, _SHAPES_ONLY),
    ):
        workload.loss(model, batch).backward()  # type: ignore[no-untyped-call]


def _place(error: Exception, model: nn.Module) -> str:
    """``, in layers.3.attn, at mine.py:12``: the innermost module, and the innermost line that is no library's."""
    names = {module: name for name, module in model.named_modules()}
    inside = where = ""
    # A frame that was asked for its locals keeps them, and in the first one, that of ``calling``, is the error itself,
    # which holds all frames: such a ring would keep what a step that failed has allocated.
    outermost = error.__traceback__
    for frame, line in traceback.walk_tb(outermost and outermost.tb_next):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            inside = names.get(module) or inside
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_USERS:
            where = f"{_shown(frame.f_code.co_filename)}:{line}"
    return f"{inside and f', in {inside}'}{where and f', at {where}'}"


def _shown(path: str) -> str:
    """``mine.py``, ``transformers/models/t5/modeling_t5.py``: without where it is installed or worked on."""
    for root in site.getsitepackages():
        if path.startswith(f"{root}{os.sep}"):
            return os.path.relpath(path, root)
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative

"""What operations return, remembered by the shapes that they are given.

A fake step asks for the outputs of tens of thousands of operations, and a model of equal layers asks the same few
hundred questions over and over. ``FakeTensorMode`` remembers answers as well, but looks at everything about a tensor
first, which takes most of a fake step's time. Here an answer is kept only where nothing but sizes, strides, types and
scalars can matter: operations of ATen that make new, dense memory from fakes alone, or views of their first input.
All others are asked anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from profiler.live import is_mutable

SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor without its contents; None stands for an output that is not there.

    ``offset``: where it begins in the memory of the operation's first input; None where its memory is new.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None


_Answer = tuple[type[Any], tuple[_Made | None, ...]]

_ANSWERS: dict[tuple[object, ...], _Answer | None] = {}
"""By operation and inputs; None where the outputs are not to be remembered."""

_ASKED_ANEW = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` under ``FakeTensorMode``, from memory where it was called like this before.

    What only writes into its inputs (a fused update of all parameters) has nothing to answer. Some of these know no
    fake tensors, and ``FakeTensorMode`` would run them for real.
    """
    if func.namespace == "aten" and not func._schema.returns:
        return None
    question: list[object] = [func]
    modes: list[FakeTensorMode] = []
    if not _rememberable(func) or not _put(args, question, modes):
        return _asked(func, args, kwargs)
    for name, value in kwargs.items():
        question.append(name)
        if not _put((value,), question, modes):
            return _asked(func, args, kwargs)
    if not modes:
        return _asked(func, args, kwargs)
    key = tuple(question)
    if key in _ANSWERS:
        answer = _ANSWERS[key]
        return _asked(func, args, kwargs) if answer is None else _again(answer, modes[0], args[0])
    outputs = _asked(func, args, kwargs)
    _ANSWERS[key] = _answer(outputs, args)
    return outputs


def _asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
        # A CPU multiplies groups in fp32; torch's account of shapes knows them in half precision only.
        halves = [arg.bfloat16() if _is_single(arg) else arg for arg in args]
        shape = func(*halves, **{name: value for name, value in kwargs.items() if name != "out_dtype"})
        return torch.empty_strided(shape.shape, shape.stride(), dtype=torch.float32, device=shape.device)
    return func(*args, **kwargs)


def _is_single(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.dtype == torch.float32


_REMEMBERABLE: dict[Any, bool] = {}


def _rememberable(func: Any) -> bool:
    found = _REMEMBERABLE.get(func)
    if found is None:
        found = (
            func.namespace == "aten"
            and not is_mutable(func)
            and not any(tag in func.tags for tag in _ASKED_ANEW)
        )
        _REMEMBERABLE[func] = found
    return found


def _put(values: Any, question: list[object], modes: list[FakeTensorMode]) -> bool:
    """Append what can matter of these values; whether that is all there is to them."""
    for value in values:
        if isinstance(value, FakeTensor):
            # Numbers of Python may have come as tensors without dimensions, which promote types in their own way.
            if value.dim() == 0 or value.dtype.is_complex:
                return False
            question.append(
                (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
            )
            modes.append(value.fake_mode)
        elif isinstance(value, SCALARS):
            question.append((type(value), value))
        elif type(value) in (list, tuple):
            question.append(len(value))
            if not _put(value, question, modes):
                return False
        else:
            return False
    return True


def _answer(outputs: Any, args: tuple[Any, ...]) -> _Answer | None:
    several = outputs if type(outputs) in (tuple, list) else (outputs,)
    read = {arg.untyped_storage() for arg in args if isinstance(arg, torch.Tensor)}
    viewed = args[0].untyped_storage() if args and isinstance(args[0], torch.Tensor) else None
    made: list[_Made | None] = []
    for tensor in several:
        if tensor is None:
            made.append(None)
            continue
        if not isinstance(tensor, FakeTensor):
            return None
        storage = tensor.untyped_storage()
        spanned = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        whole = (spanned if tensor.numel() else 0) * tensor.element_size() == storage.nbytes()
        offset = int(tensor.storage_offset()) if storage == viewed else None
        if offset is None and (storage in read or tensor.storage_offset() or not whole):
            return None
        read.add(storage)
        made.append(_Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device, offset))
    return type(outputs), tuple(made)


def _again(answer: _Answer, mode: FakeTensorMode, viewed: Any) -> Any:
    kind, several = answer
    tensors: list[FakeTensor | None] = []
    with torch._C._DisableTorchDispatch():
        for made in several:
            if made is None:
                tensors.append(None)
                continue
            if made.offset is None:
                shape = torch.empty_strided(made.size, made.stride, dtype=made.dtype, device="meta")
            else:
                shape = torch.empty(0, dtype=made.dtype, device="meta")
                shape.set_(viewed.untyped_storage(), made.offset, made.size, made.stride)
            tensors.append(FakeTensor(mode, shape, made.device))
    if kind in (tuple, list):
        return kind(tensors)
    return tensors[0]

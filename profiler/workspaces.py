"""Scratch memory inside kernels, measured on the device by kind of operation.

A fake step knows every operation, its inputs and its outputs, and nothing of what a kernel takes for itself: a
convolution reorders its weights, attention keeps a block of scores. A real step shows it, operation by operation, and a
*kind* of operation (the same function with the same shapes, strides, types and whole numbers) needs the same wherever
it occurs, whatever the plan:

    real step ──▶ 1,900 operations ──▶ 140 kinds, each with the bytes that memory rose by inside it
    fake step ──▶ the same kinds   ──▶ the rise is put where the operation begins

A device that is not here cannot be asked; there nothing is added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from profiler.allocator import AllocatorMeter

LIST_KERNELS = ("_foreach_", "_fused_")
"""Kernels over lists of all parameters: in place, tensor by tensor, with no scratch memory of their own."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor without its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Kind:
    """An operation without the contents of its tensors. Equal kinds need equal scratch memory."""

    function: torch._ops.OpOverload
    leaves: tuple[Hashable, ...]


def kind_of(function: torch._ops.OpOverload, args: Any, kwargs: Any) -> Kind | None:
    """The kind of an operation that is being called; None where it is too small to matter or allocates nothing."""
    if function.is_view or function.__name__.startswith(LIST_KERNELS):
        return None
    found: list[Hashable] = []
    floats = False
    for leaf in tree_flatten((args, kwargs or {}))[0]:
        if isinstance(leaf, torch.Tensor):
            strides = tuple(leaf.stride()) if leaf.layout is torch.strided else ()
            floats |= leaf.dtype.is_floating_point
            found.append(_Shape(tuple(leaf.shape), strides, leaf.dtype))
        elif isinstance(leaf, torch.device | torch.Generator | float):
            found.append(
                type(leaf).__name__
            )  # a learning rate or an epsilon decides on no kernel's scratch memory
        else:
            found.append(leaf if isinstance(leaf, Hashable) else repr(leaf))
    return Kind(function, tuple(found)) if floats else None


class Workspaces:
    """How far memory rises inside each kind of operation on a device, outputs included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[Kind, int] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Learn from a real step that runs inside."""
        if self._device.type == "cuda":
            with _OnCuda(self._device) as mode:
                yield
            risen = mode.risen
        else:
            with AllocatorMeter() as meter, _OnCpu(meter) as on_cpu:
                yield
            risen = [(on_cpu.kinds[int(name)], rise) for name, rise in meter.peaks_in_spans()]
        for kind, rise in risen:
            self._peaks[kind] = max(rise, self._peaks.get(kind, 0))

    def peak_bytes(self, kind: Kind) -> int:
        """How far memory in use rises inside the operation; 0 for one that no real step showed."""
        return self._peaks.get(kind, 0)


class _OnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every operation a span of the meter."""

    def __init__(self, meter: AllocatorMeter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: list[Kind] = []
        self._meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = kind_of(func, args, kwargs)
        if kind is None:
            return func(*args, **(kwargs or {}))
        self.kinds.append(kind)
        with self._meter.span(str(len(self.kinds) - 1)):
            return func(*args, **(kwargs or {}))


class _OnCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reads the caching allocator's peak around every operation; it counts as the host asks, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.risen: list[tuple[Kind, int]] = []
        self._target = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = kind_of(func, args, kwargs)
        if kind is None:
            return func(*args, **(kwargs or {}))
        torch.cuda.reset_peak_memory_stats(self._target)
        before = torch.cuda.memory_allocated(self._target)
        outputs = func(*args, **(kwargs or {}))
        self.risen.append((kind, torch.cuda.max_memory_allocated(self._target) - before))
        return outputs

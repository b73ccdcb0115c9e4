"""Scratch memory inside kernels, measured on the device by kind of operation.

A fake step knows every operation, its inputs and its outputs, and nothing of what a kernel takes for itself: a
convolution reorders its weights, attention keeps a block of scores. A real step shows it, operation by operation, and a
*kind* of operation (the same function with the same shapes, strides, types and whole numbers) needs the same wherever
it occurs, whatever the plan:

    real step ──▶ 1,900 operations ──▶ 140 kinds, each with the bytes that memory rose by inside it
    fake step ──▶ the same kinds   ──▶ the rise is put where the operation begins

Where a fake operation is wrong about its outputs (an LSTM's buffer for its backward pass has no size there, statistics
have another type), the sizes of the real one count. A device that is not here cannot be asked; there nothing is added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from profiler.allocator import AllocatorMeter
from profiler.live import CUDA_BLOCK_BYTES, storage_bytes

LIST_KERNELS = ("_foreach_", "_fused_")
"""Kernels over lists of all parameters: in place, tensor by tensor, with no scratch memory of their own."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor without its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Taken:
    """What a kind of operation took: how far memory rose inside it, and the storages of its outputs, in order."""

    peak_bytes: int
    output_bytes: tuple[int, ...]


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
            floats |= leaf.dtype.is_floating_point
            if leaf.dtype is torch.uint8:
                found.append("bytes")  # a kernel's own buffer, whose size a fake one may not know
                continue
            found.append(_Shape(tuple(leaf.shape), _strides(leaf), leaf.dtype))
        elif isinstance(leaf, torch.device | torch.Generator | float):
            found.append("any")  # a learning rate or an epsilon decides on no kernel's scratch memory
        else:
            found.append(leaf if isinstance(leaf, Hashable) else repr(leaf))
    return Kind(function, tuple(found)) if floats else None


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides without those that lead nowhere: of a dimension of one, fake and real tensors have different ones."""
    if tensor.layout is not torch.strided:
        return ()
    return tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _of_any_strides(kind: Kind) -> Kind:
    leaves = (replace(leaf, stride=()) if isinstance(leaf, _Shape) else leaf for leaf in kind.leaves)
    return Kind(kind.function, tuple(leaves))


class Workspaces:
    """What each kind of operation takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._taken: dict[Kind, Taken] = {}
        self._taken_of_any_strides: dict[Kind, Taken] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Learn from a real step that runs inside."""
        if self._device.type == "cuda":
            with _Watch(_CudaRises(self._device), CUDA_BLOCK_BYTES) as watch:
                yield
            rises = watch.rises.of_all()
        else:
            with AllocatorMeter() as meter, _Watch(_CpuRises(meter)) as watch:
                yield
            rises = watch.rises.of_all()
        for (kind, output_bytes), rise in zip(watch.calls, rises, strict=True):
            for known, name in ((self._taken, kind), (self._taken_of_any_strides, _of_any_strides(kind))):
                before = known.get(name)
                known[name] = Taken(max(rise, before.peak_bytes if before else 0), output_bytes)

    def taken(self, kind: Kind) -> Taken | None:
        """What the operation takes; None for one that no real step showed.

        Where a fake tensor is laid out otherwise than the real one, the most that the operation took with any layout.
        """
        return self._taken.get(kind) or self._taken_of_any_strides.get(_of_any_strides(kind))


class _CpuRises:
    """Makes every operation a span of the meter."""

    def __init__(self, meter: AllocatorMeter) -> None:
        self._meter = meter
        self._count = 0

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        self._count += 1
        return self._meter.span(str(self._count - 1))

    def of_all(self) -> list[int]:
        found = dict(self._meter.peaks_in_spans())
        return [found[str(index)] for index in range(self._count)]


class _CudaRises:
    """Reads the caching allocator's peak around every operation; it counts as the host asks, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rises: list[int] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        self._rises.append(torch.cuda.max_memory_allocated(self._device) - before)

    def of_all(self) -> list[int]:
        return self._rises


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation's kind and outputs, and has its rise measured."""

    def __init__(self, rises: _CpuRises | _CudaRises, block_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rises = rises
        self.calls: list[tuple[Kind, tuple[int, ...]]] = []
        self._block_bytes = block_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = kind_of(func, args, kwargs)
        if kind is None:
            return func(*args, **(kwargs or {}))
        with self.rises.watch():
            outputs = func(*args, **(kwargs or {}))
        made = dict.fromkeys(_storages(outputs))
        for storage in _storages((args, kwargs)):
            made.pop(storage, None)
        self.calls.append((kind, tuple(storage_bytes(storage, self._block_bytes) for storage in made)))
        return outputs


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return (leaf.untyped_storage() for leaf in leaves if leaf.layout is torch.strided)

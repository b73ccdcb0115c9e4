"""Scratch memory inside kernels, measured on the device by kind of operation.

A fake step knows every operation, its inputs and its outputs, and nothing of what a kernel takes for itself: a
convolution reorders its weights, attention keeps a block of scores. A real step shows it, operation by operation, and a
*kind* of operation (the same function with the same shapes, strides, types and whole numbers) needs the same wherever
it occurs, whatever the plan:

    real step ──▶ 1,900 operations ──▶ 140 kinds, each with the bytes that memory rose by inside it
    fake step ──▶ the same kinds   ──▶ the rise is put where the operation begins

Where a fake operation is wrong about its outputs (an LSTM's buffer for its backward pass has no size there, statistics
have another type), the sizes of the real one count. A device that is not here cannot be asked; there nothing is added.

A step that is not to run can be learned from all the same: each new kind of a fake step is tried out once, by itself,
on zeros of its shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from profiler.allocator import AllocatorMeter
from profiler.live import CUDA_BLOCK_BYTES, storage_bytes

LIST_KERNELS = ("_foreach_", "_fused_")
"""Kernels over lists of all parameters: in place, tensor by tensor, with no scratch memory of their own."""


_OWN_BUFFER = "bytes"
"""A tensor of bytes that a kernel made for its backward pass. A fake one may not know its size, and with other contents
an LSTM's backward kernel kills the process."""


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
                found.append(_OWN_BUFFER)
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


@dataclass(frozen=True, slots=True)
class _Call:
    """How to call an operation of a kind for real: ``tensors`` are (position among the leaves, elements, shape)."""

    leaves: tuple[Any, ...]
    structure: TreeSpec

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> _Call:
        leaves, structure = tree_flatten((args, kwargs))
        return cls(
            tuple(_Zeros.like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), structure
        )

    @property
    def size_bytes(self) -> int:
        return sum(leaf.size_bytes for leaf in self.leaves if isinstance(leaf, _Zeros))

    def run(self, function: torch._ops.OpOverload) -> None:
        leaves = [leaf.made() if isinstance(leaf, _Zeros) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Zeros:
    """A tensor to be made of zeros, laid out like another one."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: torch.Tensor) -> _Zeros:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    @property
    def elements(self) -> int:
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True))

    @property
    def size_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        return torch.zeros(self.elements, dtype=self.dtype).as_strided(self.size, self.stride)


class Workspaces:
    """What each kind of operation takes on a device.

    ``trying_bytes``: kinds that no real step showed are tried out, where their inputs take no more than this.
    """

    def __init__(self, device: torch.device, trying_bytes: int = 0) -> None:
        self._device = device
        self._trying_bytes = trying_bytes
        self._untried: dict[Kind, _Call] = {}
        self.refused: set[Kind] = set()
        """Kinds that do not run on zeros, or are too large to be tried, or read a buffer that another kernel fills."""
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
        for call, rise in zip(watch.calls, rises, strict=True):
            if call is None:
                continue
            kind, output_bytes = call
            for known, name in ((self._taken, kind), (self._taken_of_any_strides, _of_any_strides(kind))):
                before = known.get(name)
                known[name] = Taken(max(rise, before.peak_bytes if before else 0), output_bytes)

    def note(self, kind: Kind | None, args: Any, kwargs: Any) -> None:
        """A fake step calls an operation of this kind."""
        if self._trying_bytes and kind is not None and self.taken(kind) is None and kind not in self.refused:
            self._untried.setdefault(kind, _Call.of(args, kwargs or {}))

    def try_noted(self) -> None:
        """Run every kind that was noted and is not known, one after the other, and learn from it."""
        untried, self._untried = self._untried, {}
        if not untried:
            return
        with torch.no_grad(), self.watching():
            for kind, call in untried.items():
                if call.size_bytes > self._trying_bytes or _OWN_BUFFER in kind.leaves:
                    self.refused.add(kind)
                    continue
                try:
                    call.run(kind.function)
                except (RuntimeError, IndexError, ValueError):
                    self.refused.add(kind)  # It asks for contents that zeros do not have.

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
        self.calls: list[tuple[Kind, tuple[int, ...]] | None] = []
        self._block_bytes = block_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = kind_of(func, args, kwargs)
        if kind is None:
            return func(*args, **(kwargs or {}))
        self.calls.append(None)  # In case that it raises.
        with self.rises.watch():
            outputs = func(*args, **(kwargs or {}))
        made = dict.fromkeys(_storages(outputs))
        for storage in _storages((args, kwargs)):
            made.pop(storage, None)
        self.calls[-1] = kind, tuple(storage_bytes(storage, self._block_bytes) for storage in made)
        return outputs


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return (leaf.untyped_storage() for leaf in leaves if leaf.layout is torch.strided)

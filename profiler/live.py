"""Which tensor storages are alive, at every operation.

Memory is held by *storages*: views share one, a saved tensor may be a parameter, a tuple of outputs may be
one block. ``LiveStorages`` is a dispatch mode that meets every operation below autograd, notes each storage
the first time it appears, and learns from a weak reference when it dies:

    mm ──▶ storage 7 (4 MiB) appears      live 12 MiB
    gelu ─▶ storage 8 (16 MiB) appears    live 28 MiB  ◀── peak so far
    (last reference to 7 gone)            live 24 MiB

Under ``FakeTensorMode`` the same run costs no memory at all, which is how a model is measured for a device
that it does not fit on. Scratch memory that a kernel takes and returns by itself is below this level and is
not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_BLOCK_BYTES = 512
"""CUDA's caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator, ``kMinBlockSize``)."""


def storage_bytes(storage: torch.UntypedStorage, block_bytes: int = 1) -> int:
    """Bytes that a storage takes from an allocator which rounds up to ``block_bytes``."""
    return -(-storage.nbytes() // block_bytes) * block_bytes


class QuickMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that ``torch.compile`` may look into: spared of what keeps it out, each dispatch takes half the time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class LiveStorages(QuickMode):
    """Follow the live storages of everything that runs inside this context.

    ``observe(event, key, size_bytes)`` is called with ``"alloc"`` and ``"free"`` as they happen;
    ``operation(func, inputs, outputs)`` after each operation with the keys of the storages it read and
    returned; ``calling(func, args, kwargs)`` before it and ``called(func, args, kwargs, outputs)`` after it. Each may
    be None. ``live_bytes`` and ``peak_bytes`` are kept in any case.
    """

    def __init__(
        self,
        *,
        block_bytes: int = 1,
        observe: Callable[[str, int, int], None] | None = None,
        operation: Callable[[Any, list[int], list[int]], None] | None = None,
        calling: Callable[[Any, Any, Any], None] | None = None,
        called: Callable[[Any, Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block_bytes = block_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._observe = observe
        self._operation = operation
        self._calling = calling
        self._called = called
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._keys: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._next_key = 0

    def track(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        """Count tensors that already exist (parameters, state, inputs); return their storages' keys."""
        return [self._key(tensor) for tensor in tensors]

    def key_of(self, tensor: torch.Tensor) -> int | None:
        """The key of a tensor's storage, or None when it was never seen."""
        return self._keys.get(tensor.untyped_storage())

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        known = self._keys.get(storage)
        if known is not None:
            return known
        key = self._next_key
        self._next_key += 1
        size_bytes = storage_bytes(storage, self.block_bytes)
        self._keys[storage] = key
        self._alive[key] = (weakref.ref(storage, functools.partial(self._freed, key)), size_bytes)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._observe is not None:
            self._observe("alloc", key, size_bytes)
        return key

    def _freed(self, key: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        _, size_bytes = self._alive.pop(key)
        self.live_bytes -= size_bytes
        if self._observe is not None:
            self._observe("free", key, size_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._calling is not None:
            self._calling(func, args, kwargs)
        outputs = func(*args, **(kwargs or {}))
        if self._called is not None:
            self._called(func, args, kwargs or {}, outputs)
        if self._operation is None:
            for tensor in tensors_in(outputs):
                self._key(tensor)
        else:
            read = [self._key(tensor) for values in (args, kwargs) for tensor in tensors_in(values)]
            self._operation(func, read, [self._key(tensor) for tensor in tensors_in(outputs)])
        return outputs


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments or outputs of an operation, which come in tuples, lists and keywords.

    A step has tens of thousands of operations, and ``torch.utils._pytree`` takes several times as long for each.
    """
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, tuple | list):
                yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


@functools.cache
def is_mutable(func: Any) -> bool:
    """Whether an operation writes into one of its arguments; the schema takes its time to say so."""
    mutable: bool = func._schema.is_mutable
    return mutable

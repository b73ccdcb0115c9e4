"""What autograd saves, kept off the device from forward to backward: how a step runs that does not fit there.

    forward    saves a tensor     ──▶  copied to the host's memory; on a CPU to a file, mapped into memory
    backward   asks for it        ◀──  copied back, and gone once the operation has run

Weights, gradients, the optimizer's state and what one operation works on are on the device, and nothing else. No way of
recomputing needs less, so whatever some plan can train with can be timed. The same kernels run on the same numbers as
in a plain step; only the copying comes between them, and meanwhile the clock stands still (profiler/timing.py).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

SMALLEST_BYTES = 64 * 2**10
"""Smaller tensors stay where they are."""

SPARED_BYTES = 4 * 2**30
"""Of the host's memory, for everything else that runs there."""

Paused = Callable[[], contextlib.AbstractContextManager[Any]]


class NoRoomElsewhere(ValueError):
    """What a step saves fits neither on the device nor elsewhere."""


class _Room:
    """Room elsewhere for the elements of a tensor. When nobody needs it any more it waits for the next of its size."""

    __slots__ = ("__weakref__", "elements", "source", "waiting")

    def __init__(self, elements: torch.Tensor, source: StorageWeakRef, waiting: list[torch.Tensor]) -> None:
        self.elements = elements
        self.source = source
        self.waiting = waiting

    def __del__(self) -> None:
        # Giving it back to the system instead would take time while the clock runs.
        self.waiting.append(self.elements)


@dataclass(frozen=True, slots=True)
class Away:
    """A saved tensor that lies elsewhere, and how it is to lie on the device again.

    ``room``: its elements in the order of its storage, gaps between them included.
    """

    room: _Room
    size: torch.Size
    stride: tuple[int, ...]


class Elsewhere:
    """Takes what autograd saves off a device. The model's own tensors stay. ``paused``: a context around copying."""

    def __init__(
        self, model: nn.Module, device: torch.device, paused: Paused = contextlib.nullcontext
    ) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._staying = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._device = device
        self._paused = paused
        self._rooms: weakref.WeakValueDictionary[tuple[int, ...], _Room] = weakref.WeakValueDictionary()
        self._waiting: dict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """While forward and backward passes run."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, self.give_back):
            yield

    def keep(self, tensor: torch.Tensor) -> torch.Tensor | Away:
        """The tensor as it is kept: elsewhere, or where it is.

        Raises NoRoomElsewhere where there is none for it elsewhere either.
        """
        if tensor.layout is not torch.strided or tensor.device != self._device or 0 in tensor.shape:
            return tensor
        if isinstance(tensor, FakeTensor):
            return tensor  # It takes no memory.
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if elements * tensor.itemsize < SMALLEST_BYTES:
            return tensor
        if tensor.untyped_storage().data_ptr() in self._staying:
            return tensor
        with self._paused(), torch.no_grad(), _disable_current_modes():
            return self._moved(tensor, elements)

    def _moved(self, tensor: torch.Tensor, elements: int) -> Away:
        """One that is saved by several operations is copied once, as long as it is there and unchanged."""
        storage = tensor.untyped_storage()
        offset = int(tensor.storage_offset())
        name = (storage.data_ptr(), offset, elements, tensor.itemsize, tensor._version)
        room = self._rooms.get(name)
        there = room is not None and not room.source.expired()  # type: ignore[no-untyped-call]
        if room is None or not there or room.elements.dtype is not tensor.dtype:
            waiting = self._waiting[elements, tensor.dtype]
            held = waiting.pop() if waiting else self._made(elements, tensor.dtype)
            held.copy_(tensor.detach().as_strided((elements,), (1,), offset))
            room = _Room(held, StorageWeakRef(storage), waiting)  # type: ignore[no-untyped-call]
            self._rooms[name] = room
        return Away(room, tensor.shape, tensor.stride())

    def give_back(self, kept: torch.Tensor | Away) -> torch.Tensor:
        """The tensor, on the device again."""
        if isinstance(kept, torch.Tensor):
            return kept
        with self._paused(), torch.no_grad(), _disable_current_modes():
            held = kept.room.elements
            elements = torch.empty(held.shape, dtype=held.dtype, device=self._device)
            return elements.copy_(held).as_strided(kept.size, kept.stride)

    def _made(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """In the host's memory if that is not the device's and has room, else in a file."""
        if self._device.type != "cpu" and elements * dtype.itemsize <= _available_bytes() - SPARED_BYTES:
            return torch.empty(elements, dtype=dtype)
        return _mapped(elements, dtype)


def _available_bytes() -> int:
    """Of the host's memory, without what it would have to write to disk first."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _mapped(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file that has no name any more, and goes with it."""
    handle, name = tempfile.mkstemp(prefix="planner-elsewhere-")
    try:
        try:
            os.posix_fallocate(handle, 0, elements * dtype.itemsize)
        except OSError as error:
            raise NoRoomElsewhere(
                "The folder for temporary files must hold what a step saves that does not fit on the device, and "
                f"{tempfile.gettempdir()} has no room ({error.strerror}). Set TMPDIR to a folder on a larger disk, or "
                "leave larger micro-batches out of --batch."
            ) from error
        return torch.from_file(name, shared=True, size=elements, dtype=dtype)
    finally:
        os.close(handle)
        os.unlink(name)

"""What a process does with memory that is freed: kept for the next step, or given back.

glibc gives every large block back to the system when it is freed, and a training step asks for the same blocks again:
on a CPU a quarter of GPT-2's step goes into page faults (``python -m studies.allocator`` measures it). So measuring and
training on a CPU both keep freed memory in the process, and ``FreedMemoryGuard`` ends that where a loop would pay for
it with ever more memory.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections import deque

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""

DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 2**10, 65536
"""What glibc begins with."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse freed blocks, for the rest of this process; whether it was told.

    Not in a process whose memory is limited: between blocks that are kept are holes, and the limit counts them.
    """
    if not sys.platform.startswith("linux") or _is_limited():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_bytes() -> tuple[int, int] | None:
    """Of the heap, and of what is freed and kept in it; None where malloc does not tell (glibc does since 2.33)."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
    if mallinfo is None:
        return None
    mallinfo.restype = _Mallinfo2
    found = mallinfo()
    return int(found.arena), int(found.fordblks)


class FreedMemoryGuard:
    """Ends ``keep_freed_memory`` in a process whose loop makes the heap grow step by step.

    What a loop keeps of each step, if only its loss, may lie in a freed block, which then is too small for the tensor
    that comes again: of GPT-2 that is 154 MB a step. Such a heap grows at most looks, by much, and what it has to
    spare grows with it. An evaluation or a saving makes it grow once, batches of other lengths make it grow ever more
    rarely, and holes that come and go make it grow by little: those are no reason to end.
    """

    FIRST_STEPS, EVERY_STEPS = 3, 2
    LATEST_LOOKS, MOST_GROWTHS = 12, 4
    MOST_GROWN, SLACK_BYTES = 0.5, 64 * 2**20
    """Of what was to spare after the first steps, and beside it."""

    def __init__(self) -> None:
        self.ended = False
        self._steps = 0
        self._first: tuple[int, int] | None = None
        self._heap_bytes = 0
        self._largest_growth_bytes = 0
        self._grew: deque[bool] = deque(maxlen=self.LATEST_LOOKS)

    def stepped(self) -> None:
        """To be called after each step on a CPU."""
        self._steps += 1
        if (
            self.ended
            or self._steps < self.FIRST_STEPS
            or (self._steps - self.FIRST_STEPS) % self.EVERY_STEPS
        ):
            return
        found = heap_bytes()
        if found is not None and self.grows_without_end(*found):
            release_freed_memory(torch.device("cpu"))
            self.ended = True
            warnings.warn(
                "The heap grows step by step: something small that the loop keeps of each step, such as its loss, "
                "splits blocks that tensors come back to. Freed memory goes back to the system from now on, which may "
                "make steps a quarter slower than predicted. Keep numbers instead, as loss.item().",
                RuntimeWarning,
                stacklevel=3,
            )

    def grows_without_end(self, heap: int, freed: int) -> bool:
        """Whether a look that found a heap of ``heap`` bytes, ``freed`` of them to spare, is one too many."""
        if self._first is None:
            self._first, self._heap_bytes = (heap, freed), heap
            return False
        growth = heap - self._heap_bytes
        self._grew.append(growth > 0)
        self._largest_growth_bytes = max(self._largest_growth_bytes, growth)
        self._heap_bytes = heap
        first_heap, first_freed = self._first
        grown = min(heap - first_heap, freed - first_freed) - self._largest_growth_bytes
        return (
            sum(self._grew) > self.MOST_GROWTHS and grown > self.MOST_GROWN * first_freed + self.SLACK_BYTES
        )


def release_freed_memory(device: torch.device) -> None:
    """Give what is freed but kept back, and on a CPU keep no more: for a process that was refused memory."""
    let_go_of_a_failed_backward()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is not None and trim is not None:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
        trim(0)


def let_go_of_a_failed_backward() -> None:
    """Free what is left of a backward pass that ended in an error.

    Autograd's queue of the calling thread holds it, nodes with all that they saved, until the next backward pass.
    """
    with torch.enable_grad():
        torch.ones((), requires_grad=True).exp().backward()  # type: ignore[no-untyped-call]


def _is_limited() -> bool:
    import resource  # Not on every platform.

    limits = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)

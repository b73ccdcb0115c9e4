"""What PyTorch's own allocator hands out: the truth that memory predictions are held against.

Live tensors are not all: a kernel may take scratch memory and return it before it ends, which only the allocator
sees. On CUDA the caching allocator keeps its own peak. On a CPU it reports every block that it hands out or takes
back to torch's profiler; their running sum is the memory in use, and its highest value is the peak:

    +4 MiB  +16 MiB  -4 MiB  +1 MiB  -1 MiB  ...      relative to what was in use when measuring began

Scratch that a math library takes from the system by itself (packing buffers of a matrix product) is in neither.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

POINTS = 600
"""How many points of a step's course are kept for a picture."""


class AllocatorMeter:
    """Peak and course of the bytes in use on a CPU while the context is open, above those in use when it began.

    Every operation is recorded, so steps that are timed are better off without it.
    """

    def __init__(self) -> None:
        # The profiler's library writes its comings and goings to stderr unless told not to before its first use.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._times: list[int] = []
        self._levels: list[int] = []
        self._spans: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> AllocatorMeter:
        gc.collect()
        self._profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        inner = self._profiler.profiler
        assert inner is not None
        assert inner.kineto_results is not None
        changes: list[tuple[int, int, int]] = []
        for index, event in enumerate(inner.kineto_results.events()):
            if event.name() == "[memory]":
                changes.append((event.start_ns(), index, event.nbytes()))  # type: ignore[attr-defined]
            elif event.name().startswith(_SPAN):
                begin = event.start_ns()
                self._spans[event.name()] = begin, begin + event.duration_ns()
        changes.sort()
        self._times = [at for at, _, _ in changes]
        self._levels = list(itertools.accumulate(change for _, _, change in changes))

    def span(self, name: str) -> record_function:
        """A context inside this one whose own peak can be asked for afterwards."""
        return record_function(_SPAN + name)

    @property
    def peak_bytes(self) -> int:
        """The highest use inside the context, relative to its beginning; at least 0."""
        return max(0, max(self._levels, default=0))

    def peaks_in_spans(self) -> Iterator[tuple[str, int]]:
        """Of every span: how far use rose above its level at the span's beginning. Spans must not overlap."""
        spans = sorted((begin, end, name) for name, (begin, end) in self._spans.items())
        position, level = 0, 0
        for begin, end, name in spans:
            while position < len(self._times) and self._times[position] < begin:
                level = self._levels[position]
                position += 1
            before, rise = level, 0
            while position < len(self._times) and self._times[position] <= end:
                level = self._levels[position]
                rise = max(rise, level - before)
                position += 1
            yield name.removeprefix(_SPAN), rise

    def course(self) -> tuple[tuple[float, int], ...]:
        """``(share of the events, bytes)`` in at most ``POINTS`` points, each the highest of its stretch."""
        count = len(self._levels)
        width = -(-count // POINTS) or 1
        return tuple(
            (start / count, max(self._levels[start : start + width])) for start in range(0, count, width)
        )


_SPAN = "planner span "


@dataclass(frozen=True, slots=True)
class StepPeak:
    """The allocator's peak over a step; on CUDA what it reserved, on a CPU the step's course for a picture."""

    peak_bytes: int
    reserved_bytes: int | None
    course: tuple[tuple[float, int], ...] | None


def measure_step(
    step: Callable[[], object],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: object,
    device: torch.device,
) -> StepPeak:
    """Run a step and read its peak: parameters, buffers, optimizer state, ``batches``, and all that it takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return StepPeak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), None)
    there = itertools.chain(model.parameters(), model.buffers(), tree_leaves(list(optimizer.state.values())))
    before = bytes_of(
        leaf for leaf in itertools.chain(there, tree_leaves(batches)) if isinstance(leaf, torch.Tensor)
    )
    with AllocatorMeter() as meter:
        step()
    return StepPeak(
        before + meter.peak_bytes, None, tuple((share, before + level) for share, level in meter.course())
    )


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())

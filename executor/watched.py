"""The memory of one of several processes, to the byte, as PyTorch's own CPU allocator tells it.

    watch ─▶ model, engine ─▶ step 1 ─▶ step 2 ─▶ step 3: its highest point ─▶ stop watching

DeepSpeed keeps states, gradients and buckets where it likes, so all that is alive counts, from before the model is
made. What another thread frees no profiler sees, and gloo's threads may be the last to let go of a tensor. So while
memory is watched every collective waits until they have, and the level before and after the measured step shows whether
anything went unseen.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

LET_GO_SECONDS = 0.005
"""What gloo's threads get to drop a finished collective; they need microseconds, once they have a processor."""

MOST_SECONDS = 1.0
"""How long it is waited for that, at most."""

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "reduce",
    "all_gather",
)


class _Handle:
    """A collective under way, whose ``wait`` also waits until only the caller holds its tensors."""

    def __init__(self, work: Any, tensors: list[torch.Tensor], holders: list[tuple[int, int]]) -> None:
        self._work = work
        self._tensors = tensors
        self._holders = holders

    def wait(self, *args: Any, **kwargs: Any) -> None:
        if self._work is None:
            return
        self._work.wait()
        # gloo's thread first: whoever drops the work last frees its buffers, and only this thread is watched.
        time.sleep(LET_GO_SECONDS)
        _wait(_others_sleep, MOST_SECONDS)
        self._work = None
        _wait(self._nobody_else_holds, MOST_SECONDS)
        self._tensors = []

    def _nobody_else_holds(self) -> bool:
        return all(now <= then for now, then in zip(_holders(self._tensors), self._holders, strict=True))


def _wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0)


def _others_sleep() -> bool:
    """Whether no other thread of this process runs or waits for a processor. True where the system does not tell."""
    own = threading.get_native_id()
    for task in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # One that has ended meanwhile.
            if int(task.parent.name) != own and task.read_text().rpartition(")")[2].split()[0] == "R":
                return False
    return True


def _holders(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Who else holds each of these tensors: in Python, and below it."""
    count: Any = operator.methodcaller("_use_count")  # Not in every version's stubs.
    return [(sys.getrefcount(tensor), count(tensor)) for tensor in tensors]


@contextlib.contextmanager
def collectives_let_go() -> Iterator[set[str]]:
    """While what is yielded is not empty, torch's collectives return only when their threads hold nothing any more."""
    watching = set(COLLECTIVES)
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def letting_go(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            if not watching:
                return original(*args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            holders = _holders(tensors)
            asynchronous = kwargs.pop("async_op", False)
            work = original(*args, **kwargs, async_op=True)
            if work is None:
                return None
            handle = _Handle(work, tensors, holders)
            del work, tensors
            if asynchronous:
                return handle
            handle.wait()
            return None

        return collective

    for name, original in originals.items():
        setattr(torch.distributed, name, letting_go(original))
    try:
        yield watching
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def levels_of(profiler: profile, span: str) -> tuple[int, int, int]:
    """Bytes in use before a span, at its highest and after it, counted since the profiler was started."""
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    changes, begin, end = [], 0, 0
    for index, event in enumerate(inner.kineto_results.events()):
        if event.name() == "[memory]":
            changes.append((event.start_ns(), index, event.nbytes()))  # type: ignore[attr-defined]
        elif event.name() == span:
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
    changes.sort()
    times = [at for at, _, _ in changes]
    levels = list(accumulate(change for _, _, change in changes))
    first, last = bisect_left(times, begin), bisect_right(times, end)
    return levels[first - 1], max(levels[first - 1 : last]), levels[last - 1]

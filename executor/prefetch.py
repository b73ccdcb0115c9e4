"""Batches prepared ahead of the loop that trains on them, in threads, and how long the loop waited all the same.

    threads    │ 1 ──▶│ 2 ──▶│ 3 ──▶│ 4 ──▶
    the loop   ·····│ step 1    │ step 2    │ step 3        waiting_seconds: the dots

Decoding, copying and arithmetic on arrays let other threads run, so threads do where processes would have to send
every batch. The order is that of ``executor.order``: several threads prepare different batches, and the loop takes
them in turn.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch.utils._pytree import tree_map_only

from executor.order import Dataset, OwnBatches, preparations
from planner.plan import Plan

AHEAD: Final = 4
"""Batches that are ready or in preparation while a step runs."""


def batches_ahead(plan: Plan) -> int:
    """How many batches a run prepares ahead: ``AHEAD``, or as many as a CPU plan's budget has room for beside its peak.

    On a CPU they lie where the model trains. A step's own batch is in its peak, under the name of inputs.
    """
    if plan.device.kind != "cpu" or plan.memory_budget_bytes is None:
        return AHEAD
    found = plan.prediction
    peak_bytes = found.peak_memory_bytes * (1 + found.error.peak_memory_bytes)
    batch_bytes = max(1, found.parts.peak_memory_bytes["inputs"])
    return max(0, min(AHEAD, int((plan.memory_budget_bytes - peak_bytes) // batch_bytes)))


class Loader(Iterator[Any]):
    """An iterator of batches that are prepared ahead of it. Leaving its ``with`` block ends its threads.

    ``preparations`` are calls that make one batch each. What one of them raises, the loop raises when it comes to that
    batch. ``ahead`` 0 makes each batch when it is asked for, without a thread.
    """

    waiting_seconds: float
    """How long ``next`` took so far, all batches together."""

    def __init__(
        self,
        preparations: Iterator[Callable[[], Any]],
        *,
        ahead: int = AHEAD,
        device: torch.device | None = None,
    ) -> None:
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}.")
        self.waiting_seconds = 0.0
        self._preparations = preparations
        self._pinned = device is not None and device.type == "cuda"
        self._coming: collections.deque[Future[Any]] = collections.deque()
        self._threads = (
            ThreadPoolExecutor(min(ahead, _spare_cores()), thread_name_prefix="loader") if ahead else None
        )
        self._prepare_ahead(ahead)

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            if self._threads is None:
                return self._made(next(self._preparations))
            if not self._coming:
                raise StopIteration
            batch = self._coming[0].result()
            self._coming.popleft()
            self._prepare_ahead(1)
            return batch
        finally:
            self.waiting_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Forget what is prepared and wait for the threads to end."""
        self._coming.clear()
        self._preparations = iter(())
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _prepare_ahead(self, count: int) -> None:
        for prepare in itertools.islice(self._preparations, count):
            assert self._threads is not None
            self._coming.append(self._threads.submit(self._made, prepare))

    def _made(self, prepare: Callable[[], Any]) -> Any:
        """A batch; for a CUDA device in page-locked memory, from where copies run beside the step."""
        batch = prepare()
        return tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if self._pinned else batch


def loader(
    dataset: Dataset | OwnBatches,
    global_batch_size: int,
    seed: int,
    start: int = 0,
    *,
    device: torch.device | None = None,
    ahead: int = AHEAD,
) -> Loader:
    """``executor.order.batches``, prepared ahead for a run on ``device``.

    A workload's own batches are made when they are asked for: they draw on torch's one generator, and so does the step.
    """
    if isinstance(dataset, OwnBatches):
        ahead = 0
    return Loader(preparations(dataset, global_batch_size, seed, start), ahead=ahead, device=device)


def _spare_cores() -> int:
    """Half of the cores that this process may use: the step needs some itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)

"""The order in which a run sees its samples: a function of (seed, number), so that a run can come back to it.

Epoch e of a run with some seed is one permutation of the samples, drawn from (seed, e) alone, cut into global
batches whose ragged rest is left out:

    start ──▶ (epoch, place) = divmod(start, batches per epoch) ──▶ permutation(seed, epoch)[place * size ...]

so the n-th batch costs the same as the first, and a run that was killed goes on where it was with one number
saved. What is random about a sample, the crop of an image, is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from profiler.registry import seeded


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """One pass of one run over its samples."""

    seed: int
    number: int


class Dataset(Protocol):
    """Samples that can be had in any order, from several threads at once."""

    def __len__(self) -> int: ...

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        """The samples at these places, as one batch; ``epoch`` decides what is random about them, None: nothing is."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnBatches:
    """The batches that a workload makes itself, which cannot be had in another order."""

    batch: Callable[[int], Any]


def batches(
    dataset: Dataset | OwnBatches, global_batch_size: int, seed: int, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Global batches without end, beginning with number ``start``; the first dimension is the samples.

    A workload's own batches come one call each. torch's generator is seeded from (seed, number) for the call,
    so a run can come back to them too, as far as they draw on that generator.
    """
    return (prepare() for prepare in preparations(dataset, global_batch_size, seed, start))


def preparations(
    dataset: Dataset | OwnBatches, global_batch_size: int, seed: int, start: int = 0
) -> Iterator[Callable[[], Any]]:
    """The same batches, each as the call that makes it."""
    if global_batch_size < 1 or start < 0:
        raise ValueError(
            f"global_batch_size must be at least 1 and start at least 0, got {global_batch_size} and {start}."
        )
    if isinstance(dataset, OwnBatches):
        return (
            functools.partial(_own_batch, dataset, global_batch_size, seed, n) for n in itertools.count(start)
        )
    if global_batch_size > len(dataset):
        raise ValueError(
            f"global_batch_size must be at most the {len(dataset)} samples of an epoch, "
            f"got {global_batch_size}. Give more data or a smaller batch."
        )
    return _permuted(dataset, global_batch_size, seed, start)


def _permuted(
    dataset: Dataset, global_batch_size: int, seed: int, start: int
) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
    batches_per_epoch = len(dataset) // global_batch_size
    first_epoch, first_place = divmod(start, batches_per_epoch)
    for number in itertools.count(first_epoch):
        order = np.random.default_rng((seed, number)).permutation(len(dataset))
        epoch = Epoch(seed=seed, number=number)
        for place in range(first_place, batches_per_epoch):
            indices = order[place * global_batch_size : (place + 1) * global_batch_size]
            yield functools.partial(dataset.gather, indices, epoch)
        first_place = 0


def _own_batch(dataset: OwnBatches, global_batch_size: int, seed: int, number: int) -> Any:
    with seeded(int(np.random.SeedSequence((seed, number)).generate_state(1)[0])):
        return dataset.batch(global_batch_size)

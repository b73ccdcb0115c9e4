"""The order in which a run sees its samples: a function of (seed, number), so that a run can come back to it.

Epoch e of a run with some seed is one permutation of the samples, drawn from (seed, e) alone, cut into global
batches whose ragged rest is left out:

    start ──▶ (epoch, place) = divmod(start, batches per epoch) ──▶ permutation(seed, epoch)[place * size ...]

so the n-th batch costs the same as the first, and a run that was killed goes on where it was with its position saved,
which is three numbers. Where the batch grows or shrinks on the way, samples come in the same order all the same. What
is random about a sample, the crop of an image, is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from profiler.registry import seeded
from profiler.workload import split


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """What is behind a run: so many samples of this epoch, and so many batches in all."""

    epoch: int = 0
    samples: int = 0
    batches: int = 0

    @classmethod
    def after(cls, dataset: Dataset | OwnBatches, batches: int, size: int) -> Position:
        """Behind this many batches of one size."""
        if isinstance(dataset, OwnBatches):
            return cls(batches=batches)
        epoch, place = divmod(batches, len(dataset) // size)
        return cls(epoch=epoch, samples=place * size, batches=batches)

    def then(self, dataset: Dataset | OwnBatches, size: int) -> Position:
        """Behind one more batch. Where less than ``size`` is left of an epoch, it comes from the next."""
        if isinstance(dataset, OwnBatches):
            return Position(batches=self.batches + 1)
        fits = len(dataset) - self.samples >= size
        epoch, samples = (self.epoch, self.samples) if fits else (self.epoch + 1, 0)
        return Position(epoch=epoch, samples=samples + size, batches=self.batches + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of every batch a process takes: the ``rank``-th of ``world_size`` equal ones."""

    rank: int = 0
    world_size: int = 1

    def of(self, size: int) -> slice:
        each = size // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)


WHOLE: Final = Share()


def coming(
    dataset: Dataset | OwnBatches, size: int, seed: int, position: Position, share: Share = WHOLE
) -> Iterator[tuple[Callable[[], Any], Position]]:
    """Batches of ``size`` samples without end from a position on: the call that makes each, and what is then behind."""
    check_size(dataset, size)
    if isinstance(dataset, OwnBatches):
        return _own(dataset, size, seed, position, share)
    return _permuted(dataset, size, seed, position, share)


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
    check_size(dataset, global_batch_size)
    position = Position.after(dataset, start, global_batch_size)
    return (prepare for prepare, _ in coming(dataset, global_batch_size, seed, position))


def check_size(dataset: Dataset | OwnBatches, size: int) -> None:
    """Raise ValueError for batches larger than an epoch."""
    if not isinstance(dataset, OwnBatches) and size > len(dataset):
        raise ValueError(
            f"global_batch_size must be at most the {len(dataset)} samples of an epoch, "
            f"got {size}. Give more data or a smaller batch."
        )


def _permuted(
    dataset: Dataset, size: int, seed: int, position: Position, share: Share
) -> Iterator[tuple[Callable[[], Any], Position]]:
    order, of_epoch = np.zeros(0, np.int64), -1
    while True:
        position = position.then(dataset, size)
        if position.epoch != of_epoch:
            of_epoch = position.epoch
            order = np.random.default_rng((seed, of_epoch)).permutation(len(dataset))
        indices = order[position.samples - size : position.samples][share.of(size)]
        yield functools.partial(dataset.gather, indices, Epoch(seed=seed, number=of_epoch)), position


def _own(
    dataset: OwnBatches, size: int, seed: int, position: Position, share: Share
) -> Iterator[tuple[Callable[[], Any], Position]]:
    while True:
        number, position = position.batches, position.then(dataset, size)
        yield functools.partial(_own_batch, dataset, size, seed, number, share), position


def _own_batch(dataset: OwnBatches, size: int, seed: int, number: int, share: Share) -> Any:
    with seeded(int(np.random.SeedSequence((seed, number)).generate_state(1)[0])):
        batch = dataset.batch(size)
    return batch if share == WHOLE else split(batch, size, share.world_size)[share.rank]

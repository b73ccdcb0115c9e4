"""A run's batches: the same samples in the same order, whatever sizes they are taken in and wherever it goes on."""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.order import Epoch, OwnBatches, Position, Share, batches
from executor.stream import Stream


class Numbers:
    """Sample n is n."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        assert epoch is not None
        return {"x": torch.from_numpy(indices), "epoch": torch.full((len(indices),), epoch.number)}


def taken(stream: Stream, sizes: list[int]) -> list[list[int]]:
    with closing(stream):
        return [stream.take(size)["x"].tolist() for size in sizes]


def test_batches_of_one_size_are_those_of_the_order() -> None:
    with closing(Stream(Numbers(20), seed=3)) as stream:
        for expected, _ in zip(batches(Numbers(20), 6, seed=3), range(10), strict=False):
            found = stream.take(6)
            assert torch.equal(found["x"], expected["x"])
            assert torch.equal(found["epoch"], expected["epoch"])


def test_every_epoch_has_an_order_of_its_own_and_leaves_the_ragged_rest_out() -> None:
    with closing(Stream(Numbers(20), seed=3)) as stream:
        found = [stream.take(6) for _ in range(9)]
    assert [batch["epoch"].tolist() for batch in found] == [
        [number] * 6 for number in (0, 0, 0, 1, 1, 1, 2, 2, 2)
    ]
    epochs = [torch.cat([batch["x"] for batch in found[start : start + 3]]).tolist() for start in (0, 3, 6)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@settings(max_examples=50)
@given(
    st.integers(8, 30),
    st.lists(st.integers(1, 8), min_size=1, max_size=12),
    st.data(),
    st.sampled_from([0, 3]),
)
def test_a_run_that_goes_on_sees_what_it_would_have_seen(
    count: int, sizes: list[int], data: st.DataObject, ahead: int
) -> None:
    cut = data.draw(st.integers(0, len(sizes)))
    whole = taken(Stream(Numbers(count), seed=1, ahead=ahead), sizes)
    with closing(Stream(Numbers(count), seed=1, ahead=ahead)) as before:
        first = [before.take(size)["x"].tolist() for size in sizes[:cut]]
        position = before.position
    rest = taken(Stream(Numbers(count), seed=1, position=position, ahead=ahead), sizes[cut:])
    assert first + rest == whole


@given(st.integers(8, 30), st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_within_an_epoch_no_sample_comes_twice_and_the_order_is_that_of_single_samples(
    count: int, sizes: list[int]
) -> None:
    singles = [row[0] for row in taken(Stream(Numbers(count), seed=5, ahead=0), [1] * count)]
    seen: list[int] = []
    for batch in taken(Stream(Numbers(count), seed=5, ahead=0), sizes):
        if seen + batch != singles[: len(seen) + len(batch)]:
            return  # The next epoch has begun.
        seen += batch
    assert len(seen) == sum(sizes)


def test_the_shares_of_all_processes_are_the_batch() -> None:
    shares = [Stream(Numbers(24), seed=2, share=Share(rank=rank, world_size=3), ahead=0) for rank in range(3)]
    whole = Stream(Numbers(24), seed=2, ahead=0)
    for size in (6, 12, 6):
        parts = [share.take(size)["x"] for share in shares]
        assert torch.equal(torch.cat(parts), whole.take(size)["x"])


def test_a_workloads_own_batches_come_back_too() -> None:
    own = OwnBatches(batch=lambda size: {"x": torch.rand(size)})
    with closing(Stream(own, seed=1)) as stream:
        first, second = stream.take(4)["x"], stream.take(4)["x"]
    assert not torch.equal(first, second)
    with closing(Stream(own, seed=1, position=Position(batches=1))) as stream:
        assert torch.equal(stream.take(4)["x"], second)
    half = Stream(own, seed=1, share=Share(rank=1, world_size=2))
    assert torch.equal(half.take(4)["x"], first[2:])


def test_no_thread_is_left_and_the_waiting_is_added_up() -> None:
    with closing(Stream(Numbers(100), seed=0)) as stream:
        stream.take(10)
        before = stream.waiting_seconds
        stream.take(20)
        assert stream.waiting_seconds > before > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_batch_larger_than_an_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="at most the 5 samples of an epoch, got 6"):
        Stream(Numbers(5), seed=0).take(6)

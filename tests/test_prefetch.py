"""Batches ahead of the loop: the same ones in the same order, no thread left, and what was waited is measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from executor.order import Epoch, OwnBatches, batches
from executor.prefetch import AHEAD, Loader, batches_ahead, loader
from planner.plan import Plan
from tests.plans import plan
from tests.test_images import dataset


class Failing:
    """Samples of which one cannot be read."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 100

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        if self.bad in indices:
            raise ValueError(f"sample {self.bad} cannot be read")
        return {"x": torch.from_numpy(indices)}


def of_the_loader() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def taking(seconds: float, count: int = 10**9) -> Iterator[Callable[[], int]]:
    """Preparations that take a while each, without the processor."""

    def prepare(number: int) -> Callable[[], int]:
        return lambda: (time.sleep(seconds), number)[1]

    return (prepare(number) for number in range(count))


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_the_batches_are_those_without_a_loader(ahead: int) -> None:
    samples = dataset(augmented=True)
    expected = itertools.islice(batches(samples, 64, seed=5, start=3), 12)
    with loader(samples, 64, seed=5, start=3, ahead=ahead) as found:
        for one, other in zip(expected, found, strict=False):
            assert torch.equal(one["images"], other["images"])
            assert torch.equal(one["labels"], other["labels"])


def test_threads_that_finish_out_of_turn_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.prefetch._spare_cores", lambda: 4)
    delays = itertools.cycle((0.02, 0.0, 0.01, 0.0))
    preparations = (
        lambda number=number, delay=delay: (time.sleep(delay), number)[1]
        for number, delay in zip(range(40), delays, strict=False)
    )
    with Loader(preparations, ahead=4) as found:
        assert len(of_the_loader()) > 1
        assert list(found) == list(range(40))


def test_no_thread_is_left_however_the_loop_ends() -> None:
    with loader(dataset(), 10, seed=0) as found:
        next(found)
        assert of_the_loader()
    assert not of_the_loader()
    with pytest.raises(StopIteration):
        next(found)
    with pytest.raises(KeyboardInterrupt), loader(dataset(), 10, seed=0):
        raise KeyboardInterrupt
    assert not of_the_loader()
    closed = loader(dataset(), 10, seed=0)
    closed.close()
    closed.close()
    assert not of_the_loader()


def test_no_more_is_prepared_than_was_asked_for() -> None:
    made: list[int] = []
    preparations = (lambda number=number: made.append(number) for number in itertools.count())
    with Loader(preparations, ahead=3) as found:
        for _ in range(2):
            next(found)
        until = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) == 5


def test_what_goes_wrong_in_a_thread_goes_wrong_in_the_loop_at_that_batch() -> None:
    order = np.random.default_rng((0, 0)).permutation(100)
    with loader(Failing(bad=int(order[25])), 10, seed=0) as found:
        for place in range(2):
            assert next(found)["x"].tolist() == order[place * 10 : place * 10 + 10].tolist()
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^sample {order[25]} cannot be read$"):
                next(found)
    assert not of_the_loader()


def test_what_can_never_be_drawn_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="at most the 100 samples of an epoch, got 101"):
        loader(Failing(bad=-1), 101, seed=0)
    with pytest.raises(ValueError, match="ahead must be at least 0, got -1"):
        Loader(taking(0), ahead=-1)
    assert not of_the_loader()


def test_waiting_is_measured_and_short_where_a_step_takes_longer_than_a_batch() -> None:
    waited = {}
    for ahead in (0, 2):
        began = time.perf_counter()
        with Loader(taking(0.02), ahead=ahead) as found:
            next(found)
            first_seconds, first_ended = found.waiting_seconds, time.perf_counter()
            for _ in range(10):
                time.sleep(0.05)
                next(found)
            waited[ahead] = found.waiting_seconds - first_seconds
            assert 0 < first_seconds < first_ended - began
            assert first_ended - began >= 0.02  # Ahead, the first one is begun before it is asked for.
            if not ahead:
                assert first_seconds >= 0.02
    assert waited[0] >= 10 * 0.02
    assert waited[2] < waited[0] / 2


def test_a_workloads_own_batches_are_made_in_the_loops_thread() -> None:
    """They draw on torch's one generator, which a step's dropout draws on at the same time."""
    threads = []

    def batch(size: int) -> Any:
        threads.append(threading.current_thread())
        return torch.randn(size)

    own = OwnBatches(batch=batch)
    before = torch.get_rng_state()
    with loader(own, 4, seed=2, start=1) as found:
        made = [next(found) for _ in range(3)]
    assert set(threads) == {threading.main_thread()}
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(made, batches(own, 4, seed=2, start=1), strict=False):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_on_cuda_batches_lie_in_page_locked_memory() -> None:
    with loader(dataset(), 10, seed=0, device=torch.device("cuda")) as found:
        batch = next(found)
    assert batch["images"].is_pinned()
    assert batch["images"][2:4].is_pinned()


@pytest.mark.parametrize(
    ("room_bytes", "ahead"), [(-1, 0), (0, 0), (19, 0), (20, 1), (79, 3), (80, 4), (1000, AHEAD)]
)
def test_on_a_cpu_as_many_batches_are_ahead_as_the_budget_has_room_for(room_bytes: int, ahead: int) -> None:
    """A peak of 600 bytes, stated 10% off, of which the step's own batch is 20."""
    assert batches_ahead(planned(budget_bytes=660 + room_bytes)) == ahead


def test_without_a_budget_and_on_a_gpu_all_batches_are_ahead() -> None:
    assert batches_ahead(planned(budget_bytes=None)) == AHEAD
    tight = planned(budget_bytes=661)
    on_gpu = msgspec.structs.replace(tight, device=msgspec.structs.replace(tight.device, kind="cuda"))
    assert (batches_ahead(tight), batches_ahead(on_gpu)) == (0, AHEAD)


def planned(budget_bytes: int | None) -> Plan:
    made = plan()
    parts = msgspec.structs.replace(
        made.prediction.parts, peak_memory_bytes={"parameters": 580, "inputs": 20}
    )
    prediction = msgspec.structs.replace(made.prediction, peak_memory_bytes=600, parts=parts)
    return msgspec.structs.replace(made, prediction=prediction, memory_budget_bytes=budget_bytes)

"""Which storages are alive, counted by hand; and the same computation under fake tensors, to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from profiler.fake import RealIntegers, fake_batch, fake_parameters
from profiler.live import LiveStorages, storage_bytes
from profiler.workload import Workload
from tests.models import cnn, mlp

KIB_OF_FLOATS = 256


def test_views_share_one_storage() -> None:
    with LiveStorages() as live:
        base = torch.zeros(4, KIB_OF_FLOATS)
        views = [base[0], base.view(-1), base.t(), base.detach()]
    assert live.live_bytes == 4 * 1024
    assert {live.key_of(view) for view in views} == {live.key_of(base)}


def test_a_storage_is_freed_with_its_last_view() -> None:
    with LiveStorages() as live:
        base = torch.zeros(4, KIB_OF_FLOATS)
        row = base[0]
        del base
        assert live.live_bytes == 4 * 1024
        del row
        assert live.live_bytes == 0


def test_frees_and_allocations_are_reported_as_they_happen() -> None:
    seen: list[tuple[str, int, int]] = []
    with LiveStorages(observe=lambda *event: seen.append(event)):
        first = torch.zeros(KIB_OF_FLOATS)
        second = first + 1
        del first
        del second
    assert seen == [("alloc", 0, 1024), ("alloc", 1, 1024), ("free", 0, 1024), ("free", 1, 1024)]


def test_peak_of_a_computation_worked_out_by_hand() -> None:
    """x is 1 KiB and tracked; a and b stand beside it (3 KiB), a goes, c of 2 KiB comes (4 KiB), b goes, c goes,
    and what comes after them is no peak."""
    x = torch.zeros(KIB_OF_FLOATS)
    with LiveStorages() as live:
        live.track([x])
        a = x * 2
        b = a + 1
        assert live.live_bytes == live.peak_bytes == 3 * 1024
        del a
        c = torch.cat([b, b])
        assert live.live_bytes == live.peak_bytes == 4 * 1024
        del b
        assert (live.live_bytes, live.peak_bytes) == (3 * 1024, 4 * 1024)
        del c
        d = x + 1
    assert (live.live_bytes, live.peak_bytes) == (2 * 1024, 4 * 1024)
    del d


def test_an_operation_in_place_takes_nothing() -> None:
    x = torch.zeros(KIB_OF_FLOATS)
    with LiveStorages() as live:
        live.track([x])
        x.add_(1).mul_(2)
    assert live.peak_bytes == 1024


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_sizes_are_rounded_up_to_whole_blocks(size: int, taken: int) -> None:
    assert storage_bytes(torch.zeros(size, dtype=torch.uint8).untyped_storage(), block_bytes=512) == taken


def test_every_storage_is_rounded_by_itself() -> None:
    with LiveStorages(block_bytes=512) as live:
        pair = [torch.zeros(1), torch.zeros(129)]
    assert live.live_bytes == 512 + 1024
    del pair


def test_operations_are_reported_with_what_they_read_and_return() -> None:
    seen: list[tuple[str, list[int], list[int]]] = []
    x = torch.zeros(2)
    with LiveStorages(operation=lambda func, read, made: seen.append((str(func), read, made))) as live:
        live.track([x])
        y = x.view(1, 2) + 1
    assert seen == [("aten.view.default", [0], [0]), ("aten.add.Tensor", [0], [1])]
    del y


@pytest.mark.parametrize("build", [mlp, cnn])
def test_fake_and_real_steps_agree_at_every_allocation(build: Callable[[], Workload]) -> None:
    workload = build()
    assert course(workload, fake=True) == course(workload, fake=False)


def course(workload: Workload, *, fake: bool) -> list[tuple[str, int]]:
    """Every allocation of a forward and backward pass, and every free, with the bytes alive after it."""
    points: list[tuple[str, int]] = []
    with contextlib.ExitStack() as stack:
        batch = workload.batch(3)
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            batch = fake_batch(mode, batch)
            for context in (fake_parameters(workload.model, mode), mode, RealIntegers()):
                stack.enter_context(context)
        live = LiveStorages(observe=lambda event, key, size: points.append((event, live.live_bytes)))
        with live:
            live.track(workload.model.parameters())
            live.track(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
            workload.loss(workload.model, batch).backward()
            workload.model.zero_grad(set_to_none=True)
            return points.copy()


def test_fake_parameters_are_put_back_when_the_run_fails() -> None:
    model = mlp().model
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fail_among_fakes() -> None:
        with fake_parameters(model, mode):
            assert {id(parameter) for parameter in model.parameters()}.isdisjoint(before.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_among_fakes()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_integers_stay_real_under_fake_tensors_so_that_branches_are_those_of_a_real_step() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tokens = fake_batch(mode, torch.tensor([3, 1]))
    with mode, RealIntegers():
        assert bool((torch.arange(2) == tokens - tokens + torch.arange(2)).all())
        assert tokens.tolist() == [3, 1]

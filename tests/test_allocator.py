"""The allocator's own account, and the two corrections that make a fake step's course that of a real one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from profiler.allocator import AllocatorMeter, bytes_of, measure_step
from profiler.chain import discover
from profiler.events import Accumulate, Alloc, Enter, Event, Free, Operate, Save, Trace, settle
from profiler.memory import MemoryTracer
from profiler.profile_record import Precision
from profiler.step import Stepper, build_optimizer
from profiler.timing import stepper_for
from profiler.workload import Workload
from profiler.workspaces import Workspaces, kind_of
from tests.models import ZOO, cnn, gpt2

CPU = torch.device("cpu")
MIB = 2**20


def mebibyte(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_the_peak_is_the_highest_of_what_was_in_use_at_once() -> None:
    with AllocatorMeter() as meter:
        first = mebibyte(3)
        second = mebibyte(4)
        del first
        third = mebibyte(2)
        del second, third
    assert meter.peak_bytes == 7 * MIB
    assert max(level for _, level in meter.course()) == 7 * MIB
    assert meter.course()[-1][1] == 0


def test_what_was_there_before_does_not_count_and_letting_go_of_it_is_no_peak() -> None:
    before = mebibyte(5)
    with AllocatorMeter() as meter:
        del before
        assert meter is not None
    assert meter.peak_bytes == 0


def test_a_span_has_the_rise_above_its_own_beginning() -> None:
    with AllocatorMeter() as meter:
        kept = mebibyte(8)
        with meter.span("one"):
            passing = mebibyte(2)
            more = mebibyte(1)
            del passing
        with meter.span("two"):
            del more
        with meter.span("three"):
            again = mebibyte(4)
    assert dict(meter.peaks_in_spans()) == {"one": 3 * MIB, "two": 0, "three": 4 * MIB}
    assert bytes_of([kept, again, kept[: 2 * MIB]]) == 12 * MIB


def test_a_measured_step_counts_parameters_state_batches_and_all_that_it_takes() -> None:
    model = nn.Linear(256, 256, bias=False)
    optimizer = build_optimizer("sgd", model)
    batch = torch.ones(64, 256)

    def step() -> None:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    weight, rows = 256 * 256 * 4, 64 * 256 * 4
    # weight and momentum, batch, the output's gradient (an expanded scalar made dense), the weight's gradient
    peak = measure_step(step, model, optimizer, batch, CPU).peak_bytes
    assert 2 * weight + rows + weight <= peak <= 2 * weight + rows + weight + 2 * rows


def test_a_sum_of_gradients_is_written_into_the_operand_that_nobody_else_holds() -> None:
    events: list[Event] = [
        Alloc(1, 10), Alloc(2, 10), Accumulate((1, 2)), Alloc(3, 10), Free(1, 10), Free(2, 10), Operate(None),
        Save(3), Free(3, 10),
    ]  # fmt: skip
    assert settle(events, None) == [Alloc(1, 10), Alloc(2, 10), Free(2, 10), Save(1), Free(1, 10)]


def test_a_chain_of_sums_stays_in_the_first_storage() -> None:
    events: list[Event] = [
        Alloc(1, 10), Alloc(2, 10), Accumulate((1, 2)), Alloc(3, 10), Free(1, 10), Free(2, 10),
        Alloc(4, 10), Accumulate((3, 4)), Alloc(5, 10), Free(3, 10), Free(4, 10), Free(5, 10),
    ]  # fmt: skip
    trace = Trace(events=settle(events, None))
    assert trace.events[-1] == Free(1, 10)
    assert trace.peak_bytes == 20


def test_a_sum_is_a_third_tensor_when_both_operands_live_on_or_are_not_dense() -> None:
    held: list[Event] = [
        Alloc(1, 10),
        Alloc(2, 10),
        Accumulate((1, 2)),
        Alloc(3, 10),
        Enter(("between", 0, 0)),
    ]
    assert Trace(events=settle(held, None)).peak_bytes == 30
    expanded: list[Event] = [Alloc(1, 1), Alloc(2, 10), Accumulate((2,)), Alloc(3, 10), Free(1, 1)]
    assert Trace(events=settle(expanded, None)).peak_bytes == 21


class Twice(nn.Module):
    """The widest tensor is used twice, so its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 4096)
        self.left = nn.Linear(4096, 4)
        self.right = nn.Linear(4096, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        return self.left(x) + self.right(x)


def scored(model: nn.Module) -> Workload:
    return Workload(
        model=model,
        batch=lambda size: torch.ones(size, 8),
        loss=lambda model, batch: F.mse_loss(model(batch), torch.zeros(len(batch), 4)),
    )


def traced_and_real(workload: Workload, size: int, *, watch: bool) -> tuple[int, int]:
    workspaces = Workspaces(CPU)
    stepper: Stepper = stepper_for(workload, "sgd", "fp32", CPU)
    batches = [workload.batch(size) for _ in range(2)]
    stepper.step(batches, 2)
    if watch:
        with workspaces.watching():
            stepper.step(batches, 2)
    tracer = MemoryTracer(workload, discover(workload), "sgd", workspaces=workspaces)
    traced = tracer.plain_peak_bytes("fp32", size)
    return traced, measure_step(
        lambda: stepper.step(batches, 2), workload.model, stepper.optimizer, batches, CPU
    ).peak_bytes


def test_a_tensor_used_twice_is_predicted_to_the_byte() -> None:
    traced, real = traced_and_real(scored(Twice()), 64, watch=True)
    assert traced == pytest.approx(real, abs=64)


def test_tied_weights_are_predicted_to_the_byte() -> None:
    traced, real = traced_and_real(gpt2(), 3, watch=True)
    assert traced == pytest.approx(real, abs=64)


def test_scratch_memory_of_convolutions_is_what_the_prediction_lacks_without_watching() -> None:
    unwatched, real = traced_and_real(cnn(), 4, watch=False)
    assert unwatched < 0.95 * real
    traced, real = traced_and_real(cnn(), 4, watch=True)
    assert traced == real


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in sorted(ZOO)), ("gpt2", "bf16"), ("mlp", "bf16")]
)
def test_operations_tried_out_one_by_one_tell_what_a_whole_step_takes(
    name: str, precision: Precision
) -> None:
    workload = ZOO[name]()
    workspaces = Workspaces(CPU, trying_bytes=2**24)
    tracer = MemoryTracer(workload, discover(workload), "adamw", workspaces=workspaces)
    traced = tracer.plain_peak_bytes(precision, 4)
    stepper = stepper_for(workload, "adamw", precision, CPU)
    batches = [workload.batch(4) for _ in range(2)]
    stepper.step(batches, 2)
    real = measure_step(lambda: stepper.step(batches, 2), workload.model, stepper.optimizer, batches, CPU)
    assert not workspaces.refused
    assert traced == pytest.approx(real.peak_bytes, abs=1024)


def test_an_operation_that_is_too_large_to_be_tried_is_refused() -> None:
    workload = cnn()
    workspaces = Workspaces(CPU, trying_bytes=1024)
    MemoryTracer(workload, discover(workload), "sgd", workspaces=workspaces).plain_peak_bytes("fp32", 4)
    assert any(kind.function is torch.ops.aten.convolution.default for kind in workspaces.refused)


def test_an_operation_that_reads_another_kernels_buffer_is_not_tried_on_zeros() -> None:
    """An LSTM's backward kernel would kill the process."""
    model = nn.LSTM(8, 8, batch_first=True)
    workload = Workload(
        model=model,
        batch=lambda size: torch.ones(size, 5, 8),
        loss=lambda model, batch: model(batch)[0].square().mean(),
    )
    workspaces = Workspaces(CPU, trying_bytes=2**24)
    MemoryTracer(workload, discover(workload), "sgd", workspaces=workspaces).plain_peak_bytes("fp32", 4)
    assert any("backward" in kind.function.__name__ for kind in workspaces.refused)


def test_kinds_are_equal_for_equal_shapes_and_differ_in_strides_types_and_scalars() -> None:
    add = torch.ops.aten.add.Tensor
    one = torch.ones(2, 3)

    def kind(tensor: torch.Tensor, alpha: int = 1) -> object:
        return kind_of(add, (tensor, tensor), {"alpha": alpha})

    assert kind(one) == kind(torch.zeros(2, 3))
    others = [kind(torch.ones(3, 2).t()), kind(one.double()), kind(torch.ones(2, 4)), kind(one, alpha=2)]
    assert all(other != kind(one) for other in others)
    assert kind_of(torch.ops.aten.t.default, (one,), None) is None


def test_strides_that_lead_nowhere_make_no_other_kind() -> None:
    norm = torch.ops.aten.relu.default
    kinds = [kind_of(norm, (torch.ones(6).as_strided((1, 6), (far, 1)),), None) for far in (1, 6)]
    assert kinds[0] == kinds[1]


def test_an_operation_on_another_layout_takes_the_most_that_was_seen() -> None:
    workspaces, wide = Workspaces(CPU), torch.ones(64, 32)
    with workspaces.watching():
        torch.relu(wide)
    known, other = (kind_of(torch.ops.aten.relu.default, (t,), None) for t in (wide, torch.ones(32, 64).t()))
    assert known is not None
    assert other is not None
    assert known != other
    taken = workspaces.taken(known)
    assert taken is not None
    assert taken.peak_bytes == 64 * 32 * 4
    assert workspaces.taken(other) == taken


class Patches(nn.Module):
    """A convolution over patches, whose gradient comes back with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, stride=8)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.patch(x).flatten(2).transpose(1, 2)).mean(1)


def test_a_single_sample_is_predicted_to_the_byte() -> None:
    workload = Workload(
        model=Patches(),
        batch=lambda size: torch.ones(size, 3, 64, 64),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    traced, real = traced_and_real(workload, 1, watch=True)
    assert traced == real


def test_an_unknown_kind_adds_nothing() -> None:
    found = kind_of(torch.ops.aten.add.Tensor, (torch.ones(2), torch.ones(2)), None)
    assert found is not None
    assert Workspaces(CPU).taken(found) is None
    assert settle([Operate(found), Alloc(1, 8)], Workspaces(CPU)) == [Alloc(1, 8)]


class Tied(nn.Module):
    """The embedding is the head's weight: its gradient from the head is a view, which no sum is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.embedding(x), self.embedding.weight)


def test_a_tied_weight_that_is_most_of_the_model_is_predicted_to_the_byte() -> None:
    workload = Workload(
        model=Tied(),
        batch=lambda size: torch.zeros(size, 2, dtype=torch.int64),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    traced, real = traced_and_real(workload, 2, watch=True)
    assert traced == pytest.approx(real, abs=64)


def test_an_lstm_whose_fake_kernel_forgets_its_buffer_is_predicted_to_the_byte() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return x

    workload = Workload(
        model=Recurrent(),
        batch=lambda size: torch.ones(size, 12, 8),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    traced, real = traced_and_real(workload, 4, watch=True)
    assert traced == pytest.approx(real, abs=64)
    unwatched, real = traced_and_real(workload, 4, watch=False)
    assert unwatched < 0.8 * real

"""What autograd saves, kept off the device: the same numbers, less memory, and a clock that stands still meanwhile."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from profiler import timing
from profiler.allocator import AllocatorMeter
from profiler.chain import discover
from profiler.elsewhere import SMALLEST_BYTES, Away, Elsewhere, NoRoomElsewhere
from profiler.workload import Workload
from profiler.workspaces import Workspaces

CPU = torch.device("cpu")
ELEMENTS = SMALLEST_BYTES // 4


class Attention(nn.Module):
    """Views into one product, an expanded mask, dropout, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.qkv = nn.Linear(64, 192)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        scores = F.dropout((query @ key.mT).softmax(-1), 0.1)
        x = x + scores @ value * torch.ones(1, 1, 1).expand_as(x)
        return F.linear(x, self.embedding.weight)


class Convolutions(nn.Module):
    """Channels last, batch norm, and an operation in place on what another has saved by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 8, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        out: torch.Tensor = self.second(x).exp_()
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "attention": (Attention, lambda: torch.randint(50, (16, 128))),
    "convolutions": (
        Convolutions,
        lambda: torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last),
    ),
    "recurrent": (lambda: nn.GRU(64, 128, batch_first=True), lambda: torch.randn(16, 64, 64)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_those_of_a_plain_step_bit_for_bit(case: str, precision: str) -> None:
    build, make = CASES[case]
    torch.manual_seed(0)
    model, x = build(), make()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = model(x)
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    with Elsewhere(model, CPU).holding():
        elsewhere = gradients()
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, elsewhere, strict=True))


def test_a_step_needs_what_one_operation_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseen(elements: int, dtype: torch.dtype) -> torch.Tensor:
        """The meter counts what torch maps as well, and not what numpy allocates."""
        return torch.from_numpy(np.empty(elements * dtype.itemsize, dtype=np.uint8)).view(dtype)

    monkeypatch.setattr("profiler.elsewhere._mapped", unseen)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.GELU())))
    x = torch.randn(4096, 64)

    def peak_bytes() -> int:
        with AllocatorMeter() as meter, meter.span("step"):
            model(x).sum().backward()
        model.zero_grad()
        ((_, peak),) = meter.peaks_in_spans()
        return peak

    plain = peak_bytes()
    with Elsewhere(model, CPU).holding():
        elsewhere = peak_bytes()
    tensor = x.nbytes
    assert plain > 23 * tensor
    assert elsewhere < 5 * tensor


def test_a_tensor_that_is_saved_twice_is_copied_once_unless_it_changed() -> None:
    elsewhere = Elsewhere(nn.Linear(1, 1), CPU)
    tensor = torch.zeros(2 * ELEMENTS)
    first, again = elsewhere.keep(tensor), elsewhere.keep(tensor)
    half = elsewhere.keep(tensor[:ELEMENTS])
    tensor.add_(1)
    changed = elsewhere.keep(tensor)
    kept = [each for each in (first, again, half, changed) if isinstance(each, Away)]
    assert len(kept) == 4
    assert kept[0].room is kept[1].room
    assert len({id(each.room) for each in kept}) == 3
    assert elsewhere.give_back(first).sum() == 0
    assert elsewhere.give_back(half).shape == (ELEMENTS,)
    assert elsewhere.give_back(changed).sum() == tensor.sum()


def test_another_tensor_in_the_same_place_is_copied_anew() -> None:
    elsewhere = Elsewhere(nn.Linear(1, 1), CPU)
    buffer = bytearray(4 * ELEMENTS)
    kept = elsewhere.keep(torch.frombuffer(buffer, dtype=torch.float32))
    buffer[:4] = b"\x00\x00\x80\x3f"
    later = elsewhere.keep(torch.frombuffer(buffer, dtype=torch.float32))
    assert elsewhere.give_back(kept)[0] == 0
    assert elsewhere.give_back(later)[0] == 1


def test_small_tensors_and_the_models_own_stay() -> None:
    model = nn.Linear(256, 256)
    elsewhere = Elsewhere(model, CPU)
    transposed = model.weight.t()
    small = torch.zeros(ELEMENTS - 1)
    assert elsewhere.keep(transposed) is transposed
    assert elsewhere.keep(small) is small


def test_layout_is_kept() -> None:
    elsewhere = Elsewhere(nn.Linear(1, 1), CPU)
    whole = torch.arange(float(6 * ELEMENTS)).view(3, 2, ELEMENTS)
    for tensor in (whole.transpose(0, 2), whole[:, 1], whole[:, :, ::2], whole[:1].expand(4, 2, ELEMENTS)):
        kept = elsewhere.keep(tensor)
        assert isinstance(kept, Away)
        back = elsewhere.give_back(kept)
        assert back.stride() == tensor.stride()
        assert torch.equal(back, tensor)


def test_no_room_elsewhere_either_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = Elsewhere(nn.Linear(1, 1), CPU)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_BYTES // 2, hard))
    try:
        with pytest.raises(NoRoomElsewhere, match="Set TMPDIR to a folder on a larger disk"):
            elsewhere.keep(torch.zeros(ELEMENTS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_clock_stands_still_while_it_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(wall=0.0, cpu=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now.wall))
    monkeypatch.setattr(timing, "process_cpu_seconds", lambda: now.cpu)

    def pass_by(wall: float, cpu: float) -> None:
        now.wall, now.cpu = now.wall + wall, now.cpu + cpu

    clock = timing._CpuClock()
    clock.start()
    clock.mark(("forward", 0, 0))
    pass_by(1.0, 2.0)
    with clock.paused():
        pass_by(64.0, 128.0)
    clock.mark_inside(("saved", 0, 0))
    pass_by(4.0, 8.0)
    clock.mark(("backward", 0, 0))
    with clock.paused():
        pass_by(64.0, 128.0)
    pass_by(16.0, 32.0)
    found = clock.read()
    assert found.wall == {("saved", 0, 0): 1.0, ("forward", 0, 0): 5.0, ("backward", 0, 0): 16.0}
    assert found.process_cpu == {("saved", 0, 0): 2.0, ("forward", 0, 0): 10.0, ("backward", 0, 0): 32.0}
    clock.start()
    clock.mark(("forward", 0, 0))
    pass_by(1.0, 1.0)
    assert clock.read().wall == {("forward", 0, 0): 1.0}


def test_copying_is_in_no_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is made to take 50 ms a tensor, of the eight and more that each micro-batch saves."""
    moved = Elsewhere._moved
    copies: list[int] = []

    def slowly(self: Elsewhere, tensor: torch.Tensor, elements: int) -> Away:
        copies.append(elements)
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            pass
        return moved(self, tensor, elements)

    monkeypatch.setattr(Elsewhere, "_moved", slowly)
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.0)  # One step is enough.
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.GELU())))
    workload = Workload(
        model=model,
        batch=lambda size: torch.randn(size, 256),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    with timing.on_device(workload, CPU) as placed:
        found = timing.measure_times(
            placed, discover(placed, batch_size=2), optimizer="adamw", precision="fp32", micro_batch_size=128,
            device=CPU, steps=1, workspaces=Workspaces(CPU), elsewhere=True,
        )  # fmt: skip
    assert len(copies) > 3 * 2 * 8
    for times in (found.wall, found.process_cpu):
        assert times is not None
        assert times.kept_elsewhere
        assert times.step_seconds < 2 * 8 * 0.05 / 2

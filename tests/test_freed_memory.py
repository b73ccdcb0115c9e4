"""Memory that a process frees and keeps: for how long that pays."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import pytest

from profiler.freed_memory import FreedMemoryGuard

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize(("limited", "kept"), [(False, "True"), (True, "False")])
def test_a_process_whose_memory_is_limited_keeps_no_freed_blocks(limited: bool, kept: str) -> None:
    """The limit counts the holes between blocks that are kept."""
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (2**36, 2**36))" if limited else "pass"
    code = f"import resource; {limit}; from profiler.freed_memory import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kept


LOOP = """
import sys, torch
from torch import nn
from tests.test_freed_memory import resident_bytes
import executor, planner, profiler

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        wide = [n * 2**13 for n in range(1, 7)]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, 64)) for w in wide)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if keeps == "tensors":
                kept.extend(x.detach().mean() for _ in range(4))
        return x

kept, resident = [], []
keeps, model = sys.argv[1], Wide()
workload = profiler.Workload(
    model=model, batch=lambda size: torch.randn(size, 64), loss=lambda model, x: model(x).square().mean()
)
plan = planner.optimize(profiler.profile(workload, (4,), ("fp32",), "cpu", steps=1), 8)
step = executor.prepare(model, torch.optim.AdamW(model.parameters()), plan, loss=workload.loss)
after = 0
for n in range(120 if keeps == "tensors" else 40):
    value = step(workload.batch(8))
    kept.append(value if keeps == "tensors" else value.item())
    if keeps == "numbers" and n == 20:
        large = [torch.ones(2**24) for _ in range(8)]
        del large
    resident.append(resident_bytes())
    after += step._guard.ended
    if after == 8:
        break
print(resident[10], max(resident), step._guard.ended)
"""


def resident_bytes() -> int:
    """Of this process, in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize("keeps", ["tensors", "numbers"])
def test_a_loop_that_keeps_every_loss_as_a_tensor_does_not_grow_without_end(keeps: str) -> None:
    """Each may split a large block. With numbers, what is large and freed once, as by saving, is no reason to stop."""
    done = subprocess.run([sys.executable, "-c", LOOP, keeps], capture_output=True, text=True, check=True)
    early, most, ended = done.stdout.split()
    assert ended == str(keeps == "tensors")
    assert ("Keep numbers instead, as loss.item()" in done.stderr) == (keeps == "tensors")
    # Tensors have it grow by some 10 MiB a step, 840 in all if nothing stops that.
    assert int(most) - int(early) < (2**29 + 2**28 if keeps == "numbers" else 2**29)


def ended_at(growths_mib: Iterable[float], *, kept: bool = False) -> int | None:
    """The look at which a heap of 500 MiB that grows by these is told to end; what grew is free, or ``kept``."""
    guard = FreedMemoryGuard()
    for look, grown in enumerate(accumulate(growths_mib, initial=0.0)):
        if guard.grows_without_end(int((500 + grown) * MIB), int((170 + (0 if kept else grown)) * MIB)):
            return look
    return None


def test_a_heap_that_grows_with_each_step_is_told_to_end() -> None:
    """At the first look of which the growths but one sum to more than 170 / 2 + 64 MiB."""
    assert ended_at([154] * 40) == 5  # As GPT-2's; five looks must have seen it grow.
    assert ended_at([24] * 40) == 8
    assert ended_at([24, 0] * 40) == 15
    assert ended_at([0] * 500 + [24] * 40) == 508


@pytest.mark.parametrize(
    "growths_mib",
    [
        [2, 16, 4, 464, 1, 0, 2, 0, 1, 0, 0, 3, 0, 1, 1],
        [300] + [0] * 9 + [200] + [0] * 9 + [150],
        [2, -1, 0, -1] * 100,
        [0.0] * 3 + [100, 0, 60, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0, 0, 0, 40] + [0] * 30 + [30],
        [100, -100] * 100,
    ],
    ids=[
        "one saving and holes",
        "an evaluation of each kind",
        "holes that come and go",
        "longer batches",
        "to and fro",
    ],
)
def test_a_heap_that_has_grown_to_what_its_steps_need_is_left_alone(growths_mib: list[float]) -> None:
    assert ended_at(growths_mib) is None


def test_a_loop_that_needs_what_its_heap_grows_by_gains_nothing_by_giving_back() -> None:
    assert ended_at([154] * 40, kept=True) is None


def test_what_the_loop_itself_lets_go_of_is_no_growth() -> None:
    guard = FreedMemoryGuard()
    for look in range(40):
        assert not guard.grows_without_end((1500 + look) * MIB, (170 if look < 5 else 1170 + look) * MIB)

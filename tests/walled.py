"""Two runs of one plan, the memory of the second taken away while it trains: ``python -m tests.walled FOLDER BYTES``.

The model has few weights and much to keep. After the third step the process may have so many bytes more than it then
has, and no more. What it has by then has holes, which would be memory that the limit does not count: they are filled.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import executor
import planner
import profiler
from executor.run import Progress
from executor.trial import data_bytes
from profiler.freed_memory import release_freed_memory

WIDTH = 64
LENGTH = 512


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8 * WIDTH)
        self.down = nn.Linear(8 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.drop(self.down(F.gelu(self.up(x))))
        return out


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x.mean(dim=1))
        return out


def batch(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(size, LENGTH, WIDTH), "labels": torch.randint(4, (size,))}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def workload() -> profiler.Workload:
    torch.manual_seed(0)
    return profiler.Workload(model=Tower(), batch=batch, loss=loss)


class Lowering(Progress):
    """Takes memory away after the third step, unless it is 0 bytes that should be left."""

    def __init__(self, spare_bytes: int) -> None:
        self.said: list[str] = []
        self.losses: list[float] = []
        self._spare_bytes = spare_bytes

    def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
        self.losses.append(loss)
        if step == 3 and self._spare_bytes:
            # A process that keeps what it frees would not notice.
            release_freed_memory(torch.device("cpu"))
            fill_holes()
            limit = data_bytes() + self._spare_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def announced(self, message: str) -> None:
        self.said.append(message)


def fill_holes() -> None:
    """Take what the allocator has and does not use, from the biggest piece to the smallest that a tensor may find."""
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    for size in (2**power for power in range(24, 12, -1)):
        before = data_bytes()
        while malloc(size) and data_bytes() <= before:
            pass


def main() -> int:
    folder, spare = Path(sys.argv[1]), int(sys.argv[2])
    profile = profiler.profile(workload(), batch_sizes=(4,), precisions=("fp32",), device="cpu", steps=2)
    plan = planner.optimize(profile, global_batch_size=8)
    free, walled = Lowering(0), Lowering(spare)
    reports = [
        executor.train(
            plan, None, folder / name, workload=workload(), steps=8, learning_rate=1e-3, progress=progress
        )
        for name, progress in (("free", free), ("walled", walled))
    ]
    print(
        json.dumps(
            {
                "plain": plan.prediction.peak_memory_bytes,
                "losses": [free.losses, walled.losses],
                "said": walled.said,
                "fallbacks": [report.fallbacks for report in reports],
                "samples": [report.samples for report in reports],
                "peaks": [report.measured.peak_memory_bytes for report in reports],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

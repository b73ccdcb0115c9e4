"""A run whose memory is taken away while it trains: ``python -m tests.walled FOLDER``.

The model has little to learn from and much to keep: 24 blocks whose activations are 30 times their weights. After the
third step the process may have so much memory as a plan needs that recomputes, and no more.
"""

from __future__ import annotations

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
from executor.errors import OutOfMemory
from executor.run import Progress
from executor.trial import data_bytes
from profiler.device import release_freed_memory

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
    """Takes memory away after the third step, down to ``share`` of what the process had at most."""

    def __init__(self, spare_bytes: int) -> None:
        self.said: list[str] = []
        self.losses: list[float] = []
        self._spare_bytes = spare_bytes

    def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
        self.losses.append(loss)
        if step == 3 and self._spare_bytes:
            # A process that keeps what it frees would not notice.
            release_freed_memory(torch.device("cpu"))
            limit = data_bytes() + self._spare_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def announced(self, message: str) -> None:
        self.said.append(message)


def main() -> int:
    folder, spare = Path(sys.argv[1]), int(sys.argv[2])
    profile = profiler.profile(workload(), batch_sizes=(8,), precisions=("fp32",), device="cpu", steps=2)
    plan = planner.optimize(profile, global_batch_size=16)
    lowering = Lowering(spare)
    found: dict[str, object] = {}
    try:
        report = executor.train(
            plan, None, folder, workload=workload(), steps=8, learning_rate=1e-3, progress=lowering
        )
        found = {
            "fallbacks": report.fallbacks,
            "samples": report.samples,
            "peak": report.measured.peak_memory_bytes,
        }
    except OutOfMemory as error:
        found = {"refused": str(error)}
    peaks = sorted(choice.prediction.peak_memory_bytes for choice in plan.front)
    facts = {"losses": lowering.losses, "said": lowering.said, "plain": plan.prediction.peak_memory_bytes}
    print(json.dumps(found | facts | {"tightest": peaks[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

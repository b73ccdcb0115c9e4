"""A tower of blocks that does what the environment says, from outside of the process that runs it.

``FAULT``: sleep, segfault, raise, exit or memory, at the third call of the loss. ``FAULT_FILE``: only in the first
process that finds no file of this name, which it makes.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch
from torch import nn

from profiler.workload import Workload

WIDTH = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tower() -> Workload:
    calls = 0

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            _misbehave()
        return model(batch).square().mean()

    return Workload(model=Tower(), batch=lambda size: torch.ones(size, 64, WIDTH), loss=loss)


def _misbehave() -> None:
    fault, file = os.environ.get("FAULT"), os.environ.get("FAULT_FILE")
    if fault is None:
        return
    if file is not None:
        if Path(file).exists():
            return
        Path(file).write_text(str(os.getpid()))
    if fault == "sleep":
        time.sleep(3600)
    elif fault == "segfault":
        ctypes.string_at(0)
    elif fault == "raise":
        raise ArithmeticError("a wrong turn")
    elif fault == "exit":
        os._exit(7)
    elif fault == "memory":
        torch.ones(2**29).sum()

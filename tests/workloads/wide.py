"""Wide layers, whose weights are most of what a process holds, so that dealing them out shows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from profiler.workload import Workload

WIDTH = 768


def wide() -> Workload:
    """Four linear layers."""
    modules = [module for _ in range(4) for module in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]

    def batch(size: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(size, WIDTH), "y": torch.randn(size, WIDTH)}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(model(batch["x"]), batch["y"])

    return Workload(model=torch.nn.Sequential(*modules), batch=batch, loss=loss)

"""A workload small enough for any test, and functions that are no workloads."""

from __future__ import annotations

import torch

from profiler.workload import Workload

SETTINGS = {"width": 4}


def linear() -> Workload:
    """Four numbers in, two classes out; ten parameters. Its batches come from torch's global generator."""

    def batch(size: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(size, 4), "y": torch.randint(2, (size,))}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    return Workload(model=torch.nn.Linear(4, 2), batch=batch, loss=loss)


def forgets_to_return() -> None:
    linear()


def returns_a_model() -> torch.nn.Module:
    return torch.nn.Linear(4, 2)


def raises() -> Workload:
    torch.rand(1)
    raise RuntimeError("no such\nfile.")


def frozen() -> Workload:
    return Workload(model=torch.nn.Linear(4, 2).requires_grad_(False), batch=torch.ones, loss=torch.dist)

"""A chain of small blocks: what profiles and plans of real models have, in a few milliseconds."""

from __future__ import annotations

import torch

from profiler.workload import Workload

WIDTH, BLOCKS, CLASSES = 64, 6, 10


def mlp() -> Workload:
    """Six blocks that recomputation can leave out, and a head that averages over the sequence."""

    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.LayerNorm(WIDTH))

    def batch(size: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(size, 32, WIDTH), "y": torch.randint(CLASSES, (size,))}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]).mean(1), batch["y"])

    model = torch.nn.Sequential()
    model.add_module("h", torch.nn.Sequential(*(block() for _ in range(BLOCKS))))
    model.add_module("head", torch.nn.Linear(WIDTH, CLASSES))
    return Workload(model=model, batch=batch, loss=loss)


def bad_batch() -> Workload:
    """A workload with a bug of its user's in it."""

    def batch(size: int) -> dict[str, torch.Tensor]:
        raise ValueError("my own mistake")

    return Workload(model=torch.nn.Linear(4, 2), batch=batch, loss=lambda model, batch: model(batch).sum())

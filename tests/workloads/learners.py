"""Two models that learn in seconds: which token follows which, and which colour an image is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from profiler.workload import Workload

TOKENS, LENGTH, CLASSES, SIZE = 512, 16, 10, 32


def speller() -> Workload:
    """Guesses the next token from the last."""

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(TOKENS, (size, LENGTH))
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = model(batch["input_ids"][:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())

    model = torch.nn.Sequential(torch.nn.Embedding(TOKENS, 32), torch.nn.Linear(32, TOKENS))
    return Workload(model=model, batch=batch, loss=loss)


def painter() -> Workload:
    """Guesses an image's class from a few numbers about it."""

    def batch(size: int) -> dict[str, torch.Tensor]:
        return {"image": torch.randn(size, 3, SIZE, SIZE), "labels": torch.randint(CLASSES, (size,))}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["image"]), batch["labels"])

    model = torch.nn.Sequential(
        torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 64), torch.nn.ReLU(),
        torch.nn.Dropout(0.1), torch.nn.Linear(64, CLASSES),
    )  # fmt: skip
    return Workload(model=model, batch=batch, loss=loss)

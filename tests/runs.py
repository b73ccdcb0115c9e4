"""Training runs small enough to be killed thirty times: a model with everything that a step changes, and its plans."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn import functional as F

import planner
import profiler
from planner.plan import Plan

WIDTH = 32


class Block(nn.Module):
    """Statistics of a normalisation, random numbers, and products to be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
        return out


class Tower(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def batch(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(size, 16), "labels": torch.randint(10, (size,))}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def workload(seed: int = 0) -> profiler.Workload:
    torch.manual_seed(seed)
    return profiler.Workload(model=Tower(), batch=batch, loss=loss)


@functools.cache
def plain() -> Plan:
    """A global batch of 32 in micro-batches of 8 or more, nothing recomputed."""
    profile = profiler.profile(workload(), batch_sizes=(8,), precisions=("fp32",), device="cpu", steps=2)
    return planner.optimize(profile, global_batch_size=32)


def recomputing(plan: Plan) -> Plan:
    """The same micro-batches, with the most segments of the front."""
    tightest = max(plan.front, key=lambda choice: len(choice.checkpoint))
    return msgspec.structs.replace(plan, checkpoint=tightest.checkpoint, prediction=tightest.prediction)


def losses_by_hand(
    steps: int, *, seed: int = 0, learning_rate: float = 1e-3, k: int = 4
) -> tuple[list[float], dict[str, Any]]:
    """The loop that an expert writes, with the same data: losses and weights."""
    import math

    import numpy as np

    made = workload(seed)
    model = made.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )
    warm_up = 0.05 * steps * 32
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        state = torch.get_rng_state()
        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
        data = batch(32)
        torch.set_rng_state(state)
        seen = 32 * step
        rise = min(1.0, (seen + 32) / warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (seen - warm_up) / (32 * steps - warm_up))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * fall
        total = 0.0
        for piece in range(k):
            part = {name: value[piece * 32 // k : (piece + 1) * 32 // k] for name, value in data.items()}
            value = loss(model, part) / k
            value.backward()
            total += value.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
    return losses, model.state_dict()


def trained(folder: str, plan_file: str, steps: int, **terms: Any) -> None:
    """One process of a run that may be killed; what it was given in words, since it may be another process's."""
    import executor
    from planner.plan import load_plan

    executor.train(
        load_plan(plan_file),
        None,
        folder,
        workload=workload(),
        steps=steps,
        learning_rate=1e-3,
        resume=True,
        **terms,
    )

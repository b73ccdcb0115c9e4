"""What every engine trains here: blocks with dropout that count their calls, and the report on two runs of it.

A run with the plan's segments on the model must end with the very weights of a run without: equal gradients, bit for
bit, in every step.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import nn

import executor
from planner.plan import Plan

WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.dropout(torch.tanh(self.linear(x)))


class Network(nn.Module):
    """Four blocks and a head; ``samples``: how many it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 2)
        self.samples = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.samples += len(x)
        for block in self.h:
            x = block(x)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def dataset(samples: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(WIDTH, generator=generator), "labels": torch.randint(2, (), generator=generator)}
        for _ in range(samples)
    ]


def report(plan: Plan, train: Callable[[Network], dict[str, int]]) -> str:
    """Train twice, without and with the plan's segments: what the engine says, and what the network saw, as JSON."""
    weights, calls, said, samples = [], [], {}, 0
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Network()
        before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        if recompute:
            executor.apply_checkpoints(model, plan)
        torch.manual_seed(0)
        said = train(model)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        assert not torch.equal(before, weights[-1])
        calls.append([block.calls for block in model.h])
        samples = model.samples
    return json.dumps(said | {"samples": samples, "equal": torch.equal(*weights), "calls": calls})

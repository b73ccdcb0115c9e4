"""Models small enough to be run hundreds of times, each with something that planning or recomputing may get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from profiler.workload import Workload
from studies import workloads

CLASSES = 5


def gpt2(layers: int = 2, *, dropout: float = 0.1) -> Workload:
    """Half blocks behind one residual stream; dropout in every one; the loss is made inside the model."""
    config = GPT2Config(
        n_layer=layers, n_embd=32, n_head=2, vocab_size=64, n_positions=16, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, loss_type="ForCausalLM",
    )  # fmt: skip

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(config.vocab_size, (size, 16))
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    return Workload(model=GPT2LMHeadModel(config).train(), batch=batch, loss=loss)


def mlp(hidden_layers: int = 4) -> Workload:
    """A plain nn.Sequential of Linear and GELU: module 2 i is a Linear, 2 i + 1 a GELU."""
    layers: list[nn.Module] = [nn.Linear(12, 24)]
    for _ in range(hidden_layers - 1):
        layers += [nn.GELU(), nn.Linear(24, 24)]
    return classifier(nn.Sequential(*layers, nn.GELU(), nn.Linear(24, CLASSES)), 12)


class ResidualBlock(nn.Module):
    """torchvision's basic block: the ReLU works in place, the input is added back at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class ResidualCNN(nn.Module):
    """A convolution, residual blocks, a head: batch norm's running statistics are written in every forward."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(8) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def cnn(blocks: int = 4) -> Workload:
    return classifier(ResidualCNN(blocks), 3, 8, 8)


class DropoutNet(nn.Module):
    """Dropout inside modules and in the glue between them, where only the random state makes it the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(12, 24)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(4))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.2)) for _ in range(4))
        self.outlet = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + F.dropout(F.gelu(layer(norm(x))), 0.3, self.training)
        return self.outlet(x)


def dropout_net() -> Workload:
    return classifier(DropoutNet(), 12)


class Chained(nn.Module):
    """Modules one after the other, under names of their own, with any function of the input around them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._call = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(self, x)


def classifier(model: nn.Module, *shape: int) -> Workload:
    """Five classes: the models here are tiny."""
    return workloads.classifier(model, *shape, classes=CLASSES)


ZOO: dict[str, Callable[[], Workload]] = {"gpt2": gpt2, "mlp": mlp, "cnn": cnn, "dropout_net": dropout_net}

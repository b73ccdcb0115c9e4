"""Workloads of the studies that are in no library's list: small, and each unlike the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from profiler.workload import Workload

CLASSES = 10


def classifier(model: nn.Module, *shape: int, classes: int = CLASSES) -> Workload:
    """Cross entropy of the model's scores on random inputs of one shape."""

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, *shape), torch.randint(classes, (size,))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Workload(model=model.train(), batch=batch, loss=loss)


def language_model(model: nn.Module, vocabulary_size: int, sequence_length: int) -> Workload:
    """Random tokens for a model of transformers, which makes the loss itself."""

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(vocabulary_size, (size, sequence_length))
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = model(**batch).loss
        return value

    return Workload(model=model.train(), batch=batch, loss=loss)


def gpt2_of_three_blocks() -> Workload:
    """GPT-2's smallest with three of its twelve blocks, at 256 tokens."""
    config = GPT2Config(n_layer=3, use_cache=False)
    return language_model(GPT2LMHeadModel(config), config.vocab_size, 256)


def gpt2_medium() -> Workload:
    """355 M parameters in 24 blocks, at 1,024 tokens."""
    config = GPT2Config(n_layer=24, n_embd=1024, n_head=16, use_cache=False)
    return language_model(GPT2LMHeadModel(config), config.vocab_size, 1024)


def llama() -> Workload:
    """Six blocks with grouped-query attention and a gated MLP."""
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=8000, use_cache=False,
    )  # fmt: skip
    return language_model(LlamaForCausalLM(config), config.vocab_size, 128)


def mixtral() -> Workload:
    """Four blocks whose MLPs are mixtures of four experts, two of which see each token."""
    config = MixtralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=8000, use_cache=False,
    )  # fmt: skip
    return language_model(MixtralForCausalLM(config), config.vocab_size, 128)


def mlp() -> Workload:
    """Six hidden layers of 1,024 for images of 28 x 28."""
    hidden = [layer for _ in range(5) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    return classifier(nn.Sequential(nn.Linear(784, 1024), nn.GELU(), *hidden, nn.Linear(1024, CLASSES)), 784)


class _Recurrent(nn.Module):
    """Three LSTM layers, each a module of its own, between an embedding and a head."""

    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(3))
        self.head = nn.Linear(width, vocabulary_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        scores: torch.Tensor = self.head(x)
        return scores


def lstm() -> Workload:
    """A recurrent language model over 64 tokens."""
    vocabulary_size = 1000

    def batch(size: int) -> torch.Tensor:
        return torch.randint(vocabulary_size, (size, 65))

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Workload(model=_Recurrent(vocabulary_size, 256).train(), batch=batch, loss=loss)


def _double_convolution(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


class _UNet(nn.Module):
    """What each level of the descent made is needed again on the way up, so few places cut it in two."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _double_convolution(inside, outside)
            for inside, outside in zip((3, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _double_convolution(inside + outside, outside)
            for inside, outside in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for block, across in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), across], dim=1))
        scores: torch.Tensor = self.head(x)
        return scores


def unet() -> Workload:
    """Per-pixel classes of images of 48 x 48."""
    size = 48

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(count, 3, size, size), torch.randint(CLASSES, (count, size, size))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return Workload(model=_UNet(24, 48, 96).train(), batch=batch, loss=loss)

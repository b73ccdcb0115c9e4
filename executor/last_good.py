"""What a step changes before it updates the weights: random state and buffers. Remembered, a failed step never was.

remember ─▶ k forward and backward passes ─▶ update
                   │ out of memory, not a number
restore  ◀─────────┘  gradients dropped, buffers and random state as they were: the step can be made again
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from executor.snapshots import Tree

SMALL_BYTES: Final = 64 * 2**10
"""Buffers up to this size are always remembered: the statistics of a normalisation, which its kernels write without
telling the version counter. The mask of an attention is larger, and remembered only where the counter says it changes.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    """Of Python, numpy and torch, on the CPU and on every CUDA device that was used."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    cuda: dict[int, torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if used else ()
        return cls(
            python=random.getstate(),
            numpy=dict(np.random.get_state(legacy=False)),
            cpu=torch.get_rng_state(),
            cuda={index: torch.cuda.get_rng_state(index) for index in devices},
        )

    def set(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def tree(self) -> Tree:
        """As a snapshot holds it."""
        generator = self.numpy["state"]
        key = torch.from_numpy(generator["key"].astype(np.int64))
        return {
            "python": self.python,
            "numpy": {**self.numpy, "state": {"key": key, "pos": int(generator["pos"])}},
            "cpu": self.cpu,
            "cuda": self.cuda,
        }

    @classmethod
    def of(cls, tree: Tree) -> RandomState:
        """What ``tree`` holds; devices that are not here are left out."""
        numpy = dict(tree["numpy"])
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        numpy["state"] = {"key": key, "pos": numpy["state"]["pos"]}
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cuda = {index: state for index, state in tree["cuda"].items() if index < here}
        return cls(python=tree["python"], numpy=numpy, cpu=tree["cpu"], cuda=cuda)


class LastGood:
    """The state before a step: random state, and the buffers that steps change."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._large = [
            (buffer, buffer._version) for buffer in model.buffers() if _bytes(buffer) > SMALL_BYTES
        ]
        self._watched = [buffer.detach() for buffer in model.buffers() if _bytes(buffer) <= SMALL_BYTES]
        self._copies = [buffer.clone() for buffer in self._watched]
        self._random = RandomState.now()

    def remember(self) -> None:
        """Before a step."""
        for changed in [buffer for buffer, version in self._large if buffer._version != version]:
            self._large = [pair for pair in self._large if pair[0] is not changed]
            self._watched.append(changed.detach())
            self._copies.append(changed.clone())
        _copy(self._copies, self._watched)
        self._random = RandomState.now()

    def restore(self) -> None:
        """After a step that failed before its update: no gradients, buffers and random state as they were."""
        for parameter in self._model.parameters():
            parameter.grad = None
        _copy(self._watched, self._copies)
        self._random.set()


def _copy(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

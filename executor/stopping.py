"""Why a run stops before its last step: somebody asks it to, it has reached what it was for, or it has gone wrong.

A signal does not end the step that is running: the run asks between two steps. A second signal of the same kind
ends the process as if nobody listened.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

NOT_FINITE_STEPS: Final = 5
"""Steps in a row without a finite gradient, after which a run stops."""

OVERFLOW_STEPS: Final = 40
"""The same where a scaler halves its scale each time and the losses are finite: from 2^16 that is 2^-24."""


@dataclass(slots=True)
class Requests:
    """Which signal asked a run to stop, if any."""

    signal_number: int | None = None


@contextlib.contextmanager
def listening() -> Iterator[Requests]:
    """Inside, SIGTERM and SIGINT are noted. Only the main thread can listen; in another nothing is noted."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(number: int, frame: FrameType | None) -> None:
        requests.signal_number = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Metric = Literal["accuracy", "perplexity", "loss"]
METRICS: Final[tuple[Metric, ...]] = ("accuracy", "perplexity", "loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a run is for. Accuracy rises to it, perplexity and loss fall to it; all are of data held out."""

    metric: Metric
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """``accuracy=0.85``, ``perplexity=45``; ValueError says what else it must be."""
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        metric = next((metric for metric in METRICS if metric == name.strip()), None)
        if metric is None or not value > 0 or not math.isfinite(value):
            raise ValueError(
                f"must be METRIC=VALUE with one of {', '.join(METRICS)} and a positive number, such as "
                f"accuracy=0.85, got {text!r}"
            )
        if metric == "accuracy" and value > 1:
            raise ValueError(f"accuracy must be a share of 1, such as 0.85, got {number}")
        return cls(metric=metric, value=value)

    def is_reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "accuracy" else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


@dataclass(slots=True)
class Watch:
    """Counts steps that updated nothing because their gradients were not finite."""

    skipped: int = 0
    in_a_row: int = 0

    def stepped(self, *, applied: bool, loss: float, scaled: bool) -> bool:
        """Whether it has gone on for too long. ``scaled``: a scaler looks for a scale that does not overflow."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.skipped += not applied
        return self.in_a_row >= (OVERFLOW_STEPS if scaled and math.isfinite(loss) else NOT_FINITE_STEPS)


def first_not_finite(model: nn.Module, forward: Callable[[], object], inputs: Sequence[Any]) -> str:
    """Where a forward pass first makes something that is no finite number, in words."""
    if not _finite(inputs):
        return "the batch itself holds numbers that are not finite"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name} is not finite"
    found: list[str] = []

    def watching(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__}) is not finite")

        return look

    hooks = [module.register_forward_hook(watching(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return (
        found[0] if found else "every module's output is finite, so it is the loss or a gradient that is not"
    )


def _finite(value: Any) -> bool:
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )

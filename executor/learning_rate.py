"""The learning rate as a function of the samples seen, so that a changing effective batch does not bend it.

A schedule over steps is stretched when the batch grows half way: fewer steps are left than were planned for. One over
samples has the same course whatever batches they come in:

    peak |    /'''-.
         |   /       '-.                rate(samples) = peak * course(samples) * scale(batch)
         |  /            '-.
         | /                 '-.___
         +-+----+------------------+--▶ samples
           B  warm-up            total

``course`` rises in a line over the warm-up, then falls as a cosine to a share of the peak. The rise counts the samples
of the step itself, so the first step already moves; the cosine counts those before the step, so the last step still
does. ``scale`` is what the step's batch asks for: a mean gradient over more samples is less noisy and may be followed
further. In proportion for SGD (Goyal et al., "Accurate, large minibatch SGD", 2017), with the square root for Adam and
its kin (Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Scaling = Literal["linear", "sqrt", "none"]
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """A course over ``total_samples``; ``peak`` is for steps of ``reference_batch_size`` samples.

    ``warm_up_share`` and ``final_share`` are shares of the samples and of the peak. A constant course keeps the peak
    after its warm-up.
    """

    peak: float
    total_samples: int
    reference_batch_size: int
    warm_up_share: float = 0.05
    final_share: float = 0.0
    scaling: Scaling = "linear"
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        if not (0 < self.peak < math.inf):
            raise ValueError(f"The peak of the learning rate must be positive and finite, got {self.peak}.")
        for name in ("total_samples", "reference_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (0 <= self.warm_up_share < 1):
            raise ValueError(
                f"warm_up_share must be at least 0 and below 1, got {self.warm_up_share}. It is a share of all "
                "samples: 0.05 for 5%."
            )
        if not (0 <= self.final_share <= 1):
            raise ValueError(
                f"final_share must be from 0 to 1, got {self.final_share}. It is a share of the peak: 0.1 for a tenth."
            )
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {self.scaling!r}.")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}."
            )
        if self.schedule == "constant" and self.final_share:
            raise ValueError(
                f"A constant schedule must have no final_share, got {self.final_share}: it ends at its peak. "
                "Leave it out, or choose cosine."
            )

    def at(self, samples_seen: int, batch_size: int) -> float:
        """The rate for a step on ``batch_size`` samples, all of its micro-batches, after ``samples_seen`` others."""
        if samples_seen < 0 or batch_size < 1:
            raise ValueError(
                "samples_seen must be at least 0 and batch_size at least 1, "
                f"got {samples_seen} and {batch_size}."
            )
        return self.peak * self._course(samples_seen, batch_size) * self._scale(batch_size)

    def _course(self, samples_seen: int, batch_size: int) -> float:
        warm_up = self.warm_up_share * self.total_samples
        risen = samples_seen + batch_size
        rise = risen / warm_up if risen < warm_up else 1.0
        if self.schedule == "constant":
            return rise
        progress = min(1.0, max(0.0, (samples_seen - warm_up) / (self.total_samples - warm_up)))
        fall = self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2
        return rise * fall

    def _scale(self, batch_size: int) -> float:
        ratio = batch_size / self.reference_batch_size
        match self.scaling:
            case "linear":
                return ratio
            case "sqrt":
                return math.sqrt(ratio)
            case "none":
                return 1.0


def beta2_at(reference_beta2: float, batch_ratio: float) -> float:
    """AdamW's beta2 for a batch of ``batch_ratio`` times the one that ``reference_beta2`` is for.

    ``beta2 ** batch_ratio`` keeps the half-life of the mean of squared gradients constant in samples: one step on twice
    the samples forgets as much as two steps did (Marek et al., "Small batch size training for language models", 2025,
    who take beta2* = beta2 ** (B* / B)). torch's bias correction takes the beta2 of now for that of all steps so far:
    within the first 1 / (1 - beta2) steps a batch that grows lengthens them too, by at most the square root of its
    growth.
    """
    if not (0 <= reference_beta2 < 1):
        raise ValueError(f"reference_beta2 must be at least 0 and below 1, got {reference_beta2}.")
    if not (0 < batch_ratio < math.inf):
        raise ValueError(f"batch_ratio must be positive and finite, got {batch_ratio}.")
    return math.pow(reference_beta2, batch_ratio)

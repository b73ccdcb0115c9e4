"""One optimizer step, as everybody here runs it.

The profiler traces it, times it and the executor trains with it, so there is one definition of what a step
is:

    for each of k micro-batches:   loss(model, micro_batch) under autocast;  backward of loss / k
    then:                          unscale, clip by norm, optimizer.step(), gradients set to None

The mean of the k micro-batch gradients equals the gradient of one batch of k times the size, to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from profiler import absent
from profiler.profile_record import OPTIMIZERS, Precision

AUTOCAST_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Loss = Callable[[nn.Module, Any], torch.Tensor]


class StepObserver:
    """Told where in a step the machine is. The base class observes nothing."""

    def forward_begins(self, micro_batch: int) -> None: ...

    def backward_begins(self, micro_batch: int) -> None: ...

    def backward_ended(self, micro_batch: int) -> None: ...

    def optimizer_begins(self) -> None: ...

    def updated(self, gradient_norm: torch.Tensor | None, applied: bool | None) -> None:
        """``gradient_norm``: of all gradients, before they were clipped; None where nothing is clipped.

        ``applied``: whether the weights were updated; None where nobody waited to see whether a scaler skipped it.
        """

    def step_ended(self) -> None: ...


SILENT = StepObserver()


def autocast(precision: Precision, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Around forward passes: products in the precision, weights in fp32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    if device_type == "cuda" and not torch.cuda.is_available():
        return absent.autocast(dtype)
    return torch.autocast(device_type, dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepper:
    """All that an optimizer step needs except the data. ``max_gradient_norm`` None means no clipping.

    ``skip_not_finite``: gradients that are not finite update nothing, in any precision, as a scaler has it in fp16; to
    see it, the step waits for the device before its update.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    precision: Precision
    device_type: str
    scaler: torch.amp.GradScaler | None = None
    max_gradient_norm: float | None = 1.0
    skip_not_finite: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.precision, self.device_type)

    def step(
        self, micro_batches: Iterable[Any], gradient_accumulation_steps: int, observer: StepObserver = SILENT
    ) -> torch.Tensor:
        """Run one step and return the mean loss of its micro-batches (a detached scalar, no synchronisation).

        Raises ValueError when ``micro_batches`` does not hold ``gradient_accumulation_steps`` batches.
        """
        k = gradient_accumulation_steps
        total: torch.Tensor | None = None
        seen = 0
        for index, micro_batch in enumerate(micro_batches):
            if index >= k:
                raise ValueError(f"A step takes gradient_accumulation_steps = {k} micro-batches, got more.")
            observer.forward_begins(index)
            with self.autocast():
                loss = self.loss(self.model, micro_batch) / k
            observer.backward_begins(index)
            if self.scaler is not None:
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            else:
                loss.backward()  # type: ignore[no-untyped-call]
            detached = loss.detach()
            total = detached if total is None else total + detached
            del loss, detached, micro_batch
            seen += 1
            observer.backward_ended(index)
        if seen != k or total is None:
            raise ValueError(f"A step takes gradient_accumulation_steps = {k} micro-batches, got {seen}.")
        observer.optimizer_begins()
        self._update(observer)
        observer.step_ended()
        return total

    def _update(self, observer: StepObserver) -> None:
        scaler = self.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = None
        if self.max_gradient_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        applied: bool | None = True
        if scaler is not None:
            scale = scaler.get_scale() if self.skip_not_finite else None
            scaler.step(self.optimizer)
            scaler.update()
            applied = None if scale is None else scaler.get_scale() >= scale
        elif not self.skip_not_finite or self._is_finite(norm):
            self.optimizer.step()
        else:
            applied = False
        observer.updated(norm, applied)
        del norm
        self.optimizer.zero_grad(set_to_none=True)

    def _is_finite(self, norm: torch.Tensor | None) -> bool:
        if norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return bool(torch.isfinite(norm))


def build_optimizer(
    name: str, model: nn.Module, *, learning_rate: float = 1e-4, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """The optimizer that a profile or plan names, over the parameters that require gradients.

    ``adamw`` and ``sgd`` are fused: one pass over each parameter, no temporaries. ``adamw-foreach`` and ``adamw-loop``
    are torch's other two implementations, which make temporaries the size of all parameters or of one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = weight_decay
    match name:
        case "adamw" | "adamw-foreach" | "adamw-loop":
            implementation = {"fused": name == "adamw", "foreach": name == "adamw-foreach"}
            return torch.optim.AdamW(
                parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=decay, **implementation
            )
        case "sgd":
            return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=decay, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=decay)
        case _:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")


def build_scaler(precision: Precision, device_type: str) -> torch.amp.GradScaler | None:
    """fp16 gradients need dynamic loss scaling; fp32 and bf16 have the range."""
    return torch.amp.GradScaler(device_type) if precision == "fp16" else None

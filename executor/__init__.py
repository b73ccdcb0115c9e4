"""Trains with a plan, and holds the plan against what really happens.

import executor

step = executor.prepare(model, optimizer, plan, loss=loss)     # an existing loop keeps its shape
executor.train(plan, data=..., output_dir=...)                 # or the whole run
executor.verify(plan).relative_error                           # predicted against measured
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executor.engine import apply_checkpoints as apply_checkpoints
    from executor.engine import prepare as prepare
    from executor.errors import OutOfMemory as OutOfMemory
    from executor.errors import PlanDoesNotFit as PlanDoesNotFit
    from executor.training import TrainingReport as TrainingReport
    from executor.training import train as train
    from executor.verification import Verification as Verification
    from executor.verification import verify as verify

_HOMES = {
    "OutOfMemory": "executor.errors",
    "PlanDoesNotFit": "executor.errors",
    "TrainingReport": "executor.training",
    "Verification": "executor.verification",
    "apply_checkpoints": "executor.engine",
    "prepare": "executor.engine",
    "train": "executor.training",
    "verify": "executor.verification",
}

__all__ = [
    "OutOfMemory",
    "PlanDoesNotFit",
    "TrainingReport",
    "Verification",
    "apply_checkpoints",
    "prepare",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'executor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Finds the best training plan for a profile, and says why it is the best.

    import planner

    plan = planner.optimize(profile, global_batch_size=32, memory_budget_bytes=8 * 2**30)
    plan.prediction.step_seconds, plan.prediction.peak_memory_bytes
    plan.save("gpt2.plan.json")

Names are imported when first used; nothing here needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executor.auto import auto_checkpoint as auto_checkpoint
    from planner.export import NotExpressed as NotExpressed
    from planner.plan import NoFeasiblePlan as NoFeasiblePlan
    from planner.plan import Plan as Plan
    from planner.plan import Reference as Reference
    from planner.plan import Weights as Weights
    from planner.plan import load_plan as load_plan
    from planner.run_cost import with_run_cost as with_run_cost
    from planner.search import optimize as optimize
    from planner.target import optimize_to_target as optimize_to_target
    from profiler.records import RecordError as RecordError

_HOMES = {
    "NoFeasiblePlan": "planner.plan",
    "NotExpressed": "planner.export",
    "Plan": "planner.plan",
    "RecordError": "profiler.records",
    "Reference": "planner.plan",
    "Weights": "planner.plan",
    "auto_checkpoint": "executor.auto",  # Named here for whoever looks for it; it stands a floor above.
    "load_plan": "planner.plan",
    "optimize": "planner.search",
    "optimize_to_target": "planner.target",
    "with_run_cost": "planner.run_cost",
}

__all__ = [
    "NoFeasiblePlan",
    "NotExpressed",
    "Plan",
    "RecordError",
    "Reference",
    "Weights",
    "auto_checkpoint",
    "load_plan",
    "optimize",
    "optimize_to_target",
    "with_run_cost",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

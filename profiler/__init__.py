"""Measures a model: what each stage of it keeps, needs and costs on a device.

    import profiler

    workload = profiler.Workload(model=..., batch=lambda size: {...}, loss=lambda model, batch: ...)
    profile = profiler.profile(workload, batch_sizes=(1, 2, 4), precisions=("fp32", "bf16"), device="auto")

Names are imported when first used, so that reading a profile needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.measure import profile as profile
    from profiler.profile_record import Profile as Profile
    from profiler.registry import build as build
    from profiler.workload import Workload as Workload
    from profiler.workload_spec import WorkloadError as WorkloadError
    from profiler.workload_spec import WorkloadSpec as WorkloadSpec

_HOMES = {
    "Profile": "profiler.profile_record",
    "Workload": "profiler.workload",
    "WorkloadError": "profiler.workload_spec",
    "WorkloadSpec": "profiler.workload_spec",
    "build": "profiler.registry",
    "profile": "profiler.measure",
}

__all__ = ["Profile", "Workload", "WorkloadError", "WorkloadSpec", "build", "profile"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'profiler' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""What verifications taught about a device: how far predictions were off, and the error to state from now on.

Every ``planner verify`` leaves a *residual*, (predicted - measured) / measured, with the device it was measured on. The
error that a prediction states is meant to hold nine times out of ten, and residuals say what would have held:

    fewer than nine   they can only widen it:  max(prior, largest seen)
    nine and more     the ceil(0.9 (n + 1))-th smallest of n replaces the prior, for better or worse

The second is split conformal prediction (Vovk et al. 2005; Lei et al. 2018, section 2.2): with residuals that are
exchangeable with the next one, it covers the next one with a probability of at least 0.9, whatever their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from planner import state
from profiler import records
from profiler.profile_record import DeviceRecord
from profiler.records import Document, Record

COVERAGE = 0.9
KEPT = 200
"""How many residuals of a device are kept, the newest."""


class Residual(Record):
    """One verified plan: relative errors (predicted - measured) / measured of its step time and its peak."""

    plan_sha256: str
    step_seconds: float
    peak_memory_bytes: float


class Calibration(Document, tag="calibration"):
    """The residuals seen on one device, oldest first; a plan that is verified again replaces its own."""

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    device: DeviceRecord
    residuals: tuple[Residual, ...] = ()

    def with_residual(self, residual: Residual) -> Calibration:
        """The same with one more, and without what is too old."""
        others = tuple(r for r in self.residuals if r.plan_sha256 != residual.plan_sha256)
        return msgspec.structs.replace(self, residuals=(*others, residual)[-KEPT:])

    def time_error(self, prior: float) -> float:
        """The relative error to state for a step's time, of which ``prior`` is what the profile itself knows."""
        return stated_error(prior, [r.step_seconds for r in self.residuals])

    def memory_error(self, prior: float) -> float:
        """The relative error to state for a peak. The prior is a worst case that was measured: never below it."""
        return max(prior, stated_error(prior, [r.peak_memory_bytes for r in self.residuals]))


def stated_error(prior: float, residuals: Sequence[float]) -> float:
    """What would have covered ``COVERAGE`` of the residuals and the next; with too few, at least the prior."""
    sizes = sorted(map(abs, residuals))
    rank = math.ceil(COVERAGE * (len(sizes) + 1))
    if rank > len(sizes):
        return max([prior, *sizes])
    return sizes[rank - 1]


def path_of(device: DeviceRecord) -> Path:
    """The file of a device in the user's state directory."""
    threads = "" if device.threads is None else f"-{device.threads}"
    name = "".join(c if c.isalnum() else "-" for c in f"{device.name}{threads}".lower())
    return state.here() / "calibration" / f"{name}.json"


def load(device: DeviceRecord) -> Calibration:
    """What is known of a device; nothing when it was never verified on. RecordError for a damaged file."""
    path = path_of(device)
    if not path.exists():
        return Calibration(device=device)
    return records.read(path, Calibration)


def learn(device: DeviceRecord, residual: Residual) -> Calibration:
    """Add a residual to the device's file and return all that is known now."""
    known = load(device).with_residual(residual)
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, known)
    return known

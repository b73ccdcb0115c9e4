"""What the device draws in each phase of a step, read from a counter of joules where there is one.

Counters, in the order in which they are looked for:

    a CUDA device   NVML's total-energy counter of that very GPU
    the CPU         RAPL's counters of every package and its memory (needs read access, root on most systems)

A counter moves in ticks (NVML up to 0.1 s apart), so a phase is repeated until it fills a window that is long
beside a tick, and its watts are the window's joules over its seconds. Backward alone cannot be repeated; it is
what forward and backward together take beyond forward:

    wait ├──────2 s──────┤   forward ├──────2 s──────┤   forward + backward ├──────2 s──────┤   optimizer ...

RAPL counts the whole processor, other processes' work included; NVML the whole GPU. Without a counter nothing is
known, and only the user can say: ``stated`` takes one number of watts for every phase.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from profiler.device import synchronize
from profiler.profile_record import EnergyProfile, PhaseWatts, Precision
from profiler.step import Stepper
from profiler.timing import stepper_for
from profiler.workload import Workload

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's zones, one folder each."""

WINDOW_SECONDS = 2.0
"""How long a phase is repeated: twenty ticks of the slowest counter."""

TICK_SECONDS: dict[str, float] = {"nvml": 0.1, "rapl": 0.001}
"""How far apart a counter's updates can be: Yang et al., "Accurate and convenient energy measurements for GPUs"
(SC 2024), 20 to 100 ms; Haehnel et al., "Measuring energy consumption for short code paths using RAPL" (2012)."""


class EnergyCounter(Protocol):
    """A counter of joules that only rises."""

    @property
    def source(self) -> Literal["nvml", "rapl"]: ...

    def joules(self) -> float:
        """Joules since some fixed moment; only differences mean anything."""
        ...


def find_counter(device: torch.device) -> EnergyCounter | None:
    """The counter of a device, or None where there is none that can be read."""
    return NvmlCounter.of(device) if device.type == "cuda" else RaplCounter.of(POWERCAP)


class NvmlCounter:
    """The total-energy counter of one GPU: millijoules since the driver was loaded, from Volta on."""

    source: Literal["nvml"] = "nvml"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def of(cls, device: torch.device) -> NvmlCounter | None:
        """The counter of this GPU, found by its identity: NVML numbers GPUs that CUDA does not see as well."""
        nvml: Any = importlib.import_module("pynvml")
        identity = torch.cuda.get_device_properties(device).uuid
        try:
            nvml.nvmlInit()
            counter = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}"))
            counter.joules()
        except nvml.NVMLError:
            return None
        return counter

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


class RaplCounter:
    """The sum of RAPL's packages and their memory: microjoules that start again from 0 at the end of a zone's range.

    Of the other zones ``core`` and ``uncore`` are parts of a package, and ``psys`` holds the packages. A range lasts
    for minutes; more than one between two readings cannot be seen.
    """

    source: Literal["rapl"] = "rapl"

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones]
        self._last = [_number(file) for file, _ in self._zones]
        self._microjoules = 0

    @classmethod
    def of(cls, powercap: Path) -> RaplCounter | None:
        """The counter over all zones under this folder; None when there is none or it may not be read."""
        try:
            names = {zone: (zone / "name").read_text().strip() for zone in powercap.glob("intel-rapl:*")}
            zones = [zone for zone, name in names.items() if name.startswith("package-") or name == "dram"]
            return cls(zones) if zones else None
        except OSError:
            return None

    def joules(self) -> float:
        now = [_number(file) for file, _ in self._zones]
        for before, after, (_, end) in zip(self._last, now, self._zones, strict=True):
            self._microjoules += after - before if after >= before else end - before + after
        self._last = now
        return self._microjoules / 1e6


def _number(file: Path) -> int:
    return int(file.read_text())


def check_watts(watts: float) -> None:
    """Raise ValueError for what cannot be the power of a device."""
    if not (math.isfinite(watts) and watts > 0):
        raise ValueError(
            f"--watts must be a positive number of watts, got {watts:g}. Leave it out if unknown."
        )


def stated(watts: float, precisions: Sequence[Precision]) -> EnergyProfile:
    """The energy profile of a device that, as the user says, always draws ``watts``."""
    check_watts(watts)
    return EnergyProfile(
        source="stated",
        error=None,
        phases=tuple(
            PhaseWatts(
                precision=precision,
                forward_watts=watts,
                backward_watts=watts,
                optimizer_watts=watts,
                host_watts=watts,
            )
            for precision in precisions
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What a phase took while it was repeated; ``spread``: how far its halves lie from their mean, relatively."""

    joules: float
    seconds: float
    calls: int
    spread: float

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


def repeat(
    counter: EnergyCounter, work: Callable[[], object], device: torch.device, seconds: float
) -> Window:
    """Do ``work`` once unmeasured, and then again and again for ``seconds`` under the counter."""
    work()
    synchronize(device)
    readings = [(time.perf_counter(), counter.joules())]
    calls = 0
    for share in (0.5, 1.0):
        while time.perf_counter() - readings[0][0] < share * seconds or calls < 2 * share:
            work()
            synchronize(device)
            calls += 1
        readings.append((time.perf_counter(), counter.joules()))
    (t0, e0), (t1, e1), (t2, e2) = readings
    joules, seconds = e2 - e0, t2 - t0
    # Of equal halves this is the distance of either from their mean; a half cut short counts for what it is.
    off = 2 * abs((e1 - e0) - joules * (t1 - t0) / seconds)
    return Window(joules=joules, seconds=seconds, calls=calls, spread=off / joules if joules > 0 else 0.0)


def watts_beyond(part: Window, whole: Window) -> float:
    """The watts of what ``whole`` does and ``part`` does not; those of ``whole`` where the difference drowns."""
    joules = whole.joules / whole.calls - part.joules / part.calls
    seconds = whole.seconds / whole.calls - part.seconds / part.calls
    return joules / seconds if seconds > 0 and joules > 0 else whole.watts


def measure(
    workload: Workload,
    counter: EnergyCounter,
    *,
    precisions: Sequence[Precision],
    optimizer: str,
    micro_batch_size: int,
    device: torch.device,
    window_seconds: float,
) -> EnergyProfile | None:
    """The watts of every phase at every precision.

    The model is on ``device`` and keeps its weights. Two windows, and two more for each precision. No watts when the
    counter stands still.
    """
    batch = workload.batch(micro_batch_size)
    waiting = repeat(counter, lambda: time.sleep(window_seconds / 20), device, window_seconds)
    windows = [waiting]
    passes: dict[Precision, tuple[Window, Window]] = {}
    for precision in precisions:
        works = _forward_and_both(stepper_for(workload, optimizer, precision, device), batch)
        forward_alone, both = (repeat(counter, work, device, window_seconds) for work in works)
        passes[precision] = forward_alone, both
        windows += [forward_alone, both]
    # Gradients are there from the last backward; the learning rate is zero. Every precision has fp32 weights.
    updater = stepper_for(workload, optimizer, "fp32", device).optimizer
    updating = repeat(counter, updater.step, device, window_seconds)
    updater.zero_grad(set_to_none=True)
    windows.append(updating)
    if any(window.joules <= 0 for window in windows):
        return None
    resolution = TICK_SECONDS[counter.source] / min(window.seconds for window in windows)
    return EnergyProfile(
        source=counter.source,
        error=max(resolution, *(window.spread for window in windows)),
        phases=tuple(
            PhaseWatts(
                precision=precision,
                forward_watts=part.watts,
                backward_watts=watts_beyond(part, whole),
                optimizer_watts=updating.watts,
                host_watts=waiting.watts,
            )
            for precision, (part, whole) in passes.items()
        ),
    )


def _forward_and_both(stepper: Stepper, batch: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    def forward() -> torch.Tensor:
        with stepper.autocast():
            return stepper.loss(stepper.model, batch)

    def forward_and_backward() -> None:
        stepper.optimizer.zero_grad(set_to_none=True)
        forward().backward()  # type: ignore[no-untyped-call]

    return forward, forward_and_backward

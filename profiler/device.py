"""Which device a run is on, and the clocks that can be read there."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from profiler import catalogue
from profiler.profile_record import DeviceRecord

PACKAGES = ("torch", "transformers", "torchvision", "deepspeed", "optuna", "training-planner")


def resolve(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is here; ValueError otherwise."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind == "cuda" and (not index or index.isdecimal()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) < count:
            return torch.device("cuda", int(index or 0))
        raise ValueError(
            f"--device {name} is not here: this machine has {count} CUDA devices. Use auto or cpu."
        )
    raise ValueError(
        f"--device must be auto, cpu, cuda or cuda:N, got {name!r}. {catalogue.suggestion(name)}"
    )


def describe(device: torch.device) -> DeviceRecord:
    """The record of a device that is here."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceRecord(kind="cuda", name=properties.name, memory_bytes=properties.total_memory)
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cpuinfo = Path("/proc/cpuinfo")
    name = cpu_name(cpuinfo.read_text() if cpuinfo.exists() else "")
    return DeviceRecord(
        kind="cpu", name=name, memory_bytes=pages * page_bytes, threads=torch.get_num_threads()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, or this was raised because one was.

    A CPU's allocator has no exception of its own for it.
    """
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    refusals = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in refusals)


def found() -> dict[str, DeviceRecord]:
    """The devices that are here, by the names that ``resolve`` knows them by."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(f"cuda:{index}" for index in range(count))]
    return {name: describe(torch.device(name)) for name in names}


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo, with family and model where a hypervisor hides which one it is.

    "AMD EPYC" may be of any generation, and bf16 ten times slower than fp32 there or four times faster.
    """
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    said = re.sub(r"@.*", "", name)
    if any(c.isdigit() for c in said) or not {"cpu family", "model"} <= found.keys():
        return name
    return f"{name} family {found['cpu family']} model {found['model']}"


def versions() -> dict[str, str]:
    """Python and the libraries that decide how a step runs."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OtherWork:
    """How much of this machine's processors everything but this process takes, from when this was made."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._now()

    def share(self) -> float | None:
        """From 0 to 1, what a hypervisor gave to others included; None where the system does not say."""
        before, now = self._before, self._now()
        if before is None or now is None or now.seconds <= before.seconds:
            return None
        others = (now.busy_seconds - before.busy_seconds) - (now.own_seconds - before.own_seconds)
        share = others / (now.processors * (now.seconds - before.seconds))
        return min(1.0, max(0.0, share))

    def _now(self) -> _Processors | None:
        if not self._stat.exists():
            return None
        lines = [line.split() for line in self._stat.read_text().splitlines() if line.startswith("cpu")]
        user, nice, system, _, _, interrupts, soft, stolen = map(int, lines[0][1:9])
        busy = user + nice + system + interrupts + soft + stolen
        return _Processors(
            processors=len(lines) - 1,
            busy_seconds=busy / os.sysconf("SC_CLK_TCK"),
            own_seconds=process_cpu_seconds(),
            seconds=time.perf_counter(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Processors:
    processors: int
    busy_seconds: float
    own_seconds: float
    seconds: float


def process_cpu_seconds() -> float:
    """CPU time of all threads of this process: steady on a machine that others use too."""
    return time.process_time()

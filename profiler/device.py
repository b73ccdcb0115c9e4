"""Which device a run is on, the clocks that can be read there, and how its memory is handed out.

glibc gives every large block back to the system when it is freed, and a training step asks for the same blocks again:
on a CPU a quarter of GPT-2's step goes into page faults (``python -m studies.allocator`` measures it). So measuring and
training on a CPU both keep freed memory in the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
import time
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
    return DeviceRecord(
        kind="cpu", name=_cpu_name(), memory_bytes=pages * page_bytes, threads=torch.get_num_threads()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused. A CPU's allocator has no exception of its own for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    refusals = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in refusals)


def found() -> dict[str, DeviceRecord]:
    """The devices that are here, by the names that ``resolve`` knows them by."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(f"cuda:{index}" for index in range(count))]
    return {name: describe(torch.device(name)) for name in names}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""

DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 2**10, 65536
"""What glibc begins with."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse freed blocks, for the rest of this process; whether it was told.

    Not in a process whose memory is limited: between blocks that are kept are holes, and the limit counts them.
    """
    if not sys.platform.startswith("linux") or _is_limited():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def release_freed_memory(device: torch.device) -> None:
    """Give what is freed but kept back, and on a CPU keep no more: for a process that was refused memory."""
    let_go_of_a_failed_backward()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is not None and trim is not None:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
        trim(0)


def let_go_of_a_failed_backward() -> None:
    """Free what is left of a backward pass that ended in an error.

    Autograd's queue of the calling thread holds it, nodes with all that they saved, until the next backward pass.
    """
    with torch.enable_grad():
        torch.ones((), requires_grad=True).exp().backward()  # type: ignore[no-untyped-call]


def _is_limited() -> bool:
    import resource  # Not on every platform.

    limits = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


def process_cpu_seconds() -> float:
    """CPU time of all threads of this process: steady on a machine that others use too."""
    return time.process_time()

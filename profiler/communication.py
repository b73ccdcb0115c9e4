"""How fast processes on this machine move data between them: an all-reduce at several sizes, and a line through it.

    seconds
      |                          o       slope: 1 / rate, where an all-reduce of m bytes over N processes
      |                  o               moves 2 m (N - 1) / N of them through each
      |      o   o
      |  o o                             what is left at m = 0: the latency, alpha
      +----------------------------> bytes moved

The processes are started by torchrun: ``measure_link`` runs this very module in each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from profiler.profile_record import Link

SIZES_BYTES = (4 * 2**10, 64 * 2**10, 2**20, 4 * 2**20, 25 * 2**20)
"""From a message that is all latency to the bucket that gradients are summed in (planner/zero.py)."""

REPETITIONS = 7
"""All-reduces of each size; the median counts, after one that does not."""

TIME_LIMIT_SECONDS = 180

Backend = Literal["gloo", "nccl"]


def measure_link(
    world_size: int,
    device_type: Literal["cpu", "cuda"] = "cpu",
    *,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> Link:
    """The link between ``world_size`` processes on this machine: gloo between CPUs, nccl between CUDA devices.

    Raises ValueError for fewer than two processes or more than there are CUDA devices, RuntimeError when the processes
    fail or take longer than the limit.
    """
    if world_size < 2:
        raise ValueError(f"world_size must be at least 2 to measure a link, got {world_size}.")
    if device_type == "cuda" and world_size > torch.cuda.device_count():
        raise ValueError(
            f"world_size must be at most the number of CUDA devices here, got {world_size} and "
            f"{torch.cuda.device_count()}. Measure where they are, or pass a known link to planner.optimize."
        )
    backend: Backend = "nccl" if device_type == "cuda" else "gloo"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size),
        "-m", "profiler.communication", "--backend", backend, "--sizes", *map(str, sizes_bytes),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=time_limit_seconds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"Measuring the link between {world_size} processes must end within {time_limit_seconds:.0f} s, and it "
            "did not. Try again when the machine is less busy."
        ) from error
    if done.returncode:
        raise RuntimeError(
            f"Measuring the link between {world_size} processes failed: {done.stderr.strip()[-500:]}"
        )
    samples = json.loads(done.stdout.strip().splitlines()[-1])
    return fit(world_size, backend, [(size, seconds) for size, seconds in samples])


def fit(world_size: int, backend: Backend, samples: Sequence[tuple[int, float]]) -> Link:
    """The line through ``(all-reduced bytes, seconds)`` with the smallest relative residuals."""
    seconds = np.array([s for _, s in samples])
    moved = np.array([2 * size * (world_size - 1) / world_size for size, _ in samples])
    design = np.stack([np.ones_like(moved), moved], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    if latency < 0:
        # Noise: no message arrives before it is sent. The rate alone, through the origin.
        latency, per_byte = 0.0, float(np.sum(moved / seconds) / np.sum((moved / seconds) ** 2))
    if per_byte <= 0:
        raise RuntimeError(
            "An all-reduce of more bytes must take longer, and here it did not: "
            f"{', '.join(f'{size} bytes {s:.2e} s' for size, s in samples)}. Measure again."
        )
    fitted = latency + per_byte * moved
    return Link(
        world_size=world_size,
        backend=backend,
        latency_seconds=float(latency),
        bytes_per_second=float(1 / per_byte),
        error=float(np.max(np.abs(fitted - seconds) / seconds)),
    )


def main() -> None:
    """One of the processes: the first prints the median seconds of every size as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(options.backend)
    samples = [(size, _median_seconds(size, device)) for size in options.sizes]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(samples))
    torch.distributed.destroy_process_group()


def _median_seconds(size_bytes: int, device: torch.device) -> float:
    tensor = torch.zeros(size_bytes // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(1 + REPETITIONS):
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()

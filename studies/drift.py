"""Does a yardstick between the steps tell a machine's drift? Means of some steps should vary less as its multiples.

    |--y--|----step----|--y--|----step----|--y--| ...      in blocks of n steps: mean(step), mean(step) / mean(y)

Prints how far the means of blocks of 4, 8 and 16 steps vary from block to block. Writes results/drift.json.

    python -m studies.drift            # three minutes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from profiler.device import process_cpu_seconds
from profiler.registry import build
from profiler.timing import on_device, stepper_for
from profiler.workload_spec import WorkloadSpec, resolve
from profiler.yardstick import Yardstick
from studies.runs import provenance, write


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=480, help="steps to time (default: 480)")
    options = parser.parse_args()
    device = torch.device("cpu")
    workload = build(resolve(WorkloadSpec(name="torchvision:resnet18", image_size=96)))
    steps: list[float] = []
    yardsticks: list[float] = []
    with on_device(workload, device) as placed:
        stepper = stepper_for(placed, "sgd", "fp32", device)
        batches = [placed.batch(12)]
        stepper.step(batches, 1)
        for _ in range(options.steps):
            beside = Yardstick.of(stepper, batches[0], device)
            wall, cpu = time.perf_counter(), process_cpu_seconds()
            stepper.step(batches, 1)
            steps.append(process_cpu_seconds() - cpu)
            beside.beside(time.perf_counter() - wall)
            yardsticks.append(beside.cpu_seconds())
    rows = []
    for size in (4, 8, 16):
        of_steps, of_yardsticks = blocks(steps, size), blocks(yardsticks, size)
        ratios = [step / beside for step, beside in zip(of_steps, of_yardsticks, strict=True)]
        rows.append({"steps": size, "mean": variation(of_steps), "ratio": variation(ratios)})
        print(
            f"{size:2} steps: their mean varies by {rows[-1]['mean']:.1%}, its ratio by {rows[-1]['ratio']:.1%}"
        )
    print(f"written to {write('drift', provenance('python -m studies.drift') | {'rows': rows})}")
    return 0


def blocks(values: list[float], size: int) -> list[float]:
    """The means of consecutive blocks."""
    return [statistics.mean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def variation(values: list[float]) -> float:
    """Standard deviation by mean."""
    return statistics.stdev(values) / statistics.mean(values)


if __name__ == "__main__":
    sys.exit(main())

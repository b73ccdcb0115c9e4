"""Does a yardstick between the steps tell a machine's drift? Means of some steps should vary less as its multiples.

    |--y--|----step----|--y--|----step----|--y--| ...      in blocks of n steps: mean(step), mean(step) / mean(y)

Prints how far the means of blocks of 4, 8 and 16 steps vary from block to block.

Then profiles are made of two micro-batch sizes, every other one with another process working while the larger size is
timed, and none while the smaller one is. How the two compare should be the same in both; it is told as it was measured,
and as the profile has it after it compared the sizes at one speed (profiler/one_speed.py). Writes results/drift.json.

    python -m studies.drift            # five minutes
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch

from profiler.device import process_cpu_seconds
from profiler.measure import profile
from profiler.one_speed import at_one_speed
from profiler.profile_record import PrecisionProfile
from profiler.registry import build
from profiler.timing import on_device, stepper_for
from profiler.workload_spec import WorkloadSpec, resolve
from profiler.yardstick import Yardstick
from studies.runs import provenance, write


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=480, help="steps to time (default: 480)")
    parser.add_argument("--profiles", type=int, default=3, help="of each kind (default: 3)")
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
    found = {other: [between_sizes(other) for _ in range(options.profiles)] for other in (False, True)}
    compared = {
        how: [statistics.median(pair[place] for pair in found[other]) for other in (False, True)]
        for place, how in enumerate(("as measured", "at one speed"))
    }
    for how, (alone, disturbed) in compared.items():
        print(f"12 samples take {alone:.2f} times what 6 do; {disturbed:.2f} times beside other work, {how}")
    results = {"rows": rows, "sizes": compared}
    print(f"written to {write('drift', provenance('python -m studies.drift') | results)}")
    return 0


def between_sizes(other_work: bool) -> tuple[float, float]:
    """The larger micro-batch's step time over the smaller one's, as it was measured and as the profile has it.

    ``other_work``: on every processor, while the larger one is timed.
    """
    workload = build(resolve(WorkloadSpec(name="torchvision:resnet18", image_size=96)))
    burning: list[subprocess.Popen[bytes]] = []

    def tell(message: str) -> None:
        while burning:
            burning.pop().kill()
        if other_work and message.endswith("timing micro-batch 12"):
            burning.extend(
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(os.cpu_count() or 1)
            )

    as_measured: list[float] = []

    def noting(each: PrecisionProfile, yardsticks: Any) -> PrecisionProfile:
        as_measured.append(ratio(each))
        return at_one_speed(each, yardsticks)

    with mock.patch("profiler.one_speed.at_one_speed", noting):
        found = profile(workload, (6, 12), ("fp32",), "cpu", steps=4, progress=tell)
    return as_measured[0], ratio(found.precisions[0])


def ratio(measured: PrecisionProfile) -> float:
    """Of the steps on the wall clock, which is what a plan promises."""
    small, large = measured.wall
    return large.step_seconds / small.step_seconds


def blocks(values: list[float], size: int) -> list[float]:
    """The means of consecutive blocks."""
    return [statistics.mean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def variation(values: list[float]) -> float:
    """Standard deviation by mean."""
    return statistics.stdev(values) / statistics.mean(values)


if __name__ == "__main__":
    sys.exit(main())

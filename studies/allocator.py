"""What keeping freed memory in the process is worth on a CPU: the same steps with and without it, side by side.

    python -m studies.allocator [--model gpt2] [--steps 3] [--rounds 3]

Processes with and without take turns, so that a noisy machine is noisy for both; the ratio of medians is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

CHILD = "PLANNER_STUDY_CHILD"


def child(model: str, steps: int, keep: bool) -> None:
    """Print the seconds of each step, one a line."""
    import torch

    import profiler
    from profiler.freed_memory import keep_freed_memory
    from profiler.timing import stepper_for

    workload = profiler.build(profiler.WorkloadSpec(name=model))
    if keep:
        assert keep_freed_memory()
    stepper = stepper_for(workload, "adamw", "fp32", torch.device("cpu"))
    batches = [workload.batch(2) for _ in range(2)]
    stepper.step(batches, 2)
    for _ in range(steps):
        began = time.perf_counter()
        stepper.step(batches, 2)
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if os.environ.get(CHILD):
        child(options.model, options.steps, os.environ[CHILD] == "keep")
        return
    seconds: dict[str, list[float]] = {"give back": [], "keep": []}
    for _ in range(options.rounds):
        for name, found in seconds.items():
            lines = subprocess.run(
                [sys.executable, "-m", "studies.allocator", *sys.argv[1:]],
                env=os.environ | {CHILD: name}, stdout=subprocess.PIPE, check=True, text=True,
            ).stdout.split()  # fmt: skip
            found += map(float, lines)
            print(f"{name:10} {' '.join(f'{float(line):.2f}' for line in lines)} s", flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"median step: give back {medians['give back']:.2f} s, keep {medians['keep']:.2f} s, "
          f"ratio {medians['keep'] / medians['give back']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

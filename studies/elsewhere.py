"""Is a step whose saved tensors lie elsewhere timed as the plain step is? For models whose plain step fits.

    plain   elsewhere   plain   elsewhere   ...      profiler.timing.measure_times, round after round, in one process

Told for each model: elsewhere's time over plain's on the process's own clock (a CPU) or the device's (CUDA), of the
step, of all forward and all backward windows, and of the stage that is furthest off among those that take at least a
fiftieth of the step. The last column is how far plain is from itself: the largest of its rounds over the smallest.

    python -m studies.elsewhere             # --device cuda on a GPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torchvision

from planner.time import ELSEWHERE_ERROR
from profiler import device as devices
from profiler.chain import discover
from profiler.profile_record import StageTime, StepTime
from profiler.registry import build
from profiler.timing import measure_times, on_device
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec, resolve
from profiler.workspaces import Workspaces
from studies.runs import name_on, picked, provenance, write
from studies.workloads import classifier, llama, lstm, mlp

SMALLEST_SHARE = 0.02
"""Of the step's time, for a stage to be looked at by itself."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    build: Callable[[], Workload]
    size: int


def _gpt2(sequence_length: int) -> Callable[[], Workload]:
    return lambda: build(resolve(WorkloadSpec(name="gpt2", sequence_length=sequence_length)))


ON_CPU = (
    Case("gpt2, 64 tokens", _gpt2(64), 4),
    Case("llama", llama, 8),
    Case("resnet18, 96 x 96", lambda: classifier(torchvision.models.resnet18(), 3, 96, 96, classes=1000), 16),
    Case("lstm", lstm, 64),
    Case("mlp", mlp, 512),
)
ON_CUDA = (
    Case("gpt2, 1024 tokens", _gpt2(1024), 8),
    Case("llama", llama, 64),
    Case("resnet50, 224 x 224", lambda: classifier(torchvision.models.resnet50(), 3, 224, 224), 32),
    Case("mlp", mlp, 8192),
)


def compared(case: Case, device_name: str, rounds: int, steps: int) -> dict[str, Any]:
    """The row of a case."""
    device = devices.resolve(device_name)
    found: dict[bool, list[StepTime]] = {False: [], True: []}
    with on_device(case.build(), device) as workload:
        stages = discover(workload, batch_size=2)
        for _ in range(rounds):
            for elsewhere, times in found.items():
                timing = measure_times(
                    workload, stages, optimizer="adamw", precision="fp32", micro_batch_size=case.size,
                    device=device, steps=steps, workspaces=Workspaces(device), elsewhere=elsewhere,
                )  # fmt: skip
                times.append(timing.process_cpu or timing.wall)
    plain, away = found[False], found[True]
    whole = statistics.median(step.step_seconds for step in plain)
    of_stages = [
        _ratio([_both(step.stages[i]) for step in away], [_both(step.stages[i]) for step in plain])
        for i in range(len(stages))
        if statistics.median(_both(step.stages[i]) for step in plain) >= SMALLEST_SHARE * whole
    ]
    return {
        "case": case.name,
        "micro_batch_size": case.size,
        "step_seconds": whole,
        "step": _ratio([step.step_seconds for step in away], [step.step_seconds for step in plain]),
        "forward": _ratio([_forward(step) for step in away], [_forward(step) for step in plain]),
        "backward": _ratio([_backward(step) for step in away], [_backward(step) for step in plain]),
        "furthest_stage": max(of_stages, key=lambda ratio: abs(ratio - 1)),
        "plain_from_itself": max(step.step_seconds for step in plain)
        / min(step.step_seconds for step in plain),
    }


def _forward(step: StepTime) -> float:
    return sum(stage.forward_seconds for stage in step.stages)


def _backward(step: StepTime) -> float:
    return sum(stage.backward_first_seconds + stage.backward_later_seconds for stage in step.stages)


def _both(stage: StageTime) -> float:
    return 2 * stage.forward_seconds + stage.backward_first_seconds + stage.backward_later_seconds


def _ratio(away: Sequence[float], plain: Sequence[float]) -> float:
    """The median over rounds: what each pair has in common is the machine's mood."""
    return statistics.median(a / b for a, b in zip(away, plain, strict=True))


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:20} x {row['micro_batch_size']:<5} {1e3 * row['step_seconds']:8.1f} ms   "
        f"step {row['step']:.3f}  forward {row['forward']:.3f}  backward {row['backward']:.3f}  "
        f"furthest stage {row['furthest_stage']:.3f}   plain from itself {row['plain_from_itself']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    of_device = ON_CUDA if options.device == "cuda" else ON_CPU
    cases = picked(parser, of_device, lambda case: case.name, options.only)
    rows = []
    for case in cases:
        rows.append(compared(case, options.device, options.rounds, options.steps))
        print(line(rows[-1]), flush=True)
    off = max(abs(row["step"] - 1) for row in rows)
    print(f"furthest off: {off:.1%}; a plan states {ELSEWHERE_ERROR:.0%} more")
    device = devices.describe(devices.resolve(options.device))
    head = provenance(f"python -m studies.elsewhere --device {options.device}")
    path = write(name_on("elsewhere", device), head | {"device": msgspec.to_builtins(device), "rows": rows})
    print(f"written to {path}")
    return 0 if off <= ELSEWHERE_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())

"""How far a roofline's times are from measured ones, and peaks that nobody checked from checked ones, on this CPU.

    python -m studies.roofline [--models gpt2 bert mlp cnn ...]

Each model is profiled for real and without running it. The efficiencies are calibrated on all *other* models, as they
would be for one that was never measured here; what remains is the error to state for a CPU. Times are CPU seconds of
the process. Written to results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

import profiler
from planner.cost import plain_peak_bytes
from profiler.chain import discover
from profiler.device import describe, process_cpu_seconds, versions
from profiler.profile_record import Profile, StepTime
from profiler.roofline import Efficiency, StepCosts, calibrate, step_costs, step_time, windows_of
from profiler.unmeasured import cpu_rates
from profiler.workload import Workload

RESULTS = Path(__file__).parent / "results"
SIZES = {"mlp": (64, 256), "cnn": (2, 8), "gpt2": (1, 2), "encoder": (1, 4), "resnet50": (2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    # Both on the process's own clock: what others do on this machine is in neither.
    rates = cpu_rates(("fp32",), process_cpu_seconds)
    print(
        f"{describe(torch.device('cpu')).name}: {rates.flops_per_second['fp32'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{rates.memory_bytes_per_second / 1e9:.1f} GB/s"
    )
    profiles: dict[str, Profile] = {}
    unchecked: dict[str, Profile] = {}
    costs: dict[str, list[StepCosts]] = {}
    for name in options.models:
        workload = build(name)
        profiles[name] = profiler.profile(workload, SIZES[name], ("fp32",), "cpu", steps=options.steps)
        unchecked[name] = profiler.profile(workload, SIZES[name], ("fp32",), "cpu", fake=True)
        stages = discover(workload)
        costs[name] = [step_costs(workload, stages, "adamw", "fp32", size) for size in SIZES[name]]
        print(f"{name}: profiled", flush=True)
    rows: list[dict[str, Any]] = []
    for name, profile in profiles.items():
        others = [
            window
            for other in options.models
            if other != name or len(options.models) == 1
            for cost, times in zip(costs[other], _times(profiles[other]), strict=True)
            for window in windows_of(cost, times)
        ]
        compute, memory, overhead = calibrate(others, rates)
        efficiency = Efficiency(compute=compute, memory=memory, operation_seconds=overhead, time_error=0.0)
        check = profile.memory_check
        assert check is not None
        peak = plain_peak_bytes(
            unchecked[name], "fp32", check.micro_batch_size, check.gradient_accumulation_steps
        )
        for cost, times in zip(costs[name], _times(profile), strict=True):
            predicted = step_time(cost, rates, efficiency).step_seconds
            rows.append(
                {
                    "model": name,
                    "micro_batch_size": cost.micro_batch_size,
                    "predicted_seconds": predicted,
                    "measured_seconds": times.step_seconds,
                    "time_error": predicted / times.step_seconds - 1,
                    "peak_error": peak / check.measured_bytes - 1,
                    "compute": compute,
                    "memory": memory,
                    "operation_seconds": overhead,
                }
            )
            print(_line(rows[-1]), flush=True)
    document: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "studies.roofline", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": msgspec.to_builtins(describe(torch.device("cpu"))),
        "versions": versions(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "roofline.json").write_text(json.dumps(document, indent=2) + "\n")
    time_errors = [abs(float(row["time_error"])) for row in rows]
    print(
        f"step times: median error {statistics.median(time_errors):.0%}, worst {max(time_errors):.0%}; "
        f"peaks: worst {max(abs(float(row['peak_error'])) for row in rows):.1%}"
    )


def _times(profile: Profile) -> tuple[StepTime, ...]:
    times = profile.precisions[0].process_cpu
    assert times is not None
    return times


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:9} b={row['micro_batch_size']:<4} {row['predicted_seconds']:8.4f} s of "
        f"{row['measured_seconds']:8.4f} s ({row['time_error']:+.0%}), peak {row['peak_error']:+.2%}; "
        f"compute {row['compute']:.2f} memory {row['memory']:.2f} overhead {row['operation_seconds'] * 1e6:.0f} us"
    )


def build(name: str) -> Workload:
    """A model of the study, small enough to be timed in seconds."""
    if name == "gpt2":
        return profiler.build(profiler.WorkloadSpec(name="gpt2", sequence_length=64))
    if name == "resnet50":
        return profiler.build(profiler.WorkloadSpec(name="resnet50"))
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "mlp": (lambda: nn.Sequential(*(layer for _ in range(6) for layer in _dense(1024))), (1024,)),
        "cnn": (
            lambda: nn.Sequential(_convolution(3), *(_convolution(64) for _ in range(5)), _Mean()),
            (3, 32, 32),
        ),
        "encoder": (
            lambda: nn.Sequential(
                nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(512, 8, batch_first=True), 4, enable_nested_tensor=False
                ),
                _First(),
            ),
            (128, 512),
        ),
    }
    make, shape = models[name]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = model(batch).square().mean()
        return value

    return Workload(model=make(), batch=lambda size: torch.randn(size, *shape), loss=loss, name=name)


def _dense(width: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, width), nn.GELU()


def _convolution(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class _First(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


if __name__ == "__main__":
    main()

"""The main job on a CUDA device: GPT-2 small, sequence 1,024, plain fp32 against the plan.

    python -m studies.gpu

Profiles, optimises under a budget, runs plain baseline and plan, and writes predicted and measured peaks (allocated
and reserved) and step times to studies/results/, with device, versions, date and this command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

import executor
import planner
import profiler
from planner.cost import instead
from planner.plan import Plan
from profiler.device import versions
from profiler.profile_record import Precision

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument(
        "--budget-share", type=float, default=0.5, help="0: tightest plan's peak, 1: plain fp32's"
    )
    parser.add_argument("--device", default="cuda", help="cpu tries the script where there is no GPU")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "studies.gpu: this machine has no CUDA device. Run the same command on one that has.",
            file=sys.stderr,
        )
        return 2
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    spec = profiler.WorkloadSpec(name="gpt2", sequence_length=options.sequence_length)
    profile = profiler.profile(
        profiler.build(spec),
        batch_sizes=options.micro_batch_sizes,
        precisions=precisions[:2] if options.device == "cpu" else precisions,
        device=options.device,
        steps=5,
        spec=spec,
        progress=lambda message: print(message, file=sys.stderr),
    )
    unlimited = planner.optimize(profile, options.global_batch_size, precisions=("fp32",))
    plain_bytes = unlimited.baselines.plain.prediction.peak_memory_bytes
    tightest_bytes = unlimited.front[0].prediction.peak_memory_bytes
    budget = int(1.01 * tightest_bytes + options.budget_share * (plain_bytes - tightest_bytes))
    plan = planner.optimize(profile, options.global_batch_size, memory_budget_bytes=budget)
    rows = [
        _row("plain fp32", instead(plan, plan.baselines.plain), options.steps),
        _row("every block", instead(plan, plan.baselines.every_block), options.steps),
        _row("plan", plan, options.steps),
    ]
    document = {
        "command": shlex.join(["python", "-m", "studies.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": msgspec.to_builtins(profile.device),
        "versions": versions(),
        "memory_budget_bytes": budget,
        "profile_seconds": profile.cost.seconds,
        "memory_check": msgspec.to_builtins(profile.memory_check),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", profile.device.name.lower()).strip("-")
    path = RESULTS / f"gpu-{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    for row in rows:
        print(_line(row))
    print(f"written to {path}")
    return 0


def _row(label: str, plan: Plan, steps: int) -> dict[str, Any]:
    verification = executor.verify(plan, steps=steps)
    return {
        "label": label,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "precision": plan.precision,
        "segments": len(plan.checkpoint),
        "predicted": msgspec.to_builtins(verification.predicted),
        "measured": msgspec.to_builtins(verification.measured),
        "relative_error": verification.relative_error,
        "within": verification.within,
    }


def _line(row: dict[str, Any]) -> str:
    predicted, measured = row["predicted"], row["measured"]
    text = f"{row['label']:12} b={row['micro_batch_size']} k={row['gradient_accumulation_steps']} {row['precision']}"
    for key, unit in (("step_seconds", 1.0), ("peak_memory_bytes", 2**20), ("peak_reserved_bytes", 2**20)):
        if measured[key] is not None and predicted[key] is not None:
            error = predicted[key] / measured[key] - 1
            text += f"  {key} {predicted[key] / unit:.3f} / {measured[key] / unit:.3f} ({error:+.2%})"
    return text


if __name__ == "__main__":
    sys.exit(main())

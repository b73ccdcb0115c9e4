"""The main job on this machine, as a user types it: profile, optimise, verify plan and plain baseline.

    python -m studies.main_job

Three cases, each command in a process of its own; predicted and measured step time and peak memory are printed and
written to studies/results/main-job.json with device, versions, date and commit.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.runs import document, provenance, run, write


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model with its flags, and the budget: a size, or a share of the plain baseline's predicted peak."""

    model: str
    profile_flags: tuple[str, ...]
    global_batch_size: int
    budget: str | float


CASES = (
    Case(
        model="gpt2",
        profile_flags=("--seq-len", "256", "--batch", "1,2"),
        global_batch_size=8,
        budget="2600MiB",
    ),
    Case(model="resnet50", profile_flags=("--batch", "16,32,64"), global_batch_size=64, budget=0.85),
    Case(
        model="resnet50",
        profile_flags=("--image-size", "64", "--batch", "16,32,64"),
        global_batch_size=64,
        budget=0.75,
    ),
)


def main() -> int:
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            plan = _plan(case, Path(folder))
            found = document("verify", plan)
            plain = document("verify", plan, "--baseline", "plain")
            rows += [_row(case, "plan", found), _row(case, "plain", plain)]
            for row in rows[-2:]:
                print(_line(row), flush=True)
    head = provenance("python -m studies.main_job") | {"device": found["device"]}
    print(f"written to {write('main-job', head | {'rows': rows})}")
    return 0


def _plan(case: Case, folder: Path) -> str:
    profile, plan = str(folder / "model.profile.json"), str(folder / "model.plan.json")
    run("profile", case.model, *case.profile_flags, "-o", profile)
    batch = ("--global-batch-size", str(case.global_batch_size))
    quiet = ("--storage", "none", "-o", plan)
    budget = case.budget
    if isinstance(budget, float):
        unlimited = document("optimize", profile, *batch, *quiet)
        budget = str(int(budget * unlimited["baselines"]["plain"]["prediction"]["peak_memory_bytes"]))
    run("optimize", profile, *batch, "--memory-budget", budget, *quiet)
    return plan


def _row(case: Case, label: str, found: dict[str, Any]) -> dict[str, Any]:
    measured = {key: value for key, value in found["measured"].items() if key != "memory_curve"}
    knobs = ("micro_batch_size", "gradient_accumulation_steps", "precision", "memory_budget_bytes")
    return {
        "model": case.model,
        "profile_flags": list(case.profile_flags),
        "label": label,
        **{key: found[key] for key in knobs},
        "segments": len(found["checkpoint"]),
        "predicted": {
            key: found["prediction"][key]
            for key in found["measured"]["relative_error"]
            if key in found["prediction"]
        },
        "stated_error": found["prediction"]["error"],
        "measured": measured,
    }


def _line(row: dict[str, Any]) -> str:
    errors, predicted = row["measured"]["relative_error"], row["predicted"]
    mib = row["measured"]["peak_memory_bytes"] / 2**20
    flags = " ".join(row["profile_flags"])
    return (
        f"{row['model']} {flags:28} {row['label']:6} b={row['micro_batch_size']:<3}"
        f"k={row['gradient_accumulation_steps']:<2} {row['precision']} "
        f"segments={row['segments']:<3} step {predicted['step_seconds']:.3f} s ({errors['step_seconds']:+.1%} wall, "
        f"{errors['step_cpu_seconds']:+.1%} CPU, {errors['steady_seconds']:+.1%} at the device's speed)  "
        f"peak {mib:.1f} MiB ({errors['peak_memory_bytes']:+.3%})"
    )


if __name__ == "__main__":
    sys.exit(main())

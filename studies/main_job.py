"""The main job on this machine, as a user types it: profile, optimise, verify plan and plain baseline.

    python -m studies.main_job

Three cases, each command in a process of its own; predicted and measured step time and peak memory are printed and
written to studies/results/main-job.json with device, versions, date and commit.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            plan = _plan(case, Path(folder))
            document = _json("verify", plan)
            plain = _json("verify", plan, "--baseline", "plain")
            rows += [_row(case, "plan", document), _row(case, "plain", plain)]
            for row in rows[-2:]:
                print(_line(row), flush=True)
    profile = {key: document[key] for key in ("device",)}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE, check=False, text=True)
    record = {
        "command": "python -m studies.main_job",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "versions": _versions(),
        **profile,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "main-job.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")
    return 0


def _plan(case: Case, folder: Path) -> str:
    profile, plan = str(folder / "model.profile.json"), str(folder / "model.plan.json")
    _run("profile", case.model, *case.profile_flags, "-o", profile)
    batch = ("--global-batch-size", str(case.global_batch_size))
    quiet = ("--storage", "none", "-o", plan)
    budget = case.budget
    if isinstance(budget, float):
        unlimited = _json("optimize", profile, *batch, *quiet)
        budget = str(int(budget * unlimited["baselines"]["plain"]["prediction"]["peak_memory_bytes"]))
    _run("optimize", profile, *batch, "--memory-budget", budget, *quiet)
    return plan


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "planner.cli", *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _json(*arguments: str) -> dict[str, Any]:
    """The document that a command prints; verify exits 5 when a plan does not hold, and prints it all the same."""
    command = [sys.executable, "-m", "planner.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode not in (0, 5):
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _row(case: Case, label: str, document: dict[str, Any]) -> dict[str, Any]:
    measured = {key: value for key, value in document["measured"].items() if key != "memory_curve"}
    knobs = ("micro_batch_size", "gradient_accumulation_steps", "precision", "memory_budget_bytes")
    return {
        "model": case.model,
        "profile_flags": list(case.profile_flags),
        "label": label,
        **{key: document[key] for key in knobs},
        "segments": len(document["checkpoint"]),
        "predicted": {key: document["prediction"][key] for key in document["measured"]["relative_error"]},
        "stated_error": document["prediction"]["error"],
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
        f"{errors['step_cpu_seconds']:+.1%} CPU)  peak {mib:.1f} MiB ({errors['peak_memory_bytes']:+.3%})"
    )


def _versions() -> dict[str, str]:
    from profiler.device import versions

    return versions()


if __name__ == "__main__":
    sys.exit(main())

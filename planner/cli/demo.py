"""``make demo``: the whole path on a real model, with the commands that a user would type.

GPT-2 small (124 M parameters) is profiled on this machine, the best plan under a budget below the plain plan's peak is
found and tried beside another for real, plan and plain baseline are run and measured in processes of their own, a few
training steps follow, and a page shows it all.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from planner.cli.picture import MemoryCourse, draw_memory

FOLDER = Path("demo")
MODEL = "gpt2"
SEQUENCE_LENGTH = 192
BUDGET = "2400MiB"
BUDGET_BYTES = 2400 * 2**20


def main() -> int:
    """Run the demo in ``./demo``; the exit code of the first command that fails, else 0."""
    began = time.perf_counter()
    FOLDER.mkdir(exist_ok=True)
    os.environ.setdefault("PLANNER_HOME", str(FOLDER.resolve() / "home"))
    profile, plan, page = (FOLDER / f"gpt2.{name}" for name in ("profile.json", "plan.json", "report.html"))
    try:
        _planner(
            "profile", MODEL, "--seq-len", str(SEQUENCE_LENGTH), "--batch", "2", "--steps", "2", "-o", str(profile),
        )  # fmt: skip
        _planner(
            "optimize", str(profile), "--global-batch-size", "4", "--memory-budget", BUDGET,
            "--trials", "1", "--trial-steps", "2", "-o", str(plan),
        )  # fmt: skip
        plain = _measure("verify", str(plan), "--baseline", "plain", "--steps", "2")
        best = _measure("verify", str(plan), "--steps", "2")
        _planner("train", str(plan), "--steps", "2", "--output-dir", str(FOLDER / "run"))
        _planner("report", str(plan), "-o", str(page))
    except subprocess.CalledProcessError as failure:
        return failure.returncode
    picture = FOLDER / "memory.png"
    draw_memory(
        _course("plain baseline, measured", plain),
        _course("plan, measured", best),
        BUDGET_BYTES,
        f"GPT-2 small, sequence {SEQUENCE_LENGTH}, global batch 4, {best['device']['name']}",
        picture,
    )
    table = _table(plain, best)
    (FOLDER / "table.txt").write_text(table + "\n")
    print(f"\n{table}\n")
    print(f"Page: {page}   Picture: {picture}   Plan: {plan}")
    print(f"Trials in the dashboard: planner dashboard --storage {_storage()}")
    print(f"The demo took {time.perf_counter() - began:.0f} s.")
    return 0


def _storage() -> str:
    return f"journal:{Path(os.environ['PLANNER_HOME']) / 'studies.journal'}"


def _planner(*arguments: str) -> None:
    print(f"\n$ planner {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "planner.cli", *arguments], check=True)


def _measure(*arguments: str) -> dict[str, Any]:
    print(f"\n$ planner {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "planner.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if not done.stdout:
        raise subprocess.CalledProcessError(done.returncode, command)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _course(label: str, document: dict[str, Any]) -> MemoryCourse:
    return MemoryCourse(
        label=label,
        curve=document["measured"]["memory_curve"],
        predicted_peak_bytes=document["prediction"]["peak_memory_bytes"],
    )


ROWS = (
    ("step time, wall", "step_seconds", 1.0, "s", ".2f"),
    ("step time, process CPU", "step_cpu_seconds", 1.0, "s", ".2f"),
    ("at the device's speed", "steady_seconds", 1.0, "s", ".2f"),
    ("peak memory", "peak_memory_bytes", 2**20, "MiB", ",.1f"),
    ("energy", "step_joules", 1.0, "J", ".0f"),
)


def _held_against(document: dict[str, Any], key: str) -> tuple[float | None, float | None]:
    """Predicted and measured; steady seconds are the CPU's own, predicted for the speed that the device has now."""
    prediction, measured = document["prediction"], document["measured"]
    if key != "steady_seconds":
        return prediction[key], measured[key]
    clock = "step_seconds" if measured["step_cpu_seconds"] is None else "step_cpu_seconds"
    return prediction[clock] / (measured["device_speed"] or 1.0), measured[clock]


def _table(plain: dict[str, Any], best: dict[str, Any]) -> str:
    lines = [
        f"{'':24} {'plain baseline':^37} {'plan':^37}",
        f"{'':24}" + f" {'predicted':>12} {'measured':>12} {'error':>11}" * 2,
    ]
    for title, key, unit, symbol, form in ROWS:
        cells = []
        for document in (plain, best):
            predicted, measured = _held_against(document, key)
            error = document["measured"]["relative_error"][key]
            cells += [
                "unknown" if predicted is None else f"{predicted / unit:{form}} {symbol}",
                "unknown" if measured is None else f"{measured / unit:{form}} {symbol}",
                "" if error is None else f"{error:+.2%}",
            ]
        lines.append(
            f"{title:24}" + "".join(f" {a:>12} {b:>12} {c:>11}" for a, b, c in (cells[:3], cells[3:]))
        )
    for title, document in (("plain baseline", plain), ("plan", best)):
        k, b = document["gradient_accumulation_steps"], document["micro_batch_size"]
        segments = document["checkpoint"]
        lines.append(
            f"{title}: micro-batch {b} x {k} accumulation steps, {document['precision']}, "
            + (f"{len(segments)} recomputed segments" if segments else "nothing recomputed")
            + (f", the loss in {document['loss_chunks']} chunks" if document.get("loss_chunks") else "")
        )
    said = ["fits" if document["measured"]["peak_memory_bytes"] <= BUDGET_BYTES else "does not fit"
            for document in (plain, best)]  # fmt: skip
    lines.append(f"budget {BUDGET}: the plain baseline {said[0]}, the plan {said[1]}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

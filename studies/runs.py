"""What every study does: run commands as a user types them, and keep results with where they come from."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.profile_record import DeviceRecord

RESULTS = Path(__file__).parent / "results"


def run(*arguments: str, time_limit_seconds: float | None = None) -> str:
    """The standard output of a ``planner`` command in a process of its own; RuntimeError when it fails."""
    return _finished(arguments, (0,), time_limit_seconds)


def document(*arguments: str, time_limit_seconds: float | None = None) -> dict[str, Any]:
    """The document that a command prints; verify exits 5 when a plan does not hold, and prints it all the same."""
    found: dict[str, Any] = json.loads(_finished((*arguments, "--json"), (0, 5), time_limit_seconds))
    return found


def _finished(arguments: tuple[str, ...], good: tuple[int, ...], time_limit_seconds: float | None) -> str:
    command = [sys.executable, "-m", "planner.cli", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=time_limit_seconds)
    if done.returncode not in good:
        raise RuntimeError(
            f"planner {' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def provenance(command: str) -> dict[str, Any]:
    """Command, date, commit and library versions, for the head of a results file."""
    from profiler.device import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE, check=False, text=True)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "versions": versions(),
    }


def name_on(study: str, device: DeviceRecord) -> str:
    """What the results of a study on one device are called."""
    model = device.name.lower().split(" with")[0]
    return f"{study}-" + re.sub(r"[^a-z0-9]+", "-", model).strip("-")[:24]


def write(name: str, results: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path

"""What every study does: run commands as a user types them, keep results with where they come from, draw them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from profiler.profile_record import DeviceRecord

RESULTS = Path(__file__).parent / "results"

Case = TypeVar("Case")


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
    return f"{study}-" + re.sub(r"[^a-z0-9]+", "-", model).strip("-")[:36]


def write(name: str, results: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def picked(
    parser: argparse.ArgumentParser, cases: Iterable[Case], name_of: Callable[[Case], str], part: str
) -> list[Case]:
    """The cases whose name contains what ``--only`` says; the parser's error where none does."""
    by_name = {name_of(case): case for case in cases}
    found = [case for name, case in by_name.items() if part in name]
    if not found:
        parser.error(f"--only {part} must be part of one of these names: {', '.join(by_name)}.")
    return found


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **more: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure with its grid of axes, open at the top and the right; it is written when all is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, dpi=120, squeeze=False, layout="constrained", **more)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    yield figure, grid
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)

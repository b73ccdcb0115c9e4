"""A trial's own process: how long it may take, how much memory, and how its end is read.

    parent                                   child: python -m executor.trial
      plan.json ───────────────────────────▶   wall of memory, dies with its parent
      waits, at most the time limit             warm-up, timed steps, peak
      result.json ◀──────────────────────────   how it ended, what it measured

What the child says on its way out is kept for people, and decides nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from planner.explain import chosen
from planner.outcome import Outcome, TrialResult
from planner.plan import Choice, Plan
from profiler import records

Sampler = Literal["tpe", "gp"]

STARTING_SECONDS = 90.0
SLOWER = 10.0
"""A trial may take this many times as long as its steps should, and the seconds above to start."""

STEPS_BESIDE = 4
"""Steps of a trial that are not timed: warm-up, the one whose peak is measured, and what the yardstick takes."""

WALL_SHARE = {"cpu": 4.0, "cuda": 1.25}
WALL_BYTES = 2**30
"""The wall around a trial: so many budgets, and what libraries take. It is for what goes wrong; whether a plan keeps
the budget is measured. On a CPU a process that keeps what it frees, as the profile did, holds far more than what is in
use: GPT-2 with a peak of 2.5 GiB was refused memory at 3.75 GiB (studies/LOG.md)."""

LAST_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTerms:
    """How many trials a study shall have in all, and how each is run. ``timeout_seconds`` None: from its prediction."""

    trials: int
    steps: int = 3
    timeout_seconds: float | None = None
    seed: int = 0
    sampler: Sampler = "tpe"

    def time_limit(self, choice: Choice) -> float:
        """Seconds after which a trial of this plan is ended."""
        if self.timeout_seconds is not None:
            return self.timeout_seconds
        return STARTING_SECONDS + SLOWER * (self.steps + STEPS_BESIDE) * choice.prediction.step_seconds


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended, and what it measured if it did."""

    outcome: Outcome
    result: TrialResult | None
    message: str | None = None


def run_in_process(plan: Plan, terms: TrialTerms) -> Ended:
    """Run a plan in a process of its own, which dies with this one."""
    with tempfile.TemporaryDirectory(prefix="planner-trial-") as folder:
        written, result, said = (Path(folder) / name for name in ("plan.json", "result.json", "said.txt"))
        plan.save(written)
        command = [
            sys.executable, "-m", "executor.trial", str(written), str(result), "--steps", str(terms.steps),
            "--parent", str(os.getpid()),
        ]  # fmt: skip
        wall = wall_bytes(plan)
        if wall is not None:
            command += ["--wall-bytes", str(wall)]
        killed_before = killed_for_memory()
        with said.open("wb") as output:
            child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                status = child.wait(terms.time_limit(chosen(plan)))
            except subprocess.TimeoutExpired:
                return Ended("timeout", None, last_lines(said))
            finally:
                _end(child)
        if result.exists():
            found = records.read(result, TrialResult)
            return Ended(found.outcome, found if found.outcome == "ok" else None, found.message)
        if status == -signal.SIGKILL and killed_for_memory() > killed_before:
            return Ended("out_of_memory", None, "The kernel killed it: the machine had no memory left.")
        how = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        return Ended("crash", None, f"{how}\n{last_lines(said)}".rstrip())


def wall_bytes(plan: Plan) -> int | None:
    """How much memory a trial of this plan may take, in bytes; None where nothing keeps a process within a limit."""
    if plan.device.kind == "cpu" and not sys.platform.startswith("linux"):
        return None
    budget = plan.memory_budget_bytes or plan.device.memory_bytes
    wall = math.ceil(WALL_SHARE[plan.device.kind] * budget) + WALL_BYTES
    return min(wall, plan.device.memory_bytes)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def last_lines(said: Path) -> str:
    lines = said.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


def killed_for_memory() -> int:
    """How many processes the kernel has killed for memory since it started; 0 where it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(counters[counters.index("oom_kill") + 1]) if "oom_kill" in counters else 0


def myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks, which tells it from a later one with its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def is_alive(worker: dict[str, Any]) -> bool:
    """Whether the process that runs a trial on this machine is still there."""
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(worker["started"] == _started(worker["pid"]))

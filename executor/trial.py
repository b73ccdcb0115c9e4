"""One trial: run a plan in this process, behind a wall of memory, and write down how it ended.

    python -m executor.trial PLAN RESULT [--steps N] [--wall-bytes N]

The wall keeps a plan that needs more than was predicted from taking the machine with it: on a CPU the process may
allocate that much on top of what it has before it builds the model, on CUDA the caching allocator may. The process
dies with its parent.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from executor.parent import die_with
from planner.outcome import TrialResult
from planner.plan import Plan, load_plan
from profiler import records


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one plan and write down how it ended.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--wall-bytes", type=int)
    parser.add_argument("--parent", type=int, help="die with this process")
    options = parser.parse_args()
    if options.parent is not None:
        die_with(options.parent)
    plan = load_plan(options.plan)
    result = measured(plan, options.steps, options.wall_bytes)
    records.write(options.result, result)
    if result.message is not None:
        print(result.message, file=sys.stderr)
    return 0 if result.outcome == "ok" else 1


def measured(plan: Plan, steps: int, wall_bytes: int | None) -> TrialResult:
    """Verify a plan; whatever it raises is an outcome too."""
    from executor.verification import device_of, verify
    from profiler.device import is_out_of_memory
    from profiler.freed_memory import keep_freed_memory

    try:
        device = device_of(plan)
        if device.type == "cpu":
            keep_freed_memory()  # As in the profile, and before there is a limit, which counts what is kept.
        if wall_bytes is not None:
            raise_wall(device.type, wall_bytes)
        found = verify(plan, steps=steps)
    except Exception as error:
        return TrialResult(
            plan_sha256=plan.sha256,
            outcome="out_of_memory" if is_out_of_memory(error) else "crash",
            message=traceback.format_exc(limit=-3),
        )
    return TrialResult(
        plan_sha256=plan.sha256,
        outcome="ok",
        measured=found.measured,
        steady_seconds=found.measured.steady_seconds * (found.device_speed or 1.0),
        steady_error=found.relative_error["steady_seconds"],
        device_speed=found.device_speed,
    )


def raise_wall(device_type: str, wall_bytes: int) -> None:
    """From now on this process gets ``wall_bytes`` more memory and no more. ValueError where there is no such wall."""
    import torch

    if device_type == "cuda":
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, wall_bytes / total, free / total))
        return
    if not sys.platform.startswith("linux"):
        raise ValueError("Only Linux keeps a process's memory within a limit. Leave the limit out.")
    import resource

    limit = data_bytes() + wall_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def data_bytes() -> int:
    """What ``RLIMIT_DATA`` counts: private memory that can be written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


if __name__ == "__main__":
    sys.exit(main())

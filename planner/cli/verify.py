"""Run a plan briefly and hold its prediction against what is measured.

Exit code 5 says that a measurement lies outside of the error that the plan states, or that memory ran out. What was off
is kept with the device, and decides on the error that later plans state. A plan for several processes is run in as
many.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from planner.cli import arguments, ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from executor import Verification
    from planner.plan import Plan

FAILED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument(
        "--steps", metavar="N", type=arguments.count, default=5, help="optimizer steps to time (default: 5)"
    )
    parser.add_argument(
        "--baseline",
        choices=("plain", "sqrt", "every_block"),
        help="run this baseline of the plan instead: what one would do by hand",
    )


def run(args: argparse.Namespace) -> int:
    # Of blocks freed under the meter and allocated before it, torch would log that it does not know them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from planner.plan import load_plan

    plan = load_plan(args.plan)
    if args.baseline is not None:
        from planner.cost import instead

        plan = instead(plan, getattr(plan.baselines, args.baseline))
    if plan.world_size > 1:
        return _of_several(args, plan)
    from planner import calibration

    with ranks.speaking() as tell:
        tell("loading torch")
        import executor
        from executor.errors import OutOfMemory

        try:
            found = executor.verify(plan, steps=args.steps, progress=tell)
        except OutOfMemory as error:
            print(f"planner: {error}", file=sys.stderr)
            return FAILED
    calibration.learn(plan.device, found.residual)
    return _said(args, plan, found)


def _of_several(args: argparse.Namespace, plan: Plan) -> int:
    """Start the plan's processes, or be one of them. What was off stays here: it is not the device's alone."""
    import msgspec

    from executor.launch import as_rank, is_rank
    from executor.verification import Verification

    def work(hand_over: Callable[[bytes], None]) -> int:
        with ranks.speaking() as tell:
            tell("loading torch and DeepSpeed")
            import executor

            hand_over(msgspec.json.encode(executor.verify(plan, steps=args.steps, progress=tell)))
        return 0

    if is_rank():
        return as_rank(work)
    ended = ranks.start(args, plan)
    if ended.document is None or ended.status != 0:
        return ended.status
    return _said(args, plan, msgspec.json.decode(ended.document, type=Verification))


def _said(args: argparse.Namespace, plan: Plan, found: Verification) -> int:
    if args.json:
        json.dump(_document(plan, found), sys.stdout, indent=2)
        print()
    else:
        show(plan, found)
    return 0 if found.passed else FAILED


def _document(plan: Plan, found: Verification) -> dict[str, object]:
    """The plan's own document, and what was measured beside it."""
    import msgspec

    whole: dict[str, object] = msgspec.to_builtins(plan)
    measured: dict[str, object] = msgspec.to_builtins(found.measured)
    of_verification: dict[str, object] = msgspec.to_builtins(found)
    names = ("relative_error", "within", "passed", "device_speed", "memory_curve")
    verdict = {name: of_verification[name] for name in names}
    return whole | {"measured": measured | verdict}


def _at_speed(device_speed: float | None) -> str:
    """The line by which a step's time is judged."""
    return "  as judged" if device_speed is None else f"  at {device_speed:.0%} of the profile's speed"


def show(plan: Plan, found: Verification) -> None:
    """Predicted against measured."""
    from planner.cli.output import console, heading, of_bytes, of_joules, of_seconds, table

    out = console()
    verdict = "the plan holds" if found.passed else "the plan does not hold"
    out.print(heading(f"{plan.model}: {verdict}"))
    out.print()
    numbers = ("predicted", "measured", "off", "stated")
    rows = table("", *numbers, "", right=numbers)
    stated = plan.prediction.error
    judged = {"step_seconds": "", "steady_seconds": "step_seconds"}
    for name, label, written, error in (
        ("step_seconds", "step time", of_seconds, None),
        ("step_cpu_seconds", "step time, CPU's clock", of_seconds, None),
        ("steady_seconds", _at_speed(found.device_speed), of_seconds, stated.step_seconds),
        ("peak_memory_bytes", "peak memory", of_bytes, stated.peak_memory_bytes),
        ("peak_reserved_bytes", "peak reserved", of_bytes, None),
        ("step_joules", "energy", of_joules, stated.step_joules),
    ):
        predicted, measured = getattr(found.predicted, name), getattr(found.measured, name)
        off = found.relative_error.get(name)
        if name == "steady_seconds":
            predicted /= found.device_speed or 1.0
        if measured is None and (name != "step_joules" or predicted is None):
            continue
        rows.add_row(
            label,
            "" if predicted is None else written(predicted),
            "not measured" if measured is None else written(measured),
            "" if off is None else f"{off:+.1%}",
            "" if error is None else f"± {error:.1%}",
            {True: "within", False: "outside", None: ""}[found.within.get(judged.get(name, name))],
        )
    out.print(rows)
    if not found.within.get("memory_budget", True):
        out.print()
        over = found.measured.peak_memory_bytes - (plan.memory_budget_bytes or 0)
        out.print(f"The measured peak is {of_bytes(over)} over the budget.")

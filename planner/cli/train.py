"""Train the plan's model.

Built-in workloads bring data that every machine has; a language model also trains on a folder of text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from executor import TrainingReport
    from planner.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument("--data", metavar="DIR", type=Path, help="a folder of text (default: data at hand)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", metavar="N", type=arguments.count, help="optimizer steps (default: 20)")
    length.add_argument("--epochs", metavar="N", type=arguments.count, help="passes over the data")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=arguments.output_folder,
        help="for weights, metrics and the report (default: none kept)",
    )


def run(args: argparse.Namespace) -> int:
    from planner.plan import load_plan
    from profiler import records

    plan = load_plan(args.plan)
    from planner.cli.output import progress

    with progress() as tell:
        tell("loading torch")
        import executor
        from executor.training import Progress

        class Told(Progress):
            def begins(self, data: str, steps: int) -> None:
                tell(f"{steps} steps on {data}")

            def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
                tell(f"step {step} of {steps}  loss {loss:.4f}  {samples_per_second:.2f} samples/s")

        report = executor.train(
            plan, args.data, args.output_dir, steps=args.steps, epochs=args.epochs, progress=Told()
        )
    if args.json:
        sys.stdout.write(records.encode(report).decode())
    else:
        show(plan, report, args.output_dir)
    return 0


def show(plan: Plan, report: TrainingReport, output_dir: Path | None) -> None:
    """What the run came to."""
    from planner.cli.output import console, facts, heading, of_bytes, of_seconds

    out = console()
    predicted, measured = report.predicted, report.measured
    out.print(heading(f"{plan.model}: {report.steps} steps, {report.samples} samples"))
    out.print()
    time = f"{of_seconds(measured.step_seconds)}, predicted {of_seconds(predicted.step_seconds)}"
    peak = f"{of_bytes(measured.peak_memory_bytes)}, predicted {of_bytes(predicted.peak_memory_bytes)}"
    rows = [
        ("data", report.data),
        ("loss", f"{report.first_loss:.4f} at first, {report.final_loss:.4f} at last"),
        ("step time", time),
        ("peak memory", peak),
    ]
    if output_dir is not None:
        rows.append(("written to", str(output_dir)))
    out.print(facts(rows))

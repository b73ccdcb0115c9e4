"""Draw a plan on one page: what memory buys, memory and time of a step, what becomes of each stage.

The page is one HTML file that needs no network, to open in a browser, to print or to send. Everything is read from
the plan file: no model, no device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planner.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument(
        "-o",
        metavar="FILE",
        dest="output",
        type=arguments.output_file,
        help="default: PLAN's name, .report.html",
    )


def run(args: argparse.Namespace) -> int:
    from planner.plan import load_plan
    from planner.report import missing, page
    from profiler import records

    plan = load_plan(args.plan)
    path: Path = args.output or Path(f"{_stem(args.plan)}.report.html")
    drawn = page(plan).encode()
    try:
        records.replace_whole(path, lambda file: file.write(drawn))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Name another file with -o.") from error
    if args.json:
        print(json.dumps({"plan_sha256": plan.sha256, "report": str(path), "missing": missing(plan)}))
    else:
        show(path, missing(plan))
    return 0


def _stem(plan: str) -> str:
    return Path(plan).name.removesuffix(".json").removesuffix(".plan")


def show(path: Path, missing: tuple[str, ...]) -> None:
    """Where the page went, and what it could not show."""
    from planner.cli.output import console, facts

    lacking = f"{' and '.join(missing)}: make the plan again with planner optimize"
    console().print(facts([("written to", str(path)), *([("missing", lacking)] if missing else [])]))

"""Draw a plan on one page: what memory buys, memory and time of a step, what becomes of each stage.

The page is one HTML file that needs no network, to open in a browser, to print or to send. Everything is read from
the plan file, or from a study, which holds its plan; and from the study of its trials where it had any: no model, no
device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.report import Trial


TRIALS = "what its trials measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="PLAN|STUDY", help="a file made by planner optimize, or the study of that name"
    )
    parser.add_argument(
        "-o",
        metavar="FILE",
        dest="output",
        type=arguments.output_file,
        help="default: PLAN's or STUDY's name, .report.html",
    )
    parser.add_argument(
        "--storage", metavar="URL", help="where the study is, its own or of its trials (default: the user's)"
    )


def run(args: argparse.Namespace) -> int:
    from planner.plan import load_plan
    from planner.report import missing, page
    from profiler import records

    path: Path = args.output or Path(f"{_stem(args.plan)}.report.html")
    if Path(args.plan).exists():
        plan = load_plan(args.plan)
        trials = _trials_of_plan(plan, args.storage)
    else:
        from planner.storage import default_storage_url
        from planner.study import plan_of

        url = args.storage or default_storage_url()
        plan = plan_of(args.plan, url)
        trials = _trials(url, args.plan)
    lacking = missing(plan) if trials is not None else (*missing(plan), TRIALS)
    drawn = page(plan, trials or ()).encode()
    try:
        records.replace_whole(path, lambda file: file.write(drawn))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Name another file with -o.") from error
    if args.json:
        print(json.dumps({"plan_sha256": plan.sha256, "report": str(path), "missing": lacking}))
    else:
        show(path, lacking)
    return 0


def _trials_of_plan(plan: Plan, storage: str | None) -> list[Trial] | None:
    """The plan's trials that were measured; None where it had some and the storage does not know them."""
    if plan.trials is None:
        return []
    from planner.storage import default_storage_url

    return _trials(storage or default_storage_url(), plan.trials.study)


def _trials(storage_url: str, study: str) -> list[Trial] | None:
    """The trials of a study that were measured; None where the storage does not know it."""
    from planner.trials import description, trials_of

    tried = trials_of(storage_url, study)
    if tried is None:
        return None
    return [
        (
            f"{each.number}: {description(each.placement, each.choice)}",
            each.choice.prediction,
            each.result.measured,
        )
        for each in tried
        if each.result is not None and each.result.measured is not None
    ]


def _stem(plan: str) -> str:
    return Path(plan).name.removesuffix(".json").removesuffix(".plan")


def show(path: Path, missing: tuple[str, ...]) -> None:
    """Where the page went, and what it could not show."""
    from planner.cli.output import console, facts

    of_plan = [each for each in missing if each != TRIALS]
    rows = [("written to", str(path))]
    if of_plan:
        rows.append(("missing", f"{' and '.join(of_plan)}: make the plan again with planner optimize"))
    if TRIALS in missing:
        rows.append(("missing", f"{TRIALS}: this storage has not their study, give it with --storage"))
    console().print(facts(rows))

"""Write a plan as the configuration of another engine, and say what that cannot hold.

The configuration goes to -o FILE or to stdout, what it leaves out to stderr. JSON for deepspeed, transformers
(TrainingArguments) and lightning (Trainer), YAML for accelerate launch --config_file, a Python module for torchtitan.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from planner.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument(
        "--to",
        metavar="ENGINE",
        dest="target",
        required=True,
        type=arguments.target,
        help="deepspeed, transformers, accelerate, lightning or torchtitan",
    )
    parser.add_argument(
        "-o", metavar="FILE", dest="output", type=arguments.output_file, help="default: stdout"
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from planner.export import EXPORTERS
    from planner.plan import load_plan
    from profiler import records

    exported = EXPORTERS[args.target](load_plan(args.plan))
    path: Path | None = args.output
    if path is not None:
        text = exported.text.encode()
        try:
            records.replace_whole(path, lambda file: file.write(text))
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written: {error.strerror}. Name another file with -o."
            ) from error
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(exported), indent=2).decode() + "\n")
        return 0
    if path is None:
        sys.stdout.write(exported.text)
    else:
        print(f"written to {path}, for {exported.target} {exported.target_version}", file=sys.stderr)
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0

"""Measure a model on this machine and write its profile.

The profile holds what planning needs: memory curves and times of every stage, per precision and micro-batch
size.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from profiler.profile_record import Profile

DEFAULT_BATCHES = {"resnet50": (16, 32, 64)}
FALLBACK_BATCHES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="gpt2, resnet50 or package.module:function")
    parser.add_argument(
        "--batch",
        metavar="BATCHES",
        type=arguments.counts,
        help="micro-batch sizes to measure (default: 1,2,4; for resnet50: 16,32,64)",
    )
    parser.add_argument(
        "--seq-len", metavar="N", type=arguments.count, help="tokens in a sequence (gpt2: 256)"
    )
    parser.add_argument(
        "--image-size", metavar="N", type=arguments.count, help="pixels a side (resnet50: 32)"
    )
    parser.add_argument(
        "--precision",
        metavar="LIST",
        type=arguments.precisions,
        default=("fp32", "bf16"),
        help="of fp32, bf16, fp16 (default: fp32,bf16)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="adamw or sgd (default: adamw)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=arguments.count,
        default=4,
        help="steps to time of each kind (default: 4)",
    )
    parser.add_argument(
        "-o", metavar="FILE", dest="output", type=arguments.output_file, help="default: MODEL.profile.json"
    )


def run(args: argparse.Namespace) -> int:
    from planner.cli.output import progress
    from profiler import records
    from profiler.workload_spec import WorkloadSpec, resolve

    spec = resolve(WorkloadSpec(name=args.model, sequence_length=args.seq_len, image_size=args.image_size))
    path: Path = args.output or Path(f"{spec.name.rpartition(':')[2]}.profile.json")
    with progress() as tell:
        tell(f"building {spec.name}")
        from profiler.measure import profile
        from profiler.registry import build

        found = profile(
            build(spec),
            args.batch or DEFAULT_BATCHES.get(spec.name, FALLBACK_BATCHES),
            args.precision,
            args.device,
            optimizer=args.optimizer,
            steps=args.steps,
            spec=spec,
            progress=tell,
        )
    records.write(path, found)
    if args.json:
        sys.stdout.write(records.encode(found).decode())
    else:
        show(found, path)
    return 0


def show(profile: Profile, path: Path) -> None:
    """What was found, in one page."""
    from planner.cli.output import console, facts, heading, of_bytes, of_count, of_seconds, table
    from planner.explain import stage_groups

    out = console()
    device, check, largest = profile.device, profile.memory_check, profile.micro_batch_sizes[-1]
    threads = "" if device.threads is None else f", {device.threads} thread{'s' * (device.threads > 1)}"
    out.print(heading(f"{profile.model} on {device.name}{threads}"))
    out.print(
        f"{of_count(profile.parameter_count)} parameters in {len(profile.stages)} stages, {profile.optimizer}"
    )
    out.print()

    out.print(heading(f"One micro-batch of {largest} in fp32, stage by stage"))
    numbers = ("count", "parameters", "forward", "backward", "kept for backward")
    rows = table("stages", *numbers, right=numbers)
    for group in stage_groups(profile, "fp32"):
        rows.add_row(
            group.name,
            str(group.count),
            of_count(group.parameter_count),
            of_seconds(group.forward_seconds),
            of_seconds(group.backward_seconds),
            of_bytes(group.kept_bytes),
        )
    out.print(rows)
    out.print()

    out.print(heading("One optimizer step of two micro-batches"))
    columns = [f"micro-batch {size}" for size in profile.micro_batch_sizes]
    steps = table("precision", *columns, right=columns)
    for measured in profile.precisions:
        steps.add_row(
            measured.precision, *(f"{of_seconds(t.step_seconds)} ± {t.spread:.1%}" for t in measured.wall)
        )
    out.print(steps)
    for left_out in profile.hopeless:
        out.print(
            f"{left_out.precision} is {left_out.slowdown:.1f} times slower than fp32 here and was left out."
        )
    out.print()

    off = check.predicted_bytes / check.measured_bytes - 1
    took = f"{of_seconds(profile.cost.seconds)}, {profile.cost.micro_batches_run} micro-batches run"
    predicted, real = of_bytes(check.predicted_bytes), of_bytes(check.measured_bytes)
    # What the smallest micro-batch needs and a tenth more: some plan fits, and it has to try.
    budget = math.ceil(1.1 * check.measured_bytes / 2**20)
    out.print(
        facts(
            [
                ("memory check", f"predicted {predicted}, a real step needed {real}: off by {abs(off):.2%}"),
                ("took", took),
                ("written to", str(path)),
                (
                    "next",
                    f"planner optimize {path} --global-batch-size {8 * largest} --memory-budget {budget}MiB",
                ),
            ]
        )
    )

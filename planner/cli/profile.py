"""Measure a model on this machine and write its profile.

The profile holds what planning needs: memory curves and times of every stage, per precision and micro-batch
size.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from profiler.profile_record import Profile
    from profiler.workload import Workload

MODELS = "gpt2, resnet50, transformers:NAME_OR_DIR, torchvision:NAME or package.module:function"
SMALLEST_BATCHES = {"resnet50": 16}
"""Micro-batch sizes are doubles of these, or of 1."""

NOISE_STEPS = 8
"""Probing steps of ``--noise-scale``: with 8, its 95% interval is wide (Student's t of 7 is 2.4) but not useless."""

MUCH_OTHER_WORK = 0.1
"""Of the processors, while a profile was made: then its page says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODELS)
    parser.add_argument(
        "--batch",
        metavar="BATCHES",
        type=arguments.counts,
        help="micro-batch sizes to measure (default: 1,2,4 on a CPU, 1,2,4,... up to 128 as the memory of a GPU "
        "allows; resnet50: from 16 on)",
    )
    parser.add_argument(
        "--seq-len",
        metavar="N",
        type=arguments.count,
        help="tokens in a sequence (default: 256 or the longest)",
    )
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=arguments.count,
        help="pixels a side (default: the model's; resnet50: 32)",
    )
    parser.add_argument(
        "--precision",
        metavar="LIST",
        type=arguments.precisions,
        default=("fp32", "bf16"),
        help="of fp32, bf16, fp16 (default: fp32,bf16)",
    )
    parser.add_argument(
        "--all-precisions",
        action="store_true",
        help="also time a precision that is hopelessly slow here (left out otherwise)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:N, or one of `planner devices`, on which nothing is run (default: auto)",
    )
    parser.add_argument(
        "--fake", action="store_true", help="run nothing: shapes give the memory, a roofline the time"
    )
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        type=arguments.optimizer,
        default="adamw",
        help="adamw, adamw-foreach, adamw-loop, sgd or adafactor (default: adamw)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=arguments.count,
        default=4,
        help="steps to time of each kind (default: 4)",
    )
    parser.add_argument(
        "--watts",
        metavar="N",
        type=float,
        help="what the device draws, in place of a counter's word (default: NVML or RAPL, where they are)",
    )
    parser.add_argument(
        "--noise-scale",
        metavar="STEPS",
        type=arguments.count,
        nargs="?",
        const=NOISE_STEPS,
        default=0,
        help=f"also probe the gradient noise scale, with this many steps (without a number: {NOISE_STEPS})",
    )
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=arguments.count,
        default=1,
        help="also measure the link between this many processes (default: 1, no link)",
    )
    parser.add_argument(
        "-o", metavar="FILE", dest="output", type=arguments.output_file, help="default: MODEL.profile.json"
    )


def run(args: argparse.Namespace) -> int:
    from planner.cli.output import progress
    from profiler import records
    from profiler.workload_spec import WorkloadSpec, resolve

    spec = resolve(WorkloadSpec(name=args.model, sequence_length=args.seq_len, image_size=args.image_size))
    path: Path = args.output or Path(f"{Path(spec.name.rpartition(':')[2]).resolve().name}.profile.json")
    with progress() as tell:
        tell(f"building {spec.name}")
        from profiler import catalogue
        from profiler.fake import without_memory
        from profiler.measure import profile
        from profiler.registry import build

        fake = args.fake or catalogue.has(args.device)
        with without_memory() if fake else contextlib.nullcontext():
            workload = build(spec)
        batches = args.batch
        if batches is None:
            tell("choosing micro-batch sizes")
            batches = default_sizes(args.device, SMALLEST_BATCHES.get(spec.name, 1), workload, args.optimizer)
        found = profile(
            workload,
            batches,
            args.precision,
            args.device,
            optimizer=args.optimizer,
            steps=args.steps,
            all_precisions=args.all_precisions,
            watts=args.watts,
            noise_steps=args.noise_scale,
            fake=fake,
            world_size=args.world_size,
            spec=spec,
            progress=tell,
        )
    records.write(path, found)
    if args.json:
        sys.stdout.write(records.encode(found).decode())
    else:
        show(found, path)
    return 0


def default_sizes(device: str, smallest: int, workload: Workload, optimizer: str) -> tuple[int, ...]:
    """Three micro-batch sizes for a CPU, for a GPU as many as it holds."""
    from profiler import catalogue
    from profiler.device import describe, resolve
    from profiler.micro_batches import FEWEST, sizes_that_fit

    if catalogue.has(device):
        memory_bytes = catalogue.find(device).memory_bytes
    elif (here := resolve(device)).type == "cuda":
        memory_bytes = describe(here).memory_bytes
    else:
        return tuple(smallest * 2**n for n in range(FEWEST))
    return sizes_that_fit(workload, memory_bytes, smallest=smallest, optimizer=optimizer)


def show(profile: Profile, path: Path) -> None:
    """What was found, in one page."""
    from planner.cli.output import console, facts, heading, of_bytes, of_count, of_seconds, of_source, table
    from planner.cost import checked_peak_bytes, memory_error, plain_peak_bytes
    from planner.explain import stage_groups

    out = console()
    device, check = profile.device, profile.memory_check
    largest = profile.precisions[0].micro_batch_sizes[-1]
    threads = "" if device.threads is None else f", {device.threads} thread{'s' * (device.threads > 1)}"
    out.print(heading(f"{profile.model} on {device.name}{threads}"))
    out.print(
        f"{of_count(profile.parameter_count)} parameters in {len(profile.stages)} stages, {profile.optimizer}"
    )
    if len(profile.stages) == 1:
        out.print("It can be cut nowhere: it is one stage, and nothing of it can be recomputed.")
    out.print()

    source = of_source(profile.time_source)
    out.print(heading(f"One micro-batch of {largest} in fp32, stage by stage{source}"))
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

    out.print(heading(f"One optimizer step of two micro-batches{of_source(profile.time_source)}"))
    columns = ("micro-batch", *(measured.precision for measured in profile.precisions))
    steps = table(*columns, right=columns)
    for number, size in enumerate(profile.micro_batch_sizes):
        times = [
            f"{of_seconds(measured.wall[number].step_seconds)} ± {measured.wall[number].spread:.1%}"
            if number < len(measured.wall)
            else "no memory"
            for measured in profile.precisions
        ]
        steps.add_row(str(size), *times)
    out.print(steps)
    for measured in profile.precisions:
        away = [str(size) for size in measured.micro_batch_sizes if size not in measured.plain_sizes]
        if away:
            out.print(
                f"{measured.precision}: a plain step of micro-batch {away[0]} was refused memory; "
                f"{' and '.join(away)} ran with what a step saves kept elsewhere, at the same speed."
            )
    for refused in profile.too_large:
        out.print(
            f"{refused.precision}: micro-batch {refused.micro_batch_size} was refused memory, however little was kept; "
            "nothing that large was timed, and no plan takes it."
        )
    for left_out in profile.hopeless:
        out.print(
            f"{left_out.precision} is {left_out.slowdown:.1f} times slower than fp32 here and was left out."
        )
    out.print()

    took = f"{of_seconds(profile.cost.seconds)}, {profile.cost.micro_batches_run} micro-batches run"
    composed = checked_peak_bytes(profile)
    if check is None or composed is None:
        sizes = profile.precisions[0].micro_batch_sizes
        peak = plain_peak_bytes(profile, "fp32", sizes[len(sizes) // 2], 2)
        why = "nothing was run" if profile.time_source == "roofline" else "no plain step fits"
        checked = f"{why}, so peaks are stated ± {memory_error(profile):.0%}"
    else:
        peak = check.measured_bytes
        off = abs(composed / peak - 1)
        checked = f"predicted {of_bytes(composed)}, a real step needed {of_bytes(peak)}: off by {off:.2%}"
    # What a plain step needs and a tenth more; if none fits, two thirds: some plan fits, and it has to try.
    of_peak = 1.1 if profile.precisions[0].plain_sizes else 2 / 3
    budget = math.ceil(of_peak * peak / 2**20)
    out.print(
        facts(
            [
                ("memory check", checked),
                ("energy", _energy_text(profile)),
                *_noise_rows(profile),
                ("took", took),
                *_other_work_rows(profile),
                ("written to", str(path)),
                (
                    "next",
                    f"planner optimize {path} --global-batch-size {8 * largest} --memory-budget {budget}MiB",
                ),
            ]
        )
    )


def _energy_text(profile: Profile) -> str:
    if profile.energy is None:
        return "unknown: no NVML, no readable RAPL, no --watts"
    first = profile.energy.phases[0]
    if profile.energy.source == "stated":
        return f"{first.forward_watts:g} W in every phase, as stated"
    watts = "; ".join(
        f"{phase.precision}: forward {phase.forward_watts:.0f} W, backward {phase.backward_watts:.0f} W"
        for phase in profile.energy.phases
    )
    return (
        f"{watts}; optimizer {first.optimizer_watts:.0f} W, waiting {first.host_watts:.0f} W "
        f"({profile.energy.source}, ± {profile.energy.error or 0:.1%})"
    )


def _other_work_rows(profile: Profile) -> list[tuple[str, str]]:
    """A warning where what was timed is longer than it would be alone."""
    share = profile.cost.other_work_share
    if share is None or share < MUCH_OTHER_WORK:
        return []
    return [
        ("meanwhile", f"other work took {share:.0%} of the processors: times on the wall clock are too long")
    ]


def _noise_rows(profile: Profile) -> list[tuple[str, str]]:
    from planner.cli.output import of_noise_scale

    found = profile.noise_scale
    return [] if found is None else [("noise scale", of_noise_scale(found))]

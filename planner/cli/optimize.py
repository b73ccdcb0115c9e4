"""Find the cheapest plan that fits, and write it.

Every plan of the space is considered; the answer comes with the proof that no other is cheaper under the
model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from planner.plan import Plan

FRONT_ROWS = 8
"""How many plans of the front are shown."""

NEXT = ("explain", "report", "verify", "train")
"""What one can do with a plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a file made by planner profile")
    parser.add_argument(
        "--global-batch-size",
        metavar="N",
        type=arguments.count,
        required=True,
        help="samples per optimizer step",
    )
    parser.add_argument(
        "--memory-budget", metavar="SIZE", type=arguments.size, help="such as 8GiB or 8GB (default: no limit)"
    )
    parser.add_argument(
        "--world-size", metavar="N", type=arguments.count, default=1, help="devices (default: 1)"
    )
    for name, default in (("time", 1.0), ("memory", 0.0), ("energy", 0.0)):
        parser.add_argument(
            f"--{name}-weight",
            metavar="W",
            type=arguments.weight,
            default=default,
            help=f"weight of {name} in the cost, relative to the plain plan (default: {default:g})",
        )
    parser.add_argument(
        "--precision",
        metavar="LIST",
        type=arguments.precisions,
        help="of those profiled (default: all of them)",
    )
    parser.add_argument(
        "--zero-stage",
        metavar="LIST",
        type=arguments.zero_stages,
        default=(0,),
        help="of 0,1,2,3 (default: 0)",
    )
    parser.add_argument(
        "--trials", metavar="N", type=arguments.no_trials, default=0, help="0: the search is exact"
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="where the study goes: journal:FILE, sqlite:///FILE or none (default: a journal of the user's)",
    )
    parser.add_argument(
        "--study-name", metavar="NAME", help="default: made of model, device, batch and budget"
    )
    parser.add_argument(
        "-o",
        metavar="FILE",
        dest="output",
        type=arguments.output_file,
        help="default: PROFILE's name, .plan.json",
    )


def run(args: argparse.Namespace) -> int:
    from planner import calibration
    from planner.plan import Weights
    from planner.search import optimize
    from profiler import records
    from profiler.profile_record import Profile

    profile = records.read(args.profile, Profile)
    plan = optimize(
        profile,
        args.global_batch_size,
        args.memory_budget,
        Weights(time=args.time_weight, memory=args.memory_weight, energy=args.energy_weight),
        args.world_size,
        precisions=args.precision,
        zero_stages=args.zero_stage,
        calibration=calibration.load(profile.device),
    )
    path: Path = args.output or Path(f"{_stem(args.profile)}.plan.json")
    study = None
    if args.storage != "none":
        from planner.storage import default_storage_url
        from planner.study import record

        study = record(plan, args.storage or default_storage_url(), args.study_name)
    plan.save(path)
    if args.json:
        sys.stdout.write(records.encode(plan).decode())
    else:
        show(plan, path, study)
    return 0


def _stem(profile: str) -> str:
    return Path(profile).name.removesuffix(".json").removesuffix(".profile")


def show(plan: Plan, path: Path, study: str | None) -> None:
    """The plan, what it is up against, and where it went."""
    from planner.cli.output import (
        BASELINES,
        NEGLIGIBLE,
        change,
        console,
        facts,
        heading,
        of_bytes,
        of_joules,
        of_seconds,
        of_source,
        table,
    )
    from planner.explain import explain, proof_text, segment_runs

    out = console()
    predicted, why = plan.prediction, explain(plan)
    budget = plan.memory_budget_bytes
    within = "without a memory limit" if budget is None else f"within {of_bytes(budget)}"
    out.print(heading(f"{plan.model}: the plan for a global batch of {plan.global_batch_size} {within}"))
    out.print()
    runs = segment_runs(plan.checkpoint)
    widest = max((len(run.span) for run in runs), default=0)
    recomputed = [f"{run.span:{widest}}   {run.shape}" for run in runs] or ["nothing"]
    time = ", ".join(
        f"{name} {of_seconds(value)}"
        for name, value in why.step_parts.items()
        if value >= NEGLIGIBLE * predicted.step_seconds
    )
    memory = ", ".join(
        f"{name.replace('_', ' ')} {of_bytes(value)}"
        for name, value in why.peak_parts.items()
        if value >= NEGLIGIBLE * predicted.peak_memory_bytes
    )
    energy = []
    if predicted.step_joules is not None and why.energy_parts is not None:
        error = predicted.error.step_joules
        sure = " at the stated watts" if error is None else f" ± {error:.1%}"
        joules = ", ".join(
            f"{name} {of_joules(value)}"
            for name, value in why.energy_parts.items()
            if value >= NEGLIGIBLE * predicted.step_joules
        )
        energy = [("energy", f"{of_joules(predicted.step_joules)}{sure}"), ("", joules)]
    out.print(
        facts(
            [
                (
                    "micro-batch",
                    f"{plan.micro_batch_size}, accumulated {plan.gradient_accumulation_steps} times",
                ),
                *(
                    [("processes", f"{plan.world_size}, ZeRO stage {plan.zero_stage}")]
                    if plan.world_size > 1
                    else []
                ),
                ("precision", plan.precision),
                ("recomputed", recomputed[0]),
                *(("", line) for line in recomputed[1:]),
                *([("loss", f"in {plan.loss_chunks} chunks of the tokens")] if plan.loss_chunks else []),
                ("", ""),
                (
                    "step time",
                    f"{of_seconds(predicted.step_seconds)} ± {predicted.error.step_seconds:.1%}"
                    f"{of_source(plan.time_source)}",
                ),
                ("", time),
                (
                    "peak memory",
                    f"{of_bytes(predicted.peak_memory_bytes)} ± {predicted.error.peak_memory_bytes:.1%}",
                ),
                ("", f"{memory}, at {why.peak_at}"),
                *energy,
                ("cost", f"{plan.objective.cost:.4f}, {proof_text(plan.objective)}"),
            ]
        )
    )
    out.print()

    out.print(heading("Beside what one would do by hand"))
    rows = table("plan", "step time", "", "peak", "cost", "fits", right=("step time", "", "peak", "cost"))
    rows.add_row(
        "this plan", of_seconds(predicted.step_seconds), "", of_bytes(predicted.peak_memory_bytes),
        f"{plan.objective.cost:.3f}", "yes",
    )  # fmt: skip
    for other in why.baselines:
        over = other.budget_bytes - (budget or 0)
        rows.add_row(
            BASELINES[other.name], of_seconds(other.step_seconds), change(other.relative_step_seconds),
            of_bytes(other.peak_memory_bytes), f"{other.cost:.3f}",
            "yes" if other.fits else f"no, {of_bytes(over)} too much",
        )  # fmt: skip
    out.print(rows)
    out.print()

    shown = spread(len(plan.front), FRONT_ROWS)
    out.print(heading(f"What memory buys: {len(shown)} of the {len(plan.front)} plans in the file"))
    numbers = ("peak", "step time", "micro-batch", "segments")
    trade = table("peak", "step time", "precision", "micro-batch", "segments", "fits", right=numbers)
    for index in shown:
        choice = plan.front[index]
        trade.add_row(
            of_bytes(choice.prediction.peak_memory_bytes), of_seconds(choice.prediction.step_seconds),
            choice.precision, str(choice.micro_batch_size), str(len(choice.checkpoint)),
            "yes" if choice.fits else "no",
        )  # fmt: skip
    out.print(trade)
    out.print()
    next_commands = [("next" if n == 0 else "", f"planner {c} {path}") for n, c in enumerate(NEXT)]
    out.print(facts([("written to", str(path)), ("study", study or "not recorded"), *next_commands]))


def spread(length: int, most: int) -> list[int]:
    """At most this many indices of a list, evenly spread, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(n * (length - 1) / (most - 1)) for n in range(most)]

"""Find the cheapest plan that fits, and write it.

Every plan of the space is considered; the answer comes with the proof that no other is cheaper under the
model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli import arguments, run_cost, target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.plan import Plan
    from planner.search import Space
    from planner.trials import Tried

FRONT_ROWS = 8
"""How many plans of the front are shown."""

NEXT = ("explain", "report", "verify", "train")
"""What one can do with a plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a file made by planner profile")
    target.add_arguments(parser)
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
            type=arguments.amount,
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
    run_cost.add_arguments(parser)
    parser.add_argument(
        "--trials",
        metavar="N",
        type=arguments.count_or_none,
        default=0,
        help="run so many plans for real, each in a process of its own (default: 0, the exact search alone)",
    )
    parser.add_argument(
        "--trial-steps", metavar="N", type=arguments.count, default=3, help="timed per trial (default: 3)"
    )
    parser.add_argument(
        "--trial-timeout",
        metavar="SECONDS",
        type=arguments.seconds,
        help="when a trial is ended (default: ten times what it should take, and 90 s)",
    )
    parser.add_argument("--sampler", choices=("tpe", "gp"), default="tpe", help="Optuna's (default: tpe)")
    parser.add_argument(
        "--seed", metavar="N", type=arguments.count_or_none, default=0, help="of the sampler (default: 0)"
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
    import msgspec

    from planner import calibration
    from planner.plan import Weights
    from planner.what_if import what_ifs
    from profiler import records
    from profiler.profile_record import Profile

    profile = records.read(args.profile, Profile)
    asked: dict[str, Any] = {
        "memory_budget_bytes": args.memory_budget,
        "weights": Weights(time=args.time_weight, memory=args.memory_weight, energy=args.energy_weight),
        "world_size": args.world_size,
        "precisions": args.precision,
        "zero_stages": args.zero_stage,
        "calibration": calibration.load(profile.device),
    }
    plan, plans = target.search(args, profile, asked)
    tried: list[Tried] = []
    if args.trials:
        plan, tried = _run_trials(args, plans, plan)
    plan = run_cost.priced(msgspec.structs.replace(plan, what_ifs=what_ifs(plans, plan)), args)
    path: Path = args.output or Path(f"{_stem(args.profile)}.plan.json")
    study = None if plan.trials is None else plan.trials.study
    if args.storage != "none":
        from planner.storage import default_storage_url
        from planner.study import record, replace_plan

        url = args.storage or default_storage_url()
        if study is None:
            study = record(plan, url, args.study_name)
        else:
            replace_plan(plan, url, study)
    plan.save(path)
    if args.json:
        sys.stdout.write(records.encode(plan).decode())
    else:
        show(plan, path, study, tried)
    return 0


def _run_trials(args: argparse.Namespace, plans: Space, best: Plan) -> tuple[Plan, list[Tried]]:
    """The best plan of that plan's global batch by real trials; what they teach about the device is kept."""
    import msgspec

    from executor.verification import device_of
    from planner import calibration
    from planner.cli.output import progress
    from planner.storage import default_storage_url
    from planner.trial_process import TrialTerms
    from planner.trials import run_trials

    if args.storage == "none":
        raise ValueError("--trials keeps its trials in a study, and --storage none has none. Give --storage.")
    device_of(best)
    terms = TrialTerms(
        trials=args.trials,
        steps=args.trial_steps,
        timeout_seconds=args.trial_timeout,
        seed=args.seed,
        sampler=args.sampler,
    )
    storage = args.storage or default_storage_url()
    with progress() as tell:
        plan, tried = run_trials(plans, terms, storage, args.study_name, progress=tell)
    for each in tried:
        if each.residual is not None:
            calibration.learn(plan.device, each.residual)
    return msgspec.structs.replace(plan, convergence=best.convergence), tried


def _stem(profile: str) -> str:
    return Path(profile).name.removesuffix(".json").removesuffix(".profile")


def show(plan: Plan, path: Path, study: str | None, tried: Sequence[Tried] = ()) -> None:
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
                *run_cost.rows(plan),
            ]
        )
    )
    out.print()

    if plan.convergence is not None:
        target.show(plan.convergence)
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
    run_cost.show_baselines(plan)

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
    if tried:
        show_trials(plan, tried)
    next_commands = [("next" if n == 0 else "", f"planner {c} {path}") for n, c in enumerate(NEXT)]
    out.print(facts([("written to", str(path)), ("study", study or "not recorded"), *next_commands]))


def show_trials(plan: Plan, tried: Sequence[Tried]) -> None:
    """Every plan that was run: predicted against measured."""
    from planner.cli.output import console, heading, of_bytes, of_seconds, table
    from planner.trials import description

    out = console()
    out.print(heading(f"Real trials: {_outcomes(plan)}"))
    numbers = ("predicted", "measured", "off", "peak", "cost")
    rows = table("", "plan", *numbers, "", right=("", *numbers))
    for each in tried:
        predicted = of_seconds(each.choice.prediction.step_seconds)
        what = description(each.placement, each.choice)
        if each.result is None or each.result.measured is None or each.cost is None:
            rows.add_row(str(each.number), what, predicted, "", "", "", "", each.outcome.replace("_", " "))
            continue
        measured, error = each.result.measured, each.result.steady_error
        over = plan.memory_budget_bytes is not None and measured.peak_memory_bytes > plan.memory_budget_bytes
        rows.add_row(
            str(each.number), what, predicted, of_seconds(measured.step_seconds),
            "" if error is None else f"{error:+.1%}", of_bytes(measured.peak_memory_bytes), f"{each.cost:.3f}",
            "over the budget" if over else "",
        )  # fmt: skip
    out.print(rows)
    for each in tried:
        if each.message is not None:
            out.print(f"trial {each.number}: {each.message.splitlines()[-1]}")
    if plan.trials is not None:
        saved = plan.trials.saved_by_trials
        if saved is None:
            out.print("The model's best plan was not measured within the budget; see the trials.")
        elif saved > 0:
            out.print(f"The plan was measured to cost {saved:.1%} less than the model's best.")
        else:
            out.print("The model's best plan stands: none was measured to cost less by more than 2%.")
    out.print()


def _outcomes(plan: Plan) -> str:
    if plan.trials is None:
        return "none"
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in plan.trials.outcomes.items())


def spread(length: int, most: int) -> list[int]:
    """At most this many indices of a list, evenly spread, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(n * (length - 1) / (most - 1)) for n in range(most)]

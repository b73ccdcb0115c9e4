"""Say what binds a plan, why others lose, and what would change it.

Everything is read from the plan file: no model, no device. What other questions would have found is in the files of
``planner optimize``; for a plan that was made in Python it is searched for in its profile.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from planner.cli import target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.explain import Alternative, Answer, Explanation
    from planner.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="the profile it was made from, to ask again what would change it (default: as in the plan)",
    )


def run(args: argparse.Namespace) -> int:
    from planner.explain import explain
    from planner.plan import load_plan
    from profiler import records

    plan = load_plan(args.plan)
    why = explain(plan if args.profile is None else _asked_again(plan, args.profile))
    if args.json:
        sys.stdout.write(records.encode(why).decode())
    else:
        show(why)
    return 0


def _asked_again(plan: Plan, path: str) -> Plan:
    """The plan with what other questions find in this profile by what is known of its device today."""
    import msgspec

    from planner import calibration
    from planner.what_if import what_ifs_of
    from profiler import records
    from profiler.profile_record import Profile

    profile = records.read(path, Profile)
    found = what_ifs_of(plan, profile, calibration.load(plan.device))
    return msgspec.structs.replace(plan, what_ifs=found)


def show_answers(answers: Sequence[Answer]) -> None:
    """What changing one thing of the question would buy, a line for each."""
    from planner.cli.output import change, console, facts, heading, of_bytes, of_seconds, table
    from planner.explain import outcome_text

    out = console()
    numbers = ("step time", "", "peak", "cost", "per GiB")
    rows = table("with", *numbers, "the plan would be", right=numbers)
    for each in answers:
        other, rate = each.plan, each.seconds_per_gib
        if other is None:
            continue
        told = ("",) * len(numbers)
        if each.feasible:
            told = (
                of_seconds(other.step_seconds), change(other.relative_step_seconds),
                of_bytes(other.peak_memory_bytes), f"{other.cost:.3f}", "" if rate is None else of_seconds(rate),
            )  # fmt: skip
        rows.add_row(each.change, *told, outcome_text(each))
    out.print(rows)
    unknown = [(each.change, outcome_text(each)) for each in answers if each.plan is None]
    if unknown:
        out.print()
        out.print(heading("What nobody can tell from the profile"))
        out.print(facts(unknown))


def show(why: Explanation) -> None:
    """The explanation, in sentences."""
    from planner.cli.output import (
        BASELINES,
        NEGLIGIBLE,
        console,
        facts,
        heading,
        of_bytes,
        of_joules,
        of_noise_scale,
        of_seconds,
        of_source,
        table,
    )

    out = console()
    out.print(heading(f"{why.model}: {_verdict(why)}"))
    out.print()
    out.print(heading(f"The peak is at {why.peak_at}"))
    total = sum(why.peak_parts.values())
    rows = table("memory", "size", "share", right=("size", "share"))
    for name, value in why.peak_parts.items():
        if value >= NEGLIGIBLE * total:
            rows.add_row(name.replace("_", " "), of_bytes(value), f"{value / total:.0%}")
    out.print(rows)
    out.print()
    out.print(heading(f"Where the time goes{of_source(why.time_source)}"))
    seconds = sum(why.step_parts.values())
    times = table("work", "per step", "share", right=("per step", "share"))
    for work, spent in why.step_parts.items():
        if spent >= NEGLIGIBLE * seconds:
            times.add_row(work, of_seconds(spent), f"{spent / seconds:.0%}")
    out.print(times)
    out.print()
    if why.energy_parts is not None:
        out.print(heading("Where the energy goes"))
        joules = sum(why.energy_parts.values())
        drawn = table("work", "per step", "share", right=("per step", "share"))
        for work, used in why.energy_parts.items():
            if used >= NEGLIGIBLE * joules:
                drawn.add_row(work, of_joules(used), f"{used / joules:.0%}")
        out.print(drawn)
        out.print()
    out.print(heading("Why not by hand"))
    out.print(facts([(BASELINES[other.name], _verdict_on(other, why)) for other in why.baselines]))
    out.print()
    out.print(heading("Other budgets"))
    lines = [("tightest", _at_budget(why.tightest, why))]
    if why.next_faster is not None:
        lines.append(("next faster", _at_budget(why.next_faster, why)))
    lines.append(("no limit", _at_budget(why.without_limit, why)))
    out.print(facts(lines))
    out.print()
    out.print(heading("What would change it"))
    if why.what_ifs is None:
        out.print("Not in the plan file: give the profile it was made from with --profile.")
    else:
        show_answers(why.what_ifs)
    if why.convergence is not None:
        out.print()
        target.show(why.convergence)
    if why.noise_scale is not None:
        out.print()
        out.print(heading("Other global batches"))
        said = [("noise scale", of_noise_scale(why.noise_scale))]
        if why.saved_by_doubling is not None:
            batch, saved = why.global_batch_size, why.saved_by_doubling
            said.append(
                ("", f"doubling the global batch from {batch} to {2 * batch} saves {saved:.1%} of the steps")
            )
        out.print(facts(said))


def _verdict(why: Explanation) -> str:
    from planner.cli.output import of_bytes

    if why.memory_budget_bytes is None or why.headroom_bytes is None:
        return "there was no memory limit, and this is the cheapest plan of all"
    budget, left = of_bytes(why.memory_budget_bytes), of_bytes(why.headroom_bytes)
    if why.binding:
        return f"the budget of {budget} binds; {left} of it is left"
    return f"the budget of {budget} does not bind; {left} of it is left"


def _verdict_on(other: Alternative, why: Explanation) -> str:
    from planner.cli.output import of_bytes

    if other.same:
        return "is this very plan"
    speed = _speed(other)
    if not other.fits:
        over = other.budget_bytes - (why.memory_budget_bytes or 0)
        return f"does not fit: needs {of_bytes(other.budget_bytes)}, {of_bytes(over)} too much ({speed})"
    if other.relative_cost <= 0:
        return f"costs the same ({speed})"
    return f"fits, but costs {other.relative_cost:.1%} more ({speed})"


def _speed(other: Alternative) -> str:
    relative = other.relative_step_seconds
    if abs(relative) < 0.0005:
        return "as fast"
    return f"{abs(relative):.1%} {'slower' if relative > 0 else 'faster'}"


def _at_budget(other: Alternative, why: Explanation) -> str:
    from planner.cli.output import of_bytes, of_seconds

    if other.same:
        return f"this very plan, from {of_bytes(other.budget_bytes)} on ({other.budget_bytes} bytes)"
    beyond = other.budget_bytes - (why.memory_budget_bytes or other.budget_bytes)
    more = f", {of_bytes(beyond)} more than now" if beyond > 0 else ""
    chunks = f", the loss in {other.loss_chunks} chunks" if other.loss_chunks else ""
    counted = "1 segment" if other.segments == 1 else f"{other.segments or 'no'} segments"
    return (
        f"{of_seconds(other.step_seconds)} a step, {_speed(other)}; {other.precision}, "
        f"micro-batch {other.micro_batch_size}, {counted}{chunks}\n"
        f"from {of_bytes(other.budget_bytes)} on ({other.budget_bytes} bytes{more})"
    )

"""Say what binds a plan, why others lose, and what another budget would give.

Everything is read from the plan file: no model, no device.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from planner.cli import target

if TYPE_CHECKING:
    from planner.explain import Alternative, Explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")


def run(args: argparse.Namespace) -> int:
    from planner.explain import explain
    from planner.plan import load_plan
    from profiler import records

    why = explain(load_plan(args.plan))
    if args.json:
        sys.stdout.write(records.encode(why).decode())
    else:
        show(why)
    return 0


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

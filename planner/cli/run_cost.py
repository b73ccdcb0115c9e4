"""What the whole run takes: the flags of ``planner optimize`` for it, and how it is shown."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from planner.cli import arguments

if TYPE_CHECKING:
    from planner.plan import Plan, RunCost

NO_ENERGY = "unknown: the profile has no source of energy. planner profile --watts states one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", metavar="N", type=arguments.count, help="samples that the whole run trains on"
    )
    parser.add_argument(
        "--epochs", metavar="N", type=arguments.count, help="passes over the data, with --dataset-size"
    )
    parser.add_argument("--dataset-size", metavar="N", type=arguments.count, help="samples in the data")
    parser.add_argument(
        "--price-per-hour",
        metavar="PRICE",
        type=arguments.amount,
        help="of one device, in any currency: what the run costs",
    )
    parser.add_argument(
        "--carbon-intensity",
        metavar="G_PER_KWH",
        type=arguments.amount,
        help="grams of CO2 per kWh: what the run emits",
    )


def priced(plan: Plan, args: argparse.Namespace) -> Plan:
    """The plan with its run, where a flag asks for it."""
    from planner.run_cost import with_run_cost

    asked = (args.samples, args.epochs, args.dataset_size, args.price_per_hour, args.carbon_intensity)
    if all(value is None for value in asked):
        return plan
    return with_run_cost(
        plan,
        samples=args.samples,
        epochs=args.epochs,
        dataset_size=args.dataset_size,
        price_per_hour=args.price_per_hour,
        carbon_grams_per_kilowatt_hour=args.carbon_intensity,
    )


def rows(plan: Plan) -> list[tuple[str, str]]:
    """The run in two lines; none where nobody asked."""
    from planner.cli.output import of_count, of_duration

    run = plan.run
    if run is None:
        return []
    name = "1,000 steps" if run.length == "1000 steps" else "whole run"
    until = " to the target by the formula" if run.length == "target" else ""
    length = (
        f"{of_count(run.samples)} samples, {run.steps:,} steps{until}, "
        f"{of_duration(run.seconds)} ± {plan.prediction.error.step_seconds:.1%}"
    )
    costs = [f"{_price(run)} at {run.price_per_hour:.2f} per hour{_devices(plan)}"] if _price(run) else []
    costs += [_energy(run)] if _energy(run) else []
    costs += [f"{_carbon(run)} CO2"] if _carbon(run) else []
    lines = [(name, length)]
    if costs:
        lines.append(("", ", ".join(costs)))
    if run.joules is None:
        unknown = "kWh" if run.carbon_grams_per_kilowatt_hour is None else "kWh and CO2"
        lines.append(("", f"{unknown} {NO_ENERGY}"))
    return lines


def show_baselines(plan: Plan) -> None:
    """The whole run beside that of the baselines: what the plan saves."""
    from planner.cli.output import BASELINES, console, heading, of_duration, table
    from planner.run_cost import run_of

    run = plan.run
    if run is None:
        return
    out = console()
    length = f"{run.steps:,} steps" if run.length == "1000 steps" else "The whole run"
    out.print(heading(f"{length} beside what one would do by hand"))
    known = [
        (title, cell)
        for title, cell in (("price", _price), ("energy", _energy), ("CO2", _carbon))
        if cell(run)
    ]
    titles = [title for title, _ in known]
    shown = table("plan", "time", *titles, "this plan saves", right=("time", *titles, "this plan saves"))
    shown.add_row("this plan", of_duration(run.seconds), *(cell(run) for _, cell in known), "")
    for name, words in BASELINES.items():
        choice = getattr(plan.baselines, name)
        other = run_of(plan, choice)
        saved = of_duration(other.seconds - run.seconds)
        if other.price is not None and run.price is not None:
            saved += f", {_money(other.price - run.price)}"
        shown.add_row(
            words, of_duration(other.seconds), *(cell(other) for _, cell in known),
            saved if choice.fits else "does not fit",
        )  # fmt: skip
    out.print(shown)
    out.print()


def _price(run: RunCost) -> str:
    return "" if run.price is None else _money(run.price)


def _money(price: float) -> str:
    return f"{price:,.2f}" if abs(price) >= 1 or price == 0 else f"{price:.2g}"


def _energy(run: RunCost) -> str:
    from planner.cli.output import of_kilowatt_hours

    return "" if run.joules is None else of_kilowatt_hours(run.joules)


def _carbon(run: RunCost) -> str:
    from planner.cli.output import of_grams

    return "" if run.carbon_grams is None else of_grams(run.carbon_grams)


def _devices(plan: Plan) -> str:
    return "" if plan.world_size == 1 else f" on each of {plan.world_size} devices"

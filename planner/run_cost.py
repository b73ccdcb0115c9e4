"""What a whole run takes: a step's time and energy, times the steps, at a price and a carbon intensity.

    steps     N samples over the global batch, or epochs as planner train counts them, or as the target needs
    seconds   steps * step_seconds
    price     hours * price_per_hour * world_size           in the unit that the price was given in
    joules    steps * step_joules                           of all devices together
    carbon    joules / 3.6e6 J/kWh * grams per kWh

Nothing here changes a plan; it only says what following it comes to. The relative error is that of a step.
"""

from __future__ import annotations

import math

import msgspec

from planner.plan import Choice, Cost, Length, Plan, RunCost

SECONDS_PER_HOUR = 3600
JOULES_PER_KILOWATT_HOUR = 3.6e6

UNSTATED_STEPS = 1000
"""How many steps are priced where nothing says how long the run is."""


def with_run_cost(
    plan: Plan,
    *,
    samples: int | None = None,
    epochs: int | None = None,
    dataset_size: int | None = None,
    price_per_hour: float | None = None,
    carbon_grams_per_kilowatt_hour: float | None = None,
) -> Plan:
    """The plan with its ``run``: what ``samples``, or ``epochs`` over ``dataset_size`` samples, will take.

    With neither, a plan whose global batch was chosen for a target is priced until the target, and any other for
    1,000 steps. ``price_per_hour`` is of one device. Raises ValueError for arguments that contradict each other.
    """
    for flag, value in (("--samples", samples), ("--epochs", epochs), ("--dataset-size", dataset_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}.")
    for flag, rate in (
        ("--price-per-hour", price_per_hour),
        ("--carbon-intensity", carbon_grams_per_kilowatt_hour),
    ):
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"{flag} must be a finite number of at least 0, got {rate}.")
    length, steps = _length(plan, samples, epochs, dataset_size)
    run = _run(plan, plan.prediction, length, steps, price_per_hour, carbon_grams_per_kilowatt_hour)
    return msgspec.structs.replace(plan, run=run)


def run_of(plan: Plan, choice: Choice) -> RunCost:
    """The plan's run with another choice for the same global batch, such as a baseline, in place of its own.

    Raises ValueError for a plan without a run.
    """
    run = plan.run
    if run is None:
        raise ValueError(
            "The plan must say how long the run is, and it has no run. Use planner.with_run_cost."
        )
    return _run(
        plan, choice.prediction, run.length, run.steps, run.price_per_hour, run.carbon_grams_per_kilowatt_hour
    )


def _run(
    plan: Plan,
    step: Cost,
    length: Length,
    steps: int,
    price_per_hour: float | None,
    carbon_grams_per_kilowatt_hour: float | None,
) -> RunCost:
    seconds = steps * step.step_seconds
    joules = None if step.step_joules is None else steps * step.step_joules
    price = carbon_grams = None
    if price_per_hour is not None:
        price = seconds / SECONDS_PER_HOUR * price_per_hour * plan.world_size
    if joules is not None and carbon_grams_per_kilowatt_hour is not None:
        carbon_grams = joules / JOULES_PER_KILOWATT_HOUR * carbon_grams_per_kilowatt_hour
    return RunCost(
        length=length,
        samples=steps * plan.global_batch_size,
        steps=steps,
        seconds=seconds,
        price_per_hour=price_per_hour,
        price=price,
        joules=joules,
        carbon_grams_per_kilowatt_hour=carbon_grams_per_kilowatt_hour,
        carbon_grams=carbon_grams,
    )


def _length(
    plan: Plan, samples: int | None, epochs: int | None, dataset_size: int | None
) -> tuple[Length, int]:
    """Where the number of steps comes from, and the number."""
    batch = plan.global_batch_size
    if samples is not None and (epochs is not None or dataset_size is not None):
        raise ValueError(
            "--samples says how long the run is, and so do --epochs and --dataset-size: give one or the other."
        )
    if (epochs is None) != (dataset_size is None):
        given, missing = (
            ("--epochs", "--dataset-size") if dataset_size is None else ("--dataset-size", "--epochs")
        )
        raise ValueError(f"{given} needs {missing} as well: both together say how long the run is.")
    if plan.convergence is not None:
        if samples is not None or epochs is not None:
            raise ValueError(
                "With --global-batch-range the plan says how many steps the run takes: leave out --samples, --epochs "
                "and --dataset-size, or give --global-batch-size."
            )
        return "target", math.ceil(plan.convergence.chosen.steps)
    if samples is not None:
        return "samples", math.ceil(samples / batch)
    if epochs is not None and dataset_size is not None:
        if dataset_size < batch:
            raise ValueError(
                f"One epoch must hold a global batch of {batch}, the data has {dataset_size} samples. "
                "Give a smaller --global-batch-size, or --samples."
            )
        return "epochs", epochs * (dataset_size // batch)
    return "1000 steps", UNSTATED_STEPS

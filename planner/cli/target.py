"""Which global batch: the one that was given, or the one that reaches a target first.

The flags of ``planner optimize`` for it, and how the answer is shown.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.cli import arguments

if TYPE_CHECKING:
    from planner.plan import Convergence, Plan
    from planner.search import Space
    from profiler.profile_record import Profile

ONLY_WITH_RANGE = ("reference_batch", "reference_steps", "noise_scale_samples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--global-batch-size", metavar="N", type=arguments.count, help="samples per optimizer step"
    )
    which.add_argument(
        "--global-batch-range",
        metavar="LOW:HIGH",
        type=arguments.span,
        help="choose the global batch too, for the least time to a target",
    )
    parser.add_argument(
        "--reference-batch",
        metavar="B",
        type=arguments.count,
        help="global batch of a run that is known to reach the target",
    )
    parser.add_argument(
        "--reference-steps", metavar="S", type=arguments.count, help="the optimizer steps that it took"
    )
    parser.add_argument(
        "--noise-scale-samples",
        metavar="PHI",
        type=arguments.amount,
        help="gradient noise scale (default: as profiled with --noise-scale)",
    )


def search(args: argparse.Namespace, profile: Profile, asked: dict[str, Any]) -> tuple[Plan, Space]:
    """The plan, for the global batch that was given or for the one that reaches a target first, and its space.

    Raises ValueError for flags that contradict each other or lack others. Where nothing fits a global batch that was
    given, what raises says what would.
    """
    from planner.plan import NoFeasiblePlan, Reference
    from planner.search import space
    from planner.target import optimize_to_target
    from planner.what_if import ways_out, ways_out_text

    given = [name for name in ONLY_WITH_RANGE if getattr(args, name) is not None]
    if args.global_batch_range is None:
        if given:
            raise ValueError(
                f"{_flag(given[0])} serves to choose the global batch, and --global-batch-size "
                f"{args.global_batch_size} gives it. Leave it out, or give --global-batch-range LOW:HIGH instead."
            )
        searched = space(profile, args.global_batch_size, **asked)
        try:
            return searched.plan(), searched
        except NoFeasiblePlan as none:
            raise NoFeasiblePlan(f"{none} {ways_out_text(ways_out(searched))}", none.tightest) from none
    missing = [name for name in ONLY_WITH_RANGE[:2] if name not in given]
    if missing:
        raise ValueError(
            "--global-batch-range needs a run that is known to reach the target, and "
            f"{' and '.join(map(_flag, missing))} of it {'is' if len(missing) == 1 else 'are'} missing. "
            "Add what is missing, or give --global-batch-size."
        )
    low, high = args.global_batch_range
    plan = optimize_to_target(
        profile,
        range(low, high + 1),
        Reference(global_batch_size=args.reference_batch, steps=args.reference_steps),
        noise_scale_samples=args.noise_scale_samples,
        **asked,
    )
    return plan, space(profile, plan.global_batch_size, **asked | {"weights": plan.objective.weights})


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def show(found: Convergence) -> None:
    """How the global batch was chosen, and what others would take."""
    from planner.cli.output import change, console, facts, heading, of_duration, of_seconds, table

    out = console()
    chosen, known = found.chosen, found.reference
    out.print(heading("Which global batch: the one that reaches the target first"))
    out.print(
        facts(
            [
                ("considered", _considered(found)),
                ("noise scale", _noise(found)),
                (
                    "reference",
                    f"a run of {known.steps:,} steps at a global batch of {known.global_batch_size}",
                ),
                (
                    "this plan",
                    f"global batch {chosen.global_batch_size}: {chosen.steps:,.0f} steps of "
                    f"{of_seconds(chosen.step_seconds)}, {of_duration(chosen.seconds)} to the target",
                ),
            ]
        )
    )
    out.print()
    numbers = ("global batch", "steps", "step time", "to the target", "")
    rows = table(*numbers, right=numbers)
    for batch in found.neighbours:
        own = batch.global_batch_size == chosen.global_batch_size
        rows.add_row(
            str(batch.global_batch_size), f"{batch.steps:,.0f}", of_seconds(batch.step_seconds),
            of_duration(batch.seconds), "this plan" if own else change(batch.seconds / chosen.seconds - 1),
        )  # fmt: skip
    out.print(rows)


def _considered(found: Convergence) -> str:
    low, high = found.global_batch_range
    every = found.batches_considered == found.batches_in_range
    count = (
        f"all {found.batches_in_range:,}"
        if every
        else f"{found.batches_considered:,} (evenly spread by ratio) of the {found.batches_in_range:,}"
    )
    said = f"{count} that can be run from {low:,} to {high:,}"
    left_out = found.batches_considered - found.batches_fitting
    if left_out:
        said += f"; {left_out:,} have no plan that fits"
    sizes = [batch.global_batch_size for batch in found.neighbours]
    if len(sizes) > 1 and found.chosen.global_batch_size in (sizes[0], sizes[-1]):
        end = "smallest" if found.chosen.global_batch_size == sizes[0] else "largest"
        said += f". The {end} that fits is chosen: a better one may lie outside of the range"
    return said


def _noise(found: Convergence) -> str:
    said = f"phi = {found.noise_scale_samples:.4g} samples"
    if found.noise_scale_source == "stated":
        return f"{said}, as stated"
    if found.best_at_low is None or found.best_at_high is None:
        return f"{said}, measured in the profile, whose steps do not bound it"
    return (
        f"{said}, measured in the profile; at the ends of its interval a global batch of "
        f"{found.best_at_low} or {found.best_at_high} would be best"
    )

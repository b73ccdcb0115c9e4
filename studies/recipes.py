"""The plan of GPT-2 small beside what one would train it with by hand, all on one global batch and really run.

    plain                 fp32, the largest micro-batch that fits, nothing recomputed
    biggest batch         bf16, the same
    paper, k = 4 and 8    fp16, segments of sqrt(L) blocks
    plan                  planner optimize --trials N, from all precisions

Each is run in processes of its own, as trials are, in turns, round after round; what is told is the median. A recipe
that is predicted not to fit is run all the same, since a prediction is no measurement. One whose precision the profile
left out (hopeless on the device) or whose micro-batch was not profiled is named, and not run.

The command fails when the plan runs out of memory, or is more than 3% slower than the fastest recipe within the budget
and by more than either is from itself.

    python -m studies.recipes --device cuda       # sequences of 1,024, global batch 64
    python -m studies.recipes                     # a CPU: sequences of 64, global batch 8
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from planner.cost import instead
from planner.plan import Choice, Cost, Plan, load_plan
from planner.search import Space, space
from planner.sizes import parse_size
from planner.trial_process import TrialTerms, run_in_process
from profiler import records
from profiler.profile_record import Precision, Profile
from studies.runs import name_on, picture, provenance, run, write

CLOSE = 0.03
"""How far the plan may be behind the fastest recipe."""

PLAN = "plan"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained, and what is profiled for it."""

    model: str
    flags: tuple[str, ...]
    batch: str
    global_batch_size: int
    precisions: str = "fp32,bf16,fp16"
    memory_budget_bytes: int | None = None


ON_CUDA = Job(model="gpt2", flags=("--seq-len", "1024"), batch="2,8,16,32,64", global_batch_size=64)
ON_CPU = Job(
    model="gpt2", flags=("--seq-len", "64"), batch="1,4", global_batch_size=8, memory_budget_bytes=2 * 2**30
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What one would write down by hand. ``gradient_accumulation_steps`` None: as few as fit."""

    name: str
    precision: Precision
    placement: str
    gradient_accumulation_steps: int | None = None


RECIPES = (
    Recipe(name="plain fp32", precision="fp32", placement="plain"),
    Recipe(name="bf16, biggest batch", precision="bf16", placement="plain"),
    Recipe(name="paper, k = 4", precision="fp16", placement="sqrt", gradient_accumulation_steps=4),
    Recipe(name="paper, k = 8", precision="fp16", placement="sqrt", gradient_accumulation_steps=8),
)


def by_hand(recipe: Recipe, profile: Profile, everything: Space, budget_bytes: int) -> Choice | str:
    """The plan that a recipe comes to on this profile, or why there is none."""
    hopeless = {each.precision: each.slowdown for each in profile.hopeless}
    if recipe.precision in hopeless:
        return f"{recipe.precision} is {hopeless[recipe.precision]:.1f} times slower than fp32 here"
    at_hand = sorted(
        knobs
        for knobs in everything.knobs()
        if knobs.precision == recipe.precision and knobs.loss_chunks is None
    )
    choices = [everything.by_hand(knobs, recipe.placement) for knobs in at_hand]
    if recipe.gradient_accumulation_steps is None:
        choices = [each for each in choices if each.prediction.peak_memory_bytes <= budget_bytes]
    else:
        choices = [
            each for each in choices if each.gradient_accumulation_steps == recipe.gradient_accumulation_steps
        ]
    return choices[0] if choices else "no such micro-batch was profiled, or none fits"


def missed(rows: Sequence[Row], budget_bytes: int) -> list[str]:
    """The bars that were not met."""
    ran = {row["recipe"]: row for row in rows if row.get("measured")}
    if PLAN not in ran:
        return [f"the plan did not run: {next(row['why'] for row in rows if row['recipe'] == PLAN)}"]
    bars = []
    ours = ran.pop(PLAN)
    plan = ours["measured"]
    if plan["peak_memory_bytes"] > budget_bytes:
        over = (plan["peak_memory_bytes"] - budget_bytes) / 2**20
        bars.append(f"the plan's peak is {over:,.0f} MiB over the budget")
    within = [row for row in ran.values() if row["measured"]["peak_memory_bytes"] <= budget_bytes]
    if within:
        best = min(within, key=lambda row: row["measured"]["step_seconds"])
        behind = plan["step_seconds"] / best["measured"]["step_seconds"] - 1
        if behind > CLOSE + max(map(noise, (ours, best))):
            bars.append(f"the plan is {behind:.1%} slower than {best['recipe']}")
    return bars


def noise(row: Row) -> float:
    """How far the rounds of a recipe lie from their middle, at most."""
    seconds: list[float] = row["rounds"]
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


def line(row: Row, plain_seconds: float | None) -> str:
    """One row of the table."""
    if not row.get("measured"):
        return f"{row['recipe']:20} {row['why']}"
    found, predicted = row["measured"], row["predicted"]
    times = "" if plain_seconds is None else f" ({plain_seconds / found['step_seconds']:5.2f} x plain)"
    joules = "energy unknown" if found["step_joules"] is None else f"{found['step_joules']:8,.1f} J"
    chunks = "" if row["loss_chunks"] is None else f", loss in {row['loss_chunks']} chunks"
    return (
        f"{row['recipe']:20} {row['micro_batch_size']:3} x {row['gradient_accumulation_steps']:<3} {row['precision']} "
        f"{row['segments']:3} segments   {1e3 * found['step_seconds']:9,.1f} ms{times} "
        f"(predicted {predicted['step_seconds'] / found['step_seconds'] - 1:+.1%})   "
        f"{found['peak_memory_bytes'] / 2**20:9,.1f} MiB "
        f"(predicted {predicted['peak_memory_bytes'] / found['peak_memory_bytes'] - 1:+.2%})   {joules}{chunks}"
    )


def median_of(rounds: Sequence[Cost]) -> dict[str, float | None]:
    """Cost by cost, the median over rounds; the highest of peaks."""
    found: dict[str, float | None] = {}
    for name in Cost.__struct_fields__:
        values = [value for each in rounds if (value := getattr(each, name)) is not None]
        of_memory = name.startswith("peak")
        found[name] = None if not values else max(values) if of_memory else statistics.median(values)
    return found


def draw(rows: Sequence[Row], budget_bytes: int, title: str, path: Path) -> None:
    """Step time against peak memory, one dot a recipe, the budget as a line."""
    with picture(path, figsize=(7.2, 3.6)) as (_, [[axes]]):
        for row in rows:
            if not row.get("measured"):
                continue
            found = row["measured"]
            ours = row["recipe"] == PLAN
            peak, seconds = found["peak_memory_bytes"] / 2**30, 1e3 * found["step_seconds"]
            axes.plot(peak, seconds, "o", color="#1f6feb" if ours else "#d08c60", markersize=9 if ours else 7)
            axes.annotate(
                row["recipe"], (peak, seconds), textcoords="offset points", xytext=(8, 4), fontsize=8,
                fontweight="bold" if ours else "normal",
            )  # fmt: skip
        axes.axvline(budget_bytes / 2**30, color="#c0392b", linestyle="--", linewidth=0.8)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.set_xlim(left=0, right=1.15 * max(axes.get_xlim()[1], budget_bytes / 2**30))
        axes.set_xlabel("peak memory of a step, measured, GiB (dashed: the budget)", fontsize=8)
        axes.set_ylabel("step time, measured, ms", fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(labelsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--memory-budget",
        type=parse_size,
        help="such as 24GB (default: 90%% of the device's memory; on a CPU 2 GiB, less than it takes plain)",
    )
    parser.add_argument("--trials", type=int, default=6, help="real trials behind the plan (default: 6)")
    parser.add_argument("--steps", type=int, default=5, help="to time in each turn (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: 2)")
    options = parser.parse_args()
    job = ON_CUDA if options.device == "cuda" else ON_CPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PLANNER_HOME"] = str(folder / "state")
        profile_file = folder / "model.profile.json"
        print(f"profiling {job.model}", flush=True)
        run(
            "profile", job.model, *job.flags, "--batch", job.batch, "--precision", job.precisions,
            "--device", options.device, "-o", str(profile_file),
        )  # fmt: skip
        profile = records.read(profile_file, Profile)
        whole = round(0.9 * profile.device.memory_bytes)
        budget = options.memory_budget or job.memory_budget_bytes or whole
        print(f"optimising, {options.trials} trials", flush=True)
        plan_file = folder / "plan.plan.json"
        run(
            "optimize", str(profile_file), "--global-batch-size", str(job.global_batch_size),
            "--memory-budget", str(budget), "--trials", str(options.trials), "-o", str(plan_file),
        )  # fmt: skip
        plan = load_plan(plan_file)
    rows, plans = _prepared(profile, plan, job, budget)
    results: dict[str, list[Cost]] = {recipe: [] for recipe in plans}
    terms = TrialTerms(trials=1, steps=options.steps)
    for _ in range(options.rounds):
        for recipe, each in plans.items():
            ended = run_in_process(each, terms)
            print(f"  {recipe}: {ended.outcome}", flush=True)
            if ended.result is not None and ended.result.measured is not None:
                results[recipe].append(ended.result.measured)
            else:
                rows[recipe]["why"] = ended.outcome.replace("_", " ")
    for recipe, found in results.items():
        if "why" not in rows[recipe]:
            rows[recipe] |= {"measured": median_of(found), "rounds": [each.step_seconds for each in found]}
    table = list(rows.values())
    plain = rows["plain fp32"].get("measured")
    print("\n".join(line(row, plain and plain["step_seconds"]) for row in table))
    head = provenance(f"python -m studies.recipes --device {options.device}") | {
        "device": msgspec.to_builtins(profile.device),
        "job": {
            "model": job.model,
            "flags": list(job.flags),
            "global_batch_size": job.global_batch_size,
        },
        "memory_budget_bytes": budget,
    }
    path = write(name_on("recipes", profile.device), head | {"rows": table})
    title = f"{job.model} {' '.join(job.flags)}, global batch {job.global_batch_size}, {profile.device.name}"
    draw(table, budget, title, path.with_suffix(".png"))
    bars = missed(table, budget)
    print("\n".join(bars) or "all bars met")
    print(f"written to {path}")
    return 1 if bars else 0


def _prepared(
    profile: Profile, plan: Plan, job: Job, budget_bytes: int
) -> tuple[dict[str, Row], dict[str, Plan]]:
    """A row for each recipe and for the plan, and those that are to be run."""
    everything = space(profile, job.global_batch_size)
    rows: dict[str, Row] = {}
    plans: dict[str, Plan] = {}
    for recipe in RECIPES:
        choice = by_hand(recipe, profile, everything, budget_bytes)
        if isinstance(choice, str):
            rows[recipe.name] = {"recipe": recipe.name, "why": choice}
            continue
        rows[recipe.name] = _row(recipe.name, choice)
        plans[recipe.name] = instead(plan, choice)
    return rows | {PLAN: _row(PLAN, plan)}, plans | {PLAN: plan}


def _row(recipe: str, chosen: Choice | Plan) -> Row:
    return {
        "recipe": recipe,
        "micro_batch_size": chosen.micro_batch_size,
        "gradient_accumulation_steps": chosen.gradient_accumulation_steps,
        "precision": chosen.precision,
        "segments": len(chosen.checkpoint),
        "loss_chunks": chosen.loss_chunks,
        "predicted": {name: getattr(chosen.prediction, name) for name in Cost.__struct_fields__},
    }


if __name__ == "__main__":
    sys.exit(main())

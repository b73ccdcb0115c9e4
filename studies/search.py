"""Planner against what people use to find a micro-batch size, under one wall of memory and one global batch.

    Lightning's BatchSizeFinder          power and binsearch, each with and without gradient checkpointing
    Accelerate's find_executable_batch_size         the same
    transformers' auto_find_batch_size              the same
    brute force                          every micro-batch with every placement at hand, run and measured
    ours                                 planner.profile and planner.optimize

Each decides in a fresh process behind the same wall (studies/wall.py, studies/rivals.py). Then all that they chose is
timed side by side, behind the wall again, with all that brute force tries (studies/brute_force.py). A size that a tool
found and that does not divide the global batch is lowered to the next one that does; what it tried without accumulation
and then does not fit with it counts as one more out-of-memory event, and the next smaller size is taken.

Ours is profiled where there is memory, since a profile serves every budget; ``ours-behind-the-wall`` profiles behind
the wall too, and so can time only sizes whose plain step fits. Planning itself runs nothing and has no wall.

The command fails when the plan runs out of memory, is more than 3% slower than the best of brute force, or slower than
a tool by more than the noise. Results are kept case by case.

    python -m studies.search                 # all cases
    python -m studies.search --only gpt2     # cases whose name contains this
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torchvision
from torch import nn

from planner.plan import NoFeasiblePlan
from planner.search import optimize
from profiler.device import describe
from profiler.records import Record
from profiler.unmeasured import profile_unmeasured, target_of
from profiler.workload import Workload
from studies import execution
from studies.placement import Flat
from studies.runs import RESULTS, name_on, picked, picture, provenance, write
from studies.wall import ENVIRONMENT
from studies.workloads import classifier

Row = dict[str, Any]

OURS = ("ours", "ours-behind-the-wall")
RIVALS = ("lightning", "lightning-binsearch", "accelerate", "trainer")
TOOLS = (*RIVALS, *OURS)
CONTENDERS = (
    *((tool, False) for tool in OURS),
    *((tool, checkpointing) for tool in RIVALS for checkpointing in (False, True)),
)
"""Who decides, and whether every block is checkpointed; a plan decides that itself."""

BRUTE_FORCE = "brute force"

PLAIN = "plain"
EVERY_BLOCK = "every block"

SHARES = {"tight": 0.15, "roomy": 0.45}
"""Budgets: from the tightest plan (0) to the plain step of the whole global batch at once (1)."""

CLOSE = 0.03
"""How far the plan may be behind the best of brute force."""

TIME_LIMIT_SECONDS = 900.0
"""For a tool to decide in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and a global batch, and where the model's blocks are; a case has a budget by its share."""

    name: str
    build: Callable[[], Workload]
    blocks: Callable[[Any], nn.ModuleList | nn.Sequential]
    global_batch_size: int
    share: float

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        return divisors(self.global_batch_size)


def resnet18() -> Workload:
    """ResNet-18 with ten classes, at 64 x 64."""
    return classifier(Flat(torchvision.models.resnet18(num_classes=10)), 3, 64, 64)


MODELS = (
    ("gpt2", execution.gpt2, lambda model: model.transformer.h, 16),
    ("resnet18", resnet18, lambda model: model.blocks, 32),
    ("vit", execution.vit, lambda model: model.encoder.layers, 64),
)
CASES = {
    f"{name}-{budget}": Case(
        name=f"{name}-{budget}", build=build, blocks=blocks, global_batch_size=size, share=share
    )
    for name, build, blocks, size in MODELS
    for budget, share in SHARES.items()
}


class Decision(Record):
    """What a tool found: a micro-batch size, or None and how it ended."""

    found: int | None
    seconds: float
    out_of_memory_events: int
    ended: str | None = None


class Measured(Record):
    """One way to train, behind the wall. Times are in terms of the reference's around them.

    ``sieve``: None where it did not run, rough where it is far behind. ``ratio``, ``noise`` (the standard error of the
    ratio) and the peak: None where it did not come to the finals.
    """

    micro_batch_size: int
    placement: str
    sieve: float | None = None
    ratio: float | None = None
    noise: float | None = None
    peak_memory_bytes: int | None = None


class Finals(Record):
    """All ways of a case. ``plans``: which of them are the plans of ours; ``reference_seconds``: a step of the first.

    ``seconds``: what brute force takes to decide, which is all but the finals.
    """

    ways: tuple[Measured, ...]
    plans: dict[str, tuple[int, str]]
    reference_seconds: float
    seconds: float


def divisors(number: int) -> tuple[int, ...]:
    """Rising."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def settled(
    found: int | None, global_batch_size: int, placement: str, running: Collection[tuple[int, str]]
) -> tuple[int | None, int]:
    """The micro-batch size that training goes on with, and how often it ran out of memory on the way there."""
    events = 0
    for size in reversed(divisors(global_batch_size)):
        if found is None or size > found:
            continue
        if (size, placement) in running:
            return size, events
        events += 1
    return None, events


def rows_of(
    case: Case, budget_bytes: int, decisions: dict[tuple[str, bool], Decision], finals: Finals
) -> list[Row]:
    """One row a tool, ours first, brute force last. ``relative``: samples per second in terms of ours."""
    ways = {(way.micro_batch_size, way.placement): way for way in finals.ways}
    running = {key for key, way in ways.items() if way.sieve is not None}
    own = ways.get(finals.plans.get("ours", (0, "")))
    rows = []
    for (tool, checkpointing), decision in decisions.items():
        events = decision.out_of_memory_events
        if tool in OURS:
            key = finals.plans.get(tool)
            if key is not None and key not in running:
                key, events = None, events + 1
        else:
            placement = EVERY_BLOCK if checkpointing else PLAIN
            size, more = settled(decision.found, case.global_batch_size, placement, running)
            key, events = None if size is None else (size, placement), events + more
        rows.append(
            {
                "case": case.name, "tool": tool, "checkpointing": checkpointing, "found": decision.found,
                "decision_seconds": decision.seconds, "out_of_memory_events": events, "ended": decision.ended,
                **_of_way(case, budget_bytes, None if key is None else ways[key], own, finals),
            }
        )  # fmt: skip
    best = min(
        (way for way in finals.ways if way.ratio is not None), key=lambda way: way.ratio or 0, default=None
    )
    rows.append(
        {
            "case": case.name, "tool": BRUTE_FORCE, "checkpointing": False, "found": None,
            "decision_seconds": finals.seconds, "out_of_memory_events": len(ways) - len(running), "ended": None,
            **_of_way(case, budget_bytes, best, own, finals),
        }
    )  # fmt: skip
    return sorted(rows, key=lambda row: row["tool"] not in OURS)


def _of_way(case: Case, budget_bytes: int, way: Measured | None, own: Measured | None, finals: Finals) -> Row:
    if way is None or way.ratio is None:
        return {"budget_bytes": budget_bytes, "micro_batch_size": None, "relative": None}
    same = own is not None and way is own
    relative = None if own is None or own.ratio is None else own.ratio / way.ratio
    return {
        "budget_bytes": budget_bytes,
        "micro_batch_size": way.micro_batch_size,
        "gradient_accumulation_steps": case.global_batch_size // way.micro_batch_size,
        "placement": way.placement,
        "samples_per_second": case.global_batch_size / (way.ratio * finals.reference_seconds),
        "relative": 1.0 if same else relative,
        "noise": 0.0 if same or own is None else (way.noise or 0.0) + (own.noise or 0.0),
        "peak_memory_bytes": way.peak_memory_bytes,
    }


def missed(rows: Sequence[Row]) -> list[str]:
    """Which bars are not met, in words."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        own = next(row for row in of_case if row["tool"] == "ours")
        if own["micro_batch_size"] is None:
            found.append(f"{case}: ours has no plan that runs: {own['ended'] or 'out of memory'}")
            continue
        if own["out_of_memory_events"]:
            found.append(f"{case}: ours had {own['out_of_memory_events']} out-of-memory events")
        if own["peak_memory_bytes"] > own["budget_bytes"]:
            found.append(f"{case}: ours needs {own['peak_memory_bytes']} of {own['budget_bytes']} bytes")
        for row in of_case:
            if row["tool"] in OURS or row["relative"] is None:
                continue
            if row["tool"] == BRUTE_FORCE:
                if row["relative"] > 1 / (1 - CLOSE):
                    found.append(f"{case}: ours reaches {1 / row['relative']:.1%} of the best of brute force")
            elif row["relative"] > 1 + 2 * row["noise"]:
                found.append(f"{case}: {label(row)} reaches {row['relative']:.3f} of ours")
    return found


def label(row: Row) -> str:
    """A tool's name as tables and pictures have it."""
    tool: str = row["tool"]
    return tool + (" + checkpointing" if row["checkpointing"] else "")


def line(row: Row) -> str:
    """A row of the table."""
    took = f"{row['decision_seconds']:6.1f} s to decide, {row['out_of_memory_events']:2} out of memory"
    head = f"{row['case']:15} {label(row):36} "
    if row["micro_batch_size"] is None:
        return f"{head}no plan: {row['ended'] or 'nothing fits'}   {took}"
    used = f"{row['peak_memory_bytes'] / 2**20:6.1f} of {row['budget_bytes'] / 2**20:6.1f} MiB"
    return (
        f"{head}{row['micro_batch_size']:3} x {row['gradient_accumulation_steps']:<3} {row['placement']:22} "
        f"{row['samples_per_second']:7.2f} samples/s  {row['relative']:.3f} of ours (± {row['noise']:.3f})  "
        f"{used}   {took}"
    )


def budget_of(case: Case) -> int:
    """Bytes, from a profile that runs nothing."""
    torch.manual_seed(0)
    workload = case.build()
    profile = profile_unmeasured(
        workload, case.micro_batch_sizes, ("fp32",), target_of("cpu", ("fp32",)), optimizer="adamw", watts=None,
        spec=None, progress=lambda message: None,
    )  # fmt: skip
    plain = optimize(profile, case.global_batch_size).baselines.plain.prediction.peak_memory_bytes
    try:
        optimize(profile, case.global_batch_size, 1)
    except NoFeasiblePlan as refused:
        tightest = refused.tightest.peak_memory_bytes * (1 + refused.tightest.error.peak_memory_bytes)
        return round(tightest + case.share * (plain - tightest))
    raise AssertionError("a byte was enough")


def decided(case: Case, tool: str, checkpointing: bool, budget_bytes: int, folder: Path) -> Decision:
    """The decision of a tool in a process of its own, which leaves its files in the folder."""
    folder.mkdir()
    began = time.perf_counter()
    flags = ("--checkpointing",) if checkpointing else ()
    ended = _child(
        "studies.rivals", case.name, tool, str(budget_bytes), str(folder), *flags,
        time_limit_seconds=TIME_LIMIT_SECONDS,
    )  # fmt: skip
    written = folder / "decision.json"
    if written.exists():
        return msgspec.json.decode(written.read_bytes(), type=Decision)
    return Decision(
        found=None, seconds=time.perf_counter() - began, out_of_memory_events=0, ended=f"died: {ended}"
    )


def _child(module: str, *arguments: str, time_limit_seconds: float | None = None, heard: bool = False) -> str:
    """Run a module in a fresh process, as it is to run behind a wall; the last line that it said.

    ``heard``: what it says to stderr is said, and no part of that.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
            stderr=None if heard else subprocess.STDOUT, text=True, check=False, timeout=time_limit_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"ended after {time_limit_seconds:g} s"
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1][:300]


def measured(case: Case) -> tuple[list[Row], Finals]:
    """All tools and brute force on one case."""
    budget_bytes = budget_of(case)
    say(case, f"budget {budget_bytes / 2**20:.1f} MiB")
    decisions: dict[tuple[str, bool], Decision] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["PLANNER_HOME"] = str(Path(name) / "state")
        folder = Path(name) / "decisions"
        folder.mkdir()
        for tool, checkpointing in (
            *((tool, False) for tool in OURS),
            *((t, c) for t in RIVALS for c in (False, True)),
        ):
            own = folder / f"{tool}{'-checkpointing' if checkpointing else ''}"
            found = decided(case, tool, checkpointing, budget_bytes, own)
            decisions[tool, checkpointing] = found
            say(
                case,
                f"{own.name}: {found.found} in {found.seconds:.1f} s, {found.out_of_memory_events} out of memory"
                + (f" ({found.ended})" if found.ended else ""),
            )
        ended = _child("studies.brute_force", case.name, str(budget_bytes), str(folder), heard=True)
        written = folder / "finals.json"
        if not written.exists():
            raise RuntimeError(f"brute force of {case.name} died: {ended}")
        finals = msgspec.json.decode(written.read_bytes(), type=Finals)
    return rows_of(case, budget_bytes, decisions, finals), finals


def say(case: Case, message: str) -> None:
    """Progress, while it goes."""
    print(f"  {case.name}: {message}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    cases = picked(parser, CASES.values(), lambda case: case.name, options.only)
    device = describe(torch.device("cpu"))
    name = name_on("search", device)
    path = RESULTS / f"{name}.json"
    kept: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    for case in cases:
        rows, finals = measured(case)
        print("\n".join(line(row) for row in rows), flush=True)
        head = provenance("python -m studies.search") | {"device": msgspec.to_builtins(device)}
        kept[case.name] = {
            "date": head["date"], "commit": head["commit"], "rows": rows, "finals": msgspec.to_builtins(finals),
        }  # fmt: skip
        write(name, head | {"cases": kept})
        draw([row for each in kept.values() for row in each["rows"]], path.with_suffix(".png"))
    bars = missed([row for case in cases for row in kept[case.name]["rows"]])
    print("\n".join(bars) or f"{len(cases)} cases: all bars met")
    print(f"written to {path}")
    return 1 if bars else 0


def draw(rows: Sequence[Row], path: Path) -> None:
    """Samples per second in terms of ours, one panel a case; above each bar what the tool took to decide."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    with picture(path, lines, columns, figsize=(6.5 * columns, 2.9 * lines), sharex=True) as (_, grid):
        for axes in grid.flat[len(cases) :]:
            axes.set_visible(False)
        for axes, case in zip(grid.flat, cases, strict=False):
            of_case = [row for row in rows if row["case"] == case][::-1]
            colours = {"ours": "#1f6feb", "ours-behind-the-wall": "#79a8f0", BRUTE_FORCE: "#6b7280"}
            for place, row in enumerate(of_case):
                colour = colours.get(row["tool"], "#d08c60")
                axes.barh(place, row["relative"] or 0.0, color=colour, height=0.7)
                events = row["out_of_memory_events"]
                note = f"{row['decision_seconds']:.0f} s" + (f", {events} out of memory" if events else "")
                if row["relative"] is None:
                    note = f"no plan after {note}"
                axes.text((row["relative"] or 0.0) + 0.01, place, note, va="center", fontsize=7)
            axes.axvline(1.0, color="#1f6feb", linewidth=0.8)
            axes.set_yticks(range(len(of_case)), [label(row) for row in of_case], fontsize=7)
            axes.set_xlim(0, 1.45)
            budget = of_case[0]["budget_bytes"] / 2**20
            axes.set_title(f"{case}, {budget:.0f} MiB", loc="left", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("samples per second, in terms of ours", fontsize=8)


if __name__ == "__main__":
    sys.exit(main())

"""Train the same steps with the plan and as one would without it, and draw the losses over each other.

    planner profile ─▶ planner optimize (a budget below what plain training needs) ─▶ planner train, twice:

    plain   fp32, the largest micro-batch, nothing recomputed, whether or not that fits the budget
    plan    what was chosen, from all precisions

Both see the same samples in the same order and begin with the same weights. What is told is what the run's own report
says: throughput, the share of the device's arithmetic (where its maker states one), peak, joules a step (where there is
a counter), and how far the mean loss of the last tenth of the steps is from the plain run's.

The command fails when the plan's run goes over the budget, falls back to another plan, or ends with a loss that is more
than 2% higher.

    python -m studies.training --device cuda      # GPT-2 small at 1,024 tokens and ResNet-50, 200 steps each
    python -m studies.training                    # a CPU: GPT-2 small at 256 tokens, 10 steps; ResNet-50 on 32 x 32, 20
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from executor.training import REPORT, TrainingReport
from planner.cost import instead
from planner.plan import Plan, load_plan
from profiler import records
from studies.runs import RESULTS, document, name_on, picked, picture, provenance, run, write

HIGHER = 0.02
"""How much higher the plan's loss may be in the end. With BatchNorm another micro-batch is another training."""

PLAIN, PLAN = "plain", "plan"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained, and the budget as a share of the plain step's predicted peak."""

    model: str
    flags: tuple[str, ...]
    batch: str
    global_batch_size: int
    budget_share: float
    steps: int


ON_CUDA = (
    Case(
        model="gpt2",
        flags=("--seq-len", "1024", "--precision", "fp32,bf16,fp16"),
        batch="2,8,16",
        global_batch_size=16,
        budget_share=0.6,
        steps=200,
    ),
    Case(
        model="resnet50",
        flags=("--precision", "fp32,bf16,fp16"),
        batch="16,64,128",
        global_batch_size=128,
        budget_share=0.6,
        steps=200,
    ),
)
ON_CPU = (
    Case(
        model="gpt2",
        flags=("--seq-len", "256"),
        batch="2",
        global_batch_size=4,
        budget_share=0.88,
        steps=10,
    ),
    Case(model="resnet50", flags=(), batch="8,16,32", global_batch_size=32, budget_share=0.9, steps=20),
)


def planned(case: Case, device: str, folder: Path) -> dict[str, Plan]:
    """Plan and plain baseline, by the commands that a user types."""
    profile, written = str(folder / "model.profile.json"), folder / "model.plan.json"
    run("profile", case.model, *case.flags, "--batch", case.batch, "--device", device, "-o", profile)
    batch = ("--global-batch-size", str(case.global_batch_size))
    quiet = ("--storage", "none", "-o", str(written))
    unlimited = document("optimize", profile, *batch, *quiet)
    plain_bytes = unlimited["baselines"]["plain"]["prediction"]["peak_memory_bytes"]
    run("optimize", profile, *batch, "--memory-budget", str(int(case.budget_share * plain_bytes)), *quiet)
    plan = load_plan(written)
    return {PLAIN: instead(plan, plan.baselines.plain), PLAN: plan}


def trained(plan: Plan, steps: int, folder: Path) -> tuple[TrainingReport, list[float]]:
    """The report of a run of ``planner train`` in a process of its own, and its losses."""
    file, directory = plan.save(folder.with_suffix(".plan.json")), folder
    run("train", str(file), "--steps", str(steps), "--output-dir", str(directory), "--seed", "0")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return records.read(directory / REPORT, TrainingReport), [
        float(json.loads(line)["loss"]) for line in lines
    ]


def at_last(losses: Sequence[float]) -> float:
    """The mean over the last tenth of the steps."""
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def row(case: Case, name: str, plan: Plan, report: TrainingReport, losses: Sequence[float]) -> Row:
    """What is kept of a run."""
    return {
        "model": case.model,
        "flags": list(case.flags),
        "run": name,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "precision": plan.precision,
        "segments": len(plan.checkpoint),
        "loss_chunks": plan.loss_chunks,
        "memory_budget_bytes": plan.memory_budget_bytes,
        "steps": report.steps,
        "samples_per_second": report.samples_per_second,
        "model_flops_per_second": report.model_flops_per_second,
        "model_flops_utilisation": report.model_flops_utilisation,
        "waiting_share": report.waiting_share,
        "skipped_steps": report.skipped_steps,
        "fallbacks": list(report.fallbacks),
        "predicted": msgspec.to_builtins(report.predicted),
        "measured": msgspec.to_builtins(report.measured),
        "last_loss": at_last(losses),
        "losses": list(losses),
    }


def missed(rows: Mapping[str, Row]) -> list[str]:
    """The bars that a case did not meet."""
    plan, plain = rows[PLAN], rows[PLAIN]
    bars = []
    over = plan["measured"]["peak_memory_bytes"] - plan["memory_budget_bytes"]
    if over > 0:
        bars.append(f"{plan['model']}: the plan's run is {over / 2**20:,.1f} MiB over the budget")
    if plan["fallbacks"]:
        bars.append(f"{plan['model']}: the plan's run fell back: {plan['fallbacks'][0]}")
    higher = plan["last_loss"] / plain["last_loss"] - 1
    if not higher <= HIGHER:
        bars.append(f"{plan['model']}: the plan's last loss is {higher:.1%} higher than the plain run's")
    return bars


def lines(rows: Mapping[str, Row]) -> list[str]:
    """The rows of the table of one case."""
    plain = rows[PLAIN]
    found = []
    for each in rows.values():
        taken, predicted = each["measured"], each["predicted"]
        utilisation = each["model_flops_utilisation"]
        joules = taken["step_joules"]
        found.append(
            f"{each['model']:9} {each['run']:5} "
            f"{each['micro_batch_size']:3} x {each['gradient_accumulation_steps']:<3} "
            f"{each['precision']} {each['segments']:3} segments  {each['samples_per_second']:8.2f} samples/s "
            f"({each['samples_per_second'] / plain['samples_per_second']:.2f} x)  "
            f"{taken['peak_memory_bytes'] / 2**20:9,.1f} MiB "
            f"({taken['peak_memory_bytes'] / plain['measured']['peak_memory_bytes']:.2f} x, "
            f"predicted {predicted['peak_memory_bytes'] / taken['peak_memory_bytes'] - 1:+.2%})  "
            f"step {1e3 * taken['step_seconds']:,.0f} ms "
            f"(predicted {predicted['step_seconds'] / taken['step_seconds'] - 1:+.1%})  "
            f"MFU {'unknown' if utilisation is None else f'{utilisation:.1%}'}  "
            f"{'energy unknown' if joules is None else f'{joules:,.1f} J a step'}  last loss {each['last_loss']:.4f}"
        )
    return found


def draw(cases: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """The losses of both runs over each other, a panel for each model."""
    with picture(path, columns=len(cases), figsize=(5.6 * len(cases), 3.2)) as (_, panels):
        for axes, (model, rows) in zip(panels[0], cases.items(), strict=True):
            for name, colour, width in ((PLAIN, "#6b7280", 2.4), (PLAN, "#1f6feb", 1.0)):
                each = rows[name]
                label = (
                    f"{name}: {each['micro_batch_size']} x {each['gradient_accumulation_steps']}, {each['precision']}, "
                    f"{each['samples_per_second']:,.1f} samples/s, "
                    f"{each['measured']['peak_memory_bytes'] / 2**20:,.0f} MiB"
                )
                steps = range(1, len(each["losses"]) + 1)
                axes.plot(steps, each["losses"], color=colour, linewidth=width, label=label)
            axes.set_title(model, loc="left", fontsize=9)
            axes.set_xlabel("optimizer step", fontsize=8)
            axes.set_ylabel("loss", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.legend(fontsize=7, frameon=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--steps", type=int, help="instead of as many as a case has")
    options = parser.parse_args()
    of_device = ON_CUDA if options.device == "cuda" else ON_CPU
    cases = picked(parser, of_device, lambda case: case.model, options.only)
    kept: dict[str, dict[str, Row]] = {}
    bars: list[str] = []
    path: Path | None = None
    with tempfile.TemporaryDirectory() as name:
        os.environ["PLANNER_HOME"] = str(Path(name) / "state")
        for case in cases:
            folder = Path(name) / case.model
            folder.mkdir()
            plans = planned(case, options.device, folder)
            device = plans[PLAN].device
            if path is None:
                path = RESULTS / f"{name_on('training', device)}.json"
                kept = json.loads(path.read_text())["cases"] if path.exists() else {}
            rows = {}
            for each, plan in plans.items():
                rows[each] = row(case, each, plan, *trained(plan, options.steps or case.steps, folder / each))
            print("\n".join(lines(rows)), flush=True)
            bars += missed(rows)
            head = provenance(f"python -m studies.training --device {options.device}")
            of_case = {"date": head["date"], "commit": head["commit"]}
            kept[case.model] = {key: of_case | value for key, value in rows.items()}
            write(path.stem, head | {"device": msgspec.to_builtins(device), "cases": kept})
            draw(kept, path.with_suffix(".png"))
    print("\n".join(bars) or f"{len(cases)} cases: all bars met")
    print(f"written to {path}")
    return 1 if bars else 0


if __name__ == "__main__":
    sys.exit(main())

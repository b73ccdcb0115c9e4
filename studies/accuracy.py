"""Is what Planner predicts true? A matrix of models and random plans, each run in a process of its own.

    for each model:  planner profile ──▶ random plans (segments, b, k, precision) ──▶ planner verify, one by one
                                      predicted step time and peak ◀──▶ measured ones

Peak memory is the allocator's own, of a fresh process. Step time is judged on the steadiest clock (a CPU process's own,
which does not count what others on a shared machine took) at the speed that a yardstick beside every step tells
("steady", see profiler/yardstick.py); the other readings are kept as well. Each verification calibrates the errors that
the next predictions state, from nothing at the beginning. On a CUDA device every row also has what the roofline says of
it without running anything.

Results go to results/accuracy-DEVICE.json, model by model: a run of some models replaces their rows and no others.

    python -m studies.accuracy                       # the whole matrix, about an hour on 2 cores
    python -m studies.accuracy --only unet --plans 2
    python -m studies.accuracy --device cuda         # GPT-2 small and medium, BERT, ViT, ResNet-50 at full size
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from planner import calibration, optimize
from planner.cost import index_segments, instead, name_segments, predict
from planner.nested import PLAIN, Placed
from planner.plan import Choice, Plan
from profiler import catalogue, records
from profiler.device import describe
from profiler.profile_record import KEEPINGS, DeviceRecord, Keeping, PrecisionMemory, Profile
from studies.runs import RESULTS, document, name_on, picked, picture, provenance, run, write

TIME_LIMIT_SECONDS = 600.0

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model as the command line names it, the micro-batch sizes to profile, and the optimizer."""

    model: str
    batch: str
    optimizer: str = "adamw"
    flags: tuple[str, ...] = ()
    steps: int = 20

    @property
    def name(self) -> str:
        return self.model.rpartition(":")[2]


BF16 = ("--precision", "fp32,bf16", "--all-precisions")

CASES = (
    Case(model="gpt2", batch="1,2,4", flags=("--seq-len", "64"), steps=8),
    Case(
        model="transformers:bert",
        batch="2,4,8",
        optimizer="adamw-foreach",
        flags=("--seq-len", "64"),
        steps=8,
    ),
    Case(model="transformers:t5", batch="2,4,8", optimizer="adafactor", flags=("--seq-len", "64"), steps=8),
    Case(model="transformers:vit", batch="1,2,3", optimizer="sgd", steps=8),
    Case(model="studies.workloads:llama", batch="2,4,8", optimizer="adamw-loop"),
    Case(model="studies.workloads:mixtral", batch="2,4,8"),
    Case(model="resnet50", batch="4,8,16", flags=("--image-size", "64"), steps=12),
    Case(model="torchvision:resnet18", batch="4,8,16", optimizer="sgd", flags=("--image-size", "96")),
    Case(model="torchvision:vgg11", batch="4,8,16", optimizer="sgd", flags=("--image-size", "64"), steps=8),
    Case(model="torchvision:mobilenet_v3_large", batch="4,8,16", flags=("--image-size", "96")),
    Case(
        model="torchvision:densenet121",
        batch="4,8,16",
        optimizer="adamw-loop",
        flags=("--image-size", "64"),
        steps=12,
    ),
    Case(model="torchvision:convnext_tiny", batch="4,8,16", flags=("--image-size", "64"), steps=12),
    Case(model="studies.workloads:lstm", batch="16,32,64"),
    Case(model="studies.workloads:unet", batch="4,8,16"),
    Case(model="studies.workloads:mlp", batch="128,256,512", flags=BF16, steps=12),
)


ON_CUDA = (
    Case(model="gpt2", batch="2,4,8", flags=("--seq-len", "1024", *BF16), steps=10),
    Case(model="studies.workloads:gpt2_medium", batch="1,2,4", flags=BF16, steps=10),
    Case(model="transformers:bert", batch="4,8,16", flags=("--seq-len", "512", *BF16), steps=10),
    Case(model="transformers:vit", batch="16,32,64", flags=BF16, steps=10),
    Case(model="resnet50", batch="16,32,64", flags=("--image-size", "224", *BF16), steps=10),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--plans", type=int, default=5, help="plans per model, the plain one first (default: 5)"
    )
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument(
        "--steps", type=int, help="steps to time of each kind (default: 20, or 8 for the large models)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and this machine has none. Run it on one that has.")
    of_device = ON_CUDA if options.device == "cuda" else CASES
    cases = picked(parser, of_device, lambda case: case.model, options.only)
    results = Results(describe(torch.device(options.device)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PLANNER_HOME"] = str(Path(folder) / "state")
        for case in cases:
            steps = options.steps or case.steps
            profile = profiled(case, options.device, Path(folder), steps)
            beforehand = roofline(case, profile, Path(folder))
            rows = []
            for plan in random_plans(profile, options.plans, options.seed):
                rows.append(measured(case, plan, Path(folder), steps) | of_roofline(beforehand, plan))
                print(line(rows[-1]), flush=True)
            results.replace(case, profile, rows)
    print("\n".join(f"{name}: {value}" for name, value in summarise(results.rows).items()))
    print(f"written to {results.path}")
    return 0


class Results:
    """The file of one device: its rows, and on CUDA the profiles beside it, for tests to compose the peaks again."""

    def __init__(self, device: DeviceRecord) -> None:
        self._device = device
        self._name = name_on("accuracy", device)
        self.path = RESULTS / f"{self._name}.json"
        self.rows: list[Row] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def replace(self, case: Case, profile: Profile, rows: Sequence[Row]) -> None:
        """Write the rows of a model in the place of those it had, and the picture of all."""
        head = provenance("python -m studies.accuracy") | {"device": msgspec.to_builtins(self._device)}
        own = [{"date": head["date"], "commit": head["commit"]} | row for row in rows]
        self.rows = [row for row in self.rows if row["model"] != case.model] + own
        write(self._name, head | {"summary": summarise(self.rows), "rows": self.rows})
        draw(self.rows, self.path.with_suffix(".png"))
        if self._device.kind == "cuda":
            records.write(RESULTS / f"{self._name}-{case.name}.profile.json", profile)


def profiled(case: Case, device: str, folder: Path, steps: int) -> Profile:
    """The model's profile, made by the command in a process of its own."""
    path = folder / f"{case.name}.{device}.profile.json"
    flags = ("--batch", case.batch, "--optimizer", case.optimizer, *case.flags)
    if "--precision" not in flags:
        flags += ("--precision", "fp32,bf16")  # bf16 is left out where it is hopeless.
    flags += ("--device", device, "--steps", str(steps), "-o", str(path))
    run("profile", case.model, *flags, time_limit_seconds=TIME_LIMIT_SECONDS)
    return records.read(path, Profile)


def roofline(case: Case, profile: Profile, folder: Path) -> Profile | None:
    """What is said of a CUDA device when only its name is known; None for a CPU and for one not in the catalogue."""
    known = catalogue.titled(profile.device.name)
    return None if known is None else profiled(case, known.name, folder, 1)


def of_roofline(beforehand: Profile | None, plan: Plan) -> Row:
    """What that profile predicts of the plan."""
    at_precision = None if beforehand is None else beforehand.at(plan.precision)
    if beforehand is None or at_precision is None:
        return {}
    prediction = predict(
        beforehand, at_precision, micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        placed=index_segments(beforehand, plan.checkpoint),
    )  # fmt: skip
    costs = {name: getattr(prediction, name) for name in ("step_seconds", "peak_memory_bytes")}
    return {"roofline": costs | {"stated_error": msgspec.to_builtins(prediction.error)}}


def random_plans(profile: Profile, count: int, seed: int) -> Iterator[Plan]:
    """The plain plan at the largest micro-batch, then random ones within the profiled range."""
    generator = random.Random(f"{profile.model} {seed}")
    allowed = [stage.recomputable for stage in profile.stages]
    low, high = profile.micro_batch_sizes[0], profile.micro_batch_sizes[-1]
    for index in range(count):
        b = generator.randint(low, high) if index else high
        k = generator.choice((1, 2, 3)) if index else 1
        measured = generator.choice(profile.precisions)
        memory = measured.memory_at(b)
        placed = random_placed(allowed, selectable(memory), generator) if index else PLAIN
        prediction = predict(
            profile, measured, micro_batch_size=b, gradient_accumulation_steps=k, placed=placed,
            calibration=calibration.load(profile.device),
        )  # fmt: skip
        choice = Choice(
            micro_batch_size=b,
            gradient_accumulation_steps=k,
            precision=measured.precision,
            zero_stage=0,
            checkpoint=name_segments(profile, placed),
            prediction=prediction,
            fits=True,
        )
        yield instead(optimize(profile, global_batch_size=b * k), choice)


def random_placed(
    recomputable: Sequence[bool], ways: Sequence[tuple[Keeping, ...]], generator: random.Random
) -> Placed:
    """Runs of stages, one to six long: kept, one segment, a segment with another inside, or stages kept selectively."""
    segments: list[tuple[int, int]] = []
    chosen: list[tuple[int, int]] = []
    start = 0
    while start < len(recomputable):
        stop = start
        longest = start + generator.randint(1, 6)
        while stop < min(longest, len(recomputable)) and recomputable[stop]:
            stop += 1
        how = generator.choice(("kept", "kept", "segment", "nested", "selective")) if stop > start else "kept"
        if how == "selective":
            able = [stage for stage in range(start, stop) if ways[stage]]
            chosen += [(stage, KEEPINGS.index(generator.choice(ways[stage]))) for stage in able]
        elif how != "kept":
            segments.append((start, stop))
            if how == "nested" and stop - start > 1:
                first = generator.randrange(start, stop - 1)
                segments.append((first, generator.randrange(first + 1, stop)))
        start = max(stop, start + 1)
    return Placed.of(tuple(segments), chosen)


def selectable(memory: PrecisionMemory) -> list[tuple[Keeping, ...]]:
    """What each stage may keep as a selective segment."""
    return [tuple(how for how in KEEPINGS if stage.keeping(how)) for stage in memory.stages]


def measured(case: Case, plan: Plan, folder: Path, steps: int) -> Row:
    """Verify one plan in a fresh process; the row keeps what was predicted, stated and measured."""
    path = plan.save(folder / f"{case.name}.plan.json")
    found = document("verify", str(path), "--steps", str(steps), time_limit_seconds=TIME_LIMIT_SECONDS)
    names = ("step_seconds", "step_cpu_seconds", "peak_memory_bytes", "peak_reserved_bytes")
    speed = found["measured"]["device_speed"]
    return {
        "model": case.model,
        "flags": list(case.flags),
        "optimizer": plan.optimizer,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "precision": plan.precision,
        "segments": [[segment.first, segment.last] for segment in plan.checkpoint],
        "steps": steps,
        "predicted": {name: getattr(plan.prediction, name) for name in names}
        | {"steady_seconds": plan.prediction.steady_seconds / speed},
        "stated_error": {
            "step_seconds": plan.prediction.error.step_seconds,
            "peak_memory_bytes": plan.prediction.error.peak_memory_bytes,
        },
        "measured": {name: found["measured"][name] for name in names}
        | {"steady_seconds": found["measured"]["step_cpu_seconds"] or found["measured"]["step_seconds"]},
        "relative_error": {
            name: found["measured"]["relative_error"][name] for name in (*names, "steady_seconds")
        },
        "device_speed": speed,
        "within": found["measured"]["within"],
    }


def line(row: Row) -> str:
    errors, taken = row["relative_error"], row["measured"]
    cpu = "" if errors["step_cpu_seconds"] is None else f"{errors['step_cpu_seconds']:+6.1%} CPU "
    return (
        f"{row['model']:32} b={row['micro_batch_size']:<3} k={row['gradient_accumulation_steps']} "
        f"{row['precision']} {row['optimizer']:13} {len(row['segments']):2} segments   "
        f"peak {taken['peak_memory_bytes'] / 2**20:8.1f} MiB {errors['peak_memory_bytes']:+.3%}   "
        f"step {taken['step_seconds']:6.3f} s {errors['step_seconds']:+6.1%} wall "
        f"{cpu}{errors['steady_seconds']:+6.1%} at {row['device_speed']:.0%} speed "
        f"(stated {row['stated_error']['step_seconds']:.1%})"
    )


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means and worst cases, and how often the stated error held."""

    def errors(name: str) -> list[float]:
        found = [row["relative_error"][name] for row in rows]
        return [error for error in found if error is not None]

    def share(name: str) -> float:
        return statistics.mean(bool(row["within"][name]) for row in rows)

    memory = errors("peak_memory_bytes")
    summary: dict[str, Any] = {
        "models": len({row["model"] for row in rows}),
        "plans": len(rows),
        "memory_error_mean": statistics.mean(map(abs, memory)),
        "memory_error_max": max(map(abs, memory)),
        "memory_error_lowest": min(memory),
        "memory_within_stated": share("peak_memory_bytes"),
    }
    if reserved := errors("peak_reserved_bytes"):
        summary |= {
            "reserved_error_mean": statistics.mean(map(abs, reserved)),
            "reserved_error_max": max(map(abs, reserved)),
        }
    for clock, name in (("wall", "step_seconds"), ("cpu", "step_cpu_seconds"), ("steady", "steady_seconds")):
        found = errors(name)
        if not found:
            continue
        stated = [row["stated_error"]["step_seconds"] for row in rows]
        summary |= {
            f"time_error_mean_{clock}": statistics.mean(map(abs, found)),
            f"time_error_max_{clock}": max(map(abs, found)),
            f"time_within_stated_{clock}": statistics.mean(
                abs(error) <= bound for error, bound in zip(found, stated, strict=True)
            ),
        }
    return summary


def draw(rows: Sequence[Row], path: Path) -> None:
    """Predicted against measured, memory and time, one mark per plan."""
    import matplotlib
    from matplotlib.ticker import LogLocator, NullFormatter

    models = sorted({row["model"] for row in rows})
    colours = matplotlib.colormaps["tab20"]
    with picture(path, columns=2, figsize=(10, 4.8)) as (figure, [panels]):
        for axes, name, scale, title in (
            (panels[0], "peak_memory_bytes", 2**20, "peak memory, MiB"),
            (panels[1], "steady_seconds", 1.0, "step time at the device's speed, s"),
        ):
            values = [row[side][name] / scale for row in rows for side in ("measured", "predicted")]
            ends = (min(values) / 1.3, max(values) * 1.3)
            axes.plot(ends, ends, color="#9aa5b1", linewidth=1, zorder=0)
            for index, model in enumerate(models):
                own = [row for row in rows if row["model"] == model]
                axes.scatter(
                    [row["measured"][name] / scale for row in own],
                    [row["predicted"][name] / scale for row in own],
                    s=22, color=colours(index), label=model.rpartition(":")[2], alpha=0.85,
                )  # fmt: skip
            worst = max(abs(row["relative_error"][name]) for row in rows)
            mean = statistics.mean(abs(row["relative_error"][name]) for row in rows)
            axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured", ylabel="predicted")
            axes.set_title(
                f"{title}: off by {mean:.2%} on average, {worst:.2%} at worst", loc="left", fontsize=9
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            axes.set_aspect("equal")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
        )


if __name__ == "__main__":
    sys.exit(main())

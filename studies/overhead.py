"""Is a planned step as fast as the loop that an expert writes by hand, and as the loops of the frameworks?

The same job in six loops (studies/loops.py), in one process. They take turns, with a turn of ours between any two; the
hand-written loop takes part twice, and how far it is from itself is the noise. A turn:

    the first weights, a new optimizer │ step 1 │ step 2   step 3   ...   step n + 1 │
                                                └───────────── window ──────────────┘

The window is from the end of the first optimizer step to the end of the last, as the optimizer itself reports it,
whoever calls it. Inside is all that a loop does for each step: fetching k micro-batches, forward and backward passes,
clipping, the update, and its own bookkeeping. Outside are setting up, the first step, which makes the optimizer's
state, and tearing down. On CUDA the device is waited for at both ends, nowhere else. On a CPU the clock is that of the
process, all threads together: by the clock on the wall a loop was up to 10% from itself on a shared machine.

A machine's mood may change within a turn. In the cases named ``-steps`` the hand-written loop, the same again and ours
take turns by the step, each with a model of its own; these are made anew now and then, in any order, so that no loop's
lies better in memory. Each step's random numbers are seeded by its place, so losses must be the same here too.

``gpt2-bare`` has the modules and parameters of GPT-2 and next to nothing to compute. What its step takes more than the
hand-written one's, in microseconds, is what any step of GPT-2 does, and on a noisy machine it tells more than a ratio.

Micro-batches are ready in memory, on the device. Every turn has the same, the same weights, the same random numbers
(seeded in the first forward pass), the fused AdamW, fp32, and no checkpoints, evaluation, logging or saving; so its
losses must be the same, and on a CPU those of ours are bit for bit. The process keeps freed memory from its beginning,
for every loop (profiler/device.py). Peaks are the allocator's, over two steps.

The command fails when a step of ours takes more than 1.02 of the hand-written one's time, or more than a framework's
and the noise; when its peak is another than the hand-written loop's; when losses differ on a CPU; and when the noise is
too large to tell. Results are kept case by case.

    python -m studies.overhead              # --device cuda on a GPU
    python -m studies.overhead --only mlp --rounds 20
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torchvision
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from planner.cost import instead
from planner.plan import Plan
from planner.search import optimize
from profiler import device as devices
from profiler.allocator import measure_step
from profiler.freed_memory import keep_freed_memory
from profiler.step import Loss, build_optimizer
from profiler.timing import to_device
from profiler.unmeasured import profile_unmeasured, target_of
from profiler.workload import Workload
from studies import loops
from studies.placement import gpt2
from studies.runs import RESULTS, name_on, picked, picture, provenance, write
from studies.turns import in_turns, standard_error
from studies.workloads import classifier, language_model

MOST_OF_HAND = 1.02
"""Of the hand-written loop's time."""

MOST_NOISE = 0.02
"""With more a ratio that should be 1.02 at most could be anything; not so one that is far below 1."""

FEWEST_ROUNDS = 2
"""Noise is told from the difference between rounds."""

PEAK_STEPS = 2
"""The second has the optimizer's state."""

OURS = "ours"
HANDS = ("hand", "hand 2")
OTHERS: dict[str, loops.Loop] = {**dict.fromkeys(HANDS, loops.hand), **loops.RIVALS}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and its micro-batch size, the steps in the window of a turn, and how many rounds tell enough.

    ``bare``: there is next to nothing to compute, so ratios mean nothing and microseconds do. ``by_the_step``: loops
    take turns by the step, and make their models anew after ``steps``.
    """

    name: str
    build: Callable[[], Workload]
    size: int
    steps: int
    rounds: int
    bare: bool = False
    by_the_step: bool = False


def resnet50(image_size: int) -> Workload:
    """With ten classes."""
    return classifier(torchvision.models.resnet50(num_classes=10), 3, image_size, image_size)


def small_mlp() -> Workload:
    """So little to compute that what a loop does besides is seen."""
    return classifier(nn.Sequential(nn.Linear(784, 1024), nn.GELU(), nn.Linear(1024, 10)), 784)


def bare_gpt2() -> Workload:
    """GPT-2's twelve blocks, modules and parameters, of width 12, on eight of 64 words."""
    config = GPT2Config(n_layer=12, n_embd=12, n_head=12, vocab_size=64, n_positions=8, use_cache=False)
    return language_model(GPT2LMHeadModel(config), 64, 8)


ON_CPU = (
    Case(name="gpt2-bare", build=bare_gpt2, size=1, steps=20, rounds=9, bare=True),
    Case(name="mlp", build=small_mlp, size=32, steps=100, rounds=9),
    Case(name="resnet50", build=lambda: resnet50(64), size=8, steps=3, rounds=3),
    Case(name="gpt2", build=lambda: gpt2(128), size=2, steps=1, rounds=3),
    Case(name="resnet50-steps", build=lambda: resnet50(64), size=8, steps=30, rounds=150, by_the_step=True),
    Case(name="gpt2-steps", build=lambda: gpt2(32), size=1, steps=30, rounds=200, by_the_step=True),
)
ON_CUDA = (
    Case(name="gpt2-bare", build=bare_gpt2, size=1, steps=20, rounds=9, bare=True),
    Case(name="mlp", build=small_mlp, size=32, steps=500, rounds=9),
    Case(name="resnet50", build=lambda: resnet50(224), size=64, steps=20, rounds=5),
    Case(name="gpt2", build=lambda: gpt2(1024), size=8, steps=10, rounds=5),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A loop in its turns. ``relative``: its step's time over that of ours around it, a round each; of ours nothing.

    ``losses_equal``: whether every turn had the losses of the hand-written loop's first, bit for bit: of each
    micro-batch as the loss was called, and of each step as far as the loop reports it.
    """

    relative: tuple[float, ...]
    peak_memory_bytes: int
    losses_equal: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All loops of a case. ``reproducible``: whether the device computes the same twice; ``bare``: see Case."""

    case: str
    reproducible: bool
    ours_seconds: float
    loops: dict[str, Measured]
    bare: bool = False

    def ratio(self, *names: str) -> float:
        """The time of ours over that of these loops, by the median of all their turns."""
        return statistics.median(1 / each for name in names for each in self.loops[name].relative)

    def noise(self, *names: str) -> float:
        """Of such a ratio: how far the hand-written loop is from itself, or if more the error of the median."""
        first, second = (self.loops[name].relative for name in HANDS)
        apart = [b / a for a, b in zip(first, second, strict=True)]
        ratios = [1 / each for name in names for each in self.loops[name].relative]
        return max(abs(statistics.median(apart) - 1) + standard_error(apart), standard_error(ratios))

    def seconds(self, name: str) -> float:
        """Of one step."""
        return self.ours_seconds if name == OURS else self.ours_seconds / self.ratio(name)

    def overhead_seconds(self, name: str) -> float:
        """What a step of this loop takes more than a hand-written one."""
        return self.seconds(name) - self.ours_seconds / self.ratio(*HANDS)


def missed(found: Comparison) -> list[str]:
    """Which bars are not met, in words."""
    bars = []
    ours, hand = found.loops[OURS], found.loops[HANDS[0]]
    timed = [
        ("the hand-written loop", MOST_OF_HAND, HANDS),
        *((name, 1.0, (name,)) for name in found.loops if name not in (OURS, *HANDS)),
    ]
    for text, most, names in () if found.bare else timed:
        ratio, noise = found.ratio(*names), found.noise(*names)
        if ratio > max(most, 1 + noise):
            bars.append(
                f"{found.case}: ours takes {ratio:.3f} of the time of {text}, the noise is {noise:.3f}"
            )
        elif noise > MOST_NOISE and ratio + noise > 1:
            bars.append(
                f"{found.case}: ours takes {ratio:.3f} of the time of {text}, and the noise of {noise:.3f} is "
                "too much to tell. Let nothing else run, or give more --rounds."
            )
    if ours.peak_memory_bytes != hand.peak_memory_bytes:
        bars.append(
            f"{found.case}: ours needs {ours.peak_memory_bytes:,} bytes, the hand-written loop "
            f"{hand.peak_memory_bytes:,}"
        )
    for name, measured in found.loops.items():
        if found.reproducible and not measured.losses_equal:
            bars.append(
                f"{found.case}: the losses of {name} are not those of the hand-written loop's first turn"
            )
    return bars


class Stopwatch:
    """Called by an optimizer at the end of each of its steps; looks at the clock after the first and the last."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = 0
        self._last = steps
        self._device = device
        self._marks: list[float] = []

    def __call__(self, *_: object) -> None:
        self.steps += 1
        if self.steps in (1, self._last):
            devices.synchronize(self._device)
            self._marks.append(_now(self._device))

    @property
    def seconds(self) -> float:
        """Between the two."""
        began, ended = self._marks
        return ended - began


def _now(device: torch.device) -> float:
    """In seconds; on a CPU of the process, all threads together."""
    return devices.process_cpu_seconds() if device.type == "cpu" else time.perf_counter()


class Recorded:
    """A loss that remembers its values, and seeds random numbers when it is first called."""

    def __init__(self, loss: Loss) -> None:
        self.values: list[torch.Tensor] = []
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if not self.values:
            torch.manual_seed(0)
        value = self._loss(model, batch)
        self.values.append(value.detach())
        return value


@dataclass(frozen=True, slots=True)
class _Losses:
    """Of a turn: each micro-batch's, and each step's as the loop reports it, or nothing."""

    called: list[torch.Tensor]
    reported: list[torch.Tensor]

    def same_as(self, other: _Losses) -> bool:
        return _equal(self.called, other.called) and (
            not self.reported or _equal(self.reported, other.reported)
        )


def _equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


class Turns:
    """Turns of all loops on one model."""

    def __init__(self, case: Case, device: torch.device, others: Mapping[str, loops.Loop]) -> None:
        torch.manual_seed(0)
        self._workload = case.build()
        self._plan = plain_plan(self._workload, case.size, device)
        self._loops: dict[str, loops.Loop] = {OURS: functools.partial(loops.ours, self._plan), **others}
        self._steps = case.steps
        self._device = device
        self._weights = {
            name: value.detach().cpu().clone() for name, value in self._workload.model.state_dict().items()
        }
        self._micro_batches = [
            to_device(self._workload.batch(case.size), device)
            for _ in range((1 + max(case.steps, PEAK_STEPS)) * loops.ACCUMULATION)
        ]
        self._losses: dict[str, list[_Losses]] = {}

    def seconds(self, name: str) -> float:
        """Of one step, by the window of a turn."""
        steps = 1 + self._steps
        recorded = Recorded(self._workload.loss)
        job = self._job(steps, recorded)
        stopwatch = Stopwatch(steps, self._device)
        job.optimizer.register_step_post_hook(stopwatch)
        self._loops[name](job)
        if stopwatch.steps != steps:
            raise RuntimeError(f"{name} took {stopwatch.steps} optimizer steps where {steps} were asked for.")
        self._losses.setdefault(name, []).append(_Losses(recorded.values, job.reported))
        return stopwatch.seconds / self._steps

    def peak_bytes(self, name: str) -> int:
        """The allocator's."""
        job = self._job(PEAK_STEPS, self._workload.loss)
        return measure_step(
            lambda: self._loops[name](job), job.model, job.optimizer, job.micro_batches, self._device
        ).peak_bytes

    def losses_equal(self, name: str) -> bool:
        """Whether every turn had the losses of the hand-written loop's first."""
        first = self._losses[HANDS[0]][0]
        return all(losses.same_as(first) for losses in self._losses[name])

    def _job(self, steps: int, loss: Loss) -> loops.Job:
        """The model as it was at first, and nothing left of the turn before."""
        model = self._workload.model.to(self._device).train()
        model.load_state_dict(self._weights)
        model.zero_grad(set_to_none=True)
        gc.collect()
        return loops.Job(
            model=model,
            loss=loss,
            optimizer=build_optimizer("adamw", model),
            micro_batches=self._micro_batches[: steps * loops.ACCUMULATION],
            device=self._device,
        )


class Steps(Turns):
    """Turns of one step each, of the loops that can stop after it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device, dict.fromkeys(HANDS, loops.hand))
        self._steppers: dict[str, loops.Steps] = {
            **dict.fromkeys(HANDS, loops.hand_steps),
            OURS: functools.partial(loops.our_steps, self._plan),
        }
        self._going: dict[str, Iterator[torch.Tensor]] = {}
        self._reported: dict[str, list[float]] = {}
        self._earlier: list[dict[str, list[float]]] = []
        self._order = random.Random(0)

    def seconds(self, name: str) -> float:
        """Of the loop's next step."""
        if len(self._reported.get(name, ())) > self._steps:
            self._end()
        if not self._going:
            self._begin()
        return self._next(name)

    def _begin(self) -> None:
        """Each with a model of its own, made in any order; their first steps, which make the optimizers' states."""
        for name in self._order.sample(list(self._steppers), len(self._steppers)):
            job = self._job(1 + self._steps, self._workload.loss)
            model = copy.deepcopy(job.model)
            job = dataclasses.replace(job, model=model, optimizer=build_optimizer("adamw", model))
            self._going[name], self._reported[name] = self._steppers[name](job), []
        for name in self._steppers:
            self._next(name)

    def _next(self, name: str) -> float:
        torch.manual_seed(len(self._reported[name]))
        devices.synchronize(self._device)
        began = _now(self._device)
        loss = next(self._going[name])
        devices.synchronize(self._device)
        taken = _now(self._device) - began
        self._reported[name].append(loss.item())  # A tensor that stays splits the block that it was made in.
        return taken

    def _end(self) -> None:
        self._earlier.append(self._reported.copy())
        self._going.clear()
        self._reported.clear()

    def losses_equal(self, name: str) -> bool:
        """Whether each step had the loss of the hand-written loop's, as far as both went."""
        return all(
            loss == by_hand
            for reported in (*self._earlier, self._reported)
            for loss, by_hand in zip(reported[name], reported[HANDS[0]], strict=False)
        )


def plain_plan(workload: Workload, size: int, device: torch.device) -> Plan:
    """The plan that recomputes nothing, from a profile that runs nothing."""
    profile = profile_unmeasured(
        workload, (size,), ("fp32",), target_of(str(device), ("fp32",)), optimizer="adamw", watts=None, spec=None,
        progress=lambda message: None, trying_bytes=0,
    )  # fmt: skip
    plan = optimize(profile, size * loops.ACCUMULATION)
    plain = instead(plan, plan.baselines.plain)
    assert (plain.micro_batch_size, plain.gradient_accumulation_steps) == (size, loops.ACCUMULATION)
    assert not plain.checkpoint
    assert plain.loss_chunks is None
    return plain


def compared(
    case: Case, device: torch.device, rounds: int, others: Mapping[str, loops.Loop] = OTHERS
) -> Comparison:
    """Peaks first, one after another, then rounds of turns."""
    if case.bare:
        torch.set_num_threads(1)  # Others would only spin, on a clock that counts them.
    if case.by_the_step:
        others = dict.fromkeys(HANDS, loops.hand)
    turns = Steps(case, device) if case.by_the_step else Turns(case, device, others)
    names = (OURS, *others)
    peaks = {}
    for name in names:
        say(case, f"peak of {name}")
        peaks[name] = turns.peak_bytes(name)

    def seconds_of(name: str) -> float:
        seconds = turns.seconds(name)
        say(case, f"{name}: {seconds:.4f} s a step")
        return seconds

    relative, seconds = in_turns(seconds_of, list(others), OURS, rounds)
    return Comparison(
        case=case.name,
        reproducible=device.type == "cpu",
        ours_seconds=statistics.median(seconds),
        loops={
            name: Measured(
                relative=tuple(ratios), peak_memory_bytes=peaks[name], losses_equal=turns.losses_equal(name)
            )
            for name, ratios in zip(names, ([], *relative), strict=True)
        },
        bare=case.bare,
    )


def say(case: Case, message: str) -> None:
    """Progress, while it goes."""
    print(f"  {case.name}: {message}", file=sys.stderr, flush=True)


def rows_of(found: Comparison) -> list[Row]:
    """One row a loop, for the results file, the table and the picture."""
    return [
        {
            "case": found.case,
            "loop": name,
            "step_seconds": found.seconds(name),
            "ratio": None if name == OURS else found.ratio(name),
            "ratios": [1 / each for each in measured.relative],
            "noise": None if name == OURS else found.noise(name),
            "overhead_seconds": found.overhead_seconds(name),
            "peak_memory_bytes": measured.peak_memory_bytes,
            "losses_equal": measured.losses_equal,
        }
        for name, measured in found.loops.items()
    ]


def line(row: Row) -> str:
    """A row of the table."""
    ratio = "" if row["ratio"] is None else f"ours / it {row['ratio']:.3f} (± {row['noise']:.3f})"
    losses = "same losses" if row["losses_equal"] else "OTHER LOSSES"
    noise = "" if row["noise"] is None else f" ± {1e6 * row['noise'] * row['step_seconds']:.0f}"
    overhead = f"{1e6 * row['overhead_seconds']:+.0f}{noise} us"
    return (
        f"{row['case']:9} {row['loop']:10} {1e3 * row['step_seconds']:10.3f} ms a step, "
        f"{overhead:>18}   {ratio:27}  "
        f"peak {row['peak_memory_bytes']:13,} bytes   {losses}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """The time of ours over that of each loop: a dot a round, a bar at the median."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    with picture(path, lines, columns, figsize=(4.6 * columns, 2.6 * lines)) as (_, panels):
        for axes in panels.flat[len(cases) :]:
            axes.set_visible(False)
        for axes, case in zip(panels.flat, cases, strict=False):
            others = [row for row in rows if row["case"] == case and row["loop"] != OURS][::-1]
            for place, row in enumerate(others):
                colour = "#6b7280" if row["loop"] in HANDS else "#d08c60"
                axes.plot(
                    row["ratios"], [place] * len(row["ratios"]), "o", color=colour, alpha=0.5, markersize=5
                )
                axes.plot([row["ratio"]] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
            axes.axvline(1.0, color="#1f6feb", linewidth=0.8)
            axes.axvline(MOST_OF_HAND, color="#c0392b", linewidth=0.8, linestyle="--")
            axes.set_yticks(range(len(others)), [row["loop"] for row in others], fontsize=8)
            axes.set_title(
                f"{case}, {1e3 * others[-1]['step_seconds']:,.0f} ms a step", loc="left", fontsize=9
            )
            axes.set_xlabel("time of ours over the loop's", fontsize=8)
            axes.tick_params(axis="x", labelsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, help="instead of as many as a case has")
    options = parser.parse_args()
    device = devices.resolve(options.device)
    of_device = ON_CUDA if device.type == "cuda" else ON_CPU
    cases = picked(parser, of_device, lambda case: case.name, options.only)
    if options.rounds is not None and options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}, got {options.rounds}.")
    if importlib.util.find_spec("accelerate") is None or loops.lightning_here() is None:
        parser.error("Accelerate and Lightning take part, and are not here: pip install -e '.[studies]'.")
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        parser.error("Frameworks take all GPUs that they see. Set CUDA_VISIBLE_DEVICES to one.")
    keep_freed_memory()
    record = devices.describe(device)
    path = RESULTS / f"{name_on('overhead', record)}.json"
    kept: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    bars = []
    threads = torch.get_num_threads()
    for case in cases:
        torch.set_num_threads(threads)
        found = compared(case, device, options.rounds or case.rounds)
        rows = rows_of(found)
        print("\n".join(map(line, rows)), flush=True)
        bars += missed(found)
        head = provenance("python -m studies.overhead") | {"device": msgspec.to_builtins(record)}
        kept[case.name] = {"date": head["date"], "commit": head["commit"], "rows": rows}
        write(path.stem, head | {"cases": kept})
        draw(
            list(itertools.chain.from_iterable(each["rows"] for each in kept.values())),
            path.with_suffix(".png"),
        )
    print("\n".join(bars) or f"{len(cases)} cases: all bars met")
    print(f"written to {path}")
    return 1 if bars else 0


if __name__ == "__main__":
    sys.exit(main())

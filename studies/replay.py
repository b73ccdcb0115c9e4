"""What does recomputing cost beside the operations that run again?

A segment's operations are written down in the forward pass and called again in the backward pass, and a selective one
watches each of them; that is Python, and on a CPU the device waits for it. Steps of one micro-batch take turns:

    plain │ each stage a segment │ four stages a segment │ each block a segment │ each stage selective │ plain │ ...
            extra time - what the operations take that run again (planner/time.py) = what the host took

in units of ``StepTime.dispatch_seconds``, how long this host takes to lead one operation through a mode written in
Python. ``planner.time`` states as SEGMENT_DISPATCHES, STAGE_DISPATCHES and SELECTIVE_DISPATCHES what makes the mean
error over all models and precisions the least; it is shown how far both passes are off with them, and without.

Beside them the same blocks take turns as one would recompute them by hand, each block's forward pass wrapped in
``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``. A GPT-2 with next to nothing to compute tells what a
block takes more than a plain one, in microseconds, by hand and by a plan, also where products are kept (by hand:
``create_selective_checkpoint_contexts``).

    python -m studies.replay                # about ten minutes on 2 cores
    python -m studies.replay --only llama
    python -m studies.replay --only bare    # seconds
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import profiler
from executor.engine import apply_checkpoints
from planner import optimize
from planner.cost import instead, name_segments, predict
from planner.nested import PLAIN, Placed
from planner.plan import Choice, Plan
from planner.search import block_name, blocks
from planner.time import (
    SEGMENT_DISPATCHES,
    SELECTIVE_DISPATCHES,
    STAGE_DISPATCHES,
    at_micro_batch,
    step_parts,
)
from profiler import records, registry
from profiler.device import describe
from profiler.freed_memory import keep_freed_memory
from profiler.profile_record import KEEPINGS, PrecisionProfile, Profile
from profiler.selective import MADE_FROM
from profiler.timing import stepper_for
from studies.accuracy import selectable
from studies.overhead import bare_gpt2
from studies.runs import RESULTS, name_on, picked, provenance, run, write

CPU = torch.device("cpu")

BY_HAND = "by hand"
BARE = ("planned", BY_HAND, "planned, products kept", "by hand, products kept")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model as the command line names it, and what it is profiled with."""

    model: str
    flags: tuple[str, ...]


CASES = (
    Case(model="gpt2", flags=("--batch", "2", "--seq-len", "64")),
    Case(model="transformers:bert", flags=("--batch", "4", "--seq-len", "64")),
    Case(model="studies.workloads:llama", flags=("--batch", "4")),
    Case(model="torchvision:resnet18", flags=("--batch", "4", "--image-size", "96", "--all-precisions")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Seconds of one forward and backward pass; ``operations_seconds``: of what runs again, at the speed of now."""

    model: str
    precision: str
    placed: str
    segments: int
    stages: int
    plain_seconds: float
    seconds: float
    operations_seconds: float
    predicted_seconds: float
    dispatch_seconds: float
    by_hand_seconds: float | None

    @property
    def host_dispatches(self) -> float:
        """What the host took beside the operations."""
        return (self.seconds - self.plain_seconds - self.operations_seconds) / self.dispatch_seconds

    @property
    def off(self) -> float:
        """How far the predicted time is from the measured one."""
        return self.predicted_seconds / self.seconds - 1

    def off_with(self, dispatches: float) -> float:
        """The same of a prediction in which the host takes so many."""
        predicted = self.plain_seconds + self.operations_seconds + dispatches * self.dispatch_seconds
        return predicted / self.seconds - 1


def placements(profile: Profile, measured: PrecisionProfile) -> Iterator[tuple[str, Placed]]:
    """What is timed, by name."""
    allowed = [stage.recomputable for stage in profile.stages]
    first, end = allowed.index(True), len(allowed) - allowed[::-1].index(True)
    yield "plain", PLAIN
    yield "single", Placed.of(tuple((i, i + 1) for i in range(first, end) if allowed[i]), [])
    if all(allowed[first:end]):
        yield "fours", Placed.of(tuple((i, min(i + 4, end)) for i in range(first, end, 4)), [])
    yield "blocks", Placed.of(tuple(named_blocks(profile).values()), [])
    ways = selectable(measured.memory_at(profile.micro_batch_sizes[0]))
    for number, how in enumerate(KEEPINGS):
        able = [i for i in range(first, end) if allowed[i] and how in ways[i]]
        if able:
            yield how, Placed.of((), [(i, number) for i in able])


def named_blocks(profile: Profile) -> dict[str, tuple[int, int]]:
    """The modules that are blocks, with their stages."""
    names = ((block_name(profile.stages[start].name), (start, stop)) for start, stop in blocks(profile))
    return {name: span for name, span in names if name is not None}


def recompute_by_hand(model: torch.nn.Module, names: Iterable[str], **how: Any) -> None:
    """Wrap the modules of these names as torch's documentation has it."""
    for name in names:
        module = model.get_submodule(name)
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **how)


def timed(profile: Profile, measured: PrecisionProfile, rounds: int) -> Iterator[Row]:
    """Every placement of a model, each on a copy of it, in turns."""
    assert profile.workload is not None
    workload = registry.build(profile.workload)
    size = profile.micro_batch_sizes[0]
    placed = dict(placements(profile, measured))
    models = {name: copy.deepcopy(workload.model) for name in placed}
    for name, model in models.items():
        if placed[name] != PLAIN:
            apply_checkpoints(model, _plan(profile, measured, placed[name]))
    models[BY_HAND] = copy.deepcopy(workload.model)
    recompute_by_hand(models[BY_HAND], named_blocks(profile))
    autocast = stepper_for(workload, "sgd", measured.precision, CPU).autocast
    batch = workload.batch(size)

    def seconds(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        with autocast():
            loss = workload.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        spent = time.perf_counter() - start
        model.zero_grad()
        return spent

    found = _medians({name: functools.partial(seconds, model) for name, model in models.items()}, rounds)
    times = at_micro_batch(measured.wall, size)
    assert times.dispatch_seconds is not None
    without = msgspec.structs.replace(times, dispatch_seconds=None)
    passes = step_parts(times, 1, PLAIN)
    speed = found["plain"] / (passes["forward"] + passes["backward"])
    for name in (name for name in placed if placed[name] != PLAIN):
        segments, keeping = placed[name].segments, placed[name].keeping
        yield Row(
            model=profile.model,
            precision=measured.precision,
            placed=name,
            segments=len(segments) + len(keeping),
            stages=sum(stop - start for start, stop in segments) + len(keeping),
            plain_seconds=found["plain"],
            seconds=found[name],
            operations_seconds=speed * step_parts(without, 1, placed[name])["recompute"],
            predicted_seconds=found["plain"] + speed * step_parts(times, 1, placed[name])["recompute"],
            dispatch_seconds=speed * times.dispatch_seconds,
            by_hand_seconds=found[BY_HAND] if name == "blocks" else None,
        )


def bare(rounds: int) -> dict[str, float]:
    """Microseconds that a block of next to no computing takes more than a plain one; the least of all rounds."""
    workload = bare_gpt2()
    profile = profiler.profile(workload, (1,), ("fp32",), "cpu", steps=1)
    measured, spans = profile.precisions[0], named_blocks(profile)
    stages = [stage for start, stop in spans.values() for stage in range(start, stop)]
    models = {name: copy.deepcopy(workload.model) for name in ("plain", *BARE)}
    apply_checkpoints(models["planned"], _plan(profile, measured, Placed.of(tuple(spans.values()), [])))
    kept = Placed.of((), [(stage, KEEPINGS.index("selective")) for stage in stages])
    apply_checkpoints(models["planned, products kept"], _plan(profile, measured, kept))
    recompute_by_hand(models[BY_HAND], spans)
    recompute_by_hand(models["by hand, products kept"], spans, context_fn=_keep_products)
    batch = workload.batch(1)

    def seconds(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        workload.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        spent = time.perf_counter() - start
        model.zero_grad()
        return spent

    work = {name: functools.partial(seconds, model) for name, model in models.items()}
    least = {name: min(taken[2:]) for name, taken in _in_turns(work, rounds).items()}
    return {name: (least[name] - least["plain"]) / len(spans) * 1e6 for name in BARE}


def _keep_products() -> Any:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation.overloadpacket in MADE_FROM
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _plan(profile: Profile, measured: PrecisionProfile, placed: Placed) -> Plan:
    size = profile.micro_batch_sizes[0]
    choice = Choice(
        micro_batch_size=size,
        gradient_accumulation_steps=1,
        precision=measured.precision,
        zero_stage=0,
        checkpoint=name_segments(profile, placed),
        prediction=predict(
            profile, measured, micro_batch_size=size, gradient_accumulation_steps=1, placed=placed
        ),
        fits=True,
    )
    return instead(optimize(profile, global_batch_size=size), choice)


def _medians(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of all rounds but the first two, which warm up."""
    return {name: statistics.median(seconds[2:]) for name, seconds in _in_turns(work, rounds).items()}


def _in_turns(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each returned in each round, and in two before."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 2):
        for name, once in work.items():
            taken[name].append(once())
    return taken


def fitted(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Dispatches of a segment, of each of its stages, and of a selective stage, for the least mean error."""
    whole = [row for row in rows if row.placed not in KEEPINGS]
    selective = [row for row in rows if row.placed in KEEPINGS]

    def error_of_segments(each: tuple[int, int]) -> float:
        return _mean(row.off_with(each[0] * row.segments + each[1] * row.stages) for row in whole)

    segment, stage = min(itertools.product(range(0, 801, 20), range(0, 401, 20)), key=error_of_segments)
    kept = min(
        range(0, 2001, 20), key=lambda each: _mean(row.off_with(each * row.stages) for row in selective)
    )
    return segment, stage, kept


def _mean(errors: Iterable[float]) -> float:
    return statistics.mean(map(abs, errors))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The constants as these rows have them, and how far they are off with those of ``planner.time`` and without."""
    return {
        "least mean error with segment, stage, selective": fitted(rows),
        "stated in planner.time": (SEGMENT_DISPATCHES, STAGE_DISPATCHES, SELECTIVE_DISPATCHES),
        "mean_error": _mean(row.off for row in rows),
        "largest_error": max(abs(row.off) for row in rows),
        "mean_error_without_the_host": _mean(row.off_with(0) for row in rows),
        "largest_error_without_the_host": max(abs(row.off_with(0)) for row in rows),
        "blocks against torch.utils.checkpoint": {
            f"{row.model} {row.precision}": row.seconds / row.by_hand_seconds
            for row in rows
            if row.by_hand_seconds is not None
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What recomputing costs beside the operations that run again."
    )
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=16)
    options = parser.parse_args()
    keep_freed_memory()
    least = bare(10 * options.rounds) if options.only in ("", "bare") else {}
    if least:
        print("microseconds a block with next to nothing to compute takes more:")
        print("\n".join(f"  {name:24}{taken:7.0f}" for name, taken in least.items()), flush=True)
    if options.only == "bare":
        return
    rows: list[Row] = []
    for case in picked(parser, CASES, lambda case: case.model, options.only):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.profile.json"
            run("profile", case.model, *case.flags, "--precision", "fp32,bf16", "--device", "cpu", "-o", str(path),
                time_limit_seconds=600.0)  # fmt: skip
            profile = records.read(path, Profile)
        for measured in profile.precisions:
            for row in timed(profile, measured, options.rounds):
                rows.append(row)
                print(
                    f"{row.model:18} {row.precision} {row.placed:16} {row.stages:3} stages: plain "
                    f"{1e3 * row.plain_seconds:6.1f} ms, {1e3 * row.seconds:6.1f} ms, predicted {row.off:+6.1%}, "
                    f"without the host {row.off_with(0):+6.1%}; it took {row.host_dispatches / row.stages:5.0f} "
                    "dispatches a stage"
                    + (
                        ""
                        if row.by_hand_seconds is None
                        else f"; of torch's {row.seconds / row.by_hand_seconds:.3f}"
                    ),
                    flush=True,
                )
    summary = summarise(rows)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    if not options.only:
        device = describe(CPU)
        name = name_on("replay", device)
        head = provenance("python -m studies.replay") | {"device": msgspec.to_builtins(device)}
        write(
            name,
            head
            | {
                "summary": summary,
                "bare_block_microseconds": least,
                "rows": [msgspec.to_builtins(row) for row in rows],
            },
        )
        print(f"written to {RESULTS / name}.json")


if __name__ == "__main__":
    main()

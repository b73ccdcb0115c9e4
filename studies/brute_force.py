"""Every micro-batch with every placement at hand, really run behind the wall, and timed side by side.

    every way      one step: does it run behind the wall?              those that do not are out-of-memory events,
                                                                       as are those that do not later on
    the sieve      two rounds of one step each                         what is far behind the best is left out
    the finals     nine rounds: the plan, the best of the sieve, and what each tool would train with

Ways take turns, round after round, with steps of the plan between them: a way's time is in terms of the plan's around
it, so the machine's moods meet all alike, and which ways come to the finals is decided by other steps than those by
which they are judged. The plan takes part twice, once as the measure and once as a way: how far the two are apart
is the noise. Peaks are the allocator's, read afterwards with the wall lifted, since reading takes memory too.

    python -m studies.brute_force CASE BUDGET_BYTES FOLDER
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from executor.errors import is_out_of_memory
from planner.cost import instead
from planner.plan import Plan, load_plan
from planner.search import space
from profiler import records
from profiler.allocator import measure_step
from profiler.profile_record import Profile
from profiler.step import Stepper
from profiler.timing import stepper_for
from profiler.workload import Workload, split
from studies.placement import Applied, every_block, plain, planned
from studies.search import CASES, EVERY_BLOCK, OURS, PLAIN, Case, Decision, Finals, Measured, settled
from studies.turns import in_turns, standard_error
from studies.wall import Wall

CPU = torch.device("cpu")

SIEVE_ROUNDS = 2
FINAL_ROUNDS = 9

FAR_BEHIND = 1.12
"""In terms of the best of the sieve. A single ratio of two steps scatters by some percent."""

MOST_FINALISTS = 6
"""Of the sieve's best; the plan and the tools' ways come on top."""

FRONT_POINTS = 4
"""Of the planner's frontier of each micro-batch that fit: the fastest, and others spread evenly over memory."""


Key = tuple[int, str]
"""A way's micro-batch size and the name of its placement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A micro-batch size and a placement that can be put on the model."""

    micro_batch_size: int
    placement: str
    make: Callable[[], Applied]

    @property
    def key(self) -> Key:
        return self.micro_batch_size, self.placement


class Steps:
    """Whole optimizer steps of the global batch, in whatever way."""

    def __init__(self, case: Case, workload: Workload) -> None:
        self._model = workload.model
        self._stepper: Stepper = stepper_for(workload, "adamw", "fp32", CPU)
        self._batch = workload.batch(case.global_batch_size)
        self._size = case.global_batch_size

    def run(self, way: Way) -> float:
        """Seconds of one step on the wall clock, which is what samples per second are counted by."""
        gc.collect()
        micro_batches = self._micro_batches(way)
        with way.make():
            began = time.perf_counter()
            self._stepper.step(micro_batches, len(micro_batches))
            return time.perf_counter() - began

    def seconds(self, way: Way) -> float | None:
        """Of a step; None where it does not find the memory that it asks for."""
        try:
            return self.run(way)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._stepper.optimizer.zero_grad(set_to_none=True)
        return None

    def peak_bytes(self, way: Way) -> int:
        """The allocator's, over one step."""
        micro_batches = self._micro_batches(way)
        with way.make():
            return measure_step(
                lambda: self._stepper.step(micro_batches, len(micro_batches)),
                self._model, self._stepper.optimizer, micro_batches, CPU,
            ).peak_bytes  # fmt: skip

    def _micro_batches(self, way: Way) -> list[Any]:
        return list(split(self._batch, self._size, self._size // way.micro_batch_size))


Essence = tuple[int, object, int | None]
"""What tells one way from another: micro-batch size, placement, chunks of the loss."""


def ways(
    case: Case, workload: Workload, profile: Profile, plans: dict[str, Plan], budget_bytes: int
) -> dict[Essence, Way]:
    """All that are tried, the plans first, none twice."""
    model, blocks = workload.model, case.blocks(workload.model)
    found: dict[Essence, Way] = {}
    for name, plan in plans.items():
        found.setdefault(_essence(plan), _planned(model, plan, name))
    for size in case.micro_batch_sizes:
        found.setdefault(
            (size, (), None),
            Way(micro_batch_size=size, placement=PLAIN, make=functools.partial(plain, model)),
        )
        found[size, EVERY_BLOCK, None] = Way(
            micro_batch_size=size, placement=EVERY_BLOCK, make=functools.partial(every_block, model, blocks)
        )
    considered = space(profile, case.global_batch_size, budget_bytes)
    plan = considered.plan()
    for knobs in considered.candidates():
        choices = {} if knobs.loss_chunks else {"sqrt(L)": considered.by_hand(knobs, "sqrt")}
        points = [index for _, _, _, index in reversed(considered.fitting(knobs))]
        chunks = f", loss in {knobs.loss_chunks}" if knobs.loss_chunks else ""
        for number, index in enumerate(spread(points, FRONT_POINTS)):
            choices[f"front {number + 1}{chunks}"] = considered.choice(knobs, index)
        for name, choice in choices.items():
            other = instead(plan, choice)
            found.setdefault(_essence(other), _planned(model, other, name))
    return found


def _planned(model: nn.Module, plan: Plan, name: str) -> Way:
    placement = name if plan.checkpoint or plan.loss_chunks else PLAIN
    return Way(
        micro_batch_size=plan.micro_batch_size,
        placement=placement,
        make=functools.partial(planned, model, plan),
    )


def _essence(plan: Plan) -> Essence:
    return plan.micro_batch_size, plan.checkpoint, plan.loss_chunks


def spread(items: Sequence[int], count: int) -> list[int]:
    """The first, the last and others evenly between them; all where there are no more than ``count``."""
    if len(items) <= count:
        return list(items)
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


class NoMemory(Exception):
    """A way that ran before was refused memory: the heap's holes are others than they were then."""

    def __init__(self, way: Way) -> None:
        super().__init__(f"{way.micro_batch_size} x {way.placement}")
        self.way = way


def lasting(
    seconds_of: Callable[[Way], float | None], taking_part: Sequence[Way], rounds: int
) -> tuple[dict[Key, list[float]], list[float]]:
    """``in_turns`` of the ways that never are refused memory, the first of them being the reference.

    After a refusal all begin again without that way, so that all ratios are of the same rounds.
    """

    def timed(way: Way) -> float:
        taken = seconds_of(way)
        if taken is None:
            raise NoMemory(way)
        return taken

    left = list(taking_part)
    while left:
        try:
            ratios, seconds = in_turns(timed, left, left[0], rounds)
        except NoMemory as refused:
            left.remove(refused.way)
        else:
            return {way.key: found for way, found in zip(left, ratios, strict=True)}, seconds
    raise RuntimeError("All ways that ran once were refused memory later: what the process holds has grown.")


def measured(case: Case, budget_bytes: int, folder: Path) -> Finals:
    """Sieve and finals, behind the wall; the reference is the plan, or where it does not run the first that does."""
    profile = records.read(folder / "ours" / "profile.json", Profile)
    plans = {
        name: load_plan(folder / name / "plan.json")
        for name in OURS
        if (folder / name / "plan.json").exists()
    }
    torch.manual_seed(0)
    wall = Wall.before_the_model()
    began = time.perf_counter()
    workload = case.build()
    tried = ways(case, workload, profile, plans, budget_bytes)
    steps = Steps(case, workload)
    wall.stand(budget_bytes)
    running = [way for way in tried.values() if steps.seconds(way) is not None]
    first, _ = lasting(steps.seconds, running, SIEVE_ROUNDS)
    sieve = {key: statistics.median(ratios) for key, ratios in first.items()}
    seconds = time.perf_counter() - began
    of_plans = {name: tried[_essence(plan)].key for name, plan in plans.items()}
    alive = dict(sieve)
    while True:
        chosen = {*close(alive), *of_plans.values(), *of_tools(case, folder, alive)}
        last = [way for way in running if way.key in chosen & alive.keys()]
        ratios, taken = lasting(steps.seconds, last, FINAL_ROUNDS)
        if len(ratios) == len(last):
            break
        # What a tool falls back on then has yet to be measured.
        alive = {key: ratio for key, ratio in alive.items() if key in ratios or key not in chosen}
    wall.lift()
    judged = {
        way.key: Measured(
            micro_batch_size=way.micro_batch_size, placement=way.placement, sieve=sieve[way.key],
            ratio=statistics.median(ratios[way.key]), noise=standard_error(ratios[way.key]),
            peak_memory_bytes=steps.peak_bytes(way),
        )
        for way in running
        if way.key in ratios
    }  # fmt: skip
    return Finals(
        ways=tuple(
            judged.get(way.key)
            or Measured(
                micro_batch_size=way.micro_batch_size,
                placement=way.placement,
                sieve=alive.get(way.key),
            )
            for way in tried.values()
        ),
        plans=of_plans,
        reference_seconds=statistics.median(taken),
        seconds=seconds,
    )


def close(sieve: dict[Key, float]) -> list[Key]:
    """The fastest, at most so many and none far behind."""
    limit = FAR_BEHIND * min(sieve.values())
    return [key for key in sorted(sieve, key=lambda key: sieve[key])[:MOST_FINALISTS] if sieve[key] <= limit]


def of_tools(case: Case, folder: Path, running: Collection[Key]) -> Iterator[Key]:
    """What each tool would train with."""
    for path in folder.glob("*/decision.json"):
        decision = msgspec.json.decode(path.read_bytes(), type=Decision)
        placement = EVERY_BLOCK if path.parent.name.endswith("-checkpointing") else PLAIN
        size, _ = settled(decision.found, case.global_batch_size, placement, running)
        if size is not None and path.parent.name not in OURS:
            yield size, placement


def main() -> int:
    parser = argparse.ArgumentParser(description="Every micro-batch with every placement, behind a wall.")
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("budget_bytes", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    finals = measured(CASES[options.case], options.budget_bytes, options.folder)
    (options.folder / "finals.json").write_bytes(msgspec.json.encode(finals))
    return 0


if __name__ == "__main__":
    sys.exit(main())

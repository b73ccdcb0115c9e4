"""Every micro-batch with every placement at hand, really run behind the wall, and timed side by side.

    every way      two steps: does it run behind the wall?         those that do not are out-of-memory events,
                                                                   as are those that do not later on
    the sieve      two rounds of one step each, of all ways whose second step was not much slower than another's
    the finals     seven rounds: the plan, the best of the sieve, and what each tool would train with

Each way has a process of its own behind a wall of its own, as whoever trains with it would: in one that runs many, what
earlier ones left on the heap is refused to later ones. A process waits while others take their turns.

Ways take turns, round after round, with steps of the plan between them: a way's time is in terms of the plan's around
it, so the machine's moods meet all alike, and which ways come to the finals is decided by other steps than those by
which they are judged. The plan takes part twice, once as the measure and once as a way: how far the two are apart
is the noise. Peaks are the allocator's, read afterwards with the wall lifted, since reading takes memory too.

    python -m studies.brute_force CASE BUDGET_BYTES FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import msgspec
import torch

from planner.cost import instead
from planner.plan import Plan, load_plan
from planner.search import space
from profiler import records
from profiler.allocator import measure_step
from profiler.device import is_out_of_memory
from profiler.profile_record import Profile
from profiler.step import Stepper
from profiler.timing import stepper_for
from profiler.workload import Workload, split
from studies.placement import Applied, every_block, plain, planned
from studies.search import CASES, EVERY_BLOCK, OURS, PLAIN, Case, Decision, Finals, Measured, say, settled
from studies.turns import in_turns, standard_error
from studies.wall import Wall

CPU = torch.device("cpu")

FIRST_STEPS = 2
"""The first makes the optimizer's state, and the second has it."""

HOPELESS = 1.5
"""In terms of the fastest second step. A step beside nothing scatters by a quarter here."""

SIEVE_ROUNDS = 2
FINAL_ROUNDS = 7

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
    """A micro-batch size and a placement that can be put on the model, which is the plan's where there is one."""

    micro_batch_size: int
    placement: str
    plan: Plan | None = None

    @property
    def key(self) -> Key:
        return self.micro_batch_size, self.placement

    def on(self, case: Case, workload: Workload) -> Applied:
        """The model with the placement on it."""
        if self.plan is not None:
            return planned(workload.model, self.plan)
        if self.placement == EVERY_BLOCK:
            return every_block(workload.model, case.blocks(workload.model))
        return plain(workload.model)


class Steps:
    """Whole optimizer steps of the global batch in one way, in this process."""

    def __init__(self, case: Case, workload: Workload, way: Way) -> None:
        self._model = workload.model
        self._stepper: Stepper = stepper_for(workload, "adamw", "fp32", CPU)
        self._micro_batches = list(
            split(
                workload.batch(case.global_batch_size),
                case.global_batch_size,
                case.global_batch_size // way.micro_batch_size,
            )
        )

    def _step(self) -> object:
        return self._stepper.step(self._micro_batches, len(self._micro_batches))

    def seconds(self) -> float | None:
        """Of one step on the wall clock, which samples per second are counted by; None where memory is refused."""
        gc.collect()
        began = time.perf_counter()
        try:
            self._step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return time.perf_counter() - began

    def peak_bytes(self) -> int:
        """The allocator's, over one step."""
        return measure_step(
            self._step, self._model, self._stepper.optimizer, self._micro_batches, CPU
        ).peak_bytes


SECONDS, PEAK_BYTES = "seconds", "peak bytes"
"""What a process is asked for."""


def serve(asked: Connection, case: str, way: Way, budget_bytes: int) -> None:
    """A process behind a wall: it takes a step in one way whenever it is asked to, until nobody will ask again."""
    torch.manual_seed(0)
    wall = Wall.before_the_model()
    workload = CASES[case].build()
    steps = Steps(CASES[case], workload, way)
    with way.on(CASES[case], workload), contextlib.suppress(EOFError):
        while True:
            if asked.recv() == SECONDS:
                wall.stand(budget_bytes)
                asked.send(steps.seconds())
            else:
                wall.lift()
                asked.send(steps.peak_bytes())


class Server:
    """The other side of ``serve``."""

    def __init__(self, context: ForkServerContext, case: Case, way: Way, budget_bytes: int) -> None:
        self._way = way
        self._line, asked = context.Pipe()
        self._process = context.Process(target=serve, args=(asked, case.name, way, budget_bytes), daemon=True)
        self._process.start()
        asked.close()

    def seconds(self) -> float | None:
        """Of a step, None where it is refused memory."""
        found: float | None = self._answer(SECONDS)
        return found

    def peak_bytes(self) -> int:
        """Of a step with the wall lifted."""
        found: int = self._answer(PEAK_BYTES)
        return found

    def close(self) -> None:
        """The process ends once nobody can ask it anything."""
        self._line.close()
        self._process.join()

    def _answer(self, question: str) -> Any:
        self._line.send(question)
        try:
            return self._line.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"The process of {self._way.key} died with exit code {self._process.exitcode}."
            ) from None


Essence = tuple[int, object, int | None]
"""What tells one way from another: micro-batch size, placement, chunks of the loss."""


def ways(case: Case, profile: Profile, plans: dict[str, Plan], budget_bytes: int) -> dict[Essence, Way]:
    """All that are tried, the plans first, none twice."""
    found: dict[Essence, Way] = {}
    for name, plan in plans.items():
        found.setdefault(_essence(plan), _planned(plan, name))
    for size in case.micro_batch_sizes:
        found.setdefault((size, (), None), Way(micro_batch_size=size, placement=PLAIN))
        found[size, EVERY_BLOCK, None] = Way(micro_batch_size=size, placement=EVERY_BLOCK)
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
            found.setdefault(_essence(other), _planned(other, name))
    return found


def _planned(plan: Plan, name: str) -> Way:
    placement = name if plan.checkpoint or plan.loss_chunks else PLAIN
    return Way(micro_batch_size=plan.micro_batch_size, placement=placement, plan=plan)


def _essence(plan: Plan) -> Essence:
    return plan.micro_batch_size, plan.checkpoint, plan.loss_chunks


def spread(items: Sequence[int], count: int) -> list[int]:
    """The first, the last and others evenly between them; all where there are no more than ``count``."""
    if len(items) <= count:
        return list(items)
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


class NoMemory(Exception):
    """A way that ran before was refused memory."""

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
    raise RuntimeError("All ways that ran at first were refused memory later.")


def measured(case: Case, budget_bytes: int, folder: Path) -> Finals:
    """Sieve and finals; the reference is the plan, or where it does not run the first way that does."""
    profile = records.read(folder / "ours" / "profile.json", Profile)
    plans = {
        name: load_plan(folder / name / "plan.json")
        for name in OURS
        if (folder / name / "plan.json").exists()
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studies.brute_force"])
    began = time.perf_counter()
    tried = ways(case, profile, plans, budget_bytes)
    with contextlib.ExitStack() as closing:
        servers: dict[Key, Server] = {}
        alone: dict[Key, float] = {}
        for number, way in enumerate(tried.values()):
            server = Server(context, case, way, budget_bytes)
            steps = [server.seconds() for _ in range(FIRST_STEPS)]
            if steps[-1] is not None and None not in steps:
                closing.callback(server.close)
                servers[way.key], alone[way.key] = server, steps[-1]
            else:
                server.close()
            say(case, f"way {number + 1} of {len(tried)}, {way.micro_batch_size} x {way.placement}: "
                      f"{'runs' if way.key in servers else 'out of memory'}")  # fmt: skip

        def seconds_of(way: Way) -> float | None:
            return servers[way.key].seconds()

        running = [way for way in tried.values() if way.key in servers]
        fastest = min(alone.values())
        hopeful = [way for way in running if alone[way.key] <= HOPELESS * fastest]
        first, taken_first = lasting(seconds_of, hopeful, SIEVE_ROUNDS)
        far = {
            way.key: alone[way.key] / statistics.median(taken_first) for way in running if way not in hopeful
        }
        sieve = far | {key: statistics.median(ratios) for key, ratios in first.items()}
        seconds = time.perf_counter() - began
        of_plans = {name: tried[_essence(plan)].key for name, plan in plans.items()}
        alive = dict(sieve)
        while True:
            chosen = {*close(alive), *of_plans.values(), *of_tools(case, folder, alive)}
            last = [way for way in running if way.key in chosen & alive.keys()]
            ratios, taken = lasting(seconds_of, last, FINAL_ROUNDS)
            if len(ratios) == len(last):
                break
            # What a tool falls back on then has yet to be measured.
            alive = {key: ratio for key, ratio in alive.items() if key in ratios or key not in chosen}
        judged = {
            key: Measured(
                micro_batch_size=key[0], placement=key[1], sieve=sieve[key],
                ratio=statistics.median(ratios[key]), noise=standard_error(ratios[key]),
                peak_memory_bytes=servers[key].peak_bytes(),
            )
            for key in ratios
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

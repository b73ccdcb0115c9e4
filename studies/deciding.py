"""How long it takes to decide once the profile is loaded, and how long the what-ifs take on top.

    GPT-2 small                 the profile of tests/data, both its precisions, on one device
    GPT-2 small, 4 processes    the same over a stated link, with every stage of ZeRO
    96 layers                   the same profile with its transformer blocks repeated

Each at a global batch of 32, for no memory limit, for a budget that binds, and for one that nothing fits, for which
segments inside segments are tried as well; in chains as long as that of 96 layers these take minutes, and are left out.
Times are the shortest of several, on the wall clock and of the process; the very first call in a process may read
compiled loops from the disk, and is not counted. What one search remembers is forgotten before the next.

    python -m studies.deciding [PROFILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from planner.cost import checked_peak_bytes, sharded_once
from planner.explain import budget_for
from planner.plan import NoFeasiblePlan
from planner.search import space
from planner.what_if import DEEPER_UP_TO_STAGES, ways_out, what_ifs
from profiler import records
from profiler.profile_record import Curve, Link, ParameterRecord, PrecisionMemory, Profile, StepTime

GPT2 = Path(__file__).parent.parent / "tests" / "data" / "gpt2.profile.json"
GLOBAL_BATCH = 32
WORLD = 4
LAYERS = 96
REPEATS = 3
STATE_BYTES_PER_PARAMETER = 8
"""The two moments of Adam."""

LINK = Link(
    world_size=WORLD, backend="gloo", latency_seconds=1e-4, bytes_per_second=5e9, error=0.2, source="measured"
)
"""Between processes that share memory, roughly: its numbers change what is decided, not how long that takes."""

Each = TypeVar("Each")


def with_parameters(profile: Profile) -> Profile:
    """The profile with a parameter for each stage that has any, where it does not tell them apart, and a link."""
    parameters = profile.parameters or tuple(
        ParameterRecord(module=stage.name, count=stage.parameter_count, stages=(index,))
        for index, stage in enumerate(profile.stages)
        if stage.parameter_count
    )
    return msgspec.structs.replace(profile, parameters=parameters, link=LINK)


def longer(profile: Profile, layers: int) -> Profile:
    """The profile with its transformer blocks, ``transformer.h.N``, repeated as a whole until there are so many."""
    names = [stage.name for stage in profile.stages]
    inside = [index for index, name in enumerate(names) if name.startswith("transformer.h.")]
    first, stop = inside[0], inside[-1] + 1
    blocks = 1 + int(names[stop - 1].split(".")[2])
    times, rest = divmod(layers, blocks)
    if rest:
        raise ValueError(f"layers must be a multiple of the profile's {blocks} blocks, got {layers}.")

    def repeated(stages: Sequence[Each], copy: Callable[[Each, int], Each]) -> tuple[Each, ...]:
        """``copy`` gets a stage and how many more times the blocks come behind it."""
        body = [copy(stage, times - 1 - n) for n in range(times) for stage in stages[first:stop]]
        head = [copy(stage, times - 1) for stage in stages[:first]]
        return (*head, *body, *(copy(stage, 0) for stage in stages[stop:]))

    def lengthened(memory: PrecisionMemory) -> PrecisionMemory:
        gradients = sum(int(stage.gradient[0]) for stage in memory.stages[first:stop])
        more = gradients * (times - 1)
        stages = repeated(
            memory.stages,
            lambda stage, behind: msgspec.structs.replace(
                stage,
                backward_first=_raised(stage.backward_first, gradients * behind),
                backward_later=_raised(stage.backward_later, more),
            ),
        )
        return msgspec.structs.replace(
            memory,
            parameter_bytes=memory.parameter_bytes + more,
            optimizer_state_bytes=memory.optimizer_state_bytes + more // 4 * STATE_BYTES_PER_PARAMETER,
            optimizer=_raised(memory.optimizer, more),
            stages=stages,
        )

    def slower(step: StepTime) -> StepTime:
        stages = repeated(step.stages, lambda stage, _: stage)
        added = sum(s.forward_seconds + s.backward_later_seconds for s in step.stages[first:stop]) * (
            times - 1
        )
        return msgspec.structs.replace(step, stages=stages, step_seconds=step.step_seconds + added)

    made = msgspec.structs.replace(
        profile,
        stages=tuple(
            msgspec.structs.replace(stage, name=_moved(stage.name, n), entry=_moved(stage.entry, n))
            for n, stage in _numbered(profile.stages, first, stop, times, blocks)
        ),
        parameter_count=profile.parameter_count
        + (times - 1) * sum(stage.parameter_count for stage in profile.stages[first:stop]),
        precisions=tuple(
            msgspec.structs.replace(
                each,
                memory=lengthened(each.memory),
                memory_at_one=None if each.memory_at_one is None else lengthened(each.memory_at_one),
                wall=tuple(map(slower, each.wall)),
                process_cpu=None if each.process_cpu is None else tuple(map(slower, each.process_cpu)),
            )
            for each in profile.precisions
        ),
        parameters=(),
        energy=None,
    )
    composed = checked_peak_bytes(made)
    if made.memory_check is None or composed is None:
        return made
    # Nobody ran it: its check is taken to have held.
    return msgspec.structs.replace(
        made, memory_check=msgspec.structs.replace(made.memory_check, measured_bytes=composed)
    )


def _raised(curve: Curve, fixed_bytes: int) -> Curve:
    return tuple((fixed + fixed_bytes, slope) for fixed, slope in curve)


def _numbered(
    stages: Sequence[Each], first: int, stop: int, times: int, blocks: int
) -> list[tuple[int, Each]]:
    """Every stage of the longer chain with how far the number of its block moves."""
    return [
        *((0, stage) for stage in stages[:first]),
        *((n * blocks, stage) for n in range(times) for stage in stages[first:stop]),
        *((times * blocks - blocks, stage) for stage in stages[stop:]),
    ]


def _moved(name: str, blocks: int) -> str:
    """``transformer.h.3.attn`` by so many blocks; other names as they are."""
    parts = name.split(".")
    if parts[:2] == ["transformer", "h"]:
        parts[2] = str(int(parts[2]) + blocks)
    return ".".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """The shortest of several times: to decide, and then, of the process, to say what would change it."""

    wall_seconds: float
    process_seconds: float
    what_if_seconds: float
    said: str


def decided(profile: Profile, budget_bytes: int | None, **asked: Any) -> Taken:
    """How long a decision takes, and what came of it."""
    walls, processes, others = [], [], []
    said = ""
    for _ in range(REPEATS):
        sharded_once.cache_clear()
        wall, process = time.perf_counter(), time.process_time()
        searched = space(profile, GLOBAL_BATCH, budget_bytes, **asked)
        plan = None
        try:
            plan = searched.plan()
            said = f"{plan.objective.plans_considered} plans considered"
        except NoFeasiblePlan:
            said = "nothing fits"
        walls.append(time.perf_counter() - wall)
        processes.append(time.process_time() - process)
        process = time.process_time()
        found = ways_out(searched) if plan is None else what_ifs(searched, plan)
        others.append(time.process_time() - process)
        said = f"{said}, {sum(each.choice is not None for each in found)} other questions"
    return Taken(
        wall_seconds=min(walls), process_seconds=min(processes), what_if_seconds=min(others), said=said
    )


def cases(profile: Profile) -> dict[str, tuple[Profile, dict[str, Any]]]:
    """What is asked, by name."""
    alone, together = msgspec.structs.replace(profile, link=None), with_parameters(profile)
    long = longer(profile, LAYERS)
    spread = {"world_size": WORLD, "zero_stages": (0, 1, 2, 3)}
    return {
        "GPT-2 small": (alone, {}),
        f"GPT-2 small, {WORLD} processes": (together, spread),
        f"{LAYERS} layers": (msgspec.structs.replace(long, link=None), {}),
        f"{LAYERS} layers, {WORLD} processes": (with_parameters(long), spread),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the decision, the profile being loaded.")
    parser.add_argument("profile", nargs="?", default=GPT2, help="of GPT-2 (default: the one of the tests)")
    options = parser.parse_args()
    profile = records.read(options.profile, Profile)
    for name, (made, asked) in cases(profile).items():
        front = space(made, GLOBAL_BATCH, **asked).plan().front
        tightest, widest = budget_for(front[0].prediction), budget_for(front[-1].prediction)
        budgets = {"no limit": None, "binding": (tightest + widest) // 2}
        if len(made.stages) <= DEEPER_UP_TO_STAGES:
            budgets["too small"] = tightest // 2
        for which, budget in budgets.items():
            taken = decided(made, budget, **asked)
            print(
                f"{name:25} {which:9} decided in {taken.wall_seconds:6.3f} s ({taken.process_seconds:6.3f} s CPU), "
                f"what-ifs {taken.what_if_seconds:6.3f} s CPU; {taken.said}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

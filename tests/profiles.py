"""Small profiles of random numbers, and every placement of their stages.

``random_profile`` makes one from a seed; ``memories`` and ``profiles`` draw them with hypothesis.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import msgspec
from hypothesis import strategies as st

from planner.cost import checked_peak_bytes
from planner.nested import PLAIN, Placed, Segments
from profiler.profile_record import (
    KEEPINGS,
    AffineBytes,
    ChunkedHead,
    DeviceRecord,
    EnergyProfile,
    HopelessPrecision,
    Keeping,
    Link,
    MemoryCheck,
    ParameterRecord,
    PhaseWatts,
    Precision,
    PrecisionMemory,
    PrecisionProfile,
    Profile,
    ProfileCost,
    SelectiveMemory,
    StageMemory,
    StageRecord,
    StageTime,
    StepTime,
)
from studies.accuracy import selectable


def random_profile(seed: int, *, share_predicted: float = 1.0) -> Profile:
    """Three to six stages of random curves and times; at times a stage in the middle cannot be recomputed."""
    generator = random.Random(seed)
    length = generator.randint(3, 6)

    def affine() -> AffineBytes:
        return float(generator.randint(0, 30)), float(generator.randint(0, 30))

    def selective_memory() -> SelectiveMemory | None:
        if generator.random() < 0.3:
            return None
        return SelectiveMemory(
            hold=(0.0, float(generator.randint(0, 9))), forward=(affine(),), rebuild=(affine(),)
        )

    def stage_memory() -> StageMemory:
        own = {
            name: tuple(affine() for _ in range(2))
            for name in (
                "forward",
                "recompute",
                "rebuild_first",
                "rebuild_single",
                "dropped",
                "dropped_first",
                "backward_first",
                "backward_later",
            )
        }
        return StageMemory(
            input=(0.0, float(generator.randint(1, 5))), saves_input=generator.random() < 0.5, hold=affine(),
            dropped_hold=(0.0, float(generator.randint(0, 2))), carry=affine(),
            gradient=(float(generator.randint(0, 9)), 0.0), selective=selective_memory(), **own,
        )  # fmt: skip

    def memory() -> PrecisionMemory:
        return PrecisionMemory(
            parameter_bytes=generator.randint(1, 50), buffer_bytes=3, optimizer_state_bytes=40, other_bytes=0,
            batch=(0.0, 2.0), optimizer=((30.0 + 60 * (seed % 8), 0.0),),
            stages=tuple(stage_memory() for _ in range(length)),
        )  # fmt: skip

    def step_time(size: int) -> StepTime:
        stages = []
        for _ in range(length):
            forward = generator.randint(1, 9) * size
            stages.append(
                StageTime(
                    forward_seconds=forward,
                    recompute_seconds=(recompute := generator.randint(0, forward)),
                    kept_seconds=generator.randint(0, recompute),
                    backward_first_seconds=2 * forward,
                    backward_later_seconds=2 * forward,
                )
            )
        return StepTime(
            micro_batch_size=size, stages=tuple(stages), update_seconds=1, host_seconds=0.5,
            step_seconds=100, steps_timed=4, spread=0.02, dispatch_seconds=None if seed % 2 else 1e-3,
        )  # fmt: skip

    def at(precision: Precision) -> PrecisionProfile:
        return PrecisionProfile(
            precision=precision,
            memory=memory(),
            memory_at_one=memory(),
            wall=(step_time(1), step_time(4)),
            process_cpu=None,
        )

    fixed = generator.randrange(1, length)
    profile = Profile(
        model="made up",
        workload=None,
        parameter_count=10,
        optimizer="adamw",
        device=DeviceRecord(kind="cpu", name="none", memory_bytes=2**30, threads=1),
        versions={},
        micro_batch_sizes=(1, 4),
        stages=tuple(
            StageRecord(
                name=f"h.{i}", entry=f"h.{i}" if i else "", parameter_count=1,
                recomputable=0 < i < length - 1 and (i != fixed or seed % 3 > 0),
            )
            for i in range(length)
        ),
        precisions=(at("fp32"), at("bf16")),
        hopeless=(HopelessPrecision(precision="fp16", slowdown=7.5),),
        memory_check=MemoryCheck(
            precision="fp32", micro_batch_size=1, gradient_accumulation_steps=2, measured_bytes=1
        ),
        cost=ProfileCost(seconds=1, micro_batches_run=1),
    )  # fmt: skip
    return with_check(profile, share_predicted)


def with_check(profile: Profile, share_predicted: float) -> Profile:
    """The same where the real step of the profile's own check needed what was predicted of it over the share."""
    measured_bytes = round(checked_peak_bytes(profile) / share_predicted)
    check = msgspec.structs.replace(profile.memory_check, measured_bytes=measured_bytes)
    return msgspec.structs.replace(profile, memory_check=check)


def every_placement(
    recomputable: list[bool], ways: list[tuple[Keeping, ...]], start: int = 0
) -> Iterator[Placed]:
    """Every single-level one: each stage kept, selective in each way that it can be, or in a segment."""
    if start == len(recomputable):
        yield PLAIN
        return
    for rest in every_placement(recomputable, ways, start + 1):
        yield rest
        for how in ways[start] if recomputable[start] else ():
            yield replace(rest, **{how: (start, *getattr(rest, how))})
    for stop in range(start + 1, len(recomputable) + 1):
        if not recomputable[stop - 1]:
            return
        for rest in every_placement(recomputable, ways, stop):
            yield replace(rest, segments=((start, stop), *rest.segments))


def placements_of(profile: Profile, memory: PrecisionMemory) -> list[Placed]:
    return list(every_placement([stage.recomputable for stage in profile.stages], selectable(memory)))


def every_nested_placement(placed: Placed) -> Iterator[Placed]:
    """The placement with every choice of segments inside its segments that end before they do."""

    def inside(start: int, stop: int) -> Iterator[Segments]:
        if start >= stop:
            yield ()
            return
        yield from inside(start + 1, stop)
        for end in range(start + 1, stop + 1):
            for within in inside(start, end - 1):
                for rest in inside(end, stop):
                    yield ((start, end), *within, *rest)

    choices = (
        [((start, stop), *within) for within in inside(start, stop - 1)] for start, stop in placed.segments
    )
    for choice in itertools.product(*choices):
        yield replace(placed, segments=tuple(itertools.chain.from_iterable(choice)))


sizes = st.integers(0, 40)
sloped = st.tuples(sizes, sizes).map(lambda pair: (float(pair[0]), float(pair[1])))
curves = st.lists(sloped, min_size=1, max_size=2).map(tuple)


def backward_has_what_is_held(stage: StageMemory) -> StageMemory:
    """As it is with every stage: its backward begins with all that it holds."""
    fixed, per_sample = stage.hold
    curve = tuple((fixed + point[0], per_sample + point[1]) for point in stage.backward_first)
    return msgspec.structs.replace(stage, backward_first=curve)


selective_memories = st.builds(SelectiveMemory, hold=sloped, forward=curves, rebuild=curves)
stage_memories = st.builds(
    StageMemory,
    input=sloped, saves_input=st.booleans(), hold=sloped, dropped_hold=sloped, carry=sloped,
    gradient=sizes.map(lambda size: (float(size), 0.0)),
    forward=curves, recompute=curves, rebuild_first=curves, rebuild_single=curves, dropped=curves,
    dropped_first=curves, backward_first=curves, backward_later=curves,
    selective=st.none() | selective_memories,
    selective_narrow=st.none() | st.none() | selective_memories,
).map(backward_has_what_is_held)  # fmt: skip


@st.composite
def worthwhile_stage_memories(draw: st.DrawFn) -> StageMemory:
    """Of a stage that holds more than its input, as those do that are worth recomputing."""

    def up_to(most: int, above: AffineBytes = (0.0, 0.0)) -> AffineBytes:
        return above[0], above[1] + draw(st.integers(0, most))

    hold = up_to(40)
    return StageMemory(
        input=draw(st.sampled_from(((0.0, 2.0), (0.0, 20.0)))), saves_input=draw(st.booleans()), hold=hold,
        dropped_hold=(0.0, 0.0), carry=up_to(9), gradient=(0.0, 0.0), forward=(up_to(40, hold),),
        recompute=(up_to(40, hold),), rebuild_first=(up_to(40, hold),), rebuild_single=(up_to(40, hold),),
        dropped=(up_to(60),), dropped_first=(up_to(60),),
        backward_first=(up_to(9, hold),), backward_later=(up_to(9, hold),),
        **{
            how: draw(st.none() | st.builds(
                SelectiveMemory, hold=st.just(up_to(9)), forward=st.just((up_to(9, hold),)),
                rebuild=st.just((up_to(9, hold),)),
            ))
            for how in KEEPINGS
        },
    )  # fmt: skip


def memories(
    shortest: int = 1, longest: int = 6, of_stages: st.SearchStrategy[StageMemory] = stage_memories
) -> st.SearchStrategy[PrecisionMemory]:
    """The memory of a chain of so many stages."""
    return st.builds(
        PrecisionMemory,
        parameter_bytes=st.integers(1, 40),
        buffer_bytes=sizes,
        optimizer_state_bytes=sizes,
        other_bytes=sizes,
        batch=sloped,
        optimizer=curves,
        stages=st.lists(of_stages, min_size=shortest, max_size=longest).map(tuple),
        segment_bytes=sizes,
    )


seconds = st.floats(0.01, 1.0)
shares = st.floats(0.0, 1.0)


@st.composite
def stage_times(draw: st.DrawFn) -> StageTime:
    forward, backward = draw(seconds), draw(seconds)
    recompute = forward * draw(shares)
    return StageTime(
        forward_seconds=forward,
        recompute_seconds=recompute,
        kept_seconds=draw(st.none() | shares.map(lambda share: share * recompute)),
        kept_narrow_seconds=draw(st.none() | shares.map(lambda share: share * recompute)),
        backward_first_seconds=backward,
        backward_later_seconds=backward * (1 + draw(shares)),
    )


def step_times(micro_batch_size: int, length: int) -> st.SearchStrategy[StepTime]:
    return st.builds(
        StepTime,
        micro_batch_size=st.just(micro_batch_size),
        stages=st.tuples(*[stage_times()] * length),
        update_seconds=seconds,
        host_seconds=seconds,
        step_seconds=seconds,
        steps_timed=st.just(3),
        spread=shares,
    )


SIZES = (1, 4)
"""The micro-batch sizes of a drawn profile; those between are interpolated."""


@st.composite
def at_precision(draw: st.DrawFn, precision: Precision, length: int) -> PrecisionProfile:
    of_stages = draw(st.sampled_from((stage_memories, worthwhile_stage_memories())))
    memory = draw(memories(length, length, of_stages))
    head = None
    if draw(st.integers(0, 2)) == 0:
        last = draw(of_stages)
        head = ChunkedHead(
            chunks=2, memory=last, memory_at_one=last, wall=tuple(draw(stage_times()) for _ in SIZES),
            process_cpu=None,
        )  # fmt: skip
    return PrecisionProfile(
        precision=precision,
        memory=memory,
        memory_at_one=draw(st.just(memory) | memories(length, length, of_stages)),
        wall=tuple(draw(step_times(size, length)) for size in SIZES),
        process_cpu=None,
        chunked_head=head,
    )


watts = st.floats(1.0, 100.0)


@st.composite
def profiles(draw: st.DrawFn, longest: int = 5) -> Profile:
    """All that a profile can hold, of a chain of so many stages at most; the link is one between two processes."""
    length = draw(st.integers(2, longest))
    precisions: tuple[Precision, ...] = draw(st.sampled_from((("fp32",), ("fp32", "bf16"))))
    made = Profile(
        model="made up",
        workload=None,
        parameter_count=10,
        optimizer="adamw",
        device=DeviceRecord(kind=draw(st.sampled_from(("cpu", "cuda"))), name="none", memory_bytes=2**30),
        versions={},
        micro_batch_sizes=SIZES,
        stages=tuple(
            StageRecord(
                name=f"h.{i}", entry=f"h.{i}" if i else "", parameter_count=1,
                recomputable=0 < i < length - 1 and draw(st.integers(0, 4)) > 0,
            )
            for i in range(length)
        ),
        precisions=tuple(draw(at_precision(precision, length)) for precision in precisions),
        hopeless=(HopelessPrecision(precision="fp16", slowdown=7.5),),
        memory_check=MemoryCheck(
            precision="fp32", micro_batch_size=1, gradient_accumulation_steps=2, measured_bytes=1
        ),
        cost=ProfileCost(seconds=1, micro_batches_run=1),
        energy=EnergyProfile(
            source="stated",
            error=None,
            phases=tuple(
                PhaseWatts(
                    precision=precision, forward_watts=draw(watts), backward_watts=draw(watts),
                    optimizer_watts=draw(watts), host_watts=draw(watts),
                )
                for precision in precisions
            ),
        ),
        parameters=tuple(
            ParameterRecord(module=f"h.{i}", count=draw(st.integers(1, 9)), stages=(i,)) for i in range(length)
        ),
        link=draw(
            st.builds(
                Link, world_size=st.just(2), backend=st.just("gloo"), latency_seconds=shares,
                bytes_per_second=st.floats(16.0, 1024.0), error=shares,
            )
        ),
    )  # fmt: skip
    return with_check(made, share_predicted=draw(st.sampled_from((1.0, 0.97))))

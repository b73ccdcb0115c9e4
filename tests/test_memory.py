"""Composed peaks against executed ones, and the solver's units against the timeline window by window."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import kernels
from planner import nested as nested_module
from planner.memory import (
    constant_bytes,
    optimizer_peak_bytes,
    peak_window,
    plan_nest,
    plan_units,
    timeline,
)
from planner.nested import PLAIN, Placed, depths, nested
from planner.placement import Units, pareto
from profiler import memory
from profiler.chain import Stage, discover, recomputable_stages
from profiler.memory import MemoryTracer, upper_envelope
from profiler.profile_record import (
    KEEPINGS,
    AffineBytes,
    Curve,
    Keeping,
    Precision,
    PrecisionMemory,
    StageMemory,
    bytes_at,
    peak_at,
)
from profiler.workload import Workload
from studies.accuracy import random_placed, selectable
from studies.composition import (
    Setting,
    executed_peak_bytes,
    predicted_peak_bytes,
    random_settings,
    tracer_of,
)
from tests.models import ZOO
from tests.oracle import walk
from tests.profiles import every_nested_placement, every_placement, memories, worthwhile_stage_memories

BATCH_SIZES = (1, 2, 3, 7, 16)
LOSS_BYTES = 4
"""The sum of losses so far, which the windows of a second forward pass leave out."""

SCALARS_BYTES = 512
"""Zero-dimensional tensors that the engine makes of Python numbers, and statistics kept in a wider type than fake
ones: the same few bytes whatever the model's size."""


@functools.cache
def traced(name: str) -> tuple[Workload, tuple[Stage, ...], MemoryTracer]:
    """With the scratch memory of each size: which kernel a product of so few numbers gets, and so what it takes for
    itself, jumps from size to size on some CPUs (in bf16, oneDNN's from 4,096 multiplications on)."""
    workload = ZOO[name]()
    stages = discover(workload)
    return workload, stages, tracer_of(workload, stages, BATCH_SIZES)


@functools.cache
def curves(name: str, precision: Precision, at_one: bool = False) -> PrecisionMemory:
    return traced(name)[2].memory(precision, (1, 1) if at_one else (2, 16))


@functools.cache
def curves_at(name: str, precision: Precision, size: int) -> PrecisionMemory:
    """Of one micro-batch size, with what kernels take at that size."""
    return traced(name)[2].memory(precision, (size, size))


def settings_of(name: str, batch_sizes: Sequence[int], count: int, seed: int) -> Iterator[Setting]:
    return random_settings(traced(name)[1], functools.partial(curves, name), batch_sizes, count, seed)


def executed(name: str, setting: Setting) -> int:
    workload, stages, _ = traced(name)
    return executed_peak_bytes(workload, stages, setting)


def predicted(name: str, setting: Setting) -> int:
    return predicted_peak_bytes(curves_at(name, setting.precision, setting.micro_batch_size), setting)


def test_every_plan_of_a_plain_mlp_is_predicted_within_a_few_numbers() -> None:
    for setting in settings_of("mlp", (2, 3, 7, 16), 16, seed=1):
        assert -SLACK_BYTES <= executed("mlp", setting) - predicted("mlp", setting) <= LOSS_BYTES


def test_every_plan_with_dropout_in_the_glue_is_predicted_within_a_few_numbers() -> None:
    for setting in settings_of("dropout_net", BATCH_SIZES, 12, seed=2):
        above = executed("dropout_net", setting) - predicted("dropout_net", setting)
        assert -SLACK_BYTES <= above <= SCALARS_BYTES


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 7])
def test_the_plain_plan_is_predicted_to_the_byte(
    name: str, precision: Precision, micro_batch_size: int
) -> None:
    setting = Setting(
        placed=PLAIN, micro_batch_size=micro_batch_size, gradient_accumulation_steps=2, precision=precision
    )
    assert 0 <= executed(name, setting) - predicted(name, setting) <= SCALARS_BYTES


SLACK_BYTES = 1536
"""Replays keep copies of batch norm's statistics: a few numbers per channel, which only such small models notice."""

LEFTOVERS = 0.02
"""Inside a segment a rebuilt stage is charged with what the forward pass's local variables still held at that point,
which a replay may have let go of: too much, never too little, and visible only in models as small as these."""


@pytest.mark.parametrize("name", sorted(ZOO))
def test_random_plans_are_never_predicted_below_what_a_real_step_needs_nor_far_above(name: str) -> None:
    for setting in settings_of(name, BATCH_SIZES, 8, seed=3):
        said, real = predicted(name, setting), executed(name, setting)
        assert said >= real * (1 - 0.005) - SLACK_BYTES, setting
        above = 0.002 if setting.placed == PLAIN else LEFTOVERS
        assert said <= real * (1 + above) + SLACK_BYTES, setting


@pytest.mark.parametrize("name", sorted(ZOO))
def test_walking_a_real_models_curves_peaks_where_its_real_steps_do(name: str) -> None:
    """An mlp to the byte."""
    for drawn in settings_of(name, (2, 3, 7), 3, seed=5):
        setting = replace(drawn, precision="fp32")
        walked = walk(
            curves_at(name, "fp32", setting.micro_batch_size),
            setting.placed,
            micro_batch_size=setting.micro_batch_size,
            micro_batches=setting.gradient_accumulation_steps,
        )
        real = executed(name, setting)
        if name == "mlp":
            assert real - walked in (0, LOSS_BYTES), setting
        assert real * 0.995 - SLACK_BYTES <= walked <= real * (1 + LEFTOVERS) + SLACK_BYTES, setting


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_curves_of_two_sizes_say_of_a_third_what_its_own_trace_says(name: str, precision: Precision) -> None:
    """Of all but scratch memory: what tensors take is affine in the micro-batch where the operations are the same."""
    workload, stages, _ = traced(name)
    tracer = MemoryTracer(workload, stages, "adamw")
    memory = tracer.memory(precision, (2, 16))
    for size in (2, 5, 7):
        setting = Setting(
            placed=PLAIN, micro_batch_size=size, gradient_accumulation_steps=2, precision=precision
        )
        read = tracer.plain_peak_bytes(precision, size)
        assert read - predicted_peak_bytes(memory, setting) in (0, LOSS_BYTES)


def test_a_block_of_a_gpt2_keeps_what_autograd_saves_of_it() -> None:
    """ln_2 and mlp of width 32 in fp32, per token: the input, ln_2's output, mean and deviation; of width 128
    gelu's argument, its tanh, the two factors of its product, and the product; at last dropout's mask."""
    tokens = 16
    numbers = 32 + 32 + 2 + 5 * 128 + 32
    assert curves("gpt2", "fp32").stages[3].hold == (0, tokens * numbers * 4)
    assert curves("gpt2", "fp32").stages[3].input == (0, tokens * 32 * 4)


def test_constant_bytes_are_parameters_their_adam_state_buffers_and_batches() -> None:
    """The mlp: 12 * 24 + 24, three times 24 * 24 + 24, 24 * 5 + 5 numbers; two moments and one step per tensor."""
    numbers = 12 * 24 + 24 + 3 * (24 * 24 + 24) + 24 * 5 + 5
    tensors = 10
    sample = 12 * 4 + 8
    assert constant_bytes(curves("mlp", "fp32"), 6, 2) == 3 * 4 * numbers + 4 * tensors + 2 * 6 * sample


def test_the_second_run_of_a_selective_stage_has_its_products_from_the_beginning() -> None:
    """Made until the end: 5 and 8 bytes, of which the 8 are needed: levels of 3, 9 and 20 with 0, 5, 8 of them made."""
    analysis = memory._SelectiveAnalysis(hold_bytes=8, points=3, rebuild=[(3, 0), (9, 5), (20, 8), (99, 8)])
    assert analysis.rebuilt() == [3 + 8, 9 + 3, 20]


def test_a_timeline_with_the_products_kept_of_a_stage_without_such_curves_is_refused() -> None:
    found = curves("mlp", "fp32")
    bare = msgspec.structs.replace(found.stages[1], selective=None, selective_narrow=None)
    known = msgspec.structs.replace(found, stages=(found.stages[0], bare, *found.stages[2:]))
    with pytest.raises(ValueError, match=r"no curves for stages \[1\]"):
        list(
            timeline(
                known,
                Placed(selective=(1,)),
                micro_batch_size=2,
                gradient_accumulation_steps=1,
                resident_batches=1,
            )
        )


# What follows needs no model: profiles made of random numbers.


def units_of(memory: PrecisionMemory, b: int, k: int, cost: np.ndarray | None = None) -> Units:
    length = len(memory.stages)
    return plan_units(
        memory,
        micro_batch_size=b,
        gradient_accumulation_steps=k,
        keep_cost=np.zeros(length, dtype=np.int64),
        segment_cost=np.zeros((length, length + 1), dtype=np.int64) if cost is None else cost,
        recomputable=inner(length),
        selective_cost={
            (stage, how): cost_of_keeping(stage, how) for stage in range(length) for how in KEEPINGS
        },
    )


def cost_of_keeping(stage: int, how: Keeping) -> int:
    return stage + 1 if how == "selective" else 2 * stage + 1


def inner(length: int) -> np.ndarray:
    return np.array(recomputable_stages([Stage(name=str(i), entry=str(i)) for i in range(length)]))


def peak_of_units(units: Units, placed: Placed) -> int:
    """The highest of what the units before hold and one needs, unit by unit."""
    options = {(option.stage, KEEPINGS[option.way]): option for option in units.options}
    stops, peak, held, i = dict(placed.segments), 0, 0, 0
    while i < len(units.keep_need):
        j = stops.get(i)
        need, hold = (
            (options[i, placed.keeping[i]].need, options[i, placed.keeping[i]].hold) if i in placed.keeping
            else (units.keep_need[i], units.keep_hold[i]) if j is None
            else (units.need[i, j], units.hold[i, j])
        )  # fmt: skip
        peak = max(peak, held + int(need))
        held += int(hold)
        i = i + 1 if j is None else j
    return peak


def one_level(memory: PrecisionMemory, generator: random.Random) -> Placed:
    placed = random_placed(inner(len(memory.stages)).tolist(), selectable(memory), generator)
    segments = zip(placed.segments, depths(placed.segments), strict=True)
    return replace(placed, segments=tuple(segment for segment, depth in segments if depth == 0))


def peak_of_timeline(memory: PrecisionMemory, placed: Placed, b: int, k: int) -> int:
    windows = timeline(memory, placed, micro_batch_size=b, gradient_accumulation_steps=k, resident_batches=k)
    return peak_window(w for w in windows if w.phase != "optimizer").total_bytes


@given(memories(), st.integers(1, 8), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=300)
def test_units_need_and_hold_what_the_timeline_says(
    memory: PrecisionMemory, b: int, k: int, seed: int
) -> None:
    placed = one_level(memory, random.Random(seed))
    peak = peak_of_units(units_of(memory, b, k), placed) + constant_bytes(memory, b, k)
    assert peak == peak_of_timeline(memory, placed, b, k)


@given(memories(), st.integers(1, 4), st.integers(1, 2), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_every_point_of_the_frontier_has_the_peak_of_its_own_timeline(
    memory: PrecisionMemory, b: int, k: int, generator: random.Random
) -> None:
    length = len(memory.stages)
    cost = np.array([[generator.randint(0, 9) for _ in range(length + 1)] for _ in range(length)])
    units = units_of(memory, b, k, cost)
    frontier = pareto(units)
    for index, (peak, time) in enumerate(frontier.points):
        taken = [units.options[number] for number in frontier.options(index)]
        placed = Placed.of(frontier.segments(index), ((o.stage, o.way) for o in taken))
        assert peak + constant_bytes(memory, b, k) == peak_of_timeline(memory, placed, b, k)
        recomputed = sum(cost[start, stop] for start, stop in placed.segments)
        assert time == recomputed + sum(option.cost for option in taken)


@given(memories(4, 5, worthwhile_stage_memories()), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=100)
def test_the_frontier_with_nested_segments_is_that_of_every_placement_by_its_timeline(
    memory: PrecisionMemory, b: int, k: int
) -> None:
    """Of each stage that runs forward again the cost is 1, and of one that keeps its products its number and 1."""
    length = len(memory.stages)
    units = units_of(memory, b, k, np.triu(np.arange(length + 1) - np.arange(length)[:, None]))
    nest = plan_nest(memory, units, micro_batch_size=b, gradient_accumulation_steps=k)
    solution, constant = nested(nest), constant_bytes(memory, b, k)
    plans = sorted(
        (peak_of_timeline(memory, placed, b, k), cost_of(placed))
        for outer in every_placement(inner(length).tolist(), selectable(memory))
        for placed in every_nested_placement(outer)
    )
    lowest = [min(cost for _, cost in plans[: n + 1]) for n in range(len(plans))]
    falls = [plans[n] for n in range(len(plans)) if n == 0 or lowest[n] < lowest[n - 1]]
    assert [(need + constant, cost) for need, cost in solution.points] == falls
    for need, cost in solution.points:
        placed = solution.placed(need)
        assert (peak_of_timeline(memory, placed, b, k), cost_of(placed)) == (need + constant, cost)


@given(memories(4, 5, worthwhile_stage_memories()), st.integers(1, 4), st.integers(1, 2), st.booleans())
@settings(max_examples=30)
def test_the_solvers_loops_stay_within_their_tables(
    memory: PrecisionMemory, b: int, k: int, in_steps: bool
) -> None:
    """Compiled, an index beyond a table reads whatever lies there; as the loops are written, it raises."""
    length = len(memory.stages)
    units = units_of(memory, b, k, np.triu(np.arange(length + 1) - np.arange(length)[:, None]))
    nest = plan_nest(memory, units, micro_batch_size=b, gradient_accumulation_steps=k)
    with pytest.MonkeyPatch.context() as patch:
        if in_steps:
            patch.setattr(nested_module, "MOST_SLOTS", 0)
        compiled = nested(nest).points
        for name in ("fill_slots", "fill_steps", "_grown"):
            patch.setattr(kernels, name, getattr(kernels, name).py_func)
        assert nested(nest).points == compiled


def cost_of(placed: Placed) -> int:
    return sum(stop - start for start, stop in placed.segments) + sum(
        cost_of_keeping(stage, how) for stage, how in placed.keeping.items()
    )


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_units_of_real_curves_agree_with_the_timeline(name: str, precision: Precision) -> None:
    memory, generator = curves(name, precision), random.Random(4)
    for _ in range(40):
        b, k = generator.choice(BATCH_SIZES), generator.choice((1, 2, 3))
        placed = one_level(memory, generator)
        peak = peak_of_units(units_of(memory, b, k), placed) + constant_bytes(memory, b, k)
        assert peak == peak_of_timeline(memory, placed, b, k)


def one_stage_each(**changes: Curve | AffineBytes | bool) -> StageMemory:
    flat = ((0.0, 0.0),)
    fields = {
        "input": (0.0, 0.0), "saves_input": True, "hold": (0.0, 0.0), "dropped_hold": (0.0, 0.0),
        "carry": (0.0, 0.0), "gradient": (0.0, 0.0), "forward": flat, "recompute": flat,
        "rebuild_first": flat, "rebuild_single": flat, "dropped": flat,
        "dropped_first": flat, "backward_first": flat, "backward_later": flat,
    } | changes  # fmt: skip
    return StageMemory(**fields)  # type: ignore[arg-type]


def test_windows_of_a_plan_worked_out_by_hand() -> None:
    """Three stages that hold 10, 20 and 30 bytes a sample, the middle one recomputed from its input of 4; b = 2.

    Forward: 12, then 2 * 10 held and 5 to drop, then 20 + 2 * 4 held. Backward of the last on top of the same 28. The
    middle one is rebuilt with the carry of 6 arriving, on what the first holds; 7 bytes of gradient stand by then.
    """
    memory = PrecisionMemory(
        parameter_bytes=100, buffer_bytes=0, optimizer_state_bytes=200, other_bytes=0, batch=(0.0, 1.0),
        optimizer=((9.0, 0.0),),
        stages=(
            one_stage_each(hold=(0.0, 10.0), forward=((12.0, 0.0),), backward_first=((50.0, 0.0),)),
            one_stage_each(
                input=(0.0, 4.0), hold=(0.0, 20.0), carry=(6.0, 0.0), dropped_first=((5.0, 0.0),),
                recompute=((99.0, 0.0),), rebuild_single=((41.0, 0.0),), backward_first=((60.0, 0.0),),
            ),
            one_stage_each(
                hold=(0.0, 30.0), gradient=(7.0, 0.0), forward=((61.0, 0.0),), backward_first=((70.0, 0.0),)
            ),
        ),
    )  # fmt: skip
    constant = 100 + 200 + 2
    windows = timeline(
        memory,
        Placed(segments=((1, 2),)),
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        resident_batches=1,
    )
    assert [(w.phase, w.stage, w.total_bytes - constant) for w in windows] == [
        ("forward", 0, 12),
        ("forward", 1, 20 + 5),
        ("forward", 2, 20 + 2 * 4 + 61),
        ("backward", 2, 20 + 2 * 4 + 70),
        ("recompute", 1, 20 + 6 + 7 + 41),
        ("backward", 1, 20 + 60),
        ("backward", 0, 50),
        ("optimizer", 0, 9),
    ]
    assert optimizer_peak_bytes(memory, 2, 1) == constant + 9


@given(st.sets(st.tuples(st.integers(-50, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_the_upper_envelope_is_the_maximum_at_every_micro_batch_size(points: set[tuple[int, int]]) -> None:
    curve = upper_envelope({(float(fixed), float(slope)) for fixed, slope in points})
    for b in range(1, 65):
        assert peak_at(curve, b) == max(fixed + slope * b for fixed, slope in points)


@given(st.sets(st.tuples(st.integers(-50, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_the_upper_envelope_keeps_only_points_that_are_highest_somewhere(
    points: set[tuple[int, int]],
) -> None:
    curve = upper_envelope({(float(fixed), float(slope)) for fixed, slope in points})
    somewhere = [1 + n / 64 for n in range(64 * 120)]
    for point in curve:
        assert any(
            point[0] + point[1] * b >= max(fixed + slope * b for fixed, slope in points) - 1e-9
            for b in somewhere
        )


def test_a_size_is_rounded_to_whole_bytes() -> None:
    assert bytes_at((0.4, 1.5), 3) == 5

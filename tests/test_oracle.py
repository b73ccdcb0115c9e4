"""Formulas against an interpreter that only takes and gives back buffers (and that against real steps: test_memory)."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory import constant_bytes, optimizer_peak_bytes, peak_window, plan_units, timeline
from planner.nested import PLAIN, Placed, Segments
from planner.placement import pareto
from profiler.profile_record import KEEPINGS, PrecisionMemory
from studies.accuracy import selectable
from tests.oracle import HandMade, Layer, Step, walk, windows_of
from tests.profiles import memories

sizes = st.integers(0, 100)


@st.composite
def chains(draw: st.DrawFn, longest: int = 6) -> HandMade:
    def layer() -> Layer:
        return Layer(
            saves_input=draw(st.booleans()),
            saved=tuple(draw(st.lists(sizes, min_size=1, max_size=3))),
            output=draw(sizes),
            leaves=draw(st.sampled_from((0, 0, 7))),
            forward_scratch=draw(sizes),
            backward_scratch=draw(sizes),
            gradient=draw(sizes),
        )

    return HandMade(
        input=draw(sizes),
        layers=tuple(layer() for _ in range(draw(st.integers(1, longest)))),
        constant=draw(sizes),
        state=draw(st.sampled_from((0, 5))),
        optimizer_scratch=draw(sizes),
    )


@st.composite
def segmentations(draw: st.DrawFn, start: int, stop: int) -> Segments:
    """Segments of stages [start, stop), which may touch, with others inside that end before they do."""
    segments: list[tuple[int, int]] = []
    while start < stop:
        end = start + draw(st.integers(1, stop - start))
        if draw(st.booleans()):
            segments += [(start, end), *draw(segmentations(start, end - 1))]
        start = end
    return tuple(segments)


@st.composite
def placements(draw: st.DrawFn, memory: PrecisionMemory) -> Placed:
    """Segments, and stages outside of them that keep their products."""
    segments = draw(segmentations(0, len(memory.stages)))
    recomputed = {stage for start, stop in segments for stage in range(start, stop)}
    taken = [
        (i, KEEPINGS.index(how))
        for i, ways in enumerate(selectable(memory))
        if i not in recomputed and ways and (how := draw(st.none() | st.sampled_from(ways)))
    ]
    return Placed.of(segments, taken)


def composed(memory: PrecisionMemory, placed: Placed, b: int, k: int) -> int:
    return peak_window(
        timeline(memory, placed, micro_batch_size=b, gradient_accumulation_steps=k, resident_batches=k)
    ).total_bytes


@given(st.data(), chains(), st.integers(1, 3))
@settings(max_examples=400)
def test_a_peak_composed_of_single_windows_is_that_of_the_whole_step_run_tensor_by_tensor(
    data: st.DataObject, chain: HandMade, k: int
) -> None:
    segments = data.draw(segmentations(0, len(chain.layers)))
    assert composed(windows_of(chain), Placed(segments=segments), 1, k) == Step(chain).run(segments, k)


def test_plain_layers_behind_a_segment_are_gone_before_it_is_rebuilt() -> None:
    """What a sum of kept activations, segment inputs and the largest segment gets wrong.

    Two layers that save 100 each, a segment of the first, the second kept. Forward: x, 100 and y of the first (each 1)
    one after the other; then x, y and the second's 100 and output. Backward: the second goes before the first returns.
    """
    layer = Layer(
        saves_input=True, saved=(100,), output=1, leaves=0, forward_scratch=0, backward_scratch=0, gradient=0
    )
    chain = HandMade(input=1, layers=(layer, layer), constant=0, state=0, optimizer_scratch=0)
    assert (
        Step(chain).run(((0, 1),), 1) == 1 + 1 + 100 + 1 + 1
    )  # x 0, x 1, saved, x 2 and dx 2 or dx 2 and dx 1
    assert Step(chain).run((), 1) == 1 + 100 + 1 + 100 + 1 + 1
    assert composed(windows_of(chain), Placed(segments=((0, 1),)), 1, 1) == 104
    assert composed(windows_of(chain), PLAIN, 1, 1) == 204


@given(st.data(), memories(), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=200)
def test_any_curves_whatever_compose_as_they_are_walked(
    data: st.DataObject, memory: PrecisionMemory, b: int, k: int
) -> None:
    placed = data.draw(placements(memory))
    assert composed(memory, placed, b, k) == walk(memory, placed, micro_batch_size=b, micro_batches=k)


@given(chains(longest=5), st.integers(1, 2), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_every_point_of_the_frontier_peaks_where_it_says_when_it_is_run(
    chain: HandMade, k: int, generator: random.Random
) -> None:
    length, memory = len(chain.layers), windows_of(chain)
    units = plan_units(
        memory,
        micro_batch_size=1,
        gradient_accumulation_steps=k,
        keep_cost=np.zeros(length, dtype=np.int64),
        segment_cost=np.array([[generator.randint(1, 9) for _ in range(length + 1)] for _ in range(length)]),
        recomputable=np.ones(length, dtype=bool),
    )
    floor = optimizer_peak_bytes(memory, 1, k)
    frontier = pareto(units)
    for index, (peak, _) in enumerate(frontier.points):
        assert max(peak + constant_bytes(memory, 1, k), floor) == Step(chain).run(frontier.segments(index), k)

"""The peak memory of any plan, composed from a profile's curves.

A step is a sequence of windows, and its peak is the highest window. What is alive in a window is

    constant        parameters, buffers, optimizer state, the step's input batches
  + held            what *earlier* stages keep for their backward: everything, or only a segment's input
  + the window      its own curve: its input, what it makes, its gradients, temporaries
  + gradients       all of them from the second micro-batch on; in the first, those of the later stages

    forward           ▁▂▃▄▅▆▇█ loss         held grows with every kept stage
    backward                  █▇▅▃▂▁        a segment is rebuilt here: forward again, then its backward
                            ▲▲▲ recompute

``timeline`` spells this out window by window and is the reference; ``plan_units`` says the same for every
stage and every segment at once, as the placement solver wants it. Until it has run again a segment also keeps the
random state it began with, and while it does the state that it will go back to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from planner.nested import RULED_OUT, Nest, Placed
from planner.placement import Option, Units, ruled_out
from planner.plan import Phase
from profiler.profile_record import KEEPINGS, Keeping, PrecisionMemory, SelectiveMemory, bytes_at, peak_at


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryWindow:
    """The highest moment of one window of a step, with what it is made of, all in bytes."""

    phase: Phase
    micro_batch: int
    stage: int
    constant_bytes: int
    held_bytes: int
    gradient_bytes: int
    own_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.constant_bytes + self.held_bytes + self.gradient_bytes + self.own_bytes


@dataclass(frozen=True, slots=True)
class _Selective:
    """A selective stage's curves at one micro-batch size."""

    forward: int
    hold: int
    rebuild: int

    @classmethod
    def of(cls, memory: SelectiveMemory | None, b: int) -> _Selective | None:
        if memory is None:
            return None
        return cls(peak_at(memory.forward, b), bytes_at(memory.hold, b), peak_at(memory.rebuild, b))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A precision's curves at one micro-batch size, in whole bytes, stage by stage."""

    input: list[int]
    saves_input: list[bool]
    hold: list[int]
    dropped_hold: list[int]
    carry: list[int]
    gradient: list[int]
    forward: list[int]
    recompute: list[int]
    rebuild_first: list[int]
    rebuild_single: list[int]
    dropped: list[int]
    dropped_first: list[int]
    backward_first: list[int]
    backward_later: list[int]
    keeping: dict[Keeping, list[_Selective | None]]
    optimizer: int
    segment: int

    @classmethod
    def of(cls, memory: PrecisionMemory, b: int) -> _Sizes:
        stages = memory.stages
        return cls(
            input=[bytes_at(s.input, b) for s in stages],
            saves_input=[s.saves_input for s in stages],
            hold=[bytes_at(s.hold, b) for s in stages],
            dropped_hold=[bytes_at(s.dropped_hold, b) for s in stages],
            carry=[bytes_at(s.carry, b) for s in stages],
            gradient=[bytes_at(s.gradient, b) for s in stages],
            forward=[peak_at(s.forward, b) for s in stages],
            recompute=[peak_at(s.recompute, b) for s in stages],
            rebuild_first=[peak_at(s.rebuild_first, b) for s in stages],
            rebuild_single=[peak_at(s.rebuild_single, b) for s in stages],
            dropped=[peak_at(s.dropped, b) for s in stages],
            dropped_first=[peak_at(s.dropped_first, b) for s in stages],
            backward_first=[peak_at(s.backward_first, b) for s in stages],
            backward_later=[peak_at(s.backward_later, b) for s in stages],
            keeping={how: [_Selective.of(s.keeping(how), b) for s in stages] for how in KEEPINGS},
            optimizer=peak_at(memory.optimizer, b),
            segment=memory.segment_bytes,
        )

    def rebuilt(self, stage: int, start: int, stop: int) -> int:
        """The highest point of a stage's replay in the segment [start, stop)."""
        if stage == start:
            return self.rebuild_single[stage] if stage == stop - 1 else self.rebuild_first[stage]
        return self.recompute[stage] if stage == stop - 1 else self.forward[stage]


def constant_bytes(memory: PrecisionMemory, micro_batch_size: int, resident_batches: int) -> int:
    """What is alive throughout: parameters, buffers, optimizer state, input batches."""
    return (
        memory.parameter_bytes
        + memory.buffer_bytes
        + memory.optimizer_state_bytes
        + memory.other_bytes
        + resident_batches * bytes_at(memory.batch, micro_batch_size)
    )


def timeline(
    memory: PrecisionMemory,
    placed: Placed,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    resident_batches: int,
) -> Iterator[MemoryWindow]:
    """Every window of a step, in order: the first micro-batch, a later one if there is one, the optimizer.

    Raises ValueError where a selective stage has no curves of its own.
    """
    unknown = [i for i, how in placed.keeping.items() if memory.stages[i].keeping(how) is None]
    if unknown:
        raise ValueError(f"The profile has no curves for stages {unknown} with their products kept.")
    sizes = _Sizes.of(memory, micro_batch_size)
    constant = constant_bytes(memory, micro_batch_size, resident_batches)
    all_gradients = sum(sizes.gradient)
    found = {stage: sizes.keeping[how][stage] for stage, how in placed.keeping.items()}
    selective = {stage: each for stage, each in found.items() if each is not None}
    for micro_batch in range(min(gradient_accumulation_steps, 2)):
        step = _Pass(sizes, constant, micro_batch, placed, selective)
        yield from step.windows(0, len(sizes.hold), 0, ())
    yield MemoryWindow(
        phase="optimizer", micro_batch=0, stage=0, constant_bytes=constant,
        held_bytes=0, gradient_bytes=all_gradients, own_bytes=sizes.optimizer - all_gradients,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Pass:
    """The forward and backward pass of one micro-batch, and the same of each segment as it runs again."""

    sizes: _Sizes
    constant_bytes: int
    micro_batch: int
    placed: Placed
    selective: Mapping[int, _Selective]

    def windows(
        self, start: int, stop: int, held: int, around: tuple[tuple[int, int], ...]
    ) -> Iterator[MemoryWindow]:
        """Of stages [start, stop): all of them, or those of the innermost segment ``around``, while that runs again.

        ``held``: what earlier stages keep, and this segment besides its input. A segment that runs again finds the
        gradient of its end there, the random state that it began with, and that which it will go back to.
        """
        sizes, again = self.sizes, bool(around)
        standing = sum(sizes.gradient) if self.micro_batch else 0
        gradients = self._gradients_behind(stop - 1) if again else standing
        beside = sizes.carry[stop - 1] + 2 * sizes.segment if again else 0
        phase: Phase = "recompute" if again else "forward"
        units: list[tuple[int, int, int]] = []
        inside = self._inside(start, stop, around)
        t = start
        while t < stop:
            end = inside.get(t, t + 1)
            units.append((t, end, held))
            if t in inside:
                held += sizes.segment
                for s in range(t, end):
                    own = sizes.dropped_first[s] if s == t else sizes.dropped[s]
                    yield self._window(phase, s, held + beside, gradients, own)
                    held += sizes.dropped_hold[s] + (sizes.input[s] if s == t else 0)
            elif t in self.selective:
                held += sizes.segment
                yield self._window(phase, t, held, gradients, self.selective[t].forward)
                held += sizes.dropped_hold[t] + sizes.input[t] + self.selective[t].hold
            else:
                own = sizes.rebuilt(t, start, stop) if again else sizes.forward[t]
                yield self._window(phase, t, held + beside, gradients, own)
                held += sizes.hold[t]
                if again and t == start and not sizes.saves_input[t]:
                    beside += sizes.input[t]
            t = end
        backward = sizes.backward_later if self.micro_batch else sizes.backward_first
        for t, end, before in reversed(units):
            if t in inside:
                before += sum(sizes.dropped_hold[t:end])
                yield from self.windows(t, end, before, (*around, (t, end)))
                continue
            if t in self.selective:
                before += sizes.dropped_hold[t]
                beside = sizes.carry[t] + 2 * sizes.segment
                yield self._window(
                    "recompute", t, before + beside, self._gradients_behind(t), self.selective[t].rebuild
                )
            own_gradients = self._gradients_behind(t)
            yield self._window("backward", t, before, own_gradients, backward[t] - own_gradients)

    def _inside(self, start: int, stop: int, around: tuple[tuple[int, int], ...]) -> dict[int, int]:
        """The outermost segments inside of those ``around``: where each begins and ends."""
        found: dict[int, int] = {}
        for first, last in self.placed.segments:
            if start <= first and last <= stop and (first, last) not in around:
                found[first] = max(found.get(first, 0), last)
        outermost: dict[int, int] = {}
        end = start
        for first in sorted(found):
            if first >= end:
                end = outermost[first] = found[first]
        return outermost

    def _gradients_behind(self, stage: int) -> int:
        """Parameter gradients that are there when the backward of a stage begins."""
        return sum(self.sizes.gradient if self.micro_batch else self.sizes.gradient[stage + 1 :])

    def _window(
        self, phase: Phase, stage: int, held_bytes: int, gradient_bytes: int, own_bytes: int
    ) -> MemoryWindow:
        return MemoryWindow(
            phase=phase, micro_batch=self.micro_batch, stage=stage, constant_bytes=self.constant_bytes,
            held_bytes=held_bytes, gradient_bytes=gradient_bytes, own_bytes=own_bytes,
        )  # fmt: skip


def peak_window(windows: Iterator[MemoryWindow]) -> MemoryWindow:
    """The highest window of a timeline."""
    return max(windows, key=lambda window: window.total_bytes)


def optimizer_peak_bytes(memory: PrecisionMemory, micro_batch_size: int, resident_batches: int) -> int:
    """The peak of the optimizer's window, the same for every placement."""
    return constant_bytes(memory, micro_batch_size, resident_batches) + peak_at(
        memory.optimizer, micro_batch_size
    )


def plan_nest(
    memory: PrecisionMemory,
    units: Units,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
) -> Nest:
    """The chain of ``plan_units`` for the solver of nested plans; needs are above what is constant here too.

    Beyond case 0 there is one for each size of input that a segment's first stage does not save, and the last.
    """
    sizes = _Sizes.of(memory, micro_batch_size)
    length = len(sizes.hold)
    accumulates = gradient_accumulation_steps > 1

    def array(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    gradient, backward = array(sizes.gradient), array(sizes.backward_first)
    if accumulates:
        backward = np.maximum(backward, array(sizes.backward_later))
    standing = int(gradient.sum()) if accumulates else 0
    later = np.append(np.cumsum(gradient[::-1])[::-1], 0)
    held = np.append(0, array(sizes.carry)) + (standing if accumulates else later) + 2 * sizes.segment
    held[length] = standing
    allowed = np.triu(units.need < ruled_out(units.need.dtype), 1)
    unsaved = np.where(allowed.any(axis=1) & ~np.array(sizes.saves_input), array(sizes.input), 0)
    beside = np.append(np.unique(np.append(0, unsaved)), 0)
    last = len(beside) - 1
    after_keep = np.repeat(np.arange(last + 1), length).reshape(last + 1, length)
    after_keep[last] = np.searchsorted(beside[:last], unsaved)
    stages = np.arange(length)
    keep_need = np.empty((last + 1, length, length + 1), dtype=np.int64)
    for case, extra in enumerate(beside.tolist()):
        inside, at_end = sizes.forward, sizes.recompute
        if case == last:
            inside, at_end = sizes.rebuild_first, sizes.rebuild_single
        keep_need[case] = array(inside)[:, None] + held + extra
        keep_need[case, stages, stages + 1] = array(at_end) + held[1:] + extra
    keep_need[:, :, length] = array(sizes.forward) + standing
    keep_need = np.maximum(keep_need, backward[:, None])
    dropped_held = np.append(0, np.cumsum(array(sizes.dropped_hold)))
    dropped_total = dropped_held - dropped_held[:-1, None]
    run_need = np.full((length, length + 1), RULED_OUT, dtype=np.int64)
    for i in range(length):
        windows = array(sizes.dropped[i:]) + dropped_total[i, i:length] + sizes.input[i]
        windows[0] = sizes.dropped_first[i]
        run_need[i, i + 1 :] = np.maximum.accumulate(windows) + sizes.segment
    run_need[~allowed] = RULED_OUT
    option_need = np.full((len(KEEPINGS), length), RULED_OUT, dtype=np.int64)
    option_hold, option_cost = np.zeros((2, len(KEEPINGS), length), dtype=np.int64)
    for option in units.options:
        at = option.way, option.stage
        option_need[at], option_hold[at], option_cost[at] = option.need, option.hold, option.cost
    return Nest(
        keep_need=keep_need,
        after_keep=after_keep,
        beside=beside,
        keep_hold=array(sizes.hold),
        keep_cost=units.keep_cost.astype(np.int64),
        run_need=run_need,
        run_hold=units.hold.astype(np.int64),
        run_cost=units.cost.astype(np.int64),
        again_hold=dropped_total,
        again_need=np.where(allowed, units.need, 0),
        held=held,
        end_need=np.zeros(length + 1, dtype=np.int64),
        option_need=option_need,
        option_hold=option_hold,
        option_cost=option_cost,
    )


def plan_units(
    memory: PrecisionMemory,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    keep_cost: np.ndarray,
    segment_cost: np.ndarray,
    recomputable: np.ndarray,
    selective_cost: Mapping[tuple[int, Keeping], int] = MappingProxyType({}),
) -> Units:
    """Need, hold and cost of every kept stage and every segment, for the placement solver.

    ``segment_cost[i, j]`` is the extra time of recomputing stages i..j-1; ``recomputable[i]`` says whether
    stage i may be in a segment. ``selective_cost``: the extra time of stages that may be selective, each of which
    becomes an option. Needs are those of the timeline, above what is constant.
    """
    sizes = _Sizes.of(memory, micro_batch_size)
    length = len(sizes.hold)
    accumulates = gradient_accumulation_steps > 1
    gradient = np.array(sizes.gradient, dtype=np.int64)
    all_gradients = int(gradient.sum())
    standing = all_gradients if accumulates else 0
    later = np.concatenate([np.cumsum(gradient[::-1])[::-1], [0]])
    at_recompute = np.full(length + 1, all_gradients) if accumulates else later

    def array(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    forward, recompute, hold = array(sizes.forward), array(sizes.recompute), array(sizes.hold)
    dropped, carry = array(sizes.dropped), array(sizes.carry)
    backward = array(sizes.backward_first)
    if accumulates:
        backward = np.maximum(backward, array(sizes.backward_later))
    held = np.concatenate([[0], np.cumsum(hold)])
    dropped_held = np.concatenate([[0], np.cumsum(array(sizes.dropped_hold))])

    lowest = np.iinfo(np.int64).min // 4
    need = np.full((length, length + 1), ruled_out(np.dtype(np.int64)), dtype=np.int64)
    holds = np.zeros((length, length + 1), dtype=np.int64)
    for i in range(length):
        stop = i
        while stop < length and recomputable[stop]:
            stop += 1
        if stop == i:
            continue
        span = slice(i, stop)
        ends = slice(i + 1, stop + 1)
        lasting = dropped_held[span] - dropped_held[i]
        forward_need = dropped[span] + lasting + sizes.input[i]
        forward_need[0] = sizes.dropped_first[i]
        forward_need = np.maximum.accumulate(forward_need) + standing + sizes.segment
        inner = held[span] - held[i]
        tape = np.where(np.arange(stop - i) > 0, 0 if sizes.saves_input[i] else sizes.input[i], 0)
        not_last, as_last = forward[span].copy(), recompute[span].copy()
        not_last[0], as_last[0] = sizes.rebuild_first[i], sizes.rebuild_single[i]
        whole = np.concatenate([[lowest], np.maximum.accumulate(not_last + inner + tape)[:-1]])
        rebuilt = np.maximum(whole, as_last + inner + tape) + carry[span] + at_recompute[ends]
        rebuilt += 2 * sizes.segment
        backward_need = np.maximum.accumulate(backward[span] + inner)
        dropped_total = dropped_held[ends] - dropped_held[i]
        need[i, ends] = np.maximum(forward_need, np.maximum(rebuilt, backward_need) + dropped_total)
        holds[i, ends] = sizes.input[i] + dropped_total + sizes.segment
    options = tuple(
        Option(
            stage=i,
            need=max(
                kept.forward + standing + sizes.segment,
                sizes.dropped_hold[i] + kept.rebuild + sizes.carry[i] + int(at_recompute[i + 1])
                + 2 * sizes.segment,
                sizes.dropped_hold[i] + int(backward[i]),
            ),
            hold=kept.hold + sizes.input[i] + sizes.dropped_hold[i] + sizes.segment,
            cost=cost,
            way=KEEPINGS.index(how),
        )
        for (i, how), cost in selective_cost.items()
        if recomputable[i] and (kept := sizes.keeping[how][i]) is not None
    )  # fmt: skip
    return Units(
        options=options,
        keep_need=np.maximum(forward + standing, backward),
        keep_hold=hold,
        keep_cost=keep_cost,
        need=need,
        hold=holds,
        cost=segment_cost,
        terminal_need=int(lowest),  # The loss is a stage; behind it there is nothing.
    )

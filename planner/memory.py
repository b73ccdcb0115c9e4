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
stage and every segment at once, as the placement solver wants it. A segment also keeps the random state it began
with, and while it is replayed the state that it will go back to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.placement import Units, ruled_out
from profiler.profile_record import PrecisionMemory, bytes_at, peak_at

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryWindow:
    """The highest moment of one window of a step, with what it is made of, all in bytes."""

    phase: str
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
    segments: Segments,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    resident_batches: int,
) -> Iterator[MemoryWindow]:
    """Every window of a step, in order: the first micro-batch, a later one if there is one, the optimizer."""
    sizes = _Sizes.of(memory, micro_batch_size)
    constant = constant_bytes(memory, micro_batch_size, resident_batches)
    length = len(sizes.hold)
    start_of = {t: (start, stop) for start, stop in segments for t in range(start, stop)}
    all_gradients = sum(sizes.gradient)

    for micro_batch in range(min(gradient_accumulation_steps, 2)):
        standing = all_gradients if micro_batch else 0
        held = 0
        held_before: list[int] = []
        for t in range(length):
            held_before.append(held)
            if t not in start_of:
                yield MemoryWindow(
                    phase="forward", micro_batch=micro_batch, stage=t, constant_bytes=constant,
                    held_bytes=held, gradient_bytes=standing, own_bytes=sizes.forward[t],
                )  # fmt: skip
                held += sizes.hold[t]
                continue
            first = start_of[t][0] == t
            held += sizes.segment if first else 0
            yield MemoryWindow(
                phase="forward", micro_batch=micro_batch, stage=t, constant_bytes=constant,
                held_bytes=held, gradient_bytes=standing,
                own_bytes=sizes.dropped_first[t] if first else sizes.dropped[t],
            )  # fmt: skip
            held += sizes.dropped_hold[t] + (sizes.input[t] if first else 0)
        backward = sizes.backward_later if micro_batch else sizes.backward_first
        for t in reversed(range(length)):
            later = sum(sizes.gradient[t + 1 :])
            own_gradients = standing if micro_batch else later
            if t in start_of:
                start, stop = start_of[t]
                dropped = sum(sizes.dropped_hold[start:stop])
                before = held_before[start] + dropped + sizes.segment
                if t == stop - 1:
                    for s in range(start, stop):
                        inner = sum(sizes.hold[start:s])
                        if s > start and not sizes.saves_input[start]:
                            inner += sizes.input[start]
                        yield MemoryWindow(
                            phase="recompute", micro_batch=micro_batch, stage=s, constant_bytes=constant,
                            held_bytes=before + inner + sizes.carry[stop - 1] + sizes.segment,
                            gradient_bytes=own_gradients,
                            own_bytes=sizes.rebuilt(s, start, stop),
                        )  # fmt: skip
                held = before + sum(sizes.hold[start:t])
            else:
                held = held_before[t]
            yield MemoryWindow(
                phase="backward", micro_batch=micro_batch, stage=t, constant_bytes=constant,
                held_bytes=held, gradient_bytes=own_gradients, own_bytes=backward[t] - own_gradients,
            )  # fmt: skip
    yield MemoryWindow(
        phase="optimizer", micro_batch=0, stage=0, constant_bytes=constant,
        held_bytes=0, gradient_bytes=all_gradients, own_bytes=sizes.optimizer - all_gradients,
    )  # fmt: skip


def peak_window(windows: Iterator[MemoryWindow]) -> MemoryWindow:
    """The highest window of a timeline."""
    return max(windows, key=lambda window: window.total_bytes)


def optimizer_peak_bytes(memory: PrecisionMemory, micro_batch_size: int, resident_batches: int) -> int:
    """The peak of the optimizer's window, the same for every placement."""
    return constant_bytes(memory, micro_batch_size, resident_batches) + peak_at(
        memory.optimizer, micro_batch_size
    )


def plan_units(
    memory: PrecisionMemory,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    resident_batches: int,
    keep_cost: np.ndarray,
    segment_cost: np.ndarray,
    recomputable: np.ndarray,
) -> Units:
    """Need, hold and cost of every kept stage and every segment, for the placement solver.

    ``segment_cost[i, j]`` is the extra time of recomputing stages i..j-1; ``recomputable[i]`` says whether
    stage i may be in a segment. Needs are absolute: constant included.
    """
    sizes = _Sizes.of(memory, micro_batch_size)
    constant = constant_bytes(memory, micro_batch_size, resident_batches)
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
        backward_need = np.maximum.accumulate(backward[span] + inner) + sizes.segment
        dropped_total = dropped_held[ends] - dropped_held[i]
        need[i, ends] = constant + np.maximum(
            forward_need, np.maximum(rebuilt, backward_need) + dropped_total
        )
        holds[i, ends] = sizes.input[i] + dropped_total + sizes.segment
    return Units(
        keep_need=constant + np.maximum(forward + standing, backward),
        keep_hold=hold,
        keep_cost=keep_cost,
        need=need,
        hold=holds,
        cost=segment_cost,
        terminal_need=0,
    )

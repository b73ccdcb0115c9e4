"""Checkpoints inside checkpoints: exact placement where what runs again may itself recompute, for every budget.

A stretch of stages [i, j) whose input is there is worked off, forward and backward, by a plan of this grammar:

    plan(i, j)  :=  forward of i, kept    plan(i+1, j)   backward of i        (at j = L also: treated in other ways)
                 |  forward of i .. k-1   plan(k, j)     plan(i, k)        [i, k) is a segment, run again by a plan
    plan(j, j)  :=  nothing, or the loss at the end of the chain

``least[i, j](a)`` is the least cost of a plan(i, j) in a bytes, while whoever waits for it holds the gradient of its
end. Both lines above ask for shorter stretches only:

    least[i, j](a) = min( keep_cost[i] + least[i+1, j](a - keep_hold[i])         where a >= keep_need[i, j],
                          min over k of  run_cost[i, k] + least[k, j](a - run_hold[i, k])
                                         + least[i, k](a - again_hold[i, k])     where a >= run_need[i, k] + held[j] )

Every plan is one way through these two lines, so least[0, L] is the complete frontier, and its own proof.

What a forward needs as a segment runs again may depend on how the segment began, so a stretch comes in *cases*,
``least[c, i, j]``, of which a chain has those that differ:

    0       stages ran before i, or nothing runs again
    1 ..    the same, and the segment's input stays beside every forward, since its first stage saved none of it
    last    the segment begins at i, and finds nothing of the stage before

A stretch behind a kept stage is in the case ``after_keep`` of it. One behind a segment is in the same case, in case 0
where that segment was the first; and a segment runs again in the last case. A function is held in one of two ways, both
exact:

    slots   its value at every multiple of the sizes' common unit, where there are few of them
    steps   the points where it falls, where the sizes are odd numbers of bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.profile_record import KEEPINGS, Keeping

Integers = NDArray[np.int64]

MOST_SLOTS = 4096
"""With more multiples of the common unit than this, steps are faster."""

KEPT, OPTION = -1, -2
"""In the place of a segment's end: a stage that is in none. ``OPTION`` and what is below it: treated in another way."""

RULED_OUT = -1
"""The ``run_need`` of a segment that is not allowed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Nest:
    """What the recursion must know of a chain of L stages, in whole numbers; entries with j <= i are never read."""

    keep_need: Integers
    """[c, i, j]: the worst moment of stage i kept, forward or backward, in a plan that ends before j."""
    after_keep: Integers
    """[c, i]: the case behind stage i kept in case c."""
    beside: Integers
    """[c]: what stays beside every forward that keeps nothing."""
    keep_hold: Integers
    """[i]: what a kept stage holds from its forward to its backward."""
    keep_cost: Integers
    run_need: Integers
    """[i, k]: the worst moment of the forward that keeps nothing of [i, k), or ``RULED_OUT``; L x (L + 1)."""
    run_hold: Integers
    """[i, k]: what segment [i, k) holds until it runs again."""
    run_cost: Integers
    """[i, k]: the cost of running [i, k) once more."""
    again_hold: Integers
    """[i, k]: what is held besides while segment [i, k) runs again; L x (L + 1)."""
    again_need: Integers
    """[i, k]: the worst moment of running segment [i, k) again, forward and backward, with every stage kept."""
    held: Integers
    """[j]: what is held for whoever waits for a plan that ends before j; L + 1 values."""
    end_need: Integers
    """[j]: what the empty plan at j needs; at [L] that is what the loss needs."""
    option_need: Integers
    """[w, i]: the worst moment of stage i treated in the way w, outside of all segments, or ``RULED_OUT``."""
    option_hold: Integers
    option_cost: Integers

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """[i, k]: whether there may be a segment [i, k)."""
        return np.triu(self.run_need != RULED_OUT, 1)


Segments = tuple[tuple[int, int], ...]
"""Half-open ranges of stages, each before those inside of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Where a plan recomputes: ``segments``, and stages outside of them that keep some of what they make, by how."""

    segments: Segments = ()
    selective: tuple[int, ...] = ()
    selective_narrow: tuple[int, ...] = ()

    @classmethod
    def of(cls, segments: Segments, ways: Iterable[tuple[int, int]]) -> Placed:
        """``ways``: pairs of a stage and the number of the way in ``KEEPINGS``."""
        kept: dict[Keeping, list[int]] = {how: [] for how in KEEPINGS}
        for stage, way in ways:
            kept[KEEPINGS[way]].append(stage)
        return cls(segments=segments, **{how: tuple(stages) for how, stages in kept.items()})

    @property
    def keeping(self) -> dict[int, Keeping]:
        """The selective stages, each with what it keeps."""
        wide: dict[int, Keeping] = dict.fromkeys(self.selective, "selective")
        return wide | dict.fromkeys(self.selective_narrow, "selective_narrow")


PLAIN = Placed()
"""Nothing is recomputed."""


def depths(segments: Segments) -> tuple[int, ...]:
    """In how many others each segment lies; they come as ``Solution.segments`` gives them, outer before inner ones."""
    around: list[tuple[int, int]] = []
    found = []
    for start, stop in segments:
        while around and not (around[-1][0] <= start and stop <= around[-1][1]):
            around.pop()
        found.append(len(around))
        around.append((start, stop))
    return tuple(found)


class Solution:
    """All of ``least``; ``points`` is the frontier of (need, cost), needs rising and costs falling."""

    def __init__(self, nest: Nest, table: _Slots | _Steps) -> None:
        self._nest = nest
        self._length = len(nest.keep_cost)
        self._table = table
        self._last = len(nest.beside) - 1
        self.points = tuple(table.steps(self._length))

    def placed(self, need: int) -> Placed:
        """A fastest plan within ``need``."""
        segments: list[tuple[int, int]] = []
        options: list[tuple[int, int]] = []
        self._walk(0, 0, self._length, need, segments, options)
        return Placed.of(tuple(segments), options)

    def _walk(
        self, case: int, i: int, j: int, room: int, segments: list[tuple[int, int]],
        options: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        nest = self._nest
        while i < j:
            k = self._unit_end(case, i, j, room)
            if k == KEPT:
                room -= int(nest.keep_hold[i])
                case = int(nest.after_keep[case, i])
                i += 1
            elif k <= OPTION:
                way = OPTION - k
                options.append((i, way))
                room -= int(nest.option_hold[way, i])
                i += 1
            else:
                segments.append((i, k))
                self._walk(self._last, i, k, room - int(nest.again_hold[i, k]), segments, options)
                room -= int(nest.run_hold[i, k])
                case = self._behind(case)
                i = k

    def _behind(self, case: int) -> int:
        """The case behind a segment."""
        return 0 if case == self._last else case

    def _unit_end(self, case: int, i: int, j: int, room: int) -> int:
        """Where the segment that begins at i ends in an optimal plan(i, j); or ``KEPT``, or ``OPTION`` less the way."""
        nest, least = self._nest, self._table.least
        cost = least(case, i, j, room)
        kept = least(int(nest.after_keep[case, i]), i + 1, j, room - int(nest.keep_hold[i]))
        if room >= nest.keep_need[case, i, j] and kept + int(nest.keep_cost[i]) == cost:
            return KEPT
        for way in range(len(nest.option_need) if j == self._length else 0):
            if 0 <= nest.option_need[way, i] <= room:
                rest = least(case, i + 1, j, room - int(nest.option_hold[way, i]))
                if rest + int(nest.option_cost[way, i]) == cost:
                    return OPTION - way
        for k in range(i + 1, j):
            if 0 <= nest.run_need[i, k] <= room - nest.held[j] - nest.beside[case]:
                rest = least(self._behind(case), k, j, room - int(nest.run_hold[i, k]))
                again = least(self._last, i, k, room - int(nest.again_hold[i, k]))
                if rest + again + int(nest.run_cost[i, k]) == cost:
                    return k
        raise AssertionError(f"no plan leads through the table of stages {i} to {j} at {room}")


def nested(nest: Nest) -> Solution:
    """Any depth of segments inside segments."""
    return Solution(nest, _Slots.of(nest) or _Steps.of(nest))


def single_level(nest: Nest) -> Solution | None:
    """Segments with nothing but kept stages inside; None where a common unit of the sizes is too small for slots."""
    slots = _Slots.of(nest, single=True)
    return None if slots is None else Solution(nest, slots)


def _pairs(last: int) -> int:
    """How many pairs i <= j there are up to j = ``last``, in the order of j and then i."""
    return (last + 1) * (last + 2) // 2


def _common_unit(nest: Nest) -> int:
    """The greatest size of which all sizes that are read are multiples."""
    above = np.triu(np.ones_like(nest.keep_need[0], dtype=bool), 1)
    options = nest.option_need != RULED_OUT
    read = (
        nest.keep_need[:, above].ravel(), nest.keep_hold, nest.beside, nest.run_need[nest.allowed],
        nest.run_hold[nest.allowed], nest.again_hold[nest.allowed], nest.again_need[nest.allowed], nest.held,
        nest.end_need, nest.option_need[options], nest.option_hold[options],
    )  # fmt: skip
    return int(np.gcd.reduce(np.concatenate(read))) or 1


@dataclass(frozen=True, slots=True)
class _Slots:
    """``rows[c, j (j + 1) / 2 + i, a]``: least[c, i, j] of ``a`` units; ``never`` where there is no plan.

    With a single level there is one case, and ``rows[0, i]`` is for j = L; a segment runs again in ``again_need``, at a
    cost of ``whole``.
    """

    rows: NDArray[Any]
    unit: int
    never: int
    again_need: Integers
    whole: Integers

    @classmethod
    def of(cls, nest: Nest, single: bool = False) -> _Slots | None:
        """None for a chain with too many slots."""
        unit = _common_unit(nest)
        room = int(nest.end_need[-1])
        at_the_top = nest.keep_need[0, :, -1]
        for need, hold in zip(at_the_top[::-1].tolist(), nest.keep_hold[::-1].tolist(), strict=True):
            room = max(need, room + hold)
        slots = room // unit + 1
        if slots > MOST_SLOTS:
            return None
        length = len(nest.keep_cost)
        # A plan of n stages runs none of them forward more than n times.
        again = nest.run_cost[nest.allowed].max(initial=0)
        longest = int(np.vstack((nest.keep_cost, nest.option_cost)).max(axis=0).sum() + length * again)
        dtype = np.int32 if longest < 2**28 else np.int64
        never = 2 * longest + 1
        cases = len(nest.beside)
        rows = np.empty((cases, length + 1 if single else _pairs(length), slots), dtype)
        from planner.kernels import fill_slots

        def units(sizes: Integers) -> Integers:
            return np.where(sizes == RULED_OUT, RULED_OUT, sizes // unit)

        fill_slots(
            units(nest.keep_need), nest.after_keep, units(nest.beside), units(nest.keep_hold),
            nest.keep_cost.astype(dtype), units(nest.run_need), units(nest.run_hold), nest.run_cost.astype(dtype),
            units(nest.again_hold), units(nest.again_need), units(nest.held), units(nest.end_need),
            units(nest.option_need), units(nest.option_hold), nest.option_cost.astype(dtype), dtype(never), rows,
        )  # fmt: skip
        return cls(rows, unit, never, nest.again_need, np.insert(nest.keep_cost.cumsum(), 0, 0))

    def least(self, case: int, i: int, j: int, room: int) -> float:
        if room < 0:
            return math.inf
        length = len(self.whole) - 1
        base = _pairs(j - 1)
        if self.rows.shape[1] == length + 1:
            if j < length:
                return int(self.whole[j] - self.whole[i]) if room >= self.again_need[i, j] else math.inf
            base = 0
        cost = int(self.rows[case, base + i, min(room // self.unit, self.rows.shape[2] - 1)])
        return math.inf if cost >= self.never else cost

    def steps(self, length: int) -> Iterator[tuple[int, int]]:
        row = self.rows[0, 0 if self.rows.shape[1] == length + 1 else _pairs(length - 1)]
        falls = np.concatenate(([True], row[1:] < row[:-1])) & (row < self.never)
        for slot in np.flatnonzero(falls).tolist():
            yield slot * self.unit, int(row[slot])


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of least[c, i, j] are needs and costs from ``begin[c, i, j]`` to ``end[c, i, j]``."""

    needs: Integers
    costs: Integers
    begin: Integers
    end: Integers

    @classmethod
    def of(cls, nest: Nest) -> _Steps:
        from planner.kernels import fill_steps

        arguments = (getattr(nest, each.name) for each in fields(nest) if each.name != "again_need")
        return cls(*fill_steps(*arguments))

    def least(self, case: int, i: int, j: int, room: int) -> float:
        begin, end = self.begin[case, i, j], self.end[case, i, j]
        at = begin + int(np.searchsorted(self.needs[begin:end], room, side="right")) - 1
        return math.inf if at < begin else int(self.costs[at])

    def steps(self, length: int) -> Iterator[tuple[int, int]]:
        span = slice(int(self.begin[0, 0, length]), int(self.end[0, 0, length]))
        yield from zip(self.needs[span].tolist(), self.costs[span].tolist(), strict=True)

"""Which stages to recompute: exact checkpoint placement on a chain, for every memory budget at once.

A plan cuts the chain into consecutive *units*. A unit is one stage kept as it is, or a segment of stages
that stores only its output on the way forward and runs forward again on the way back:

    stages    0    1    2    3    4    5
    units   [kept][  segment  ][kept][kept]  loss

Three numbers say all that the rest of the chain must know about a unit u:

    need   bytes at its worst moment, forward or backward, on top of what the units before it hold
    hold   bytes it holds for everything after it, from its forward to its backward
    cost   the time it takes

While a unit works, the units before it hold and the units after it do not, so a plan u_1 .. u_n peaks at
max over m of (hold_1 + .. + hold_(m-1) + need_m), and it costs the sum of its costs. Read from the right,
that is a recursion on (need, cost) pairs, with (terminal need, 0) for the loss behind the last stage:

    D_i = Pareto set, over units u = [i, j) and (n, c) in D_j, of (max(need_u, hold_u + n), cost_u + c)

Both components are monotone in (n, c), so a pair that another beats in D_j can only lead to pairs that are
beaten in D_i: nothing is lost by dropping it, and D_0 is the complete frontier of (peak, cost). That is
the principle of optimality with two criteria, and the proof that every answer here is optimal.

`pareto` is that recursion, for whoever brings units. `Chain`, `frontier` and `place` bring the units of a
chain given by the sizes and times of its stages, as in Beaumont et al., "Optimal checkpointing for
heterogeneous chains" (arXiv 1911.13214), with one level of recomputation, or as many as pay (planner/nested.py).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from planner import nested as tables
from planner.nested import RULED_OUT, Nest, Segments, depths

Numbers = NDArray[np.number[Any]]
Schedule = tuple[tuple[str, int], ...]

KEPT, RECOMPUTED, FIRST_OPTION = range(3)

COMPILED_FROM_STAGES = 64
"""The recursion over shorter chains takes milliseconds in numpy, less than it takes to load a compiled one. Once that
is loaded, a frontier takes a quarter of them with it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One more unit of a single stage; ``way`` tells those of the same stage apart."""

    stage: int
    need: float
    hold: float
    cost: float
    way: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Units:
    """Every unit of a chain of L stages: entry [i, j] of the L x (L + 1) arrays is the segment [i, j).

    Integers are exact; floats are added as they come (see `exactly_summable`). A segment whose need is
    `ruled_out` is not allowed. Entries with j <= i are never read.
    """

    need: Numbers
    hold: Numbers
    cost: Numbers
    keep_need: Numbers
    keep_hold: Numbers
    keep_cost: Numbers
    terminal_need: float
    options: tuple[Option, ...] = ()
    """Further ways to treat single stages, besides keeping and recomputing them."""

    def __post_init__(self) -> None:
        length = len(self.keep_need)
        for name in ("need", "hold", "cost", "keep_need", "keep_hold", "keep_cost"):
            shape = (length,) if name.startswith("keep_") else (length, length + 1)
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} of {length} stages must have the shape {shape}, got {found}. "
                    f"keep_need has one value per stage and sets the number of stages."
                )
        if not (np.isfinite(self.keep_need).all() and math.isfinite(self.terminal_need)):
            raise ValueError(
                "keep_need and terminal_need must be finite, got an infinity or a NaN. "
                "Only segments can be ruled out; a stage can always be kept."
            )

    def same_as(self, other: Units) -> bool:
        """Whether every number and every option is, and so the frontier."""
        if (self.terminal_need, self.options) != (other.terminal_need, other.options):
            return False
        names = ("keep_need", "keep_hold", "keep_cost", "need", "hold", "cost")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frontier:
    """Every plan worth having: the peaks rise, the costs fall, and no plan at all beats a point in both.

    The labels behind the points are the members of D_L, D_(L-1), .., D_0 in this order; each knows the
    stage where its first unit starts, the label that follows this unit, and what it is: `KEPT`, `RECOMPUTED`, or
    from `FIRST_OPTION` on the option of that number.
    """

    points: tuple[tuple[float, float], ...]
    label_stage: NDArray[np.intp] = field(repr=False)
    label_next: NDArray[np.intp] = field(repr=False)
    label_kind: NDArray[np.intp] = field(repr=False)

    def segments(self, index: int) -> Segments:
        """The recomputed half-open ranges of stages of the plan behind `points[index]`."""
        return tuple((start, stop) for start, stop, kind in self._units(index) if kind == RECOMPUTED)

    def options(self, index: int) -> tuple[int, ...]:
        """Which of the units' options the plan behind `points[index]` takes."""
        return tuple(kind - FIRST_OPTION for _, _, kind in self._units(index) if kind >= FIRST_OPTION)

    def _units(self, index: int) -> Iterator[tuple[int, int, int]]:
        label = range(len(self.label_stage) - len(self.points), len(self.label_stage))[index]
        while label != 0:
            following = int(self.label_next[label])
            yield int(self.label_stage[label]), int(self.label_stage[following]), int(self.label_kind[label])
            label = following


def ruled_out(dtype: np.dtype[Any]) -> float:
    """The need of a segment that is not allowed: infinity, or the largest integer of the type."""
    return math.inf if dtype.kind == "f" else int(np.iinfo(dtype).max)


def pareto(units: Units) -> Frontier:
    """The complete frontier of (peak, cost) over all plans made of `units`.

    Of labels that agree in need and cost, the one with fewer recomputed stages stays, then the one with
    fewer segments. Behind a unit, all labels that fit into the unit's own need lead to the same need, so
    the cheapest of them stands for all: that keeps the candidates few.
    """
    length = len(units.keep_need)
    terminal = np.array([units.terminal_need])
    sizes = np.result_type(units.need, units.hold, units.keep_need, units.keep_hold, terminal, np.int64)
    times = np.result_type(units.cost, units.keep_cost, np.int64)

    # Column i of row i, the segment without stages, takes the kept stage: row i from there on is every unit.
    allowed = units.need < ruled_out(units.need.dtype)
    np.fill_diagonal(allowed, True)
    need = _with_diagonal(units.need, units.keep_need, sizes)
    hold = _with_diagonal(units.hold, units.keep_hold, sizes)
    cost = _with_diagonal(units.cost, units.keep_cost, times)
    recomputed = np.arange(length + 1) - np.arange(length)[:, None]
    effort = recomputed * (length + 1) + (recomputed > 0)
    options: list[list[int]] = [[] for _ in range(length)]
    for number, option in enumerate(units.options):
        options[option.stage].append(number)

    needs: list[list[float]] = [[]] * length + [terminal.tolist()]  # Of the labels of D_j, at [j].
    first = np.zeros(length + 1, np.intp)  # Where the labels of D_j begin in the arrays of all labels.
    label_need, label_cost, label_effort = terminal.astype(sizes), np.zeros(1, times), np.zeros(1, np.int64)
    label_next, label_kind = [np.zeros(1, np.intp)], [np.zeros(1, np.intp)]

    for i in reversed(range(length)):
        column = allowed[i, i:].nonzero()[0] + i
        after = np.maximum(column, i + 1)
        kind = np.where(column > i, RECOMPUTED, KEPT)
        unit_need, unit_hold, unit_cost = need[i, column], hold[i, column], cost[i, column]
        unit_effort = effort[i, column]
        if options[i]:
            more = [units.options[number] for number in options[i]]
            after = np.append(after, np.full(len(more), i + 1))
            kind = np.append(kind, np.array(options[i]) + FIRST_OPTION)
            unit_need = np.append(unit_need, np.array([option.need for option in more], sizes))
            unit_hold = np.append(unit_hold, np.array([option.hold for option in more], sizes))
            unit_cost = np.append(unit_cost, np.array([option.cost for option in more], times))
            unit_effort = np.append(unit_effort, np.full(len(more), effort[i, i + 1]))
        room = (unit_need - unit_hold).tolist()
        fitting = [bisect_right(needs[j], most) for j, most in zip(after.tolist(), room, strict=True)]
        skipped = np.maximum(np.array(fitting) - 1, 0)
        count = np.array([len(needs[j]) for j in after.tolist()]) - skipped

        unit = np.arange(len(after)).repeat(count)
        following = np.arange(len(unit)) + (first[after] + skipped + count - count.cumsum())[unit]
        candidate_need = np.maximum(unit_need[unit], unit_hold[unit] + label_need[following])
        candidate_cost = unit_cost[unit] + label_cost[following]
        cheaper = _falling(candidate_need, candidate_cost)
        unit, following = unit[cheaper], following[cheaper]
        candidate_need, candidate_cost = candidate_need[cheaper], candidate_cost[cheaper]
        candidate_effort = unit_effort[unit] + label_effort[following]
        chosen = _undominated(candidate_need, candidate_cost, candidate_effort)

        needs[i] = candidate_need[chosen].tolist()
        first[i] = len(label_need)
        label_need = np.concatenate((label_need, candidate_need[chosen]))
        label_cost = np.concatenate((label_cost, candidate_cost[chosen]))
        label_effort = np.concatenate((label_effort, candidate_effort[chosen]))
        label_next.append(following[chosen])
        label_kind.append(kind[unit[chosen]])

    return Frontier(
        points=tuple(zip(needs[0], label_cost[first[0] :].tolist(), strict=True)),
        label_stage=np.arange(length, -1, -1).repeat([len(labels) for labels in label_next]),
        label_next=np.concatenate(label_next),
        label_kind=np.concatenate(label_kind),
    )


def _with_diagonal(table: Numbers, diagonal: Numbers, dtype: DTypeLike) -> Numbers:
    filled = table.astype(dtype)
    np.fill_diagonal(filled, diagonal)
    return filled


def _falling(need: Numbers, cost: Numbers) -> NDArray[np.intp]:
    """Indices by increasing need of those that cost no more than any before: few, with the Pareto set among them."""
    order: NDArray[np.intp] = need.argsort(kind="stable")  # Merges: the needs come as sorted runs.
    costs = cost[order]
    falling: NDArray[np.intp] = order[costs == np.minimum.accumulate(costs)]
    return falling


def _undominated(need: Numbers, cost: Numbers, effort: Numbers) -> NDArray[np.intp]:
    """Indices of the Pareto set, by increasing need; of equal candidates the one with the least effort."""
    order = np.lexsort((effort, cost, need))
    lowest = np.minimum.accumulate(cost[order])
    improves = np.concatenate(([True], lowest[1:] < lowest[:-1]))
    return order[improves]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Stages 0 .. L-1, each turning x_i into x_(i+1); sizes in any one unit, times in any one unit.

    Integers are exact. Floats are first rounded to about 2**-51 of their total (see `exactly_summable`).
    """

    forward: tuple[float, ...]
    """f_i: time of the forward of stage i, the same with and without gradients."""
    backward: tuple[float, ...]
    """b_i: time of the backward of stage i."""
    input: tuple[float, ...]
    """x_i, i = 0 .. L: size of what enters stage i, and of its gradient y_i; x_L is the last output."""
    kept: tuple[float, ...]
    """xb_i: all that stage i keeps for its backward, with its output x_(i+1), without its input x_i."""
    forward_transient: tuple[float, ...]
    """tf_i: further memory while the forward of stage i runs."""
    backward_transient: tuple[float, ...]
    """tb_i: further memory while the backward of stage i runs."""

    def __post_init__(self) -> None:
        length = len(self.forward)
        if length == 0:
            raise ValueError("A chain must have at least one stage, got none: forward is empty.")
        for each in fields(self):
            values = getattr(self, each.name)
            expected = length + (each.name == "input")
            if len(values) != expected:
                raise ValueError(
                    f"{each.name} must have {expected} values for {length} stages, got {len(values)}. "
                    f"Give one per stage, as forward does, and for input the size of the last output as well."
                )
            for i, value in enumerate(values):
                if not 0 <= value < math.inf:
                    raise ValueError(
                        f"{each.name} must be finite and not negative, got {each.name}[{i}] = {value}. "
                        f"Give 0 where there is nothing to count."
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The fastest plan within a budget: its time, its peak, what it recomputes, and how it runs.

    `segments` are half-open ranges of stages, each before those inside it. `schedule` lists the operations:
    ("Fe", i) runs the forward of stage i and keeps what its backward needs, ("Fc", i) keeps only the input,
    ("Fn", i) not even that, ("B", i) runs the backward, and ("Loss", L) turns the last output into its gradient.
    """

    cost: float
    peak: float
    segments: Segments
    schedule: Schedule

    @property
    def lower_bound(self) -> float:
        """What no plan within the budget can beat: `cost` itself, because the recursion is exact.

        A plan is dropped only for one that needs no more and costs no more from the same stage on, and
        can replace it behind every beginning. So nothing within the budget costs less.
        """
        return self.cost


def frontier(chain: Chain, nested: bool = False) -> tuple[tuple[float, float], ...]:
    """Every (peak, cost) worth having, by increasing peak: the optimum for every budget at once.

    The optimum for a budget is the last point whose peak fits; below the first point nothing fits.
    `nested`: what is recomputed may itself recompute.
    """
    compiled_from = 0 if "planner.kernels" in sys.modules else COMPILED_FROM_STAGES
    return _solved(chain, nested, compiled_from).points


def place(chain: Chain, memory_budget: float, nested: bool = False) -> Placement | None:
    """The fastest plan whose peak is at most `memory_budget`; None where there is no such plan."""
    solved = _solved(chain, nested)
    fitting = sum(peak <= memory_budget for peak, _ in solved.points)
    if fitting == 0:
        return None
    peak, cost = solved.points[fitting - 1]
    segments = solved.segments(fitting - 1)
    schedule = _schedule(len(chain.forward), segments)
    return Placement(cost=cost, peak=peak, segments=segments, schedule=schedule)


def _solved(chain: Chain, nested: bool, compiled_from: int = COMPILED_FROM_STAGES) -> Frontier | _FromTables:
    """By whatever is fastest: all are exact. Of plans that need and cost the same, two ways may take different ones."""
    if not nested and len(chain.forward) < compiled_from:
        return pareto(chain_units(chain))
    (f, b), time_shift = _whole(chain.forward, chain.backward)
    (x, xb, tf, tb), size_shift = _whole(
        chain.input, chain.kept, chain.forward_transient, chain.backward_transient
    )
    nest = _nest(f, b, x, xb, tf, tb)
    solution = tables.nested(nest) if nested else tables.single_level(nest)
    if solution is None:
        return pareto(chain_units(chain))
    points = tuple(
        (_scaled(int(x[0]) + need, -size_shift), _scaled(cost, -time_shift)) for need, cost in solution.points
    )
    return _FromTables(points, solution)


@dataclass(frozen=True, slots=True)
class _FromTables:
    """A frontier read from tables that leave out x_0 and are in whole numbers."""

    points: tuple[tuple[float, float], ...]
    solution: tables.Solution

    def segments(self, index: int) -> Segments:
        return self.solution.placed(self.solution.points[index][0]).segments


def _whole(*values: ArrayLike) -> tuple[tuple[NDArray[np.int64], ...], int]:
    """The values as whole numbers of 2**-shift: integers as they are, floats to about 2**-51 of their total.

    So much can be added L times over, as deep plans do, without leaving 63 bits.
    """
    arrays = tuple(np.asarray(each) for each in values)
    total = math.fsum(array.sum(dtype=np.float64) for array in arrays)
    if all(array.dtype.kind in "iu" for array in arrays) and total * len(arrays[0]) < 2**62:
        return tuple(array.astype(np.int64) for array in arrays), 0
    shift = 51 - math.frexp(total)[1]
    return tuple(
        np.rint(np.ldexp(array.astype(np.float64), shift)).astype(np.int64) for array in arrays
    ), shift


def _scaled(value: int, shift: int) -> float:
    return value if shift == 0 else math.ldexp(value, shift)


def chain_units(chain: Chain) -> Units:
    """The needs, holds and times of a chain's units, with x_0, which everything holds, in every need.

    A kept stage runs Fe(i) and later, with y_(i+1) there, B(i). It holds xb_i. A segment [i, j) holds x_j:

        forward        Fc(i)           x_(i+1) + tf_i
                       Fn(k), k > i    x_k + x_(k+1) + tf_k
        recomputation  Fe(k)           y_j + xb_i + .. + xb_k + tf_k
        backward       B(k)            xb_i + .. + xb_k + y_(k+1) + y_k + tb_k

    The maximum over the k in [i, j) is a running maximum along row i, and of the recomputation only y_j
    depends on j. A segment that ends at L is not allowed: its recomputation starts right after the loss and
    holds all its stages at once, so keeping them all needs no more, and saves a forward each.
    """
    forward, backward = exactly_summable(chain.forward, chain.backward)
    inputs, kept, forward_transient, backward_transient = exactly_summable(
        chain.input, chain.kept, chain.forward_transient, chain.backward_transient
    )
    length = len(forward)
    x, y = inputs[:-1], inputs[1:]
    held = np.insert(kept.cumsum(), 0, 0)
    grown = held[1:] - held[:-1, None]
    entering = np.where(np.eye(length, dtype=bool), 0, x)  # The unit before holds x_i already.
    recomputation = _running_maximum(grown + forward_transient) + y
    otherwise = _running_maximum(
        np.maximum(entering + y + forward_transient, grown + x + y + backward_transient)
    )
    need = np.full((length, length + 1), ruled_out(y.dtype), y.dtype)
    need[:, 1:length] = (inputs[0] + np.maximum(recomputation, otherwise))[:, :-1]
    elapsed = np.insert((2 * forward + backward).cumsum(), 0, 0)
    return Units(
        need=need,
        hold=np.broadcast_to(inputs, need.shape),
        cost=elapsed - elapsed[:-1, None],
        keep_need=inputs[0] + kept + np.maximum(forward_transient, x + y + backward_transient),
        keep_hold=kept,
        keep_cost=forward + backward,
        terminal_need=(inputs[0] + inputs[-1]).item(),
    )


def _nest(f: Any, b: Any, x: Any, xb: Any, tf: Any, tb: Any) -> Nest:
    """A chain's numbers for the tables; x_i is held by whoever came before, and counted there.

    A kept stage runs Fe(i) beside the gradient y_j of the plan's end, and later B(i). The rest is as in `chain_units`,
    with the forward of a segment and its second run apart.
    """
    length = len(f)
    held = np.append(x[:-1], 0)
    through = np.insert(xb.cumsum(), 0, 0)
    grown = through[1:] - through[:-1, None]
    entering = np.where(np.eye(length, dtype=bool), 0, x[:-1])
    run_need = np.full((length, length + 1), RULED_OUT)
    run_need[:, 1:length] = _running_maximum(entering + x[1:] + tf)[:, :-1]
    run_need[np.tril_indices(length, 0, length + 1)] = RULED_OUT
    again_need = np.zeros((length, length + 1), np.int64)
    again_need[:, 1:] = np.maximum(
        _running_maximum(grown + tf) + held[1:], _running_maximum(grown + x[:-1] + x[1:] + tb)
    )
    elapsed = np.insert(f.cumsum(), 0, 0)
    return Nest(
        keep_need=np.maximum(held + (xb + tf)[:, None], (x[1:] + xb + x[:-1] + tb)[:, None])[None],
        after_keep=np.zeros((1, length), np.int64),
        beside=np.zeros(1, np.int64),
        keep_hold=xb,
        keep_cost=f + b,
        run_need=run_need,
        run_hold=np.broadcast_to(x, (length, length + 1)).copy(),
        run_cost=elapsed - elapsed[:-1, None],
        again_hold=np.zeros((length, length + 1), np.int64),
        again_need=again_need,
        held=held,
        end_need=x,
        option_need=np.full((0, length), RULED_OUT),
        option_hold=np.zeros((0, length), np.int64),
        option_cost=np.zeros((0, length), np.int64),
    )


def _running_maximum(table: Numbers) -> Numbers:
    """At [i, k] the maximum over the columns i .. k of row i."""
    return np.maximum.accumulate(np.triu(table), axis=1)


def exactly_summable(*values: ArrayLike) -> tuple[Numbers, ...]:
    """The values as arrays in which sums are exact, so that plans of equal cost compare equal.

    Integers stay integers. Floats, and integers beyond 2**61 in total, are rounded to multiples of one
    power of two, at most 2**-51 of their total: four times the total of such multiples still fits into the
    53 bits of a float, and no sum of them rounds.
    """
    arrays = tuple(np.asarray(each) for each in values)
    room = 4 * math.fsum(np.abs(array).sum(dtype=np.float64) for array in arrays)
    if all(array.dtype.kind in "iu" for array in arrays) and room < 2**63:
        return tuple(array.astype(np.int64) for array in arrays)
    shift = 53 - math.frexp(room)[1]
    return tuple(np.ldexp(np.rint(np.ldexp(array.astype(np.float64), shift)), -shift) for array in arrays)


def sqrt_segments(length: int) -> Segments:
    """The classic prior: g = round(sqrt(L)) segments of ceil(L / g) stages, the last of what remains.

    Chen et al., "Training deep nets with sublinear memory cost" (arXiv 1604.06174).
    """
    if length < 1:
        raise ValueError(f"A chain must have at least one stage, got length {length}.")
    count = round(math.sqrt(length))
    size = -(-length // count)
    return tuple((start, min(start + size, length)) for start in range(0, length, size))


def _schedule(length: int, segments: Segments) -> Schedule:
    """The operations of a plan: of a segment first a forward that keeps nothing, behind the rest all of its plan."""
    whole = (0, length + 1)  # No segment: the loss is behind the last stage.
    inside: dict[tuple[int, int], list[tuple[int, int]]] = {}
    around = [whole]
    for depth, segment in zip(depths(segments), segments, strict=True):
        del around[depth + 1 :]
        inside.setdefault(around[-1], []).append(segment)
        around.append(segment)

    def plan(start: int, stop: int, children: list[tuple[int, int]]) -> Iterator[tuple[str, int]]:
        stops = dict(children)
        units: list[tuple[int, int]] = []
        while start < stop:
            end = stops.get(start, start + 1)
            units.append((start, end))
            if start in stops:
                yield ("Fc", start)
                yield from (("Fn", k) for k in range(start + 1, end))
            else:
                yield ("Fe", start)
            start = end
        if stop == length:
            yield ("Loss", length)
        for start, end in reversed(units):
            if start in stops:
                yield from plan(start, end, inside.get((start, end), []))
            else:
                yield ("B", start)

    return tuple(plan(0, length, inside.get(whole, [])))

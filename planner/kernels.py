"""The placement solver's inner loops, compiled by numba when they are first called, and kept on disk from then on.

``import numba`` takes a quarter of a second, so only who needs a compiled loop imports this module. Everything is in
whole numbers, or in floats whose sums are exact (``planner.placement.exactly_summable``).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


def _compiled(function: Any) -> Any:
    """Where no directory can be written to, a function is compiled in every process anew."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:
        return numba.njit(function)


@_compiled
def _grown(array: Any, capacity: Any) -> Any:
    """A longer array that begins like ``array``."""
    longer = np.empty((capacity, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


@_compiled
def fill_slots(
    keep_need: Any, after_keep: Any, beside: Any, keep_hold: Any, keep_cost: Any, run_need: Any, run_hold: Any,
    run_cost: Any, again_hold: Any, again_need: Any, held: Any, end_need: Any, option_need: Any, option_hold: Any,
    option_cost: Any, never: Any, rows: Any,
) -> None:  # fmt: skip
    """Fill ``rows[c, j (j + 1) / 2 + i, a]`` with least[c, i, j](a) as ``planner.nested`` defines it, i <= j; ``never``
    where there is no plan.

    With a single level, ``rows[0, i, a]`` is least[0, i, L](a): that of a segment is not a table then.
    """
    length, top = len(keep_cost), rows.shape[2]
    single, cases = rows.shape[1] == length + 1, len(beside)
    last = cases - 1
    # From the first slot of ``need`` there is a plan, from that of ``flat`` on all is kept, which is ``whole``.
    need = np.zeros((cases, length + 1, length + 1), np.int64)
    flat = np.zeros((cases, length + 1, length + 1), np.int64)
    whole = np.zeros((length + 1, length + 1), rows.dtype)
    for j in range(length + 1):
        base = 0 if single else j * (j + 1) // 2
        tabulated = j == length or not single
        rows[:, base + j, : end_need[j]] = never
        rows[:, base + j, end_need[j] :] = 0
        need[:, j, j] = flat[:, j, j] = end_need[j]
        for i in range(j - 1, -1, -1):
            whole[i, j] = whole[i + 1, j] + keep_cost[i]
            if not tabulated:
                continue
            for c in range(cases if j < length else 1):
                following, behind = after_keep[c, i], 0 if c == last else c
                row, after = rows[c, base + i], rows[following, base + i + 1]
                flat[c, i, j] = max(keep_need[c, i, j], flat[following, i + 1, j] + keep_hold[i])
                first = min(max(keep_need[c, i, j], need[following, i + 1, j] + keep_hold[i]), top)
                row[:first] = never
                kept = after[first - keep_hold[i] : top - keep_hold[i]]
                for a in range(top - first):
                    row[first + a] = kept[a] + keep_cost[i]
                for way in range(len(option_need) if j == length else 0):
                    if option_need[way, i] < 0:
                        continue
                    low = max(option_need[way, i], need[c, i + 1, j] + option_hold[way, i])
                    for a in range(top - low):
                        cost = after[low - option_hold[way, i] + a] + option_cost[way, i]
                        row[low + a] = min(row[low + a], cost)
                    first = min(first, low)
                high, before = min(flat[c, i, j], top), whole[i, j]
                for k in range(i + 1, j):
                    if run_need[i, k] < 0:
                        continue
                    again = run_cost[i, k]
                    best = whole[i, j] + again
                    if best < before:
                        high = min(flat[c, i, j], top)
                    before = best
                    while high > 0 and row[high - 1] <= best:
                        high -= 1
                    low = max(run_need[i, k] + held[j] + beside[c], need[behind, k, j] + run_hold[i, k])
                    low = max(low, again_need[i, k] if single else need[last, i, k] + again_hold[i, k])
                    if low >= high:
                        continue
                    rest = rows[behind, base + k, low - run_hold[i, k] : high - run_hold[i, k]]
                    out = rows[c, base + i, low:high]
                    if single:
                        again += whole[i, k]
                        for a in range(high - low):
                            cost = rest[a] + again
                            out[a] = cost if cost < out[a] else out[a]
                    else:
                        inside = k * (k + 1) // 2 + i
                        back = rows[last, inside, low - again_hold[i, k] : high - again_hold[i, k]]
                        for a in range(high - low):
                            cost = rest[a] + back[a] + again
                            out[a] = cost if cost < out[a] else out[a]
                    first = min(first, low)
                need[c, i, j] = first


@_compiled
def fill_steps(
    keep_need: Any, after_keep: Any, beside: Any, keep_hold: Any, keep_cost: Any, run_need: Any, run_hold: Any,
    run_cost: Any, again_hold: Any, held: Any, end_need: Any, option_need: Any, option_hold: Any, option_cost: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """The steps of least[c, i, j] as ``planner.nested`` defines it, needs rising and costs falling.

    Returns the needs and costs of all stretches, and where those of each begin and end.
    """
    length, cases = len(keep_cost), len(beside)
    last = cases - 1
    needs, costs = np.empty(1024, np.int64), np.empty(1024, np.int64)
    begin = np.zeros((cases, length + 1, length + 1), np.int64)
    end = np.zeros((cases, length + 1, length + 1), np.int64)
    needs[0] = costs[0] = 0  # Of nothing: what runs again where nothing does.
    used = 1
    best_need, best_cost = np.empty(64, np.int64), np.empty(64, np.int64)
    next_need, next_cost = np.empty(64, np.int64), np.empty(64, np.int64)
    for j in range(length + 1):
        whole = 0
        for i in range(j, -1, -1):
            if i < j:
                whole += keep_cost[i]
            for c in range(cases if j < length else 1):
                count = 0
                if i == j:
                    best_need[0], best_cost[0] = end_need[j], 0
                    count = 1
                else:
                    following = after_keep[c, i]
                    start, stop = begin[following, i + 1, j], end[following, i + 1, j]
                    if 2 * (stop - start) > len(best_need):
                        capacity = 4 * (stop - start)
                        best_need, best_cost = _grown(best_need, capacity), _grown(best_cost, capacity)
                        next_need, next_cost = _grown(next_need, capacity), _grown(next_cost, capacity)
                    for at in range(start, stop):
                        level = max(keep_need[c, i, j], needs[at] + keep_hold[i])
                        if count and best_need[count - 1] == level:
                            count -= 1
                        best_need[count], best_cost[count] = level, costs[at] + keep_cost[i]
                        count += 1
                for k in range(i + 1 - len(option_need), j):
                    way = i - k
                    if (
                        way >= 0
                    ):  # Another way to treat stage i, behind which it goes on as behind a kept one.
                        if j < length or i == j or option_need[way, i] < 0:
                            continue
                        low, hold, inside = option_need[way, i], option_hold[way, i], 0
                        rest, rest_end, back, back_end = begin[c, i + 1, j], end[c, i + 1, j], 0, 1
                        extra = option_cost[way, i]
                        again = extra - keep_cost[i]
                    else:
                        if run_need[i, k] < 0:
                            continue
                        behind = 0 if c == last else c
                        low = run_need[i, k] + held[j] + beside[c]
                        hold, inside = run_hold[i, k], again_hold[i, k]
                        rest, rest_end = begin[behind, k, j], end[behind, k, j]
                        back, back_end = begin[last, i, k], end[last, i, k]
                        again = extra = run_cost[i, k]
                    level = max(low, needs[rest] + hold, needs[back] + inside)
                    merged = own = cost = 0
                    walking = True
                    while walking or own < count:
                        if walking:
                            while rest + 1 < rest_end and needs[rest + 1] + hold <= level:
                                rest += 1
                            while back + 1 < back_end and needs[back + 1] + inside <= level:
                                back += 1
                            cost = costs[rest] + costs[back] + extra
                        if merged + 2 > len(next_need):
                            capacity = 2 * merged + 2
                            next_need, next_cost = _grown(next_need, capacity), _grown(next_cost, capacity)
                        if own < count and (
                            not walking
                            or best_need[own] < level
                            or (best_need[own] == level and best_cost[own] <= cost)
                        ):
                            if merged == 0 or best_cost[own] < next_cost[merged - 1]:
                                next_need[merged], next_cost[merged] = best_need[own], best_cost[own]
                                merged += 1
                            own += 1
                            # Nothing that is recomputed costs less than all kept once and this forward run again.
                            walking = walking and next_cost[merged - 1] > whole + again
                            continue
                        if merged == 0 or cost < next_cost[merged - 1]:
                            next_need[merged], next_cost[merged] = level, cost
                            merged += 1
                        walking = rest + 1 < rest_end or back + 1 < back_end
                        if rest + 1 < rest_end and back + 1 < back_end:
                            level = min(needs[rest + 1] + hold, needs[back + 1] + inside)
                        elif rest + 1 < rest_end:
                            level = needs[rest + 1] + hold
                        elif back + 1 < back_end:
                            level = needs[back + 1] + inside
                    best_need, next_need = next_need, best_need
                    best_cost, next_cost = next_cost, best_cost
                    count = merged
                while used + count > len(needs):
                    needs, costs = _grown(needs, 2 * len(needs)), _grown(costs, 2 * len(costs))
                begin[c, i, j], end[c, i, j] = used, used + count
                needs[used : used + count] = best_need[:count]
                costs[used : used + count] = best_cost[:count]
                used += count
    return needs[:used], costs[:used], begin, end

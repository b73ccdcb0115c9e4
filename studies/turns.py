"""Ways of doing one thing take turns, so that the machine's moods meet all of them alike.

reference   A   reference   B   reference   C   reference   A   ...      round after round
            └── its time over the mean of the reference's before and after it
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Way = TypeVar("Way")


def in_turns(
    seconds_of: Callable[[Way], float], taking_part: Sequence[Way], reference: Way, rounds: int
) -> tuple[list[list[float]], list[float]]:
    """Of each way its time over the reference's around it, round after round; and the reference's seconds."""
    ratios: list[list[float]] = [[] for _ in taking_part]
    seconds = [seconds_of(reference)]
    for _ in range(rounds):
        for found, way in zip(ratios, taking_part, strict=True):
            taken = seconds_of(way)
            seconds.append(seconds_of(reference))
            found.append(2 * taken / (seconds[-2] + seconds[-1]))
    return ratios, seconds


def standard_error(ratios: Sequence[float]) -> float:
    """Of their median, from the middle half of them, as if they were normal."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios))

"""Which micro-batch sizes to profile where the user names none: doubling, as far as the device holds a plain step.

A GPU is seldom fast with a few samples, and a plan takes no larger micro-batch than was profiled. On a CPU a step takes
seconds, and three sizes are enough to plan with.

    1  2  4 │ 8  16  32  64  128     the first three always, of the others those whose plain step fits; the last of them
            └─ fake steps ─┘         is found by halving, with three fake steps
"""

from __future__ import annotations

import bisect
import functools

from profiler.chain import discover
from profiler.memory import MemoryTracer
from profiler.workload import Workload

FEWEST, MOST = 3, 8
"""How many sizes: 1 to 4, and 1 to 128."""


def sizes_that_fit(
    workload: Workload, memory_bytes: int, *, smallest: int, optimizer: str
) -> tuple[int, ...]:
    """``smallest`` and its doubles, those beyond three only where a plain step in fp32 fits ``memory_bytes``.

    Nothing is run, and the model is left as it was.
    """
    doubles = [smallest * 2**n for n in range(MOST)]
    training = workload.model.training
    workload.model.train()
    try:
        tracer = MemoryTracer(workload, discover(workload), optimizer)
        peak_bytes = functools.partial(tracer.plain_peak_bytes, "fp32")
        fitting = bisect.bisect_right(doubles[FEWEST:], memory_bytes, key=peak_bytes)
    finally:
        workload.model.train(training)
    return tuple(doubles[: FEWEST + fitting])

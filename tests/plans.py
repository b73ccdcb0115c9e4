"""A plan made by hand, in bytes and seconds that fit in the head.

peak, bytes    300   400   500   600   800   1000      each needs a tenth more, the stated error
step, seconds   15    14    13    12    11     10
                     sqrt  every  the         plain
                           block  plan
"""

from __future__ import annotations

import msgspec

from planner.plan import (
    Baselines,
    Choice,
    Error,
    Objective,
    Parts,
    Plan,
    Prediction,
    Segment,
    Weights,
)
from profiler.profile_record import DeviceRecord


def segment(first: str, last: str | None = None) -> Segment:
    return Segment(first=first, last=last or first, enter=first, leave="head")


def prediction(step_seconds: float, peak_bytes: int) -> Prediction:
    return Prediction(
        step_seconds=step_seconds,
        step_cpu_seconds=None,
        peak_memory_bytes=peak_bytes,
        peak_reserved_bytes=None,
        step_joules=None,
        parts=Parts(
            step_seconds={"forward": 4.0, "backward": step_seconds - 4.0},
            peak_memory_bytes={"parameters": 100, "activations": peak_bytes - 100},
        ),
        error=Error(step_seconds=0.05, peak_memory_bytes=0.1),
        peak_at="backward of head",
    )


def choice(step_seconds: float, peak_bytes: int, limit: float, *checkpoint: Segment) -> Choice:
    return Choice(
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        precision="fp32",
        zero_stage=0,
        checkpoint=checkpoint,
        prediction=prediction(step_seconds, peak_bytes),
        fits=peak_bytes <= limit,
    )


def plan(budget_bytes: int | None = 700) -> Plan:
    """The plan for a budget of 700 bytes, or for none."""
    limit = float("inf") if budget_bytes is None else budget_bytes / 1.1
    one, two, four = segment("h.0"), segment("h.1"), segment("h.0", "h.3")
    front = (
        choice(15, 300, limit, one, two, segment("h.2")),
        choice(12, 600, limit, one, two),
        choice(11, 800, limit, one),
        choice(10, 1000, limit),
    )
    best = [point for point in front if point.fits][-1]
    cost = best.prediction.step_seconds / 10
    return Plan(
        model="chain",
        workload=None,
        profile_sha256="ab" * 32,
        device=DeviceRecord(kind="cpu", name="A (TM) CPU", memory_bytes=2**30, threads=2),
        optimizer="sgd",
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        world_size=1,
        global_batch_size=8,
        precision="fp32",
        zero_stage=0,
        checkpoint=best.checkpoint,
        memory_budget_bytes=budget_bytes,
        prediction=best.prediction,
        objective=Objective(cost=cost, weights=Weights(), lower_bound=cost, optimal=True, plans_considered=9),
        baselines=Baselines(
            plain=choice(10, 1000, limit),
            sqrt=choice(14, 400, limit, four),
            every_block=choice(13, 500, limit, one, two, segment("h.2"), segment("h.3")),
        ),
        front=front,
    )


def with_weights(time: float, memory: float) -> Plan:
    """The plan for 700 bytes when memory counts as well; the plain plan costs ``time + memory``."""
    made = plan()

    def cost(point: Choice) -> float:
        prediction = point.prediction
        return time * prediction.step_seconds / 10 + memory * prediction.peak_memory_bytes / 1000

    best = min((point for point in made.front if point.fits), key=cost)
    weighed = msgspec.structs.replace(
        made.objective, cost=cost(best), lower_bound=cost(best), weights=Weights(time=time, memory=memory)
    )
    return msgspec.structs.replace(
        made, objective=weighed, checkpoint=best.checkpoint, prediction=best.prediction
    )

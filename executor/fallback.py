"""What to train with when a plan ran out of memory: the next plan on the front that needs less.

    front   2.1   2.6   3.0   3.4 GiB         3.4 ran out ─▶ 3.0; at least 5% less, so that it is worth a try
             ◀── less memory, more time

The global batch stays, so the run stays what it was. The precision stays too: what has been learnt so far was learnt
in it.
"""

from __future__ import annotations

from typing import Final

from planner.cost import instead
from planner.plan import Choice, Plan

LESS: Final = 0.95
"""How much of what was refused the next plan may need."""


class NoFallback(Exception):
    """There is no plan that needs less."""


def next_plan(plan: Plan) -> Plan:
    """The fastest plan of the front that needs clearly less memory than ``plan``; NoFallback where there is none."""
    needed = plan.prediction.peak_memory_bytes
    others = [choice for choice in plan.front if _comparable(plan, choice)]
    smaller = [choice for choice in others if choice.prediction.peak_memory_bytes <= LESS * needed]
    # Closer than that is better than nothing.
    smaller = smaller or [choice for choice in others if choice.prediction.peak_memory_bytes < needed]
    if not smaller:
        raise NoFallback(
            f"Out of memory, and no plan of the front needs less than the {needed / 2**30:.2f} GiB of this one at the "
            f"same global batch in {plan.precision}. Optimise with a smaller --global-batch-size or for more devices."
        )
    return instead(plan, min(smaller, key=lambda choice: choice.prediction.step_seconds))


def _comparable(plan: Plan, choice: Choice) -> bool:
    return (choice.precision, choice.zero_stage) == (plan.precision, plan.zero_stage)


def described(plan: Plan) -> str:
    """A plan in few words."""
    recomputed = len(plan.checkpoint)
    words = [f"micro-batch {plan.micro_batch_size} x {plan.gradient_accumulation_steps}"]
    words.append(f"{recomputed} segments recomputed" if recomputed != 1 else "1 segment recomputed")
    if plan.loss_chunks is not None:
        words.append(f"loss in {plan.loss_chunks} chunks")
    return ", ".join(words)

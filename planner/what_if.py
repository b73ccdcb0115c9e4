"""What would change a plan: the search asked again with one thing of the question otherwise.

    memory       a little more, a little less, no limit, and as little as still does
    precision    each that was not asked for
    placement    nothing recomputed, the loss in one piece: what the plan gains by them
    devices      the next number of them that divides the global batch, with every stage of ZeRO
    ZeRO         each stage that was not asked for
    micro-batch  larger ones, where the plan takes the largest that was profiled

Each answer is exact, a plan with the cost that it has on the scale of the plan that was chosen; or one line says what
would have to be known. Frontiers are shared with the search: another budget is another look at the same ones.

Where nothing fits, ``ways_out`` are those of the changes with which something does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from planner.calibration import Calibration
from planner.communication import LARGEST_MACHINE, catalogue_link
from planner.explain import budget_for, chosen
from planner.plan import Asked, Choice, Knob, Plan, WhatIf
from planner.search import Space, space
from planner.zero import SEVERAL_PRECISIONS, ZERO_STAGES
from profiler import records
from profiler.profile_record import PRECISIONS, Link, Precision, Profile

GIB = 2**30

DEEPER_UP_TO_STAGES = 64
"""Segments inside segments are looked for in chains that are no longer: in those of 64 it takes a tenth of a second, in
one of 196, with sizes that have no common unit, minutes."""

NOT_SEARCHED = (
    "nothing fits, unless with segments inside segments, which in so long a chain are not looked for here"
)

LEAST = 1
"""A budget, in bytes, that nothing fits."""

NOT_IN_SEVERAL = f"several processes run in {' or '.join(SEVERAL_PRECISIONS)} only"


def what_ifs(searched: Space, plan: Plan) -> tuple[WhatIf, ...]:
    """What other questions would find than the one that ``plan`` answers from what was ``searched``."""
    own, questions = chosen(plan), _Questions(searched)
    return (
        *questions.budgets(own),
        *questions.precisions(),
        *questions.placements(own),
        *questions.devices(),
        *questions.zero_stages(),
        *questions.micro_batches(own),
    )


def what_ifs_of(plan: Plan, profile: Profile, calibration: Calibration | None = None) -> tuple[WhatIf, ...]:
    """The same for a plan from a file. Raises ``OtherProfile`` for a profile that it was not made from."""
    if records.sha256(profile) != plan.profile_sha256:
        raise OtherProfile(
            f"The plan was made from profile {plan.profile_sha256[:12]}, and this is {records.sha256(profile)[:12]}. "
            "Give the one it was made from, or make the plan again with planner optimize."
        )
    asked = plan.asked
    if asked is None:
        raise ValueError(
            "The plan does not say what it was chosen from: an older version wrote it. Make it again with planner "
            "optimize."
        )
    searched = space(
        profile, plan.global_batch_size, plan.memory_budget_bytes, plan.objective.weights, plan.world_size,
        precisions=asked.precisions, zero_stages=asked.zero_stages, link=asked.link, calibration=calibration,
    )  # fmt: skip
    return what_ifs(searched, plan)


class OtherProfile(ValueError):
    """The profile is not the one that a plan was made from."""


def ways_out(searched: Space) -> tuple[WhatIf, ...]:
    """Where nothing that was searched fits: what would, and of a larger budget the least."""
    questions = _Questions(searched)
    relaxed = (*questions.precisions(), *questions.devices(), *questions.zero_stages())
    fitting = (each for each in relaxed if each.choice is not None and each.choice.fits)
    return (questions.tightest(), *fitting)


def memory_step_bytes(memory_bytes: int) -> int:
    """A little of so much memory, in a round number: an eighth or less, and at most 1 GiB."""
    return min(GIB, 1 << max(0, (memory_bytes // 8).bit_length() - 1))


def ways_out_text(ways: Sequence[WhatIf]) -> str:
    """The ways out in one sentence, with the flags that take them."""
    return f"A plan fits with {', or with '.join(map(_flags, ways))}."


def _flags(way: WhatIf) -> str:
    assert way.choice is not None
    match way.knob:
        case "memory_budget":
            return f"--memory-budget {way.memory_budget_bytes}"
        case "precision":
            return f"--precision {way.choice.precision}"
        case _:
            return f"--world-size {way.world_size} --zero-stage {way.choice.zero_stage}"


class _Questions:
    """The question that a space answers, and others."""

    def __init__(self, searched: Space) -> None:
        self._space = searched
        self._asked = searched.asked
        self._deeper = len(searched.profile.stages) <= DEEPER_UP_TO_STAGES

    @property
    def _profile(self) -> Profile:
        return self._space.profile

    def _answer(
        self, knob: Knob, change: str, *, memory_budget_bytes: int | None, world_size: int | None = None,
        asked: Asked | None = None, chunked: bool = True,
    ) -> WhatIf:  # fmt: skip
        """What the search finds when all but what is given stays as it was."""
        world = world_size or self._space.world_size
        found = self._space.otherwise(
            memory_budget_bytes, world, asked or self._asked, chunked=chunked, deeper=self._deeper
        )
        choice = found.best()
        told = choice.fits or self._deeper or memory_budget_bytes == LEAST
        return WhatIf(
            knob=knob, change=change, memory_budget_bytes=memory_budget_bytes, world_size=world,
            choice=choice if told else None, reason=None if told else NOT_SEARCHED,
        )  # fmt: skip

    def _unknown(self, knob: Knob, change: str, reason: str, world_size: int | None = None) -> WhatIf:
        here = self._space
        return WhatIf(
            knob=knob, change=change, memory_budget_bytes=here.memory_budget_bytes,
            world_size=world_size or here.world_size, choice=None, reason=reason,
        )  # fmt: skip

    def budgets(self, own: Choice) -> Iterator[WhatIf]:
        """More memory and less of it; without a limit, less than the plan needs."""
        budget = self._space.memory_budget_bytes
        now = budget or budget_for(own.prediction)
        step = memory_step_bytes(now)
        if budget is not None:
            yield self._answer("memory_budget", f"{_size(step)} more", memory_budget_bytes=now + step)
        less = f"{_size(step)} less" + ("" if budget else " than it needs")
        yield self._answer("memory_budget", less, memory_budget_bytes=now - step)
        if budget is not None:
            yield self._answer("memory_budget", "no memory limit", memory_budget_bytes=None)
        yield self.tightest()

    def tightest(self) -> WhatIf:
        """The least memory with which there is a plan."""
        change = "the least memory" + ("" if self._deeper else ", no segment in another")
        found = self._answer("memory_budget", change, memory_budget_bytes=LEAST)
        assert found.choice is not None
        return msgspec.structs.replace(
            found,
            memory_budget_bytes=budget_for(found.choice.prediction),
            choice=msgspec.structs.replace(found.choice, fits=True),
        )

    def precisions(self) -> Iterator[WhatIf]:
        """Each precision that was not asked for, beside those that were."""
        here = self._space
        hopeless = {each.precision: each.slowdown for each in self._profile.hopeless}
        for precision in PRECISIONS:
            if precision in self._asked.precisions:
                continue
            change = f"{precision} as well"
            if here.world_size > 1 and precision not in SEVERAL_PRECISIONS:
                yield self._unknown("precision", change, NOT_IN_SEVERAL)
            elif precision in hopeless:
                slower = f"{hopeless[precision]:.1f} times slower than fp32 on this device"
                yield self._unknown("precision", change, slower)
            elif self._profile.at(precision) is None:
                yield self._unknown(
                    "precision", change, f"not profiled: planner profile --precision {self._with(precision)}"
                )
            else:
                asked = msgspec.structs.replace(self._asked, precisions=(*self._asked.precisions, precision))
                yield self._answer(
                    "precision", change, memory_budget_bytes=here.memory_budget_bytes, asked=asked
                )

    def _with(self, precision: Precision) -> str:
        """The profile's precisions and one more, as a flag takes them."""
        there = {each.precision for each in self._profile.precisions} | {precision}
        return ",".join(each for each in PRECISIONS if each in there)

    def placements(self, own: Choice) -> Iterator[WhatIf]:
        """What the plan does to save memory, forbidden."""
        here = self._space
        if own.checkpoint:
            plain = [here.by_hand(knobs, "plain") for knobs in here.candidates()]
            fitting = [choice for choice in plain if choice.fits]
            choice = (
                min(fitting, key=lambda each: here.cost(each.prediction))
                if fitting
                else min(plain, key=lambda each: budget_for(each.prediction))
            )
            yield WhatIf(
                knob="recomputation", change="nothing recomputed", memory_budget_bytes=here.memory_budget_bytes,
                world_size=here.world_size, choice=choice,
            )  # fmt: skip
        if own.loss_chunks:
            yield self._answer(
                "loss_chunks", "the loss in one piece", memory_budget_bytes=here.memory_budget_bytes,
                chunked=False,
            )  # fmt: skip
        elif here.world_size > 1 and any(each.chunked_head for each in self._profile.precisions):
            yield self._unknown("loss_chunks", "the loss in chunks", "not measured with several processes")

    def devices(self) -> Iterator[WhatIf]:
        """The next number of devices that divides the global batch, with every stage of ZeRO."""
        here, profile = self._space, self._profile
        world, link = self._next_world()
        if world is None:
            reason = f"no larger number of them divides a global batch of {here.global_batch_size}"
            yield self._unknown("devices", "more devices", reason)
            return
        change = f"{world} devices"
        if not any(parameter.trainable for parameter in profile.parameters):
            reason = "the profile does not hold the model's parameters: profile again"
        elif not (precisions := [each for each in self._asked.precisions if each in SEVERAL_PRECISIONS]):
            reason = f"{NOT_IN_SEVERAL}, which was not asked for"
        elif link is None:
            reason = f"their link is not known: planner profile --world-size {world}"
        else:
            asked = Asked(precisions=tuple(precisions), zero_stages=ZERO_STAGES, link=link)
            yield self._answer(
                "devices", change, memory_budget_bytes=here.memory_budget_bytes, world_size=world, asked=asked
            )
            return
        yield self._unknown("devices", change, reason, world)

    def _next_world(self) -> tuple[int | None, Link | None]:
        """How many devices come next, and how fast they reach each other: measured ones before others."""
        here, profile = self._space, self._profile
        batch, sizes = here.global_batch_size, profile.micro_batch_sizes
        larger = [
            world
            for world in range(here.world_size + 1, batch // sizes[0] + 1)
            if any(batch % (b * world) == 0 for b in range(sizes[0], sizes[-1] + 1))
        ]
        measured = profile.link
        if measured is not None and measured.world_size in larger:
            return measured.world_size, measured
        if not larger:
            return None, None
        known = larger[0] <= LARGEST_MACHINE
        return larger[0], catalogue_link(profile.device, larger[0]) if known else None

    def zero_stages(self) -> Iterator[WhatIf]:
        """Each stage of ZeRO that was not asked for, beside those that were."""
        here = self._space
        for stage in ZERO_STAGES:
            if here.world_size > 1 and stage not in self._asked.zero_stages:
                asked = msgspec.structs.replace(self._asked, zero_stages=(*self._asked.zero_stages, stage))
                yield self._answer(
                    "zero_stage", f"ZeRO stage {stage} as well",
                    memory_budget_bytes=here.memory_budget_bytes, asked=asked,
                )  # fmt: skip

    def micro_batches(self, own: Choice) -> Iterator[WhatIf]:
        """Larger micro-batches than were profiled, where the plan takes the largest."""
        measured = self._profile.at(own.precision)
        assert measured is not None
        low, high = measured.micro_batch_sizes[0], measured.micro_batch_sizes[-1]
        if (
            own.micro_batch_size != high
            or self._space.global_batch_size % (2 * high * self._space.world_size) != 0
        ):
            return
        refused = [each for each in self._profile.too_large if each.precision == own.precision]
        if refused:
            reason = (
                f"{refused[0].micro_batch_size} was refused memory when it was profiled, however little was kept, so "
                "nothing larger was timed; planner profile --fake tells their times by a roofline"
            )
        else:
            sizes = ",".join(str(size) for size in dict.fromkeys((low, high, 2 * high)))
            reason = f"{high} is the largest that was profiled: planner profile --batch {sizes}"
        yield self._unknown("micro_batch", "larger micro-batches", reason)


def _size(power_of_two: int) -> str:
    """``256 MiB``, without decimals."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if power_of_two >= size:
            return f"{power_of_two // size} {unit}"
    return f"{power_of_two} B"

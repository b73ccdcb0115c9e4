"""What several processes send each other in an optimizer step, and how long that takes.

In units of Psi, the bytes of all parameters, of which an all-reduce moves two per process and an all-gather or a
reduce-scatter one (ZeRO, section 7; k micro-batches):

    stage   sum of gradients     gather of parameters     in all
    0       2                                             2
    1       2                    1                        3
    2       2 k                  1                        2 k + 1
    3       k                    2 k                      3 k

The paper needs 2 at stages 1 and 2, with a reduce-scatter of gradients; DeepSpeed sums them by all-reduce and so moves
one more (runtime/zero/stage_1_and_2.py, ``allreduce_bucket``). Stage 3 gathers in every forward and every backward.

A message of m bytes to and from N processes takes ``alpha + m (N - 1) / N / rate`` seconds, with both measured
(profiler/communication.py). Nothing of it is taken to be hidden behind computing: the configuration sums gradients
between the operations of the backward pass and not beside them (``overlap_comm`` is off).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.zero import BUCKET_ELEMENTS, FP32_BYTES, PERSISTENCE_ELEMENTS, ZERO_STAGES, Collectives
from profiler import catalogue
from profiler.profile_record import DeviceRecord, Link, ParameterRecord

LINK_EFFICIENCY = 0.8
"""What NCCL reaches of an NVLink's line rate: the protocol takes a fifth, 370 of an H100's 450 GB/s (S. Jeaugey,
NVIDIA/nccl-tests issue 212)."""

LINK_LATENCY_SECONDS = 13e-6
"""The shortest all-reduces took 12 to 13 us between two devices (NVIDIA/nccl-tests issue 44)."""

LINK_ERROR = 0.5
"""Eight A100 reach 200 of 300 GB/s where the efficiency says 240 (NVIDIA/nccl-tests issue 149); over PCIe switches and
sockets it is less, and nothing here has been measured."""

LARGEST_MACHINE = 8
"""How many devices the catalogue's link joins: those of one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Over how many processes a step is spread, and how. ``link`` None: one process, which sends nothing."""

    world_size: int = 1
    zero_stage: int = 0
    link: Link | None = None

    @property
    def collectives(self) -> Collectives:
        """The library that sums between the processes."""
        return "gloo" if self.link is None else self.link.backend


ALONE = Distribution()


def catalogue_link(device: DeviceRecord, world_size: int) -> Link | None:
    """The link between devices of this kind in one machine, from the data sheet; None for a device not known by name.

    Raises ValueError for more devices than one machine has.
    """
    known = catalogue.titled(device.name)
    if known is None:
        return None
    if world_size > LARGEST_MACHINE:
        raise ValueError(
            f"world_size must be at most {LARGEST_MACHINE} for a link of the catalogue, which joins the devices of one "
            f"machine, got {world_size}. Pass link= to planner.optimize."
        )
    return Link(
        world_size=world_size,
        backend="nccl",
        latency_seconds=LINK_LATENCY_SECONDS,
        bytes_per_second=LINK_EFFICIENCY * known.link_bytes_per_second,
        error=LINK_ERROR,
        source="catalogue",
    )


def volume(zero_stage: int, gradient_accumulation_steps: int) -> int:
    """What one process moves in an optimizer step, in units of the bytes of all parameters."""
    k = gradient_accumulation_steps
    match zero_stage:
        case 0:
            return 2
        case 1:
            return 3
        case 2:
            return 2 * k + 1
        case 3:
            return 3 * k
        case _:
            raise ValueError(f"zero_stage must be of {', '.join(map(str, ZERO_STAGES))}, got {zero_stage}.")


def messages(zero_stage: int, gradient_accumulation_steps: int, parameters: Sequence[ParameterRecord]) -> int:
    """How many collectives an optimizer step takes at least: buckets of gradients, and gathers."""
    k = gradient_accumulation_steps
    buckets = math.ceil(sum(p.count for p in parameters) / BUCKET_ELEMENTS)
    gathered = sum(len(p.stages) for p in parameters if p.count > PERSISTENCE_ELEMENTS)
    return {0: buckets, 1: buckets + 1, 2: k * buckets + 1, 3: k * (buckets + 2 * gathered)}[zero_stage]


def step_seconds(
    distribution: Distribution, gradient_accumulation_steps: int, parameters: Sequence[ParameterRecord]
) -> float:
    """The seconds of an optimizer step that processes spend on sending to each other."""
    link, stage, k = distribution.link, distribution.zero_stage, gradient_accumulation_steps
    if link is None:
        return 0.0
    psi_bytes = FP32_BYTES * sum(p.count for p in parameters)
    others = (distribution.world_size - 1) / distribution.world_size
    moved_bytes = volume(stage, k) * psi_bytes * others
    return messages(stage, k, parameters) * link.latency_seconds + moved_bytes / link.bytes_per_second

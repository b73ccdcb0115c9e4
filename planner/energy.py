"""The energy of a step: ``E = sum over kinds of work of watts * seconds``, on every device.

Each kind of work that a step's time is made of (planner/time.py) has watts in the profile; recomputation is forward
work. So the energy of a placement differs from that of the plain step by forward watts times its recomputed seconds
alone: at one micro-batch, precision and device count it rises exactly with time. A placement that another beats in
(peak, time) is beaten in energy as well, and the frontier over (peak, time) is complete for the three of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from profiler.profile_record import PhaseWatts, Precision, Profile


def watts_at(profile: Profile, precision: Precision) -> PhaseWatts | None:
    """What a device draws at a precision; None when nothing tells."""
    return None if profile.energy is None else profile.energy.at(precision)


def step_joules(parts: Mapping[str, float], watts: PhaseWatts, world_size: int = 1) -> dict[str, float]:
    """The joules of one optimizer step by kind of work, of all devices together; the step's energy is their sum.

    ``parts`` are seconds as ``planner.time.step_parts`` gives them. What is neither computing nor updating, such as
    waiting for other devices, draws what a device does that waits.
    """
    drawn = {
        "forward": watts.forward_watts,
        "recompute": watts.forward_watts,
        "backward": watts.backward_watts,
        "optimizer": watts.optimizer_watts,
    }
    return {kind: world_size * drawn.get(kind, watts.host_watts) * s for kind, s in parts.items()}


def expected_error(profile: Profile, time_error: float) -> float | None:
    """The relative error to state: of the seconds and of the watts. None for watts that nobody measured."""
    if profile.energy is None or profile.energy.error is None:
        return None
    return (1 + time_error) * (1 + profile.energy.error) - 1

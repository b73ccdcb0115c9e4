"""The time of any plan, composed from a profile's stage times.

    T = k * (forward + backward + host) + recompute + update

The first micro-batch makes gradients and later ones add to them, so their backward times are kept apart. A
segment runs its stages forward again: all of each but the last, which stops at the last tensor that its
backward needs. Where the device waits for its host, what the host does to record and replay a segment is paid as
well. Between two profiled micro-batch sizes every time is interpolated; outside of them nothing is
said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.nested import Placed
from profiler.profile_record import Keeping, StageTime, StepTime

RECOMPUTE_ERROR = 0.05
"""Stage times predict a checkpointed step within 1-5% (six models); studies/accuracy repeats it."""


SEGMENT_DISPATCHES, STAGE_DISPATCHES, SELECTIVE_DISPATCHES = 180, 140, 840
"""What the host does to record and replay a segment, for each of its stages, and for a stage that runs again but for
what it keeps; in ``StepTime.dispatch_seconds``. With these the mean error over four models in two precisions is the
least: ``python -m studies.replay``."""


ELSEWHERE_ERROR = 0.06
"""To add for times of steps that kept elsewhere what they save; ``python -m studies.elsewhere`` shows how far they are
from those of plain steps."""


def at_micro_batch(times: Sequence[StepTime], micro_batch_size: int) -> StepTime:
    """The times at a micro-batch size: as measured, or interpolated between the two measured sizes around it.

    Raises ValueError outside of the profiled range, where an extrapolation can be off by a fifth.
    """
    below = max((t for t in times if t.micro_batch_size <= micro_batch_size), key=_size, default=None)
    above = min((t for t in times if t.micro_batch_size >= micro_batch_size), key=_size, default=None)
    if below is None or above is None:
        sizes = sorted(t.micro_batch_size for t in times)
        raise ValueError(
            f"micro_batch_size must lie in the profiled range {sizes[0]} to {sizes[-1]}, "
            f"got {micro_batch_size}. Profile a wider range with --batch."
        )
    if below is above:
        return below
    share = (micro_batch_size - below.micro_batch_size) / (above.micro_batch_size - below.micro_batch_size)

    def between(low: float, high: float) -> float:
        return low + share * (high - low)

    def where_known(low: float | None, high: float | None) -> float | None:
        return None if low is None or high is None else between(low, high)

    return StepTime(
        micro_batch_size=micro_batch_size,
        stages=tuple(
            StageTime(
                forward_seconds=between(a.forward_seconds, b.forward_seconds),
                recompute_seconds=between(a.recompute_seconds, b.recompute_seconds),
                backward_first_seconds=between(a.backward_first_seconds, b.backward_first_seconds),
                backward_later_seconds=between(a.backward_later_seconds, b.backward_later_seconds),
                kept_seconds=where_known(a.kept_seconds, b.kept_seconds),
                kept_narrow_seconds=where_known(a.kept_narrow_seconds, b.kept_narrow_seconds),
            )
            for a, b in zip(below.stages, above.stages, strict=True)
        ),
        update_seconds=between(below.update_seconds, above.update_seconds),
        host_seconds=between(below.host_seconds, above.host_seconds),
        step_seconds=between(below.step_seconds, above.step_seconds),
        steps_timed=min(below.steps_timed, above.steps_timed),
        spread=max(below.spread, above.spread),
        yardstick_seconds=where_known(below.yardstick_seconds, above.yardstick_seconds),
        kept_elsewhere=below.kept_elsewhere or above.kept_elsewhere,
        dispatch_seconds=where_known(below.dispatch_seconds, above.dispatch_seconds),
    )


def _size(times: StepTime) -> int:
    return times.micro_batch_size


def step_parts(times: StepTime, gradient_accumulation_steps: int, placed: Placed) -> dict[str, float]:
    """The seconds of one optimizer step by kind of work; the step's time is their sum."""
    k = gradient_accumulation_steps
    return {
        "forward": k * sum(stage.forward_seconds for stage in times.stages),
        "backward": sum(s.backward_first_seconds + (k - 1) * s.backward_later_seconds for s in times.stages),
        "recompute": k
        * (
            sum(segment_seconds(times, start, stop) for start, stop in placed.segments)
            + sum(selective_seconds(times, stage, how) for stage, how in placed.keeping.items())
        ),
        "optimizer": times.update_seconds,
        "host": k * times.host_seconds,
    }


def segment_seconds(times: StepTime, start: int, stop: int) -> float:
    """Extra seconds, per micro-batch, of recomputing stages start..stop-1 as one segment."""
    whole = sum(stage.forward_seconds for stage in times.stages[start : stop - 1])
    dispatches = SEGMENT_DISPATCHES + (stop - start) * STAGE_DISPATCHES
    return whole + times.stages[stop - 1].recompute_seconds + _waiting_seconds(times, dispatches)


def selective_seconds(times: StepTime, stage: int, how: Keeping = "selective") -> float:
    """Extra seconds, per micro-batch, of a stage that runs again but for what it keeps."""
    kept = times.stages[stage].keeping(how)
    if kept is None:
        raise ValueError(
            "This profile does not tell how long products take in a stage. Profile again with this version."
        )
    again = max(0.0, times.stages[stage].recompute_seconds - kept)
    return again + _waiting_seconds(times, SELECTIVE_DISPATCHES)


def _waiting_seconds(times: StepTime, dispatches: int) -> float:
    """How long the device waits for its host; not at all where that is not known to keep it waiting."""
    return 0.0 if times.dispatch_seconds is None else dispatches * times.dispatch_seconds


def segment_nanoseconds(times: StepTime) -> npt.NDArray[np.int64]:
    """``segment_seconds`` of every segment [i, j) in whole nanoseconds, so that sums are exact."""
    per_stage = round(_waiting_seconds(times, STAGE_DISPATCHES) * 1e9)
    per_segment = round(_waiting_seconds(times, SEGMENT_DISPATCHES) * 1e9)
    forward = np.array([round(s.forward_seconds * 1e9) + per_stage for s in times.stages], dtype=np.int64)
    last = np.array(
        [round(s.recompute_seconds * 1e9) + per_stage + per_segment for s in times.stages], dtype=np.int64
    )
    length = len(forward)
    before = np.concatenate([[0], np.cumsum(forward)])
    ends = np.concatenate([[0], before[:-1] + last])
    cost = np.zeros((length, length + 1), dtype=np.int64)
    cost[:, 1:] = ends[1:][None, :] - before[:-1][:, None]
    return np.maximum(cost, 0)


def expected_error(times: StepTime) -> float:
    """The relative error to state: the larger of the noise and the method's own, and what keeping elsewhere adds."""
    return max(RECOMPUTE_ERROR, times.spread) + ELSEWHERE_ERROR * times.kept_elsewhere

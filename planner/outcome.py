"""How a trial ended, as its own process writes it down.

A trial runs a plan in a process of its own, and four things can happen to it that its parent must tell apart:

    ok              it was measured                              the file says so
    out_of_memory   an allocation was refused                    the file says so, or the kernel killed for memory
    crash           an exception, a signal                       the file says so, or there is none
    timeout         it was still running at its time limit       its parent knows, who ended it
    interrupted     its parent was told to stop, or died         whoever resumes the study finds it running, alone
"""

from __future__ import annotations

from typing import ClassVar, Literal

from planner.plan import Cost
from profiler.records import Document

Outcome = Literal["ok", "out_of_memory", "timeout", "crash", "interrupted"]

RAN: tuple[Outcome, ...] = ("ok", "out_of_memory", "timeout", "crash")
"""Outcomes that count as trials; one that was interrupted is run again."""


class TrialResult(Document, tag="trial_result"):
    """What the process of a trial leaves behind.

    ``steady_seconds``: the step's time on the steadiest clock, at the speed that the device had in the profile.
    ``steady_error``: by how much the prediction of it was off, (predicted - measured) / measured.
    ``message``: of an exception.
    """

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    plan_sha256: str
    outcome: Literal["ok", "out_of_memory", "crash"]
    measured: Cost | None = None
    steady_seconds: float | None = None
    steady_error: float | None = None
    device_speed: float | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        if self.outcome == "ok" and (self.measured is None or self.steady_seconds is None):
            raise ValueError("A trial that is ok must have been measured.")

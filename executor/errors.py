"""Outcomes of running a plan that a caller can act on."""

from __future__ import annotations


class PlanDoesNotFit(ValueError):
    """The plan was made for another model or another device than the one it should run on."""


class OutOfMemory(Exception):
    """The device refused memory: to a plan that is verified, or in training, where no plan is left that needs less."""


class NotFinite(Exception):
    """Training made losses or gradients that are no finite numbers, step after step."""


class Interrupted(Exception):
    """Training was asked to stop by a signal, and has saved what it had done if it was to save anything."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

"""Outcomes of running a plan that a caller can act on."""

from __future__ import annotations


class PlanDoesNotFit(ValueError):
    """The plan was made for another model or another device than the one it should run on."""

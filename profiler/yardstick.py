"""How fast the device is at this very moment, told by a fixed piece of work.

A shared machine, or a GPU that gets warm, does not keep its speed: the same step took 0.59 s and 0.86 s within
minutes on two cores of a cloud machine, on the process's own CPU clock as well. So the yardstick runs beside every
step that is timed, in a profile and in a verification, and the ratio of the two is how much the device has drifted:

    profile:  step 0.60 s, yardstick 40 ms        verify:  step 0.72 s, yardstick 48 ms  ──▶  the device, not the model

Means are compared, not medians: what slows a machine down comes in bursts. Over 480 steps of a ResNet-18 on such a
machine, means of 16 steps varied by 5.4%, their ratio to the yardsticks between them by 2.7%
(``python -m studies.drift``).
"""

from __future__ import annotations

import statistics
import time

import torch

from profiler.device import process_cpu_seconds, synchronize

SIDE = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the matrices that are multiplied."""

PRODUCTS = 6
ELEMENTS = 2**23
"""Of the vector that is read and written beside, too large for most caches."""

SHARE = 0.15
"""How long the yardstick runs, in terms of the time of the steps that it runs beside."""


class Yardstick:
    """Matrix products, and a vector read and written: what most of a training step consists of. Takes about 50 ms."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        side = SIDE[device.type]
        self._matrix = torch.full((side, side), 1 / side, device=device)
        self._product = torch.empty_like(self._matrix)
        self._vector = torch.zeros(ELEMENTS, device=device)
        self._readings: list[tuple[float, float]] = []
        self._owed_seconds = 0.0
        self._run()
        self.beside(0.0)

    def beside(self, step_seconds: float) -> None:
        """Run beside a step that took this long, or, where steps are short, beside every few of them."""
        self._owed_seconds += SHARE * step_seconds
        while self._owed_seconds > 0 or not self._readings:
            synchronize(self._device)
            wall, cpu = time.perf_counter(), process_cpu_seconds()
            self._run()
            synchronize(self._device)
            self._readings.append((time.perf_counter() - wall, process_cpu_seconds() - cpu))
            self._owed_seconds -= self._readings[-1][0]

    def wall_seconds(self) -> float:
        """How long it took on the wall clock, in the mean over all runs."""
        return statistics.mean(wall for wall, _ in self._readings)

    def cpu_seconds(self) -> float:
        """The same on the process's CPU clock."""
        return statistics.mean(cpu for _, cpu in self._readings)

    @torch.no_grad()
    def _run(self) -> None:
        for _ in range(PRODUCTS):
            torch.mm(self._matrix, self._matrix, out=self._product)
        self._vector.add_(1.0)

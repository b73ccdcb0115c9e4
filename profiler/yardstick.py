"""How fast the device is at this very moment, told by the model's own forward pass.

A shared machine, or a GPU that gets warm, does not keep its speed: the same step took 0.59 s and 0.86 s within
minutes on two cores of a cloud machine, on the process's own CPU clock as well. So a forward pass without gradients
runs between the steps that are timed, in a profile and in a verification, and the ratio of the two is how much the
device has drifted:

    profile:  step 0.60 s, yardstick 0.15 s       verify:  step 0.72 s, yardstick 0.18 s  ──▶  the device, not the plan

It has the model's own mix of work, and takes less memory than any step of it. A fixed piece of work tells less: with
matrix products in its place, transformers were 1-3% off and convolutional networks 5-12% (studies/LOG.md). Means are
compared, not medians: what slows a machine down comes in bursts. ``python -m studies.drift`` shows what it is worth.

A burst that hits one step and not the yardstick on either side of it would be taken for the step's own: a step of
GPT-2 once took 13.7 s between others of 8.5 s. Such a step does not count (``undisturbed``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from profiler.device import process_cpu_seconds, synchronize
from profiler.step import Stepper

SHARE = 0.2
"""How long the yardstick runs, in terms of the time of the steps that it runs beside."""


ALONE = 1.25
"""A step this many times as long as the others, each in terms of the slower yardstick beside it, was hit by a burst."""

FEWEST_STEPS = 3
"""Among fewer nobody can tell."""


class Yardstick:
    """A piece of work that is timed again and again, between the steps that are being timed.

    ``wall`` and ``cpu`` are the clocks that it is read on, in seconds.
    """

    def __init__(
        self,
        work: Callable[[], object],
        device: torch.device,
        *,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = process_cpu_seconds,
    ) -> None:
        self._work = work
        self._device = device
        self._wall = wall
        self._cpu = cpu
        self._readings: list[tuple[float, float]] = []
        self._owed_seconds = 0.0
        self._ratios: list[float] = []
        work()
        self.beside(0.0)

    @classmethod
    def of(cls, stepper: Stepper, batch: Any, device: torch.device) -> Yardstick:
        """The forward pass and loss of a micro-batch, without gradients, at the stepper's precision."""

        @torch.no_grad()
        def work() -> None:
            with stepper.autocast():
                stepper.loss(stepper.model, batch)

        return cls(work, device)

    def beside(self, step_seconds: float) -> None:
        """Run beside a step that took this long, or, where steps are short, beside every few of them."""
        before = self._readings[-1:]
        self._owed_seconds += SHARE * step_seconds
        while self._owed_seconds > 0 or not self._readings:
            synchronize(self._device)
            wall, cpu = self._wall(), self._cpu()
            self._work()
            synchronize(self._device)
            self._readings.append((self._wall() - wall, self._cpu() - cpu))
            self._owed_seconds -= self._readings[-1][0]
        if before:
            self._ratios.append(step_seconds / max(before[0][0], self._readings[-1][0]))

    def undisturbed(self) -> list[int]:
        """Which of the steps that it ran beside count, from 0."""
        ratios = self._ratios
        if len(ratios) < FEWEST_STEPS:
            return list(range(len(ratios)))
        limit = ALONE * statistics.median(ratios)
        return [index for index, ratio in enumerate(ratios) if ratio <= limit]

    def wall_seconds(self) -> float:
        """How long it took on the wall clock, in the mean over all runs."""
        return statistics.mean(wall for wall, _ in self._readings)

    def cpu_seconds(self) -> float:
        """The same on the process's CPU clock."""
        return statistics.mean(cpu for _, cpu in self._readings)

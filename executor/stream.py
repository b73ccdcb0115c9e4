"""The batches of a run, prepared ahead, of whatever size the next one is to have.

    take(32) ─▶ a batch        32, 32, 32 are being prepared
    take(48) ─▶ a batch        those are forgotten, 48, 48, 48 are being prepared

Samples come in the same order whatever the sizes are. ``position`` is what a run saves to come back to.
"""

from __future__ import annotations

from typing import Any

import torch

from executor.order import WHOLE, Dataset, OwnBatches, Position, Share, coming
from executor.prefetch import AHEAD, Loader


class Stream:
    """See the module. ``close`` ends its threads."""

    position: Position
    """Behind the last batch that was taken."""

    def __init__(
        self,
        dataset: Dataset | OwnBatches,
        seed: int,
        *,
        position: Position | None = None,
        share: Share = WHOLE,
        device: torch.device | None = None,
        ahead: int = AHEAD,
    ) -> None:
        self.position = position or Position()
        self._dataset = dataset
        self._seed = seed
        self._share = share
        self._device = device
        # A workload's own batches draw on torch's one generator, and so does the step.
        self._ahead = 0 if isinstance(dataset, OwnBatches) else ahead
        self._size: int | None = None
        self._loader: Loader | None = None
        self._waited_before = 0.0

    @property
    def waiting_seconds(self) -> float:
        """How long ``take`` took so far."""
        return self._waited_before + (self._loader.waiting_seconds if self._loader else 0.0)

    def take(self, size: int) -> Any:
        """The next ``size`` samples, or this process's share of them."""
        if size != self._size or self._loader is None:
            self.close()
            batches = coming(self._dataset, size, self._seed, self.position, self._share)
            self._loader = Loader((prepare for prepare, _ in batches), ahead=self._ahead, device=self._device)
            self._size = size
        batch = next(self._loader)
        self.position = self.position.then(self._dataset, size)
        return batch

    def close(self) -> None:
        """Forget what is prepared, and end the threads."""
        if self._loader is not None:
            self._waited_before = self.waiting_seconds
            loader, self._loader = self._loader, None
            loader.close()

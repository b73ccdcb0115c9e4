"""One wall of memory for every process of a study, whatever it imports.

    imports, threads started │ model, optimizer, steps
                        base ┘ <── at most budget + SLACK_BYTES ──>     RLIMIT_DATA = base + budget + SLACK_BYTES

What lies behind the wall is the model's and what its training takes, so a tool that imports more does not have less.
The slack is for what is no tensor: Python's objects, scratch memory of a math library, small blocks. It is the same
for all.

``RLIMIT_DATA`` counts the holes of a heap as well. With ``MALLOC_MMAP_THRESHOLD_`` held at what glibc begins with,
each block of 128 KiB or more goes back to the system when it is freed, and the limit counts what is alive: a step of a
vision transformer needs its peak of live tensors and 8 MiB. That makes all steps slower, as it would on any machine
that keeps no freed memory; all processes of the study are alike in it.

oneDNN is off: refused memory, it says "could not create a primitive", which no tool takes for a lack of memory.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from executor.trial import data_bytes

SLACK_BYTES = 16 * 2**20

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""Of every process behind a wall, besides the number of threads, which is that of the study."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wall:
    """A limit that can be raised and lifted; made before the model is."""

    base_bytes: int

    @classmethod
    def before_the_model(cls) -> Wall:
        """Starts the threads, and sees to it that this process is like all others of the study, walled or not."""
        if not sys.platform.startswith("linux"):
            raise SystemExit("Only Linux keeps a process's memory within a limit. Run this study on Linux.")
        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
        images = torch.randn(2, 8, 16, 16, requires_grad=True)
        F.conv2d(images, torch.randn(8, 8, 3, 3)).sum().backward()  # type: ignore[no-untyped-call]
        matrix = torch.randn(256, 256, requires_grad=True)
        (matrix @ matrix).sum().backward()  # type: ignore[no-untyped-call]
        wall = cls(base_bytes=data_bytes())
        wall.lift()
        return wall

    def stand(self, budget_bytes: int) -> None:
        """From now on an allocation that does not fit is refused."""
        _limit(self.base_bytes + budget_bytes + SLACK_BYTES)

    def lift(self) -> None:
        """All of the machine's memory: still a limit, so that nobody begins to keep freed memory."""
        _limit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _limit(limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, resource.RLIM_INFINITY))

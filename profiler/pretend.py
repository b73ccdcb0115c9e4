"""The surroundings of a step that costs no memory: fake floats, real integers, a device that is here or only named.

Modes see an operation in the reverse order of entering, which is the order that this module is about:

    standing_in ─▶ what watches ─▶ RealIntegers ─▶ FakeTensorMode
    (answers about the device)    (what stays real)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from profiler.absent import DEVICE, AbsentCuda, graph_ends, standing_in
from profiler.fake import RealIntegers, fake_batch, fake_parameters


@contextlib.contextmanager
def pretending(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    absent: AbsentCuda | None = None,
    watch: TorchDispatchMode | None = None,
) -> Iterator[list[Any]]:
    """Inside, ``model`` has fake parameters and buffers, and ``watch`` sees every operation; yields the batches, fake.

    ``absent``: the CUDA device that the fakes are on, else they are where the model is.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = DEVICE if absent else None
    fakes = [fake_batch(mode, batch, device) for batch in batches]
    with (
        fake_parameters(model, mode, device),
        mode,
        RealIntegers(device),
        graph_ends(model, absent),
        watch or contextlib.nullcontext(),
        standing_in(absent),
    ):
        yield fakes

"""Profiles behind a wall of memory, in a process of its own: ``python -m tests.profiled FOLDER``.

A plain step of 8 fits, and with it what a profile itself takes; one of 64 by far does not.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

import planner
import profiler
from executor.trial import data_bytes
from planner.cost import plain_peak_bytes
from profiler import records
from tests.walled import Tower, batch, loss

SIZES = (2, 8, 64)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = Tower()
    workload = profiler.Workload(model=model, batch=batch, loss=loss)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fake = profiler.profile(workload, SIZES, ("fp32",), "cpu", fake=True)
    limit = data_bytes() + round(1.3 * plain_peak_bytes(fake, "fp32", 8, 2))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    said: list[str] = []
    found = profiler.profile(workload, SIZES, ("fp32",), "cpu", steps=1, progress=said.append)
    records.write(folder / "profile.json", found)
    planner.optimize(found, 64).save(folder / "plan.json")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "fp32: micro-batch 64 was refused memory, left out like all larger ones" in said, said
    try:
        profiler.profile(workload, (64,), ("fp32",), "cpu", steps=1)
    except ValueError as refused:
        (folder / "refused.txt").write_text(str(refused))
    return 0


if __name__ == "__main__":
    sys.exit(main())

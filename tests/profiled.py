"""Profiles behind a wall of memory, in a process of its own: ``python -m tests.profiled FOLDER``.

A plain step of 4 fits, and with it what a profile itself takes. One of 8 does not, but in segments it does; of one of
256 not even a single operation fits.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec
import torch

import executor
import planner
import profiler
from executor.trial import data_bytes
from planner.cost import instead, plain_peak_bytes
from profiler import records
from tests.walled import Tower, batch, loss

SIZES = (2, 4, 8, 256)

OF_THE_PROFILE_BYTES = 70 * 2**20


def main() -> int:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = Tower()
    workload = profiler.Workload(model=model, batch=batch, loss=loss)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fake = profiler.profile(workload, SIZES, ("fp32",), "cpu", fake=True)
    limit = data_bytes() + plain_peak_bytes(fake, "fp32", 4, 2) + OF_THE_PROFILE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    said: list[str] = []
    found = profiler.profile(workload, SIZES, ("fp32",), "cpu", steps=1, progress=said.append)
    records.write(folder / "profile.json", found)
    planner.optimize(found, 64).save(folder / "plan.json")
    assert "fp32: timing micro-batch 8, what it saves kept elsewhere" in said, said
    assert "fp32: micro-batch 256 was refused memory, left out like all larger ones" in said, said
    try:
        profiler.profile(workload, (256,), ("fp32",), "cpu", steps=1)
    except ValueError as refused:
        (folder / "refused.txt").write_text(str(refused))
    # Where nothing fits that is not in segments.
    alone = profiler.profile(workload, (8,), ("fp32",), "cpu", steps=1)
    records.write(folder / "alone.json", alone)
    budget = round(0.5 * plain_peak_bytes(fake, "fp32", 8, 2))
    plan = planner.optimize(alone, 32, memory_budget_bytes=budget)
    plan.save(folder / "alone.plan.json")
    verified = executor.verify(plan, workload, steps=1)
    (folder / "verified.json").write_bytes(msgspec.json.encode(verified))
    try:
        executor.verify(instead(plan, plan.baselines.plain), workload, steps=1)
    except executor.OutOfMemory as error:
        (folder / "out-of-memory.txt").write_text(str(error))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return 0


if __name__ == "__main__":
    sys.exit(main())

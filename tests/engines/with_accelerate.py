"""Two steps with Accelerate, as its launcher set it up: with_accelerate.py PLAN RESULT."""

import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator

from planner.plan import load_plan
from tests.engines.network import Network, dataset, report

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # As in executor/distributed.py.
plan = load_plan(sys.argv[1])


def train(model: Network) -> dict[str, int]:
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(
        dataset(2 * plan.global_batch_size), batch_size=plan.micro_batch_size
    )
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    updates = 0
    for micro_batch in loader:
        with accelerator.accumulate(engine):
            accelerator.backward(engine(**micro_batch)["loss"])
            updates += accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
    return {
        "accumulation": accelerator.gradient_accumulation_steps,
        "effective_batch": engine.train_batch_size(),
        "steps": engine.global_steps,
        "updates": updates,
    }


Path(sys.argv[2]).write_text(report(plan, train))

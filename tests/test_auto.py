"""``planner.auto_checkpoint``: one line, real steps after it, and a real wall of memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import planner
from executor.auto import default_loss
from profiler.allocator import measure_step
from profiler.step import Stepper, build_optimizer
from tests.models import cnn, gpt2

CPU = torch.device("cpu")


class Tower(nn.Module):
    """Blocks called in a loop with a keyword argument, a tuple from each, dropout between them."""

    def __init__(self, blocks: int = 6, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, self.seen = block(x, scale=0.5)
            x = nn.functional.dropout(x, 0.1, self.training)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 8 * width)
        self.narrow = nn.Linear(8 * width, width)

    def forward(self, x: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.narrow(torch.tanh(self.wide(x)).square())
        return x + scale * y, y.mean().detach()


def gradients(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    torch.manual_seed(11)
    model.zero_grad()
    default_loss(model, batch).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def peak_bytes(model: nn.Module, batch: Any) -> int:
    """Of the second step with AdamW, by the allocator."""
    stepper = Stepper(
        model=model,
        loss=default_loss,
        optimizer=build_optimizer("adamw", model),
        precision="fp32",
        device_type="cpu",
    )
    stepper.step([batch], 1)
    return measure_step(lambda: stepper.step([batch], 1), model, stepper.optimizer, [batch], CPU).peak_bytes


def batch_of(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    if name == "tower":
        return Tower(), torch.randn(256, 32)
    if name == "gpt2":
        workload = gpt2(layers=4)
        return workload.model, workload.batch(8)
    return cnn(8).model, torch.randn(16, 3, 16, 16)


@pytest.mark.parametrize("name", ["tower", "gpt2", "cnn"])
@pytest.mark.parametrize("budget", ["85%", "65%"])
def test_a_model_fits_the_budget_and_its_gradients_keep_every_bit(name: str, budget: str) -> None:
    model, batch = batch_of(name)
    names = list(model.state_dict())
    plain, plain_peak = gradients(model, batch), peak_bytes(copy.deepcopy(model), batch)
    same, checkpointed = planner.auto_checkpoint(model, batch, memory_budget=budget)
    assert same is model
    assert list(model.state_dict()) == names
    assert all(map(torch.equal, plain, gradients(model, batch)))
    assert checkpointed.plan.checkpoint
    assert checkpointed.plan.prediction.error.peak_memory_bytes <= 0.01
    limit = int(budget[:-1]) / 100 * plain_peak
    assert peak_bytes(model, batch) <= limit * 1.001
    checkpointed.remove()
    assert not model._forward_pre_hooks
    assert str(checkpointed).startswith(f"{type(model).__name__}: peak ")


def test_an_impossible_budget_names_the_tightest_plan_and_leaves_the_model_as_it_was() -> None:
    model, batch = batch_of("tower")
    model.eval()
    with pytest.raises(planner.NoFeasiblePlan, match="the tightest needs") as refused:
        planner.auto_checkpoint(model, batch, memory_budget="1MB")
    assert refused.value.tightest.peak_memory_bytes > 10**6
    assert not model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_under_autocast_the_plan_is_for_its_precision() -> None:
    model, batch = batch_of("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        _, checkpointed = planner.auto_checkpoint(model, batch, memory_budget="90%")
    assert checkpointed.plan.precision == "bf16"


@pytest.mark.parametrize("budget", ["0%", "120%", "some%", "8 parsecs"])
def test_a_budget_that_is_none_is_refused(budget: str) -> None:
    model, batch = batch_of("tower")
    with pytest.raises(ValueError, match=r"memory_budget must be|a size is"):
        planner.auto_checkpoint(model, batch, memory_budget=budget)


def test_a_batch_without_tensors_and_a_model_without_floats_are_refused() -> None:
    model, _ = batch_of("tower")
    with pytest.raises(ValueError, match="batch must hold a tensor"):
        planner.auto_checkpoint(model, {"x": 3}, memory_budget="50%")
    with pytest.raises(ValueError, match="must return a loss or a tensor of floats"):
        default_loss(nn.Flatten(), torch.ones(2, 3, dtype=torch.long))


WALL = """
import resource, sys
import torch
from torch import nn
import planner
from tests.test_auto import Tower
import executor.auto, torch._dynamo

torch.set_num_threads(1)
torch.manual_seed(0)
model, batch = Tower(blocks=24, width=128), torch.randn(2048, 128)
step_bytes = {budget}


def used_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


there = sum(p.numel() * 4 for p in model.parameters()) + batch.numel() * 4
wall = used_bytes() - there + step_bytes + {code_bytes}
resource.setrlimit(resource.RLIMIT_DATA, (wall, wall))
if {checkpointed}:
    _, done = planner.auto_checkpoint(model, batch, memory_budget=step_bytes, optimizer="sgd")
    print(done)
    print("VmData", used_bytes() - wall)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(3):
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained", float(loss))
"""


CODE_BYTES = 2**27
"""For what planning itself brings into memory: modules, compiled code, fake tensors."""


def test_behind_a_real_wall_the_plain_model_dies_and_the_checkpointed_one_trains() -> None:
    """24 blocks that hold some tensors of 1 MiB and several of 8 MiB each need about 480 MiB. Planning is behind the
    same wall."""

    def run(checkpointed: bool) -> subprocess.CompletedProcess[str]:
        code = WALL.format(budget=250 * 2**20, code_bytes=CODE_BYTES, checkpointed=checkpointed)
        # Else glibc keeps freed blocks of megabytes on its heap, where holes between them count as well.
        own_blocks = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=own_blocks
        )

    plain, ours = run(False), run(True)
    assert plain.returncode != 0
    assert "can't allocate memory" in plain.stderr, plain.stderr
    assert ours.returncode == 0, ours.stderr
    assert "trained" in ours.stdout

"""Run a plan in several processes: DeepSpeed with the configuration that the plan was predicted for.

Started once per process by torchrun, which tells each who it is; no ssh, no hostfile:

    torchrun --nproc-per-node 2 train.py
        executor.distributed.join("cpu")
        step = executor.distributed.prepare(model, optimizer, plan, loss=loss)
        for batch in loader:              # this process's share of a global batch
            value = step(batch)           # k micro-batches, gradients summed over all processes, update

The k micro-batches, the division of the loss by k and the clipping are those of a step in one process
(profiler/step.py); between processes gradients are averaged. Recomputed segments work as they do there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from executor.engine import apply_checkpoints
from executor.errors import PlanDoesNotFit
from executor.recompute import Checkpoints
from planner.export import deepspeed_config
from planner.plan import Plan
from planner.zero import BUCKET_ELEMENTS
from profiler.device import keep_freed_memory
from profiler.step import Loss
from profiler.timing import to_device
from profiler.workload import split

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What DeepSpeed prints goes to stderr: stdout is the caller's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def join(device_type: str) -> int:
    """Meet the other processes that torchrun started; this one's rank. Imports DeepSpeed, which takes seconds."""
    if "RANK" not in os.environ:
        raise PlanDoesNotFit(
            "A plan for several processes must be started once per process, and no RANK is set here. "
            "Start it with torchrun --nproc-per-node N."
        )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _stdout_kept_clean():
        import deepspeed
        from deepspeed.utils import logger

        for handler in logger.handlers:
            handler.setStream(sys.stderr)
        # Only DeepSpeed's inference uses this kernel, and building it takes minutes and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend_of(device_type), verbose=False)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank()


def leave() -> None:
    """Part from the other processes."""
    torch.distributed.destroy_process_group()


def backend_of(device_type: str) -> str:
    """The library that sums between devices of a kind."""
    return "nccl" if device_type == "cuda" else "gloo"


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    zero_stage: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
) -> DeepSpeedEngine:
    """DeepSpeed's engine for a model and an optimizer over its trainable parameters, in a process that joined."""
    import deepspeed

    config = deepspeed_config(
        zero_stage=zero_stage,
        world_size=torch.distributed.get_world_size(),
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    with _stdout_kept_clean():
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # Stage 0 sums in buckets of a fixed 500 million gradients if left alone; ``run_step`` names the size instead.
    engine.enable_backward_allreduce = zero_stage > 0
    return engine


def run_step(engine: DeepSpeedEngine, loss: Loss, micro_batches: Iterator[Any]) -> torch.Tensor:
    """One optimizer step; the mean loss of this process's micro-batches, detached.

    Raises ValueError when there are not gradient_accumulation_steps of them.
    """
    k = engine.gradient_accumulation_steps()
    total: torch.Tensor | None = None
    seen = 0
    for micro_batch in micro_batches:
        if seen == k:
            raise ValueError(f"A step takes gradient_accumulation_steps = {k} micro-batches, got more.")
        value = loss(engine, micro_batch)
        engine.backward(value)
        detached = value.detach() / k
        total = detached if total is None else total + detached
        del value, detached, micro_batch
        seen += 1
        if seen == k and not engine.enable_backward_allreduce:
            engine.allreduce_gradients(bucket_size=BUCKET_ELEMENTS)
        engine.step()
    if seen != k or total is None:
        raise ValueError(f"A step takes gradient_accumulation_steps = {k} micro-batches, got {seen}.")
    return total


class DistributedStep:
    """One planned optimizer step at a call; see ``prepare``."""

    def __init__(self, engine: DeepSpeedEngine, plan: Plan, loss: Loss, checkpoints: Checkpoints) -> None:
        self.engine = engine
        self.checkpoints = checkpoints
        self._plan = plan
        self._loss = loss

    def __call__(self, batch: Any) -> torch.Tensor:
        """Run one step on this process's share of a global batch, or on an iterator of its micro-batches."""
        plan = self._plan
        k = plan.gradient_accumulation_steps
        micro_batches = batch if isinstance(batch, Iterator) else split(batch, plan.micro_batch_size * k, k)
        device = self.engine.device
        return run_step(self.engine, self._loss, (to_device(mb, device) for mb in micro_batches))

    def remove(self) -> None:
        """Take the plan's segments off the model."""
        self.checkpoints.remove()


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, loss: Loss) -> DistributedStep:
    """Make ``step(batch)`` of a plan in a process that joined. Raises PlanDoesNotFit for another number of them.

    ``optimizer`` is over the model's trainable parameters in the model's order, as ``build_optimizer`` makes it.
    """
    world_size = torch.distributed.get_world_size()
    if plan.world_size != world_size:
        raise PlanDoesNotFit(
            f"The plan is for {plan.world_size} processes, and {world_size} were started. "
            f"Start it with torchrun --nproc-per-node {plan.world_size}, or optimise for --world-size {world_size}."
        )
    if plan.precision != "fp32":
        raise PlanDoesNotFit(
            f"A plan for several processes must be in fp32, got {plan.precision}. Optimise with --precision fp32."
        )
    if plan.zero_stage == 3 and plan.checkpoint:
        raise PlanDoesNotFit(
            "A plan with ZeRO stage 3 must recompute nothing: DeepSpeed's hooks, which gather parameters, make "
            f"tensors that a segment cannot replay. Got {len(plan.checkpoint)} segments. "
            "Optimise with --zero-stage 0,1,2."
        )
    checkpoints = apply_checkpoints(model, plan)
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    engine = start_engine(
        model,
        optimizer,
        zero_stage=plan.zero_stage,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )
    return DistributedStep(engine, plan, loss, checkpoints)

"""Run a plan in several processes: DeepSpeed with the configuration that the plan was predicted for.

Started once per process by torchrun, which tells each who it is; no ssh, no hostfile:

    torchrun --nproc-per-node 2 train.py
        executor.distributed.join("cpu", plan.device.threads)
        executor.distributed.check_same_plan(plan)
        step = executor.distributed.prepare(model, optimizer, plan, loss=loss)
        for batch in loader:              # this process's share of a global batch
            value = step(batch)           # k micro-batches, gradients summed over all processes, update

The k micro-batches, the division of the loss by k and the clipping are those of a step in one process
(profiler/step.py); between processes gradients are averaged. Recomputed segments work as they do there.

What DeepSpeed deals out, a saved state holds in parts: each process saves its own, and as many processes must resume.
At stage 0 nothing is dealt out, so every process's state is whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from executor import state, zero_state
from executor.engine import apply_checkpoints
from executor.errors import PlanDoesNotFit
from executor.recompute import Checkpoints
from executor.state import Tree
from planner.export import deepspeed_config
from planner.plan import Plan
from planner.zero import BUCKET_ELEMENTS, SEVERAL_PRECISIONS
from profiler.freed_memory import FreedMemoryGuard, keep_freed_memory
from profiler.profile_record import Precision
from profiler.step import Loss, autocast
from profiler.timing import to_device
from profiler.workload import split

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What DeepSpeed prints goes to stderr: stdout is the caller's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def join(device_type: str, threads: int | None = None) -> int:
    """Meet the other processes that torchrun started; this one's rank. Imports DeepSpeed, which takes seconds.

    ``threads``: of this process on a CPU, those that the plan was profiled with. torchrun gives one unless it is told.
    """
    if "RANK" not in os.environ:
        raise PlanDoesNotFit(
            "A plan for several processes must be started once per process, and no RANK is set here. "
            "Start it with torchrun --nproc-per-node N."
        )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
    # DeepSpeed calls collectives by the names that they had before torch 2.14, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
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


def check_same_plan(plan: Plan) -> None:
    """Raise ValueError in every process when they were not all given the same plan. All processes at once."""
    own = torch.tensor(list(bytes.fromhex(plan.sha256)), dtype=torch.uint8, device=collective_device())
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, own)
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(gathered):
        ranks.setdefault(bytes(digest.tolist()).hex(), []).append(rank)
    if len(ranks) > 1:
        found = "; ".join(f"{sha256} in {_of_ranks(numbers)}" for sha256, numbers in ranks.items())
        raise ValueError(
            f"All processes must train with the same plan, and their sha256 differ: {found}. Give every process the "
            "same file."
        )


def _of_ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def collective_device() -> torch.device:
    """Where tensors must be for the processes to exchange them."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


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
    precision: Precision = "fp32",
) -> DeepSpeedEngine:
    """DeepSpeed's engine for a model and an optimizer over its trainable parameters, in a process that joined."""
    import deepspeed

    config = deepspeed_config(
        zero_stage=zero_stage,
        world_size=torch.distributed.get_world_size(),
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        precision=precision,
    )
    with _stdout_kept_clean():
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # Stage 0 sums in buckets of a fixed 500 million gradients if left alone; ``run_step`` names the size instead.
    engine.enable_backward_allreduce = zero_stage > 0
    if zero_stage == 0:
        _clip_as_one_process_does(engine)
    return engine


def _clip_as_one_process_does(engine: DeepSpeedEngine) -> None:
    """Stage 0: all gradients are in every process, whose norm needs no further sum. DeepSpeed's own forgets it.

    Where it is no finite number nothing is updated, as at the later stages: DeepSpeed asks an optimizer for
    ``overflow`` and counts such a step, and an optimizer leaves alone what has no gradient.
    """

    def clip() -> None:
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
        engine._global_grad_norm = norm
        engine.optimizer.overflow = not bool(torch.isfinite(norm))
        if engine.optimizer.overflow:
            engine.module.zero_grad(set_to_none=True)

    engine.clip_fp32_gradients = clip


def run_step(
    engine: DeepSpeedEngine, loss: Loss, micro_batches: Iterator[Any], precision: Precision = "fp32"
) -> torch.Tensor:
    """One optimizer step; the mean loss of this process's micro-batches, detached. ``precision``: the engine's.

    Raises ValueError when there are not gradient_accumulation_steps of them.
    """
    k = engine.gradient_accumulation_steps()
    total: torch.Tensor | None = None
    seen = 0
    for micro_batch in micro_batches:
        if seen == k:
            raise ValueError(f"A step takes gradient_accumulation_steps = {k} micro-batches, got more.")
        with autocast(precision, engine.device.type):
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
    """One planned optimizer step at a call; see ``prepare``. It is an ``Engine`` (executor/engines.py)."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        loss: Loss,
        checkpoints: Checkpoints,
        guard: FreedMemoryGuard | None,
    ) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.checkpoints = checkpoints
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self._plan = plan
        self._loss = loss
        self._skipped = False
        self._guard = guard

    def __call__(self, batch: Any) -> torch.Tensor:
        """Run one step on this process's share of a global batch, or on an iterator of its micro-batches."""
        plan = self._plan
        k = plan.gradient_accumulation_steps
        micro_batches = batch if isinstance(batch, Iterator) else split(batch, plan.micro_batch_size * k, k)
        device = self.engine.device
        on_device = (to_device(mb, device) for mb in micro_batches)
        value = run_step(self.engine, self._loss, on_device, plan.precision)
        self._skipped = not self.engine.was_step_applied()
        if self._guard is not None:
            self._guard.stepped()
        return value

    def step(self, batch: Any) -> torch.Tensor:
        """A call, by the name that all engines have for it."""
        return self(batch)

    @property
    def model(self) -> nn.Module:
        """At stage 3 its parameters are there only while their module runs."""
        module: nn.Module = self.engine.module
        return module

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def gradient_norm(self) -> float | None:
        """Of the last step, of all processes' mean gradient before clipping; None before the first."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing because gradients were not finite."""
        return self._skipped

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes. All processes at once, and it waits for them."""
        summed = value.detach().clone()
        torch.distributed.all_reduce(summed)
        return summed / self.world_size

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. All processes at once, and it waits for them."""
        said = torch.tensor(float(flag), device=collective_device())
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return bool(said)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.agree(False)

    def state(self) -> Tree:
        """What this process has to remember; of all processes together nothing is missing. Between steps only."""
        engine = self.engine
        return {
            **self._facts(),
            "steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "samples": engine.global_samples,
            "weights": dict(state.detached(self._own_weights())),
            "optimizer": zero_state.take(engine),
        }

    def load_state(self, tree: Any) -> None:
        """Go on from a state of the process of this rank. All processes at once.

        Raises ValueError for a state of another rank, another number of processes, another stage or another model.
        """
        state.check_made_by(tree, **self._facts())
        state.fill(self._own_weights(), tree["weights"])
        zero_state.give(self.engine, tree["optimizer"])
        self.engine.global_steps = tree["steps"]
        self.engine.skipped_steps = tree["skipped_steps"]
        self.engine.global_samples = tree["samples"]

    def _facts(self) -> dict[str, Tree]:
        return {
            "engine": "deepspeed",
            "zero_stage": self._plan.zero_stage,
            "world_size": self.world_size,
            "rank": self.rank,
        }

    def _own_weights(self) -> dict[str, torch.Tensor]:
        """Of the weights, those that the optimizer's state does not have: at stages 1 to 3 it has all it updates."""
        found = state.weights(self.model)
        if self._plan.zero_stage == 0:
            return found
        own = {}
        for name, tensor in found.items():
            if not isinstance(tensor, nn.Parameter):
                own[name] = tensor
            elif not tensor.requires_grad:
                own[name] = tensor if self._plan.zero_stage < 3 else _part(tensor)
        return own

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The model's parameters and buffers, each once, under the first of its names, in the first process.

        None in the others. All processes at once. At stage 3 they are gathered one by one, and are copies on the CPU.
        """
        found = state.weights(self.model)
        if self._plan.zero_stage < 3:
            return state.detached(found) if self.is_first else None
        whole = {}
        for name, tensor in found.items():
            with _gathered(tensor):
                if self.is_first:
                    whole[name] = tensor.detach().to("cpu", copy=True)
        return whole if self.is_first else None

    def remove(self) -> None:
        """Take the plan's segments and DeepSpeed's hooks off the model. At stage 3 it keeps only its part of it."""
        self.checkpoints.remove()
        self.engine.destroy()


def _part(parameter: Any) -> torch.Tensor:
    """What stage 3 leaves of a parameter in this process."""
    part: torch.Tensor = parameter.ds_tensor
    return part


def _gathered(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """While it lasts a parameter is whole here; it may have been all along."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    status = getattr(tensor, "ds_status", ZeroParamStatus.AVAILABLE)  # A buffer has none.
    if status is ZeroParamStatus.AVAILABLE:
        return contextlib.nullcontext()
    gathering: contextlib.AbstractContextManager[None] = GatheredParameters([tensor])
    return gathering


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
    if plan.precision not in SEVERAL_PRECISIONS:
        raise PlanDoesNotFit(
            f"A plan for several processes must be in fp32 or bf16, got {plan.precision}. "
            "Optimise with --precision fp32,bf16."
        )
    if plan.zero_stage > 0 and plan.optimizer == "adafactor":
        raise PlanDoesNotFit(
            "A plan with adafactor must have ZeRO stage 0: it keeps averages of a matrix's rows and columns, and the "
            f"later stages flatten matrices. Got stage {plan.zero_stage}. Optimise with --zero-stage 0."
        )
    if plan.zero_stage == 3 and plan.loss_chunks is not None:
        raise PlanDoesNotFit(
            "A plan with ZeRO stage 3 must have its loss in one piece: chunks use the head's weight outside of the "
            f"head, where DeepSpeed has not gathered it. Got {plan.loss_chunks} chunks. "
            "Optimise with --zero-stage 0,1,2."
        )
    checkpoints = apply_checkpoints(model, plan)
    if plan.zero_stage == 3:
        # DeepSpeed's hooks, which gather a module's parameters, must be called again in a replay, so they go on first.
        checkpoints.remove()
    keeps = next(model.parameters()).device.type == "cpu" and keep_freed_memory()
    engine = start_engine(
        model,
        optimizer,
        zero_stage=plan.zero_stage,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        precision=plan.precision,
    )
    if plan.zero_stage == 3:
        checkpoints = apply_checkpoints(model, plan, hooked=True)
    return DistributedStep(engine, optimizer, plan, loss, checkpoints, FreedMemoryGuard() if keeps else None)

"""torch's own planner of selective checkpoints, ``sac_milp``, as a rival: its statistics, its solver, its policies.

It asks a GPU's data sheet how long operations take, which a CPU has not; there it gets the roofline that our profiles
without a step are made with, and everything else is its own. It needs
``pulp`` and ``pwlf`` (``pip install -e '.[studies]'``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.ilp_utils import (
    aggregate_stats,
    get_peak_memory_runtime_baseline,
    parse_module_info,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.runtime_estimator import RuntimeEstimator
from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP, SACEstimator
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from profiler.fake import RealIntegers
from profiler.roofline import CPU_EFFICIENCY, operation_of, seconds
from profiler.unmeasured import cpu_rates
from profiler.workload import Workload


class Mismatch(Exception):
    """A module runs other operations than those that the plan was made for."""


class SacPlanner:
    """What ``sac_milp`` knows of a model, from fake steps of one micro-batch.

    ``plain_bytes``: the peak that it expects without checkpoints; it leaves out the optimizer.
    """

    def __init__(self, build: Callable[[], Workload], size: int, device: torch.device) -> None:
        # Here, because it needs pulp, which those who do not ask for this rival need not have.
        from torch.distributed._tools import sac_ilp

        self._solver = sac_ilp
        times = RuntimeEstimator()("operator-level-cost-model")
        selective = SACEstimator()
        if device.type == "cpu":
            timed = _roofline()
            times._estimate = timed
            selective._estimate_runtime = timed
        with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers(device), torch.device(device):
            workload = build()
            model = workload.model
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
            batch = workload.batch(size)

            def step() -> None:
                optimizer.zero_grad()
                workload.loss(model, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

            step()
            memory = MemTracker()
            memory.track_external(model, optimizer)
            with memory:
                step()
                memory.reset_mod_stats()
                step()
            with times:
                step()
            with selective:
                loss = workload.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self._statistics = selective.sac_mod_stats
        self._graph = parse_module_info(aggregate_stats(model, memory, times, selective, device))
        self.plain_bytes = get_peak_memory_runtime_baseline(self._graph)[0]

    def policies(self, budget_bytes: int) -> dict[str, list[bool]] | None:
        """By module: of each of its operations in order, whether its output is kept. None: it found no plan."""
        discarded, _, peak_bytes = self._solver.sac_milp(self._graph, budget_bytes / 2**30)
        if peak_bytes < 0:
            return None
        found = {}
        for name, share in discarded.items():
            kept = self._solver.get_optimal_checkpointing_policy_per_module(self._statistics[name], 1 - share)
            found[name.partition(".")[2]] = [bool(each) for each in kept]
        return found


@contextlib.contextmanager
def applied(model: nn.Module, policies: dict[str, list[bool]]) -> Iterator[nn.Module]:
    """The model with torch's selective checkpoints around those modules."""
    modules = {name: model.get_submodule(name) for name in policies}
    try:
        for name, module in modules.items():
            contexts = functools.partial(_contexts, name, policies[name])
            module.forward = functools.partial(
                checkpoint, module.forward, use_reentrant=False, context_fn=contexts
            )
        yield model
    finally:
        for module in modules.values():
            del module.forward


def _contexts(name: str, kept: list[bool]) -> Any:
    """A policy counts the operations of one forward pass, and again those of its recomputation."""
    counts = {False: 0, True: 0}

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if function in OPS_TO_ALWAYS_SKIP:
            return CheckpointPolicy.PREFER_RECOMPUTE
        position = counts[context.is_recompute]
        counts[context.is_recompute] += 1
        if position >= len(kept):
            raise Mismatch(f"{name} runs more operations than the {len(kept)} of the plan: {function}")
        return CheckpointPolicy.MUST_SAVE if kept[position] else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _roofline() -> Callable[..., tuple[Any, float]]:
    """An operation's outputs and its milliseconds on this CPU."""
    rates = cpu_rates(("fp32",))

    def timed(function: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        operation = operation_of(function, args, kwargs, outputs)
        taken = seconds([operation], rates, CPU_EFFICIENCY) if operation is not None else 0.0
        return outputs, 1e3 * taken

    return timed

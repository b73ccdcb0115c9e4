"""Hold a plan of several processes against reality, in each of them; they come to one verdict.

    watched: model, engine, two steps, the third one's peak ─▶ n timed steps between barriers ─▶ the largest of all

The peak is that of the process that needs most, as the plan predicts it, and the time that of the slowest. At stage 3
of ZeRO no yardstick runs between the steps: a forward pass there gathers parameters from all processes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from executor import distributed
from executor.distributed import DistributedStep
from executor.verification import Clocks, Progress, Verification, build_workload, compare, device_here
from executor.watched import collectives_let_go, levels_of
from planner.plan import Cost, Plan
from profiler.allocator import bytes_of
from profiler.step import autocast, build_optimizer
from profiler.timing import MOST_STEPS, SHORTEST_SECONDS, to_device
from profiler.workload import Workload
from profiler.yardstick import Yardstick

WATCHED_STEPS = 3
"""The optimizer's state is there from the first, and the last is measured."""

MEASURED = "planner: measured step"


def verify_as_rank(
    plan: Plan,
    workload: Workload | None = None,
    *,
    steps: int = 5,
    progress: Progress = lambda message: None,
) -> Verification:
    """Join the other processes of the plan, run it with them and compare; all get the same verdict.

    ``steps`` optimizer steps are timed, more where they are short. The learning rate is zero, but a model that is
    passed in is the engine's afterwards. Raises PlanDoesNotFit, and ValueError where another has another plan.
    """
    with collectives_let_go() as watched:
        distributed.join(plan.device.kind, plan.device.threads)
        distributed.check_same_plan(plan)
        device = device_here(plan)
        progress("building the model")
        before = 0
        if workload is not None:
            model = workload.model
            before = bytes_of(itertools.chain(model.parameters(), model.buffers()))
        peaks = _PeakOnCpu(before) if device.type == "cpu" else _PeakOnCuda(device)
        with peaks:
            workload = workload or build_workload(plan)
            engine = distributed.prepare(
                workload.model.train().to(device),
                build_optimizer(plan.optimizer, workload.model, learning_rate=0.0, weight_decay=0.0),
                plan,
                workload.loss,
            )
            batch = workload.worst_batch(plan.micro_batch_size * plan.gradient_accumulation_steps)
            for step in range(WATCHED_STEPS):
                progress("warming up" if step < WATCHED_STEPS - 1 else "measuring peak memory")
                with peaks.measuring() if step == WATCHED_STEPS - 1 else contextlib.nullcontext():
                    engine.step(batch)
        watched.clear()
        del batch
        peak_bytes, reserved_bytes = peaks.found()
        clocks, yardstick = _timed(engine, plan, workload, device, steps, progress)
        counted = range(len(clocks.wall)) if yardstick is None else yardstick.undisturbed()
        seconds, peak, reserved = _largest(
            statistics.mean(clocks.wall[index] for index in counted), peak_bytes, reserved_bytes or 0
        )
        speed = None if yardstick is None else float(engine.mean(torch.tensor(yardstick.wall_seconds())))
        engine.remove()
        distributed.leave()
    measured = Cost(
        step_seconds=seconds,
        step_cpu_seconds=None,
        peak_memory_bytes=round(peak),
        peak_reserved_bytes=None if reserved_bytes is None else round(reserved),
        step_joules=None,
    )
    return compare(plan, measured, len(counted), None, speed)


def _timed(
    engine: DistributedStep,
    plan: Plan,
    workload: Workload,
    device: torch.device,
    steps: int,
    progress: Progress,
) -> tuple[Clocks, Yardstick | None]:
    """Steps that begin together, as many in each process, and what tells how fast the device was meanwhile."""
    batch = workload.batch(plan.micro_batch_size * plan.gradient_accumulation_steps)
    clocks, yardstick = Clocks(), None
    if plan.zero_stage < 3:
        micro_batch = to_device(workload.batch(plan.micro_batch_size), device)

        @torch.no_grad()
        def forward() -> None:
            with autocast(plan.precision, device.type):
                workload.loss(engine.model, micro_batch)

        yardstick = Yardstick(forward, device)
    while engine.agree(
        len(clocks.wall) < steps or (sum(clocks.wall) < SHORTEST_SECONDS and len(clocks.wall) < MOST_STEPS)
    ):
        progress(f"timing step {len(clocks.wall) + 1} of {max(steps, len(clocks.wall) + 1)}")
        engine.barrier()
        with clocks.timing(device):
            engine.step(batch)
        if yardstick is not None:
            yardstick.beside(clocks.wall[-1])
    return clocks, yardstick


def _largest(*values: float) -> list[float]:
    """Of all processes. All processes at once."""
    found = torch.tensor(values, dtype=torch.float64, device=distributed.collective_device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [float(value) for value in found]


class _PeakOnCpu:
    """All that this process allocates, from before the model is made; ``before`` bytes of it were made already."""

    def __init__(self, before: int) -> None:
        self._before = before
        self._watching = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> None:
        gc.collect()
        self._watching.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._watching.__exit__(*error)  # type: ignore[no-untyped-call]

    def measuring(self) -> contextlib.AbstractContextManager[object]:
        """Around the step whose peak is asked for."""
        return record_function(MEASURED)

    def found(self) -> tuple[int, int | None]:
        """The peak, and what was reserved for it, which a CPU does not."""
        _, peak, _ = levels_of(self._watching, MEASURED)
        return self._before + peak, None


class _PeakOnCuda:
    """What the caching allocator gave out and reserved."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the step whose peak is asked for."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        torch.cuda.synchronize(self._device)

    def found(self) -> tuple[int, int | None]:
        """The peak, and what was reserved for it."""
        return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)

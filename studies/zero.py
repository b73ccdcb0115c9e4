"""Peak memory per process under ZeRO stages 0 to 3, predicted and measured, in real DeepSpeed processes.

Each row is a fresh pair of processes (gloo, one thread each) that takes three optimizer steps; the third is measured
to the byte by PyTorch's own CPU allocator, which has been watched since before the model was built:

    watch ─▶ model, engine ─▶ step 1 ─▶ step 2 ─▶ step 3: its highest point ─▶ stop watching ─▶ timed steps

How it is watched, says executor/watched.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from executor import distributed
from executor.watched import COLLECTIVES, collectives_let_go, levels_of
from planner.communication import Distribution
from planner.cost import predict, resident_batches
from planner.memory import peak_window, timeline
from planner.nested import PLAIN
from planner.zero import ZERO_STAGES, sharded
from profiler import device as devices
from profiler.measure import profile as profile_workload
from profiler.profile_record import Profile
from profiler.registry import build, seeded
from profiler.step import build_optimizer
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec
from studies.runs import provenance, write

WORLD_SIZE = 2
STEPS = 3
"""Optimizer steps; the optimizer's state is there from the first, and the last is measured."""

TIMED_STEPS = 3
TIME_LIMIT_SECONDS = 300
OPTIMIZER = "adamw"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one process trains on."""

    workload: Callable[[], Workload]
    micro_batch_size: int
    gradient_accumulation_steps: int


def gpt2_small() -> Workload:
    """GPT-2 small, whose embedding and head share a third of its parameters, at 64 tokens."""
    return build(WorkloadSpec(name="gpt2", sequence_length=64))


def mlp(layers: int) -> Workload:
    """Linear layers of 2,048 x 2,048, each larger than a third of the bucket."""
    width = 2048
    modules = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.GELU())]

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, width), torch.randn(size, width)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    return Workload(model=nn.Sequential(*modules[:-1]), batch=batch, loss=loss, name=f"mlp of {layers}")


CASES = {
    "gpt2": Case(workload=gpt2_small, micro_batch_size=1, gradient_accumulation_steps=1),
    "mlp": Case(workload=lambda: mlp(8), micro_batch_size=16, gradient_accumulation_steps=2),
}
QUICK = {
    "mlp-quick": Case(workload=lambda: mlp(3), micro_batch_size=16, gradient_accumulation_steps=2),
}


# The parent: predicts, starts pairs of processes, compares.


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One process. ``steady_bytes``: how much more is alive after the measured step than before it."""

    model: str
    zero_stage: int
    rank: int
    predicted_bytes: int
    measured_bytes: int
    steady_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def profiled(case: Case) -> Profile:
    """The workload alone in a process of one thread, and the link between two of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return profile_workload(
            case.workload(),
            (case.micro_batch_size,),
            ("fp32",),
            "cpu",
            optimizer=OPTIMIZER,
            steps=2,
            world_size=WORLD_SIZE,
        )
    finally:
        torch.set_num_threads(threads)


def rows(name: str, case: Case, found: Profile, zero_stage: int) -> list[Row]:
    """Both processes of one stage, started, measured and compared with what the profile says."""
    b, k = case.micro_batch_size, case.gradient_accumulation_steps
    fp32 = found.at("fp32")
    assert fp32 is not None
    spread = Distribution(world_size=WORLD_SIZE, zero_stage=zero_stage, link=found.link)
    seconds = predict(
        found, fp32, micro_batch_size=b, gradient_accumulation_steps=k, placed=PLAIN, distribution=spread
    ).step_seconds
    made = []
    for measured in measure(name, (zero_stage,))[zero_stage]:
        memory = sharded(
            fp32.memory_at(b), found.parameters, zero_stage=zero_stage, world_size=WORLD_SIZE,
            gradient_accumulation_steps=k, rank=measured["rank"], collectives=spread.collectives,
        )  # fmt: skip
        windows = timeline(
            memory, PLAIN, micro_batch_size=b, gradient_accumulation_steps=k,
            resident_batches=resident_batches(found, k),
        )  # fmt: skip
        made.append(
            Row(
                model=name,
                zero_stage=zero_stage,
                rank=measured["rank"],
                predicted_bytes=peak_window(windows).total_bytes,
                measured_bytes=measured["peak_bytes"],
                steady_bytes=measured["steady_bytes"],
                predicted_step_seconds=seconds,
                measured_step_seconds=measured["step_seconds"],
            )
        )
    return made


def measure(name: str, zero_stages: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """By stage, what each of a fresh pair of processes measured of itself; one pair for all of the stages."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(WORLD_SIZE), "-m", "studies.zero",
            "--case", name, "--folder", folder, "--stage", *map(str, zero_stages),
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIME_LIMIT_SECONDS,
        )
        if done.returncode:
            stages = ", ".join(map(str, zero_stages))
            raise RuntimeError(f"{name} under ZeRO stage {stages} failed: {done.stderr[-2000:]}")
        return {
            stage: [
                json.loads((Path(folder) / f"{stage}-{rank}.json").read_text()) for rank in range(WORLD_SIZE)
            ]
            for stage in zero_stages
        }


# One of the processes.


def work(case: Case, zero_stages: Sequence[int], folder: Path) -> None:
    """Train under one stage after the other, watch, and leave what was seen in the folder."""
    torch.set_num_threads(1)
    with collectives_let_go() as watching:
        rank = distributed.join("cpu")
        for zero_stage in zero_stages:
            watching.update(COLLECTIVES)
            seen = train(case, zero_stage, stop_watching=watching.clear)
            (folder / f"{zero_stage}-{rank}.json").write_text(json.dumps({"rank": rank} | seen))
            gc.collect()
    distributed.leave()


def train(case: Case, zero_stage: int, stop_watching: Callable[[], None]) -> dict[str, float]:
    """What a training run of its own measures in this process."""
    b, k = case.micro_batch_size, case.gradient_accumulation_steps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with seeded(0):
            workload = case.workload()
        engine = distributed.start_engine(
            workload.model.train(),
            build_optimizer(OPTIMIZER, workload.model),
            zero_stage=zero_stage,
            micro_batch_size=b,
            gradient_accumulation_steps=k,
        )
        batches = [workload.batch(b) for _ in range(k)]
        for step in range(STEPS):
            with record_function(f"step {step}"):
                distributed.run_step(engine, workload.loss, iter(batches))
    stop_watching()
    seconds = []
    for _ in range(TIMED_STEPS):
        torch.distributed.barrier()
        began = time.perf_counter()
        distributed.run_step(engine, workload.loss, iter(batches))
        seconds.append(time.perf_counter() - began)
    engine.destroy()
    before, peak, after = levels_of(profiler, f"step {STEPS - 1}")
    return {
        "peak_bytes": peak,
        "steady_bytes": after - before,
        "step_seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory per process under ZeRO, predicted and measured.")
    parser.add_argument("--quick", action="store_true", help="a small model, nothing written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        work((CASES | QUICK)[options.case], options.stage, options.folder)
        return
    made: list[Row] = []
    for name, case in (QUICK if options.quick else CASES).items():
        found = profiled(case)
        for zero_stage in ZERO_STAGES:
            for row in rows(name, case, found, zero_stage):
                made.append(row)
                predicted, measured = row.predicted_bytes / 2**20, row.measured_bytes / 2**20
                print(
                    f"{row.model:9} stage {row.zero_stage} rank {row.rank}  predicted {predicted:8.2f} MiB, measured "
                    f"{measured:8.2f} MiB, error {row.error:+.3%}   step predicted {row.predicted_step_seconds:.2f} s, "
                    f"measured {row.measured_step_seconds:.2f} s",
                    flush=True,
                )
    print(f"{len(made)} processes: largest error of a peak {max(abs(row.error) for row in made):.3%}")
    if not options.quick:
        print(f"written to {keep(made)}")


def keep(made: list[Row]) -> Path:
    """Write the results, with what they were made on and by."""
    head = provenance("python -m studies.zero") | {
        "device": devices.describe(torch.device("cpu")).name,
        "world_size": WORLD_SIZE,
        "cases": {
            name: {
                "micro_batch_size": case.micro_batch_size,
                "gradient_accumulation_steps": case.gradient_accumulation_steps,
            }
            for name, case in CASES.items()
        },
    }
    return write("zero", head | {"rows": [asdict(row) | {"error": row.error} for row in made]})


if __name__ == "__main__":
    main()

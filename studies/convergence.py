"""Is the global batch that the planner chooses for a target the one that gets there first?

    L(x) = x'Hx / 2     one sample's gradient  Hx + n,  n of covariance Sigma(x) = s(x) H
                        s(x) such that         phi = tr(H Sigma) / (g'Hg) = 64 wherever x is

Given: phi, eps_max = |g|^2 / g'Hg at the start, steps of a + c B seconds, and the steps of one run at batch 32. Each
batch trains at the constant rate of the theory, eps(B) = eps_max / (1 + phi / B) (McCandlish et al. 2018, equation
2.7), and beside it at rates around that. Measured: the steps of torch's SGD, sample by sample, until the loss is a
tenth of the first, as means over seeds; times a + c B that is the time to the target.

The curvatures h span two decades and every direction has the same share of the loss, so that it takes many steps
without any noise, as a network does. ``--fixed``: the noise stays as it is at the start while the gradient falls, so
phi grows on the way and is 64 at the start alone, which is all that a profile of the start can tell; the target is
then three tenths of the first loss.

    python -m studies.convergence            # a minute
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner import Reference, optimize_to_target
from profiler import noise
from profiler.profile_record import (
    DeviceRecord,
    PrecisionMemory,
    PrecisionProfile,
    Profile,
    ProfileCost,
    StageMemory,
    StageRecord,
    StageTime,
    StepTime,
)
from profiler.workload import Workload
from studies.runs import provenance, write

NOISE_SCALE = 64.0
DIRECTIONS = 64
TARGET = 0.1
"""Of the loss at the start."""

FIXED_TARGET = 0.3
"""The same with ``--fixed``: the noise keeps the small batches from getting much lower."""

BATCHES = (8, 16, 32, 64, 128, 256)
REFERENCE = 32
SEEDS = 16
MOST_STEPS = 1000
RATES = (0.7, 1.0, 1.2, 1.4)
"""In units of the theory's learning rate."""
SAMPLE_SECONDS = 0.001
OVERHEADS = (4, 16, 64, 256)
"""Of a step, in units of the seconds of a sample: the best batch is about the root of this times the noise scale."""


class Quadratic(nn.Module):
    """L(x), all curvatures and the start such that every direction has the same share of it."""

    curvatures: torch.Tensor

    def __init__(self, *, fixed_noise: bool = False) -> None:
        super().__init__()
        h = torch.logspace(0, -2, DIRECTIONS, dtype=torch.float64)
        self.register_buffer("curvatures", h)
        self.x = nn.Parameter(h.rsqrt())
        self._fixed = self._noise_variance() if fixed_noise else None

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """The mean loss of samples of standard normal numbers; each one's gradient is Hx + n."""
        variance = self._noise_variance() if self._fixed is None else self._fixed
        pushed = (samples * variance.sqrt()).mean(dim=0)
        return self.loss() + (pushed * (self.x - self.x.detach())).sum()

    def loss(self) -> torch.Tensor:
        return (self.curvatures * self.x.square()).sum() / 2

    def largest_rate(self) -> float:
        """eps_max here, the best rate of a step without noise."""
        g = self.curvatures * self.x.detach()
        return float(g.square().sum() / (self.curvatures * g.square()).sum())

    def _noise_variance(self) -> torch.Tensor:
        """The diagonal of Sigma here."""
        h = self.curvatures
        curved = (h**3 * self.x.detach().square()).sum()
        return NOISE_SCALE * curved / h.square().sum() * h


def workload(model: Quadratic) -> Workload:
    return Workload(
        model=model,
        batch=lambda size: torch.randn(size, DIRECTIONS, dtype=torch.float64),
        loss=lambda model, batch: model(batch),
    )


def train(
    batch_size: int, seed: int, *, rate_factor: float = 1.0, fixed_noise: bool = False
) -> tuple[int | None, Quadratic]:
    """Steps until the target with this batch, and the model then; None where it diverges or takes ``MOST_STEPS``."""
    torch.manual_seed(seed)
    model = Quadratic(fixed_noise=fixed_noise)
    rate = rate_factor * model.largest_rate() / (1 + NOISE_SCALE / batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    first = model.loss().item()
    target = first * (FIXED_TARGET if fixed_noise else TARGET)
    for step in range(MOST_STEPS):
        loss = model.loss().item()
        if loss <= target:
            return step, model
        if loss > 10 * first:
            break
        optimizer.zero_grad()
        model(torch.randn(batch_size, DIRECTIONS, dtype=torch.float64)).backward()
        optimizer.step()
    return None, model


def measured_steps(
    batch_size: int, *, seeds: int = SEEDS, rate_factor: float = 1.0, fixed_noise: bool = False
) -> float:
    """The mean steps to the target; infinity when a run does not get there."""
    counts = [
        train(batch_size, seed, rate_factor=rate_factor, fixed_noise=fixed_noise)[0] for seed in range(seeds)
    ]
    reached = [count for count in counts if count is not None]
    return statistics.fmean(reached) if len(reached) == len(counts) else math.inf


def profile_of(overhead_seconds: float, sample_seconds: float = SAMPLE_SECONDS) -> Profile:
    """A profile in which a step of B samples takes ``overhead_seconds + B * sample_seconds``, and no memory."""
    nothing = ((0.0, 0.0),)
    stage = StageMemory(
        input=(0.0, 0.0), saves_input=False, hold=(0.0, 0.0), dropped_hold=(0.0, 0.0), carry=(0.0, 0.0),
        gradient=(0.0, 0.0), forward=nothing, recompute=nothing, rebuild_first=nothing, rebuild_single=nothing,
        dropped=nothing, dropped_first=nothing, backward_first=nothing, backward_later=nothing,
    )  # fmt: skip
    memory = PrecisionMemory(
        parameter_bytes=8 * DIRECTIONS, buffer_bytes=0, optimizer_state_bytes=0, other_bytes=0,
        batch=(0.0, 0.0), optimizer=nothing, stages=(stage,),
    )  # fmt: skip

    def step(size: int) -> StepTime:
        half = sample_seconds * size / 2
        time = StageTime(
            forward_seconds=half, recompute_seconds=half, backward_first_seconds=half,
            backward_later_seconds=half,
        )  # fmt: skip
        return StepTime(
            micro_batch_size=size, stages=(time,), update_seconds=overhead_seconds, host_seconds=0.0,
            step_seconds=overhead_seconds + 2 * half, steps_timed=1, spread=0.0,
        )  # fmt: skip

    sizes = (BATCHES[0], BATCHES[-1])
    return Profile(
        model="noisy quadratic",
        workload=None,
        parameter_count=DIRECTIONS,
        optimizer="sgd",
        device=DeviceRecord(kind="cpu", name="a + c B", memory_bytes=2**30, threads=1),
        versions={},
        micro_batch_sizes=sizes,
        stages=(StageRecord(name="x", entry="", recomputable=False, parameter_count=DIRECTIONS),),
        precisions=(
            PrecisionProfile(
                precision="fp32",
                memory=memory,
                memory_at_one=None,
                wall=tuple(step(size) for size in sizes),
                process_cpu=None,
            ),
        ),
        hopeless=(),
        memory_check=None,
        cost=ProfileCost(seconds=0.0, micro_batches_run=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """One batch on the way to the target."""

    batch_size: int
    predicted_steps: float
    measured_steps: float
    predicted_seconds: float
    measured_seconds: float


def race(overhead: float, measured: dict[int, float]) -> tuple[int, list[Race]]:
    """The planner's choice for a step of ``overhead + B`` samples' seconds, and how every batch really does."""
    profile = profile_of(overhead * SAMPLE_SECONDS)
    reference = Reference(global_batch_size=REFERENCE, steps=round(measured[REFERENCE]))
    plan = optimize_to_target(profile, BATCHES, reference, noise_scale_samples=NOISE_SCALE)
    found = plan.convergence
    assert found is not None
    rows = [
        Race(
            batch_size=batch.global_batch_size,
            predicted_steps=batch.steps,
            measured_steps=measured[batch.global_batch_size],
            predicted_seconds=batch.seconds,
            measured_seconds=measured[batch.global_batch_size] * batch.step_seconds,
        )
        for batch in found.neighbours
    ]
    return plan.global_batch_size, rows


def fastest(rows: Sequence[Race]) -> int:
    """The batch that was really first."""
    return min(rows, key=lambda row: row.measured_seconds).batch_size


def simple_noise_scale(model: Quadratic) -> float:
    """tr(Sigma) / |G|^2 at these weights, as ``planner profile --noise-scale`` measures it."""
    torch.manual_seed(0)
    found = noise.measure(workload(model), micro_batch_size=16, steps=200).noise_scale_samples
    return math.nan if found is None else found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fixed", action="store_true", help="noise that does not fall with the gradient")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each kind (default: {SEEDS})")
    options = parser.parse_args()
    by_rate = {
        rate: {
            size: measured_steps(size, seeds=options.seeds, rate_factor=rate, fixed_noise=options.fixed)
            for size in BATCHES
        }
        for rate in RATES
    }
    best_rate = {size: min(RATES, key=lambda rate: by_rate[rate][size]) for size in BATCHES}
    start, end = Quadratic(fixed_noise=options.fixed), train(256, 0, fixed_noise=options.fixed)[1]
    scales = [simple_noise_scale(model) for model in (start, end)]
    print(
        f"tr(Sigma) / |G|^2 as a profile measures it: {scales[0]:.0f} at the start, {scales[1]:.0f} at the target"
    )
    models = []
    for overhead in OVERHEADS:
        chosen, rows = race(overhead, by_rate[1.0])
        tuned = {size: by_rate[best_rate[size]][size] for size in BATCHES}
        firsts = {"fastest": fastest(rows), "fastest at best rates": fastest(race(overhead, tuned)[1])}
        print(f"\na step takes as long as {overhead} + B samples")
        print("    B   steps: predicted  measured  at best rate   seconds: predicted  measured")
        for row in rows:
            size = row.batch_size
            marks = ["chosen"] * (size == chosen) + [name for name, first in firsts.items() if first == size]
            print(
                f"{size:5} {row.predicted_steps:18.1f} {row.measured_steps:9.1f} "
                f"{tuned[size]:8.1f} ({best_rate[size]:.1f}) {row.predicted_seconds:20.3f} "
                f"{row.measured_seconds:9.3f}  {', '.join(marks)}".rstrip()
            )
        models.append(
            {
                "overhead_samples": overhead,
                "chosen": chosen,
                **firsts,
                "rows": [{name: getattr(row, name) for name in Race.__dataclass_fields__} for row in rows],
            }
        )
    document: dict[str, Any] = {
        "simple_noise_scale_at_start_and_target": scales,
        "steps_by_rate": [
            {
                "rate": rate,
                "steps": {size: count if count < math.inf else None for size, count in steps.items()},
            }
            for rate, steps in by_rate.items()
        ],
        "cost_models": models,
    }
    name = "convergence-fixed" if options.fixed else "convergence"
    command = f"python -m studies.convergence{' --fixed' if options.fixed else ''}"
    print(f"\nwritten to {write(name, provenance(command) | document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

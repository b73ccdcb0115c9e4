"""Do operations that are tried out one by one tell what a whole step takes?

A fake step knows no scratch memory. ``profiler.workspaces`` finds it without running a step: each kind of operation
runs once, by itself, on zeros. Here the peak predicted with and without that is held against a real step's:

    fake step ─────────────────────────────▶ peak ─┐
    fake step + operations tried one by one ▶ peak ├──▶ relative errors
    two real steps, the allocator's own ────▶ peak ─┘

    python -m studies.kernels
"""

from __future__ import annotations

import time

import torch

from planner.cost import TRIED_KERNELS_ERROR
from profiler.chain import discover
from profiler.freed_memory import keep_freed_memory
from profiler.measure import measure_peak
from profiler.memory import MemoryTracer
from profiler.profile_record import Precision
from profiler.registry import build
from profiler.unmeasured import TRYING_BYTES
from profiler.workload_spec import WorkloadSpec, resolve
from profiler.workspaces import Workspaces

CPU = torch.device("cpu")

CASES: tuple[tuple[WorkloadSpec, int, Precision], ...] = (
    (WorkloadSpec(name="gpt2", sequence_length=64), 2, "fp32"),
    (WorkloadSpec(name="gpt2", sequence_length=32), 1, "bf16"),
    (WorkloadSpec(name="resnet50", image_size=64), 4, "fp32"),
    (WorkloadSpec(name="resnet50", image_size=32), 2, "bf16"),
    (WorkloadSpec(name="transformers:bert", sequence_length=64), 2, "fp32"),
    (WorkloadSpec(name="transformers:t5", sequence_length=64), 2, "fp32"),
    (WorkloadSpec(name="torchvision:vit_b_16"), 1, "fp32"),
    (WorkloadSpec(name="torchvision:convnext_tiny", image_size=64), 2, "fp32"),
    (WorkloadSpec(name="torchvision:mobilenet_v3_large", image_size=64), 4, "fp32"),
    (WorkloadSpec(name="torchvision:vgg11", image_size=64), 2, "fp32"),
)


def main() -> None:
    keep_freed_memory()
    errors = []
    for spec, size, precision in CASES:
        workload = build(resolve(spec))
        workload.model.train()
        stages = discover(workload)
        fake = MemoryTracer(workload, stages, "adamw").plain_peak_bytes(precision, size)
        began = time.perf_counter()
        workspaces = Workspaces(CPU, TRYING_BYTES)
        tracer = MemoryTracer(workload, stages, "adamw", workspaces=workspaces)
        tried = tracer.plain_peak_bytes(precision, size)
        took = time.perf_counter() - began
        real, _ = measure_peak(workload, "adamw", precision, size, CPU)
        errors.append(abs(tried / real - 1))
        print(
            f"{spec.name:32} {precision} b={size}  fake {fake / real - 1:+8.3%}  tried {tried / real - 1:+8.3%}  "
            f"({took:4.1f} s; refused: {len(workspaces.refused)})",
            flush=True,
        )
    print(f"largest error {max(errors):.3%}; stated as TRIED_KERNELS_ERROR: {TRIED_KERNELS_ERROR:.0%}")


if __name__ == "__main__":
    main()

"""Profiles of devices on which nothing runs: fake CUDA memory by hand, marks, refusals, and what building costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import executor
import planner
import profiler
from executor.errors import PlanDoesNotFit
from planner.cli import main
from planner.cost import TRIED_KERNELS_ERROR, UNCHECKED_MEMORY_ERROR
from profiler import absent as absent_cuda
from profiler import records, shapes
from profiler.absent import (
    DEVICE,
    AbsentCuda,
    attention_kernel,
    blas_workspace_bytes,
    graph_ends,
    standing_in,
)
from profiler.chain import discover
from profiler.events import Alloc, Trace
from profiler.fake import RealIntegers, without_memory
from profiler.live import CUDA_BLOCK_BYTES, LiveStorages
from profiler.memory import MemoryTracer
from profiler.profile_record import Profile
from profiler.registry import build
from profiler.timing import on_device
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec
from studies import workloads
from tests import models

AMPERE, HOPPER, VOLTA = (8, 0), (9, 0), (7, 0)


def kept_by_attention(capability: tuple[int, int], dtype: torch.dtype, masked: bool = False) -> int:
    """Bytes that attention of 2 samples, 4 heads, 16 tokens and width 8 keeps beside its inputs."""
    absent = AbsentCuda(capability)
    live = LiveStorages(block_bytes=CUDA_BLOCK_BYTES)
    module = nn.Module()
    with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers(DEVICE):
        module.qkv = nn.Parameter(torch.empty(3, 2, 4, 16, 8, dtype=dtype, device=DEVICE))
        mask = torch.empty(16, 16, dtype=dtype, device=DEVICE) if masked else None
        with graph_ends(module, absent), live, standing_in(absent):
            live.track([module.qkv] if mask is None else [module.qkv, mask])
            before = live.live_bytes
            attended = F.scaled_dot_product_attention(*module.qkv.unbind(0), attn_mask=mask)
            kept = live.live_bytes - before
            attended.sum().backward()
            assert module.qkv.grad is not None
            assert module.qkv.grad.device == DEVICE
    return kept


def test_attention_in_fp32_keeps_its_output_and_a_number_per_row_padded_to_32() -> None:
    """2 x 4 x 16 x 8 numbers of 4 bytes; 2 x 4 x 32 of 4 bytes; two states of the generator, one block each."""
    assert kept_by_attention(AMPERE, torch.float32) == 4096 + 1024 + 2 * 512


def test_attention_in_bf16_is_flash_and_keeps_a_number_per_row() -> None:
    """2 bytes a number of the output; 2 x 4 x 16 of 4 bytes."""
    assert kept_by_attention(AMPERE, torch.bfloat16) == 2048 + 512 + 2 * 512


def test_attention_with_a_mask_is_the_memory_efficient_one() -> None:
    assert kept_by_attention(AMPERE, torch.bfloat16, masked=True) == 2048 + 1024 + 2 * 512


def test_attention_in_bf16_on_volta_keeps_the_scores() -> None:
    """The plain formula in fp32: far more than 2 x 4 x 16 x 16 weights of 4 bytes."""
    assert kept_by_attention(VOLTA, torch.bfloat16) > 2 * 4 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "masked", "dropout", "kernel"),
    [
        (AMPERE, torch.float32, 64, False, 0.0, "efficient"),
        (AMPERE, torch.bfloat16, 64, False, 0.1, "flash"),
        (AMPERE, torch.bfloat16, 64, True, 0.0, "efficient"),
        (AMPERE, torch.bfloat16, 512, False, 0.0, "efficient"),
        (HOPPER, torch.bfloat16, 64, False, 0.0, "cudnn"),
        (HOPPER, torch.bfloat16, 64, False, 0.1, "flash"),
        (HOPPER, torch.bfloat16, 64, False, 0.125, "cudnn"),
        (HOPPER, torch.float32, 64, False, 0.0, "efficient"),
        (HOPPER, torch.float32, 5, False, 0.0, "math"),
        (VOLTA, torch.float16, 64, False, 0.0, "efficient"),
        (VOLTA, torch.bfloat16, 64, False, 0.0, "math"),
    ],
)
def test_the_kernel_of_attention_follows_the_device(
    capability: tuple[int, int], dtype: torch.dtype, width: int, masked: bool, dropout: float, kernel: str
) -> None:
    query = torch.empty(2, 4, 16, width, dtype=dtype, device="meta")
    chosen = attention_kernel(capability, query, query, query, masked=masked, dropout=dropout, causal=False)
    assert chosen == kernel


def test_autocast_casts_as_on_cuda_and_is_put_back() -> None:
    """Products in bf16; layer norm and cross entropy in fp32, which they are not on a CPU."""
    absent, norm, linear = AbsentCuda(AMPERE), nn.LayerNorm(8), nn.Linear(8, 8)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, RealIntegers(DEVICE):
        model = nn.Sequential(linear, norm)
        for module in model:
            for name, parameter in list(module.named_parameters()):
                fake = torch.empty(parameter.shape, device=DEVICE)
                setattr(module, name, nn.Parameter(fake))
        with graph_ends(model, absent), standing_in(absent), absent_cuda.autocast(torch.bfloat16):
            product = model[0](torch.empty(4, 8, device=DEVICE))
            normed = model[1](product)
            dropped = F.dropout(normed, 0.5)
            assert (product.dtype, normed.dtype, dropped.dtype) == (
                torch.bfloat16,
                torch.float32,
                torch.float32,
            )
            assert "NativeDropout" in type(dropped.grad_fn).__name__
        assert mode is not None
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before


def test_a_small_block_of_memory_is_one_of_cudas_blocks() -> None:
    """An mlp's ten parameters take whole blocks of 512 bytes, and AdamW's state of each three: two moments, a step."""
    workload = Workload(
        model=nn.Linear(4, 2), batch=lambda size: torch.randn(size, 4), loss=lambda m, b: m(b).sum()
    )
    stages = discover(workload, absent=AbsentCuda(AMPERE))
    tracer = MemoryTracer(
        workload, stages, "adamw", device_type="cuda", block_bytes=CUDA_BLOCK_BYTES, absent=AbsentCuda(AMPERE)
    )
    memory = tracer.memory("fp32", (2, 4))
    assert memory.parameter_bytes == 2 * 512
    assert memory.optimizer_state_bytes == 2 * 3 * 512


def test_cublas_workspaces_are_those_of_the_generation() -> None:
    """32 MiB on Hopper, 8 MiB and an eighth elsewhere; per thread (forward, backward) before torch 2.15."""
    threads = 2 if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15) else 1
    assert blas_workspace_bytes(HOPPER) == threads * 32 * 2**20
    assert blas_workspace_bytes(AMPERE) == threads * (8 * 2**20 + 128 * 2**10)


@pytest.fixture(scope="module")
def h200() -> Profile:
    return profiler.profile(models.gpt2(), (2, 4), ("fp32", "bf16"), "h200-141gb", optimizer="sgd")


def test_a_device_that_is_not_here_gets_a_profile_that_says_so(h200: Profile) -> None:
    assert (h200.device.kind, h200.device.name, h200.device.catalogue) == (
        "cuda",
        "NVIDIA H200",
        "h200-141gb",
    )
    assert h200.time_source == "roofline"
    assert h200.memory_check is None
    assert h200.cost.micro_batches_run == 0
    assert [p.precision for p in h200.precisions] == ["fp32", "bf16"]
    in_blocks = sum(
        -(-p.nbytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES for p in models.gpt2().model.parameters()
    )
    assert h200.precisions[0].memory.parameter_bytes == in_blocks
    assert records.decode(records.encode(h200), Profile) == h200


def test_planning_with_it_works_states_wide_errors_and_runs_nowhere_else(h200: Profile) -> None:
    plan = planner.optimize(h200, 8)
    assert plan.time_source == "roofline"
    assert plan.prediction.error.step_seconds >= 0.5
    assert plan.prediction.error.peak_memory_bytes == UNCHECKED_MEMORY_ERROR
    assert plan.prediction.peak_reserved_bytes is None
    tight = planner.optimize(
        h200, 8, memory_budget_bytes=int(1.18 * plan.front[0].prediction.peak_memory_bytes)
    )
    assert tight.prediction.peak_memory_bytes <= plan.prediction.peak_memory_bytes
    with pytest.raises(PlanDoesNotFit, match="NVIDIA H200"):
        executor.verify(plan, models.gpt2())


def test_on_the_device_that_is_here_kernels_are_tried_and_the_error_is_stated_narrow() -> None:
    workload = models.cnn()
    found = profiler.profile(workload, (2, 4), ("fp32",), "cpu", fake=True)
    assert found.kernels_tried
    assert found.cost.micro_batches_run == 0
    plan = planner.optimize(found, 4)
    assert plan.prediction.error.peak_memory_bytes == TRIED_KERNELS_ERROR
    measured = executor.verify(plan, workload, steps=1)
    error = measured.relative_error["peak_memory_bytes"]
    assert error is not None
    assert abs(error) < TRIED_KERNELS_ERROR


def test_kernels_that_could_not_be_tried_are_named_and_keep_the_error_wide() -> None:
    said: list[str] = []
    found = profiler.profile(workloads.lstm(), (2, 4), ("fp32",), "cpu", fake=True, progress=said.append)
    assert not found.kernels_tried
    assert any("mkldnn_rnn_layer_backward" in line for line in said)
    assert planner.optimize(found, 4).prediction.error.peak_memory_bytes == UNCHECKED_MEMORY_ERROR


class Doubled(torch.autograd.Function):
    """A function of somebody's own, whose forward runs without gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 + 0 * x


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = Doubled.apply(layer(x))
        return x


def test_a_custom_function_runs_on_a_device_that_is_not_here() -> None:
    workload = Workload(
        model=Doubling(),
        batch=lambda size: torch.ones(size, 8),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    apply = torch.autograd.Function.__dict__["apply"]
    found = profiler.profile(workload, (2, 4), ("bf16",), "a100-80gb", optimizer="sgd")
    assert [p.precision for p in found.precisions] == ["fp32", "bf16"]
    here = profiler.profile(workload, (64, 128), ("fp32",), "cpu", optimizer="sgd", fake=True)
    there = profiler.profile(workload, (64, 128), ("fp32",), "a100-80gb", optimizer="sgd")
    held = [sum(stage.hold[1] for stage in p.precisions[0].memory.stages) for p in (here, there)]
    assert held[0] == held[1] > 0
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_a_precision_that_the_device_lacks_is_left_out() -> None:
    found = profiler.profile(models.mlp(), (2,), ("fp32", "bf16"), "v100-16gb", optimizer="sgd")
    assert [p.precision for p in found.precisions] == ["fp32"]


def test_on_the_device_that_is_here_the_curves_are_those_of_a_real_profile() -> None:
    """But for scratch memory inside kernels, which only a real one can measure."""
    workload = models.mlp()
    fake = profiler.profile(workload, (2, 4), ("fp32",), "cpu", fake=True)
    stages = discover(workload)
    with on_device(workload, torch.device("cpu")) as placed:
        expected = MemoryTracer(placed, stages, "adamw").memory("fp32", (2, 4))
    assert fake.precisions[0].memory == expected
    assert [stage.name for stage in fake.stages] == [stage.name for stage in stages]


def test_remembered_shapes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, absent = models.gpt2(1), AbsentCuda(AMPERE)
    stages = discover(workload, absent=absent)
    tracer = MemoryTracer(workload, stages, "sgd", device_type="cuda", absent=absent)
    tracer.trace("bf16", 2, "plain")
    remembered = tracer.trace("bf16", 2, "plain")
    monkeypatch.setattr(shapes, "_rememberable", lambda func: False)
    asked_anew = tracer.trace("bf16", 2, "plain")
    assert allocations(asked_anew) == allocations(remembered)
    assert asked_anew.peak_bytes == remembered.peak_bytes


def test_a_remembered_view_begins_where_its_own_input_does() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers():
        matrix = torch.empty(8, 4)
        offsets = [matrix[start : start + 4].t().storage_offset() for start in (2, 4, 2)]
    assert offsets == [8, 16, 8]


def allocations(trace: Trace) -> list[int]:
    return [event.size_bytes for event in trace.events if isinstance(event, Alloc)]


def test_weights_built_without_memory_have_shapes_only_and_the_profile_is_the_same() -> None:
    """GPT-2's 124 M parameters: no matrix of it is made."""
    with without_memory():
        workload = build(WorkloadSpec(name="gpt2", sequence_length=8))
    matrices = [p for p in workload.model.parameters() if p.dim() > 1]
    assert all(matrix.is_meta for matrix in matrices)
    assert sum(p.numel() for p in workload.model.parameters()) == 124_439_808
    assert not torch.empty(2**20).is_meta
    stages = discover(workload)
    assert len(stages) == 28


def test_what_a_model_reads_while_it_is_built_is_real() -> None:
    with without_memory():
        rates = torch.linspace(0, 0.1, 12)
        index = torch.arange(2**20)
        table = torch.zeros(1024, 1024)
    assert [round(rate.item(), 3) for rate in rates][-1] == 0.1
    assert index[-1].item() == 2**20 - 1
    assert table.is_meta


def test_the_model_and_its_modes_are_left_as_they_were() -> None:
    workload = models.dropout_net()
    workload.model.eval()
    before = {name: tensor.clone() for name, tensor in workload.model.state_dict().items()}
    profiler.profile(workload, (2,), ("fp32",), "a100-80gb", optimizer="sgd")
    assert not workload.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in workload.model.state_dict().items())
    assert all(p.grad is None and not p.is_meta for p in workload.model.parameters())
    loss = workload.loss(workload.model, workload.batch(2))
    loss.backward()


def test_the_noise_scale_of_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="measured by running steps, and nothing is run for t4-16gb"):
        profiler.profile(models.mlp(), (2,), ("fp32",), "t4-16gb", noise_steps=2)


def test_the_command_line_says_roofline_wherever_it_shows_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, plan = str(tmp_path / "p.json"), str(tmp_path / "p.plan.json")
    words = ["--device", "rtx4090-24gb", "--batch", "2,4", "--precision", "fp32", "-o", profile]
    assert main(["profile", "tests.workloads.tiny:linear", *words]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA GeForce RTX 4090" in shown
    assert shown.count("(roofline, not measured)") == 2
    assert "nothing was run, so peaks are stated ± 16%" in shown
    assert main(["optimize", profile, "--global-batch-size", "8", "--storage", "none", "-o", plan]) == 0
    assert "(roofline, not measured)" in capsys.readouterr().out
    assert json.loads(Path(plan).read_text())["time_source"] == "roofline"
    assert main(["explain", plan]) == 0
    assert "(roofline, not measured)" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fake_peak_is_the_measured_one(precision: str) -> None:
    """On the device that is here, by its own capability, against the allocator; cuBLAS's workspaces apart."""
    from profiler.measure import measure_peak

    workload, device = models.gpt2(4), torch.device("cuda", 0)
    absent = AbsentCuda(torch.cuda.get_device_capability(device))
    stages = discover(workload, absent=absent)
    tracer = MemoryTracer(
        workload, stages, "adamw", device_type="cuda", block_bytes=CUDA_BLOCK_BYTES, absent=absent
    )
    predicted = tracer.plain_peak_bytes(precision, 8)  # type: ignore[arg-type]
    with on_device(workload, device) as placed:
        measured, _ = measure_peak(placed, "adamw", precision, 8, device)  # type: ignore[arg-type]
    assert 0 <= measured - predicted <= 2 * blas_workspace_bytes(absent.capability)


def test_a_record_from_before_there_were_marks_still_reads(h200: Profile) -> None:
    document = msgspec.to_builtins(h200)
    del document["device"]["catalogue"]
    old = msgspec.convert(document, Profile)
    assert old.device.catalogue is None

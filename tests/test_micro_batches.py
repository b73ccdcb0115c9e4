"""Which micro-batch sizes are profiled where nobody names any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.cli.profile import default_sizes
from profiler.chain import discover
from profiler.memory import MemoryTracer
from profiler.micro_batches import sizes_that_fit
from tests.models import mlp


def peak_bytes(size: int) -> int:
    workload = mlp()
    return MemoryTracer(workload, discover(workload), "sgd").plain_peak_bytes("fp32", size)


@pytest.mark.parametrize(
    ("smallest", "memory_bytes", "sizes"),
    [
        (1, 2**40, (1, 2, 4, 8, 16, 32, 64, 128)),
        (16, 2**40, (16, 32, 64, 128, 256, 512, 1024, 2048)),
        (1, 0, (1, 2, 4)),
        (3, peak_bytes(48), (3, 6, 12, 24, 48)),
        (3, peak_bytes(48) - 1, (3, 6, 12, 24)),
    ],
)
def test_sizes_double_as_far_as_a_plain_step_fits(
    smallest: int, memory_bytes: int, sizes: tuple[int, ...]
) -> None:
    workload = mlp()
    workload.model.eval()
    assert sizes_that_fit(workload, memory_bytes, smallest=smallest, optimizer="sgd") == sizes
    assert not workload.model.training


def test_a_cpu_has_three() -> None:
    assert default_sizes("cpu", 1, mlp(), "sgd") == (1, 2, 4)
    assert default_sizes("cpu", 16, mlp(), "sgd") == (16, 32, 64)


def test_the_profile_for_a_gpu_that_is_not_here_has_them_all_on_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["profile", "tests.workloads.mlp:mlp", "--device", "h200-141gb"]
    assert main(command) == 0
    said = capsys.readouterr().out
    steps = said[said.index("One optimizer step") : said.index("memory check")].splitlines()[1:]
    rows = [line.split() for line in steps if line.strip() and "─" not in line]
    assert rows[0] == ["micro-batch", "fp32", "bf16"]
    assert [int(row[0]) for row in rows[1:]] == [1, 2, 4, 8, 16, 32, 64, 128]
    document: dict[str, Any] = json.loads((tmp_path / "mlp.profile.json").read_text())
    for row, fp32 in zip(rows[1:], document["precisions"][0]["wall"], strict=True):
        assert row[3] == "±"
        assert int(row[0]) == fp32["micro_batch_size"]

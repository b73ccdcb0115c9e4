"""The demo's table and picture, from documents as the commands print them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.cli.demo import _table
from planner.cli.picture import MemoryCourse, draw_memory


def document(*, seconds: float, peak_mib: int, segments: int) -> dict[str, Any]:
    predicted = {
        "step_seconds": seconds, "step_cpu_seconds": 2 * seconds, "peak_memory_bytes": peak_mib * 2**20,
        "step_joules": None,
    }  # fmt: skip
    measured = {
        "step_seconds": seconds * 1.25, "step_cpu_seconds": 2 * seconds, "peak_memory_bytes": peak_mib * 2**20,
        "step_joules": None, "device_speed": 0.8,
    }  # fmt: skip
    errors = {
        "step_seconds": -0.2, "step_cpu_seconds": 0.0, "steady_seconds": 0.25, "peak_memory_bytes": 0.0,
        "step_joules": None,
    }  # fmt: skip
    return {
        "prediction": predicted,
        "measured": {**measured, "relative_error": errors},
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "precision": "fp32",
        "checkpoint": [{}] * segments,
    }


def words(line: str) -> str:
    return " ".join(line.split())


def test_the_table_sets_predicted_beside_measured_with_the_error_and_says_what_is_unknown() -> None:
    table = _table(
        document(seconds=4.0, peak_mib=2900, segments=0), document(seconds=5.0, peak_mib=2300, segments=3)
    ).splitlines()
    assert words(table[2]) == "step time, wall 4.00 s 5.00 s -20.00% 5.00 s 6.25 s -20.00%"
    assert words(table[4]) == "at the device's speed 10.00 s 8.00 s +25.00% 12.50 s 10.00 s +25.00%"
    assert table[5].split() == [
        "peak",
        "memory",
        "2,900.0",
        "MiB",
        "2,900.0",
        "MiB",
        "+0.00%",
        "2,300.0",
        "MiB",
        "2,300.0",
        "MiB",
        "+0.00%",
    ]
    assert words(table[6]) == "energy unknown unknown unknown unknown"
    assert table[-2].endswith("fp32, 3 recomputed segments")
    assert table[-1] == "budget 2400MiB: the plain baseline does not fit, the plan fits."


def test_the_picture_is_a_png_with_both_curves(tmp_path: Path) -> None:
    def course(label: str, peak: int) -> MemoryCourse:
        curve = [(n / 10, peak * n // 10) for n in range(11)]
        return MemoryCourse(label=label, curve=curve, predicted_peak_bytes=peak)

    path = tmp_path / "new" / "memory.png"
    draw_memory(course("plain", 3 * 2**30), course("plan", 2 * 2**30), 5 * 2**29, "a step", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000

"""What a run writes down as it goes: one JSON object a line, and the same numbers for TensorBoard.

    metrics.jsonl    {"step": 12, "samples": 384, "loss": 3.91, "learning_rate": 0.0001, "step_seconds": 1.31, ...}
    tensorboard/     events of the same names, at most once a second; tensorboard --logdir DIR shows them

A number that is not known is left out of its line. A run that goes on from step n first drops what was written after
it: the steps that a crash threw away, and which now are made again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter

from profiler.records import replace_whole

LINES: Final = "metrics.jsonl"
BOARD: Final = "tensorboard"
BOARD_SECONDS: Final = 1.0

Value = int | float | str | None


class Metrics:
    """The files of a run in ``directory``, from behind ``after_step`` on."""

    def __init__(self, directory: Path, after_step: int = 0) -> None:
        path = directory / LINES
        kept = [line for line in _lines(path) if _step(line) <= after_step] if after_step else []
        replace_whole(path, lambda file: file.write("".join(kept).encode()))
        self._file = path.open("a")
        # TensorBoard forgets what an earlier file of events holds from this step on.
        self._board = SummaryWriter(str(directory / BOARD), purge_step=after_step + 1, flush_secs=10)
        self._next_on_board = time.monotonic()

    def write(self, step: int, values: dict[str, Value]) -> None:
        """One line; numbers that are not finite are written as words, since JSON has none."""
        line: dict[str, Any] = {"step": step}
        # A dozen events take a millisecond, as long as a small model's step.
        on_board = time.monotonic() >= self._next_on_board
        if on_board:
            self._next_on_board = time.monotonic() + BOARD_SECONDS
        for name, value in values.items():
            if value is None:
                continue
            finite = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if finite else str(value)
            if on_board and finite and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _lines(path: Path) -> Iterator[str]:
    """The whole ones: a process that is killed may leave half a line at the end."""
    if path.exists():
        yield from (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def _step(line: str) -> int:
    step = json.loads(line)["step"]
    if not isinstance(step, int):
        raise ValueError(
            f"A line of {LINES} must have a whole number as step, got {step!r}. Remove the file."
        )
    return step

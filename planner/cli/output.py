"""How commands speak: one manner for numbers (planner/words.py), tables and progress.

Tables have no lines but one under their heading. On a terminal progress is one line that moves; elsewhere it is
a line per message, on stderr either way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from planner.words import BASELINES as BASELINES
from planner.words import NEGLIGIBLE as NEGLIGIBLE
from planner.words import change as change
from planner.words import of_bytes as of_bytes
from planner.words import of_count as of_count
from planner.words import of_duration as of_duration
from planner.words import of_grams as of_grams
from planner.words import of_joules as of_joules
from planner.words import of_kilowatt_hours as of_kilowatt_hours
from planner.words import of_noise_scale as of_noise_scale
from planner.words import of_seconds as of_seconds
from planner.words import of_source as of_source

PLAIN_WIDTH = 100
"""Columns to fill where stdout is not a terminal."""


def console() -> Console:
    """Stdout, with nothing in what we print taken for markup."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, markup=False, highlight=False, soft_wrap=False)


def heading(text: str) -> Text:
    """The title of a block."""
    return Text(text, style="bold")


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table with these headings; those in ``right`` hold numbers."""
    made = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        numeric = column in right
        made.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    return made


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and what they are."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=12)
    grid.add_column()
    for name, value in rows:
        grid.add_row(name, value)
    return grid


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Where a long command says what it is doing."""
    if not sys.stderr.isatty():
        began = time.monotonic()
        yield lambda message: print(
            f"{time.monotonic() - began:6.1f} s  {message}", file=sys.stderr, flush=True
        )
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda message: shown.update(task, description=message)

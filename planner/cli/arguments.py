"""What the flags accept: sizes, lists, counts, files.

Each function turns the words of one flag into a value, or says what the flag takes and what was given
instead.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from planner.sizes import parse_size


def size(text: str) -> int:
    """``8GiB``, ``8GB``, ``1.5GiB`` or plain bytes, as bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """A whole number of at least one."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers of at least one, ``1,2,4``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, such as 1,2,4, got {text!r}")
    return tuple(int(part) for part in parts)


def span(text: str) -> tuple[int, int]:
    """Two whole numbers of at least one, the smaller first, ``8:512``."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise argparse.ArgumentTypeError(
            f"must be two whole numbers of at least 1, the smaller first, such as 8:512, got {text!r}"
        )
    return int(low), int(high)


def amount(text: str) -> float:
    """A finite number that is not negative."""
    if not (value := _finite(text)) >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def precisions(text: str) -> tuple[str, ...]:
    """Some of fp32, bf16, fp16, ``fp32,bf16``."""
    from profiler.profile_record import PRECISIONS

    return _some_of(PRECISIONS, text)


def optimizer(text: str) -> str:
    """One of the optimizers that a step can be run with."""
    from profiler.profile_record import OPTIMIZERS

    if text not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(OPTIMIZERS)}, got {text!r}")
    return text


def target(text: str) -> str:
    """One of the engines that a plan can be exported to."""
    from planner.export import EXPORTERS

    if text not in EXPORTERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(EXPORTERS)}, got {text!r}")
    return text


def zero_stages(text: str) -> tuple[int, ...]:
    """Some of the stages of ZeRO, ``0,1``."""
    return tuple(int(stage) for stage in _some_of(("0", "1", "2", "3"), text))


def count_or_none(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    if not (value := _finite(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above zero."""
    if not (value := _finite(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def reached(text: str) -> str:
    """A target, ``accuracy=0.85``."""
    from executor.stopping import Target

    try:
        Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def output_file(text: str) -> Path:
    """A file that can be written when the work is done: its folder is there, and it is not one itself."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text}. Name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must lie in a folder that is there and can be written, got {text}. Make {path.parent} first"
        )
    return path


def output_folder(text: str) -> Path:
    """A folder that is there or can be made."""
    path = Path(text)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a folder that can be written, got {text}: {there} is not one"
        )
    return path


def _finite(text: str) -> float:
    """A number; NaN, which no bound lets pass, for words and infinities."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _some_of(choices: tuple[str, ...], text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in choices]:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(choices)}, separated by commas, got {unknown[0]!r}"
        )
    return parts

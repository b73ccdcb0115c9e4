"""Which files are to train on and which are held out: what their names say.

The words are those of the datasets library: ``wiki.train.tokens``, ``validation-00000-of-00001.parquet``,
``test/part1.txt``. A word in the name of a file counts before one in the name of its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_WORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS: Final[Mapping[str, str]] = {word: split for split, words in _WORDS.items() for word in words}

HELD_OUT: Final = ("validation", "test")
"""What a model is evaluated on: the first of these that there is."""


def split_of(name: str) -> str | None:
    """``train``, ``validation``, ``test`` or None: what the words of a name say."""
    found = (_SPLITS.get(word) for word in re.split(r"[^a-z]+", name.lower()))
    return next((split for split in found if split), None)


def by_split(files: Iterable[Path], root: Path) -> dict[str | None, tuple[Path, ...]]:
    """The files below ``root`` by what their names say, each in the order in which they came."""
    groups: dict[str | None, list[Path]] = {}
    for file in files:
        parts = reversed(file.relative_to(root).parts)
        split = next((split for part in parts if (split := split_of(part))), None)
        groups.setdefault(split, []).append(file)
    return {split: tuple(group) for split, group in groups.items()}

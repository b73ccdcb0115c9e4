"""Where tokens and tables are kept between runs, under a hash of all that they depend on.

An entry is right or absent, never stale; it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from profiler.records import replace_whole


def cache_directory() -> Path:
    """``$PLANNER_HOME/cache``, else ``planner`` in the cache directory of the XDG base directories."""
    if home := os.environ.get("PLANNER_HOME"):
        return Path(home).expanduser().absolute() / "cache"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "planner"


def write_cache(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write all of a file or nothing; several processes may do so at once."""
    with writing_to_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)


@contextmanager
def writing_to_cache() -> Iterator[None]:
    """What goes wrong in here goes wrong in the cache directory."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The cache directory must be writable, got {cache_directory()}: {error.strerror or error}. "
            f"Set PLANNER_HOME to one that is."
        ) from error


def content_sha256(files: Iterable[Path]) -> str:
    """The identity of what is in these files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

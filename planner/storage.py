"""Where studies are kept: Optuna storages, opened by URL.

A study outlives the process that ran it, so that an interrupted search can go on and a dashboard can look.
Optuna's own URLs (`sqlite:///f.db`, `postgresql://...`) open a database. `journal:FILE` opens Optuna's
journal, an append-only log of operations in one file: no server, and safe when several processes write.
The default is a journal in the user's state directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

from planner import state

_JOURNAL = "journal:"


def default_storage_url() -> str:
    """A journal in the user's state directory, made when it is first opened."""
    return f"{_JOURNAL}{state.here() / 'studies.journal'}"


@contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    """A storage for a while; a database's connections are closed in the end."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def open_storage(url: str) -> BaseStorage:
    """The storage at this URL, made where it is missing. ValueError says what is wrong with the URL."""
    if url.startswith(_JOURNAL):
        return _open_journal(url)
    try:
        return RDBStorage(url)
    except (sqlalchemy.exc.NoSuchModuleError, ImportError) as error:
        raise ValueError(
            f"No database driver here opens {_without_password(url)}: {error.__cause__ or error}. "
            "Install one, or use journal:FILE."
        ) from error
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise ValueError(
            f"A storage is sqlite:///FILE, postgresql://USER@HOST/NAME or journal:FILE, got {url!r}. "
            "The simplest is a file: journal:studies.journal."
        ) from error
    except sqlalchemy.exc.DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise ValueError(
            f"{_without_password(url)} does not open as a storage: {reason}. "
            "Check that it is there and that you may write to it, or use journal:FILE."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{_without_password(url)} was written by another version of Optuna than the one here: "
            f"{' '.join(str(error).split())}"
        ) from error


def _open_journal(url: str) -> JournalStorage:
    path = url.removeprefix(_JOURNAL)
    if not path:
        raise ValueError("journal: needs a file, as in journal:studies.journal.")
    # The default lock is a symbolic link, which Windows does not let every user make.
    lock = JournalFileOpenLock(path) if os.name == "nt" else JournalFileSymlinkLock(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(path, lock))
    except OSError as error:
        raise ValueError(f"{url} does not open as a storage: {error.strerror}. Name another file.") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        # What Optuna raises when it replays a line that is not JSON, or not one of its operations.
        raise ValueError(
            f"{url} is not an Optuna journal, or a damaged one: {error!r}. Name another file, or remove it."
        ) from error


def where(url: str) -> str:
    """A storage's URL as it may be shown."""
    return url if url.startswith(_JOURNAL) else _without_password(url)


def _without_password(url: str) -> str:
    return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)

"""The processes of a plan on this machine: started together, ended together, one word about how.

    parent: launch(2, ["-m", "planner.cli", "train", ...])      rank 0              rank 1
      torch's elastic agent, a free port on localhost ─────▶     RANK=0              RANK=1
      stderr ◀─────────────────────────────────────────────     what it says        kept, shown if it fails
      SIGTERM, SIGINT ─────────────────────────────────────▶     saves, status 143   saves, status 143
      document ◀────────────────────────────────────────────     handed over         dropped
      how it ended: exit status, which rank, why

When one rank dies the others get SIGTERM, and SIGKILL half a minute later: one that waits for the dead one in a
collective cannot end by itself. When the parent is asked to stop the ranks have ``grace_seconds`` to save. When it is
killed they are killed with it.

A rank's entry is ``as_rank``. It needs nothing of the above but RANK, WORLD_SIZE and LOCAL_RANK in the environment, so
the same command runs under a torchrun of the user's, on several machines too. There what rank 0 hands over goes to its
stdout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from executor.parent import die_with
from planner.plan import Plan
from planner.trial_process import killed_for_memory, last_lines

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE_SECONDS = 120
"""What ranks that were asked to stop get to save. torch before 2.12 has 30 s and cannot be told otherwise."""

POLL_SECONDS = 0.1

FOLDER, LAUNCHER = "PLANNER_RANKS_FOLDER", "PLANNER_RANKS_LAUNCHER"
"""Environment variables of ``launch`` for ``as_rank``: where ranks leave what they have to say, who started them."""

DEADLY = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that one rank's end brings to no other. SIGABRT it may: so nccl gives up waiting for a rank that is gone."""

AFTERMATH_SECONDS = 15
"""Well before torch kills, 30 s after one rank's end, what did not end at its word."""

HandOver = Callable[[bytes], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a launch ended. ``status``: for the parent to exit with; 143 and 130 are SIGTERM and SIGINT, obeyed.

    ``message``: which rank failed, how and why; None where none did. ``document``: what rank 0 handed over.
    """

    status: int
    message: str | None
    document: bytes | None


def launch(
    nproc: int,
    arguments: Sequence[str],
    *,
    threads: int | None = None,
    grace_seconds: int = GRACE_SECONDS,
) -> Ended:
    """Run ``python ARGUMENTS`` in ``nproc`` ranks until all have ended. From the main thread only.

    ``threads``: of each rank on a CPU, those that the plan was profiled with; None leaves it to the environment.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    environment = {
        LAUNCHER: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_seconds),
        # What watches memory would say on stderr that it looked for a GPU.
        "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99"),
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    # torch puts an argument through string.Template, to write the local rank into it.
    escaped = [argument.replace("$", "$$") for argument in arguments]
    killed_before = killed_for_memory()
    status, message = 0, None
    with tempfile.TemporaryDirectory(prefix="planner-ranks-") as folder:
        place = Path(folder)
        try:
            with _set(environment | {FOLDER: folder}), _handlers_kept(), _nothing_logged(), _files_let_go():
                config = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=nproc,
                    run_id=uuid.uuid4().hex,
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    local_addr="localhost",
                    max_restarts=0,
                    monitor_interval=POLL_SECONDS,
                    signals_to_handle="SIGTERM,SIGINT",
                    logs_specs=DefaultLogsSpecs(
                        log_dir=str(place / "said"),
                        redirects={rank: Std.ALL if rank else Std.OUT for rank in range(nproc)},
                    ),
                )
                elastic_launch(config, sys.executable)(*escaped)
        except SignalException as stop:
            status, message = _stopped(stop.sigval, nproc, place, grace_seconds)
        except ChildFailedError as error:
            for_memory = killed_for_memory() > killed_before
            status, message = _failed(error.failures, nproc, place, for_memory=for_memory)
        document = place / "document"
        return Ended(
            status=status, message=message, document=document.read_bytes() if document.exists() else None
        )


def crowded(plan: Plan, nproc: int) -> str | None:
    """What to expect where the ranks want more processors than there are; None where they do not."""
    threads, processors = plan.device.threads, os.cpu_count()
    if plan.device.kind != "cpu" or threads is None or processors is None or nproc * threads <= processors:
        return None
    return (
        f"{nproc} processes of {threads} threads share {processors} processors: steps will take longer than predicted. "
        f"Profile with OMP_NUM_THREADS={max(1, processors // nproc)}."
    )


def is_rank() -> bool:
    """Whether this process is one of several, started by ``launch`` or by torchrun."""
    return "RANK" in os.environ


def as_rank(work: Callable[[HandOver], int]) -> int:
    """Do a rank's work; its exit status. ``work`` is given what takes the document, rank 0's, for the parent's stdout.

    Whatever else is written to stdout goes to stderr. Until ``work`` handles SIGTERM itself it is ended by it.
    """
    folder, launcher = os.environ.get(FOLDER), os.environ.get(LAUNCHER)
    rank = int(os.environ["RANK"])
    if launcher is not None:
        die_with(int(launcher))
    faulthandler.enable()
    before = signal.signal(signal.SIGTERM, _end_at_once)
    status = None
    try:
        with _stdout_to_stderr() as stdout:

            def hand_over(document: bytes) -> None:
                if rank == 0 and folder is not None:
                    _write(Path(folder) / "document", document)
                elif rank == 0:
                    _write_all(stdout, document)

            status = work(hand_over)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    except Exception as error:
        _report(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if folder is not None and status is not None:
            _write(_status_file(Path(folder), rank), str(status).encode())
    return status


def _report(error: Exception) -> None:
    """Leave the error where torch's agent looks for it, this launch's or another."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[int]:
    """Whatever is written to stdout goes to stderr, by C++ libraries too; yields a descriptor of the real stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _write_all(descriptor: int, document: bytes) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        file.write(document)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    written = path.with_suffix(".part")
    written.write_bytes(content)
    written.replace(path)


def _status_file(place: Path, rank: int) -> Path:
    """What a rank leaves when it ends by itself: its exit status."""
    return place / f"{rank}.status"


def _file_of(place: Path, rank: int, name: str) -> Path | None:
    """A file that torch keeps of a rank: ``error.json``, ``stderr.log``."""
    return next(place.glob(f"said/*/attempt_*/{rank}/{name}"), None)


def _stopped(number: signal.Signals, nproc: int, place: Path, grace_seconds: int) -> tuple[int, str | None]:
    """What became of a launch that was asked to stop."""
    asked = 128 + number
    ended = {
        rank: int(file.read_text()) for rank in range(nproc) if (file := _status_file(place, rank)).exists()
    }
    if len(ended) == nproc and set(ended.values()) <= {0, asked}:
        return max(ended.values()), None
    faults = []
    for rank in range(nproc):
        reason = _reason(_file_of(place, rank, "error.json"))
        if reason is not None:
            faults.append(f"rank {rank} failed: {reason}")
        elif rank not in ended:
            faults.append(f"rank {rank} had not ended {grace_seconds} s later and was killed")
        elif ended[rank] not in (0, asked):
            faults.append(f"rank {rank} ended with exit status {ended[rank]}")
    return 1, f"Asked to stop by {number.name}, and not all ranks did so in order: {'; '.join(faults)}."


def _failed(
    failures: Mapping[int, ProcessFailure], nproc: int, place: Path, *, for_memory: bool
) -> tuple[int, str | None]:
    """The rank that failed first, and how. The others were ended for it, or failed for want of it."""
    rank = _first(failures, place)
    failure = failures[rank]
    status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if _was_stopped(failure):
        return status, None
    if failure.exitcode > 0:
        how = f"ended with exit status {failure.exitcode}"
    else:
        how = f"was killed by {failure.signal_name()}"
    reason = _reason(_file_of(place, rank, "error.json"))
    if reason is None and failure.exitcode == -signal.SIGKILL and for_memory:
        reason = "the machine had no memory left"
    message = f"Rank {rank} of {nproc} {how}{f': {reason}' if reason else ''}".rstrip(".") + "."
    said = _file_of(place, rank, "stderr.log")
    if said is not None and (lines := last_lines(said).strip()):
        message += f" The last it said:\n{lines}"
    return status, message


def _first(failures: Mapping[int, ProcessFailure], place: Path) -> int:
    """The rank whose end brought the others'.

    A rank that ends by itself leaves a file at that moment. Of one that is killed it is known when torch noticed, which
    may be after the others failed for want of it: so it goes before them.
    """
    ended = {rank: _seconds(failure, _status_file(place, rank)) for rank, failure in failures.items()}
    soon = min(ended.values()) + AFTERMATH_SECONDS

    def order(rank: int) -> tuple[bool, bool, float]:
        failure = failures[rank]
        fell = -failure.exitcode in DEADLY and ended[rank] < soon
        return _was_stopped(failure), not fell, ended[rank]

    return min(failures, key=order)


def _seconds(failure: ProcessFailure, status_file: Path) -> float:
    """When a rank ended, as far as is known."""
    for file in (Path(failure.error_file), status_file):
        if file.exists():
            return file.stat().st_mtime
    return failure.timestamp


def _was_stopped(failure: ProcessFailure) -> bool:
    """Whether a rank ended because it was asked to, obeying or not."""
    asked = (signal.SIGTERM, signal.SIGINT)
    return failure.exitcode in {-number for number in asked} | {128 + number for number in asked}


def _reason(error_file: Path | None) -> str | None:
    """A rank's exception in one line, as torch's error handler wrote it."""
    if error_file is None or not error_file.exists():
        return None
    return " ".join(json.loads(error_file.read_text())["message"]["message"].split())


@contextlib.contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, for as long as children are started from here."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """torch's agent takes SIGTERM and SIGINT and does not give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _files_let_go() -> Iterator[None]:
    """torch's agent leaves the ranks' files for the garbage collector to close, which Python warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            gc.collect()


@contextlib.contextmanager
def _nothing_logged() -> Iterator[None]:
    """torch's agent logs each step of an end that ``Ended`` tells in one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

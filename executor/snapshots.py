"""A run's state on disk: whole or not there, checked before it is used, and nothing in it is ever executed.

    checkpoints/
      step-00000040/
        process-0.safetensors    tensors, each once
        process-0.json           everything else, and where in it the tensors belong
        manifest.json            what run it is of; the size and SHA-256 of the others
      .writing-3f2a.../          one that is being written, or that a run was killed over

The files of all processes are written and synchronised, then the manifest, then the folder gets its name: a name that
is there stands for a whole snapshot, unless the disk or somebody changed it since, which the sums tell. Neither
JSON nor safetensors can hold code.

A state is a tree of dictionaries, lists, tuples, numbers, strings, None and tensors. Numbers come back bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from profiler import records
from profiler.records import Document, Record, RecordError

Tree = Any
"""``dict | list | tuple | str | int | float | bool | None | torch.Tensor``, nested."""

KEPT: Final = 2
"""Snapshots that a run keeps: one may be damaged."""

_PREFIX: Final = "step-"
_WRITING: Final = ".writing-"
_MANIFEST: Final = "manifest.json"


class Damaged(Exception):
    """A snapshot that is not what was written."""


class NotSaved(Exception):
    """A snapshot could not be written; those before it are as they were."""


class FileSum(Record):
    """One file of a snapshot as it was written."""

    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(Document, tag="checkpoint"):
    """What a snapshot is of. ``run``: what two runs must have in common for one to go on from the other's."""

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    step: Annotated[int, Meta(ge=0)]
    world_size: Annotated[int, Meta(ge=1)]
    run: dict[str, str]
    files: dict[str, FileSum]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """The processes of a run. ``agree``: whether any of them says so, which waits for all."""

    rank: int = 0
    world_size: int = 1
    agree: Callable[[bool], bool] = bool


ALONE: Final = Peers()


def steps_kept(directory: Path) -> list[int]:
    """Of which steps there are snapshots, newest first."""
    names = (path.name for path in directory.glob(f"{_PREFIX}*") if path.is_dir())
    return sorted(
        (int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdecimal()),
        reverse=True,
    )


def path_of(directory: Path, step: int) -> Path:
    """Where the snapshot of a step lies."""
    return directory / f"{_PREFIX}{step:08d}"


def save(
    directory: Path, step: int, run: dict[str, str], state: Tree, *, peers: Peers = ALONE, keep: int = KEPT
) -> Path:
    """Write this process's state after ``step`` steps, and drop all but the newest ``keep`` snapshots up to it.

    All processes call it at the same step; they must share the directory. Raises NotSaved, in every process, when any
    of them could not write its part.
    """
    if keep < 1:
        raise ValueError(
            f"keep must be at least 1, got {keep}: the newest snapshot is what a run goes on from."
        )
    writing = directory / f"{_WRITING}{step:08d}"
    try:
        _together(peers, lambda: _begin(directory, writing, peers))
        _together(peers, lambda: _write_process(writing, peers.rank, state))
        _together(peers, lambda: _finish(directory, writing, step, run, peers, keep))
    except NotSaved:
        if peers.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)  # A full disk has other use for the space.
        raise
    return path_of(directory, step)


def _together(peers: Peers, act: Callable[[], None]) -> None:
    """One part of writing, in all processes: all have done it, or all raise NotSaved."""
    failure: Exception | None = None
    try:
        act()
    except (OSError, SafetensorError, RecordError) as error:
        failure = error
    if peers.agree(failure is not None):
        raise NotSaved(str(failure or "another process could not write its part")) from failure


def _begin(directory: Path, writing: Path, peers: Peers) -> None:
    if peers.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_WRITING}*"):
            shutil.rmtree(left)
        writing.mkdir()


def _finish(directory: Path, writing: Path, step: int, run: dict[str, str], peers: Peers, keep: int) -> None:
    if peers.rank == 0:
        final = path_of(directory, step)
        files = {path.name: _sum_of(path) for path in sorted(writing.iterdir())}
        manifest = Manifest(step=step, world_size=peers.world_size, run=run, files=files)
        records.write(writing / _MANIFEST, manifest)
        if final.exists():
            # Damaged, or of another time that the run came here. A folder that is not empty cannot be replaced at once.
            aside = directory / f"{_WRITING}{secrets.token_hex(4)}"
            os.rename(final, aside)
        os.rename(writing, final)
        records.sync_directory(directory)
        kept = steps_kept(directory)
        # Later steps are of a future that this run did not go on from: they were damaged.
        for old in (*(each for each in kept if each > step), *[each for each in kept if each <= step][keep:]):
            shutil.rmtree(path_of(directory, old))
        for left in directory.glob(f"{_WRITING}*"):
            shutil.rmtree(left)


def manifest_of(path: Path) -> Manifest:
    """What a snapshot says it is; Damaged where that cannot be read."""
    try:
        return records.read(path / _MANIFEST, Manifest)
    except RecordError as error:
        raise Damaged(f"{path} has no whole {_MANIFEST}: {error}") from error


def load(path: Path, *, rank: int = 0) -> Tree:
    """One process's state as it was saved. Raises Damaged when any file of the snapshot is not what was written."""
    manifest = manifest_of(path)
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path} is not whole: {name} is missing.")
        if (found := file.stat().st_size) != expected.size_bytes:
            raise Damaged(f"{file} must have {expected.size_bytes} bytes, got {found}.")
        if _sum_of(file).sha256 != expected.sha256:
            raise Damaged(f"{file} has changed since it was written: its SHA-256 is another.")
    try:
        tensors = load_file(path / f"process-{rank}.safetensors")
        tree: Tree = json.loads((path / f"process-{rank}.json").read_bytes())
        return _decoded(tree, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error


def _write_process(folder: Path, rank: int, state: Tree) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = _encoded(state, tensors, {}, "")
    saved, described = folder / f"process-{rank}.safetensors", folder / f"process-{rank}.json"
    save_file(tensors, saved)
    described.write_text(json.dumps(tree, allow_nan=False))
    for file in (saved, described):
        _synchronise(file)


def _synchronise(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _sum_of(file: Path) -> FileSum:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileSum(size_bytes=file.stat().st_size, sha256=digest)


def _encoded(value: Tree, tensors: dict[str, torch.Tensor], names: dict[Any, str], where: str) -> Any:
    """The tree for JSON, each tensor in ``tensors`` under one name, however often it occurs."""
    match value:
        case torch.Tensor():
            return {"tensor": _named(value, tensors, names, where)}
        case dict():
            return {"dict": list(_pairs(value, tensors, names, where))}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_encoded(item, tensors, names, f"{where}.{i}") for i, item in enumerate(value)]}
        case float() if not math.isfinite(value):
            return {"float": str(float(value))}
        case bool() | int() | float() | str() | None:
            return value
        case _:
            raise TypeError(
                f"A state must be made of dictionaries, lists, numbers, strings, None and tensors, got "
                f"{type(value).__name__} at {where or 'the top'}."
            )


def _pairs(
    value: dict[Any, Any], tensors: dict[str, torch.Tensor], names: dict[Any, str], where: str
) -> Iterator[list[Any]]:
    for key, item in value.items():
        if not isinstance(key, str | int):
            raise TypeError(f"A key must be a string or a whole number, got {key!r} at {where or 'the top'}.")
        yield [key, _encoded(item, tensors, names, f"{where}.{key}" if where else str(key))]


def _named(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], names: dict[Any, str], where: str) -> str:
    # An empty tensor has no address to know it by.
    storage = (tensor.device, tensor.untyped_storage().data_ptr())
    place = (
        where
        if tensor.numel() == 0
        else (*storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
    )
    if place not in names:
        names[place] = where
        whole = tensor.detach()
        # The format holds tensors that own their storage. A view of a larger one is copied.
        owns = (
            whole.numel() * whole.element_size() == whole.untyped_storage().nbytes() and storage not in names
        )
        tensors[where] = whole.contiguous() if owns else whole.clone(memory_format=torch.contiguous_format)
        names[storage] = where
    return names[place]


def _decoded(tree: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {key: _decoded(item, tensors) for key, item in value}
        case "list":
            return [_decoded(item, tensors) for item in value]
        case "tuple":
            return tuple(_decoded(item, tensors) for item in value)
        case "float":
            return float(value)
        case _:
            raise ValueError(f"unknown kind {kind!r}")

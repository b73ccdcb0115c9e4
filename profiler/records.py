"""Reading and writing records: the one place where our files meet our types.

A *record* is a frozen msgspec Struct. A *document* is a record that is a whole file: it says what kind of
thing it is and under which version of our schema it was written.

    {"kind": "plan", "schema_version": 1, ...fields of the plan...}

A file passes four gates on the way in, and the first that it does not pass gives the message:

    readable  ->  whole JSON  ->  right kind, known version  ->  fields, types, ranges

Kind and version come before the fields because a profile given for a plan, or a file from a newer planner,
has every field wrong; the useful answer is the one fact behind them. On the way out the same gates run in
reverse, so that whatever was written can be read back, and the file changes whole or not at all:

    temporary file in the same directory  ->  fsync  ->  rename over the old file  ->  fsync of the directory

The bytes of a document are a function of its contents (field order, indentation and the shortest digits
that give back the same float are all fixed), which makes their SHA-256 its identity.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar, dataclass_transform

import msgspec


class RecordError(ValueError):
    """A file that cannot be read as the record it should hold, or a record that cannot be written."""


class _RecordMeta(msgspec.StructMeta):
    """Makes `class X(Record)` mean what it says: msgspec does not let a subclass inherit kw_only."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **settings: Any
    ) -> _RecordMeta:
        ours = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
        return super().__new__(cls, name, bases, namespace, **(ours | settings))


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, metaclass=_RecordMeta, frozen=True, kw_only=True):
    """Validated data: frozen, built by keyword, and without fields that nobody declared."""


class Document(Record, tag_field="kind"):
    """A record that is a file by itself. A kind of document is a subclass:

        class Plan(Document, tag="plan"):
            current_version: ClassVar[int] = 1
            schema_version: int = current_version

    The tag becomes the first field of the file, `"kind": "plan"`.
    """

    current_version: ClassVar[int]
    schema_version: int


DocumentT = TypeVar("DocumentT", bound=Document)


def kind_of(type_: type[Document]) -> str:
    """What the files of this type call themselves: "plan", "profile"."""
    return str(type_.__struct_config__.tag)


def read(path: str | os.PathLike[str], type_: type[DocumentT]) -> DocumentT:
    """The document in a file; RecordError says in one line why there is none."""
    source, kind = os.fspath(path), kind_of(type_)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise _refusal(f"{source} is not a {kind}: there is no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise _refusal(f"{source} is not a {kind}: it is a directory. Name a file in it.") from error
    except OSError as error:
        raise _refusal(f"{source} cannot be read: {error.strerror}.") from error
    return decode(data, type_, source=source)


def decode(data: bytes, type_: type[DocumentT], *, source: str = "the document") -> DocumentT:
    """The document in these bytes. `source` names them in messages: a path, or where they came from."""
    kind = kind_of(type_)
    try:
        _check_header(data, type_, source)
        return msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as error:
        raise _refusal(f"{source} is not a {kind}: {_broken_rule(error)}.") from error
    except RecursionError as error:
        raise _refusal(f"{source} is not a {kind}: its JSON is nested too deeply.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not data.strip():
            raise _refusal(f"{source} is not a {kind}: it is empty. Make the file again.") from error
        # A number cut in two is called malformed, at the byte after the last.
        if "truncated" in str(error) or f"invalid number (byte {len(data)})" in str(error):
            raise _refusal(
                f"{source} is not a {kind}: its JSON is cut short. Make the file again."
            ) from error
        raise _refusal(f"{source} is not a {kind}: it is not JSON ({error}).") from error


def encode(document: Document) -> bytes:
    """The document's bytes, the same for the same contents. ValueError when they could not be read back.

    What is written is what would be read back: an int in a field of floats becomes a float first.
    """
    kind = kind_of(type(document))
    for where, value in _floats(msgspec.to_builtins(document), "$"):
        if not math.isfinite(value):
            raise ValueError(f"A {kind} holds finite numbers only, got {value} at {where}.")
    as_read_back = decode(msgspec.json.encode(document), type(document), source="what should be written")
    return msgspec.json.format(msgspec.json.encode(as_read_back), indent=2) + b"\n"


def write(path: str | os.PathLike[str], document: Document) -> None:
    """Puts the document in a file. The old file, if any, stays whole until the new one is on the disk."""
    data = encode(document)
    try:
        replace_whole(path, lambda file: file.write(data))
    except OSError as error:
        raise _refusal(f"{os.fspath(path)} cannot be written: {error.strerror}.") from error


def replace_whole(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Write all of a file or leave the old one as it is; several processes may do so at once. OSError says why not."""
    # A link keeps pointing where it did: what it points to is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Unlike the tempfile module's, its permissions are those of any file the user makes (umask).
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)


def sha256(document: Document) -> str:
    """The document's identity: the hexadecimal SHA-256 of its bytes."""
    return hashlib.sha256(encode(document)).hexdigest()


class _Header(msgspec.Struct):
    """The two fields that decide whether the others are worth reading, of whatever type they came."""

    kind: object = msgspec.UNSET
    schema_version: object = msgspec.UNSET


def _check_header(data: bytes, type_: type[Document], source: str) -> None:
    header = msgspec.json.decode(data, type=_Header)
    kind, found, newest = kind_of(type_), header.schema_version, type_.current_version
    if header.kind is msgspec.UNSET:
        raise msgspec.ValidationError("Object missing required field `kind`")
    if isinstance(header.kind, str) and header.kind != kind:
        raise _refusal(f"{source} is not a {kind}: it is a {header.kind}. Give a {kind}.")
    if found is msgspec.UNSET:
        raise msgspec.ValidationError("Object missing required field `schema_version`")
    if isinstance(found, int) and found > newest:
        raise _refusal(
            f"{source} has schema_version {found}, this version of planner reads up to {newest}. "
            "Upgrade planner or make the file again."
        )
    if isinstance(found, int) and found < 1:
        raise msgspec.ValidationError("Expected `int` >= 1 - at `$.schema_version`")


def _broken_rule(error: msgspec.ValidationError) -> str:
    """msgspec's message in our manner; one from a record's own `__post_init__` keeps its wording."""
    message = str(error).replace("`", "").replace(" - at ", " at ")
    if error.__cause__ is None:
        message = message[0].lower() + message[1:]
    return message.rstrip(".") if " at $" in message else f"{message.rstrip('.')} at $"


def _floats(value: object, where: str) -> Iterator[tuple[str, float]]:
    """Every float in JSON-like data, each with its place, in the notation of msgspec's own messages."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _floats(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _floats(item, f"{where}[{index}]")


def _refusal(message: str) -> RecordError:
    """One line whatever the file holds: a line break or an escape in a name is shown, not obeyed."""
    return RecordError(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    )


def sync_directory(directory: Path) -> None:
    """Makes the rename itself durable. Windows cannot open a directory and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

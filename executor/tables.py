"""Tables that the datasets library reads from a local path: text in a column, or images beside their classes.

    a folder made by save_to_disk                 dataset_dict.json or state.json in it
    *.parquet, *.arrow, *.json(l), *.csv, *.tsv   below a folder, or one file; also compressed (.gz, .bz2, .xz)

No network is used, and no code that lies beside the data: the files are named to the library one by one, with the
builder of its own for their kind. What it makes of them is kept in the cache under a hash of their contents.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import types

from executor import cifar
from executor.cache import cache_directory, content_sha256, writing_to_cache
from executor.images import EncodedImages, Images, opened
from executor.splits import HELD_OUT, by_split, split_of
from executor.text import PIECE_BYTES, Text, in_pieces

_KINDS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
}
"""The datasets library's builder for a suffix, in the order in which a folder of several kinds is tried."""
BINARY_KINDS: Final = (".parquet", ".arrow")
"""Kinds that hold tables and nothing else. JSON and CSV may lie beside anything."""
_COMPRESSED: Final = (".gz", ".bz2", ".xz")
_NO_TABLES: Final = frozenset(
    {
        "added_tokens.json", "config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json",
        "generation_config.json", "preprocessor_config.json", "special_tokens_map.json", "state.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }
)  # fmt: skip
_ROWS_AT_ONCE: Final = 1_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Table:
    """Rows of a split; ``rows`` is a ``datasets.Dataset`` that gives Arrow tables."""

    rows: Any
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def schema(self) -> pa.Schema:
        schema: pa.Schema = self.rows.data.schema
        return schema

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column, one after the other."""
        for batch in self.rows.select_columns([name]).iter(_ROWS_AT_ONCE):
            yield from batch.column(name).to_pylist()

    def columns(self) -> str:
        return ", ".join(f"{field.name} ({field.type})" for field in self.schema) or "no columns"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables:
    """The table to train on, and the one held out if there is one."""

    training: Table
    held_out: Table | None
    path: Path


def saved_to_disk(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def table_files(path: Path, suffixes: Iterable[str] = _KINDS) -> tuple[Path, ...]:
    """The files below a folder, or the one file, that hold a table: all of the first kind that there is."""
    below = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [
        file
        for file in below
        if file.is_file()
        and file.name not in _NO_TABLES
        and (file == path or not any(part.startswith(".") for part in file.relative_to(path).parts))
    ]
    kinds = ([file for file in files if _suffix(file) == suffix] for suffix in suffixes)
    return tuple(next((kind for kind in kinds if kind), ()))


def open_saved(path: Path) -> Tables:
    """What ``save_to_disk`` left in a folder."""
    with _reading(path) as datasets:
        loaded = datasets.load_from_disk(str(path))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return _tables(splits, {name: split_of(name) for name in splits}, path)


def open_files(files: tuple[Path, ...], path: Path) -> Tables:
    """The tables in files of one kind that lie below ``path``."""
    builder, options = _KINDS[_suffix(files[0])]
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise ValueError(
            f"{empty[0]} must hold a table, but the file is empty. Get it again or take it away."
        )
    groups = by_split(files, path if path.is_dir() else path.parent)
    if "train" in groups:
        groups.pop(None, None)
    _refuse_several(groups.get("train", ()), path)
    names = {split or "train": group for split, group in groups.items()}
    with _reading(path) as datasets:
        loaded = datasets.load_dataset(
            builder,
            data_files={
                name: [glob.escape(str(file.absolute())) for file in group] for name, group in names.items()
            },
            cache_dir=str(cache_directory() / "tables" / content_sha256(files)[:16]),
            **options,
        )
    return _tables(loaded, {name: split_of(name) for name in loaded}, path)


def text_of(tables: Tables) -> Text:
    """The text in a table: the column ``text``, or the only one that holds strings."""
    training, held_out = tables.training, tables.held_out
    strings = [field.name for field in training.schema if _is_string(field.type)]
    name = _the_one(strings, ("text",), "text", "a column text, or one column of strings", training)
    if held_out is not None and name not in held_out.schema.names:
        raise _no_column(f"a column {name} as {training.source} has", held_out)
    return Text(
        corpus=_Rows(table=training, column=name, lines=_are_lines(training, name)),
        description=f"text of {len(training):,} rows in {tables.path}",
        held_out=None
        if held_out is None
        else _Rows(table=held_out, column=name, lines=_are_lines(held_out, name)),
        held_out_description="" if held_out is None else f"{len(held_out):,} rows of {held_out.source}",
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Rows:
    """A corpus of rows: a document each, or the lines of one, as in WikiText."""

    table: Table
    column: str
    lines: bool

    def __iter__(self) -> Iterator[Iterable[str]]:
        texts = (text for text in self.table.column(self.column) if text is not None)
        if self.lines:
            yield in_pieces(_blocks(texts))
        else:
            for text in texts:
                yield in_pieces(text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES))


def _blocks(texts: Iterator[str]) -> Iterator[str]:
    while some := list(itertools.islice(texts, _ROWS_AT_ONCE)):
        yield "".join(some)


def _are_lines(table: Table, column: str) -> bool:
    """Whether rows are no documents: each is empty, or one line with its end."""
    texts = [text for text in itertools.islice(table.column(column), _ROWS_AT_ONCE) if text]
    return bool(texts) and all(text.find("\n") == len(text) - 1 for text in texts)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledTables:
    """The images in tables; ``is_cifar_10`` where they are what the dataset of that name has."""

    training: Images
    held_out: Images | None
    is_cifar_10: bool


def images_of(tables: Tables, channels: int, size: tuple[int, int]) -> LabelledTables:
    """The images and classes in a table, decoded for a model that takes images of ``size``.

    Images that are smaller than that and square stay as they are, to be blown up batch by batch.
    """
    table = tables.training
    image = _the_one(
        [field.name for field in table.schema if _is_image(field.type)],
        ("img", "image"),
        "images",
        "a column img or image, or one column of encoded images",
        table,
    )
    label = _the_one(
        [field.name for field in table.schema if _is_integer(field.type)],
        ("label", "labels"),
        "classes",
        "a column label or labels, or one column of whole numbers",
        table,
    )
    if len(table) == 0:
        raise ValueError(f"A data folder (--data) must hold images, got no rows in {table.source}.")
    width, height = opened(_encoded(table, image, np.array([0]))[0], f"image 0 of {table.source}").size
    stored = (height, width) if height == width <= min(size) else size
    held_out = tables.held_out
    if held_out is not None:
        for name in (image, label):
            if name not in held_out.schema.names:
                raise _no_column(f"a column {name} as {table.source} has", held_out)
    read = [
        None if split is None else _images(split, image, label, (channels, *stored))
        for split in (table, held_out)
    ]
    training = read[0]
    assert training is not None
    names = getattr(table.rows.features[label], "names", None)
    return LabelledTables(
        training=training,
        held_out=read[1],
        is_cifar_10=(height, width) == cifar.SHAPE[1:]
        and channels == cifar.SHAPE[0]
        and (tuple(names) == cifar.CLASSES if names else int(training.labels.max()) < len(cifar.CLASSES)),
    )


def _images(table: Table, image: str, label: str, shape: tuple[int, int, int]) -> Images:
    labels = list(table.column(label))
    wrong = next(((i, value) for i, value in enumerate(labels) if value is None or value < 0), None)
    if wrong is not None:
        raise ValueError(
            f"Classes must be whole numbers from 0, got {wrong[1]} in row {wrong[0]} of {table.source}. "
            f"Leave out what has no class."
        )
    encoded = EncodedImages(
        encoded=lambda rows: _encoded(table, image, rows), count=len(labels), shape=shape, source=table.source
    )
    return Images(pixels=encoded.in_memory(), labels=np.array(labels, np.int64))


def _encoded(table: Table, column: str, rows: npt.NDArray[np.int64]) -> list[bytes]:
    values = table.rows[rows.tolist()].column(column).to_pylist()
    return [_bytes_of(value, int(row), table) for value, row in zip(values, rows, strict=True)]


def _bytes_of(value: Any, row: int, table: Table) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return bytes(data)
    path = value.get("path") if isinstance(value, dict) else None
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        raise ValueError(
            f"A row must hold an image or the path of one, got {path!r} in row {row} of {table.source}."
        ) from error


def _the_one(found: list[str], preferred: tuple[str, ...], what: str, rule: str, table: Table) -> str:
    """The preferred column that there is, or the only one."""
    name = next((name for name in preferred if name in found), None)
    if name is None and len(found) != 1:
        raise _no_column(f"{rule}, for {what}", table)
    return name or found[0]


def _no_column(rule: str, table: Table) -> ValueError:
    return ValueError(f"A table must have {rule}, got {table.columns()} in {table.source}. Rename a column.")


def _is_string(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_integer(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind))


def _tables(splits: Mapping[str, Any], meant: Mapping[str, str | None], path: Path) -> Tables:
    """The split that is to train on and the one that is not, of those that there are."""
    by_meaning = {meant[name]: name for name in reversed(list(splits))}
    training = by_meaning.get("train")
    if training is None:
        if len(splits) != 1:
            raise ValueError(
                f"Data in several splits must have one that is named train, got {', '.join(splits)} in {path}."
            )
        training = next(iter(splits))
    held_out = next(
        (by_meaning[split] for split in HELD_OUT if split in by_meaning and by_meaning[split] != training),
        None,
    )
    opened_splits = {
        name: Table(
            rows=splits[name].with_format("arrow"),
            source=f"{name} of {path}" if len(splits) > 1 else str(path),
        )
        for name in (training, held_out)
        if name is not None
    }
    return Tables(
        training=opened_splits[training],
        held_out=None if held_out is None else opened_splits[held_out],
        path=path,
    )


def _refuse_several(training: tuple[Path, ...], path: Path) -> None:
    """Two folders with the same training files are two data sets, or two versions of one."""
    homes: dict[str, Path] = {}
    for file in training:
        other = homes.setdefault(file.name, file)
        if other != file and split_of(file.name) == "train":
            raise ValueError(
                f"A data folder (--data) must hold one data set, got {file.name} in "
                f"{other.parent.relative_to(path)} and in {file.parent.relative_to(path)} of {path}. Name one of them."
            )


def _suffix(file: Path) -> str:
    name = re.sub("|".join(map(re.escape, _COMPRESSED)) + "$", "", file.name.lower())
    return Path(name).suffix


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The datasets library, offline and silent; what it raises about the files in ``path`` becomes ValueError."""
    import datasets
    import huggingface_hub.constants

    with writing_to_cache():
        cache_directory().mkdir(parents=True, exist_ok=True)
    verbosity = datasets.utils.logging.get_verbosity()
    bars = not datasets.utils.are_progress_bars_disabled()
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield datasets
    except (
        datasets.exceptions.DatasetsError,
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{path} must hold whole tables that the datasets library {datasets.__version__} reads, "
            f"got {type(reason).__name__}: {' '.join(str(reason).split())}. Get the files again."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.utils.enable_progress_bars()

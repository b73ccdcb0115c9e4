"""Text to train a language model on: files or rows ──▶ one row of tokens ──▶ windows that do not overlap.

A *corpus* is documents, each in pieces, that can be gone through again and again. Documents end with a token of
their own where the tokenizer has one. Pieces are cut before white space, where GPT-2's tokenizer cuts in any case:
the tokens of the pieces are those of the whole, and encoding takes 150 times the memory of what it is given.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from tokenizers import Tokenizer

from executor.cache import cache_directory, write_cache
from executor.order import Epoch
from executor.splits import HELD_OUT, by_split
from executor.tokenizer import (
    DOCUMENT_END,
    MERGES_FILE,
    VOCABULARY_FILE,
    VOCABULARY_SIZE,
    train_tokenizer,
    vocabulary_size,
)

TEXT_SUFFIXES: Final = frozenset({".txt", ".tokens", ".raw", ".py", ".md"})
STANDARD_LIBRARY_BYTES: Final = 4_000_000
TOKENIZER_BYTES: Final = 16_000_000
"""A tokenizer learns from this much of a corpus, 4 s on two cores. The rest is encoded all the same."""
PIECE_BYTES: Final = 1 << 18
HELD_OUT_SHARE: Final = 20
"""Where nothing is set apart by name, one window in twenty is held out: the last ones."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Corpus = Iterable[Iterable[str]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextFiles:
    """A corpus of files, a document each."""

    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[Iterable[str]]:
        for path in self.files:
            yield in_pieces(_blocks(path))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Text:
    """A corpus to train on, the one held out if there is one, and how to call them."""

    corpus: Corpus
    description: str
    held_out: Corpus | None = None
    held_out_description: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenDataset:
    """A long row of tokens, cut into windows of ``sequence_length`` that do not overlap."""

    tokens: Tokens
    sequence_length: int
    attention_mask: bool = False
    """Whether a batch says that every token counts, for models that want to be told."""

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(
                f"A text must hold at least one sequence of {self.sequence_length} tokens, "
                f"got {len(self.tokens)} tokens. Give more text or a shorter sequence_length (--seq-len)."
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        windows = self.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        tokens = torch.from_numpy(windows[indices].astype(np.int64))
        batch = {"input_ids": tokens, "labels": tokens}
        return batch | {"attention_mask": torch.ones_like(tokens)} if self.attention_mask else batch


def text_in_files(path: Path) -> Text:
    """The text below a folder, or in a file; files whose names say so are held out."""
    files = text_files(path)
    root = path if path.is_dir() else path.parent
    groups = by_split(files, root)
    if "train" not in groups:
        return Text(corpus=TextFiles(files=files), description=f"text of {_counted(files)} in {path}")
    held_out = next((groups[split] for split in HELD_OUT if split in groups), ())
    return Text(
        corpus=TextFiles(files=groups["train"]),
        description=f"text of {_counted(groups['train'])} in {path}",
        held_out=TextFiles(files=held_out) if held_out else None,
        held_out_description=", ".join(file.name for file in held_out),
    )


def text_files(path: Path) -> tuple[Path, ...]:
    """The text files below a folder, or the one file; ValueError where there are none."""
    files = find_text_files(path)
    if not files:
        kinds = ", ".join(f"*{suffix}" for suffix in sorted(TEXT_SUFFIXES))
        found = "none below" if path.is_dir() else "another kind of file," if path.exists() else "nothing at"
        raise ValueError(
            f"Text to train on (--data) must be {kinds} files or a table, found {found} {path}. "
            f"Name another folder."
        )
    return files


def find_text_files(path: Path) -> tuple[Path, ...]:
    """In alphabetical order; hidden files and folders and a tokenizer's merges are left out."""
    if not path.is_dir():
        return (path,) if path.is_file() and path.suffix in TEXT_SUFFIXES else ()
    return tuple(
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in TEXT_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not (file.name == MERGES_FILE and (file.parent / VOCABULARY_FILE).exists())
    )


def standard_library_files(limit_bytes: int = STANDARD_LIBRARY_BYTES) -> tuple[Path, ...]:
    """The running Python's own sources, in alphabetical order, as many as stay within ``limit_bytes``."""
    root = Path(sysconfig.get_path("stdlib"))
    elsewhere = {"site-packages", "dist-packages", "test", "tests"}
    sources = sorted(
        path for path in root.rglob("*.py") if elsewhere.isdisjoint(path.relative_to(root).parts)
    )
    totals = itertools.accumulate(path.stat().st_size for path in sources)
    files = tuple(path for path, total in zip(sources, totals, strict=True) if total <= limit_bytes)
    if not files:
        raise ValueError(
            f"The standard library's sources must be on this machine to train on them, found none in {root}. "
            f"Give a folder of text (--data)."
        )
    return files


def trained_tokenizer(corpus: Corpus, *, vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """A tokenizer trained on this corpus, or the same from the cache."""
    settings = {
        "corpus": _sha256(corpus),
        "document_end": DOCUMENT_END,
        "tokenizer_bytes": TOKENIZER_BYTES,
        "tokenizers": tokenizers.__version__,
        "vocabulary_size": vocabulary_size,
    }
    file = cache_directory() / f"{_key(settings)}.tokenizer.json"
    if not file.exists():
        made = train_tokenizer(_beginning(corpus, TOKENIZER_BYTES), vocabulary_size=vocabulary_size).to_str()
        write_cache(file, lambda opened: opened.write(made.encode()))
    tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    return tokenizer


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """A corpus as one row of tokens, mapped from the cache."""
    settings = {
        "corpus": _sha256(corpus),
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "tokenizers": tokenizers.__version__,
    }
    file = cache_directory() / f"{_key(settings)}.tokens.npy"
    if not file.exists():
        tokens = _encode(corpus, tokenizer)
        write_cache(file, lambda opened: np.save(opened, tokens, allow_pickle=False))
    mapped: Tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    return mapped


def last_windows(tokens: Tokens, sequence_length: int) -> tuple[Tokens, Tokens]:
    """The tokens in two: to train on, and the last twentieth of the windows."""
    windows = len(tokens) // sequence_length
    kept = (windows - windows // HELD_OUT_SHARE) * sequence_length
    return tokens[:kept], tokens[kept:]


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """The same text, cut before white space: one piece a block, except that no word is cut."""
    rest = ""
    for block in blocks:
        rest += block
        if cut := _LAST_WORD_END.match(rest):
            yield cut[0]
            rest = rest[cut.end() :]
    if rest:
        yield rest


_LAST_WORD_END: Final = re.compile(r".*\S(?=\s)", re.DOTALL)


def _blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        with path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                yield decoder.decode(block)
    except OSError as error:
        raise ValueError(
            f"A text to train on must be readable, got {path}: {error.strerror}. Change that or leave it out."
        ) from error
    yield decoder.decode(b"", final=True)


def _encode(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    dtype = np.uint16 if vocabulary_size(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    end = tokenizer.token_to_id(DOCUMENT_END)
    parts = [np.empty(0, dtype)]
    for document in corpus:
        parts += [
            np.array(tokenizer.encode(piece, add_special_tokens=False).ids, dtype) for piece in document
        ]
        if end is not None:
            parts.append(np.array([end], dtype))
    return np.concatenate(parts)


def _beginning(corpus: Corpus, limit_bytes: int) -> Iterator[str]:
    taken_bytes = 0
    for piece in itertools.chain.from_iterable(corpus):
        if taken_bytes >= limit_bytes:
            return
        taken_bytes += len(piece.encode())
        yield piece


def _sha256(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for document in corpus:
        inside = hashlib.sha256()
        for piece in document:
            inside.update(piece.encode())
        digest.update(inside.digest())
    return digest.hexdigest()


def _key(settings: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _counted(files: tuple[Path, ...]) -> str:
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}"

"""Text to tokens and back: GPT-2's byte-level BPE, or one trained on the corpus.

    vocab.json + merges.txt     GPT-2's two files (byte pairs and the order in which they merge)
    tokenizer.json              any tokenizer of the tokenizers library
    neither                     the same kind as GPT-2's, trained on the corpus

All 256 bytes are tokens of the last kind and of GPT-2's, so that every text comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE: Final = 8_192
"""Of GPT-2's 50,257: in the default corpus a token then occurs 127 times on average, enough to learn from."""
SMALLEST_VOCABULARY: Final = 256 + 1
DOCUMENT_END: Final = "<|endoftext|>"

TOKENIZER_FILE: Final = "tokenizer.json"
VOCABULARY_FILE: Final = "vocab.json"
MERGES_FILE: Final = "merges.txt"


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """GPT-2's kind of tokenizer: byte pairs above the 256 bytes."""
    largest = np.iinfo(np.uint16).max + 1
    if not SMALLEST_VOCABULARY <= vocabulary_size <= largest:
        raise ValueError(
            f"vocabulary_size must be from {SMALLEST_VOCABULARY} to {largest}, got {vocabulary_size}."
        )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[DOCUMENT_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in (TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a folder, or in a ``tokenizer.json``. ValueError says what is wrong with its files."""
    if path.is_dir():
        if not has_tokenizer(path):
            raise ValueError(
                f"A tokenizer's folder must hold {VOCABULARY_FILE} and {MERGES_FILE}, or {TOKENIZER_FILE}, "
                f"got {path} with neither."
            )
        whole = path / TOKENIZER_FILE
        return _whole(whole) if whole.exists() else _pairs(path / VOCABULARY_FILE, path / MERGES_FILE)
    return _whole(path)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token: how many rows an embedding needs."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _whole(path: Path) -> Tokenizer:
    text = _read(path)
    try:
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"{path} must be a file of the tokenizers library, got: {error}. Save it again."
        ) from error
    return tokenizer


def _pairs(vocabulary_path: Path, merges_path: Path) -> Tokenizer:
    text = _read(vocabulary_path)
    try:
        vocabulary = msgspec.json.decode(text, type=dict[str, int])
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"{vocabulary_path} must be JSON with a number for each token, got: {error}."
        ) from error
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary))
    if missing:
        raise ValueError(
            f"{vocabulary_path} must have a token for each of the 256 bytes as GPT-2's has, got "
            f"{256 - len(missing)} of them. Give the vocab.json of a byte-level BPE."
        )
    merges = []
    for number, line in enumerate(_read(merges_path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        first, _, second = line.partition(" ")
        if not {first, second, first + second} <= set(vocabulary):
            raise ValueError(
                f"A line of {merges_path} must be two tokens of {VOCABULARY_FILE} that together are one, "
                f"got {line!r} in line {number}. The two files must be of one tokenizer, and whole."
            )
        merges.append((first, second))
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
    if DOCUMENT_END in vocabulary:
        tokenizer.add_special_tokens([DOCUMENT_END])
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise ValueError(
            f"A tokenizer is {VOCABULARY_FILE} with {MERGES_FILE}, or {TOKENIZER_FILE}; {path} is not there. "
            f"Put it there, or take the others away to train one."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}.") from error

"""What a run trains on, without a download, in an order that a run can come back to.

    gpt2       text of Python's own standard library, or of a folder ──▶ byte-level BPE ──▶ windows of tokens
    resnet50   images generated as they are asked for, one template per class with noise over it
    others     the batches of the workload itself

The order of a run is a function and not a state. Epoch e of a run with some seed is one permutation of the
samples, drawn from (seed, e) alone, cut into global batches whose ragged rest is left out:

    start ──▶ (epoch, place) = divmod(start, batches per epoch) ──▶ permutation(seed, epoch)[place * size ...]

so the n-th batch costs the same as the first, and a run that was killed goes on where it was with one number
saved.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from profiler.records import replace_whole
from profiler.registry import seeded
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec, resolve

TEXT_SUFFIXES: Final = frozenset({".txt", ".tokens", ".py", ".md"})
STANDARD_LIBRARY_BYTES: Final = 4_000_000
VOCABULARY_SIZE: Final = 8_192
"""Of GPT-2's 50,257: in the default corpus a token then occurs 127 times on average, enough to learn from."""
TOKENIZER_BYTES: Final = 16_000_000
"""The tokenizer learns from this much of a corpus, 4 s on two cores. The rest is encoded all the same."""
DOCUMENT_END: Final = "<|endoftext|>"
DOCUMENT_END_TOKEN: Final = 0

CLASSES: Final = 10
IMAGES: Final = 50_000
TEMPLATE_CELLS: Final = 4
NOISE: Final = 2.0
"""Standard deviation of an image's noise, where the templates have 1."""


class Dataset(Protocol):
    """Samples that can be had in any order."""

    def __len__(self) -> int: ...

    def gather(self, indices: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The samples at these places, as one batch."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenDataset:
    """A long row of tokens, cut into windows of ``sequence_length`` that do not overlap."""

    tokens: npt.NDArray[np.uint16]
    sequence_length: int
    tokenizer_file: Path

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(
                f"A text must hold at least one sequence of {self.sequence_length} tokens, "
                f"got {len(self.tokens)} tokens. Give more text or a shorter sequence_length (--seq-len)."
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def gather(self, indices: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        windows = self.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        tokens = torch.from_numpy(windows[indices].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageDataset:
    """Image i is the template of class ``i % 10`` under noise that (seed, i) decides; mean 0, deviation 1.

    The templates are the same whatever the seed, so another seed gives unseen images of the same classes.
    """

    image_size: int
    images: int = IMAGES
    seed: int = 0

    def __len__(self) -> int:
        return self.images

    def gather(self, indices: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        labels = indices % CLASSES
        shape = (3, self.image_size, self.image_size)
        noise = np.stack(
            [np.random.default_rng((self.seed, int(i))).standard_normal(shape, np.float32) for i in indices]
        )
        images = (_templates(self.image_size)[labels] + NOISE * noise) / math.sqrt(1 + NOISE**2)
        return {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}


@functools.cache
def _templates(image_size: int) -> npt.NDArray[np.float32]:
    """One smooth pattern per class: a few random colours, blown up to the size of an image."""
    cells = np.random.default_rng(0).standard_normal((CLASSES, 3, TEMPLATE_CELLS, TEMPLATE_CELLS), np.float32)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(cells), size=(image_size, image_size), mode="bicubic", align_corners=False
    )
    templates: npt.NDArray[np.float32] = ((smooth - smooth.mean()) / smooth.std()).numpy()
    return templates


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnBatches:
    """The batches that a workload makes itself, which cannot be had in another order."""

    batch: Callable[[int], Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """What a run trains on, and how to say so."""

    description: str
    dataset: Dataset | OwnBatches


def load(spec: WorkloadSpec, workload: Workload, data_dir: Path | None = None) -> TrainingData:
    """The training data of a workload; ``data_dir`` is a folder of text to use in place of the default."""
    spec = resolve(spec)
    if data_dir is not None and spec.name != "gpt2":
        raise ValueError(
            f"A data folder (--data) is for workloads that read text, got {data_dir} for {spec.name}. "
            f"Leave it out."
        )
    match spec:
        case WorkloadSpec(name="gpt2", sequence_length=int(sequence_length)):
            if data_dir is None:
                description = f"text of the Python {platform.python_version()} standard library"
                files = standard_library_files()
            else:
                files = text_files(data_dir)
                description = f"text of {len(files)} files in {data_dir}"
            text = tokenize(files)
            dataset: Dataset | OwnBatches = TokenDataset(
                tokens=text.tokens, sequence_length=sequence_length, tokenizer_file=text.tokenizer_file
            )
        case WorkloadSpec(name="resnet50", image_size=int(image_size)):
            description = "generated images (no download)"
            dataset = ImageDataset(image_size=image_size)
        case _:
            description = f"batches that {spec.name} makes itself"
            dataset = OwnBatches(batch=workload.batch)
    return TrainingData(description=description, dataset=dataset)


def batches(
    dataset: Dataset | OwnBatches, global_batch_size: int, seed: int, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Global batches without end, beginning with number ``start``; the first dimension is the samples.

    A workload's own batches come one call each. torch's generator is seeded from (seed, number) for the call,
    so a run can come back to them too, as far as they draw on that generator.
    """
    if global_batch_size < 1 or start < 0:
        raise ValueError(
            f"global_batch_size must be at least 1 and start at least 0, got {global_batch_size} and {start}."
        )
    if isinstance(dataset, OwnBatches):
        return _own_batches(dataset, global_batch_size, seed, start)
    if global_batch_size > len(dataset):
        raise ValueError(
            f"global_batch_size must be at most the {len(dataset)} samples of an epoch, "
            f"got {global_batch_size}. Give more data or a smaller batch."
        )
    return _permuted_batches(dataset, global_batch_size, seed, start)


def _permuted_batches(
    dataset: Dataset, global_batch_size: int, seed: int, start: int
) -> Iterator[dict[str, torch.Tensor]]:
    batches_per_epoch = len(dataset) // global_batch_size
    first_epoch, first_place = divmod(start, batches_per_epoch)
    for epoch in itertools.count(first_epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
        for place in range(first_place, batches_per_epoch):
            yield dataset.gather(order[place * global_batch_size : (place + 1) * global_batch_size])
        first_place = 0


def _own_batches(dataset: OwnBatches, global_batch_size: int, seed: int, start: int) -> Iterator[Any]:
    for number in itertools.count(start):
        with seeded(int(np.random.SeedSequence((seed, number)).generate_state(1)[0])):
            batch = dataset.batch(global_batch_size)
        yield batch


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


def text_files(data_dir: Path) -> tuple[Path, ...]:
    """The text files below a folder, in alphabetical order; hidden files and folders are left out."""
    kinds = ", ".join(f"*{suffix}" for suffix in sorted(TEXT_SUFFIXES))
    if not data_dir.is_dir():
        found = "a file" if data_dir.exists() else "nothing there"
        raise ValueError(
            f"A data folder (--data) must be a folder with {kinds} files, got {data_dir}: {found}."
        )
    files = tuple(
        path
        for path in sorted(data_dir.rglob("*"))
        if path.suffix in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(data_dir).parts)
    )
    if not files:
        raise ValueError(
            f"A data folder (--data) must hold {kinds} files, found none below {data_dir}. "
            f"Name another folder."
        )
    return files


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenizedText:
    """A corpus as tokens, mapped from the cache, with the file of the tokenizer that made them."""

    tokens: npt.NDArray[np.uint16]
    tokenizer_file: Path


def tokenize(files: Iterable[Path], *, vocabulary_size: int = VOCABULARY_SIZE) -> TokenizedText:
    """Train a tokenizer on these files and encode them with it, or take both from the cache.

    Cached under a hash of every byte and setting they depend on, so an entry is right or absent, never stale.
    """
    files = tuple(files)
    key = _cache_key(files, vocabulary_size)
    tokenizer_file = cache_directory() / f"{key}.tokenizer.json"
    tokens_file = cache_directory() / f"{key}.tokens.npy"
    if not (tokenizer_file.exists() and tokens_file.exists()):
        tokenizer = train_tokenizer(_pieces(files, TOKENIZER_BYTES), vocabulary_size=vocabulary_size)
        tokens = _encode(tokenizer, files)
        _write_cache(tokenizer_file, lambda file: file.write(tokenizer.to_str().encode()))
        _write_cache(tokens_file, lambda file: np.save(file, tokens, allow_pickle=False))
    return TokenizedText(
        tokens=np.load(tokens_file, mmap_mode="r", allow_pickle=False), tokenizer_file=tokenizer_file
    )


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """GPT-2's kind of tokenizer: byte pairs above the 256 bytes, so that every text comes back as it was."""
    smallest = 256 + 1
    largest = np.iinfo(np.uint16).max + 1
    if not smallest <= vocabulary_size <= largest:
        raise ValueError(f"vocabulary_size must be from {smallest} to {largest}, got {vocabulary_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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


def _encode(tokenizer: Tokenizer, files: Iterable[Path]) -> npt.NDArray[np.uint16]:
    parts: list[npt.NDArray[np.uint16]] = []
    for file in files:
        parts += [np.array(tokenizer.encode(piece).ids, np.uint16) for piece in _pieces([file])]
        parts.append(np.array([DOCUMENT_END_TOKEN], np.uint16))
    return np.concatenate(parts)


def _pieces(files: Iterable[Path], limit_bytes: int | None = None) -> Iterator[str]:
    """Whole lines, 256 KiB at a time: encoding takes 150 times the memory of what is encoded at once."""
    read_bytes = 0
    for path in files:
        with path.open("rb") as file:
            while lines := file.readlines(1 << 18):
                if limit_bytes is not None and read_bytes >= limit_bytes:
                    return
                piece = b"".join(lines)
                read_bytes += len(piece)
                yield piece.decode(errors="replace")


def _cache_key(files: Iterable[Path], vocabulary_size: int) -> str:
    settings = {
        "document_end": DOCUMENT_END,
        "tokenizer_bytes": TOKENIZER_BYTES,
        "tokenizers": tokenizers.__version__,
        "vocabulary_size": vocabulary_size,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cache_directory() -> Path:
    """``$PLANNER_HOME/cache``, else ``planner`` in the cache directory of the XDG base directories."""
    if home := os.environ.get("PLANNER_HOME"):
        return Path(home).expanduser().absolute() / "cache"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "planner"


def _write_cache(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write all of a file or nothing; several processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)
    except OSError as error:
        raise ValueError(
            f"The cache directory must be writable, got {path.parent}: {error.strerror or error}. "
            f"Set PLANNER_HOME to one that is."
        ) from error

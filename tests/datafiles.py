"""Data sets of a few samples in the formats in which the real ones are published."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import pre_tokenizers

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
VERSE = "the cat sat on the mat, the cat sat on the hat\n"


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes as Python 2 wrote its strings, in which CIFAR-10's keys and pixels are."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(
            (pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
            + struct.pack("<B" if short else "<i", len(value))
            + value
        )
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    """Protocol 2 of Python 2 with its numpy: what is in ``cifar-10-python.tar.gz``."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pixels(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Rows of 3 x 32 x 32 numbers, a channel after the other."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def batch(count: int, seed: int = 0) -> dict[bytes, Any]:
    """What one file of CIFAR-10 holds."""
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [(seed + i) % 10 for i in range(count)],
        b"data": pixels(count, seed),
        b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * count,
    }


def write_cifar(folder: Path, images: int = 4) -> Path:
    """Six files of a few images each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(BATCHES):
        (folder / name).write_bytes(python2_pickle(batch(images, seed=number)))
    return folder


def write_archive(path: Path, folder: Path) -> Path:
    """The archive that is downloaded, with its own folder in it."""
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname="cifar-10-batches-py")
    return path


def png(image: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """An image of (height, width, channels) as a file."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind)
    return file.getvalue()


def colour(size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def write_images(
    file: Path,
    count: int,
    *,
    seed: int = 0,
    size: int = 32,
    names: tuple[str, str] = ("img", "label"),
    classes: int = 10,
) -> Path:
    """A parquet file as the hub has CIFAR-10: a struct of bytes and path beside a number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(colour(size, seed + i)), "path": None} for i in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({names[0]: pa.array(images, kind), names[1]: [i % classes for i in range(count)]})
    pq.write_table(table, file)
    return file


def write_gpt2_files(folder: Path, merges: tuple[str, ...] = ("t h", "th e", "Ġ c", "a t", "Ġc at")) -> Path:
    """``vocab.json`` and ``merges.txt`` as GPT-2 has them, with its 256 bytes and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder

"""CIFAR-10 as it is downloaded: six pickles in a folder or in ``cifar-10-python.tar.gz``.

A pickle is a program for a machine that may call anything. These were written by numpy under Python 2, and to read
them takes four calls, all of which are answered here by inert stand-ins that only note what they were given:

    numpy.core.multiarray._reconstruct, numpy.ndarray, numpy.dtype      an array: its shape, its type, its bytes
    _codecs.encode                                                      bytes, where Python 3 wrote them

Whatever else a pickle names is refused before it is looked up, so nothing of it runs.
"""

from __future__ import annotations

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from executor.images import Images, PixelArray

FOLDER: Final = "cifar-10-batches-py"
ARCHIVE: Final = "cifar-10-python.tar.gz"
TRAINING_FILES: Final = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE: Final = "test_batch"
CLASSES: Final = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SHAPE: Final = (3, 32, 32)

_FILES: Final = (*TRAINING_FILES, TEST_FILE)
_LARGEST_FILE_BYTES: Final = 1 << 27
"""Four times a file of CIFAR-10: an archive that unpacks to more holds something else."""


def find(path: Path) -> Path | None:
    """The folder of batches or the archive that ``path`` is or holds, else None."""
    if path.is_file():
        return path if path.name.endswith((".tar.gz", ".tgz", ".tar")) else None
    for folder in (path, path / FOLDER):
        if any((folder / name).is_file() for name in _FILES):
            return folder
    archive = path / ARCHIVE
    return archive if archive.is_file() else None


def read(path: Path) -> tuple[Images, Images]:
    """The training and the test images in a folder or archive of batches; ValueError says which file is bad."""
    files = _in_archive(path) if path.is_file() else _in_folder(path)
    batches = {name: read_batch(data, source=str(path / name)) for name, data in files}
    missing = [name for name in _FILES if name not in batches]
    if missing:
        raise ValueError(
            f"CIFAR-10 is {TRAINING_FILES[0]} to {TRAINING_FILES[-1]} and {TEST_FILE}, but {path} has no "
            f"{', '.join(missing)}. Unpack {ARCHIVE} again."
        )
    return _joined([batches[name] for name in TRAINING_FILES]), _joined([batches[TEST_FILE]])


def read_batch(data: bytes, *, source: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The pixels (n, 3, 32, 32) and labels of one pickled batch."""
    content = _unpickled(data, source)
    if not isinstance(content, dict):
        raise _bad(source, f"a {type(content).__name__} in place of a dictionary")
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    pixels, labels = named.get("data"), named.get("labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise _bad(source, f"the entries {', '.join(map(repr, named)) or 'none'}")
    images = pixels.images(source)
    if len(images) != len(labels) or not labels:
        raise _bad(source, f"{len(images)} images and {len(labels)} labels")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < len(CLASSES)]
    if wrong:
        raise _bad(source, f"the label {wrong[0]!r}, where classes go from 0 to {len(CLASSES) - 1}")
    return images, np.array(labels, np.int64)


def _joined(batches: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]) -> Images:
    return Images(
        pixels=PixelArray(array=np.concatenate([pixels for pixels, _ in batches])),
        labels=np.concatenate([labels for _, labels in batches]),
    )


def _in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in _FILES:
        if (folder / name).is_file():
            try:
                yield name, (folder / name).read_bytes()
            except OSError as error:
                raise ValueError(f"{folder / name} cannot be read: {error.strerror}.") from error


def _in_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read in place; nothing is unpacked to the disk."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name not in _FILES or not member.isfile():
                    continue
                if member.size > _LARGEST_FILE_BYTES:
                    raise _bad(str(path / name), f"{member.size} bytes")
                opened = archive.extractfile(member)
                assert opened is not None
                yield name, opened.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} must be {ARCHIVE}, whole, got: {error}. Download it again or unpack another copy."
        ) from error


class _Array:
    """What a pickle says about an array, before any of it is believed."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, tuple) else ()

    def images(self, source: str) -> npt.NDArray[np.uint8]:
        match self.state:
            case (_, (int(count), int(width)), _Type(name="u1"), False, bytes(data) | bytearray(data)):
                pass
            case _:
                raise _bad(source, "something else in place of rows of 8-bit numbers")
        if width != math.prod(SHAPE) or count * width != len(data):
            raise _bad(source, f"{count} x {width} numbers and {len(data)} bytes for them")
        return np.frombuffer(data, np.uint8).reshape(count, *SHAPE)


class _Type:
    """What a pickle says about a type of numbers."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None: ...


def _encoded(text: Any, encoding: Any = None) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an encoding that Python does not pickle them in")
    return text.encode("latin1")


def _from_buffer(data: Any, type_: Any, shape: Any, order: Any) -> _Array:
    return _Array(1, shape, type_, order != "C", data)


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("_codecs", "encode"): _encoded,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Refused(ValueError):
    """A pickle that names what an image batch has no use for."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise _Refused(f"a call of {module}.{name}")
        # A new function each time: a pickle may set attributes on what it was given.
        return lambda *arguments: stand_in(*arguments)


def _unpickled(data: bytes, source: str) -> object:
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(
            f"{source} must hold an array of images and their labels, got {error}, which may do anything; "
            f"nothing in it was run. Get the file from where CIFAR-10 is published."
        ) from error
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        raise _bad(source, f"a pickle that is cut short or damaged ({error})") from error


def _bad(source: str, found: str) -> ValueError:
    return ValueError(
        f"{source} must be a batch of CIFAR-10 for Python, whole, got {found}. Unpack {ARCHIVE} again."
    )

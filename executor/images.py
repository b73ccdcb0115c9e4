"""Images with classes: pixels and labels ──▶ crops and flips ──▶ normalised batches of the size a model takes.

    stored      whole numbers 0 to 255, (channels, height, width), decoded at the start where they fit in memory
    augmented   CIFAR-10, in training: four black pixels around it, a crop of its old size, mirrored half of the time
    normalised  (pixel / 255 - mean) / deviation, for each channel

Which crop and whether mirrored is drawn from (seed, epoch) for all samples at once, so it is a function of the run,
the epoch and the sample, whatever batch the sample comes in.
"""

from __future__ import annotations

import functools
import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from executor.order import Epoch

HELD_OUT_SHARE: Final = 20
"""Where no images are set apart, one in twenty is held out: every twentieth, since files are often sorted by class."""
PADDING: Final = 4
IN_MEMORY_BYTES: Final = 1 << 31
PREPROCESSOR_FILE: Final = "preprocessor_config.json"
NORMALISATION_IMAGES: Final = 2_000

GENERATED_CLASSES: Final = 10
GENERATED_IMAGES: Final = 50_000
GENERATED_HELD_OUT: Final = 2_000
TEMPLATE_CELLS: Final = 4
NOISE: Final = 2.0
"""Standard deviation of an image's noise, where the templates have 1."""

_AUGMENTATION: Final = 1
"""Beside (seed, epoch), which the order of the samples is drawn from."""


class Pixels(Protocol):
    """Images of one shape, (channels, height, width)."""

    def __len__(self) -> int: ...

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The images in these rows."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PixelArray:
    """Images that are in memory."""

    array: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.array[rows]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedImages:
    """Files of images (PNG, JPEG ...), decoded when they are asked for, cut about the middle to one shape."""

    encoded: Callable[[npt.NDArray[np.int64]], list[bytes]]
    count: int
    shape: tuple[int, int, int]
    source: str

    def __len__(self) -> int:
        return self.count

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        images = [self._decoded(data, int(row)) for data, row in zip(self.encoded(rows), rows, strict=True)]
        return np.stack(images)

    def _decoded(self, data: bytes, row: int) -> npt.NDArray[np.uint8]:
        channels, height, width = self.shape
        image = opened(data, f"image {row} of {self.source}").convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)

    def in_memory(self) -> Pixels:
        """All of them decoded, or as they are where that would be too much."""
        if self.count * math.prod(self.shape) > IN_MEMORY_BYTES:
            return self
        array = np.empty((self.count, *self.shape), np.uint8)
        for rows in np.array_split(np.arange(self.count), max(1, self.count // 1_000)):
            array[rows] = self.read(rows)
        return PixelArray(array=array)


def opened(data: bytes, source: str) -> Image.Image:
    """An image with its pixels read. ValueError for what is none, or is cut short."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        found = str(error).partition(" <_io")[0]
        raise ValueError(
            f"Images must be whole files that Pillow reads, got {source}: {found}. Replace or leave out that one."
        ) from error
    return image


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Images and the class of each."""

    pixels: Pixels
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalisation:
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.deviation) or not self.mean:
            raise ValueError(
                f"A normalisation has a mean and a deviation for each channel, got {len(self.mean)} means and "
                f"{len(self.deviation)} deviations."
            )
        if not all(map(math.isfinite, (*self.mean, *self.deviation))) or min(self.deviation) <= 0:
            raise ValueError(
                f"The means of a normalisation must be finite and its deviations above 0, got {self.mean} and "
                f"{self.deviation}. Images that are all alike have no deviation."
            )

    def check(self, channels: int) -> None:
        if len(self.mean) != channels:
            raise ValueError(
                f"A normalisation must have a mean and a deviation for each of the {channels} channels of the images, "
                f"got {len(self.mean)}: mean {self.mean}, deviation {self.deviation}."
            )

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        values = pixels.astype(np.float32)
        values /= np.float32(255)
        values -= np.array(self.mean, np.float32)[:, None, None]
        values /= np.array(self.deviation, np.float32)[:, None, None]
        return values


CIFAR_10: Final = Normalisation(mean=(0.4914, 0.4822, 0.4465), deviation=(0.2470, 0.2435, 0.2616))


class _Preprocessor(msgspec.Struct):
    """The two settings of transformers' ``preprocessor_config.json`` that say how images are normalised."""

    image_mean: list[float] | float | None = None
    image_std: list[float] | float | None = None


def stated_normalisation(folder: Path) -> Normalisation | None:
    """What ``preprocessor_config.json`` in a folder of images says, or None without one."""
    file = folder / PREPROCESSOR_FILE
    if not file.is_file():
        return None
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_Preprocessor)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} must be JSON with image_mean and image_std, got: {error}.") from error
    if found.image_mean is None and found.image_std is None:
        return None
    mean, deviation = (
        tuple(value) if isinstance(value, list) else () if value is None else (value,)
        for value in (found.image_mean, found.image_std)
    )
    try:
        return Normalisation(mean=mean, deviation=deviation)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def measured_normalisation(pixels: Pixels) -> Normalisation:
    """Mean and deviation of the images themselves, of 2,000 of them where there are more."""
    rows = np.unique(np.linspace(0, len(pixels) - 1, NORMALISATION_IMAGES).astype(np.int64))
    values = pixels.read(rows).astype(np.float64) / 255
    return Normalisation(
        mean=tuple(values.mean(axis=(0, 2, 3)).tolist()), deviation=tuple(values.std(axis=(0, 2, 3)).tolist())
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PixelDataset:
    """Some rows of images, normalised, of the ``size`` (height, width) and under the name that a model takes.

    ``augmented``: cropped and mirrored, in an epoch of training.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    normalisation: Normalisation
    size: tuple[int, int]
    name: str = "images"
    augmented: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        rows = self.rows[indices]
        pixels = self.images.pixels.read(rows)
        if self.augmented and epoch is not None:
            pixels = cropped_and_mirrored(pixels, _draws(epoch, len(self.images.pixels))[rows])
        images = torch.from_numpy(self.normalisation.apply(pixels))
        if images.shape[2:] != self.size:
            images = torch.nn.functional.interpolate(
                images, self.size, mode="bilinear", align_corners=False, antialias=True
            )
        return {self.name: images, "labels": torch.from_numpy(self.images.labels[rows])}


def every_twentieth(count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows to train on and those that are held out."""
    rows = np.arange(count)
    held_out = rows % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    return rows[~held_out], rows[held_out]


def cropped_and_mirrored(
    pixels: npt.NDArray[np.uint8], draws: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Images moved by up to four pixels over black and mirrored; each has a draw of (down, right, mirrored)."""
    height, width = pixels.shape[2:]
    padded = np.pad(pixels, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped: npt.NDArray[np.uint8] = windows[np.arange(len(pixels)), :, draws[:, 0], draws[:, 1]]
    mirrored = draws[:, 2] == 1
    cropped[mirrored] = cropped[mirrored, :, :, ::-1]
    return cropped


@functools.lru_cache(maxsize=2)
def _draws(epoch: Epoch, samples: int) -> npt.NDArray[np.int64]:
    generator = np.random.default_rng((epoch.seed, epoch.number, _AUGMENTATION))
    return generator.integers((2 * PADDING + 1, 2 * PADDING + 1, 2), size=(samples, 3))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageDataset:
    """Image i is the template of class ``i % 10`` under noise that (seed, i) decides; mean 0, deviation 1.

    The templates are the same whatever the seed, so another seed gives unseen images of the same classes.
    """

    image_size: int
    images: int = GENERATED_IMAGES
    seed: int = 0

    def __len__(self) -> int:
        return self.images

    def gather(self, indices: npt.NDArray[np.int64], epoch: Epoch | None = None) -> dict[str, torch.Tensor]:
        labels = indices % GENERATED_CLASSES
        shape = (3, self.image_size, self.image_size)
        noise = np.stack(
            [np.random.default_rng((self.seed, int(i))).standard_normal(shape, np.float32) for i in indices]
        )
        images = (_templates(self.image_size)[labels] + NOISE * noise) / math.sqrt(1 + NOISE**2)
        return {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}


@functools.cache
def _templates(image_size: int) -> npt.NDArray[np.float32]:
    """One smooth pattern per class: a few random colours, blown up to the size of an image."""
    shape = (GENERATED_CLASSES, 3, TEMPLATE_CELLS, TEMPLATE_CELLS)
    cells = np.random.default_rng(0).standard_normal(shape, np.float32)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(cells), size=(image_size, image_size), mode="bicubic", align_corners=False
    )
    templates: npt.NDArray[np.float32] = ((smooth - smooth.mean()) / smooth.std()).numpy()
    return templates

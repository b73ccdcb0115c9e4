"""What preparing batches ahead is worth: the same steps and batches with and without it, side by side.

    python -m studies.loading [--step-seconds 0.05] [--batch-seconds 0.02] [--steps 40] [--rounds 3]

A step is products of matrices on the CPU, a batch is JPEG files decoded, each as many as take the seconds that are
asked for. Ways take turns, so that a noisy machine is noisy for all; the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from executor.images import EncodedImages, Images, Normalisation, PixelDataset
from executor.prefetch import AHEAD, loader

SIZE = 128
IMAGES = 256
WIDTH = 512


def images() -> PixelDataset:
    """JPEG files of noise that are decoded each time they are asked for."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    encoded = EncodedImages(
        encoded=lambda rows: [files[row] for row in rows],
        count=IMAGES,
        shape=(3, SIZE, SIZE),
        source="this study",
    )
    return PixelDataset(
        images=Images(pixels=encoded, labels=np.zeros(IMAGES, np.int64)),
        rows=np.arange(IMAGES),
        normalisation=Normalisation(mean=(0.5,) * 3, deviation=(0.5,) * 3),
        size=(SIZE, SIZE),
    )


def seconds_of(call: Callable[[], object], repeats: int = 10) -> float:
    """The median of some calls."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def products(count: int) -> None:
    matrix = torch.full((WIDTH, WIDTH), 1 / WIDTH)
    for _ in range(count):
        matrix = matrix @ matrix


def trained(
    dataset: PixelDataset, batch_size: int, per_step: int, steps: int, ahead: int
) -> tuple[float, float]:
    """Seconds of a loop of some steps, and the share of them that it waited for batches."""
    with loader(dataset, batch_size, seed=0, ahead=ahead) as batches:
        next(batches)
        waited, began = batches.waiting_seconds, time.perf_counter()
        for _ in itertools.islice(batches, steps):
            products(per_step)
        taken = time.perf_counter() - began
        return taken, (batches.waiting_seconds - waited) / taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--batch-seconds", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = images()
    one_image = seconds_of(lambda: dataset.gather(np.arange(16))) / 16
    one_product = seconds_of(lambda: products(10)) / 10
    batch_size = min(IMAGES, max(1, round(options.batch_seconds / one_image)))
    per_step = max(1, round(options.step_seconds / one_product))
    step = seconds_of(lambda: products(per_step))
    batch = seconds_of(lambda: dataset.gather(np.arange(batch_size)))
    print(
        f"a step: {per_step} products, {1e3 * step:.0f} ms; a batch: {batch_size} images, {1e3 * batch:.0f} ms"
    )
    found: dict[int, list[tuple[float, float]]] = {0: [], 1: [], AHEAD: []}
    for _ in range(options.rounds):
        for ahead, results in found.items():
            results.append(trained(dataset, batch_size, per_step, options.steps, ahead))
    for ahead, results in found.items():
        taken, waited = (statistics.median(values) for values in zip(*results, strict=True))
        print(
            f"{ahead} ahead: {1e3 * taken / options.steps:5.1f} ms a step, {waited:6.1%} of the time waiting"
        )


if __name__ == "__main__":
    main()

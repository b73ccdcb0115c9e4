"""What a run trains on, and what it is evaluated on.

    without a folder   gpt2       text of Python's own standard library ──▶ byte-level BPE ──▶ windows of tokens
                       resnet50   images generated as they are asked for, one template per class with noise over it
                       others     the batches of the workload itself
    from a folder      text       text files, or a column of a table       for workloads that take tokens
                       images     CIFAR-10 for Python, or a table          for workloads that take images

All that can be known to be wrong with data is found when it is loaded, before a model has made a step.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from executor import cifar, tables
from executor.form import ImageForm, TextForm, form_of
from executor.images import (
    CIFAR_10,
    GENERATED_HELD_OUT,
    ImageDataset,
    Images,
    Normalisation,
    PixelDataset,
    every_twentieth,
    measured_normalisation,
    stated_normalisation,
)
from executor.order import Dataset, Epoch, OwnBatches, batches
from executor.text import (
    Text,
    TextFiles,
    TokenDataset,
    Tokens,
    find_text_files,
    last_windows,
    standard_library_files,
    text_in_files,
    tokenize,
    trained_tokenizer,
)
from executor.tokenizer import (
    SMALLEST_VOCABULARY,
    VOCABULARY_SIZE,
    has_tokenizer,
    read_tokenizer,
    vocabulary_size,
)
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec, resolve

__all__ = [
    "Dataset",
    "Epoch",
    "ImageDataset",
    "OwnBatches",
    "TokenDataset",
    "TrainingData",
    "batches",
    "load",
]

Metric = Literal["accuracy", "perplexity"]

_NOTES: Final = frozenset({".md", ".py"})
_GENERATED_SEED: Final = 1
"""Of the images that a model is evaluated on; those that it is trained on have 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """What a run trains on and is evaluated on, and how to say so.

    ``metric``: ``accuracy`` is the share of ``evaluation`` whose largest output is its label, ``perplexity`` the
    exponential of the mean loss over it. Both are None where nothing is held out.
    """

    description: str
    dataset: Dataset | OwnBatches
    evaluation: Dataset | None = None
    evaluation_description: str | None = None
    metric: Metric | None = None


def load(
    spec: WorkloadSpec,
    workload: Workload,
    data_dir: Path | None = None,
    *,
    tokenizer: Path | None = None,
    normalisation: Normalisation | None = None,
) -> TrainingData:
    """The training data of a workload, at hand or from a folder or file; ValueError for data that does not do.

    ``tokenizer`` is a folder with GPT-2's two files or a ``tokenizer.json``, else those in the data folder are taken,
    else one is trained. ``normalisation`` is for images, else that of a ``preprocessor_config.json`` in the folder,
    else CIFAR-10's for CIFAR-10 and for others their own.
    """
    spec = resolve(spec)
    takes_text = spec.name == "gpt2"
    form = None
    if data_dir is not None:
        form = form_of(spec, workload)
        takes_text = isinstance(form, TextForm)
    if tokenizer is not None and not takes_text:
        raise ValueError(f"A tokenizer is for text, got {tokenizer} for {spec.name}. Leave it out.")
    if normalisation is not None and not isinstance(form, ImageForm):
        raise ValueError(
            f"A normalisation is for images in a data folder, got one for {spec.name}. Leave it out."
        )
    if data_dir is None:
        return _at_hand(spec, workload, tokenizer)
    if not data_dir.exists():
        raise ValueError(f"Data (--data) must be a folder or a file, got {data_dir}: nothing there.")
    if isinstance(form, ImageForm):
        return _images(data_dir, form, normalisation)
    assert form is not None
    if tokenizer is None and data_dir.is_dir() and has_tokenizer(data_dir):
        tokenizer = data_dir
    return _tokens(_text_in(data_dir), form, tokenizer)


def _at_hand(spec: WorkloadSpec, workload: Workload, tokenizer: Path | None) -> TrainingData:
    match spec:
        case WorkloadSpec(name="gpt2", sequence_length=int(sequence_length)):
            text = Text(
                corpus=TextFiles(files=standard_library_files()),
                description=f"text of the Python {platform.python_version()} standard library",
            )
            form = TextForm(sequence_length=sequence_length, vocabulary_size=None, attention_mask=False)
            return _tokens(text, form, tokenizer)
        case WorkloadSpec(name="resnet50", image_size=int(image_size)):
            return TrainingData(
                description="generated images (no download)",
                dataset=ImageDataset(image_size=image_size),
                evaluation=ImageDataset(
                    image_size=image_size, images=GENERATED_HELD_OUT, seed=_GENERATED_SEED
                ),
                evaluation_description=f"{GENERATED_HELD_OUT:,} other generated images",
                metric="accuracy",
            )
        case _:
            return TrainingData(
                description=f"batches that {spec.name} makes itself", dataset=OwnBatches(batch=workload.batch)
            )


def _text_in(path: Path) -> Text:
    if tables.saved_to_disk(path):
        return tables.text_of(tables.open_saved(path))
    if files := tables.table_files(path, tables.BINARY_KINDS) or _more_than_text(
        tables.table_files(path), path
    ):
        return tables.text_of(tables.open_files(files, path))
    return text_in_files(path)


def _more_than_text(files: tuple[Path, ...], path: Path) -> tuple[Path, ...]:
    """These JSON or CSV files, or none where more of a folder is text. Notes and scripts beside tables are no text."""
    folders = {file.parent for file in files}
    text = (
        file.stat().st_size
        for file in find_text_files(path)
        if not (file.suffix in _NOTES and file.parent in folders)
    )
    return files if sum(file.stat().st_size for file in files) >= sum(text) else ()


def _tokens(text: Text, form: TextForm, tokenizer_path: Path | None) -> TrainingData:
    if tokenizer_path is None:
        known = form.vocabulary_size or VOCABULARY_SIZE
        if known < SMALLEST_VOCABULARY:
            raise ValueError(
                f"A tokenizer that is trained on text needs a model with {SMALLEST_VOCABULARY} tokens or more, got "
                f"{known}. Give the tokenizer of the model."
            )
        tokenizer = trained_tokenizer(text.corpus, vocabulary_size=min(known, VOCABULARY_SIZE))
    else:
        tokenizer = read_tokenizer(tokenizer_path)
    needed = vocabulary_size(tokenizer)
    if form.vocabulary_size is not None and needed > form.vocabulary_size:
        raise ValueError(
            f"A model must know all tokens of its tokenizer, got {form.vocabulary_size} of the model and {needed} in "
            f"{tokenizer_path}. Give another tokenizer, or none to train one."
        )

    length = form.sequence_length
    tokens = tokenize(text.corpus, tokenizer)
    if text.held_out is None:
        tokens, held_out = last_windows(tokens, length)
        name = f"the last {len(held_out) // length:,} of {(len(tokens) + len(held_out)) // length:,} windows"
    else:
        held_out, name = tokenize(text.held_out, tokenizer), text.held_out_description

    def windows(tokens: Tokens) -> TokenDataset:
        return TokenDataset(tokens=tokens, sequence_length=length, attention_mask=form.attention_mask)

    evaluated = len(held_out) >= length
    return TrainingData(
        description=text.description,
        dataset=windows(tokens),
        evaluation=windows(held_out) if evaluated else None,
        evaluation_description=name if evaluated else None,
        metric="perplexity" if evaluated else None,
    )


def _images(path: Path, form: ImageForm, normalisation: Normalisation | None) -> TrainingData:
    training, held_out, is_cifar_10 = _images_in(path, form)
    for images in (training, held_out):
        largest = None if images is None else int(images.labels.max(initial=0))
        if form.classes is not None and largest is not None and largest >= form.classes:
            raise ValueError(
                f"A model must tell all classes of its data apart, got {form.classes} classes of the model and the "
                f"class {largest} in {path}. Train a model with {largest + 1} classes."
            )
    if normalisation is None and path.is_dir():
        normalisation = stated_normalisation(path)
    if normalisation is None:
        normalisation = CIFAR_10 if is_cifar_10 else measured_normalisation(training.pixels)
    normalisation.check(form.channels)

    def of(images: Images, rows: npt.NDArray[np.int64], *, augmented: bool) -> PixelDataset:
        return PixelDataset(
            images=images,
            rows=rows,
            normalisation=normalisation,
            size=form.size,
            name=form.name,
            augmented=augmented,
        )

    rows = np.arange(len(training.labels))
    if held_out is None:
        rows, others = every_twentieth(len(training.labels))
        evaluation, name = of(training, others, augmented=False), f"{len(others):,} of them held out"
    else:
        others = np.arange(len(held_out.labels))
        evaluation, name = of(held_out, others, augmented=False), f"{len(others):,} held-out images"
    kind = "images of CIFAR-10" if is_cifar_10 else "images"
    return TrainingData(
        description=f"{len(rows):,} {kind} in {path}",
        dataset=of(training, rows, augmented=is_cifar_10),
        evaluation=evaluation if len(evaluation) else None,
        evaluation_description=name if len(evaluation) else None,
        metric="accuracy" if len(evaluation) else None,
    )


def _images_in(path: Path, form: ImageForm) -> tuple[Images, Images | None, bool]:
    """Training images, held-out images, and whether they are CIFAR-10."""
    if batches_path := cifar.find(path):
        if form.channels != cifar.SHAPE[0]:
            raise ValueError(
                f"CIFAR-10 is images of {cifar.SHAPE[0]} channels, got {batches_path} for a model that takes "
                f"{form.channels}. Give a folder of such images."
            )
        return *cifar.read(batches_path), True
    if tables.saved_to_disk(path):
        opened = tables.open_saved(path)
    elif files := tables.table_files(path):
        opened = tables.open_files(files, path)
    else:
        raise ValueError(
            f"Images to train on (--data) must be CIFAR-10's batches for Python, or a table, got {path} with neither. "
            f"Name the folder with data_batch_1, {cifar.ARCHIVE} or parquet files."
        )
    images = tables.images_of(opened, form.channels, form.size)
    return images.training, images.held_out, images.is_cifar_10

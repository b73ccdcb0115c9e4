"""Training data: which data fits which workload, what is held out, and the order in which a run sees it."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from executor.data import OwnBatches, TrainingData, batches, load
from executor.images import CIFAR_10, ImageDataset, Normalisation, PixelDataset
from executor.text import TokenDataset
from profiler.registry import build
from profiler.transformers_workload import of_configuration
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec
from tests.datafiles import (
    VERSE,
    colour,
    write_archive,
    write_cifar,
    write_gpt2_files,
    write_images,
)

SPEC = WorkloadSpec(name="tests.workloads.tiny:linear")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text(VERSE * 30)
    return folder


def row(tokens: int, sequence_length: int) -> TokenDataset:
    return TokenDataset(tokens=np.arange(tokens, dtype=np.uint16), sequence_length=sequence_length)


def tiny_workload() -> Workload:
    return build(SPEC)


def text_workload(vocabulary_size: int = 300, length: int = 8) -> Workload:
    """A language model of its own, which takes what transformers' do."""
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary_size, 4), torch.nn.Linear(4, vocabulary_size))

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(vocabulary_size, (size, length))
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = model(batch["input_ids"][:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())

    return Workload(model=model, batch=batch, loss=loss)


def image_workload(classes: int = 10, channels: int = 3, size: int = 32, name: str = "images") -> Workload:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size * size, classes))

    def batch(count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, channels, size, size), "labels": torch.randint(classes, (count,))}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[name]), batch["labels"])

    return Workload(model=model, batch=batch, loss=loss)


def fits(data: TrainingData, workload: Workload) -> bool:
    """Whether the workload's loss takes what it is to be trained and evaluated on."""
    assert not isinstance(data.dataset, OwnBatches)
    assert data.evaluation is not None
    own = workload.batch(2)
    for dataset in (data.dataset, data.evaluation):
        batch = dataset.gather(np.arange(2))
        assert {name: (t.shape, t.dtype) for name, t in batch.items()} == {
            name: (t.shape, t.dtype) for name, t in own.items()
        }
        assert workload.loss(workload.model, batch).isfinite()
    return True


class TestBatches:
    def test_go_through_the_samples_once_an_epoch_and_leave_out_the_ragged_rest(self) -> None:
        stream = batches(row(tokens=10, sequence_length=1), 3, seed=0)
        first, second = (
            [token for _ in range(3) for token in next(stream)["input_ids"].flatten().tolist()]
            for _ in range(2)
        )
        for epoch in (first, second):
            assert len(set(epoch)) == 9
            assert set(epoch) < set(range(10))
        assert first != second

    def test_are_decided_by_the_seed(self) -> None:
        dataset = row(tokens=100, sequence_length=1)
        zero, again, one = (next(batches(dataset, 10, seed))["input_ids"].tolist() for seed in (0, 0, 1))
        assert zero == again
        assert zero != one

    @given(
        samples=st.integers(1, 12),
        size=st.integers(1, 12),
        start=st.integers(0, 30),
        seed=st.integers(0, 2**32),
    )
    def test_begin_at_any_number_as_if_the_ones_before_had_been_skipped(
        self, samples: int, size: int, start: int, seed: int
    ) -> None:
        dataset = row(tokens=samples, sequence_length=1)
        size = min(size, samples)
        skipped = itertools.islice(batches(dataset, size, seed), start, start + 4)
        started = itertools.islice(batches(dataset, size, seed, start), 4)
        for expected, found in zip(skipped, started, strict=True):
            assert found["input_ids"].tolist() == expected["input_ids"].tolist()

    @pytest.mark.timeout(10)
    def test_begin_late_as_quickly_as_early(self) -> None:
        assert next(batches(row(tokens=10, sequence_length=1), 3, seed=0, start=10**12))["labels"].shape == (
            3,
            1,
        )

    def test_refuse_at_once_what_can_never_be_drawn(self) -> None:
        dataset = row(tokens=10, sequence_length=1)
        with pytest.raises(ValueError, match="at most the 10 samples of an epoch, got 11"):
            batches(dataset, 11, seed=0)
        with pytest.raises(ValueError, match="got 0 and 0"):
            batches(dataset, 0, seed=0)
        with pytest.raises(ValueError, match="got 1 and -1"):
            batches(dataset, 1, seed=0, start=-1)

    def test_of_a_workloads_own_can_be_come_back_to_and_leave_the_callers_random_state_alone(self) -> None:
        dataset = OwnBatches(batch=tiny_workload().batch)
        before = torch.get_rng_state()
        zero, one, two = itertools.islice(batches(dataset, 5, seed=0), 3)
        other_seed = next(batches(dataset, 5, seed=1))
        resumed = next(batches(dataset, 5, seed=0, start=2))
        assert zero["x"].shape == (5, 4)
        assert not torch.equal(zero["x"], one["x"])
        assert not torch.equal(zero["x"], other_seed["x"])
        assert torch.equal(two["x"], resumed["x"])
        assert torch.equal(torch.get_rng_state(), before)


class TestLoadWithoutAFolder:
    def test_gives_gpt2_the_standard_library_in_tokens_that_it_has(self) -> None:
        data = load(WorkloadSpec(name="gpt2"), tiny_workload())
        version = ".".join(map(str, sys.version_info[:3]))
        assert data.description == f"text of the Python {version} standard library"
        assert isinstance(data.dataset, TokenDataset)
        assert isinstance(data.evaluation, TokenDataset)
        assert 2_000 < len(data.dataset) < 8_000
        assert len(data.evaluation) == (len(data.dataset) + len(data.evaluation)) // 20
        assert data.metric == "perplexity"
        assert next(batches(data.dataset, 4, seed=0))["input_ids"].shape == (4, 256)
        assert data.dataset.tokens.max() == 8_191

    def test_gives_resnet50_generated_images_and_others_to_be_evaluated_on(self) -> None:
        data = load(WorkloadSpec(name="resnet50"), tiny_workload())
        assert data.description == "generated images (no download)"
        assert next(batches(data.dataset, 2, seed=0))["images"].shape == (2, 3, 32, 32)
        assert isinstance(data.evaluation, ImageDataset)
        assert isinstance(data.dataset, ImageDataset)
        assert data.evaluation.seed != data.dataset.seed
        assert data.metric == "accuracy"

    def test_gives_other_workloads_their_own_batches(self) -> None:
        workload = tiny_workload()
        data = load(SPEC, workload)
        assert data.description == "batches that tests.workloads.tiny:linear makes itself"
        assert workload.loss(workload.model, next(batches(data.dataset, 2, seed=0))).isfinite()
        assert (data.evaluation, data.evaluation_description, data.metric) == (None, None, None)


class TestLoadText:
    def test_takes_a_folder_of_text_and_holds_out_its_end(self, folder: Path) -> None:
        workload = text_workload()
        data = load(SPEC, workload, folder)
        assert fits(data, workload)
        assert data.description == f"text of 1 file in {folder}"
        assert isinstance(data.dataset, TokenDataset)
        total = len(data.dataset) + len(data.evaluation or ())
        assert data.evaluation_description == f"the last {total // 20} of {total} windows"
        assert data.metric == "perplexity"

    def test_takes_wikitext_as_it_is_published(self, tmp_path: Path) -> None:
        for split, text in (("train", VERSE * 5), ("valid", VERSE * 2), ("test", "the hat " * 40)):
            (tmp_path / f"wiki.{split}.tokens").write_text(text)
        write_gpt2_files(tmp_path)
        workload = text_workload(length=16)
        data = load(SPEC, workload, tmp_path)
        assert fits(data, workload)
        assert data.evaluation_description == "wiki.valid.tokens"
        assert isinstance(data.dataset, TokenDataset)
        assert data.dataset.tokens[-1] == 261
        assert len(data.dataset.tokens) < len(VERSE) * 5

    def test_takes_what_the_datasets_library_saved(self, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"text": [VERSE * 2] * 20})
        rows.save_to_disk(tmp_path / "saved")
        workload = text_workload()
        data = load(SPEC, workload, tmp_path / "saved")
        assert fits(data, workload)
        assert data.description == f"text of 20 rows in {tmp_path / 'saved'}"

    def test_learns_its_tokens_from_what_is_not_held_out(self, tmp_path: Path) -> None:
        (tmp_path / "train.txt").write_text("the cat " * 100)
        (tmp_path / "valid.txt").write_text("xyzzy " * 100)
        data = load(SPEC, text_workload(), tmp_path)
        assert isinstance(data.evaluation, TokenDataset)
        assert isinstance(data.dataset, TokenDataset)
        assert len(data.evaluation.tokens) >= 600
        assert len(data.dataset.tokens) < 600

    @pytest.mark.parametrize(
        ("beside", "rows"),
        [
            ({"README.md": 5_000, "mine.py": 5_000}, True),
            ({"book.txt": 20}, True),
            ({"book.txt": 5_000}, False),
            ({"deep/module.py": 5_000}, False),
        ],
    )
    def test_takes_json_beside_text_for_what_more_of_a_folder_is(
        self, tmp_path: Path, beside: dict[str, int], rows: bool
    ) -> None:
        (tmp_path / "mine.jsonl").write_text(json.dumps({"text": VERSE * 20}) + "\n")
        for name, size in beside.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("the cat " * (size // 8))
        description = load(SPEC, text_workload(), tmp_path).description
        assert description.startswith("text of 1 rows" if rows else "text of 1 file")

    def test_takes_a_tokenizer_from_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        trained = load(SPEC, text_workload(), folder).dataset
        given = load(SPEC, text_workload(), folder, tokenizer=write_gpt2_files(tmp_path / "gpt2")).dataset
        assert isinstance(trained, TokenDataset)
        assert isinstance(given, TokenDataset)
        assert len(given.tokens) > len(trained.tokens)
        with pytest.raises(
            ValueError, match=r"A tokenizer is for text, got .*gpt2 for resnet50\. Leave it out"
        ):
            load(WorkloadSpec(name="resnet50"), image_workload(), tokenizer=tmp_path / "gpt2")

    def test_fits_any_causal_model_of_transformers(self, folder: Path) -> None:
        config = transformers.LlamaConfig(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        workload = of_configuration(
            config, WorkloadSpec(name="transformers:llama", sequence_length=8), seed=0
        )
        data = load(WorkloadSpec(name="transformers:llama", sequence_length=8), workload, folder)
        assert fits(data, workload)

    def test_is_not_for_models_that_predict_hidden_tokens(self, folder: Path) -> None:
        config = transformers.BertConfig(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        spec = WorkloadSpec(name="transformers:bert", sequence_length=8)
        with pytest.raises(
            ValueError, match="for models that predict the next token, and BertForMaskedLM predicts"
        ):
            load(spec, of_configuration(config, spec, seed=0), folder)

    def test_refuses_a_tokenizer_with_more_tokens_than_the_model(self, folder: Path) -> None:
        write_gpt2_files(folder)
        load(SPEC, text_workload(vocabulary_size=262), folder)
        with pytest.raises(
            ValueError, match="must know all tokens of its tokenizer, got 261 of the model and 262 in"
        ):
            load(SPEC, text_workload(vocabulary_size=261), folder)

    def test_trains_a_tokenizer_that_the_model_can_take(self, folder: Path) -> None:
        dataset = load(SPEC, text_workload(vocabulary_size=260), folder).dataset
        assert isinstance(dataset, TokenDataset)
        assert dataset.tokens.max() < 260
        with pytest.raises(ValueError, match="needs a model with 257 tokens or more, got 256"):
            load(SPEC, text_workload(vocabulary_size=256), folder)

    @pytest.mark.parametrize("content", ["", "short"])
    def test_refuses_an_empty_corpus(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(
            ValueError, match=r"at least one sequence of 64 tokens, got \d tokens\. Give more text"
        ):
            load(SPEC, text_workload(length=64), tmp_path)

    def test_evaluates_on_nothing_where_what_is_held_out_is_shorter_than_a_sequence(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "train.txt").write_text(VERSE * 30)
        (tmp_path / "valid.txt").write_text("a")
        data = load(SPEC, text_workload(), tmp_path)
        assert (data.evaluation, data.evaluation_description, data.metric) == (None, None, None)


class TestLoadImages:
    def test_takes_cifar_10_as_it_is_published(self, tmp_path: Path) -> None:
        write_cifar(tmp_path / "cifar-10-batches-py")
        workload = image_workload()
        data = load(SPEC, workload, tmp_path)
        assert fits(data, workload)
        assert data.description == f"20 images of CIFAR-10 in {tmp_path}"
        assert data.evaluation_description == "4 held-out images"
        assert data.metric == "accuracy"
        assert isinstance(data.dataset, PixelDataset)
        assert isinstance(data.evaluation, PixelDataset)
        assert data.dataset.normalisation == data.evaluation.normalisation == CIFAR_10
        assert data.dataset.augmented
        assert not data.evaluation.augmented

    def test_takes_the_archive_for_the_folder_in_it(self, tmp_path: Path) -> None:
        folder = write_cifar(tmp_path / "folder")
        (tmp_path / "archive").mkdir()
        write_archive(tmp_path / "archive" / "cifar-10-python.tar.gz", folder)
        first, second = (
            next(batches(load(SPEC, image_workload(), tmp_path / name).dataset, 20, seed=0))
            for name in ("folder", "archive")
        )
        assert torch.equal(first["images"], second["images"])

    def test_takes_cifar_10_as_the_hub_has_it(self, tmp_path: Path) -> None:
        write_images(tmp_path / "plain_text" / "train-00000-of-00001.parquet", 30)
        write_images(tmp_path / "plain_text" / "test-00000-of-00001.parquet", 4, seed=90)
        workload = image_workload(name="pixel_values")
        data = load(SPEC, workload, tmp_path)
        assert fits(data, workload)
        assert data.description == f"30 images of CIFAR-10 in {tmp_path}"
        assert isinstance(data.dataset, PixelDataset)
        assert data.dataset.augmented
        image = (colour(32, 7).transpose(2, 0, 1) / 255 - np.array(CIFAR_10.mean)[:, None, None]) / np.array(
            CIFAR_10.deviation
        )[:, None, None]
        found = data.dataset.gather(np.array([7]))["pixel_values"][0]
        assert found.numpy() == pytest.approx(image, abs=1e-5)

    def test_holds_out_every_twentieth_image_where_none_are_set_apart(self, tmp_path: Path) -> None:
        write_images(tmp_path / "a.parquet", 45)
        data = load(SPEC, image_workload(), tmp_path)
        assert not isinstance(data.dataset, OwnBatches)
        assert data.evaluation is not None
        assert data.evaluation.gather(np.array([0, 1]))["labels"].tolist() == [9, 9]
        assert (len(data.dataset), len(data.evaluation)) == (43, 2)
        assert data.evaluation_description == "2 of them held out"

    def test_takes_other_images_as_they_are_with_a_normalisation_of_their_own(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train.parquet", 40, size=16)
        workload = image_workload(size=24)
        data = load(SPEC, workload, tmp_path)
        assert fits(data, workload)
        assert isinstance(data.dataset, PixelDataset)
        assert not data.dataset.augmented
        assert data.dataset.normalisation.mean == pytest.approx((0.5,) * 3, abs=0.01)
        assert data.dataset.normalisation.deviation == pytest.approx((math.sqrt(1 / 12),) * 3, abs=0.01)

    def test_takes_a_normalisation_that_is_given_or_lies_in_the_folder(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        given = Normalisation(mean=(0.1, 0.1, 0.1), deviation=(1.0, 1.0, 1.0))
        dataset = load(SPEC, image_workload(), tmp_path, normalisation=given).dataset
        assert isinstance(dataset, PixelDataset)
        assert dataset.normalisation == given
        (tmp_path / "preprocessor_config.json").write_text(
            '{"image_mean": [0.2, 0.2, 0.2], "image_std": [1, 1, 1]}'
        )
        stated = load(SPEC, image_workload(), tmp_path).dataset
        assert isinstance(stated, PixelDataset)
        assert stated.normalisation.mean == (0.2, 0.2, 0.2)
        (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
        with pytest.raises(ValueError, match="for each of the 3 channels of the images, got 1: mean"):
            load(SPEC, image_workload(), tmp_path)
        with pytest.raises(ValueError, match="A normalisation is for images in a data folder"):
            load(WorkloadSpec(name="gpt2"), text_workload(), normalisation=given)

    def test_refuses_classes_that_the_model_does_not_have_in_either_split(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train.parquet", 5)
        load(SPEC, image_workload(classes=5), tmp_path)
        for split in ("train", "test"):
            write_images(tmp_path / f"{split}.parquet", 6)
            with pytest.raises(
                ValueError, match=r"got 5 classes of the model and the class 5 in .* with 6 classes"
            ):
                load(SPEC, image_workload(classes=5), tmp_path)
            write_images(tmp_path / f"{split}.parquet", 5)

    def test_refuses_channels_that_the_images_do_not_have(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        with pytest.raises(ValueError, match=r"images of 3 channels, got .* for a model that takes 1"):
            load(SPEC, image_workload(channels=1), tmp_path)

    def test_refuses_a_folder_without_any(self, folder: Path) -> None:
        with pytest.raises(
            ValueError, match=r"CIFAR-10's batches for Python, or a table, got .* with neither"
        ):
            load(SPEC, image_workload(), folder)

    def test_leaves_the_model_and_the_random_state_as_they_were(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        model = torch.nn.Sequential(
            torch.nn.BatchNorm2d(3), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(3072, 10)
        )
        plain = image_workload()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = torch.get_rng_state()
        load(SPEC, Workload(model=model, batch=plain.batch, loss=plain.loss), tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert not model._forward_hooks


class TestLoadFitsTheWorkload:
    def test_refuses_a_folder_for_batches_that_are_neither_text_nor_images(self, folder: Path) -> None:
        with pytest.raises(
            ValueError,
            match=r"tokens .* or images .*, got x \(2, 4\), y \(2,\) for tests\.workloads\.tiny:linear\. Leave it",
        ):
            load(SPEC, tiny_workload(), folder)

    @pytest.mark.parametrize(
        "batch",
        [
            lambda size: torch.randn(size, 3),
            lambda size: {"input_ids": [[1]] * size, "labels": torch.ones(size, 1).long()},
            lambda size: {"input_ids": torch.randn(size, 3), "labels": torch.randn(size, 3)},
            lambda size: {"input_ids": torch.ones(size, 3), "labels": torch.ones(size)},
            lambda size: {"images": torch.randn(size, 3, 4, 4), "labels": torch.ones(size, 4, 4).long()},
            lambda size: {"images": torch.randn(size, 3, 4, 4), "labels": torch.randn(size)},
            lambda size: {
                "images": torch.randn(size, 3, 4, 4),
                "masks": torch.randn(size, 3, 4, 4),
                "labels": torch.ones(size).long(),
            },
        ],
    )
    def test_refuses_what_only_looks_like_it(self, folder: Path, batch: Callable[[int], Any]) -> None:
        workload = Workload(model=torch.nn.Linear(1, 1), batch=batch, loss=lambda model, batch: batch)
        with pytest.raises(ValueError, match=r"A data folder .* is for workloads whose batches are"):
            load(SPEC, workload, folder)

    @pytest.mark.parametrize("workload", [text_workload, image_workload])
    def test_refuses_a_path_with_nothing_there(
        self, tmp_path: Path, workload: Callable[[], Workload]
    ) -> None:
        with pytest.raises(ValueError, match=r"must be a folder or a file, got .*absent: nothing there"):
            load(SPEC, workload(), tmp_path / "absent")

    def test_knows_the_classes_of_models_by_their_shapes_alone(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train.parquet", 30)
        spec = WorkloadSpec(name="resnet50")
        resnet50 = build(spec)
        data = load(spec, resnet50, tmp_path)
        assert next(batches(data.dataset, 2, seed=0))["images"].shape == (2, 3, 32, 32)
        write_images(tmp_path / "train.parquet", 30, classes=11)
        with pytest.raises(ValueError, match="got 10 classes of the model and the class 10 in"):
            load(spec, resnet50, tmp_path)

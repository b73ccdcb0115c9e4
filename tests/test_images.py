"""Images with classes: how they are decoded, augmented, normalised, and brought to the size that a model takes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from executor import images as module
from executor.images import (
    CIFAR_10,
    EncodedImages,
    ImageDataset,
    Images,
    Normalisation,
    PixelArray,
    PixelDataset,
    every_twentieth,
    measured_normalisation,
    stated_normalisation,
)
from executor.order import Epoch, batches
from tests.datafiles import colour, pixels, png

STORED = pixels(400).reshape(400, 3, 32, 32)


def dataset(
    stored: np.ndarray = STORED, *, size: tuple[int, int] = (32, 32), augmented: bool = False
) -> PixelDataset:
    rows = np.arange(len(stored))
    return PixelDataset(
        images=Images(pixels=PixelArray(array=stored), labels=rows % 10),
        rows=rows,
        normalisation=CIFAR_10,
        size=size,
        augmented=augmented,
    )


def as_stored(images: torch.Tensor) -> np.ndarray:
    """Normalisation undone."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CIFAR_10.mean, CIFAR_10.deviation))
    return ((images * deviation + mean) * 255).round().to(torch.uint8).numpy()


class TestNormalisation:
    def test_of_cifar_10_is_that_of_torchvisions_transforms(self) -> None:
        published = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )
        expected = torch.stack([published(Image.fromarray(image.transpose(1, 2, 0))) for image in STORED[:8]])
        found = dataset().gather(np.arange(8))
        assert torch.equal(found["images"], expected)
        assert found["labels"].tolist() == list(range(8))

    @pytest.mark.parametrize(
        ("mean", "deviation", "found"),
        [
            ((0.5, 0.5, 0.5), (0.5, 0.5), "got 3 means and 2 deviations"),
            ((), (), "got 0 means and 0 deviations"),
            ((0.5,), (0.0,), r"deviations above 0, got \(0.5,\) and \(0.0,\)"),
            ((math.nan,), (1.0,), "must be finite"),
        ],
    )
    def test_has_a_mean_and_a_deviation_above_0_for_each_channel(
        self, mean: tuple[float, ...], deviation: tuple[float, ...], found: str
    ) -> None:
        with pytest.raises(ValueError, match=found):
            Normalisation(mean=mean, deviation=deviation)

    def test_must_be_for_as_many_channels_as_the_images_have(self) -> None:
        with pytest.raises(ValueError, match="for each of the 1 channels of the images, got 3: mean"):
            CIFAR_10.check(1)

    def test_is_what_the_preprocessor_of_a_folder_says(self, tmp_path: Path) -> None:
        file = tmp_path / "preprocessor_config.json"
        assert stated_normalisation(tmp_path) is None
        file.write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": {"height": 9}})
        )
        assert stated_normalisation(tmp_path) == Normalisation(mean=(0.1, 0.2, 0.3), deviation=(1, 2, 3))
        file.write_text(json.dumps({"do_resize": True}))
        assert stated_normalisation(tmp_path) is None
        for content, found in (
            ('{"image_mean": [0.1, 0.2], "image_std": [1]}', r"config\.json: .* 2 means and 1 dev"),
            ('{"image_mean": [0.1]}', r"config\.json: .* 1 means and 0 deviations"),
            ('{"image_mean": "a"}', "must be JSON with image_mean and image_std"),
            ('{"image_mean"', "must be JSON with image_mean and image_std"),
        ):
            file.write_text(content)
            with pytest.raises(ValueError, match=found):
                stated_normalisation(tmp_path)

    def test_is_measured_on_images_that_come_without_one(self) -> None:
        values = STORED / 255
        found = measured_normalisation(PixelArray(array=STORED))
        assert found.mean == pytest.approx(values.mean(axis=(0, 2, 3)))
        assert found.deviation == pytest.approx(values.std(axis=(0, 2, 3)))
        with pytest.raises(ValueError, match="Images that are all alike have no deviation"):
            measured_normalisation(PixelArray(array=np.zeros((3, 3, 4, 4), np.uint8)))


class TestAugmentation:
    def test_moves_by_up_to_four_pixels_over_black_and_mirrors_every_other(self) -> None:
        found = as_stored(dataset(augmented=True).gather(np.arange(400), Epoch(seed=0, number=0))["images"])
        ways = [self.way(before, after) for before, after in zip(STORED, found, strict=True)]
        assert {down for down, _, _ in ways} == {right for _, right, _ in ways} == set(range(9))
        assert 160 < sum(mirrored for _, _, mirrored in ways) < 240

    @staticmethod
    def way(before: np.ndarray, after: np.ndarray) -> tuple[int, int, bool]:
        """By trying all: the corner of the crop, and whether it was mirrored."""
        padded = np.zeros((3, 40, 40), np.uint8)
        padded[:, 4:36, 4:36] = before
        found = [
            (down, right, mirrored)
            for down, right, mirrored in itertools.product(range(9), range(9), (False, True))
            if np.array_equal(
                padded[:, down : down + 32, right : right + 32], after[:, :, ::-1] if mirrored else after
            )
        ]
        assert len(found) == 1
        return found[0]

    def test_is_decided_by_the_seed_the_epoch_and_the_sample_alone(self) -> None:
        augmented = dataset(augmented=True)
        epoch = Epoch(seed=3, number=7)
        together = augmented.gather(np.array([5, 9, 2]), epoch)["images"]
        assert torch.equal(augmented.gather(np.array([9]), epoch)["images"][0], together[1])
        for other in (Epoch(seed=4, number=7), Epoch(seed=3, number=8)):
            assert not torch.equal(augmented.gather(np.array([5, 9, 2]), other)["images"], together)

    def test_gives_a_run_that_is_gone_on_with_the_very_same_images(self) -> None:
        through = list(itertools.islice(batches(dataset(augmented=True), 150, seed=1), 6))
        resumed = next(batches(dataset(augmented=True), 150, seed=1, start=5))
        assert torch.equal(resumed["images"], through[5]["images"])
        plain = next(batches(dataset(), 150, seed=1))
        assert torch.equal(plain["labels"], through[0]["labels"])
        assert not torch.equal(plain["images"], through[0]["images"])
        assert not torch.equal(through[0]["images"], through[2]["images"])

    def test_is_for_training_only(self) -> None:
        plain = dataset().gather(np.arange(9))["images"]
        assert torch.equal(dataset(augmented=True).gather(np.arange(9))["images"], plain)
        assert torch.equal(dataset().gather(np.arange(9), Epoch(seed=0, number=0))["images"], plain)
        assert np.array_equal(as_stored(plain), STORED[:9])


class TestSize:
    def test_is_the_one_that_the_model_takes(self) -> None:
        batch = dataset(size=(64, 48)).gather(np.array([0, 1]))["images"]
        assert batch.shape == (2, 3, 64, 48)
        flat = dataset(np.full((1, 3, 32, 32), 200, np.uint8), size=(64, 64)).gather(np.array([0]))["images"]
        assert as_stored(flat).tolist() == np.full((1, 3, 64, 64), 200).tolist()


class TestEncodedImages:
    def encoded(self, *files: bytes, shape: tuple[int, int, int] = (3, 8, 8)) -> EncodedImages:
        return EncodedImages(
            encoded=lambda rows: [files[row] for row in rows], count=len(files), shape=shape, source="mine"
        )

    def test_are_decoded_as_they_were_before_they_were_encoded(self) -> None:
        images = [colour(8, seed) for seed in range(5)]
        found = self.encoded(*map(png, images))
        expected = np.stack(images).transpose(0, 3, 1, 2)
        assert np.array_equal(found.read(np.array([4, 0])), expected[[4, 0]])
        assert np.array_equal(found.in_memory().read(np.arange(5)), expected)

    def test_of_any_mode_get_the_channels_that_the_model_takes(self) -> None:
        grey = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
        transparent = np.dstack([colour(8), grey])
        three = self.encoded(png(grey), png(transparent)).read(np.array([0, 1]))
        assert np.array_equal(three[0], np.broadcast_to(grey.transpose(2, 0, 1), (3, 8, 8)))
        assert np.array_equal(three[1], colour(8).transpose(2, 0, 1))
        one = self.encoded(png(grey), shape=(1, 8, 8)).read(np.array([0]))
        assert np.array_equal(one[0, 0], grey[..., 0])

    def test_of_other_sizes_are_cut_about_the_middle(self) -> None:
        wide = np.zeros((16, 32, 3), np.uint8)
        wide[:, 8:24] = 255
        found = self.encoded(png(wide)).read(np.array([0]))
        assert found.shape == (1, 3, 8, 8)
        assert found.min() > 200

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
    def test_cut_short_anywhere_are_refused_by_number(self, kind: str) -> None:
        whole = png(colour(8), kind)
        for length in range(0, len(whole) - 20, 7):
            with pytest.raises(ValueError, match=r"whole files that Pillow reads, got image 1 of mine: "):
                self.encoded(png(colour(8)), whole[:length]).in_memory()

    def test_stay_encoded_where_they_would_take_too_much_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = self.encoded(*(png(colour(8, seed)) for seed in range(3)))
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 3 * 8 * 8 * 3)
        assert isinstance(encoded.in_memory(), PixelArray)
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 3 * 8 * 8 * 3 - 1)
        assert encoded.in_memory() is encoded


def test_every_twentieth_image_is_held_out_where_none_are_set_apart() -> None:
    rows, held_out = every_twentieth(50)
    assert held_out.tolist() == [19, 39]
    assert sorted([*rows, *held_out]) == list(range(50))


class TestGeneratedImages:
    def test_labels_go_round_the_ten_classes(self) -> None:
        batch = ImageDataset(image_size=8).gather(np.array([0, 9, 10, 25]))
        assert batch["labels"].tolist() == [0, 9, 0, 5]
        assert batch["images"].shape == (4, 3, 8, 8)
        assert batch["images"].dtype == torch.float32

    def test_an_image_is_the_same_in_any_company(self) -> None:
        dataset = ImageDataset(image_size=8)
        together = dataset.gather(np.array([3, 4, 5]))["images"]
        assert torch.equal(dataset.gather(np.array([4]))["images"][0], together[1])
        assert not torch.equal(together[0], dataset.gather(np.array([13]))["images"][0])

    def test_images_are_normalised(self) -> None:
        images = ImageDataset(image_size=32).gather(np.arange(500))["images"]
        assert images.mean().item() == pytest.approx(0, abs=0.01)
        assert images.std().item() == pytest.approx(1, abs=0.01)

    def test_a_linear_model_learns_the_classes_and_knows_them_in_unseen_images(self) -> None:
        model = torch.nn.Linear(3 * 8 * 8, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for batch in itertools.islice(batches(ImageDataset(image_size=8), 64, seed=0), 40):
            loss = torch.nn.functional.cross_entropy(model(batch["images"].flatten(1)), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        unseen = ImageDataset(image_size=8, seed=1).gather(np.arange(500))
        correct = model(unseen["images"].flatten(1)).argmax(1) == unseen["labels"]
        assert losses[0] > 2
        assert losses[-1] < 0.5
        assert correct.float().mean() > 0.9

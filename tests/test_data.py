"""Training data: the text and its tokens, the images, and the order in which a run sees them."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from executor.data import (
    ImageDataset,
    OwnBatches,
    TokenDataset,
    batches,
    cache_directory,
    load,
    standard_library_files,
    text_files,
    tokenize,
    train_tokenizer,
)
from profiler.registry import build
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec

ROOT = Path(__file__).parents[1]
VERSE = "the cat sat on the mat, the cat sat on the hat\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANNER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small texts, one of them in a folder within the folder."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text(VERSE * 3)
    (folder / "deep" / "a.md").write_text("Übergrößenträger 🙂\r\n\ttabs  and   spaces\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([VERSE] * 10, vocabulary_size=300)


def row(tokens: int, sequence_length: int) -> TokenDataset:
    return TokenDataset(
        tokens=np.arange(tokens, dtype=np.uint16),
        sequence_length=sequence_length,
        tokenizer_file=Path("none"),
    )


def tiny_workload() -> Workload:
    return build(WorkloadSpec(name="tests.workloads.tiny:linear"))


class TestTextFiles:
    def test_are_all_text_below_the_folder_in_order(self, folder: Path) -> None:
        for name in ("c.tokens", "d.py", "e.json", "no_suffix"):
            (folder / name).write_text("x")
        assert [str(path.relative_to(folder)) for path in text_files(folder)] == [
            "b.txt",
            "c.tokens",
            "d.py",
            "deep/a.md",
        ]

    def test_leave_out_what_is_hidden_below_the_folder_but_not_a_folder_that_is_itself_hidden(
        self, folder: Path
    ) -> None:
        hidden = folder / ".venv"
        hidden.mkdir()
        (hidden / "module.py").write_text("x")
        assert hidden / "module.py" not in text_files(folder)
        assert text_files(hidden) == (hidden / "module.py",)

    def test_must_exist(self, tmp_path: Path) -> None:
        (tmp_path / "e.json").write_text("{}")
        with pytest.raises(
            ValueError, match=r"must hold \*\.md, \*\.py, \*\.tokens, \*\.txt files, found none"
        ):
            text_files(tmp_path)
        with pytest.raises(ValueError, match=r"absent: nothing there\."):
            text_files(tmp_path / "absent")
        with pytest.raises(ValueError, match=r"e\.json: a file\."):
            text_files(tmp_path / "e.json")

    def test_of_the_standard_library_are_its_first_sources_within_the_limit(self) -> None:
        files = standard_library_files(limit_bytes=100_000)
        assert 50_000 < sum(path.stat().st_size for path in files) <= 100_000
        assert list(files) == sorted(files)

    def test_of_the_standard_library_are_no_tests_and_nothing_that_was_installed(self) -> None:
        root = Path(os.__file__).parent
        folders = {
            folder for path in standard_library_files(10**9) for folder in path.relative_to(root).parts
        }
        assert "json" in folders
        assert folders.isdisjoint({"test", "tests", "site-packages"})

    def test_of_the_standard_library_cannot_be_none(self) -> None:
        with pytest.raises(
            ValueError, match=r"sources must be on this machine .* Give a folder of text \(--data\)"
        ):
            standard_library_files(limit_bytes=0)


class TestTokenizer:
    @given(st.text(max_size=60))
    def test_gives_back_every_text_as_it_was(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_learns_the_words_that_it_sees_often(self, tokenizer: Tokenizer) -> None:
        assert len(tokenizer.encode("the cat sat on the mat").ids) == 6
        assert tokenizer.get_vocab_size() < 300

    def test_needs_room_for_the_bytes_and_fits_in_two_of_them(self) -> None:
        with pytest.raises(ValueError, match="from 257 to 65536, got 256"):
            train_tokenizer([VERSE], vocabulary_size=256)
        with pytest.raises(ValueError, match="from 257 to 65536, got 65537"):
            train_tokenizer([VERSE], vocabulary_size=65_537)


class TestTokenize:
    def test_ends_each_document_with_a_token_of_its_own(self, folder: Path) -> None:
        text = tokenize(text_files(folder))
        decoded = Tokenizer.from_file(str(text.tokenizer_file)).decode(
            text.tokens.tolist(), skip_special_tokens=False
        )
        first, second = ((folder / name).read_bytes().decode() for name in ("b.txt", "deep/a.md"))
        assert decoded == f"{first}<|endoftext|>{second}<|endoftext|>"

    def test_keeps_a_file_whole_that_is_read_in_pieces(self, tmp_path: Path) -> None:
        lines = "".join(f"line {number}\n" for number in range(60_000))
        assert len(lines) > 2 * 2**18
        (tmp_path / "long.txt").write_text(lines)
        text = tokenize([tmp_path / "long.txt"])
        decoded = Tokenizer.from_file(str(text.tokenizer_file)).decode(text.tokens.tolist())
        assert decoded == lines

    def test_puts_a_mark_where_bytes_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "broken.txt").write_bytes(b"caf\xe9\n")
        text = tokenize([tmp_path / "broken.txt"])
        decoded = Tokenizer.from_file(str(text.tokenizer_file)).decode(text.tokens.tolist())
        assert decoded == "caf\N{REPLACEMENT CHARACTER}\n"

    def test_takes_from_the_cache_what_is_there(self, folder: Path, home: Path) -> None:
        first = tokenize(text_files(folder))
        (tokens_file,) = (home / "cache").glob("*.tokens.npy")
        np.save(tokens_file, np.array([7, 7, 7], np.uint16))
        assert tokenize(text_files(folder)).tokens.tolist() == [7, 7, 7]
        assert len(first.tokens) > 3

    def test_makes_again_what_was_removed_from_the_cache(self, folder: Path, home: Path) -> None:
        before = tokenize(text_files(folder)).tokens.tolist()
        for file in (home / "cache").iterdir():
            whole = file.read_bytes()
            file.unlink()
            assert tokenize(text_files(folder)).tokens.tolist() == before
            assert file.read_bytes() == whole

    def test_leaves_nothing_in_the_cache_but_the_tokenizer_and_the_tokens(
        self, folder: Path, home: Path
    ) -> None:
        tokenize(text_files(folder))
        endings = {".".join(file.name.split(".")[1:]) for file in (home / "cache").iterdir()}
        assert endings == {"tokenizer.json", "tokens.npy"}

    def test_does_not_mistake_one_corpus_or_setting_for_another(self, folder: Path) -> None:
        before = tokenize(text_files(folder)).tokenizer_file
        assert tokenize(text_files(folder), vocabulary_size=260).tokenizer_file != before
        assert tokenize(reversed(text_files(folder))).tokenizer_file != before
        (folder / "b.txt").write_text(VERSE * 3 + " ")
        assert tokenize(text_files(folder)).tokenizer_file != before

    def test_comes_to_the_same_bytes_in_another_process(
        self, folder: Path, home: Path, tmp_path: Path
    ) -> None:
        tokenize(text_files(folder))
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import pathlib, sys\n"
                "from executor.data import text_files, tokenize\n"
                "tokenize(text_files(pathlib.Path(sys.argv[1])))\n",
                str(folder),
            ],
            cwd=ROOT,
            env=os.environ | {"PLANNER_HOME": str(tmp_path / "other"), "RAYON_NUM_THREADS": "1"},
            check=True,
        )
        here, there = (
            {file.name: file.read_bytes() for file in (place / "cache").iterdir()}
            for place in (home, tmp_path / "other")
        )
        assert here == there

    def test_says_when_the_cache_cannot_be_written(self, folder: Path, home: Path) -> None:
        home.write_text("a file where the folder would be")
        with pytest.raises(
            ValueError, match=r"cache directory must be writable, got .*home/cache: .* PLANNER_HOME"
        ):
            tokenize(text_files(folder))

    @pytest.mark.parametrize(("limit_bytes", "whole"), [(1_000, set()), (50_000, {"json"})])
    def test_leaves_no_half_a_file_where_there_is_no_room_for_all_of_it(
        self, tmp_path: Path, home: Path, limit_bytes: int, whole: set[str]
    ) -> None:
        (tmp_path / "long.txt").write_text(VERSE * 3_000)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
        try:
            with pytest.raises(ValueError, match=r"cache directory must be writable, got .*: (?!None)"):
                tokenize([tmp_path / "long.txt"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {file.name.rpartition(".")[2] for file in (home / "cache").iterdir()} == whole
        assert len(tokenize([tmp_path / "long.txt"]).tokens) > 25_000


class TestCacheDirectory:
    def test_lies_in_the_users_cache_unless_the_user_says_where(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PLANNER_HOME", "~/mine")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "mine" / "cache"
        monkeypatch.delenv("PLANNER_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
        assert cache_directory() == Path("/var/caches/planner")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
        assert cache_directory() == tmp_path / ".cache" / "planner"


class TestTokenDataset:
    def test_is_cut_into_whole_windows(self) -> None:
        dataset = row(tokens=11, sequence_length=4)
        batch = dataset.gather(np.array([1, 0]))
        assert len(dataset) == 2
        assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
        assert batch["labels"].tolist() == batch["input_ids"].tolist()
        assert batch["input_ids"].dtype == torch.int64

    def test_must_hold_one_window(self) -> None:
        assert len(row(tokens=4, sequence_length=4)) == 1
        with pytest.raises(ValueError, match="at least one sequence of 4 tokens, got 3 tokens"):
            row(tokens=3, sequence_length=4)


class TestImageDataset:
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


class TestLoad:
    def test_gives_gpt2_the_standard_library_in_tokens_that_it_has(self) -> None:
        data = load(WorkloadSpec(name="gpt2"), tiny_workload())
        version = ".".join(map(str, sys.version_info[:3]))
        assert data.description == f"text of the Python {version} standard library"
        assert isinstance(data.dataset, TokenDataset)
        assert 2_000 < len(data.dataset) < 8_000
        assert next(batches(data.dataset, 4, seed=0))["input_ids"].shape == (4, 256)
        assert data.dataset.tokens.max() == 8_191

    def test_gives_gpt2_the_text_of_a_folder(self, folder: Path) -> None:
        data = load(WorkloadSpec(name="gpt2", sequence_length=8), tiny_workload(), folder)
        assert data.description == f"text of 2 files in {folder}"
        assert next(batches(data.dataset, 2, seed=0))["input_ids"].shape == (2, 8)

    def test_gives_resnet50_generated_images(self) -> None:
        data = load(WorkloadSpec(name="resnet50"), tiny_workload())
        assert data.description == "generated images (no download)"
        assert next(batches(data.dataset, 2, seed=0))["images"].shape == (2, 3, 32, 32)

    def test_gives_other_workloads_their_own_batches(self) -> None:
        workload = tiny_workload()
        data = load(WorkloadSpec(name="tests.workloads.tiny:linear"), workload)
        assert data.description == "batches that tests.workloads.tiny:linear makes itself"
        assert workload.loss(workload.model, next(batches(data.dataset, 2, seed=0))).isfinite()

    @pytest.mark.parametrize("name", ["resnet50", "tests.workloads.tiny:linear"])
    def test_refuses_a_folder_where_no_text_is_read(self, name: str, folder: Path) -> None:
        with pytest.raises(
            ValueError, match=rf"for workloads that read text, got .* for {name}\. Leave it out"
        ):
            load(WorkloadSpec(name=name), tiny_workload(), folder)

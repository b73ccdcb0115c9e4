"""Text: which files it is in, what tokens it becomes, and what is kept between runs."""

from __future__ import annotations

import itertools
import json
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
from transformers import GPT2Tokenizer

from executor import text as module
from executor.cache import cache_directory
from executor.text import (
    Corpus,
    TextFiles,
    TokenDataset,
    in_pieces,
    last_windows,
    standard_library_files,
    text_files,
    text_in_files,
    tokenize,
    trained_tokenizer,
)
from executor.tokenizer import read_tokenizer, train_tokenizer, vocabulary_size
from tests.datafiles import VERSE, write_gpt2_files

ROOT = Path(__file__).parents[1]


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


def files(folder: Path) -> TextFiles:
    return TextFiles(files=text_files(folder))


def trained_tokens(corpus: Corpus) -> np.ndarray:
    return tokenize(corpus, trained_tokenizer(corpus))


def decoded(corpus: Corpus) -> str:
    """The corpus after its way through tokens."""
    tokens = trained_tokens(corpus).tolist()
    text: str = trained_tokenizer(corpus).decode(tokens, skip_special_tokens=False)
    return text


class TestTextFiles:
    def test_are_all_text_below_the_folder_in_order(self, folder: Path) -> None:
        for name in ("c.tokens", "d.py", "e.json", "f.raw", "no_suffix"):
            (folder / name).write_text("x")
        assert [str(path.relative_to(folder)) for path in text_files(folder)] == [
            "b.txt",
            "c.tokens",
            "d.py",
            "deep/a.md",
            "f.raw",
        ]

    def test_leave_out_what_is_hidden_below_the_folder_but_not_a_folder_that_is_itself_hidden(
        self, folder: Path
    ) -> None:
        hidden = folder / ".venv"
        hidden.mkdir()
        (hidden / "module.py").write_text("x")
        assert hidden / "module.py" not in text_files(folder)
        assert text_files(hidden) == (hidden / "module.py",)

    def test_may_be_one_file(self, folder: Path) -> None:
        assert text_files(folder / "b.txt") == (folder / "b.txt",)

    def test_must_exist(self, tmp_path: Path) -> None:
        (tmp_path / "e.json").write_text("{}")
        with pytest.raises(
            ValueError, match=r"must be \*\.md, .* \*\.txt files or a table, found none below"
        ):
            text_files(tmp_path)
        with pytest.raises(ValueError, match=r"found nothing at .*absent\. Name another"):
            text_files(tmp_path / "absent")
        with pytest.raises(ValueError, match=r"found another kind of file, .*e\.json"):
            text_files(tmp_path / "e.json")

    def test_are_not_the_merges_of_a_tokenizer(self, folder: Path) -> None:
        (folder / "merges.txt").write_text("of two rivers")
        assert folder / "merges.txt" in text_files(folder)
        (folder / "vocab.json").write_text("{}")
        assert folder / "merges.txt" not in text_files(folder)

    def test_that_are_named_so_are_held_out(self, folder: Path) -> None:
        for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
            (folder / name).write_text(name)
        text = text_in_files(folder)
        assert text.description == f"text of 1 file in {folder}"
        assert text.held_out_description == "wiki.valid.tokens"
        assert [list(document) for document in text.corpus] == [["wiki.train.tokens"]]
        assert text.held_out is not None
        assert [list(document) for document in text.held_out] == [["wiki.valid.tokens"]]
        (folder / "wiki.valid.tokens").unlink()
        assert text_in_files(folder).held_out_description == "wiki.test.tokens"

    def test_in_folders_that_are_named_so_are_held_out(self, tmp_path: Path) -> None:
        for name in ("train/a.txt", "train/test_of_time.txt", "dev/a.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        text = text_in_files(tmp_path)
        assert [list(document) for document in text.corpus] == [["train/a.txt"]]
        assert text.held_out is not None
        assert [list(document) for document in text.held_out] == [["dev/a.txt"]]

    def test_are_all_to_train_on_where_none_is_named_so(self, folder: Path) -> None:
        (folder / "test_module.py").write_text("x")
        text = text_in_files(folder)
        assert text.description == f"text of 3 files in {folder}"
        assert text.held_out is None

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


class TestPieces:
    @given(st.lists(st.text(alphabet="ab \n\t\u3000", max_size=6), max_size=8))
    def test_are_the_text_cut_before_white_space_after_a_word(self, blocks: list[str]) -> None:
        pieces = list(in_pieces(blocks))
        assert "".join(pieces) == "".join(blocks)
        assert all(pieces)
        for before, after in itertools.pairwise(pieces):
            assert not before[-1].isspace()
            assert after[0].isspace()

    def test_have_the_tokens_of_the_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PIECE_BYTES", 100)
        text = "".join(f"line {number}{chr(10) * (number % 4)} \t the cat" for number in range(300))
        (tmp_path / "long.txt").write_text(text)
        corpus = TextFiles(files=(tmp_path / "long.txt",))
        assert len(list(next(iter(corpus)))) > 50
        tokenizer = train_tokenizer([text], vocabulary_size=300)
        assert tokenize(corpus, tokenizer).tolist() == [*tokenizer.encode(text).ids, 0]

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_do_not_cut_a_character(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        monkeypatch.setattr(module, "PIECE_BYTES", size)
        text = "é🙂 \u3000🙂\n" * 3
        (tmp_path / "long.txt").write_text(text)
        assert "".join(next(iter(TextFiles(files=(tmp_path / "long.txt",))))) == text


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

    def test_of_gpt2s_two_files_is_transformers_own(self, tmp_path: Path) -> None:
        folder = write_gpt2_files(tmp_path)
        theirs = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        ours = read_tokenizer(folder)
        for text in (VERSE, " the  cat\n\n's thé 🙂 12 cats!?", "a<|endoftext|>the cat", ""):
            assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.token_to_id("<|endoftext|>") == 261
        assert vocabulary_size(ours) == 262
        assert len(ours.encode(" the cat").ids) == 3

    def test_may_be_any_of_the_tokenizers_library(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            assert read_tokenizer(path).encode(VERSE).ids == tokenizer.encode(VERSE).ids

    @pytest.mark.parametrize(
        ("name", "content", "found"),
        [
            ("vocab.json", None, r"vocab\.json is not there\. Put it there, or take the others away"),
            ("merges.txt", None, r"merges\.txt is not there"),
            ("vocab.json", b'{"a": 1', "must be JSON with a number for each token"),
            ("vocab.json", b'{"a": "b"}', "must be JSON with a number for each token"),
            ("vocab.json", b'{"a": 0}', "a token for each of the 256 bytes as GPT-2's has, got 1 of them"),
            ("merges.txt", b"#version: 0.2\nt h\nth\n", "got 'th' in line 3"),
            ("merges.txt", b"t h\nx y\n", "that together are one, got 'x y' in line 2"),
            ("merges.txt", b"\xff\xfe", r"merges\.txt cannot be read as text"),
            ("tokenizer.json", b"{}", r"tokenizer\.json must be a file of the tokenizers library"),
        ],
    )
    def test_says_what_is_wrong_with_its_files(
        self, tmp_path: Path, name: str, content: bytes | None, found: str
    ) -> None:
        folder = write_gpt2_files(tmp_path)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=found):
            read_tokenizer(folder)

    def test_must_be_in_the_folder_that_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must hold vocab\.json and merges\.txt, or tokenizer\.json"):
            read_tokenizer(tmp_path)
        with pytest.raises(ValueError, match="absent is not there"):
            read_tokenizer(tmp_path / "absent")


class TestTokenize:
    def test_ends_each_document_with_a_token_of_its_own(self, folder: Path) -> None:
        first, second = ((folder / name).read_bytes().decode() for name in ("b.txt", "deep/a.md"))
        assert decoded(files(folder)) == f"{first}<|endoftext|>{second}<|endoftext|>"

    def test_ends_none_where_the_tokenizer_has_no_such_token(self, folder: Path, tmp_path: Path) -> None:
        vocabulary = write_gpt2_files(tmp_path / "gpt2") / "vocab.json"
        tokens = json.loads(vocabulary.read_text())
        del tokens["<|endoftext|>"]
        vocabulary.write_text(json.dumps(tokens))
        tokenizer = read_tokenizer(tmp_path / "gpt2")
        assert tokenizer.decode(tokenize(files(folder), tokenizer).tolist()) == "".join(
            (folder / name).read_bytes().decode() for name in ("b.txt", "deep/a.md")
        )

    def test_keeps_large_tokens_whole(self, tmp_path: Path, folder: Path) -> None:
        vocabulary = write_gpt2_files(tmp_path / "gpt2") / "vocab.json"
        tokens = json.loads(vocabulary.read_text()) | {"<|endoftext|>": 65_535}
        vocabulary.write_text(json.dumps(tokens))
        found = tokenize(files(folder), read_tokenizer(tmp_path / "gpt2"))
        assert (found.dtype, found[-1]) == (np.uint16, 65_535)
        vocabulary.write_text(json.dumps(tokens | {"<|endoftext|>": 65_536}))
        found = tokenize(files(folder), read_tokenizer(tmp_path / "gpt2"))
        assert (found.dtype, found[-1]) == (np.uint32, 65_536)

    def test_puts_a_mark_where_bytes_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "broken.txt").write_bytes(b"caf\xe9\n")
        assert decoded(files(tmp_path)) == "caf\N{REPLACEMENT CHARACTER}\n<|endoftext|>"

    def test_takes_from_the_cache_what_is_there(self, folder: Path, home: Path) -> None:
        first = trained_tokens(files(folder))
        (tokens_file,) = (home / "cache").glob("*.tokens.npy")
        np.save(tokens_file, np.array([7, 7, 7], np.uint16))
        assert trained_tokens(files(folder)).tolist() == [7, 7, 7]
        assert len(first) > 3

    def test_makes_again_what_was_removed_from_the_cache(self, folder: Path, home: Path) -> None:
        before = trained_tokens(files(folder)).tolist()
        for file in (home / "cache").iterdir():
            whole = file.read_bytes()
            file.unlink()
            assert trained_tokens(files(folder)).tolist() == before
            assert file.read_bytes() == whole

    def test_leaves_nothing_in_the_cache_but_the_tokenizer_and_the_tokens(
        self, folder: Path, home: Path
    ) -> None:
        trained_tokens(files(folder))
        endings = {".".join(file.name.split(".")[1:]) for file in (home / "cache").iterdir()}
        assert endings == {"tokenizer.json", "tokens.npy"}

    def test_does_not_mistake_one_corpus_or_setting_for_another(self, folder: Path, home: Path) -> None:
        def entries() -> int:
            return len(list((home / "cache").glob("*.tokenizer.json")))

        trained_tokenizer(files(folder))
        trained_tokenizer(files(folder), vocabulary_size=260)
        assert entries() == 2
        trained_tokenizer(TextFiles(files=tuple(reversed(text_files(folder)))))
        assert entries() == 3
        (folder / "b.txt").write_text(VERSE * 3 + " ")
        trained_tokenizer(files(folder))
        assert entries() == 4

    def test_does_not_mistake_the_tokens_of_one_tokenizer_for_anothers(
        self, folder: Path, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        other = read_tokenizer(write_gpt2_files(tmp_path / "gpt2"))
        for each in (tokenizer, other, tokenizer):
            found = tokenize(files(folder), each).tolist()
            assert each.decode(found).startswith(VERSE)

    def test_does_not_mistake_the_end_of_one_document_for_the_beginning_of_the_next(
        self, tokenizer: Tokenizer
    ) -> None:
        one = tokenize([["the cat"], [" sat"]], tokenizer).tolist()
        other = tokenize([["the"], [" cat sat"]], tokenizer).tolist()
        assert one != other

    def test_comes_to_the_same_bytes_in_another_process(
        self, folder: Path, home: Path, tmp_path: Path
    ) -> None:
        trained_tokens(files(folder))
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import pathlib, sys\n"
                "from executor.text import TextFiles, text_files, tokenize, trained_tokenizer\n"
                "corpus = TextFiles(files=text_files(pathlib.Path(sys.argv[1])))\n"
                "tokenize(corpus, trained_tokenizer(corpus))\n",
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
            trained_tokens(files(folder))

    @pytest.mark.parametrize(("limit_bytes", "whole"), [(1_000, set()), (50_000, {"json"})])
    def test_leaves_no_half_a_file_where_there_is_no_room_for_all_of_it(
        self, tmp_path: Path, home: Path, limit_bytes: int, whole: set[str]
    ) -> None:
        (tmp_path / "long.txt").write_text(VERSE * 3_000)
        corpus = TextFiles(files=(tmp_path / "long.txt",))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
        try:
            with pytest.raises(ValueError, match=r"cache directory must be writable, got .*: (?!None)"):
                trained_tokens(corpus)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {file.name.rpartition(".")[2] for file in (home / "cache").iterdir()} == whole
        assert len(trained_tokens(corpus)) > 25_000


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


def row(tokens: int, sequence_length: int) -> TokenDataset:
    return TokenDataset(tokens=np.arange(tokens, dtype=np.uint16), sequence_length=sequence_length)


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

    def test_says_that_every_token_counts_where_a_model_wants_to_be_told(self) -> None:
        dataset = TokenDataset(tokens=np.arange(8, dtype=np.uint32), sequence_length=4, attention_mask=True)
        assert set(row(8, 4).gather(np.array([0]))) == {"input_ids", "labels"}
        assert dataset.gather(np.array([1, 0]))["attention_mask"].tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(("windows", "held_out"), [(1, 0), (19, 0), (20, 1), (59, 2), (100, 5)])
def test_the_last_twentieth_of_the_windows_is_held_out(windows: int, held_out: int) -> None:
    tokens = np.arange(windows * 3 + 2, dtype=np.uint16)
    kept, others = last_windows(tokens, 3)
    assert (len(kept) // 3, len(others) // 3) == (windows - held_out, held_out)
    assert np.array_equal(np.concatenate([kept, others]), tokens)

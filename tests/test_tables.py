"""Tables of the datasets library: its formats, which column is what, and no network and no foreign code."""

from __future__ import annotations

import csv
import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from executor import tables
from tests.datafiles import colour, png, write_images

LINES = ["", " = Title = \n", "", " the cat sat \n", " on the mat . \n"]
TEXTS = ["the cat sat", "on the mat\nand the hat"]


def table(path: Path) -> tables.Tables:
    if tables.saved_to_disk(path):
        return tables.open_saved(path)
    return tables.open_files(tables.table_files(path), path)


def documents(path: Path) -> list[str]:
    return ["".join(document) for document in tables.text_of(table(path)).corpus]


def write_rows(file: Path, columns: dict[str, list[Any]]) -> Path:
    """The same rows in the format that the suffix names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match file.suffix:
        case ".parquet":
            pq.write_table(pa.table(columns), file)
        case ".arrow":
            arrow = pa.table(columns)
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as stream:
                stream.write_table(arrow)
        case ".jsonl" | ".ndjson":
            file.write_text(lines)
        case ".gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".csv" | ".tsv":
            with file.open("w", newline="") as opened:
                writer = csv.writer(opened, delimiter="," if file.suffix == ".csv" else "\t")
                writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
        case _:
            raise AssertionError(file)
    return file


class TestFormats:
    @pytest.mark.parametrize(
        "name", ["a.parquet", "a.arrow", "a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.csv", "a.tsv"]
    )
    def test_of_all_kinds_hold_the_same_text(self, tmp_path: Path, name: str) -> None:
        file = write_rows(tmp_path / "data" / name, {"id": [1, 2], "text": TEXTS})
        assert documents(tmp_path / "data") == TEXTS
        assert documents(file) == TEXTS

    def test_made_by_save_to_disk(self, tmp_path: Path) -> None:
        one = datasets.Dataset.from_dict({"text": TEXTS})
        one.save_to_disk(tmp_path / "one")
        assert documents(tmp_path / "one") == TEXTS
        other = datasets.Dataset.from_dict({"text": ["held out"]})
        datasets.DatasetDict({"validation": other, "train": one}).save_to_disk(tmp_path / "two")
        assert documents(tmp_path / "two") == TEXTS
        held_out = tables.text_of(table(tmp_path / "two")).held_out
        assert held_out is not None
        assert ["".join(document) for document in held_out] == ["held out"]

    def test_in_several_files_are_read_in_order(self, tmp_path: Path) -> None:
        for number in (2, 0, 1):
            write_rows(tmp_path / f"train-0000{number}-of-00003.parquet", {"text": [f"part {number}"]})
        assert documents(tmp_path) == ["part 0", "part 1", "part 2"]

    def test_in_a_folder_with_any_name(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a [1] *?" / "train.parquet", {"text": TEXTS})
        assert documents(tmp_path / "a [1] *?") == TEXTS

    def test_are_read_again_when_they_change(self, tmp_path: Path) -> None:
        file = write_rows(tmp_path / "a.jsonl", {"text": TEXTS})
        before = file.stat()
        assert documents(tmp_path) == TEXTS
        write_rows(file, {"text": TEXTS[::-1]})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert documents(tmp_path) == TEXTS[::-1]

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.json", "a.csv"])
    def test_cut_short_or_empty_are_refused(
        self, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        file = write_rows(tmp_path / name, {"text": TEXTS * 20})
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2 + 5] if name != "a.csv" else b'text\n"cut')
        with pytest.raises(
            ValueError, match=r"must hold whole tables that the datasets library .* reads, got"
        ):
            table(tmp_path)
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} must hold a table, but the file is empty"):
            table(tmp_path)
        assert capfd.readouterr().err == ""

    def test_of_a_damaged_save_are_refused(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
        with pytest.raises(ValueError, match="saved must hold whole tables"):
            table(tmp_path / "saved")
        (tmp_path / "saved" / "state.json").write_text("{")
        with pytest.raises(ValueError, match="saved must hold whole tables"):
            table(tmp_path / "saved")


class TestSplits:
    def test_are_what_the_files_are_named(self, tmp_path: Path) -> None:
        for split in ("test", "train", "validation"):
            write_rows(tmp_path / "data" / f"{split}-00000-of-00001.parquet", {"text": [split]})
        write_rows(tmp_path / "data" / "notes.parquet", {"other": [1]})
        text = tables.text_of(table(tmp_path))
        assert documents(tmp_path) == ["train"]
        assert text.held_out_description == f"1 rows of validation of {tmp_path}"
        (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
        assert tables.text_of(table(tmp_path)).held_out_description == f"1 rows of test of {tmp_path}"

    def test_alone_are_to_train_on_whatever_they_are_named(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "test.parquet", {"text": TEXTS})
        assert documents(tmp_path) == TEXTS
        assert tables.text_of(table(tmp_path)).held_out is None

    def test_without_a_name_are_to_train_on(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "corpus.parquet", {"text": TEXTS})
        write_rows(tmp_path / "corpus-valid.parquet", {"text": ["held out"]})
        assert documents(tmp_path) == TEXTS
        assert tables.text_of(table(tmp_path)).held_out is not None

    def test_must_have_one_to_train_on(self, tmp_path: Path) -> None:
        for split in ("validation", "test"):
            write_rows(tmp_path / f"{split}.parquet", {"text": TEXTS})
        with pytest.raises(ValueError, match="must have one that is named train, got test, validation in"):
            table(tmp_path)

    def test_of_two_data_sets_are_not_mixed(self, tmp_path: Path) -> None:
        for name in ("wikitext-2-v1", "wikitext-103-v1"):
            write_rows(tmp_path / name / "train-00000-of-00001.parquet", {"text": [name]})
        with pytest.raises(
            ValueError, match=r"one data set, got train-00000.* in wikitext-103-v1 and in wikitext-2-v1"
        ):
            table(tmp_path)
        assert documents(tmp_path / "wikitext-2-v1") == ["wikitext-2-v1"]


class TestText:
    def test_is_the_column_of_that_name_or_the_only_one_of_strings(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a" / "a.parquet", {"title": ["x", "y"], "text": TEXTS})
        write_rows(tmp_path / "b" / "b.parquet", {"id": [1, 2], "content": TEXTS})
        assert documents(tmp_path / "a") == documents(tmp_path / "b") == TEXTS

    @pytest.mark.parametrize("columns", [{"a": ["x"], "b": ["y"]}, {"id": [1]}])
    def test_is_not_guessed_at(self, tmp_path: Path, columns: dict[str, list[Any]]) -> None:
        write_rows(tmp_path / "a.parquet", columns)
        found = ", ".join(f"{name} \\({'int64' if name == 'id' else 'string'}\\)" for name in columns)
        with pytest.raises(
            ValueError, match=f"must have a column text, or one column of strings, for text, got {found} in"
        ):
            tables.text_of(table(tmp_path))

    def test_is_in_the_held_out_table_too(self, tmp_path: Path) -> None:
        datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict({"text": TEXTS}),
                "test": datasets.Dataset.from_dict({"other": TEXTS}),
            }
        ).save_to_disk(tmp_path)
        with pytest.raises(
            ValueError, match=r"must have a column text as train of .* has, got other \(string\)"
        ):
            tables.text_of(table(tmp_path))

    def test_in_lines_is_one_document_as_in_wikitext(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train-00000-of-00001.parquet", {"text": LINES})
        assert documents(tmp_path) == ["".join(LINES)]

    def test_of_files_that_end_their_last_line_is_a_document_a_row(self, tmp_path: Path) -> None:
        rows = ["import os\nprint(1)\n", "import sys\n"]
        write_rows(tmp_path / "a.parquet", {"text": rows})
        assert documents(tmp_path) == rows

    def test_leaves_out_rows_without_any(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a.parquet", {"text": ["one", None, "two"]})
        assert documents(tmp_path) == ["one", "two"]


class TestImages:
    @pytest.mark.parametrize("names", [("img", "label"), ("image", "labels"), ("picture", "kind")])
    def test_are_a_column_of_encoded_images_and_one_of_numbers(
        self, tmp_path: Path, names: tuple[str, str]
    ) -> None:
        write_images(tmp_path / "plain_text" / "train-00000-of-00001.parquet", 12, names=names)
        write_images(tmp_path / "plain_text" / "test-00000-of-00001.parquet", 3, seed=50, names=names)
        found = tables.images_of(table(tmp_path), 3, (32, 32))
        assert found.is_cifar_10
        assert np.array_equal(found.training.pixels.read(np.array([7]))[0], colour(32, 7).transpose(2, 0, 1))
        assert found.training.labels.tolist() == [*range(10), 0, 1]
        assert found.held_out is not None
        assert np.array_equal(found.held_out.pixels.read(np.array([2]))[0], colour(32, 52).transpose(2, 0, 1))

    def test_saved_by_the_library_itself_are_read_too(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        )
        rows = {"image": [colour(8, seed) for seed in range(4)], "label": [0, 1, 1, 0]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
        found = tables.images_of(table(tmp_path), 3, (16, 16))
        assert not found.is_cifar_10
        assert found.training.labels.tolist() == [0, 1, 1, 0]
        assert np.array_equal(found.training.pixels.read(np.array([3]))[0], colour(8, 3).transpose(2, 0, 1))

    @pytest.mark.parametrize(("size", "classes", "same"), [(32, 10, True), (32, 11, False), (28, 10, False)])
    def test_are_those_of_cifar_10_by_size_and_classes(
        self, tmp_path: Path, size: int, classes: int, same: bool
    ) -> None:
        write_images(tmp_path / "train.parquet", 11, size=size, classes=classes)
        assert tables.images_of(table(tmp_path), 3, (32, 32)).is_cifar_10 is same

    def test_with_names_of_other_classes_are_none_of_cifar_10(self, tmp_path: Path) -> None:
        names = datasets.ClassLabel(names=[str(digit) for digit in range(10)])
        rows = {"image": [colour(32)] * 2, "label": [0, 9]}
        features = datasets.Features({"image": datasets.Image(), "label": names})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
        assert not tables.images_of(table(tmp_path), 3, (32, 32)).is_cifar_10

    def test_by_their_paths_are_read_from_there(self, tmp_path: Path) -> None:
        (tmp_path / "one.png").write_bytes(png(colour(8)))
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": None, "path": str(tmp_path / "one.png")}], kind)
        pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "a.parquet")
        found = tables.images_of(table(tmp_path), 3, (8, 8)).training.pixels.read(np.array([0]))
        assert np.array_equal(found[0], colour(8).transpose(2, 0, 1))
        (tmp_path / "one.png").unlink()
        with pytest.raises(ValueError, match=r"an image or the path of one, got '.*one\.png' in row 0 of"):
            tables.images_of(table(tmp_path), 3, (8, 8))

    def test_that_are_damaged_are_named_before_any_training(self, tmp_path: Path) -> None:
        file = write_images(tmp_path / "a.parquet", 5)
        rows = pq.read_table(file).to_pylist()
        rows[3]["img"]["bytes"] = rows[3]["img"]["bytes"][:-200]
        pq.write_table(pa.Table.from_pylist(rows), file)
        with pytest.raises(
            ValueError, match=r"whole files that Pillow reads, got image 3 of .*: image file is trunc"
        ):
            tables.images_of(table(tmp_path), 3, (32, 32))

    @pytest.mark.parametrize("label", [-1, None])
    def test_must_have_a_class_each(self, tmp_path: Path, label: int | None) -> None:
        file = write_images(tmp_path / "a.parquet", 3)
        rows = pq.read_table(file).to_pylist()
        rows[1]["label"] = label
        pq.write_table(pa.Table.from_pylist(rows), file)
        with pytest.raises(ValueError, match=rf"whole numbers from 0, got {label} in row 1 of"):
            tables.images_of(table(tmp_path), 3, (32, 32))

    def test_are_not_guessed_at(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a.parquet", {"text": TEXTS})
        with pytest.raises(
            ValueError, match=r"one column of encoded images, for images, got text \(string\)"
        ):
            tables.images_of(table(tmp_path), 3, (32, 32))
        write_images(tmp_path / "a.parquet", 2)
        rows = pq.read_table(tmp_path / "a.parquet").drop_columns("label")
        pq.write_table(rows.append_column("a", [[1, 2]]).append_column("b", [[1, 2]]), tmp_path / "a.parquet")
        with pytest.raises(
            ValueError, match="a column label or labels, or one column of whole numbers, for classes"
        ):
            tables.images_of(table(tmp_path), 3, (32, 32))


class TestSafety:
    def test_nothing_is_asked_of_the_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def refuse(*arguments: object, **options: object) -> None:
            asked.append(arguments)
            raise OSError("no network in this test")

        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        write_rows(tmp_path / "a.parquet", {"text": TEXTS})
        assert documents(tmp_path) == TEXTS
        assert asked == []
        assert datasets.config.HF_HUB_OFFLINE is False

    def test_a_script_beside_the_data_does_not_run(self, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        write_rows(folder / "train.jsonl", {"text": TEXTS})
        trace = tmp_path / "trace"
        for name in ("mine.py", "train.py", "json.py", "__init__.py"):
            (folder / name).write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: a\n  data_files: ../secret.jsonl\n---\n"
        )
        assert documents(folder) == TEXTS
        assert not trace.exists()

    def test_the_users_settings_of_the_library_stay(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a.jsonl", {"text": TEXTS})
        before = datasets.utils.logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()
        documents(tmp_path)
        assert (datasets.utils.logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()) == before

    def test_what_is_kept_lies_in_the_cache(self, tmp_path: Path, state_of_its_own: Path) -> None:
        write_rows(tmp_path / "a.jsonl", {"text": TEXTS})
        documents(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
        assert list((state_of_its_own / "cache" / "tables").iterdir())

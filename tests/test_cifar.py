"""CIFAR-10 as it is downloaded: read as published, and nothing that a file contains is run."""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor import cifar
from tests.datafiles import BATCHES, batch, pixels, python2_pickle, write_archive, write_cifar

WHOLE = python2_pickle(batch(2))


class _Call:
    """Pickled, it is a call that unpickling makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def test_a_folder_is_five_batches_to_train_on_and_one_to_test_on(tmp_path: Path) -> None:
    training, held_out = cifar.read(write_cifar(tmp_path, images=4))
    expected = np.concatenate([pixels(4, seed) for seed in range(5)]).reshape(20, 3, 32, 32)
    assert np.array_equal(training.pixels.read(np.arange(20)), expected)
    assert training.labels.tolist() == [(seed + i) % 10 for seed in range(5) for i in range(4)]
    assert np.array_equal(held_out.pixels.read(np.arange(4)).reshape(4, -1), pixels(4, seed=5))


def test_an_archive_is_the_folder_in_it_and_nothing_is_unpacked(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "unpacked")
    (tmp_path / "data").mkdir()
    archive = write_archive(tmp_path / "data" / "cifar-10-python.tar.gz", folder)
    for training, held_out in (cifar.read(archive), cifar.read(folder)):
        assert np.array_equal(training.pixels.read(np.array([7])), pixels(4, 1)[3].reshape(1, 3, 32, 32))
        assert held_out.labels.tolist() == [5, 6, 7, 8]
    assert list((tmp_path / "data").iterdir()) == [archive]


def test_the_batches_are_found_where_they_may_be(tmp_path: Path) -> None:
    assert cifar.find(tmp_path) is None
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert cifar.find(tmp_path) == cifar.find(tmp_path / "cifar-10-python.tar.gz") == tmp_path / cifar.ARCHIVE
    inside = write_cifar(tmp_path / "cifar-10-batches-py")
    assert cifar.find(tmp_path) == cifar.find(inside) == inside


@pytest.mark.parametrize("protocol", range(6))
def test_batches_that_python_3_pickled_again_are_read_too(protocol: int) -> None:
    data = pickle.dumps({"data": pixels(3), "labels": [3, 1, 2]}, protocol)
    images, labels = cifar.read_batch(data, source="again")
    assert np.array_equal(images.reshape(3, -1), pixels(3))
    assert labels.tolist() == [3, 1, 2]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, np.frombuffer, np.ndarray.tofile])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, function: Any
) -> None:
    trace = tmp_path / "trace"
    call = _Call(os.system, f"touch {trace}") if function is os.system else _Call(function, "1")
    harmful = pickle.dumps({"data": pixels(1), "labels": [call]}, protocol)
    with pytest.raises(ValueError, match=r"^mine must hold .* got a call of .*; nothing in it was run"):
        cifar.read_batch(harmful, source="mine")
    assert not trace.exists()
    if function is os.system:
        pickle.loads(harmful)
        assert trace.exists()  # the pickle does what it is meant to do


def test_what_a_pickle_sets_on_a_stand_in_is_gone_with_it() -> None:
    sets = b"\x80\x02cnumpy\ndtype\n}U\x04mineK\x01sb."
    with pytest.raises(ValueError, match="a function in place of a dictionary"):
        cifar.read_batch(sets, source="mine")
    assert not any(hasattr(stand_in, "mine") for stand_in in cifar._STAND_INS.values())


@given(st.integers(0, len(WHOLE) - 1))
def test_a_batch_cut_short_anywhere_is_refused_by_name(length: int) -> None:
    with pytest.raises(ValueError, match=r"^data_batch_1 must be a batch of CIFAR-10 for Python, whole, got"):
        cifar.read_batch(WHOLE[:length], source="data_batch_1")


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_batch_is_read_or_refused(place: int, damage: bytes) -> None:
    with contextlib.suppress(ValueError):
        cifar.read_batch(WHOLE[:place] + damage + WHOLE[place + len(damage) :], source="damaged")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({b"labels": [1]}, "got 2 images and 1 labels"),
        ({b"labels": [], b"data": pixels(0)}, "got 0 images and 0 labels"),
        ({b"labels": [1, 10]}, "the label 10, where classes go from 0 to 9"),
        ({b"labels": [1, -1]}, "the label -1"),
        ({b"labels": [1, True]}, "the label True"),
        ({b"labels": "12"}, "got the entries 'batch_label', 'labels', 'data', 'filenames'"),
        ({b"data": pixels(2)[:, :3000].copy()}, "2 x 3000 numbers and 6000 bytes"),
        ({b"data": pixels(2).astype(np.float32)}, "something else in place of rows of 8-bit numbers"),
        ({b"data": np.asfortranarray(pixels(2))}, "something else in place of rows of 8-bit numbers"),
        ({b"data": pixels(2).reshape(2, 3, 1024)}, "something else in place of rows of 8-bit numbers"),
    ],
)
def test_a_batch_that_is_none_is_refused_with_what_it_holds(change: dict[bytes, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"^test_batch must be .*{found}"):
        cifar.read_batch(python2_pickle(batch(2) | change), source="test_batch")


def test_a_shape_that_its_numbers_do_not_fill_is_not_believed() -> None:
    shape = b"K\x02M\x00\x0c\x86"
    assert shape in WHOLE
    with pytest.raises(ValueError, match=r"^mine must be .* got 3 x 3072 numbers and 6144 bytes for them"):
        cifar.read_batch(WHOLE.replace(shape, b"K\x03" + shape[2:]), source="mine")


def test_a_dictionary_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="got a list in place of a dictionary"):
        cifar.read_batch(pickle.dumps([1, 2]), source="mine")
    with pytest.raises(ValueError, match="got the entries none"):
        cifar.read_batch(pickle.dumps({}), source="mine")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_missing_batch_is_named(tmp_path: Path, name: str) -> None:
    (write_cifar(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=rf"has no {name}\. Unpack"):
        cifar.read(tmp_path)


def test_an_archive_cut_short_or_of_something_else_is_refused(tmp_path: Path) -> None:
    whole = write_archive(tmp_path / "whole.tar.gz", write_cifar(tmp_path / "data")).read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"no archive"), ("empty", b"")):
        (tmp_path / f"{name}.tar.gz").write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name}\.tar\.gz must be cifar-10-python\.tar\.gz, whole, got"
        ):
            cifar.read(tmp_path / f"{name}.tar.gz")


def test_an_archive_is_not_believed_that_unpacks_to_too_much_or_points_elsewhere(tmp_path: Path) -> None:
    bomb = tarfile.TarInfo("data_batch_1")
    bomb.size = 1 << 40
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as file:
        file.write(bomb.tobuf())
    with pytest.raises(
        ValueError, match=r"data_batch_1 must be a batch of CIFAR-10.*got 1099511627776 bytes"
    ):
        cifar.read(tmp_path / "bomb.tar.gz")
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as archive:
        for name in BATCHES:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    with pytest.raises(ValueError, match="has no data_batch_1, data_batch_2"):
        cifar.read(tmp_path / "links.tar.gz")

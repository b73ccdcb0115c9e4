"""A run's state on disk: it comes back bit by bit, whole or not at all, and what is damaged is said to be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from executor import snapshots
from executor.last_good import LastGood, RandomState
from executor.snapshots import Damaged, load, manifest_of, path_of, save, steps_kept

RUN = {"plan": "abc"}


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "weights": {"tied": weight, "also tied": weight, "part": weight[2:4, 1:3]},
        "optimizer": {0: {"step": torch.tensor(3.0)}, 1: {"betas": (0.9, 0.999)}},
        "numbers": [1, 2**80, -0.1, math.inf, -math.inf, True, None, "words"],
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "bf16": torch.randn(3, generator=generator).bfloat16(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path, 12, RUN, state())
    assert path == path_of(tmp_path, 12)
    found = load(path)
    assert same(found, state())
    assert found["weights"]["tied"] is found["weights"]["also tied"]
    assert manifest_of(path).run == RUN


@given(st.floats(allow_nan=True))
def test_every_float_comes_back_to_the_bit(value: float) -> None:
    tensors: dict[str, torch.Tensor] = {}
    encoded = json.loads(json.dumps(snapshots._encoded(value, tensors, {}, ""), allow_nan=False))
    assert same(snapshots._decoded(encoded, tensors), value)


def test_what_is_neither_number_nor_tensor_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got Linear at optimizer\.groups\.1"):
        save(tmp_path, 1, RUN, {"optimizer": {"groups": [0, nn.Linear(1, 1)]}})
    assert steps_kept(tmp_path) == []


def test_only_the_newest_are_kept_and_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".writing-00000007").mkdir()
    for step in (7, 9, 100, 30):
        save(tmp_path, step, RUN, {"step": step}, keep=2)
    # A run that is at step 30 has passed over what is there of step 100.
    assert steps_kept(tmp_path) == [30, 9]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert load(path_of(tmp_path, 30)) == {"step": 30}


def test_a_step_that_is_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 5, RUN, {"loss": 1.0})
    save(tmp_path, 5, RUN, {"loss": 2.0})
    assert load(path_of(tmp_path, 5)) == {"loss": 2.0}


@pytest.mark.parametrize("name", ["process-0.safetensors", "process-0.json", "manifest.json"])
@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_is_detected(tmp_path: Path, name: str, seed: int) -> None:
    file = save(tmp_path, 1, RUN, state()) / name
    data = bytearray(file.read_bytes())
    chosen = random.Random(seed)
    places = range(len(data))
    if name == "manifest.json":  # White space and the run's own words are not summed up.
        text = bytes(data).decode()
        places = range(text.index('"sha256": "') + 11, text.index('"sha256": "') + 75)
    data[chosen.choice(places)] ^= 1 << chosen.randrange(3)
    file.write_bytes(bytes(data))
    with pytest.raises(Damaged, match=r"has changed|cannot be read|no whole"):
        load(path_of(tmp_path, 1))


@pytest.mark.parametrize("name", ["process-0.safetensors", "process-0.json", "manifest.json"])
def test_a_file_that_is_cut_off_or_gone_is_named(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1, RUN, state()) / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        load(path_of(tmp_path, 1))
    file.unlink()
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        load(path_of(tmp_path, 1))


def test_nothing_in_a_snapshot_is_run(tmp_path: Path) -> None:
    path = save(tmp_path, 1, RUN, state())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_random_state_comes_back_through_a_snapshot(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        import numpy as np

        return [random.random(), float(np.random.random()), float(torch.rand(())), random.gauss(0, 1)]

    random.seed(4)
    random.gauss(0, 1)  # Python's generator then holds a second one for later.
    save(tmp_path, 1, RUN, RandomState.now().tree())
    expected = drawn()
    assert drawn() != expected
    RandomState.of(load(path_of(tmp_path, 1))).set()
    assert drawn() == expected


def test_a_step_that_failed_leaves_neither_gradients_nor_statistics_nor_random_numbers() -> None:
    class Counting(nn.Module):
        """Writes into one large buffer and leaves the other alone."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(200, 200))
            self.register_buffer("mask", torch.zeros(300, 300))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Counting(), nn.Dropout(0.5))
    last_good = LastGood(model)
    last_good.remember()
    model(torch.ones(3, 4)).sum().backward()
    for _ in range(3):
        last_good.remember()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = model(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
        first.sum().backward()
        last_good.restore()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model(torch.randn(3, 4, generator=torch.Generator().manual_seed(1))), first)
    assert sum(copy.numel() for copy in last_good._copies) == 4 + 4 + 1 + 200 * 200

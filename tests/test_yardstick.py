"""A fixed piece of work beside what is timed, which tells how fast the device is meanwhile."""

from __future__ import annotations

import time

import pytest
import torch

from profiler import yardstick
from profiler.yardstick import SHARE, Yardstick

CPU = torch.device("cpu")


def test_it_runs_for_its_share_of_the_steps_that_it_runs_beside() -> None:
    beside = Yardstick(CPU)
    began = time.perf_counter()
    beside.beside(2.0)
    elapsed = time.perf_counter() - began
    assert elapsed + beside.wall_seconds() >= SHARE * 2.0
    assert elapsed <= SHARE * 2.0 + 5 * beside.wall_seconds()


def test_short_steps_share_a_run() -> None:
    beside = Yardstick(CPU)
    beside.beside(0.0)
    one = beside.wall_seconds()
    began = time.perf_counter()
    for _ in range(10):
        beside.beside(one / 10)
    assert time.perf_counter() - began < 4 * one


def test_a_device_of_half_the_speed_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, slow = [], []
    for _ in range(3):
        monkeypatch.setattr(yardstick, "PRODUCTS", 8)
        usual.append(Yardstick(CPU).cpu_seconds())
        monkeypatch.setattr(yardstick, "PRODUCTS", 16)
        slow.append(Yardstick(CPU).cpu_seconds())
    assert 1.4 < min(slow) / min(usual) < 2.8

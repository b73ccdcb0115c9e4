"""How much of the processors others take while a profile is made."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from planner.cli.profile import show
from profiler import device
from profiler.device import OtherWork
from tests.profiles import random_profile

SYSTEM = (
    "cpu  {user} 0 50 9999 7 3 2 {stolen} 5 0\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 12\n"
)


@pytest.mark.parametrize(
    ("user", "stolen", "own", "share"),
    [
        (400, 0, 4.0, 0.0),
        (1400, 0, 4.0, 0.5),
        (400, 1000, 4.0, 0.5),
        (400, 0, 4.5, 0.0),
        (9999, 0, 0.0, 1.0),
    ],
)
def test_what_is_not_ours_is_others(
    user: int, stolen: int, own: float, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds of two processors; ticks of a hundredth of a second."""
    now = SimpleNamespace(own=0.0, wall=0.0)
    monkeypatch.setattr(device, "process_cpu_seconds", lambda: now.own)
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now.wall))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    stat = tmp_path / "stat"
    stat.write_text(SYSTEM.format(user=0, stolen=0))
    other_work = OtherWork(stat)
    now.own, now.wall = own, 10.0
    stat.write_text(SYSTEM.format(user=user, stolen=stolen))
    assert other_work.share() == pytest.approx(share)


def test_a_system_that_does_not_say_is_not_asked(tmp_path: Path) -> None:
    assert OtherWork(tmp_path / "none").share() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_a_real_process_beside_this_one_is_seen() -> None:
    other_work = OtherWork()
    burning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        share = other_work.share()
    finally:
        burning.kill()
        burning.wait()
    assert share is not None
    assert share > 0.3 / (os.cpu_count() or 1)


def test_the_page_says_so_where_it_is_much(capsys: pytest.CaptureFixture[str]) -> None:
    profile = random_profile(1)

    def page(share: float | None) -> str:
        cost = msgspec.structs.replace(profile.cost, other_work_share=share)
        show(msgspec.structs.replace(profile, cost=cost), Path("made-up.profile.json"))
        return " ".join(capsys.readouterr().out.split())

    assert "other work took 45% of the processors" in page(0.45)
    assert "other work" not in page(0.05)
    assert "other work" not in page(None)

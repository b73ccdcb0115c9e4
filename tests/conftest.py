"""What every test may rely on: no network, no state of the user's, a skip where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

# A shared machine may stop for a second at any time, which is no fault of the example it stopped in.
hypothesis.settings.register_profile("planner", deadline=None)
hypothesis.settings.load_profile("planner")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's studies are not for tests to write to."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("PLANNER_HOME", str(home))
    return home

"""`planner devices`, and profiles of devices that are only named, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from planner.cli import main


def test_the_catalogue_and_what_is_here_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert "h200-141gb" in shown
    assert shown.index("Here") < shown.index("cpu") < shown.index("In the catalogue")


def test_as_json_it_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "devices"
    assert len(document["catalogue"]) >= 15
    assert document["here"]["cpu"]["memory_bytes"] > 2**28


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize(("limited", "kept"), [(False, "True"), (True, "False")])
def test_a_process_whose_memory_is_limited_keeps_no_freed_blocks(limited: bool, kept: str) -> None:
    """The limit counts the holes between blocks that are kept."""
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (2**36, 2**36))" if limited else "pass"
    code = (
        f"import resource; {limit}; from profiler.device import keep_freed_memory; print(keep_freed_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kept

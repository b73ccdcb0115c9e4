"""`planner devices`, and profiles of devices that are only named, through the command line."""

from __future__ import annotations

import json

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

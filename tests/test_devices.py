"""`planner devices`, and profiles of devices that are only named, through the command line."""

from __future__ import annotations

import json

import pytest

from planner.cli import main
from profiler.device import cpu_name


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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AMD EPYC", "AMD EPYC family 26 model 2"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz family 26 model 2"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor"),
    ],
)
def test_processors_that_hide_which_they_are_are_told_apart(name: str, said: str) -> None:
    one = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\nstepping\t: 1\n"
    assert cpu_name(one + "\n" + one.replace("26", "25")) == said
    assert cpu_name(f"model name\t: {name}\n") == name

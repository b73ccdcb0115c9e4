"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs_and_its_plan_recomputes_under_its_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    plan = names["plan"]
    assert plan.checkpoint  # type: ignore[attr-defined]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_tree_names_every_module_that_there_is() -> None:
    tree = README.read_text().split("## The house")[1]
    for package in ("profiler", "planner", "executor"):
        for module in (README.parent / package).glob("*.py"):
            if module.name != "__init__.py":
                assert f"  {module.name} " in tree, module


def test_every_study_that_is_named_exists() -> None:
    named = set(re.findall(r"python -m (studies\.\w+)", README.read_text()))
    assert named
    for study in named:
        assert (README.parent / f"{study.replace('.', '/')}.py").exists(), study

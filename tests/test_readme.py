"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import planner
from profiler.allocator import measure_step

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_line_for_a_model_that_does_not_fit_runs_and_says_what_it_did() -> None:
    _, line, _ = examples()
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(8))
    )
    names: dict[str, Any] = {"planner": planner, "model": model, "batch": torch.randn(4096, 64)}
    exec(line, names)
    assert names["model"] is model
    assert names["checkpointed"].plan.checkpoint


def test_the_solver_by_itself_gives_what_the_comments_say() -> None:
    _, _, example = examples()
    names: dict[str, Any] = {}
    exec(example, names)
    schedule = names["place"](names["chain"], 14).schedule
    assert schedule[:5] == (("Fc", 0), ("Fe", 1), ("Fe", 2), ("Loss", 3), ("B", 2))


def test_the_python_example_runs_and_its_plan_recomputes_under_its_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example, _, _ = examples()
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    plan, step, batch = names["plan"], names["step"], names["batch"]
    assert plan.checkpoint
    assert len(capsys.readouterr().out.splitlines()) == 5
    # The loop of the example needs what the plan says.
    whole = batch(1024)
    peak = measure_step(lambda: step(whole), names["model"], step.optimizer, whole, torch.device("cpu"))
    predicted = plan.prediction
    assert peak.peak_bytes == pytest.approx(
        predicted.peak_memory_bytes, rel=predicted.error.peak_memory_bytes
    )


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

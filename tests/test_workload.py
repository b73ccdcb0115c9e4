"""Workloads, and how a name becomes one."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from logging.handlers import BufferingHandler
from pathlib import Path

import msgspec
import pytest
import torch

from profiler.registry import build
from profiler.workload import Workload
from profiler.workload_spec import WorkloadError, WorkloadSpec, resolve

ROOT = Path(__file__).parents[1]
LINEAR = "tests.workloads.tiny:linear"


def run_python(script: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs a script, with ``cwd`` nowhere on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def parameters(workload: Workload) -> int:
    return sum(parameter.numel() for parameter in workload.model.parameters())


@pytest.fixture(scope="module")
def gpt2_and_its_warnings() -> tuple[Workload, list[str]]:
    """GPT-2 after one forward pass, and what transformers logged until then."""
    handler = BufferingHandler(capacity=1_000)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        workload = build(WorkloadSpec(name="gpt2", sequence_length=8))
        workload.loss(workload.model, workload.batch(1))
    finally:
        logger.removeHandler(handler)
    return workload, [record.getMessage() for record in handler.buffer]


@pytest.fixture
def gpt2(gpt2_and_its_warnings: tuple[Workload, list[str]]) -> Workload:
    return gpt2_and_its_warnings[0]


class TestWorkload:
    def test_is_called_by_its_name_or_else_by_the_class_of_its_model(self) -> None:
        model = torch.nn.Linear(1, 1)
        assert Workload(model=model, batch=torch.ones, loss=torch.dist, name="mine").label == "mine"
        assert Workload(model=model, batch=torch.ones, loss=torch.dist).label == "Linear"

    def test_takes_a_model_and_not_its_class(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got the class Linear itself"):
            Workload(model=torch.nn.Linear, batch=torch.ones, loss=torch.dist)

    def test_refuses_a_batch_that_is_one_batch_and_not_a_function(self) -> None:
        with pytest.raises(TypeError, match=r"batch must be callable as batch\(size\), got dict"):
            Workload(model=torch.nn.Linear(1, 1), batch={"x": torch.ones(1)}, loss=torch.dist)

    def test_refuses_a_loss_that_is_a_number(self) -> None:
        with pytest.raises(TypeError, match=r"loss must be callable as loss\(model, batch\), got float"):
            Workload(model=torch.nn.Linear(1, 1), batch=torch.ones, loss=0.5)

    def test_refuses_a_model_with_nothing_to_train(self) -> None:
        frozen = torch.nn.Linear(3, 2).requires_grad_(False)
        with pytest.raises(
            ValueError, match="got Linear with 2 parameters, none of which requires a gradient"
        ):
            Workload(model=frozen, batch=torch.ones, loss=torch.dist)
        with pytest.raises(ValueError, match="got ReLU with 0 parameters"):
            Workload(model=torch.nn.ReLU(), batch=torch.ones, loss=torch.dist)


class TestGPT2:
    def test_has_the_published_size_and_trains(self, gpt2: Workload) -> None:
        assert parameters(gpt2) == 124_439_808
        assert gpt2.model.training
        assert gpt2.label == "gpt2"

    def test_batches_are_random_tokens_of_the_length_asked_for(self, gpt2: Workload) -> None:
        batch = gpt2.batch(3)
        assert batch["input_ids"].shape == (3, 8)
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert len(batch["input_ids"].unique()) > 20
        assert torch.equal(gpt2.batch(3)["input_ids"], batch["input_ids"])

    def test_knows_nothing_at_first(self, gpt2: Workload) -> None:
        loss = gpt2.loss(gpt2.model, gpt2.batch(4))
        assert loss.shape == ()
        assert loss.item() == pytest.approx(math.log(50_257), abs=0.5)

    def test_is_built_and_run_without_a_warning(
        self, gpt2_and_its_warnings: tuple[Workload, list[str]]
    ) -> None:
        assert gpt2_and_its_warnings[1] == []


class TestResNet50:
    def test_has_ten_classes_and_takes_images_of_cifar10s_size(self) -> None:
        workload = build(WorkloadSpec(name="resnet50"))
        batch = workload.batch(2)
        assert parameters(workload) == 23_528_522
        assert workload.model.training
        assert batch["images"].shape == (2, 3, 32, 32)
        assert batch["labels"].shape == (2,)
        assert workload.loss(workload.model, batch).isfinite()

    def test_says_why_one_small_image_is_too_few(self) -> None:
        workload = build(WorkloadSpec(name="resnet50"))
        with pytest.raises(ValueError, match="must be at least 2 for images of 32x32, got 1"):
            workload.batch(1)

    def test_takes_one_image_that_is_large_enough(self) -> None:
        workload = build(WorkloadSpec(name="resnet50", image_size=33))
        assert workload.loss(workload.model, workload.batch(1)).isfinite()


class TestBuild:
    def test_leaves_the_callers_random_state_alone(self) -> None:
        before = torch.get_rng_state()
        build(WorkloadSpec(name=LINEAR))
        with pytest.raises(WorkloadError):
            build(WorkloadSpec(name="tests.workloads.tiny:raises"))
        assert torch.equal(torch.get_rng_state(), before)

    def test_makes_the_same_weights_of_the_same_seed_only(self) -> None:
        zero, again, one = (build(WorkloadSpec(name=LINEAR), seed=seed).model.weight for seed in (0, 0, 1))
        assert torch.equal(zero, again)
        assert not torch.equal(zero, one)

    def test_finds_modules_in_the_current_directory_and_gives_each_process_the_same_weights(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "mine.py").write_text("from tests.workloads.tiny import linear\n")
        script = tmp_path / "elsewhere" / "script.py"
        script.parent.mkdir()
        script.write_text(
            "from profiler.registry import WorkloadSpec, build\n"
            "print(build(WorkloadSpec(name='mine:linear')).model.weight.tolist())\n"
        )
        done = run_python(script, tmp_path / "here")
        assert done.stderr == ""
        assert done.stdout == f"{build(WorkloadSpec(name=LINEAR)).model.weight.tolist()}\n"

    def test_needs_no_torch_before_something_is_built(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\n"
            "from profiler.registry import WorkloadSpec, resolve\n"
            "resolve(WorkloadSpec(name='gpt2'))\n"
            "print('torch' in sys.modules)\n"
        )
        assert run_python(script, tmp_path).stdout == "False\n"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "gpt3",
                "A workload must be gpt2, resnet50, or package.module:function, got 'gpt3'. "
                "Did you mean gpt2?",
            ),
            ("ResNet50", "got 'ResNet50'. Did you mean resnet50?"),
            ("", "A workload must be gpt2, resnet50, or package.module:function, got ''."),
            ("tests.workloads.tiny:", "got 'tests.workloads.tiny:'."),
            (
                "tests/workloads/tiny.py:linear",
                "Try tests.workloads.tiny:linear from the folder that tests lies in.",
            ),
            (
                "tests.workloads.absent:linear",
                "got tests.workloads.absent: No module named 'tests.workloads.absent'. Change directory",
            ),
            ("tests.workloads.tiny.more:linear", "'tests.workloads.tiny' is not a package"),
            (
                "tests.workloads.needs_more:linear",
                "Importing tests.workloads.needs_more raised ModuleNotFoundError: "
                "No module named 'a_module_that_nobody_has'.",
            ),
            (
                "tests.workloads.runs_at_once:linear",
                "Importing tests.workloads.runs_at_once raised SystemExit: usage: runs_at_once FILE.",
            ),
            (
                "tests.workloads.tiny:linea",
                "must be a function that returns a profiler.Workload, but there is no linea. Functions of "
                "tests.workloads.tiny: forgets_to_return, frozen, linear, raises, returns_a_model. "
                "Did you mean linear?",
            ),
            ("tests.workloads.tiny:SETTINGS", "but SETTINGS is a dict."),
            ("tests.workloads.tiny:raises", "tiny:raises() raised RuntimeError: no such file."),
            ("tests.workloads.tiny:frozen", "tiny:frozen() raised ValueError: model must have a parameter"),
            (
                "tests.workloads.tiny:forgets_to_return",
                "must return a profiler.Workload, got NoneType. Does it lack a return statement?",
            ),
            ("tests.workloads.tiny:returns_a_model", "must return a profiler.Workload, got Linear."),
        ],
    )
    def test_says_in_one_line_what_is_wrong_with_a_name(self, name: str, message: str) -> None:
        with pytest.raises(WorkloadError) as caught:
            build(WorkloadSpec(name=name))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_keeps_what_the_function_raised_as_the_cause(self) -> None:
        with pytest.raises(WorkloadError) as caught:
            build(WorkloadSpec(name="tests.workloads.tiny:raises"))
        assert isinstance(caught.value.__cause__, RuntimeError)


class TestWorkloadSpec:
    def test_is_resolved_by_filling_in_the_defaults(self) -> None:
        assert resolve(WorkloadSpec(name="gpt2")) == WorkloadSpec(name="gpt2", sequence_length=256)
        assert resolve(WorkloadSpec(name="resnet50")) == WorkloadSpec(name="resnet50", image_size=32)
        assert resolve(WorkloadSpec(name=LINEAR)) == WorkloadSpec(name=LINEAR)

    def test_keeps_the_sizes_that_are_given(self) -> None:
        given = WorkloadSpec(name="gpt2", sequence_length=1_024)
        assert resolve(given) == given

    def test_survives_being_written_and_read(self) -> None:
        spec = WorkloadSpec(name="resnet50", image_size=64)
        assert msgspec.json.decode(msgspec.json.encode(spec), type=WorkloadSpec) == spec

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (
                WorkloadSpec(name="resnet50", sequence_length=128),
                "resnet50 takes no sequence_length (--seq-len), got 128. Leave it out, or give --image-size.",
            ),
            (
                WorkloadSpec(name="gpt2", image_size=32),
                "gpt2 takes no image_size (--image-size), got 32. Leave it out, or give --seq-len.",
            ),
            (
                WorkloadSpec(name=LINEAR, sequence_length=128),
                f"{LINEAR} takes no sequence_length (--seq-len), got 128. "
                f"Leave it out; the function itself decides on its sizes.",
            ),
            (
                WorkloadSpec(name="gpt2", sequence_length=2_048),
                "sequence_length (--seq-len) of gpt2 must be from 2 to 1024, got 2048.",
            ),
            (
                WorkloadSpec(name="gpt2", sequence_length=1),
                "sequence_length (--seq-len) of gpt2 must be from 2 to 1024, got 1.",
            ),
        ],
    )
    def test_refuses_a_size_that_the_workload_has_no_use_for(self, spec: WorkloadSpec, message: str) -> None:
        with pytest.raises(WorkloadError) as caught:
            resolve(spec)
        assert str(caught.value) == message

    def test_refuses_a_size_below_one(self) -> None:
        with pytest.raises(ValueError, match=r"image_size \(--image-size\) must be at least 1, got 0\."):
            WorkloadSpec(name="resnet50", image_size=0)

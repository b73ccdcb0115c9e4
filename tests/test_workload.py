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
                "A workload must be gpt2, resnet50, transformers:NAME, torchvision:NAME, or "
                "package.module:function, got 'gpt3'. "
                "Did you mean gpt2?",
            ),
            ("ResNet50", "got 'ResNet50'. Did you mean resnet50?"),
            ("", "or package.module:function, got ''."),
            ("transformers:", "or package.module:function, got 'transformers:'."),
            (
                "transformers:brt",
                "such as bert, llama, t5 or vit, or a folder with a config.json, got 'brt'. Did you mean bert",
            ),
            ("transformers:./nowhere", "or a folder with a config.json, got './nowhere'."),
            ("transformers:siglip_text_model", "is no model by itself: transformers lists no class"),
            ("transformers:layoutlmv2", "layoutlmv2 cannot be built by transformers"),
            ("torchvision:resnet19", "got 'resnet19'. Did you mean resnet18"),
            (
                "torchvision:fasterrcnn_resnet50_fpn",
                "its loss needs boxes, a different number in every image",
            ),
            ("torchvision:quantized_resnet18", "it is for inference only"),
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


TINY_BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 40, "type_vocab_size": 2,
}  # fmt: skip


def folder(path: Path, **settings: object) -> str:
    """A folder with a configuration, by the name that a user types."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(msgspec.json.encode(TINY_BERT | settings).decode())
    return f"transformers:{path}"


class TestTransformers:
    def test_a_bare_type_is_built_with_the_head_that_it_is_made_for(self) -> None:
        """BERT's and BART's decoders alone are classes too, but nobody means them."""
        heads = {name: type(build(WorkloadSpec(name=f"transformers:{name}")).model).__name__ for name in
                 ("gpt2", "distilbert", "t5")}  # fmt: skip
        assert heads == {
            "gpt2": "GPT2LMHeadModel",
            "distilbert": "DistilBertForMaskedLM",
            "t5": "T5ForConditionalGeneration",
        }

    def test_a_folder_with_architectures_is_built_as_the_first_of_them_that_can_be_trained(
        self, tmp_path: Path
    ) -> None:
        for architecture, labels in {
            "BertLMHeadModel": (2, 40),
            "BertForSequenceClassification": (2,),
            "BertForTokenClassification": (2, 40),
        }.items():
            workload = build(WorkloadSpec(name=folder(tmp_path / "bert", architectures=[architecture])))
            assert type(workload.model).__name__ == architecture
            assert workload.batch(2)["labels"].shape == labels
            assert workload.loss(workload.model, workload.batch(2)).isfinite()
            assert workload.label == "bert"

    def test_an_architecture_without_a_loss_of_its_own_is_refused_with_those_that_there_are(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(
            WorkloadError, match=r"got BertForNextSentencePrediction\. Of this model type: .*Bert"
        ):
            build(WorkloadSpec(name=folder(tmp_path, architectures=["BertForNextSentencePrediction"])))

    def test_weights_are_fp32_whatever_the_configuration_was_saved_in(self, tmp_path: Path) -> None:
        workload = build(WorkloadSpec(name=folder(tmp_path, dtype="bfloat16")))
        assert {p.dtype for p in workload.model.parameters()} == {torch.float32}

    def test_sequences_are_as_long_as_asked_for_or_as_the_model_takes_up_to_256(self, tmp_path: Path) -> None:
        name = folder(tmp_path)
        assert build(WorkloadSpec(name=name)).batch(1)["input_ids"].shape == (1, 40)
        assert build(WorkloadSpec(name=name, sequence_length=7)).batch(1)["input_ids"].shape == (1, 7)
        with pytest.raises(WorkloadError, match=r"\(--seq-len\) of .* must be from 2 to 40, got 41\."):
            build(WorkloadSpec(name=name, sequence_length=41))
        with pytest.raises(
            WorkloadError, match=r"takes no image_size .*, got 8\. Leave it out, or give --seq-len"
        ):
            build(WorkloadSpec(name=name, image_size=8))

    def test_no_token_is_a_special_one(self, tmp_path: Path) -> None:
        workload = build(WorkloadSpec(name=folder(tmp_path, vocab_size=4, pad_token_id=1, eos_token_id=3)))
        assert set(workload.batch(50)["input_ids"].flatten().tolist()) == {0, 2}

    def test_images_have_the_size_that_was_asked_for_and_so_has_the_model(self) -> None:
        workload = build(WorkloadSpec(name="transformers:vit", image_size=32))
        assert workload.batch(2)["pixel_values"].shape == (2, 3, 32, 32)
        assert workload.loss(workload.model, workload.batch(2)).isfinite()
        with pytest.raises(WorkloadError, match="takes no sequence_length"):
            build(WorkloadSpec(name="transformers:vit", sequence_length=32))

    def test_what_no_memory_holds_is_refused_before_it_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(WorkloadError, match=r"must fit in this machine's memory, got \d+\.\d GiB"):
            build(WorkloadSpec(name=folder(tmp_path, num_hidden_layers=10, hidden_size=2**18)))

    def test_a_broken_configuration_is_refused_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(WorkloadError, match="must be a configuration of a model type") as caught:
            build(WorkloadSpec(name=folder(tmp_path, model_type="mine")))
        assert "\n" not in str(caught.value)


class TestTorchvision:
    def test_classifiers_take_the_images_that_their_published_weights_take(self) -> None:
        workload = build(WorkloadSpec(name="torchvision:squeezenet1_1"))
        assert workload.batch(2)["images"].shape == (2, 3, 224, 224)
        assert workload.label == "squeezenet1_1"

    def test_a_network_with_a_fixed_size_of_image_is_built_for_the_one_asked_for(self) -> None:
        workload = build(WorkloadSpec(name="torchvision:vit_b_32", image_size=64))
        assert workload.loss(workload.model, workload.batch(2)).isfinite()

    def test_auxiliary_classifiers_weigh_three_tenths(self) -> None:
        """Three outputs with equal scores over 1000 classes: (1 + 0.3 + 0.3) ln 1000."""
        workload = build(WorkloadSpec(name="torchvision:googlenet", image_size=64))

        class Constant(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(torch.zeros(len(x), 1000) for _ in range(3))

        loss = workload.loss(Constant(), workload.batch(2)).item()
        assert loss == pytest.approx(1.6 * math.log(1_000))
        assert len(workload.model(torch.randn(2, 3, 64, 64))) == 3

    def test_segmentation_has_a_label_for_every_pixel(self) -> None:
        workload = build(WorkloadSpec(name="torchvision:lraspp_mobilenet_v3_large", image_size=64))
        batch = workload.batch(2)
        assert batch["labels"].shape == (2, 64, 64)
        assert workload.loss(workload.model, batch).isfinite()

    def test_no_text_is_read(self) -> None:
        with pytest.raises(
            WorkloadError, match=r"takes no sequence_length .*, got 8\. Leave it out, or give --image"
        ):
            build(WorkloadSpec(name="torchvision:vgg11", sequence_length=8))


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

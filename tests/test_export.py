"""Plans in other engines: what is written, what is said, and that each engine really trains with it.

The four engines run at once, each in a process of its own, on two CPU cores in about half a minute.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planner
from planner.cli import main
from planner.export import EXPORTERS, VERSIONS, Export, Target, deepspeed_config
from planner.plan import Plan, Segment, Stage
from planner.zero import BUCKET_ELEMENTS
from profiler.profile_record import OPTIMIZERS, PRECISIONS, DeviceRecord
from profiler.workload_spec import WorkloadSpec
from tests import plans

ROOT = Path(__file__).parent.parent
TITAN_FIELDS = ROOT / "tests" / "data" / "torchtitan-0.3.0.fields.json"
GPT2 = WorkloadSpec(name="gpt2", sequence_length=256)


def segment(first: str, last: str, leave: str, **changes: Any) -> Segment:
    return Segment(first=first, last=last, enter=first, leave=leave, **changes)


def plan(**changes: Any) -> Plan:
    """Micro-batch 2, 4 accumulation steps, fp32, on a CPU; of four blocks, one alone and two together run again."""
    checkpoint = (segment("h.0", "h.0", "h.1"), segment("h.1", "h.2", "h.3"))
    made = {"optimizer": "adamw", "checkpoint": checkpoint} | changes
    return msgspec.structs.replace(plans.plan(), **made)


def sharded(zero_stage: int, **changes: Any) -> Plan:
    """The same in two processes."""
    return plan(zero_stage=zero_stage, world_size=2, gradient_accumulation_steps=2, **changes)


def blocks(count: int = 3) -> tuple[Stage, ...]:
    """Stages as a transformer's: an embedding, blocks of two stages, a norm and a head."""
    halves = [f"model.layers.{i}.{half}" for i in range(count) for half in ("attention", "mlp")]
    return tuple(
        Stage(name=name, parameter_count=1, forward_seconds=1, backward_seconds=2, kept_bytes=1)
        for name in ("model.embedding", *halves, "model.norm", "head")
    )


def every_block(count: int = 3, **changes: Any) -> tuple[Segment, ...]:
    return tuple(
        Segment(
            first=f"model.layers.{i}.attention",
            last=f"model.layers.{i}.mlp",
            enter=f"model.layers.{i}",
            leave=f"model.layers.{i + 1}" if i + 1 < count else "model.norm",
            **changes,
        )
        for i in range(count)
    )


def exported(target: Target, of: Plan) -> Export:
    return EXPORTERS[target](of)


def varied() -> Iterator[Plan]:
    """Every precision, optimizer and stage of ZeRO that an exporter may meet, in two processes."""
    for precision, optimizer, zero_stage in itertools.product(PRECISIONS, OPTIMIZERS, range(4)):
        yield sharded(zero_stage, precision=precision, optimizer=optimizer)


# What is written


def test_deepspeed_is_given_the_batch_of_all_processes_and_the_buckets_that_memory_was_predicted_for() -> (
    None
):
    config = exported("deepspeed", sharded(2)).configuration
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 8
    assert config["zero_optimization"]["reduce_bucket_size"] == BUCKET_ELEMENTS
    assert "activation_checkpointing" not in config


@pytest.mark.parametrize("zero_stage", range(4))
def test_the_executor_runs_the_very_configuration_that_is_exported(zero_stage: int) -> None:
    """But for the optimizer, which the executor makes itself and DeepSpeed makes of its section."""
    run = deepspeed_config(
        zero_stage=zero_stage, world_size=2, micro_batch_size=2, gradient_accumulation_steps=2
    )
    config = exported("deepspeed", sharded(zero_stage)).configuration
    assert {name: value for name, value in config.items() if name != "optimizer"} == run
    within = exported("transformers", sharded(zero_stage)).configuration.get("deepspeed")
    assert within == (run if zero_stage else None)


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage must be 0, 1, 2 or 3, got 4"):
        deepspeed_config(zero_stage=4, world_size=2, micro_batch_size=1, gradient_accumulation_steps=1)


@pytest.mark.parametrize(
    ("precision", "transformers", "lightning", "accelerate"),
    [("fp32", (False, False), "32-true", "no"), ("bf16", (True, False), "bf16-mixed", "bf16"),
     ("fp16", (False, True), "16-mixed", "fp16")],
)  # fmt: skip
def test_each_engine_is_told_the_precision_in_its_own_words(
    precision: str, transformers: tuple[bool, bool], lightning: str, accelerate: str
) -> None:
    made = plan(precision=precision)
    arguments = exported("transformers", made).configuration
    assert (arguments["bf16"], arguments["fp16"]) == transformers
    assert exported("lightning", made).configuration["precision"] == lightning
    assert exported("accelerate", made).configuration["mixed_precision"] == accelerate
    config = exported("deepspeed", made).configuration
    sections = {"fp32": [], "bf16": ["torch_autocast"], "fp16": ["fp16"]}
    assert [name for name in ("torch_autocast", "bf16", "fp16") if name in config] == sections[precision]
    dealt_out = msgspec.structs.replace(sharded(2), precision=precision)
    within = exported("transformers", dealt_out).configuration["deepspeed"]
    assert [name for name in ("torch_autocast", "bf16", "fp16") if name in within] == (
        [] if precision == "fp32" else [precision]
    )


def test_the_file_of_accelerate_has_deepspeed_keys_or_its_file_and_never_both() -> None:
    assert set(exported("accelerate", sharded(2)).configuration["deepspeed_config"]) == {
        "zero_stage", "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag",
    }  # fmt: skip


def test_processes_become_each_engines_own_kind_of_parallelism() -> None:
    assert exported("lightning", plan()).configuration["strategy"] == "auto"
    assert exported("lightning", sharded(0)).configuration["strategy"] == "ddp"
    assert exported("lightning", sharded(2)).configuration["strategy"] == "deepspeed_stage_2"
    assert exported("transformers", sharded(0)).configuration["ddp_bucket_cap_mb"] == 25
    degrees = {
        stage: list(exported("torchtitan", sharded(stage)).configuration["parallelism"].values())
        for stage in range(4)
    }
    assert degrees == {0: [2, 1, "default"], 1: [1, 2, "never"], 2: [1, 2, "never"], 3: [1, 2, "default"]}


def test_a_plan_for_a_gpu_asks_for_one() -> None:
    made = plan(device=DeviceRecord(kind="cuda", name="NVIDIA H200", memory_bytes=2**37))
    assert exported("lightning", made).configuration["accelerator"] == "gpu"
    assert exported("accelerate", made).configuration["use_cpu"] is False
    assert exported("transformers", made).configuration["use_cpu"] is False
    assert not any("DS_ACCELERATOR" in note for note in exported("accelerate", made).notes)


@pytest.mark.parametrize("made", list(varied()), ids=lambda p: f"{p.precision}-{p.optimizer}-{p.zero_stage}")
def test_torchtitan_is_told_only_what_its_dataclasses_hold(made: Plan) -> None:
    """By the list of fields of version 0.3.0, with the values that they may have."""
    fields = json.loads(TITAN_FIELDS.read_text())
    assert fields["version"] == VERSIONS["torchtitan"]
    for section, settings in exported("torchtitan", made).configuration.items():
        assert section in fields["config"]
        if section == "activation_checkpoint":
            continue
        for name, value in settings.items():
            kind = fields[section][name]
            assert value in kind if isinstance(kind, list) else type(value).__name__ in kind


# What is said


@pytest.mark.parametrize("target", EXPORTERS)
def test_segments_that_an_engine_cannot_express_are_counted_with_the_way_out(target: Target) -> None:
    checkpoint = (
        segment("h.0", "h.2", "h.3"),
        segment("h.1", "h.1", "h.2", depth=1),
        segment("h.3", "h.3", "head", mode="selective"),
    )
    *_, note = exported(target, plan(checkpoint=checkpoint)).notes
    assert "3 recomputed segments (1 inside others, 1 selective)" in note
    assert "plan = planner.load_plan(FILE); executor.apply_checkpoints(model, plan)" in note
    assert not any("apply_checkpoints" in each for each in exported(target, plan(checkpoint=())).notes)


@pytest.mark.parametrize("target", EXPORTERS)
def test_the_loss_in_chunks_is_said_where_it_is_not_set(target: Target) -> None:
    found = exported(target, plan(checkpoint=(), loss_chunks=4))
    if target == "torchtitan":
        assert found.configuration["loss"] == {"num_chunks": 4}
        assert "ChunkedLossWrapper.Config(loss_fn=config.loss, num_chunks=4)" in found.text
    else:
        assert any("the loss in 4 chunks" in note and "apply_checkpoints" in note for note in found.notes)


@pytest.mark.parametrize(
    ("target", "made", "words"),
    [
        ("deepspeed", plan(precision="fp16"), "predicted for fp32 weights under autocast"),
        ("deepspeed", plan(precision="bf16"), "a loss that is computed outside of it runs in fp32"),
        ("transformers", msgspec.structs.replace(sharded(1), precision="bf16"), "under autocast"),
        ("deepspeed", sharded(0), "buckets of 500 million elements"),
        ("transformers", sharded(1), "torchrun --nproc-per-node 2"),
        ("transformers", plan(optimizer="adafactor"), "transformers' own Adafactor"),
        ("transformers", plan(optimizer="adamw-foreach"), "here adamw-loop; the plan has adamw-foreach"),
        ("accelerate", plan(), "batch_size=2. With 4 accumulation steps and 1 process"),
        ("accelerate", sharded(2), "deepspeed_config_file"),
        ("lightning", plan(), "batch_size=2. With 4 accumulation steps and 1 process"),
        ("lightning", sharded(2), "CUDA only, and the plan is for a CPU"),
        ("lightning", sharded(2), f"reduce_bucket_size={BUCKET_ELEMENTS}"),
        ("torchtitan", plan(precision="fp16"), "no fp16: bfloat16 is written"),
        ("torchtitan", plan(optimizer="sgd"), "not the plan's optimizer, sgd"),
        ("torchtitan", sharded(1), "ZeRO stage 1 is not to be had"),
    ],
)
def test_what_else_differs_is_said(target: Target, made: Plan, words: str) -> None:
    assert any(words in note for note in exported(target, made).notes)


@pytest.mark.parametrize("target", EXPORTERS)
def test_a_plain_plan_in_fp32_for_one_gpu_says_nothing_of_precision_or_processes(
    target: Target,
) -> None:
    gpu = DeviceRecord(kind="cuda", name="NVIDIA H200", memory_bytes=2**37)
    notes = " ".join(exported(target, plan(device=gpu, checkpoint=())).notes)
    assert not any(word in notes for word in ("autocast", "bucket", "torchrun", "ZeRO", "configuration:"))


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({}, True),
        ({"checkpoint": every_block()[:2]}, False),
        ({"checkpoint": (segment("model.embedding", "model.embedding", "model.layers.0"), *every_block())}, False),
        ({"checkpoint": every_block(mode="selective")}, False),
        ({"checkpoint": (msgspec.structs.replace(every_block()[0], enter="x"), *every_block()[1:])}, False),
        ({"checkpoint": (segment("model.layers.0.attention", "model.layers.1.mlp", "model.layers.2"),)}, False),
        ({"stages": None}, False),
        ({"loss_chunks": 2}, False),
        ({"workload": None}, False),
        ({"workload": WorkloadSpec(name="torchvision:vgg11")}, False),
        ({"workload": WorkloadSpec(name="transformers:llama")}, True),
    ],
)  # fmt: skip
def test_transformers_recomputes_by_itself_only_where_the_plan_is_exactly_every_block(
    changes: dict[str, Any], every: bool
) -> None:
    made = plan(**{"workload": GPT2, "stages": blocks(), "checkpoint": every_block()} | changes)
    found = exported("transformers", made)
    assert found.configuration.get("activation_checkpointing", False) is every
    assert any("do not apply_checkpoints as well" in note for note in found.notes) is every
    assert any("Not in the configuration" in note for note in found.notes) is not every


@pytest.mark.parametrize("name", ["model.layers.0#1", "model.layers.0.layer.1"])
def test_blocks_that_are_called_twice_or_have_two_numbers_are_not_taken_for_an_engines(name: str) -> None:
    stages = (*blocks(), msgspec.structs.replace(blocks()[0], name=name))
    found = exported("transformers", plan(workload=GPT2, stages=stages, checkpoint=every_block()))
    assert "activation_checkpointing" not in found.configuration


def test_torchtitan_recomputes_its_layers_where_the_plan_is_every_one_of_them() -> None:
    stages = tuple(msgspec.structs.replace(s, name=s.name.removeprefix("model.")) for s in blocks())
    checkpoint = tuple(
        msgspec.structs.replace(
            s, **{name: getattr(s, name).removeprefix("model.") for name in ("first", "last", "enter", "leave")}
        )
        for s in every_block()
    )  # fmt: skip
    found = exported("torchtitan", plan(stages=stages, checkpoint=checkpoint))
    assert found.configuration["activation_checkpoint"] == "FullAC"
    assert "config.activation_checkpoint = FullAC.Config()" in found.text
    assert not found.notes
    part = exported("torchtitan", plan(stages=stages, checkpoint=checkpoint[1:]))
    assert part.configuration["activation_checkpoint"] is None


# In Python, and on the command line


def test_a_plan_gives_each_configuration_and_warns_of_what_it_leaves_out() -> None:
    made = plan()
    given = {
        "deepspeed": made.to_deepspeed, "transformers": made.to_training_arguments,
        "accelerate": made.to_accelerate, "lightning": made.to_lightning, "torchtitan": made.to_torchtitan,
    }  # fmt: skip
    for target, method in given.items():
        with pytest.warns(planner.NotExpressed) as said:
            assert method() == exported(target, made).configuration  # type: ignore[arg-type]
        assert tuple(str(each.message) for each in said) == exported(target, made).notes  # type: ignore[arg-type]
        assert {each.filename for each in said} == {__file__}


@pytest.mark.parametrize("target", EXPORTERS)
def test_the_command_writes_the_file_and_says_the_rest_on_stderr(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = exported(target, plan())
    path = plan().save(tmp_path / "p.plan.json")
    assert main(["export", str(path), "--to", target]) == 0
    out, err = capsys.readouterr()
    assert out == made.text
    assert all(f"note: {note}\n" in err for note in made.notes)

    assert main(["export", str(path), "--to", target, "-o", str(tmp_path / "file"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "file").read_text() == made.text
    assert json.loads(out) == {
        "target": target, "target_version": VERSIONS[target], "configuration": made.configuration,
        "notes": list(made.notes),
    }  # fmt: skip
    assert err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json", "--to", "lightning"], "nowhere.json is not a plan: there is no such file"),
        (["{plan}"], "the following arguments are required: --to"),
        (["{plan}", "--to", "megatron"], "must be one of deepspeed, transformers, accelerate, lightning, torchtitan"),
        (["{plan}", "--to", "lightning", "-o", "no/such/file"], "must lie in a folder that is there"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_in_a_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(plan().save(tmp_path / "p.plan.json"))
    try:
        code = main(["export", *(path if word == "{plan}" else word for word in words)])
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_exporting_imports_no_torch(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "p.plan.json")
    code = (
        "import sys; from planner.cli import main; from planner.export import EXPORTERS\n"
        f"assert not any(main(['export', {str(path)!r}, '--to', each]) for each in EXPORTERS)\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# In the engines


@dataclass(frozen=True, kw_only=True)
class Running:
    process: subprocess.Popen[bytes]
    result: Path

    def said(self) -> dict[str, Any]:
        code = self.process.wait()
        assert code == 0, self.result.with_suffix(".log").read_text()[-3000:]
        found: dict[str, Any] = json.loads(self.result.read_text())
        return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """All of them, started at once, each with the file that the command wrote."""
    folder = tmp_path_factory.mktemp("engines")
    started = {
        target: _start(folder, target) for target in ("deepspeed", "accelerate", "transformers", "lightning")
    }
    yield started  # type: ignore[misc]
    for running in started.values():
        running.process.terminate()  # Launchers pass it on to their workers, which would wait for them otherwise.
        running.process.wait(timeout=60)


def _start(folder: Path, target: Target) -> Running:
    made = sharded(2) if target == "deepspeed" else plan()
    path = made.save(folder / f"{target}.plan.json")
    written = folder / f"{target}.{'yaml' if target == 'accelerate' else 'json'}"
    assert main(["export", str(path), "--to", target, "-o", str(written)]) == 0
    result, others = folder / f"{target}.result", folder / f"{target}.others"
    others.write_text(json.dumps(_others(target)))
    script = ROOT / "tests" / "engines" / f"with_{target}.py"
    python, words = [sys.executable], [path, written, result, others]
    if target == "deepspeed":
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if target == "accelerate":
        python += ["-m", "accelerate.commands.launch", "--config_file", str(written)]
        words = [path, result]
    surroundings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with result.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*python, script, *words], cwd=folder, env=os.environ | surroundings, stdout=log, stderr=log
        )
    return Running(process=process, result=result)


def _others(target: Target) -> list[dict[str, Any]]:
    """Configurations that are only read: all of DeepSpeed's, those of transformers that one process can read."""
    if target == "deepspeed":
        return [exported("deepspeed", made).configuration for made in varied()]
    every = plan(workload=GPT2, stages=blocks(), checkpoint=every_block())
    optimizers = [plan(precision=p, optimizer=o) for p, o in itertools.product(("fp32", "bf16"), OPTIMIZERS)]
    return [exported("transformers", made).configuration for made in (every, sharded(0), *optimizers)]


RECOMPUTED = {"equal": True, "calls": [[8, 8, 8, 8], [16, 16, 16, 8]]}
"""Weights to the bit as without; of eight micro-batches, three blocks run forward twice and the last one once."""


def test_accelerate_launches_with_the_accumulation_and_the_global_batch(engines: dict[str, Running]) -> None:
    assert engines["accelerate"].said() == {
        "accumulation": 4, "effective_batch": 8, "steps": 2, "updates": 2, "samples": 16,
    } | RECOMPUTED  # fmt: skip


def test_the_trainer_of_transformers_takes_two_steps_of_the_global_batch(engines: dict[str, Running]) -> None:
    """And its TrainingArguments take the other configurations, every block and several processes included."""
    assert engines["transformers"].said() == {"effective_batch": 8, "steps": 2, "samples": 16} | RECOMPUTED


def test_the_trainer_of_lightning_takes_two_steps_of_the_global_batch(engines: dict[str, Running]) -> None:
    assert engines["lightning"].said() == {"accumulation": 4, "steps": 2, "samples": 16} | RECOMPUTED


def test_deepspeed_trains_with_the_global_batch_in_two_processes(engines: dict[str, Running]) -> None:
    """A plan of 2 x 2 accumulation steps x 2 processes, ZeRO stage 2: each process has half of the samples."""
    assert engines["deepspeed"].said() == {
        "effective_batch": 8, "steps": 2, "engine_samples": 16, "zero_stage": 2, "samples": 8,
        "equal": True, "calls": [[4, 4, 4, 4], [8, 8, 8, 4]],
    }  # fmt: skip


def test_deepspeeds_own_parser_reads_every_value_that_is_written(engines: dict[str, Running]) -> None:
    """It takes an unknown name for no name at all, so each value is asked for after parsing."""
    engines["deepspeed"].said()
    parsed = json.loads(engines["deepspeed"].result.with_suffix(".parsed").read_text())
    for written, read in zip(_others("deepspeed"), parsed, strict=True):
        assert set(written) <= set(read)
        for name, value in written.items():
            if name == "zero_optimization":
                assert read[name] == {key: int(each) for key, each in value.items()}
            elif name == "optimizer":
                assert (read[name]["type"].lower(), read[name]["params"]) == (
                    value["type"].lower(),
                    value["params"],
                )
            else:
                assert read[name] == value
        assert (read["torch_autocast"]["enabled"], read["fp16"]["enabled"]) == (
            "torch_autocast" in written,
            "fp16" in written,
        )
        assert not read["bf16"]["enabled"]


TITAN = """
import sys, importlib.util
from torchtitan.models.llama3.config_registry import llama3_debugmodel
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("planned", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.with_plan(llama3_debugmodel())
    config.__post_init__()
    training = config.training
    degrees = config.parallelism.data_parallel_replicate_degree * config.parallelism.data_parallel_shard_degree
    print(training.global_batch_size // (training.local_batch_size * degrees), type(config.loss).__qualname__)
"""


TITAN_FOLDER = os.environ.get("TORCHTITAN_FOLDER")
"""Where tests/torchtitan.txt is installed: beside the other packages, since it asks for an older datasets."""


@pytest.mark.skipif(
    not TITAN_FOLDER and importlib.util.find_spec("torchtitan") is None and os.environ.get("CI") != "true",
    reason="needs torchtitan 0.3.0: see TORCHTITAN_FOLDER in .ci/run",
)
def test_the_dataclasses_of_torchtitan_take_the_module(tmp_path: Path) -> None:
    """Where it is installed; elsewhere the list of its fields must do."""
    written = []
    for index, made in enumerate((plan(), sharded(2), sharded(3), plan(checkpoint=(), loss_chunks=4))):
        written.append(tmp_path / f"planned_{index}.py")
        written[-1].write_text(exported("torchtitan", made).text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TITAN, *map(str, written)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TITAN_FOLDER or "", str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plainly = "CrossEntropyLoss.Config"
    assert done.stdout.splitlines() == [
        f"4 {plainly}", f"2 {plainly}", f"2 {plainly}", "4 ChunkedLossWrapper.Config"
    ]  # fmt: skip

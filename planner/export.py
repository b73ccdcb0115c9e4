"""A plan for other engines: what each takes of it, and what none of its settings can say.

    Plan ──▶ Export: configuration (data), notes ──▶ a file of the engine's own kind

Every exporter is a function of the plan alone. All engines accumulate gradients; what differs:

    engine        micro-batch    recomputation                 ZeRO            precision
    deepspeed     yes            none                          1, 2, 3         autocast; fp16 with weights cast
    transformers  yes            every block, or none          by DeepSpeed    autocast; with ZeRO weights cast
    accelerate    DataLoader's   none                          by DeepSpeed    weights cast, fp32 masters
    lightning     DataLoader's   none                          by DeepSpeed    autocast; with ZeRO weights cast
    torchtitan    yes            every block, loss in chunks   3; the nearest  autocast; no fp16

Segments from one module call to another, nested and selective ones no engine has a setting for. They are put on
the model itself, which works inside all of them:

    plan = planner.load_plan("gpt2.plan.json")
    executor.apply_checkpoints(model, plan)

DeepSpeed's own ``activation_checkpointing`` section wraps no layer (it configures a function that a model may call), so
nothing is written there.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from planner.zero import (
    BUCKET_ELEMENTS,
    FP32_BYTES,
    MAX_GRADIENT_NORM,
    PERSISTENCE_ELEMENTS,
    PREFETCH_ELEMENTS,
    REUSE_ELEMENTS,
    check,
)
from profiler.profile_record import Precision
from profiler.records import Record
from profiler.workload_spec import library_model

if TYPE_CHECKING:
    from planner.plan import Plan

Target = Literal["deepspeed", "transformers", "accelerate", "lightning", "torchtitan"]

VERSIONS: dict[Target, str] = {
    "deepspeed": "0.19",
    "transformers": "5.24",
    "accelerate": "1.15",
    "lightning": "2.6",
    "torchtitan": "0.3.0",
}
"""The versions whose settings these are."""

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.999)
MOMENTUM = 0.9
"""What ``profiler.step.build_optimizer`` trains with where nobody says otherwise."""

Json = dict[str, Any]


class NotExpressed(UserWarning):
    """Something of a plan that the engine's configuration cannot say."""


class Export(Record):
    """A plan as an engine takes it. ``notes``: what the configuration leaves out or changes, and the way out."""

    target: Target
    target_version: str
    configuration: Json
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The file: YAML for Accelerate, a Python module for torchtitan, JSON for the others."""
        if self.target == "accelerate":
            return _yaml(self.configuration)
        if self.target == "torchtitan":
            return _torchtitan_module(self.configuration)
        return json.dumps(self.configuration, indent=2) + "\n"

    def said(self) -> Json:
        """The configuration, after a warning for every note."""
        for note in self.notes:
            warnings.warn(note, NotExpressed, stacklevel=3)
        return self.configuration


def deepspeed_config(
    *,
    zero_stage: int,
    world_size: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    precision: Precision = "fp32",
) -> Json:
    """The DeepSpeed configuration that plans with several processes are predicted for and run with.

    The optimizer is not in it: it is the executor's own (``profiler.step``), handed to DeepSpeed, or an engine's.
    bf16 is autocast's, with weights, gradients and their sums in fp32: else DeepSpeed would switch autocast off inside
    of the model, and, left to its default, sum the gradients of linear layers in bf16.
    """
    check(zero_stage, world_size)
    config: Json = {
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": MAX_GRADIENT_NORM,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "contiguous_gradients": False,
            "overlap_comm": False,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_max_reuse_distance": REUSE_ELEMENTS,
            "stage3_max_live_parameters": REUSE_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENCE_ELEMENTS,
        },
    }
    if precision == "bf16":
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return config


def to_deepspeed(plan: Plan) -> Export:
    """``deepspeed.initialize(model=model, model_parameters=model.parameters(), config=...)``."""
    configuration = _engine(plan) | {"optimizer": _deepspeed_optimizer(plan.optimizer)}
    return _export(
        "deepspeed",
        configuration,
        f"A plan has no learning rate: optimizer.params.lr is {LEARNING_RATE:g}, where planner train begins. "
        "Set yours.",
        _on_cpu(plan),
        _low_precision(plan) if plan.precision == "fp16" else None,
        "Autocast is for the model's own forward pass; a loss that is computed outside of it runs in fp32."
        if plan.precision == "bf16"
        else None,
        _unsharded_buckets(plan),
        _placement(plan, "before deepspeed.initialize"),
    )


def to_transformers(plan: Plan) -> Export:
    """Keyword arguments: ``TrainingArguments(output_dir=..., **configuration)``."""
    optim, optimizer_note = _transformers_optimizer(plan)
    configuration: Json = {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_grad_norm": MAX_GRADIENT_NORM,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "use_cpu": plan.device.kind == "cpu",
        **optim,
    }
    placement = _placement(plan, "before the Trainer is made")
    if _is_of_transformers(plan) and _recomputes_every_block(plan) and plan.loss_chunks is None:
        configuration["activation_checkpointing"] = True
        configuration["activation_checkpointing_kwargs"] = {"use_reentrant": False}
        placement = (
            "activation_checkpointing recomputes every block, which is the plan's placement: "
            "do not apply_checkpoints as well."
        )
    if plan.zero_stage:
        configuration["deepspeed"] = _casting(_engine(plan))
    elif plan.world_size > 1:
        configuration["ddp_bucket_cap_mb"] = BUCKET_ELEMENTS * FP32_BYTES // 2**20
    return _export(
        "transformers",
        configuration,
        _processes(plan, "torchrun --nproc-per-node {}"),
        optimizer_note,
        _on_cpu(plan) if plan.zero_stage else None,
        _low_precision(plan) if plan.zero_stage else None,
        placement,
    )


def to_accelerate(plan: Plan) -> Export:
    """A file for ``accelerate launch --config_file``.

    Accelerate's file has accumulation, clipping and ZeRO under DeepSpeed only, so DeepSpeed is what it asks for.
    """
    configuration: Json = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": plan.world_size,
        "mixed_precision": "no" if plan.precision == "fp32" else plan.precision,
        "use_cpu": plan.device.kind == "cpu",
        "deepspeed_config": {
            "zero_stage": plan.zero_stage,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "gradient_clipping": MAX_GRADIENT_NORM,
            "zero3_init_flag": False,
        },
    }
    buckets = (
        f"The bucket size that memory was predicted for, {BUCKET_ELEMENTS} elements, is no key of this file. "
        "Export --to deepspeed, take its optimizer section out, and let deepspeed_config hold nothing but "
        "deepspeed_config_file and zero3_init_flag; leave mixed_precision out then."
    )
    return _export(
        "accelerate",
        configuration,
        _data_loader(plan),
        _on_cpu(plan),
        _low_precision(plan),
        buckets if plan.zero_stage else _unsharded_buckets(plan),
        _placement(plan, "before accelerator.prepare"),
    )


def to_lightning(plan: Plan) -> Export:
    """Keyword arguments: ``Trainer(**configuration)``."""
    precisions = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    strategy = "auto" if plan.world_size == 1 else "ddp"
    notes = [_data_loader(plan)]
    if plan.zero_stage:
        strategy = f"deepspeed_stage_{plan.zero_stage}"
        notes.append(
            f"{strategy} has buckets of Lightning's own size. As memory was predicted it is "
            f"strategy=DeepSpeedStrategy(stage={plan.zero_stage}, reduce_bucket_size={BUCKET_ELEMENTS}, "
            f"allgather_bucket_size={BUCKET_ELEMENTS}, contiguous_gradients=False, overlap_comm=False)."
        )
        if plan.device.kind == "cpu":
            notes.append("Lightning runs DeepSpeed on CUDA only, and the plan is for a CPU.")
    return _export(
        "lightning",
        {
            "accelerator": "cpu" if plan.device.kind == "cpu" else "gpu",
            "devices": plan.world_size,
            "strategy": strategy,
            "precision": precisions[plan.precision],
            "accumulate_grad_batches": plan.gradient_accumulation_steps,
            "gradient_clip_val": MAX_GRADIENT_NORM,
            "gradient_clip_algorithm": "norm",
        },
        *notes,
        _low_precision(plan) if plan.zero_stage else None,
        f"The optimizer is what configure_optimizers returns; the plan's is {plan.optimizer}.",
        _placement(
            plan,
            "before trainer.fit, without the LightningModule around it",
        ),
    )


def to_torchtitan(plan: Plan) -> Export:
    """Fields of ``torchtitan.trainer.Trainer.Config`` by section.

    torchtitan 0.3 reads no file: a configuration is a function of a Python module. The one that is written takes a
    configuration that says the rest (model, data, learning rate) and sets the plan's fields. Besides those,
    ``activation_checkpoint`` is FullAC or None, and ``loss`` says in how many chunks it runs.
    """
    notes = [_processes(plan, "torchrun --nproc-per-node {}")]
    sharded = plan.zero_stage > 0
    if plan.zero_stage in (1, 2):
        notes.append(
            f"ZeRO stage {plan.zero_stage} is not to be had: the nearest is written, FSDP that keeps gathered "
            "parameters from forward to backward. Its memory is not what was predicted."
        )
    if plan.precision == "fp16":
        notes.append("torchtitan has no fp16: bfloat16 is written in its place.")
    implementation = {"adamw": "fused", "adamw-foreach": "foreach", "adamw-loop": "for-loop"}.get(
        plan.optimizer
    )
    if implementation is None:
        notes.append(f"torchtitan has Adam and AdamW, and not the plan's optimizer, {plan.optimizer}.")
    full = _recomputes_every_block(plan) and all(s.first.startswith("layers.") for s in plan.checkpoint)
    training = {
        "local_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
        "max_norm": MAX_GRADIENT_NORM,
        "dtype": "float32",
        "mixed_precision_param": "float32" if plan.precision == "fp32" else "bfloat16",
    }
    if plan.workload is not None and plan.workload.sequence_length is not None:
        training["seq_len"] = plan.workload.sequence_length
    configuration: Json = {
        "training": training,
        "parallelism": {
            "data_parallel_replicate_degree": 1 if sharded else plan.world_size,
            "data_parallel_shard_degree": plan.world_size if sharded else 1,
            "fsdp_reshard_after_forward": "never" if plan.zero_stage in (1, 2) else "default",
        },
        "optimizer": {} if implementation is None else {"implementation": implementation},
        "activation_checkpoint": "FullAC" if full else None,
        "loss": {"num_chunks": plan.loss_chunks or 1},
    }
    return _export(
        "torchtitan",
        configuration,
        *notes,
        None
        if full
        else _placement(plan, "before trainer.train, where it is trainer.model_parts[0]", chunks_too=False),
    )


EXPORTERS: dict[Target, Callable[[Plan], Export]] = {
    "deepspeed": to_deepspeed,
    "transformers": to_transformers,
    "accelerate": to_accelerate,
    "lightning": to_lightning,
    "torchtitan": to_torchtitan,
}


def _export(target: Target, configuration: Json, *notes: str | None) -> Export:
    return Export(
        target=target,
        target_version=VERSIONS[target],
        configuration=configuration,
        notes=tuple(note for note in notes if note is not None),
    )


def _engine(plan: Plan) -> Json:
    """DeepSpeed's configuration for a plan, without an optimizer."""
    return deepspeed_config(
        zero_stage=plan.zero_stage,
        world_size=plan.world_size,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        precision=plan.precision,
    )


def _casting(configuration: Json) -> Json:
    """With DeepSpeed's own bf16 in place of autocast, as transformers wants it."""
    cast = {"bf16": {"enabled": True}} if "torch_autocast" in configuration else {}
    return {name: value for name, value in configuration.items() if name != "torch_autocast"} | cast


def _deepspeed_optimizer(optimizer: str) -> Json:
    """torch's own implementations, as the plan was predicted with; DeepSpeed's would be compiled first."""
    common: Json = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    if optimizer == "sgd":
        return {"type": "SGD", "params": common | {"momentum": MOMENTUM, "fused": True}}
    if optimizer == "adafactor":
        return {"type": "Adafactor", "params": common}
    implementation = {"adamw": {"fused": True}, "adamw-foreach": {"foreach": True}}
    chosen = implementation.get(optimizer, {"foreach": False})
    return {"type": "AdamW", "params": common | {"betas": list(BETAS), "torch_adam": True} | chosen}


def _transformers_optimizer(plan: Plan) -> tuple[Json, str | None]:
    """``optim`` and its arguments, and what is different about it."""
    if plan.optimizer == "adamw":
        return {"optim": "adamw_torch_fused"}, None
    if plan.optimizer == "sgd":
        return {"optim": "sgd", "optim_args": f"momentum={MOMENTUM}"}, None
    if plan.optimizer == "adafactor":
        return {
            "optim": "adafactor"
        }, "optim is transformers' own Adafactor, the plan was predicted with torch's."
    default = "adamw-loop" if plan.device.kind == "cpu" else "adamw-foreach"
    note = None
    if plan.optimizer != default:
        note = f"optim is torch's AdamW as it chooses itself, here {default}; the plan has {plan.optimizer}."
    return {"optim": "adamw_torch"}, note


def _low_precision(plan: Plan) -> str | None:
    if plan.precision == "fp32":
        return None
    return (
        f"DeepSpeed's {plan.precision} casts the weights and keeps fp32 copies of them; the plan was predicted for "
        "fp32 weights under autocast, and its memory and time are not these."
    )


def _on_cpu(plan: Plan) -> str | None:
    if plan.device.kind != "cpu":
        return None
    return (
        "The plan is for a CPU: where there is a GPU, set DS_ACCELERATOR=cpu for DeepSpeed to leave it alone."
    )


def _unsharded_buckets(plan: Plan) -> str | None:
    if plan.zero_stage or plan.world_size == 1:
        return None
    return (
        "Without ZeRO, DeepSpeed sums gradients in buckets of 500 million elements whatever the file says; memory was "
        f"predicted for {BUCKET_ELEMENTS}, with which executor.distributed runs."
    )


def _data_loader(plan: Plan) -> str:
    return (
        f"The micro-batch is your DataLoader's: batch_size={plan.micro_batch_size}. With "
        f"{plan.gradient_accumulation_steps} accumulation steps and {plan.world_size} "
        f"{'process' if plan.world_size == 1 else 'processes'} that makes the global batch of {plan.global_batch_size}."
    )


def _processes(plan: Plan, command: str) -> str | None:
    if plan.world_size == 1:
        return None
    return f"The plan is for {plan.world_size} processes: start it with {command.format(plan.world_size)}."


def _placement(plan: Plan, moment: str, *, chunks_too: bool = True) -> str | None:
    """What is recomputed, counted by kind, and how to have it."""
    told = []
    if plan.checkpoint:
        count = len(plan.checkpoint)
        nested = sum(segment.depth > 0 for segment in plan.checkpoint)
        selective = sum(segment.mode != "recompute" for segment in plan.checkpoint)
        kinds = [f"{n} {kind}" for n, kind in ((nested, "inside others"), (selective, "selective")) if n]
        counted = "1 recomputed segment" if count == 1 else f"{count} recomputed segments"
        told.append(counted + (f" ({', '.join(kinds)})" if kinds else ""))
    if plan.loss_chunks is not None and chunks_too:
        told.append(f"the loss in {plan.loss_chunks} chunks")
    if not told:
        return None
    return (
        f"Not in the configuration: {' and '.join(told)}. Put it on the model yourself, {moment}: "
        "import executor, planner; plan = planner.load_plan(FILE); executor.apply_checkpoints(model, plan)."
    )


def _is_of_transformers(plan: Plan) -> bool:
    if plan.workload is None:
        return False
    library = library_model(plan.workload.name)
    return plan.workload.name == "gpt2" or (library is not None and library[0] == "transformers")


def _recomputes_every_block(plan: Plan) -> bool:
    """Whether the segments are the numbered blocks (``h.3``), each of them whole, and nothing besides.

    Where names have two numbers (``block.0.layer.1``) or a module is called twice, what an engine takes for a block
    cannot be told, and the answer is no.
    """
    names = [stage.name for stage in plan.stages or ()]
    numbers = {name: [part for part in _parts(name) if part.isdecimal()] for name in names}
    if any(len(found) > 1 or "#" in name for name, found in numbers.items()):
        return False
    groups = ((block, list(group)) for block, group in itertools.groupby(names, key=_block))
    blocks = [(block, group[0], group[-1], "recompute", 0) for block, group in groups if numbers[group[0]]]
    return bool(blocks) and blocks == [(s.enter, s.first, s.last, s.mode, s.depth) for s in plan.checkpoint]


def _parts(stage: str) -> list[str]:
    return re.split(r"[.@]", stage)


def _block(stage: str) -> str:
    """``transformer.h.3`` of ``transformer.h.3.attn``; a stage outside of blocks is its own."""
    parts = _parts(stage)
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return stage if numbered is None else ".".join(parts[: numbered + 1])


def _yaml(configuration: Json, indent: str = "") -> str:
    """Mappings of scalars, in block style; a JSON scalar is a YAML scalar."""
    lines = []
    for key, value in configuration.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)


TORCHTITAN_MODULE = '''\
"""A plan's settings for torchtitan {version}, on top of a configuration that says the rest.

In a config_registry.py of yours, for --module yours --config planned:

    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    def planned():
        return with_plan(llama3_debugmodel())
"""

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.trainer import Trainer


def with_plan(config: Trainer.Config) -> Trainer.Config:
{settings}
    config.activation_checkpoint = {recomputation}
    if isinstance(config.loss, ChunkedLossWrapper.Config):
        config.loss = config.loss.loss_fn
{loss}    return config
'''


def _torchtitan_module(configuration: Json) -> str:
    settings = [
        f"    config.{section}.{field} = {json.dumps(value)}"
        for section in ("training", "parallelism", "optimizer")
        for field, value in configuration[section].items()
    ]
    chunks = configuration["loss"]["num_chunks"]
    chunked = f"    config.loss = ChunkedLossWrapper.Config(loss_fn=config.loss, num_chunks={chunks})\n"
    return TORCHTITAN_MODULE.format(
        version=VERSIONS["torchtitan"],
        settings="\n".join(settings),
        recomputation="FullAC.Config()" if configuration["activation_checkpoint"] else "None",
        loss=chunked if chunks > 1 else "",
    )

"""What a workload's batches look like, and so which data can stand in for them.

    input_ids, labels (n, length) whole numbers; attention_mask     ──▶ text
    one tensor (n, channels, height, width); labels (n,)            ──▶ images with classes

A built-in workload, one of a library and a function of the user's are told apart by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

from profiler.pretend import pretending
from profiler.registry import seeded
from profiler.rehearsal import calling
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec

_SAMPLES: Final = 2
_TEXT: Final = {"input_ids", "labels"}
_MASK: Final = "attention_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextForm:
    """Batches of tokens; ``vocabulary_size`` None: how many the model knows cannot be told."""

    sequence_length: int
    vocabulary_size: int | None
    attention_mask: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageForm:
    """Batches of images under ``name``; ``classes`` None: how many the model tells apart is not known."""

    name: str
    channels: int
    size: tuple[int, int]
    classes: int | None


def form_of(spec: WorkloadSpec, workload: Workload) -> TextForm | ImageForm:
    """The form of a workload's batches; ValueError for one that no data of ours fits."""
    with seeded(0), calling(f"batch({_SAMPLES})", workload.model):
        batch = workload.batch(_SAMPLES)
    named = isinstance(batch, dict) and all(isinstance(value, torch.Tensor) for value in batch.values())
    tensors: dict[Any, torch.Tensor] = batch if named else {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names = set(tensors)
    if (
        names - {_MASK} == _TEXT
        and len({*shapes.values()}) == 1
        and len(shapes.get("labels", ())) == 2
        and not tensors["input_ids"].is_floating_point()
    ):
        if _predicts_hidden_tokens(workload.model):
            raise ValueError(
                f"A data folder (--data) of text is for models that predict the next token, and "
                f"{type(workload.model).__name__} predicts hidden ones. Leave it out, or train in a loop of your own."
            )
        return TextForm(
            sequence_length=shapes["labels"][1],
            vocabulary_size=_vocabulary_size(workload.model),
            attention_mask=_MASK in names,
        )
    images = [name for name, shape in shapes.items() if len(shape) == 4 and tensors[name].is_floating_point()]
    if (
        len(images) == 1
        and names == {images[0], "labels"}
        and len(shapes.get("labels", ())) == 1
        and not tensors["labels"].is_floating_point()
    ):
        _, channels, height, width = shapes[images[0]]
        return ImageForm(
            name=images[0], channels=channels, size=(height, width), classes=_classes(workload, batch)
        )
    found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()) or type(batch).__name__
    raise ValueError(
        f"A data folder (--data) is for workloads whose batches are tokens (input_ids and labels) or images with "
        f"classes (one tensor of four dimensions and labels), got {found} for {spec.name}. Leave it out."
    )


def _vocabulary_size(model: torch.nn.Module) -> int | None:
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return max(sizes, default=None)


def _predicts_hidden_tokens(model: torch.nn.Module) -> bool:
    if not type(model).__module__.startswith("transformers."):
        return False
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    return (
        name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        and name not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _classes(workload: Workload, batch: Any) -> int | None:
    """The width of the model's first output with a row for each sample, from shapes alone."""
    outputs: list[Any] = []
    watching = workload.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with (
            seeded(0),
            torch.no_grad(),
            pretending(workload.model, [batch]) as (fake,),
            calling(f"loss(model, batch({_SAMPLES}))", workload.model),
        ):
            workload.loss(workload.model, fake)
    finally:
        watching.remove()
    rows = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.dim() == 2)
    return next((row.shape[1] for row in rows if row.shape[0] == _SAMPLES), None)

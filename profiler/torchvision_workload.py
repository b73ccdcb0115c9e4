"""Any model of torchvision that learns classes: of images, of their pixels, of short videos.

    torchvision:vgg11             (n, 3, 224, 224) ─▶ a class each          cross entropy
    torchvision:fcn_resnet50      (n, 3, 520, 520) ─▶ a class per pixel     cross entropy over pixels
    torchvision:r3d_18            (n, 3, 16, 112, 112) ─▶ a class each      cross entropy

Weights and inputs are random and nothing is downloaded. The size of the images and the number of classes are
those of the weights that torchvision publishes for the model. Outputs beside the main one (Inception,
GoogLeNet, segmentation networks) enter the loss with the weight of the paper or reference script.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
import torchvision
from torch.nn.functional import cross_entropy

from profiler.workload import Workload
from profiler.workload_spec import FLAGS, WorkloadError, WorkloadSpec

FRAMES: Final = 16
"""Of a video: what torchvision's video networks were trained on (``clip_len`` of its reference scripts)."""
AUXILIARY_CLASSIFIER_WEIGHT: Final = 0.3
"""Szegedy et al. 2014, Going deeper with convolutions, section 5."""
AUXILIARY_MASK_WEIGHT: Final = 0.5
"""``criterion`` in torchvision's references/segmentation/train.py."""

_NO_CLASSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "detection": "its loss needs boxes, a different number in every image, so no two steps are alike",
        "optical_flow": "its loss compares flows between two images",
        "quantization": "it is for inference only",
    }
)


def named(name: str, spec: WorkloadSpec, seed: int) -> Workload:
    """The workload of ``torchvision:name``."""
    if spec.sequence_length is not None:
        raise WorkloadError(
            f"{spec.name} takes no sequence_length ({FLAGS['sequence_length']}), got {spec.sequence_length}. "
            f"Leave it out, or give {FLAGS['image_size']}."
        )
    kind = _kind(name)
    published = torchvision.models.get_model_weights(name).DEFAULT
    preset = published.transforms()
    image_size = spec.image_size or getattr(preset, "crop_size", preset.resize_size)[0]
    model = _model(name, image_size, {"weights_backbone": None} if kind == "segmentation" else {})
    shape = (3, FRAMES, image_size, image_size) if kind == "video" else (3, image_size, image_size)
    per_pixel = shape[1:] if kind == "segmentation" else ()
    classes = len(published.meta["categories"])

    def batch(size: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "images": torch.randn(size, *shape, generator=generator),
            "labels": torch.randint(classes, (size, *per_pixel), generator=generator),
        }

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return _loss(model(batch["images"]), batch["labels"])

    return Workload(model=model.train(), batch=batch, loss=loss, name=name)


def _kind(name: str) -> str:
    """The family of a model: ``video``, ``segmentation`` or, for image classification, ``""``."""
    known = torchvision.models.list_models()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        suggestion = f" Did you mean {' or '.join(close)}?" if close else ""
        raise WorkloadError(
            f"torchvision:NAME must name one of the {len(known)} models of torchvision "
            f"{torchvision.__version__}, such as vgg16, convnext_tiny or vit_b_16, got {name!r}.{suggestion}"
        )
    module: str = torchvision.models.get_model_builder(name).__module__
    family = module.removeprefix("torchvision.models.").rpartition(".")[0]
    if family in _NO_CLASSES:
        raise WorkloadError(
            f"torchvision:{name} cannot be trained on random classes: {_NO_CLASSES[family]}. "
            f"Write a function that returns a profiler.Workload (package.module:function)."
        )
    return family


def _model(name: str, image_size: int, options: dict[str, Any]) -> torch.nn.Module:
    """Without weights; where the architecture fixes the size of its images, for this one."""
    with warnings.catch_warnings():
        # Inception and GoogLeNet announce that their weights will be drawn in another way one day.
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        with torch.device("meta"):
            fixed = getattr(torchvision.models.get_model(name, weights=None, **options), "image_size", None)
        if fixed not in (None, image_size):
            options = options | {"image_size": image_size}
        model: torch.nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _loss(output: object, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the main output, and of the auxiliary ones with their weight."""
    if isinstance(output, torch.Tensor):
        return cross_entropy(output, labels)
    if isinstance(output, dict):
        main, weight = output["out"], AUXILIARY_MASK_WEIGHT
        others = [scores for name, scores in output.items() if name != "out"]
    else:
        assert isinstance(output, tuple)
        main, *others = output
        weight = AUXILIARY_CLASSIFIER_WEIGHT
    loss = cross_entropy(main, labels)
    for scores in others:
        if scores is not None:
            loss = loss + weight * cross_entropy(scores, labels)
    return loss

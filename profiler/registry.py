"""From the name of a workload to the workload: the two of ours, a library's, and anyone's by import.

    gpt2                      GPT-2 small from its configuration, random weights, random tokens
    resnet50                  ResNet-50 for ten classes, random weights, random images of CIFAR-10's size
    transformers:NAME_OR_DIR  any model type of transformers, or a folder with a config.json
    torchvision:NAME          torchvision's models of image and video classification and segmentation
    package.module:function   whatever ``function()`` returns; also from the current directory

Nothing is downloaded. The same name and seed give the same weights and batches, and building leaves the
caller's random state alone. torch is imported when something is built, not before.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from profiler.workload_spec import WorkloadError, WorkloadSpec, described, library_model, resolve

if TYPE_CHECKING:
    import torch

    from profiler.workload import Workload

__all__ = ["WorkloadError", "WorkloadSpec", "build", "resolve", "seeded"]


def build(spec: WorkloadSpec, *, seed: int = 0) -> Workload:
    """Make the named workload on the CPU, in training mode; ``seed`` decides its weights and its batches."""
    spec = resolve(spec)
    with seeded(seed):
        match spec:
            case WorkloadSpec(name="gpt2", sequence_length=int(length)):
                return _gpt2(length, seed)
            case WorkloadSpec(name="resnet50", image_size=int(size)):
                return _resnet50(size, seed)
            case _:
                pass
        match library_model(spec.name):
            case ("transformers", name):
                from profiler import transformers_workload

                return transformers_workload.named(name, spec, seed)
            case (_, name):
                from profiler import torchvision_workload

                return torchvision_workload.named(name, spec, seed)
            case None:
                return _imported(spec.name)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for this block only; afterwards it is where it was."""
    import torch

    # torch.manual_seed would reach the generators of every GPU as well, which fork_rng then had to save.
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


def _gpt2(sequence_length: int, seed: int) -> Workload:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from profiler.workload import Workload

    config = GPT2Config(use_cache=False)
    model = GPT2LMHeadModel(config).train()
    # The loss that transformers falls back on for this class anyway, but with a warning at the first step.
    model.loss_type = "ForCausalLM"

    def batch(size: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(config.vocab_size, (size, sequence_length), generator=generator)
        return {"input_ids": tokens, "labels": tokens}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss

    return Workload(model=model, batch=batch, loss=loss, name="gpt2")


def _resnet50(image_size: int, seed: int) -> Workload:
    import torch
    from torchvision.models import resnet50

    from profiler.workload import Workload

    classes = 10
    downsampling = 32

    def batch(size: int) -> dict[str, torch.Tensor]:
        if size == 1 and image_size <= downsampling:
            raise WorkloadError(
                f"The micro-batch of resnet50 must be at least 2 for images of {image_size}x{image_size}, "
                f"got 1: its last BatchNorm sees one value of each image. "
                f"Use 2 or more, or images larger than {downsampling}x{downsampling}."
            )
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 3, image_size, image_size, generator=generator)
        return {"images": images, "labels": torch.randint(classes, (size,), generator=generator)}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"])

    model: torch.nn.Module = resnet50(num_classes=classes)
    return Workload(model=model.train(), batch=batch, loss=loss, name="resnet50")


def _imported(name: str) -> Workload:
    from profiler.workload import Workload

    module_name, _, function_name = name.partition(":")
    function = _function(_module(module_name), function_name)
    try:
        workload = function()
    except Exception as error:
        raise WorkloadError(f"{name}() raised {described(error)}.") from error
    if not isinstance(workload, Workload):
        missing = " Does it lack a return statement?" if workload is None else ""
        raise WorkloadError(
            f"{name}() must return a profiler.Workload, got {type(workload).__name__}.{missing}"
        )
    return workload


def _module(name: str) -> ModuleType:
    # It stays importable: the workload's functions may import more of it when they are called.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise WorkloadError(
                f"The module of a workload must be importable from {os.getcwd()} or be installed, "
                f"got {name}: {error}. Change directory or set PYTHONPATH."
            ) from error
        raise WorkloadError(f"Importing {name} raised {described(error)}.") from error
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"Importing {name} raised {described(error)}.") from error


def _function(module: ModuleType, name: str) -> Callable[[], Any]:
    own = sorted(
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    )
    function: object = getattr(module, name, None)
    if callable(function):
        return function
    found = f"{name} is a {type(function).__name__}" if hasattr(module, name) else f"there is no {name}"
    close = difflib.get_close_matches(name, own, n=1)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    raise WorkloadError(
        f"{module.__name__}:{name} must be a function that returns a profiler.Workload, but {found}. "
        f"Functions of {module.__name__}: {', '.join(own) or 'none'}.{suggestion}"
    )

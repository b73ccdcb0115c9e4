"""How good a model is on data that it was not trained on.

perplexity   exp(mean loss of a token)            Bengio et al. 2003, with the loss in nats
accuracy     share of samples whose largest output is their label
loss         mean loss of a sample
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from executor.last_good import RandomState
from executor.order import Dataset
from executor.stopping import Metric
from profiler.step import Stepper
from profiler.timing import to_device


def evaluate(stepper: Stepper, dataset: Dataset, metric: Metric, micro_batch_size: int) -> float:
    """The metric over all of ``dataset``, in the stepper's precision, without gradients and without dropout.

    Random state is left as it was. Raises ValueError where a model's outputs hold no class of each sample.
    """
    model = stepper.model
    device = next(model.parameters()).device
    was_training = [module for module in model.modules() if module.training]
    total = torch.zeros((), dtype=torch.float64, device=device)
    random = RandomState.now()
    model.eval()
    try:
        with torch.no_grad(), stepper.autocast():
            for start in range(0, len(dataset), micro_batch_size):
                rows = np.arange(start, min(start + micro_batch_size, len(dataset)))
                batch = to_device(dataset.gather(rows), device)
                total += _sum(stepper, batch, metric, len(rows))
    finally:
        for module in was_training:
            module.training = True
        random.set()
    mean = total.item() / len(dataset)
    if metric != "perplexity":
        return mean
    return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf


def _sum(stepper: Stepper, batch: dict[str, torch.Tensor], metric: Metric, rows: int) -> torch.Tensor:
    """Over the samples of a batch: of those that are right, or of their losses."""
    if metric != "accuracy":
        return stepper.loss(stepper.model, batch).double() * rows
    outputs: list[Any] = []
    watching = stepper.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        stepper.loss(stepper.model, batch)
    finally:
        watching.remove()
    return (_scores(stepper.model, outputs, rows).argmax(dim=1) == batch["labels"]).sum().double()


def _scores(model: nn.Module, outputs: list[Any], rows: int) -> torch.Tensor:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and leaf.shape[0] == rows:
            return leaf
    raise ValueError(
        f"Accuracy needs a model that gives each sample a score for every class, got none of {type(model).__name__}. "
        "Evaluate by the loss: --until loss=VALUE."
    )

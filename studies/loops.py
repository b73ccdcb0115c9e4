"""One training job in the loops that people write, for studies.overhead.

    hand         torch alone, as an expert writes it            (these two also step by step)
    ours         executor.prepare
    accelerate   Accelerator and its accumulate context
    trainer      transformers' Trainer
    lightning    Lightning's Trainer in its barebones mode, which turns off all that may cost time

All do the same: the mean gradient of ``ACCUMULATION`` micro-batches, clipped at norm 1, one step of the optimizer that
they are handed, until the micro-batches are used up. Each takes them, ready in memory, from the same DataLoader, or
makes one like it itself. ``hand`` and ``ours`` report each step's mean loss; what others keep is theirs.
What else a loop does in between is its own as well, and is what the study is after.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import executor
from planner.plan import Plan
from profiler.step import Loss
from profiler.workload import Workload
from studies.rivals import WithLoss

ACCUMULATION = 2
"""Micro-batches of one optimizer step."""

LARGEST_NORM = 1.0

LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
"""One library under two names; whichever is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained, on which device it is, and the micro-batches of all steps, one after another.

    ``reported``: the mean loss of each step, from loops that have it.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    micro_batches: list[Any]
    device: torch.device
    reported: list[torch.Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.micro_batches) // ACCUMULATION

    def loader(self) -> DataLoader[Any]:
        """The micro-batches as they are, in their order."""
        return DataLoader(self.micro_batches, batch_size=1, collate_fn=_as_it_is)  # type: ignore[arg-type]


_as_it_is = operator.itemgetter(0)
"""A DataLoader hands over a list of one."""

Loop = Callable[[Job], None]
Steps = Callable[[Job], Iterator[torch.Tensor]]
"""A loop that stops after each step with its mean loss, and goes on when it is asked for the next."""


def hand_steps(job: Job) -> Iterator[torch.Tensor]:
    model, optimizer = job.model, job.optimizer
    batches = iter(job.loader())
    for _ in range(job.steps):
        mean_loss: Any = 0.0
        for _ in range(ACCUMULATION):
            loss = job.loss(model, next(batches)) / ACCUMULATION
            loss.backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield mean_loss


def our_steps(plan: Plan, job: Job) -> Iterator[torch.Tensor]:
    step = executor.prepare(job.model, job.optimizer, plan, loss=job.loss, max_gradient_norm=LARGEST_NORM)
    batches = iter(job.loader())
    for _ in range(job.steps):
        yield step(itertools.islice(batches, ACCUMULATION))
    step.remove()


def hand(job: Job) -> None:
    job.reported.extend(hand_steps(job))


def ours(plan: Plan, job: Job) -> None:
    job.reported.extend(our_steps(plan, job))


def accelerate(job: Job) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=job.device.type == "cpu", gradient_accumulation_steps=ACCUMULATION)
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer, job.loader())
    for batch in loader:
        with accelerator.accumulate(model):
            loss = job.loss(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()


def trainer(job: Job) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = WithLoss(Workload(model=job.model, batch=lambda size: None, loss=job.loss))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=ACCUMULATION,
            max_steps=job.steps, max_grad_norm=LARGEST_NORM, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", use_cpu=job.device.type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", eval_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        engine = Trainer(
            model=model,
            args=arguments,
            train_dataset=job.micro_batches,
            data_collator=lambda found: {"batch": _as_it_is(found)},
            optimizers=(job.optimizer, None),
        )
        engine.remove_callback(PrinterCallback)
        engine.train()


def lightning(job: Job) -> None:
    library: Any = importlib.import_module(lightning_here() or LIGHTNING[0])

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return job.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer

    logging.getLogger(library.__name__).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That a loader without workers may be slow.
        engine = library.Trainer(
            accelerator="cpu" if job.device.type == "cpu" else "gpu", devices=1, max_steps=job.steps,
            accumulate_grad_batches=ACCUMULATION, gradient_clip_val=LARGEST_NORM, barebones=True,
        )  # fmt: skip
        engine.fit(Module(), job.loader())


def lightning_here() -> str | None:
    """The name under which Lightning is installed, if it is."""
    return next((name for name in LIGHTNING if importlib.util.find_spec(name.partition(".")[0])), None)


RIVALS: dict[str, Loop] = {"accelerate": accelerate, "trainer": trainer, "lightning": lightning}

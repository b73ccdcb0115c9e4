"""One tool decides how to train a model behind a wall of memory, in this process, and writes down what it found.

    lightning, lightning-binsearch   Tuner.scale_batch_size, which runs Lightning's BatchSizeFinder: 2, 4, 8 ... samples
    accelerate                       find_executable_batch_size: from the whole global batch, 0.9 of it at each refusal
    trainer                          transformers' Trainer with auto_find_batch_size, the same from inside the Trainer
    ours                             planner: profile where there is memory, optimize for the wall
    ours-behind-the-wall             planner, profiling behind the wall as well

The tools are called, not imitated, with the optimizer, clipping and data that the steps which are measured afterwards
have. Out-of-memory events are counted where each tool itself recognises one.

    python -m studies.rivals CASE TOOL BUDGET_BYTES FOLDER [--checkpointing]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

import planner
import profiler
from planner.cost import memory_error, plain_peak_bytes
from profiler import records
from profiler.device import is_out_of_memory
from profiler.profile_record import Profile
from profiler.step import build_optimizer
from profiler.timing import MICRO_BATCHES_PER_STEP, stepper_for
from profiler.workload import Workload
from studies.placement import every_block, plain
from studies.search import CASES, TOOLS, Case, Decision
from studies.wall import Wall

TRIAL_STEPS = 2
"""Optimizer steps after which a size counts as found, for tools that leave that to the user. The second step has the
optimizer's state from the first."""

CPU = torch.device("cpu")


class Samples(Dataset[Any]):
    """Endless enough random samples, each made when it is asked for, as from a disk."""

    def __init__(self, workload: Workload, length: int) -> None:
        self._workload = workload
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor[0], self._workload.batch(1))


@dataclass(slots=True)
class Counted:
    """How many errors a tool has taken for a lack of memory."""

    events: int = 0


@contextlib.contextmanager
def counting(counted: Counted, module: types.ModuleType, predicate: str) -> Iterator[None]:
    """Watch the function by which a tool tells that an error is a lack of memory."""
    asked: Callable[[BaseException], bool] = getattr(module, predicate)

    def answer(error: BaseException) -> bool:
        found = asked(error)
        counted.events += found
        return found

    setattr(module, predicate, answer)
    try:
        yield
    finally:
        setattr(module, predicate, asked)


def with_lightning(case: Case, workload: Workload, folder: Path, counted: Counted, mode: str) -> int | None:
    """The size that BatchSizeFinder leaves. It stops untried at ``max_val``, so that is twice the global batch."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import batch_size_scaling
    from lightning.pytorch.tuner.tuning import Tuner

    class Module(LightningModule):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model
            self.batch_size = 1

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return workload.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer("adamw", self.model)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Samples(workload, 64 * case.global_batch_size), batch_size=self.batch_size)

    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=1.0, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with counting(counted, batch_size_scaling, "is_oom_error"):
        found: int | None = Tuner(trainer).scale_batch_size(
            Module(), mode=mode, max_val=2 * case.global_batch_size
        )
    return found


def with_accelerate(case: Case, workload: Workload, counted: Counted) -> int | None:
    """The size at which the decorated function came to its end. It trains on whole global batches."""
    from accelerate.utils import memory

    def train(batch_size: int) -> int:
        stepper = stepper_for(workload, "adamw", "fp32", CPU)
        micro_batches = -(-case.global_batch_size // batch_size)
        for _ in range(TRIAL_STEPS):
            stepper.step((workload.batch(batch_size) for _ in range(micro_batches)), micro_batches)
        return batch_size

    with counting(counted, memory, "should_reduce_batch_size"):
        return _none_at_zero(
            memory.find_executable_batch_size(train, starting_batch_size=case.global_batch_size)
        )


class WithLoss(nn.Module):
    """A workload's model as the Trainer wants it: its forward makes the loss."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model
        self._loss = workload.loss

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self._loss(self.model, batch)}


def with_trainer(case: Case, workload: Workload, folder: Path, counted: Counted) -> int | None:
    """The size at which the Trainer came to its end. It takes one micro-batch a step: its global batch shrinks too."""
    from accelerate.utils import memory
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=case.global_batch_size, auto_find_batch_size=True,
        max_steps=TRIAL_STEPS, max_grad_norm=1.0, optim="adamw_torch_fused", use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False,
    )  # fmt: skip
    job = Trainer(
        model=WithLoss(workload),
        args=arguments,
        train_dataset=Samples(workload, 64 * case.global_batch_size),
        data_collator=lambda samples: {"batch": default_collate(samples)},
    )

    def train() -> int | None:
        job.train()
        return job.state.train_batch_size

    with counting(counted, memory, "should_reduce_batch_size"):
        return _none_at_zero(train)


def _none_at_zero(find: Callable[[], int | None]) -> int | None:
    try:
        return find()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        return None


def with_ours(
    case: Case, workload: Workload, folder: Path, wall: Wall, budget_bytes: int, beforehand: Profile | None
) -> int | None:
    """The plan's micro-batch; profile and plan are left in the folder.

    ``beforehand``: a profile that ran nothing. With it the measured one is made behind the wall: a profile runs plain
    steps, and this one tells the sizes whose plain steps fit; where none does, it is all there is.
    """
    sizes: Sequence[int] = case.micro_batch_sizes
    if beforehand is not None:
        sizes = plain_sizes(beforehand, budget_bytes)
        wall.stand(budget_bytes)
    profile = profiler.profile(workload, sizes, ("fp32",), "cpu") if sizes else beforehand
    assert profile is not None
    wall.lift()
    try:
        plan = planner.optimize(profile, case.global_batch_size, budget_bytes)
    except planner.NoFeasiblePlan:
        return None
    records.write(folder / "profile.json", profile)
    plan.save(folder / "plan.json")
    return plan.micro_batch_size


def plain_sizes(profile: Profile, budget_bytes: int) -> list[int]:
    """The sizes that a profile can time within the budget."""
    return [
        size
        for size in profile.micro_batch_sizes
        if plain_peak_bytes(profile, "fp32", size, MICRO_BATCHES_PER_STEP) * (1 + memory_error(profile))
        <= budget_bytes
    ]


IMPORTS = {
    "lightning": "lightning.pytorch",
    "accelerate": "accelerate",
    "trainer": "transformers.trainer",
    "ours": "planner",
}
"""By the first word of a tool's name. They are no part of the decision, nor of what is behind the wall."""


def decided(case: Case, tool: str, checkpointing: bool, budget_bytes: int, folder: Path) -> Decision:
    """What the tool chose and what it took."""
    importlib.import_module(IMPORTS[tool.partition("-")[0]])
    torch.manual_seed(0)
    began, beforehand = time.perf_counter(), None
    if tool == "ours-behind-the-wall":
        beforehand = profiler.profile(case.build(), case.micro_batch_sizes, ("fp32",), "cpu", fake=True)
    wall, counted = Wall.before_the_model(), Counted()
    workload = case.build()
    model, found, ended = workload.model, None, None
    applied = every_block(model, case.blocks(model)) if checkpointing else plain(model)
    if not tool.startswith("ours"):
        wall.stand(budget_bytes)
    try:
        with applied, tempfile.TemporaryDirectory() as scratch:
            match tool:
                case "lightning":
                    found = with_lightning(case, workload, Path(scratch), counted, "power")
                case "lightning-binsearch":
                    found = with_lightning(case, workload, Path(scratch), counted, "binsearch")
                case "accelerate":
                    found = with_accelerate(case, workload, counted)
                case "trainer":
                    found = with_trainer(case, workload, Path(scratch), counted)
                case "ours" | "ours-behind-the-wall":
                    found = with_ours(case, workload, folder, wall, budget_bytes, beforehand)
    except (RuntimeError, ValueError) as error:
        ended = f"{type(error).__name__}: {error}"[:300]
        counted.events += is_out_of_memory(error)
    return Decision(
        found=found, seconds=time.perf_counter() - began, out_of_memory_events=counted.events, ended=ended
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="One tool decides, behind a wall of memory.")
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("budget_bytes", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    case = CASES[options.case]
    decision = decided(case, options.tool, options.checkpointing, options.budget_bytes, options.folder)
    (options.folder / "decision.json").write_bytes(msgspec.json.encode(decision))
    return 0


if __name__ == "__main__":
    sys.exit(main())

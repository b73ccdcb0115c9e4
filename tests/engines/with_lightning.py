"""Two steps with Lightning: with_lightning.py PLAN CONFIGURATION RESULT."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from planner.plan import load_plan
from tests.engines.network import Network, dataset, report

plan = load_plan(sys.argv[1])


class Module(pl.LightningModule):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.network(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(model: Network) -> dict[str, int]:
    trainer = pl.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **json.loads(Path(sys.argv[2]).read_text()),
    )
    loader = torch.utils.data.DataLoader(
        dataset(2 * plan.global_batch_size), batch_size=plan.micro_batch_size
    )
    trainer.fit(Module(model), loader)
    return {"accumulation": trainer.accumulate_grad_batches, "steps": trainer.global_step}


Path(sys.argv[3]).write_text(report(plan, train))

"""Two steps with transformers' Trainer: with_transformers.py PLAN CONFIGURATION RESULT OTHERS.

OTHERS: a file with other configurations, which TrainingArguments takes as well.
"""

import json
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

from planner.plan import load_plan
from tests.engines.network import Network, dataset, report

plan = load_plan(sys.argv[1])


def train(model: Network) -> dict[str, int]:
    arguments = TrainingArguments(
        output_dir=str(Path(sys.argv[3]).parent),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **json.loads(Path(sys.argv[2]).read_text()),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset(2 * plan.global_batch_size))
    trainer.train()
    return {
        "effective_batch": trainer.get_total_train_batch_size(arguments),
        "steps": trainer.state.global_step,
    }


for other in json.loads(Path(sys.argv[4]).read_text()):
    TrainingArguments(output_dir=str(Path(sys.argv[3]).parent), report_to=[], **other)
Path(sys.argv[3]).write_text(report(plan, train))

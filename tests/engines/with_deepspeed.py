"""Two steps with DeepSpeed, in as many processes as started this: with_deepspeed.py PLAN CONFIGURATION RESULT OTHERS.

OTHERS: a file with configurations to parse; what DeepSpeed's parser made of each goes beside RESULT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from executor import distributed
from planner.plan import load_plan
from tests.engines.network import Network, dataset, report

plan = load_plan(sys.argv[1])
rank = distributed.join("cpu")
import deepspeed  # noqa: E402 - join says which accelerator first
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402


def train(model: Network) -> dict[str, int]:
    config = json.loads(Path(sys.argv[2]).read_text())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    data = dataset(2 * plan.global_batch_size)[rank :: plan.world_size]
    for micro_batch in torch.utils.data.DataLoader(data, batch_size=plan.micro_batch_size):
        engine.backward(engine(**micro_batch)["loss"])
        engine.step()
    said = {
        "effective_batch": engine.train_batch_size(),
        "steps": engine.global_steps,
        "engine_samples": engine.global_samples,
        "zero_stage": engine.zero_optimization_stage(),
    }
    engine.destroy()
    return said


def parsed(configuration: dict[str, Any]) -> dict[str, Any]:
    found = DeepSpeedConfig(configuration)
    return {
        "train_batch_size": found.train_batch_size,
        "train_micro_batch_size_per_gpu": found.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": found.gradient_accumulation_steps,
        "gradient_clipping": found.gradient_clipping,
        "zero_allow_untested_optimizer": found.zero_allow_untested_optimizer,
        "steps_per_print": found.steps_per_print,
        "zero_optimization": {
            name: int(value)
            for name, value in found.zero_config.model_dump(by_alias=True).items()
            if name in configuration["zero_optimization"]
        },
        "bf16": {"enabled": found.bfloat16_config.enabled},
        "torch_autocast": {
            "enabled": found.torch_autocast_enabled,
            "dtype": str(found.torch_autocast_dtype).removeprefix("torch."),
            "lower_precision_safe_modules": found.torch_autocast_lower_precision_safe_modules,
        },
        "fp16": {
            name: getattr(found.float16_config, name)
            for name in ("enabled", "loss_scale", "initial_scale_power")
        },
        "optimizer": {"type": found.optimizer_name, "params": found.optimizer_params},
    }


said = report(plan, train)
others = [parsed(configuration) for configuration in json.loads(Path(sys.argv[4]).read_text())]
distributed.leave()
if rank == 0:
    Path(sys.argv[3]).write_text(said)
    Path(sys.argv[3]).with_suffix(".parsed").write_text(json.dumps(others))

"""What the processes of tests/test_distributed.py do: ``python -m tests.ranks ACT FOLDER``, once per rank.

Each leaves what it saw in the folder, under its rank. Only ``train`` needs torch, which takes seconds to import.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from executor.launch import HandOver, as_rank
from profiler.profile_record import Precision

RANK = int(os.environ.get("RANK", "0"))
STEPS = 20
SAVED_AFTER = 3
K = 2
MICRO_BATCH = 3
DOCUMENT = b'{"steps": 20}\n'


def say(folder: Path, hand_over: HandOver) -> int:
    print("a library says something")
    os.write(1, b"and so does C++\n")
    hand_over(DOCUMENT)
    return 0


def save_when_asked(folder: Path, hand_over: HandOver) -> int:
    """The way of a run loop: a signal is noted, and acted on where it suits."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    (folder / f"{RANK}.up").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.5)
    (folder / f"{RANK}.saved").touch()
    return 128 + asked[0]


def deaf(folder: Path, hand_over: HandOver) -> int:
    """Rank 0 does not hear SIGTERM."""
    if RANK == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return wait(folder, hand_over)


def wait(folder: Path, hand_over: HandOver) -> int:
    written = folder / f"{RANK}.pid"
    written.write_text(str(os.getpid()))
    written.rename(folder / f"{RANK}.up")  # Whoever sees it can read it.
    time.sleep(600)
    return 0


def fail(folder: Path, hand_over: HandOver) -> int:
    """Rank 1 does."""
    if RANK == 1:
        print("looking for data", file=sys.stderr)
        raise ValueError("There are no samples\nin data/.")
    return wait(folder, hand_over)


def give_up(folder: Path, hand_over: HandOver) -> int:
    return 4


def train(folder: Path, hand_over: HandOver) -> int:
    """All that needs DeepSpeed, in one pair of processes, since they take long to start; at the end rank 1 dies."""
    import torch

    from executor import distributed
    from planner import export

    export.PERSISTENCE_ELEMENTS = 50  # So that stage 3 has something to gather, and something that it keeps.
    given = torch.get_num_threads()
    distributed.join("cpu", threads=3)
    seen: dict[str, Any] = {"threads": [given, torch.get_num_threads()]}
    torch.set_num_threads(1)
    seen["agreed"], seen["different"] = other_plan()
    seen["configuration"] = {stage: configuration(stage) for stage in range(4)}
    seen["learned"] = {stage: learned(stage) for stage in range(4)}
    seen["resumed"] = {stage: resumed(stage) for stage in range(4)}
    seen["refused"] = refused()
    # DeepSpeed remembers in the rest of the process that it was told to cast, so these come last.
    seen["learned"] |= {f"{stage} bf16": learned(stage, "bf16") for stage in range(4)}
    (folder / f"{RANK}.json").write_text(json.dumps(seen))
    hand_over(DOCUMENT)
    die_in_step(folder)
    return 0


def a_plan(zero_stage: int, **changes: Any) -> Any:
    import msgspec

    from tests import plans

    return msgspec.structs.replace(
        plans.plan(),
        world_size=2,
        zero_stage=zero_stage,
        micro_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=K,
        global_batch_size=MICRO_BATCH * K * 2,
        optimizer="adamw",
        **{"checkpoint": ()} | changes,
    )


def segment(enter: str, leave: str) -> Any:
    from planner.plan import Segment

    return Segment(first=enter, last=leave, enter=enter, leave=leave)


def other_plan() -> tuple[bool, str]:
    """Equal plans pass; when rank 1 has another, every rank says so."""
    from executor import distributed

    distributed.check_same_plan(a_plan(0))
    try:
        distributed.check_same_plan(a_plan(RANK))
    except ValueError as error:
        return True, str(error)
    return True, ""


def configuration(zero_stage: int) -> dict[str, Any]:
    """What DeepSpeed reads out of a plan's configuration, and which of its fields make no difference to it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from planner.export import deepspeed_config

    written = deepspeed_config(
        zero_stage=zero_stage,
        world_size=2,
        micro_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=K,
    )
    read = DeepSpeedConfig(copy.deepcopy(written))
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    others = {
        "gradient_clipping": 7.0,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 7,
        "zero_optimization": written["zero_optimization"] | {"reduce_bucket_size": 7},
    }
    ignored = [
        name
        for name in written.keys() - set(batch)
        if said(DeepSpeedConfig(copy.deepcopy(written) | {name: others.get(name, 7)})) == said(read)
    ]
    sharding = read.zero_config
    return {
        "batch": [getattr(read, name) for name in batch],
        "clipping": read.gradient_clipping,
        "stage": int(sharding.stage),
        "buckets": [sharding.reduce_bucket_size, sharding.allgather_bucket_size],
        "overlap": sharding.overlap_comm,
        "contiguous": sharding.contiguous_gradients,
        "stage3": [
            sharding.prefetch_bucket_size,
            sharding.max_reuse_distance,
            sharding.max_live_parameters,
            sharding.param_persistence_threshold,
        ],
        "precision": [read.float16_config.enabled, read.bfloat16_config.enabled],
        "ignored": ignored,
        "misspelt": misspelt(written),
    }


def said(config: Any) -> str:
    return str({name: value for name, value in vars(config).items() if name != "_param_dict"})


def misspelt(written: dict[str, Any]) -> str:
    from deepspeed.runtime.config import DeepSpeedConfig

    wrong = copy.deepcopy(written)
    wrong["zero_optimization"]["reduce_buckets"] = 1
    try:
        DeepSpeedConfig(wrong)
    except Exception as error:
        return type(error).__name__
    return ""


def learned(zero_stage: int, precision: Precision = "fp32") -> dict[str, Any]:
    """Losses and gradient norms of two processes, and of one that has all their batches."""
    import torch

    from executor import engines
    from executor.engine import _Norm
    from profiler.step import Stepper, build_optimizer

    torch.manual_seed(7)
    model = layers()
    alone = copy.deepcopy(model)
    stepper = Stepper(
        model=alone,
        loss=loss,
        optimizer=build_optimizer("adamw", alone),
        precision=precision,
        device_type="cpu",
    )
    # Out of one block, through the next, into a third: at stage 3 DeepSpeed has hooks around all of them.
    segments = (segment("1.1", "3.1"),)
    engine = engines.prepare(
        model,
        build_optimizer("adamw", model),
        a_plan(zero_stage, checkpoint=segments, precision=precision),
        loss,
    )
    before = engine.whole_weights()
    exact = before is None or all(
        torch.equal(alone.state_dict()[name], each) for name, each in before.items()
    )
    torch.manual_seed(3)
    everything = torch.randn(2 * K * MICRO_BATCH, 12), torch.randn(2 * K * MICRO_BATCH, 5)
    shares = [torch.tensor_split(part, 2)[RANK] for part in everything]
    seen: dict[str, Any] = {"exact": exact, "losses": [], "norms": [], "skipped": []}
    for step in range(STEPS):
        norm = _Norm()
        for optimizer in (stepper.optimizer, engine.optimizer):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        expected = stepper.step(
            list(zip(*(part.chunk(2 * K) for part in everything), strict=True)), 2 * K, norm
        )
        got = engine.mean(engine.step(tuple(shares)))
        seen["losses"].append((float(expected), float(got)))
        assert norm.value is not None
        seen["norms"].append((float(norm.value), engine.gradient_norm))
        seen["skipped"].append(engine.skipped)
    seen["recomputed"] = copy.deepcopy(engine.checkpoints.counts)
    after = copied(engine.whole_weights())
    seen["names"] = None if after is None else list(after)
    seen["expected_names"] = list(alone.state_dict())
    if after is not None:
        seen["farthest"] = max(float((after[n] - w).abs().max()) for n, w in alone.state_dict().items())
    engine.step((shares[0] * float("nan"), shares[1]))
    seen["skipped_nan"] = engine.skipped
    left = engine.whole_weights()
    seen["unchanged"] = difference(copied(left), after) == ""
    seen["identity"] = [engine.rank, engine.world_size, engine.is_first]
    seen["agree"] = [engine.agree(False), engine.agree(RANK == 1), engine.agree(True)]
    engine.barrier()
    engine.remove()
    return seen


def layers() -> Any:
    """Blocks of a linear layer each. tests/models.py would import transformers, which takes seconds."""
    from torch import nn

    sizes = [(12, 24), (24, 24), (24, 24), (24, 24)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(*size), nn.GELU()) for size in sizes), nn.Linear(24, 5))


def loss(model: Any, batch: Any) -> Any:
    """Large enough for gradients to be clipped."""
    from torch.nn import functional as F

    return 10 * F.mse_loss(model(batch[0]), batch[1])


def hard_workload() -> Any:
    """A little of all that may be forgotten: tied, frozen and odd-sized weights, buffers, dropout."""
    import torch
    from torch import nn

    from profiler.workload import Workload

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Embedding(11, 7)
            self.frozen = nn.Linear(7, 9)
            self.norm = nn.BatchNorm1d(9)
            self.drop = nn.Dropout(0.3)
            self.back = nn.Linear(9, 7)
            self.head = nn.Linear(7, 11, bias=False)
            self.head.weight = self.inlet.weight
            self.frozen.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.back(self.drop(self.norm(self.frozen(self.inlet(x))))))

    def batch(size: int) -> torch.Tensor:
        return torch.randint(11, (size,))

    def entropy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), batch)

    return Workload(model=Net().train(), batch=batch, loss=entropy)


def fresh(zero_stage: int, seed: int) -> tuple[Any, Any]:
    import torch

    from executor import engines
    from profiler.step import build_optimizer

    torch.manual_seed(seed)
    workload = hard_workload()
    optimizer = build_optimizer("adamw", workload.model, learning_rate=0.05)
    return workload, engines.prepare(workload.model, optimizer, a_plan(zero_stage), workload.loss)


def resumed(zero_stage: int) -> dict[str, Any]:
    """A run, and one that goes on from its state of after three steps in an engine that began elsewhere."""
    import torch

    workload, engine = fresh(zero_stage, seed=1)
    torch.manual_seed(RANK)
    batches = [workload.batch(MICRO_BATCH * K) for _ in range(2 * SAVED_AFTER)]
    for batch in batches[:SAVED_AFTER]:
        engine.step(batch)
    state, random = copied(engine.state()), torch.get_rng_state()
    losses = [float(engine.step(batch)) for batch in batches[SAVED_AFTER:]]
    end, whole = copied(engine.state()), copied(engine.whole_weights())
    engine.remove()
    _, engine = fresh(zero_stage, seed=2)
    engine.load_state(state)
    loaded = difference(engine.state(), state)
    torch.set_rng_state(random)
    again = [float(engine.step(batch)) for batch in batches[SAVED_AFTER:]]
    seen = {
        "losses": losses,
        "again": again,
        "loaded": loaded,
        "end": difference(engine.state(), end),
        "whole": difference(engine.whole_weights(), whole),
        "elements": sum(tensor.numel() for tensor in tensors(state)),
    }
    engine.remove()
    return seen


def refused() -> dict[str, str]:
    """States that are not this engine's."""
    _, engine = fresh(1, seed=1)
    state = engine.state()
    other = {name: each for name, each in state["weights"].items() if name != "frozen.bias"}
    wrong = {
        "rank": state | {"rank": 1 - RANK},
        "world": state | {"world_size": 3},
        "stage": state | {"zero_stage": 2},
        "engine": {"engine": "torch"},
        "weights": state | {"weights": other},
        "partition": state | {"optimizer": state["optimizer"] | {"partitions": []}},
    }
    messages = {}
    for name, tree in wrong.items():
        try:
            engine.load_state(tree)
        except ValueError as error:
            messages[name] = str(error)
    engine.remove()
    return messages | refused_plans()


def refused_plans() -> dict[str, str]:
    """Plans that DeepSpeed would run otherwise, or not at all; nothing is on the model afterwards."""
    import msgspec
    import torch

    from executor import distributed
    from executor.errors import PlanDoesNotFit

    changes: dict[str, dict[str, Any]] = {
        "processes": {"world_size": 3, "global_batch_size": 18},
        "precision": {"precision": "fp16"},
        "chunks": {"zero_stage": 3, "loss_chunks": 4},
        "adafactor": {"optimizer": "adafactor", "zero_stage": 1},
        "segment": {"zero_stage": 3, "checkpoint": (segment("elsewhere", "too"),)},
    }
    messages = {}
    for name, change in changes.items():
        model = layers()
        plan = msgspec.structs.replace(a_plan(0), **change)
        try:
            distributed.prepare(model, torch.optim.SGD(model.parameters()), plan, loss)
        except PlanDoesNotFit as error:
            left = any(module._forward_pre_hooks for module in model.modules())
            messages[name] = "hooks are left" if left else str(error)
    return messages


def die_in_step(folder: Path) -> None:
    """Rank 1 is killed between its micro-batches' backward passes and what rank 0 waits for."""
    workload, engine = fresh(2, seed=1)
    for step in range(100):
        if RANK == 1 and step == 2:
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        engine.step(workload.batch(MICRO_BATCH * K))


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: copied(each) for name, each in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied(each) for each in tree)
    return tree.clone() if hasattr(tree, "clone") else tree


def tensors(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [tensor for each in tree.values() for tensor in tensors(each)]
    if isinstance(tree, list | tuple):
        return [tensor for each in tree for tensor in tensors(each)]
    return [tree] if hasattr(tree, "numel") else []


def difference(one: Any, other: Any, name: str = "state") -> str:
    """Where two trees are not the same to the bit; empty where they are."""
    import torch

    if type(one) is not type(other):
        return f"{name}: {type(one)}, {type(other)}"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{name}: {list(one)}, {list(other)}"
        found = [difference(each, other[key], f"{name}.{key}") for key, each in one.items()]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{name}: {len(one)}, {len(other)}"
        found = [difference(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one, other) else name
    else:
        return "" if one == other else f"{name}: {one}, {other}"
    return " ".join(filter(None, found))


ACTS: dict[str, Callable[[Path, HandOver], int]] = {
    act.__name__: act for act in (say, save_when_asked, deaf, wait, fail, give_up, train)
}


if __name__ == "__main__":
    act, folder = ACTS[sys.argv[1]], Path(sys.argv[2])
    sys.exit(as_rank(lambda hand_over: act(folder, hand_over)))

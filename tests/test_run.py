"""Whole runs of training: what an expert's loop does to the bit, and nothing lost however they end."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import executor
from executor import snapshots
from executor.accumulation import AdaptiveAccumulation
from executor.errors import Interrupted, NotFinite
from executor.run import Progress
from planner.plan import Plan
from tests import runs
from tests.runs import workload

STEPS = 12


@pytest.fixture(scope="module")
def plan() -> Plan:
    return runs.plain()


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    executor.train(plan, None, folder, workload=workload(), steps=STEPS, learning_rate=1e-3)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Acting(Progress):
    """Does something after a step, and keeps what was announced."""

    def __init__(self, step: int = 0, act: Any = None) -> None:
        self.said: list[str] = []
        self._step, self._act = step, act

    def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
        if step == self._step and self._act is not None:
            self._act()

    def announced(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_weights_are_those_of_a_loop_written_by_hand_to_the_bit(
    plan: Plan, tmp_path: Path, recompute: bool
) -> None:
    used = runs.recomputing(plan) if recompute else plan
    assert bool(used.checkpoint) == recompute
    report = executor.train(used, None, tmp_path, workload=workload(), steps=20, learning_rate=1e-3)
    losses, expected = runs.losses_by_hand(20)
    assert [line["loss"] for line in lines(tmp_path)] == losses
    assert report.final_loss == losses[-1]
    assert same(weights(tmp_path), expected)


def test_a_report_holds_plan_prediction_and_what_was_measured(plan: Plan, whole: Path) -> None:
    report = json.loads((whole / "report.json").read_bytes())
    assert (report["steps"], report["samples"]) == (STEPS, 32 * STEPS)
    assert report["plan_sha256"] == plan.sha256
    assert report["measured"]["peak_memory_bytes"] == pytest.approx(
        plan.prediction.peak_memory_bytes, rel=0.002
    )
    assert report["measured"]["step_seconds"] > 0
    assert 0 <= report["waiting_share"] < 1
    # 2 flops a product: the stem, the blocks and the head, forward and twice as much backward.
    flops = 3 * 2 * (16 * 32 + 4 * 2 * 32 * 128 + 32 * 10)
    assert report["model_flops_per_second"] == pytest.approx(flops * report["samples_per_second"])
    last = lines(whole)[-1]
    assert (last["step"], last["samples"], last["loss"]) == (STEPS, 32 * STEPS, report["final_loss"])
    assert {"learning_rate", "gradient_norm", "samples_per_second", "waiting_seconds"} <= last.keys()
    assert list((whole / "tensorboard").iterdir())


def test_a_short_run_that_was_not_told_to_saves_nothing_on_the_way(whole: Path) -> None:
    assert not (whole / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    plan: Plan, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    kill = Acting(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"stopped after step 5, saved in .*step-00000005") as stopped:
        executor.train(
            plan, None, tmp_path, workload=workload(), steps=STEPS, learning_rate=1e-3, progress=kill
        )
    assert stopped.value.signal_number == number
    assert len(lines(tmp_path)) == 5
    again = Acting()
    report = executor.train(
        plan,
        None,
        tmp_path,
        workload=workload(),
        steps=STEPS,
        learning_rate=1e-3,
        resume=True,
        progress=again,
    )
    assert again.said == [f"goes on after step 5, from {tmp_path / 'checkpoints' / 'step-00000005'}"]
    assert report.resumed_after_steps == (5,)
    assert same(weights(tmp_path), weights(whole))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(whole)]


def test_thirty_kills_at_any_moment_change_nothing(plan: Plan, tmp_path: Path) -> None:
    steps = 50
    folder, file = tmp_path / "killed", str(plan.save(tmp_path / "tower.plan.json"))
    executor.train(
        plan, None, tmp_path / "whole", workload=workload(), steps=steps, learning_rate=1e-3, save_every=1
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["executor.training", "tests.runs", "torch._dynamo"])
    chosen = random.Random(1)
    arguments = {"target": runs.trained, "args": (str(folder), file, steps), "kwargs": {"save_every": 1}}
    reached = [0]
    for _ in range(30):
        child = context.Process(**arguments)
        child.start()
        # While it starts, or in whatever it does some moments after a step was saved.
        until = reached[-1] + chosen.choice([0, 1, 1, 2])
        while until > reached[-1] and newest(folder) < until and child.is_alive():
            time.sleep(0.001)
        child.join(chosen.uniform(0, 0.05))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)
        reached.append(newest(folder))
    child = context.Process(**arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(set(reached)) > 10, reached
    assert reached == sorted(reached)
    assert same(weights(folder), weights(tmp_path / "whole"))
    assert [line["loss"] for line in lines(folder)] == [line["loss"] for line in lines(tmp_path / "whole")]


def newest(folder: Path) -> int:
    return max(snapshots.steps_kept(folder / "checkpoints"), default=0)


def saved(plan: Plan, folder: Path, steps: int = STEPS, **terms: Any) -> executor.TrainingReport:
    return executor.train(
        plan, None, folder, workload=workload(), steps=steps, learning_rate=1e-3, save_every=3, **terms
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    plan: Plan, whole: Path, tmp_path: Path
) -> None:
    saved(plan, tmp_path)
    assert snapshots.steps_kept(tmp_path / "checkpoints") == [12, 9]
    file = tmp_path / "checkpoints" / "step-00000012" / "process-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))
    heard = Acting()
    report = saved(plan, tmp_path, resume=True, progress=heard)
    assert f"passed over: {file} has changed since it was written" in heard.said[0]
    assert "goes on after step 9" in heard.said[1]
    assert report.resumed_after_steps == (9,)
    assert same(weights(tmp_path), weights(whole))


def test_a_run_that_was_finished_is_not_run_again_and_can_be_made_longer(plan: Plan, tmp_path: Path) -> None:
    first = saved(plan, tmp_path)
    again = saved(plan, tmp_path, resume=True)
    assert (again.steps, again.final_loss, again.seconds) == (first.steps, first.final_loss, first.seconds)
    longer = saved(plan, tmp_path, steps=STEPS + 2, resume=True)
    assert longer.steps == STEPS + 2
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 3))


def test_checkpoints_of_another_run_are_refused_and_not_written_over(plan: Plan, tmp_path: Path) -> None:
    saved(plan, tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoints of a run, and a new one must not write over"):
        saved(plan, tmp_path)
    with pytest.raises(executor.PlanDoesNotFit, match=r"is one of another: seed 0 instead of 1\. Give"):
        saved(plan, tmp_path, resume=True, seed=1)
    with pytest.raises(executor.PlanDoesNotFit, match=r"plan [0-9a-f]{16} instead of"):
        saved(runs.recomputing(plan), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"--resume needs the folder"):
        executor.train(plan, workload=workload(), steps=1, resume=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    plan: Plan, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    heard = Acting()
    saved(plan, folder, progress=heard)
    failed = "no checkpoint could be written after step 3, and training goes on: "
    assert heard.said[0].startswith(failed)
    assert "No space left on device" in heard.said[0]
    assert list(small_disk.iterdir()) == []
    assert same(weights(folder), weights(whole))


def test_numbers_that_are_none_stop_the_run_and_say_where(plan: Plan, tmp_path: Path) -> None:
    made = workload()

    def poison() -> None:
        def broken(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * math.nan

        made.model.blocks[2].down.register_forward_hook(broken)

    with pytest.raises(NotFinite, match=r"up to step 9: the output of blocks\.2\.down \(Linear\)") as stopped:
        executor.train(
            plan, None, tmp_path, workload=made, steps=STEPS, learning_rate=1e-3, save_every=4,
            progress=Acting(4, poison),
        )  # fmt: skip
    assert "The weights are those before it" in str(stopped.value)
    path = snapshots.path_of(tmp_path / "checkpoints", 9)
    good = snapshots.load(snapshots.path_of(tmp_path / "checkpoints", 8))["engine"]["weights"]
    kept = snapshots.load(path)["engine"]["weights"]
    assert same(kept, good)
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_an_overflow_in_fp16_skips_one_step_halves_the_scale_recovers_and_is_counted(
    plan: Plan, tmp_path: Path
) -> None:
    half = msgspec.structs.replace(plan, precision="fp16")
    made = workload()

    class Overflowing(Progress):
        """Makes the gradients of the fourth step too large for fp16."""

        hook: Any = None

        def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
            if step == 3:
                self.hook = made.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
            if step == 4:
                self.hook.remove()

    report = executor.train(
        half, None, tmp_path, workload=made, steps=6, learning_rate=1e-3, progress=Overflowing()
    )
    found = lines(tmp_path)
    scales = [line["loss_scale"] for line in found]
    assert scales == [2.0**16] * 3 + [2.0**15] * 3
    assert [line["skipped_steps"] for line in found] == [0, 0, 0, 1, 1, 1]
    assert (report.skipped_steps, report.loss_scale) == (1, 2.0**15)
    assert math.isfinite(report.final_loss)


def test_a_batch_that_follows_the_noise_keeps_the_samples_and_takes_the_learning_rate_along(
    plan: Plan, tmp_path: Path
) -> None:
    heard = Acting()
    adaptive = AdaptiveAccumulation(k_max=8, target=1e-3, patience=1, smoothing=0.0)
    terms: dict[str, Any] = {"workload": workload(), "steps": 30, "learning_rate": 1e-3, "adaptive": adaptive}
    report = executor.train(plan, None, tmp_path, progress=heard, save_every=1000, **terms)
    found = lines(tmp_path)
    ks = [line["gradient_accumulation_steps"] for line in found]
    assert ks[0] == 4
    assert ks[-1] == 8
    assert all(0 <= later - earlier <= 1 for earlier, later in itertools.pairwise(ks))
    assert report.samples >= 30 * 32
    assert report.samples - 30 * 32 < 8 * 8
    total = 0
    for line in found:
        assert line["global_batch_size"] == 8 * line["gradient_accumulation_steps"]
        warm_up = 0.05 * 30 * 32
        rise = min(1.0, (total + line["global_batch_size"]) / warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (total - warm_up) / (30 * 32 - warm_up))))
        assert line["learning_rate"] == pytest.approx(1e-3 * rise * fall * line["global_batch_size"] / 32)
        total += line["global_batch_size"]
        assert line["samples"] == total
    (step,) = snapshots.steps_kept(tmp_path / "checkpoints")
    (group,) = snapshots.load(snapshots.path_of(tmp_path / "checkpoints", step))["engine"]["optimizer"][
        "param_groups"
    ]
    # So much of the past is kept over as many samples as 0.999 keeps of it over 32.
    assert group["betas"] == (0.9, pytest.approx(0.999 ** (found[-1]["global_batch_size"] / 32), rel=1e-12))
    assert heard.said[0].startswith("gradient accumulation 4 -> 5: noise scale")
    assert report.gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"steps": 1, "epochs": 1}, "--steps and --epochs contradict"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"save_every": 0}, "--save-every must be at least 1"),
        ({"epochs": 1}, "--epochs needs data of a known length"),
        ({"until": "accuracy=0.5"}, "need data that is held out"),
        ({"until": "bleu=3"}, "must be METRIC=VALUE"),
    ],
)
def test_contradictory_terms_are_refused_before_anything_is_made(
    plan: Plan, tmp_path: Path, terms: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        executor.train(plan, None, tmp_path / "run", workload=workload(), **terms)
    assert not (tmp_path / "run").exists()


def test_memory_taken_away_on_the_way_is_met_by_a_plan_that_needs_less(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.walled", str(tmp_path), str(85 * 10**6)],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False,
        # Blocks of 128 KiB or more go back when they are freed, and the limit counts what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    free, walled = found["fallbacks"]
    assert free == []
    assert found["peaks"][0] == pytest.approx(found["plain"], rel=0.002)
    assert walled[0].startswith("after step 3 out of memory with micro-batch 4 x 2, 0 segments")
    assert walled[0] == f"after step 3 {found['said'][0]}"
    assert found["peaks"][1] < found["peaks"][0]
    assert found["samples"] == [8 * 8] * 2
    assert found["losses"][0] == found["losses"][1]

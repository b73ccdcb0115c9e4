"""Plans that run: the Python interface end to end, with a model of the test's own."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import executor
import planner
import profiler
from executor.engine import split
from executor.verification import compare
from planner.cost import instead
from planner.plan import Cost, Plan, Segment
from profiler.profile_record import Profile

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "x": torch.randn(size, 32, 16, generator=generator),
        "y": torch.randint(10, (size, 32), generator=generator),
    }


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


@pytest.fixture(scope="module")
def workload() -> profiler.Workload:
    return profiler.Workload(model=tower(), batch=batch, loss=loss)


@pytest.fixture(scope="module")
def profile(workload: profiler.Workload) -> Profile:
    return profiler.profile(workload, batch_sizes=(8, 16), precisions=("fp32",), device="cpu", steps=3)


@pytest.fixture(scope="module")
def plain(profile: Profile) -> Plan:
    return planner.optimize(profile, global_batch_size=32)


@pytest.fixture(scope="module")
def tight(profile: Profile, plain: Plan) -> Plan:
    """A plan that has to recompute: the budget lies between the tightest plan and the plain one."""
    low = plain.front[0].prediction.peak_memory_bytes
    high = min(choice.prediction.peak_memory_bytes for choice in plain.front if not choice.checkpoint)
    return planner.optimize(profile, global_batch_size=32, memory_budget_bytes=(low * 2 + high) // 3)


def run_steps(plan: Plan, steps: int = 3) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = executor.prepare(model, optimizer, plan, loss=loss)
    torch.manual_seed(1)
    losses = [step(batch(plan.global_batch_size)) for _ in range(steps)]
    step.remove()
    return losses, model.state_dict()


def test_the_python_interface_profiles_optimises_saves_and_verifies_a_model_of_ones_own(
    workload: profiler.Workload, tight: Plan, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    tight.save(tmp_path / "tower.plan.json")
    loaded = planner.load_plan(tmp_path / "tower.plan.json")
    assert loaded == tight
    verification = executor.verify(loaded, workload, steps=2)
    assert verification.plan_sha256 == tight.sha256
    assert verification.measured.peak_memory_bytes == pytest.approx(
        tight.prediction.peak_memory_bytes, rel=tight.prediction.error.peak_memory_bytes
    )
    assert tight.memory_budget_bytes is not None
    assert verification.measured.peak_memory_bytes <= tight.memory_budget_bytes
    assert verification.within["memory_budget"]
    after = workload.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_that_recomputes_nothing_puts_nothing_on_the_model(plain: Plan) -> None:
    model = tower()
    optimizer = torch.optim.SGD(model.parameters())
    executor.prepare(model, optimizer, plain, loss=loss)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_binding_budget_makes_the_plan_recompute_and_a_slack_one_does_not(plain: Plan, tight: Plan) -> None:
    assert not plain.checkpoint
    assert tight.checkpoint
    assert tight.prediction.parts.step_seconds["recompute"] > 0
    assert tight.prediction.step_seconds > plain.prediction.step_seconds


def test_recomputing_changes_neither_losses_nor_weights_by_a_single_bit(plain: Plan, tight: Plan) -> None:
    same_knobs = msgspec.structs.replace(
        tight, checkpoint=(), memory_budget_bytes=None, prediction=plain.prediction
    )
    losses, weights = run_steps(tight)
    plain_losses, plain_weights = run_steps(same_knobs)
    assert all(torch.equal(a, b) for a, b in zip(losses, plain_losses, strict=True))
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


def test_micro_batches_agree_with_one_large_batch_to_rounding(plain: Plan) -> None:
    def gradients(k: int) -> list[torch.Tensor]:
        plan = msgspec.structs.replace(
            plain, micro_batch_size=32 // k, gradient_accumulation_steps=k, checkpoint=()
        )
        model = tower().eval()
        seen: list[torch.Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
        )
        executor.prepare(model, optimizer, plan, loss=loss, max_gradient_norm=None)(batch(32))
        return seen

    one, many = gradients(1), gradients(8)
    for a, b in zip(one, many, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(a)


def test_a_step_takes_an_iterator_of_micro_batches_as_well(plain: Plan) -> None:
    model = tower()
    step = executor.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), plain, loss=loss)
    model.eval()
    whole = batch(32)
    pieces = split(whole, 32, plain.gradient_accumulation_steps)
    assert torch.equal(step(whole), step(iter(pieces)))


def test_a_batch_of_another_size_is_refused_with_both_sizes(plain: Plan) -> None:
    model = tower()
    step = executor.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), plain, loss=loss)
    with pytest.raises(ValueError, match=r"global_batch_size = 32 samples .* got 30"):
        step(batch(30))


def test_a_plan_for_another_model_is_refused_before_anything_changes(tight: Plan) -> None:
    model = nn.Sequential(nn.Linear(16, 10))
    with pytest.raises(executor.PlanDoesNotFit, match="which Sequential has not"):
        executor.apply_checkpoints(model, tight)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_plan_for_another_device_is_refused_by_name(tight: Plan, workload: profiler.Workload) -> None:
    elsewhere = msgspec.structs.replace(
        tight, device=msgspec.structs.replace(tight.device, name="Another CPU")
    )
    with pytest.raises(executor.PlanDoesNotFit, match="made for Another CPU"):
        executor.verify(elsewhere, workload)


def test_a_plan_from_a_python_object_needs_that_object_again(tight: Plan) -> None:
    with pytest.raises(executor.PlanDoesNotFit, match="made from a Workload object"):
        executor.verify(tight)


def test_a_measurement_outside_the_stated_error_or_the_budget_does_not_pass(tight: Plan) -> None:
    def measured(*, seconds: float = 1.0, memory: float = 1.0) -> Cost:
        prediction = tight.prediction
        assert prediction.step_cpu_seconds is not None
        return Cost(
            step_seconds=prediction.step_seconds * seconds,
            step_cpu_seconds=prediction.step_cpu_seconds * seconds,
            peak_memory_bytes=round(prediction.peak_memory_bytes * memory),
            peak_reserved_bytes=None,
            step_joules=None,
        )

    assert compare(tight, measured(), 1, None).passed
    # Of steps as short as these it is more than a half where others work beside.
    stated = tight.prediction.error.step_seconds
    fast = compare(tight, measured(seconds=1 / (1 + 1.01 * stated)), 1, None)
    assert fast.within == {"step_seconds": False, "peak_memory_bytes": True, "memory_budget": True}
    assert not fast.passed
    slow = compare(tight, measured(seconds=3.0), 1, None)
    assert slow.relative_error["step_seconds"] == pytest.approx(-2 / 3)
    assert slow.passed == (stated >= 2 / 3)
    assert tight.prediction.yardstick_seconds is not None
    drifted = compare(tight, measured(seconds=3.0), 1, None, 3.0 * tight.prediction.yardstick_seconds)
    assert drifted.device_speed == pytest.approx(1 / 3)
    assert drifted.relative_error["steady_seconds"] == pytest.approx(0)
    assert drifted.passed
    large = compare(tight, measured(memory=1.5), 1, None)
    assert large.within == {"step_seconds": True, "peak_memory_bytes": False, "memory_budget": False}


def test_a_baseline_can_be_run_in_the_plans_place(tight: Plan, workload: profiler.Workload) -> None:
    plan = instead(tight, tight.baselines.every_block)
    assert plan.checkpoint == tight.baselines.every_block.checkpoint
    assert plan.memory_budget_bytes is None
    verification = executor.verify(plan, workload, steps=1)
    assert verification.measured.peak_memory_bytes == pytest.approx(
        plan.prediction.peak_memory_bytes, rel=plan.prediction.error.peak_memory_bytes
    )


def test_segments_of_a_plan_name_modules_of_the_model(tight: Plan) -> None:
    names = {name for name, _ in tower().named_modules()}
    assert all(isinstance(s, Segment) and {s.enter, s.leave} <= names for s in tight.checkpoint)


def test_training_resnet50_on_generated_images_lowers_the_loss_and_reports_what_it_did(
    tmp_path: Path,
) -> None:
    spec = profiler.WorkloadSpec(name="resnet50", image_size=32)
    small = profiler.profile(
        profiler.build(spec), batch_sizes=(4,), precisions=("fp32",), device="cpu", steps=1, spec=spec
    )
    plan = planner.optimize(small, global_batch_size=8)
    report = executor.train(plan, output_dir=tmp_path / "run", steps=6, learning_rate=1e-3)
    assert (report.steps, report.samples) == (6, 48)
    assert report.data == "generated images (no download)"
    assert report.plan_sha256 == plan.sha256
    assert report.measured.peak_memory_bytes == pytest.approx(plan.prediction.peak_memory_bytes, rel=0.002)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert lines[-1]["loss"] == report.final_loss
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 90e6
    again = executor.train(plan, steps=6, learning_rate=1e-3)
    assert again.final_loss == report.final_loss


def test_steps_and_epochs_together_are_refused(plain: Plan) -> None:
    with pytest.raises(ValueError, match="--steps and --epochs contradict"):
        executor.train(plain, steps=1, epochs=1)


def test_a_plan_of_several_processes_is_refused_by_what_runs_one(plain: Plan) -> None:
    several = msgspec.structs.replace(plain, world_size=2, global_batch_size=2 * plain.global_batch_size)
    with pytest.raises(
        executor.PlanDoesNotFit, match=r"for 2 processes, and this is one. .* use executor\.distributed"
    ):
        executor.verify(several, steps=1)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(executor.PlanDoesNotFit, match="for 2 processes"):
        executor.prepare(model, torch.optim.SGD(model.parameters()), several, loss=lambda m, b: m(b).sum())

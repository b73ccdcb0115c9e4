"""The loss in chunks: the same loss and gradients, less memory, as predicted; refused where it would be wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import executor
import planner
import profiler
from executor.errors import PlanDoesNotFit
from planner.cost import instead, name_segments
from planner.explain import checkpoint_text
from planner.nested import Placed
from planner.search import CHUNKS_ERROR
from profiler.chunked import ChunkedLoss, ChunkedLossError, can_be_chunked, chunks_for, in_chunks
from profiler.live import LiveStorages
from profiler.profile_record import Profile
from profiler.workload import Workload
from tests.models import cnn

CHUNKS = 8
"""Of 64 micro-batches of 32 tokens, 256 in each."""


def wordy(vocabulary: int = 4096) -> Workload:
    """A GPT-2 of two narrow blocks whose logits are most of its memory; labels are ignored here and there."""
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=vocabulary, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip

    def batch(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(vocabulary, (size, 32))
        labels = torch.where(torch.rand(size, 32) < 0.2, -100, tokens)
        return {"input_ids": tokens, "labels": labels}

    return Workload(
        model=GPT2LMHeadModel(config).train(), batch=batch, loss=lambda model, batch: model(**batch).loss
    )


def loss_and_gradients(workload: Workload, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(4)
    workload.model.zero_grad()
    loss = workload.loss(workload.model, batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunks", [2, 7, 16, 500])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_whole_loss(chunks: int, precision: torch.dtype | None) -> None:
    workload = wordy(256)
    batch = workload.batch(3)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        loss, gradients = loss_and_gradients(workload, batch)
        with in_chunks(workload.model, chunks):
            same_loss, same_gradients = loss_and_gradients(workload, batch)
    tolerance = 1e-5 if precision is None else 2e-2
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(same_gradients) > 0
    for one, other in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def test_what_was_put_on_comes_off_without_a_trace() -> None:
    workload = wordy(256)
    model = workload.model
    names, before, batch = list(model.state_dict()), dict(vars(model)), workload.batch(2)
    logits = model.eval()(**batch).logits
    with in_chunks(model, 4):
        assert list(model.state_dict()) == names
        assert model(**batch).logits is None
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)
    assert torch.equal(model(**batch).logits, logits)
    assert "_loss_function" not in vars(model)
    assert set(vars(model)) == set(before)
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks


class Capped(GPT2LMHeadModel):
    """Changes its logits between head and loss, as some do."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda *args: torch.tanh(args[2]))


def test_a_model_that_changes_its_logits_first_is_refused_when_it_does() -> None:
    workload = wordy(256)
    model = Capped(workload.model.config)
    ChunkedLoss(model, 4)
    with pytest.raises(ChunkedLossError, match="changes its logits between head and loss"):
        model(**workload.batch(2))


def test_a_chunk_has_256_tokens_of_the_largest_micro_batch_and_there_are_two_at_least() -> None:
    workload = wordy(64)
    assert [chunks_for(workload.batch(size)) for size in (1, 8, 16, 64, 65)] == [2, 2, 2, 8, 8]
    assert chunks_for(torch.ones(9999)) == 2


def test_other_models_are_refused() -> None:
    model = cnn().model
    assert not can_be_chunked(model)
    with pytest.raises(ChunkedLossError, match="must be a causal language model"):
        ChunkedLoss(model, 4)


def test_only_a_chunk_of_the_logits_is_there_at_a_time() -> None:
    """8 x 32 tokens of 4,096 words in fp32 are 4 MiB of logits; a sixteenth of them is a quarter MiB."""
    workload = wordy()
    batch = workload.batch(8)

    def peak() -> int:
        with LiveStorages() as live:
            workload.loss(workload.model, batch).backward()
            workload.model.zero_grad(set_to_none=True)
        return live.peak_bytes

    whole = peak()
    with in_chunks(workload.model, 16):
        assert peak() < whole - 2 * 4 * 2**20


@pytest.fixture(scope="module")
def profiled() -> tuple[Workload, Profile]:
    torch.manual_seed(0)
    workload = wordy()
    return workload, profiler.profile(workload, batch_sizes=(2, 64), precisions=("fp32",), steps=2)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_a_plan_with_chunks_needs_what_it_says(profiled: tuple[Workload, Profile], size: int) -> None:
    workload, profile = profiled
    plan = planner.optimize(
        profile, global_batch_size=2 * size, weights=planner.Weights(time=0.0, memory=1.0)
    )
    sized = [c for c in plan.front if c.micro_batch_size == size and c.loss_chunks]
    assert plan.loss_chunks == CHUNKS
    for choice in sized[:2]:
        found = executor.verify(instead(plan, choice), workload, steps=1)
        error = found.relative_error["peak_memory_bytes"]
        assert error is not None
        assert abs(error) < choice.prediction.error.peak_memory_bytes == CHUNKS_ERROR


def test_a_budget_that_the_whole_logits_break_is_met_by_chunks(profiled: tuple[Workload, Profile]) -> None:
    """Two samples: 64 tokens of 4,096 words are a MiB, several times over; the rest of the model is 2 MiB."""
    _, profile = profiled
    tightest = planner.optimize(profile, 2, weights=planner.Weights(time=0.0, memory=1.0)).prediction
    plan = planner.optimize(profile, 2, memory_budget_bytes=int(1.05 * tightest.peak_memory_bytes))
    assert plan.loss_chunks == CHUNKS
    assert f"the loss in {CHUNKS} chunks" in checkpoint_text(plan.checkpoint, plan.loss_chunks)
    plain = plan.baselines.plain.prediction
    assert plan.prediction.peak_memory_bytes < 0.8 * plain.peak_memory_bytes


def test_a_plan_with_chunks_for_another_kind_of_model_is_refused_before_anything_changes(
    profiled: tuple[Workload, Profile],
) -> None:
    _, profile = profiled
    plan = planner.optimize(profile, global_batch_size=8, weights=planner.Weights(time=0.0, memory=1.0))
    other = nn.Module()
    other.transformer = profiled[0].model.transformer
    other.lm_head = nn.Linear(32, 4096)
    with pytest.raises(PlanDoesNotFit, match="has the loss in chunks"):
        executor.apply_checkpoints(other, plan)
    assert not any(module._forward_pre_hooks for module in other.modules())


def test_steps_with_chunks_and_segments_train_like_plain_ones() -> None:
    workload = wordy()
    profile = profiler.profile(workload, batch_sizes=(4,), precisions=("fp32",), fake=True)
    plan = planner.optimize(profile, global_batch_size=8, weights=planner.Weights(time=0.0, memory=1.0))
    assert plan.loss_chunks
    # The chunks of the loss are what is tightest, so segments are put on by hand.
    plan = msgspec.structs.replace(
        plan, checkpoint=name_segments(profile, Placed(segments=((2, 4),), selective=(4,)))
    )
    batch = workload.batch(8)
    losses = []
    for placed in (None, plan):
        torch.manual_seed(2)
        model = GPT2LMHeadModel(workload.model.config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        used = planner.optimize(profile, global_batch_size=8) if placed is None else placed
        step = executor.prepare(model, optimizer, used, workload.loss)
        torch.manual_seed(3)
        losses.append(torch.stack([step(batch) for _ in range(3)]))
        step.remove()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)

"""Where a model can be cut: one activation crosses, a module begins there, and nothing rewrites it afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from profiler.chain import Call, Stage, discover, recomputable_stages
from profiler.workload import Workload
from tests.models import Chained, ResidualCNN, classifier, cnn, gpt2, mlp


def cuts(workload: Workload) -> list[tuple[str, str]]:
    return [(stage.name, stage.entry) for stage in discover(workload)]


def entries(workload: Workload) -> list[str]:
    return [stage.entry for stage in discover(workload)]


def test_a_gpt2_is_cut_into_half_blocks() -> None:
    assert cuts(gpt2(layers=2)) == [
        ("transformer.wte", ""),
        ("transformer.drop", "transformer.drop"),
        ("transformer.h.0.attn", "transformer.h.0"),
        ("transformer.h.0.mlp", "transformer.h.0.ln_2"),
        ("transformer.h.1.attn", "transformer.h.1"),
        ("transformer.h.1.mlp", "transformer.h.1.ln_2"),
        ("transformer.ln_f", "transformer.ln_f"),
        ("lm_head", "lm_head"),
    ]


def test_stages_count_the_parameters_that_begin_in_them() -> None:
    """A half block of width 32: ln 64, attn 32 * 96 + 96 + 32 * 32 + 32; ln 64, mlp 32 * 128 + 128 + 128 * 32 + 32."""
    counts = {stage.name: stage.parameter_count for stage in discover(gpt2(layers=2))}
    assert counts["transformer.wte"] == 64 * 32 + 16 * 32
    assert counts["transformer.h.0.attn"] == 64 + 4224
    assert counts["transformer.h.1.mlp"] == 64 + 8352
    assert counts["transformer.drop"] == 0


def test_a_residual_network_is_cut_between_its_blocks_and_nowhere_inside() -> None:
    assert cuts(cnn(blocks=3)) == [
        ("stem", ""),
        ("blocks.0", "blocks"),
        ("blocks.1", "blocks.1"),
        ("blocks.2", "blocks.2"),
        ("pool", "pool"),
        ("head", "head"),
    ]


def test_a_sequential_is_cut_before_every_layer() -> None:
    assert entries(mlp(hidden_layers=3)) == ["", "1", "2", "3", "4", "5", "6"]


def test_nothing_inside_a_skip_over_everything_is_a_cut() -> None:
    model = Chained(
        lambda m, x: m.last(torch.cat([skip := m.first(x), m.up(m.middle(m.down(skip)))], 1)),
        first=nn.Linear(8, 8), down=nn.Linear(8, 4), middle=nn.Linear(4, 4), up=nn.Linear(4, 8),
        last=nn.Linear(16, 5),
    )  # fmt: skip
    assert entries(classifier(model, 8)) == ["", "down", "last"]


def test_a_model_that_can_be_cut_nowhere_is_one_stage() -> None:
    assert cuts(classifier(nn.Linear(4, 5), 4)) == [("forward", "")]


def test_what_is_rewritten_in_place_afterwards_is_no_boundary() -> None:
    def layers(inplace: bool) -> Workload:
        return classifier(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 5)), 4)

    assert entries(layers(inplace=False)) == ["", "1", "2"]
    assert entries(layers(inplace=True)) == ["", "2"]


def test_later_calls_of_a_shared_module_are_numbered() -> None:
    model = Chained(
        lambda m, x: m.out(m.shared(m.shared(m.shared(m.inlet(x))))),
        inlet=nn.Linear(4, 4), shared=nn.Linear(4, 4), out=nn.Linear(4, 5),
    )  # fmt: skip
    assert cuts(classifier(model, 4)) == [
        ("inlet", ""),
        ("shared", "shared"),
        ("shared#1", "shared#1"),
        ("shared#2", "shared#2"),
        ("out", "out"),
    ]


@pytest.mark.parametrize("text", ["transformer.h.0", "shared#2"])
def test_a_call_is_written_as_it_is_read(text: str) -> None:
    assert str(Call.parse(text)) == text


def test_glue_between_modules_belongs_to_the_stage_before() -> None:
    model = Chained(lambda m, x: m.b(F.relu(F.relu(m.a(x)) + 1)), a=nn.Linear(4, 4), b=nn.Linear(4, 5))
    assert cuts(classifier(model, 4)) == [("a", ""), ("b", "b")]


def test_frozen_layers_in_front_make_no_activation_to_cut_at() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[:2].requires_grad_(False)
    assert entries(classifier(model, 4)) == ["", "3"]


def test_position_biases_that_depend_on_parameters_alone_may_cross_a_cut() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.table(torch.arange(4)).sum(0)
            for layer in self.layers:
                x = layer(x) + bias
            return x

    assert entries(classifier(Biased(), 4)) == ["", "layers.1", "layers.2"]


def test_a_loss_that_depends_on_no_parameter_is_refused() -> None:
    workload = Workload(
        model=nn.Linear(4, 4), batch=lambda size: torch.randn(size, 4), loss=lambda model, batch: batch.sum()
    )
    with pytest.raises(ValueError, match="must depend on the batch and on a trainable parameter"):
        discover(workload)


def test_neither_the_first_stage_nor_the_last_nor_one_past_the_first_call_is_recomputed() -> None:
    stages = [Stage(name=str(i), entry=str(i), in_first_call=i != 3) for i in range(5)]
    assert recomputable_stages(stages) == (False, True, True, False, False)


def test_stages_of_a_second_call_of_the_model_are_marked() -> None:
    """Two calls in one loss: hooks count within one, so only the first call's stages can be recomputed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    workload = Workload(
        model=model, batch=lambda size: torch.randn(size, 4), loss=lambda model, x: model(model(x)).sum()
    )
    assert [(stage.entry, stage.in_first_call) for stage in discover(workload)] == [
        ("", True), ("1", True), ("2", True), ("#1", False), ("1#1", False), ("2#1", False),
    ]  # fmt: skip


def test_finding_the_chain_leaves_the_model_as_it_was() -> None:
    model = ResidualCNN(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    discover(classifier(model, 3, 8, 8))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(hooks) == 0 == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

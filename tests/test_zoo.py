"""Models of every build profile without a case of their own, and their memory is predicted to the byte.

Each is traced without being run: the peak composed from curves, at a size that was not traced, has to be the one read
off a fake step of that size. A few are profiled and run for real.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from executor.recompute import Checkpoints, Stretch
from planner.cli.profile import show
from planner.nested import PLAIN, Placed
from planner.search import optimize
from profiler.chain import discover, recomputable_stages
from profiler.measure import profile
from profiler.memory import MemoryTracer
from profiler.rehearsal import rehearse
from profiler.step import Stepper, build_optimizer
from profiler.transformers_workload import of_configuration
from profiler.workload import Workload
from profiler.workload_spec import WorkloadSpec
from studies.composition import stretches
from studies.zoo import examined, small_configuration
from tests.models import CLASSES, classifier


class UNet(nn.Module):
    """Two levels down and up again; each level's output crosses over to its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)])
        self.middle = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
        )
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(32, 8, 2, 2)])
        self.outlet = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.inlet(x)]
        for down in self.down:
            skips.append(F.relu(down(skips[-1])))
        x = self.middle(skips.pop())
        for up in self.up:
            x = torch.cat([F.relu(up(x)), skips.pop()], 1)
        return self.outlet(x).mean((2, 3))


class Recurrent(nn.Module):
    """Two LSTMs one after the other; a tensor made in forward; a tuple between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(6, 16, batch_first=True)
        self.second = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(1, len(x), 16)
        x, state = self.first(x, (state, state))
        x, _ = self.second(x, state)
        return self.head(x[:, -1])


class Outputs(NamedTuple):
    x: torch.Tensor
    extra: torch.Tensor


@dataclass
class Output:
    x: torch.Tensor
    extra: torch.Tensor


class Wrapping(nn.Module):
    """Blocks called with keyword arguments that hand a container from one to the next."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any], unwrap: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Keyword() for _ in range(4))
        self.head = nn.Linear(8, CLASSES)
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.wrap(x)
        for block in self.blocks:
            held = self.wrap(block(hidden=self.unwrap(held), scale=torch.ones(8)))
        return self.head(self.unwrap(held))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, *, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return hidden + F.gelu(self.linear(hidden * scale))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Squaring(nn.Module):
    """A linear layer and a function with a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Square.apply(self.linear(x))


class Experts(nn.Module):
    """Two experts of which a router weighs both: dense, as its shapes must not depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return x + sum(w.unsqueeze(-1) * e(x) for w, e in zip(weights.unbind(-1), self.experts, strict=True))


class Bare(nn.Module):
    """No module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).tanh()


def tied() -> nn.Module:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    layers[3].weight = layers[0].weight
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def half_frozen() -> nn.Module:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)), nn.Linear(8, CLASSES)
    )
    model[:3].requires_grad_(False)
    return model


def frozen_in_the_middle() -> nn.Module:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)), nn.Linear(8, CLASSES)
    )
    model[2:4].requires_grad_(False)
    return model


def of_type(model_type: str, **changes: Any) -> Workload:
    spec = WorkloadSpec(name=f"transformers:{model_type}", sequence_length=16)
    return of_configuration(small_configuration(model_type, changes), spec, 0)


OWN: dict[str, tuple[Callable[[], Workload], int]] = {
    "U-Net": (lambda: classifier(UNet(), 3, 16, 16), 3),
    "LSTM": (lambda: classifier(Recurrent(), 5, 6), 2),
    "experts": (lambda: classifier(nn.Sequential(Experts(), Experts(), nn.Linear(8, CLASSES)), 8), 3),
    "dicts": (lambda: classifier(Wrapping(lambda x: {"x": x}, lambda held: held["x"]), 8), 5),
    "tuples": (lambda: classifier(Wrapping(lambda x: (x, x.shape), lambda held: held[0]), 8), 5),
    "named tuples": (lambda: classifier(Wrapping(lambda x: Outputs(x, x), lambda held: held.x), 8), 5),
    "dataclasses": (lambda: classifier(Wrapping(lambda x: Output(x, x), lambda held: held.x), 8), 5),
    "own autograd": (
        lambda: classifier(nn.Sequential(*(Squaring() for _ in range(3)), nn.Linear(8, CLASSES)), 8),
        4,
    ),
    "tied weights": (lambda: classifier(tied(), 8), 5),
    "half frozen": (lambda: classifier(half_frozen(), 8), 7),
    "frozen in the middle": (lambda: classifier(frozen_in_the_middle(), 8), 13),
    "no modules": (lambda: classifier(Bare(), 8), 1),
}
"""The workload, and how many stages can be seen in its drawing."""

NAMED: dict[str, Callable[[], Workload]] = {
    "encoder-decoder (T5)": lambda: of_type("t5"),
    "encoder-decoder (BART)": lambda: of_type("bart"),
    "mixture of experts (Mixtral)": lambda: of_type("mixtral", num_local_experts=4),
    "encoder (ELECTRA)": lambda: of_type("electra"),
}


@pytest.mark.parametrize("name", OWN)
def test_any_build_of_module_is_cut_and_its_peak_composed_exactly(name: str) -> None:
    build, stages = OWN[name]
    found = examined(build())
    assert found["stages"] == stages
    assert found["composed_peak_bytes"] == found["direct_peak_bytes"]


@pytest.mark.parametrize("name", NAMED)
def test_any_model_type_is_cut_and_its_peak_composed_exactly(name: str) -> None:
    found = examined(NAMED[name]())
    assert found["stages"] >= 4
    assert found["composed_peak_bytes"] == found["direct_peak_bytes"]


@pytest.mark.parametrize("name", OWN)
def test_recomputing_every_stage_of_any_build_changes_no_weight_by_a_bit(name: str) -> None:
    torch.manual_seed(0)
    workload = OWN[name][0]()
    stages = discover(workload)
    batches = [workload.batch(2) for _ in range(2)]
    every = tuple((i, i + 1) for i, allowed in enumerate(recomputable_stages(stages)) if allowed)
    plain, recomputed = (
        weights_after_a_step(copy.deepcopy(workload.model), workload, batches, stretches(stages, placed))
        for placed in (PLAIN, Placed(segments=every))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def weights_after_a_step(
    model: nn.Module, workload: Workload, batches: list[Any], segments: Sequence[Stretch]
) -> list[torch.Tensor]:
    checkpoints = Checkpoints(model, segments)
    optimizer = build_optimizer("sgd", model, learning_rate=0.1)
    stepper = Stepper(
        model=model, loss=workload.loss, optimizer=optimizer, precision="fp32", device_type="cpu"
    )
    stepper.step(batches, len(batches))
    assert checkpoints.counts == [[2, 2]] * len(segments)
    return list(model.parameters())


def test_a_model_without_modules_profiles_for_real_and_the_command_says_that_it_has_no_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = profile(OWN["no modules"][0](), (2, 4), ("fp32",), "cpu", steps=1)
    show(found, Path("bare.profile.json"))
    assert "It can be cut nowhere: it is one stage" in capsys.readouterr().out
    assert optimize(found, global_batch_size=8).checkpoint == ()


def test_a_frozen_layer_between_others_is_a_stage_without_gradients() -> None:
    workload = OWN["frozen in the middle"][0]()
    memory = MemoryTracer(workload, discover(workload), "adamw").memory("fp32", (2, 4))
    gradients = [stage.gradient[0] for stage in memory.stages]
    layer = (8 * 8 + 8) * 4
    assert gradients == [layer, 0, layer, 0, 0, 0, 0, 0, layer, 0, layer, 0, (8 * CLASSES + CLASSES) * 4]


def test_speech_is_trained_on_transcripts_whose_lengths_only_integers_tell() -> None:
    """The shape of what CTC's kernel returns depends on the longest transcript, which a fake tensor cannot know."""
    changes = {
        "num_feat_extract_layers": 2,
        "conv_dim": [16, 16],
        "conv_stride": [20, 16],
        "conv_kernel": [20, 16],
    }
    spec = WorkloadSpec(name="transformers:wav2vec2")
    workload = of_configuration(small_configuration("wav2vec2", changes), spec, 0)
    rehearse(workload, 2, ())
    assert len(discover(workload)) > 5

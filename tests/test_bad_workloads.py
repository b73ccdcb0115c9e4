"""A workload that cannot be profiled is refused in one line: which call, what was expected, where, the way out."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import cli
from profiler.device import is_out_of_memory
from profiler.measure import profile
from profiler.rehearsal import rehearse
from profiler.workload import Workload
from profiler.workload_spec import WorkloadError
from tests.models import Chained, mlp

ROOT = Path(__file__).parents[1]


def tensors(size: int) -> torch.Tensor:
    return torch.randn(size, 4)


def workload(
    model: nn.Module | None = None,
    batch: Callable[[int], Any] = tensors,
    loss: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch).mean(),
) -> Workload:
    return Workload(model=model or nn.Linear(4, 2), batch=batch, loss=loss)


def refusal(bad: Workload, sizes: tuple[int, ...] = (2, 3)) -> str:
    """What the public entry point says, which has to be one line that is ours."""
    with pytest.raises(WorkloadError) as caught:
        profile(bad, sizes, ("fp32",), "cpu", steps=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fails_in_the_middle(inside: Callable[[torch.Tensor], torch.Tensor]) -> Workload:
    """A model whose second layer's second module is a function."""
    layer = nn.Sequential(nn.Linear(4, 4), Chained(lambda m, x: inside(x)))
    return workload(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)))


@dataclass
class NotATree:
    x: torch.Tensor


class TestBatch:
    @pytest.mark.parametrize(
        ("batch", "got"),
        [
            (lambda size: "two", "got str."),
            (lambda size: None, "got NoneType."),
            (lambda size: ["two", "words"], "got list of str."),
            (lambda size: {"x": [1.0, 2.0]}, "got dict of float."),
            (lambda size: NotATree(torch.randn(size, 4)), "got NotATree."),
        ],
    )
    def test_without_a_tensor_is_refused_with_what_it_is(self, batch: Callable[[int], Any], got: str) -> None:
        message = refusal(workload(batch=batch))
        assert message.startswith(
            "batch(2) must return a tensor, or dicts, lists and tuples of tensors, " + got
        )

    def test_whose_first_dimension_is_not_the_samples_is_refused_by_the_name_of_the_tensor(self) -> None:
        bad = workload(batch=lambda size: {"x": torch.randn(size, 4), "mask": torch.ones(7, size)})
        message = refusal(bad)
        assert message.startswith("batch(2) must return tensors with 2 samples in their first dimension")
        assert "got batch['mask'] of shape (7, 2)." in message

    def test_that_ignores_the_size_is_refused_at_the_size_that_shows_it(self) -> None:
        assert refusal(workload(batch=lambda size: torch.randn(2, 4))).startswith("batch(3) must return")

    def test_of_scalars_alone_is_refused(self) -> None:
        bad = workload(batch=lambda size: torch.tensor(1.0))
        assert "got only scalars." in refusal(bad)

    def test_that_raises_is_named_with_the_error_and_the_line_of_the_users_code(self) -> None:
        def batch(size: int) -> torch.Tensor:
            raise KeyError("no column 'text'")

        line = batch.__code__.co_firstlineno + 1
        assert refusal(workload(batch=batch)).startswith(
            f"""batch(2) raised KeyError: "no column 'text'", at tests/test_bad_workloads.py:{line}."""
        )

    def test_of_one_that_the_model_rejects_says_to_profile_larger_ones(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        message = refusal(workload(model), sizes=(1, 2))
        assert message.startswith(
            "loss(model, batch(1)) raised ValueError: Expected more than 1 value per channel"
        )
        assert ", in 1, at " in message
        assert "profile larger micro-batches (--batch 2,4)." in message


class TestLoss:
    @pytest.mark.parametrize(
        ("loss", "says"),
        [
            (lambda model, x: model(x), r"must return one number, got a tensor of shape \(2, 2\)\..*\.mean"),
            (lambda model, x: {"loss": model(x).mean()}, r"must return a scalar tensor .*, got dict\."),
            (lambda model, x: model(x).mean().item(), r"must return a scalar tensor .*, got float\."),
            (lambda model, x: None, r"must return a scalar tensor .*, got NoneType\."),
            (lambda model, x: model(x).mean().detach(), r"must depend on a parameter .*\.detach\(\)"),
            (lambda model, x: x.clone().requires_grad_().sum(), r"must depend on a parameter"),
            (lambda model, x: model(x).mean() * float("nan"), r"must be finite, got nan\. Check the batch"),
            (lambda model, x: model(x).exp().sum() * float("inf"), r"must be finite, got inf\."),
        ],
    )
    def test_that_backward_cannot_start_from_is_refused(self, loss: Callable[..., Any], says: str) -> None:
        message = refusal(workload(loss=loss))
        assert re.match(r"loss\(model, batch\(2\)\) " + says, message), message

    def test_that_takes_another_kind_of_batch_is_refused_with_the_line_that_takes_it(self) -> None:
        message = refusal(
            workload(
                batch=lambda size: [torch.randn(size, 4)], loss=lambda model, batch: model(batch["x"]).sum()
            )
        )
        assert message.startswith("loss(model, batch(2)) raised TypeError: list indices must be integers")
        assert ", at tests/test_bad_workloads.py:" in message

    def test_that_fails_in_the_backward_pass_is_refused_as_that(self) -> None:
        class OneWay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("no way back")

        message = refusal(fails_in_the_middle(OneWay.apply))
        assert message.startswith("loss(model, batch(2)).backward() raised RuntimeError: no way back, at ")

    def test_that_a_precision_breaks_names_the_precision(self) -> None:
        """Under autocast the linear layer's output is bf16, and ``dot`` wants both of its operands alike."""
        bad = workload(loss=lambda model, x: torch.dot(model(x).flatten(), torch.ones(4)))
        with pytest.raises(WorkloadError) as caught:
            profile(bad, (2,), ("fp32", "bf16"), "cpu", steps=1)
        assert str(caught.value).startswith(
            "loss(model, batch(2)) in bf16 raised RuntimeError: dot : expected"
        )
        assert "Leave this precision out" in str(caught.value)


class TestModel:
    def test_that_raises_is_named_down_to_the_innermost_module(self) -> None:
        message = refusal(fails_in_the_middle(lambda x: x.view(3, 5)))
        assert message.startswith("loss(model, batch(2)) raised RuntimeError: shape '[3, 5]' is invalid")
        assert ", in 1.1, at tests/test_bad_workloads.py:" in message

    @pytest.mark.parametrize(
        "inside",
        [
            lambda x: x * 2 if x.sum() > 0 else x * 3,
            lambda x: x * x.max().item(),
            lambda x: x * torch.tensor(x.detach().numpy()),
            lambda x: x * x.tolist()[0][0],
            lambda x: x[x >= x.mean()].mean() * x,
        ],
        ids=["if", "item", "numpy", "tolist", "float mask"],
    )
    def test_that_asks_floats_for_their_values_is_told_from_a_broken_one(
        self, inside: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        message = refusal(fails_in_the_middle(inside))
        assert message.startswith("loss(model, batch(2)) works, but under fake tensors")
        assert ", in 1.1, at tests/test_bad_workloads.py:" in message
        assert "Use torch.where" in message

    def test_whose_parameters_have_no_shape_yet_is_refused(self) -> None:
        message = refusal(workload(nn.Sequential(nn.LazyLinear(3))))
        assert message.startswith("model must have its parameters, but 0.weight gets a shape in the first")

    def test_that_depends_on_the_values_of_integers_is_fine(self) -> None:
        """A mask of the batch decides on shapes, as in a masked language model that scores only some places."""
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

        def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            chosen = batch["y"] != 0
            return F.cross_entropy(model[1](model[0](batch["y"])[chosen]), batch["y"][chosen])

        good = Workload(
            model=model, batch=lambda size: {"y": torch.arange(size * 4).view(size, 4) % 9}, loss=loss
        )
        rehearse(good, 2, (3,))


def test_what_is_right_passes_and_keeps_nothing() -> None:
    good = mlp()
    before = [parameter.clone() for parameter in good.model.parameters()]
    rehearse(good, 1, (2, 4))
    after = list(good.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_the_original_error_is_kept_as_the_cause() -> None:
    with pytest.raises(WorkloadError) as caught:
        profile(fails_in_the_middle(lambda x: x.view(3, 5)), (2,), ("fp32",), "cpu", steps=1)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_command_says_it_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, profiler\n"
        "def bad():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(5, 2))\n"
        "    return profiler.Workload(\n"
        "        model=model, batch=lambda n: torch.randn(n, 4), loss=lambda m, x: m(x).sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", "profile", "mine:bad", "--precision", "fp32", "--batch", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.splitlines()[-1]
    begins, _, says = message.partition(" raised RuntimeError: ")
    assert begins == "planner: loss(model, batch(2))"
    assert says.removeprefix("addmm: ").startswith(
        "mat1 and mat2 shapes"
    )  # The name came with a later torch.
    assert message.endswith(", in 1, at mine.py:5.")
    assert "Traceback" not in done.stderr


def test_what_a_failed_call_had_allocated_goes_with_its_error() -> None:
    """Without waiting for the garbage collector: a step that was refused memory is followed by one that needs it."""
    allocated: list[weakref.ref[torch.Tensor]] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        activations = model(batch)
        allocated.append(weakref.ref(activations))
        raise RuntimeError("can't allocate memory")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(WorkloadError):
            rehearse(workload(loss=loss), 2, ())
        assert [reference() for reference in allocated] == [None]
    finally:
        gc.enable()


def test_weights_that_the_device_refuses_are_named_with_the_ways_out() -> None:
    class Refused(nn.Linear):
        moved = 0

        def to(self, *to: Any, **how: Any) -> Any:
            self.moved += 1
            if self.moved == 1:  # And then it is brought home.
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().to(*to, **how)

    with pytest.raises(
        ValueError, match=r"weights must fit on the cpu device, and these of 1 MiB.*--fake"
    ) as refused:
        profile(workload(Refused(512, 512)), (2,), ("fp32",), "cpu")
    assert is_out_of_memory(refused.value), "a trial whose weights do not fit is no crash"


def test_a_command_that_runs_out_of_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: argparse.Namespace) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(cli.devices, "run", refused)
    assert cli.main(["devices"]) == 6
    assert capsys.readouterr().err == "planner: CUDA out of memory. Tried to allocate 20.00 GiB.\n"

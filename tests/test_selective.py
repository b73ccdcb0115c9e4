"""Which operations a selective segment keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from profiler.selective import NARROW, NOWHERE, WIDE, keepers


class Kept(TorchDispatchMode):
    """What is kept of what runs, by the name of the operation, and whether it was no larger than its input."""

    def __init__(self, made_from: int) -> None:
        super().__init__()
        self.found: list[tuple[str, frozenset[str], bool]] = []
        self._made_from = made_from

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        how = keepers(func, args, kwargs or {})
        if how:
            smaller = output.numel() <= args[self._made_from].numel()
            self.found.append((func.overloadpacket.__name__, how, smaller))
        return output


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("channels", [3, 4, 9, 40])
def test_a_convolution_is_narrow_where_its_output_is_no_larger_than_its_input(
    kernel: int, stride: int, dilation: int, channels: int
) -> None:
    layer = nn.Conv2d(4, channels, kernel, stride, padding=1, dilation=dilation)
    with Kept(made_from=0) as kept:
        layer(torch.randn(2, 4, 17, 13))
    [(name, how, smaller)] = kept.found
    assert name == "convolution"
    assert how == (NARROW if smaller else WIDE)


@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (8, 8), (8, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_narrow_where_its_output_is_no_larger_than_its_input(
    rows: int, columns: int, bias: bool
) -> None:
    with Kept(made_from=1 if bias else 0) as kept:
        nn.Linear(rows, columns, bias=bias)(torch.randn(5, rows))
    [(name, how, smaller)] = kept.found
    assert name == ("addmm" if bias else "mm")
    assert how == (NARROW if smaller else WIDE)


def test_scores_of_a_long_sequence_are_wide_and_what_they_weigh_is_narrow() -> None:
    queries, keys, values = (torch.randn(3, 20, 4) for _ in range(3))
    with Kept(made_from=0) as kept:
        torch.bmm(torch.bmm(queries, keys.transpose(1, 2)), values)
    assert [how for _, how, _ in kept.found] == [WIDE, NARROW]


def test_attention_is_narrow_unless_it_draws_random_numbers() -> None:
    x = torch.randn(1, 2, 8, 4)
    kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert keepers(kept, (x, x, x), {}) == NARROW
    draws = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert keepers(draws, (x, x, x, 0.1), {}) == NOWHERE
    assert keepers(draws, (x, x, x, 0.0), {}) == NARROW


def test_nothing_else_is_kept() -> None:
    with Kept(made_from=0) as kept:
        nn.functional.gelu(torch.randn(3)).mul(2).sum()
    assert kept.found == []

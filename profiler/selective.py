"""What a selective segment keeps: the outputs of products and of attention, which take long and are small.

    x ─▶ norm ─▶ [product] ─▶ gelu, tanh, mul, ... ─▶ [product] ─▶ dropout, +      [ ] kept, the rest runs again

The same choice is made when memory is traced, when time is measured, and when the plan runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_aten = torch.ops.aten

KEPT = frozenset(
    packet
    for packet in (
        _aten.mm,
        _aten.bmm,
        _aten.addmm,
        _aten.baddbmm,
        _aten.convolution,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
    )
)


def is_kept(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a selective segment keeps what this operation makes.

    Not where it draws random numbers: a replay that took the output from what is kept would draw other ones later.
    """
    return _makes_products(func) and not _draws(func, args, kwargs)


@functools.cache
def _makes_products(func: Any) -> bool:
    return func.overloadpacket in KEPT


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 1.0))

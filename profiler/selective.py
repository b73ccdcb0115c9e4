"""What a selective segment keeps: the outputs of products and of attention, which take long and are small.

    x ─▶ norm ─▶ [product] ─▶ gelu, tanh, mul, ... ─▶ [product] ─▶ dropout, +      [ ] kept, the rest runs again

Some products are smaller than others: that of a transformer's MLP which widens makes four times what the one which
narrows makes, in the same time. So there are two ways, ``selective`` and ``selective_narrow``, which keeps products
only where they are no larger than what they are made from. The same choice is made when memory is traced, when time is
measured, and when the plan runs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from profiler.profile_record import Keeping

_aten = torch.ops.aten

MADE_FROM = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.addmm: 1,
    _aten.baddbmm: 1,
    _aten.convolution: 0,
    _aten._scaled_dot_product_flash_attention: 0,
    _aten._scaled_dot_product_flash_attention_for_cpu: 0,
    _aten._scaled_dot_product_efficient_attention: 0,
    _aten._scaled_dot_product_cudnn_attention: 0,
}
"""Products and attention, each with the number of the argument that its output is made from."""

NOWHERE: frozenset[Keeping] = frozenset()
WIDE: frozenset[Keeping] = frozenset({"selective"})
NARROW: frozenset[Keeping] = frozenset({"selective", "selective_narrow"})


def keepers(func: Any, args: Any, kwargs: Any) -> frozenset[Keeping]:
    """The ways of keeping in which a selective segment keeps what this operation makes.

    None where it draws random numbers: a replay that took the output from what is kept would draw other ones later.
    """
    packet = _product(func)
    if packet is None or _draws(func, args, kwargs):
        return NOWHERE
    return NARROW if _is_narrow(packet, args) else WIDE


@functools.cache
def _product(func: Any) -> Any:
    return func.overloadpacket if func.overloadpacket in MADE_FROM else None


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    left_out = {
        argument.name: argument.default_value for argument in arguments if argument.has_default_value()
    }
    return bool((left_out | given).get("dropout_p", 1.0))


def _is_narrow(packet: Any, args: Any) -> bool:
    """Whether the output has no more elements than what it is made from."""
    if packet is _aten.convolution:
        return _convolution_narrows(*args[:7])
    made_from = args[MADE_FROM[packet]]
    if packet in (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm):
        return bool(args[MADE_FROM[packet] + 1].shape[-1] <= made_from.shape[-1])
    return True  # Attention makes as much as there are queries.


def _convolution_narrows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
) -> bool:
    if transposed:
        return False
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    positions = math.prod(
        (size + 2 * before - apart * (width - 1) - 1) // step + 1
        for size, width, step, before, apart in sizes
    )
    return bool(weight.shape[0] * positions <= x.shape[1] * math.prod(x.shape[2:]))

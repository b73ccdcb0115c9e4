"""Run a model without its memory: fake floats, real integers.

``FakeTensorMode`` gives every tensor a shape and no bytes. That is right for activations and wrong for the
few small integer tensors that steer Python control flow: position ids, attention masks, packed-sequence
tests. A model asks ``mask.all()`` and takes another path (for transformers' GPT-2: it materialises a causal
mask in every layer) when the answer cannot be known. So tensors that depend on no float stay real and are
computed for real:

    input_ids (real) ──▶ arange, eq, all (real) ──▶ the branch that a real step takes
         │
         └──▶ embedding(weight fake) ──▶ fake from here on
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only


class RealIntegers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered inside ``FakeTensorMode``: integer factories and operations on real tensors run for real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fake or (not tensors and not _makes_integers(args, kwargs)):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def _makes_integers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    numbers = [leaf for leaf in args if isinstance(leaf, int | float)]
    return bool(numbers) and all(isinstance(number, int) for number in numbers)


def fake_batch(mode: FakeTensorMode, batch: Any) -> Any:
    """The batch with its floating-point tensors fake and its integers as they are."""
    return tree_map_only(
        torch.Tensor, lambda tensor: mode.from_tensor(tensor) if tensor.is_floating_point() else tensor, batch
    )


@contextlib.contextmanager
def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Swap every parameter and buffer of ``model`` for a fake one; put them back whatever happens."""
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            fake: torch.Tensor = mode.from_tensor(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        return fakes[id(tensor)]

    try:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None:
                        swapped.append((store, name, tensor))
                        store[name] = fake_of(tensor)
        yield
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor

"""Run a model without its memory: fake floats, real integers.

``FakeTensorMode`` gives every tensor a shape and no bytes. That is right for activations and wrong for the
few small integer tensors that steer Python control flow: position ids, attention masks, packed-sequence
tests. A model asks ``mask.all()`` and takes another path (for transformers' GPT-2: it materialises a causal
mask in every layer) when the answer cannot be known. So tensors that depend on no float stay real and are
computed for real:

    input_ids (real) ──▶ arange, eq, all (real) ──▶ the branch that a real step takes
         │
         └──▶ embedding(weight fake) ──▶ fake from here on

Fakes may stand for a CUDA device that is not here (``profiler/absent.py``): then floats live on ``device``, and a
real integer becomes a fake one there at the operation that mixes it with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from profiler import shapes
from profiler.live import QuickMode, tensors_in


class RealIntegers(QuickMode):
    """Entered inside ``FakeTensorMode``: integer factories and operations on real tensors run for real.

    ``device``: where the fakes are, if not where the real tensors are. What is real stays on the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        unplaced = args, kwargs
        if fake or (not tensors and not _makes_integers(args, kwargs)):
            if self._device is not None:
                kwargs = _placed(kwargs, self._device)
                args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
            try:
                return shapes.call(func, args, kwargs)
            except DynamicOutputShapeException:
                if all(isinstance(tensor, FakeTensor) for tensor in tensors):
                    raise
                return self._shaped_by_integers(func, *unplaced)
        if self._device is not None:
            kwargs = _placed(kwargs, torch.device("cpu"))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _shaped_by_integers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Integers decide on the shape of an output (``x[mask]``): run once with zeros for the floats."""
        mode = next(t.fake_mode for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor))
        with _disable_current_modes():
            zeros = tree_map_only(FakeTensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), (args, kwargs))
            outputs = func(*zeros[0], **_placed(zeros[1], torch.device("cpu")))
        return tree_map_only(torch.Tensor, lambda tensor: _fake_of(tensor, mode, self._device), outputs)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake_like(tensor, self._device)


def _placed(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of an operation that makes tensors, which now makes them on ``device``."""
    return kwargs | {"device": device} if kwargs.get("device") is not None else kwargs


def fake_like(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Under ``FakeTensorMode``: a fake of a tensor's shape on another device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _makes_integers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    numbers = [leaf for leaf in args if isinstance(leaf, int | float)]
    return bool(numbers) and all(isinstance(number, int) for number in numbers)


def fake_batch(mode: FakeTensorMode, batch: Any, device: torch.device | None = None) -> Any:
    """The batch with its floating-point tensors fake, on ``device`` if given, and its integers as they are."""
    return tree_map_only(
        torch.Tensor,
        lambda tensor: _fake_of(tensor, mode, device) if tensor.is_floating_point() else tensor,
        batch,
    )


def _fake_of(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device | None) -> torch.Tensor:
    if device is None and not tensor.is_meta:
        fake: torch.Tensor = mode.from_tensor(tensor)
        return fake
    with mode:
        return fake_like(tensor, device or torch.device("cpu"))


@contextlib.contextmanager
def fake_parameters(
    model: nn.Module, mode: FakeTensorMode, device: torch.device | None = None
) -> Iterator[None]:
    """Swap every parameter and buffer of ``model`` for a fake one, on ``device`` if given; put them back at the end."""
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    fakes: dict[int, torch.Tensor] = {}

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            fake = _fake_of(tensor.detach(), mode, device)
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


class _NumbersAreOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``.item()`` of a fake number is 1.0."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        return func(*args, **(kwargs or {}))


def numbers_in_updates(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer ask fake tensors for numbers (Adafactor scales by norms): no update's memory depends on them."""
    mode = _NumbersAreOne()  # type: ignore[no-untyped-call]
    optimizer.register_step_pre_hook(lambda *_: mode.__enter__() and None)  # type: ignore[no-untyped-call]
    optimizer.register_step_post_hook(lambda *_: mode.__exit__(None, None, None))  # type: ignore[no-untyped-call]


KEPT_REAL_ELEMENTS = 2**16
"""Float tensors up to this size are built for real (a quarter of a MiB): models read small ones while they are built,
such as a schedule of drop rates, and no weight matrix that matters is as small."""


class _WithoutMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Large float tensors are made without memory; integers and small ones are made for real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        if any(tensor.is_meta for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs = kwargs | {"device": "meta"}
            return func(*args, **kwargs)
        if not tensors and _makes_large_floats(args, kwargs):
            return func(*args, **kwargs | {"device": "meta"})
        return func(*args, **kwargs)


def _makes_large_floats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    sizes = [size for size in args if isinstance(size, list | tuple | torch.Size)]
    elements = torch.Size(sizes[0]).numel() if sizes else 0
    return bool(dtype.is_floating_point) and elements > KEPT_REAL_ELEMENTS


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models built inside have large parameters on the meta device: shapes without bytes."""
    with _WithoutMemory():
        yield


def builds_without_memory() -> bool:
    """Whether models are being built without memory, so that none is too large."""
    return any(isinstance(mode, _WithoutMemory) for mode in _get_current_dispatch_mode_stack())

"""Fake tensors on a CUDA device that is not here, which behave as they would there.

A fake tensor needs no device, yet some of what decides a step's memory asks the C++ library for one. Three places
have to be answered for a device that is only named:

    kernel of attention      chosen in C++ from the device's properties  ──▶ chosen here, by the same rules
    autocast                 asks each input whether it is on CUDA       ──▶ yes
    autograd's graph         asks each output, and plans a stream for it ──▶ "on the CPU": there is no stream

The last two ask the same question, ``tensor.device()``, through the dispatcher, where a mode can answer it. Autograd
asks right after an operation, once about each output that has a history, and during the backward pass; all others
ask before one. So the first question about a fresh differentiable output is answered with the CPU, every later
one with CUDA. Dispatch keys, and so autocast's lists and CUDA's own paths (native dropout, one fused layer norm), are
CUDA's all along.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

from profiler.live import QuickMode, tensors_in

Capability = tuple[int, int]

DEVICE = torch.device("cuda", 0)
"""Where the fakes say they are."""

MIB = 2**20

TAKEN_PER_PRODUCT_SINCE = "2.15"
"""The release of torch from which on cuBLAS's workspace is no longer kept between products."""


@dataclass(frozen=True, slots=True)
class AbsentCuda:
    """A CUDA device by its compute capability."""

    capability: Capability


@contextlib.contextmanager
def standing_in(absent: AbsentCuda | None) -> Iterator[None]:
    """Entered last, around fake steps; ``absent``: the device that fakes on ``DEVICE`` stand for.

    Questions after a device are most of what is dispatched in a fake step (two of three in Llama's). Answered
    here they pass through no other mode, which makes fake steps of devices that are here faster as well.
    """
    if absent is None:
        with _PresentDevice():
            yield
        return
    with _DeviceAnswers() as answers, _custom_functions(answers), _Attention(absent.capability):
        yield


class _PresentDevice(QuickMode):
    """Answers C++ about the device of a fake tensor as the tensor does, at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0].device if func is torch.ops.prim.device.default else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def graph_ends(model: nn.Module, absent: AbsentCuda | None) -> Iterator[None]:
    """Entered before anything watches: makes the graph's ends at the parameters, which are asked at odd moments."""
    if absent is None:
        yield
        return
    with _DeviceAnswers(always_cpu=True):
        ends = [torch.autograd.graph.get_gradient_edge(p) for p in model.parameters() if p.requires_grad]
    yield
    del ends


class _DeviceAnswers(QuickMode):
    """Answers C++ about the device of a fake tensor; see the module's text."""

    def __init__(self, *, always_cpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fresh: set[int] = set()
        self._always_cpu = always_cpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return self._device_of(args[0])
        outputs = func(*args, **(kwargs or {}))
        self._fresh.clear()
        if torch.is_grad_enabled() and any(t.requires_grad for v in (args, kwargs) for t in tensors_in(v)):
            self.made(outputs)
        return outputs

    def made(self, outputs: Any) -> None:
        """Autograd is about to ask about these outputs, which have a history."""
        self._fresh.update(
            id(tensor)
            for tensor in tensors_in(outputs)
            if isinstance(tensor, FakeTensor) and tensor.is_floating_point()
        )

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        """In a backward pass gradients are enabled only where a forward pass is repeated."""
        backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if self._always_cpu or backward or id(tensor) in self._fresh:
            self._fresh.discard(id(tensor))
            return torch.device("cpu")
        return tensor.device


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda")``, which turns itself off where there is no CUDA."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)
        torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _custom_functions(answers: _DeviceAnswers) -> Iterator[None]:
    """A custom function runs forward without gradients, and its outputs have a history all the same."""
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        forward, defined = cls.forward, cls.__dict__.get("forward")
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(args))

        def remembered(*inner: Any, **options: Any) -> Any:
            outputs = forward(*inner, **options)
            if learns:
                answers.made(outputs)
            return outputs

        cls.forward = staticmethod(remembered)
        try:
            return own.__get__(None, cls)(*args, **kwargs)
        finally:
            if defined is None:
                del cls.forward
            else:
                cls.forward = defined

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = own


class _Attention(TorchFunctionMode):
    """Calls the kernel of scaled dot product attention that a device of this capability would use."""

    def __init__(self, capability: Capability) -> None:
        super().__init__()
        self._capability = capability

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As ``scaled_dot_product_attention`` of ATen/native/transformers/attention.cpp goes on once it has chosen."""
        if torch.is_autocast_enabled("cuda"):
            # In autocast's list of what runs in the lower precision.
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        kernel = attention_kernel(
            self._capability, query, key, value, masked=attn_mask is not None,
            dropout=dropout_p, causal=is_causal,
        )  # fmt: skip
        if kernel == "math":
            made = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return _first(made)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            attn_mask = torch.where(attn_mask, zero, -math.inf)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if kernel == "flash":
            width = query.shape[-1]
            scale = 1 / math.sqrt(width) if scale is None else scale
            padded = [F.pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t for t in (query, key, value)]
            made = torch.ops.aten._scaled_dot_product_flash_attention(
                *padded, dropout_p, is_causal, False, scale=scale
            )
            return _first(made)[..., :width]
        if attn_mask is not None:
            shape = (*query.shape[:3], key.shape[-2])
            columns = attn_mask.shape[-1]
            if columns % _MASK_ALIGNMENT:
                padding = _MASK_ALIGNMENT - columns % _MASK_ALIGNMENT
                attn_mask = F.pad(attn_mask, (0, padding))[..., :columns]
            attn_mask = attn_mask.expand(shape)
        attention: Callable[..., Any] = (
            torch.ops.aten._scaled_dot_product_cudnn_attention
            if kernel == "cudnn"
            else torch.ops.aten._scaled_dot_product_efficient_attention
        )
        return _first(attention(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale))


_MASK_ALIGNMENT = 8
"""Columns of a mask are a multiple of this in memory (``preprocess_mask`` in attention.cpp)."""


def _first(outputs: Any) -> torch.Tensor:
    first: torch.Tensor = outputs[0]
    return first


def attention_kernel(
    capability: Capability,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    masked: bool,
    dropout: float,
    causal: bool,
) -> str:
    """``cudnn``, ``flash``, ``efficient`` or ``math``: the choice of ATen/native/transformers/cuda/sdp_utils.cpp.

    Of torch 2.13 and later with cuDNN above 9.15: cuDNN comes first on compute capabilities 9.0 and 10.0, then
    flash, then memory-efficient attention.
    """
    width, other = query.shape[-1], value.shape[-1]
    short = query.dtype in (torch.bfloat16, torch.float16)
    square = query.shape[-2] == key.shape[-2] or not causal
    if query.dim() != 4 or query.dtype is torch.float64:
        return "math"
    if short and not (masked and causal):
        widest = 256 if capability == (9, 0) else 128
        # cuDNN resolves a dropout probability to sixteenths.
        whole_sixteenths = dropout * 16 == int(dropout * 16)
        fits_cudnn = max(width, other) <= widest and width % 8 == 0 and other % 8 == 0 and whole_sixteenths
        if capability in ((9, 0), (10, 0)) and fits_cudnn:
            return "cudnn"
        if capability >= (8, 0) and not masked and width == other and width <= 256 and square:
            return "flash"
    alignment = 8 if short else 4
    if query.dtype is torch.bfloat16 and capability < (8, 0):
        return "math"
    return "math" if width % alignment or other % alignment else "efficient"


def blas_workspace_bytes(capability: Capability) -> int:
    """What cuBLAS holds in the allocator while matrices are multiplied, at most.

    One workspace has 32 MiB on capabilities 9, 10 and 12, else 2 x 4 MiB + 8 x 16 KiB (``parseChosenWorkspaceSize``,
    ATen/cuda/CublasHandlePool.cpp). torch 2.15 takes it for each product and gives it back; before, one was kept for
    the thread of the forward pass and one for that of the backward pass (``TORCH_CUBLAS_WORKSPACE_CACHE``).
    """
    one = 32 * MIB if capability[0] in (9, 10, 12) else 8 * MIB + 128 * 2**10
    kept_per_thread = TorchVersion(torch.__version__) < TAKEN_PER_PRODUCT_SINCE
    return one * (2 if kept_per_thread else 1)

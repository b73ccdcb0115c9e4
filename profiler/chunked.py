"""The loss of a language model, a chunk of tokens at a time.

Of a small model with a large vocabulary the logits are most of the peak: GPT-2 small at 8 x 1,024 tokens makes 1.5 GiB
of them in fp32, and again as probabilities and as gradients. Here the head and the loss run on one chunk of tokens
after the other, and each chunk is recomputed in the backward pass:

    hidden states  ──▶ [ head ─▶ logits ─▶ loss ]  ──▶ sum / tokens
                       [ head ─▶ logits ─▶ loss ]      only one chunk's logits at a time
                       [        ...             ]

It takes the place of the head's forward and of the model's loss function, which transformers calls one after the other.
The sum is the same but for the order in which floats are added. A model that does something to its logits in between is
refused when it first does.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

TOKENS_PER_CHUNK = 256
"""Of the largest micro-batch: fewer make slow products, more make large logits."""


def chunks_for(batch: Any) -> int:
    """In how many chunks to cut micro-batches of which this is the largest; its tokens are its largest integers."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    tokens = max((tensor.numel() for tensor in tensors if not tensor.is_floating_point()), default=0)
    return max(2, tokens // TOKENS_PER_CHUNK)


class ChunkedLossError(ValueError):
    """The model's head and loss cannot be run in chunks."""


def can_be_chunked(model: nn.Module) -> bool:
    """Whether this is a causal language model of transformers with a linear head and the loss that comes with it."""
    losses = sys.modules.get("transformers.loss.loss_utils")  # There where a model came with it.
    get_head: Any = getattr(model, "get_output_embeddings", None)
    if losses is None or get_head is None or type(get_head()) is not nn.Linear:
        return False
    # Some classes compute their loss by themselves.
    if "self.loss_function(" not in inspect.getsource(inspect.unwrap(type(model).forward)):
        return False
    return getattr(model, "loss_function", None) is losses.ForCausalLMLoss


@contextlib.contextmanager
def in_chunks(model: nn.Module, chunks: int) -> Iterator[None]:
    """The model with its loss in chunks while the context is open."""
    chunked = ChunkedLoss(model, chunks)
    try:
        yield
    finally:
        chunked.remove()


class ChunkedLoss:
    """Puts the loss of ``model`` in chunks; ``remove()`` undoes it. Raises ChunkedLossError where that cannot be.

    Outputs have no ``logits`` meanwhile: there are none.
    """

    def __init__(self, model: Any, chunks: int) -> None:
        if not can_be_chunked(model):
            raise ChunkedLossError(
                f"{type(model).__name__} must be a causal language model of transformers with a linear head and its "
                "own loss for the loss to run in chunks."
            )
        self._model = model
        self._head: Any = model.get_output_embeddings()
        self._chunks = chunks
        self._passed: weakref.ref[torch.Tensor] | None = None
        self._own_loss = vars(model).get("_loss_function")
        self._head.forward = self._pass_on
        self._model.loss_function = self._loss
        self._handle = model.register_forward_hook(self._without_logits)

    def remove(self) -> None:
        """Give the model its head and loss back."""
        self._handle.remove()
        del self._head.forward
        if self._own_loss is None:
            del self._model._loss_function
        else:
            self._model.loss_function = self._own_loss

    def _pass_on(self, hidden: torch.Tensor) -> torch.Tensor:
        self._passed = weakref.ref(hidden)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = type(self._head).forward(self._head, hidden)
        return logits

    def _without_logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, dict) and "logits" in output:
            output["logits"] = None if output.get("loss") is not None else self._logits(output["logits"])
        return output

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' ``ForCausalLMLoss``, of hidden states."""
        hidden = logits
        if self._passed is None or self._passed() is not hidden:
            raise ChunkedLossError(
                f"{type(self._model).__name__} changes its logits between head and loss: it cannot run in chunks."
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
        wanted = shift_labels.reshape(-1).to(hidden.device)
        states = hidden.reshape(-1, hidden.shape[-1])
        total = hidden.new_zeros((), dtype=torch.float32)
        size = -(-len(wanted) // self._chunks)
        for start in range(0, len(wanted), size):
            piece = states[start : start + size], wanted[start : start + size], ignore_index
            total = total + _recomputed(self._sum_of, *piece)
        count = (wanted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        loss: torch.Tensor = total / count
        return loss

    def _sum_of(self, states: torch.Tensor, wanted: torch.Tensor, ignore_index: int) -> torch.Tensor:
        logits = self._logits(states).float()
        return F.cross_entropy(logits, wanted, ignore_index=ignore_index, reduction="sum")


class _Holder:
    """What autograd keeps of a chunk instead of a saved tensor."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


def _recomputed(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """``function(*args)``, which keeps nothing for its backward pass but runs again in it.

    As ``torch.utils.checkpoint``, whose autocast would turn itself off on a CUDA device that is only named.
    """
    holders: list[weakref.ref[_Holder]] = []
    device_type = args[0].device.type
    autocast = device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def pack(tensor: torch.Tensor) -> _Holder:
        holder = _Holder()
        holders.append(weakref.ref(holder))
        return holder

    def unpack(holder: _Holder) -> torch.Tensor:
        if holder.value is None:
            saved: list[torch.Tensor] = []
            keeping = torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.detach()), lambda t: t
            )
            with torch.enable_grad(), _autocast_of(*autocast), keeping:
                function(*args)
            for reference, tensor in zip(holders, saved, strict=True):
                waiting = reference()
                if waiting is not None:
                    waiting.value = tensor
        assert holder.value is not None
        return holder.value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*args)


@contextlib.contextmanager
def _autocast_of(device_type: str, enabled: bool, dtype: torch.dtype) -> Iterator[None]:
    """Autocast as it was, for a device that need not be here; nothing that is cast is kept."""
    now = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device_type, enabled)
    torch.set_autocast_dtype(device_type, dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, now[0])
        torch.set_autocast_dtype(device_type, now[1])
        torch.set_autocast_cache_enabled(keeps)

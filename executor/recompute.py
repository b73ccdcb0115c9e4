"""Recompute any run of stages, on the module as it is.

``torch.utils.checkpoint`` takes a function, and a planned segment seldom is one: it may begin in the middle
of one block's forward and end in the middle of another's. So a segment is the stretch of the forward pass
between two module entries, and its function is *recorded* while it runs:

    enter h.0.ln_2 ──────────────────────────────────────────────▶ enter h.2.ln_2
      mlp(ln_2(x))   x + ·   [h.1](·)   [h.2.ln_1]  [h.2.attn]  · + ·
      module calls are kept whole, the glue between them one torch function at a time

During the stretch every tensor that autograd saves is replaced by an empty holder. The first holder that the
backward pass opens replays the recording, with the random state, autocast state and buffers of the first
time, fills all holders, and stops as soon as the last one is full. Then the recording is dropped, and with it
the segment's input. This is the mechanism of ``torch.utils.checkpoint(use_reentrant=False)``, built on the
same public ``saved_tensors_hooks``; gradients are bit-equal to those without.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from profiler.chain import Call


class SegmentError(RuntimeError):
    """A stretch of the forward pass cannot be replayed, or was not the same the second time."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A segment for the hooks: from the entry of one module call to the entry of another (None: the end)."""

    enter: Call
    leave: Call | None


class Checkpoints:
    """Segments applied to a model. ``remove()`` takes them off; the model's state_dict never changes.

    ``counts[i]`` is how often segment i was recorded and how often replayed, for tests and reports.
    """

    def __init__(self, model: nn.Module, stretches: Sequence[Stretch]) -> None:
        modules = dict(model.named_modules())
        for stretch in stretches:
            for call in (stretch.enter, stretch.leave):
                if call is not None and call.module not in modules:
                    raise ValueError(
                        f"A planned segment begins or ends at {call.module!r}, which this model has not."
                    )
        self.counts = [[0, 0] for _ in stretches]
        self._model = model
        self._enter = {stretch.enter: index for index, stretch in enumerate(stretches)}
        self._leave = [stretch.leave for stretch in stretches]
        self._calls: dict[str, int] = {}
        self._open: _Recorder | None = None
        self._replaying = False
        self._changed_buffers: dict[int, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        boundaries = {c.module for s in stretches for c in (s.enter, s.leave) if c is not None}
        ancestors = {name[:i] for name in boundaries for i, char in enumerate(name) if char == "."} | {""}
        whole = {name for name in modules if name not in ancestors and name.rpartition(".")[0] in ancestors}
        for name in sorted(boundaries | whole):
            module = modules[name]
            hook = self._entering(name, whole=name in whole)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            if name in whole:
                self._handles.append(module.register_forward_hook(self._left, always_call=True))
        self._handles.append(model.register_forward_pre_hook(self._begin, prepend=True))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._replaying:
            self._close()
            self._calls.clear()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._replaying:
            self._close()

    def _entering(self, name: str, *, whole: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._replaying or (self._open is not None and self._open.depth):
                return
            call = Call(name, self._calls.get(name, 0))
            self._calls[name] = call.count + 1
            if self._open is not None and self._leave[self._open.segment] == call:
                self._close()
            if self._open is None and call in self._enter and torch.is_grad_enabled():
                self._open = _Recorder(self, self._enter[call])
                self._open.start()
            if whole and self._open is not None:
                self._open.module_begins(module, args, kwargs)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._replaying and self._open is not None:
            self._open.module_ended(module, output)

    def _close(self) -> None:
        if self._open is not None:
            recorder, self._open = self._open, None
            recorder.stop()
            self.counts[recorder.segment][0] += 1

    def buffer_versions(self) -> list[tuple[int, ...]]:
        """How often each buffer was written, module by module."""
        return [tuple(buffer._version for buffer in own) for own in self._buffers()]

    def _buffers(self) -> list[tuple[torch.Tensor, ...]]:
        modules = self._model.modules()
        return [own for module in modules if (own := tuple(module.buffers(recurse=False)))]

    @contextlib.contextmanager
    def replaying(self, segment: int) -> Iterator[None]:
        """Buffers that the segment writes (batch norm's statistics) are written once, not twice."""
        changed = self._changed_buffers.get(segment, [])
        before = [buffer.detach().clone() for buffer in changed]
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
            self.counts[segment][1] += 1
            with torch.no_grad():
                for buffer, value in zip(changed, before, strict=True):
                    buffer.copy_(value)

    def note_buffers(self, segment: int, versions: list[tuple[int, ...]]) -> None:
        """All buffers of every module that wrote one: batch norm's kernels count only its counter as written."""
        if segment not in self._changed_buffers:
            self._changed_buffers[segment] = [
                buffer
                for own, now, before in zip(self._buffers(), self.buffer_versions(), versions, strict=True)
                if now != before
                for buffer in own
            ]

    def knows_buffers(self, segment: int) -> bool:
        return segment in self._changed_buffers


@dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for a tensor (or object) that an earlier recorded call returned."""

    index: int


@dataclass(slots=True)
class _Recorded:
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    grad_enabled: bool
    outputs: list[int | None] = field(default_factory=list)
    done_with: list[int] = field(default_factory=list)


class _Holder:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class _Full(Exception):
    """Every holder is filled: the rest of the replay is not needed."""


class _Recorder(TorchFunctionMode):
    """Records one stretch while it runs; afterwards lives on as what the holders replay."""

    def __init__(self, owner: Checkpoints, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.depth = 0
        self._owner = owner
        self._calls: list[_Recorded] = []
        self._slots: dict[int, tuple[Any, int, bool]] = {}
        self._slot_count = 0
        self._holders: list[weakref.ref[_Holder]] = []
        self._inside: nn.Module | None = None
        self._pending: _Recorded | None = None
        self._inputs: list[tuple[torch.Tensor, int]] = []
        self._input_ids: set[int] = set()

    def start(self) -> None:
        self._rng = _RandomState.capture()
        self._autocast = _Autocast.capture()
        self._cache_was_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._versions = None if self._owner.knows_buffers(self.segment) else self._owner.buffer_versions()
        marker = torch.empty((), requires_grad=True).view(())
        self._first_node = _sequence_number(marker)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(None, None, None)
        del self._hooks
        torch.set_autocast_cache_enabled(self._cache_was_enabled)
        if self._versions is not None:
            self._owner.note_buffers(self.segment, self._versions)
        self._slots.clear()
        self._pending = self._inside = None
        last_use: dict[int, int] = {}
        for position, call in enumerate(self._calls):
            for leaf in tree_leaves((call.args, call.kwargs)):
                if isinstance(leaf, _Slot):
                    last_use[leaf.index] = position
            for index in call.outputs:
                if index is not None:
                    last_use.setdefault(index, position)
        for index, position in last_use.items():
            self._calls[position].done_with.append(index)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        recorded = self._begin(func, args, kwargs)
        output = func(*args, **kwargs)
        self._finish(recorded, output)
        return output

    def module_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._pending = self._begin(module, args, kwargs)
        self._inside = module
        self.depth = 1

    def module_ended(self, module: nn.Module, output: Any) -> None:
        if self._inside is module and self._pending is not None:
            self.depth = 0
            self._finish(self._pending, output)
            self._inside = self._pending = None

    def _begin(self, function: Callable[..., Any], args: Any, kwargs: Any) -> _Recorded:
        return _Recorded(
            function, tree_map(self._refer, args), tree_map(self._refer, kwargs), torch.is_grad_enabled()
        )

    def _finish(self, recorded: _Recorded, output: Any) -> None:
        for leaf in tree_leaves(output):
            if _is_plain(leaf):
                recorded.outputs.append(None)
                continue
            index = self._slot_count
            self._slot_count += 1
            recorded.outputs.append(index)
            reference = weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else (lambda leaf=leaf: leaf)
            self._slots[id(leaf)] = (reference, index, _is_made_by_custom_function(leaf))
        self._calls.append(recorded)

    def _refer(self, leaf: Any) -> Any:
        known = self._slots.get(id(leaf))
        if known is not None and known[0]() is leaf:
            if _is_made_by_custom_function(leaf) and not known[2]:
                raise _outside_of_any_module(leaf)
            return _Slot(known[1])
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf:
            self._check_input(leaf)
        return leaf

    def _check_input(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._input_ids:
            return
        if _sequence_number(tensor) > self._first_node:
            raise _outside_of_any_module(tensor)
        self._input_ids.add(id(tensor))
        self._inputs.append((tensor, tensor._version))

    def _pack(self, tensor: torch.Tensor) -> _Holder:
        holder = _Holder()
        self._holders.append(weakref.ref(holder))
        return holder

    def _unpack(self, holder: _Holder) -> torch.Tensor:
        if holder.value is None:
            self._replay()
        if holder.value is None:
            raise SegmentError(
                "A recomputed segment saved fewer tensors than the first time: it is not deterministic."
            )
        return holder.value

    def _replay(self) -> None:
        for tensor, version in self._inputs:
            if tensor._version != version:
                raise SegmentError(
                    "The input of a recomputed segment was changed in place after it was used; "
                    "begin the segment later."
                )
        filled = 0

        def pack(tensor: torch.Tensor) -> None:
            nonlocal filled
            if filled >= len(self._holders):
                raise SegmentError("A recomputed segment saved more tensors than the first time.")
            holder = self._holders[filled]()
            if holder is not None:
                holder.value = tensor.detach() if tensor.requires_grad else tensor
            filled += 1
            if filled == len(self._holders):
                raise _Full

        def unpack(_: None) -> torch.Tensor:
            raise SegmentError("The backward pass of a replay was asked for; only the first forward has one.")

        calls, self._calls = self._calls, []
        self._inputs, self._input_ids = [], set()
        with (
            self._owner.replaying(self.segment),
            self._rng.restored(),
            self._autocast.restored(),
            torch.autograd.graph.saved_tensors_hooks(pack, unpack),
            contextlib.suppress(_Full),
        ):
            _run(calls)
        self._holders = []


def _run(calls: list[_Recorded]) -> None:
    slots: dict[int, Any] = {}

    def fetch(leaf: Any) -> Any:
        return slots[leaf.index] if isinstance(leaf, _Slot) else leaf

    calls.reverse()
    while calls:
        call = calls.pop()
        args, kwargs = tree_map(fetch, call.args), tree_map(fetch, call.kwargs)
        with torch.set_grad_enabled(call.grad_enabled):
            output = call.function(*args, **kwargs)
        del args, kwargs
        leaves, _ = tree_flatten(output)
        del output
        for index, leaf in zip(call.outputs, leaves, strict=True):
            if index is not None:
                slots[index] = leaf
        del leaves
        leaf = None
        for index in call.done_with:
            del slots[index]


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(
        leaf, bool | int | float | str | torch.dtype | torch.device | torch.Size
    )


def _is_made_by_custom_function(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and isinstance(
        leaf.grad_fn, torch.autograd.function.BackwardCFunction
    )


def _outside_of_any_module(tensor: torch.Tensor) -> SegmentError:
    return SegmentError(
        f"A recomputed segment made a tensor by {type(tensor.grad_fn).__name__} outside of any module, which "
        "cannot be replayed. Put that call into a module of its own, or leave this stage out of segments."
    )


def _sequence_number(tensor: torch.Tensor) -> int:
    node = tensor.grad_fn
    return -1 if node is None else node._sequence_nr()


@dataclass(frozen=True, slots=True)
class _RandomState:
    """The random state of the CPU and of every CUDA device that was used."""

    cpu: torch.Tensor
    cuda: tuple[tuple[int, torch.Tensor], ...]

    @classmethod
    def capture(cls) -> _RandomState:
        with _disable_current_modes():
            devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
            return cls(torch.get_rng_state(), tuple((i, torch.cuda.get_rng_state(i)) for i in devices))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        now = _RandomState.capture()
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        with _disable_current_modes():
            torch.set_rng_state(self.cpu)
            for index, state in self.cuda:
                torch.cuda.set_rng_state(state, index)


@dataclass(frozen=True, slots=True)
class _Autocast:
    """The autocast settings of the CPU and the current accelerator."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls) -> _Autocast:
        types = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)  # type: ignore[no-untyped-call]
        return cls(tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.settings:
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            yield

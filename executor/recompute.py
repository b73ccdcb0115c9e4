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

A segment may have segments inside. The replay around one runs it without filling its holders, and keeps for it
what it began with; the first of *its* holders that is opened replays it in turn:

    replay of the outer one    [ kept ][ inside: inputs and random state are kept, nothing is filled ][ kept ]
    later, of the inner one                       [ kept                                ]

What modules are handed besides tensors may have a state: a cache of keys and values knows what it has seen. A replay
gets such an object as it was when the segment first met it.

A *selective* segment keeps the outputs of its products and attention, and a replay takes them from there.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from profiler.chain import Call
from profiler.chunked import ChunkedLoss
from profiler.live import QuickMode
from profiler.profile_record import Keeping
from profiler.selective import keepers


class SegmentError(RuntimeError):
    """A stretch of the forward pass cannot be replayed, or was not the same the second time."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A segment for the hooks: from the entry of one module call to the entry of another (None: the end).

    ``inside``: the segments that its second run recomputes in turn. ``keeping``: what a selective one keeps.
    """

    enter: Call
    leave: Call | None
    inside: tuple[Stretch, ...] = ()
    keeping: Keeping | None = None

    def with_all_inside(self) -> Iterator[Stretch]:
        """This segment and those inside of it, outer before inner ones."""
        yield self
        for stretch in self.inside:
            yield from stretch.with_all_inside()


def nest(stretches: Iterable[tuple[int, Stretch]]) -> tuple[Stretch, ...]:
    """Segments with those inside of them, from (depth, segment) pairs in which outer ones come before inner ones."""
    pairs = list(stretches)
    nested: list[Stretch] = []
    for index, (depth, stretch) in enumerate(pairs):
        if depth == 0:
            following = itertools.takewhile(lambda pair: pair[0] > 0, pairs[index + 1 :])
            inside = nest((deeper - 1, inner) for deeper, inner in following)
            nested.append(replace(stretch, inside=inside))
    return tuple(nested)


class Checkpoints:
    """Segments applied to a model. ``remove()`` takes them off; the model's state_dict never changes.

    ``counts[i]`` is how often segment i ran without being kept and how often it was replayed, for tests and reports;
    a segment is followed by those inside of it.

    ``hooked``: the modules have hooks already that put tensors of their own in the place of others (DeepSpeed's at
    stage 3 of ZeRO). Those of the modules that a segment calls are called again with them. Around the others, which it
    begins or ends inside of, a hook must give back the memory that it was given, and the replay leaves it out.
    """

    def __init__(
        self,
        model: nn.Module,
        stretches: Sequence[Stretch],
        chunked_loss: ChunkedLoss | None = None,
        *,
        hooked: bool = False,
    ) -> None:
        modules = dict(model.named_modules())
        every = [each for stretch in stretches for each in stretch.with_all_inside()]
        for stretch in every:
            for call in (stretch.enter, stretch.leave):
                if call is not None and call.module not in modules:
                    raise ValueError(
                        f"A planned segment begins or ends at {call.module!r}, which this model has not."
                    )
        self.counts = [[0, 0] for _ in every]
        self._model = model
        self._chunked_loss = chunked_loss
        self._index = {id(stretch): index for index, stretch in enumerate(every)}
        self._enter = {stretch.enter: stretch for stretch in stretches}
        self._calls: dict[str, int] = {}
        self._open: _Recorder | None = None
        self._replaying = False
        self._changed_buffers: dict[int, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._passing: list[list[Any]] = []
        if every:
            self._watch(modules, every, hooked)

    def _watch(self, modules: dict[str, nn.Module], every: Sequence[Stretch], hooked: bool) -> None:
        """Put the hooks on the model; with nothing to recompute it has none, and loses no time to them."""
        boundaries = {c.module for s in every for c in (s.enter, s.leave) if c is not None}
        ancestors = {name[:i] for name in boundaries for i, char in enumerate(name) if char == "."} | {""}
        whole = set(_outermost_called(modules, ancestors))
        for name in sorted(boundaries | whole):
            module = modules[name]
            hook = self._entering(name, whole=name in whole)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            if name in whole:
                self._handles.append(module.register_forward_hook(self._left, always_call=True))
        for name in sorted(ancestors - {""}) if hooked else ():
            self._handles.extend(self._watch_hooks(modules[name]))
        self._handles.append(self._model.register_forward_pre_hook(self._begin, prepend=True))
        self._handles.append(self._model.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Take every hook off the model, and give it its own loss back."""
        if self._chunked_loss is not None:
            self._chunked_loss.remove()
            self._chunked_loss = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch_hooks(self, module: nn.Module) -> Iterator[Any]:
        """Hooks before and after all others of a module, that note what became of each tensor between them."""

        def note(leaves: list[Any]) -> None:
            before = self._passing.pop()
            if self._open is None or self._replaying or self._open.depth:
                return
            if len(before) == len(leaves):
                for old, new in zip(before, leaves, strict=True):
                    self._open.stands_for(new, old)

        yield module.register_forward_pre_hook(
            lambda module, args, kwargs: self._passing.append(tree_leaves((args, kwargs))),
            with_kwargs=True,
            prepend=True,
        )
        yield module.register_forward_pre_hook(
            lambda module, args, kwargs: note(tree_leaves((args, kwargs))), with_kwargs=True
        )
        yield module.register_forward_hook(
            lambda module, args, output: self._passing.append(tree_leaves(output)), prepend=True
        )
        yield module.register_forward_hook(lambda module, args, output: note(tree_leaves(output)))

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._replaying:
            self._close()
            self._calls.clear()
            self._passing.clear()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._replaying:
            self._close()

    def _entering(self, name: str, *, whole: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._replaying or (self._open is not None and self._open.depth):
                return
            call = Call(name, self._calls.get(name, 0))
            self._calls[name] = call.count + 1
            if self._open is not None and self._open.stretch.leave == call:
                self._close()
            if self._open is None and call in self._enter and torch.is_grad_enabled():
                recorder = _Recorder(self, self._enter[call])
                recorder.start()
                self._open = recorder
            if self._open is not None:
                self._open.passes(call)
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

    def index(self, stretch: Stretch) -> int:
        """Where a segment is counted."""
        return self._index[id(stretch)]

    def buffer_versions(self) -> list[tuple[int, ...]]:
        """How often each buffer was written, module by module."""
        return [tuple(buffer._version for buffer in own) for own in self._buffers()]

    def _buffers(self) -> list[tuple[torch.Tensor, ...]]:
        modules = self._model.modules()
        return [own for module in modules if (own := tuple(module.buffers(recurse=False)))]

    @contextlib.contextmanager
    def replaying(self, segment: int) -> Iterator[None]:
        """Buffers that the outermost segment writes (batch norm's statistics) are written once, not twice."""
        changed = self._changed_buffers.get(segment, [])
        before = [buffer.detach().clone() for buffer in changed]
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
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


def _outermost_called(modules: Mapping[str, nn.Module], ancestors: Container[str]) -> Iterator[str]:
    """The modules that are called by those ancestors themselves: their children, and theirs where a child is a list."""
    open_lists: set[str] = set()
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if name in ancestors or not (parent in ancestors or parent in open_lists):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            open_lists.add(name)
        else:
            yield name


@dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for a tensor (or object) that an earlier recorded call returned."""

    index: int


@dataclass(frozen=True, slots=True)
class _Thing:
    """Stands for an object with a state of its own, as it was when the segment first met it."""

    index: int


@dataclass(slots=True)
class _Recorded:
    """A call; ``leaves`` with ``form`` are its arguments and keyword arguments, as pytrees have them."""

    function: Callable[..., Any]
    leaves: list[Any]
    form: TreeSpec
    grad_enabled: bool
    outputs: list[int | None] = field(default_factory=list)
    done_with: list[int] = field(default_factory=list)


class _Holder:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "index", "value")

    def __init__(self, index: int) -> None:
        self.index = index
        self.value: torch.Tensor | None = None


class _Full(Exception):
    """Every holder is filled: the rest of the replay is not needed."""


@dataclass(slots=True)
class _Region:
    """A segment in a recording: its calls and holders, and what its replay starts from once that is known."""

    stretch: Stretch
    first_call: int
    first_holder: int
    end_call: int = -1
    end_holder: int = -1
    inside: list[_Region] = field(default_factory=list)
    calls: list[_Recorded] | None = None
    slots: dict[int, Any] = field(default_factory=dict)
    things: dict[int, Any] = field(default_factory=dict)
    random: _RandomState | None = None

    def end(self, calls: int, holders: int) -> None:
        self.end_call, self.end_holder = calls, holders

    def has(self, holder: int) -> bool:
        return self.first_holder <= holder < self.end_holder

    @property
    def last_own_holder(self) -> int:
        """Behind the last holder that no segment inside fills."""
        last = self.end_holder
        for region in reversed(self.inside):
            if region.end_holder == last:
                last = region.first_holder
        return last


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one operation made, apart from autograd's graph, and the versions that its tensors had."""

    outputs: torch.Tensor | tuple[Any, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, outputs: Any) -> _Kept:
        # With this key the copy counts what is written into the original, as one made above autograd would.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            if isinstance(outputs, torch.Tensor):
                outputs = outputs.detach()
            else:
                outputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in outputs)
        return cls(outputs, _versions(outputs))


def _versions(outputs: torch.Tensor | tuple[Any, ...]) -> tuple[int, ...]:
    """How often the tensors were written that a product (one) or attention (several, and numbers) made."""
    together = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(x._version for x in together if isinstance(x, torch.Tensor))


class _Keep(QuickMode):
    """Keeps what products and attention make, all of it or where it is narrow."""

    def __init__(self, how: Keeping, kept: list[_Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._how = how
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self._how in keepers(func, args, kwargs or {}):
            self._kept.append(_Kept.of(outputs))
        return outputs


class _Give(QuickMode):
    """Gives what was kept in the place of making it again, in the same order."""

    def __init__(self, how: Keeping, kept: list[_Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._how = how
        self._kept = kept
        self._kept.reverse()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._kept or self._how not in keepers(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        kept = self._kept.pop()
        if _versions(kept.outputs) != kept.versions:
            raise SegmentError(
                f"What {func.__name__} made was changed in place, so a selective segment cannot keep it. "
                "Recompute this stage as a whole."
            )
        return kept.outputs


class _Recorder(TorchFunctionMode):
    """Records one stretch while it runs; afterwards lives on as what the holders replay."""

    def __init__(self, owner: Checkpoints, stretch: Stretch) -> None:
        super().__init__()
        self.stretch = stretch
        self.depth = 0
        self._owner = owner
        self._root = _Region(stretch, first_call=0, first_holder=0)
        self._around = [self._root]
        self._calls: list[_Recorded] = []
        self._kept: list[_Kept] = []
        self._kept_needed = 0
        self._slots: dict[int, tuple[Any, int, bool]] = {}
        self._things: dict[int, tuple[Any, int]] = {}
        self._standing: dict[int, tuple[Any, torch.Tensor]] = {}
        self._slot_count = 0
        self._holders: list[weakref.ref[_Holder]] = []
        self._inside: nn.Module | None = None
        self._pending: _Recorded | None = None
        self._is_aside = False
        self._inputs: list[tuple[torch.Tensor, int]] = []
        self._input_ids: set[int] = set()

    def start(self) -> None:
        """Begin to record. What may be refused memory comes first: nothing is changed then."""
        self._root.random = _RandomState.capture()
        marker = torch.empty((), requires_grad=True).view(())
        self._first_node = _sequence_number(marker)
        known = self._owner.knows_buffers(self._owner.index(self.stretch))
        self._versions = None if known else self._owner.buffer_versions()
        self._autocast = _Autocast.capture()
        self._cache_was_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._contexts = contextlib.ExitStack()
        if self.stretch.keeping is not None:
            self._contexts.enter_context(_Keep(self.stretch.keeping, self._kept))
        self._contexts.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._contexts.enter_context(self)

    def passes(self, call: Call) -> None:
        """Segments inside end and begin with this call."""
        while len(self._around) > 1 and self._around[-1].stretch.leave == call:
            self._end_inner()
        entering = True
        while entering:
            around = self._around[-1]
            entering = False
            for stretch in around.stretch.inside:
                if stretch.enter == call:
                    region = _Region(stretch, len(self._calls), len(self._holders))
                    around.inside.append(region)
                    self._around.append(region)
                    entering = True

    def _end_inner(self) -> None:
        region = self._around.pop()
        region.end(len(self._calls), len(self._holders))
        self._owner.counts[self._owner.index(region.stretch)][0] += 1

    def stop(self) -> None:
        self._step_back()
        self._contexts.close()
        del self._contexts
        del self._kept[self._kept_needed :]
        while len(self._around) > 1:
            self._end_inner()
        self._end_inner()
        torch.set_autocast_cache_enabled(self._cache_was_enabled)
        if self._versions is not None:
            self._owner.note_buffers(self._owner.index(self.stretch), self._versions)
        self._slots.clear()
        self._things.clear()
        self._standing.clear()
        self._pending = self._inside = None
        last_use: dict[int, int] = {}
        for position, call in enumerate(self._calls):
            for leaf in call.leaves:
                if isinstance(leaf, _Slot):
                    last_use[leaf.index] = position
            for index in call.outputs:
                if index is not None:
                    last_use.setdefault(index, position)
        for index, position in last_use.items():
            self._calls[position].done_with.append(index)
        self._root.calls, self._calls = self._calls, []

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
        # What a whole module calls is not recorded, so the mode need not be in its way.
        if _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self._is_aside = True

    def module_ended(self, module: nn.Module, output: Any) -> None:
        if self._inside is module and self._pending is not None:
            self._step_back()
            self.depth = 0
            self._finish(self._pending, output)
            self._inside = self._pending = None

    def _step_back(self) -> None:
        """Be torch's mode again, where it was left for a module."""
        if self._is_aside:
            self._is_aside = False
            self.__enter__()  # type: ignore[no-untyped-call]

    def _begin(self, function: Callable[..., Any], args: Any, kwargs: Any) -> _Recorded:
        leaves, form = tree_flatten((args, kwargs))
        return _Recorded(function, list(map(self._refer, leaves)), form, torch.is_grad_enabled())

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
        if isinstance(leaf, torch.Tensor):
            standing = self._standing.get(id(leaf))
            if standing is not None and standing[0]() is leaf:
                return standing[1]
            if leaf.requires_grad and not leaf.is_leaf:
                self._check_input(leaf)
            return leaf
        return self._thing(leaf) if _has_state(leaf) else leaf

    def stands_for(self, tensor: Any, other: Any) -> None:
        """One tensor is the other to a replay, when it is the same memory."""
        if tensor is other or not _is_same_memory(tensor, other):
            return
        known = self._slots.get(id(other))
        if known is not None and known[0]() is other:
            self._slots[id(tensor)] = (weakref.ref(tensor), known[1], True)
        else:
            self._check_input(other)
            self._standing[id(tensor)] = (weakref.ref(tensor), other)

    def _thing(self, leaf: Any) -> _Thing:
        _, index = self._things.setdefault(id(leaf), (leaf, len(self._things)))
        if index not in self._root.things:
            self._root.things[index] = _as_it_is(leaf)
        return _Thing(index)

    def _check_input(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._input_ids:
            return
        if _sequence_number(tensor) > self._first_node:
            raise _outside_of_any_module(tensor)
        self._input_ids.add(id(tensor))
        self._inputs.append((tensor, tensor._version))

    def _pack(self, tensor: torch.Tensor) -> _Holder:
        holder = _Holder(len(self._holders))
        self._holders.append(weakref.ref(holder))
        self._kept_needed = len(self._kept)
        return holder

    def _unpack(self, holder: _Holder) -> torch.Tensor:
        region: _Region | None = self._root
        while holder.value is None and region is not None:
            if region.calls is not None:
                self._replay(region)
            region = next((inner for inner in region.inside if inner.has(holder.index)), None)
        if holder.value is None:
            raise SegmentError(
                "A recomputed segment saved fewer tensors than the first time: it is not deterministic."
            )
        return holder.value

    def _replay(self, region: _Region) -> None:
        for tensor, version in self._inputs:
            if tensor._version != version:
                raise SegmentError(
                    "The input of a recomputed segment was changed in place after it was used; "
                    "begin the segment later."
                )
        self._inputs, self._input_ids = [], set()
        assert region.calls is not None
        assert region.random is not None
        calls, slots, things, random = region.calls, region.slots, region.things, region.random
        region.calls, region.slots, region.things, region.random = None, {}, {}, None
        counts, how = self._owner.counts, self.stretch.keeping
        counts[self._owner.index(region.stretch)][1] += 1
        last = region.last_own_holder
        passed = region.first_holder
        inside: _Region | None = None
        waiting = region.inside[::-1]

        def pack(tensor: torch.Tensor) -> None:
            nonlocal passed
            if passed >= region.end_holder:
                raise SegmentError("A recomputed segment saved more tensors than the first time.")
            holder = self._holders[passed]()
            if holder is not None and inside is None:
                holder.value = tensor.detach() if tensor.requires_grad else tensor
            passed += 1
            if passed == last and not waiting:
                raise _Full

        def unpack(_: None) -> torch.Tensor:
            raise SegmentError("The backward pass of a replay was asked for; only the first forward has one.")

        with (
            self._owner.replaying(self._owner.index(self.stretch)),
            random.restored(),
            self._autocast.restored(),
            contextlib.nullcontext() if how is None else _Give(how, self._kept),
            torch.autograd.graph.saved_tensors_hooks(pack, unpack),
            contextlib.suppress(_Full),
        ):
            calls.reverse()
            position = region.first_call
            while calls or waiting:
                if waiting and waiting[-1].first_call == position:
                    inside = waiting.pop()
                    inside.calls = [calls.pop() for _ in range(inside.end_call - position)]
                    inside.random = _RandomState.capture()
                    inside.slots = {index: slots[index] for index in _used(inside.calls) if index in slots}
                    inside.things = {index: _as_it_is(thing) for index, thing in things.items()}
                    if passed == last and not waiting:
                        raise _Full
                    for call in inside.calls:
                        _run(call, slots, things)
                    for stretch in inside.stretch.with_all_inside():
                        counts[self._owner.index(stretch)][0] += 1
                    position = inside.end_call
                    inside = None
                else:
                    _run(calls.pop(), slots, things)
                    position += 1
        if not region.inside and region is self._root:
            self._holders = []


def _used(calls: list[_Recorded]) -> Iterator[int]:
    """The slots that calls read."""
    for call in calls:
        for leaf in call.leaves:
            if isinstance(leaf, _Slot):
                yield leaf.index


def _run(call: _Recorded, slots: dict[int, Any], things: dict[int, Any]) -> None:
    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, _Thing):
            return things[leaf.index]
        return slots[leaf.index] if isinstance(leaf, _Slot) else leaf

    args, kwargs = tree_unflatten(map(fetch, call.leaves), call.form)
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


def _has_state(leaf: Any) -> bool:
    """Whether an argument is an object that a module might change."""
    kept_as_it_is = nn.Module | type | FunctionType | MethodType
    return hasattr(leaf, "__dict__") and not isinstance(leaf, kept_as_it_is)


def _as_it_is(thing: Any, copies: dict[int, Any] | None = None) -> Any:
    """A copy of an object and of what it is made of, but for tensors, modules and functions: these are shared."""
    copies = {} if copies is None else copies
    made: Any
    if id(thing) in copies:
        return copies[id(thing)]
    if isinstance(thing, list | set):
        made = type(thing)(_as_it_is(each, copies) for each in thing)
    elif isinstance(thing, tuple):
        return tuple(_as_it_is(each, copies) for each in thing) if type(thing) is tuple else thing
    elif isinstance(thing, dict):
        made = copy.copy(thing)
        made.update((key, _as_it_is(value, copies)) for key, value in thing.items())
    elif not isinstance(thing, torch.Tensor) and _has_state(thing):
        made = copy.copy(thing)
        copies[id(thing)] = made
        for name, value in vars(thing).items():
            object.__setattr__(made, name, _as_it_is(value, copies))
    else:
        return thing
    copies[id(thing)] = made
    return made


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(
        leaf, bool | int | float | str | torch.dtype | torch.device | torch.Size
    )


def _is_made_by_custom_function(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and isinstance(
        leaf.grad_fn, torch.autograd.function.BackwardCFunction
    )


def _is_same_memory(one: Any, other: Any) -> bool:
    """Whether two things are tensors that are the same elements in the same places."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    with torch._C.DisableTorchFunction():  # Asking is nothing to record.
        return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
            other.data_ptr(),
            other.dtype,
            other.shape,
            other.stride(),
        )


def _outside_of_any_module(tensor: torch.Tensor) -> SegmentError:
    return SegmentError(
        f"A recomputed segment made a tensor by {type(tensor.grad_fn).__name__} outside of any module, which "
        "cannot be replayed. Put that call into a module of its own, or leave this stage out of segments."
    )


def _sequence_number(tensor: torch.Tensor) -> int:
    node = tensor.grad_fn
    return -1 if node is None else node._sequence_nr()


def _below_modes() -> contextlib.AbstractContextManager[object]:
    """Where no mode sees what is done: asking for them takes a tenth of switching none of them off."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class _RandomState:
    """The random state of the CPU and of every CUDA device that was used."""

    cpu: torch.Tensor
    cuda: tuple[tuple[int, torch.Tensor], ...]

    @classmethod
    def capture(cls) -> _RandomState:
        with _below_modes():
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
        with _below_modes():
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

"""From a module to a chain of stages.

One forward pass under fake tensors is recorded: which operation read and made the contents of which storage
(a storage written in place has new contents). What depends both on the batch and on a trainable parameter is
an *activation*. A module entry at which exactly one activation is still needed is a place where the model can
be cut in two:

    wte + wpe ──▶ x0 ──▶ ln_1, attn ──▶ (+) ──▶ x1 ──▶ ln_2, mlp ──▶ (+) ──▶ x2 ──▶ ... ──▶ loss
                  │                      ▲       │                     ▲
                  └──────── residual ────┘       └────── residual ─────┘
    cut at x0, x1, x2; nowhere inside a half block, where two activations are needed

Module entries are where hooks can tell one stage from the next: stage i runs from its entry
(``transformer.h.0``, ``transformer.h.0.ln_2``) to the entry of stage i + 1, glue code included. What depends
on parameters or on the batch alone (position biases, masks) may cross a cut: it is there anyway.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from profiler.absent import AbsentCuda
from profiler.live import LiveStorages
from profiler.pretend import pretending
from profiler.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A piece of the chain: ``name`` for people, ``entry`` for hooks (empty: the start of the forward pass).

    ``in_first_call``: it ends within the first call of the whole model, which is as far as hooks count.
    """

    name: str
    entry: str
    parameter_count: int = 0
    in_first_call: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """The ``count``-th call (from 0) of a module in a forward pass: ``transformer.h.0``, ``shared#2``."""

    module: str
    count: int

    def __str__(self) -> str:
        return self.module if self.count == 0 else f"{self.module}#{self.count}"

    @classmethod
    def parse(cls, text: str) -> Call:
        module, _, count = text.partition("#")
        return cls(module, int(count or 0))


@dataclass(slots=True)
class _Entry:
    """A module call: how many operations came before it, and the first input that a gradient flows to."""

    call: Call
    position: int
    input_key: int | None
    input_node: object
    end: int = -1


@dataclass(slots=True)
class _Recording:
    reads: list[list[int]] = field(default_factory=list)
    writes: list[list[int]] = field(default_factory=list)
    mutated: list[set[int]] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)
    trainable: set[int] = field(default_factory=set)
    batch: set[int] = field(default_factory=set)
    graph: set[object] = field(default_factory=set)
    loss: int = -1


def discover(workload: Workload, batch_size: int = 2, absent: AbsentCuda | None = None) -> tuple[Stage, ...]:
    """The stages of a workload's forward pass and loss, in order; one stage when it can be cut nowhere."""
    recording = _record(workload, batch_size, absent)
    entries = _boundaries(recording)
    starts = [0, *(entry.position for entry in entries)]
    stops = [*starts[1:], len(recording.reads)]
    sizes = {name: _parameter_count(module) for name, module in workload.model.named_modules()}
    first_end = next((e.end for e in recording.entries if not e.call.module), len(recording.reads))
    stages: list[Stage] = []
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        inside = [
            e for e in recording.entries if e.call.module and start <= e.position and 0 <= e.end <= stop
        ]
        main = max(
            inside, key=lambda e: (sizes[e.call.module], e.end - e.position, -e.position), default=None
        )
        entry = "" if index == 0 else str(entries[index - 1].call)
        stages.append(
            Stage(
                name=str(main.call) if main else entry or "forward",
                entry=entry,
                parameter_count=sum(sizes[e.call.module] for e in _outermost(inside)),
                in_first_call=stop <= first_end,
            )
        )
    return tuple(_unique(stages))


def recomputable_stages(stages: Sequence[Stage]) -> tuple[bool, ...]:
    """Which stages may be in a segment: not the first (nothing enters it), not the last (no gain)."""
    last = len(stages) - 1
    return tuple(0 < i < last and stage.in_first_call for i, stage in enumerate(stages))


def _outermost(entries: list[_Entry]) -> list[_Entry]:
    """The module calls that are inside no other of the list."""
    found: list[_Entry] = []
    for entry in sorted(entries, key=lambda e: (e.position, -e.end, len(e.call.module))):
        if not any(entry.call.module.startswith(f"{outer.call.module}.") for outer in found):
            found.append(entry)
    return found


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _unique(stages: list[Stage]) -> Iterator[Stage]:
    seen: set[str] = set()
    for stage in stages:
        name = stage.name if stage.name not in seen else f"{stage.name}@{stage.entry}"
        seen.add(name)
        yield replace(stage, name=name)


def _record(workload: Workload, batch_size: int, absent: AbsentCuda | None = None) -> _Recording:
    recording = _Recording()
    model = workload.model

    def operation(func: Any, read: list[int], written: list[int]) -> None:
        recording.reads.append(read)
        recording.writes.append(written)
        recording.mutated.append(set(written) & set(read) if func._schema.is_mutable else set())

    live = LiveStorages(operation=operation)

    def entering(call: Call, inputs: list[torch.Tensor]) -> None:
        tensor = next((tensor for tensor in inputs if tensor.requires_grad), None)
        key, node = (None, None) if tensor is None else (live.key_of(tensor), tensor.grad_fn)
        recording.entries.append(_Entry(call, len(recording.reads), key, node))

    def leaving(call: Call) -> None:
        for entry in reversed(recording.entries):
            if entry.call == call:
                entry.end = len(recording.reads)
                return

    with (
        pretending(model, [workload.batch(batch_size)], absent=absent, watch=live) as (batch,),
        watch_calls(model, entering, leaving),
    ):
        recording.trainable.update(live.track(p for p in model.parameters() if p.requires_grad))
        tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
        recording.batch.update(live.track(tensors))
        loss = workload.loss(model, batch)
        key = live.key_of(loss)
        assert key is not None
        recording.loss = key
        recording.graph = _graph(loss)
    return recording


def _graph(loss: torch.Tensor) -> set[object]:
    """The nodes of autograd's graph that the backward pass of ``loss`` visits."""
    found: set[object] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


@contextlib.contextmanager
def watch_calls(
    model: nn.Module,
    entering: Callable[[Call, list[torch.Tensor]], None],
    leaving: Callable[[Call], None] | None = None,
    only: Container[str] | None = None,
) -> Iterator[Callable[[], None]]:
    """Report module calls of a forward pass, counted per module; yields what restarts the counts."""
    counts: dict[str, int] = {}
    open_calls: list[Call] = []
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(name, counts.get(name, 0))
            counts[name] = call.count + 1
            open_calls.append(call)
            entering(call, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        call = open_calls.pop()
        if leaving is not None:
            leaving(call)

    try:
        for name, module in model.named_modules():
            if only is not None and name not in only:
                continue
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        yield counts.clear
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Contents:
    """What a storage holds between two writes."""

    key: int
    made_at: int
    last_use: int
    rewritten: bool = False


def _boundaries(recording: _Recording) -> list[_Entry]:
    """The first module entry of every place where the model can be cut, in order."""
    activations = _activations(recording)
    positions = len(recording.reads) + 1
    needed_change = [0] * (positions + 1)
    index_change = [0] * (positions + 1)
    for index, contents in enumerate(activations):
        needed_change[contents.made_at + 1] += 1
        index_change[contents.made_at + 1] += index
        needed_change[contents.last_use + 1] -= 1
        index_change[contents.last_use + 1] -= index
    needed = list(itertools.accumulate(needed_change))
    index_sum = list(itertools.accumulate(index_change))
    found: dict[int, _Entry] = {}
    for entry in recording.entries:
        if needed[entry.position] != 1:
            continue
        cut = activations[index_sum[entry.position]]
        # A view that a module only asks for its shape holds the activation too, but no gradient comes by.
        if cut.key == entry.input_key and entry.input_node in recording.graph and not cut.rewritten:
            found.setdefault(cut.made_at, entry)
    return list(found.values())


def _activations(recording: _Recording) -> list[_Contents]:
    """The activations of a forward pass, each with the operation that made it and the last that needed it."""
    current: dict[int, _Contents] = {}
    trainable = set(recording.trainable)
    batch = set(recording.batch)
    activations: list[_Contents] = []
    for position, (reads, writes, mutated) in enumerate(
        zip(recording.reads, recording.writes, recording.mutated, strict=True)
    ):
        from_trainable = any(key in trainable for key in reads)
        from_batch = any(key in batch for key in reads)
        for key in reads:
            if key in current:
                current[key].last_use = position
        for key in writes:
            if key in reads and key not in mutated:
                continue
            if from_trainable:
                trainable.add(key)
            if from_batch:
                batch.add(key)
            if key in current and key in mutated:
                current[key].rewritten = True
            if from_trainable and from_batch:
                current[key] = _Contents(key, position, position)
                activations.append(current[key])
    loss = current.get(recording.loss)
    if loss is None:
        raise ValueError(
            "loss(model, batch) must depend on the batch and on a trainable parameter, got a constant."
        )
    loss.last_use = len(recording.reads)
    return activations

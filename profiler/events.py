"""The events of a traced step, and two corrections that make a fake step's course that of a real one.

**Gradients add up in place.** Where a tensor is used twice its two gradients are added by autograd's engine, which
writes into the first one if nobody else holds it and it is no view (a tied weight's gradient often is one). With a
dispatch mode watching it never does (a mode might be a subclass that must not be written to), so a watched step makes
a third tensor. An addition *between* two nodes of the graph whose first operand dies right after it is such a one, and
the operand's storage lives on under the result's name.

**Kernels take scratch memory.** What an operation needs at its highest, and what its outputs really take, is measured
by kind (profiler/workspaces.py) and put where the operation begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from profiler.profile_record import Keeping
from profiler.workspaces import Kind, Workspaces

Window = tuple[str, int, int]
"""``(phase, micro_batch, stage)``; phases are forward, backward, between, optimizer."""


@dataclass(frozen=True, slots=True)
class Alloc:
    """``kept``: by what ways of keeping a selective segment keeps what the operation makes (profiler/selective.py)."""

    key: int
    size_bytes: int
    kept: frozenset[Keeping] = frozenset()


@dataclass(frozen=True, slots=True)
class Free:
    key: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Enter:
    """A window begins. ``input_key`` is the stage's input storage for forward windows."""

    window: Window
    input_key: int | None = None


@dataclass(frozen=True, slots=True)
class Save:
    """Autograd saved a tensor of this storage for backward."""

    key: int


@dataclass(frozen=True, slots=True)
class Operate:
    """An operation begins. ``kind`` None: its scratch memory is of no interest. ``kept``: as its outputs are."""

    kind: Kind | None
    kept: frozenset[Keeping] = frozenset()


@dataclass(frozen=True, slots=True)
class Accumulate:
    """The engine adds two gradients; what is allocated next is their sum, which it might write into a ``reusable``."""

    reusable: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Peak:
    """Inside an operation memory rises this far above what is alive at its beginning. ``kept``: as its outputs are."""

    size_bytes: int
    kept: frozenset[Keeping] = frozenset()


Event = Alloc | Free | Enter | Save | Operate | Accumulate | Peak
EventT = TypeVar("EventT", Alloc, Free)


@dataclass(slots=True)
class Trace:
    """The events of one step, and what was alive before it. ``rewritten``: kept outputs that were written in place."""

    events: list[Event] = field(default_factory=list)
    rewritten: set[int] = field(default_factory=set)
    parameter_bytes: int = 0
    buffer_bytes: int = 0
    optimizer_state_bytes: int = 0
    batch_bytes: int = 0

    @property
    def constant_bytes(self) -> int:
        return self.parameter_bytes + self.buffer_bytes + self.optimizer_state_bytes + self.batch_bytes

    def levels(self) -> Iterator[int]:
        """Bytes above ``constant_bytes`` at the beginning and after every event."""
        level = 0
        yield level
        for event in self.events:
            match event:
                case Alloc(size_bytes=size):
                    level += size
                    yield level
                case Peak(size_bytes=size):
                    yield level + size
                case Free(size_bytes=size):
                    level -= size
                    yield level
                case _:
                    pass

    @property
    def peak_bytes(self) -> int:
        """The highest point, read directly."""
        return self.constant_bytes + max(self.levels())


class BetweenNodes:
    """Knows whether a backward pass is inside a node of the graph or between two, where the engine adds gradients."""

    def __init__(self) -> None:
        self.now = False

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Follow the backward pass of this loss; returns it."""
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting.extend(next_node for next_node, _ in node.next_functions)
            if node.name() != "torch::autograd::AccumulateGrad":
                node.register_prehook(self._enter)
                node.register_hook(self._leave)
        return loss

    def _enter(self, gradients: Any) -> None:
        self.now = False

    def _leave(self, gradients: Any, incoming: Any) -> None:
        self.now = True

    def ended(self) -> None:
        """The backward pass is over."""
        self.now = False


def is_sum_of_two(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is ``a + b`` of two tensors, which is how the engine adds gradients."""
    return (
        function is torch.ops.aten.add.Tensor
        and not kwargs
        and len(args) == 2
        and all(isinstance(tensor, torch.Tensor) for tensor in args)
    )


def settle(events: Sequence[Event], workspaces: Workspaces | None) -> list[Event]:
    """The events as a step that nobody watches would have them, with scratch memory where it was measured."""
    return list(_in_place(events if workspaces is None else list(_as_measured(events, workspaces))))


def _in_place(events: Sequence[Event]) -> Iterator[Event]:
    """Without the allocations of sums that are written into an operand, which keeps its name."""
    reused = _reused(events)
    names: dict[int, int] = {}
    for event in events:
        match event:
            case Alloc(key=key) if key in reused:
                operand = reused[key]
                names[key] = names.get(operand, operand)
            case Alloc():
                yield event
            case Free(key=key) if key in reused.values():
                pass
            case Free(key=key, size_bytes=size):
                yield Free(names.pop(key, key), size)
            case Save(key=key):
                yield Save(names.get(key, key))
            case Accumulate() | Operate():
                pass
            case _:
                yield event


def _reused(events: Sequence[Event]) -> dict[int, int]:
    """Sums by key, each with the operand that it is written into: the first to die right after the addition."""
    reused: dict[int, int] = {}
    for index, event in enumerate(events):
        if not isinstance(event, Accumulate):
            continue
        result = _run(events, index + 1, Alloc)[:1]
        dying = {free.key for free in _run(events, index + 2, Free)}
        operand = next((key for key in event.reusable if key in dying), None)
        if result and operand is not None:
            reused[result[0].key] = operand
    return reused


def _run(events: Sequence[Event], start: int, kind: type[EventT]) -> list[EventT]:
    """The events from ``start`` on as long as they are of one kind."""
    found: list[EventT] = []
    for index in range(start, len(events)):
        event = events[index]
        if not isinstance(event, kind):
            break
        found.append(event)
    return found


def _as_measured(events: Sequence[Event], workspaces: Workspaces) -> Iterator[Event]:
    """With each operation's measured peak, and its outputs of the measured sizes."""
    sizes: dict[int, int] = {}
    for index, event in enumerate(events):
        match event:
            case Operate(kind=kind, kept=kept):
                taken = None if kind is None else workspaces.taken(kind)
                if taken is None:
                    yield event
                    continue
                yield Peak(taken.peak_bytes, kept)
                outputs = _run(events, index + 1, Alloc)
                if len(outputs) == len(taken.output_bytes):
                    sizes.update(zip((output.key for output in outputs), taken.output_bytes, strict=True))
            case Alloc(key=key, size_bytes=size, kept=kept):
                yield Alloc(key, sizes.get(key, size), kept)
            case Free(key=key, size_bytes=size):
                yield Free(key, sizes.get(key, size))
            case _:
                yield event

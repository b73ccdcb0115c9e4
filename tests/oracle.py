"""An interpreter that runs plans on a machine that knows nothing but named buffers being taken and given back.

No formula of planner/memory.py is in here: a plan is walked operation by operation, and the peak is whatever the
machine saw. It runs on two kinds of things.

``Layer``: a chain made by hand, tensor by tensor. A layer turns x into a chain of tensors s_1 .. s_n that it saves, and
the last of them into its output; on the way back it takes a gradient dy and gives back dx:

    forward, saving      x  ─▶ s_1 ─▶ .. ─▶ s_n ─▶ y        all s stay, and x where the layer saves it
    forward, dropping    x  ─▶ s_1 ─▶ .. ─▶ s_n ─▶ y        each goes when the next is there
    backward             dx ◀─ (s_n .. s_1) ◀─ dy           with a gradient of its parameters

``windows_of`` runs each layer by itself, which is all that a profile knows; ``run`` runs the whole step of a plan.

``walk``: the curves of a profile, a buffer for the highest point of each window, so that a profile of a real model can
be run too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from planner.nested import Placed, Segments
from profiler.profile_record import PrecisionMemory, SelectiveMemory, StageMemory, bytes_at, peak_at


class Machine:
    """Memory: buffers by name, and the most that was ever taken at once."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.peak_bytes = 0

    def take(self, name: str, size_bytes: int) -> None:
        assert name not in self.live, f"{name} is there already"
        self.live[name] = size_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))

    def give_back(self, name: str) -> None:
        del self.live[name]

    @contextmanager
    def for_a_moment(self, name: str, size_bytes: int) -> Iterator[None]:
        self.take(name, size_bytes)
        yield
        self.give_back(name)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes of one layer's tensors, in bytes. ``leaves`` stays after the forward pass whether saved or dropped."""

    saves_input: bool
    saved: tuple[int, ...]
    output: int
    leaves: int
    forward_scratch: int
    backward_scratch: int
    gradient: int


@dataclass(frozen=True, kw_only=True)
class HandMade:
    """A chain of layers, and what else a step needs. ``state``: the random state that a segment keeps."""

    input: int
    layers: tuple[Layer, ...]
    constant: int
    state: int
    optimizer_scratch: int

    def entering(self, i: int) -> int:
        return self.layers[i - 1].output if i else self.input


class Step:
    """One machine that runs a hand-made chain; ``x i`` is the input of layer i, ``dx i`` its gradient."""

    def __init__(self, chain: HandMade) -> None:
        self.chain = chain
        self.machine = Machine()

    def forward(
        self, i: int, *, saving: bool, keep_input: bool = False, until_last_save: bool = False, depth: int = 0
    ) -> None:
        """From ``x i`` to ``x i+1``. ``until_last_save``: a replay that is only wanted for what it saves."""
        layer, machine = self.chain.layers[i], self.machine
        with machine.for_a_moment(f"forward scratch {i}", layer.forward_scratch):
            for n, size in enumerate(layer.saved):
                machine.take(f"saved {i} {n}", size)
                if n and not saving:
                    machine.give_back(f"saved {i} {n - 1}")
            last = len(layer.saved) - 1
        machine.take(f"left by saving {i}" if saving else f"left by dropping {i} {depth}", layer.leaves)
        if not until_last_save:
            machine.take(f"x {i + 1}", layer.output)
        if not saving:
            machine.give_back(f"saved {i} {last}")
        if not keep_input and not (saving and layer.saves_input):
            machine.give_back(f"x {i}")

    def backward(self, i: int) -> None:
        """From ``dx i+1`` to ``dx i``, giving back all that the layer kept."""
        layer, machine = self.chain.layers[i], self.machine
        with machine.for_a_moment(f"backward scratch {i}", layer.backward_scratch):
            if f"gradient {i}" in machine.live:
                with machine.for_a_moment(f"addend {i}", layer.gradient):
                    pass
            else:
                machine.take(f"gradient {i}", layer.gradient)
            if i:
                machine.take(f"dx {i}", self.chain.entering(i))
        machine.give_back(f"dx {i + 1}")
        for n in range(len(layer.saved)):
            machine.give_back(f"saved {i} {n}")
        machine.give_back(f"left by saving {i}")
        if layer.saves_input:
            machine.give_back(f"x {i}")

    def run(self, segments: Segments, micro_batches: int) -> int:
        """A whole step; its peak."""
        chain, machine = self.chain, self.machine
        machine.take("constant", chain.constant)
        length = len(chain.layers)
        for _ in range(micro_batches):
            machine.take("x 0", chain.input)
            self.there_and_back(0, length, segments, ())
        with machine.for_a_moment("optimizer scratch", chain.optimizer_scratch):
            pass
        for i in range(length):
            machine.give_back(f"gradient {i}")
        assert set(machine.live) == {"constant"}, "a step leaves nothing behind"
        return machine.peak_bytes

    def there_and_back(self, start: int, stop: int, segments: Segments, around: Segments) -> None:
        """Layers [start, stop) forward and backward: the whole chain, or the innermost segment ``around`` again."""
        chain, machine, depth = self.chain, self.machine, len(around)
        units = list(units_of(start, stop, segments, around))
        if around:
            machine.take(f"state to go back to {depth}", chain.state)
        for first, last, recomputed in units:
            if not recomputed:
                self.forward(
                    first, saving=True, keep_input=depth > 0 and first == start,
                    until_last_save=depth > 0 and first == stop - 1,
                )  # fmt: skip
                continue
            machine.take(f"state {first} {depth}", chain.state)
            for i in range(first, last):
                self.forward(i, saving=False, keep_input=i == first, depth=depth)
        if around:
            if not units[0][2] and not chain.layers[start].saves_input:
                machine.give_back(f"x {start}")
            machine.give_back(f"state to go back to {depth}")
            machine.give_back(f"state {start} {depth - 1}")
        else:
            machine.give_back(f"x {stop}")  # The loss turns the output into its gradient.
            machine.take(f"dx {stop}", chain.layers[-1].output)
        for first, last, recomputed in reversed(units):
            if not recomputed:
                self.backward(first)
                continue
            self.there_and_back(first, last, segments, (*around, (first, last)))
            for i in range(first, last):
                machine.give_back(f"left by dropping {i} {depth}")


def units_of(
    start: int, stop: int, segments: Segments, around: Segments = ()
) -> Iterator[tuple[int, int, bool]]:
    """Layers [start, stop) as half-open ranges, each with whether it is one of the segments: the outermost ones."""
    i = start
    while i < stop:
        ends = [b for a, b in segments if a == i and b <= stop and (a, b) not in around]
        yield i, max(ends, default=i + 1), bool(ends)
        i = max(ends, default=i + 1)


def windows_of(chain: HandMade) -> PrecisionMemory:
    """What a profile would say of the chain: every layer run by itself, with nothing of the layers before it."""
    length = len(chain.layers)

    def begun(**live: int) -> Step:
        step = Step(chain)
        for name, size in live.items():
            step.machine.take(name.replace("_", " "), size)
        return step

    def forward(i: int, *, saving: bool, keep_input: bool = False, until_last_save: bool = False) -> float:
        step = begun(**{f"x_{i}": chain.entering(i)})
        step.forward(i, saving=saving, keep_input=keep_input, until_last_save=until_last_save)
        return step.machine.peak_bytes

    def backward(i: int, gradients_there: Sequence[int]) -> float:
        step = begun(**{f"x_{i}": chain.entering(i)})
        step.forward(i, saving=True)
        step.machine.give_back(f"x {i + 1}")
        step.machine.take(f"dx {i + 1}", chain.layers[i].output)
        for n in gradients_there:
            step.machine.take(f"gradient {n}", chain.layers[n].gradient)
        step.machine.peak_bytes = sum(step.machine.live.values())
        step.backward(i)
        return step.machine.peak_bytes

    def stage(i: int) -> StageMemory:
        layer = chain.layers[i]
        saved = begun(**{f"x_{i}": chain.entering(i)})
        saved.forward(i, saving=True)
        saved.machine.give_back(f"x {i + 1}")
        dropped = begun(**{f"x_{i}": chain.entering(i)})
        dropped.forward(i, saving=False)
        dropped.machine.give_back(f"x {i + 1}")
        plain, last = forward(i, saving=True), forward(i, saving=True, until_last_save=True)
        return StageMemory(
            input=(chain.entering(i), 0.0),
            saves_input=layer.saves_input,
            hold=(sum(saved.machine.live.values()), 0.0),
            dropped_hold=(sum(dropped.machine.live.values()), 0.0),
            carry=(layer.output, 0.0),
            gradient=(layer.gradient, 0.0),
            forward=((plain, 0.0),),
            recompute=((last, 0.0),),
            rebuild_first=((plain, 0.0),),
            rebuild_single=((last, 0.0),),
            dropped=((forward(i, saving=False), 0.0),),
            dropped_first=((forward(i, saving=False, keep_input=True), 0.0),),
            backward_first=((backward(i, range(i + 1, length)), 0.0),),
            backward_later=((backward(i, range(length)), 0.0),),
        )

    gradients = sum(layer.gradient for layer in chain.layers)
    return PrecisionMemory(
        parameter_bytes=chain.constant,
        buffer_bytes=0,
        optimizer_state_bytes=0,
        other_bytes=0,
        batch=(0.0, 0.0),
        optimizer=((gradients + chain.optimizer_scratch, 0.0),),
        stages=tuple(stage(i) for i in range(length)),
        segment_bytes=chain.state,
    )


def walk(memory: PrecisionMemory, placed: Placed, *, micro_batch_size: int, micro_batches: int) -> int:
    """The highest window of a step of a profiled model on a CPU, where all its micro-batches wait in memory."""
    b, machine = micro_batch_size, Machine()
    stages, length = memory.stages, len(memory.stages)
    levels: list[int] = []
    for name in ("parameter_bytes", "buffer_bytes", "optimizer_state_bytes", "other_bytes"):
        machine.take(name, getattr(memory, name))
    for m in range(micro_batches):
        machine.take(f"batch {m}", bytes_at(memory.batch, b))

    def during(curve: Sequence[tuple[float, float]], besides: int = 0) -> None:
        """A window at its highest, but for what it counts and the machine holds already."""
        with machine.for_a_moment("window", peak_at(tuple(curve), b) - besides):
            levels.append(sum(machine.live.values()))

    def gradients() -> int:
        return sum(size for name, size in machine.live.items() if name.startswith("gradient"))

    def selective(i: int) -> SelectiveMemory:
        found = stages[i].keeping(placed.keeping[i])
        assert found is not None
        return found

    def there_and_back(m: int, start: int, stop: int, around: Segments) -> None:
        depth = len(around)
        units = list(units_of(start, stop, placed.segments, around))
        if around:
            machine.take(f"state to go back to {depth}", memory.segment_bytes)
            machine.take(f"arriving gradient {depth}", bytes_at(stages[stop - 1].carry, b))
        for first, last, recomputed in units:
            stage = stages[first]
            if recomputed:
                machine.take(f"state {first} {depth}", memory.segment_bytes)
                for i in range(first, last):
                    during(stages[i].dropped_first if i == first else stages[i].dropped)
                    machine.take(f"left {i} {depth}", bytes_at(stages[i].dropped_hold, b))
                    if i == first:
                        machine.take(f"input {i} {depth}", bytes_at(stages[i].input, b))
            elif first in placed.keeping:
                machine.take(f"state {first} {depth}", memory.segment_bytes)
                during(selective(first).forward)
                machine.take(f"left {first} {depth}", bytes_at(stage.dropped_hold, b))
                machine.take(f"input {first} {depth}", bytes_at(stage.input, b))
                machine.take(f"products {first}", bytes_at(selective(first).hold, b))
            else:
                single, begins, ends = start == first == stop - 1, first == start, first == stop - 1
                during(
                    stage.forward if not around
                    else stage.rebuild_single if single
                    else stage.rebuild_first if begins
                    else stage.recompute if ends
                    else stage.forward
                )  # fmt: skip
                machine.take(f"kept {first}", bytes_at(stage.hold, b))
                if around and begins and not stage.saves_input:
                    machine.take(f"tape {depth}", bytes_at(stage.input, b))
        if around:
            machine.live.pop(f"tape {depth}", None)
            machine.give_back(f"arriving gradient {depth}")
            machine.give_back(f"state to go back to {depth}")
            machine.give_back(f"state {start} {depth - 1}")
        for first, last, recomputed in reversed(units):
            stage = stages[first]
            if recomputed:
                machine.give_back(f"input {first} {depth}")  # The first window counts it as its own.
                there_and_back(m, first, last, (*around, (first, last)))
            else:
                if first in placed.keeping:
                    machine.give_back(f"input {first} {depth}")
                    machine.give_back(f"products {first}")  # The second run counts them.
                    machine.take("state to go back to", memory.segment_bytes)
                    machine.take("arriving gradient", bytes_at(stage.carry, b))
                    during(selective(first).rebuild)
                    machine.give_back("arriving gradient")
                    machine.give_back("state to go back to")
                    machine.give_back(f"state {first} {depth}")
                else:
                    machine.give_back(f"kept {first}")
                during(stage.backward_later if m else stage.backward_first, besides=gradients())
                if not m:
                    machine.take(f"gradient {first}", bytes_at(stage.gradient, b))
            if recomputed or first in placed.keeping:
                for i in range(first, last):
                    machine.give_back(f"left {i} {depth}")

    for m in range(micro_batches):
        there_and_back(m, 0, length, ())
    during(memory.optimizer, besides=gradients())
    return max(levels)

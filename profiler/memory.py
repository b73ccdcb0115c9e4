"""The memory curves of a step, from steps that run under fake tensors.

Three runs at each of two micro-batch sizes tell everything:

    plain:       F0 F1 ... F_L-1 | B_L-1 ... B0   F0 ... B0   optimizer   (gradients appear, then are added to)
    dropped:     F0 F1 ... F_L-1                                          (saved tensors are let go at once)
    evaluation:  F0 F1 ... F_L-1                                          (no gradients, evaluation mode)

Every storage has a birth and a death in this sequence of windows, so each can be given to the stage that
*owns* it: a storage that survives the forward pass belongs to the stage that made it, except a stage's input,
which belongs to the stage that saves it. A window's curve leaves out what earlier stages own; what remains
does not depend on whether those were recomputed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._pytree import tree_leaves

from profiler.absent import AbsentCuda
from profiler.chain import Call, Stage, watch_calls
from profiler.events import (
    Accumulate,
    Alloc,
    BetweenNodes,
    Enter,
    Free,
    Operate,
    Peak,
    Save,
    Trace,
    Window,
    is_sum_of_two,
    settle,
)
from profiler.fake import numbers_in_updates
from profiler.live import LiveStorages, is_mutable, tensors_in
from profiler.pretend import pretending
from profiler.profile_record import (
    KEEPINGS,
    AffineBytes,
    Curve,
    Keeping,
    Precision,
    PrecisionMemory,
    SelectiveMemory,
    StageMemory,
)
from profiler.selective import NOWHERE, keepers
from profiler.step import StepObserver, Stepper, build_optimizer
from profiler.workload import Workload
from profiler.workspaces import Workspaces, kind_of


class WindowMarks(StepObserver):
    """Turns a step's course into windows: forward by module entries, backward by gradients of stage inputs.

    ``mark(window, input)`` is called as each window begins. Used for memory (fake) and for time (real) alike.
    """

    def __init__(self, stages: Sequence[Stage], mark: Callable[[Window, torch.Tensor | None], None]) -> None:
        self._index = {Call.parse(stage.entry): i for i, stage in enumerate(stages) if stage.entry}
        self._last = len(stages) - 1
        self._mark = mark
        self._micro_batch = 0
        self._restart: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        modules = {call.module for call in self._index}
        with watch_calls(model, self._entering, only=modules) as restart:
            self._restart = restart
            yield

    def _entering(self, call: Call, inputs: list[torch.Tensor]) -> None:
        index = self._index.get(call)
        if index is None or not torch.is_grad_enabled():
            return
        boundary = next((tensor for tensor in inputs if tensor.requires_grad), None)
        self._mark(("forward", self._micro_batch, index), boundary)
        if boundary is not None:
            window = ("backward", self._micro_batch, index - 1)
            boundary.register_hook(lambda gradient: self._mark(window, None))  # type: ignore[no-untyped-call]

    def forward_begins(self, micro_batch: int) -> None:
        self._restart()
        self._micro_batch = micro_batch
        self._mark(("forward", micro_batch, 0), None)

    def backward_begins(self, micro_batch: int) -> None:
        self._mark(("backward", micro_batch, self._last), None)

    def backward_ended(self, micro_batch: int) -> None:
        self._mark(("between", micro_batch, 0), None)

    def optimizer_begins(self) -> None:
        self._mark(("optimizer", 0, 0), None)

    def step_ended(self) -> None:
        self._mark(("between", self._micro_batch, 0), None)


Run = Literal["plain", "dropped", "evaluation"]
"""``dropped``: saved tensors are let go. ``evaluation``: no gradients, and the model in evaluation mode."""


class StepCounter(Protocol):
    """What may watch a plain run beside the tracer: windows, saved tensors and operations of the recorded step."""

    def entered(self, window: Window) -> None: ...

    def saved(self) -> None: ...

    def called(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None: ...


class MemoryTracer:
    """Runs fake steps of one workload, whose model is in training mode, and turns them into curves."""

    def __init__(
        self,
        workload: Workload,
        stages: Sequence[Stage],
        optimizer: str,
        *,
        device_type: str = "cpu",
        block_bytes: int = 1,
        workspaces: Workspaces | None = None,
        absent: AbsentCuda | None = None,
    ) -> None:
        self._workload = workload
        self._stages = stages
        self._optimizer = optimizer
        self._device_type = device_type
        self._block_bytes = block_bytes
        self._workspaces = workspaces
        self._absent = absent

    def memory(
        self,
        precision: Precision,
        batch_sizes: tuple[int, int],
        counters: Mapping[int, StepCounter] = MappingProxyType({}),
    ) -> PrecisionMemory:
        """Curves of a step at ``precision``, affine through two micro-batch sizes; constant when they are equal.

        ``counters``: what watches the plain step of a micro-batch size.
        """
        analyses = {
            size: self._analyse(precision, size, counters.get(size)) for size in dict.fromkeys(batch_sizes)
        }
        small, large = (analyses[size] for size in batch_sizes)
        fit = _Fit(*batch_sizes)
        trace = small.plain
        return PrecisionMemory(
            parameter_bytes=trace.parameter_bytes,
            buffer_bytes=trace.buffer_bytes,
            optimizer_state_bytes=trace.optimizer_state_bytes,
            other_bytes=0,
            batch=fit.affine(small.plain.batch_bytes / 2, large.plain.batch_bytes / 2),
            optimizer=fit.curve(small.optimizer, large.optimizer),
            evaluation=fit.curve(small.evaluation, large.evaluation),
            stages=tuple(fit.stage(a, b) for a, b in zip(small.stages, large.stages, strict=True)),
            segment_bytes=torch.get_rng_state().nbytes if self._device_type == "cpu" else 0,
        )

    def last_stage(
        self,
        precision: Precision,
        batch_sizes: tuple[int, int],
        counters: Mapping[int, StepCounter] = MappingProxyType({}),
    ) -> StageMemory:
        """The curves of the last stage alone, as ``memory`` gives them; to be asked for a changed head."""
        small, large = (
            _analyse(
                self.trace(precision, size, "plain", counters.get(size)),
                self.trace(precision, size, "dropped"),
                Trace(),
                len(self._stages),
            ).stages[-1]
            for size in batch_sizes
        )
        return _Fit(*batch_sizes).stage(small, large)

    def plain_peak_bytes(self, precision: Precision, batch_size: int) -> int:
        """The peak of a fake plain step of two micro-batches, read directly."""
        return self.trace(precision, batch_size, "plain").peak_bytes

    def _analyse(self, precision: Precision, batch_size: int, counter: StepCounter | None) -> _Analysis:
        return _analyse(
            self.trace(precision, batch_size, "plain", counter),
            self.trace(precision, batch_size, "dropped"),
            self.trace(precision, batch_size, "evaluation"),
            len(self._stages),
        )

    def trace(
        self,
        precision: Precision,
        batch_size: int,
        run: Run,
        counter: StepCounter | None = None,
        *,
        longest: bool = True,
    ) -> Trace:
        """A fake ``plain`` step of two micro-batches, or one forward pass: ``dropped``, ``evaluation``.

        ``longest``: on the longest batches of the workload, where it tells them apart.
        """
        model = self._workload.model
        trace = Trace()
        recording = False

        keeps = NOWHERE
        kept_keys: set[int] = set()

        def observe(event: str, key: int, size_bytes: int) -> None:
            if not recording:
                return
            if event == "alloc":
                trace.events.append(Alloc(key, size_bytes, keeps))
                if keeps:
                    kept_keys.add(key)
            else:
                trace.events.append(Free(key, size_bytes))

        between = BetweenNodes()

        def calling(func: Any, args: Any, kwargs: Any) -> None:
            nonlocal keeps
            if not recording:
                return
            keeps = keepers(func, args, kwargs or {})
            if is_mutable(func):
                given = (tensor for values in (args, kwargs) for tensor in tensors_in(values))
                trace.rewritten.update(kept_keys & {live.key_of(tensor) for tensor in given})
            if between.now and is_sum_of_two(func, args, kwargs):
                first = args[:1] if not args[0]._is_view() else ()
                dense = (tensor for tensor in first if is_non_overlapping_and_dense_or_false(tensor))
                trace.events.append(Accumulate(tuple(k for k in map(live.key_of, dense) if k is not None)))
            else:
                kind = None
                if self._workspaces is not None:
                    kind = kind_of(func, args, kwargs)
                    self._workspaces.note(kind, args, kwargs)
                trace.events.append(Operate(kind, keeps))

        def called(func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
            if recording and counter is not None:
                counter.called(func, args, kwargs, outputs)

        live = LiveStorages(block_bytes=self._block_bytes, observe=observe, calling=calling, called=called)

        def mark(window: Window, boundary: torch.Tensor | None) -> None:
            if window[0] != "backward":
                between.ended()
            if window[0] == "optimizer":
                make_state()
            if recording:
                trace.events.append(Enter(window, live.key_of(boundary) if boundary is not None else None))
                if counter is not None:
                    counter.entered(window)

        def make_state() -> None:
            """An update before the one that is recorded, which finds the optimizer's state as every later one does."""
            nonlocal recording
            recording, before = False, live.live_bytes
            optimizer.step()
            trace.optimizer_state_bytes = live.live_bytes - before
            recording = True

        def save(tensor: torch.Tensor) -> torch.Tensor | None:
            key = live.key_of(tensor)
            if recording and key is not None:
                trace.events.append(Save(key))
                if counter is not None:
                    counter.saved()
            return None if run == "dropped" else tensor

        marks = WindowMarks(self._stages, mark)
        batch = self._workload.worst_batch if longest else self._workload.batch
        real = [batch(batch_size) for _ in range(2)]
        with (
            pretending(model, real, absent=self._absent, watch=live) as batches,
            marks.watching(model),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            optimizer = build_optimizer(self._optimizer, model)
            numbers_in_updates(optimizer)
            stepper = Stepper(
                model=model,
                loss=lambda model, batch: between.watch(self._workload.loss(model, batch)),
                optimizer=optimizer,
                precision=precision,
                device_type=self._device_type,
                scaler=None,
            )
            before = live.live_bytes
            live.track(model.parameters())
            trace.parameter_bytes = live.live_bytes - before
            before = live.live_bytes
            live.track(model.buffers())
            trace.buffer_bytes = live.live_bytes - before
            before = live.live_bytes
            live.track(leaf for leaf in tree_leaves(batches) if isinstance(leaf, torch.Tensor))
            trace.batch_bytes = live.live_bytes - before
            if run == "plain":
                recording = True
                stepper.step(batches, 2, marks)
            else:
                evaluates = run == "evaluation"
                model.train(not evaluates)
                recording = True
                marks.forward_begins(0)
                with torch.set_grad_enabled(not evaluates), stepper.autocast():
                    torch.set_autocast_cache_enabled(evaluates)
                    loss = stepper.loss(model, batches[0])
                marks.backward_begins(0)
                del loss
                model.train()
            recording = False
        if self._workspaces is not None:
            self._workspaces.try_noted()
        trace.events = settle(trace.events, self._workspaces)
        return trace


@dataclass(slots=True)
class _StageAnalysis:
    input_bytes: int = 0
    saves_input: bool = False
    hold_bytes: int = 0
    dropped_hold_bytes: int = 0
    carry_bytes: int = 0
    gradient_bytes: int = 0
    forward: list[int] = field(default_factory=list)
    rebuild_first: list[int] = field(default_factory=list)
    recompute_points: int = 0
    dropped: list[int] = field(default_factory=list)
    dropped_first: list[int] = field(default_factory=list)
    backward_first: list[int] = field(default_factory=list)
    backward_later: list[int] = field(default_factory=list)
    keeping: dict[Keeping, _SelectiveAnalysis] = field(
        default_factory=lambda: {how: _SelectiveAnalysis() for how in KEEPINGS}
    )


@dataclass(slots=True)
class _SelectiveAnalysis:
    """What a stage that keeps its products adds: ``rebuild`` pairs a level with the kept bytes made until then.

    ``hold_bytes`` and ``points``: up to its last saved tensor.
    """

    made_bytes: int = 0
    hold_bytes: int = 0
    points: int = 0
    possible: bool = True
    rebuild: list[tuple[int, int]] = field(default_factory=list)
    forward: list[int] = field(default_factory=list)

    def rebuilt(self) -> list[int]:
        """Levels of the second run: all that is kept is there from the beginning."""
        needed = self.rebuild[: max(self.points, 1)]
        return [level + self.hold_bytes - min(made, self.hold_bytes) for level, made in needed]


@dataclass(slots=True)
class _Analysis:
    plain: Trace
    stages: list[_StageAnalysis]
    optimizer: list[int]
    evaluation: list[int]


@dataclass(slots=True)
class _Life:
    size_bytes: int
    born: Window
    dies: Window | None = None


def _lives(
    trace: Trace,
) -> tuple[dict[int, _Life], dict[tuple[str, int, int], int | None], set[tuple[int, Window]]]:
    """Where each storage was born and died; the input of each forward window; what was saved where."""
    lives: dict[int, _Life] = {}
    inputs: dict[Window, int | None] = {}
    saved: set[tuple[int, Window]] = set()
    window: Window = ("between", 0, 0)
    for event in trace.events:
        match event:
            case Enter(window=entered, input_key=key):
                window = entered
                inputs[window] = key
            case Alloc(key=key, size_bytes=size):
                lives[key] = _Life(size, window)
            case Free(key=key) if key in lives:
                lives[key].dies = window
            case Save(key=key):
                saved.add((key, window))
            case _:
                pass
    return lives, inputs, saved


def _analyse(plain: Trace, dropped: Trace, evaluation: Trace, length: int) -> _Analysis:
    stages = [_StageAnalysis() for _ in range(length)]
    lives, inputs, saved = _lives(plain)
    keys = [[inputs.get(("forward", m, i)) for i in range(length)] for m in range(2)]
    owner = {key: _owner(key, life, keys, saved) for key, life in lives.items() if _survives_forward(life)}
    for i, stage in enumerate(stages):
        key = keys[0][i]
        if key is not None and key in lives:
            stage.input_bytes = lives[key].size_bytes
            stage.saves_input = owner.get(key) == i and (key, ("forward", 0, i)) in saved
        stage.hold_bytes = sum(
            lives[k].size_bytes for k, who in owner.items() if who == i and lives[k].born[1] == 0
        )
        stage.gradient_bytes = sum(
            life.size_bytes
            for life in lives.values()
            if life.born == ("backward", 0, i) and _is_gradient(life)
        )
    optimizer = _walk_plain(plain, stages, lives, owner)
    _walk_dropped(dropped, stages)
    return _Analysis(plain, stages, optimizer, list(evaluation.levels()))


def _survives_forward(life: _Life) -> bool:
    phase, micro_batch, _ = life.born
    return phase == "forward" and not (
        life.dies is not None and life.dies[0] == "forward" and life.dies[1] == micro_batch
    )


def _is_gradient(life: _Life) -> bool:
    """Whether a storage born in a backward pass is a parameter's gradient: the optimizer sees it."""
    return life.dies is None or life.dies[0] == "optimizer"


def _owner(key: int, life: _Life, keys: list[list[int | None]], saved: set[tuple[int, Window]]) -> int:
    """The stage that a surviving storage is counted with."""
    _, micro_batch, born = life.born
    row = keys[micro_batch]
    after = born + 1
    if after < len(row) and row[after] == key and (key, ("forward", micro_batch, after)) in saved:
        return after
    return born


def _walk_plain(
    trace: Trace, stages: list[_StageAnalysis], lives: dict[int, _Life], owner: dict[int, int]
) -> list[int]:
    """Fill the forward and backward points of every stage; return the optimizer's."""
    alive: dict[int, int] = {}
    total = 0
    window: Window = ("between", 0, 0)
    points: list[int] = []
    optimizer: list[int] = []
    excluded = 0
    leftovers: dict[int, int] = {}

    def earlier(key: int) -> bool:
        phase, micro_batch, stage = window
        if phase not in ("forward", "backward"):
            return False
        return key in owner and lives[key].born[1] == micro_batch and owner[key] < stage

    def add_point(inside: int = 0) -> None:
        level = total - excluded + inside
        points.append(level)
        if window[:2] == ("forward", 0):
            stage = stages[window[2]]
            stage.rebuild_first.append(level - sum(leftovers.values()))
            for selective in stage.keeping.values():
                selective.rebuild.append((stage.rebuild_first[-1], selective.made_bytes))

    for event in trace.events:
        match event:
            case Enter(window=entered):
                window = entered
                excluded = sum(size for key, size in alive.items() if earlier(key))
                phase, micro_batch, i = window
                leftovers.clear()
                if phase == "forward":
                    points = stages[i].forward if micro_batch == 0 else []
                    leftovers.update(
                        (key, size)
                        for key, size in alive.items()
                        if key not in owner and key != event.input_key
                    )
                elif phase == "backward":
                    points = stages[i].backward_first if micro_batch == 0 else stages[i].backward_later
                    if micro_batch == 0:
                        stages[i].carry_bytes = sum(
                            size
                            for key, size in alive.items()
                            if not (key in owner and owner[key] <= i)
                            and not (lives[key].born[0] == "backward" and _is_gradient(lives[key]))
                        )
                elif phase == "optimizer":
                    points = optimizer
                else:
                    points = []
                add_point()
            case Alloc(key=key, size_bytes=size, kept=kept):
                alive[key] = size
                total += size
                if window[:2] == ("forward", 0):
                    for how in kept:
                        selective = stages[window[2]].keeping[how]
                        selective.made_bytes += size
                        selective.possible &= key not in trace.rewritten
                add_point()
            case Peak(size_bytes=size, kept=kept):
                add_point(size)
                if window[:2] == ("forward", 0):
                    for how in kept:  # The second run does not call this operation.
                        stages[window[2]].keeping[how].rebuild.pop()
            case Free(key=key) if key in alive:
                size = alive.pop(key)
                total -= size
                leftovers.pop(key, None)
                if earlier(key):
                    excluded -= size
            case Save() if window[0] == "forward" and window[1] == 0:
                stage = stages[window[2]]
                stage.recompute_points = len(points)
                for selective in stage.keeping.values():
                    selective.points = len(selective.rebuild)
                    selective.hold_bytes = selective.made_bytes
            case _:
                pass
    return optimizer


def _walk_dropped(trace: Trace, stages: list[_StageAnalysis]) -> None:
    lives, inputs, _ = _lives(trace)
    length = len(stages)
    boundaries = {inputs.get(("forward", 0, i)) for i in range(length)}
    lasting = {
        key
        for key, life in lives.items()
        if _survives_forward(life) and key not in boundaries and life.born[2] < length - 1
    }
    for i, stage in enumerate(stages):
        stage.dropped_hold_bytes = sum(lives[key].size_bytes for key in lasting if lives[key].born[2] == i)
    alive: dict[int, int] = {}
    total = excluded = returned = 0
    kept_bytes: Counter[Keeping] = Counter()
    kept_here: dict[int, frozenset[Keeping]] = {}
    current = 0

    def add_point(inside: int = 0) -> None:
        level = total - excluded + inside
        stages[current].dropped.append(level)
        stages[current].dropped_first.append(level + returned)
        for how, selective in stages[current].keeping.items():
            selective.forward.append(level + returned + kept_bytes[how])

    for event in trace.events:
        match event:
            case Enter(window=("forward", _, i)):
                current, returned = i, 0
                kept_bytes.clear()
                kept_here.clear()
                excluded = sum(alive[key] for key in alive if key in lasting)
                add_point()
            case Alloc(key=key, size_bytes=size, kept=kept):
                alive[key] = size
                total += size
                kept_here[key] = kept
                add_point()
            case Peak(size_bytes=size):
                add_point(size)
            case Free(key=key) if key in alive:
                size = alive.pop(key)
                total -= size
                kept_bytes.update(dict.fromkeys(kept_here.get(key, ()), size))
                if key == inputs.get(("forward", 0, current)):
                    returned = size
            case _:
                pass


class _Fit:
    """Affine sizes and curves through two micro-batch sizes."""

    def __init__(self, small: int, large: int) -> None:
        self._small = small
        self._large = large

    def affine(self, at_small: float, at_large: float) -> AffineBytes:
        spread = self._large - self._small
        per_sample = (at_large - at_small) / spread if spread else 0.0
        return at_small - per_sample * self._small, per_sample

    def curve(self, at_small: list[int], at_large: list[int]) -> Curve:
        if len(at_small) != len(at_large):
            return (self.affine(max(at_small), max(at_large)),)
        return upper_envelope({self.affine(a, b) for a, b in zip(at_small, at_large, strict=True)})

    def stage(self, a: _StageAnalysis, b: _StageAnalysis) -> StageMemory:
        return StageMemory(
            input=self.affine(a.input_bytes, b.input_bytes),
            saves_input=a.saves_input and b.saves_input,
            hold=self.affine(a.hold_bytes, b.hold_bytes),
            dropped_hold=self.affine(a.dropped_hold_bytes, b.dropped_hold_bytes),
            carry=self.affine(a.carry_bytes, b.carry_bytes),
            gradient=self.affine(a.gradient_bytes, b.gradient_bytes),
            forward=self.curve(a.forward, b.forward),
            recompute=self.curve(
                a.forward[: max(a.recompute_points, 1)], b.forward[: max(b.recompute_points, 1)]
            ),
            rebuild_first=self.curve(a.rebuild_first, b.rebuild_first),
            rebuild_single=self.curve(
                a.rebuild_first[: max(a.recompute_points, 1)], b.rebuild_first[: max(b.recompute_points, 1)]
            ),
            dropped=self.curve(a.dropped, b.dropped),
            dropped_first=self.curve(a.dropped_first, b.dropped_first),
            backward_first=self.curve(a.backward_first, b.backward_first),
            backward_later=self.curve(a.backward_later, b.backward_later),
            **self.keeping(a.keeping, b.keeping),
        )

    def keeping(
        self, a: dict[Keeping, _SelectiveAnalysis], b: dict[Keeping, _SelectiveAnalysis]
    ) -> dict[Keeping, SelectiveMemory | None]:
        """The ways of keeping that are possible; what would keep the same is left out."""
        found = {how: self.selective(a[how], b[how]) for how in KEEPINGS}
        if found["selective_narrow"] == found["selective"]:
            found["selective_narrow"] = None
        return found

    def selective(self, a: _SelectiveAnalysis, b: _SelectiveAnalysis) -> SelectiveMemory | None:
        if not (a.hold_bytes and b.hold_bytes and a.possible and b.possible):
            return None
        return SelectiveMemory(
            hold=self.affine(a.hold_bytes, b.hold_bytes),
            forward=self.curve(a.forward, b.forward),
            rebuild=self.curve(a.rebuilt(), b.rebuilt()),
        )


def upper_envelope(points: set[AffineBytes]) -> Curve:
    """Those affine points that are the maximum for some micro-batch size b >= 1, by rising slope."""
    best: dict[float, float] = {}
    for fixed, per_sample in points:
        best[per_sample] = max(best.get(per_sample, fixed), fixed)
    envelope: list[AffineBytes] = []
    for per_sample, fixed in sorted(best.items()):
        while envelope:
            last_fixed, last_slope = envelope[-1]
            if fixed + per_sample >= last_fixed + last_slope:
                envelope.pop()
                continue
            if len(envelope) >= 2:
                before_fixed, before_slope = envelope[-2]
                here = (last_fixed - fixed) * (last_slope - before_slope)
                there = (before_fixed - last_fixed) * (per_sample - last_slope)
                if here <= there:
                    envelope.pop()
                    continue
            break
        envelope.append((fixed, per_sample))
    return tuple(envelope)

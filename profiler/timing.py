"""How long every window of a step takes on the device.

Real optimizer steps run with a mark at each window's begin; what lies between two marks is that window's
time:

    step:    F0 | F1 | ... | F_L-1 | B_L-1 | ... | B0 | F0 | ... | B0 | update
    micro-batch 0: gradients appear                     1: gradients are added to

One step warms up, on the largest batches there are, and shows what memory kernels take inside; a few are timed, and
the mean over those that nothing else disturbed is kept, beside that of a yardstick (profiler/yardstick.py) that runs
between them. On a CPU a mark reads the wall clock and the process's CPU clock; on CUDA it records an event, and all
are read after the step. The learning rate is zero and the buffers are put back, so the model is what it was.

A step that does not fit runs all the same with what it saves kept elsewhere (profiler/elsewhere.py); while tensors are
copied there and back the clock stands still.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from profiler.chain import Stage
from profiler.device import is_out_of_memory, process_cpu_seconds, synchronize
from profiler.elsewhere import Away, Elsewhere
from profiler.events import Window
from profiler.freed_memory import keep_freed_memory
from profiler.live import QuickMode
from profiler.memory import WindowMarks
from profiler.profile_record import Precision, StageTime, StepTime
from profiler.selective import NOWHERE, WIDE, keepers
from profiler.step import Stepper, build_optimizer, build_scaler
from profiler.workload import Workload
from profiler.workspaces import Workspaces
from profiler.yardstick import Yardstick

MICRO_BATCHES_PER_STEP = 2
"""The first micro-batch makes gradients, the second adds to them; every later one is like the second."""

SHORTEST_SECONDS = 1.0
"""Short steps are repeated for this long, or until there are so many:"""

MOST_STEPS = 50

KEPT_PASSES = 2
"""Forward passes in which what a selective segment keeps is timed, operation by operation."""

HOPELESS_SLOWDOWN = 2.0
"""A precision whose forward pass takes this many times fp32's is not timed any further."""


class HopelessPrecisionError(Exception):
    """A precision takes too long; carries how many times fp32's time it took at least."""

    def __init__(self, slowdown: float) -> None:
        super().__init__(slowdown)
        self.slowdown = slowdown


@dataclass(frozen=True, slots=True)
class Timing:
    """A step's times on the wall clock and on the process's CPU clock (None on CUDA)."""

    wall: StepTime
    process_cpu: StepTime | None


@contextlib.contextmanager
def on_device(workload: Workload, device: torch.device) -> Iterator[Workload]:
    """The workload with its model on ``device`` in training mode; afterwards the model is as it was."""
    if device.type == "cpu":
        keep_freed_memory()
    model = workload.model
    home = next(model.parameters()).device
    training = model.training
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            model.train()
            _move(model, device)
            yield Workload(
                model=model,
                batch=lambda size: to_device(workload.batch(size), device),
                loss=workload.loss,
                name=workload.name,
                longest_batch=lambda size: to_device(workload.worst_batch(size), device),
            )
        finally:
            model.to(home)
            model.train(training)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _move(model: torch.nn.Module, device: torch.device) -> None:
    try:
        model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        raise ValueError(
            f"The weights must fit on the {device.type} device, and these of {size / 2**20:,.0f} MiB were refused "
            "memory. Free some there, take a smaller model, or run nothing (--fake), as for several processes that "
            "share them."
        ) from error


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch on ``device``. Most batches are plain containers, which need not pytree's slow walk."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if type(batch) is dict:
        return {name: to_device(value, device) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)([to_device(value, device) for value in batch])
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def stepper_for(workload: Workload, optimizer: str, precision: Precision, device: torch.device) -> Stepper:
    """A stepper that measures but does not learn: its learning rate is zero."""
    return Stepper(
        model=workload.model,
        loss=workload.loss,
        optimizer=build_optimizer(optimizer, workload.model, learning_rate=0.0, weight_decay=0.0),
        precision=precision,
        device_type=device.type,
        scaler=build_scaler(precision, device.type),
    )


def measure_times(
    workload: Workload,
    stages: Sequence[Stage],
    *,
    optimizer: str,
    precision: Precision,
    micro_batch_size: int,
    device: torch.device,
    steps: int,
    workspaces: Workspaces,
    elsewhere: bool = False,
) -> Timing:
    """Mean times of ``steps`` optimizer steps of two micro-batches or more; the model is already on ``device``.

    ``workspaces`` learns from the step that warms up. ``elsewhere``: what a step saves is kept off the device. Raises
    ValueError for a loss that is not finite.
    """
    stepper = stepper_for(workload, optimizer, precision, device)
    clock = _clock(device)
    saves = _LastSave(clock, _elsewhere(workload, device, clock) if elsewhere else None)
    marks = WindowMarks(stages, saves.window)
    batches = [workload.batch(micro_batch_size) for _ in range(MICRO_BATCHES_PER_STEP)]
    worst = (workload.worst_batch(micro_batch_size) for _ in range(MICRO_BATCHES_PER_STEP))
    readings: list[_Reading] = []
    spent = 0.0
    with marks.watching(workload.model), saves.watching():
        with workspaces.watching():
            _check_finite(stepper.step(worst, MICRO_BATCHES_PER_STEP, marks), precision, micro_batch_size)
        saves.learn()
        stepper.step(batches[:1], 1)  # What watches leaves the allocator's memory in pieces.
        yardstick = Yardstick.of(stepper, batches[0], device)
        while len(readings) < steps or (spent < SHORTEST_SECONDS and len(readings) < MOST_STEPS):
            synchronize(device)
            clock.start()
            loss = stepper.step(batches, MICRO_BATCHES_PER_STEP, marks)
            synchronize(device)
            readings.append(clock.read())
            _check_finite(loss, precision, micro_batch_size)
            yardstick.beside(readings[-1].wall_seconds)
            spent += readings[-1].wall_seconds
        marking = _KeptMarks(clock, saves)
        forwards = []
        for _ in range(KEPT_PASSES):
            synchronize(device)
            clock.start()
            with marking, stepper.autocast():
                marks.forward_begins(0)
                stepper.loss(stepper.model, batches[0])
                marks.step_ended()
            synchronize(device)
            forwards.append(clock.read())
            saves.let_go()
    readings = [readings[index] for index in yardstick.undisturbed()]
    dispatch = dispatch_seconds() if device.type == "cpu" else None
    wall = _summary(
        [r.wall for r in readings],
        _kept_in([r.wall for r in forwards], len(stages)),
        micro_batch_size,
        yardstick.wall_seconds(),
        elsewhere,
        dispatch,
    )
    of_cpu = [r.process_cpu for r in readings if r.process_cpu is not None]
    if not of_cpu:
        return Timing(wall, None)
    kept_cpu = _kept_in([r.process_cpu for r in forwards if r.process_cpu is not None], len(stages))
    cpu = _summary(of_cpu, kept_cpu, micro_batch_size, yardstick.cpu_seconds(), elsewhere)
    if dispatch is not None:
        # Meanwhile the other threads spin, and their time counts as well.
        busy = max(1.0, cpu.step_seconds / wall.step_seconds)
        cpu = msgspec.structs.replace(cpu, dispatch_seconds=dispatch * busy)
    return Timing(wall, cpu)


class _Through(QuickMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def dispatch_seconds(calls: int = 300, rounds: int = 7) -> float:
    """How long this host takes to lead one operation through a mode written in Python: the quickest of some rounds."""
    number = torch.zeros(())

    def each() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.add(number, number)
        return (time.perf_counter() - start) / calls

    with torch.no_grad():
        plain = min(each() for _ in range(rounds))
        with _Through():  # type: ignore[no-untyped-call]
            return min(each() for _ in range(rounds)) - plain


def measure_last_stage(
    workload: Workload,
    stages: Sequence[Stage],
    beside: Timing,
    *,
    optimizer: str,
    precision: Precision,
    micro_batch_size: int,
    device: torch.device,
    workspaces: Workspaces,
) -> tuple[StageTime, StageTime | None]:
    """The times of a changed last stage on both clocks, from one step at the speed that ``beside`` was measured at.

    The other stages are the same in both, so the ratio of their times is that of the device's speeds. What the step
    saves is kept where it was for ``beside``.
    """
    stepper = stepper_for(workload, optimizer, precision, device)
    clock = _clock(device)
    saves = _LastSave(clock, _elsewhere(workload, device, clock) if beside.wall.kept_elsewhere else None)
    marks = WindowMarks(stages, saves.window)
    batches = [workload.batch(micro_batch_size) for _ in range(MICRO_BATCHES_PER_STEP)]
    with marks.watching(workload.model), saves.watching():
        with workspaces.watching():
            _check_finite(stepper.step(batches, MICRO_BATCHES_PER_STEP, marks), precision, micro_batch_size)
        synchronize(device)
        clock.start()
        stepper.step(batches, MICRO_BATCHES_PER_STEP, marks)
        synchronize(device)
        reading = clock.read()

    def last(times: Times, before: StepTime) -> StageTime:
        nothing_kept = [_Kept()] * len(stages)
        found = _summary([times], nothing_kept, micro_batch_size, None)
        speed = _of_others(before) / _of_others(found) if len(stages) > 1 else 1.0
        stage = found.stages[-1]
        return StageTime(
            forward_seconds=speed * stage.forward_seconds,
            recompute_seconds=speed * stage.recompute_seconds,
            backward_first_seconds=speed * stage.backward_first_seconds,
            backward_later_seconds=speed * stage.backward_later_seconds,
        )

    cpu = None
    if reading.process_cpu is not None and beside.process_cpu is not None:
        cpu = last(reading.process_cpu, beside.process_cpu)
    return last(reading.wall, beside.wall), cpu


def _of_others(step: StepTime) -> float:
    """Seconds of all stages but the last, of two micro-batches."""
    return sum(
        2 * s.forward_seconds + s.backward_first_seconds + s.backward_later_seconds for s in step.stages[:-1]
    )


def _clock(device: torch.device) -> _CpuClock | _CudaClock:
    return _CudaClock() if device.type == "cuda" else _CpuClock()


def _check_finite(loss: torch.Tensor, precision: Precision, micro_batch_size: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"loss(model, batch) is {loss.item()} at {precision} with micro-batch "
            f"{micro_batch_size}; a model whose loss is not finite cannot be profiled. "
            "Check the batch and the initial weights."
        )


def _elsewhere(workload: Workload, device: torch.device, clock: _CpuClock | _CudaClock) -> Elsewhere:
    return Elsewhere(workload.model, device, clock.paused)


def forward_seconds(
    workload: Workload, precision: Precision, batch: Any, device: torch.device, *, saving: bool = True
) -> float:
    """Seconds of one forward pass on the wall clock; ``saving``: with what a backward pass would need."""
    stepper = stepper_for(workload, "sgd", precision, device)
    synchronize(device)
    start = time.perf_counter()
    with stepper.autocast(), torch.set_grad_enabled(saving):
        stepper.loss(stepper.model, batch)
    synchronize(device)
    return time.perf_counter() - start


def check_worthwhile(
    workload: Workload,
    stages: Sequence[Stage],
    precision: Precision,
    batch: Any,
    device: torch.device,
    *,
    saving: bool = True,
) -> None:
    """Raise HopelessPrecisionError when ``precision`` runs far slower than fp32 here.

    fp32's second forward pass is the yardstick. The other precision's first one (kernels are set up in it) is
    broken off between two stages as soon as it has taken ten times as long; its second one is compared. ``saving``
    False: passes save nothing, for a device that has no room for it, and none is broken off.
    """
    forward_seconds(workload, "fp32", batch, device, saving=saving)
    yardstick = forward_seconds(workload, "fp32", batch, device, saving=saving)
    start = time.perf_counter()

    def mark(window: Window, boundary: torch.Tensor | None) -> None:
        slowdown = (time.perf_counter() - start) / yardstick
        if slowdown > 5 * HOPELESS_SLOWDOWN:
            raise HopelessPrecisionError(slowdown)

    with WindowMarks(stages, mark).watching(workload.model):
        forward_seconds(workload, precision, batch, device, saving=saving)
    slowdown = forward_seconds(workload, precision, batch, device, saving=saving) / yardstick
    if slowdown > HOPELESS_SLOWDOWN:
        raise HopelessPrecisionError(slowdown)


Key = tuple[str, int, int]
Times = dict[Key, float]


@dataclass(slots=True)
class _Reading:
    """Seconds of each window; ``("saved", m, i)``: stage i's forward up to its last saved tensor."""

    wall: Times
    process_cpu: Times | None

    @property
    def wall_seconds(self) -> float:
        """Of the whole step."""
        return _total(self.wall)


class _Saved:
    """A tensor that autograd saved.

    Handed back as it is, an output that its own operation saves would keep that operation alive, and all before it,
    unless a backward pass comes: none does for a step that is refused memory.
    """

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor | Away) -> None:
        self.tensor: torch.Tensor | Away | None = tensor


class _LastSave:
    """Marks the moment of each stage's last saved tensor, once a first step has shown how many it saves.

    ``elsewhere``: where they are kept, if not on the device.
    """

    def __init__(self, clock: _CpuClock | _CudaClock, elsewhere: Elsewhere | None = None) -> None:
        self._clock = clock
        self._elsewhere = elsewhere
        self._saved: list[weakref.ref[_Saved]] = []
        self._window: Window = ("between", 0, 0)
        self._counts: dict[int, int] = defaultdict(int)
        self._last: dict[int, int] = {}
        self._seen = 0

    @property
    def stage(self) -> int | None:
        """The stage that runs forward, if one does."""
        return self._window[2] if self._window[0] == "forward" else None

    def window(self, window: Window, boundary: torch.Tensor | None) -> None:
        self._window, self._seen = window, 0
        self._clock.mark(window)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While steps run; afterwards nothing of them stays, however they ended."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Of all that no backward pass will ask for any more."""
        for reference in self._saved:
            saved = reference()
            if saved is not None:
                saved.tensor = None
        self._saved.clear()

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        phase, micro_batch, stage = self._window
        if phase == "forward":
            self._seen += 1
            if not self._last:
                self._counts[stage] = max(self._counts[stage], self._seen)
            elif self._last.get(stage) == self._seen:
                self._clock.mark_inside(("saved", micro_batch, stage))
        saved = _Saved(tensor if self._elsewhere is None else self._elsewhere.keep(tensor))
        self._saved.append(weakref.ref(saved))
        return saved

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        kept = saved.tensor
        assert kept is not None, "nothing was let go of that a backward pass still asks for"
        return kept if isinstance(kept, torch.Tensor) else self._given_back(kept)

    def _given_back(self, kept: Away) -> torch.Tensor:
        assert self._elsewhere is not None
        return self._elsewhere.give_back(kept)

    def learn(self) -> None:
        if not self._last:
            self._last = dict(self._counts)


class _KeptMarks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks where each operation begins and ends whose outputs a selective segment keeps."""

    def __init__(self, clock: _CpuClock | _CudaClock, saves: _LastSave) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._saves = saves
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        stage = self._saves.stage
        kept = keepers(func, args, kwargs) if stage is not None else NOWHERE
        if stage is None or not kept:
            return func(*args, **kwargs)
        self._count += 1
        self._clock.mark_inside(("kept begins", self._count, stage))
        outputs = func(*args, **kwargs)
        self._clock.mark_inside(("kept ends" if kept == WIDE else "narrow ends", self._count, stage))
        return outputs


@dataclass(slots=True)
class _Kept:
    """Seconds of a stage's forward up to its last saved tensor, and of those operations whose outputs would be kept.

    ``narrow_seconds``: of these, by ``selective_narrow`` too.
    """

    whole_seconds: float = 0.0
    seconds: float = 0.0
    narrow_seconds: float = 0.0

    @property
    def share(self) -> float:
        return self.seconds / self.whole_seconds if self.whole_seconds else 0.0

    @property
    def narrow_share(self) -> float:
        return self.narrow_seconds / self.whole_seconds if self.whole_seconds else 0.0


def _kept_in(passes: list[Times], length: int) -> list[_Kept]:
    """What selective segments would keep, stage by stage."""
    found = [_Kept() for _ in range(length)]
    for times in passes:
        for (kind, number, stage), seconds in times.items():
            if kind == "saved":
                found[stage].whole_seconds += seconds
            elif kind in ("kept ends", "narrow ends") and seconds <= times.get(("saved", 0, stage), 0.0):
                taken = seconds - times["kept begins", number, stage]
                found[stage].seconds += taken
                found[stage].narrow_seconds += taken if kind == "narrow ends" else 0.0
    return found


class _CpuClock:
    """Wall and CPU clock readings at every mark."""

    def __init__(self) -> None:
        self._marks: list[tuple[Key, bool, float, float]] = []
        self._lost = (0.0, 0.0)

    def start(self) -> None:
        self._marks = []
        self._lost = (0.0, 0.0)

    def _mark(self, key: Key, inside: bool) -> None:
        wall, cpu = self._lost
        self._marks.append((key, inside, time.perf_counter() - wall, process_cpu_seconds() - cpu))

    def mark(self, key: Key) -> None:
        self._mark(key, False)

    def mark_inside(self, key: Key) -> None:
        self._mark(key, True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside takes no time."""
        wall, cpu = time.perf_counter(), process_cpu_seconds()
        yield
        lost_wall, lost_cpu = self._lost
        self._lost = (
            lost_wall + time.perf_counter() - wall,
            lost_cpu + process_cpu_seconds() - cpu,
        )

    def read(self) -> _Reading:
        self.mark(("end", 0, 0))
        wall = _differences([(key, inside, t) for key, inside, t, _ in self._marks])
        cpu = _differences([(key, inside, t) for key, inside, _, t in self._marks])
        return _Reading(wall, cpu)


class _CudaClock:
    """CUDA events at every mark, read after the step."""

    def __init__(self) -> None:
        self._marks: list[tuple[Key, bool, torch.cuda.Event]] = []
        self._pauses: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._marks = []
        self._pauses = []

    def _record(self, key: Key, inside: bool) -> None:
        self._marks.append((key, inside, _recorded()))

    def mark(self, key: Key) -> None:
        self._record(key, False)

    def mark_inside(self, key: Key) -> None:
        self._record(key, True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the device does for what runs inside takes no time."""
        begins = _recorded()
        yield
        self._pauses.append((len(self._marks), begins, _recorded()))

    def read(self) -> _Reading:
        self._record(("end", 0, 0), False)
        torch.cuda.synchronize()
        first = self._marks[0][2]
        lost = [0.0] * (len(self._marks) + 1)
        for position, begins, ends in self._pauses:
            lost[position] += begins.elapsed_time(ends)
        marks = [
            (key, inside, (first.elapsed_time(event) - before) / 1e3)
            for (key, inside, event), before in zip(self._marks, itertools.accumulate(lost), strict=False)
        ]
        return _Reading(_differences(marks), None)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _differences(marks: list[tuple[Key, bool, float]]) -> Times:
    times: Times = defaultdict(float)
    window: tuple[Key, float] | None = None
    for key, inside, at in marks:
        if window is not None and inside:
            times[key] = at - window[1]
            continue
        if window is not None:
            times[window[0]] += at - window[1]
        window = (key, at)
    return dict(times)


def _total(step: Times) -> float:
    return sum(seconds for key, seconds in step.items() if key[0] != "saved")


def _summary(
    steps: list[Times],
    kept: list[_Kept],
    micro_batch_size: int,
    yardstick_seconds: float | None,
    elsewhere: bool = False,
    dispatch_seconds: float | None = None,
) -> StepTime:
    totals = [_total(step) for step in steps]

    def mean(*keys: Key) -> float:
        return statistics.mean(step.get(key, 0.0) for key in keys for step in steps)

    def stage(i: int) -> StageTime:
        forward = mean(("forward", 0, i), ("forward", 1, i))
        recompute = min(forward, mean(("saved", 0, i), ("saved", 1, i)))
        return StageTime(
            forward_seconds=forward,
            recompute_seconds=recompute,
            kept_seconds=kept[i].share * recompute,
            kept_narrow_seconds=kept[i].narrow_share * recompute,
            backward_first_seconds=mean(("backward", 0, i)),
            backward_later_seconds=mean(("backward", 1, i)),
        )

    ordered = sorted(totals)
    quarter = len(ordered) // 4
    middle = statistics.mean(ordered)
    return StepTime(
        micro_batch_size=micro_batch_size,
        stages=tuple(stage(i) for i in range(len(kept))),
        update_seconds=mean(("optimizer", 0, 0)),
        host_seconds=sum(mean(("between", m, 0)) for m in range(2)) / 2,
        step_seconds=middle,
        steps_timed=len(steps),
        spread=(ordered[-1 - quarter] - ordered[quarter]) / (2 * middle),
        yardstick_seconds=yardstick_seconds,
        kept_elsewhere=elsewhere,
        dispatch_seconds=dispatch_seconds,
    )

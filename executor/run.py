"""One run of training, step by step, in whatever state it is found.

    take a batch ─▶ remember ─▶ k forward and backward passes ─▶ update ─▶ write down ─▶ save, evaluate, stop?
                       ▲                    │
                       └── out of memory: the next plan on the front, the same batch again

All that decides how the run goes on is in ``RunState`` and the engine: what a snapshot holds. So a run that is killed
at any moment goes on from its newest snapshot as if it had never been killed, bit for bit on a CPU.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from executor import engines, snapshots
from executor.accumulation import AccumulationController, AdaptiveAccumulation, GradientSpread, OverheadGuard
from executor.data import TrainingData
from executor.engine import PreparedStep
from executor.engines import Engine
from executor.errors import Interrupted, NotFinite, OutOfMemory, PlanDoesNotFit
from executor.evaluation import evaluate
from executor.fallback import NoFallback, described, next_plan
from executor.last_good import LastGood, RandomState
from executor.learning_rate import LearningRate, beta2_at
from executor.metrics import Metrics
from executor.order import Position, Share
from executor.prefetch import batches_ahead
from executor.snapshots import Damaged, NotSaved, Peers, Tree
from executor.stopping import Metric, Requests, Target, Watch, first_not_finite
from executor.stream import Stream
from executor.verification import Clocks
from planner.cost import instead
from planner.plan import Plan
from profiler import energy
from profiler.allocator import AllocatorMeter, bytes_of, measure_step
from profiler.device import is_out_of_memory
from profiler.freed_memory import release_freed_memory
from profiler.step import StepObserver, Stepper
from profiler.timing import to_device
from profiler.workload import Workload, split

SAVE_SECONDS: Final = 600.0
"""How often a run saves that was not told."""

METERED_STEP: Final = 2
"""Of a process's steps with one plan, the one whose peak is read on a CPU: the optimizer's state exists by then."""

REMEMBERED_STEPS: Final = 200
"""How many steps' times a run keeps for its report."""


class Progress:
    """Told what a run is doing. The base class says nothing."""

    def begins(self, data: str, steps: int) -> None: ...

    def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None: ...

    def announced(self, message: str) -> None:
        """Something that whoever started the run should know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """How long a run is and how it goes, besides the plan. Everything here is as a user asked for it.

    ``total_samples``: the length of the course of the learning rate, and of the run unless it stops before.
    ``save_every``: steps; None saves by the clock. ``keep``: snapshots.
    """

    total_samples: int
    seed: int
    learning_rate: LearningRate
    save_every: int | None = None
    keep: int = snapshots.KEPT
    evaluate_every: int | None = None
    until: Target | None = None
    adaptive: AdaptiveAccumulation | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The model held against data that it was not trained on, after so many steps."""

    step: int
    samples: int
    seconds: float
    value: float


@dataclass(kw_only=True, slots=True)
class RunState:
    """Where a run is. ``seconds``: that it has trained for, over all processes that it was killed in."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    joules: float = 0.0
    first_loss: float | None = None
    loss: float | None = None
    gradient_accumulation_steps: int
    fallbacks: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    wall_seconds: collections.deque[float] = field(
        default_factory=lambda: collections.deque(maxlen=REMEMBERED_STEPS)
    )
    cpu_seconds: collections.deque[float] = field(
        default_factory=lambda: collections.deque(maxlen=REMEMBERED_STEPS)
    )
    unsteady_seconds: tuple[float, float] | None = None
    peak_bytes: int | None = None
    noise_scale_samples: float | None = None

    def steady_seconds(self) -> tuple[float, float]:
        """Mean wall and CPU seconds of the last steps like all others; of the first where there is none."""
        if self.wall_seconds:
            return statistics.mean(self.wall_seconds), statistics.mean(self.cpu_seconds)
        if self.unsteady_seconds is None:
            raise ValueError("A run must have made a step before its time can be told, got none.")
        return self.unsteady_seconds

    def tree(self) -> Tree:
        """As a snapshot holds it."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return found | {
            "evaluations": [dataclasses.asdict(each) for each in self.evaluations],
            "watch": dataclasses.asdict(self.watch),
            "wall_seconds": list(self.wall_seconds),
            "cpu_seconds": list(self.cpu_seconds),
        }

    @classmethod
    def of(cls, tree: Tree) -> RunState:
        return cls(
            **tree
            | {
                "evaluations": [Evaluation(**each) for each in tree["evaluations"]],
                "watch": Watch(**tree["watch"]),
                "wall_seconds": collections.deque(tree["wall_seconds"], maxlen=REMEMBERED_STEPS),
                "cpu_seconds": collections.deque(tree["cpu_seconds"], maxlen=REMEMBERED_STEPS),
            }
        )


class _Observed(StepObserver):
    """What a step did, and the spread of its gradients where somebody wants it."""

    def __init__(self, spread: GradientSpread | None = None) -> None:
        self.in_update = False
        self.applied = True
        self.gradient_norm: torch.Tensor | None = None
        self._spread = spread

    def backward_begins(self, micro_batch: int) -> None:
        if self._spread is not None:
            self._spread.backward_begins(micro_batch)

    def backward_ended(self, micro_batch: int) -> None:
        if self._spread is not None:
            self._spread.backward_ended(micro_batch)

    def optimizer_begins(self) -> None:
        if self._spread is not None:
            self._spread.optimizer_begins()
        self.in_update = True

    def updated(self, gradient_norm: torch.Tensor | None, applied: bool | None) -> None:
        self.gradient_norm, self.applied = gradient_norm, applied is not False


class Run:
    """See the module. ``identity``: what two runs must have in common for one to go on from the other's snapshots."""

    def __init__(
        self,
        plan: Plan,
        workload: Workload,
        optimizer: torch.optim.Optimizer,
        source: TrainingData,
        terms: Terms,
        *,
        device: torch.device,
        directory: Path | None,
        identity: dict[str, str],
        progress: Progress,
        model_flops_per_sample: float,
        peak_flops_per_second: float | None,
    ) -> None:
        self.plan = plan
        self.state = RunState(gradient_accumulation_steps=plan.gradient_accumulation_steps)
        self._workload = workload
        self._optimizer = optimizer
        self._source = source
        self._terms = terms
        self._device = device
        self._directory = directory
        self._identity = identity
        self._progress = progress
        self._flops = model_flops_per_sample
        self._peak_flops = peak_flops_per_second
        self._planned_batch_size = plan.global_batch_size
        self._planned_micro_batch_size = plan.micro_batch_size
        self._betas = [group.get("betas") for group in optimizer.param_groups]
        self._spread: GradientSpread | None = None
        self.engine: Engine = self._engine()
        self._controller: AccumulationController | None = None
        self._guard = OverheadGuard()
        if terms.adaptive is not None:
            k = min(max(plan.gradient_accumulation_steps, terms.adaptive.k_min), terms.adaptive.k_max)
            self._controller = AccumulationController(terms.adaptive, k)
            self.state.gradient_accumulation_steps = self._controller.k
        self._last_good = LastGood(workload.model)
        self._position = Position()
        self._stream = self._stream_from(self._position)
        self._counter = energy.find_counter(device) if self.engine.world_size == 1 else None
        self._steps_with_plan = 0
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None

    @property
    def steps_in_all(self) -> int:
        """Steps that the run has if its batch stays what it is."""
        left = max(0, self._terms.total_samples - self.state.samples)
        return self.state.step + -(-left // self._batch_size)

    @property
    def measures_energy(self) -> bool:
        return self._counter is not None

    @property
    def loss_scale(self) -> float | None:
        scaler = self._scaler()
        return None if scaler is None else float(scaler.get_scale())

    def model_flops_per_second(self, samples_per_second: float) -> float:
        """Of all processes together."""
        return self._flops * samples_per_second

    def model_flops_utilisation(self, samples_per_second: float) -> float | None:
        """In terms of what the maker of the devices states; None where it is not known."""
        if self._peak_flops is None:
            return None
        return self.model_flops_per_second(samples_per_second) / (self._peak_flops * self.engine.world_size)

    def resume(self) -> None:
        """Go on from the newest whole snapshot of this run; stay at the beginning where there is none.

        Damaged ones are named and passed over. Raises PlanDoesNotFit for one of another run.
        """
        if self._directory is None:
            return
        peers = self._peers()
        steps = snapshots.steps_kept(self._directory)
        for step in steps:
            path = snapshots.path_of(self._directory, step)
            tree, damage = None, None
            try:
                self._check_run(path)
                tree = snapshots.load(path, rank=self.engine.rank)
            except Damaged as error:
                damage = error
            if not peers.agree(damage is not None):
                self._restore(tree)
                self.state.resumed_from.append(step)
                self._saved_step = step
                self._progress.announced(f"goes on after step {step}, from {path}")
                return
            self._progress.announced(f"passed over: {damage or 'damaged for another process'}")
        if steps:
            self._progress.announced("no checkpoint is whole: begins again")

    def _check_run(self, path: Path) -> None:
        manifest = snapshots.manifest_of(path)
        found, expected = manifest.run | {"processes": str(manifest.world_size)}, self._identity
        others = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        if others:
            facts = ", ".join(f"{name} {found.get(name)} instead of {expected.get(name)}" for name in others)
            raise PlanDoesNotFit(
                f"{path} must be a checkpoint of this run, and is one of another: {facts}. Give the arguments that it "
                "was started with, or another --output-dir."
            )

    def go(self, requests: Requests, metrics: Metrics | None) -> None:
        """Train until all samples are seen, the target is reached, or ``requests`` asks to stop.

        Raises Interrupted, NotFinite and OutOfMemory, each with everything saved that is worth it.
        """
        while self.state.samples < self._terms.total_samples and not self._reached():
            self._step(metrics)
            if self._is_due(self._terms.evaluate_every):
                self._evaluate(metrics)
            signal_number = requests.signal_number
            if self.engine.agree(signal_number is not None):
                saved = self._save()
                where = f", saved in {saved}: --resume goes on from there" if saved else ", nothing saved"
                # Where another process was told, this one stops for the same reason.
                raise Interrupted(
                    f"stopped after step {self.state.step}{where}.", signal_number or signal.SIGTERM
                )
            if self._is_time_to_save():
                self._save()
        if self._terms.evaluate_every is not None and self._evaluated_step() != self.state.step:
            self._evaluate(metrics)
        if self._terms.save_every is not None or self._saved_step is not None:
            self._save()

    def close(self) -> None:
        """End the threads and take the plan's segments off the model."""
        self._stream.close()
        self.engine.remove()

    @property
    def _smallest_batch_size(self) -> int:
        """Of one micro-batch in each process."""
        return self.plan.micro_batch_size * self.plan.world_size

    @property
    def _batch_size(self) -> int:
        return self.state.gradient_accumulation_steps * self._smallest_batch_size

    def _step(self, metrics: Metrics | None) -> None:
        state = self.state
        size = self._batch_size
        waited, joules = self._stream.waiting_seconds, self._joules()
        began = time.perf_counter()
        batch = self._stream.take(size)
        rate = self._set_rate(size)
        self._last_good.remember()
        observing = (
            self._spread is not None and self._guard.observes_next and size > self._smallest_batch_size
        )
        while True:
            observed = _Observed(self._spread if observing else None)
            clocks = Clocks()
            value, refused = self._attempt(batch, observed, clocks)
            if value is not None:
                break
            self._fall_back(refused, observed)
        loss = float(self.engine.mean(value))
        applied = observed.applied
        seconds = time.perf_counter() - began
        self._position = self._stream.position
        state.step += 1
        state.samples += size
        state.seconds += seconds
        state.waiting_seconds += self._stream.waiting_seconds - waited
        state.joules += self._joules() - joules
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.loss = loss
        if metrics is not None:
            metrics.write(
                state.step,
                {
                    "samples": state.samples,
                    "epoch": self._stream.position.epoch,
                    "loss": loss,
                    "learning_rate": rate,
                    "step_seconds": clocks.wall[-1],
                    "samples_per_second": size / seconds,
                    "waiting_seconds": self._stream.waiting_seconds - waited,
                    "gradient_norm": _number(observed.gradient_norm),
                    "gradient_accumulation_steps": state.gradient_accumulation_steps,
                    "global_batch_size": size,
                    "loss_scale": self.loss_scale,
                    "skipped_steps": state.watch.skipped + (not applied),
                    "noise_scale_samples": state.noise_scale_samples,
                    "step_joules": self._joules() - joules if self.measures_energy else None,
                    "model_flops_per_second": self.model_flops_per_second(size / seconds),
                    "model_flops_utilisation": self.model_flops_utilisation(size / seconds),
                    "peak_memory_bytes": state.peak_bytes,
                },
            )
        self._progress.stepped(state.step, self.steps_in_all, loss, size / seconds)
        self._judge(applied, loss, batch)
        if self._controller is not None:
            self._adapt(self._controller, observing, clocks.wall[-1], applied)

    def _attempt(self, batch: Any, observed: _Observed, clocks: Clocks) -> tuple[torch.Tensor | None, str]:
        """The loss of one step; None and why, when memory ran out. The failed step's tensors are gone by then."""
        self._steps_with_plan += 1
        last = self.state.samples + self._batch_size >= self._terms.total_samples
        metered = self._device.type == "cpu" and (
            self._steps_with_plan == METERED_STEP or (last and self.state.peak_bytes is None)
        )
        k = self.state.gradient_accumulation_steps
        engine = self.engine
        had_state = bool(self._optimizer.state)
        try:
            with clocks.timing(self._device):
                if not isinstance(engine, PreparedStep):
                    value = self._metered_rank(engine, batch) if metered else engine.step(batch)
                    observed.applied = not engine.skipped
                elif metered:
                    value = self._metered(engine, batch, observed, k)
                else:
                    value = engine(batch, observed, k)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.engine.world_size > 1:
                raise
            refused = str(error).strip().partition("\n")[0]
        else:
            if self._steps_with_plan == 1:
                self.state.unsteady_seconds = clocks.wall[-1], clocks.cpu[-1]
            elif not metered:
                self.state.wall_seconds.append(clocks.wall[-1])
                self.state.cpu_seconds.append(clocks.cpu[-1])
            if self._device.type == "cuda":
                self.state.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return value, ""
        if observed.in_update and not had_state:
            self._optimizer.state.clear()  # Made in part, and of nothing but zeros.
            observed.in_update = self.plan.optimizer not in ("adamw", "sgd")
        return None, refused

    def _metered(self, engine: PreparedStep, batch: Any, observed: _Observed, k: int) -> torch.Tensor:
        micro_batches = list(split(batch, self._batch_size, k))
        values: list[torch.Tensor] = []
        peak = measure_step(
            lambda: values.append(engine(iter(micro_batches), observed, k)),
            engine.model,
            engine.optimizer,
            micro_batches,
            self._device,
        )
        self.state.peak_bytes = peak.peak_bytes
        return values[0]

    def _metered_rank(self, engine: Engine, batch: Any) -> torch.Tensor:
        """DeepSpeed keeps states, gradients and buckets where it likes: before the step, all that Python knows of."""
        gc.collect()
        alive = bytes_of(
            thing
            for thing in gc.get_objects()
            if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor)
        )
        with AllocatorMeter() as meter:
            value = engine.step(batch)
        self.state.peak_bytes = alive + meter.peak_bytes
        return value

    def _fall_back(self, refused: str, observed: _Observed) -> None:
        """Train on with the next plan that needs less, from the state before the step."""
        try:
            plan = next_plan(self.plan)
        except NoFallback as error:
            saved = None if observed.in_update else self._save_after_restoring()
            where = f" What was trained is in {saved}." if saved else ""
            raise OutOfMemory(f"{error}{where} It was refused with: {refused}") from error
        if observed.in_update:
            raise OutOfMemory(
                f"Memory ran out while the weights were being updated after step {self.state.step}, and they may be "
                f"half new. --resume goes on from the newest checkpoint. It was refused with: {refused}"
            )
        previous = described(self.plan)
        scale = None if (scaler := self._scaler()) is None else scaler.state_dict()
        self.engine.remove()
        self._last_good.restore()
        self._use(plan)
        if scale is not None and (scaler := self._scaler()) is not None:
            scaler.load_state_dict(scale)
        gc.collect()
        release_freed_memory(self._device)
        self._steps_with_plan = 0
        self.state.peak_bytes = None
        self.state.wall_seconds.clear()
        self.state.cpu_seconds.clear()
        message = f"out of memory with {previous}: goes on with {described(plan)}"
        self.state.fallbacks.append(f"after step {self.state.step} {message}")
        self._progress.announced(message)

    def _judge(self, applied: bool, loss: float, batch: Any) -> None:
        """Raise NotFinite when it has gone on for too long; a step without an update never was."""
        scaled = self._scaler() is not None
        too_long = self.state.watch.stepped(applied=applied, loss=loss, scaled=scaled)
        if applied or (scaled and not too_long):
            return
        self._last_good.restore()
        if not too_long:
            return
        stepper = self._stepper()
        size = self._batch_size // self.plan.world_size
        pieces = split(batch, size, self.state.gradient_accumulation_steps)

        def forward() -> None:
            with stepper.autocast():
                for piece in pieces:
                    stepper.loss(stepper.model, to_device(piece, self._device))

        where = first_not_finite(stepper.model, forward, pieces)
        self._last_good.restore()
        saved = self._save()
        kept = f" The weights are those before it, in {saved}." if saved else ""
        raise NotFinite(
            f"Losses and gradients must be finite, and for {self.state.watch.in_a_row} steps in a row they were not, "
            f"up to step {self.state.step}: {where}.{kept} Lower --learning-rate, or look at the data."
        )

    def _adapt(
        self, controller: AccumulationController, observed: bool, seconds: float, applied: bool
    ) -> None:
        """Let the step's gradients say how many micro-batches the next one has."""
        k = self.state.gradient_accumulation_steps
        if self._steps_with_plan > METERED_STEP:
            undecided = self._guard.every is None
            self._guard.stepped(seconds, k=k, observed=observed)
            if undecided and (every := self._guard.every) is not None and every > 1:
                self._progress.announced(
                    f"looking at the noise costs too much: in one of {every} steps from now on"
                )
        spread = self._spread.take() if observed and applied and self._spread is not None else None
        if spread is None:
            controller.skip()
        else:
            decision = controller.observe(
                spread.mean_square, spread.square_of_mean, spread.k, self.plan.micro_batch_size
            )
            self.state.noise_scale_samples = decision.noise_scale_samples
            if decision.changed:
                noise = decision.noise_scale_samples
                self._progress.announced(
                    f"gradient accumulation {k} -> {decision.k}: noise scale "
                    + (f"{noise:.4g} samples" if noise is not None else "not known, noise hides the gradient")
                )
        self.state.gradient_accumulation_steps = controller.k

    def _set_rate(self, size: int) -> float:
        rate = self._terms.learning_rate.at(self.state.samples, size)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        if self._terms.adaptive is not None:
            for group, betas in zip(self.engine.optimizer.param_groups, self._betas, strict=True):
                if betas is not None:
                    group["betas"] = (betas[0], beta2_at(betas[1], size / self._planned_batch_size))
        return rate

    def _evaluate(self, metrics: Metrics | None) -> None:
        metric, dataset = self._metric(), self._source.evaluation
        if metric is None or dataset is None:
            return
        value = evaluate(self._stepper(), dataset, metric, self.plan.micro_batch_size)
        state = self.state
        state.evaluations.append(
            Evaluation(step=state.step, samples=state.samples, seconds=state.seconds, value=value)
        )
        if metrics is not None:
            metrics.write(state.step, {"samples": state.samples, f"evaluation_{metric}": value})
        self._progress.announced(f"{metric} {value:.4f} after step {state.step}")

    def _metric(self) -> Metric | None:
        return self._terms.until.metric if self._terms.until else self._source.metric

    def _evaluated_step(self) -> int | None:
        return self.state.evaluations[-1].step if self.state.evaluations else None

    def _reached(self) -> bool:
        target, evaluations = self._terms.until, self.state.evaluations
        return target is not None and bool(evaluations) and target.is_reached(evaluations[-1].value)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _is_time_to_save(self) -> bool:
        if self._directory is None:
            return False
        if self._terms.save_every is not None:
            return self._is_due(self._terms.save_every)
        return self.engine.agree(time.monotonic() - self._saved_at >= SAVE_SECONDS)

    def _save(self) -> Path | None:
        """The snapshot of now; None without a directory."""
        if self._directory is None:
            return None
        step = self.state.step
        if self._saved_step != step:
            self._saved_at = time.monotonic()
            try:
                snapshots.save(
                    self._directory,
                    step,
                    self._run(),
                    self._tree(),
                    peers=self._peers(),
                    keep=self._terms.keep,
                )
            except NotSaved as error:
                self._progress.announced(
                    f"no checkpoint could be written after step {step}, and training goes on: {error}"
                )
                return None
            self._saved_step = step
        return snapshots.path_of(self._directory, step)

    def _save_after_restoring(self) -> Path | None:
        self._last_good.restore()
        return self._save()

    def _run(self) -> dict[str, str]:
        return {name: value for name, value in self._identity.items() if name != "processes"}

    def _tree(self) -> Tree:
        choice = None
        if self.state.fallbacks:
            choice = next(
                index for index, each in enumerate(self.plan.front) if each.prediction == self.plan.prediction
            )
        return {
            "run": self.state.tree(),
            "engine": self.engine.state(),
            "random": RandomState.now().tree(),
            "position": dataclasses.asdict(self._position),
            "accumulation": self._controller
            and {"controller": self._controller.state(), "guard": self._guard.state()},
            "front": choice,
        }

    def _restore(self, tree: Tree) -> None:
        if tree["front"] is not None:
            self.engine.remove()
            self._use(instead(self.plan, self.plan.front[tree["front"]]))
        self.engine.load_state(tree["engine"])
        self.state = RunState.of(tree["run"])
        if self._controller is not None:
            self._controller.restore(tree["accumulation"]["controller"])
            self._guard.restore(tree["accumulation"]["guard"])
        self._position = Position(**tree["position"])
        self._stream.close()
        self._stream = self._stream_from(self._position)
        # Last: nothing that was done to get here may have drawn from it.
        RandomState.of(tree["random"]).set()

    def _use(self, plan: Plan) -> None:
        """Train with another plan of the front from now on, on as many samples a step as before."""
        size, terms = self._batch_size, self._terms.adaptive
        if self._controller is not None and terms is not None:
            ratio = self.plan.micro_batch_size / plan.micro_batch_size
            k_max = max(2, round(terms.k_max * self._planned_micro_batch_size / plan.micro_batch_size))
            settings = dataclasses.replace(terms, k_max=max(k_max, terms.k_min))
            k = min(max(round(self._controller.state()["k"] * ratio), settings.k_min), settings.k_max)
            state = self._controller.state() | {"k": k}
            self._controller = AccumulationController(settings, k)
            self._controller.restore(state)
            size = k * plan.micro_batch_size
        self.plan = plan
        self.state.gradient_accumulation_steps = size // self._smallest_batch_size
        self.engine = self._engine()

    def _engine(self) -> Engine:
        engine = engines.prepare(self._workload.model, self._optimizer, self.plan, self._workload.loss)
        if self._terms.adaptive is not None:
            if not isinstance(engine, PreparedStep):
                raise PlanDoesNotFit(
                    f"Accumulation follows the noise in one process, and the plan is for {self.plan.world_size}. "
                    "Train with a fixed k: leave --adaptive out."
                )
            self._spread = GradientSpread(engine.stepper)
        return engine

    def _stepper(self) -> Stepper:
        """For forward passes only."""
        return Stepper(
            model=self.engine.model,
            loss=self._workload.loss,
            optimizer=self._optimizer,
            precision=self.plan.precision,
            device_type=self._device.type,
        )

    def _scaler(self) -> torch.amp.GradScaler | None:
        return self.engine.stepper.scaler if isinstance(self.engine, PreparedStep) else None

    def _peers(self) -> Peers:
        engine = self.engine
        return Peers(rank=engine.rank, world_size=engine.world_size, agree=engine.agree)

    def _stream_from(self, position: Position) -> Stream:
        return Stream(
            self._source.dataset,
            self._terms.seed,
            position=position,
            share=Share(rank=self.engine.rank, world_size=self.engine.world_size),
            device=self._device,
            ahead=batches_ahead(self.plan),
        )

    def _joules(self) -> float:
        return 0.0 if self._counter is None else self._counter.joules()


def _number(value: torch.Tensor | None) -> float | None:
    return None if value is None else float(value)

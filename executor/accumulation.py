"""Gradient accumulation that follows the noise: as many micro-batches in a step as their mean needs.

Early in training all samples pull the same way and a small batch says where to go. Later their gradients mostly
contradict each other, and only a mean over many is more signal than noise. So k, the micro-batches of a step, is set
from what the step's own gradients say, and nothing is computed twice for it:

    backward 1 ──▶ |g_1|^2 ─┐
    backward 2 ──▶ |g_2|^2 ─┼─▶ mean |g_j|^2 ─┐
    backward k ──▶ |g_k|^2 ─┘                 ├─▶ |G|^2, tr(Sigma) ──▶ running means ──▶ wanted k ──▶ k, one step
    optimizer  ──▶ |mean of g_j|^2 ───────────┘     (profiler/noise.py)                              at a time

``GradientSpread`` observes, ``AccumulationController`` decides, ``OverheadGuard`` says how often observing is worth it.

With sigma^2 = tr(Sigma) / b the variance of the gradient of a micro-batch of b samples, the mean of k has sigma^2 / k.
Two rules say how much of that is too much:

- *relative*: at most theta |G|^2, so ``k = ceil(sigma^2 / (theta |G|^2))``. With theta = 1 the batch b k follows the
  gradient noise scale (McCandlish et al., "An empirical model of large-batch training", 2018).
- *absolute*: at most sigma_target^2, so ``k = min(k_max, ceil(sigma^2 / (sigma_target^2 + eps)))``.

All of this is about one process, whose micro-batches are the whole step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from profiler.noise import norms, signal_and_noise, squared_norm, sum_of_squares
from profiler.step import StepObserver, Stepper

Rule = Literal["relative", "absolute"]

EPSILON = 1e-12
"""The rule's eps. It is far below any target, so it only decides where rounding would."""


class SpreadError(RuntimeError):
    """A micro-batch's gradient did not come as a whole, so its norm cannot be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """What the k gradients of a step have in length: ``mean |g_j|^2``, and ``|g|^2`` of their mean before clipping."""

    mean_square: float
    square_of_mean: float
    k: int


class GradientSpread(StepObserver):
    """Observes the spread of a step's micro-batch gradients; pass it to the steps that are to be observed.

    A hook on a parameter sees the gradient of one backward pass, all uses of the parameter summed, just before it is
    added to ``.grad``. Its norm is taken there and then, so no second gradient is ever held, and stays on the device:
    nothing waits before ``take``. Recomputed segments make no difference: what is replayed has no backward pass of its
    own. Only *reentrant* checkpoints have one, and bring a parameter's gradient in parts; they raise SpreadError when
    a parameter takes part in two.

    The step's division of the loss by k and the scaler's scale are undone. Hooks are there during a backward pass only.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._parameters: list[torch.Tensor] = []
        self._handles: list[Any] = []
        self._seen: set[int] = set()
        self._norms: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        self._whole: torch.Tensor | None = None

    def remove(self) -> None:
        """Take the hooks off that a backward pass has left when it raised."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward_begins(self, micro_batch: int) -> None:
        self.remove()
        if micro_batch == 0:
            groups = self._stepper.optimizer.param_groups
            self._parameters = [p for group in groups for p in group["params"] if p.requires_grad]
            self._squares, self._whole = [], None
        self._seen.clear()
        self._norms.clear()
        self._handles += [
            parameter.register_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self._parameters)
        ]

    def backward_ended(self, micro_batch: int) -> None:
        self.remove()
        self._squares.append(sum_of_squares(self._norms))
        self._norms.clear()

    def optimizer_begins(self) -> None:
        whole = squared_norm(p.grad for p in self._parameters if p.grad is not None)
        k = len(self._squares)
        parts = torch.stack(self._squares).sum() * k
        scaler = self._stepper.scaler
        if scaler is not None:
            scale = scaler.scale(torch.ones((), device=whole.device)).double()
            parts, whole = parts / scale**2, whole / scale**2
        self._whole = torch.stack([parts, whole])

    def take(self) -> Spread | None:
        """The spread of the last observed step, once; waits for the device. None where its gradients overflowed.

        Raises RuntimeError when no step was observed since the last call.
        """
        if self._whole is None:
            raise RuntimeError("A spread can be taken once after each step that ran with this observer.")
        mean_square, square_of_mean = self._whole.tolist()
        k = len(self._squares)
        self._squares, self._whole = [], None
        if not (math.isfinite(mean_square) and math.isfinite(square_of_mean)):
            return None
        return Spread(mean_square=mean_square, square_of_mean=square_of_mean, k=k)

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def see(gradient: torch.Tensor) -> None:
            if index in self._seen:
                raise SpreadError(
                    "The gradient of a parameter must come as a whole for its norm to be told, and that of "
                    f"{self._name(index)} came in parts, as reentrant checkpoints bring it. Use "
                    "use_reentrant=False, or train with a fixed k."
                )
            self._seen.add(index)
            self._norms += norms(gradient)

        return see

    def _name(self, index: int) -> str:
        parameter = self._parameters[index]
        names = (name for name, each in self._stepper.model.named_parameters() if each is parameter)
        return next(names, f"one of shape {tuple(parameter.shape)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveAccumulation:
    """How k follows the noise.

    ``target`` is theta of the relative rule and sigma_target^2 of the absolute one. ``smoothing`` is the share of the
    past in each running mean. ``patience`` is how many observations in a row must want more micro-batches than there
    are, or fewer, before there is one more or one fewer.

    With ``k_min`` 1 training may settle at one micro-batch, whose variance nobody can see. Then every
    ``probe_every``-th step is a probing step of two, which is observed.
    """

    k_max: int
    k_min: int = 2
    rule: Rule = "relative"
    target: float = 1.0
    smoothing: float = 0.95
    patience: int = 3
    probe_every: int = 16

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}.")
        if not (0 < self.target < math.inf):
            raise ValueError(f"target must be positive and finite, got {self.target}.")
        if self.k_min < 1 or self.k_max < max(2, self.k_min):
            raise ValueError(
                "k_min must be at least 1, and k_max at least 2 and k_min, "
                f"got k_min = {self.k_min} and k_max = {self.k_max}."
            )
        if not (0 <= self.smoothing < 1):
            raise ValueError(f"smoothing must be at least 0 and below 1, got {self.smoothing}.")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}.")
        if self.probe_every < 2:
            raise ValueError(
                f"probe_every must be at least 2, got {self.probe_every}. For two micro-batches in every step, "
                "set k_min to 2."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What follows from an observation: the micro-batches of the next step, and why.

    ``wanted`` is where the rule would go at once. ``noise_scale_samples`` is None where the noise hides the gradient.
    """

    k: int
    wanted: int
    noise_scale_samples: float | None
    changed: bool


@dataclass(kw_only=True, slots=True)
class _Memory:
    """What a controller remembers: k, smoothed sums, and for how long more or fewer (side 1 or -1) was wanted."""

    k: int
    steps_unseen: int = 0
    signal: float = 0.0
    noise: float = 0.0
    weight: float = 0.0
    side: int = 0
    streak: int = 0


class AccumulationController:
    """Sets k from what is observed. Tell it of every step: ``observe`` or, where there is nothing to tell, ``skip``.

    The estimates of ``|G|^2`` and ``tr(Sigma)`` are smoothed apart and divided last, each mean corrected for having
    begun at zero. Where the smoothed ``|G|^2`` is not positive, the noise hides the gradient and the relative rule
    wants ``k_max``: that is its limit for a vanishing gradient, and with more micro-batches the gradient shows again.
    """

    def __init__(self, settings: AdaptiveAccumulation, k: int) -> None:
        self._settings = settings
        self._check(k)
        self._memory = _Memory(k=k)

    @property
    def k(self) -> int:
        """The micro-batches of the next step."""
        memory = self._memory
        probing = memory.k == 1 and memory.steps_unseen >= self._settings.probe_every - 1
        return 2 if probing else memory.k

    def observe(self, mean_square: float, square_of_mean: float, k: int, micro_batch_size: int) -> Decision:
        """Learn from a step of k micro-batches: its ``mean |g_j|^2`` and ``|mean of g_j|^2``.

        Raises ValueError for a single micro-batch, and for numbers that are no squares.
        """
        if k < 2 or micro_batch_size < 1:
            raise ValueError(
                "An observed step must have at least 2 micro-batches of at least 1 sample, "
                f"got {k} of {micro_batch_size}. After a step of one micro-batch call skip."
            )
        if not (0 <= mean_square < math.inf and 0 <= square_of_mean < math.inf):
            raise ValueError(
                "Squared gradient norms must be finite and not negative, "
                f"got {mean_square} and {square_of_mean}. After a step that overflowed call skip."
            )
        signal, noise = signal_and_noise(
            mean_square, square_of_mean, micro_batch_size=micro_batch_size, micro_batches=k
        )
        memory, kept = self._memory, self._settings.smoothing
        memory.signal = kept * memory.signal + (1 - kept) * signal
        memory.noise = kept * memory.noise + (1 - kept) * noise
        memory.weight = kept * memory.weight + (1 - kept)
        memory.steps_unseen = 0
        wanted = self._wanted(micro_batch_size)
        changed = self._follow(wanted)
        return Decision(
            k=self.k, wanted=wanted, noise_scale_samples=self.noise_scale_samples, changed=changed
        )

    def skip(self) -> None:
        """A step passed that tells nothing: of one micro-batch, not observed, or with gradients that overflowed."""
        self._memory.steps_unseen += 1

    @property
    def noise_scale_samples(self) -> float | None:
        """Of the smoothed estimates; None before the first observation and where the noise hides the gradient."""
        signal, noise = self._memory.signal, self._memory.noise
        return max(0.0, noise) / signal if signal > 0 else None

    def state(self) -> dict[str, int | float]:
        """All that the next decision depends on; JSON keeps it to the bit."""
        return asdict(self._memory)

    def restore(self, state: Mapping[str, int | float]) -> None:
        """Go on from a ``state``. Raises ValueError, and changes nothing, where that is none or k is out of bounds."""
        memory = _Memory(**_checked(state, self.state(), "an accumulation controller"))
        self._check(memory.k)
        self._memory = memory

    def _wanted(self, micro_batch_size: int) -> int:
        settings, memory = self._settings, self._memory
        variance = memory.noise / memory.weight / micro_batch_size
        if settings.rule == "relative":
            limit = settings.target * memory.signal / memory.weight
        else:
            limit = settings.target + EPSILON
        if variance <= 0:
            return settings.k_min
        if variance >= limit * settings.k_max:
            return settings.k_max
        return max(settings.k_min, math.ceil(variance / limit))

    def _follow(self, wanted: int) -> bool:
        memory = self._memory
        side = (wanted > memory.k) - (wanted < memory.k)
        if side != memory.side:
            memory.side, memory.streak = side, 0
        memory.streak += abs(side)
        if memory.streak < self._settings.patience:
            return False
        memory.k += side
        memory.streak = 0
        return True

    def _check(self, k: int) -> None:
        low, high = self._settings.k_min, self._settings.k_max
        if not (low <= k <= high):
            raise ValueError(
                f"The micro-batches of a step must be from k_min = {low} to k_max = {high}, got {k}. "
                "Widen the bounds, or begin within them."
            )


class OverheadGuard:
    """Decides in how many steps one is observed, so that observing costs at most ``share`` of a step's time.

    Norms take time, little beside a large micro-batch and much beside a small one. First steps with and without them
    take turns; when there are ``steps`` of each, the medians give the overhead, and from then on every n-th step is
    observed: every one where the overhead is within the share, else the fewest that keep the mean within it.

    Steps of one micro-batch do not count, and a change of k begins the comparison anew. What it decides hangs on the
    clock: a run that must repeat to the bit should observe every step, or every n-th of a fixed n.
    """

    def __init__(self, *, share: float = 0.02, steps: int = 8) -> None:
        if not (0 < share < math.inf) or steps < 1:
            raise ValueError(
                f"share must be positive and finite and steps at least 1, got {share} and {steps}."
            )
        self._share = share
        self._steps = steps
        self._with: list[float] = []
        self._without: list[float] = []
        self._k = 0
        self._every = 0
        self._since = 0

    @property
    def every(self) -> int | None:
        """Of how many steps one is observed; None while that is being found out."""
        return self._every or None

    @property
    def observes_next(self) -> bool:
        """Whether the next step should be observed."""
        if self._every:
            return self._since >= self._every - 1
        return len(self._with) <= len(self._without)

    def stepped(self, seconds: float, *, k: int, observed: bool) -> None:
        """A step of k micro-batches took this long. Leave out steps that are not like others, as a run's first."""
        self._since = 0 if observed else self._since + 1
        if self._every or k < 2:
            return
        if k != self._k:
            self._k, self._with, self._without = k, [], []
        (self._with if observed else self._without).append(seconds)
        if min(len(self._with), len(self._without)) >= self._steps:
            overhead = statistics.median(self._with) / statistics.median(self._without) - 1
            self._every = max(1, math.ceil(overhead / self._share))

    def state(self) -> dict[str, int]:
        """What was decided, which JSON keeps. A comparison that is under way begins anew."""
        return {"every": self._every, "since": self._since}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a ``state``. Raises ValueError, and changes nothing, where that is none."""
        known = _checked(state, self.state(), "an overhead guard")
        self._every, self._since = known["every"], known["since"]


def _checked(state: Mapping[str, Any], like: Mapping[str, Any], of: str) -> dict[str, Any]:
    types = {name: type(value).__name__ for name, value in state.items()}
    wanted = {name: type(value).__name__ for name, value in like.items()}
    if types != wanted:
        raise ValueError(
            f"The state of {of} must be {_listed(wanted)}, got {_listed(types)}. It is of another version: "
            "begin a new run."
        )
    return dict(state)


def _listed(types: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in types.items()) or "nothing"

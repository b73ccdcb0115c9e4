"""The gradient noise scale: how many samples it takes until the mean gradient is more signal than noise.

``phi = tr(Sigma) / |G|^2``, with G the true gradient and Sigma the covariance of one sample's (McCandlish et al.,
"An empirical model of large-batch training", 2018, equation 2.9). A batch far below phi wastes steps, one far above
it wastes samples; planner/convergence.py says how many.

Neither G nor Sigma is ever seen, only gradients g_1 .. g_k of micro-batches of b samples and their mean g. Both hold
noise, less of it in the mean, and the difference of their squared lengths tells signal and noise apart without bias:

    |G|^2       estimated by   (k |g|^2 - mean |g_j|^2) / (k - 1)
    tr(Sigma)   estimated by   (mean |g_j|^2 - |g|^2) * b * k / (k - 1)

A probing step gives one estimate of each. They are averaged apart over the steps and divided last: one step's |G|^2
may be near zero, and a mean of ratios is then worth nothing. The interval is the jackknife's over steps: the ratio is
taken again without each step in turn, and the spread of its logarithm, by Student's t, bounds it.

The weights stay as they are, at their values of now; phi grows while a model learns. Only one gradient and one running
sum are alive at a time. What dropout adds counts as noise, as it does in training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from profiler.profile_record import NoiseScale
from profiler.workload import Workload, split

MICRO_BATCHES = 8
"""Micro-batches in a probing step. Two would do; with k of them the noise in |G|^2 falls as 1 / sqrt(k (k - 1))."""

CONFIDENCE = 0.95

SAME_GRADIENT = 1e-5
"""Variance below this share of the gradient's squared norm is rounding, which is a few times 1e-6 in ``norms``."""

PIECE_ELEMENTS = 2**18
"""Of a tensor on a CPU, how many are summed in fp32."""


def measure(
    workload: Workload, *, micro_batch_size: int, steps: int, micro_batches: int = MICRO_BATCHES
) -> NoiseScale:
    """Probe the workload's gradients at its weights of now, in fp32, wherever its model is.

    One batch of all samples is drawn and cut, so that no sample comes twice even where ``batch`` gives the same one at
    every call. Raises ValueError when there are too few steps, or when all samples have the same gradient.
    """
    check_steps(steps)
    if micro_batches < 2:
        raise ValueError(f"micro_batches must be at least 2, got {micro_batches}: one alone has no variance.")
    count = steps * micro_batches
    pieces = split(workload.batch(count * micro_batch_size), count * micro_batch_size, count)
    groups = [pieces[start : start + micro_batches] for start in range(0, count, micro_batches)]
    probes = [_probe(workload, group) for group in groups]
    return estimate(probes, micro_batch_size=micro_batch_size, micro_batches=micro_batches)


def check_steps(steps: int) -> None:
    """Raise ValueError for a number of steps that no interval comes from."""
    if steps < 2:
        raise ValueError(
            f"--noise-scale must be at least 2 steps, got {steps}: its interval comes from how steps differ. "
            "Leave it out for none."
        )


def estimate(
    probes: Sequence[tuple[float, float]], *, micro_batch_size: int, micro_batches: int
) -> NoiseScale:
    """The noise scale from each step's ``(mean |g_j|^2, |g|^2)``."""
    b, k = micro_batch_size, micro_batches
    pairs = [signal_and_noise(parts, whole, micro_batch_size=b, micro_batches=k) for parts, whole in probes]
    signals, noises = [signal for signal, _ in pairs], [noise for _, noise in pairs]
    signal, noise = statistics.fmean(signals), statistics.fmean(noises)
    if noise <= SAME_GRADIENT * abs(signal):
        raise ValueError(
            f"The gradient noise scale needs samples that differ, got {len(probes) * k} micro-batches with one "
            "and the same gradient. Let batch(size) draw from data."
        )
    low, high = _jackknife(noises, signals)
    return NoiseScale(
        noise_scale_samples=noise / signal if signal > 0 else None,
        low_samples=low,
        high_samples=high,
        gradient_norm_squared=signal,
        gradient_variance_trace=noise,
        micro_batch_size=b,
        micro_batches=k,
        steps=len(probes),
    )


def signal_and_noise(
    mean_square: float, square_of_mean: float, *, micro_batch_size: int, micro_batches: int
) -> tuple[float, float]:
    """``|G|^2`` and ``tr(Sigma)`` without bias, from one step's ``mean |g_j|^2`` and ``|g|^2``."""
    b, k = micro_batch_size, micro_batches
    return (k * square_of_mean - mean_square) / (k - 1), (mean_square - square_of_mean) * b * k / (k - 1)


def squared_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The squared length of all of them together: a scalar on their device, and nothing waits for it."""
    return sum_of_squares([norm for tensor in tensors for norm in norms(tensor)])


def norms(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Lengths whose squares add up to the tensor's, at one kernel each and without a copy of it.

    On a CPU piece by piece: there torch's norm adds up fp32 one after the other, which is off by 0.5% at 40 million
    elements and by 3e-6 in pieces, and asked for float64 it makes a copy in it first. CUDA adds up as a tree.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return [torch.linalg.vector_norm(piece, dtype=dtype) for piece in _pieces(tensor)]


def sum_of_squares(lengths: Sequence[torch.Tensor]) -> torch.Tensor:
    """In float64, on their device."""
    return (
        torch.stack(list(lengths)).double().square().sum()
        if lengths
        else torch.zeros((), dtype=torch.float64)
    )


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of at most PIECE_ELEMENTS where rows are no longer than that; any layout will do."""
    if tensor.device.type != "cpu":
        return (tensor,)
    rows = torch.atleast_1d(tensor)  # type: ignore[no-untyped-call]
    pieces: Sequence[torch.Tensor] = rows.split(max(1, len(rows) * PIECE_ELEMENTS // max(1, rows.numel())))
    return pieces


def _jackknife(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float | None, float | None]:
    """The interval of the ratio of the means, or no bounds when a single step decides whether it exists."""
    from scipy.special import stdtrit

    n, above, below = len(numerators), math.fsum(numerators), math.fsum(denominators)
    without = [(above - x, below - y) for x, y in zip(numerators, denominators, strict=True)]
    if below <= 0 or any(x <= 0 or y <= 0 for x, y in without):
        return None, None
    logarithms = [math.log(x / y) for x, y in without]
    deviation = math.sqrt(n - 1) * statistics.pstdev(logarithms)
    reach = math.exp(float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * deviation)
    return above / below / reach, above / below * reach


def _probe(workload: Workload, micro_batches: Sequence[Any]) -> tuple[float, float]:
    """``(mean |g_j|^2, |g|^2)`` of these micro-batches, with one gradient and their sum in memory."""
    parameters = [p for p in workload.model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    parts = 0.0
    for micro_batch in micro_batches:
        loss = workload.loss(workload.model, micro_batch)
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            (total, gradient) for total, gradient in zip(sums, found, strict=True) if gradient is not None
        ]
        parts += float(squared_norm(gradient for _, gradient in gradients))
        for total, gradient in gradients:
            total.add_(gradient)
        del loss, found, gradients
    k = len(micro_batches)
    return parts / k, float(squared_norm(sums)) / k**2

"""How many steps a batch needs, from the gradient noise scale.

``steps(B) = S_min * (1 + phi / B)``: with an endless batch S_min steps reach the target, and with B = phi it takes
twice as many (McCandlish et al., "An empirical model of large-batch training", 2018, equation 2.11). S_min is not
known without a run, but two batches compare without it.

    steps |*
          | *                      phi: half of what a larger batch can save is saved
          |   *
    S_min |........*......*......*
          +--------phi----------- B
"""

from __future__ import annotations

from planner.plan import Reference


def steps(batch_size: float, noise_scale_samples: float, *, least_steps: float = 1.0) -> float:
    """Optimizer steps to the target with this global batch, in units of ``least_steps``, those of an endless batch."""
    return least_steps * (1 + noise_scale_samples / batch_size)


def steps_saved(noise_scale_samples: float, *, batch_size: float, larger: float) -> float:
    """The share of the steps that a larger global batch saves."""
    return 1 - steps(larger, noise_scale_samples) / steps(batch_size, noise_scale_samples)


def steps_beside(batch_size: float, noise_scale_samples: float, reference: Reference) -> float:
    """Optimizer steps to the target with this global batch, beside a run that is known to reach it."""
    known = steps(reference.global_batch_size, noise_scale_samples)
    return steps(batch_size, noise_scale_samples, least_steps=reference.steps / known)

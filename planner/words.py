"""Numbers as people read them: in the unit that keeps them short, three digits of them.

Sizes are binary, MiB and GiB. The command line and the report say the same number in the same words.
"""

from __future__ import annotations

from profiler.profile_record import NoiseScale, TimeSource

NEGLIGIBLE = 0.0005
"""Parts of a whole below this share are not shown."""

BASELINES = {"plain": "nothing recomputed", "sqrt": "every sqrt(L) blocks", "every_block": "every block"}
"""What the baselines do, in words."""


def of_bytes(count: float) -> str:
    """``2.54 GiB``, ``475 MiB``, ``16.0 KiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count) >= 2**power:
            return f"{_three_digits(count / 2**power)} {unit}"
    return f"{count:.0f} B"


def of_seconds(seconds: float) -> str:
    """``52.8 s``, ``4.21 ms``, ``51.7 us``."""
    if seconds == 0 or abs(seconds) >= 1:
        return f"{_three_digits(seconds)} s"
    unit, factor = ("ms", 1e3) if abs(seconds) >= 1e-3 else ("us", 1e6)
    return f"{_three_digits(seconds * factor)} {unit}"


def of_count(count: int) -> str:
    """``124.4 M``, ``38.6 k``."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{_three_digits(count / size)} {unit}"
    return str(count)


def of_joules(joules: float) -> str:
    """``52.8 J``, ``1.20 kJ``, ``517 mJ``."""
    unit, factor = ("kJ", 1e-3) if joules >= 1e3 else ("J", 1.0) if joules >= 1 else ("mJ", 1e3)
    return f"{_three_digits(joules * factor)} {unit}"


def of_duration(seconds: float) -> str:
    """``41.3 h``, ``12.5 min``, and below two minutes as ``of_seconds``."""
    for unit, size, least in (("h", 3600, 3600), ("min", 60, 120)):
        if abs(seconds) >= least:
            return f"{_three_digits(seconds / size)} {unit}"
    return of_seconds(seconds)


def of_kilowatt_hours(joules: float) -> str:
    """``12.1 kWh``, ``0.04 kWh``, and below a hundredth in joules."""
    kilowatt_hours = joules / 3.6e6
    return f"{_three_digits(kilowatt_hours)} kWh" if kilowatt_hours >= 0.01 else of_joules(joules)


def of_grams(grams: float) -> str:
    """``4.84 kg``, ``52.8 g``."""
    return f"{_three_digits(grams / 1e3)} kg" if grams >= 1e3 else f"{_three_digits(grams)} g"


def of_noise_scale(found: NoiseScale) -> str:
    """``phi = 1.2 k samples [0.9 k, 1.5 k]``, or what is missing for it."""
    if found.noise_scale_samples is None:
        return "phi is not known: the noise hides the gradient. Probe more steps with --noise-scale STEPS."
    bounds = "the steps bound it nowhere"
    if found.low_samples is not None and found.high_samples is not None:
        bounds = f"{found.low_samples:.4g} to {found.high_samples:.4g}"
    return f"phi = {found.noise_scale_samples:.4g} samples [{bounds}]"


def of_source(time_source: TimeSource) -> str:
    """What to add to a time that nobody measured."""
    return "" if time_source == "measured" else " (roofline, not measured)"


def change(relative: float) -> str:
    """``+12.8%``; nothing where it would read as zero."""
    return f"{relative:+.1%}" if abs(relative) >= 0.0005 else ""


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"

"""Sizes as people write them: ``8GiB``, ``8GB``, ``512MiB``, plain bytes."""

from __future__ import annotations

import re
from decimal import Decimal

UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
"""Bytes in a unit, by its name in small letters: ``gb`` is 1000**3, ``gib`` is 1024**3."""


def parse_size(text: str) -> int:
    """``8GiB``, ``8GB``, ``1.5GiB`` or plain bytes, as bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = match[2].lower() if match else ""
    if match is None or unit not in UNITS:
        way_out = f" Is it {text}iB (1024) or {text}B (1000)?" if unit in "kmgt" and unit else ""
        raise ValueError(
            f"a size is a number with a unit, such as 8GiB or 8GB, or plain bytes, got {text!r}.{way_out}"
        )
    found = int(Decimal(match[1]) * UNITS[unit])
    if found < 1:
        raise ValueError(f"a size must be at least one byte, got {text!r}")
    return found


def size_text(size_bytes: float) -> str:
    """In GiB, or in MiB where it is less than one."""
    return f"{size_bytes / 2**30:.3f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"

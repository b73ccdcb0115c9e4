"""Devices that one can plan for without having them: what their makers state, as data in ``catalogue.json``.

    h200-141gb   141 GB   989 TFLOP/s bf16   4.8 TB/s   ──roofline──▶ seconds of an operation, at best

Rates are dense ones (makers like to print twice that, with half of the numbers zero) and, on GeForce, those that
add up in fp32. ``fp32`` is what plain fp32 matrix products run at, which torch uses unless told to allow TF32. A rate
that is not there is None: V100 and T4 have no bf16. ``memory_bytes`` is what nvidia-smi calls the total; a little of it
is the driver's.
"""

from __future__ import annotations

import difflib
import functools
from importlib.resources import files
from typing import Annotated, ClassVar

from msgspec import Meta

from profiler import records
from profiler.profile_record import DeviceRecord, Positive, Precision
from profiler.records import Document, Record

Rate = Annotated[float, Meta(gt=0)]


class CatalogueDevice(Record):
    """One device. ``title``: what the driver calls it. ``link_bytes_per_second``: to a neighbour, one direction.

    ``watts`` is the board's limit, not what a job draws.
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory_bytes: Positive
    fp32_flops_per_second: Rate
    tf32_flops_per_second: Rate | None
    bf16_flops_per_second: Rate | None
    fp16_flops_per_second: Rate | None
    memory_bytes_per_second: Rate
    link_bytes_per_second: Rate
    link: str
    watts: Rate
    source: str

    def flops_per_second(self, precision: Precision) -> float | None:
        """The dense rate of matrix products at a precision; None where the device has none."""
        match precision:
            case "fp32":
                return self.fp32_flops_per_second
            case "bf16":
                return self.bf16_flops_per_second
            case "fp16":
                return self.fp16_flops_per_second


class Catalogue(Document, tag="catalogue"):
    """The file: devices, the largest first."""

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    devices: tuple[CatalogueDevice, ...]


class Devices(Document, tag="devices"):
    """Devices that are here, by the names they are asked for by, and those of the catalogue."""

    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    here: dict[str, DeviceRecord]
    catalogue: tuple[CatalogueDevice, ...]


@functools.cache
def devices() -> tuple[CatalogueDevice, ...]:
    """All devices of the catalogue."""
    file = files("profiler").joinpath("catalogue.json")
    return records.decode(file.read_bytes(), Catalogue, source="profiler/catalogue.json").devices


def find(name: str) -> CatalogueDevice:
    """A device by its name; ValueError lists all and suggests one."""
    for device in devices():
        if device.name == name:
            return device
    raise ValueError(f"A device of the catalogue is asked for by its name, got {name!r}. {suggestion(name)}")


def suggestion(name: str) -> str:
    """What a wrong name may have meant, and all there are."""
    known = [device.name for device in devices()]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    meant = f"Did you mean {close[0]}? " if close else ""
    return f"{meant}Devices that need not be here: {', '.join(known)}."


def has(name: str) -> bool:
    """Whether a device of the catalogue has this name."""
    return any(device.name == name for device in devices())


def titled(title: str) -> CatalogueDevice | None:
    """The device that the driver calls by this title, if the catalogue has it."""
    return next((device for device in devices() if device.title == title), None)

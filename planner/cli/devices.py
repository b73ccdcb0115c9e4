"""List the devices of the catalogue and those that are here.

A device of the catalogue need not be here to be planned for: planner profile MODEL --device NAME.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profiler.catalogue import Devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes nothing."""


def run(args: argparse.Namespace) -> int:
    from profiler import catalogue, records
    from profiler.device import found

    devices = catalogue.Devices(here=found(), catalogue=catalogue.devices())
    if args.json:
        sys.stdout.write(records.encode(devices).decode())
    else:
        show(devices)
    return 0


def show(devices: Devices) -> None:
    """Two tables: what is here, and what can be planned for."""
    from planner.cli.output import console, heading, of_bytes, table

    out = console()
    out.print(heading("Here"))
    here = table("device", "name", "memory", "threads", right=("memory", "threads"))
    for name, record in devices.here.items():
        here.add_row(name, record.name, of_bytes(record.memory_bytes), str(record.threads or ""))
    out.print(here)
    out.print()
    out.print(heading("In the catalogue: rates as their makers state them, dense"))
    columns = ("memory", "TB/s", "fp32", "tf32", "bf16", "fp16", "link", "watts")
    rows = table("device", *columns, right=columns)
    for device in devices.catalogue:
        rates = (
            device.fp32_flops_per_second,
            device.tf32_flops_per_second,
            device.bf16_flops_per_second,
            device.fp16_flops_per_second,
        )
        rows.add_row(
            device.name, of_bytes(device.memory_bytes), f"{device.memory_bytes_per_second / 1e12:.2f}",
            *_teraflops(rates), f"{device.link_bytes_per_second / 1e9:.0f} GB/s", f"{device.watts:.0f}",
        )  # fmt: skip
    out.print(rows)
    out.print("fp32 to fp16 in TFLOP/s. Nothing runs on these: planner profile MODEL --device NAME")


def _teraflops(rates: Sequence[float | None]) -> list[str]:
    return ["-" if rate is None else f"{rate / 1e12:.0f}" for rate in rates]

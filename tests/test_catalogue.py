"""Devices as data: dense rates as published, names that can be asked for."""

from __future__ import annotations

import pytest

from profiler import catalogue
from profiler.device import resolve


def test_there_are_devices_of_six_generations_each_with_its_source() -> None:
    devices = catalogue.devices()
    assert len(devices) >= 15
    assert {device.capability[0] * 10 + device.capability[1] for device in devices} >= {
        70,
        75,
        80,
        86,
        89,
        90,
    }
    assert all("https://" in device.source for device in devices)
    assert (
        len({device.name for device in devices}) == len({device.title for device in devices}) == len(devices)
    )


@pytest.mark.parametrize(
    ("name", "fp32", "bf16", "fp16", "terabytes_per_second", "watts"),
    [
        ("h200-141gb", 67e12, 989.5e12, 989.5e12, 4.8, 700),
        ("h100-80gb", 67e12, 989.5e12, 989.5e12, 3.35, 700),
        ("a100-80gb", 19.5e12, 312e12, 312e12, 2.039, 400),
        ("rtx3090-24gb", 35.6e12, 71e12, 71e12, 0.936, 350),
        ("v100-32gb", 15.7e12, None, 125e12, 0.9, 300),
        ("t4-16gb", 8.1e12, None, 65e12, 0.32, 70),
    ],
)
def test_rates_are_the_published_dense_ones(
    name: str, fp32: float, bf16: float | None, fp16: float, terabytes_per_second: float, watts: float
) -> None:
    device = catalogue.find(name)
    assert device.flops_per_second("fp32") == fp32
    assert device.flops_per_second("bf16") == bf16
    assert device.flops_per_second("fp16") == fp16
    assert device.memory_bytes_per_second == pytest.approx(terabytes_per_second * 1e12)
    assert device.watts == watts


def test_a_name_says_the_memory_and_no_rate_is_one_with_sparsity() -> None:
    for device in catalogue.devices():
        stated = int(device.name.rpartition("-")[2].removesuffix("gb"))
        assert device.memory_bytes == pytest.approx(stated * 2**30, rel=0.07)
        # With fp16 the tensor cores of no generation do more than 32 times what its plain fp32 units do.
        assert (device.fp16_flops_per_second or 0) < 32 * device.fp32_flops_per_second
        assert device.bf16_flops_per_second in (None, device.fp16_flops_per_second)


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(ValueError, match=r"got 'h200'\. Did you mean h200-141gb\? .*t4-16gb"):
        catalogue.find("h200")
    with pytest.raises(
        ValueError,
        match=r"--device must be auto, cpu, cuda or cuda:N, got 'a100-80'\. Did you mean a100-80gb",
    ):
        resolve("a100-80")


def test_a_device_is_found_by_what_its_driver_calls_it() -> None:
    found = catalogue.titled("NVIDIA H200")
    assert found is not None
    assert found.name == "h200-141gb"
    assert catalogue.titled("Voodoo 2") is None

"""Counters of joules, the energy of a step, and a search that weighs it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import executor
import planner
import profiler
from planner.cli import main
from planner.cost import memory_error
from planner.energy import expected_error, step_joules
from planner.nested import PLAIN
from planner.plan import Plan, Weights
from planner.search import optimize
from planner.time import at_micro_batch, step_parts
from profiler import energy, records
from profiler.energy import RaplCounter, Window, repeat, watts_beyond
from profiler.profile_record import EnergyProfile, PhaseWatts, Precision, Profile
from tests.models import mlp
from tests.profiles import placements_of, random_profile
from tests.test_search import GLOBAL_BATCH, SEEDS, seconds_and_peak

CPU = torch.device("cpu")
RANGE_MICROJOULES = 262_143_328_850
"""The range of a package's counter as Linux states it: it starts again from 0 beyond this."""


def write_zone(powercap: Path, zone: str, name: str, microjoules: int) -> Path:
    """One of RAPL's zones as Linux shows it."""
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_MICROJOULES}\n")
    return folder / "energy_uj"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Path]:
    """Two processors with what is in them, and the zones that count the same joules again."""
    zones = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    (tmp_path / "intel-rapl").mkdir()
    return {zone: write_zone(tmp_path, zone, name, 1_000_000) for zone, name in zones.items()}


def add_joules(file: Path, joules: float) -> None:
    file.write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % RANGE_MICROJOULES}\n")


def test_packages_and_memory_count_and_zones_that_repeat_them_do_not(
    machine: dict[str, Path], tmp_path: Path
) -> None:
    counter = RaplCounter.of(tmp_path)
    assert counter is not None
    before = counter.joules()
    for joules, zone in enumerate(machine, start=1):
        add_joules(machine[zone], 10.0**joules)
    assert counter.joules() - before == pytest.approx(10 + 1000 + 10_000)  # package-0, dram, package-1


def test_a_counter_that_starts_again_from_zero_goes_on_rising(tmp_path: Path) -> None:
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_MICROJOULES - 3_000_000)
    counter = RaplCounter.of(tmp_path)
    assert counter is not None
    before = counter.joules()
    file.write_text("4000000\n")
    assert counter.joules() - before == pytest.approx(7.0)
    file.write_text("4500000\n")
    assert counter.joules() - before == pytest.approx(7.5)


def test_without_zones_and_with_zones_that_may_not_be_read_there_is_no_counter(tmp_path: Path) -> None:
    assert RaplCounter.of(tmp_path) is None
    assert RaplCounter.of(tmp_path / "not there") is None
    write_zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    assert RaplCounter.of(tmp_path) is None


def test_a_phase_is_repeated_until_its_window_is_full(tmp_path: Path) -> None:
    """Every call takes 7 J; the one that warms up is outside of the window."""
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter = RaplCounter.of(tmp_path)
    assert counter is not None
    window = repeat(counter, lambda: (time.sleep(0.001), add_joules(file, 7.0)), CPU, 0.1)
    assert window.seconds >= 0.1
    assert window.calls > 2
    assert window.joules == pytest.approx(7.0 * window.calls)
    assert int(file.read_text()) == 7_000_000 * (window.calls + 1)


def test_backward_takes_what_both_passes_take_beyond_forward() -> None:
    """Forward: 10 calls of 1 s and 20 J. Both: 5 calls of 3 s and 140 J. So backward takes 2 s and 120 J."""
    forward = Window(joules=200.0, seconds=10.0, calls=10, spread=0.0)
    both = Window(joules=700.0, seconds=15.0, calls=5, spread=0.0)
    assert watts_beyond(forward, both) == pytest.approx(60.0)
    drowned = Window(joules=99.0, seconds=15.0, calls=5, spread=0.0)
    assert watts_beyond(forward, drowned) == pytest.approx(99 / 15)


class Steady:
    """A device that draws 40 W whatever it does."""

    source = "rapl"

    def joules(self) -> float:
        return 40.0 * time.perf_counter()


class Rising:
    """A device whose power rises from nothing: after t seconds it has drawn 8 t * t joules."""

    source = "rapl"

    now = 0.0

    def joules(self) -> float:
        return 8.0 * self.now**2

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += 0.005


def test_halves_of_a_window_that_differ_are_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 J in the first half second and 8 - 2 in the second: 4 and 12 W, each 4 W from their mean of 8."""
    rising = Rising()
    monkeypatch.setattr(energy, "time", rising)
    window = repeat(rising, rising.work, CPU, 1.0)
    assert window.spread == pytest.approx(0.5, abs=0.01)
    assert window.watts == pytest.approx(8.0, rel=0.02)


class Unplugged:
    source = "rapl"

    def joules(self) -> float:
        return 12.0


def test_a_device_that_always_draws_the_same_is_measured_so_in_every_phase() -> None:
    workload = mlp(2)
    weights = {name: value.clone() for name, value in workload.model.state_dict().items()}
    ran: list[int] = []

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        ran.append(len(ran))
        return workload.loss(model, batch)

    found = energy.measure(
        replace(workload, loss=loss), Steady(), precisions=("fp32", "bf16"), optimizer="adamw", micro_batch_size=2,
        device=CPU, window_seconds=0.2,
    )  # fmt: skip
    assert found is not None
    assert [phase.precision for phase in found.phases] == ["fp32", "bf16"]
    for phase in found.phases:
        for name in ("forward_watts", "backward_watts", "optimizer_watts", "host_watts"):
            assert getattr(phase, name) == pytest.approx(40.0, rel=0.05)
    assert found.source == "rapl"
    assert found.error is not None
    assert 0 < found.error < 0.5
    assert len(ran) > 4
    assert all(torch.equal(weights[name], value) for name, value in workload.model.state_dict().items())
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_a_counter_that_stands_still_tells_nothing() -> None:
    found = energy.measure(
        mlp(1), Unplugged(), precisions=("fp32",), optimizer="sgd", micro_batch_size=1,
        device=CPU, window_seconds=0.01,
    )  # fmt: skip
    assert found is None


WATTS = PhaseWatts(precision="fp32", forward_watts=100, backward_watts=200, optimizer_watts=50, host_watts=10)


def test_a_step_takes_watts_times_seconds_of_each_kind_of_work_on_every_device() -> None:
    parts = {"forward": 2.0, "backward": 3.0, "recompute": 0.5, "optimizer": 1.0, "host": 0.25}
    joules = {"forward": 200.0, "backward": 600.0, "recompute": 50.0, "optimizer": 50.0, "host": 2.5}
    assert step_joules(parts, WATTS) == joules
    assert step_joules(parts, WATTS, 4) == {kind: 4 * value for kind, value in joules.items()}


def test_work_that_no_phase_was_measured_for_draws_what_waiting_draws() -> None:
    assert step_joules({"forward": 1.0, "communication": 3.0}, WATTS) == {
        "forward": 100.0,
        "communication": 30.0,
    }


def with_energy(profile: Profile, generator: random.Random) -> Profile:
    """Random watts, at each precision others, so that what is fast may cost more."""

    def watts(precision: Precision) -> PhaseWatts:
        drawn = [float(generator.randint(1, 400)) for _ in range(4)]
        return PhaseWatts(
            precision=precision, forward_watts=drawn[0], backward_watts=drawn[1],
            optimizer_watts=drawn[2], host_watts=drawn[3],
        )  # fmt: skip

    measured = EnergyProfile(
        source="rapl", error=0.03, phases=tuple(watts(p.precision) for p in profile.precisions)
    )
    return msgspec.structs.replace(profile, energy=measured)


def every_plan(profile: Profile) -> Iterator[tuple[float, int, float]]:
    """``(seconds, peak, joules)`` of every plan of the global batch; the plain one at the largest micro-batch first."""
    assert profile.energy is not None
    plans = (
        (measured, b, placed)
        for measured, b in itertools.product(profile.precisions, (4, 2, 1))
        for placed in sorted(
            placements_of(profile, measured.memory_at(b)), key=lambda placed: placed != PLAIN
        )
    )
    for measured, b, placed in plans:
        seconds, peak = seconds_and_peak(profile, measured, b, placed)
        parts = step_parts(at_micro_batch(measured.wall, b), GLOBAL_BATCH // b, placed)
        watts = profile.energy.at(measured.precision)
        assert watts is not None
        joules = watts.forward_watts * (parts["forward"] + parts["recompute"])
        joules += watts.backward_watts * parts["backward"] + watts.optimizer_watts * parts["optimizer"]
        yield seconds, peak, joules + watts.host_watts * parts["host"]


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_with_energy_the_search_finds_what_brute_force_finds(seed: int) -> None:
    profile = with_energy(random_profile(seed), random.Random(seed))
    plans = list(every_plan(profile))
    plain = plans[0]
    peaks = sorted({peak for _, peak, _ in plans})
    margin = 1 + memory_error(profile)
    for peak in (peaks[0], peaks[len(peaks) // 2], peaks[-1]):
        for weights in (Weights(time=0.0, energy=1.0), Weights(time=0.4, memory=0.3, energy=1.0)):
            plan = optimize(profile, GLOBAL_BATCH, int(peak * margin) + 1, weights)
            best = min(
                weights.time * t / plain[0] + weights.memory * m / plain[1] + weights.energy * e / plain[2]
                for t, m, e in plans
                if m <= peak
            )
            assert plan.objective.cost == pytest.approx(best, rel=1e-9)
            assert plan.objective.optimal
            parts = plan.prediction.parts.step_joules
            assert parts is not None
            assert plan.prediction.step_joules == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_the_front_holds_every_plan_that_none_beats_in_time_peak_and_energy(seed: int) -> None:
    profile = with_energy(random_profile(seed), random.Random(seed))
    plans = set(every_plan(profile))

    def beaten(plan: tuple[float, int, float]) -> bool:
        return any(all(x <= y for x, y in zip(other, plan, strict=True)) for other in plans - {plan})

    front = [c.prediction for c in optimize(profile, GLOBAL_BATCH).front]
    best = sorted((t, m, e) for t, m, e in plans if not beaten((t, m, e)))
    found = sorted((p.step_seconds, p.peak_memory_bytes, p.step_joules) for p in front)
    assert len(best) <= 24
    assert found == [pytest.approx(plan) for plan in best]


def test_energy_is_refused_where_nothing_tells_it_and_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs a source of energy, .* or profile with --watts"):
        optimize(random_profile(0), GLOBAL_BATCH, weights=Weights(energy=1.0))
    assert optimize(random_profile(0), GLOBAL_BATCH).prediction.step_joules is None


def test_the_error_of_energy_is_that_of_seconds_and_watts_together_and_unknown_for_stated_watts() -> None:
    profile = with_energy(random_profile(0), random.Random(0))
    assert expected_error(profile, 0.10) == pytest.approx(1.10 * 1.03 - 1)
    stated = msgspec.structs.replace(profile, energy=energy.stated(65.0, ("fp32", "bf16")))
    assert expected_error(stated, 0.10) is None
    assert optimize(stated, GLOBAL_BATCH).prediction.error.step_joules is None
    assert optimize(stated, GLOBAL_BATCH, weights=Weights(energy=1.0)).objective.optimal


@pytest.mark.parametrize("watts", [0.0, -1.0, float("nan"), float("inf")])
def test_watts_that_no_device_draws_are_refused(watts: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number of watts, got"):
        profiler.profile(mlp(1), (1,), ("fp32",), "cpu", watts=watts)


DRAWN_WATTS = 50.0


@pytest.fixture(scope="module")
def draws_50_watts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """RAPL's files of a processor that draws 50 W, kept up to date every few milliseconds."""
    powercap = tmp_path_factory.mktemp("powercap")
    file = write_zone(powercap, "intel-rapl:0", "package-0", 0)
    began, done = time.perf_counter(), threading.Event()

    def drawing() -> None:
        while not done.wait(0.003):
            new = file.with_name("new")
            new.write_text(f"{round(DRAWN_WATTS * 1e6 * (time.perf_counter() - began))}\n")
            new.replace(file)

    thread = threading.Thread(target=drawing)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "POWERCAP", powercap)
        patch.setattr(energy, "WINDOW_SECONDS", 1.0)
        yield powercap
    done.set()
    thread.join()


@pytest.fixture(scope="module")
def plan(draws_50_watts: Path) -> Plan:
    profile = profiler.profile(mlp(2), (2,), ("fp32",), "cpu", steps=2)
    assert profile.energy is not None
    assert profile.energy.source == "rapl"
    watts = profile.energy.phases[0]
    # The thread that keeps the file up to date may have to wait for a processor.
    assert watts.forward_watts == pytest.approx(DRAWN_WATTS, rel=0.3)
    assert watts.optimizer_watts == pytest.approx(DRAWN_WATTS, rel=0.3)
    return planner.optimize(profile, 4, weights=Weights(energy=1.0))


def test_a_counter_is_used_from_the_profile_to_the_verification(draws_50_watts: Path, plan: Plan) -> None:
    """A short step is repeated until the counter has had its window."""
    assert plan.prediction.step_joules is not None
    assert plan.prediction.error.step_joules is not None
    workload, losses = mlp(2), 0
    at: dict[str, tuple[float, int]] = {}

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal losses
        losses += 1
        return workload.loss(model, batch)

    def note(message: str) -> None:
        at[message.partition(" (")[0]] = time.perf_counter(), losses

    found = executor.verify(plan, replace(workload, loss=counted), steps=20, progress=note)
    (began, before), (ended, after) = at["measuring energy"], at["measuring peak memory"]
    steps = (after - before) / plan.gradient_accumulation_steps
    assert ended - began > energy.WINDOW_SECONDS
    assert found.measured.step_joules is not None
    assert found.measured.step_joules == pytest.approx(DRAWN_WATTS * (ended - began) / steps, rel=0.3)
    assert "step_joules" in found.within


def test_watts_that_are_stated_win_over_a_counter_and_it_is_said(draws_50_watts: Path) -> None:
    said: list[str] = []
    profile = profiler.profile(mlp(1), (2,), ("fp32",), "cpu", steps=1, watts=30, progress=said.append)
    assert profile.energy == energy.stated(30, ("fp32",))
    assert "energy: 30 W in every phase, as stated, and not as the rapl counter here tells" in said


def test_joules_are_printed_where_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = with_energy(random_profile(1), random.Random(1))
    records.write(tmp_path / "a.profile.json", profile)
    command = ["optimize", "a.profile.json", "--global-batch-size", "8", "--energy-weight", "2"]
    assert main([*command, "--storage", "none"]) == 0
    assert "energy" in (out := capsys.readouterr().out)
    assert "kJ ±" in out
    assert main(["explain", "a.plan.json"]) == 0
    assert "Where the energy goes" in capsys.readouterr().out


def test_where_nothing_tells_joules_none_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.find_counter(CPU) is None
    profile = profiler.profile(mlp(1), (2,), ("fp32",), "cpu", steps=1)
    assert profile.energy is None
    found = executor.verify(planner.optimize(profile, 2), mlp(1), steps=1)
    assert found.measured.step_joules is None
    assert found.relative_error["step_joules"] is None
    assert "step_joules" not in found.within


@pytest.mark.gpu
def test_a_gpu_draws_more_when_it_works_than_when_it_waits() -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (7, 0):
        pytest.skip("GPUs count joules from Volta on")
    counter = energy.find_counter(device)
    assert counter is not None
    matrix = torch.randn(8192, 8192, device=device)
    working = repeat(counter, lambda: matrix @ matrix, device, 1.0)
    waiting = repeat(counter, lambda: time.sleep(0.05), device, 1.0)
    assert working.watts > 1.2 * waiting.watts > 0

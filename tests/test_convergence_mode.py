"""The global batch that reaches a target first: against brute force, against training, and as its user meets it."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planner
from planner.cli import main
from planner.convergence import steps_beside
from planner.cost import memory_error
from planner.explain import budget_for, explain
from planner.memory import peak_window, timeline
from planner.plan import NoFeasiblePlan, Plan, Reference, Weights, load_plan
from planner.search import optimize
from planner.target import MOST_BATCHES, optimize_to_target, spread
from planner.time import at_micro_batch, step_parts
from profiler import records
from profiler.profile_record import (
    ChunkedHead,
    DeviceRecord,
    NoiseScale,
    PrecisionProfile,
    Profile,
    StageMemory,
    StageTime,
)
from studies import convergence as study
from tests.test_energy import with_energy
from tests.test_search import placements_of, random_profile
from tests.test_zero import linked

GPT2 = Path(__file__).parent / "data" / "gpt2.profile.json"
PHI = 24.0
REFERENCE = Reference(global_batch_size=8, steps=1000)
SIZES = (2, 3, 4, 8, 12)

KNOWN = NoiseScale(
    noise_scale_samples=PHI, low_samples=2, high_samples=500, gradient_norm_squared=1.0,
    gradient_variance_trace=24.0, micro_batch_size=1, micro_batches=8, steps=8,
)  # fmt: skip


def to_target(profile: Profile, sizes: Sequence[int] = SIZES, *more: Any, **named: Any) -> Plan:
    named = {"noise_scale_samples": PHI} | named
    return optimize_to_target(profile, sizes, REFERENCE, *more, **named)


def found_in(plan: Plan) -> planner.plan.Convergence:
    assert plan.convergence is not None
    return plan.convergence


@pytest.fixture(scope="module")
def gpt2() -> Profile:
    return records.read(GPT2, Profile)


# Training


@pytest.fixture(scope="module")
def measured() -> dict[int, float]:
    """Steps to the target of every batch, as means over twelve runs each."""
    return {size: study.measured_steps(size, seeds=12) for size in study.BATCHES}


@pytest.mark.parametrize(("overhead", "first"), [(4, 16), (16, 32), (64, 64), (256, 128)])
def test_the_batch_that_is_chosen_is_really_the_first_at_the_target(
    overhead: int, first: int, measured: dict[int, float]
) -> None:
    """On L(x) = x'Hx / 2 with H of 64 curvatures from 1 down to 0.01, and gradients with noise n of covariance
    Sigma = s H for each sample, s such that tr(H Sigma) / (g'Hg) = 64 wherever x is.

    Given to the planner: this noise scale, a profile whose steps take ``overhead + B`` milliseconds, and the steps of
    one measured run at batch 32. Given to the training: the theory's constant learning rate of each batch,
    eps_max / (1 + 64 / B) with eps_max = |g|^2 / g'Hg at the start. Measured: the steps that torch's SGD takes, on
    noise drawn for every sample, from the start to a tenth of its loss; times the milliseconds of a step that is the
    time to the target of each of six batches. By the theory the best is near the root of 64 * overhead.
    """
    chosen, rows = study.race(overhead, measured)
    assert chosen == study.fastest(rows) == first
    for row in rows:
        assert row.predicted_steps == pytest.approx(row.measured_steps, rel=0.03)
        assert row.measured_seconds == pytest.approx(
            measured[row.batch_size] * (overhead + row.batch_size) / 1e3
        )


def test_with_a_wrong_noise_scale_the_choice_is_really_slower(measured: dict[int, float]) -> None:
    """The same race with a sixteenth of the true noise scale, for a step of 64 + B milliseconds."""
    profile = study.profile_of(64 * study.SAMPLE_SECONDS)
    reference = Reference(global_batch_size=32, steps=round(measured[32]))
    wrong = optimize_to_target(profile, study.BATCHES, reference, noise_scale_samples=study.NOISE_SCALE / 16)
    _, rows = study.race(64, measured)
    seconds = {row.batch_size: row.measured_seconds for row in rows}
    assert wrong.global_batch_size == 16
    assert seconds[16] > 1.3 * min(seconds.values())


def test_the_noise_scale_of_the_quadratic_is_what_a_profile_measures_at_its_start() -> None:
    """With every direction's loss the same, tr(Sigma) / |g|^2 is tr(H Sigma) / (g'Hg) there."""
    assert study.simple_noise_scale(study.Quadratic()) == pytest.approx(study.NOISE_SCALE, rel=0.1)


# Against brute force

Way = tuple[int, float, int, float]


def every_way(profile: Profile, sizes: Sequence[int]) -> Iterator[Way]:
    """``(global batch, seconds to the target, peak, joules to the target)`` of every plan of every size."""
    assert profile.energy is not None
    for size, measured, b in itertools.product(sizes, profile.precisions, (1, 2, 3, 4)):
        if size % b:
            continue
        k = size // b
        resident = k if profile.device.kind == "cpu" else 1
        steps = 1000 * (1 + PHI / size) / (1 + PHI / 8)
        watts = profile.energy.at(measured.precision)
        assert watts is not None
        for placed in placements_of(profile, measured.memory_at(b)):
            parts = step_parts(at_micro_batch(measured.wall, b), k, placed)
            windows = timeline(
                measured.memory_at(b), placed, micro_batch_size=b, gradient_accumulation_steps=k,
                resident_batches=resident,
            )  # fmt: skip
            joules = watts.forward_watts * (parts["forward"] + parts["recompute"])
            joules += watts.backward_watts * parts["backward"] + watts.optimizer_watts * parts["optimizer"]
            joules += watts.host_watts * parts["host"]
            yield size, steps * sum(parts.values()), peak_window(windows).total_bytes, steps * joules


@pytest.mark.parametrize(("seed", "kind"), [(3, "cpu"), (4, "cpu"), (8, "cuda")])
def test_the_choice_is_the_cheapest_of_all_plans_of_all_global_batches(seed: int, kind: str) -> None:
    """For budgets from slack to tight, with time alone, memory alone, and all three priced; and so is what the plan
    says of each global batch by itself."""
    profile = with_energy(random_profile(seed), random.Random(seed))
    device = DeviceRecord(kind=kind, name="none", memory_bytes=2**30, threads=1)  # type: ignore[arg-type]
    profile = msgspec.structs.replace(profile, device=device)
    ways = list(every_way(profile, SIZES))
    plain = optimize(profile, 8).baselines.plain.prediction  # 8 is the reference's own batch.
    assert plain.step_joules is not None
    peaks = sorted({peak for _, _, peak, _ in ways})
    for peak in (peaks[0], peaks[len(peaks) // 3], peaks[-1]):
        budget = math.ceil(peak * (1 + memory_error(profile)))
        for weights in (Weights(), Weights(time=0.0, memory=1.0), Weights(time=0.4, memory=0.3, energy=1.0)):

            def cost(way: Way, weights: Weights = weights) -> float:
                _, seconds, bytes_, joules = way
                time_share = seconds / (1000 * plain.step_seconds)
                energy_share = joules / (1000 * plain.step_joules)
                memory_share = bytes_ / plain.peak_memory_bytes
                return (
                    weights.time * time_share + weights.memory * memory_share + weights.energy * energy_share
                )

            plan = to_target(profile, SIZES, budget, weights)
            best = min((way for way in ways if way[2] <= peak), key=cost)
            found = found_in(plan)
            assert plan.objective.cost == pytest.approx(cost(best), rel=1e-9)
            assert plan.objective.optimal
            assert found.weights == weights
            assert plan.prediction.peak_memory_bytes <= peak
            own = (
                plan.global_batch_size,
                found.chosen.seconds,
                found.chosen.peak_memory_bytes,
                found.chosen.joules,
            )
            assert cost(own) == pytest.approx(cost(best), rel=1e-9)  # type: ignore[arg-type]
            for batch in found.neighbours:
                others = (way for way in ways if way[0] == batch.global_batch_size and way[2] <= peak)
                assert batch.cost == pytest.approx(min(map(cost, others)), rel=1e-9)


@pytest.mark.parametrize("seed", [1, 3, 25])
def test_every_global_batch_is_searched_as_by_itself(seed: int) -> None:
    """Alone and as two processes at all stages of ZeRO; without a limit, with one, and where it takes segments inside
    segments (seed 25)."""
    worlds = [(random_profile(seed), 1, (0,)), (linked(seed), 2, (0, 1, 2, 3))]
    for profile, world_size, stages in worlds:
        runnable = [size for size in range(1, 15) if size % world_size == 0]
        alone = {"world_size": world_size, "zero_stages": stages}
        tightest = optimize(profile, runnable[-1], **alone).front[0].prediction.peak_memory_bytes
        for budget in (None, int(1.3 * tightest), int(0.99 * tightest)):
            expected: dict[int, float] = {}
            for size in runnable:
                try:
                    expected[size] = optimize(profile, size, budget, **alone).prediction.step_seconds
                except NoFeasiblePlan:
                    continue
            if not expected:
                with pytest.raises(
                    NoFeasiblePlan, match=r"No global batch from 1 to 14 has a plan that fits"
                ):
                    to_target(profile, range(1, 15), budget, **alone)
                continue
            plan = to_target(profile, range(1, 15), budget, **alone)
            found = found_in(plan)
            assert found.batches_in_range == found.batches_considered == len(runnable)
            assert found.batches_fitting == len(expected)
            for batch in found.neighbours:
                assert batch.step_seconds == pytest.approx(expected[batch.global_batch_size], rel=1e-6)
            seconds = {size: steps_beside(size, PHI, REFERENCE) * expected[size] for size in expected}
            assert found.chosen.seconds == pytest.approx(min(seconds.values()), rel=1e-6)
            assert plan.world_size == world_size


def with_chunks(measured: PrecisionProfile) -> PrecisionProfile:
    """A last stage that takes next to no memory, and twice its time, with the loss in four chunks."""

    def small(stage: StageMemory) -> StageMemory:
        low = ((1.0, 1.0),)
        return msgspec.structs.replace(stage, forward=low, backward_first=low, backward_later=low)

    def slow(stage: StageTime) -> StageTime:
        return msgspec.structs.replace(stage, forward_seconds=2 * stage.forward_seconds)

    assert measured.memory_at_one is not None
    head = ChunkedHead(
        chunks=4,
        memory=small(measured.memory.stages[-1]),
        memory_at_one=small(measured.memory_at_one.stages[-1]),
        wall=tuple(slow(step.stages[-1]) for step in measured.wall),
        process_cpu=None,
    )
    return msgspec.structs.replace(measured, chunked_head=head)


def test_the_loss_in_chunks_counts_with_its_wider_error() -> None:
    """At every third byte of budget from the tightest plan on: a fiftieth of its peak is three bytes."""
    profile = random_profile(1)
    profile = msgspec.structs.replace(profile, precisions=tuple(map(with_chunks, profile.precisions)))
    tightest = optimize(profile, 8, weights=Weights(time=0.0, memory=1.0))
    assert tightest.loss_chunks == 4
    chunked = set()
    least = budget_for(tightest.prediction)
    for budget in range(least, least + 60, 3):
        for batch in found_in(to_target(profile, (4, 8), budget)).neighbours:
            alone = optimize(profile, batch.global_batch_size, budget)
            assert batch.step_seconds == pytest.approx(alone.prediction.step_seconds, rel=1e-6)
            chunked.add(alone.loss_chunks)
    assert chunked == {None, 4}


def test_a_plan_is_that_of_its_global_batch_and_only_says_more() -> None:
    profile = random_profile(3)
    chosen = to_target(profile)
    alone = optimize(profile, chosen.global_batch_size)
    assert chosen.prediction == alone.prediction
    assert chosen.checkpoint == alone.checkpoint
    assert chosen.baselines == alone.baselines
    assert alone.convergence is None


# What is said


def test_steps_beside_a_known_run_worked_out_by_hand() -> None:
    """At 24 a batch as large as phi takes 2 / 4 of what 8 takes; the reference itself its own steps."""
    assert steps_beside(24, PHI, REFERENCE) == pytest.approx(500)
    assert steps_beside(8, PHI, REFERENCE) == pytest.approx(1000)
    assert steps_beside(2, PHI, REFERENCE) == pytest.approx(13 / 4 * 1000)


def test_the_plan_says_how_its_batch_was_chosen_and_what_others_take(tmp_path: Path) -> None:
    plan = to_target(random_profile(3))
    found = found_in(plan)
    assert found.mode == "time_to_target"
    assert found.global_batch_range == (2, 12)
    assert (found.noise_scale_samples, found.noise_scale_source) == (PHI, "stated")
    assert found.reference == REFERENCE
    assert [batch.global_batch_size for batch in found.neighbours] == list(SIZES)
    assert found.chosen in found.neighbours
    assert found.chosen.seconds == min(batch.seconds for batch in found.neighbours)
    assert found.chosen.steps == pytest.approx(1000 * (1 + PHI / plan.global_batch_size) / 4)
    assert found.chosen.seconds == pytest.approx(found.chosen.steps * plan.prediction.step_seconds)
    assert load_plan(plan.save(tmp_path / "a.plan.json")) == plan
    assert explain(plan).convergence == found


def test_the_profiles_noise_scale_serves_and_its_interval_shows_what_else_may_be_best() -> None:
    """Of 2, 24 and 500 samples the best batches are those that these noise scales stated would give."""
    profile = msgspec.structs.replace(study.profile_of(0.016), noise_scale=KNOWN)
    sizes = range(8, 257, 8)
    found = found_in(optimize_to_target(profile, sizes, REFERENCE))

    def stated(samples: float) -> int:
        return optimize_to_target(profile, sizes, REFERENCE, noise_scale_samples=samples).global_batch_size

    assert (found.noise_scale_samples, found.noise_scale_source) == (PHI, "profile")
    assert (found.best_at_low, found.best_at_high) == (stated(2), stated(500))
    assert found.best_at_low == 8  # The root of 2 * 16, less than 8.
    assert found.best_at_high == 88  # The root of 500 * 16 is 89.4.


def at_sizes(profile: Profile, sizes: tuple[int, int]) -> Profile:
    """The same, said to be of these micro-batch sizes."""
    return msgspec.structs.replace(
        profile,
        micro_batch_sizes=sizes,
        precisions=tuple(
            msgspec.structs.replace(
                measured,
                wall=tuple(
                    msgspec.structs.replace(step, micro_batch_size=size)
                    for step, size in zip(measured.wall, sizes, strict=True)
                ),
            )
            for measured in profile.precisions
        ),
    )


def test_global_batches_that_cannot_be_run_are_left_out_and_none_is_refused() -> None:
    """Micro-batches from 8 on make no prime, and nothing below 8."""
    found = found_in(
        optimize_to_target(study.profile_of(0.1), range(1, 20), REFERENCE, noise_scale_samples=9)
    )
    assert found.batches_in_range == 12  # 8 to 19
    profile = at_sizes(random_profile(0), (3, 4))
    assert found_in(to_target(profile, range(1, 13))).batches_in_range == 6  # 3, 4, 6, 8, 9, 12
    with pytest.raises(
        ValueError, match="a multiple of a micro-batch size between 8 and 256, the profiled range"
    ):
        to_target(study.profile_of(0.1), range(1, 8))


def test_batches_beyond_the_memory_limit_are_left_out() -> None:
    """Input batches lie on a CPU all at once: two bytes a sample."""
    profile = random_profile(3)
    budget = math.ceil(optimize(profile, 6).front[0].prediction.peak_memory_bytes * 1.01)
    found = found_in(to_target(profile, range(1, 200), budget))
    assert 6 <= found.batches_fitting < found.batches_considered == 199
    assert all(batch.peak_memory_bytes <= budget for batch in found.neighbours)


def test_of_too_many_batches_some_are_searched_and_the_plan_says_how_many() -> None:
    found = found_in(to_target(random_profile(3), range(1, 5001)))
    assert found.batches_in_range == 5000
    assert 0.5 * MOST_BATCHES < found.batches_considered <= MOST_BATCHES
    assert found.neighbours[0].global_batch_size == 1
    assert found.neighbours[-1].global_batch_size == 5000


def test_numbers_are_spread_by_their_ratio_with_both_ends_among_them() -> None:
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread(range(1, 1025), 11) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert spread([8, 9, 100, 101, 102], 3) == [8, 9, 102]  # 28.6 is between 9 and 100, nearer to 9.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"noise_scale_samples": None},
            "this profile has none. Profile with --noise-scale STEPS, or state it",
        ),
        ({"noise_scale_samples": -1.0}, "must be a finite number of at least 0, got -1"),
        ({"noise_scale_samples": math.inf}, "must be a finite number of at least 0, got inf"),
        ({"sizes": ()}, "must be between 1 and 1048576 sizes, got 0"),
        ({"sizes": range(1, 2**21)}, "got 2097151. Narrow --global-batch-range"),
        ({"sizes": (0, 8)}, "must be at least 1, got 0"),
        ({"world_size": 2}, "world_size must be 1 for a profile without a measured link"),
        ({"weights": Weights(energy=1.0)}, "needs a source of energy"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_target(random_profile(0), **arguments)


def test_a_noise_scale_lost_in_noise_names_more_steps() -> None:
    lost = msgspec.structs.replace(KNOWN, noise_scale_samples=None, low_samples=None, high_samples=None)
    profile = msgspec.structs.replace(random_profile(0), noise_scale=lost)
    with pytest.raises(ValueError, match="lost it in noise after 8 probing steps"):
        to_target(profile, noise_scale_samples=None)


def test_a_reference_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="of a reference must be at least 1, got 0 and 5"):
        planner.Reference(global_batch_size=0, steps=5)


def test_a_range_of_five_hundred_batches_of_gpt2_takes_two_seconds_at_most(gpt2: Profile) -> None:
    sizes = range(8, 513)
    began = time.process_time()
    plan = planner.optimize_to_target(gpt2, sizes, REFERENCE, 2600 * 2**20, noise_scale_samples=1000)
    assert time.process_time() - began < 2
    assert found_in(plan).batches_considered == 505


# The command

TARGET = ("--reference-batch", "32", "--reference-steps", "10000", "--noise-scale-samples", "1000")


def command(*words: str | Path, out: Path) -> int:
    return main(["optimize", str(GPT2), "--storage", "none", "-o", str(out), *map(str, words)])


def test_the_command_chooses_the_batch_prices_the_way_and_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.plan.json"
    flags = ("--global-batch-range", "8:64", *TARGET, "--memory-budget", "2600MiB", "--price-per-hour", "2")
    assert command(*flags, out=out) == 0
    plan = load_plan(out)
    found, run = found_in(plan), plan.run
    said = " ".join(capsys.readouterr().out.split())
    assert run is not None
    assert (run.length, run.steps) == ("target", math.ceil(found.chosen.steps))
    assert f"{run.steps:,} steps to the target by the formula, {run.seconds / 3600:.1f} h" in said
    assert main(["explain", str(out)]) == 0
    for shown in (said, " ".join(capsys.readouterr().out.split())):
        assert "all 57 that can be run from 8 to 64" in shown
        assert "phi = 1000 samples, as stated" in shown
        assert "a run of 10,000 steps at a global batch of 32" in shown
        assert f"global batch {plan.global_batch_size}: {found.chosen.steps:,.0f} steps of" in shown
        assert f"{found.chosen.seconds / 3600:.1f} h to the target" in shown
        assert "this plan" in shown


def test_an_answer_at_the_end_of_the_range_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command(
            "--global-batch-range", "16:32", *TARGET[:4], "--noise-scale-samples", "1", out=tmp_path / "a"
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "The smallest that fits is chosen: a better one may lie outside of the range" in said


def test_the_document_holds_the_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--global-batch-range", "8:16", *TARGET, "--json", out=tmp_path / "a.json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["convergence"]["mode"] == "time_to_target"
    assert document["convergence"]["chosen"]["global_batch_size"] == document["global_batch_size"]
    assert command("--global-batch-size", "8", "--json", out=tmp_path / "b.json") == 0
    assert json.loads(capsys.readouterr().out)["convergence"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--global-batch-range", "8:16"), "--reference-batch and --reference-steps of it are missing"),
        (("--global-batch-range", "8:16", *TARGET[:2]), "--reference-steps of it is missing"),
        (("--global-batch-range", "8:16", *TARGET[:4]), "or state it with --noise-scale-samples"),
        (("--global-batch-size", "8", *TARGET[:2]), "--reference-batch serves to choose the global batch"),
        (("--global-batch-range", "8:16", *TARGET, "--samples", "9"), "leave out --samples"),
    ],
)
def test_flags_that_lack_others_or_contradict_them_exit_2_with_the_way_out(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words, out=tmp_path / "a.json") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--global-batch-range", "16:8"), "the smaller first, such as 8:512, got '16:8'"),
        (("--global-batch-range", "0:8"), "at least 1"),
        (("--global-batch-range", "8"), "such as 8:512, got '8'"),
        (("--global-batch-range", "8:16", "--global-batch-size", "8"), "not allowed with argument"),
        ((), "one of the arguments --global-batch-size --global-batch-range is required"),
    ],
)
def test_a_range_is_two_numbers_in_place_of_one(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(*words, out=tmp_path / "a.json")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_where_no_batch_fits_it_is_code_3_with_the_one_that_needs_least(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--global-batch-range", "8:16", *TARGET, "--memory-budget", "1GiB")
    assert command(*words, out=tmp_path / "a.json") == 3
    error = capsys.readouterr().err
    assert (
        "No global batch from 8 to 16 has a plan that fits; the one that needs least is 8. No plan fits"
        in error
    )

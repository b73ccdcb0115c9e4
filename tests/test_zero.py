"""ZeRO: the paper's figures, two parameters by hand, and real DeepSpeed processes on this machine."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
import torch

from planner.communication import Distribution, catalogue_link, step_seconds
from planner.cost import ZERO_ERROR, predict
from planner.memory import peak_window, timeline
from planner.nested import PLAIN
from planner.placement import Frontier, Units, pareto
from planner.plan import NoFeasiblePlan, Weights
from planner.search import optimize
from planner.zero import ZERO_STAGES, model_state_bytes, sharded
from profiler.chain import discover
from profiler.memory import MemoryTracer
from profiler.parameters import parameter_records
from profiler.profile_record import (
    DeviceRecord,
    Link,
    ParameterRecord,
    PrecisionMemory,
    Profile,
    StageMemory,
)
from profiler.workspaces import Workspaces
from studies.accuracy import selectable
from studies.zero import QUICK, WORLD_SIZE, measure
from tests.models import gpt2, mlp
from tests.profiles import every_placement, random_profile
from tests.test_search import GLOBAL_BATCH

LINK = Link(world_size=2, backend="gloo", latency_seconds=0.25, bytes_per_second=16.0, error=0.1)


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_of_the_papers_first_figure(zero_stage: int, gigabytes: float) -> None:
    """7.5 B parameters on 64 devices, Rajbhandari et al. 2020, figure 1."""
    assert round(model_state_bytes(7_500_000_000, zero_stage, 64) / 1e9, 1) == gigabytes


def test_more_sharding_never_needs_more_model_state() -> None:
    counts = [model_state_bytes(1_000_003, stage, 7) for stage in ZERO_STAGES]
    assert counts == sorted(counts, reverse=True)
    for stage in ZERO_STAGES:
        devices = [model_state_bytes(1_000_003, stage, n) for n in (1, 2, 3, 8, 64)]
        assert devices == sorted(devices, reverse=True)


def by_hand() -> tuple[PrecisionMemory, tuple[ParameterRecord, ...]]:
    """Two stages with six and two fp32 parameters, Adam; nothing else takes memory: 32 + 64 bytes, gradients 32."""

    def stage(count: int, later: int) -> StageMemory:
        nothing = ((0.0, 0.0),)
        own = (float(4 * count), 0.0)
        return StageMemory(
            input=(0.0, 0.0), saves_input=False, hold=(0.0, 0.0), dropped_hold=(0.0, 0.0), carry=(0.0, 0.0),
            gradient=own, forward=nothing, recompute=nothing, rebuild_first=nothing, rebuild_single=nothing,
            dropped=nothing, dropped_first=nothing,
            backward_first=((4.0 * (count + later), 0.0),), backward_later=((32.0 + 4 * count, 0.0),),
        )  # fmt: skip

    memory = PrecisionMemory(
        parameter_bytes=32, buffer_bytes=0, optimizer_state_bytes=64, other_bytes=0, batch=(0.0, 0.0),
        optimizer=((32.0, 0.0),), stages=(stage(6, 2), stage(2, 0)),
    )  # fmt: skip
    parameters = (
        ParameterRecord(module="a", count=6, stages=(0,)),
        ParameterRecord(module="b", count=2, stages=(1,)),
    )
    return memory, parameters


def peak(memory: PrecisionMemory, k: int = 1) -> int:
    windows = timeline(memory, PLAIN, micro_batch_size=1, gradient_accumulation_steps=k, resident_batches=k)
    return peak_window(windows).total_bytes


@pytest.mark.parametrize(
    ("zero_stage", "rank", "bucket_elements", "k", "expected"),
    [
        # All states, 96; gradients 32; a fresh buffer for both, 32. Each for itself: in place.
        (0, 0, 100, 1, 96 + 32 + 32),
        (0, 0, 1, 1, 96 + 32),
        # Parameters 32, a copy of half of them 16, half of the states 32 = 80. Sum of both gradients: 32 and 32.
        (1, 0, 100, 1, 80 + 32 + 32),
        # Summed each for itself, then rank 0 has the first four of a: all of its gradient, 24, and those four in fp64.
        (1, 0, 4, 1, 80 + 24 + 4 * 8),
        # Rank 1 has two of a and all of b: both gradients, and their flat copy of 16, or two in fp64.
        (1, 1, 4, 1, 80 + 32 + 16),
        (2, 0, 4, 1, 80 + 24 + 4 * 8),
        (2, 1, 4, 1, 80 + 32 + 16),
        # The flush of both at the end of the backward, above everything else.
        (2, 0, 100, 1, 80 + 32 + 32),
        # In the second micro-batch, on top of what was kept in the first.
        (2, 0, 100, 2, 80 + 24 + 32 + 32),
        (2, 1, 100, 2, 80 + 32 + 32 + 32),
        # b is summed before a arrives, and rank 1 keeps it: all it kept of the first, b, and a as it arrives.
        (2, 1, 4, 2, 80 + 32 + 8 + 24),
        # Small parameters stay everywhere, 32; half of parameters, copy, gradients 3 x 16, of the states 32 = 112;
        # at the end both gradients, their common buffer, and gloo's copy of it.
        (3, 0, 100, 1, 112 + 32 + 32 + 32),
        (3, 0, 1, 1, 112 + 24 + 24),
    ],
)
def test_two_parameters_by_hand(
    zero_stage: int, rank: int, bucket_elements: int, k: int, expected: int
) -> None:
    memory, parameters = by_hand()
    found = sharded(
        memory, parameters, zero_stage=zero_stage, world_size=2, rank=rank, gradient_accumulation_steps=k,
        bucket_elements=bucket_elements,
    )  # fmt: skip
    assert peak(found, k) == expected


def test_kept_gradients_stand_beside_the_new_ones_of_a_later_micro_batch() -> None:
    """Stage 2, rank 1, which has a part of both: while a's stage runs backward, b waits and a arrives, 8 + 24."""
    memory, parameters = by_hand()
    found = sharded(
        memory,
        parameters,
        zero_stage=2,
        world_size=2,
        rank=1,
        gradient_accumulation_steps=2,
        bucket_elements=4,
    )
    windows = timeline(found, PLAIN, micro_batch_size=1, gradient_accumulation_steps=2, resident_batches=2)
    totals = {(w.phase, w.micro_batch, w.stage): w.total_bytes for w in windows}
    assert totals["backward", 0, 0] == 80 + 8 + 24
    assert totals["forward", 1, 0] == 80 + 32
    assert totals["backward", 1, 0] == 80 + 32 + 8 + 24


def test_a_process_alone_is_as_it_was_profiled() -> None:
    memory, parameters = by_hand()
    assert sharded(memory, parameters, zero_stage=0, world_size=1, gradient_accumulation_steps=1) is memory


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("k", [1, 2])
def test_without_a_rank_it_is_the_process_that_needs_most(zero_stage: int, k: int) -> None:
    memory, parameters = by_hand()
    for world_size, bucket_elements in itertools.product((2, 3, 4), (1, 4, 100)):
        peaks = [
            peak(
                sharded(
                    memory, parameters, zero_stage=zero_stage, world_size=world_size, rank=rank,
                    gradient_accumulation_steps=k, bucket_elements=bucket_elements,
                ),
                k,
            )
            for rank in (*range(world_size), None)
        ]  # fmt: skip
        assert peaks[-1] == max(peaks[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": 2}, "rank must be from 0 to 1, got 2"),
        (
            {"precision": "fp16"},
            "precision must be fp32 or bf16 with several processes, got fp16.*Use --precision",
        ),
        ({"parameters": ()}, "must hold the model's parameters.*Profile again"),
    ],
)
def test_what_cannot_be_predicted_is_refused(change: dict[str, Any], message: str) -> None:
    memory, parameters = by_hand()
    arguments = {
        "memory": memory,
        "parameters": parameters,
        "zero_stage": 1,
        "world_size": 2,
        "gradient_accumulation_steps": 1,
    }
    with pytest.raises(ValueError, match=message):
        sharded(**arguments | change)


def test_a_tied_weight_is_one_parameter_of_two_stages() -> None:
    workload = gpt2(2)
    stages = discover(workload)
    records = parameter_records(workload, stages, 2)
    assert [p.count for p in records] == [p.numel() for p in workload.model.parameters()]
    assert records[0] == ParameterRecord(module="transformer.wte", count=64 * 32, stages=(0, len(stages) - 1))
    assert {p.stages for p in records[1:]} <= {(i,) for i in range(len(stages))}


def test_more_devices_never_need_more_per_process() -> None:
    workload = mlp(6)
    stages = discover(workload)
    memory = MemoryTracer(workload, stages, "adamw").memory("fp32", (2, 4))
    parameters = parameter_records(workload, stages, 2)
    for zero_stage in (1, 2, 3):
        for k in (1, 2):
            peaks = [
                peak(
                    sharded(
                        memory, parameters, zero_stage=zero_stage, world_size=n, gradient_accumulation_steps=k
                    ),
                    k,
                )
                for n in (2, 4, 8, 16)
            ]
            assert peaks == sorted(peaks, reverse=True)


def test_two_real_processes_need_what_was_predicted_at_every_stage() -> None:
    """Each within 3% to the allocator, and nothing left over from one step to the next."""
    ((name, case),) = QUICK.items()
    workload = case.workload()
    stages = discover(workload)
    tracer = MemoryTracer(workload, stages, "adamw", workspaces=Workspaces(torch.device("cpu")))
    b, k = case.micro_batch_size, case.gradient_accumulation_steps
    memory = tracer.memory("fp32", (b, b))
    parameters = parameter_records(workload, stages, b)
    for zero_stage, processes in measure(name, ZERO_STAGES).items():
        assert len(processes) == WORLD_SIZE
        for measured in processes:
            found = sharded(
                memory, parameters, zero_stage=zero_stage, world_size=WORLD_SIZE, rank=measured["rank"],
                gradient_accumulation_steps=k,
            )  # fmt: skip
            windows = timeline(
                found, PLAIN, micro_batch_size=b, gradient_accumulation_steps=k, resident_batches=k
            )
            assert peak_window(windows).total_bytes == pytest.approx(measured["peak_bytes"], rel=0.03)
            assert measured["steady_bytes"] == 0


def linked(seed: int) -> Profile:
    """A small random profile whose stages have a parameter each, with a link between two processes."""
    profile = random_profile(seed)
    parameters = tuple(
        ParameterRecord(module=f"h.{i}", count=i + 2, stages=(i,)) for i in range(len(profile.stages))
    )
    return msgspec.structs.replace(profile, parameters=parameters, link=LINK)


@pytest.mark.parametrize("seed", range(8))
def test_the_search_over_zero_stages_finds_what_brute_force_finds(seed: int) -> None:
    profile = linked(seed)
    predictions = [
        (
            zero_stage,
            predict(
                profile, measured, micro_batch_size=b, gradient_accumulation_steps=GLOBAL_BATCH // (2 * b),
                placed=placed, distribution=Distribution(world_size=2, zero_stage=zero_stage, link=LINK),
            ),
        )
        for measured, zero_stage, b in itertools.product(profile.precisions, ZERO_STAGES, (1, 2, 4))
        for placed in every_placement(
            [s.recomputable and zero_stage < 3 for s in profile.stages],
            selectable(measured.memory_at(b)),
        )
    ]  # fmt: skip
    plan = optimize(
        profile, GLOBAL_BATCH, weights=Weights(time=0.0, memory=1.0), world_size=2, zero_stages=ZERO_STAGES
    )
    tightest = min(p.peak_memory_bytes for _, p in predictions)
    assert plan.prediction.peak_memory_bytes == tightest
    assert plan.zero_stage in {stage for stage, p in predictions if p.peak_memory_bytes == tightest}
    assert (
        plan.micro_batch_size * plan.gradient_accumulation_steps * 2 == plan.global_batch_size == GLOBAL_BATCH
    )
    budget = int(1.2 * tightest)
    fits = [p.step_seconds for _, p in predictions if p.peak_memory_bytes * (1 + ZERO_ERROR) <= budget]
    fastest = optimize(profile, GLOBAL_BATCH, budget, world_size=2, zero_stages=ZERO_STAGES)
    assert fastest.prediction.step_seconds == pytest.approx(min(fits))
    assert fastest.objective.optimal
    assert fastest.baselines.plain.zero_stage == 0
    parts = fastest.prediction.parts
    assert parts.step_seconds["communication"] > 0
    assert sum(parts.peak_memory_bytes.values()) == fastest.prediction.peak_memory_bytes
    with pytest.raises(NoFeasiblePlan, match=r"ZeRO stage \d on 2 processes"):
        optimize(profile, GLOBAL_BATCH, tightest // 2, world_size=2, zero_stages=ZERO_STAGES)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"link": None}, {"world_size": 2}, r"Profile with --world-size 2, or pass link="),
        (
            {},
            {"world_size": 4},
            r"must be 2, the number of processes .*, got 4\. Profile with --world-size 4",
        ),
        ({}, {"world_size": 0}, "world_size must be at least 1, got 0"),
        ({}, {"world_size": 1, "zero_stages": (1, 2)}, "got 1, 2: there is nothing to shard"),
        ({}, {"world_size": 2, "zero_stages": (4,)}, "must be of 0, 1, 2 and 3, got 4"),
        ({}, {"world_size": 2, "global_batch_size": 7}, "a multiple of 2 times a micro-batch size between"),
    ],
)
def test_processes_that_nothing_is_known_of_are_refused(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    profile = msgspec.structs.replace(linked(0), **changes)
    with pytest.raises(ValueError, match=message):
        optimize(profile, **{"global_batch_size": GLOBAL_BATCH} | arguments)


def test_nothing_is_recomputed_at_stage_3() -> None:
    """What gathering again would cost is not known. At stage 2 the same profile recomputes."""
    tightest = Weights(time=0.0, memory=1.0)
    for zero_stage, recomputes in ((2, True), (3, False)):
        plan = optimize(linked(3), GLOBAL_BATCH, weights=tightest, world_size=2, zero_stages=(zero_stage,))
        assert any(choice.checkpoint for choice in plan.front) is recomputes


def test_a_link_can_be_passed_in_place_of_a_measured_one() -> None:
    profile = msgspec.structs.replace(linked(0), link=None)
    plan = optimize(profile, GLOBAL_BATCH, world_size=2, zero_stages=(1,), link=LINK)
    assert (plan.world_size, plan.zero_stage) == (2, 1)


def test_devices_of_the_catalogue_have_the_link_of_their_data_sheet() -> None:
    """An H200's NVLink: 450 GB/s in one direction, four fifths of which arrive."""
    h200 = DeviceRecord(kind="cuda", name="NVIDIA H200", memory_bytes=2**37)
    profile = msgspec.structs.replace(linked(0), link=None, device=h200)
    plan = optimize(profile, GLOBAL_BATCH, world_size=8, zero_stages=(1,))
    link = catalogue_link(h200, 8)
    assert link is not None
    assert (link.world_size, link.source, link.bytes_per_second) == (8, "catalogue", 360e9)
    assert plan.prediction.parts.step_seconds["communication"] == pytest.approx(
        step_seconds(Distribution(world_size=8, zero_stage=1, link=link), 1, profile.parameters)
    )
    assert plan.prediction.error.peak_memory_bytes >= ZERO_ERROR
    with pytest.raises(ValueError, match="at most 8 for a link of the catalogue"):
        optimize(profile, 4 * GLOBAL_BATCH, world_size=16)


def test_the_stated_error_of_a_link_counts_as_far_as_a_step_waits_for_it() -> None:
    slow = msgspec.structs.replace(LINK, bytes_per_second=1e-3, error=0.4)
    fast = msgspec.structs.replace(LINK, bytes_per_second=1e12, latency_seconds=0.0, error=0.4)
    waits, hardly = (
        optimize(linked(0), GLOBAL_BATCH, world_size=2, link=link).prediction.error for link in (slow, fast)
    )
    assert waits.step_seconds == pytest.approx(0.4, rel=0.01)
    assert hardly.step_seconds < 0.2


def test_a_sharded_plan_updates_its_share_and_shows_its_copy_of_it() -> None:
    """Six parameters of 2 to 7 elements, 27 padded to 28: 14 each, in fp32. The whole update takes 1 s."""
    profile = next(p for p in map(linked, range(20)) if len(p.parameters) == 6)
    plan = optimize(profile, GLOBAL_BATCH, world_size=2, zero_stages=(1,))
    assert plan.prediction.parts.step_seconds["optimizer"] == 0.5
    assert plan.prediction.parts.peak_memory_bytes["parameter_copies"] == 14 * 4
    assert plan.baselines.plain.prediction.parts.step_seconds["optimizer"] == 1


def test_stages_of_zero_that_share_out_only_what_is_constant_are_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage 1 deals out the optimizer's states, stage 2 gradients as well, which changes what segments need."""
    searched: list[Units] = []

    def counted(units: Units) -> Frontier:
        searched.append(units)
        return pareto(units)

    monkeypatch.setattr("planner.search.pareto", counted)
    counts = []
    for zero_stages in ((0,), (0, 1), (0, 1, 2)):
        searched.clear()
        optimize(linked(3), GLOBAL_BATCH, world_size=2, zero_stages=zero_stages)
        counts.append(len(searched))
    assert counts[0] == counts[1] > 0
    assert counts[2] == 2 * counts[0]
    assert not any(one.same_as(other) for one, other in itertools.combinations(searched, 2))

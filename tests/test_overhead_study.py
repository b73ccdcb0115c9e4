"""What studies.overhead concludes from what it measured, and our loop beside the hand-written one for real."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from profiler.freed_memory import keep_freed_memory
from studies import loops
from studies.overhead import (
    HANDS,
    OURS,
    Case,
    Comparison,
    Measured,
    Steps,
    Stopwatch,
    Turns,
    compared,
    draw,
    line,
    missed,
    rows_of,
    small_mlp,
)
from studies.runs import picked
from studies.turns import in_turns

CPU = torch.device("cpu")
CASE = Case(name="mlp", build=small_mlp, size=4, steps=2, rounds=2)
BOTH_HANDS = dict.fromkeys(HANDS, loops.hand)


def measured(*relative: float, peak: int = 1000, losses_equal: bool = True) -> Measured:
    return Measured(relative=relative, peak_memory_bytes=peak, losses_equal=losses_equal)


def comparison(**others: Measured) -> Comparison:
    """A step of ours takes 2 s, as the hand-written loop's does, which is never further from itself than by 1%."""
    found = {
        "ours": measured(),
        "hand": measured(1.0, 1.01, 0.99),
        "hand 2": measured(1.01, 1.0, 0.99),
        "trainer": measured(1.1, 1.1, 1.1, peak=1200),
    }
    return Comparison(case="m", reproducible=True, ours_seconds=2.0, loops=found | others)


def test_a_step_as_fast_as_the_hand_written_one_and_no_slower_than_the_frameworks_meets_all_bars() -> None:
    assert missed(comparison()) == []


def test_a_bare_model_is_judged_by_its_losses_and_its_peak_alone() -> None:
    slow = comparison(hand=measured(0.1, 0.1, 0.1), trainer=measured(0.1, 0.1, 0.1))
    assert len(missed(slow)) > 1
    assert missed(dataclasses.replace(slow, bare=True)) == []
    other = measured(0.1, 0.1, 0.1, peak=7)
    assert len(missed(dataclasses.replace(comparison(hand=other), bare=True))) == 1


def test_the_time_of_ours_over_anothers_is_told_by_the_median_of_the_rounds() -> None:
    found = comparison(trainer=measured(1.25, 1.25, 9.0))
    assert found.ratio("trainer") == pytest.approx(0.8)
    assert found.seconds("trainer") == pytest.approx(2.5)
    assert found.overhead_seconds("trainer") == pytest.approx(0.5)
    assert found.overhead_seconds("ours") == pytest.approx(0.0)


def test_both_turns_of_the_hand_written_loop_count_against_ours() -> None:
    faster = comparison(hand=measured(0.97, 0.97, 0.97), **{"hand 2": measured(0.97, 0.97, 0.97)})
    assert missed(faster) == ["m: ours takes 1.031 of the time of the hand-written loop, the noise is 0.000"]
    assert faster.overhead_seconds("ours") == pytest.approx(2.0 * 0.03)
    second_faster = comparison(hand=measured(1.0, 1.0, 1.0), **{"hand 2": measured(0.95, 0.95, 0.95)})
    [bar] = missed(second_faster)
    assert bar.startswith("m: ours takes 1.026 of the time of the hand-written loop")


def test_noise_is_how_far_the_hand_written_loop_is_from_itself() -> None:
    steady = comparison(hand=measured(1.0, 1.0, 1.0), **{"hand 2": measured(1.01, 1.01, 1.01)})
    assert steady.noise("trainer") == steady.noise(*HANDS) == pytest.approx(0.01)


def test_noise_is_no_less_than_the_loops_own_turns_scatter() -> None:
    found = comparison(trainer=measured(1 / 0.8, 1 / 0.9, 1.0))
    assert found.noise("trainer") == pytest.approx(1.253 * 0.2 / 1.349 / 3**0.5)
    assert found.noise(*HANDS) < 0.02


def test_where_noise_leaves_it_open_the_bar_is_missed_and_the_way_out_named() -> None:
    [bar] = missed(comparison(trainer=measured(0.9, 1.0, 1.1)))
    assert bar.startswith(
        "m: ours takes 1.000 of the time of trainer, and the noise of 0.108 is too much to tell. Let"
    )
    assert missed(comparison(trainer=measured(1.4, 1.5, 1.6))) == []
    [bar] = missed(comparison(trainer=measured(0.6, 0.7, 0.8)))
    assert bar == "m: ours takes 1.429 of the time of trainer, the noise is 0.223"


def test_a_framework_may_be_faster_by_the_noise_and_no_more() -> None:
    noise = comparison().noise("trainer")
    assert 0.005 < noise < 0.02
    assert missed(comparison(trainer=measured(*[1 / (1 + 0.9 * noise)] * 3))) == []
    [bar] = missed(comparison(trainer=measured(*[1 / (1 + 1.1 * noise)] * 3)))
    assert bar.startswith("m: ours takes 1.0")
    assert "of the time of trainer, the noise is 0.0" in bar


def test_peaks_must_be_equal_to_the_byte_with_the_hand_written_loop_and_with_no_other() -> None:
    [bar] = missed(comparison(ours=measured(peak=1004)))
    assert bar == "m: ours needs 1,004 bytes, the hand-written loop 1,000"


def test_losses_must_be_equal_where_the_device_computes_the_same_twice() -> None:
    other = comparison(ours=measured(losses_equal=False))
    assert missed(other) == ["m: the losses of ours are not those of the hand-written loop's first turn"]
    assert missed(dataclasses.replace(other, reproducible=False)) == []


def test_a_machine_that_slows_down_steadily_is_slow_for_everyone_who_takes_turns() -> None:
    turns = iter(range(100))
    ratios, _ = in_turns(
        lambda loop: (100 + next(turns)) * (2 if loop == "slow" else 1), ["a", "slow"], "b", 3
    )
    assert ratios == [[1.0] * 3, [2.0] * 3]


def test_the_first_step_and_what_is_before_it_are_outside_the_window() -> None:
    def work(seconds: float) -> None:
        began = time.process_time()
        while time.process_time() < began + seconds:
            pass

    began = time.process_time()
    stopwatch = Stopwatch(3, CPU)
    work(0.05)
    stopwatch()
    work(0.01)
    time.sleep(0.05)  # Others' time does not count.
    stopwatch()
    stopwatch()
    assert 0.01 <= stopwatch.seconds <= time.process_time() - began - 0.05


def test_rows_make_a_table_and_a_picture(tmp_path: Path) -> None:
    rows = rows_of(comparison())
    assert [row["loop"] for row in rows] == ["ours", "hand", "hand 2", "trainer"]
    assert "ours / it 0.909 (± 0.0" in line(rows[-1])
    assert "peak         1,200 bytes" in line(rows[-1])
    draw(rows, tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 1000


def without_clipping(job: loops.Job) -> None:
    batches = iter(job.loader())
    for _ in range(job.steps):
        for _ in range(loops.ACCUMULATION):
            (job.loss(job.model, next(batches)) / loops.ACCUMULATION).backward()
        job.optimizer.step()
        job.optimizer.zero_grad()


def keeps_gradients(job: loops.Job) -> None:
    """To the end of the next forward pass, as some frameworks do."""
    batches = iter(job.loader())
    for _ in range(job.steps):
        for index in range(loops.ACCUMULATION):
            loss = job.loss(job.model, next(batches)) / loops.ACCUMULATION
            if index == 0:
                job.optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(job.model.parameters(), loops.LARGEST_NORM)
        job.optimizer.step()


def test_our_loop_has_the_losses_and_the_peak_of_the_hand_written_one_and_a_wrong_loop_is_found_out() -> None:
    keep_freed_memory()
    others = BOTH_HANDS | {"wrong": without_clipping, "late": keeps_gradients}
    found = compared(CASE, CPU, 2, others).loops
    assert {name for name, loop in found.items() if loop.losses_equal} == {OURS, *HANDS, "late"}
    assert (
        found[OURS].peak_memory_bytes == found["hand"].peak_memory_bytes == found["hand 2"].peak_memory_bytes
    )
    assert len(found["wrong"].relative) == 2


def test_a_loop_that_takes_fewer_steps_than_it_is_asked_for_is_an_error() -> None:
    def one_step(job: loops.Job) -> None:
        loops.hand(dataclasses.replace(job, micro_batches=job.micro_batches[: loops.ACCUMULATION]))

    turns = Turns(CASE, CPU, {"idle": one_step})
    with pytest.raises(RuntimeError, match="idle took 1 optimizer steps where 3 were asked for"):
        turns.seconds("idle")


def test_loops_that_take_turns_by_the_step_have_the_same_losses_and_a_wrong_one_is_found_out() -> None:
    """Their models are made anew after three steps of the loop that is ahead, here in its second round."""
    keep_freed_memory()
    turns = Steps(CASE, CPU)
    right, wrong = HANDS
    turns._steppers[wrong] = lambda job: loops.hand_steps(
        dataclasses.replace(job, loss=lambda model, batch: 1.001 * job.loss(model, batch))
    )
    for _ in range(4):
        assert all(turns.seconds(name) > 0 for name in (OURS, right, OURS, wrong))
    assert len(turns._earlier) > 1
    assert [turns.losses_equal(name) for name in (OURS, right, wrong)] == [True, True, False]


def test_a_name_that_no_case_has_is_refused_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [CASE, dataclasses.replace(CASE, name="gpt2")]
    parser = argparse.ArgumentParser()
    assert picked(parser, cases, lambda case: case.name, "pt") == cases[1:]
    with pytest.raises(SystemExit):
        picked(parser, cases, lambda case: case.name, "bert")
    assert "--only bert must be part of one of these names: mlp, gpt2." in capsys.readouterr().err

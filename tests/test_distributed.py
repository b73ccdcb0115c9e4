"""Training in several processes: real DeepSpeed on two ranks, and how launches begin and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from executor import engine, state
from executor.launch import Ended, crowded, launch
from profiler.profile_record import Precision
from profiler.step import build_optimizer
from tests import plans, ranks
from tests.models import gpt2

ROOT = Path(__file__).parent.parent
STAGES = ("0", "1", "2", "3")
IN_BF16 = [f"{stage} bf16" for stage in STAGES]


def run(act: str, folder: Path, **how: Any) -> Ended:
    """Two ranks of tests/ranks.py."""
    return launch(2, ["-m", "tests.ranks", act, str(folder)], **how)


@dataclass(frozen=True, slots=True)
class Trained:
    """What both ranks saw, how their launch ended, and how long that was after rank 1 was killed."""

    ranks: list[dict[str, Any]]
    ended: Ended
    ending_seconds: float


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("DS_ACCELERATOR", "cpu")
        ended = run("train", folder, threads=1)
    now = time.time()
    assert (folder / "died").exists(), ended.message
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return Trained(seen, ended, now - float((folder / "died").read_text()))


@pytest.mark.parametrize("stage", [*STAGES, *IN_BF16])
def test_two_processes_learn_what_one_learns_from_all_batches(trained: Trained, stage: str) -> None:
    """With k = 2, clipping, a learning rate that changes, and a recomputed segment."""
    for rank, seen in enumerate(trained.ranks):
        learned = seen["learned"][stage]
        assert len(learned["losses"]) == ranks.STEPS == 20
        for alone, together in learned["losses"] + learned["norms"]:
            assert together == pytest.approx(alone, rel=1e-3 if stage in IN_BF16 else 1e-4)
        if stage in IN_BF16:
            in_fp32, _ = seen["learned"][stage[0]]["losses"][0]
            assert learned["losses"][0][1] != pytest.approx(in_fp32, rel=1e-5)
        first, last = learned["losses"][0][0], learned["losses"][-1][0]
        assert last < first / 2
        assert max(norm for norm, _ in learned["norms"]) > 1
        assert learned["skipped"] == [False] * ranks.STEPS
        assert learned["recomputed"] == [[20 * 2, 20 * 2]]
        assert learned["identity"] == [rank, 2, rank == 0]
        assert learned["agree"] == [False, True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_process_has_the_whole_models_weights(trained: Trained, stage: str) -> None:
    first, second = (seen["learned"][stage] for seen in trained.ranks)
    assert first["exact"]
    assert first["names"] == first["expected_names"]
    assert first["farthest"] < 1e-3
    assert second["names"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_takes_no_step_with_gradients_that_are_not_numbers(trained: Trained, stage: str) -> None:
    """Stages 1 to 3 by themselves, and stage 0 as we clip for it."""
    for seen in trained.ranks:
        assert seen["learned"][stage]["skipped_nan"]
        assert seen["learned"][stage]["unchanged"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_from_its_state_bit_for_bit(trained: Trained, stage: str) -> None:
    """Frozen and tied weights, buffers, dropout, and sizes that two processes cannot halve."""
    for seen in trained.ranks:
        resumed = seen["resumed"][stage]
        assert resumed["losses"] == resumed["again"]
        assert [resumed[name] for name in ("loaded", "end", "whole")] == ["", "", ""]
    assert trained.ranks[0]["resumed"]["0"]["losses"] != trained.ranks[1]["resumed"]["0"]["losses"]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # 165 trainable elements and their two averages, 5 step counters, 72 frozen, 19 in buffers, in both.
        ("0", [591, 591]),
        # 165 are padded to 168: 84 and twice 84, of one parameter; the last rank saves its share of weights unpadded.
        ("1", [344, 341]),
        ("2", [344, 341]),
        # 77, 9, 9, 63 and 7 elements in halves of 39, 5, 5, 32 and 4; the frozen 63 and 9 in 32 and 5.
        ("3", [312, 312]),
    ],
)
def test_what_is_dealt_out_is_saved_once(trained: Trained, stage: str, expected: list[int]) -> None:
    assert [seen["resumed"][stage]["elements"] for seen in trained.ranks] == expected


def test_a_state_of_something_else_is_refused(trained: Trained) -> None:
    for seen in trained.ranks:
        refused = seen["refused"]
        for name in ("rank", "world", "stage", "engine"):
            assert "The state must be of an engine like this one" in refused[name]
        assert "world_size 3" in refused["world"]
        assert "none of it not here, frozen.bias of the model not in it" in refused["weights"]
        assert "1 partitions here, 0 in the state" in refused["partition"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("processes", "for 3 processes, and 2 were started"),
        ("precision", "must be in fp32 or bf16, got fp16"),
        ("chunks", "must have its loss in one piece"),
        ("adafactor", "adafactor must have ZeRO stage 0"),
        ("segment", "recomputes a segment at module 'elsewhere', which Sequential has not"),
    ],
)
def test_a_plan_that_deepspeed_would_run_otherwise_is_refused(
    trained: Trained, name: str, message: str
) -> None:
    for seen in trained.ranks:
        assert message in seen["refused"][name]


def test_every_process_refuses_to_start_with_another_plan(trained: Trained) -> None:
    own, other = (ranks.a_plan(stage).sha256 for stage in (0, 1))
    for seen in trained.ranks:
        assert seen["agreed"]
        assert f"{own} in rank 0; {other} in rank 1" in seen["different"]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_reads_the_plan_out_of_its_configuration(trained: Trained, stage: str) -> None:
    for seen in trained.ranks:
        read = seen["configuration"][stage]
        assert read["batch"] == [12, 3, 2]
        assert read["clipping"] == 1.0
        assert read["stage"] == int(stage)
        assert read["buckets"] == [25 * 2**20 // 4] * 2
        assert (read["overlap"], read["contiguous"]) == (False, False)
        assert read["stage3"] == [0, 0, 0, 50]
        assert read["precision"] == [False, False]
        assert read["ignored"] == []
        assert read["misspelt"] == "ValidationError"


def test_a_killed_rank_ends_the_others_and_is_named(trained: Trained) -> None:
    """In the middle of a step, which the other rank cannot finish without it."""
    assert trained.ended.status == 128 + signal.SIGKILL
    assert trained.ended.message is not None
    assert trained.ended.message.startswith("Rank 1 of 2 was killed by SIGKILL.")
    assert trained.ending_seconds < 60


def test_ranks_have_the_threads_that_they_are_given(trained: Trained) -> None:
    """By ``launch``, and by ``join`` where torchrun was not told."""
    assert [seen["threads"] for seen in trained.ranks] == [[1, 3], [1, 3]]
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("in_root")
def test_a_rank_that_fails_is_named_with_its_reason_and_its_last_words(tmp_path: Path) -> None:
    ended = run("fail", tmp_path)
    assert ended.status == 1
    assert ended.message is not None
    first, *said = ended.message.splitlines()
    assert first == (
        "Rank 1 of 2 ended with exit status 1: ValueError: There are no samples in data/. The last it said:"
    )
    assert said[-2:] == ["ValueError: There are no samples", "in data/."]


@pytest.mark.usefixtures("in_root")
def test_an_exit_status_is_handed_on(tmp_path: Path) -> None:
    ended = run("give_up", tmp_path)
    assert (ended.status, ended.document) == (4, None)


def when_up(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something once both ranks are up."""

    def watch() -> None:
        while not all((folder / f"{rank}.up").exists() for rank in range(2)):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.usefixtures("in_root")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_save_when_the_parent_is_asked_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        sender = when_up(tmp_path, lambda: os.kill(os.getpid(), number))
        ended = run("save_when_asked", tmp_path)
        sender.join()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert (ended.status, ended.message) == (128 + number, None)
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


@pytest.mark.usefixtures("in_root")
def test_a_rank_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    sender = when_up(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = run("deaf", tmp_path, grace_seconds=4)
    sender.join()
    assert time.time() - (tmp_path / "1.up").stat().st_mtime < 20
    assert ended.status == 1
    assert ended.message == (
        "Asked to stop by SIGTERM, and not all ranks did so in order: rank 0 had not ended 4 s later and was killed."
    )


def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"from executor.launch import launch; launch(2, ['-m', 'tests.ranks', 'wait', {str(tmp_path)!r}])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    when_up(tmp_path, parent.kill).join()
    parent.wait()
    pids = [int((tmp_path / f"{rank}.up").read_text()) for rank in range(2)]
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_under_another_torchrun_prints_its_document_and_nothing_else() -> None:
    """On several machines it is the user's own, of which a rank knows three variables."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", "say", "."],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ranks.DOCUMENT)
    assert set(done.stderr.splitlines()) == {b"a library says something", b"and so does C++"}


@pytest.mark.usefixtures("in_root")
def test_what_rank_0_hands_over_reaches_the_parent_and_its_stdout_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = run("say", tmp_path)
    assert ended == Ended(status=0, message=None, document=ranks.DOCUMENT)
    out, err = capfd.readouterr()
    assert out == ""
    assert set(err.splitlines()) == {"a library says something", "and so does C++"}


def test_more_threads_than_processors_are_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's device has two threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert crowded(plans.plan(), 2) is None
    crowd = crowded(plans.plan(), 3)
    assert crowd is not None
    assert "3 processes of 2 threads share 4 processors" in crowd
    assert "OMP_NUM_THREADS=1" in crowd


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_process_goes_on_from_its_state_bit_for_bit(precision: Precision) -> None:
    """By the same verbs; dropout, tied weights, and a loss scaler in fp16."""
    plan = msgspec.structs.replace(
        plans.plan(),
        precision=precision,
        optimizer="adamw",
        checkpoint=(),
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        global_batch_size=2,
    )

    def prepared(seed: int) -> tuple[Any, engine.PreparedStep]:
        torch.manual_seed(seed)
        workload = gpt2(1)
        optimizer = build_optimizer("adamw", workload.model, learning_rate=0.01)
        return workload, engine.prepare(workload.model, optimizer, plan, workload.loss)

    workload, first = prepared(0)
    batches = [workload.batch(2) for _ in range(4)]
    for batch in batches[:2]:
        first.step(batch)
    saved, random = ranks.copied(first.state()), torch.get_rng_state()
    losses = [float(first.step(batch)) for batch in batches[2:]]
    assert first.gradient_norm is not None
    assert "lm_head.weight" not in (first.whole_weights() or {})
    _, second = prepared(1)
    second.load_state(saved)
    torch.set_rng_state(random)
    assert [float(second.step(batch)) for batch in batches[2:]] == losses
    assert ranks.difference(second.state(), ranks.copied(first.state())) == ""
    assert first.skipped is (precision == "fp16" and not torch.isfinite(torch.tensor(first.gradient_norm)))


def test_a_state_is_refused_by_another_model_before_anything_changes() -> None:
    workload, other = gpt2(1), gpt2(2)
    plan = msgspec.structs.replace(plans.plan(), optimizer="adamw", checkpoint=())
    small, large = (
        engine.prepare(w.model, build_optimizer("adamw", w.model), plan, w.loss) for w in (workload, other)
    )
    before = ranks.copied(large.whole_weights())
    with pytest.raises(
        ValueError, match=r"none of it not here, transformer\.h\.1\..* and 9 more of the model not in it"
    ):
        large.load_state(small.state())
    assert ranks.difference(ranks.copied(large.whole_weights()), before) == ""


def test_what_is_no_tree_is_refused_rather_than_lost() -> None:
    assert state.plain({"a": [1, (2.0, None)], "b": True}, "it") == {"a": [1, (2.0, None)], "b": True}
    with pytest.raises(ValueError, match=r"it\.a\[1\] is builtins\.object"):
        state.plain({"a": [1, object()]}, "it")
    with pytest.raises(ValueError, match=r"it is signal\.Signals"):
        state.plain(signal.SIGTERM, "it")
    with pytest.raises(ValueError, match="what must have the names that are known: c unknown, b missing"):
        state.check_names("what", ["a", "c"], ["a", "b"])

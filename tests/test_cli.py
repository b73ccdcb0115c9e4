"""The command line as its user meets it: a process, what it prints where, and the code it ends with."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import optuna
import pytest

from planner.cli import _is_refusal, arguments
from planner.plan import Error, Plan, Weights, load_plan
from planner.storage import open_storage
from profiler import records
from profiler.profile_record import Profile, StageTime, peak_at

ROOT = Path(__file__).parent.parent
GPT2 = ROOT / "tests" / "data" / "gpt2.profile.json"
COMMAND = [sys.executable, "-m", "planner.cli"]

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def run_in(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def planner(tmp_path: Path) -> Run:
    """Runs the command in a folder of its own."""
    return lambda *words: run_in(tmp_path, *words)


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A profile that was really measured, and what the command said."""
    folder = tmp_path_factory.mktemp("profile")
    done = run_in(folder, "profile", "tests.workloads.mlp:mlp", "--batch", "2,4", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    return folder / "mlp.profile.json", done.stdout


@pytest.fixture(scope="session")
def planned(profiled: tuple[Path, str]) -> Path:
    """A plan for that profile that recomputes something, whatever its stages of microseconds took this time."""
    profile = records.read(profiled[0], Profile)
    (measured,) = profile.precisions
    stage = StageTime(
        forward_seconds=1e-3,
        recompute_seconds=1e-3,
        backward_first_seconds=2e-3,
        backward_later_seconds=2e-3,
        kept_seconds=5e-4,
        kept_narrow_seconds=5e-4,
    )
    even = tuple(msgspec.structs.replace(at, stages=(stage,) * len(at.stages)) for at in measured.wall)
    cpu = None if measured.process_cpu is None else even
    evenly = msgspec.structs.replace(measured, wall=even, process_cpu=cpu)
    source = profiled[0].with_name("evenly.profile.json")
    records.write(source, msgspec.structs.replace(profile, precisions=(evenly,)))
    path = profiled[0].with_name("mlp.plan.json")
    words = ("--global-batch-size", "8", "--memory-budget", "1MiB", "--storage", "none", "-o", path)
    done = run_in(path.parent, "optimize", source, *words)
    assert done.returncode == 0, done.stderr
    plan = load_plan(path)
    assert (plan.micro_batch_size, bool(plan.checkpoint)) == (4, True)
    return path


@pytest.fixture
def gpt2_plan(planner: Run, tmp_path: Path) -> Path:
    done = planner(
        "optimize", GPT2, "--global-batch-size", 8, "--memory-budget", "2600MiB", "--storage", "none"
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "gpt2.plan.json"


def refusal(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of a command that refused."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("planner: ")
    return done.stderr


def cpu_seconds(folder: Path, *words: str | Path) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    assert run_in(folder, *words).returncode == 0
    return spent() - before


# Quick


def test_help_comes_at_once(tmp_path: Path) -> None:
    assert min(cpu_seconds(tmp_path, "--help") for _ in range(5)) < 0.3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, planner.cli as cli\n"
        "cli._parser().format_help()\n"
        "heavy = {'torch', 'numpy', 'msgspec', 'optuna', 'rich', 'sqlalchemy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_gpt2_is_planned_explained_and_recorded_in_four_seconds_without_torch(tmp_path: Path) -> None:
    words = ("optimize", GPT2, "--global-batch-size", "8", "--memory-budget", "2600MiB")
    assert min(cpu_seconds(tmp_path, *words) for _ in range(3)) < 4


def test_planning_and_explaining_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from planner.cli import main\n"
        f"assert main(['optimize', {str(GPT2)!r}, '--global-batch-size', '8', '-o', 'a.json']) == 0\n"
        "assert main(['explain', 'a.json']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)


# Every command, done


def test_a_profile_is_named_after_its_function_and_summed_up(profiled: tuple[Path, str]) -> None:
    path, said = profiled
    profile = records.read(path, Profile)
    assert profile.micro_batch_sizes == (2, 4)
    assert profile.workload is not None
    assert profile.workload.name == "tests.workloads.mlp:mlp"
    assert "h.*.*" in said  # eighteen stages in one row
    assert "planner optimize mlp.profile.json --global-batch-size 32" in said


def test_a_json_profile_is_alone_on_stdout_and_progress_on_stderr(planner: Run, tmp_path: Path) -> None:
    words = ("--batch", "2", "--precision", "fp32", "--steps", "1", "--json", "-o", "a.json")
    done = planner("profile", "tests.workloads.mlp:mlp", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "a.json").read_text()
    assert "timing micro-batch 2" in done.stderr


def test_a_plan_says_its_knobs_its_proof_and_where_it_went(planner: Run, tmp_path: Path) -> None:
    words = ("--global-batch-size", 8, "--memory-budget", "2600MiB", "--storage", "journal:s.journal")
    done = planner("optimize", GPT2, *words, "--study-name", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    plan = load_plan(tmp_path / "gpt2.plan.json")
    assert (
        f"proven optimal under the model ({plan.objective.plans_considered} plans considered)" in done.stdout
    )
    assert "within 2.54 GiB" in done.stdout
    assert "no, 360 MiB too much" in done.stdout  # the plain plan
    assert max(map(len, done.stdout.splitlines())) <= 100
    study = optuna.load_study(study_name="mine", storage=open_storage(f"journal:{tmp_path}/s.journal"))
    assert len(study.trials) == 4 + len(plan.front)


def test_a_json_plan_is_the_files_very_bytes(planner: Run, tmp_path: Path) -> None:
    done = planner("optimize", GPT2, "--global-batch-size", 8, "--json", "-o", "a.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "a.json").read_text()
    assert records.decode(done.stdout.encode(), Plan).global_batch_size == 8


def test_a_search_is_recorded_in_the_users_journal_unless_told_otherwise(
    planner: Run, state_of_its_own: Path
) -> None:
    assert planner("optimize", GPT2, "--global-batch-size", 8, "--storage", "none").returncode == 0
    assert list(state_of_its_own.iterdir()) == []
    assert planner("optimize", GPT2, "--global-batch-size", 8).returncode == 0
    assert (state_of_its_own / "studies.journal").is_file()


def test_an_explanation_names_what_binds_and_the_tightest_budget(planner: Run, gpt2_plan: Path) -> None:
    document = json.loads(planner("explain", gpt2_plan, "--json").stdout)
    assert document["binding"]
    said = planner("explain", gpt2_plan).stdout
    assert "the budget of 2.54 GiB binds" in said
    assert "The peak is at backward of lm_head" in said
    assert f"({document['tightest']['budget_bytes']} bytes)" in said


def test_an_explanation_tells_what_would_change_the_plan(planner: Run, gpt2_plan: Path) -> None:
    document = json.loads(planner("explain", gpt2_plan, "--json").stdout)
    told = {each["change"]: each for each in document["what_ifs"]}
    assert told["256 MiB less"]["feasible"] is False
    assert told["fp16 as well"]["reason"] == "not profiled: planner profile --precision fp32,bf16,fp16"
    more = told["256 MiB more"]
    said = planner("explain", gpt2_plan).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("256 MiB more"))
    assert f"{more['plan']['relative_step_seconds']:+.1%}" in line
    assert f"{more['plan']['cost']:.3f}" in line
    assert "bf16, 2 x 4" in line
    assert max(map(len, said.splitlines())) <= 100
    again = planner("explain", gpt2_plan, "--profile", GPT2, "--json").stdout
    assert json.loads(again)["what_ifs"] == document["what_ifs"]


def test_a_plan_that_was_not_asked_about_is_with_its_profile(
    planner: Run, gpt2_plan: Path, tmp_path: Path, profiled: tuple[Path, str]
) -> None:
    plan = msgspec.structs.replace(load_plan(gpt2_plan), what_ifs=None)
    plan.save(tmp_path / "bare.plan.json")
    assert "give the profile it was made from with --profile" in planner("explain", "bare.plan.json").stdout
    assert "256 MiB more" in planner("explain", "bare.plan.json", "--profile", GPT2).stdout
    line = refusal(planner("explain", "bare.plan.json", "--profile", profiled[0]), 4)
    assert "The plan was made from profile" in line


def test_the_tightest_budget_that_is_named_can_be_typed(planner: Run, gpt2_plan: Path) -> None:
    tightest = json.loads(planner("explain", gpt2_plan, "--json").stdout)["tightest"]["budget_bytes"]
    done = planner(
        "optimize", GPT2, "--global-batch-size", 8, "--memory-budget", tightest, "--storage", "none"
    )
    assert done.returncode == 0


def with_prediction(path: Path, target: Path, **changes: Any) -> Path:
    plan = load_plan(path)
    records.write(
        target,
        msgspec.structs.replace(plan, prediction=msgspec.structs.replace(plan.prediction, **changes)),
    )
    return target


def test_a_plan_that_holds_verifies(planner: Run, planned: Path, tmp_path: Path) -> None:
    generous = with_prediction(
        planned, tmp_path / "a.json", error=Error(step_seconds=1000.0, peak_memory_bytes=0.01)
    )
    done = planner("verify", generous, "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert "CPUAllocator" not in done.stderr
    document = json.loads(done.stdout)
    measured = document.pop("measured")
    assert document == json.loads(generous.read_text())
    assert measured["peak_memory_bytes"] == document["prediction"]["peak_memory_bytes"]
    assert measured["relative_error"]["peak_memory_bytes"] == 0
    assert measured["step_seconds"] > 0
    assert measured["step_joules"] is None


def test_a_plan_that_does_not_hold_exits_5(planner: Run, planned: Path, tmp_path: Path) -> None:
    wrong = with_prediction(planned, tmp_path / "a.json", peak_memory_bytes=2**30)
    done = planner("verify", wrong, "--steps", "1")
    assert done.returncode == 5, done.stderr
    assert "the plan does not hold" in done.stdout
    assert "1.00 GiB" in done.stdout
    assert "of the profile's speed" in done.stdout


def test_a_baseline_is_run_as_it_was_predicted_whether_or_not_it_fits(planner: Run, planned: Path) -> None:
    done = planner("verify", planned, "--baseline", "plain", "--steps", "1", "--json")
    assert done.returncode in (0, 5), done.stderr  # the time of one step may be anything
    document, plain = json.loads(done.stdout), load_plan(planned).baselines.plain
    assert not plain.fits
    assert document["checkpoint"] == []
    assert document["measured"]["peak_memory_bytes"] == plain.prediction.peak_memory_bytes
    assert max(live for _, live in document["measured"]["memory_curve"]) == plain.prediction.peak_memory_bytes


def test_training_ends_with_a_report(planner: Run, planned: Path, tmp_path: Path) -> None:
    done = planner("train", planned, "--steps", "3", "--output-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["samples"]) == (3, 24)
    assert report["plan_sha256"] == load_plan(planned).sha256
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert "step 3 of 3" in done.stderr


def test_training_that_is_told_to_end_saves_and_goes_on_by_the_same_command(
    planner: Run, planned: Path, tmp_path: Path
) -> None:
    words = ("train", planned, "--steps", "400", "--output-dir", "run", "--resume", "--json")
    with subprocess.Popen(
        [*COMMAND, *map(str, words)], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        assert any("step 3 of 400" in line for line in running.stderr)
        running.terminate()
        said = running.stderr.read()
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
        assert running.stdout is not None
        assert running.stdout.read() == ""
    last = said.splitlines()[-1]
    assert last.startswith("planner: stopped after step ")
    assert last.endswith(": --resume goes on from there.")
    done = planner(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 400
    assert f"after step {report['resumed_after_steps'][0]}, saved in" in last
    refused = planner("train", planned, "--steps", "400", "--output-dir", "run", "--resume", "--seed", "1")
    assert "is one of another: seed 0 instead of 1" in refused.stderr
    assert refused.returncode == 4


def test_the_dashboard_names_its_address_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    words = ["dashboard", "--storage", f"journal:{tmp_path}/s.journal", "--port", "0"]
    with subprocess.Popen(
        [*COMMAND, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        assert server.stdout.readline().startswith("http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130
        assert server.stderr.read() == "planner: interrupted\n"


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    words = ["optimize", str(GPT2), "--global-batch-size", "8", "--storage", "none", "--json"]
    with subprocess.Popen(
        [*COMMAND, *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait(timeout=60) == 141


# Refusals


def test_an_impossible_budget_exits_3_and_names_the_tightest_plan(planner: Run, tmp_path: Path) -> None:
    line = refusal(planner("optimize", GPT2, "--global-batch-size", 8, "--memory-budget", "1GiB"), 3)
    assert "No plan fits 1.000 GiB: the tightest needs 2." in line
    assert "Raise --memory-budget" in line
    assert list(tmp_path.iterdir()) == []
    named = line.rpartition("A plan fits with --memory-budget ")[2].rstrip(".\n")
    words = ("--global-batch-size", 8, "--memory-budget", named, "--storage", "none")
    assert planner("optimize", GPT2, *words).returncode == 0


def damaged(plan: str) -> dict[str, tuple[str, str]]:
    """Broken plan files, and what must be said of each."""
    document = json.loads(plan)

    def changed(**fields: object) -> str:
        return json.dumps(document | fields)

    return {
        "truncated": (plan[: len(plan) // 2], "its JSON is cut short"),
        "empty": ("", "it is empty"),
        "not-json": ("#!/bin/sh\n", "it is not JSON"),
        "wrong-type": (changed(micro_batch_size="two"), "expected int, got str at $.micro_batch_size"),
        "unknown-field": (changed(colour="red"), "unknown field colour at $"),
        "contradictory": (changed(gradient_accumulation_steps=3), "got 2 * 3 * 1 = 6 and 8"),
        "future": (changed(schema_version=99), "has schema_version 99"),
        "a-profile": (GPT2.read_text(), "it is a profile"),
    }


@pytest.mark.parametrize("command", ["explain", "verify", "train"])
def test_a_broken_plan_file_exits_2_with_one_line_that_names_file_and_fault(
    planner: Run, gpt2_plan: Path, tmp_path: Path, command: str
) -> None:
    for name, (text, fault) in damaged(gpt2_plan.read_text()).items():
        (tmp_path / f"{name}.json").write_text(text)
        line = refusal(planner(command, f"{name}.json"), 2)
        assert f"{name}.json" in line
        assert fault in line, name
    assert "there is no such file" in refusal(planner(command, "nowhere.json"), 2)


def test_a_plan_for_a_profile_is_refused(planner: Run, gpt2_plan: Path) -> None:
    assert "it is a plan" in refusal(planner("optimize", gpt2_plan, "--global-batch-size", 8), 2)


def test_an_unknown_model_is_answered_with_those_there_are(planner: Run) -> None:
    line = refusal(planner("profile", "gtp2"), 2)
    assert "transformers:NAME, torchvision:NAME, or package.module:function" in line
    assert "Did you mean gpt2?" in line


def test_a_workload_may_lie_in_the_current_directory(tmp_path: Path) -> None:
    """As the installed command finds it: a script elsewhere, not ``python -m`` that adds the directory."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "planner"
    script.write_text("import sys\nfrom planner.cli import main\nsys.exit(main())\n")
    (tmp_path / "mine.py").write_text("def work():\n    return 1\n")
    words = [sys.executable, str(script), "profile", "mine:work"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "mine:work() must return a profiler.Workload, got int" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fly",), "invalid choice: 'fly'"),
        ((), "required: COMMAND"),
        (("optimize", GPT2), "--global-batch-size --global-batch-range is required"),
        (("optimize", GPT2, "--global-batch-size", "0"), "must be a whole number of at least 1, got '0'"),
        (("optimize", GPT2, "--global-batch-size", "8", "--memory-budget", "8G"), "Is it 8GiB (1024) or 8GB"),
        (
            ("optimize", GPT2, "--global-batch-size", "8", "--world-size", "2"),
            "world_size must be 1 for a profile",
        ),
        (("optimize", GPT2, "--global-batch-size", "8", "--zero-stage", "1"), "nothing to shard"),
        (("optimize", GPT2, "--global-batch-size", "8", "--zero-stage", "4"), "must be of 0, 1, 2, 3"),
        (
            ("optimize", GPT2, "--global-batch-size", "8", "--trials", "-1"),
            "must be a whole number from 0, got '-1'",
        ),
        (("optimize", GPT2, "--global-batch-size", "8", "--time-weight", "-1"), "at least 0, got '-1'"),
        (
            ("optimize", GPT2, "--global-batch-size", "8", "--time-weight", "0"),
            "must be positive, got 0, 0 and 0",
        ),
        (("optimize", GPT2, "--global-batch-size", "8", "--energy-weight", "1"), "source of energy"),
        (
            ("optimize", GPT2, "--global-batch-size", "8", "--precision", "fp64"),
            "must be of fp32, bf16, fp16",
        ),
        (("optimize", GPT2, "--global-batch-size", "8", "-o", "no/such/a.json"), "Make no/such first"),
        (("optimize", GPT2, "--global-batch-size", "8", "--storage", "a b"), "journal:studies.journal"),
        (("profile", "gpt2", "--batch", "1,0"), "--batch: must be whole numbers of at least 1"),
        (("profile", "gpt2", "--image-size", "32"), "gpt2 takes no image_size (--image-size)"),
        (("train", "a.json", "--steps", "1", "--epochs", "1"), "not allowed with argument"),
        (("train", "a.json", "--output-dir", GPT2), "must be a folder that can be written"),
        (("train", "a.json", "--until", "accuracy=85"), "accuracy must be a share of 1"),
        (("train", "a.json", "--learning-rate", "0"), "must be a positive number"),
        (("train", "a.json", "--most-accumulation", "8"), "Give --adaptive too"),
        (("train", "a.json", "--adaptive", "absolute"), "Give --noise-target"),
        (("dashboard", "--storage", "journal:a", "--port", "99999"), "from 0 to 65535, got 99999"),
    ],
)
def test_bad_usage_exits_2_with_the_rule_and_the_facts(
    planner: Run, words: tuple[str, ...], said: str
) -> None:
    assert said in refusal(planner(*words), 2)


def test_a_device_that_is_not_here_exits_2(planner: Run) -> None:
    done = planner("profile", "tests.workloads.mlp:mlp", "--device", "cuda:99")
    assert done.returncode == 2
    assert "--device cuda:99 is not here" in done.stderr.splitlines()[-1]


def test_a_precision_that_was_not_profiled_exits_4(planner: Run) -> None:
    line = refusal(planner("optimize", GPT2, "--global-batch-size", 8, "--precision", "fp16"), 4)
    assert "The profile holds fp32" in line


def test_a_plan_for_another_device_exits_4(planner: Run, planned: Path, tmp_path: Path) -> None:
    plan = load_plan(planned)
    elsewhere = msgspec.structs.replace(plan.device, name="Abacus")
    records.write(tmp_path / "a.json", msgspec.structs.replace(plan, device=elsewhere))
    done = planner("verify", "a.json")
    assert done.returncode == 4
    assert "planner: The plan was made for Abacus" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_study_name_that_is_taken_exits_2(planner: Run) -> None:
    words = ("--storage", "journal:s.journal", "--study-name", "mine")
    assert planner("optimize", GPT2, "--global-batch-size", 8, *words).returncode == 0
    assert "mine holds that of plan" in refusal(
        planner("optimize", GPT2, "--global-batch-size", 4, *words), 2
    )


# Bugs stay visible


def test_a_fault_in_the_users_own_workload_is_one_line_that_says_where(planner: Run) -> None:
    done = planner("profile", "tests.workloads.mlp:bad_batch")
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith("planner: batch(1) raised ValueError: my own mistake, at ")
    assert "mlp.py:34." in message
    assert "Traceback" not in done.stderr


def test_only_what_our_own_code_raises_counts_as_a_refusal() -> None:
    with pytest.raises(ValueError, match="must be positive") as said:
        Weights(time=0)
    with pytest.raises(ValueError, match="empty") as out_of_a_call:
        peak_at((), 1)
    with pytest.raises(ValueError, match="test") as elsewhere:
        raise ValueError("this test is not ours")
    assert [_is_refusal(error.value) for error in (said, out_of_a_call, elsewhere)] == [True, False, False]


# What the flags accept


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8GiB", 8_589_934_592),
        ("8GB", 8_000_000_000),
        ("512MiB", 536_870_912),
        ("1.5GiB", 1_610_612_736),
        ("0.1GB", 100_000_000),
        ("2 kib", 2048),
        ("1TB", 10**12),
        ("700", 700),
        ("700B", 700),
    ],
)
def test_sizes_are_bytes_with_decimal_and_binary_units(text: str, found: int) -> None:
    assert arguments.size(text) == found


@pytest.mark.parametrize(
    "text", ["", "GiB", "8G", "-1GiB", "8XB", "1e9", "8 GiB extra", "nan", "0", "0.1", "\u0663GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a size"):
        arguments.size(text)

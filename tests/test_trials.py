"""Real trials: processes of their own that hang, die, run out of memory or are interrupted, and studies that go on.

The plans are of a small tower (tests/workloads/faulty.py) that misbehaves as the environment says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import optuna
import pytest

import planner
import profiler
from planner.cli import main
from planner.explain import chosen
from planner.outcome import Outcome, TrialResult
from planner.plan import Choice, Cost, Plan, Weights
from planner.search import Knobs, Space, space
from planner.storage import open_storage, opened
from planner.study import plan_of
from planner.trial_process import Ended, TrialTerms, run_in_process
from planner.trials import WORTH_CHANGING, run_trials
from profiler import energy, records
from profiler.profile_record import Profile
from profiler.registry import build
from profiler.workload_spec import WorkloadSpec, resolve
from tests import postgres

NAME = "tests.workloads.faulty:tower"
GLOBAL_BATCH_SIZE = 16
WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def profile() -> Profile:
    spec = resolve(WorkloadSpec(name=NAME))
    return profiler.profile(build(spec), (2, 8), ("fp32",), "cpu", steps=1, spec=spec)


@pytest.fixture(scope="module")
def recorded() -> Profile:
    """GPT-2 small, as it was profiled once: its plans are the same every time."""
    return records.read(Path(__file__).parent / "data" / "gpt2.profile.json", Profile)


@pytest.fixture(scope="module")
def plans(recorded: Profile) -> Space:
    """Within nine tenths of what the plain plan needs."""
    plain = planner.optimize(recorded, GLOBAL_BATCH_SIZE)
    return space(recorded, GLOBAL_BATCH_SIZE, int(0.9 * plain.prediction.peak_memory_bytes))


@pytest.fixture(scope="module")
def plan(profile: Profile) -> Plan:
    return planner.optimize(profile, GLOBAL_BATCH_SIZE, 64 * 2**20)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'trials.journal'}"


def study_of(url: str) -> optuna.Study:
    storage = open_storage(url)
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


class Machine:
    """Runs nothing: a step takes what was predicted times ``slower(choice)``, or ends as ``ends(choice)`` says."""

    def __init__(
        self,
        slower: Callable[[Choice], float] = lambda choice: 1.0,
        ends: Callable[[Choice], Outcome | None] = lambda choice: None,
        heavier: Callable[[Choice], float] = lambda choice: 1.0,
    ) -> None:
        self._slower = slower
        self._heavier = heavier
        self._ends = ends
        self.ran: list[Choice] = []

    def __call__(self, plan: Plan, terms: TrialTerms) -> Ended:
        choice, predicted = chosen(plan), plan.prediction
        self.ran.append(choice)
        outcome = self._ends(choice)
        if outcome == "interrupted":
            raise KeyboardInterrupt
        if outcome is not None:
            return Ended(outcome, None, f"it was a {outcome}")
        slower = self._slower(choice)
        measured = Cost(
            step_seconds=slower * predicted.step_seconds,
            step_cpu_seconds=slower * predicted.steady_seconds,
            peak_memory_bytes=round(self._heavier(choice) * predicted.peak_memory_bytes),
            peak_reserved_bytes=None,
            step_joules=None,
        )
        result = TrialResult(
            plan_sha256=plan.sha256,
            outcome="ok",
            measured=measured,
            steady_seconds=measured.steady_seconds,
            steady_error=1 / slower - 1,
            device_speed=1.0,
        )
        return Ended("ok", result)


class TestTheStudy:
    """Which plans are run, and what becomes of what they say. No process is started here."""

    def test_the_models_best_comes_first_and_what_does_not_fit_is_never_run(
        self, plans: Space, url: str
    ) -> None:
        machine = Machine()
        plan, tried = run_trials(plans, TrialTerms(trials=8), url, run=machine)
        assert machine.ran[0] == chosen(plans.plan())
        assert all(choice.fits for choice in machine.ran)
        pruned = study_of(url).get_trials(states=(optuna.trial.TrialState.PRUNED,))
        assert any(trial.user_attrs["not_run"] == "predicted not to fit" for trial in pruned)
        assert len(tried) == len(machine.ran) == 8
        assert len({str(choice) for choice in machine.ran}) == 8
        assert plan.trials is not None
        assert plan.trials.outcomes == {"ok": 8}
        assert plan.trials.saved_by_trials == 0
        assert chosen(plan) == chosen(plans.plan())

    def test_every_trial_has_prediction_and_measurement_side_by_side(self, plans: Space, url: str) -> None:
        run_trials(plans, TrialTerms(trials=3), url, run=Machine(slower=lambda choice: 1.25))
        for trial in study_of(url).get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            noted = trial.user_attrs
            assert noted["measured_step_seconds"] == pytest.approx(1.25 * noted["predicted_step_seconds"])
            assert noted["measured_peak_memory_bytes"] == noted["predicted_peak_memory_bytes"]
            over = noted["measured_peak_memory_bytes"] - plans.memory_budget_bytes
            assert trial.constraints == {"bytes_over_budget": over}
            assert over < 0

    def test_one_worker_with_one_seed_runs_the_same_plans_again(self, plans: Space, tmp_path: Path) -> None:
        runs = []
        for name in ("one", "two"):
            machine = Machine(slower=lambda choice: 1 + choice.micro_batch_size / 10)
            run_trials(plans, TrialTerms(trials=9, seed=4), f"journal:{tmp_path / name}", run=machine)
            runs.append(machine.ran)
        assert runs[0] == runs[1]

    def test_when_the_models_best_is_slow_another_takes_its_place(self, plans: Space, url: str) -> None:
        best = chosen(plans.plan())
        machine = Machine(slower=lambda choice: 2.0 if Knobs.of(choice) == Knobs.of(best) else 1.0)
        plan, tried = run_trials(plans, TrialTerms(trials=8), url, run=machine)
        cheapest = min((each for each in tried if each.cost is not None), key=lambda each: each.cost or 0)
        assert chosen(plan).checkpoint == cheapest.choice.checkpoint
        assert Knobs.of(chosen(plan)) != Knobs.of(best)
        assert plan.trials is not None
        assert plan.trials.saved_by_trials is not None
        assert plan.trials.saved_by_trials > 0.2
        assert not plan.objective.optimal
        assert plan.memory_budget_bytes == plans.memory_budget_bytes

    def test_a_difference_that_noise_may_have_made_changes_nothing(self, plans: Space, url: str) -> None:
        best = chosen(plans.plan())

        def barely_faster(choice: Choice) -> float:
            faster = 1 - WORTH_CHANGING / 2
            same = best.prediction.steady_seconds / choice.prediction.steady_seconds
            return 1.0 if choice == best else faster * same

        plan, tried = run_trials(plans, TrialTerms(trials=8), url, run=Machine(slower=barely_faster))
        assert min(tried, key=lambda each: each.cost or 0).choice != best
        assert chosen(plan) == best

    def test_a_plan_that_was_measured_over_the_budget_gives_way(self, plans: Space, url: str) -> None:
        best = chosen(plans.plan())
        machine = Machine(heavier=lambda choice: 1.5 if choice == best else 1.0)
        plan, _ = run_trials(plans, TrialTerms(trials=6), url, run=machine)
        assert chosen(plan) != best
        assert plan.trials is not None
        assert plan.trials.measured is not None
        assert plan.trials.measured.peak_memory_bytes <= (plans.memory_budget_bytes or 0)
        over = study_of(url).get_trials()[0].constraints["bytes_over_budget"]
        assert over > 0

    def test_corrections_lead_to_knobs_that_the_model_thought_worse(self, plans: Space, url: str) -> None:
        best = chosen(plans.plan())
        machine = Machine(slower=lambda choice: 3.0 if Knobs.of(choice) == Knobs.of(best) else 1.0)
        run_trials(plans, TrialTerms(trials=20), url, run=machine)
        later = [Knobs.of(choice) for choice in machine.ran[2:]]
        assert {knobs for knobs in plans.knobs() if knobs != Knobs.of(best)} <= set(later)
        assert later.count(Knobs.of(best)) <= 2

    def test_trials_that_end_badly_are_counted_by_how_and_never_chosen(self, plans: Space, url: str) -> None:
        ends: dict[int, Outcome] = {0: "out_of_memory", 1: "timeout", 2: "crash"}
        count = iter(range(100))
        machine = Machine(ends=lambda choice: ends.get(next(count)))
        plan, tried = run_trials(plans, TrialTerms(trials=6), url, run=machine)
        assert plan.trials is not None
        assert plan.trials.outcomes == {"out_of_memory": 1, "timeout": 1, "crash": 1, "ok": 3}
        assert chosen(plan) != chosen(plans.plan())
        assert plan.trials.saved_by_trials is None
        assert [each.message for each in tried[:3]] == [
            "it was a out_of_memory", "it was a timeout", "it was a crash",
        ]  # fmt: skip

    def test_stated_watts_price_the_time_that_was_measured(self, recorded: Profile, url: str) -> None:
        """All of the cost is energy, at the same watts in every phase: it is as much off as the time."""
        stated = msgspec.structs.replace(recorded, energy=energy.stated(100.0, ["fp32", "bf16"]))
        plans = space(stated, 8, weights=Weights(time=0.0, energy=1.0))
        _, tried = run_trials(plans, TrialTerms(trials=1), url, run=Machine(slower=lambda choice: 1.5))
        assert tried[0].cost == pytest.approx(1.5 * plans.plan().objective.cost)

    def test_an_interrupted_study_goes_on_where_it_was(self, plans: Space, url: str) -> None:
        count = iter(range(100))
        first = Machine(ends=lambda choice: "interrupted" if next(count) == 2 else None)
        with pytest.raises(KeyboardInterrupt):
            run_trials(plans, TrialTerms(trials=6), url, run=first)
        second = Machine()
        _, tried = run_trials(plans, TrialTerms(trials=6), url, run=second)
        assert len(first.ran) == 3
        assert second.ran[0] == first.ran[2]
        assert len(second.ran) == 4
        assert Counter(each.outcome for each in tried) == {"ok": 6}
        third = Machine()
        run_trials(plans, TrialTerms(trials=6), url, run=third)
        assert third.ran == []

    def test_the_last_of_the_trials_is_for_one_that_was_interrupted(self, plans: Space, url: str) -> None:
        """The model's best is interrupted, and what one would do by hand waits before it."""
        with pytest.raises(KeyboardInterrupt):
            run_trials(plans, TrialTerms(trials=2), url, run=Machine(ends=lambda choice: "interrupted"))
        second = Machine()
        run_trials(plans, TrialTerms(trials=2), url, run=second)
        assert len(second.ran) == 2
        assert second.ran[0] != second.ran[1] == chosen(plans.plan())

    def test_an_exhausted_space_ends_the_study(self, recorded: Profile, url: str) -> None:
        tightest = min(planner.optimize(recorded, 8).front, key=lambda c: c.prediction.peak_memory_bytes)
        budget = int(1.01 * tightest.prediction.peak_memory_bytes)
        machine = Machine()
        run_trials(space(recorded, 8, budget), TrialTerms(trials=500), url, run=machine)
        assert 1 <= len(machine.ran) < 200

    def test_a_study_of_another_question_is_refused(self, plans: Space, recorded: Profile, url: str) -> None:
        run_trials(plans, TrialTerms(trials=1), url, "mine", run=Machine())
        with pytest.raises(ValueError, match="Give another --study-name"):
            run_trials(space(recorded, 8), TrialTerms(trials=1), url, "mine", run=Machine())

    @pytest.mark.parametrize("sampler", ["tpe", "gp"])
    def test_both_samplers_find_the_fast_corner(self, plans: Space, url: str, sampler: str) -> None:
        machine = Machine(slower=lambda choice: choice.micro_batch_size / 2)
        terms = TrialTerms(trials=12, sampler=sampler)  # type: ignore[arg-type]
        plan, _ = run_trials(plans, terms, url, run=machine)
        assert plan.micro_batch_size == 1

    def test_a_plan_without_a_named_workload_is_refused(self, recorded: Profile, url: str) -> None:
        nameless = msgspec.structs.replace(recorded, workload=None)
        with pytest.raises(ValueError, match="a workload that has a name"):
            run_trials(space(nameless, 8), TrialTerms(trials=1), url, run=Machine())


class TestItsProcess:
    """How a real process ends."""

    def test_one_that_is_well_is_measured(self, plan: Plan) -> None:
        ended = run_in_process(plan, TrialTerms(trials=1, steps=1))
        assert ended.outcome == "ok"
        assert ended.result is not None
        assert ended.result.measured is not None
        assert ended.result.measured.peak_memory_bytes == pytest.approx(
            plan.prediction.peak_memory_bytes, rel=plan.prediction.error.peak_memory_bytes
        )
        assert ended.result.plan_sha256 == plan.sha256

    def test_one_that_sleeps_forever_is_ended_at_its_time_limit(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "pid"
        monkeypatch.setenv("FAULT", "sleep")
        monkeypatch.setenv("FAULT_FILE", str(file))
        began = time.monotonic()
        ended = run_in_process(plan, TrialTerms(trials=1, timeout_seconds=60))
        assert ended.outcome == "timeout"
        assert time.monotonic() - began < 120
        assert not is_there(int(file.read_text()))

    @pytest.mark.parametrize(
        ("fault", "outcome", "said"),
        [
            ("segfault", "crash", "killed by SIGSEGV"),
            ("raise", "crash", "ArithmeticError: a wrong turn"),
            ("exit", "crash", "exit status 7"),
            ("memory", "out_of_memory", "can't allocate memory"),
        ],
    )
    def test_one_that_fails_says_how(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch, fault: str, outcome: str, said: str
    ) -> None:
        """The memory that it asks for is there, but beyond the wall of a plan within 64 MiB."""
        monkeypatch.setenv("FAULT", fault)
        ended = run_in_process(plan, TrialTerms(trials=1, steps=2))
        assert ended.outcome == outcome
        assert ended.message is not None
        assert said in ended.message


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def command(profile: Path, url: str, folder: Path, trials: int) -> list[str]:
    return [
        sys.executable, "-m", "planner.cli", "optimize", str(profile), "--global-batch-size", str(GLOBAL_BATCH_SIZE),
        "--trials", str(trials), "--trial-steps", "1", "--storage", url, "-o", str(folder / "tower.plan.json"),
    ]  # fmt: skip


@pytest.fixture
def profile_file(profile: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "tower.profile.json"
    records.write(path, profile)
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_a_parent_killed_in_the_middle_of_a_trial_loses_that_trial_and_counts_none_twice(
    profile_file: Path, url: str, tmp_path: Path
) -> None:
    asleep = tmp_path / "asleep"
    environment = os.environ | {"FAULT": "sleep", "FAULT_FILE": str(asleep)}
    call = command(profile_file, url, tmp_path, trials=2)
    parent = subprocess.Popen(call, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: asleep.exists() and asleep.read_text() != "")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child = int(asleep.read_text())
    wait_for(lambda: not is_there(child))
    (stuck,) = study_of(url).get_trials(states=(optuna.trial.TrialState.RUNNING,))

    again = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert f"trial {stuck.number} was interrupted and is run again" in again.stderr
    trials = study_of(url).get_trials()
    lost = [trial for trial in trials if trial.state is optuna.trial.TrialState.FAIL]
    assert [trial.number for trial in lost] == [stuck.number]
    complete = [trial for trial in trials if trial.state is optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 2
    assert stuck.user_attrs["choice"] in [trial.user_attrs["choice"] for trial in complete]
    assert len({str(trial.user_attrs["choice"]) for trial in complete}) == 2


def test_two_processes_share_a_journal(profile_file: Path, url: str, tmp_path: Path) -> None:
    call = command(profile_file, url, tmp_path, trials=4)
    both = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for each in both:
        _, said = each.communicate(timeout=4 * WAIT_SECONDS)
        assert each.returncode == 0, said
    complete = study_of(url).get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(complete) == 4
    assert len({str(trial.user_attrs["choice"]) for trial in complete}) == 4
    assert len({trial.user_attrs["worker"]["pid"] for trial in complete}) == 2


def test_a_study_may_be_in_postgresql(plans: Space, tmp_path_factory: pytest.TempPathFactory) -> None:
    programs = postgres.programs()
    if programs is None:
        assert "CI" not in os.environ, "PostgreSQL must be installed under CI"
        pytest.skip("needs PostgreSQL's server programs")
    # Its account must be able to walk to its folder.
    with (
        tempfile.TemporaryDirectory(prefix="planner-postgres-") as folder,
        postgres.running(Path(folder), programs) as url,
    ):
        count = iter(range(100))
        first = Machine(ends=lambda choice: "interrupted" if next(count) == 1 else None)
        with pytest.raises(KeyboardInterrupt):
            run_trials(plans, TrialTerms(trials=4), url, run=first)
        _, tried = run_trials(plans, TrialTerms(trials=4), url, run=Machine())
        assert [each.outcome for each in tried] == ["ok"] * 4
        with opened(url) as storage:
            (name,) = optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage)
            states = Counter(trial.state.name for trial in study.get_trials())
        assert states["COMPLETE"] == 4
        assert states["FAIL"] == 1


def test_a_full_disk_leaves_the_old_plan_as_it_was(
    profile_file: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_file = small_disk / "tower.plan.json"
    plan_file.write_text("the old plan")
    (small_disk / "ballast").write_bytes(bytes(56 * 1024))
    call = [
        "optimize", str(profile_file), "--global-batch-size", "16", "--storage", "none", "-o", str(plan_file),
    ]  # fmt: skip
    assert main(call) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert plan_file.read_text() == "the old plan"
    assert sorted(each.name for each in small_disk.iterdir()) == ["ballast", "tower.plan.json"]


def test_the_report_shows_what_trials_measured(
    plans: Space, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = run_trials(plans, TrialTerms(trials=2), url, run=Machine(slower=lambda choice: 1.25))
    file, page = tmp_path / "gpt2.plan.json", tmp_path / "page.html"
    plan.save(file)
    assert main(["report", str(file), "--storage", url, "-o", str(page)]) == 0
    assert "missing" not in capsys.readouterr().out
    assert "-20.0%" in page.read_text().replace("\u2212", "-")
    assert main(["report", str(file), "--storage", f"journal:{tmp_path / 'other'}", "-o", str(page)]) == 0
    assert "give it with --storage" in capsys.readouterr().out


def test_a_study_of_trials_is_reported_by_its_name(
    plans: Space, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = run_trials(plans, TrialTerms(trials=2), url, "mine", run=Machine(slower=lambda choice: 1.25))
    assert plan.trials is not None
    assert plan_of("mine", url) == plan
    page = tmp_path / "page.html"
    assert main(["report", "mine", "--storage", url, "-o", str(page)]) == 0
    assert "missing" not in capsys.readouterr().out
    assert "-20.0%" in page.read_text()


def test_a_study_holds_the_models_plan_while_its_trials_run(plans: Space, url: str) -> None:
    held = []

    class Watching(Machine):
        def __call__(self, plan: Plan, terms: TrialTerms) -> Ended:
            held.append(plan_of("mine", url))
            return super().__call__(plan, terms)

    run_trials(plans, TrialTerms(trials=1), url, "mine", run=Watching())
    assert held == [plans.plan()]


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--storage", "none"], "--storage none has none"),
        (["--trial-timeout", "0"], "must be a positive number of seconds"),
        (["--trials", "-1"], "must be a whole number from 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    profile_file: Path,
    url: str,
    tmp_path: Path,
    flags: list[str],
    rule: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(profile_file, url, tmp_path, trials=1)[3:]
    try:
        code = main([*arguments, *flags])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert rule in capsys.readouterr().err

"""A search as a study: everything it found, once, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import msgspec
import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from planner.storage import open_storage
from planner.study import PLAN, PLAN_SHA256, default_name, plan_of, record, replace_plan
from tests.plans import plan


@pytest.fixture(params=["journal:{}/a.journal", "sqlite:///{}/a.db"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url: str = request.param.format(tmp_path)
    return url


def load(storage_url: str, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(storage_url))


def test_every_plan_of_the_search_is_a_trial_with_its_prediction(storage_url: str) -> None:
    study = load(storage_url, record(plan(), storage_url))
    assert [(trial.params["placement"], trial.values) for trial in study.trials] == [
        ("sqrt", [14.0, 400.0]),
        ("every_block", [13.0, 500.0]),
        ("plain", [10.0, 1000.0]),
        ("chosen", [12.0, 600.0]),
        ("front", [15.0, 300.0]),
        ("front", [12.0, 600.0]),
        ("front", [11.0, 800.0]),
        ("front", [10.0, 1000.0]),
    ]
    assert [trial.params.get("position") for trial in study.trials] == [None] * 4 + [0, 1, 2, 3]
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_both_metrics_are_minimised_and_named(storage_url: str) -> None:
    study = load(storage_url, record(plan(), storage_url))
    assert study.directions == [StudyDirection.MINIMIZE] * 2
    assert study.metric_names == ["step_seconds", "peak_memory_bytes"]


def test_what_people_do_by_hand_and_the_plan_come_from_the_queue(storage_url: str) -> None:
    study = load(storage_url, record(plan(), storage_url))
    queued = [t.params["placement"] for t in study.trials if "fixed_params" in t.system_attrs]
    assert queued == ["sqrt", "every_block", "plain", "chosen"]


def test_a_trial_is_feasible_exactly_when_its_plan_fits(storage_url: str) -> None:
    study = load(storage_url, record(plan(700), storage_url))
    over = [trial.constraints["bytes_over_budget"] for trial in study.trials]
    # What each needs with its error, minus 700: 400 bytes need 441.
    assert over == [-259, -149, 401, -39, -369, -39, 181, 401]


def test_without_a_budget_there_is_no_constraint(storage_url: str) -> None:
    study = load(storage_url, record(plan(None), storage_url))
    assert [trial.constraints for trial in study.trials] == [{}] * 8


def test_a_trial_says_what_is_recomputed_and_what_its_prediction_is_made_of(storage_url: str) -> None:
    study = load(storage_url, record(plan(), storage_url))
    chosen = study.trials[3].user_attrs
    assert chosen["checkpoint"] == "h.0 .. h.1 (2 segments of one stage)"
    assert chosen["peak_parts_bytes"] == {"parameters": 100, "activations": 500}
    assert chosen["expected_error"] == {"step_seconds": 0.05, "peak_memory_bytes": 0.1}


def test_recording_the_same_plan_again_adds_nothing(storage_url: str) -> None:
    name = record(plan(), storage_url)
    before = load(storage_url, name).trials
    assert record(plan(), storage_url) == name
    assert load(storage_url, name).trials == before


def test_what_an_interrupted_recording_left_out_is_added(storage_url: str) -> None:
    name = default_name(plan())
    study = optuna.create_study(
        study_name=name, storage=open_storage(storage_url), directions=["minimize"] * 2
    )
    study.set_user_attr(PLAN_SHA256, plan().sha256)
    study.enqueue_trial(
        {
            "placement": "every_block",
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "precision": "fp32",
            "zero_stage": 0,
        }
    )
    record(plan(), storage_url)
    trials = load(storage_url, name).trials
    placements = [trial.params["placement"] for trial in trials if trial.state is TrialState.COMPLETE]
    assert sorted(placements) == sorted(["sqrt", "every_block", "plain", "chosen"] + ["front"] * 4)
    assert len(trials) == 8


def test_a_study_holds_its_plan(storage_url: str) -> None:
    name = record(plan(), storage_url)
    assert plan_of(name, storage_url) == plan()
    later = msgspec.structs.replace(plan(), what_ifs=())
    replace_plan(later, storage_url, name)
    assert plan_of(name, storage_url) == later


def test_a_study_of_an_older_version_gets_its_plan_when_it_is_recorded_again(storage_url: str) -> None:
    study = optuna.create_study(
        study_name="mine", storage=open_storage(storage_url), directions=["minimize"] * 2
    )
    study.set_user_attr(PLAN_SHA256, plan().sha256)
    with pytest.raises(ValueError, match=r"^The study mine holds no plan: an older version wrote it"):
        plan_of("mine", storage_url)
    record(plan(), storage_url, "mine")
    assert plan_of("mine", storage_url) == plan()


def test_a_study_that_is_not_there_is_answered_with_those_there_are(storage_url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^nope is neither a plan file nor a study: .* holds no study\. Give"
    ):
        plan_of("nope", storage_url)
    for number in range(14):
        optuna.create_study(study_name=f"s{number}", storage=open_storage(storage_url))
    newest = ", ".join(f"s{number}" for number in range(2, 14))
    with pytest.raises(ValueError, match=rf"holds the studies {newest} and 2 older ones\. Give a plan file"):
        plan_of("nope", storage_url)


def test_the_dashboard_shows_the_beginning_of_a_plan_and_no_more(storage_url: str) -> None:
    from optuna_dashboard._serializer import serialize_attrs

    shown = serialize_attrs(load(storage_url, record(plan(), storage_url)).user_attrs)
    assert max(len(each["value"]) for each in shown) <= 1024
    (held,) = (each["value"] for each in shown if each["key"] == PLAN)
    assert held.startswith('{"kind": "plan"')


def test_another_budget_has_a_name_of_its_own(storage_url: str) -> None:
    assert record(plan(700), storage_url) != record(plan(1200), storage_url)


def test_a_name_says_what_was_planned_and_for_where() -> None:
    assert default_name(plan(None)).startswith("chain-a-tm-cpu-batch-8-no-limit-abababab-")


def test_a_given_name_that_holds_another_plan_is_refused(storage_url: str) -> None:
    record(plan(700), storage_url, "mine")
    with pytest.raises(ValueError, match=r"mine holds that of plan \w{8}, .* Give another --study-name"):
        record(plan(1200), storage_url, "mine")
    assert len(load(storage_url, "mine").trials) == 8


def test_a_given_name_that_holds_other_trials_is_refused(storage_url: str) -> None:
    optuna.create_study(study_name="mine", storage=open_storage(storage_url)).enqueue_trial({"x": 1})
    with pytest.raises(ValueError, match="mine holds other trials"):
        record(plan(), storage_url, "mine")


def test_recording_says_nothing_and_leaves_optunas_voice_as_it_was(
    storage_url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        record(plan(), storage_url)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.disable_propagation()
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")

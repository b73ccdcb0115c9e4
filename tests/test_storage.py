"""Where studies are kept, and what is said about a place where they cannot be."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import optuna
import pytest

from planner.state import state_directory
from planner.storage import default_storage_url, open_storage

HOME = Path("/home/ada")


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "/home/ada/.local/state/planner"),
        ("linux", {"XDG_STATE_HOME": "/var/ada"}, "/var/ada/planner"),
        ("linux", {"XDG_STATE_HOME": ""}, "/home/ada/.local/state/planner"),
        ("linux", {"XDG_STATE_HOME": "relative"}, "/home/ada/.local/state/planner"),
        ("darwin", {"XDG_STATE_HOME": "/var/ada"}, "/home/ada/Library/Application Support/planner"),
        ("win32", {"LOCALAPPDATA": "/c/local"}, "/c/local/planner"),
        ("win32", {}, "/home/ada/AppData/Local/planner"),
        ("linux", {"PLANNER_HOME": "/data/plans", "XDG_STATE_HOME": "/var/ada"}, "/data/plans"),
        ("darwin", {"PLANNER_HOME": "/data/plans"}, "/data/plans"),
    ],
)
def test_state_is_kept_where_the_platform_keeps_it_unless_told_otherwise(
    platform: str, environment: dict[str, str], expected: str
) -> None:
    assert state_directory(platform, environment, HOME) == Path(expected)


def test_the_default_storage_is_a_journal_in_a_directory_made_on_first_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLANNER_HOME", str(tmp_path / "not" / "yet"))
    assert default_storage_url() == f"journal:{tmp_path}/not/yet/studies.journal"
    open_storage(default_storage_url())
    assert (tmp_path / "not" / "yet" / "studies.journal").is_file()


@pytest.mark.parametrize("scheme", ["journal:", "sqlite:///"])
def test_a_study_outlives_the_storage_object_that_made_it(scheme: str, tmp_path: Path) -> None:
    url = f"{scheme}{tmp_path}/studies"
    study = optuna.create_study(study_name="gpt2", storage=open_storage(url))
    study.add_trial(optuna.trial.create_trial(value=0.25))
    assert optuna.load_study(study_name="gpt2", storage=open_storage(url)).best_value == 0.25


def refusal(url: str) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        open_storage(url)
    return str(caught.value)


@pytest.mark.parametrize("url", ["studies.db", "redis:", "", "postgresql://host:port/name"])
def test_what_is_no_url_is_refused_with_the_urls_there_are(url: str) -> None:
    assert refusal(url).startswith(
        f"A storage is sqlite:///FILE, postgresql://USER@HOST/NAME or journal:FILE, got {url!r}."
    )


def test_a_journal_needs_a_file() -> None:
    assert refusal("journal:") == "journal: needs a file, as in journal:studies.journal."


def test_a_directory_is_not_a_journal(tmp_path: Path) -> None:
    assert refusal(f"journal:{tmp_path}") == (
        f"journal:{tmp_path} does not open as a storage: Is a directory. Name another file."
    )


@pytest.mark.parametrize("content", ['{"kind": "plan"}\n', "[]\n", '{"op_code": 99}\n', "no\nno\n", "3\n"])
def test_a_file_that_is_not_a_journal_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.plan.json"
    path.write_text(content)
    assert refusal(f"journal:{path}").startswith(
        f"journal:{path} is not an Optuna journal, or a damaged one: "
    )
    assert path.read_text() == content


def test_a_database_in_a_directory_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/missing/studies.db"
    assert refusal(url).startswith(f"{url} does not open as a storage: unable to open database file.")


def test_a_file_that_is_not_a_database_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to have the header of one" * 10)
    assert "file is not a database" in refusal(f"sqlite:///{path}")


def test_a_database_of_another_optuna_is_refused_with_the_way_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    open_storage(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "studies.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
        database.commit()
    message = refusal(url)
    assert message.startswith(f"{url} was written by another version of Optuna than the one here: ")
    assert "optuna storage upgrade" in message


def test_a_database_without_a_driver_is_refused_and_its_password_kept_to_itself() -> None:
    message = refusal("nosuchdb://ada:secret@localhost/studies")
    assert message.startswith("No database driver here opens nosuchdb://ada:***@localhost/studies: ")
    assert "secret" not in message

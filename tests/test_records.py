"""Records on disk: what is written can be read, and what cannot be read is refused in one useful line."""

from __future__ import annotations

import hashlib
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta

from profiler.records import Document, Record, RecordError, decode, encode, read, sha256, write


class Cost(Record):
    seconds: float
    joules: float | None = None


class Recipe(Document, tag="recipe"):
    current_version: ClassVar[int] = 1
    schema_version: int = current_version
    name: str
    portions: Annotated[int, Meta(ge=1)]
    steps: tuple[Cost, ...] = ()
    parts: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "Tofu":
            raise ValueError("Tofu must be pressed first, got it wet.")


class Menu(Document, tag="menu"):
    current_version: ClassVar[int] = 1
    schema_version: int = current_version


SOUP = Recipe(name="soup", portions=2, steps=(Cost(seconds=0.1 + 0.2),), parts={"salt": 1e-9})

SOUP_TEXT = """\
{
  "kind": "recipe",
  "schema_version": 1,
  "name": "soup",
  "portions": 2,
  "steps": [
    {
      "seconds": 0.30000000000000004,
      "joules": null
    }
  ],
  "parts": {
    "salt": 1e-9
  }
}
"""


def refusal(data: bytes) -> str:
    with pytest.raises(RecordError) as caught:
        decode(data, Recipe, source="soup.json")
    return str(caught.value)


def test_a_document_is_written_as_readable_json_with_every_digit() -> None:
    assert encode(SOUP).decode() == SOUP_TEXT


def test_a_written_document_is_read_back_equal(tmp_path: Path) -> None:
    write(tmp_path / "soup.json", SOUP)
    assert read(tmp_path / "soup.json", Recipe) == SOUP


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers(1, 2**63))
def test_any_finite_contents_survive_the_round_trip(seconds: float, name: str, portions: int) -> None:
    document = Recipe(name=f"a {name}", portions=portions, parts={name: seconds})
    assert decode(encode(document), Recipe) == document


def test_a_whole_number_in_the_file_is_a_float_where_a_float_is_wanted() -> None:
    text = SOUP_TEXT.replace("0.30000000000000004", "3")
    assert decode(text.encode(), Recipe).steps[0].seconds == 3.0


def test_a_record_is_built_by_keyword_and_does_not_change() -> None:
    with pytest.raises(TypeError, match="positional"):
        Cost(1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="immutable"):
        SOUP.portions = 3  # type: ignore[misc]


HEAD = '{"kind": "recipe", "schema_version": 1, '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a recipe: it is empty. Make the file again."),
        ("\n", "is not a recipe: it is empty. Make the file again."),
        (SOUP_TEXT[:60], "is not a recipe: its JSON is cut short. Make the file again."),
        ("[]", "is not a recipe: expected object, got array at $."),
        ("null", "is not a recipe: expected object, got null at $."),
        ("{}", "is not a recipe: object missing required field kind at $."),
        ('{"kind": 3}', "is not a recipe: object missing required field schema_version at $."),
        ('{"kind": 3, "schema_version": 1}', "is not a recipe: expected str at $.kind."),
        ('{"kind": "menu", "schema_version": 9}', "is not a recipe: it is a menu. Give a recipe."),
        ('{"kind": "recipe"}', "is not a recipe: object missing required field schema_version at $."),
        (
            '{"kind": "recipe", "schema_version": 7, "from": "the future"}',
            "has schema_version 7, this version of planner reads up to 1. "
            "Upgrade planner or make the file again.",
        ),
        (
            '{"kind": "recipe", "schema_version": 0}',
            "is not a recipe: expected int >= 1 at $.schema_version.",
        ),
        (
            '{"kind": "recipe", "schema_version": "1", "name": "a", "portions": 1}',
            "is not a recipe: expected int, got str at $.schema_version.",
        ),
        (HEAD + '"name": "a"}', "is not a recipe: object missing required field portions at $."),
        (HEAD + '"name": "a", "portions": "2"}', "is not a recipe: expected int, got str at $.portions."),
        (HEAD + '"name": "a", "portions": true}', "is not a recipe: expected int, got bool at $.portions."),
        (HEAD + '"name": "a", "portions": 0}', "is not a recipe: expected int >= 1 at $.portions."),
        (
            HEAD + '"name": "a", "portions": 1, "spice": 1}',
            "is not a recipe: object contains unknown field spice at $.",
        ),
        (
            HEAD + '"name": "a", "portions": 1, "steps": [{"seconds": 1, "minutes": 2}]}',
            "is not a recipe: object contains unknown field minutes at $.steps[0].",
        ),
        (
            HEAD + '"name": "a", "portions": 1, "steps": [{"seconds": 1e999}]}',
            "is not a recipe: number out of range at $.steps[0].seconds.",
        ),
        (
            HEAD + '"name": "Tofu", "portions": 1}',
            "is not a recipe: Tofu must be pressed first, got it wet at $.",
        ),
        (
            '{"kind": "recipe", "x": ' + "[" * 100_000,
            "is not a recipe: its JSON is nested too deeply.",
        ),
    ],
)
def test_a_broken_document_is_refused_by_file_rule_and_field(text: str, message: str) -> None:
    assert refusal(text.encode()) == f"soup.json {message}"


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04", b"{} and more", HEAD.encode() + b'"portions": 1, "name": "\xff"}']
)
def test_what_is_not_json_is_refused_as_such(data: bytes) -> None:
    assert refusal(data).startswith("soup.json is not a recipe: it is not JSON (")


@given(st.integers(0, len(SOUP_TEXT) - 2))
@example(len(SOUP_TEXT) - 2)
def test_a_file_cut_short_anywhere_is_refused(length: int) -> None:
    assert refusal(SOUP_TEXT[:length].encode()).endswith("Make the file again.")


@given(st.binary() | st.text().map(str.encode))
@example(b'{"kind": "recipe\\u001b[2J\\nDone."}')
@example((HEAD + '"x\\u2028y": 1, "name": "a", "portions": 1}').encode())
def test_whatever_the_file_holds_the_message_is_one_printable_line(data: bytes) -> None:
    assert refusal(data).isprintable()


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "soup.json"
    with pytest.raises(RecordError) as caught:
        read(path, Recipe)
    assert str(caught.value) == f"{path} is not a recipe: there is no such file. Check the path."


def test_a_directory_is_not_a_document(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        read(tmp_path, Recipe)
    assert str(caught.value) == f"{tmp_path} is not a recipe: it is a directory. Name a file in it."


def test_a_file_that_the_system_will_not_open_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "loop.json"
    path.symlink_to(path)
    with pytest.raises(RecordError) as caught:
        read(path, Recipe)
    assert str(caught.value) == f"{path} cannot be read: Too many levels of symbolic links."


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_hold_is_refused_by_field(value: float) -> None:
    document = Recipe(name="a", portions=1, steps=(Cost(seconds=1.0), Cost(seconds=2.0, joules=value)))
    with pytest.raises(ValueError, match=r"A recipe holds finite numbers only, got .* at ") as caught:
        encode(document)
    assert str(caught.value).endswith(f"got {value} at $.steps[1].joules.")


def test_a_number_in_a_table_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"got nan at \$\.parts\.salt\."):
        encode(Recipe(name="a", portions=1, parts={"salt": math.nan}))


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "soup.json"
    write(path, SOUP)
    for wrong in (Recipe(name="a", portions=0), Recipe(name="a", portions=1, schema_version=2)):
        with pytest.raises(RecordError, match=r"^what should be written "):
            write(path, wrong)
    assert path.read_text() == SOUP_TEXT


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel stops a write that would make a file longer, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "soup.json"
    write(path, SOUP)
    more = Recipe(name="soup", portions=3)
    with pytest.raises(RecordError) as caught, files_of_at_most(40):
        write(path, more)
    assert str(caught.value) == f"{path} cannot be written: File too large."
    assert path.read_text() == SOUP_TEXT
    assert os.listdir(tmp_path) == ["soup.json"]


def test_a_write_over_a_directory_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "soup.json"
    path.mkdir()
    with pytest.raises(RecordError, match=r"soup\.json cannot be written: Is a directory\.$"):
        write(path, SOUP)
    assert os.listdir(tmp_path) == ["soup.json"]


def test_a_write_into_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"soup\.json cannot be written: No such file or directory\.$"):
        write(tmp_path / "kitchen" / "soup.json", SOUP)


def test_the_new_file_takes_the_place_of_the_old_one_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "soup.json"
    path.write_text("old")
    with path.open() as old:
        write(path, SOUP)
        assert old.read() == "old"
    assert path.read_text() == SOUP_TEXT


@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_permissions_of_any_file_the_user_makes(
    tmp_path: Path, umask: int, permissions: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "soup.json", SOUP)
    finally:
        os.umask(before)
    assert (tmp_path / "soup.json").stat().st_mode & 0o777 == permissions


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "soup.json").symlink_to("kitchen/soup.json")
    write(tmp_path / "soup.json", SOUP)
    assert (tmp_path / "soup.json").is_symlink()
    assert (tmp_path / "kitchen" / "soup.json").read_text() == SOUP_TEXT


def test_the_identity_of_a_document_is_that_of_its_file() -> None:
    assert sha256(SOUP) == hashlib.sha256(SOUP_TEXT.encode()).hexdigest()


def test_a_file_laid_out_differently_is_the_same_document() -> None:
    assert sha256(decode(SOUP_TEXT.replace("\n", "").encode(), Recipe)) == sha256(SOUP)


def test_an_int_in_a_field_of_floats_has_the_bytes_of_the_float() -> None:
    whole, point = ((Cost(seconds=value),) for value in (2, 2.0))
    assert encode(Recipe(name="a", portions=1, steps=whole)) == encode(
        Recipe(name="a", portions=1, steps=point)
    )

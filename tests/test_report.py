"""The report of a plan: what the plan file carries for it, what the page says, and how a browser shows it."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import msgspec
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from planner import charts
from planner.cost import instead
from planner.drawing import (
    BYTES,
    SECONDS,
    Box,
    Label,
    Scale,
    place_labels,
    round_step,
    span,
    stacked,
    tag,
    text_width,
    unit_for,
)
from planner.explain import answers, budget_for, explain, outcome_text
from planner.plan import Cost, Course, Plan, Stage, Weights, WhatIf, Window, load_plan
from planner.report import missing, page
from planner.search import optimize, space
from planner.study import record
from planner.what_if import what_ifs
from planner.words import of_bytes, of_seconds
from profiler import records
from profiler.profile_record import Profile
from tests import plans
from tests.plans import segment
from tests.test_cli import GPT2, refusal, run_in
from tests.test_search import GLOBAL_BATCH, random_profile
from tests.test_zero import linked

MIB = 2**20


@pytest.fixture(scope="module")
def gpt2() -> Profile:
    return records.read(GPT2, Profile)


@pytest.fixture(scope="module")
def gpt2_plan(gpt2: Profile) -> Plan:
    return optimize(gpt2, 8, 2600 * MIB)


# What a plan carries


def check_course(plan: Plan) -> None:
    """Its highest window is the predicted peak, to the byte and part by part."""
    course = plan.course
    assert course is not None
    highest = max(course.windows, key=lambda window: sum(course.bytes_by_part(window).values()))
    assert course.bytes_by_part(highest) == plan.prediction.parts.peak_memory_bytes
    assert sum(course.bytes_by_part(highest).values()) == plan.prediction.peak_memory_bytes


def test_the_highest_window_of_a_step_is_the_predicted_peak_for_every_budget(gpt2: Profile) -> None:
    front = optimize(gpt2, 8).front
    assert len(front) > 20
    for choice in front:
        budget = budget_for(choice.prediction)
        made = optimize(gpt2, 8, budget)
        check_course(made)
        assert made.course is not None
        assert all(min(made.course.bytes_by_part(window).values()) >= 0 for window in made.course.windows)


@pytest.mark.parametrize("seed", range(12))
def test_the_same_of_products_kept_and_of_processes_that_share(seed: int) -> None:
    """Random curves, whose parts may be below zero, among them plans of every kind."""
    tight = Weights(time=0.0, memory=1.0)
    for weights in (Weights(), tight):
        check_course(optimize(random_profile(seed), GLOBAL_BATCH, weights=weights))
        for zero_stage in range(4):
            made = optimize(
                linked(seed), GLOBAL_BATCH, weights=weights, world_size=2, zero_stages=(zero_stage,)
            )
            check_course(made)


def test_the_same_of_segments_inside_segments() -> None:
    profile = random_profile(25)
    made = optimize(profile, GLOBAL_BATCH, 194)
    assert max(segment.depth for segment in made.checkpoint) == 1
    check_course(made)


def test_windows_are_in_the_order_of_the_step(gpt2_plan: Plan) -> None:
    """The first micro-batch forward and backward, one that stands for the later ones, the optimizer."""
    course = gpt2_plan.course
    assert course is not None
    length = len(gpt2_plan.stages or ())
    for micro_batch in (0, 1):
        windows = [window for window in course.windows if window.micro_batch == micro_batch]
        assert [w.stage for w in windows if w.phase == "forward"] == list(range(length))
        assert [w.stage for w in windows if w.phase == "backward"] == list(reversed(range(length)))
    last = course.windows[-1]
    assert (last.phase, last.micro_batch, last.stage) == ("optimizer", None, None)


def test_stages_are_those_of_the_profile_at_the_plans_own_knobs(gpt2: Profile, gpt2_plan: Plan) -> None:
    stages, k = gpt2_plan.stages, gpt2_plan.gradient_accumulation_steps
    assert stages is not None
    assert [stage.name for stage in stages] == [stage.name for stage in gpt2.stages]
    seconds = sum(stage.forward_seconds for stage in stages) * k
    assert seconds == pytest.approx(gpt2_plan.prediction.parts.step_seconds["forward"])


def test_a_stages_backward_is_the_one_that_adds_to_gradients_only_where_there_is_one(gpt2: Profile) -> None:
    measured = gpt2.at("fp32")
    assert measured is not None
    for global_batch, field in ((2, "backward_first_seconds"), (4, "backward_later_seconds")):
        made = optimize(gpt2, global_batch, precisions=("fp32",), weights=Weights(time=1.0))
        times = next(t for t in measured.wall if t.micro_batch_size == made.micro_batch_size)
        assert (made.gradient_accumulation_steps > 1) == (field == "backward_later_seconds")
        assert [s.backward_seconds for s in made.stages or ()] == [getattr(t, field) for t in times.stages]


def test_a_plan_in_place_of_the_chosen_one_does_not_carry_its_course(gpt2_plan: Plan) -> None:
    made = instead(gpt2_plan, gpt2_plan.baselines.plain)
    assert (made.course, made.stages) == (None, None)


@pytest.fixture
def old_file(gpt2_plan: Plan, tmp_path: Path) -> Path:
    """A plan as it was written before plans carried these fields."""
    written = json.loads(records.encode(gpt2_plan))
    del written["course"], written["stages"]
    path = tmp_path / "old.plan.json"
    path.write_text(json.dumps(written))
    return path


def test_an_old_file_loads_and_its_report_says_what_is_missing(old_file: Path) -> None:
    old = load_plan(old_file)
    assert missing(old) == ("how memory runs over a step", "what each stage takes")
    said = texts(page(old))
    for what in missing(old):
        assert any(line.startswith(f"The plan file does not hold {what}:") for line in said)
    assert "window" not in "".join(classes(page(old)))


def test_a_new_file_lacks_nothing_and_says_so_nowhere(gpt2_plan: Plan, tmp_path: Path) -> None:
    made = load_plan(gpt2_plan.save(tmp_path / "a.plan.json"))
    assert made == gpt2_plan
    assert missing(made) == ()
    assert "does not hold" not in page(made)


# The page


class Reader(HTMLParser):
    """The tags, attributes and texts of a page; a tag that is not closed, or another in its place, is an error."""

    VOID = frozenset(("meta", "link", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(data.strip())


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def texts(html: str) -> list[str]:
    return read(html).texts


def classes(html: str) -> list[str]:
    return [attributes.get("class") or "" for _, attributes in read(html).found]


def everything() -> Plan:
    """A plan with all there is to show: nested and selective segments, chunks, energy, several processes."""
    made = optimize(linked(4), GLOBAL_BATCH, 10_000, world_size=2, zero_stages=(1,))
    names = [stage.name for stage in made.stages or ()]
    inner = msgspec.structs.replace(segment(names[1]), depth=1)
    selective = msgspec.structs.replace(segment(names[-2]), mode="selective")
    parts = msgspec.structs.replace(
        made.prediction.parts, step_joules={"forward": 30.0, "backward": 60.0, "host": 10.0}
    )
    return msgspec.structs.replace(
        made,
        checkpoint=(segment(names[0], names[1]), inner, selective),
        loss_chunks=4,
        prediction=msgspec.structs.replace(made.prediction, parts=parts, step_joules=100.0),
    )


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(gpt2_plan: Plan) -> None:
    for made in (gpt2_plan, everything(), plans.plan(), plans.plan(None)):
        html = page(made, TRIALS)
        reader = read(html)
        assert reader.found[0][0] == "html"
        assert not re.findall(r"https?:|//[a-z]|@import|url\(", html)
        assert [tag for tag, attributes in reader.found if "src" in attributes] == []
        assert [a["href"] for tag, a in reader.found if "href" in a] == ["data:,"]


def test_names_of_the_users_are_text_and_not_markup(gpt2_plan: Plan) -> None:
    evil = "</title><script>alert(1)</script>"
    stages = tuple(msgspec.structs.replace(stage, name=evil + stage.name) for stage in gpt2_plan.stages or ())
    checkpoint = (segment(stages[3].name, stages[5].name),)
    other = msgspec.structs.replace(gpt2_plan.front[0], fits=True, checkpoint=(segment(evil),))
    what_if = WhatIf(
        knob="precision", change=evil, memory_budget_bytes=None, world_size=1, choice=other, reason=None
    )
    unknown = msgspec.structs.replace(what_if, choice=None, reason=evil)
    made = msgspec.structs.replace(
        gpt2_plan, model=evil, stages=stages, checkpoint=checkpoint, what_ifs=(what_if, unknown),
        prediction=msgspec.structs.replace(gpt2_plan.prediction, peak_at=f"backward of {evil}"),
        device=msgspec.structs.replace(gpt2_plan.device, name=evil),
    )  # fmt: skip
    html = page(made, ((evil, cost(1.0), cost(1.0)),))
    assert html.count("<script>") == 1
    assert [tag for tag, _ in read(html).found].count("script") == 1


def test_the_head_says_the_knobs_the_numbers_with_their_errors_and_the_proof() -> None:
    said = texts(page(plans.plan(700)))
    for words in (
        "chain",
        "A (TM) CPU, 2 threads, 1.00 GiB of memory · global batch 8 · budget 700 B",
        "12.0 s", "± 5.0%", "600 B", "± 10.0%", "39 B", "it binds",
        "2, accumulated 4 times", "fp32", "sgd", "h.0 .. h.1", "2 segments of one stage",
        "1.2000 (time, over the plain plan's), proven optimal under the model (9 plans considered)",
    ):  # fmt: skip
        assert words in said


def test_a_cost_of_several_things_says_which() -> None:
    said = texts(page(plans.with_weights(time=1, memory=0.5)))
    assert any("(1 * time + 0.5 * memory, each over the plain plan's)" in line for line in said)


def test_without_a_budget_none_is_drawn_and_nothing_is_hollow() -> None:
    html = page(plans.plan(None))
    assert "no memory limit" in html
    assert not {"budget", "beyond"} & set(classes(html))
    assert not any("over" in class_.split() for class_ in classes(html))


# The front


def drawings(markup: str) -> list[Element]:
    """The drawings of a chart: the wide one and the narrow one."""
    return [svg for svg in ElementTree.fromstring(f"<p>{markup}</p>").iter("svg") if svg.get("role")]


def marked(drawing: Element, class_: str) -> list[Element]:
    return [each for each in drawing.iter() if class_ in (each.get("class") or "").split()]


def points(drawing: Element, kind: str) -> list[Element]:
    return [point for point in marked(drawing, "point") if kind in point.attrib["class"].split()]


def note(mark: Element) -> list[str]:
    return (mark.findtext("title") or "").split("\n")


def place(point: Element) -> tuple[float, float]:
    reach = marked(point, "reach")[0]
    return float(reach.attrib["cx"]), float(reach.attrib["cy"])


def test_every_plan_of_the_front_the_baselines_and_the_plan_are_points_in_both_drawings(
    gpt2_plan: Plan,
) -> None:
    """The plan is on its own front where it was made by hand, and was thinned out of GPT-2's."""
    for made, others in ((plans.plan(700), 3), (gpt2_plan, len(gpt2_plan.front))):
        for drawing in drawings(charts.front(made)):
            found = marked(drawing, "point")
            assert [note(mark)[0] for mark in found] == [
                *["on the front"] * others,
                "nothing recomputed, by hand",
                "every sqrt(L) blocks, by hand",
                "every block, by hand",
                "this plan",
            ]
            assert {mark.get("tabindex") for mark in found} == {"0"}


def test_a_point_tells_the_plan_behind_it() -> None:
    drawing, _ = drawings(charts.front(plans.plan(700)))
    assert [note(mark) for mark in points(drawing, "front")][1] == [
        "on the front",
        "peak\t800 B ± 10.0%",
        "step\t11.0 s ± 5.0%",
        "micro-batch\t2, k = 4",
        "precision\tfp32",
        "ZeRO stage\t0",
        "recomputed\th.0 (1 segment of one stage)",
        "does not fit\tneeds a budget of 881 B",
    ]
    told = note(points(drawings(charts.front(everything()))[0], "chosen")[0])
    assert {"energy\t100 J", "ZeRO stage\t1", "loss\tin 4 chunks"} <= set(told)


def test_less_memory_is_farther_left_and_a_faster_step_lower() -> None:
    """300 bytes and 15 s, 800 and 11, 1000 and 10 of the front; 600 and 12 is the plan."""
    for drawing in drawings(charts.front(plans.plan(700))):
        first, middle, last = (place(mark) for mark in points(drawing, "front"))
        (own,) = (place(mark) for mark in points(drawing, "chosen"))
        assert first[0] < own[0] < middle[0] < last[0]
        assert first[1] < own[1] < middle[1] < last[1]
        (budget,) = marked(drawing, "budget")
        # 700 of 600 to 800 bytes, to the tenth of a pixel that is written.
        assert float(budget.attrib["x1"]) == pytest.approx((own[0] + middle[0]) / 2, abs=0.1)


def test_what_does_not_fit_is_hollow_and_a_budget_far_off_is_told_instead_of_drawn() -> None:
    drawing, _ = drawings(charts.front(plans.plan(700)))
    assert [note(mark)[0] for mark in points(drawing, "over")] == [
        "on the front", "on the front", "nothing recomputed, by hand",
    ]  # fmt: skip
    far, _ = drawings(charts.front(plans.plan(100_000)))
    assert marked(far, "budget") == []
    assert "budget 97.7 KiB →" in [each.text for each in far.iter("text")]


# Memory over a step


def small_course() -> Course:
    """Two windows and the optimizer's: 100 bytes stand, and 200, 500 and 100 come and go."""

    def window(phase: str, stage: int | None, gradients: int, activations: int, working: int) -> Window:
        return Window(
            phase=phase,  # type: ignore[arg-type]
            micro_batch=None if stage is None else 0,
            stage=stage,
            gradient_bytes=gradients,
            activation_bytes=activations,
            working_bytes=working,
        )

    return Course(
        standing_bytes={"parameters": 70, "inputs": 30},
        windows=(
            window("forward", 0, 0, 150, 50),
            window("backward", 0, 100, 300, 100),
            window("optimizer", None, 100, 0, 0),
        ),
    )


def edges(path: str) -> tuple[list[float], list[float]]:
    """Of the path of an area of steps: the levels of each column's upper and lower edge."""
    levels = [float(number) for number in re.findall(r"V([\d.]+)H", path)]
    half = len(levels) // 2
    return levels[:half], levels[half:][::-1]


def test_areas_stand_one_upon_the_other_as_high_as_the_bytes_are() -> None:
    """Of 600 at the peak; the budget of 700 leaves room above."""
    for drawing in drawings(charts.memory(plans.plan(700), small_course())):
        areas = [
            (each.attrib["class"].rpartition("c-")[2], *edges(each.attrib["d"]))
            for each in marked(drawing, "area")
        ]
        assert [part for part, *_ in areas] == ["parameters", "inputs", "gradients", "activations", "working"]
        (budget,), (peak,) = marked(drawing, "budget"), marked(drawing, "peak")
        ground = float(marked(drawing, "area")[0].attrib["d"].split("V")[0].split(" ")[1])
        byte = (ground - float(peak.attrib["cy"])) / 600
        assert float(budget.attrib["y1"]) == pytest.approx(ground - 700 * byte, abs=0.2)
        expected = [(70, 70, 70), (100, 100, 100), (100, 200, 200), (250, 500, 200), (300, 600, 200)]
        below = [ground] * 3
        for (_, above, lower), sizes in zip(areas, expected, strict=True):
            assert above == pytest.approx([ground - size * byte for size in sizes], abs=0.2)
            assert lower == below
            below = above


def test_a_window_tells_what_is_alive_in_it_and_the_peak_is_named(gpt2_plan: Plan) -> None:
    course = gpt2_plan.course
    assert course is not None
    for drawing in drawings(charts.memory(gpt2_plan, course)):
        windows = marked(drawing, "window")
        assert len(windows) == len(course.windows)
        assert note(windows[0])[:2] == ["forward of transformer.wte", "of the first micro-batch"]
        assert note(windows[-1])[0] == "optimizer step"
        assert "optimizer state\t949 MiB" in note(windows[-1])
        assert "peak 2.53 GiB, backward of lm_head" in [each.text for each in drawing.iter("text")]


def test_the_windows_fill_the_drawing_from_left_to_right(gpt2_plan: Plan) -> None:
    course = gpt2_plan.course
    assert course is not None
    drawing, _ = drawings(charts.memory(gpt2_plan, course))
    places = [(float(w.attrib["x"]), float(w.attrib["width"])) for w in marked(drawing, "window")]
    for (x, width), (following, _) in itertools.pairwise(places):
        assert x + width == pytest.approx(following, abs=0.11)


# Time


def test_the_bar_is_divided_as_the_step_is() -> None:
    markup = charts.bar({"forward": 4.0, "backward": 8.0}, lambda value: f"{value:g} s", "a bar")
    (drawing,) = drawings(markup)
    assert [(m.get("x"), m.get("width"), note(m)) for m in marked(drawing, "mark")] == [
        ("0.000%", "33.333%", ["forward", "size\t4 s", "share\t33.3%"]),
        ("33.333%", "66.667%", ["backward", "size\t8 s", "share\t66.7%"]),
    ]


def test_energy_has_a_bar_only_where_it_is_known() -> None:
    assert "Where the energy goes" in texts(page(everything()))
    assert "Where the energy goes" not in texts(page(plans.plan()))


# Stages


def chain_of(count: int) -> Plan:
    """The plan made by hand on a chain of so many blocks and a head: ``h.0`` alone, ``h.1`` to ``h.3`` with ``h.2``
    inside, ``h.4`` but for its products."""
    names = [*(f"h.{number}" for number in range(count)), "head"]
    stages = tuple(
        Stage(name=name, parameter_count=1000, forward_seconds=0.25, backward_seconds=0.5, kept_bytes=2048)
        for name in names
    )
    inner = msgspec.structs.replace(segment("h.2"), depth=1)
    selective = msgspec.structs.replace(segment("h.4"), mode="selective")
    checkpoint = (segment("h.0"), segment("h.1", "h.3"), inner, selective)
    return msgspec.structs.replace(plans.plan(), stages=stages, checkpoint=checkpoint)


def test_each_stage_says_what_becomes_of_it() -> None:
    said = texts(page(chain_of(5)))
    rows = said[said.index("in this plan") + 1 :]
    numbers = ["1.00 k", "250 ms", "500 ms", "2.00 KiB"]
    told = {
        "h.0": "recomputed",
        "h.1": "recomputed",
        "h.2": "recomputed, nested 2 deep",
        "h.3": "recomputed",
        "h.4": "recomputed but for products",
        "head": "kept",
    }
    assert rows[: 6 * len(told)] == [text for name, how in told.items() for text in (name, *numbers, how)]


def test_many_stages_are_folded_into_alike_ones_with_their_sums() -> None:
    html = page(chain_of(40))
    said = texts(html)
    start = said.index("h.*")
    assert said[start : start + 7] == [
        "h.*", "\N{MULTIPLICATION SIGN} 40", "40.0 k", "10.0 s", "20.0 s", "80.0 KiB",
        "4 recomputed, 1 recomputed but for products, 35 kept",
    ]  # fmt: skip
    assert [tag for tag, _ in read(html).found].count("details") == 1
    assert all(f"h.{number}" in said for number in range(40))


# Trials


def cost(seconds: float, mib: int = 100, joules: float | None = None) -> Cost:
    return Cost(
        step_seconds=seconds,
        step_cpu_seconds=None,
        peak_memory_bytes=mib * MIB,
        peak_reserved_bytes=None,
        step_joules=joules,
    )


TRIALS = (("plain", cost(8.0, 200), cost(10.0, 200)), ("tight", cost(11.0, 105, 30.0), cost(10.0, 100)))


def test_trials_are_told_with_their_errors() -> None:
    said = texts(page(plans.plan(), TRIALS))
    assert said.count("trial") == 2  # energy was predicted once and never measured
    start = said.index("trial")
    assert said[start : start + 12] == [
        "trial", "predicted", "measured", "error",
        "plain", "8.00 s", "10.0 s", "-20.0%",
        "tight", "11.0 s", "10.0 s", "+10.0%",
    ]  # fmt: skip
    assert said[said.index("100 MiB") - 1 : said.index("100 MiB") + 2] == ["105 MiB", "100 MiB", "+5.0%"]


def test_on_the_diagonal_prediction_and_measurement_are_the_same() -> None:
    (drawing,) = drawings(
        charts.against("time", SECONDS, str, [("as said", 2.0, 2.0), ("slower", 1.0, 3.0), ("faster", 3.0, 1.0)])
    )  # fmt: skip
    (diagonal,) = marked(drawing, "diagonal")
    x1, y1, x2, y2 = (float(diagonal.attrib[name]) for name in ("x1", "y1", "x2", "y2"))

    def above(point: Element) -> float:
        x, y = place(point)
        return y1 + (x - x1) / (x2 - x1) * (y2 - y1) - y

    on, under, over = (above(point) for point in marked(drawing, "trial"))
    assert abs(on) < 0.2
    assert under < -10
    assert over > 10


def test_energy_of_trials_is_drawn_where_both_are_known() -> None:
    both = ("both", cost(1.0, joules=50.0), cost(1.0, joules=40.0))
    said = texts(page(plans.plan(), (*TRIALS, both)))
    assert said.count("trial") == 3
    assert said[-5:-1] == ["both", "50.0 J", "40.0 J", "+25.0%"]


def test_without_trials_there_is_no_place_for_them() -> None:
    assert "Predicted against measured" not in texts(page(plans.plan()))


# What would change it


@pytest.fixture(scope="module")
def asked_plan(gpt2: Profile) -> Plan:
    """A plan with what other questions would have found."""
    searched = space(gpt2, 8, 2400 * MIB)
    return msgspec.structs.replace(searched.plan(), what_ifs=what_ifs(searched, searched.plan()))


def test_each_answer_is_a_row_and_what_cannot_be_told_is_below(asked_plan: Plan) -> None:
    html = page(asked_plan)
    said = texts(html)
    more, less, *_ = answers(asked_plan) or ()
    start = said.index("256 MiB more")
    assert more.plan is not None
    assert said[start : start + 7] == [
        "256 MiB more", of_seconds(more.plan.step_seconds), f"{more.plan.relative_step_seconds:+.1%}",
        of_bytes(more.plan.peak_memory_bytes), f"{more.plan.cost:.3f}", of_seconds(more.seconds_per_gib or 0),
        outcome_text(more),
    ]  # fmt: skip
    assert not less.feasible
    assert said[start + 7 : start + 9] == ["256 MiB less", "nothing fits: the tightest needs 2.29 GiB"]
    below = said.index("What nobody can tell from the profile:")
    assert said[below + 1 : below + 3] == [
        "fp16 as well", "not profiled: planner profile --precision fp32,bf16,fp16",
    ]  # fmt: skip
    placed = [a["title"] for tag, a in read(html).found if tag == "span" and "title" in a]
    assert more.plan.checkpoint in placed


def test_where_nobody_asked_there_is_no_place_for_answers(gpt2_plan: Plan) -> None:
    assert gpt2_plan.what_ifs is None
    assert "What would change it" not in texts(page(gpt2_plan))


# Drawing


@pytest.mark.parametrize(
    ("least", "step"), [(0.3, 0.5), (0.5, 0.5), (0.011, 0.02), (1.0, 1.0), (3, 5), (7, 10), (1500, 2000)]
)
def test_steps_are_round(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)


def test_ticks_are_round_numbers_of_the_unit_at_their_places() -> None:
    scale = Scale(low=0.9 * 2**30, high=2.1 * 2**30, start=0.0, stop=120.0)
    found = [(round(place, 6), text) for place, text in scale.ticks(BYTES[0], 3)]
    assert found == [(10.0, "1.0"), (60.0, "1.5"), (110.0, "2.0")]


def test_a_unit_is_the_largest_that_counts_to_one() -> None:
    assert [unit_for(value, BYTES).name for value in (2**30, 2**30 - 1, 700, 0.5)] == [
        "GiB", "MiB", "bytes", "bytes",
    ]  # fmt: skip


def test_a_span_is_never_empty_nor_below_zero() -> None:
    assert span([10.0, 20.0], 0.1) == (9.0, 21.0)
    assert span([1.0, 100.0], 0.1)[0] == 0.0
    low, high = span([5.0], 0.1)
    assert low < 5 < high


def test_an_area_of_steps_goes_along_its_upper_edge_and_back_along_its_lower() -> None:
    assert stacked([0, 10, 20], [9, 8], [5, 4]) == (
        "M0.0 9.0V5.0H10.0V4.0H20.0V8.0H10.0V9.0H0.0Z"
    )  # fmt: skip


def test_markup_in_an_attribute_is_escaped() -> None:
    assert tag("p", class_="a", title='"<b>') == '<p class="a" title="&quot;&lt;b&gt;"></p>'


def test_labels_keep_within_the_plot_and_out_of_each_others_way() -> None:
    """Five on nearly one spot, in the upper right corner."""
    plot = Box(left=0, top=0, right=400, bottom=200)
    labels = [Label(f"label {number}", 390 - number, 5 + number) for number in range(5)]
    drawn = ElementTree.fromstring(f"<p>{place_labels(labels, [], plot)}</p>")
    boxes = []
    for each in drawn.iter("text"):
        x, y, wide = float(each.attrib["x"]), float(each.attrib["y"]), text_width(each.text or "")
        left = x if each.get("text-anchor") == "start" else x - wide
        boxes.append(Box(left=left, top=y - 11, right=left + wide, bottom=y + 4))
    assert len(boxes) == 5
    for number, box in enumerate(boxes):
        assert plot.left <= box.left < box.right <= plot.right
        assert plot.top <= box.top < box.bottom <= plot.bottom
        assert all(box.overlap(other) == 0 for other in boxes[:number])


# The command


@pytest.fixture
def plan_file(gpt2_plan: Plan, tmp_path: Path) -> Path:
    return gpt2_plan.save(tmp_path / "gpt2.plan.json")


def test_the_command_names_the_page_after_the_plan(plan_file: Path, gpt2_plan: Plan, tmp_path: Path) -> None:
    done = run_in(tmp_path, "report", plan_file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["written", "to", "gpt2.report.html"]
    assert (tmp_path / "gpt2.report.html").read_text(encoding="utf-8") == page(gpt2_plan)


def test_the_command_says_in_json_where_the_page_went_and_what_it_lacks(
    old_file: Path, tmp_path: Path
) -> None:
    done = run_in(tmp_path, "report", old_file, "-o", "here.html", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "plan_sha256": load_plan(old_file).sha256,
        "report": "here.html",
        "missing": ["how memory runs over a step", "what each stage takes"],
    }
    said = run_in(tmp_path, "report", old_file)
    assert "missing" in said.stdout
    assert "what each stage takes" in " ".join(said.stdout.split())


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2.report.html").mkdir()
    line = refusal(run_in(tmp_path, "report", plan_file), 2)
    assert "gpt2.report.html cannot be written: Is a directory. Name another file with -o." in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2.plan.json", "gpt2.report.html"]


def test_a_profile_given_for_a_plan_is_refused(tmp_path: Path) -> None:
    line = refusal(run_in(tmp_path, "report", GPT2), 2)
    assert "it is a profile. Give a plan." in line


def test_a_study_is_reported_by_its_name(asked_plan: Plan, tmp_path: Path) -> None:
    storage = f"journal:{tmp_path / 's.journal'}"
    record(asked_plan, storage, "mine")
    done = run_in(tmp_path, "report", "mine", "--storage", storage, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "plan_sha256": asked_plan.sha256, "report": "mine.report.html", "missing": [],
    }  # fmt: skip
    assert (tmp_path / "mine.report.html").read_text(encoding="utf-8") == page(asked_plan)


def test_a_name_that_is_neither_file_nor_study_is_answered_with_the_studies_there_are(
    gpt2_plan: Plan, tmp_path: Path
) -> None:
    storage = f"journal:{tmp_path / 's.journal'}"
    record(gpt2_plan, storage, "mine")
    line = refusal(run_in(tmp_path, "report", "yours", "--storage", storage), 2)
    assert line == (
        f"planner: yours is neither a plan file nor a study: there is no such file, and {storage} holds the studies "
        "mine. Give a plan file, the name of a study, or its storage with --storage.\n"
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == []


# In the browser


def show(browser: webdriver.Chrome, path: Path, width: int) -> None:
    """The page, in a window of so many pixels; the browser's own windows do not get so narrow."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


def shown_points(browser: webdriver.Chrome) -> list[WebElement]:
    """The points of the front in the drawing that the page shows at this width."""
    found = browser.find_elements(By.CSS_SELECTOR, ".mark.point.front")
    return [point for point in found if point.is_displayed()]


def tip(browser: webdriver.Chrome) -> str | None:
    """What the note says, its lines and columns joined by spaces; None where it is not shown."""
    shown = browser.find_element(By.ID, "tip")
    return " ".join(shown.text.split()) if shown.is_displayed() else None


@pytest.mark.parametrize("width", [1100, 400])
def test_pointing_at_a_plan_shows_it_and_the_page_neither_complains_nor_scrolls_sideways(
    browser: webdriver.Chrome, gpt2_plan: Plan, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "gpt2.report.html"
    path.write_text(page(gpt2_plan, TRIALS), encoding="utf-8")
    show(browser, path, width)
    assert tip(browser) is None
    points = shown_points(browser)
    assert len(points) == len(gpt2_plan.front)
    last = gpt2_plan.front[-1].prediction
    title = points[-1].find_element(By.TAG_NAME, "title")
    before = title.get_attribute("textContent")
    ActionChains(browser).scroll_to_element(points[-1]).move_to_element(points[-1]).perform()
    said = tip(browser)
    assert said is not None
    assert said.startswith("on the front peak 2.89 GiB ± 0.2% step 4.09 s ± 5.0% micro-batch 2, k = 4")
    assert "recomputed nothing does not fit" in said
    assert (round(last.peak_memory_bytes / 2**30, 2), round(last.step_seconds, 2)) == (2.89, 4.09)
    # Taken out meanwhile, so that the browser does not show it as well; then it is back.
    assert title.get_attribute("textContent") == ""
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h2")).perform()
    assert tip(browser) is None
    assert title.get_attribute("textContent") == before
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1100, 400])
def test_answers_have_room_at_every_width(
    browser: webdriver.Chrome, asked_plan: Plan, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "asked.html"
    path.write_text(page(asked_plan), encoding="utf-8")
    show(browser, path, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    rows = browser.find_elements(By.CSS_SELECTOR, ".row.answer:not(.head)")
    assert len(rows) == sum(each.plan is not None for each in answers(asked_plan) or ())
    for row in rows:
        cells = [cell.rect for cell in row.find_elements(By.TAG_NAME, "span") if cell.text]
        inside = row.rect["x"] + row.rect["width"] + 1
        assert all(cell["x"] + cell["width"] <= inside for cell in cells)
        assert len({round(cell["x"]) for cell in cells}) > 1 or len(cells) == 2


def test_the_keyboard_goes_from_plan_to_plan(
    browser: webdriver.Chrome, gpt2_plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "gpt2.report.html"
    path.write_text(page(gpt2_plan), encoding="utf-8")
    show(browser, path, 1100)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    tightest = explain(gpt2_plan).tightest
    said = tip(browser)
    assert said is not None
    assert said.startswith(f"on the front peak {tightest.peak_memory_bytes / 2**30:.2f} GiB")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert tip(browser) not in (None, said)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert tip(browser) is None


def test_long_names_fold_instead_of_making_the_page_wider(browser: webdriver.Chrome, tmp_path: Path) -> None:
    made = chain_of(40)
    long = "a" * 120
    stages = tuple(msgspec.structs.replace(s, name=f"{long}.{s.name}") for s in made.stages or ())
    checkpoint = (segment(stages[0].name, stages[3].name),)
    made = msgspec.structs.replace(made, model=long, stages=stages, checkpoint=checkpoint)
    path = tmp_path / "long.html"
    path.write_text(page(made, ((long, *TRIALS[0][1:]),)), encoding="utf-8")
    for width in (1100, 400):
        show(browser, path, width)
        for folded in browser.find_elements(By.TAG_NAME, "summary"):
            folded.click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width

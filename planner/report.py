"""A plan on one page of HTML: what was chosen, against what, and what a step of it will look like.

    head        the plan's knobs, time and peak with their stated errors, the proof
    front       peak against time: every plan of the front, what people do by hand, the budget
    what-ifs    what one thing of the question otherwise would change
    memory      what is alive in every window of a step, by part
    time        where a step's seconds go, and its joules where they are known
    stages      what each stage takes, and what becomes of it
    trials      predicted against measured, where something was

The page needs nothing but itself: planner/report.html is all of its style and script, and the drawings
(planner/charts.py) are in it. What a plan file does not hold has a line in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Literal

from msgspec import to_builtins

from planner import charts
from planner.drawing import BYTES, JOULES, SECONDS, Unit, tag
from planner.explain import Answer, alike, answers, explain, outcome_text, proof_text, segment_runs
from planner.plan import Cost, Mode, Plan, Stage, Weights
from planner.words import change, of_bytes, of_count, of_joules, of_seconds, of_source

Trial = tuple[str, Cost, Cost]
"""What was tried, in a few words; what was predicted for it and what was measured."""

LISTED = 12
"""A chain of more stages than this is shown in groups of alike ones."""

CROWDED = 120
"""In a chain of more stages than this there is no room between them."""

TREATED = {
    "kept": "kept",
    "recompute": "recomputed",
    "selective": "recomputed but for products",
    "selective_narrow": "recomputed but for narrow products",
}
"""What may become of a stage, in words."""


def page(plan: Plan, trials: Sequence[Trial] = ()) -> str:
    """The whole page, as HTML."""
    template = Template(files("planner").joinpath("report.html").read_text(encoding="utf-8"))
    title, body = escape(f"{plan.model}: training plan"), "\n".join(_sections(plan, trials))
    return template.substitute(title=title, body=body)


def missing(plan: Plan) -> tuple[str, ...]:
    """What the plan file does not hold and the page cannot show."""
    held = {"how memory runs over a step": plan.course, "what each stage takes": plan.stages}
    return tuple(what for what, value in held.items() if value is None)


def _sections(plan: Plan, trials: Sequence[Trial]) -> Iterator[str]:
    parts = plan.prediction.parts
    yield _head(plan)
    yield _section(
        "What memory buys",
        "Each mark is a plan: the farther left, the less memory it needs; the lower, the faster a step. The cross is "
        "the error to expect of this one; a plan fits when its peak with its error is within the budget. Point at a "
        "mark, or go there with the tab key, to see what it does.",
        charts.front(plan),
    )
    if (told := answers(plan)) is not None:
        yield _section(
            "What would change it",
            "The search asked again with one thing of the question otherwise: the cheapest plan then, its cost on the "
            "scale of this one. Per GiB is by how much one GiB more shortens a step, at that rate.",
            _what_ifs(told),
        )
    yield _section(
        "Memory over one step",
        "From left to right the windows of a step, a stage running forward, again or backward; each is as high as what "
        "is alive at its highest moment. The highest of all decides whether a plan fits.",
        _memory(plan),
    )
    yield _section(
        "Where the time goes",
        "The whole bar is one optimizer step; recompute is what the plan pays for memory.",
        charts.bar(parts.step_seconds, of_seconds, "The parts of a step's time"),
    )
    if parts.step_joules is not None:
        yield _section(
            "Where the energy goes",
            "The whole bar is the joules of one optimizer step, of all processes.",
            charts.bar(parts.step_joules, of_joules, "The parts of a step's energy"),
        )
    yield _section(
        "What becomes of each stage",
        "The model in the order in which it runs. Times and bytes are of one micro-batch, before anything is "
        "recomputed; the last column is what the plan does.",
        _stages(plan),
        "long",
    )
    if trials:
        yield _section(
            "Predicted against measured",
            "Each mark is a plan that was run; on the dashed line prediction and measurement are the same, above it "
            "the prediction was too high.",
            _trials(trials),
        )
    yield (
        f"<footer>Plan {plan.sha256[:12]}, from profile {plan.profile_sha256[:12]}. Sizes are binary: 1 GiB is "
        "1024 MiB.</footer>"
    )


def _section(title: str, reading: str, body: str, class_: str = "") -> str:
    opening = f'<section class="{class_}">' if class_ else "<section>"
    return f'{opening}<h2>{title}</h2><p class="reading">{reading}</p>\n{body}</section>'


def _missing(what: str) -> str:
    return (
        f'<p class="missing">The plan file does not hold {what}: an older version wrote it, or its plan took the place '
        "of the one that was found. Make it again with planner optimize.</p>"
    )


def _memory(plan: Plan) -> str:
    parts = plan.prediction.parts.peak_memory_bytes
    note = f'<p class="note">At the peak, {escape(plan.prediction.peak_at)}, there are:</p>'
    if plan.course is None:
        bar = charts.bar(parts, of_bytes, "The parts of the peak")
        return f"{_missing('how memory runs over a step')}\n{note}\n{bar}"
    from_above = {part: parts[part] for part in reversed(parts)}
    return f"{charts.memory(plan, plan.course)}\n{note}\n{charts.sizes(from_above, of_bytes)}"


# Head


def _head(plan: Plan) -> str:
    device, budget = plan.device, plan.memory_budget_bytes
    where = [
        device.name,
        *([f"{device.threads} threads"] if device.threads else []),
        f"{of_bytes(device.memory_bytes)} of memory",
        *(["planned for without having it"] if device.catalogue else []),
    ]
    within = "no memory limit" if budget is None else f"budget {of_bytes(budget)}"
    figures = "".join(
        f'<div class="figure"><span class="name">{name}</span><span class="value">{value}</span> '
        f'<span class="sure">{sure}</span></div>'
        for name, value, sure in _figures(plan)
    )
    knobs = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _knobs(plan))
    return (
        f'<header><p class="kind">Training plan</p><h1>{escape(plan.model)}</h1>\n'
        f'<p class="where">{escape(", ".join(where))} · global batch {plan.global_batch_size} · {within}</p>\n'
        f'<div class="figures">{figures}</div>\n'
        '<p class="reading">What one optimizer step is predicted to take; ± is the error to expect.</p>\n'
        f"<dl>{knobs}</dl></header>"
    )


def _figures(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """The numbers that matter most, each with its name and how sure it is."""
    predicted, error, budget = plan.prediction, plan.prediction.error, plan.memory_budget_bytes
    source = of_source(plan.time_source)
    yield "step time", of_seconds(predicted.step_seconds), f"± {error.step_seconds:.1%}{source}"
    yield "peak memory", of_bytes(predicted.peak_memory_bytes), f"± {error.peak_memory_bytes:.1%}"
    if predicted.step_joules is not None:
        sure = "at the stated watts" if error.step_joules is None else f"± {error.step_joules:.1%}"
        yield "energy", of_joules(predicted.step_joules), sure
    if budget is not None:
        why = explain(plan)
        binds = "it binds" if why.binding else "it does not bind"
        yield "left of the budget", of_bytes(budget - why.needed_bytes), binds


def _knobs(plan: Plan) -> Iterator[tuple[str, str]]:
    """The plan's decisions, as markup."""
    k = plan.gradient_accumulation_steps
    yield (
        "micro-batch",
        f"{plan.micro_batch_size}, {'not accumulated' if k == 1 else f'accumulated {k} times'}",
    )
    if plan.world_size > 1:
        yield "processes", f"{plan.world_size}, ZeRO stage {plan.zero_stage}"
    yield "precision", plan.precision
    yield "optimizer", escape(plan.optimizer)
    runs = [
        f'{escape(run.span)} <span class="shape">{escape(run.shape)}</span>'
        for run in segment_runs(plan.checkpoint)
    ]
    yield "recomputed", "<br>".join(runs) or "nothing"
    if plan.loss_chunks:
        yield "loss", f"in {plan.loss_chunks} chunks of the tokens"
    yield "peak", f"at {escape(plan.prediction.peak_at)}"
    weighed = _weighed(plan.objective.weights)
    yield "cost", f"{plan.objective.cost:.4f} ({weighed}), {proof_text(plan.objective)}"


def _weighed(weights: Weights) -> str:
    """What the cost is made of."""
    counted = [(name, weight) for name, weight in to_builtins(weights).items() if weight]
    if len(counted) == 1 and counted[0][1] == 1:
        return f"{counted[0][0]}, over the plain plan's"
    return " + ".join(f"{weight:g} * {name}" for name, weight in counted) + ", each over the plain plan's"


# What would change it


def _what_ifs(told: Sequence[Answer]) -> str:
    titles = ("step time", "", "peak", "cost", "per GiB")
    head = "".join(f'<span class="number">{title}</span>' for title in titles)
    rows = "".join(_answer(each) for each in told if each.plan is not None)
    unknown = "".join(
        f"<dt>{escape(each.change)}</dt><dd>{escape(outcome_text(each))}</dd>"
        for each in told
        if each.plan is None
    )
    note = f'<p class="note">What nobody can tell from the profile:</p><dl>{unknown}</dl>' if unknown else ""
    return (
        f'<div class="row answer head"><span class="name">with</span>{head}<span class="how">the plan would be</span>'
        f"</div>{rows}{note}"
    )


def _answer(answer: Answer) -> str:
    other, rate = answer.plan, answer.seconds_per_gib
    assert other is not None
    numbers = ("",) * 5
    if answer.feasible:
        numbers = (
            of_seconds(other.step_seconds), change(other.relative_step_seconds), of_bytes(other.peak_memory_bytes),
            f"{other.cost:.3f}", "" if rate is None else of_seconds(rate),
        )  # fmt: skip
    cells = "".join(f'<span class="number">{number}</span>' for number in numbers)
    placed = "" if other.same or not answer.feasible else f' title="{escape(other.checkpoint)}"'
    return (
        f'<div class="row answer"><span class="name">{escape(answer.change)}</span>{cells}'
        f'<span class="how"{placed}>{escape(outcome_text(answer))}</span></div>'
    )


# Stages


@dataclass(frozen=True, kw_only=True, slots=True)
class _Treatment:
    """What becomes of a stage; ``deep`` is in how many segments it lies."""

    class_: Literal["kept", Mode]
    deep: int

    @property
    def words(self) -> str:
        return TREATED[self.class_] + (f", nested {self.deep} deep" if self.deep > 1 else "")


def _treatments(plan: Plan, names: Sequence[str]) -> tuple[_Treatment, ...]:
    """What becomes of each stage of the chain."""
    position = {name: index for index, name in enumerate(names)}
    found = [_Treatment(class_="kept", deep=0)] * len(names)
    for segment in plan.checkpoint:
        for index in range(position[segment.first], position[segment.last] + 1):
            deep = max(found[index].deep, segment.depth + 1)
            found[index] = _Treatment(class_=segment.mode, deep=deep)
    return tuple(found)


def _stages(plan: Plan) -> str:
    if plan.stages is None:
        return _missing("what each stage takes")
    names = [stage.name for stage in plan.stages]
    treated = list(zip(plan.stages, _treatments(plan, names), strict=True))
    titles = "".join(
        f'<span class="number">{title}</span>'
        for title in ("parameters", "forward", "backward", "would keep")
    )
    head = f'<div class="row head"><span class="name">stage</span>{titles}<span class="how">in this plan</span></div>'
    if len(names) <= LISTED:
        rows = [_row(stage, how) for stage, how in treated]
    else:
        rows = [_group(name, [treated[index] for index in members]) for name, members in alike(names)]
    return f"{_chain(plan, treated)}\n{head}{''.join(rows)}"


def _chain(plan: Plan, treated: Sequence[tuple[Stage, _Treatment]]) -> str:
    """The stages in a row in the colours of what becomes of them, and under them the segments, a line for a depth."""
    wide = 100 / len(treated)
    position = {stage.name: index for index, (stage, _) in enumerate(treated)}

    def cell(first: int, last: int, y: float, height: float, class_: str, note: str) -> str:
        return tag(
            "rect", tag("title", escape(note)), x=f"{first * wide:.3f}%", width=f"{(last - first + 1) * wide:.3f}%",
            y=y, height=height, class_=f"mark cell filled c-{class_}",
        )  # fmt: skip

    cells = [
        cell(
            index, index, 0, 22, how.class_, f"{stage.name}\n{how.words}\nwould keep\t{of_bytes(stage.kept_bytes)}"
        )
        for index, (stage, how) in enumerate(treated)
    ]  # fmt: skip
    for segment in plan.checkpoint:
        first, last = position[segment.first], position[segment.last]
        count = "1 stage" if first == last else f"{last - first + 1} stages, to {segment.last}"
        note = f"segment from {segment.first}\n{count}"
        cells.append(cell(first, last, 26 + 9 * segment.depth, 6, segment.mode, note))
    deepest = max((segment.depth + 1 for segment in plan.checkpoint), default=0)
    drawn = tag(
        "svg", *cells, class_="crowded" if len(treated) > CROWDED else "chain", height=26 + 9 * deepest,
        role="img", aria_label="The chain of stages, and which are recomputed",
    )  # fmt: skip
    keys = "".join(
        f'<li><span class="swatch filled c-{class_}"></span>{TREATED[class_]}</li>'
        for class_ in dict.fromkeys(how.class_ for _, how in treated)
    )
    segments = "<li>the thin bars are the segments that run again as one</li>" if deepest else ""
    return f'{drawn}<ul class="keys">{keys}{segments}</ul>'


def _group(name: str, members: Sequence[tuple[Stage, _Treatment]]) -> str:
    """Alike stages: their sums, and each of them when unfolded."""
    if len(members) == 1:
        return _row(*members[0])
    stages = [stage for stage, _ in members]
    counted = Counter(how.class_ for _, how in members)
    told = [f"{count if len(counted) > 1 else 'all'} {TREATED[class_]}" for class_, count in counted.items()]
    cells = _cells(
        f'{escape(name)} <span class="count">&times; {len(members)}</span>',
        sum(stage.parameter_count for stage in stages),
        sum(stage.forward_seconds for stage in stages),
        sum(stage.backward_seconds for stage in stages),
        sum(stage.kept_bytes for stage in stages),
        list(counted),
        ", ".join(told),
    )
    rows = "".join(_row(stage, how) for stage, how in members)
    return f'<details><summary class="row">{cells}</summary>{rows}</details>'


def _row(stage: Stage, how: _Treatment) -> str:
    cells = _cells(
        escape(stage.name), stage.parameter_count, stage.forward_seconds, stage.backward_seconds,
        stage.kept_bytes, [how.class_], how.words,
    )  # fmt: skip
    return f'<div class="row">{cells}</div>'


def _cells(
    name: str, parameters: int, forward: float, backward: float, kept: int, classes: Sequence[str], words: str
) -> str:
    numbers = (of_count(parameters), of_seconds(forward), of_seconds(backward), of_bytes(kept))
    shown = "".join(f'<span class="number">{number}</span>' for number in numbers)
    swatches = "".join(f'<span class="swatch filled c-{class_}"></span>' for class_ in classes)
    return f'<span class="name">{name}</span>{shown}<span class="how">{swatches}<span>{words}</span></span>'


# Trials


def _trials(trials: Sequence[Trial]) -> str:
    """A panel for each number that was both predicted and measured in at least one trial."""
    panels = (
        _panel("step time", SECONDS, of_seconds, trials, lambda cost: cost.step_seconds),
        _panel("peak memory", BYTES, of_bytes, trials, lambda cost: cost.peak_memory_bytes),
        _panel("energy", JOULES, of_joules, trials, lambda cost: cost.step_joules),
    )
    return f'<div class="panels">{"".join(panels)}</div>'


def _panel(
    title: str, units: Sequence[Unit], written: Callable[[float], str], trials: Sequence[Trial],
    number: Callable[[Cost], float | None],
) -> str:  # fmt: skip
    known = [
        (name, before, after)
        for name, predicted, measured in trials
        if (before := number(predicted)) is not None and (after := number(measured)) is not None
    ]
    if not known:
        return ""
    head = "".join(f'<th class="number">{text}</th>' for text in ("predicted", "measured", "error"))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{written(predicted)}</td>'
        f'<td class="number">{written(measured)}</td><td class="number">{predicted / measured - 1:+.1%}</td></tr>'
        for name, predicted, measured in known
    )
    return (
        f"<div><h3>{title}</h3>{charts.against(title, units, written, known)}"
        f"<table><thead><tr><th>trial</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )

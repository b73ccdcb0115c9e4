"""The drawings of a plan: what memory buys, memory over a step, predicted against measured, bars of parts.

Each is inline SVG whose colours and lines planner/report.html gives by class. A *mark* is what one can point at: its
``<title>`` says what it is, the name in the first line and a fact in each further one, its name and value apart by a
tab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, groupby
from typing import Literal, TypeVar

from planner.drawing import (
    BYTES,
    LINE,
    SECONDS,
    Box,
    Frame,
    Label,
    Scale,
    Unit,
    label,
    place_labels,
    span,
    stacked,
    tag,
    text_width,
    unit_for,
)
from planner.explain import budget_for, chosen, segment_runs
from planner.plan import Choice, Course, Plan, Prediction, Window
from planner.words import BASELINES, NEGLIGIBLE, of_bytes, of_joules, of_seconds

WIDE, NARROW = 980.0, 352.0
"""The widths, in pixels, that charts are drawn for."""

BEYOND = 1.4
"""A budget above this many times the largest peak is told, not drawn: it would push the rest into a corner."""

RUNS_TOLD = 5
"""How many runs of segments the note on a mark tells."""

MARKS = {
    "chosen": "this plan",
    "front": "on the front",
    "hand": "what people do by hand",
    "front over": "hollow: does not fit",
}
"""What the marks of the front are, by how they are drawn."""

PARTS = frozenset(
    ("parameters", "buffers", "optimizer_state", "parameter_copies", "inputs", "gradients", "activations", "working",
     "forward", "backward", "recompute", "optimizer", "host", "communication")
)  # fmt: skip
"""The parts that have a colour of their own."""

Value = TypeVar("Value")


def colour(part: str) -> str:
    """The class that colours a part."""
    return f"c-{part}" if part in PARTS else "c-other"


def in_words(part: str) -> str:
    """A part's name as people write it."""
    return part.replace("_", " ")


def _in_two_widths(draw: Callable[[float], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div>\n<div class="narrow">{draw(NARROW)}</div>'


def _dot(class_: str, x: float, y: float) -> str:
    if class_.startswith("hand"):
        return tag("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6Z", class_="dot")
    return tag("circle", cx=x, cy=y, r=7.0 if class_ == "chosen" else 4.5, class_="dot")


def _point(note: str, x: float, y: float, class_: str) -> str:
    """A mark at a place, larger to the pointer than to the eye."""
    return tag(
        "g", tag("title", escape(note)), tag("circle", cx=x, cy=y, r=10.0, class_="reach"), _dot(class_, x, y),
        class_=f"mark point {class_}", tabindex="0", role="img",
    )  # fmt: skip


def _line(between: Box, class_: str) -> str:
    return tag("line", x1=between.left, y1=between.top, x2=between.right, y2=between.bottom, class_=class_)


def _budget_drawn(plan: Plan, largest_peak_bytes: int) -> int | None:
    """The budget, where it is near enough to what it limits."""
    budget = plan.memory_budget_bytes
    return None if budget is None or budget > BEYOND * largest_peak_bytes else budget


# The front


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """A plan in the drawing."""

    name: str
    kind: Literal["front", "hand", "chosen"]
    choice: Choice

    @property
    def class_(self) -> str:
        """How it is drawn."""
        return self.kind if self.choice.fits else f"{self.kind} over"


def front(plan: Plan) -> str:
    """Peak memory against step time: the plan, its front, what people do by hand, and the budget."""
    drawn = {mark.class_ for mark in _marks(plan)}
    keys = "".join(
        f'<li><svg viewBox="0 0 16 16" aria-hidden="true"><g class="{class_}">{_dot(class_, 8, 8)}</g></svg>{text}</li>'
        for class_, text in MARKS.items()
        if class_ != "front over" or class_ in drawn
    )
    return f'{_in_two_widths(lambda width: _front_at(plan, width))}\n<ul class="keys">{keys}</ul>'


def _marks(plan: Plan) -> list[_Mark]:
    """The front, then what people do by hand, then the plan: what is drawn later lies above."""
    own, baselines = chosen(plan), plan.baselines
    by_hand = zip(BASELINES.values(), (baselines.plain, baselines.sqrt, baselines.every_block), strict=True)
    return [
        *(
            _Mark(name="on the front", kind="front", choice=choice)
            for choice in plan.front
            if _knobs_of(choice) != _knobs_of(own)
        ),
        *(_Mark(name=f"{name}, by hand", kind="hand", choice=choice) for name, choice in by_hand),
        _Mark(name="this plan", kind="chosen", choice=own),
    ]


def _knobs_of(choice: Choice) -> tuple[object, ...]:
    return (
        choice.micro_batch_size, choice.gradient_accumulation_steps, choice.precision, choice.zero_stage,
        choice.loss_chunks, choice.checkpoint,
    )  # fmt: skip


def _front_at(plan: Plan, width: float) -> str:
    marks = _marks(plan)
    frame = Frame.of(width, 430 if width == WIDE else 380, left=44, bottom=3 * LINE)
    plot = frame.plot
    peaks = [mark.choice.prediction.peak_memory_bytes for mark in marks]
    budget = _budget_drawn(plan, max(peaks))
    across = frame.across(*span([*peaks, *([budget] if budget else [])], 0.05))
    upwards = frame.upwards(*span([mark.choice.prediction.step_seconds for mark in marks], 0.08))
    placed = [
        (mark, across.at(mark.choice.prediction.peak_memory_bytes), upwards.at(mark.choice.prediction.step_seconds))
        for mark in marks
    ]  # fmt: skip
    stairs = _stairs([(x, y) for mark, x, y in placed if mark.kind != "hand"])
    whiskers = _whiskers(plan.prediction, across, upwards, plot)
    taken = [line.grown(2) for line in (*stairs, *whiskers)]
    taken += [Box(left=x, top=y, right=x, bottom=y).grown(7) for _, x, y in placed]
    if budget:
        x = across.at(budget)
        taken.append(Box(left=x, top=plot.top, right=x, bottom=plot.bottom).grown(2))
    names = [
        Label(mark.name.removesuffix(", by hand"), x, y, mark.kind, bold=mark.kind == "chosen")
        for mark, x, y in reversed(placed)
        if mark.kind != "front"
    ]
    return frame.drawn(
        _beyond(across.at(budget), plot) if budget else "",
        frame.vertical_axis(upwards, unit_for(upwards.high, SECONDS), "step time"),
        frame.horizontal_axis(across, unit_for(across.high, BYTES), "peak memory"),
        _budget_upright(plan, across.at(budget) if budget else None, plot),
        *(_line(line, "stairs") for line in stairs),
        *(_line(line, "whisker") for line in whiskers),
        *(_point(_note(plan, mark), x, y, mark.class_) for mark, x, y in placed),
        place_labels(names, taken, plot),
        says="Step time against peak memory of every plan in the file",
    )


def _beyond(x: float, plot: Box) -> str:
    return tag("rect", x=x, y=plot.top, width=plot.right - x, height=plot.bottom - plot.top, class_="beyond")


def _budget_upright(plan: Plan, x: float | None, plot: Box) -> str:
    """The budget as an upright line with its name above it; in words where it lies too far to the right."""
    if plan.memory_budget_bytes is None:
        return ""
    text = f"budget {of_bytes(plan.memory_budget_bytes)}"
    if x is None:
        return label(f"{text} →", plot.right, plot.top - 6, "strong", "end")
    anchor = "end" if x > (plot.left + plot.right) / 2 else "start"
    upright = Box(left=x, top=plot.top, right=x, bottom=plot.bottom)
    return _line(upright, "budget") + label(text, x, plot.top - 6, "strong", anchor)


def _stairs(places: Sequence[tuple[float, float]]) -> list[Box]:
    """The fastest plan for any memory: lines from plan to faster plan, and down at the peak that it needs."""
    lines: list[Box] = []
    before: tuple[float, float] | None = None
    for x, y in sorted(places):
        if before is None or y > before[1]:
            if before is not None:
                lines.append(Box(left=before[0], top=before[1], right=x, bottom=before[1]))
                lines.append(Box(left=x, top=before[1], right=x, bottom=y))
            before = (x, y)
    return lines


def _whiskers(predicted: Prediction, across: Scale, upwards: Scale, plot: Box) -> list[Box]:
    """How far off the plan's peak and time may be, by the errors that it states."""
    peak, seconds, error = predicted.peak_memory_bytes, predicted.step_seconds, predicted.error
    x, y = across.at(peak), upwards.at(seconds)
    far = across.at(peak * (1 + error.peak_memory_bytes)) - x
    high = y - upwards.at(seconds * (1 + error.step_seconds))
    return [
        Box(left=max(plot.left, x - far), top=y, right=min(plot.right, x + far), bottom=y),
        Box(left=x, top=max(plot.top, y - high), right=x, bottom=min(plot.bottom, y + high)),
    ]


def _note(plan: Plan, mark: _Mark) -> str:
    """What a plan does and what it is predicted to take."""
    choice, predicted = mark.choice, mark.choice.prediction
    runs = [f"{run.span} ({run.shape})" for run in segment_runs(choice.checkpoint)]
    if len(runs) > RUNS_TOLD:
        runs[RUNS_TOLD:] = [f"and {len(runs) - RUNS_TOLD} more runs of segments"]
    lines = [
        mark.name,
        f"peak\t{of_bytes(predicted.peak_memory_bytes)} ± {predicted.error.peak_memory_bytes:.1%}",
        f"step\t{of_seconds(predicted.step_seconds)} ± {predicted.error.step_seconds:.1%}",
        *([] if predicted.step_joules is None else [f"energy\t{of_joules(predicted.step_joules)}"]),
        f"micro-batch\t{choice.micro_batch_size}, k = {choice.gradient_accumulation_steps}",
        f"precision\t{choice.precision}",
        f"ZeRO stage\t{choice.zero_stage}",
        f"recomputed\t{'; '.join(runs) or 'nothing'}",
        *([f"loss\tin {choice.loss_chunks} chunks"] if choice.loss_chunks else []),
    ]
    if not choice.fits and plan.memory_budget_bytes is not None:
        lines.append(f"does not fit\tneeds a budget of {of_bytes(budget_for(predicted))}")
    return "\n".join(lines)


# Memory over a step


def memory(plan: Plan, course: Course) -> str:
    """What is alive in every window of a step, by part, with the peak and the budget."""
    phases = dict.fromkeys(window.phase for window in course.windows)
    keys = "".join(f'<li><span class="swatch filled {colour(phase)}"></span>{phase}</li>' for phase in phases)
    chart = _in_two_widths(lambda width: _memory_at(plan, course, width))
    return f'{chart}\n<ul class="keys">{keys}</ul>'


def _memory_at(plan: Plan, course: Course, width: float) -> str:
    windows = course.windows
    amounts = [course.bytes_by_part(window) for window in windows]
    totals = [sum(amount.values()) for amount in amounts]
    frame = Frame.of(width, 400 if width == WIDE else 340, left=44, bottom=3 * LINE)
    plot = frame.plot
    budget = _budget_drawn(plan, max(totals))
    top = max(*totals, budget or 0)
    upwards = frame.upwards(0.0, top * (1 + 1.4 * LINE / (plot.bottom - plot.top)))
    edges = _edges(windows, plot)
    highest = totals.index(max(totals))
    x = (edges[highest] + edges[highest + 1]) / 2
    return frame.drawn(
        frame.vertical_axis(upwards, unit_for(top, BYTES), "alive"),
        *_areas(amounts, edges, upwards),
        *_phases(windows, edges, plot),
        *_micro_batches(plan, windows, edges, plot),
        *(
            tag("rect", tag("title", escape(_window_note(plan, window, amount))), x=left, y=plot.top,
                width=right - left, height=plot.bottom - plot.top, class_="mark window")
            for window, amount, left, right in zip(windows, amounts, edges, edges[1:], strict=False)
        ),
        _budget_level(plan, upwards.at(budget) if budget else None, plot, right=x < (plot.left + plot.right) / 2),
        _peak(plan, x, upwards.at(totals[highest]), frame),
        says="What is alive in every window of a step, by part",
    )  # fmt: skip


def _edges(windows: Sequence[Window], plot: Box) -> list[float]:
    """Where each window begins, and the last ends: all alike wide, but the optimizer's wide enough to be seen."""
    shares = [max(1.0, len(windows) / 18) if window.phase == "optimizer" else 1.0 for window in windows]
    wide = (plot.right - plot.left) / sum(shares)
    return [plot.left + wide * before for before in accumulate(shares, initial=0.0)]


def _areas(amounts: Sequence[dict[str, int]], edges: Sequence[float], upwards: Scale) -> Iterator[str]:
    """The parts one upon the other."""
    below = [upwards.at(0.0)] * len(amounts)
    levels = [list(accumulate(amount.values())) for amount in amounts]
    for number, part in enumerate(amounts[0]):
        above = [upwards.at(level[number]) for level in levels]
        if any(amount[part] for amount in amounts):
            yield tag("path", d=stacked(edges, below, above), class_=f"area filled {colour(part)}")
        below = above


def _phases(windows: Sequence[Window], edges: Sequence[float], plot: Box) -> Iterator[str]:
    """Beneath the areas, in colours, what each window does."""
    for phase, run in _runs([window.phase for window in windows]):
        left, right = edges[run.start], edges[run.stop]
        yield tag(
            "rect", x=left, y=plot.bottom + 5, width=right - left, height=8, class_=f"filled {colour(phase)}"
        )


def _micro_batches(plan: Plan, windows: Sequence[Window], edges: Sequence[float], plot: Box) -> Iterator[str]:
    """Beneath that, which micro-batch a window belongs to, where there is room to say so."""
    later = plan.gradient_accumulation_steps - 1
    names = {
        0: "the first micro-batch" if later else "the micro-batch",
        1: "the second micro-batch" if later == 1 else f"each of {later} later ones",
        None: "update",
    }
    for micro_batch, run in _runs([window.micro_batch for window in windows]):
        left, right = edges[run.start], edges[run.stop]
        if run.start:
            yield _line(Box(left=left, top=plot.top, right=left, bottom=plot.bottom + 17), "split")
        if text_width(names[micro_batch]) <= right - left + 12:
            yield label(names[micro_batch], (left + right) / 2, plot.bottom + 15 + LINE, anchor="middle")


def _runs(values: Sequence[Value]) -> Iterator[tuple[Value, range]]:
    """Each value that follows on another, and from where to where it stays."""
    start = 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        yield value, range(start, stop)
        start = stop


def _budget_level(plan: Plan, y: float | None, plot: Box, *, right: bool) -> str:
    """The budget as a level line, with its name at the right or left; in words where it lies too far above."""
    if plan.memory_budget_bytes is None:
        return ""
    text = f"budget {of_bytes(plan.memory_budget_bytes)}"
    x, anchor = (plot.right - 4, "end") if right else (plot.left + 4, "start")
    if y is None:
        return label(f"{text} ↑", x, plot.top + LINE - 4, "strong", anchor)
    level = Box(left=plot.left, top=y, right=plot.right, bottom=y)
    return _line(level, "budget") + label(text, x, y - 5, "strong", anchor)


def _peak(plan: Plan, x: float, y: float, frame: Frame) -> str:
    """The highest moment: a point, its name in the line above the plot, and what joins them."""
    predicted, plot = plan.prediction, frame.plot
    size = f"peak {of_bytes(predicted.peak_memory_bytes)}"
    text = f"{size}, {predicted.peak_at}"
    if text_width(text, bold=True) > frame.width:
        text = size
    half = text_width(text, bold=True) / 2
    return (
        _line(Box(left=x, top=plot.top - 2, right=x, bottom=y), "leader")
        + tag("circle", cx=x, cy=y, r=4.5, class_="peak")
        + label(text, min(max(x, half), frame.width - half), plot.top - 6, "strong", "middle")
    )


def _window_note(plan: Plan, window: Window, amount: dict[str, int]) -> str:
    """What happens in a window, and what is alive in it."""
    whole = sum(amount.values())
    title = ["optimizer step"]
    if window.stage is not None:
        name = f"stage {window.stage}" if plan.stages is None else plan.stages[window.stage].name
        which = "of a later micro-batch" if window.micro_batch else "of the first micro-batch"
        title = [f"{window.phase} of {name}", which]
    return "\n".join([*title, f"in all\t{of_bytes(whole)}", *_told(amount, whole)])


def _told(amount: dict[str, int], whole: int) -> Iterator[str]:
    for part, value in reversed(amount.items()):
        if abs(value) >= NEGLIGIBLE * whole:
            yield f"{in_words(part)}\t{of_bytes(value)}"


# Bars


def bar(parts: dict[str, float] | dict[str, int], written: Callable[[float], str], says: str) -> str:
    """One bar as long as the page is wide, divided as the whole is, and what its parts are."""
    whole, left, drawn = sum(parts.values()), 0.0, []
    for part, value in parts.items():
        share = 100 * value / whole
        note = f"{in_words(part)}\nsize\t{written(value)}\nshare\t{share:.1f}%"
        drawn.append(
            tag("rect", tag("title", escape(note)), x=f"{left:.3f}%", y=0, width=f"{share:.3f}%", height="100%",
                class_=f"mark filled {colour(part)}")
        )  # fmt: skip
        left += share
    return tag("svg", *drawn, class_="bar", role="img", aria_label=says) + sizes(parts, written)


def sizes(parts: dict[str, float] | dict[str, int], written: Callable[[float], str]) -> str:
    """What each colour is, its size and its share."""
    whole = sum(parts.values())
    rows = "".join(
        f'<li><span class="swatch filled {colour(part)}"></span><span>{escape(in_words(part))}</span>'
        f'<span class="number">{written(value)}</span><span class="number share">{value / whole:.1%}</span></li>'
        for part, value in parts.items()
        if value >= NEGLIGIBLE * whole
    )
    return f'<ul class="sizes">{rows}</ul>'


# Trials


def against(
    title: str, units: Sequence[Unit], written: Callable[[float], str], trials: Sequence[tuple[str, float, float]]
) -> str:  # fmt: skip
    """Predicted against measured, of ``(label, predicted, measured)``; on the diagonal both are the same."""
    frame = Frame.of(340, 300, left=44, bottom=3 * LINE)
    low, high = span([value for _, *values in trials for value in values], 0.08)
    across, upwards, unit, plot = (
        frame.across(low, high),
        frame.upwards(low, high),
        unit_for(high, units),
        frame.plot,
    )
    return frame.drawn(
        frame.vertical_axis(upwards, unit, f"predicted {title}"),
        frame.horizontal_axis(across, unit, f"measured {title}"),
        tag("line", x1=plot.left, y1=plot.bottom, x2=plot.right, y2=plot.top, class_="diagonal"),
        *(
            _point(
                f"{name}\npredicted\t{written(predicted)}\nmeasured\t{written(measured)}\n"
                f"error\t{predicted / measured - 1:+.1%}",
                across.at(measured), upwards.at(predicted), "trial",
            )
            for name, predicted, measured in trials
        ),
        says=f"Predicted against measured {title}",
    )  # fmt: skip

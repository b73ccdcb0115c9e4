"""What a chart is made of: markup, scales with round ticks, labels that keep out of each other's way.

An inline SVG is drawn for one width in pixels. Letters in it grow and shrink with the picture, so a chart is drawn
twice, once for a wide page and once for a narrow one, and the page shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

LETTER, BOLD_LETTER = 6.2, 7.4
"""The width, in pixels, that a letter of a label takes on average in a wide font."""

LINE = 15.0
"""The height of a line of labels, in pixels."""


def tag(name: str, *inside: str, **attributes: str | float) -> str:
    """An element. ``inside`` is markup; attributes are escaped, ``class_`` is class and ``aria_label`` aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(inside)}</{name}>"


def _attribute(value: str | float) -> str:
    """Pixels to a tenth."""
    return escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def label(text: str, x: float, y: float, class_: str = "", anchor: str = "start") -> str:
    """A line of text that begins, ends or has its middle at a place."""
    return tag("text", escape(text), x=x, y=y, class_=f"label {class_}".strip(), text_anchor=anchor)


def text_width(text: str, *, bold: bool = False) -> float:
    """About how wide a label gets, in pixels: rather too much than too little."""
    return (BOLD_LETTER if bold else LETTER) * len(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A part of a drawing, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def grown(self, by: float) -> Box:
        """The same, larger on all sides."""
        return Box(left=self.left - by, top=self.top - by, right=self.right + by, bottom=self.bottom + by)

    def overlap(self, other: Box) -> float:
        """The area that two boxes share."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What the numbers along an axis count."""

    name: str
    size: float


BYTES = tuple(
    Unit(name=name, size=2.0**power) for name, power in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("bytes", 0))
)
SECONDS = tuple(Unit(name=name, size=size) for name, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))
JOULES = tuple(Unit(name=name, size=size) for name, size in (("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3)))


def unit_for(largest: float, units: Sequence[Unit]) -> Unit:
    """The unit in which the largest number of an axis is at least one, or the smallest unit."""
    return next((unit for unit in units if largest >= unit.size), units[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """From a value to its place along an axis; ``start`` and ``stop`` are where ``low`` and ``high`` lie, in pixels."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, unit: Unit, most: int) -> Iterator[tuple[float, str]]:
        """About so many round numbers of the unit, each with its place: steps of 1, 2 or 5 and zeros."""
        low, high = self.low / unit.size, self.high / unit.size
        step = round_step((high - low) / most)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
            yield self.at(count * step * unit.size), f"{count * step:,.{decimals}f}"


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 .. (and 0.1, 0.2, 0.5 ..) that is not less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def span(values: Iterable[float], room: float) -> tuple[float, float]:
    """From the least to the largest, and at both ends ``room`` as a share of that; never below zero, never empty."""
    found = list(values)
    low, high = min(found), max(found)
    if low == high:
        low, high = 0.9 * low, 1.1 * high or 1.0
    beyond = room * (high - low)
    return max(0.0, low - beyond), high + beyond


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The plot of a chart of so many pixels: inside of it is data, around it are the axes and their titles."""

    width: float
    height: float
    plot: Box

    @classmethod
    def of(cls, width: float, height: float, *, left: float, bottom: float) -> Frame:
        """Above the plot there is room for two lines, the axis title and a label."""
        return cls(
            width=width,
            height=height,
            plot=Box(left=left, top=2 * LINE + 8, right=width - 14, bottom=height - bottom),
        )

    def across(self, low: float, high: float) -> Scale:
        """The horizontal scale."""
        return Scale(low=low, high=high, start=self.plot.left, stop=self.plot.right)

    def upwards(self, low: float, high: float) -> Scale:
        """The vertical scale."""
        return Scale(low=low, high=high, start=self.plot.bottom, stop=self.plot.top)

    def vertical_axis(self, scale: Scale, unit: Unit, title: str) -> str:
        """Its title, its numbers and a faint line for each."""
        parts = [label(f"{title}, {unit.name}", 0, LINE, "title")]
        for y, text in scale.ticks(unit, 5):
            parts.append(tag("line", x1=self.plot.left, x2=self.plot.right, y1=y, y2=y, class_="grid"))
            parts.append(label(text, self.plot.left - 8, y + 4, anchor="end"))
        return "".join(parts)

    def horizontal_axis(self, scale: Scale, unit: Unit, title: str) -> str:
        """A line with its numbers under it, and its title under them."""
        plot = self.plot
        parts = [tag("line", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom, class_="axis")]
        for x, text in scale.ticks(unit, round((plot.right - plot.left) / 80)):
            parts.append(tag("line", x1=x, x2=x, y1=plot.bottom, y2=plot.bottom + 4, class_="axis"))
            parts.append(label(text, x, plot.bottom + 4 + LINE, anchor="middle"))
        parts.append(label(f"{title}, {unit.name}", plot.right, plot.bottom + 6 + 2 * LINE, "title", "end"))
        return "".join(parts)

    def drawn(self, *parts: str, says: str) -> str:
        """The chart; ``says``: what it shows, for who does not see it."""
        return tag(
            "svg", *parts, viewBox=f"0 0 {self.width:g} {self.height:g}", role="group", aria_label=says,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Label:
    """What to write beside a place."""

    text: str
    x: float
    y: float
    class_: str = ""
    bold: bool = False


def place_labels(labels: Sequence[Label], taken: Sequence[Box], plot: Box) -> str:
    """Each label near its place, where it covers least of what is drawn and of the labels before it."""
    occupied, written = list(taken), []
    for wanted in labels:
        spots = list(_spots(wanted, plot))
        covered = [sum(box.overlap(other) for other in occupied) for box in spots]
        box = spots[covered.index(min(covered))]
        occupied.append(box)
        anchor, x = (
            ("start", box.left)
            if box.left in (plot.left, wanted.x) or box.left > wanted.x
            else ("end", box.right)
        )
        written.append(label(wanted.text, x, box.bottom - 4, wanted.class_, anchor))
    return "".join(written)


def _spots(wanted: Label, plot: Box) -> Iterator[Box]:
    """Where a label may stand within the plot, the best first: beside its place, above, below, and farther away."""
    width = text_width(wanted.text, bold=wanted.bold)
    for away in (10.0, 18.0, 28.0, 42.0):
        for turn in (0.0, 0.5, -0.5, 1.0, -1.0):
            for side in (1, -1):
                x = wanted.x + side * away * (1 - abs(turn)) - (0 if side == 1 else width)
                y = wanted.y + away * turn * 1.3
                left = max(plot.left, min(x, plot.right - width))
                bottom = max(plot.top + LINE, min(y + LINE / 2, plot.bottom - 2))
                yield Box(left=left, top=bottom - LINE, right=left + width, bottom=bottom)


def stacked(edges: Sequence[float], below: Sequence[float], above: Sequence[float]) -> str:
    """The path of an area of steps: column n from ``edges[n]`` to the next, from ``below[n]`` up to ``above[n]``."""
    columns = range(len(above))
    top = "".join(f"V{above[n]:.1f}H{edges[n + 1]:.1f}" for n in columns)
    bottom = "".join(f"V{below[n]:.1f}H{edges[n]:.1f}" for n in reversed(columns))
    return f"M{edges[0]:.1f} {below[0]:.1f}{top}{bottom}Z"

"""The picture of a plan's memory over one step, beside the plain plan's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
PLAIN_COLOUR, PLAN_COLOUR, BUDGET_COLOUR = "#9aa5b1", "#0b6e4f", "#c1121f"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCourse:
    """Live tensor bytes over one measured step, and the peak that was predicted for it."""

    label: str
    curve: Sequence[tuple[float, int]]
    predicted_peak_bytes: int


def draw_memory(
    plain: MemoryCourse, plan: MemoryCourse, budget_bytes: int | None, title: str, path: Path
) -> None:
    """Write the picture as PNG: two measured curves, their predicted peaks, the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), dpi=120)
    for course, colour in ((plain, PLAIN_COLOUR), (plan, PLAN_COLOUR)):
        shares = [100 * share for share, _ in course.curve]
        axes.plot(
            shares, [size / MIB for _, size in course.curve], color=colour, linewidth=1.6, label=course.label
        )
        axes.axhline(course.predicted_peak_bytes / MIB, color=colour, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate(
            f"predicted {course.predicted_peak_bytes / MIB:,.0f}",
            (100, course.predicted_peak_bytes / MIB),
            xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8, color=colour,
        )  # fmt: skip
    if budget_bytes is not None:
        axes.axhline(budget_bytes / MIB, color=BUDGET_COLOUR, linewidth=1.2)
        axes.annotate(
            f"budget {budget_bytes / MIB:,.0f}",
            (0, budget_bytes / MIB),
            xytext=(2, 3), textcoords="offset points", ha="left", fontsize=8, color=BUDGET_COLOUR,
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("one optimizer step, % of its allocations and frees")
    axes.set_ylabel("live tensor memory, MiB")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)

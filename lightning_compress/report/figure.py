"""The picture of the report: one small panel a quantity, one bar or dot a model, each with its number beside it.

Panels are separate pictures: on a narrow screen they go below one another and stay readable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Rectangle

from lightning_compress.report import units
from lightning_compress.report.cells import metric_names
from lightning_compress.report.directions import Mode, direction
from lightning_compress.report.drawing import FONT, PAGE, PLAIN, canvas, fitting, svg, text_width
from lightning_compress.report.table import Report, Row

_WIDTH, _ROW, _BAR = 340, 46, 14  # pixels: a panel's width, one model's height, a bar's height
_GAP = 10  # pixels: the least room between a name and its number
_ALIKE, _FAR = 0.005, 5.0  # a relative difference that is none to be seen; how far off an axis is left, in its lengths
_METRICS = 4  # panels of metrics; the table has them all


class Mark(NamedTuple):
    """One model in one panel.

    Attributes:
        name: The model.
        label: The number, as text.
        value: Where the bar or dot ends; ``None`` where nothing was measured.
        inner: A second, thin bar inside the first.
        spread: Length of the whisker around the end.
    """

    name: str
    label: str
    value: float | None
    inner: float | None = None
    spread: float = 0.0


class Panel(NamedTuple):
    """One small picture: its title, what its marks mean, and the SVG element."""

    title: str
    legend: str
    svg: str


def panels(report: Report) -> list[Panel]:
    """Draw size, latency and metrics.

    Args:
        report: What was measured.

    Returns:
        One panel for each quantity that at least one row has.

    Example:
        >>> from lightning_compress.report.table import Row
        >>> drawn = panels(Report(rows=(Row("before", bytes=4000), Row("after", bytes=1000))))
        >>> drawn[0].title, drawn[0].svg[:4]
        ('Size', '<svg')
    """
    drawn = [
        bars("Size", "Thin bar: after deflate. Shorter is smaller.", _size_marks(report)),
        bars("Latency", _latency_legend(report), _latency_marks(report)),
    ]
    for name in metric_names(report)[:_METRICS]:
        marks = [Mark(row.name, units.metric(row.metrics.get(name)), row.metrics.get(name)) for row in report.rows]
        off = _far_off(marks, direction(name))
        but = "" if off is None else ", but for 'before', which is far off"
        legend = f"From the validation; the axis spans the values shown{but}."
        drawn.append(bars(name, legend, marks, dots=True, off=off))
    return [panel for panel in drawn if panel is not None]


def _far_off(marks: Sequence[Mark], mode: Mode | None) -> Mark | None:
    """A network with random weights: worse than the others, so far that they would be one dot beside it."""
    before = next((mark for mark in marks if mark.name == "before"), None)
    values, own = _finite(mark for mark in marks if mark is not before), _finite([before] if before else [])
    if not own or not values or mode is None:
        return None
    low, high = min(values), max(values)
    beyond = low - own[0] if mode == "max" else own[0] - high
    differ = high - low > _ALIKE * max(abs(low), abs(high))  # else they should look alike
    return before if differ and beyond > _FAR * (high - low) else None


def _finite(marks: Iterable[Mark]) -> list[float]:
    """The values that have a place."""
    return [mark.value for mark in marks if mark.value is not None and math.isfinite(mark.value)]


def _size_marks(report: Report) -> list[Mark]:
    return [
        Mark(
            row.name,
            units.size(row.bytes)
            + (f" (deflated {units.size(row.bytes_compressed)})" if row.bytes_compressed is not None else ""),
            row.bytes,
            inner=row.bytes_compressed,
        )
        for row in _measured(report)
    ]


def _latency_marks(report: Report) -> list[Mark]:
    return [
        Mark(row.name, units.MISSING, None)
        if row.latency_ms is None
        else Mark(
            row.name,
            f"{units.milliseconds(row.latency_ms.median)} in {row.latency_ms.runtime}",
            row.latency_ms.median,
            spread=row.latency_ms.spread,
        )
        for row in _measured(report)
    ]


def _measured(report: Report) -> list[Row]:
    """The rows that have more than metrics."""
    return [row for row in report.rows if row.bytes is not None or row.latency_ms is not None]


def _latency_legend(report: Report) -> str:
    batches = sorted({row.latency_ms.batch for row in report.rows if row.latency_ms is not None})
    return f"Median of interleaved calls, batch {', '.join(map(str, batches))}; whisker: interquartile range."


def bars(
    title: str,
    legend: str,
    marks: Sequence[Mark],
    *,
    dots: bool = False,
    first_is_base: bool = True,
    off: Mark | None = None,
) -> Panel | None:
    """Draw one panel.

    Args:
        title: Above it.
        legend: What its marks mean.
        marks: One a line.
        dots: Draw dots between the smallest and the largest value, instead of bars from zero.
        first_is_base: Whether the first is what the others are compared with; it has another colour.
        off: One of the dots that lies off the axis: a ring at its end.

    Returns:
        The panel, or ``None`` if no mark has a value.

    Example:
        >>> bars("Size", "Shorter is smaller.", [Mark("before", "4 kB", 4000.0)]).title
        'Size'
    """
    if all(mark.value is None for mark in marks):
        return None
    height = _ROW * len(marks)
    figure, axes = canvas(_WIDTH, height)
    finite = _finite(mark for mark in marks if mark is not off)
    for index, mark in enumerate(marks):
        top = index * _ROW
        name = fitting(mark.name, _WIDTH - _GAP - text_width(mark.label))
        axes.text(0, top + 13, name, color=PAGE.text, fontsize=FONT, **PLAIN)
        axes.text(_WIDTH, top + 13, mark.label, color=PAGE.muted, ha="right", fontsize=FONT, **PLAIN)
        colour = PAGE.base if index == 0 and first_is_base else PAGE.accent
        if dots:
            _draw_dot(axes, top + 27, mark, finite, colour)
        else:
            _draw_bar(axes, top + 20, mark, max(finite, default=0.0), colour)
    return Panel(title, legend, svg(figure, f"{title}: " + ", ".join(f"{mark.name} {mark.label}" for mark in marks)))


def _draw_bar(axes: Axes, top: float, mark: Mark, largest: float, colour: str) -> None:
    """A bar from zero; every panel's longest one leaves room for its whisker."""
    scale = 0.94 * _WIDTH / largest if largest else 0.0
    axes.add_patch(Rectangle((0, top), _WIDTH, _BAR, color=PAGE.track, linewidth=0))
    if mark.value is None or not math.isfinite(mark.value):
        return
    axes.add_patch(Rectangle((0, top), mark.value * scale, _BAR, color=colour, linewidth=0))
    if mark.inner is not None:
        axes.add_patch(Rectangle((0, top + 5), mark.inner * scale, _BAR - 10, color=PAGE.text, linewidth=0))
    if mark.spread:
        ends = [min(_WIDTH, max(0.0, (mark.value + half * mark.spread) * scale)) for half in (-0.5, 0.5)]
        axes.plot(ends, [top + _BAR / 2] * 2, color=PAGE.text, linewidth=2, clip_on=False)


def _draw_dot(axes: Axes, middle: float, mark: Mark, finite: Sequence[float], colour: str) -> None:
    """A dot on a line: a bar would have to start at zero and hide what differs."""
    axes.add_patch(Rectangle((0, middle - 1), _WIDTH, 2, color=PAGE.track, linewidth=0))
    if mark.value is None or not math.isfinite(mark.value):
        return
    low, high = min(finite), max(finite)
    place = 0.5 if high == low else min(max((mark.value - low) / (high - low), 0.0), 1.0)
    inside = low <= mark.value <= high
    ring = {"facecolor": colour, "linewidth": 0.0} if inside else {"fill": False, "linewidth": 2.0}
    axes.add_patch(Ellipse((8 + place * (_WIDTH - 16), middle), 12, 12, edgecolor=colour, **ring))

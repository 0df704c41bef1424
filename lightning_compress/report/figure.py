"""The picture of the report: one small panel a quantity, one bar or dot a model, each with its number beside it.

Drawn with matplotlib's objects, without pyplot, so that no open figure and no chosen backend is touched. Panels are
separate pictures: on a narrow screen they go below one another and stay readable.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.textpath import TextToPath

from lightning_compress.report import units
from lightning_compress.report.cells import metric_names
from lightning_compress.report.table import Report, Row

_WIDTH, _ROW, _BAR = 340, 46, 14  # pixels: a panel's width, one model's height, a bar's height
_FONT, _GAP = 13, 10  # pixels: the text's size, and the least room between a name and its number
_METRICS = 4  # panels of metrics; the table has them all

# Stand-ins that become CSS, so that the page's light and dark mode apply. The accent is the blue of Okabe and Ito.
_TEXT, _MUTED, _ACCENT, _BASE, _TRACK = ("#010203", "#010204", "#010205", "#010206", "#010207")
_CSS = {
    _TEXT: "currentColor",
    _MUTED: "var(--muted)",
    _ACCENT: "var(--accent)",
    _BASE: "var(--base)",
    _TRACK: "var(--track)",
}


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
        _panel("Size", "Thin bar: after deflate. Shorter is smaller.", _size_marks(report)),
        _panel("Latency", _latency_legend(report), _latency_marks(report)),
    ]
    for name in metric_names(report)[:_METRICS]:
        marks = [Mark(row.name, units.metric(row.metrics.get(name)), row.metrics.get(name)) for row in report.rows]
        drawn.append(_panel(name, "From the validation; the axis spans the values shown.", marks, dots=True))
    return [panel for panel in drawn if panel is not None]


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


def _panel(title: str, legend: str, marks: Sequence[Mark], *, dots: bool = False) -> Panel | None:
    """Draw one panel, or nothing if no model has the quantity."""
    if all(mark.value is None for mark in marks):
        return None
    height = _ROW * len(marks)
    # One unit is one pixel of the page, and y grows downwards.
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor="none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    finite = [mark.value for mark in marks if mark.value is not None and math.isfinite(mark.value)]
    for index, mark in enumerate(marks):
        top = index * _ROW
        name = _fitting(mark.name, _WIDTH - _GAP - _text_width(mark.label))
        plain: dict[str, Any] = {"fontsize": _FONT, "parse_math": False, "usetex": False}  # a name may hold a "$"
        axes.text(0, top + 13, name, color=_TEXT, **plain)
        axes.text(_WIDTH, top + 13, mark.label, color=_MUTED, ha="right", **plain)
        colour = _BASE if index == 0 else _ACCENT
        if dots:
            _draw_dot(axes, top + 27, mark, finite, colour)
        else:
            _draw_bar(axes, top + 20, mark, max(finite, default=0.0), colour)
    return Panel(title, legend, _svg(figure, f"{title}: " + ", ".join(f"{mark.name} {mark.label}" for mark in marks)))


def _fitting(name: str, room: float) -> str:
    """The name, or as much of its beginning and its end as the room in pixels holds."""
    text = units.shortened(name, _WIDTH)  # no character is narrower than a pixel
    while _text_width(text) > room and len(text) > 5:
        text = units.shortened(name, len(text) - 1)
    return text


def _text_width(text: str) -> float:
    """Pixels in matplotlib's font, which is wider than most pages' fonts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that this font lacks
        return float(TextToPath().get_text_width_height_descent(text, FontProperties(size=_FONT), False)[0])


def _draw_bar(axes: Axes, top: float, mark: Mark, largest: float, colour: str) -> None:
    """A bar from zero; every panel's longest one leaves room for its whisker."""
    scale = 0.94 * _WIDTH / largest if largest else 0.0
    axes.add_patch(Rectangle((0, top), _WIDTH, _BAR, color=_TRACK, linewidth=0))
    if mark.value is None or not math.isfinite(mark.value):
        return
    axes.add_patch(Rectangle((0, top), mark.value * scale, _BAR, color=colour, linewidth=0))
    if mark.inner is not None:
        axes.add_patch(Rectangle((0, top + 5), mark.inner * scale, _BAR - 10, color=_TEXT, linewidth=0))
    if mark.spread:
        ends = [min(_WIDTH, max(0.0, (mark.value + half * mark.spread) * scale)) for half in (-0.5, 0.5)]
        axes.plot(ends, [top + _BAR / 2] * 2, color=_TEXT, linewidth=2, clip_on=False)


def _draw_dot(axes: Axes, middle: float, mark: Mark, finite: Sequence[float], colour: str) -> None:
    """A dot on a line: a bar would have to start at zero and hide what differs."""
    axes.add_patch(Rectangle((0, middle - 1), _WIDTH, 2, color=_TRACK, linewidth=0))
    if mark.value is None or not math.isfinite(mark.value):
        return
    low, high = min(finite), max(finite)
    place = 0.5 if high == low else (mark.value - low) / (high - low)
    axes.add_patch(Ellipse((8 + place * (_WIDTH - 16), middle), 12, 12, color=colour, linewidth=0))


def _svg(figure: Figure, description: str) -> str:
    """The figure as one element of an HTML page: real text, CSS colours, no identifiers, no references."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "path.sketch": None}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page's font, not matplotlib's, has to have the characters of a name
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)
    if body is None:
        raise RuntimeError("matplotlib wrote no <svg> element")
    inner = re.sub(r"<!--.*?-->|<defs>.*?</defs>|<defs */>| (?:id|clip-path)=\"[^\"]*\"", "", body[1], flags=re.DOTALL)
    for colour, css in _CSS.items():
        inner = inner.replace(colour, css)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    label = html.escape(description)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{inner.strip()}</svg>'

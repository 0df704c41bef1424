"""The plot of a Pareto table: cost to the right, metric upwards, the front drawn, what is dominated muted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Polygon
from matplotlib.ticker import LogLocator, MaxNLocator

from lightning_compress.mechanisms.selection import listing
from lightning_compress.report import units
from lightning_compress.report.drawing import FONT, LIGHT, PAGE, PLAIN, Colours, canvas, fitting, png, svg, text_width
from lightning_compress.report.labels import Box, Label, leader, place
from lightning_compress.report.pareto import TITLES, Cost, Pareto, Point

WIDE, NARROW = (720, 420), (340, 340)  # pixels: for a desk, and for a phone
_SMALL = 12  # pixels: the text at the axes
_RADIUS = 5.0
_NAME = 200  # pixels of a name
_FEW = 3  # points that are not on the front: as many names have room in a narrow plot
_NAMED = 40  # points, at most: more names are unreadable, and finding places for them takes minutes
_DECADE = 8.0  # ratio of the largest to the smallest cost from which on the axis is logarithmic

FORMATS: dict[Cost, Callable[[float | None], str]] = {
    "bytes": units.size,
    "bytes_compressed": units.size,
    "latency": units.milliseconds,
    "macs": units.count,
}


class Axis(NamedTuple):
    """From values to pixels.

    Attributes:
        low: The value at ``start``.
        high: The value at ``end``.
        start: Pixel.
        end: Pixel.
        log: Whether equal steps are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        """Where a value is."""
        low, high, value = (math.log(own) if self.log else own for own in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, room: float) -> list[float]:
        """Round values within the axis, at least so many pixels apart."""
        count = max(2, int(abs(self.end - self.start) / room))
        if self.log:
            decades = math.log10(self.high / self.low)
            values = LogLocator(subs=(1, 2, 5) if 3 * decades < count else (1,), numticks=99).tick_values(
                self.low, self.high
            )
        else:
            values = MaxNLocator(nbins=count, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        return [float(value) for value in values if self.low <= value <= self.high]


def scatter_svg(pareto: Pareto, size: tuple[int, int] = WIDE) -> str:
    """The plot, for a page.

    Args:
        pareto: The table.
        size: Width and height in pixels. There are 40 names at most; in narrow plots only the front and references
            have one, and what is not on the front where these are at most three.

    Returns:
        One SVG element.

    Example:
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> rows = (Row("after", bytes=400, metrics={"acc": 0.9}), Row("int8.onnx", bytes=100, metrics={"acc": 0.8}))
        >>> scatter_svg(pareto({"run": Report(rows)}))[:4]
        '<svg'
    """
    front = ", ".join(f"{point_label(pareto, point)} {_numbers(pareto, point)}" for point in pareto.front)
    return svg(_drawn(pareto, size, PAGE, "none"), f"{TITLES[pareto.cost]} against {pareto.metric}. Front: {front}")


def scatter_png(pareto: Pareto) -> bytes:
    """The plot, for a logger.

    Args:
        pareto: The table.

    Returns:
        The content of a PNG file.

    Example:
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> rows = (Row("after", bytes=400, metrics={"acc": 0.9}), Row("int8.onnx", bytes=100, metrics={"acc": 0.8}))
        >>> scatter_png(pareto({"run": Report(rows)}))[1:4]
        b'PNG'
    """
    return png(_drawn(pareto, WIDE, LIGHT, "white"))


def scatter_legend(pareto: Pareto) -> str:
    """What the marks of the plot mean.

    Args:
        pareto: The table.

    Returns:
        A few sentences.
    """
    parts = [f"{pareto.direction}."]
    if len(pareto.front) < sum(point.placed and not point.reference for point in pareto.points):
        parts.append("Blue: the front; each other model is beaten by one on it.")
    if any(point.reference for point in _shown(pareto)):
        parts.append("Diamonds: what the models came from.")
    if (count := len(_shown(pareto))) > _NAMED:
        parts.append(f"At most {_NAMED} of the {count} have their names here, the front first.")
    if pareto.away:
        parts.append(left_out(pareto))
    return " ".join(parts)


def left_out(pareto: Pareto) -> str:
    """Which networks are in neither the table nor the plot, in a sentence; empty for none."""
    names = [point_label(pareto, point) for point in pareto.away]
    return f"Far worse than all else, and left out: {listing(names)}." if names else ""


def point_label(pareto: Pareto, point: Point) -> str:
    """What a point is called: by its run alone, where each run has one model; by its row, where that is enough.

    Example:
        >>> from lightning_compress.report.table import Row
        >>> ours = Point("qat", Row("int8.onnx"), 1.0, 0.9)
        >>> point_label(Pareto("acc", "max", False, "bytes", (ours, Point("kd", Row("after"), 2.0, 0.9))), ours)
        'qat'
    """
    points = (*pareto.points, *pareto.away)
    deployed = [other.run for other in points if not other.reference]
    runs = {other.run for other in points}
    if len(runs) == 1:
        return point.row.name
    if point.reference and sum(other.row.name == point.row.name for other in points) == 1:
        return point.row.name
    if not point.reference and len(set(deployed)) == len(deployed):
        return point.run
    return f"{point.run}: {point.row.name}"


def _drawn(pareto: Pareto, size: tuple[int, int], colours: Colours, background: str) -> Figure:
    figure, axes = canvas(*size, background)
    shown = _shown(pareto)
    across, down = _axes_of(pareto, shown, size)
    _draw_grid(axes, pareto, across, down, colours)
    places = {
        index: (across.pixel(_finite(point.cost)), down.pixel(_finite(point.metric)))
        for index, point in enumerate(shown)
    }
    steps = _draw_front(axes, [places[index] for index, point in enumerate(shown) if point.front], across, colours)
    order = sorted(places, key=lambda index: (not shown[index].front, not shown[index].reference))
    for index in reversed(order):
        _draw_point(axes, *places[index], shown[index], colours, background)
    beaten = [index for index in order if not (shown[index].front or shown[index].reference)]
    unnamed = set(beaten if size[0] < WIDE[0] and len(beaten) > _FEW else ())
    named = [index for index in order if index not in unnamed][:_NAMED]
    room = Box(across.start + 1, down.end - 8, size[0] - 2, down.start - 2)
    texts = {index: fitting(point_label(pareto, shown[index]), min(_NAME, size[0] / 3), _SMALL) for index in named}
    labels = [
        Label(*places[index], text_width(texts[index], _SMALL) + 4, 15.0, math.inf if shown[index].front else 44.0)
        for index in named
    ]
    boxes = place(labels, room, list(places.values()), steps, radius=_RADIUS + 1)
    for index, box in zip(named, boxes, strict=True):
        if box is not None:
            _draw_label(
                axes, places[index], box, texts[index], colours.text if shown[index].front else colours.muted, colours
            )
    return figure


def _shown(pareto: Pareto) -> list[Point]:
    """The points that are drawn."""
    return [point for point in pareto.points if point.placed]


def _axes_of(pareto: Pareto, shown: Sequence[Point], size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Both axes, each with room around what is shown."""
    costs = [_finite(point.cost) for point in shown]
    metrics = [_finite(point.metric) for point in shown]
    low, high = min(costs, default=1.0), max(costs, default=2.0)
    log = low > 0 and high / low > _DECADE
    if log:
        ends = (low * (low / high) ** 0.08, high * (high / low) ** 0.12)
    else:
        margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        ends = (max(0.0, low - margin), high + margin)
    bottom, top = min(metrics, default=0.0), max(metrics, default=1.0)
    margin = 0.12 * (top - bottom) or 0.02 * abs(top) or 1.0
    highest = 1.0 if 0 <= bottom <= top <= 1 and pareto.mode == "max" else math.inf  # an accuracy, say
    values = Axis(bottom - margin, min(top + margin, highest), size[1] - 46, 34)
    left = 12 + max((text_width(units.metric(tick), _SMALL) for tick in values.ticks(48)), default=0.0)
    return Axis(*ends, left, size[0] - 8, log), values


def _draw_grid(axes: Axes, pareto: Pareto, across: Axis, down: Axis, colours: Colours) -> None:
    show = FORMATS[pareto.cost]
    for tick in down.ticks(48):
        y = down.pixel(tick)
        axes.plot([across.start, across.end], [y, y], color=colours.track, linewidth=1, zorder=0)
        axes.text(
            across.start - 8, y + 4, units.metric(tick), color=colours.muted, fontsize=_SMALL, ha="right", **PLAIN
        )
    for tick in across.ticks(74):
        x = across.pixel(tick)
        axes.plot([x, x], [down.start, down.end], color=colours.track, linewidth=1, zorder=0)
        anchor = "right" if x > across.end - 20 else "center"
        axes.text(x, down.start + 16, _short(show(tick)), color=colours.muted, fontsize=_SMALL, ha=anchor, **PLAIN)
    axes.plot([across.start, across.end], [down.start, down.start], color=colours.base, linewidth=1, zorder=0)
    what = f"{TITLES[pareto.cost]}{', equal steps are equal ratios' if across.log else ''}"
    axes.text(across.end, down.start + 36, what, color=colours.muted, fontsize=_SMALL, ha="right", **PLAIN)
    name = fitting(pareto.metric, across.end - 20)
    axes.text(0, 14, name, color=colours.text, fontsize=FONT, **PLAIN)


def _draw_front(axes: Axes, places: Sequence[tuple[float, float]], across: Axis, colours: Colours) -> list[Box]:
    """The best that can be had for each cost, as steps; the boxes around them."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(places):
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    if not corners:
        return []
    corners.append((across.end, corners[-1][1]))
    axes.plot(
        [x for x, _ in corners], [y for _, y in corners], color=colours.accent, linewidth=1.5, alpha=0.6, zorder=0.5
    )
    return [
        Box(min(x, far) - 1, min(y, low) - 1, max(x, far) + 1, max(y, low) + 1)
        for (x, y), (far, low) in pairwise(corners)
    ]


def _draw_point(axes: Axes, x: float, y: float, point: Point, colours: Colours, background: str) -> None:
    width = 2 * _RADIUS
    if point.reference:
        corners = [(x, y - _RADIUS), (x + _RADIUS, y), (x, y + _RADIUS), (x - _RADIUS, y)]
        axes.add_patch(Polygon(corners, facecolor="none", edgecolor=colours.text, linewidth=1.5))
    elif point.front:
        axes.add_patch(Ellipse((x, y), width + 1, width + 1, color=colours.accent, linewidth=0))
    else:
        axes.add_patch(Ellipse((x, y), width - 1, width - 1, color=colours.base, linewidth=0))


def _draw_label(axes: Axes, point: tuple[float, float], box: Box, text: str, colour: str, colours: Colours) -> None:
    end = leader(point, box)
    if end is not None:
        start = _RADIUS / math.dist(point, end)
        (x, y), (far, low) = point, end
        line = ([x + start * (far - x), far], [y + start * (low - y), low])
        axes.plot(*line, color=colours.base, linewidth=0.8, zorder=0.8)
    axes.text((box.left + box.right) / 2, box.bottom - 4, text, color=colour, fontsize=_SMALL, ha="center", **PLAIN)


def _numbers(pareto: Pareto, point: Point) -> str:
    return f"{FORMATS[pareto.cost](point.cost)}, {units.metric(point.metric)}"


def _short(text: str) -> str:
    """A round number without the digits that a table needs: "200 kB" for "200 kB", "1 MB" for "1.00 MB"."""
    number, space, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{space}{unit}"


def _finite(value: float | None) -> float:
    return math.nan if value is None else value

"""The picture of the whole library: accuracy against bytes and against time, and what nothing else beats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from lightning_compress.report.labels import Box, Label, leader, place

KINDS = {"fp32": ("#0072B2", "o"), "int8": ("#D55E00", "s"), "int4": ("#009E73", "^")}  # of Okabe and Ito
TEXT, LIGHT = "#333333", "#999999"
DENSE = 2  # pixels of the file to one of those that are meant below, for sharp letters
RADIUS = 5.5  # pixels of a point


@dataclass(frozen=True)
class Point:
    """A file: accuracy in percent with the ends of its interval, kilobytes after deflate, milliseconds an image."""

    name: str
    precision: str
    accuracy: tuple[float, float, float]
    kilobytes: float
    milliseconds: float


def front(points: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """The points that no other beats: none costs as little and is more accurate. From the cheapest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda own: (cost(own), -own.accuracy[0])):
        if not found or point.accuracy[0] > found[-1].accuracy[0]:
            found.append(point)
    return found


def draw(points: Sequence[Point], path: Path) -> bool:
    """Draw the picture; whether there is anything."""
    if points:
        figure_of(points).savefig(path)
    return bool(points)


def figure_of(points: Sequence[Point]) -> Figure:
    """Two panels, a name beside each point."""
    figure = Figure(figsize=(7.0, 10.0), dpi=100 * DENSE)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.09, right=0.965, bottom=0.05, top=0.97, hspace=0.13)
    panels = figure.subplots(2)
    costs: tuple[Callable[[Point], float], ...] = (lambda own: own.kilobytes, lambda own: own.milliseconds)
    for panel, cost, title in zip(panels, costs, ("kB of the file after deflate", "ms an image"), strict=True):
        _points(panel, points, cost)
        panel.set_xlabel(f"{title}, logarithmic", color=TEXT)
        panel.set_ylabel("test accuracy, %", color=TEXT)
    marks = [Line2D([], [], ls="", marker=own, color=colour, label=kind) for kind, (colour, own) in KINDS.items()]
    marks.append(Line2D([], [], color=LIGHT, label="the front; what is not on it is hollow"))
    panels[0].legend(handles=marks, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0.0, ncols=4)
    figure.draw_without_rendering()  # from here on limits are final
    for panel, cost in zip(panels, costs, strict=True):
        _names(panel, points, cost)
    return figure


def _points(panel: Axes, points: Sequence[Point], cost: Callable[[Point], float]) -> None:
    best = front(points, cost)
    panel.step(
        [cost(own) for own in best], [own.accuracy[0] for own in best], where="post", color=LIGHT, lw=1.2, zorder=1
    )
    for point in points:
        (mean, low, high), (colour, marker) = point.accuracy, KINDS[point.precision]
        panel.errorbar(
            cost(point),
            mean,
            [[mean - low], [high - mean]],
            fmt=marker,
            color=colour,
            markerfacecolor=colour if point in best else "white",
            ecolor=LIGHT,
            elinewidth=0.8,
            markersize=6,
        )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.28, y=0.06)
    panel.grid(visible=True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _names(panel: Axes, points: Sequence[Point], cost: Callable[[Point], float]) -> None:
    """Names beside the points; a thin line leads to one that is farther away."""
    edges, back = panel.get_window_extent(), panel.transData.inverted()

    def pixel(x: float, y: float) -> tuple[float, float]:
        across, up = panel.transData.transform((x, y))
        return float(across / DENSE), float((edges.y1 - up) / DENSE)  # from above

    def value(x: float, y: float) -> tuple[float, float]:
        return tuple(back.transform((x * DENSE, edges.y1 - y * DENSE)))

    places = [pixel(cost(own), own.accuracy[0]) for own in points]
    texts = [panel.text(0, 0, own.name, fontsize=8.2, color=TEXT, va="bottom", ha="left") for own in points]
    sizes = [text.get_window_extent() for text in texts]
    labels = [Label(*at, own.width / DENSE + 6, own.height / DENSE + 1) for at, own in zip(places, sizes, strict=True)]
    lines = [_box(pixel(cost(own), own.accuracy[1]), pixel(cost(own), own.accuracy[2])) for own in points]
    corners = [pixel(cost(own), own.accuracy[0]) for own in front(points, cost)]
    for (x, y), (far, high) in itertools.pairwise(corners):
        lines += [_box((x, y), (far, y)), _box((far, y), (far, high))]
    area = Box(edges.x0 / DENSE + 2, 0, edges.x1 / DENSE, edges.height / DENSE)
    for text, at, box in zip(texts, places, _placed(labels, area, lines), strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position(value(box.left + 3, box.bottom - 1))
        if (end := leader(at, box)) is not None:
            line = zip(value(*at), value(*end), strict=True)
            panel.plot(*line, color=LIGHT, lw=0.6, zorder=0.5, scalex=False, scaley=False)


def _placed(labels: Sequence[Label], area: Box, lines: Sequence[Box]) -> list[Box | None]:
    """A place for each name, in the first of a few orders in which most of them find one."""
    points, found = [(own.x, own.y) for own in labels], []
    for key in (lambda own: -own.width, lambda own: own.y, lambda own: -own.y, lambda own: own.x):
        order = sorted(range(len(labels)), key=lambda index: key(labels[index]))
        boxes = place([labels[index] for index in order], area, points, lines, radius=RADIUS)
        found.append([box for _, box in sorted(zip(order, boxes, strict=True), key=lambda own: own[0])])
    return min(found, key=lambda own: own.count(None))


def _box(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """Around the line between two places."""
    (x, far), (y, low) = (sorted(own) for own in zip(one, other, strict=True))
    return Box(x - 1, y - 1, far + 1, low + 1)

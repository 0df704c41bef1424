"""Which of several compressed models are worth having: those that no other one beats in cost and metric at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.mechanisms.selection import did_you_mean, listing
from lightning_compress.report import units
from lightning_compress.report.cells import metric_names
from lightning_compress.report.directions import Mode, direction, preferred
from lightning_compress.report.table import Report, Row

Cost = Literal["bytes", "bytes_compressed", "latency", "macs"]

TITLES: Mapping[str, str] = {"bytes": "Size", "bytes_compressed": "Deflated", "latency": "Latency", "macs": "MACs"}
"""What a cost is called in tables."""


@dataclass(frozen=True)
class Point:
    """One model in the Pareto table.

    Attributes:
        run: Which report it is from.
        row: Its row there.
        cost: Bytes, milliseconds, or multiply-accumulates; ``None`` where it was not measured.
        metric: Its metric; may be NaN; ``None`` where it was not measured.
        reference: Whether it is what the others came from: the network before, a teacher.
        front: Whether no other deployed model has a smaller cost and a metric at least as good, or the other way round.
    """

    run: str
    row: Row
    cost: float | None
    metric: float | None
    reference: bool = False
    front: bool = False

    @property
    def placed(self) -> bool:
        """Whether it has a place in the plot."""
        return self.cost is not None and self.metric is not None and math.isfinite(self.cost + self.metric)


@dataclass(frozen=True)
class Pareto:
    """The models of one or several reports, by one cost and one metric.

    Attributes:
        metric: Name of the metric.
        mode: Whether it should be small ("min") or large ("max").
        guessed: Whether its name said so.
        cost: "bytes", "bytes_compressed", "latency" or "macs".
        points: Deployed models by cost, then references.
        notes: Sentences on what cannot be compared.
        away: Networks before their training whose metric is far worse than all else: in a plot, all else would be one
            dot beside them.
    """

    metric: str
    mode: Mode
    guessed: bool
    cost: Cost
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    away: tuple[Point, ...] = ()

    @property
    def front(self) -> tuple[Point, ...]:
        """The models on the front, by cost."""
        return tuple(point for point in self.points if point.front)

    @property
    def direction(self) -> str:
        """The metric, and which way is better, in words."""
        better = "higher" if self.mode == "max" else "lower"
        return f"{self.metric}, {better} is better{', going by its name' if self.guessed else ''}"


def pareto(
    reports: Mapping[str, Report], *, metric: str | None = None, cost: Cost = "bytes", mode: Mode | None = None
) -> Pareto:
    """Merge reports, and find the models that no other one beats.

    Deployed are exported files and modules; the network before the fit and the teachers are references, each network
    once, and never on the front.

    Args:
        reports: Name of a run to its report.
        metric: A metric of the validation. ``None``: one that all reports have, where possible one that should be
            large.
        cost: What the model costs: bytes of the file, or of the saved weights; the same deflated; milliseconds;
            multiply-accumulates.
        mode: Whether the metric should be small ("min") or large ("max"). ``None``: what its name says.

    Returns:
        The merged table.

    Raises:
        ValueError: If there is no report, no such metric or cost, nothing to compare, or the name of the metric does
            not say which way is better.

    Example:
        >>> rows = (Row("after", bytes=400, metrics={"acc": 0.9}), Row("int8.onnx", bytes=100, metrics={"acc": 0.9}))
        >>> table = pareto({"first": Report(rows), "second": Report((Row("after", bytes=90, metrics={"acc": 0.8}),))})
        >>> table.direction, [(point.run, point.row.name) for point in table.front]
        ('acc, higher is better, going by its name', [('second', 'after'), ('first', 'int8.onnx')])
    """
    if not reports:
        raise ValueError("reports is empty; give at least one")
    if cost not in get_args(Cost):
        raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got '{cost}'{did_you_mean(cost, TITLES)}")
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    chosen = _metric(reports, metric, mode)
    way = mode or direction(chosen)
    if way is None:
        raise ValueError(f"the name '{chosen}' does not say which way is better: give mode, 'min' or 'max'")
    points = [_point(run, row, chosen, cost) for run, report in reports.items() for row in report.rows]
    deployed = [point for point in points if not point.reference and None not in (point.cost, point.metric)]
    if not deployed:
        raise ValueError(f"no model has both {TITLES[cost]} and {chosen}, so there is nothing to compare")
    front = on_front([(_number(point.cost), _number(point.metric)) for point in deployed], way)
    placed = [
        Point(point.run, point.row, point.cost, point.metric, front=best)
        for point, best in zip(deployed, front, strict=True)
    ]
    sign = -1 if way == "max" else 1
    placed.sort(key=lambda point: (_number(point.cost), _last_if_nan(sign * _number(point.metric))))
    notes = tuple(_notes(points, placed, reports, chosen, cost))
    near, away = _nearby(_references(points), placed, way)
    return Pareto(chosen, way, mode is None, cost, (*placed, *near), notes, tuple(away))


def on_front(points: Sequence[tuple[float, float]], mode: Mode) -> list[bool]:
    """Which points are not dominated: no other one is at least as good in both numbers and better in one.

    Args:
        points: Cost, to be small, and metric, of each. Points that hold NaN or infinity are never on the front.
        mode: Whether the metric should be small ("min") or large ("max").

    Returns:
        One flag a point; equal points are on the front together.

    Example:
        >>> on_front([(1.0, 0.7), (2.0, 0.9), (3.0, 0.8), (2.0, 0.9)], "max")
        [True, True, False, True]
    """
    sign = -1 if mode == "max" else 1
    finite = [(cost, sign * metric) for cost, metric in points if math.isfinite(cost) and math.isfinite(metric)]
    front, best = set(), math.inf
    for cost, loss in sorted(finite):
        if loss < best:
            front.add((cost, loss))
            best = loss
    return [(cost, sign * metric) in front for cost, metric in points]


def is_reference(row: Row) -> bool:
    """Whether a row is what the compressed models came from.

    Example:
        >>> is_reference(Row("before")), is_reference(Row("teacher of at")), is_reference(Row("after"))
        (True, True, False)
    """
    return row.name in ("before", "teacher") or row.name.startswith("teacher of ")


def latency_of(row: Row) -> float | None:
    """The median time of a row in milliseconds, if it was measured.

    Example:
        >>> latency_of(Row("after")) is None
        True
    """
    return None if row.latency_ms is None else row.latency_ms.median


def _metric(reports: Mapping[str, Report], wanted: str | None, mode: Mode | None) -> str:
    """The metric that was asked for, else the best of those that all reports have."""
    names = {run: metric_names(report) for run, report in reports.items()}
    known = list(dict.fromkeys(name for own in names.values() for name in own))
    if wanted is not None:
        name = logged_as(wanted, known)
        if name is None:
            raise ValueError(
                f"no report has the metric '{wanted}'; there are {listing(known, None) or 'none at all'}"
                f"{did_you_mean(wanted, known)}"
            )
        return name
    common = [name for name in known if all(name in own for own in names.values())]
    if not common:
        each = "; ".join(f"'{run}' has {listing(own, None) or 'none'}" for run, own in names.items())
        raise ValueError(f"the reports have no metric in common, so say which one is meant: {each}")
    if mode is not None:
        return next((name for name in common if direction(name) == mode), common[0])
    return preferred(common)


def _point(run: str, row: Row, metric: str, cost: Cost) -> Point:
    price = latency_of(row) if cost == "latency" else getattr(row, cost)
    return Point(run, row, None if price is None else float(price), row.metrics.get(metric), is_reference(row))


def _references(points: Sequence[Point]) -> list[Point]:
    """Each reference once: what several runs call, count and measure alike is the same network."""
    kept: dict[tuple[object, ...], Point] = {}
    for point in points:
        if point.reference and point.placed:
            measured = units.metric(_number(point.metric))  # as it is shown
            kept.setdefault((point.row.name, point.row.parameters, point.row.bytes, measured), point)
    return list(kept.values())


def _nearby(references: Sequence[Point], deployed: Sequence[Point], mode: Mode) -> tuple[list[Point], list[Point]]:
    """References, and those with random weights: worse than all else by more than what lies between these."""
    compared = [*deployed, *(point for point in references if point.row.name != "before")]
    values = [_number(point.metric) for point in compared if point.placed]
    if not values:
        return list(references), []
    low, high = min(values), max(values)
    span = (high - low) or 0.02 * abs(high) or 1.0
    bottom, top = (-math.inf, high + span) if mode == "min" else (low - span, math.inf)
    away = [own for own in references if own.row.name == "before" and not bottom <= _number(own.metric) <= top]
    return [point for point in references if point not in away], away


def _notes(
    points: Sequence[Point], placed: Sequence[Point], reports: Collection[str], metric: str, cost: Cost
) -> list[str]:
    notes = []
    measured = [point for point in points if not point.reference and (point.cost, point.metric) != (None, None)]
    # A row with metrics alone says how another row's network does when it is quantised: that one's file has a place.
    lacking = [
        f"{point.run}: {point.row.name}".removeprefix(": ")
        for point in measured
        if None in (point.cost, point.metric) and (point.row.bytes is not None or point.row.latency_ms is not None)
    ]
    if lacking:
        notes.append(f"Without {TITLES[cost]} or {metric}, and so left out: {listing(lacking, None)}.")
    if any(not point.placed for point in placed):
        notes.append("Where a number is NaN or infinite, the model is not on the front, nor in the plot.")
    times = [point.row.latency_ms for point in placed if point.row.latency_ms is not None]
    if cost == "latency" and len({time.runtime for time in times}) > 1:
        notes.append("Times in torch and in ONNX Runtime differ by the runtime too: compare files with files.")
    if cost == "latency" and len({time.batch for time in times}) > 1:
        notes.append("The times are of batches of different sizes.")
    if cost == "latency" and len(reports) > 1:
        notes.append("The times of different runs were not measured in turns; another load or machine moves them.")
    return notes


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value

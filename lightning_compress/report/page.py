"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from html import escape

from lightning_compress.report import units
from lightning_compress.report.cells import (
    columns,
    compressed_row,
    file_rows,
    file_table,
    latency_remark,
    layer_table,
    version_line,
)
from lightning_compress.report.figure import panels
from lightning_compress.report.pareto import TITLES, Cost, Pareto, pareto
from lightning_compress.report.profile import layer_panels
from lightning_compress.report.remarks import remarks
from lightning_compress.report.reproduce import reproduction
from lightning_compress.report.scatter import NARROW, scatter_legend, scatter_svg
from lightning_compress.report.sheet import details, document, embedded, figure, folded, grid, numbers, sentences, stack
from lightning_compress.report.table import Report, Row

PLOTTED: tuple[Cost, ...] = ("bytes", "latency")
_ENOUGH = 3  # models in a plot


def to_html(report: Report) -> str:
    """The report as a page that opens anywhere, in light and in dark, on a phone and on a desk.

    Args:
        report: What was measured; names may hold any character.

    Returns:
        A whole HTML document without a reference to anything outside it.

    Example:
        >>> page = to_html(Report(rows=(Row("<b>", bytes=4000),)))
        >>> "<b>" in page, "&lt;b&gt;" in page
        (False, True)
    """
    return document(
        "Compression report",
        [
            "<h1>Compression report</h1>",
            f'<p class="lead">{escape(_lead(report))}</p>',
            _tiles(report),
            _section("At a glance", grid([figure(*panel) for panel in panels(report)])),
            _section("What is worth having", _front(report)),
            "<h2>All numbers</h2>",
            numbers("All numbers", [row.name for row in report.rows], columns(report)),
            sentences([*remarks(report), *report.notes]),
            details("Exported files", *file_table(report.files), opened=True),
            _section("Layers", grid([figure(*panel) for panel in layer_panels(report.layers)])),
            details("All layers", *layer_table(report.layers), opened=False),
            _section("What the techniques drew", stack([embedded(picture) for picture in report.pictures])),
            _reproduction(report),
            f"<footer>{escape(version_line(report))}</footer>",
        ],
    )


def pareto_figure(table: Pareto) -> str:
    """The plot of a Pareto table, in one width for desks and in one for phones.

    Args:
        table: What to draw.

    Returns:
        HTML.
    """
    drawn = scatter_svg(table).replace("<svg ", '<svg class="wide" ', 1)
    drawn += scatter_svg(table, NARROW).replace("<svg ", '<svg class="narrow" ', 1)
    return figure(f"{TITLES[table.cost]} against {table.metric}", scatter_legend(table), drawn)


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _front(report: Report) -> str:
    """The plots of size and of time against a metric, each where it has at least three models to compare."""
    plots = []
    for cost in PLOTTED:
        try:
            table = pareto({"": report}, cost=cost)
        except ValueError:  # no metric that says which way is better, or nothing that has both
            continue
        if sum(point.placed for point in table.points) >= _ENOUGH:
            plots.append(pareto_figure(table))
    return stack(plots)


def _reproduction(report: Report) -> str:
    parts = "".join(
        f'<h3>{escape(title)}</h3><pre class="copy" tabindex="0">{escape(text.rstrip())}</pre>'
        for title, text in reproduction(report)
    )
    return folded("To do it again", parts, opened=True) if parts else ""


def _deployed(report: Report) -> Row | None:
    """What a user would ship: the last exported file, else the compressed module."""
    files = file_rows(report)
    return files[-1][0] if files else compressed_row(report)


def _lead(report: Report) -> str:
    row = _deployed(report)
    if row is None:
        return "Nothing was measured."
    if row is report.rows[0]:
        return f"'{row.name}', measured."
    return f"'{row.name}', measured against '{report.rows[0].name}'."


def _tiles(report: Report) -> str:
    """The deployed model's headline numbers, each with its ratio to the first row."""
    row = _deployed(report)
    if row is None:
        return ""
    first = report.rows[0]
    tiles = [
        ("Size", units.size(row.bytes), units.times(row.bytes, first.bytes, "smaller", "larger")),
        (
            "Deflated",
            units.size(row.bytes_compressed),
            units.times(row.bytes_compressed, first.bytes_compressed, "smaller", "larger"),
        ),
        ("MACs", units.count(row.macs), units.times(row.macs, first.macs, "fewer", "more")),
    ]
    if row.latency_ms is not None:
        remark = latency_remark(report, row) or _between_runtimes(first, row)
        tiles.append(("Latency", units.milliseconds(row.latency_ms.median), remark))
    for name, value in list(row.metrics.items())[:2]:
        was = first.metrics.get(name) if row is not first else None
        tiles.append((name, units.metric(value), "" if was is None else f"{first.name}: {units.metric(was)}"))
    shown = [tile for tile in tiles if tile[1] != units.MISSING]
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in shown)}</div>'


def _between_runtimes(first: Row, row: Row) -> str:
    """The time of the first row, where another runtime took it: a ratio of both would say little of the compression."""
    mine, theirs = row.latency_ms, first.latency_ms
    if mine is None or theirs is None or mine.runtime == theirs.runtime:
        return ""
    return f"{first.name}, in {theirs.runtime}: {units.milliseconds(theirs.median)}"


def _tile(title: str, value: str, remark: str) -> str:
    below = f"<span>{escape(remark)}</span>" if remark else ""
    return f'<div class="tile card"><span>{escape(title)}</span><strong>{escape(value)}</strong>{below}</div>'

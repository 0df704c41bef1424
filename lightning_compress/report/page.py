"""The report as one HTML page that needs nothing but itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from lightning_compress.report import units
from lightning_compress.report.cells import (
    Cell,
    columns,
    compressed_row,
    file_rows,
    file_table,
    layer_table,
    speed,
    speed_between,
    speed_over_fp32,
    version_line,
)
from lightning_compress.report.figure import panels
from lightning_compress.report.remarks import remarks
from lightning_compress.report.table import Report, Row

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #16202c; --muted: #5a6675; --line: #dde2e9;
  --accent: #0072b2; --base: #9aa5b1; --track: #edf0f4; }
@media (prefers-color-scheme: dark) { :root { --page: #10151b; --card: #1a2129; --text: #e8edf3; --muted: #9fabb9;
  --line: #303a46; --accent: #56b4e9; --base: #707c8a; --track: #262f39; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 16px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 32px 0 12px; }
p.lead { color: var(--muted); margin: 0 0 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tiles, .panels { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.panels.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.tile { padding: 16px 20px; }
.tile span { display: block; color: var(--muted); font-size: 14px; }
.tile strong { display: block; font-size: 26px; line-height: 1.3; font-weight: 650; }
figure { margin: 0; padding: 16px 20px; }
figcaption { font-weight: 600; margin-bottom: 8px; }
figcaption small { display: block; font-weight: 400; color: var(--muted); font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; max-height: 70vh; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 10px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td:first-child, table.text td:last-child { white-space: normal; min-width: 180px; }
th:first-child, td:first-child { padding-left: 20px; } th:last-child, td:last-child { padding-right: 20px; }
thead th { font-size: 13px; font-weight: 600; color: var(--muted); position: sticky; top: 0; background: var(--card); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; white-space: normal; min-width: 175px; }
td small { display: block; white-space: normal; min-width: 84px; color: var(--muted); font-size: 13px; }
ul { margin: 16px 0 0; padding-left: 20px; } li { margin: 4px 0; }
details { margin-top: 16px; } summary { cursor: pointer; padding: 12px 20px; font-weight: 600; }
pre { margin: 0; padding: 0 20px 16px; overflow-x: auto; font-size: 13px; }
footer { margin-top: 32px; color: var(--muted); font-size: 13px; }
@media (max-width: 480px) { main { padding-top: 20px; } h1 { font-size: 24px; } .tiles { gap: 10px;
  grid-template-columns: 1fr 1fr; } .tile { padding: 12px 14px; } .tile strong { font-size: 20px; }
  th, td { padding: 8px 12px; } tbody th { min-width: 130px; } }
"""


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
    body = [
        "<h1>Compression report</h1>",
        f'<p class="lead">{escape(_lead(report))}</p>',
        _tiles(report),
        _panels(report),
        "<h2>All numbers</h2>",
        _main_table(report),
        _sentences([*remarks(report), *report.notes]),
        _details("Exported files", *file_table(report.files), opened=True),
        _details("Layers", *layer_table(report.layers), opened=False),
    ]
    if report.recipe is not None:
        recipe = escape(json.dumps(report.recipe, indent=2, default=str))
        body.append(f'<details class="card"><summary>Recipe</summary><pre>{recipe}</pre></details>')
    body.append(f"<footer>{escape(version_line(report))}</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Compression report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


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
        tiles.append(("Latency", units.milliseconds(row.latency_ms.median), _latency_remark(report, row)))
    for name, value in list(row.metrics.items())[:2]:
        was = first.metrics.get(name) if row is not first else None
        tiles.append((name, units.metric(value), "" if was is None else f"{first.name}: {units.metric(was)}"))
    shown = [tile for tile in tiles if tile[1] != units.MISSING]
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in shown)}</div>'


def _latency_remark(report: Report, row: Row) -> str:
    """The ratio of the headline row's time; where the first row ran elsewhere, to a file in the same runtime."""
    mine, first = row.latency_ms, report.rows[0].latency_ms
    if mine is None:
        return ""
    if first is None or first.runtime == mine.runtime:
        return speed(mine)
    files = {id(own): file for own, file in file_rows(report)}
    if id(row) in files and (remark := speed_over_fp32(files[id(row)])):
        return f"{remark} than in fp32, by {mine.runtime}"
    for other, _ in file_rows(report):
        theirs = other.latency_ms
        if other is not row and theirs is not None and (theirs.runtime, theirs.batch) == (mine.runtime, mine.batch):
            ratio = speed_between(mine, theirs)
            return f"{ratio} than {other.name}" if ratio else f"no difference to {other.name} shown"
    return ", ".join(filter(None, (speed(mine), f"{first.runtime} to {mine.runtime}")))


def _tile(title: str, value: str, remark: str) -> str:
    below = f"<span>{escape(remark)}</span>" if remark else ""
    return f'<div class="tile card"><span>{escape(title)}</span><strong>{escape(value)}</strong>{below}</div>'


def _panels(report: Report) -> str:
    drawn = panels(report)
    if not drawn:
        return ""
    figures = "".join(
        f'<figure class="card"><figcaption>{escape(panel.title)}<small>{escape(panel.legend)}</small></figcaption>'
        f"{panel.svg}</figure>"
        for panel in drawn
    )
    grid = "panels pairs" if len(drawn) in (2, 4) else "panels"  # no row with one panel left over
    return f'<h2>At a glance</h2>\n<div class="{grid}">{figures}</div>'


def _main_table(report: Report) -> str:
    table = columns(report)
    rows = [
        f'<tr><th scope="row">{escape(row.name)}</th>{"".join(_cell(column.cells[index]) for column in table)}</tr>'
        for index, row in enumerate(report.rows)
    ]
    return _scrolling("All numbers", ["Model", *(column.title for column in table)], rows, "card")


def _cell(cell: Cell) -> str:
    remark = f"<small>{escape(cell.remark)}</small>" if cell.remark else ""
    return f"<td>{escape(cell.value)}{remark}</td>"


def _details(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, opened: bool) -> str:
    if not rows:
        return ""
    body = [f"<tr>{''.join(f'<td>{escape(entry)}</td>' for entry in row)}</tr>" for row in rows]
    table = _scrolling(title, header, body, "", "text")
    state = " open" if opened else ""
    return f'<details class="card"{state}><summary>{title} ({len(rows)})</summary>{table}</details>'


def _scrolling(title: str, header: Sequence[str], rows: Sequence[str], box: str, table: str = "") -> str:
    """A table in a box of its own that scrolls sideways, by keyboard as well, so that the page never does."""
    head = "".join(f'<th scope="col">{escape(entry)}</th>' for entry in header)
    return (
        f'<div class="scroll {box}" tabindex="0" role="region" aria-label="{title}"><table class="{table}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sentences(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""

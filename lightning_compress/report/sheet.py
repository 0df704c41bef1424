"""The frame of a page that needs nothing but itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape

from lightning_compress.report.cells import Cell, Column
from lightning_compress.report.table import Picture

_BREAK = re.compile(r"(?<=[_/: ])(?=\w)|(?<=\w)(?=\.\w)")  # where a name may go on in the next line
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
.stack { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.panels.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.tile { padding: 16px 20px; }
.tile span { display: block; color: var(--muted); font-size: 14px; }
.tile strong { display: block; font-size: 26px; line-height: 1.3; font-weight: 650; }
figure { margin: 0; padding: 16px 20px; }
figcaption { font-weight: 600; margin-bottom: 8px; }
figcaption small { display: block; font-weight: 400; color: var(--muted); font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; max-height: 70vh; background: linear-gradient(to right, var(--card) 50%, transparent) left /
  40px 100% no-repeat local, linear-gradient(to left, var(--card) 50%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, var(--base), transparent) left / 10px 100% no-repeat scroll, linear-gradient(to left,
  var(--base), transparent) right / 10px 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 10px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td:first-child, table.text td:last-child { white-space: normal; min-width: 180px; }
th:first-child, td:first-child { padding-left: 20px; } th:last-child, td:last-child { padding-right: 20px; }
thead th { font-size: 13px; font-weight: 600; color: var(--muted); position: sticky; top: 0; background: var(--card); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; white-space: normal; min-width: 120px; overflow-wrap: break-word; }
tr.best > * { font-weight: 600; } tr.best th { color: var(--accent); } tr.reference > * { color: var(--muted); }
td small { display: block; white-space: normal; min-width: 84px; color: var(--muted); font-size: 13px; }
ul { margin: 16px 0 0; padding-left: 20px; } li { margin: 4px 0; }
details { margin-top: 16px; } summary { cursor: pointer; padding: 12px 20px; font-weight: 600; }
pre { margin: 0; padding: 0 20px 16px; overflow-x: auto; font-size: 13px; }
pre.copy { background: var(--track); border-radius: 8px; padding: 12px 16px; margin: 4px 20px 16px; user-select: all;
  white-space: pre-wrap; }
h3 { font-size: 14px; margin: 4px 20px 0; color: var(--muted); }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 6px; background: #fff; }
svg.narrow { display: none; }
footer { margin-top: 32px; color: var(--muted); font-size: 13px; }
@media (max-width: 480px) { main { padding-top: 20px; } h1 { font-size: 24px; } .tiles { gap: 10px;
  grid-template-columns: 1fr 1fr; } .tile { padding: 12px 14px; } .tile strong { font-size: 20px; }
  th, td { padding: 8px 10px; } th:first-child, td:first-child { padding-left: 14px; }
  pre.copy, h3 { margin-left: 12px; margin-right: 12px; } }
@media (max-width: 600px) { svg.wide { display: none; } svg.narrow { display: block; } figure { padding: 14px; } }
@media print { .scroll { max-height: none; } details:not([open]) > * { display: block; } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: Of the window.
        parts: HTML; empty ones are left out.

    Returns:
        The text of the file.

    Example:
        >>> document("Report", ["<p>nothing</p>"]).count("Report")
        1
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def figure(title: str, legend: str, drawn: str) -> str:
    """A picture in a box, with what it is above it.

    Args:
        title: Text.
        legend: Text.
        drawn: HTML of the picture.
    """
    caption = f"<figcaption>{escape(title)}<small>{escape(legend)}</small></figcaption>"
    return f'<figure class="card">{caption}{drawn}</figure>'


def embedded(picture: Picture) -> str:
    """A picture of a technique, within the page."""
    source = base64.b64encode(picture.png).decode()
    image = f'<img src="data:image/png;base64,{source}" alt="{escape(picture.title)}">'
    return figure(picture.title, picture.legend, image)


def grid(figures: Sequence[str]) -> str:
    """Small figures beside one another, as many as there is room for."""
    kind = "panels pairs" if len(figures) in (2, 4) else "panels"  # no row with one panel left over
    return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""


def stack(figures: Sequence[str]) -> str:
    """Large figures below one another."""
    return f'<div class="stack">{"".join(figures)}</div>' if figures else ""


def numbers(title: str, names: Sequence[str], columns: Sequence[Column], kinds: Sequence[str] = ()) -> str:
    """A table of numbers with a remark below each.

    Args:
        title: What it holds, for those who do not see it.
        names: Of the rows.
        columns: One cell a row.
        kinds: How each row is set: "best", "reference" or "".
    """
    rows = [
        f'<tr class="{kind}"><th scope="row">{_BREAK.sub("<wbr>", escape(name))}</th>'
        f"{''.join(_cell(column.cells[index]) for column in columns)}</tr>"
        for index, (name, kind) in enumerate(zip(names, kinds or [""] * len(names), strict=True))
    ]
    return _scrolling(title, ["Model", *(column.title for column in columns)], rows, "card")


def details(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, opened: bool) -> str:
    """A table of texts that can be folded away; nothing where it has no row."""
    if not rows:
        return ""
    body = [f"<tr>{''.join(f'<td>{escape(entry)}</td>' for entry in row)}</tr>" for row in rows]
    return folded(f"{title} ({len(rows)})", _scrolling(title, header, body, "", "text"), opened=opened)


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """Something that can be folded away."""
    return f'<details class="card"{" open" if opened else ""}><summary>{escape(title)}</summary>{content}</details>'


def sentences(texts: Sequence[str]) -> str:
    """A list of sentences; nothing where there is none."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def _cell(cell: Cell) -> str:
    remark = f"<small>{escape(cell.remark)}</small>" if cell.remark else ""
    return f"<td>{escape(cell.value)}{remark}</td>"


def _scrolling(title: str, header: Sequence[str], rows: Sequence[str], box: str, table: str = "") -> str:
    """A table in a box of its own that scrolls sideways, by keyboard as well, so that the page never does."""
    head = "".join(f'<th scope="col">{escape(entry)}</th>' for entry in header)
    return (
        f'<div class="scroll {box}" tabindex="0" role="region" aria-label="{escape(title)}"><table class="{table}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )

"""A Pareto table as text, as a page, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import NamedTuple

from lightning_compress.mechanisms.drafts import write_together
from lightning_compress.report import units
from lightning_compress.report.cells import Cell, Column
from lightning_compress.report.page import pareto_figure
from lightning_compress.report.pareto import TITLES, Pareto, Point, latency_of
from lightning_compress.report.render import escaped, fitting, grid
from lightning_compress.report.scatter import FORMATS, left_out, scatter_legend
from lightning_compress.report.sheet import details, document, numbers, sentences
from lightning_compress.report.table import encoded

SCHEMA = 1
_TITLE = "Pareto table"
_NAME_LENGTH = 28  # characters of a name in the terminal
_NAMES = 3  # columns that say which model it is, and whether it is on the front


class ParetoFiles(NamedTuple):
    """Where a Pareto table was written."""

    json: Path
    markdown: Path
    html: Path


def pareto_table(pareto: Pareto) -> tuple[list[str], list[list[str]]]:
    """The table as text.

    Args:
        pareto: What to show.

    Returns:
        Titles, and one line a model: its run, its name, whether it is on the front, and its numbers; a quantity that
        no model has is left out.

    Example:
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> pareto_table(pareto({"kd": Report((Row("after", bytes=400, metrics={"acc": 0.9}),))}))
        (['Run', 'Model', 'Front', 'Size', 'acc'], [['kd', 'after', 'yes', '400 B', '0.9']])
    """
    columns = _columns(pareto)
    header = ["Run", "Model", "Front", *(column.title for column in columns)]
    return header, [
        [point.run, point.row.name, _front(point), *(column.cells[index].value for column in columns)]
        for index, point in enumerate(pareto.points)
    ]


def pareto_records(pareto: Pareto) -> list[dict[str, str | float | None]]:
    """The table as numbers, for a logger.

    Args:
        pareto: What to show.

    Returns:
        One record a model, all with the same keys.

    Example:
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> records = pareto_records(pareto({"kd": Report((Row("after", bytes=400, metrics={"acc": 0.9}),))}))
        >>> records[0]["bytes"], records[0]["acc"], records[0]["front"]
        (400, 0.9, 'yes')
    """
    quantities = ("bytes", "bytes_compressed", "macs", "nonzeros", "parameters")
    return [
        {"run": point.run, "model": point.row.name, "front": _front(point), pareto.metric: point.metric}
        | {quantity: getattr(point.row, quantity) for quantity in quantities}
        | {"latency_ms": latency_of(point.row)}
        for point in pareto.points
    ]


def pareto_console(pareto: Pareto, *, width: int | None = None) -> str:
    """The table as aligned ASCII text, with notes below.

    Args:
        pareto: What to show.
        width: Columns of the terminal: of numbers that do not fit beside each other, the rest follows below. ``None``:
            as many as it takes.

    Returns:
        Lines, the last one ending in a newline.

    Example:
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> print(pareto_console(pareto({"kd": Report((Row("after", bytes=400, metrics={"acc": 0.9}),))})))
        Pareto table: Size against acc, higher is better, going by its name
        Run  Model  Front  Size   acc
        kd   after  yes    400 B  0.9
        <BLANKLINE>
    """
    header, rows = pareto_table(pareto)
    short = [[*(units.shortened(entry, _NAME_LENGTH) for entry in row[:2]), *row[2:]] for row in rows]
    notes = [f"* {note}" for note in _notes(pareto)]
    return "\n".join([_heading(pareto), fitting([header, *short], width, names=_NAMES), *notes]) + "\n"


def write_pareto(pareto: Pareto, sources: Mapping[str, str], directory: str | os.PathLike[str]) -> ParetoFiles:
    """Write the table as ``pareto.json``, ``pareto.md`` and ``pareto.html``: all of them, or none.

    Args:
        pareto: What to write.
        sources: Name of a run to the file that its report was read from.
        directory: Where; made if it does not exist.

    Returns:
        The paths.

    Raises:
        OSError: If the directory cannot be written to.

    Example:
        >>> import tempfile
        >>> from lightning_compress.report.pareto import pareto
        >>> from lightning_compress.report.table import Report, Row
        >>> table = pareto({"kd": Report((Row("after", bytes=400, metrics={"acc": 0.9}),))})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_pareto(table, {"kd": "kd/compression_report.json"}, directory).html.name
        'pareto.html'
    """
    folder = Path(directory)
    files = ParetoFiles(*(folder / f"pareto{suffix}" for suffix in (".json", ".md", ".html")))
    texts = (_json(pareto, sources), _markdown(pareto, sources), _html(pareto, sources))
    folder.mkdir(parents=True, exist_ok=True)
    write_together(dict(zip(files, texts, strict=True)))
    return files


def _heading(pareto: Pareto) -> str:
    return f"{_TITLE}: {TITLES[pareto.cost]} against {pareto.direction}"


def _columns(pareto: Pareto) -> list[Column]:
    """The cost and the metric first, then what else was measured."""
    makers: dict[str, Callable[[Point], str]] = {
        TITLES[pareto.cost]: lambda point: FORMATS[pareto.cost](point.cost),
        pareto.metric: lambda point: units.metric(point.metric),
        TITLES["bytes"]: lambda point: units.size(point.row.bytes),
        TITLES["bytes_compressed"]: lambda point: units.size(point.row.bytes_compressed),
        TITLES["latency"]: lambda point: units.milliseconds(latency_of(point.row)),
        "Runtime": lambda point: point.row.latency_ms.runtime if point.row.latency_ms else units.MISSING,
        TITLES["macs"]: lambda point: units.count(point.row.macs),
        "Non-zero": lambda point: units.count(point.row.nonzeros),
    }
    columns = [Column(title, [Cell(make(point)) for point in pareto.points]) for title, make in makers.items()]
    return [column for column in columns if any(cell.value != units.MISSING for cell in column.cells)]


def _notes(pareto: Pareto) -> list[str]:
    return [*filter(None, [left_out(pareto)]), *pareto.notes]


def _front(point: Point) -> str:
    return "yes" if point.front else "reference" if point.reference else ""


def _json(pareto: Pareto, sources: Mapping[str, str]) -> str:
    document = {
        "schema": SCHEMA,
        **{key: getattr(pareto, key) for key in ("metric", "mode", "guessed", "cost", "notes")},
        "reports": dict(sources),
        "points": [asdict(point) for point in (*pareto.points, *pareto.away)],
    }
    return json.dumps(encoded(document), indent=2, allow_nan=False) + "\n"


def _markdown(pareto: Pareto, sources: Mapping[str, str]) -> str:
    parts = [f"# {escaped(_heading(pareto))}", grid(*pareto_table(pareto))]
    if notes := _notes(pareto):
        parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    parts += ["## Reports", grid(["Run", "File"], [[run, path] for run, path in sources.items()])]
    return "\n\n".join(parts) + "\n"


def _html(pareto: Pareto, sources: Mapping[str, str]) -> str:
    names = [f"{point.run}: {point.row.name}" for point in pareto.points]
    kinds = ["best" if point.front else "reference" if point.reference else "" for point in pareto.points]
    models = sum(not point.reference for point in pareto.points)
    lead = f"{models} compressed models of {len(sources)} runs; {len(pareto.front)} of them are on the front."
    front = Column("Front", [Cell("yes" if point.front else "") for point in pareto.points])
    return document(
        _TITLE,
        [
            f"<h1>{_TITLE}</h1>",
            f'<p class="lead">{escape(lead)}</p>',
            pareto_figure(pareto),
            "<h2>All models</h2>",
            numbers("All models", names, [front, *_columns(pareto)], kinds),
            sentences([scatter_legend(pareto), *pareto.notes]),
            details("Reports", ["Run", "File"], [[run, path] for run, path in sources.items()], opened=False),
        ],
    )

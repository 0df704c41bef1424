"""The report as text: a Markdown document, and a plain aligned table for the terminal.

Both, and the HTML page, show the same cells; ratios are to the first row.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Literal

from lightning_compress.mechanisms.signs import on_terminal
from lightning_compress.report import units
from lightning_compress.report.cells import Cell, columns, file_table, layer_table, version_line
from lightning_compress.report.remarks import remarks
from lightning_compress.report.reproduce import reproduction
from lightning_compress.report.table import Report

_NAME_LENGTH = 24  # characters of a model's name in the terminal


def to_console(report: Report, *, width: int | None = None) -> str:
    """The table as aligned ASCII text, quantities downwards and models across, with remarks and notes below.

    Args:
        report: What was measured.
        width: Columns of the terminal: of models that do not fit beside each other, the rest follows below. ``None``:
            as many as it takes.

    Returns:
        Lines, the last one ending in a newline.

    Example:
        >>> from lightning_compress.report.table import Row
        >>> print(to_console(Report(rows=(Row("before", bytes=4000), Row("after", bytes=1000)))))
        Compression report
                before   after
        Size    4.00 kB  1.00 kB
                         4.0x smaller
        <BLANKLINE>
    """
    lines = [["", *(units.shortened(row.name, _NAME_LENGTH) for row in report.rows)]]
    for column in columns(report):
        lines.append([column.title, *(cell.value for cell in column.cells)])
        if any(cell.remark for cell in column.cells):
            lines.append(["", *(cell.remark for cell in column.cells)])
    sentences = [f"* {sentence}" for sentence in (*remarks(report), *report.notes)]
    return "\n".join(["Compression report", fitting(lines, width), *sentences]) + "\n"


def for_terminal(report: Report) -> str:
    """The table as wide as the terminal, or as it takes where the output goes elsewhere.

    Args:
        report: What was measured.

    Returns:
        As :func:`to_console`.

    Example:
        >>> from lightning_compress.report.table import Row
        >>> for_terminal(Report(rows=(Row("after", bytes=1000),))).splitlines()
        ['Compression report', '      after', 'Size  1.00 kB']
    """
    return to_console(report, width=terminal_width())


def terminal_width() -> int | None:
    """How wide a table may be.

    Returns:
        Columns of the terminal; None where the output goes elsewhere, as into a file.

    Example:
        >>> terminal_width() is None or terminal_width() > 0
        True
    """
    return shutil.get_terminal_size().columns if on_terminal() else None


def fitting(
    lines: Sequence[Sequence[str]], width: int | None, *, names: int = 1, numbers: Literal["left", "right"] = "left"
) -> str:
    """A table for the terminal: what does not fit beside each other follows below.

    Args:
        lines: As many entries in each.
        width: Columns of the terminal; ``None``: as many as it takes.
        names: The first columns that say what a line is of; each part has them.
        numbers: Where the others are aligned.

    Returns:
        The lines, their entries below one another; an empty line between parts. Lines of a part that would be empty
        are left out.

    Example:
        >>> table = [["", "Size", "MACs"], ["after", "1 kB", "2 k"]]
        >>> print(fitting(table, None))
               Size  MACs
        after  1 kB  2 k
        >>> print(fitting(table, 14))
               Size
        after  1 kB
        <BLANKLINE>
               MACs
        after  2 k
    """
    widths = _widths(lines)
    first = list(range(names))
    parts = [[*first]]
    for index in range(names, len(widths)):
        needed = sum(widths[own] + 2 for own in parts[-1]) + widths[index]
        if width is not None and needed > width and len(parts[-1]) > names:
            parts.append([*first])
        parts[-1].append(index)
    tables = [[[line[index] for index in part] for line in lines] for part in parts]
    right = None if numbers == "left" else names
    return "\n\n".join(aligned([line for line in table if any(line)], right=right) for table in tables)


def aligned(lines: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    """A table as text, as wide as it takes.

    Args:
        lines: As many entries in each.
        right: Columns from this one on are aligned to the right.

    Returns:
        The lines, their entries below one another.

    Example:
        >>> print(aligned([["layer", "filters"], ["0", "16 -> 8"]]))
        layer  filters
        0      16 -> 8
    """
    widths = _widths(lines)
    pads = [str.rjust if right is not None and column >= right else str.ljust for column in range(len(widths))]
    padded = [[pad(own, width) for pad, own, width in zip(pads, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]


def to_markdown(report: Report) -> str:
    """The report as a Markdown document.

    Args:
        report: What was measured.

    Returns:
        GitHub-flavoured Markdown ending in a newline.

    Example:
        >>> from lightning_compress.report.table import Row
        >>> print(to_markdown(Report(rows=(Row("before", bytes=4000), Row("after", bytes=1000)))))
        # Compression report
        <BLANKLINE>
        | Model | Size |
        | --- | --- |
        | before | 4.00 kB |
        | after | 1.00 kB (4.0x smaller) |
        <BLANKLINE>
    """
    table = columns(report)
    body = [[row.name, *(_joined(column.cells[index]) for column in table)] for index, row in enumerate(report.rows)]
    parts = ["# Compression report", grid(["Model", *(column.title for column in table)], body)]
    if sentences := [*remarks(report), *report.notes]:
        parts.append("\n".join(f"- {escaped(sentence)}" for sentence in sentences))
    for title, (header, rows) in {"Files": file_table(report.files), "Layers": layer_table(report.layers)}.items():
        if rows:
            parts += [f"## {title}", grid(header, rows)]
    for title, text in reproduction(report):
        parts += [f"## {escaped(title)}", f"~~~~\n{text.rstrip()}\n~~~~"]
    if report.versions:
        parts.append(escaped(version_line(report)))
    return "\n\n".join(parts) + "\n"


def _joined(cell: Cell) -> str:
    return f"{cell.value} ({cell.remark})" if cell.remark else cell.value


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table in Markdown.

    Args:
        header: Its titles.
        rows: As many entries in each.

    Returns:
        Its lines.

    Example:
        >>> grid(["Model"], [["a|b"]]).splitlines()
        ['| Model |', '| --- |', '| a\\|b |']
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(escaped(entry) for entry in line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that cannot end a cell, start a tag or break the line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

"""What the table says, as text: one cell a quantity and model, the same in the terminal, in Markdown and in HTML.

Ratios are to the first row; a column that no row has a number for is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from lightning_compress.report import units
from lightning_compress.report.latency import shows_difference
from lightning_compress.report.table import ExportedFile, Latency, Layer, Report, Row

NO_DIFFERENCE = "no difference shown"


class Cell(NamedTuple):
    """One entry of the table: the number, and what it means against the first row."""

    value: str
    remark: str = ""


class Column(NamedTuple):
    """One quantity over all rows."""

    title: str
    cells: list[Cell]


def columns(report: Report) -> list[Column]:
    """The quantities that at least one row has, as text.

    Args:
        report: What was measured.

    Returns:
        One column a quantity, each with one cell a row.

    Example:
        >>> table = columns(Report(rows=(Row("before", bytes=4000), Row("after", bytes=1000))))
        >>> table[0].title, table[0].cells[1]
        ('Size', Cell(value='1.00 kB', remark='4.0x smaller'))
    """
    if not report.rows:
        return []
    first = report.rows[0]
    makers: dict[str, Callable[[Row], Cell]] = {
        "Parameters": lambda row: Cell(
            units.count(row.parameters), units.times(row.parameters, first.parameters, "fewer", "more")
        ),
        "Non-zero": lambda row: Cell(units.count(row.nonzeros), _zeros(row)),
        "MACs": lambda row: Cell(units.count(row.macs), units.times(row.macs, first.macs, "fewer", "more")),
        "Size": lambda row: Cell(units.size(row.bytes), units.times(row.bytes, first.bytes, "smaller", "larger")),
        "Deflated": lambda row: Cell(
            units.size(row.bytes_compressed),
            units.times(row.bytes_compressed, first.bytes_compressed, "smaller", "larger"),
        ),
        "Latency": lambda row: _latency_cell(report, row),
        "Runtime": lambda row: _runtime_cell(row.latency_ms),
    }
    for name in metric_names(report):
        makers[name] = lambda row, name=name: Cell(units.metric(row.metrics.get(name)))  # type: ignore[misc]
    table = [Column(title, [make(row) for row in report.rows]) for title, make in makers.items()]
    return [column for column in table if any(cell.value != units.MISSING for cell in column.cells)]


def metric_names(report: Report) -> list[str]:
    """The names of all metrics, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in report.rows for name in row.metrics))


def file_rows(report: Report) -> list[tuple[Row, ExportedFile]]:
    """The rows that are exported files, each with its file."""
    files = {name: file for file in report.files for name in (PurePath(file.path).name, file.path)}
    return [(row, files[row.name]) for row in report.rows if row.name in files]


def compressed_row(report: Report) -> Row | None:
    """The row of the compressed module: the one called "after", else the last that is neither file nor teacher."""
    files = {row.name for row, _ in file_rows(report)}
    modules = [row for row in report.rows if row.name not in files and row.name != "teacher"]
    return next((row for row in modules if row.name == "after"), modules[-1] if modules else None)


def file_table(files: Sequence[ExportedFile]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the exported files, as text."""
    header = ["Path", "Precision", "Size", "Against fp32", "Largest difference to the module", "Left in float"]
    return header, [
        [
            shown_path(file.path),
            file.precision,
            units.size(file.bytes),
            _against_fp32(file) or units.MISSING,
            units.metric(file.max_logit_difference),
            ", ".join(file.left_in_float) or units.MISSING,
        ]
        for file in files
    ]


def _against_fp32(file: ExportedFile) -> str:
    size, time = units.times(file.bytes, file.bytes_fp32, "smaller", "larger"), speed_over_fp32(file)
    return ", ".join(filter(None, (size, "no difference in time shown" if time == NO_DIFFERENCE else time)))


def speed_over_fp32(file: ExportedFile) -> str:
    """How much faster a file runs than one of the same network in fp32, in words; empty where that is not known."""
    if file.speed_fp32 is None:
        return ""
    if not shows_difference(file.speed_fp32_low, file.speed_fp32_high):
        return NO_DIFFERENCE
    return units.times(1 / file.speed_fp32, 1.0, "faster", "slower")


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as people read it: seen from the working directory, where that is shorter.

    Example:
        >>> shown_path(os.path.join(os.getcwd(), "model.onnx")), shown_path("model.onnx")
        ('model.onnx', 'model.onnx')
    """
    text = os.fspath(path)
    try:
        return min(text, os.path.relpath(text), key=len)
    except ValueError:  # empty, or on another drive
        return text


def layer_table(layers: Sequence[Layer]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the layers, as text."""
    header = ["Layer", "Type", "Parameters", "Zeros", "Bits", "Filters"]
    return header, [
        [
            layer.name or "(the module itself)",
            layer.type,
            units.count(layer.parameters),
            units.share(layer.sparsity),
            str(layer.bits),
            units.MISSING if layer.filters is None else str(layer.filters),
        ]
        for layer in layers
    ]


def version_line(report: Report) -> str:
    """The versions in one line."""
    return ", ".join(f"{package} {version}" for package, version in report.versions.items())


def _zeros(row: Row) -> str:
    if not row.parameters or row.nonzeros is None or row.nonzeros == row.parameters:
        return ""
    return f"{units.share(1 - row.nonzeros / row.parameters)} zeros"


def _latency_cell(report: Report, row: Row) -> Cell:
    if row.latency_ms is None:
        return Cell(units.MISSING)
    remarks = latency_remark(report, row), f"IQR {units.significant(row.latency_ms.spread, 2)}"
    return Cell(units.milliseconds(row.latency_ms.median), ", ".join(filter(None, remarks)))


def latency_remark(report: Report, row: Row) -> str:
    """How a time compares with the first one, in words; where that ran elsewhere, with a file in the same runtime.

    Empty where nothing was run in the same runtime: a ratio between two of them is none of the compression.
    """
    mine, first = row.latency_ms, next((own.latency_ms for own in report.rows if own.latency_ms is not None), None)
    if mine is None:
        return ""
    if first is None or first.runtime == mine.runtime:
        return _speed(mine)
    files = {id(own): file for own, file in file_rows(report)}
    if id(row) in files and (remark := speed_over_fp32(files[id(row)])):
        return "no difference to fp32 shown" if remark == NO_DIFFERENCE else f"{remark} than in fp32"
    for other, _ in file_rows(report):
        theirs = other.latency_ms
        if theirs is None or (theirs.runtime, theirs.batch) != (mine.runtime, mine.batch):
            continue
        if other is row:  # the first of its runtime
            break
        ratio = _speed_between(mine, theirs)
        return f"{ratio} than {other.name}" if ratio else f"no difference to {other.name} shown"
    return ""


def _speed(latency: Latency) -> str:
    """The paired ratio to the first row in words, with its 95% interval; empty for the first row itself."""
    ratio, low, high = latency.ratio, latency.ratio_low, latency.ratio_high
    if ratio is None or (ratio == low == high == 1):
        return ""
    if not shows_difference(low, high):
        return NO_DIFFERENCE
    return units.times(ratio, 1.0, "faster", "slower")


def _speed_between(latency: Latency, other: Latency) -> str:
    """The ratio of two medians in words; empty where the 95% intervals of their ratios to the first row overlap."""
    ends = (latency.ratio_low, latency.ratio_high, other.ratio_low, other.ratio_high)
    if None not in ends:
        low, high, other_low, other_high = ends
        if low <= other_high and other_low <= high:  # type: ignore[operator]
            return ""
    return units.times(latency.median, other.median, "faster", "slower")


def _runtime_cell(latency: Latency | None) -> Cell:
    return Cell(units.MISSING) if latency is None else Cell(latency.runtime, f"batch {latency.batch}")

"""Plain sentences that keep a reader from seeing more in the table than was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_compress.report import units
from lightning_compress.report.cells import compressed_row, file_rows
from lightning_compress.report.table import Report, Row


def remarks(report: Report) -> list[str]:
    """Say what the numbers do and do not show.

    Args:
        report: What was measured.

    Returns:
        Sentences; empty when nothing calls for one.

    Example:
        >>> for sentence in remarks(Report(rows=(Row("before", 10, 10, 50), Row("after", 10, 1, 50)))):
        ...     print(sentence)
        90% of the parameters of 'after' are zero: unstructured zeros make the compressed ...
    """
    sentences = [
        sentence for index, row in enumerate(report.rows) for sentence in _about_zeros(row, report.rows[:index])
    ]
    rows = {row.name: row for row in report.rows}
    files = file_rows(report)
    for row, file in files:
        module = compressed_row(report) if file.model is None else rows.get(file.model)
        if module is not None:
            sentences += _against_module(row, module, rows.get(file.quantised or "", module))
        for other, other_file in files:
            comparable = file.precision != "fp32" and other_file.precision == "fp32" and file.model == other_file.model
            if comparable and (pair := _slower(row, other)):
                sentences.append(f"'{row.name}' ({file.precision}) is slower than '{other.name}' (fp32) here: {pair}.")
    return sentences


def _about_zeros(row: Row, others: Sequence[Row]) -> list[str]:
    """For a row of the same shape as another one."""
    same = any((row.parameters, row.macs) == (other.parameters, other.macs) for other in others)
    if not same or not row.parameters or row.nonzeros is None:
        return []
    zeros = 1 - row.nonzeros / row.parameters
    if zeros < 0.05:
        return []
    return [
        f"{units.share(zeros)} of the parameters of '{row.name}' are zero: unstructured zeros make the compressed file "
        "smaller, not the network faster."
    ]


def _against_module(row: Row, module: Row, quantised: Row) -> list[str]:
    """What an exported file does differently from the module it was made of, and from that one as it is in the file."""
    sentences = []
    if row.bytes and module.bytes and row.bytes > 1.05 * module.bytes:
        sentences.append(
            f"'{row.name}' is larger than the saved weights of '{module.name}': it holds the graph as well."
        )
    if pair := _slower(row, module):
        sentences.append(f"The exported file '{row.name}' is slower than torch here: {pair}.")
    if difference := _metric_difference(row, quantised):
        sentences.append(difference)
    return sentences


def _metric_difference(row: Row, module: Row) -> str | None:
    shared = [name for name in row.metrics if name in module.metrics]
    if not shared:
        return None
    gaps = {name: _gap(row.metrics[name], module.metrics[name]) for name in shared}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] == 0:
        return f"'{row.name}' gives exactly the metrics of '{module.name}' in the same validation."
    return (
        f"In the same validation the metrics of '{row.name}' and '{module.name}' differ by at most "
        f"{units.metric(gaps[worst])} ({worst})."
    )


def _gap(one: float, other: float) -> float:
    """Absolute difference; NaN and infinities differ from nothing but what they are not."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    gap = abs(one - other)
    return math.inf if math.isnan(gap) else gap


def _slower(row: Row, other: Row) -> str | None:
    """Both times, if the first is larger beyond the 95% intervals of their ratios to the reference."""
    mine, theirs = row.latency_ms, other.latency_ms
    if mine is None or theirs is None or mine.batch != theirs.batch:
        return None
    if mine.ratio_low is None or theirs.ratio_high is None:
        slower = mine.median > 1.1 * theirs.median
    else:
        slower = mine.ratio_low > theirs.ratio_high
    return f"{units.milliseconds(mine.median)} against {units.milliseconds(theirs.median)}" if slower else None

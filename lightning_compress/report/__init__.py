"""The before/after report: measured (``measure``, ``latency``), kept (``table``), shown (``render``, ``page``)."""

from __future__ import annotations

from lightning_compress.report.compare import compare
from lightning_compress.report.latency import measure_latency
from lightning_compress.report.measure import (
    bytes_of_state,
    compressed_bytes,
    count_macs,
    count_nonzeros,
    count_parameters,
    layer_table,
    serialized_state,
    single_sample,
)
from lightning_compress.report.page import to_html
from lightning_compress.report.pareto import Pareto, pareto
from lightning_compress.report.render import to_console, to_markdown
from lightning_compress.report.table import ExportedFile, Latency, Layer, Picture, Report, Row, from_json, to_json
from lightning_compress.report.write import write_report

__all__ = [
    "ExportedFile",
    "Latency",
    "Layer",
    "Pareto",
    "Picture",
    "Report",
    "Row",
    "bytes_of_state",
    "compare",
    "compressed_bytes",
    "count_macs",
    "count_nonzeros",
    "count_parameters",
    "from_json",
    "layer_table",
    "measure_latency",
    "pareto",
    "serialized_state",
    "single_sample",
    "to_console",
    "to_html",
    "to_json",
    "to_markdown",
    "write_report",
]

"""The three files of a report, all written, or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lightning_compress.mechanisms.drafts import write_together
from lightning_compress.report.page import to_html
from lightning_compress.report.render import to_markdown
from lightning_compress.report.table import Report, to_json

FILE_STEM = "compression_report"
"""Of the files' names, unless the callback has a name of its own."""


class ReportFiles(NamedTuple):
    """Where a report was written."""

    json: Path
    markdown: Path
    html: Path


def write_report(report: Report, directory: str | os.PathLike[str], name: str = FILE_STEM) -> ReportFiles:
    """Write a report as JSON, Markdown and HTML.

    Everything is rendered and written before the first file takes its place: a reader sees the old ones or the new.

    Args:
        report: What to write.
        directory: Where; made if it does not exist.
        name: Stem of the three files.

    Returns:
        The paths ``<name>.json``, ``<name>.md`` and ``<name>.html``.

    Raises:
        OSError: If the directory cannot be written to; the old files stay then, and no partial one is left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_report(Report(rows=()), directory).json.name
        'compression_report.json'
    """
    folder = Path(directory)
    files = ReportFiles(*(folder / f"{name}{suffix}" for suffix in (".json", ".md", ".html")))
    texts = (to_json(report), to_markdown(report), to_html(report))
    folder.mkdir(parents=True, exist_ok=True)
    write_together(dict(zip(files, texts, strict=True)))
    return files

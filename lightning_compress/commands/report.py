"""The command ``lightning-compress report``: a report once more, or several merged into one Pareto table."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_compress.callbacks.base import announce
from lightning_compress.commands.exits import DONE, FAILED, USAGE, ended, one_line
from lightning_compress.report.cells import shown_path
from lightning_compress.report.find import find_reports, read_report, run_names
from lightning_compress.report.pareto import Pareto, pareto
from lightning_compress.report.pareto_files import ParetoFiles, pareto_console, pareto_records, write_pareto
from lightning_compress.report.render import to_console
from lightning_compress.report.scatter import scatter_png
from lightning_compress.report.table import Report
from lightning_compress.report.write import write_report

OUT = "compression_pareto"
"""Where the Pareto table is written, if nothing else is said."""


def report(options: argparse.Namespace) -> int:
    """Show one report, or the Pareto table of several; of one too, if that is asked for by one of its options.

    Args:
        options: ``directories``, ``metric``, ``mode``, ``cost``, ``out`` and ``wandb``, as the command has them.

    Returns:
        0: done. 1: the table was written, and could not be logged. 2: there is nothing that could be shown as asked.

    Example:
        >>> report(argparse.Namespace(directories=["missing"], wandb=None, out=None))
        2
    """
    try:
        if options.wandb is not None:
            _require_wandb()
        _check_out(options.out)
        paths = _found(options.directories)
        reports = dict(zip(run_names(paths), [read_report(path) for path in paths], strict=True))
        for name, path in zip(reports, paths, strict=True):
            sys.stdout.write(f"{name}: {shown_path(path)}\n")
        if len(reports) == 1 and not any((options.metric, options.mode, options.cost, options.wandb)):
            return _one(next(iter(reports.values())), options.out)
        table = pareto(reports, metric=options.metric, cost=options.cost or "bytes", mode=options.mode)
        sources = {name: shown_path(path) for name, path in zip(reports, paths, strict=True)}
        files = write_pareto(table, sources, options.out or OUT)
    except (ValueError, ImportError) as error:
        return ended("report", USAGE, str(error))
    except OSError as error:
        return ended("report", USAGE, f"the files cannot be written: {error}")
    announce(pareto_console(table))
    sys.stdout.write(f"wrote {', '.join(shown_path(path) for path in files)}\n")
    return DONE if options.wandb is None else _logged(options.wandb, table, sources, files)


def _one(found: Report, out: str | None) -> int:
    announce(to_console(found))
    if out is not None:
        files = write_report(found, out)
        sys.stdout.write(f"wrote {', '.join(shown_path(path) for path in files)}\n")
    return DONE


def _found(directories: Sequence[str]) -> list[Path]:
    """The files of all reports, each once, whatever directory leads to it."""
    paths = [path for directory in directories for path in find_reports(directory)]
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def _check_out(out: str | None) -> None:
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out must be a directory, and '{out}' is a file")


def _require_wandb() -> None:
    if find_spec("wandb") is None:
        raise ImportError('--wandb needs wandb, which is not installed; run: pip install "lightning-compress[wandb]"')


def _logged(project: str, table: Pareto, sources: Mapping[str, str], files: ParetoFiles) -> int:
    """Log the table, its plot and its page as one run, offline where W&B is set so."""
    import wandb
    from PIL import Image

    settings: dict[str, Any] = {key: getattr(table, key) for key in ("metric", "mode", "cost")}
    settings["reports"] = dict(sources)
    records = pareto_records(table)
    columns: list[str | int] = list(records[0])
    try:
        with wandb.init(project=project, job_type="pareto", name="pareto", config=settings) as run:
            run.log(
                {
                    "pareto/table": wandb.Table(columns=columns, data=[list(record.values()) for record in records]),
                    "pareto/plot": wandb.Image(Image.open(io.BytesIO(scatter_png(table)))),
                    "pareto/page": wandb.Html(files.html.read_text(encoding="utf-8"), inject=False),
                    "pareto/front": len(table.front),
                }
            )
    except wandb.Error as error:
        return ended("report", FAILED, f"the table was written, and W&B did not take it: {one_line(error)}")
    return DONE

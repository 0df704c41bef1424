"""The command ``lightning-compress report``: a report once more, or several merged into one Pareto table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_compress.callbacks.base import announce
from lightning_compress.commands.exits import DONE, FAILED, USAGE, UsageError, checking, ended, one_line
from lightning_compress.report.cells import shown_path
from lightning_compress.report.find import find_reports, read_report, run_names
from lightning_compress.report.pareto import pareto
from lightning_compress.report.pareto_files import pareto_console, write_pareto
from lightning_compress.report.render import for_terminal, terminal_width
from lightning_compress.report.table import Report
from lightning_compress.report.write import write_report
from lightning_compress.tracking.pareto_run import log_pareto, require_wandb

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
        with checking(ValueError, ImportError):
            if options.wandb is not None:
                require_wandb()
            _check_out(options.out)
            paths = _found(options.directories)
            reports = dict(zip(run_names(paths), [read_report(path) for path in paths], strict=True))
        sources = {name: shown_path(path) for name, path in zip(reports, paths, strict=True)}
        if len(reports) == 1 and not any((options.metric, options.mode, options.cost, options.wandb)):
            return _one(next(iter(reports.values())), options.out, sources)
        with checking(ValueError):
            table = pareto(reports, metric=options.metric, cost=options.cost or "bytes", mode=options.mode)
        files = write_pareto(table, sources, options.out or OUT)
    except UsageError as error:
        return ended("report", USAGE, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return ended("report", USAGE, f"the files cannot be written: {error}")
    _say(sources)
    announce(pareto_console(table, width=terminal_width()))
    sys.stdout.write(f"wrote {', '.join(shown_path(path) for path in files)}\n")
    if options.wandb is not None:
        try:
            log_pareto(options.wandb, table, sources, files.html)
        except ConnectionError as error:
            return ended("report", FAILED, f"the table was written, and W&B did not take it: {one_line(error)}")
    return DONE


def _one(found: Report, out: str | None, sources: Mapping[str, str]) -> int:
    files = None if out is None else write_report(found, out)
    _say(sources)
    announce(for_terminal(found))
    if files is not None:
        sys.stdout.write(f"wrote {', '.join(shown_path(path) for path in files)}\n")
    return DONE


def _say(sources: Mapping[str, str]) -> None:
    for name, path in sources.items():
        sys.stdout.write(f"{name}: {path}\n")


def _found(directories: Sequence[str]) -> list[Path]:
    """The files of all reports, each once, whatever directory leads to it."""
    paths = [path for directory in directories for path in find_reports(directory)]
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def _check_out(out: str | None) -> None:
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"--out must be a directory, and '{out}' is a file")

"""Where runs have left their reports, and what to call each of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.mechanisms.selection import did_you_mean, listing
from lightning_compress.report.cells import shown_path
from lightning_compress.report.table import Report, from_json
from lightning_compress.report.write import FILE_STEM

log = logging.getLogger("lightning_compress")


def find_reports(directory: str | os.PathLike[str]) -> list[Path]:
    """The reports below a directory, the newest one of each folder.

    Args:
        directory: A directory, or the JSON file of one report.

    Returns:
        Paths of JSON files, in the order of their folders. A link to a file that is gone is left out and told of.

    Raises:
        ValueError: If it does not exist or holds no report; the message says what is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "version_0", "compression_report.json")
        ...     path.parent.mkdir()
        ...     _ = path.write_text("{}")
        ...     find_reports(folder) == [path]
        True
    """
    root = Path(directory)
    if root.is_file():
        if root.suffix != ".json":
            raise ValueError(f"'{root}' is a file, and no {FILE_STEM}.json; give the directory that holds one")
        return [root]
    if not root.is_dir():
        beside = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise ValueError(f"'{root}' does not exist{did_you_mean(root.name, beside)}")
    newest: dict[Path, Path] = {}
    paths = list(root.rglob(f"{FILE_STEM}*.json"))
    for path in paths:
        if not path.exists():
            log.warning("'%s' is left out: it is a link to a file that does not exist", shown_path(path))
    present = [path for path in paths if path.exists()]
    for path in sorted(present, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        newest[path.parent] = path
    if not newest:
        there = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in root.iterdir())
        found = f"it holds {listing(there)}" if there else "it is empty"
        raise ValueError(
            f"there is no {FILE_STEM}.json in '{root}' or below it; {found}. `lightning-compress run`, or a "
            "CompressionReport among the callbacks, writes one into the Trainer's log directory"
        )
    return [newest[folder] for folder in sorted(newest)]


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a report from its JSON file.

    Args:
        path: The file.

    Returns:
        The report.

    Raises:
        ValueError: If it cannot be read, is damaged, or a newer version wrote it; the message names the file.

    Example:
        >>> read_report("missing.json")
        Traceback (most recent call last):
        ValueError: 'missing.json' cannot be read: No such file or directory
    """
    shown = shown_path(path)
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"'{shown}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{shown}' is damaged: it is no text") from error
    except ValueError as error:
        raise ValueError(f"'{shown}': {error}") from error


def run_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each report, from what differs in the names of their folders.

    Args:
        paths: Of the JSON files; no two are the same file.

    Returns:
        One name a path; no two are equal.

    Example:
        >>> run_names(["runs/kd/version_0/compression_report.json", "runs/qat/version_0/compression_report.json"])
        ['kd', 'qat']
        >>> run_names(["runs/kd/version_0/compression_report.json"])
        ['kd/version_0']
    """
    files = [Path(path).resolve() for path in paths]
    folders = [file.parent.parts for file in files]
    shortest = min(map(len, folders), default=0)
    same = [len({parts[index] for parts in folders}) == 1 for index in range(shortest)]
    start = next((index for index, equal in enumerate(same) if not equal), shortest)
    tails = [parts[start:] or parts[-2:] for parts in folders]
    while len(tails) > 1 and min(map(len, tails)) > 1 and len({parts[-1] for parts in tails}) == 1:
        tails = [parts[:-1] for parts in tails]
    names = ["/".join(parts) for parts in tails]
    if len(set(names)) < len(names):
        names = [os.path.relpath(file.with_suffix("")).replace(os.sep, "/") for file in files]
    return names

"""Files that are written whole or not at all, whatever ends the process that writes them.

A file is written in a hidden folder beside its place, and moved there once it is complete. The writer holds a lock in
that folder, which the system takes away when the process ends, with SIGKILL too. So the next one that writes the same
file knows which folders nobody writes in any more, and removes them.

Where a link is, what it leads to is written, and the link stays.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

MARK = 16
"""Hexadecimal digits that the name of a folder ends with."""
SPARE = MARK + 2
"""Characters that the name of a folder has more than that of its file."""
_LOCK = "lock"
_DAY = 24 * 60 * 60
"""Seconds."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing to a disk raises, without the name of a file."""


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the new one, and nothing stays where that fails.

    What an earlier process left when it was killed is removed.

    Args:
        target: The file; its folder exists.

    Returns:
        A context with the path to write to, of the same name; at its end that takes the place of the target.

    Raises:
        OSError: If it cannot be written, or is a pipe, a device or the like; the error names the target.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with draft_of(Path(folder, "notes.txt")) as draft:
        ...         _ = draft.write_text("text")
        ...     [path.name for path in Path(folder).iterdir()]
        ['notes.txt']
    """
    place = _place_of(target)
    folder = place.with_name(f".{place.name}-{uuid.uuid4().hex[:MARK]}")
    try:
        remove_abandoned(place)
        folder.mkdir()
        try:
            with _held(folder):
                yield folder / target.name
                os.replace(folder / target.name, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        unnamed = error.filename is None and error.errno in _FULL
        if not unnamed and not str(error.filename).startswith(str(folder)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def write_together(contents: Mapping[Path, str]) -> None:
    """Write several files that belong together: all are written before the first takes its place.

    Args:
        contents: Path to text; the folders exist.

    Raises:
        OSError: If one cannot be written; the error names it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_together({Path(folder, "a.txt"): "text", Path(folder, "b.txt"): "more"})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a.txt', 'b.txt']
    """
    with ExitStack() as stack:
        for target, content in contents.items():
            stack.enter_context(draft_of(target)).write_bytes(content.encode())


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one.

    Args:
        target: Where; its folder exists.
        content: What to write.

    Raises:
        OSError: If it cannot be written; the error names the target.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "notes.txt"), "text")
        ...     Path(folder, "notes.txt").read_text()
        'text'
    """
    with draft_of(target) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_abandoned(target: Path) -> None:
    """Remove what processes that were killed have left of a file.

    Args:
        target: The file; it is left alone itself, as is what another process is writing.

    Example:
        >>> remove_abandoned(Path("model.onnx"))
    """
    place = Path(os.path.realpath(target))
    for folder in place.parent.glob(f".{glob.escape(place.name)}-{'[0-9a-f]' * MARK}"):
        try:
            with open(folder / _LOCK, "r+b") as lock:
                free = _locked(lock.fileno())
        except FileNotFoundError:
            free = _was_never_locked(folder)
        except OSError:  # it is not ours
            continue
        if free:
            shutil.rmtree(folder, ignore_errors=True)


def _place_of(target: Path) -> Path:
    """Where a file is that is written, whatever links lead to it."""
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if not stat.S_ISREG(mode):
            raise FileExistsError(errno.EEXIST, "There is a pipe, a device or the like, and no file", str(target))
    return Path(os.path.realpath(target))


def _was_never_locked(folder: Path) -> bool:
    """Whether its process was killed, a day ago or more, before it held the lock and began to write."""
    try:
        old = time.time() - os.lstat(folder).st_mtime > _DAY
        return old and all(own.startswith(f"{_LOCK}-") for own in os.listdir(folder))
    except OSError:  # it is just gone
        return False


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; there is none of that name before it is held."""
    taking = folder / f"{_LOCK}-{uuid.uuid4().hex[:MARK]}"
    with open(taking, "wb") as lock:
        _locked(lock.fileno())
        os.replace(taking, folder / _LOCK)
        yield


def _locked(descriptor: int) -> bool:
    """Whether the lock of an open file could be taken; closing the file gives it back."""
    if sys.platform == "win32":
        return False  # nothing is known there, so what is left stays
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or the file system has no locks
        return False
    return True

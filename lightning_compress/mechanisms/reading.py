"""What ``torch.save`` has written, read without running any code, and what is wrong with a file that cannot be read."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch

_SIGNATURE = b"PK\x03\x04"


def read_saved(path: str | os.PathLike[str], argument: str, *, trusted: str | None) -> Any:
    """Read a file, its tensors on the CPU.

    Args:
        path: What ``torch.save`` has written.
        argument: The user's name of it, for error messages.
        trusted: What to do with objects other than tensors if one trusts the file, which an error says then; None: the
            user does, and they are unpickled.

    Returns:
        What is in it.

    Raises:
        ValueError: If it is damaged, or holds such objects, or cannot be read for another reason.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     read_saved(file.name, "teacher", trusted="load it yourself")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: teacher '...' is damaged, or was not written to its end (0 bytes)
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=trusted is not None)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise ValueError(f"{argument} '{os.fspath(path)}' {_why_unreadable(path, error, trusted)}") from error


def _why_unreadable(path: str | os.PathLike[str], error: Exception, trusted: str | None) -> str:
    """Torch's own advice, to unpickle whatever it is, is left out."""
    if _damaged(path):
        return f"is damaged, or was not written to its end ({os.path.getsize(path)} bytes)"
    for line in str(error).splitlines():
        if trusted is not None and ("GLOBAL" in line or "global" in line):
            return (
                "holds objects other than tensors, which are not unpickled because that can run any code "
                f"({line.strip()}); if you trust the file, {trusted}"
            )
    first = next(iter(str(error).splitlines()), "").split(". ")[0]
    return f"is not a file that torch.load can read: {first or type(error).__name__}"


def _damaged(path: str | os.PathLike[str]) -> bool:
    """Whether a file that begins as torch's do, or with zeros, or not at all, is not whole."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(len(_SIGNATURE))
    except OSError:
        return False
    if head == _SIGNATURE:
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
        except Exception:  # it raises many kinds too
            return True
    return _SIGNATURE.startswith(head) or not any(head)

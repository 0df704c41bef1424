"""The two errors of this package: a file that could not be made, and a file that could not be measured."""

from __future__ import annotations


class ExportError(RuntimeError):
    """The network could not be exported, or the file does not compute what the network computes."""


class EvaluationError(RuntimeError):
    """The metrics could not be computed, or would not have been those of the file."""


def first_line(error: Exception) -> str:
    r"""The first line of an error's message: what fits into a note.

    Example:
        >>> first_line(ValueError("one\ntwo"))
        'one'
    """
    return next(iter(str(error).splitlines()), "")

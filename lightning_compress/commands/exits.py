"""How a command ends: its exit code, and one line for people. Nothing heavy is imported here."""

from __future__ import annotations

LONGEST = 400
"""Characters of a message from elsewhere; torch lists every weight that does not fit."""


class UsageError(ValueError):
    """What a command was given cannot work; the message names the argument, the value, and what is accepted."""


def one_line(error: object) -> str:
    """A message from elsewhere in one line that is not too long.

    Args:
        error: An exception, or its text.

    Returns:
        Its words; of a long one the first.

    Example:
        >>> one_line(ValueError("this   and that"))
        'this and that'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."

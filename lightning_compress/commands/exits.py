"""How a command ends: its exit code, and one line for people. Nothing heavy is imported here."""

from __future__ import annotations

import sys

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LONGEST = 400
"""Characters of a message from elsewhere; torch lists every weight that does not fit."""


class UsageError(ValueError):
    """What a command was given cannot work; the message names the argument, the value, and what is accepted."""


def ended(command: str, code: int, message: str) -> int:
    """Say how a command ended: on standard output if it is done, else in one line on standard error.

    Args:
        command: Its name.
        code: How it ended.
        message: For people.

    Returns:
        The code.

    Example:
        >>> ended("export", DONE, "wrote last.onnx")
        lightning-compress export: wrote last.onnx
        0
    """
    stream = sys.stdout if code == DONE else sys.stderr
    said = message if code == DONE else " ".join(line.strip() for line in message.splitlines())
    stream.write(f"lightning-compress {command}: {said}\n")
    stream.flush()
    return code


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

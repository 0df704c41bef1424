"""How a command ends: its exit code, and one line for people. Nothing heavy is imported here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LONGEST = 400
"""Characters of a message from elsewhere; torch lists every weight that does not fit."""


class UsageError(ValueError):
    """What a command was given cannot work; the message names the argument, the value, and what is accepted."""


@contextmanager
def checking(*errors: type[Exception]) -> Iterator[None]:
    """Where something looks at what a command was given, and says with some errors that it cannot work.

    Nothing else belongs inside: a fault of this package is to end in a traceback.

    Args:
        errors: What it raises.

    Raises:
        UsageError: In their place, with the same message.

    Example:
        >>> with checking(FileNotFoundError):
        ...     raise FileNotFoundError("there is no file 'a.pt'")
        Traceback (most recent call last):
        lightning_compress.commands.exits.UsageError: there is no file 'a.pt'
    """
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(str(error)) from error


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

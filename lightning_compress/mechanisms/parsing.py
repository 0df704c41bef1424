"""What jsonargparse says of a value that it refuses, in a few words: what is accepted, what was given, the nearest.

It tells it in a chain of exceptions, one a level, whose texts repeat one another. Where a value may have several types,
the chain goes on with the first that was tried, which differs between versions; what was raised for the others is known
to the frame that raised.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from traceback import walk_tb
from types import FrameType
from typing import Any

from lightning_compress.mechanisms.selection import did_you_mean

KEY = re.compile(r'Parser key "([^"]+)"')
MISSING = re.compile(r"(?:the following arguments are required: |Option ')([^']+)(?:$|' is required but not provided)")
EXPECTED = re.compile(r"Expected an? (.+?)(\. Got value: .*)?$", re.MULTILINE)
_OTHER_TYPE = re.compile(r"Expected an? (?:<class |typing\.)")
_VALUE = re.compile(r"(?:Given|Got) value: (.*)$", re.MULTILINE)
_CONTAINER = re.compile(r"Given value type: (<class '(?:list|dict)'>)$", re.MULTILINE)
_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list",
    "<class 'collections.abc.Sequence'>": "a list",
    "<class 'dict'>": "a mapping",
    "<class 'NoneType'>": "null",
}
_EACH = {"a whole number": "whole numbers", "a number": "numbers", "a text": "texts"}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes; of what is said for each type of a union, that of the type which is meant.

    Args:
        error: What a parser has raised.

    Yields:
        The exceptions, the innermost last.

    Example:
        >>> list(chain(ValueError("a")))
        [ValueError('a')]
    """
    link: BaseException | None = error
    while link is not None:
        yield link
        if MISSING.match(str(link)):  # what it comes from is a look-up
            return
        meant = (cause for cause in _of_each_type(link) if not _OTHER_TYPE.match(str(cause)))
        link = next(meant, link.__cause__)


def frames(error: BaseException) -> Iterator[FrameType]:
    """Where an exception was raised.

    Args:
        error: The exception.

    Returns:
        Frames, the outermost first.

    Example:
        >>> list(frames(ValueError("never raised")))
        []
    """
    for frame, _ in walk_tb(error.__traceback__):
        yield frame


def refusal(error: BaseException, values: Mapping[str, Any]) -> str:
    """Why the arguments of a class were refused.

    Args:
        error: What a parser has raised.
        values: The arguments, as they were given.

    Returns:
        One line.

    Example:
        >>> from jsonargparse import ArgumentParser
        >>> parser = ArgumentParser(exit_on_error=False)
        >>> _ = parser.add_argument("--sparsity", type=float)
        >>> try:
        ...     parser.parse_object({"sparsity": "half"})
        ... except Exception as error:
        ...     refusal(error, {"sparsity": "half"})
        "sparsity must be a number, got 'half'"
    """
    links = list(chain(error))
    names = [match[1] for match in map(KEY.match, map(str, links)) if match]
    if not names or not EXPECTED.match(str(links[-1])):
        return " ".join(str(error).split())
    known = names[0] in values and {*names} == {names[0]}
    return f"{names[-1]} {wrong_value(links, repr(values[names[0]]) if known else None)}"


def wrong_value(links: Sequence[BaseException], given: str | None = None) -> str:
    """What the innermost argument accepts, of all its types, and what it was given.

    Args:
        links: A chain that ends with what some type says of a value.
        given: The value in words; as the parser shows it, where that is not known.

    Returns:
        The end of a sentence that begins with the argument's name.

    Example:
        >>> wrong_value([ValueError("Expected a <class 'float'>. Got value: half")])
        "must be a number, got 'half'"
    """
    text = _of_all_types(links)
    words: list[str] = []
    accepted: list[str] = []
    for kind, of_an_entry in EXPECTED.findall(text):
        if kind.startswith("typing.Literal["):
            own = [str(word) for word in ast.literal_eval(kind.removeprefix("typing.Literal"))]
            words += own
            accepted += own
            continue
        said = "the dotted path of a function" if kind.startswith("dot import") else _WORDS.get(kind, kind)
        if of_an_entry and (container := _CONTAINER.search(text)):
            said = f"{_WORDS[container[1]]} of {_EACH.get(said, said)}"
        accepted.append(said)
    accepted.sort(key="null".__eq__)  # the last, wherever a version tries it
    value = _VALUE.findall(text)[-1] if _VALUE.search(text) else "nothing"
    return f"must be {_either(accepted)}, got {given or repr(value)}{did_you_mean(value, words)}"


def _of_each_type(error: BaseException) -> list[BaseException]:
    """What was raised for each type of a union: the cause is the first of them, the frame that raised has them all."""
    *_, frame = (None, *frames(error))
    if frame is None or not str(frame.f_globals.get("__name__", "")).startswith("jsonargparse"):
        return []
    lists = (value for value in frame.f_locals.values() if isinstance(value, list))
    return next((value for value in lists if value and all(isinstance(entry, Exception) for entry in value)), [])


def _of_all_types(links: Sequence[BaseException]) -> str:
    """What is said of the innermost argument: of each of its types, where there are several."""
    key = max((index for index, link in enumerate(links) if KEY.match(str(link))), default=-1)
    return str(links[min(key + 1, len(links) - 1)])


def _either(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} or {last}" if others else last

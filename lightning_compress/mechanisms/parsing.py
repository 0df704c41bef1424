"""What jsonargparse says of a value that it refuses, in a few words: what is accepted, what was given, the nearest.

It tells it in a chain of exceptions, one a level, whose texts repeat one another. Where a value may have several types,
the cause is what was raised for the first that was tried, which differs between versions; the chain here goes on with
the type that was meant.
"""

from __future__ import annotations

import ast
import os
import re
import reprlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from traceback import walk_tb
from types import FrameType
from typing import Any

from lightning_compress import _compat
from lightning_compress.mechanisms.selection import did_you_mean

KEY = re.compile(r'Parser key "([^"]+)"')
_MISSING = re.compile(
    r"the following arguments are required: (?P<names>.+)"
    r"|Option '(?P<name>[^']+)' is required but not provided"  # up to jsonargparse 4.47
)
EXPECTED = re.compile(r"Expected (?P<kind>(?:an? )?.+?)(?:,? but got .*)?(?:\. Got value: (?P<value>.*))?$")
UNKNOWN = object()
"""A value that only the parser has seen."""
_OTHER_TYPE = re.compile(r"Expected an? (?:<class |typing\.)")
_LITERAL = "a typing.Literal"
_FUNCTION = re.compile(r"an? (?:dot import path string(?:: (?P<value>.*))?|import path or a subclass spec)$")
_WORDS = {
    "a <class 'int'>": "a whole number",
    "a <class 'float'>": "a number",
    "a <class 'bool'>": "true or false",
    "a <class 'str'>": "a text",
    "a <class 'list'>": "a list",
    "a <class 'tuple'>": "a list",
    "a <class 'collections.abc.Sequence'>": "a list",
    "a <class 'dict'>": "a mapping",
    "a <class 'collections.abc.Mapping'>": "a mapping",
    "a <class 'NoneType'>": "null",
}
_EACH = {
    "a whole number": "whole numbers",
    "a number": "numbers",
    "a text": "texts",
    "a list": "lists",
    "a mapping": "mappings",
}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it comes from: its cause, or what was raised for the type that was meant, of several.

    Not what an exception of this package comes from, which says that itself; but what the user's own code has raised.

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
        if missing(str(link)):  # what it comes from is a look-up
            return
        if ours(link) and not of_the_user(link.__cause__):  # told in it
            return
        meant = (cause for cause in _compat.types_tried(link) if not _OTHER_TYPE.match(str(cause)))
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


def raised_in(error: BaseException) -> str:
    """The module whose code raised an exception.

    Args:
        error: The exception.

    Returns:
        Its dotted name; empty for one that was never raised.

    Example:
        >>> raised_in(ValueError("never raised"))
        ''
    """
    return next((str(frame.f_globals.get("__name__", "")) for frame in reversed([*frames(error)])), "")


def ours(error: BaseException) -> bool:
    """Whether an exception was raised by this package.

    Args:
        error: The exception.

    Returns:
        False for one of another package, and for one that was never raised.

    Example:
        >>> ours(ValueError("never raised"))
        False
    """
    return any(map(_is_ours, [*frames(error)][-1:]))


def of_the_user(error: BaseException | None) -> bool:
    """Whether code of the user's led to an exception, rather than this package, an installed one, or none.

    Args:
        error: The exception, or None.

    Returns:
        True if a frame of its trace is in a file that no installation put there.

    Example:
        >>> of_the_user(None)
        False
    """
    paths = sysconfig.get_paths()
    installed = tuple(os.path.join(paths[name], "") for name in ("stdlib", "purelib", "platlib"))
    return error is not None and any(
        not _is_ours(frame) and not frame.f_code.co_filename.startswith(("<", *installed)) for frame in frames(error)
    )


def _is_ours(frame: FrameType) -> bool:
    """Whether it is one of this package."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]


def missing(text: str) -> str:
    """The required argument that was not given, or all of them.

    Args:
        text: What a parser says.

    Returns:
        The names; empty where something else is said.

    Example:
        >>> missing("the following arguments are required: teacher"), missing("something else")
        ('teacher', '')
    """
    match = _MISSING.match(text)
    return (match["name"] or match["names"]) if match else ""


def told(error: BaseException) -> str:
    """What an exception says, without what the next ones of a chain say: they stand below its first line.

    Args:
        error: The exception.

    Returns:
        One line: the first; of an exception of this package, which ends a chain, all of its words.

    Example:
        >>> told(ValueError("short"))
        'short'
    """
    return " ".join(str(error).split()) if ours(error) else str(error).lstrip().partition("\n")[0]


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
    found = [match[1] for match in map(KEY.match, map(str, links)) if match]
    names = [name for name, _ in groupby(found)]  # some are told twice
    said = told(links[-1])
    if left_out := missing(said):
        return f"the required key '{'.'.join([*names, left_out])}' is missing"
    if not names:
        return " ".join(str(error).split())
    if EXPECTED.match(said):
        value = values.get(names[0], UNKNOWN) if len(names) == 1 else UNKNOWN
        return f"{'.'.join(names)} {wrong_value(links, value)}"
    return f"{'.'.join(names)}: {said}"


def wrong_value(links: Sequence[BaseException], value: Any = UNKNOWN) -> str:
    """What the innermost argument accepts, of all its types, and what it was given.

    Args:
        links: A chain that ends with what some type says of a value.
        value: The value, if it is known.

    Returns:
        The end of a sentence that begins with the argument's name.

    Example:
        >>> wrong_value([ValueError("Expected a <class 'float'>. Got value: half")])
        "must be a number, got 'half'"
    """
    key = max((index for index, link in enumerate(links) if KEY.match(str(link))), default=-1)
    tried = next(filter(None, map(_compat.types_tried, reversed(links[key + 1 :]))), [links[-1]])
    matches = [match for match in map(EXPECTED.search, map(told, tried)) if match]
    seen = next((value for value in map(_value, matches) if value is not None), "nothing")
    if seen not in str(value):  # it is that of another argument of the same name
        value = UNKNOWN
    words: list[str] = []
    accepted: list[str] = []
    for match in matches:
        kind = match["kind"]
        if kind.startswith(_LITERAL):
            own = _offered(kind.removeprefix(_LITERAL))
            words += own
            accepted += own
            continue
        said = "the dotted path of a function" if _FUNCTION.match(kind) else _WORDS.get(kind, kind)
        if isinstance(value, (list, Mapping)) and _value(match) not in (None, str(value)):  # one of its entries
            said = f"a {'list' if isinstance(value, list) else 'mapping'} of {_EACH.get(said, said)}"
        accepted.append(said)
    accepted = sorted(dict.fromkeys(accepted), key="null".__eq__)  # null last, wherever a version tries it
    given = repr(seen) if value is UNKNOWN else reprlib.repr(value)
    return f"must be {_either(accepted)}, got {given}{did_you_mean(seen, words)}"


def _offered(values: str) -> list[str]:
    """The values of a Literal, as YAML has them."""
    try:
        return ["null" if value is None else str(value) for value in ast.literal_eval(values)]
    except (SyntaxError, ValueError):  # members of an Enum
        return [values.strip("[]")]


def _value(match: re.Match[str]) -> str | None:
    """The value in what is said for a type."""
    of_function = _FUNCTION.match(match["kind"])
    value: str | None = of_function["value"] if match["value"] is None and of_function else match["value"]
    return value


def _either(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} or {last}" if others else last

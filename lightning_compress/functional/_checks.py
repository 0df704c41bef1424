"""Checks of arguments, with messages of one form: the argument, what is accepted, what was given, the nearest name.

NumPy's numbers are numbers, and come back as Python's; booleans are none, and NaN is in no range.
"""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**63 - 1  # what a seed, a counter in a tensor and a file can hold
LENGTH = 80


def shown(value: Any) -> str:
    """At most 80 characters of a value, on one line, however large it is and whatever its ``repr`` does."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, LENGTH, LENGTH, LENGTH
    try:
        text = " ".join(short.repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        text = f"a very large {type(value).__name__}"
    except Exception:  # it is the user's
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Suggest the candidate closest to a name that does not exist, as the end of an error message.

    Args:
        name: What the user wrote.
        candidates: What would have been accepted.

    Returns:
        ``"; did you mean '...'?"`` with the candidate spelled most alike, else with one that ends in ``.name``;
        empty if there is neither.

    Example:
        >>> did_you_mean("layr1", ["conv1", "layer1", "layer2"])
        "; did you mean 'layer1'?"
    """
    candidates = list(candidates)
    close = get_close_matches(name, candidates, n=1) or [
        candidate for candidate in candidates if candidate.lower() == name.lower()
    ]
    close += [candidate for candidate in candidates if candidate.endswith(f".{name}")]
    return f"; did you mean '{close[0]}'?" if close else ""


def check_choice(argument: str, value: Any, accepted: Sequence[str]) -> str:
    """Refuse what is not one of the accepted words; the message names the nearest."""
    if isinstance(value, str) and value in accepted:
        return str(value)
    nearest = did_you_mean(value, accepted) if isinstance(value, str) else ""
    raise ValueError(f"{argument} must be one of {', '.join(accepted)}, got {shown(value)}{nearest}")


def check_number(argument: str, value: Any, accepted: str, fits: Callable[[float], bool]) -> float:
    """Refuse what is no finite number, or does not fit.

    Args:
        argument: Its name.
        value: What was given.
        accepted: What would be, for the message.
        fits: Whether a number is in the range.

    Returns:
        A number of Python; whole numbers stay whole.
    """
    number = _plain(value)
    if number is None or not abs(number) <= sys.float_info.max or not fits(number):
        raise ValueError(f"{argument} must be {accepted}, got {shown(value)}")
    return number


def _plain(value: Any) -> float | None:
    """A number of any kind as one of Python; None for what is none."""
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:
        return math.inf


def check_positive(argument: str, value: Any, accepted: str = "a positive number") -> float:
    """Refuse what is no positive, finite number."""
    return check_number(argument, value, accepted, lambda number: number > 0)


def check_at_least_zero(argument: str, value: Any) -> float:
    """Refuse what is no finite number from 0 on."""
    return check_number(argument, value, "a number of at least 0", lambda number: number >= 0)


def check_fraction(
    argument: str, value: Any, *, below_one: bool = False, above_zero: bool = False, or_auto: bool = False
) -> float:
    """Refuse what is no number from 0 to 1; or, if wanted, the ends. What the message says of "auto" is not checked."""

    def fits(number: float) -> bool:
        return 0 <= number <= 1 and not (below_one and number == 1) and not (above_zero and number == 0)

    accepted = (
        f"a number in {'(' if above_zero else '['}0, 1{')' if below_one else ']'}{', or auto' if or_auto else ''}"
    )
    percent = _plain(value)
    if percent is not None and 1 < percent < 100:
        raise ValueError(f"{argument} must be {accepted}, got {shown(value)}; did you mean {percent / 100}?")
    return check_number(argument, value, accepted, fits)


def check_whole(argument: str, value: Any, *, at_least: int, at_most: int = LARGEST) -> int:
    """Refuse what is no whole number, or out of its range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not at_least <= int(value) <= at_most:
        most = "of at least" if at_most == LARGEST else "from"
        end = "" if at_most == LARGEST else f" to {at_most}"
        raise ValueError(f"{argument} must be a whole number {most} {at_least}{end}, got {shown(value)}")
    return int(value)


def check_flag(argument: str, value: Any) -> bool:
    """Refuse what is neither True nor False, such as "no"."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {shown(value)}")
    return value


def check_name(
    argument: str, value: Any, *, what: str = "the dotted name of a module", may_be_empty: bool = True
) -> str | None:
    """Refuse what is neither a name nor None; the empty name is that of the whole module."""
    if value is not None and (not isinstance(value, str) or not (value or may_be_empty)):
        raise TypeError(f"{argument} must be {what}, or None, got {shown(value)}")
    return value


def check_path(argument: str, value: Any) -> str:
    """Refuse what cannot be a path at all."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{argument} must be a string or a path, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{argument} must not be empty or hold a NUL character, got {shown(text)}")
    return text


def check_tensor(argument: str, value: Any) -> Tensor:
    """Refuse what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {shown(value)}")
    return value


def check_floating(argument: str, value: Any) -> Tensor:
    """Refuse what is no tensor of floating point numbers."""
    if not check_tensor(argument, value).is_floating_point():
        raise TypeError(f"{argument} must be floating point, got dtype {value.dtype}")
    return value  # type: ignore[no-any-return]


def check_tensors(argument: str, value: Any, kind: str | None = None) -> Sequence[Tensor]:
    """Refuse what is no list of tensors with at least one; of a kind, "floating point" or "boolean", if wanted."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{argument} must be a list of tensors, got {shown(value)}")
    if not value:
        raise ValueError(f"{argument} must hold at least one tensor, got {shown(value)}")
    for tensor in value:
        check_tensor(f"each of {argument}", tensor)
        if kind == "floating point" and not tensor.is_floating_point():
            raise TypeError(f"{argument} must be floating point, got dtype {tensor.dtype}")
        if kind == "boolean" and tensor.dtype != torch.bool:
            raise TypeError(f"{argument} must be boolean, got dtype {tensor.dtype}")
    return value


def check_numbers(argument: str, value: Any) -> Sequence[Any]:
    """Refuse what is no list at all; what it holds is for others to check."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{argument} must be a list of numbers, got {shown(value)}")
    return value


def check_axis(axis: Any, tensor: Tensor) -> int | None:
    """Refuse what is neither a dimension of a tensor nor None."""
    if axis is not None and not -tensor.ndim <= check_whole("axis", axis, at_least=-LARGEST) < tensor.ndim:
        raise ValueError(f"axis must be a dimension of a tensor of shape {tuple(tensor.shape)}, or None, got {axis}")
    return axis  # type: ignore[no-any-return]


def check_unit(argument: str, value: Any) -> float:
    """Refuse what is not in [0, 1]."""
    return check_number(argument, value, "in [0, 1]", lambda number: 0 <= number <= 1)


def is_finite(number: float) -> bool:
    """For :func:`check_number`, where every number will do."""
    return True

"""What callbacks keep in checkpoints, in words that can be checked: files are cut, edited, and made by others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.functional._checks import shown


@dataclass(frozen=True)
class Each:
    """A mapping from any names to values of one kind."""

    kind: Any


@dataclass(frozen=True)
class Sometimes:
    """An entry that not every state has: of a later version, or of one way to train; each that has another one has."""

    kind: Any
    beside: str | None = None


@dataclass(frozen=True)
class Row:
    """A list with a kind for each place, of which the last may be missing where there are fewer."""

    kinds: tuple[Any, ...]
    fewest: int


GRIDS: Mapping[str, Any] = {
    "network": str,
    "weights": Each({"step": Tensor, "bits": int}),
    "activations": Each(Row((float, int, int), 3)),
    "sites": Each(Row((str, int, int, (str, None), (str, None)), 3)),
    "folds": Each(str),
    "biases": Each(Tensor),
    "statistics": Each(Row((Tensor, Tensor), 2)),
    "divisors": Each(Tensor),
    "factors": Each(Tensor),
    "fingerprints": Each(int),
    "left_in_float": [str],
    "integer_activations": bool,
    "training_only": Sometimes([str]),
    "shared": Sometimes([str]),
    "following": Sometimes(bool),
}
"""What ``Grids.state`` gives, but for what was added later."""


def damage(value: Any, kind: Any, place: str = "") -> str | None:
    """What is wrong with a part of a state.

    Args:
        value: The part.
        kind: What it should be: a class; None; a tuple of kinds, of which one is enough; a list with the kind of each
            entry; :class:`Each`; :class:`Row`; or a mapping from the keys that it has at least to their kinds.
        place: Where it is in the state.

    Returns:
        A sentence; None where it is as it should be.

    Example:
        >>> damage({"masks": None}, {"masks": Each(Tensor)})
        "'masks' must be a mapping, got None"
        >>> damage({"masks": {}}, {"masks": Each(Tensor), "begun": bool, "own": Sometimes(Mapping)})
        "'begun' is missing"
    """
    kind = kind.kind if isinstance(kind, Sometimes) else kind
    if isinstance(kind, tuple):
        problems = [damage(value, own, place) for own in kind]
        return None if None in problems else problems[0]
    wanted, inner = _wanted(kind)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (int, (int, float))):
        return f"{repr(place) if place else 'it'} must be {_WORDS.get(wanted, 'of another type')}, got {shown(value)}"
    if isinstance(kind, Mapping):
        needed = (key for key, own in kind.items() if not isinstance(own, Sometimes) or own.beside in value)
        if missing := [key for key in needed if key not in value]:
            return f"'{_joined(place, missing[0])}' is missing"
        entries = [(key, value[key], own) for key, own in kind.items() if key in value]
    elif isinstance(kind, Row):
        if not kind.fewest <= len(value) <= len(kind.kinds):
            return f"'{place}' must have {len(kind.kinds)} entries, got {shown(value)}"
        entries = [(str(index), *pair) for index, pair in enumerate(zip(value, kind.kinds, strict=False))]
    elif inner is None:
        return None
    else:
        entries = [(key, own, inner) for key, own in (value.items() if wanted is Mapping else enumerate(value))]
    problems = [damage(part, own, _joined(place, key)) for key, part, own in entries]
    return next((problem for problem in problems if problem is not None), None)


_WORDS: Mapping[Any, str] = {
    Mapping: "a mapping",
    (list, tuple): "a list",
    (int, float): "a number",
    int: "a whole number",
    str: "a string",
    bool: "True or False",
    Tensor: "a tensor",
    type(None): "None",
}


def _wanted(kind: Any) -> tuple[Any, Any]:
    """The class of a value, and the kind of what it holds, if all of that is of one kind."""
    if isinstance(kind, Each):
        return Mapping, kind.kind
    if isinstance(kind, list):
        return (list, tuple), kind[0]
    if isinstance(kind, Row):
        return (list, tuple), None
    if isinstance(kind, Mapping):
        return Mapping, None
    if kind is None:
        return type(None), None
    return {float: (int, float), list: (list, tuple), dict: Mapping}.get(kind, kind), None


def _joined(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)

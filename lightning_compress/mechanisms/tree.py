"""Nested inputs and outputs of a network: their tensors by name, and the same structure with other tensors in it.

Dicts, lists, tuples, named tuples and dataclasses are followed (so is a ``ModelOutput``, which is a dict).
``torch.utils._pytree`` is not used because it takes an unregistered dataclass for a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def children(value: Any) -> list[tuple[str, Any]] | None:
    """Name and value of what lies directly inside ``value``, or None if it is a leaf.

    Args:
        value: Anything.

    Returns:
        Pairs of name and value.

    Example:
        >>> children({"a": 1}), children(1)
        ([('a', 1)], None)
    """
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a nested structure with its name: the keys on the way to it, joined by ``_``.

    Args:
        value: A nested structure.
        prefix: What the names begin with.

    Yields:
        Name and leaf.

    Example:
        >>> list(leaves({"a": 1, "b": (2, [3])}))
        [('a', 1), ('b_0', 2), ('b_1_0', 3)]
    """
    inside = children(value)
    if inside is None:
        yield prefix, value
        return
    for name, child in inside:
        yield from leaves(child, f"{prefix}_{name}" if prefix else name)


def named_tensors(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """The tensors among the leaves of ``value``, in order, with their names.

    Args:
        value: A nested structure.
        prefix: What the names begin with.

    Returns:
        Pairs of name and tensor.

    Example:
        >>> import torch
        >>> named_tensors({"x": torch.zeros(1), "n": 3})
        [('x', tensor([0.]))]
    """
    return [(name, leaf) for name, leaf in leaves(value, prefix) if isinstance(leaf, Tensor)]


def rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same structure with ``leaf(x)`` in the place of each leaf ``x``; ``value`` itself is left alone.

    Args:
        value: A nested structure.
        leaf: From a leaf to what takes its place.

    Returns:
        New containers of the same types.

    Example:
        >>> rebuild({"a": 1, "b": (2, [3])}, lambda number: number * 10)
        {'a': 10, 'b': (20, [30])}
    """
    inside = children(value)
    if inside is None:
        return leaf(value)
    new = [rebuild(child, leaf) for _, child in inside]
    if isinstance(value, tuple):
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if isinstance(value, list):
        return type(value)(new)
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        return dict(zip(value, new, strict=True))
    result = copy.copy(value)
    if isinstance(result, MutableMapping):
        for key, child in zip(value, new, strict=True):
            result[key] = child
    else:
        for (name, _), child in zip(inside, new, strict=True):
            object.__setattr__(result, name, child)  # also into a frozen dataclass
    return result


def with_tensors(value: Any, tensors: Iterable[Tensor]) -> Any:
    """The structure of ``value`` with its tensors replaced, in order, by ``tensors``.

    Numbers, strings and None stay; any other object becomes None, because it may hold tensors of another call.

    Args:
        value: A nested structure.
        tensors: As many as ``value`` holds.

    Returns:
        New containers of the same types.

    Example:
        >>> import torch
        >>> with_tensors({"x": torch.zeros(1), "n": 3}, [torch.ones(1)])
        {'x': tensor([1.]), 'n': 3}
    """
    remaining = iter(tensors)

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return next(remaining)
        return leaf if is_constant(leaf) else None

    return rebuild(value, replaced)


def is_constant(leaf: Any) -> bool:
    """Whether a leaf is a plain value that an exported file can only hold as a constant.

    Args:
        leaf: Anything.

    Returns:
        True for None, numbers and strings.

    Example:
        >>> is_constant(3), is_constant(object())
        (True, False)
    """
    return leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes))


def unique_names(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Names fit for a file: letters, digits and ``_`` only, each once and none of ``taken``.

    Args:
        names: What to start from.
        taken: Names that are in use.

    Returns:
        One name for each.

    Example:
        >>> unique_names(["x", "x", "layer.1"], taken=["layer_1"])
        ['x', 'x_1', 'layer_1_1']
    """
    used = set(taken)
    result = []
    for name in names:
        stem = candidate = re.sub(r"\W", "_", name) or "value"
        number = 0
        while candidate in used:
            number += 1
            candidate = f"{stem}_{number}"
        used.add(candidate)
        result.append(candidate)
    return result


def detached(leaf: Any) -> Any:
    """A leaf without its graph, for :func:`rebuild`.

    Args:
        leaf: Anything.

    Returns:
        A tensor detached; anything else as it is.

    Example:
        >>> import torch
        >>> detached(torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    return leaf.detach() if isinstance(leaf, Tensor) else leaf

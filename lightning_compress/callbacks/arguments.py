"""Checks of arguments that several callbacks make, with messages of one form."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning_compress.functional._checks import LARGEST
from lightning_compress.functional._checks import check_at_least_zero as check_at_least_zero
from lightning_compress.functional._checks import check_choice as check_choice
from lightning_compress.functional._checks import check_flag as check_flag
from lightning_compress.functional._checks import check_fraction as check_fraction
from lightning_compress.functional._checks import check_name as check_name
from lightning_compress.functional._checks import check_number as check_number
from lightning_compress.functional._checks import check_path as check_path
from lightning_compress.functional._checks import check_positive as check_positive
from lightning_compress.functional._checks import check_whole as check_whole
from lightning_compress.functional._checks import shown as shown
from lightning_compress.functional.quantizers import check_bits
from lightning_compress.mechanisms.selection import check_selectors


def is_auto(value: Any) -> bool:
    """Whether it is the word "auto"; arrays and tensors, which compare entry by entry, are not."""
    return isinstance(value, str) and value == "auto"


def check_names(argument: str, value: Any) -> Any:
    """Refuse what is neither a dotted name, a list of some, nor None."""
    if value is None or isinstance(value, str):
        return value
    names = list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{argument} must be the dotted name of a module, a list of such names, or None, got {shown(value)}"
        )
    return value


def check_layers(layers: Any, exclude: Any) -> None:
    """Refuse selectors that cannot select: no lists of strings, none at all, malformed expressions."""
    for argument, value in (("layers", layers), ("exclude", exclude)):
        if value is not None:
            check_selectors(value, argument, empty=argument == "exclude")


def check_locator(argument: str, value: Any) -> None:
    """Refuse what is no place in the output of a network, or in a batch."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise TypeError(f"{argument} must be a key, the name of an attribute, an index, or None, got {shown(value)}")


def check_dimension(argument: str, value: Any) -> int | None:
    """Refuse what is neither a whole number, which may be negative, nor None."""
    return None if value is None else check_whole(argument, value, at_least=-LARGEST)


def absolute_path(argument: str, value: Any) -> str | None:
    """The place of a file, whatever the working directory will be; None stays None."""
    return None if value is None else os.path.abspath(check_path(argument, value))


EDGE_BITS, FEW_BITS = 8, 4
"""The first and the last layer have the former where the others have fewer than the latter."""


def edge_bits_of(edge_bits: int | Literal["auto"] | None, bits: int) -> int | None:
    """The bits of the first and the last layer.

    Args:
        edge_bits: What the user gave.
        bits: Those of the other layers.

    Returns:
        2 to 8; None: as the others.
    """
    if edge_bits != "auto":
        return edge_bits
    return EDGE_BITS if bits < FEW_BITS else None


def check_edge_bits(edge_bits: Any) -> Any:
    """Refuse what is neither bits of a grid, "auto", nor None."""
    if edge_bits is None or is_auto(edge_bits):
        return edge_bits
    return check_bits(edge_bits, "edge_bits, if neither 'auto' nor None,")


def check_layer_bits(layer_bits: Any) -> dict[str, int] | None:
    """Refuse what is neither None nor a mapping from selectors of layers to bits of a grid."""
    if layer_bits is None:
        return None
    if not isinstance(layer_bits, Mapping):
        raise TypeError(
            f"layer_bits must be a mapping from selectors of layers to bits, or None, got {shown(layer_bits)}"
        )
    check_selectors(list(layer_bits), "layer_bits", empty=True)
    return {selector: check_bits(bits, f"layer_bits['{selector}']") for selector, bits in layer_bits.items()}


def tell_without_effect(owner: object, kind: type, because: str, **given: Any) -> None:
    """Warn of arguments that are not at their defaults where they have no effect; whoever tries several may mean it.

    Args:
        owner: What is built.
        kind: The class whose ``__init__`` makes the call. Values are compared with its defaults, and never with those
            of a subclass, which passes on what it likes: as if this class had been built with them.
        because: What makes them so, such as "schedule='one_shot'".
        given: Their values, once each of them is checked.
    """
    for argument, value in given.items():
        usual = default_of(kind, argument)
        if value != usual:
            warnings.warn(
                f"{type(owner).__name__}: {argument}={shown(value)} has no effect with {because}; leave it out (its "
                f"default is {shown(usual)})",
                stacklevel=3,
            )


def default_of(kind: type, argument: str) -> Any:
    """The default of an argument, which stands in the signature alone."""
    return inspect.signature(kind).parameters[argument].default


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments; True where Python cannot tell."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True

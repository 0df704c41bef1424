"""Checks of arguments that several callbacks make, with messages of one form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning_compress.functional.quantizers import check_bits
from lightning_compress.mechanisms.selection import did_you_mean


def check_choice(argument: str, value: Any, accepted: Sequence[str]) -> None:
    """Refuse what is not one of the accepted words; the message names the nearest."""
    if value not in accepted:
        raise ValueError(
            f"{argument} must be one of {', '.join(accepted)}, got {value!r}{did_you_mean(str(value), accepted)}"
        )


def check_positive(argument: str, value: Any, accepted: str = "a positive number") -> None:
    """Refuse what is no positive, finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{argument} must be {accepted}, got {value!r}")


def check_whole(argument: str, value: Any, *, at_least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{argument} must be a whole number of at least {at_least}, got {value!r}")


def check_flag(argument: str, value: Any) -> None:
    """Refuse what is neither True nor False, such as "no"."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {value!r}")


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


def check_edge_bits(edge_bits: Any) -> None:
    """Refuse what is neither bits of a grid, "auto", nor None."""
    if edge_bits is not None and edge_bits != "auto":
        check_bits(edge_bits, "edge_bits, if neither 'auto' nor None,")


def check_layer_bits(layer_bits: Any) -> None:
    """Refuse what is neither None nor a mapping from selectors of layers to bits of a grid."""
    if layer_bits is None:
        return
    if not isinstance(layer_bits, Mapping) or not all(isinstance(selector, str) for selector in layer_bits):
        raise TypeError(f"layer_bits must be a mapping from selectors of layers to bits, or None, got {layer_bits!r}")
    for selector, bits in layer_bits.items():
        check_bits(bits, f"layer_bits['{selector}']")


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments; True where Python cannot tell."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def check_fraction(
    argument: str, value: Any, *, below_one: bool = False, above_zero: bool = False, or_auto: bool = False
) -> None:
    """Refuse what is no number from 0 to 1; or, if wanted, the ends. What the message says of "auto" is not checked."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1) or (above_zero and value == 0):
        meant = f"; did you mean {value / 100}?" if number and 1 < value < 100 else ""
        accepted = (
            f"a number in {'(' if above_zero else '['}0, 1{')' if below_one else ']'}{', or auto' if or_auto else ''}"
        )
        raise ValueError(f"{argument} must be {accepted}, got {value!r}{meant}")

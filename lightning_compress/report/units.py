"""Numbers as people read them: three significant digits, a unit, and a ratio in words. ASCII only, for any terminal."""

from __future__ import annotations

import math

MISSING = "-"  # what was not measured


def count(value: float | None) -> str:
    """A number of things, with k, M or G.

    Example:
        >>> count(272), count(271_824), count(11_689_512), count(None)
        ('272', '272 k', '11.7 M', '-')
    """
    return _scaled(value, "")


def size(value: float | None) -> str:
    """Bytes, with decimal units.

    Example:
        >>> size(512), size(1_094_000)
        ('512 B', '1.09 MB')
    """
    return _scaled(value, "B")


def milliseconds(value: float | None) -> str:
    """Milliseconds.

    Example:
        >>> milliseconds(0.01451), milliseconds(3.0), milliseconds(1234.5)
        ('0.0145 ms', '3.00 ms', '1234 ms')
    """
    return MISSING if value is None else f"{significant(value)} ms"


def metric(value: float | None) -> str:
    """A metric of any scale; NaN and infinities keep their names.

    Example:
        >>> metric(0.92671), metric(12.0), metric(1.5e-7), metric(float("nan"))
        ('0.9267', '12', '1.5e-07', 'nan')
    """
    return MISSING if value is None else f"{value:.4g}"


def share(value: float) -> str:
    """A fraction as a percentage.

    Example:
        >>> share(0.9), share(0.005), share(0.99999)
        ('90%', '0.5%', '>99.9%')
    """
    percent = 100 * value
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.3g}%"


def times(value: float | None, reference: float | None, less: str, more: str) -> str:
    """How many times less or more than a reference, in words.

    Args:
        value: What is compared.
        reference: What it is compared with.
        less: The word for a smaller value, such as ``"smaller"``.
        more: The word for a larger one.

    Returns:
        Such as ``"3.7x smaller"``; empty when they differ by less than half a percent or cannot be compared.

    Example:
        >>> times(270, 1000, "smaller", "larger"), times(1001, 1000, "smaller", "larger")
        ('3.7x smaller', '')
    """
    if not value or not reference or not math.isfinite(value) or not math.isfinite(reference):
        return ""
    ratio = value / reference
    if abs(ratio - 1) < 0.005:
        return ""
    factor = max(ratio, 1 / ratio)
    digits = f"{factor:.2f}" if factor < 1.95 else f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"
    return f"{digits}x {less if ratio < 1 else more}"


def significant(value: float, digits: int = 3) -> str:
    """Some significant digits without an exponent; never less than the whole number.

    Example:
        >>> significant(0.01451), significant(271.824), significant(0.2196, 2), significant(0)
        ('0.0145', '272', '0.22', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.9996 is 1.00
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def shortened(name: str, length: int) -> str:
    """A name with its middle left out where it is too long: files differ in their beginnings and in their ends.

    Example:
        >>> shortened("student_of_resnet.int8.onnx", 17), shortened("after", 17)
        ('student...t8.onnx', 'after')
    """
    if len(name) <= length:
        return name
    half = max(1, (length - 3) // 2)
    return f"{name[:half]}...{name[-half:]}"


def _scaled(value: float | None, unit: str) -> str:
    if value is None:
        return MISSING
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{significant(value / factor)} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()

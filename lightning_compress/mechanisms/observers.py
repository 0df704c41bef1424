"""Observers: see one activation in batch after batch, and give the range to quantise it in.

Extremes, and percentiles, squared error and entropy of a histogram, compared by Wu et al., "Integer quantization for
deep learning inference", 2020, arXiv:2004.09602. The moving average is that of Jacob et al., "Quantization and training
of neural networks", CVPR 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional.quantizers import check_bits
from lightning_compress.functional.ranges import entropy_range, mse_range, percentile_range
from lightning_compress.mechanisms.selection import did_you_mean, listing

OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "entropy")
BINS = 4096  # the most that a histogram has; as it has more than half as many, at least 8 to each of 256 integers
PIECE = 1 << 16  # values that are sorted into bins at a time: few enough for a cache, and for little memory

RangeOf = Callable[[Tensor, float, float], tuple[float, float]]
"""A function ``(histogram, minimum, maximum)`` that returns a range."""


class Observer(Protocol):
    """What sees an activation and gives its range."""

    def observe(self, x: Tensor) -> None:
        """See a batch of the activation.

        Args:
            x: Floating, of any shape, type and device. Without elements it changes nothing.

        Raises:
            ValueError: If a value is NaN or infinite; the batch is then not counted.
        """

    def range(self) -> tuple[float, float]:
        """The range to quantise in, 0 in it.

        Raises:
            ValueError: If nothing was observed.
        """


def make_observer(kind: str, bits: int) -> Observer:
    """A new observer.

    Args:
        kind: One of ``OBSERVERS``. "minmax" takes the smallest and largest value of all batches; "moving_average"
            averages those of each batch; "percentile", "mse" and "entropy" clip what lies far out. All but the moving
            average give the same whatever the order of the batches.
        bits: Width of the unsigned integers, in [2, 8].

    Returns:
        One that has observed nothing.

    Raises:
        ValueError: If ``kind`` is unknown or ``bits`` is not in [2, 8].

    Example:
        >>> observer = make_observer("minmax", bits=8)
        >>> observer.observe(torch.tensor([-1.0, 0.5]))
        >>> observer.observe(torch.tensor([0.25, 2.0]))
        >>> observer.range()
        (-1.0, 2.0)
    """
    check_bits(bits)
    if kind == "minmax":
        return MinMaxObserver()
    if kind == "moving_average":
        return MovingAverageObserver()
    if kind == "percentile":
        return HistogramObserver(kind, percentile_range)
    if kind == "mse":
        return HistogramObserver(kind, partial(mse_range, bits=bits), zeros=False)
    if kind == "entropy":
        return HistogramObserver(kind, partial(entropy_range, bits=bits), zeros=False)
    raise ValueError(f"an observer must be one of {listing(OBSERVERS)}, got {kind!r}{did_you_mean(kind, OBSERVERS)}")


class MinMaxObserver:
    """The smallest and the largest value of all batches."""

    def __init__(self) -> None:
        self._extremes: tuple[float, float] | None = None

    def observe(self, x: Tensor) -> None:
        """See a batch, as in :class:`Observer`."""
        if (found := _extremes(x)) is not None:
            seen = self._extremes or found
            self._extremes = min(seen[0], found[0]), max(seen[1], found[1])

    def range(self) -> tuple[float, float]:
        """The range, as in :class:`Observer`."""
        return _with_zero(self._extremes, "minmax")


class MovingAverageObserver:
    """Moving averages of the smallest and of the largest value of each batch.

    Args:
        momentum: Weight of a new batch, in (0, 1]; the first one has all.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        self._momentum = momentum
        self._averages: tuple[float, float] | None = None

    def observe(self, x: Tensor) -> None:
        """See a batch, as in :class:`Observer`."""
        if (found := _extremes(x)) is not None:
            low, high = self._averages or found
            self._averages = low + self._momentum * (found[0] - low), high + self._momentum * (found[1] - high)

    def range(self) -> tuple[float, float]:
        """The range, as in :class:`Observer`."""
        return _with_zero(self._averages, "moving_average")


class HistogramObserver:
    """A range found from a histogram of all batches.

    Bins are a power of two wide, and bin k goes from k to k + 1 widths. When values come that would need more than
    ``BINS`` of them, the width doubles, and bins 2k and 2k + 1 become bin k: the histogram is exactly what it would
    have been, had all batches been there at once. One value far larger than all others makes bins wide.

    Args:
        kind: What error messages call it.
        find: Gives the range. Where all values have the same sign, it is cut to those that were observed.
        zeros: Whether values that are exactly 0 count.
    """

    def __init__(self, kind: str, find: RangeOf, *, zeros: bool = True) -> None:
        self._kind, self._find, self._zeros = kind, find, zeros
        self._extremes: tuple[float, float] | None = None
        self._exponent = -126  # of the width: 1 over it is still a float32
        self._first = 0  # number of the first bin
        self._counts = torch.zeros(1, dtype=torch.int64)

    def observe(self, x: Tensor) -> None:
        """See a batch, as in :class:`Observer`."""
        found = _extremes(x)
        if found is None:
            return
        seen = self._extremes or (0.0, 0.0)
        self._extremes = min(seen[0], found[0]), max(seen[1], found[1])
        self._grow(*self._extremes)
        flat = x.detach().reshape(-1)
        counts = torch.zeros(len(self._counts), dtype=torch.int64, device=x.device)
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE]
            widths = at_least_float32(piece) / math.ldexp(1.0, self._exponent)
            numbers = widths.long() - self._first - (piece < 0).long()  # as in _bin
            counts += torch.bincount(numbers, minlength=len(counts))
        self._counts += counts.cpu()
        if not self._zeros:
            self._counts[-self._first] -= len(flat) - int(flat.count_nonzero())

    def range(self) -> tuple[float, float]:
        """The range, as in :class:`Observer`."""
        minimum, maximum = _with_zero(self._extremes, self._kind)
        if not self._counts.any():
            return 0.0, 0.0  # nothing but zeros, which do not count
        width = math.ldexp(1.0, self._exponent)
        low, high = self._find(self._counts, self._first * width, (self._first + len(self._counts)) * width)
        if minimum == 0.0 or maximum == 0.0:
            return max(low, minimum), min(high, maximum)
        return low, high

    def _grow(self, minimum: float, maximum: float) -> None:
        """Make place for values from ``minimum <= 0`` to ``maximum >= 0``."""
        exponent = self._exponent
        if (largest := max(-minimum, maximum)) > 0.0:
            exponent = max(exponent, math.frexp(largest)[1] - BINS.bit_length())  # no smaller one would do
        while _bin(maximum, exponent) - _bin(minimum, exponent) >= BINS:
            exponent += 1
        first, last = _bin(minimum, exponent), _bin(maximum, exponent)
        if (exponent, first, last - first + 1) == (self._exponent, self._first, len(self._counts)):
            return
        numbers = torch.arange(self._first, self._first + len(self._counts))
        merged = (numbers >> min(exponent - self._exponent, 62)) - first  # shifted by more, an int64 is undefined
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        self._counts = counts.index_add_(0, merged, self._counts)
        self._exponent, self._first = exponent, first


def _bin(value: float, exponent: int) -> int:
    """Number of the bin that a value is in, where bins are ``2^exponent`` wide; on an edge, the one away from 0.

    It is cut off and not rounded down, since a tiny negative value divided by a large width is 0.
    """
    return int(math.ldexp(value, -exponent)) - (value < 0.0)


def _extremes(x: Tensor) -> tuple[float, float] | None:
    """The smallest and largest value, or None if there are no values."""
    if x.numel() == 0:
        return None
    low, high = (float(extreme) for extreme in torch.aminmax(x.detach()))
    if math.isnan(low):  # aminmax passes it on
        raise ValueError("an activation is NaN, so it has no range")
    if math.isinf(low) or math.isinf(high):
        raise ValueError("an activation is infinite, so it has no range")
    return low, high


def _with_zero(extremes: tuple[float, float] | None, kind: str) -> tuple[float, float]:
    if extremes is None:
        raise ValueError(f"the observer {kind!r} has seen no activation, so it has no range")
    return min(extremes[0], 0.0), max(extremes[1], 0.0)

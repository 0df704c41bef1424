"""Ranges: between which two values activations are quantised, found from a histogram of what was observed.

For affine integers (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018, arXiv:1712.05877), so 0 is in every range and exactly on the grid. Values
beyond a range are clipped to its ends, which leaves smaller steps to all the others. Percentiles, the squared error and
the entropy are compared by Wu et al., "Integer quantization for deep learning inference: principles and empirical
evaluation", 2020, arXiv:2004.09602; the entropy is that of Migacz, "8-bit inference with TensorRT", GTC 2017.

Within a bin, values count as spread evenly. All is computed in float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.functional._checks import check_number, check_tensor
from lightning_compress.functional.quantizers import integer_limits

OCTAVES = 8  # how often what is tried gets halved


def percentile_range(
    histogram: Tensor, minimum: float, maximum: float, lower: float = 0.01, upper: float = 99.99
) -> tuple[float, float]:
    """The range that leaves out a given share of the values at each end.

    Args:
        histogram: Number of values in each of B bins of equal width, shape ``(B,)``, of any type and device.
        minimum: Left edge of the first bin.
        maximum: Right edge of the last bin.
        lower: Percentile, in [0, 100], at which the range begins.
        upper: Percentile, in [0, 100] and not below ``lower``, at which the range ends.

    Returns:
        The two percentiles, interpolated within their bins; 0 in place of one on the wrong side of 0.

    Raises:
        ValueError: If ``histogram`` is not one-dimensional, is empty or has negative or non-finite counts; the edges
            are not finite or not in order; or the percentiles are outside [0, 100] or not in order.

    Example:
        >>> percentile_range(torch.tensor([1, 2, 4, 2, 1]), -1.0, 4.0, lower=5.0, upper=80.0)
        (-0.5, 2.5)
    """
    counts, width = _checked(histogram, minimum, maximum)
    for argument, percentile in (("lower", lower), ("upper", upper)):
        check_number(argument, percentile, "a percentile in [0, 100]", lambda number: 0.0 <= number <= 100.0)
    if lower > upper:
        raise ValueError(f"lower must not be above upper, got {lower} and {upper}")
    below = counts.cumsum(0)  # (B,)
    ends = []
    for percentile, right in ((lower, True), (upper, False)):  # of empty bins, neither takes any into the range
        wanted = percentile / 100.0 * below[-1]
        index = min(int(torch.searchsorted(below, wanted, right=right)), int(counts.nonzero()[-1]))
        ends.append(minimum + width * (index + 1 - float((below[index] - wanted) / counts[index])))
    return min(ends[0], 0.0), max(ends[1], 0.0)


def mse_range(histogram: Tensor, minimum: float, maximum: float, bits: int) -> tuple[float, float]:
    """The range in which quantisation has the least squared error.

    Tries steps from the one that clips nothing down to a 256th of it, each 4 % below the last, then 0.3 % apart around
    the best, and every zero point with each: as 0 is on the grid, rounding to a step costs a value the same wherever
    the range ends, so one pass over the histogram serves all zero points.

    Args:
        histogram: Number of values in each of B bins of equal width, shape ``(B,)``, of any type and device. Leave
            out values that are exactly 0: they have no error.
        minimum: Left edge of the first bin.
        maximum: Right edge of the last bin.
        bits: Width of the unsigned integers, in [2, 8].

    Returns:
        The values of the lowest and of the highest integer. Where the histogram has both signs, one of them can lie
        up to a step outside of it, since the zero point is an integer.

    Raises:
        ValueError: If ``histogram`` is not one-dimensional, is empty or has negative or non-finite counts; the edges
            are not finite or not in order; or ``bits`` is not in [2, 8].

    Example:
        >>> values = torch.tensor([0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.5])
        >>> low, high = mse_range(torch.histc(values, 2048, 0.0, 1.5), 0.0, 1.5, bits=2)
        >>> low, round(high, 1)
        (0.0, 1.4)
    """
    counts, width = _checked(histogram, minimum, maximum)
    _, last = integer_limits(bits, signed=False)
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    unit = high - low  # lengths are in shares of it, which keeps their cubes within what a float can hold
    edges = (minimum + width * torch.arange(len(counts) + 1, dtype=torch.float64)) / unit  # (B + 1,)
    zero_points = torch.arange(last + 1, dtype=torch.float64)  # (Z,)
    if low == 0.0 or high == 0.0:
        zero_points = zero_points[:1] if low == 0.0 else zero_points[-1:]
    below, above = zero_points.clamp(min=1e-9), (last - zero_points).clamp(min=1e-9)
    whole = float(torch.maximum(-low / unit / below, high / unit / above).min())  # clips nothing
    coarse, _ = _least_error(counts, edges, whole * _shares(16), zero_points, last)
    around = torch.exp2(torch.linspace(-1.0, 1.0, 33, dtype=torch.float64) / 16)
    step, zero_point = _least_error(counts, edges, (coarse * around).clamp(max=whole), zero_points, last)
    return 0.0 - zero_point * step * unit, (last - zero_point) * step * unit


def entropy_range(histogram: Tensor, minimum: float, maximum: float, bits: int) -> tuple[float, float]:
    """The range in which quantisation loses the least information: the least Kullback-Leibler divergence.

    Tries thresholds of the magnitude, from the largest down, each 2 % below the last, until a step is as narrow as a
    bin. P is the histogram within the range, with what is beyond an end in its outermost bin. Q has what is in the
    range, without what is beyond, spread evenly over those bins of each integer that are not empty in P. The range is
    that of the threshold with the least KL(P, Q).

    Args:
        histogram: Number of values in each of B bins of equal width, shape ``(B,)``, of any type and device. Leave
            out values that are exactly 0: spread over the bins around 0, the many zeros behind a ReLU would make
            small ranges look better than they are.
        minimum: Left edge of the first bin.
        maximum: Right edge of the last bin.
        bits: Width of the unsigned integers, in [2, 8]. A histogram needs several times ``2^bits`` bins.

    Returns:
        The range, cut to [-threshold, threshold].

    Raises:
        ValueError: If ``histogram`` is not one-dimensional, is empty or has negative or non-finite counts; the edges
            are not finite or not in order; or ``bits`` is not in [2, 8].

    Example:
        >>> decay = torch.exp(-torch.linspace(0.0, 16.0, 2048))
        >>> low, high = entropy_range(1000 * decay, 0.0, 16.0, bits=4)
        >>> low, round(high, 1)
        (0.0, 7.7)
    """
    counts, width = _checked(histogram, minimum, maximum)
    _, last = integer_limits(bits, signed=False)
    thresholds = max(-minimum, maximum) * _shares(32)  # (T,)
    lows = (-thresholds).clamp(min=min(minimum, 0.0))
    highs = thresholds.clamp(max=max(maximum, 0.0))
    wide = highs - lows >= last * width
    wide[0] = True
    lows, highs = lows[wide], highs[wide]
    best = int(_divergences(counts, minimum, width, lows, highs, last).argmin())
    return float(lows[best]) + 0.0, float(highs[best])


def _least_error(counts: Tensor, edges: Tensor, steps: Tensor, zero_points: Tensor, last: int) -> tuple[float, float]:
    """The step and the zero point, of those given as ``(S,)`` and ``(Z,)``, with the least squared error."""
    errors = _Errors(counts, edges, steps.unsqueeze(1))
    starts, ends = -zero_points * steps.unsqueeze(1), (last - zero_points) * steps.unsqueeze(1)  # (S, Z)
    total = errors.rounding(ends) - errors.rounding(starts) + errors.above(ends) + errors.below(starts)
    row, column = divmod(int(total.argmin()), len(zero_points))
    return float(steps[row]), float(zero_points[column])


class _Errors:
    """Squared errors of the values of a histogram, for several steps.

    Args:
        counts: ``(B,)``.
        edges: ``(B + 1,)``.
        steps: ``(S, 1)``.
    """

    def __init__(self, counts: Tensor, edges: Tensor, steps: Tensor) -> None:
        self._edges, self._steps = edges, steps
        self._width = (edges[-1] - edges[0]) / len(counts)
        self._density = counts / self._width
        errors = self._density * self._integral(edges).diff()  # (S, B)
        self._rounding = torch.cat([torch.zeros_like(steps), errors.cumsum(1)], dim=1)  # (S, B + 1)
        powers = edges ** torch.arange(1, 4, dtype=edges.dtype).unsqueeze(1)  # (3, B + 1)
        moments = powers.diff() * self._density / torch.tensor([[1.0], [2.0], [3.0]])  # of order 0, 1, 2 in each bin
        after = moments.flip(1).cumsum(1).flip(1)
        self._moments = torch.cat([after, torch.zeros(3, 1, dtype=after.dtype)], dim=1)  # (3, B + 1), from an edge on

    def rounding(self, ends: Tensor) -> Tensor:
        """What is below each end ``(S, Z)``, rounded to multiples of the step."""
        inside, index = self._located(ends)
        partly = self._integral(inside) - self._integral(self._edges[index])
        return self._rounding.gather(1, index) + self._density[index] * partly

    def above(self, ends: Tensor) -> Tensor:
        """What is above each end ``(S, Z)``, moved to it."""
        inside, index = self._located(ends)
        partly = ((self._edges[index + 1] - ends) ** 3 - (inside - ends) ** 3) / 3.0
        return self._about(ends, index + 1) + self._density[index] * partly

    def below(self, ends: Tensor) -> Tensor:
        """What is below each end ``(S, Z)``, moved to it."""
        return self._about(ends, torch.zeros_like(ends, dtype=torch.int64)) - self.above(ends)

    def _about(self, ends: Tensor, index: Tensor) -> Tensor:
        """Sum of ``(x - end)^2`` from the edge with this index on."""
        about: Tensor = self._moments[2, index] - 2.0 * ends * self._moments[1, index]
        return about + ends**2 * self._moments[0, index]

    def _located(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest place within the histogram, and its bin."""
        inside = ends.clamp(self._edges[0], self._edges[-1])
        index = ((inside - self._edges[0]) / self._width).long()
        return inside, index.clamp_(max=len(self._density) - 1)

    def _integral(self, places: Tensor) -> Tensor:
        """Integral of the squared rounding error from 0 to each place, ``(S, ...)``."""
        scaled = places / self._steps
        whole = scaled.round()
        rest = scaled.sub_(whole)
        return (rest**3 / 3.0).add_(whole, alpha=1.0 / 12.0).mul_(self._steps**3)


def _divergences(counts: Tensor, minimum: float, width: float, lows: Tensor, highs: Tensor, last: int) -> Tensor:
    """KL(P, Q) of :func:`entropy_range` for each range, ``(T,)``; infinite where Q lacks what P has.

    Q is constant over the bins of an integer that are not empty, so sums over those suffice, and any sum over
    consecutive bins is a difference of two running sums.
    """
    steps = (highs - lows) / last
    zero_points = (-lows / steps).round()
    borders = (torch.arange(last) + 0.5 - zero_points.unsqueeze(1)) * steps.unsqueeze(1)  # (T, last), between integers

    def first_bin(places: Tensor) -> Tensor:  # whose centre is not before the place
        return ((places - minimum) / width - 0.5).ceil().long().clamp_(0, len(counts))

    first, end = first_bin(lows).unsqueeze(1), first_bin(highs).unsqueeze(1)  # (T, 1)
    splits = torch.cat([first, first_bin(borders).clamp(first, end), end], dim=1)  # (T, last + 2)
    kept, filled, entropy = (_running(values) for values in (counts, (counts > 0).double(), _xlogx(counts)))
    mass = kept[splits].diff()  # (T, last + 1), as below
    bins = filled[splits].diff()
    clipped_mass = mass.clone()
    own = (entropy[end] - entropy[first]).squeeze(1)  # sum of p log p over the bins, with counts for p
    for outermost, beyond in ((first, kept[first]), (end - 1, kept[-1] - kept[end])):
        outermost = outermost.clamp(0, len(counts) - 1)
        integer = (splits[:, 1:-1] <= outermost).sum(1, keepdim=True)
        count = counts[outermost]
        clipped_mass.scatter_add_(1, integer, beyond)
        bins.scatter_add_(1, integer, ((beyond > 0) & (count == 0)).double())
        own += (_xlogx(count + beyond) - _xlogx(count)).squeeze(1)
    spread = torch.where(clipped_mass > 0, clipped_mass * (mass / bins).log(), 0.0).sum(1)
    total = kept[-1]
    divergences = (own - spread) / total - (total / mass.sum(1)).log()
    return divergences.nan_to_num(nan=math.inf, posinf=math.inf)  # nan: a range without any value


def _running(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _xlogx(values: Tensor) -> Tensor:
    return torch.xlogy(values, values)


def _shares(per_octave: int) -> Tensor:
    """What is tried: shares of the largest, from 1 down to ``2^-OCTAVES``."""
    return torch.exp2(-torch.arange(OCTAVES * per_octave + 1, dtype=torch.float64) / per_octave)


def _checked(histogram: Tensor, minimum: float, maximum: float) -> tuple[Tensor, float]:
    """The counts in float64 on the CPU, and the width of a bin."""
    if check_tensor("histogram", histogram).ndim != 1:
        raise ValueError(f"histogram must be one-dimensional, (B,), got shape {tuple(histogram.shape)}")
    counts = histogram.detach().cpu().double()
    if not (counts.isfinite().all() and (counts >= 0).all() and (counts > 0).any()):
        raise ValueError("histogram must hold finite counts, none negative and some positive")
    width = (maximum - minimum) / len(counts)
    if not (math.isfinite(width) and width > 0.0):
        raise ValueError(f"minimum and maximum must be finite and in order, got {minimum} and {maximum}")
    return counts, width

"""Ranges against the raw data and against formulas written out, both by brute force; hand-worked cases and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_compress.functional.quantizers import fake_quantize, range_grid
from lightning_compress.functional.ranges import entropy_range, mse_range, percentile_range

SHARES = 2.0 ** (-np.arange(257) / 32)
BITS = [2, 3, 4, 8]


def sample(name, size=20_000):
    draw = np.random.default_rng(0)
    normal, exponential = draw.standard_normal(size), draw.exponential(size=size)
    return {
        "normal": normal,
        "relu": normal[normal > 0],
        "negative": -exponential,
        "laplace": exponential * np.sign(normal),
        "hardswish": 2 * normal * np.clip(2 * normal + 3, 0, 6) / 6,
        "far from zero": normal / 10 + 5,
        "uniform": draw.uniform(-0.3, 1.0, size),
    }[name]


def histogram_of(values, bins=2048):
    counts, edges = np.histogram(values, bins)
    return torch.from_numpy(counts), float(edges[0]), float(edges[-1])


def squared_error(values, low, high, bits):
    values = torch.as_tensor(values)
    scale, zero_point = range_grid(low, high, bits)
    return (fake_quantize(values, scale, zero_point, 0, 2**bits - 1) - values).square().mean().item()


# --- percentiles ---


@pytest.mark.parametrize("name", ["normal", "laplace", "hardswish", "uniform"])
@pytest.mark.parametrize("percentiles", [(0.01, 99.99), (1.0, 90.0), (0.0, 100.0)])
def test_percentiles_are_those_of_the_values(name, percentiles):
    values = sample(name)
    counts, minimum, maximum = histogram_of(values)
    expected = np.percentile(values, percentiles)
    spacing = np.abs(np.percentile(values, np.clip(np.add(percentiles, [[-0.01], [0.01]]), 0, 100)) - expected).max()
    width = (maximum - minimum) / 2048
    assert percentile_range(counts, minimum, maximum, *percentiles) == pytest.approx(expected, abs=width + spacing)


@pytest.mark.parametrize(
    ("counts", "percentiles", "expected"),
    [
        ([1, 1, 1, 1], (0, 100), (-2.0, 2.0)),
        ([1, 1, 1, 1], (12.5, 75), (-1.5, 1.0)),
        ([0, 1, 1, 0], (0, 100), (-1.0, 1.0)),  # empty bins at the ends are not in the range
        ([1, 0, 0, 1], (50, 100), (0.0, 2.0)),  # nor those in between, at either end
        ([1, 0, 0, 1], (0, 50), (-2.0, 0.0)),
        ([0, 1, 1, 0], (100, 100), (0.0, 1.0)),
        ([4, 0, 0, 1], (20, 90), (-1.75, 1.5)),
        ([0, 0, 0, 8], (50, 100), (0.0, 2.0)),
        ([8, 0, 0, 0], (25, 50), (-1.75, 0.0)),
    ],
)
def test_percentiles_by_hand(counts, percentiles, expected):
    assert percentile_range(torch.tensor(counts), -2.0, 2.0, *percentiles) == expected


def test_default_percentiles():
    counts = torch.full((1000,), 100)
    assert percentile_range(counts, -1.0, 1.0) == pytest.approx((-0.9998, 0.9998), abs=1e-12)


# --- squared error ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["normal", "relu", "negative", "laplace", "hardswish", "far from zero", "uniform"])
def test_no_clip_points_are_better_on_the_values(name, bits):
    values = sample(name, 2000)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    lows = low * np.linspace(0.02, 1, 25) if low < 0 else [0.0]
    highs = high * np.linspace(0.02, 1, 25) if high > 0 else [0.0]
    best = min(squared_error(values, start, end, bits) for start in lows for end in highs)
    found = squared_error(values, *mse_range(*histogram_of(values), bits), bits)
    assert 0 < found <= 1.01 * best


def integrated(counts, minimum, maximum, steps, zero_points, last, points=64):
    """Squared errors of evenly spread values, for each step and zero point."""
    width = (maximum - minimum) / len(counts)
    places = minimum + width * (np.arange(len(counts) * points) + 0.5) / points
    weights = np.repeat(counts, points) / points
    integers = np.clip(np.round(places / steps[:, None, None]), -zero_points[:, None], last - zero_points[:, None])
    return ((integers * steps[:, None, None] - places) ** 2 * weights).sum(axis=2)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    minimum=st.floats(-3, 2).filter(lambda value: not -1e-3 < value < 0),  # the steps here leave room below it
    length=st.floats(0.1, 4),
    bits=st.sampled_from([2, 3]),
)
def test_no_step_and_zero_point_is_better_on_spread_values(counts, minimum, length, bits):
    maximum, last = minimum + length, 2**bits - 1
    low, high = mse_range(torch.tensor(counts), minimum, maximum, bits)
    assert low <= 0 <= high
    step = (high - low) / last
    assert -low / step == pytest.approx(round(-low / step), abs=1e-9)
    start, end = min(minimum, 0.0), max(maximum, 0.0)
    zero_points = np.arange(last + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        covering = np.fmax(-start / zero_points, end / (last - zero_points))
    steps = np.nanmin(covering) * SHARES[::8]
    errors = integrated(np.array(counts), minimum, maximum, steps, zero_points, last)
    (found,) = integrated(np.array(counts), minimum, maximum, np.array([step]), np.array([round(-low / step)]), last)
    assert found <= errors.min() * 1.01 + 1e-3 * sum(counts) * (length / len(counts)) ** 2


def test_squared_error_by_hand():
    """Half of the values in [0, 1], half in [2, 3]; 2 bits give 4 levels.

    Without clipping, 0, 1, 2, 3: each value is at most 1/2 from a level and the mean square is 1/12. Smaller steps
    lose more at the upper end than they gain.
    """
    low, high = mse_range(torch.tensor([1, 0, 1]), 0.0, 3.0, bits=2)
    assert low == 0.0
    errors = {end: integrated(np.array([1, 0, 1]), 0, 3, np.array([end / 3]), np.array([0]), 3) for end in (high, 3.0)}
    assert errors[3.0].item() == pytest.approx(2 / 12, rel=1e-3)
    assert errors[high].item() <= errors[3.0].item()


@pytest.mark.parametrize("bits", BITS)
def test_an_outlier_is_clipped_when_there_are_few_bits(bits):
    values = np.append(sample("relu"), 12.0)
    low, high = mse_range(*histogram_of(values), bits)
    assert low == 0.0
    assert high < 4.0 if bits < 8 else high > 8.0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_outlier_at_one_end_leaves_the_other_alone(bits):
    values = np.append(sample("normal"), -20.0)
    low, high = mse_range(*histogram_of(values), bits)
    assert -5.0 < low < -0.9
    assert 0.9 < high < 3.5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["normal", "hardswish", "relu"])
def test_the_range_is_that_of_its_grid(name, bits):
    low, high = mse_range(*histogram_of(sample(name)), bits)
    scale, zero_point = range_grid(low, high, bits)
    assert scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-6)
    assert (-zero_point * scale, (2**bits - 1 - zero_point) * scale) == pytest.approx((low, high), rel=1e-6)


# --- entropy ---


def divergence(counts, minimum, maximum, low, high, bits):
    """KL(P, Q) of a range, written out bin by bin."""
    width, last = (maximum - minimum) / len(counts), 2**bits - 1
    centres = minimum + width * (np.arange(len(counts)) + 0.5)
    inside = (centres >= low) & (centres < high)
    if not counts[inside].any():
        return math.inf
    step = (high - low) / last
    zero_point = np.round(-low / step)
    integers = np.clip(np.round(centres / step) + zero_point, 0, last)[inside]
    kept = counts[inside].astype(float)
    p, q = kept.copy(), np.zeros(len(kept))
    p[0] += counts[centres < low].sum()
    p[-1] += counts[centres >= high].sum()
    for integer in set(integers):
        members = integers == integer
        filled = members & (p > 0)
        q[filled] = kept[members].sum() / max(filled.sum(), 1)
    if (q[p > 0] == 0).any():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def tried(minimum, maximum, bins, bits):
    thresholds = max(-minimum, maximum) * SHARES
    ranges = [(max(min(minimum, 0.0), -own), min(max(maximum, 0.0), own)) for own in thresholds]
    width = (maximum - minimum) / bins
    return [own for index, own in enumerate(ranges) if index == 0 or own[1] - own[0] >= (2**bits - 1) * width]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["normal", "relu", "negative", "laplace", "hardswish", "far from zero"])
def test_no_threshold_has_less_divergence(name, bits):
    counts, minimum, maximum = histogram_of(sample(name, 100_000), 1000)
    low, high = entropy_range(counts, minimum, maximum, bits)
    found = divergence(counts.numpy(), minimum, maximum, low, high, bits)
    others = tried(minimum, maximum, 1000, bits)[:: 1 if bits < 4 else 8]
    assert 0 <= found <= min(divergence(counts.numpy(), minimum, maximum, *own, bits) for own in others) + 1e-12


def clear(bins, minimum, maximum, low, high, bits):
    """Whether no bin has its centre on the border between two integers or on an end, where rounding decides."""
    centres = minimum + (maximum - minimum) / bins * (np.arange(bins) + 0.5)
    step = (high - low) / (2**bits - 1)
    borders = np.abs(centres / step % 1 - 0.5) * step
    return min(borders.min(), np.abs(centres - low).min(), np.abs(centres - high).min()) > 1e-9


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=24).filter(any),
    minimum=st.floats(-3, 2),
    length=st.floats(0.1, 4),
)
def test_no_threshold_has_less_divergence_in_sparse_histograms(counts, minimum, length):
    maximum, numbers = minimum + length, np.array(counts)
    assume(length > 2 * max(minimum, 0.0))
    found = entropy_range(torch.tensor(counts), minimum, maximum, 2)
    ranges = tried(minimum, maximum, len(counts), 2)
    assume(all(clear(len(counts), minimum, maximum, *own, 2) for own in ranges))
    best = min(divergence(numbers, minimum, maximum, *own, 2) for own in ranges)
    assert found in [pytest.approx(own, rel=1e-12) for own in ranges]
    assert divergence(numbers, minimum, maximum, *found, 2) == pytest.approx(best, abs=1e-9)


def test_entropy_by_hand():
    """4 levels over 6 bins from 0 to 3: a step of 1, and cells of 1, 2, 2 and 1 bins.

    Where the bins of each cell have equal counts, nothing is lost; 6 and 2 in a cell, which become 4 and 4, cost
    (6 log(6/4) + 2 log(2/4)) / 16. Cut at 1.5, 5 in the last bin become 7 of 13, and no cell has more than one bin.
    """
    assert entropy_range(torch.tensor([1, 5, 5, 2, 2, 7]), 0.0, 3.0, bits=2) == (0.0, 3.0)
    uneven = np.array([2, 6, 2, 2, 2, 2])
    expected = (6 * math.log(6 / 4) + 2 * math.log(2 / 4)) / 16
    assert divergence(uneven, 0.0, 3.0, 0.0, 3.0, 2) == pytest.approx(expected)
    skewed = np.array([1, 5, 5, 1, 0, 1])
    cut = (1 * math.log(11 / 13) + 5 * math.log(11 / 13) + 7 * math.log(7 / 13 * 11 / 5)) / 13
    assert divergence(skewed, 0.0, 3.0, 0.0, 1.5, 2) == pytest.approx(cut)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_uniform_is_not_clipped(bits):
    assert entropy_range(torch.ones(2048), 0.0, 3.0, bits) == (0.0, 3.0)
    assert entropy_range(torch.ones(2048), -3.0, 0.0, bits) == (-3.0, 0.0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_far_outlier_is_clipped_but_not_the_rest(bits):
    values = np.append(sample("relu", 1_000_000), [16.0] * 3)
    low, high = entropy_range(*histogram_of(values), bits)
    assert low == 0.0
    assert 2.5 < high < (6.0 if bits < 8 else 16.1)


def test_only_the_longer_side_is_clipped():
    values = sample("hardswish", 1_000_000)
    low, high = entropy_range(*histogram_of(values), 4)
    assert low == pytest.approx(values.min(), abs=0.01)
    assert 4.0 < high < 0.95 * values.max()


# --- all of them ---

FINDERS = {
    "percentile": lambda *arguments: percentile_range(*arguments),
    "mse": lambda *arguments: mse_range(*arguments, 4),
    "entropy": lambda *arguments: entropy_range(*arguments, 4),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_all_at_one_end_of_0_uses_every_integer(bits, sign):
    low, high = sorted((0.0, sign * 4.0))
    counts = torch.zeros(1024)
    counts[512 if sign == 1 else 511] = 7
    for found in (mse_range(counts, low, high, bits), entropy_range(counts, low, high, bits)):
        assert 0.0 in found
        assert low <= found[0] <= found[1] <= high


def test_no_level_is_beyond_values_of_one_sign():
    counts = torch.zeros(1000)
    counts[342] = 1000  # a step of 0.3425 would be best for these, and end at 1.0275
    counts[-1] = 1
    assert mse_range(counts, 0.0, 1.0, bits=2) == (0.0, 1.0)


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
@pytest.mark.parametrize("exponent", [-148, -130, 20, 125])
def test_ranges_scale_with_the_values(find, exponent):
    factor = 2.0**exponent
    counts = histogram_of(sample("normal"))[0]
    expected = tuple(end * factor for end in find(counts, -4.0, 3.5))
    assert find(counts, -4.0 * factor, 3.5 * factor) == expected


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
@pytest.mark.parametrize("name", ["relu", "far from zero"])
def test_one_sign_mirrored_gives_the_range_mirrored(find, name):
    counts, minimum, maximum = histogram_of(sample(name))
    low, high = find(counts, minimum, maximum)
    assert low == 0.0
    assert math.copysign(1.0, low) == 1.0
    assert find(counts.flip(0), -maximum, -minimum) == pytest.approx((-high, 0.0), rel=1e-9)


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64, torch.float16])
def test_types_of_counts(find, dtype):
    counts, minimum, maximum = histogram_of(sample("hardswish"))
    counts = counts.clamp(max=1000)
    low, high = find(counts.to(dtype), minimum, maximum)
    assert (type(low), type(high)) == (float, float)
    assert (low, high) == find(counts, minimum, maximum)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("find", [mse_range, entropy_range])
@pytest.mark.parametrize(("minimum", "maximum"), [(-1.0, 3.0), (0.0, 1.0), (-2.0, 0.0), (4.0, 5.0), (-5.0, -4.0)])
def test_one_bin(find, bits, minimum, maximum):
    low, high = find(torch.tensor([3]), minimum, maximum, bits)
    assert low <= 0.0 <= high
    assert high - low > 0.0
    scale = (high - low) / (2**bits - 1)
    assert low - scale <= (minimum + maximum) / 2 <= high + scale


ONE = torch.ones(4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"histogram must be one-dimensional.*got shape \(2, 2\)", lambda: percentile_range(ONE.view(2, 2), 0, 1)),
        (r"histogram must hold finite counts", lambda: percentile_range(ONE[:0], 0, 1)),
        (r"histogram must hold.*some positive", lambda: mse_range(0 * ONE, 0, 1, 8)),
        (r"histogram must hold.*none negative", lambda: entropy_range(torch.tensor([1.0, -1.0]), 0, 1, 8)),
        (r"histogram must hold finite counts", lambda: mse_range(torch.tensor([1.0, math.nan]), 0, 1, 8)),
        (r"histogram must hold finite counts", lambda: mse_range(torch.tensor([1.0, math.inf]), 0, 1, 8)),
        (r"minimum and maximum must be finite and in order, got 1 and 1", lambda: mse_range(ONE, 1, 1, 8)),
        (r"minimum and maximum .* got 2 and 1", lambda: entropy_range(ONE, 2, 1, 8)),
        (r"minimum and maximum .* got nan and 1", lambda: percentile_range(ONE, math.nan, 1)),
        (r"minimum and maximum .* got 0 and inf", lambda: percentile_range(ONE, 0, math.inf)),
        (r"lower must be a percentile in \[0, 100\], got -1", lambda: percentile_range(ONE, 0, 1, -1)),
        (r"lower must not be above upper, got 60 and 50", lambda: percentile_range(ONE, 0, 1, 60, 50)),
        (r"upper must be a percentile in \[0, 100\], got 101", lambda: percentile_range(ONE, 0, 1, 0, 101)),
        (r"upper must be a percentile in \[0, 100\], got None", lambda: percentile_range(ONE, 0, 1, 0, None)),
        (r"bits must be a whole number from 2 to 8, got 1", lambda: mse_range(ONE, 0, 1, 1)),
        (r"bits must be a whole number from 2 to 8, got 9", lambda: entropy_range(ONE, 0, 1, 9)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()

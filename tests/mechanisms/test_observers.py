"""Observers against NumPy on all values at once: the order of batches, growing ranges, types, and odd tensors."""

from __future__ import annotations

import math
from itertools import pairwise, permutations
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_compress.functional.quantizers import fake_quantize, range_grid
from lightning_compress.functional.ranges import entropy_range, mse_range, percentile_range
from lightning_compress.mechanisms import observers
from lightning_compress.mechanisms.observers import BINS, OBSERVERS, make_observer

HISTOGRAMS = ["percentile", "mse", "entropy"]
ORDERLESS = ["minmax", *HISTOGRAMS]


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(kind, *batches, bits=4):
    observer = make_observer(kind, bits)
    for batch in batches:
        observer.observe(batch)
    return observer.range()


def error(kind, values, bits):
    """Squared error of values quantised in the range that was observed in others like them."""
    scale, zero_point = range_grid(*observed(kind, *values[:-1], bits=bits), bits)
    return F.mse_loss(fake_quantize(values[-1], scale, zero_point, 0, 2**bits - 1), values[-1]).item()


# --- extremes ---


@pytest.mark.parametrize(
    ("batches", "extremes", "averages"),
    [
        ([[1.0, 2.0], [0.0, 4.0], [-1.0, 3.0]], (-1.0, 4.0), (0.0, 2.28)),
        ([[-3.0, -1.0], [-1.0, -0.5]], (-3.0, 0.0), (-2.8, 0.0)),
        ([[2.0, 3.0]], (0.0, 3.0), (0.0, 3.0)),
        ([[-2.0, 5.0]], (-2.0, 5.0), (-2.0, 5.0)),
    ],
)
def test_extremes_by_hand(batches, extremes, averages):
    batches = [torch.tensor(batch) for batch in batches]
    assert observed("minmax", *batches) == extremes
    assert observed("moving_average", *batches) == pytest.approx(averages, abs=1e-12)


def test_the_moving_average_depends_on_the_order():
    ones, threes = torch.ones(2), torch.full((2,), 3.0)
    assert observed("moving_average", ones, threes) == pytest.approx((0.0, 1.2))
    assert observed("moving_average", threes, ones) == pytest.approx((0.0, 2.8))


# --- histograms ---


def expected(kind, values, bits):
    """The range of a histogram of all values at once, in the fewest bins that are a power of two wide.

    Values below 0 are counted by their magnitude, so that those on an edge are treated like those above 0.
    """
    values = values.double().numpy()
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    for exponent in range(-126, 128):
        width = 2.0**exponent
        below, above = int(-low // width) + 1 if low < 0 else 0, int(high // width) + 1
        if below + above <= BINS:
            break
    assert below + above > BINS / 2
    own = values if kind == "percentile" else values[values != 0]
    negative, _ = np.histogram(-own[own < 0], np.arange(below + 1) * width)
    positive, _ = np.histogram(own[own >= 0], np.arange(above + 1) * width)
    counts = torch.from_numpy(np.concatenate([negative[::-1], positive]))
    find = {"percentile": percentile_range, "mse": mse_range, "entropy": entropy_range}[kind]
    arguments = () if kind == "percentile" else (bits,)
    start, end = find(counts, -below * width, above * width, *arguments)
    return (max(start, low), min(end, high)) if low == 0 or high == 0 else (start, end)


@pytest.mark.parametrize("kind", HISTOGRAMS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "function", [torch.tanh, F.hardsigmoid, F.relu, F.silu, torch.exp, lambda x: -x.exp(), lambda x: x * 1e-3 - 7]
)
def test_ranges_are_those_of_all_values_at_once(kind, bits, function):
    batches = [function(sample(16, 5, 7, seed=seed) * (1 + seed)) for seed in range(4)]
    assert observed(kind, *batches, bits=bits) == expected(kind, torch.cat(batches), bits)


@pytest.mark.parametrize("kind", ORDERLESS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_order_and_size_of_batches_do_not_matter(kind, scale):
    batches = [sample(300, seed=1), 20 * sample(1, seed=2).abs(), 0.01 * sample(7, seed=3), torch.zeros(5)]
    batches = [batch * scale for batch in batches]
    ranges = {observed(kind, *order) for order in permutations(batches)}
    assert ranges == {observed(kind, torch.cat(batches))}


@pytest.mark.parametrize("kind", ORDERLESS)
@pytest.mark.parametrize("order", [1, -1])
def test_ranges_that_grow_or_shrink(kind, order):
    batches = [sample(50, seed=seed) * 2.0 ** (seed % 3 + 2 * seed) for seed in range(-30, 30)][::order]
    at_once = observed(kind, torch.cat(batches))
    assert observed(kind, *batches) == at_once
    assert at_once[0] < -1e10
    assert at_once[1] > 1e10


@st.composite
def batches_of_floats(draw):
    """Finite float32 of all magnitudes, or all alike, in two groupings and orders."""
    numbers = st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(-2, 2, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-10, 3.0]),
    )
    values = draw(st.lists(numbers, min_size=1, max_size=12))
    shuffled = draw(st.permutations(values))
    cut, other = draw(st.integers(0, len(values))), draw(st.integers(0, len(values)))
    return [
        [torch.tensor(part, dtype=torch.float32) for part in (order[:own], order[own:])]
        for order, own in ((values, cut), (shuffled, other))
    ]


@pytest.mark.sample
@pytest.mark.parametrize("kind", ORDERLESS)
@settings(max_examples=40, deadline=None)
@given(groupings=batches_of_floats())
def test_any_floats_in_any_order(kind, groupings):
    low, high = observed(kind, *groupings[0])
    assert (low, high) == observed(kind, *groupings[1])
    values = torch.cat(groupings[0]).double()
    minimum, maximum = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if kind == "minmax":
        assert (low, high) == (minimum, maximum)
    assert math.isfinite(high - low)
    beyond = (maximum - minimum) * (1 if kind == "mse" else 3 / BINS) + 2.0**-126
    assert minimum - beyond <= low <= 0.0 <= high <= maximum + beyond
    if maximum - minimum > 2.0**-100:
        assert high > low or not values.any()


@pytest.mark.parametrize("percentiles", [(0.01, 99.99)])
def test_percentiles_are_those_of_the_values(percentiles):
    batches = [sample(50_000, seed=seed) * (seed + 1) for seed in range(4)]
    values = torch.cat(batches).numpy()
    ends = np.percentile(values, percentiles)
    spacing = np.abs(np.percentile(values, np.add(percentiles, [[-0.002], [0.002]])) - ends).max()
    width = 2 * np.abs(values).max() / (BINS / 2)
    assert observed("percentile", *batches) == pytest.approx(ends, abs=width + spacing)


@pytest.mark.parametrize("kind", ["mse", "entropy"])
def test_zeros_do_not_count_for_errors(kind):
    batch = F.relu(sample(4000))
    assert observed(kind, batch, torch.zeros(100_000)) == observed(kind, batch[batch > 0])
    signed = torch.cat([batch, -batch / 2, -torch.zeros(1000)])
    assert observed(kind, signed) == observed(kind, signed[signed != 0])


def test_zeros_count_for_percentiles():
    batch = torch.linspace(0.001, 1.0, 1000)
    assert observed("percentile", batch)[1] == pytest.approx(1.0, abs=1e-3)
    assert observed("percentile", batch, torch.zeros(999_000))[1] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("kind", HISTOGRAMS)
def test_a_batch_in_pieces(kind):
    batch = F.silu(sample(1000) * 3)
    with mock.patch.object(observers, "PIECE", 64):
        assert observed(kind, batch) == observed(kind, *batch.chunk(3))
    assert observed(kind, batch) == observed(kind, *batch.chunk(3))


def test_with_few_bits_clipping_is_better():
    """As in Wu et al.: all alike at 8 bits, at 4 the extremes are worse than anything that clips."""
    values = [sample(20_000, seed=seed).abs() ** 1.5 for seed in range(5)]
    four = {kind: error(kind, values, 4) for kind in OBSERVERS}
    eight = {kind: error(kind, values, 8) for kind in OBSERVERS}
    assert four["mse"] == min(four.values())
    assert all(four["minmax"] > 1.2 * four[kind] for kind in HISTOGRAMS)
    assert max(eight.values()) < 0.05 * min(four.values())


def test_fewer_bits_clip_more():
    batch = sample(100_000).abs()
    for kind in ("mse", "entropy"):
        ends = [observed(kind, batch, bits=bits)[1] for bits in (2, 3, 4, 8)]
        assert all(fewer < more for fewer, more in pairwise(ends))
    for kind in ("minmax", "moving_average", "percentile"):
        assert len({observed(kind, batch, bits=bits) for bits in (2, 3, 4, 8)}) == 1


# --- types and odd tensors ---


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(kind, dtype):
    batches = [F.silu(sample(200, seed=seed) * 3).to(dtype) for seed in range(3)]
    found = observed(kind, *batches)
    assert (type(found[0]), type(found[1])) == (float, float)
    assert found == observed(kind, *(batch.double() for batch in batches))
    mixed = [batches[0].float(), batches[1], batches[2].double()]
    if dtype != torch.float64:
        assert found == observed(kind, *mixed)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_layouts_and_gradients(kind):
    batch = sample(4, 6, 5, 5)
    plain = observed(kind, batch)
    assert observed(kind, batch.transpose(0, 2)) == plain
    assert observed(kind, batch.contiguous(memory_format=torch.channels_last)) == plain
    assert observed(kind, torch.stack([batch, batch], dim=-1)[..., 0]) == plain
    watched = batch.clone().requires_grad_()
    assert observed(kind, watched * 1) == plain
    assert torch.equal(watched, batch)


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
@pytest.mark.parametrize("value", [5.0, -0.3, 1.0, 1e38, -3e38, 1e-30])
def test_constants(kind, bits, shape, value):
    found = observed(kind, torch.full(shape, value), bits=bits)
    scale, zero_point = range_grid(*found, bits)
    assert fake_quantize(torch.tensor(value), scale, zero_point, 0, 2**bits - 1).item() == pytest.approx(
        value, rel=1e-3
    )


@pytest.mark.parametrize("kind", OBSERVERS)
def test_nothing_but_zeros(kind):
    assert observed(kind, torch.zeros(3), torch.tensor(-0.0)) == (0.0, 0.0)


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("scale", [1e-40, 1e-45, 1e38])
@pytest.mark.parametrize("values", [[-1.0, 3.0], [1.0, 2.0], [-2.0, -1.0], [0.0, 1.0]])
def test_huge_and_tiny(kind, scale, values):
    batch = torch.tensor(values) * scale
    low, high = observed(kind, batch, bits=8)
    expected = min(batch.min().item(), 0.0), max(batch.max().item(), 0.0)
    assert (low, high) == pytest.approx(expected, rel=0.02, abs=2.0**-125)  # the smallest width of a bin


@pytest.mark.parametrize("kind", OBSERVERS)
def test_without_values(kind):
    assert observed(kind, torch.ones(2), torch.zeros(0, 3)) == pytest.approx((0.0, 1.0))
    with pytest.raises(ValueError, match=f"the observer '{kind}' has seen no activation, so it has no range"):
        observed(kind)
    with pytest.raises(ValueError, match=f"the observer '{kind}' has seen no activation"):
        observed(kind, torch.zeros(0, 3))


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([math.nan, 1.0], "an activation is NaN"),
        ([math.inf, 1.0, math.nan], "an activation is NaN"),
        ([math.inf, 1.0], "an activation is infinite"),
        ([0.0, -math.inf], "an activation is infinite"),
    ],
)
def test_what_is_not_finite_is_refused_and_not_counted(kind, dtype, values, message):
    observer = make_observer(kind, 4)
    observer.observe(torch.tensor([-1.0, 2.0]))
    before = observer.range()
    with pytest.raises(ValueError, match=message):
        observer.observe(torch.tensor(values, dtype=dtype))
    assert observer.range() == before


def test_names():
    assert OBSERVERS == ("minmax", "moving_average", "percentile", "mse", "entropy")
    with pytest.raises(ValueError, match=r"one of 'minmax', 'moving_average', .* got 'min_max'; did you mean 'minmax'"):
        make_observer("min_max", 8)
    with pytest.raises(ValueError, match=r"got 'kl'$"):
        make_observer("kl", 8)


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("bits", [1, 9])
def test_bits(kind, bits):
    with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 8, got {bits}"):
        make_observer(kind, bits)

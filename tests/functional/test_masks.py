"""Masks against a stable sort in NumPy, formulas written out, hand-worked numbers, and their limits."""

from __future__ import annotations

import math
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.functional import (
    _selection,
    churn,
    erk_sparsities,
    fewest_kept,
    l2_score,
    layer_zeros,
    magnitude_mask,
    magnitude_score,
    n_m_mask,
    n_m_masks,
    random_score,
    smallest_masks,
    sparsity_of,
    taylor_score,
)
from lightning_compress.functional.masks import Filters, live_filters

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 2, 2), (4, 2, 1, 3), (1, 9)]
LAYOUTS = ["contiguous", "reversed", "strided", "channels_last"]


def sample(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(tensor, layout):
    """The same values in another order of memory."""
    if layout == "reversed":
        order = list(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([tensor, -tensor - 1], dim=-1)[..., 0]
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def ordered(values):
    """Indices of a stable sort by magnitude, NaN last; what is already gone is given as -1."""
    values = np.asarray(values)
    return np.lexsort((np.arange(len(values)), np.nan_to_num(values, nan=0.0, posinf=np.inf), np.isnan(values)))


def oracle(scores, pruned, kept=None, limits=None):
    """Walk through the sorted magnitudes of all tensors together and prune what the limits allow."""
    magnitudes = np.concatenate([np.abs(score.detach().double().numpy()).reshape(-1) for score in scores])
    if kept is not None:
        magnitudes[~np.concatenate([mask.numpy().reshape(-1) for mask in kept])] = -1.0
    owners = np.repeat(np.arange(len(scores)), [score.numel() for score in scores])
    left = [score.numel() for score in scores] if limits is None else list(limits)
    flat = np.ones(len(magnitudes), dtype=bool)
    for index in ordered(magnitudes):
        if pruned and left[owners[index]]:
            flat[index] = False
            left[owners[index]] -= 1
            pruned -= 1
    parts = np.split(flat, np.cumsum([score.numel() for score in scores])[:-1])
    return [part.reshape(tuple(score.shape)) for part, score in zip(parts, scores, strict=True)]


def assert_masks(masks, expected, scores):
    for mask, own, score in zip(masks, expected, scores, strict=True):
        assert (mask.dtype, mask.shape, mask.device) == (torch.bool, score.shape, score.device)
        assert not mask.requires_grad
        np.testing.assert_array_equal(mask.numpy(), own)


@st.composite
def tensors(draw, dtypes=DTYPES, shapes=SHAPES, most=4, tiny=True):
    """A few tensors, full of ties, with every kind of float; without ``tiny``, those whose sums are exact."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(shapes))
        info = torch.finfo(dtype)
        pool = [0.0, -0.0, 0.25, -0.25, 0.5, 1.0, -1.0, 3.0, math.inf, -math.inf, math.nan, -math.nan]
        if tiny:
            pool += [info.smallest_normal, -info.smallest_normal / 2, info.smallest_normal * info.eps, info.max]
        values = draw(st.lists(st.sampled_from(pool), min_size=math.prod(shape), max_size=math.prod(shape)))
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
        found.append(laid_out(tensor, draw(st.sampled_from(LAYOUTS))))
    return found


@st.composite
def selections(draw):
    """Arguments of ``smallest_masks``: kept masks and limits or none, and a number that they allow."""
    scores = draw(tensors())
    sizes = [score.numel() for score in scores]
    kept = limits = None
    lost = [0] * len(scores)
    if draw(st.booleans()):
        kept = [torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))) for size in sizes]
        kept = [mask.bool().reshape(score.shape) for mask, score in zip(kept, scores, strict=True)]
        kept = [laid_out(mask, draw(st.sampled_from(["contiguous", "reversed"]))) for mask in kept]
        lost = [int((~mask).sum()) for mask in kept]
    if draw(st.booleans()):
        limits = [draw(st.integers(low, size)) for low, size in zip(lost, sizes, strict=True)]
    pruned = draw(st.integers(sum(lost), sum(sizes if limits is None else limits)))
    return scores, pruned, kept, limits


# --- the smallest of all ---


def test_magnitude_mask_hand_worked():
    weights = [torch.tensor([[0.1, -0.9], [0.4, 0.2]]), torch.tensor([-0.3, 0.05, 0.8, -0.7, 0.6, 0.5])]
    assert [mask.tolist() for mask in magnitude_mask(weights, 0.4)] == [
        [[False, True], [True, False]],
        [False, False, True, True, True, True],
    ]
    assert [mask.tolist() for mask in magnitude_mask(weights, 0.55)] == [  # 5.5 is rounded up
        [[False, True], [False, False]],
        [False, False, True, True, True, False],
    ]
    assert [mask.tolist() for mask in magnitude_mask(weights, 0.55, "layer")] == [  # 2.2 and 3.3
        [[False, True], [True, False]],
        [False, False, True, True, True, False],
    ]


def test_of_equal_magnitudes_the_earlier_is_pruned_first():
    weights = [torch.tensor([1.0, -1.0]), torch.tensor([[-1.0, 1.0], [1.0, -1.0]])]
    assert [mask.tolist() for mask in magnitude_mask(weights, 0.5)] == [[False, False], [[False, True], [True, True]]]
    channels_last = torch.ones(1, 2, 1, 2).contiguous(memory_format=torch.channels_last)
    assert magnitude_mask([channels_last], 0.5)[0].tolist() == [[[[False, False]], [[True, True]]]]


def test_signed_zeros_are_equal_and_nan_is_larger_than_infinity():
    weights = [torch.tensor([math.nan, -math.inf, 0.0, -0.0])]
    assert [magnitude_mask(weights, share)[0].tolist() for share in (0.25, 0.5, 0.75)] == [
        [True, True, False, True],
        [True, True, False, False],
        [True, False, False, False],
    ]


def test_all_nan_are_equal():
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000, 0x7F800000], dtype=torch.int32)  # the last is infinity
    assert smallest_masks([bits.view(torch.float32)], 3)[0].tolist() == [False, False, True, True, False]


@settings(max_examples=100, deadline=None)
@given(arguments=selections(), piece=st.sampled_from([1, 3, 8, _selection._PIECE]))
def test_equals_a_stable_sort(arguments, piece):
    scores, pruned, kept, limits = arguments
    before = [score.clone() for score in scores]
    with mock.patch.object(_selection, "_PIECE", piece):
        masks = smallest_masks(scores, pruned, kept=kept, limits=limits)
    assert_masks(masks, oracle(scores, pruned, kept, limits), scores)
    assert sum(int((~mask).sum()) for mask in masks) == pruned
    assert all(torch.equal(old.nan_to_num(), new.nan_to_num()) for old, new in zip(before, scores, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights=tensors(), sparsity=st.floats(0, 1), scope=st.sampled_from(["global", "layer"]))
def test_counts_are_exact(weights, sparsity, scope):
    masks = magnitude_mask(weights, sparsity, scope)
    parts = [weights] if scope == "global" else [[weight] for weight in weights]
    counts = [math.floor(sparsity * sum(weight.numel() for weight in part) + 0.5) for part in parts]
    expected = [mask for part, count in zip(parts, counts, strict=True) for mask in oracle(part, count)]
    assert_masks(masks, expected, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.9, 0.99999, 1.0])
def test_many_pieces(dtype, sparsity):
    """Tensors longer and shorter than a piece; low precision has many ties, and a third is zero."""
    weights = [sample(300, 700, dtype=dtype), sample(64, 3, 3, 3, seed=1, dtype=dtype), sample(90_000, seed=2)]
    weights[2][::3] = 0.0
    pruned = math.floor(sparsity * sum(weight.numel() for weight in weights) + 0.5)
    magnitudes = np.concatenate([weight.double().abs().numpy().reshape(-1) for weight in weights])
    expected = np.ones(len(magnitudes), dtype=bool)
    expected[np.argsort(magnitudes, kind="stable")[:pruned]] = False
    flat = torch.cat([mask.flatten() for mask in magnitude_mask(weights, sparsity)]).numpy()
    np.testing.assert_array_equal(flat, expected)


@pytest.mark.parametrize("values", ["equal", "two", "one bit apart", "sorted", "huge range"])
def test_values_that_share_their_leading_bits(values):
    size = 400_000
    scores = {
        "equal": torch.full((size,), 0.1),
        "two": torch.where(torch.arange(size) % 2 == 0, 0.1, -0.2),
        "one bit apart": (torch.arange(size, dtype=torch.int32) % 5 + 0x3DCCCCCD).view(torch.float32),
        "sorted": torch.arange(size, 0, -1, dtype=torch.float32),
        "huge range": torch.exp(sample(size, dtype=torch.float64) * 20).float(),
    }[values]
    expected = np.ones(size, dtype=bool)
    expected[np.argsort(scores.abs().numpy(), kind="stable")[:123_457]] = False
    np.testing.assert_array_equal(smallest_masks([scores], 123_457)[0].numpy(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(layout, dtype):
    weight = sample(64, 48, 9, 9, dtype=dtype)  # longer than a piece
    expected = magnitude_mask([weight], 0.8)[0]
    mask = magnitude_mask([laid_out(weight, layout)], 0.8)[0]
    assert torch.equal(mask, expected)
    assert mask.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_a_row_longer_than_a_piece():
    weight = laid_out(sample(2, 150_000), "strided")
    assert torch.equal(magnitude_mask([weight], 0.3)[0], magnitude_mask([weight.contiguous()], 0.3)[0])


def test_views_of_one_element_repeated():
    mask = magnitude_mask([torch.tensor([0.5]).expand(2, 3)], 0.5)[0]
    assert mask.tolist() == [[False, False, False], [True, True, True]]


def test_different_types_are_compared_by_value():
    weights = [torch.tensor([0.5, 2.0], dtype=torch.float16), torch.tensor([1.0, 0.25], dtype=torch.float64)]
    assert [mask.tolist() for mask in magnitude_mask(weights, 0.5)] == [[False, True], [True, False]]
    third = torch.tensor([1 / 3], dtype=torch.float64)  # float32 has 1/3 a little larger
    assert [mask.item() for mask in smallest_masks([third.float(), third], 1)] == [True, False]


def test_what_was_pruned_stays_pruned():
    scores, kept = [torch.tensor([9.0, 1.0, 2.0, 0.0])], [torch.tensor([False, True, True, True])]
    assert smallest_masks(scores, 1, kept=kept)[0].tolist() == [False, True, True, True]
    assert smallest_masks(scores, 2, kept=kept)[0].tolist() == [False, True, True, False]


def test_limits_hand_worked():
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 9.0]), torch.tensor([6.0, 7.0, 8.0])]
    assert [mask.tolist() for mask in smallest_masks(scores, 6, limits=[1, 2, 3])] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]


def test_one_entry_more_changes_one_entry():
    weights = [sample(50, 41), sample(3000, seed=1)]
    total = 5050
    before = smallest_masks(weights, 0)
    for pruned in (1, 2, 3, total - 1, total):
        after = smallest_masks(weights, pruned)
        assert sum(int((~mask).sum()) for mask in after) == pruned
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
        before = after


def test_nothing_is_drawn_and_graphs_are_left_alone():
    weights = [sample(400, 400).requires_grad_(), sample(30, 20, seed=1).requires_grad_()]
    state = torch.get_rng_state()
    runs = [magnitude_mask(weights, 0.7) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(*runs, strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in weights)


def test_the_default_device_does_not_matter():
    weights, generator = [sample(6, 8), sample(3, 4, seed=1)], torch.Generator().manual_seed(0)
    expected = magnitude_mask(weights, 0.5), n_m_masks(weights, 1, 2, 5), random_score(weights[0], generator)
    with torch.device("meta"):
        generator.manual_seed(0)
        found = magnitude_mask(weights, 0.5), n_m_masks(weights, 1, 2, 5), random_score(weights[0], generator)
    for own, other in zip([*expected[0], *expected[1], expected[2]], [*found[0], *found[1], found[2]], strict=True):
        assert torch.equal(own, other)


def test_empty_tensors():
    assert [mask.shape for mask in magnitude_mask([torch.zeros(0), torch.zeros(2, 0)], 1.0)] == [(0,), (2, 0)]
    assert magnitude_mask([torch.zeros(0, 3), torch.tensor([1.0])], 1.0)[1].tolist() == [False]
    assert magnitude_mask([torch.zeros(0)], 0.5, "erk")[0].shape == (0,)


def test_erk_scope():
    weights = [sample(10, 10), sample(40, 10, seed=1)]
    masks = magnitude_mask(weights, 0.5, "erk")  # 28.57 and 221.43 of 250
    assert [int((~mask).sum()) for mask in masks] == [29, 221]
    assert_masks(masks, [oracle([weights[0]], 29)[0], oracle([weights[1]], 221)[0]], weights)


# --- shares of layers ---

shapes_of_layers = st.lists(
    st.one_of(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 20)] * 2, st.just(3), st.just(3))),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes_of_layers, sparsity=st.floats(0, 1))
def test_erk_equals_the_formula(shapes, sparsity):
    sizes = [math.prod(shape) for shape in shapes]
    found = erk_sparsities(shapes, sparsity)
    densities = [1 - own for own in found]
    kept = sum(size * density for size, density in zip(sizes, densities, strict=True))
    assert kept == pytest.approx((1 - sparsity) * sum(sizes), rel=1e-9, abs=1e-9)
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    # where one factor makes all densities: those it makes more than 1 are 1
    factor = max((d / r for d, r in zip(densities, raw, strict=True) if d < 1 - 1e-9), default=math.inf)
    for density, own in zip(densities, raw, strict=True):
        assert density == pytest.approx(min(factor * own, 1), abs=1e-7)


def test_erk_hand_worked():
    # (10 + 10) c + (40 + 10) c = 250 kept, c = 250 / 70
    assert erk_sparsities([(10, 10), (40, 10)], 0.5) == pytest.approx([1 - 500 / 7 / 100, 1 - 1250 / 7 / 400])
    # c = 32.8 / 44 would keep 3 of the first layer's 2; 30.8 are left for 41 c of the others
    found = erk_sparsities([(1, 2), (16, 16), (3, 3, 1, 2)], 1 - 32.8 / 276)
    assert found == pytest.approx([0.0, 1 - 32 * 30.8 / 41 / 256, 1 - 9 * 30.8 / 41 / 18])
    assert erk_sparsities([(4, 4), (0, 3), (9,)], 0.0) == [0.0, 0.0, 0.0]
    assert erk_sparsities([(4, 4), (9,)], 1.0) == [1.0, 1.0]
    assert erk_sparsities([], 0.5) == []


@settings(max_examples=75, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_layer_zeros_sum_to_the_total_within_limits(data, sizes):
    sparsities = data.draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes)))
    limits = [data.draw(st.integers(0, size)) for size in sizes]
    total = data.draw(st.integers(0, sum(limits)))
    zeros = layer_zeros(sizes, sparsities, total=total, limits=limits)
    assert sum(zeros) == total
    assert all(0 <= own <= limit for own, limit in zip(zeros, limits, strict=True))
    shares = [size * own for size, own in zip(sizes, sparsities, strict=True)]
    free = layer_zeros(sizes, sparsities, total=total)
    if sum(shares) > 1e-6 and all(
        share * total / sum(shares) <= size for share, size in zip(shares, sizes, strict=True)
    ):
        for own, share in zip(free, shares, strict=True):
            assert abs(own - share * total / sum(shares)) < 1 + 1e-6
    assert sum(free) == total
    assert layer_zeros(sizes, sparsities) == [math.floor(share + 0.5) for share in shares]


def test_layer_zeros_hand_worked():
    assert layer_zeros([10, 20], [0.25, 0.5]) == [3, 10]
    assert layer_zeros([10, 10], [0.5, 0.6], total=10) == [5, 5]  # 4.55 and 5.45: the larger remainder is the first's
    assert layer_zeros([4, 100], [0.0, 0.5], total=43, limits=[4, 40]) == [3, 40]
    assert layer_zeros([10, 10, 20], [0.9, 0.5, 0.5], limits=[6, 10, 20]) == [6, 6, 12]  # 3 more over rooms of 5, 10
    assert layer_zeros([5, 5], [0.0, 0.0], total=4) == [2, 2]
    assert layer_zeros([], []) == []


@pytest.mark.parametrize(
    ("size", "fewest"), [(0, 0), (1, 1), (99, 1), (100, 1), (101, 2), (2000, 20), (10**9 + 1, 10**7 + 1)]
)
def test_fewest_kept(size, fewest):
    assert fewest_kept(size) == fewest


# --- scores ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_against_numpy(dtype):
    weight, gradient = sample(4, 3, 2, 2, dtype=dtype).requires_grad_(), sample(4, 3, 2, 2, seed=1, dtype=dtype)
    w, g = weight.detach().double().numpy(), gradient.double().numpy()
    wide = torch.promote_types(dtype, torch.float32)
    expected = [
        (magnitude_score(weight), np.abs(w), dtype),
        (l2_score(weight, (1, 2, 3)), np.sqrt((w**2).sum(axis=(1, 2, 3))), wide),
        (l2_score(weight, 1), np.sqrt((w**2).sum(axis=1)), wide),
        (taylor_score(weight, gradient), np.abs(w * g), wide),
    ]
    for score, values, type_of_score in expected:
        assert score.dtype == type_of_score
        assert not score.requires_grad
        np.testing.assert_allclose(score.double().numpy(), values, rtol=1e-6, atol=0)


def test_taylor_of_half_precision_does_not_vanish():
    weight = torch.tensor([2.0**-12], dtype=torch.float16)  # whose square is below the smallest of float16
    assert taylor_score(weight, -weight).tolist() == [2.0**-24]
    assert taylor_score(weight * 2**-8, weight * 2**-8).item() == 2.0**-40


def test_random_score_draws_from_its_generator_alone():
    state = torch.get_rng_state()
    scores = [random_score(torch.zeros(40, 50, dtype=torch.bfloat16), torch.Generator().manual_seed(3)) for _ in "ab"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*scores)
    assert torch.equal(scores[0], torch.rand(40, 50, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    first, second = random_score(torch.zeros(2000), generator), random_score(torch.zeros(2000), generator)
    assert torch.equal(first, scores[0].flatten())
    assert not torch.equal(first, second)


# --- n:m ---


def n_m_oracle(scores, n, m):
    """The mask group by group, and what each loses."""
    values = np.abs(scores.double().numpy())
    mask = np.ones(values.shape, dtype=bool)
    losses = np.zeros((values.shape[0], values.shape[1] // m, *values.shape[2:]))
    for out, group, *place in np.ndindex(*losses.shape):
        members = [(out, group * m + index, *place) for index in range(m)]
        for index in ordered([values[member] for member in members])[: m - n]:
            mask[members[index]] = False
            losses[(out, group, *place)] += values[members[index]]
    return mask, losses


def n_m_masks_oracle(scores, n, m, groups, kept):
    """Those of ``kept`` first, then by their losses, one group after the other."""
    choices, losses = zip(*(n_m_oracle(score, n, m) for score in scores), strict=True)
    kept = [np.ones(score.shape, dtype=bool) for score in scores] if kept is None else [mask.numpy() for mask in kept]
    masks, flat, places = [mask.copy() for mask in kept], [], []
    for index, own in enumerate(losses):
        for place in np.ndindex(*own.shape):
            out, group, *rest = place
            members = [(out, group * m + member, *rest) for member in range(m)]
            done = sum(kept[index][member] for member in members) < m
            flat.append(-1.0 if done else own[place])
            places.append((index, members, done))
    for position in ordered(flat)[:groups]:
        index, members, done = places[position]
        for member in members:
            masks[index][member] = kept[index][member] if done else choices[index][member]
    return masks


def test_n_m_hand_worked():
    linear = torch.tensor([[0.1, -0.4, 0.3, 0.2, 5.0, 5.0, -5.0, 5.0]])
    assert n_m_mask(linear, 2, 4).tolist() == [[False, True, True, False, False, False, True, True]]
    assert n_m_mask(linear, 1, 2).tolist() == [[False, True, True, False, False, True, False, True]]
    conv = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).reshape(1, 2, 1, 2)  # two channels at two positions
    assert n_m_mask(conv, 1, 2).flatten().tolist() == [False, True, True, False]


@settings(max_examples=75, deadline=None)
@given(
    weights=tensors(
        shapes=[(2, 4), (3, 8), (2, 4, 1, 2), (1, 8, 2), (0, 4), (2, 0), (2, 4, 0, 1), (1, 4, 2, 1, 2)], most=3
    ),
    pattern=st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]),
    piece=st.sampled_from([1, _selection._PIECE]),
)
def test_n_m_equals_the_oracle(weights, pattern, piece):
    with mock.patch.object(_selection, "_PIECE", piece):
        masks = [n_m_mask(weight, *pattern) for weight in weights]
    assert_masks(masks, [n_m_oracle(weight, *pattern)[0] for weight in weights], weights)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_n_m_of_many_pieces(pattern, layout):
    n, m = pattern
    weight = sample(40, 64, 9, 9)
    mask = n_m_mask(laid_out(weight, layout), n, m)
    ranks = np.argsort(np.abs(weight.numpy()).reshape(40, 64 // m, m, 9, 9), axis=2, kind="stable")
    expected = np.ones(ranks.shape, dtype=bool)
    np.put_along_axis(expected, ranks[:, :, : m - n], False, axis=2)
    np.testing.assert_array_equal(mask.numpy(), expected.reshape(weight.shape))
    assert mask.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@settings(max_examples=75, deadline=None)
@given(
    data=st.data(),
    scores=tensors(
        dtypes=[torch.float32, torch.float64], shapes=[(2, 4), (2, 8, 2), (1, 4, 1, 2), (2, 0)], most=3, tiny=False
    ),
    pattern=st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 4)]),
)
def test_n_m_masks_equal_the_oracle(data, scores, pattern):
    n, m = pattern
    count = sum(score.numel() for score in scores) // m
    first = data.draw(st.integers(0, count))
    masks = n_m_masks(scores, n, m, first)
    assert_masks(masks, n_m_masks_oracle(scores, n, m, first, None), scores)
    # new scores, and more groups: what is n:m keeps its choice
    later = [score.flip(1) * 2 for score in scores]
    done = first if n < m else 0
    second = data.draw(st.integers(done, count))
    grown = n_m_masks(later, n, m, second, kept=masks)
    assert_masks(grown, n_m_masks_oracle(later, n, m, second, masks), later)
    assert not any(bool((new & ~old).any()) for old, new in zip(masks, grown, strict=True))
    assert sum(int((~mask).sum()) for mask in grown) == second * (m - n)


def test_n_m_masks_hand_worked():
    scores = [torch.tensor([[0.3, 0.9, 0.1, 0.2]]), torch.tensor([[0.2, -0.1], [7.0, 8.0]])]
    results = [[mask.int().tolist() for mask in n_m_masks(scores, 1, 2, groups)] for groups in range(5)]
    assert results == [
        [[[1, 1, 1, 1]], [[1, 1], [1, 1]]],
        [[[1, 1, 0, 1]], [[1, 1], [1, 1]]],
        [[[1, 1, 0, 1]], [[1, 0], [1, 1]]],
        [[[0, 1, 0, 1]], [[1, 0], [1, 1]]],
        [[[0, 1, 0, 1]], [[1, 0], [0, 1]]],
    ]


def test_losses_of_half_precision_are_summed_in_float32():
    # 2049 and 2048.5, which are both 2048 in float16
    scores = [torch.tensor([[2048.0, 1.0, 4096.0, 4096.0], [2048.0, 0.5, 4096.0, 4096.0]], dtype=torch.float16)]
    assert n_m_masks(scores, 2, 4, 1)[0].tolist() == [[True] * 4, [False, False, True, True]]


# --- reports ---


def test_sparsity_and_churn():
    old = [torch.tensor([True, False, True, True]), torch.tensor([[True], [False]])]
    new = [torch.tensor([True, True, False, True]), torch.tensor([[False], [False]])]
    assert sparsity_of(old) == 2 / 6
    assert sparsity_of(new) == 3 / 6
    assert churn(old, new) == churn(new, old) == 3 / 6
    assert churn(old, old) == 0.0
    assert (
        sparsity_of([torch.ones(0, dtype=torch.bool)]) == churn([torch.ones(0).bool()], [torch.ones(0).bool()]) == 0.0
    )


def test_sparsity_is_that_asked_for():
    weights = [sample(37, 11), sample(100, seed=1)]
    for sparsity, scope in product((0.0, 0.3, 0.9, 1.0), ("global", "erk")):
        found = sparsity_of(magnitude_mask(weights, sparsity, scope))
        assert found == math.floor(sparsity * 507 + 0.5) / 507


# --- errors ---

ONES = [torch.ones(2, 4)]
KEPT = [torch.tensor([[True, True, False, False]] * 2)]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"weights must hold at least one", lambda: magnitude_mask([], 0.5)),
        (ValueError, r"sparsity must be in \[0, 1\], got 1.5", lambda: magnitude_mask(ONES, 1.5)),
        (ValueError, r"sparsity must be in \[0, 1\], got nan", lambda: magnitude_mask(ONES, math.nan)),
        (
            ValueError,
            r"scope must be one of global, layer, erk, got 'all'",
            lambda: magnitude_mask(ONES, 0.5, "all"),
        ),
        (
            TypeError,
            r"weights must be floating point, got dtype torch.int64",
            lambda: magnitude_mask([torch.ones(2).long()], 0),
        ),
        (ValueError, r"scores must hold at least one", lambda: smallest_masks([], 0)),
        (ValueError, r"pruned must be in \[0, 8\].*got 9", lambda: smallest_masks(ONES, 9)),
        (ValueError, r"pruned must be in \[0, 8\].*got -1", lambda: smallest_masks(ONES, -1)),
        (ValueError, r"pruned must be at least 4.*got 3", lambda: smallest_masks(ONES, 3, kept=KEPT)),
        (
            ValueError,
            r"kept must have the shapes of scores.*got \[\(3,\)\]",
            lambda: smallest_masks(ONES, 3, kept=[torch.ones(3).bool()]),
        ),
        (ValueError, r"kept must hold at least one tensor, got \[\]", lambda: smallest_masks(ONES, 3, kept=[])),
        (TypeError, r"kept must be boolean, got dtype torch.float32", lambda: smallest_masks(ONES, 3, kept=ONES)),
        (ValueError, r"limits must be one per tensor, 1, got 2", lambda: smallest_masks(ONES, 3, limits=[3, 3])),
        (ValueError, r"limits must not be negative, got \[-1\]", lambda: smallest_masks(ONES, 0, limits=[-1])),
        (ValueError, r"limits allow 2 entries.*fewer than the 3", lambda: smallest_masks(ONES, 3, limits=[2])),
        (
            ValueError,
            r"kept has pruned 4 entries of tensor 0, more than its limit of 3",
            lambda: smallest_masks(ONES * 2, 8, kept=KEPT * 2, limits=[3, 8]),
        ),
        (ValueError, r"sparsity must be in \[0, 1\], got -0.1", lambda: erk_sparsities([(2, 2)], -0.1)),
        (ValueError, r"sparsities must be as many as sizes, 2, got 1", lambda: layer_zeros([1, 2], [0.5])),
        (ValueError, r"each of sparsities must be in \[0, 1\], got 2", lambda: layer_zeros([1], [2])),
        (ValueError, r"limits allow 3 entries", lambda: layer_zeros([1, 2], [0.5, 0.5], total=4)),
        (ValueError, r"limits allow 1 entries", lambda: layer_zeros([2, 2], [1.0, 0.5], limits=[0, 1])),
        (ValueError, r"total must not be negative, got -1", lambda: layer_zeros([2, 2], [0.5, 0.5], total=-1)),
        (ValueError, r"size must not be negative, got -1", lambda: fewest_kept(-1)),
        (
            ValueError,
            r"gradient must have the shape of weight, \(2,\), got \(3,\)",
            lambda: taylor_score(torch.ones(2), torch.ones(3)),
        ),
        (ValueError, r"n must be in \[1, m\], .*got n=5 and m=4", lambda: n_m_mask(ONES[0], 5, 4)),
        (ValueError, r"n must be in \[1, m\], .*got n=0 and m=4", lambda: n_m_mask(ONES[0], 0, 4)),
        (ValueError, r"m must be positive, got 0", lambda: n_m_mask(ONES[0], 0, 0)),
        (
            ValueError,
            r"weight must have a dimension 1 that m=3 divides, got shape \(2, 4\)",
            lambda: n_m_mask(ONES[0], 1, 3),
        ),
        (ValueError, r"weight must have a dimension 1", lambda: n_m_mask(torch.ones(4), 1, 2)),
        (
            TypeError,
            r"weight must be floating point, got dtype torch.int64",
            lambda: n_m_mask(torch.ones(2, 4).long(), 1, 2),
        ),
        (ValueError, r"scores must hold at least one", lambda: n_m_masks([], 1, 2, 0)),
        (ValueError, r"groups must be in \[0, 2\].*got 3", lambda: n_m_masks(ONES, 2, 4, 3)),
        (ValueError, r"groups must be in \[2, 2\].*got 1", lambda: n_m_masks(ONES, 2, 4, 1, kept=KEPT)),
        (ValueError, r"kept must hold 3 or all of each 4 consecutive", lambda: n_m_masks(ONES, 3, 4, 2, kept=KEPT)),
        (ValueError, r"kept must have the shapes of scores", lambda: n_m_masks(ONES, 2, 4, 2, kept=KEPT * 2)),
        (TypeError, r"kept must be boolean", lambda: n_m_masks(ONES, 2, 4, 2, kept=ONES)),
        (ValueError, r"masks must hold at least one tensor", lambda: sparsity_of([])),
        (ValueError, r"before must hold at least one tensor, got \[\]", lambda: churn([], [])),
        (ValueError, r"same shapes.*\(2, 4\).* and \[\(2,\)\]", lambda: churn(KEPT, [torch.ones(2).bool()])),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- filters ---

CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def answering(layer, mask):
    """Which output channels of a layer are not all zero, when its weight is masked and it sees random input."""
    with torch.no_grad():
        layer.weight.copy_(sample(*mask.shape, dtype=layer.weight.dtype) * mask)
    if isinstance(layer, nn.Linear):
        return layer(sample(16, layer.in_features, seed=1)).ne(0).any(dim=0)
    output = layer(sample(2, layer.in_channels, *[4] * (mask.ndim - 2), seed=1))
    return output.transpose(0, 1).flatten(1).ne(0).any(dim=1)


@st.composite
def masked_layers(draw, kinds, groups):
    """A layer without bias, and a mask of its weight, with many filters that are masked completely."""
    kind, count = draw(st.sampled_from(kinds)), draw(st.sampled_from(groups))
    inputs, outputs = count * draw(st.integers(1, 3)), count * draw(st.integers(1, 3))
    settings_ = {} if kind is nn.Linear else {"kernel_size": draw(st.integers(1, 2)), "groups": count}
    layer = kind(inputs, outputs, bias=False, **settings_)
    share = draw(st.sampled_from([0.0, 0.1, 0.3, 1.0]))
    return layer, sample(*layer.weight.shape, seed=draw(st.integers(0, 1000))).sigmoid() < share


@settings(max_examples=100, deadline=None)
@given(arguments=masked_layers(CONVOLUTIONS, [1, 2]))
def test_live_filters_are_the_output_channels_that_are_not_zero(arguments):
    layer, mask = arguments
    found = live_filters(mask, Filters())
    assert (found.dtype, found.shape) == (torch.bool, (len(mask), *[1] * (mask.ndim - 1)))
    assert torch.equal(found.flatten(), answering(layer, mask))


@settings(max_examples=75, deadline=None)
@given(arguments=masked_layers(TRANSPOSED, [1, 2, 3]))
def test_live_filters_of_transposed_convolutions_are_too(arguments):
    layer, mask = arguments
    alive = answering(layer, mask)
    found = live_filters(mask, Filters(groups=layer.groups))
    assert (found.dtype, found.shape) == (torch.bool, (*mask.shape[:2], *[1] * (mask.ndim - 2)))
    inputs, outputs = len(mask) // layer.groups, mask.shape[1]  # of each group
    for row, column in np.ndindex(*mask.shape[:2]):
        assert found[row, column].item() == alive[row // inputs * outputs + column].item()
    assert not (mask & ~found).any()  # it broadcasts, and what is kept belongs to a live filter


def test_live_filters_hand_worked():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]).bool()
    assert live_filters(mask, Filters()).flatten().tolist() == [True, False, True, True]
    transposed = mask.reshape(4, 3, 1)
    assert live_filters(transposed, Filters(groups=1)).squeeze(2).tolist() == [[True, False, True]] * 4
    by_group = [[True, False, False]] * 2 + [[False, False, True]] * 2
    assert live_filters(transposed, Filters(groups=2)).squeeze(2).tolist() == by_group


@pytest.mark.parametrize("filters", [Filters(), Filters(1), Filters(2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_masks_have_the_same_filters(filters, layout):
    mask = sample(4, 6, 3, 3) > 1.5
    assert torch.equal(live_filters(laid_out(mask.int(), layout).bool(), filters), live_filters(mask, filters))


@pytest.mark.parametrize("filters", [Filters(), Filters(1), Filters(2)])
def test_full_and_empty_masks_have_all_filters_and_none(filters):
    mask = torch.ones(4, 3, 2, 2, dtype=torch.bool)
    assert live_filters(mask, filters).all()
    assert not live_filters(~mask, filters).any()

"""Filters: scores against NumPy and by hand, and which filters stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.functional import filter_rows, filter_scores, kept_filters
from lightning_compress.functional.masks import Filters


def test_norms_and_taylor_by_hand():
    rows = torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, -2.0]])
    gradients = torch.tensor([[1.0, 1.0], [-2.0, 5.0], [7.0, 0.5]])
    assert filter_scores(rows, "l1").tolist() == [7.0, 2.0, 2.0]
    assert filter_scores(rows, "l2").tolist() == pytest.approx([5.0, 2.0**0.5, 2.0])
    assert filter_scores(rows, "taylor", gradients).tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(("kind", "order"), [("l1", 1), ("l2", 2)])
def test_norms_against_numpy(kind, order):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.linalg.norm(weight.numpy().reshape(6, -1), ord=order, axis=1)
    assert np.allclose(filter_scores(filter_rows(weight), kind).numpy(), expected, rtol=1e-12)


def test_taylor_is_what_the_loss_changes_by_to_first_order():
    """A loss that is linear in the weights changes by exactly the score when a filter is gone."""
    torch.manual_seed(0)
    x, target = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    loss = (F.conv2d(x, weight) * target).sum()
    loss.backward()
    scores = filter_scores(filter_rows(weight.detach()), "taylor", filter_rows(weight.grad))
    for index in range(6):
        without = weight.detach().clone()
        without[index] = 0
        changed = (F.conv2d(x, without) * target).sum() - loss.detach()
        assert scores[index].item() == pytest.approx(abs(changed.item()), rel=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_what_its_channels_are_computed_with(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    rows = filter_rows(layer.weight.detach(), Filters(groups=groups))
    assert rows.shape == (6, 4 // groups * 9)
    for index in range(6):
        with torch.no_grad():
            clone = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
            clone.weight.copy_(layer.weight)
            per_group = 6 // groups
            first = index // per_group * (4 // groups)
            clone.weight[first : first + 4 // groups, index % per_group] = 0
            output = clone(torch.randn(1, 4, 5, 5))
        assert output[:, index].abs().max() == 0
        assert output.abs().amax(dim=(0, 2, 3)).count_nonzero() == 5
        own = layer.weight[first : first + 4 // groups, index % per_group].flatten()
        assert sorted(rows[index].tolist()) == sorted(own.tolist())


def test_a_vector_has_one_number_a_row():
    assert filter_rows(torch.tensor([1.0, -2.0])).tolist() == [[1.0], [-2.0]]


def test_half_precision_does_not_overflow():
    assert filter_scores(torch.full((2, 4), 3e4, dtype=torch.float16), "l1").tolist() == pytest.approx(
        [1.2e5] * 2, rel=1e-3
    )


def test_of_equal_scores_the_lower_index_goes_first():
    assert kept_filters(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [1, 3]


def test_nothing_and_everything():
    scores = torch.tensor([2.0, 1.0])
    assert kept_filters(scores, 0).tolist() == [0, 1]
    assert kept_filters(scores, 2).tolist() == []


def test_nan_stays_longest():
    assert kept_filters(torch.tensor([float("nan"), 1.0, 2.0]), 2).tolist() == [0]


def test_blocks_lose_the_same_positions():
    scores = torch.tensor([9.0, 1.0, 5.0, 1.0, 9.0, 1.0])  # means 5, 5, 3
    assert kept_filters(scores, 1, blocks=2).tolist() == [0, 1, 3, 4]
    assert kept_filters(scores, 2, blocks=2).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filter_scores(torch.ones(2, 2), "l3"), "kind must be one of l1, l2, taylor, got 'l3'"),
        (lambda: filter_scores(torch.ones(2), "l1"), r"rows must be \(C, n\), got shape \(2,\)"),
        (lambda: filter_scores(torch.ones(2, 2), "taylor"), r"needs gradients of shape \(2, 2\), got none"),
        (lambda: filter_scores(torch.ones(2, 2), "taylor", torch.ones(2)), r"got shape \(2,\)"),
        (lambda: kept_filters(torch.ones(3), 1, blocks=2), "do not fall into 2 blocks"),
        (lambda: kept_filters(torch.ones(4), 3, blocks=2), "removed must be at most 2, .* each of blocks=2, got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

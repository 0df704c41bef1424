"""Position-based scaling against numbers worked by hand, NumPy, and its own plain form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.functional import gradients, position_scale, quantization_grid, zero_scale
from lightning_compress.functional.gradients import (
    factors_together,
    grid_positions,
    scale_gradients_,
    scale_updates_,
    total_scale,
)

WORKED = torch.tensor([0.70, 0.33, -0.12, 0.05, -0.70])


def in_numpy(weight, bits, eps=0.0, axis=None):
    """The factor in float64."""
    weight = np.asarray(weight, dtype=np.float64)
    limit = 2 ** (bits - 1) - 1
    others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
    step = np.abs(weight).max(axis=others, keepdims=axis is not None) / limit
    return np.abs(weight - step * np.clip(np.round(weight / step), -limit, limit)) + eps


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["pieces", "whole", "groups"])
def way(request, monkeypatch):
    """The kernel on a CPU with pieces of seven elements, with pieces larger than all, and as it runs on a GPU."""
    if request.param == "pieces":
        monkeypatch.setattr(gradients, "CPU_ELEMENTS", 7)
    elif request.param == "groups":

        def on_a_gpu(weights, steps, eps, scale, *others):
            columns = [[weight.detach() for weight in weights], steps or [None] * len(weights), *others]
            for group in gradients._groups(list(zip(*columns, strict=True)), 7):
                pieces, own, *rest = (list(column) for column in zip(*group, strict=True))
                yield factors_together(pieces, own if steps else None, eps, scale), *rest

        monkeypatch.setattr(gradients, "_factors", on_a_gpu)
    return request.param


def test_the_distances_worked_by_hand():
    assert position_scale(WORKED, bits=4).tolist() == pytest.approx([0, 0.03, 0.02, 0.05, 0], abs=1e-7)


def test_the_step_worked_by_hand(way):
    """lambda 150, lr 0.01, weight decay 1e-4, all gradients 0.2."""
    weight = nn.Parameter(WORKED.clone())
    optimizer = torch.optim.SGD([weight], lr=0.01, weight_decay=1e-4)
    weight.grad = torch.full((5,), 0.2)
    scale_gradients_([weight], [weight.grad], [4], scale=150)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.699999, 0.321, -0.126, 0.035, -0.699999], abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_against_numpy(bits, axis):
    weight = random(6, 5, 3).double()
    ours = position_scale(weight, bits, 0.01, axis=axis)
    assert ours.dtype == torch.float64
    assert np.abs(ours.numpy() - in_numpy(weight, bits, 0.01, axis)).max() < 1e-15


def test_a_weight_on_the_grid_is_at_distance_eps():
    weight = torch.arange(-7, 8) * 0.25
    assert position_scale(weight, bits=4).tolist() == [0.0] * 15
    assert position_scale(weight, bits=4, eps=0.5).tolist() == [0.5] * 15


def test_the_largest_weight_has_no_distance_and_others_at_most_half_a_step():
    weight = random(1000)
    scale = position_scale(weight, bits=3)
    assert float(scale[weight.abs().argmax()]) < 1e-6
    assert float(scale.max()) <= float(quantization_grid(weight, 3)) * 0.5000001
    assert float(scale.max()) > float(quantization_grid(weight, 3)) * 0.49


def test_zero_scale():
    assert zero_scale(torch.tensor([0.5, -0.25, 0.0]), 0.125).tolist() == [0.625, 0.375, 0.125]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, way):
    weight = random(4, 5).to(dtype)
    expected = in_numpy(weight.float(), 4)
    ours = position_scale(weight, bits=4)
    assert ours.dtype == torch.float32
    assert np.abs(ours.numpy() - expected).max() < 1e-6
    gradient = torch.ones(4, 5, dtype=dtype)
    scale_gradients_([weight], [gradient], [4], scale=2.0)
    assert torch.equal(gradient, (2.0 * ours).to(dtype))
    after = weight + 1
    scale_updates_([after], [weight], [4], scale=2.0)
    assert torch.equal(after, (weight.float() + 2.0 * ours * ((weight + 1).float() - weight.float())).to(dtype))


@pytest.mark.parametrize("eps", [0.0, 0.01])
@pytest.mark.parametrize("axis", [None, 0])
def test_the_kernel_is_the_plain_formula_bit_for_bit(way, axis, eps):
    weights = [random(6, 5, 3, 3), random(4, 3), random(9), random(1, 40), random(6, 4, 2, 2).mT]
    weights.append(random(6, 4, 3, 3).to(memory_format=torch.channels_last))
    grads = [random(*weight.shape, seed=1) for weight in weights]
    bits, axes = [4, 2, 8, 3, 4, 4], [axis, axis, None, axis, axis, axis]
    plain = [
        grad * (37.5 * position_scale(weight, own, eps, axis=ax))
        for weight, grad, own, ax in zip(weights, grads, bits, axes, strict=True)
    ]
    scale_gradients_(weights, grads, bits, axes=axes, scale=37.5, eps=eps)
    for ours, expected in zip(grads, plain, strict=True):
        assert torch.equal(ours, expected)


def test_the_kernel_towards_zero(way):
    weights, grads = [random(5, 3), random(20)], [random(5, 3, seed=1), random(20, seed=2)]
    plain = [grad * (3.0 * zero_scale(weight, 0.1)) for weight, grad in zip(weights, grads, strict=True)]
    scale_gradients_(weights, grads, None, scale=3.0, eps=0.1)
    for ours, expected in zip(grads, plain, strict=True):
        assert torch.equal(ours, expected)


def test_updates_are_scaled_from_where_decay_leaves_the_weights(way):
    before, after = [random(6, 5), random(9)], [random(6, 5, seed=1), random(9, seed=2)]
    expected = []
    for old, new, bits, kept in zip(before, after, [4, 3], [0.9, 1.0], strict=True):
        base = old * kept
        expected.append(base + (2.0 * position_scale(old, bits)) * (new - base))
    scale_updates_(after, before, [4, 3], scale=2.0, kept=[0.9, 1.0])
    for ours, own in zip(after, expected, strict=True):
        assert torch.equal(ours, own)


def test_mixed_types_keep_their_own_grids(way):
    weights = [random(5, 3), random(5, 3).double(), random(4).half()]
    grads = [torch.ones_like(weight) for weight in weights]
    scale_gradients_(weights, grads, [4, 4, 4], scale=1.0)
    for weight, grad in zip(weights, grads, strict=True):
        assert torch.equal(grad, position_scale(weight, 4).to(weight.dtype))


def test_the_total_is_over_all_elements(way):
    weights = [random(6, 5, 3), random(9)]
    parts = np.concatenate([in_numpy(weights[0], 4, 0.1).ravel(), in_numpy(weights[1], 2, 0.1).ravel()])
    assert float(total_scale(weights, [4, 2], eps=0.1)) == pytest.approx(parts.sum(), rel=1e-6)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    assert float(total_scale(weights, None, eps=0.1)) == pytest.approx(float((magnitudes + 0.1).sum()), rel=1e-6)


def test_parts_of_a_weight_with_the_steps_of_the_whole_give_what_the_whole_gives(way):
    whole, gradient = random(6, 5), random(6, 5)
    after = whole - 0.1 * gradient
    step = quantization_grid(whole, 4)
    expected, moved = gradient.clone(), after.clone()
    scale_gradients_([whole], [expected], [4], scale=3.0)
    scale_updates_([moved], [whole], [4], scale=3.0)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 6)):
        part, own, new = whole[rows], gradient[rows].clone(), after[rows].clone()
        scale_gradients_([part], [own], [4], scale=3.0, steps=[step])
        scale_updates_([new], [part], [4], scale=3.0, steps=[step])
        assert torch.equal(own, expected[rows])
        assert torch.equal(new, moved[rows])
        assert torch.equal(grid_positions(part, 4, step=step), grid_positions(whole, 4)[rows])
    sums = [total_scale([part], [4], steps=[step]) for part in (whole[:4], whole[4:])]
    assert float(sum(sums)) == pytest.approx(float(total_scale([whole], [4])), rel=1e-6)


def test_weights_of_nothing_but_zero_get_no_gradient(way):
    gradient = torch.ones(3)
    scale_gradients_([torch.zeros(3)], [gradient], [4], scale=10.0)
    assert gradient.tolist() == [0, 0, 0]


def test_the_gradient_of_a_weight_that_is_not_a_number_is_none_either(way):
    gradient = torch.ones(2)
    scale_gradients_([torch.tensor([1.0, float("nan")])], [gradient], [4])
    assert gradient.isnan().any()
    with pytest.raises(ValueError, match="NaN or infinite"):
        position_scale(torch.tensor([1.0, float("nan")]), 4)


def test_parameters_are_left_alone():
    weight = nn.Parameter(random(4, 3))
    before = weight.detach().clone()
    gradient = torch.ones(4, 3)
    scale_gradients_([weight], [gradient], [4])
    assert torch.equal(weight, before)
    assert position_scale(weight, 4).requires_grad is False
    assert weight._version == 0


def test_positions_lie_in_a_cell():
    weight = random(500)
    positions = grid_positions(weight, bits=4)
    step = float(quantization_grid(weight, 4))
    assert float(positions.abs().max()) <= 0.5
    assert (positions.abs() * step).tolist() == pytest.approx(position_scale(weight, 4).tolist(), abs=1e-6)
    assert grid_positions(torch.tensor([0.7, 0.33, -0.12]), 4).tolist() == pytest.approx([0, 0.3, -0.2], abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: position_scale(WORKED, 1), "bits must be a whole number from 2 to 8, got 1"),
        (lambda: position_scale(WORKED, 9), "bits must be a whole number from 2 to 8, got 9"),
        (lambda: position_scale(WORKED, 4, -1.0), "eps must be at least 0, got -1.0"),
        (lambda: position_scale(WORKED, 4, float("nan")), "eps must be at least 0, got nan"),
        (lambda: zero_scale(WORKED, 0.0), "eps must be positive"),
        (lambda: scale_gradients_([WORKED], [WORKED], [16]), "bits must be a whole number from 2 to 8, got 16"),
        (lambda: total_scale([WORKED], [1]), "bits must be a whole number from 2 to 8, got 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()

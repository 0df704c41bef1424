"""Factor transfer's losses against hand-worked numbers, an independent NumPy oracle, and their limits."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_compress.functional import factor_transfer_loss, reconstruction_loss

STUDENT = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
TEACHER = torch.tensor([[0.0, 1.0], [2.0, 2.0]], dtype=torch.float64).reshape(1, 2, 1, 2)


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(student, teacher):
    """The definition, sample by sample and element by element."""
    total, count = 0.0, 0
    for own, other in zip(np.asarray(student), np.asarray(teacher), strict=True):
        own_length = math.sqrt(sum(float(value) ** 2 for value in own.ravel()))
        other_length = math.sqrt(sum(float(value) ** 2 for value in other.ravel()))
        for index in np.ndindex(*own.shape):
            total += abs(float(own[index]) / own_length - float(other[index]) / other_length)
            count += 1
    return total / count


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 1, 3, 3), (4, 6, 1, 1)])
def test_equals_the_oracle(shape):
    student, teacher = sample(*shape), sample(*shape, seed=1)
    assert factor_transfer_loss(student, teacher).item() == pytest.approx(oracle(student, teacher), rel=1e-11)


@pytest.mark.parametrize(("large", "small"), [((4, 6), (2, 3)), ((5, 3), (2, 2)), ((4, 2), (2, 2))])
def test_the_larger_factor_is_pooled_first(large, small):
    larger, smaller = sample(2, 3, *large), sample(2, 3, *small, seed=1)
    pooled = np.empty((2, 3, *small))
    for h, w in product(range(small[0]), range(small[1])):
        rows = slice(h * large[0] // small[0], math.ceil((h + 1) * large[0] / small[0]))
        columns = slice(w * large[1] // small[1], math.ceil((w + 1) * large[1] / small[1]))
        pooled[:, :, h, w] = larger.numpy()[:, :, rows, columns].mean(axis=(2, 3))
    expected = oracle(pooled, smaller)
    ours = [factor_transfer_loss(larger, smaller).item(), factor_transfer_loss(smaller, larger).item()]
    assert ours == pytest.approx([expected] * 2, rel=1e-11)


def test_hand_worked():
    # (1, 2, 3, 0) / sqrt(14) and (0, 1, 2, 2) / 3
    student = STUDENT.clone().requires_grad_()
    loss = factor_transfer_loss(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(0.317559, abs=1e-6)
    # signs g = (1, 1, 1, -1) / 4, unit u: (g - (g.u) u) / sqrt(14), with g.u = 6 / (4 sqrt(14))
    expected = [(sign / 4 - 6 / 56 * value) / 14**0.5 for sign, value in zip((1, 1, 1, -1), (1, 2, 3, 0), strict=True)]
    assert student.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float64, (2, 2, 2, 3), elements=st.floats(-50, 50).map(lambda value: round(value, 3))),
    scale=st.floats(1e-30, 1e30),
)
def test_blind_to_scale_symmetric_and_bounded(values, scale):
    student, teacher = torch.from_numpy(values), sample(2, 2, 2, 3)
    loss = factor_transfer_loss(student, teacher).item()
    assert factor_transfer_loss(student * scale, teacher).item() == pytest.approx(loss, rel=1e-9)
    assert factor_transfer_loss(teacher, student).item() == pytest.approx(loss, rel=1e-12)
    assert 0 <= loss <= 2 / 12**0.5 + 1e-12  # two unit vectors of 12 elements
    assert factor_transfer_loss(student, student * 4).item() == pytest.approx(0, abs=1e-12)


def test_each_sample_is_scaled_to_unit_length_on_its_own():
    # against a teacher of zeros the loss is the L1 norm of the unit vector, over the number of elements
    student = sample(3, 2, 2, 2)
    flat = student.flatten(start_dim=1)
    expected = (flat.abs().sum(dim=1) / flat.square().sum(dim=1).sqrt()).mean() / 8
    assert factor_transfer_loss(student, torch.zeros_like(student)).item() == pytest.approx(expected.item(), rel=1e-12)


def test_channels_are_not_collapsed():
    # the same attention over positions, in other channels
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    student[0, 0, 0, 0], teacher[0, 1, 0, 0] = 1.0, 1.0
    assert factor_transfer_loss(student, teacher).item() == 0.5


def test_independent_of_batch_mates():
    student, teacher = sample(3, 2, 2, 2), sample(3, 2, 2, 2, seed=1)
    alone = [factor_transfer_loss(student[i : i + 1], teacher[i : i + 1]).item() for i in range(3)]
    assert factor_transfer_loss(student, teacher).item() == pytest.approx(np.mean(alone), rel=1e-12)
    student[1:] *= torch.tensor([0.0, 1e6], dtype=torch.float64).reshape(2, 1, 1, 1)
    student.requires_grad_()
    factor_transfer_loss(student, teacher).backward()
    first = student.detach()[:1].requires_grad_()
    factor_transfer_loss(first, teacher[:1]).backward()
    assert student.grad[0].flatten().tolist() == pytest.approx((first.grad[0] / 3).flatten().tolist(), rel=1e-12)


@pytest.mark.parametrize(("own", "other"), [((2, 3), (2, 3)), ((4, 5), (2, 3)), ((2, 2), (3, 4))])
def test_gradcheck(own, other):
    student, teacher = sample(2, 2, *own).requires_grad_(), sample(2, 2, *other, seed=1)
    assert torch.autograd.gradcheck(lambda s: factor_transfer_loss(s, teacher), student)


def test_gradcheck_of_the_reconstruction():
    feature = sample(2, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda r: reconstruction_loss(r, feature), sample(2, 2, 3, 3).requires_grad_())


@pytest.mark.parametrize("loss", [factor_transfer_loss, reconstruction_loss])
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = sample(2, 3, 4, 4).requires_grad_(), sample(2, 3, 4, 4, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum().item() > 1e-3


def test_zero_factors_give_finite_gradients():
    zeros, teacher = torch.zeros(2, 3, 2, 2, requires_grad=True), sample(2, 3, 2, 2, dtype=torch.float32)
    for other in (teacher, zeros.detach()):
        loss = factor_transfer_loss(zeros, other)
        (gradient,) = torch.autograd.grad(loss, zeros)
        assert gradient.abs().max().item() <= 1.0  # an eps of 1e-12 would give 1e10
    assert loss.item() == 0.0


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_extreme_scales_neither_vanish_nor_overflow(scale):
    student, teacher = sample(2, 3, 2, 2, dtype=torch.float32), sample(2, 3, 2, 2, seed=1, dtype=torch.float32)
    assert factor_transfer_loss(student * scale, teacher).item() == pytest.approx(oracle(student, teacher), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [factor_transfer_loss, reconstruction_loss])
def test_low_precision_is_computed_in_float32(loss, dtype):
    student, teacher = sample(2, 3, 4, 4, dtype=dtype).requires_grad_(), sample(2, 3, 4, 4, seed=1, dtype=dtype)
    value = loss(student, teacher)
    value.backward()
    exact = loss(student.detach().double(), teacher.double())
    assert (value.dtype, exact.dtype, student.grad.dtype) == (torch.float32, torch.float64, dtype)
    assert value.item() == pytest.approx(exact.item(), rel=2e-6)


def test_reconstruction_is_the_mean_absolute_error():
    reconstruction, feature = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])
    assert reconstruction_loss(reconstruction, feature).item() == 7 / 4


@pytest.mark.parametrize("loss", [factor_transfer_loss, reconstruction_loss])
def test_an_empty_batch_gives_zero_and_nan_is_not_hidden(loss):
    assert loss(STUDENT[:0], TEACHER[:0]).item() == 0.0
    assert math.isnan(loss(STUDENT * torch.nan, TEACHER).item())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "as many channels"),
        ((2, 3, 4, 4), (1, 3, 4, 4), "the same batch size"),
        ((2, 3, 4, 8), (2, 3, 8, 4), "in height and in width"),
    ],
)
def test_shapes_that_do_not_fit_are_both_named(student, teacher, message):
    with pytest.raises(ValueError, match=message) as error:
        factor_transfer_loss(torch.ones(student), torch.ones(teacher))
    assert str(error.value).endswith(f"got {student} from the student and {teacher} from the teacher")


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 3, 4), (2, 3, 4, 4, 4)])
def test_factors_must_be_images(shape):
    with pytest.raises(ValueError, match=r"student_factor must be \(N, C, H, W\), got shape"):
        factor_transfer_loss(torch.ones(shape), TEACHER)
    with pytest.raises(ValueError, match=r"teacher_factor must be \(N, C, H, W\), got shape"):
        factor_transfer_loss(STUDENT, torch.ones(shape))


def test_reconstruction_must_have_the_shape_of_the_feature():
    with pytest.raises(ValueError, match=r"reconstruction and feature .* got \(2, 3\) and \(2, 1\)"):
        reconstruction_loss(torch.ones(2, 3), torch.ones(2, 1))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"teacher_factor must be floating point, got dtype torch.int64"):
        factor_transfer_loss(STUDENT, TEACHER.long())
    with pytest.raises(TypeError, match=r"reconstruction must be floating point, got dtype torch.int64"):
        reconstruction_loss(STUDENT.long(), TEACHER)

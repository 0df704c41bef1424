"""Attention maps and their losses against hand-worked numbers, an independent NumPy oracle, and their limits."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_compress.functional import attention_map, attention_transfer_loss, gradient_transfer_loss

KINDS = ["sum", "abs_sum", "power", "max", "edges"]
MODES = ["code", "paper"]
# one sample, two channels (rows), two positions (columns)
STUDENT = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
TEACHER = torch.tensor([[0.0, 1.0], [2.0, 2.0]], dtype=torch.float64).reshape(1, 2, 1, 2)


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the oracle: the definitions, element by element, in Python floats ---


def oracle_value(image, h, w, power, kind):
    """The map at one position of ``(C, H, W)``, before it is scaled to unit length."""
    channels, height, width = image.shape
    column = [float(image[c, h, w]) for c in range(channels)]
    if kind == "sum":
        return sum(column)
    if kind == "abs_sum":
        return sum(abs(value) for value in column)
    if kind == "power":
        return sum(abs(value) ** power for value in column)
    if kind == "max":
        return max(abs(value) ** power for value in column)
    total = 0.0
    for c in range(channels):
        if w + 1 < width:
            total += abs(float(image[c, h, w + 1]) - float(image[c, h, w]))
        if h + 1 < height:
            total += abs(float(image[c, h + 1, w]) - float(image[c, h, w]))
    return total


def oracle_map(activation, power, kind):
    """One list per sample, unit length; tokens are images one pixel high."""
    array = np.asarray(activation, dtype=np.float64)
    if array.ndim == 3:
        array = np.transpose(array, (0, 2, 1))[:, :, None, :]
    rows = []
    for image in array:
        positions = product(range(image.shape[1]), range(image.shape[2]))
        row = [oracle_value(image, h, w, power, kind) for h, w in positions]
        length = math.sqrt(sum(value**2 for value in row))
        rows.append([value / length for value in row])
    return rows


def oracle_loss(student, teacher, power, kind, mode):
    pairs = list(zip(oracle_map(student, power, kind), oracle_map(teacher, power, kind), strict=True))
    squares = [[(s - t) ** 2 for s, t in zip(own, other, strict=True)] for own, other in pairs]
    if mode == "code":
        return sum(map(sum, squares)) / sum(map(len, squares))
    return sum(math.sqrt(sum(row)) for row in squares) / len(squares)


def oracle_pool(activation, height, width):
    """Average over windows from floor(i * H / h) to ceil((i + 1) * H / h)."""
    array = np.asarray(activation, dtype=np.float64)
    pooled = np.empty((*array.shape[:2], height, width))
    for h, w in product(range(height), range(width)):
        top, bottom = h * array.shape[2] // height, -(-(h + 1) * array.shape[2] // height)
        left, right = w * array.shape[3] // width, -(-(w + 1) * array.shape[3] // width)
        pooled[:, :, h, w] = array[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return pooled


SHAPES = {"image": (3, 4, 3, 5), "one channel": (2, 1, 4, 4), "one row": (2, 3, 1, 6), "tokens": (3, 7, 4)}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("name", "kind"), [pair for pair in product(SHAPES, KINDS) if pair != ("tokens", "edges")])
def test_maps_equal_the_oracle(name, kind, power):
    shape = SHAPES[name]
    activation = sample(*shape)
    rows = attention_map(activation, power, kind)
    assert rows.numpy() == pytest.approx(np.array(oracle_map(activation, power, kind)), rel=1e-11)
    assert rows.norm(dim=1).tolist() == pytest.approx([1.0] * shape[0], rel=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_the_oracle(kind, mode):
    student, teacher = sample(3, 4, 3, 5), sample(3, 6, 3, 5, seed=1)  # other numbers of channels
    for power in (1.0, 2.0, 3.0):
        expected = oracle_loss(student, teacher, power, kind, mode)
        ours = attention_transfer_loss(student, teacher, power, kind, mode)
        assert ours.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("large", "small"), [((6, 8), (3, 4)), ((7, 5), (3, 4)), ((4, 6), (4, 3))])
def test_the_larger_activation_is_pooled_before_its_map(large, small, kind, mode):
    larger, smaller = sample(2, 3, *large), sample(2, 4, *small, seed=1)
    pooled = oracle_pool(larger, *small)
    for student, teacher, expected in (
        (larger, smaller, oracle_loss(pooled, smaller, 2.0, kind, mode)),
        (smaller, larger, oracle_loss(smaller, pooled, 2.0, kind, mode)),
    ):
        loss = attention_transfer_loss(student, teacher, kind=kind, mode=mode)
        assert loss.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize(("large", "small"), [(8, 4), (7, 3)])
def test_longer_tokens_are_pooled_along_the_sequence(large, small, kind, mode):
    larger, smaller = sample(2, large, 3), sample(2, small, 4, seed=1)
    image = np.asarray(larger).transpose(0, 2, 1)[:, :, None, :]
    pooled = oracle_pool(image, 1, small)[:, :, 0, :].transpose(0, 2, 1)
    ours = [
        attention_transfer_loss(larger, smaller, kind=kind, mode=mode).item(),
        attention_transfer_loss(smaller, larger, kind=kind, mode=mode).item(),
    ]
    assert ours == pytest.approx([oracle_loss(pooled, smaller, 2.0, kind, mode)] * 2, rel=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_an_image_and_tokens_compare_by_position(kind, mode):
    image, tokens = sample(2, 3, 2, 3), sample(2, 6, 5, seed=1)
    as_tokens = image.flatten(start_dim=2).transpose(1, 2)
    expected = oracle_loss(as_tokens, tokens, 2.0, kind, mode)
    ours = [attention_transfer_loss(*pair, kind=kind, mode=mode).item() for pair in ((image, tokens), (tokens, image))]
    assert ours == pytest.approx([expected] * 2, rel=1e-11)


# --- worked by hand ---


def test_hand_worked_maps():
    assert attention_map(STUDENT)[0].tolist() == pytest.approx([0.928477, 0.371391], abs=1e-6)
    assert attention_map(TEACHER)[0].tolist() == pytest.approx([0.624695, 0.780869], abs=1e-6)


def test_hand_worked_losses():
    assert attention_transfer_loss(STUDENT, TEACHER).item() == pytest.approx(0.129978, abs=1e-6)
    assert attention_transfer_loss(STUDENT, TEACHER, mode="paper").item() == pytest.approx(0.509858, abs=1e-6)


def test_odd_powers_take_the_magnitude_first():
    activation = torch.tensor([[[[-1.0, 1.0]], [[-1.0, 0.0]]]], dtype=torch.float64)
    assert attention_map(activation, power=3.0)[0].tolist() == pytest.approx([2 / 5**0.5, 1 / 5**0.5], rel=1e-14)


def test_edges_of_a_step():
    # a step between columns 1 and 2, of height 1 in one channel and 2 in the other; nothing at the border
    step = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(2, 4)
    activation = torch.stack([step, 5 - 2 * step])[None]
    expected = torch.tensor([0.0, 3.0, 0.0, 0.0] * 2, dtype=torch.float64) / (3 * 2**0.5)
    assert attention_map(activation, kind="edges")[0].tolist() == pytest.approx(expected.tolist(), rel=1e-14)


# --- properties ---

activations = hnp.arrays(np.float64, (2, 3, 2, 4), elements=st.floats(-50, 50).map(lambda value: round(value, 3)))


@settings(max_examples=60, deadline=None)
@given(values=activations, scale=st.floats(1e-30, 1e30), kind=st.sampled_from(KINDS), power=st.floats(0.3, 6))
def test_maps_are_unit_or_zero_and_blind_to_scale_and_channel_order(values, scale, kind, power):
    activation = torch.from_numpy(values)
    rows = attention_map(activation, power, kind)
    lengths = rows.norm(dim=1).tolist()
    assert [min(abs(length - 1), abs(length)) for length in lengths] == pytest.approx([0, 0], abs=1e-12)
    assert attention_map(activation * scale, power, kind).numpy() == pytest.approx(rows.numpy(), abs=1e-9)
    if kind != "sum":  # whose sums may cancel, up to rounding
        assert attention_map(activation[:, [2, 0, 1]], power, kind).numpy() == pytest.approx(rows.numpy(), abs=1e-9)
        assert attention_map(-activation, power, kind).numpy() == pytest.approx(rows.numpy(), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(values=activations, kind=st.sampled_from(KINDS), mode=st.sampled_from(MODES))
def test_losses_are_symmetric_bounded_and_zero_when_equal(values, kind, mode):
    student, teacher = torch.from_numpy(values), sample(2, 3, 2, 4)
    loss = attention_transfer_loss(student, teacher, kind=kind, mode=mode).item()
    assert 0 <= loss <= (0.5 if mode == "code" else 2.0) + 1e-12  # unit rows are at most 2 apart; 8 positions
    assert attention_transfer_loss(teacher, student, kind=kind, mode=mode).item() == pytest.approx(loss, rel=1e-12)
    assert attention_transfer_loss(student, student * 4, kind=kind, mode=mode).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_channel_order_does_not_matter(kind):
    activation = sample(3, 5, 4, 4)
    permuted = attention_map(activation[:, [3, 1, 4, 0, 2]], kind=kind)
    assert permuted.numpy() == pytest.approx(attention_map(activation, kind=kind).numpy(), rel=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_does_not_depend_on_batch_mates(kind):
    activation = sample(3, 4, 3, 3)
    alone = torch.cat([attention_map(one[None], kind=kind) for one in activation])
    mates = activation * torch.tensor([1.0, 0.0, 1e6], dtype=torch.float64).reshape(3, 1, 1, 1)
    assert attention_map(activation, kind=kind).numpy() == pytest.approx(alone.numpy(), rel=1e-13)
    assert attention_map(mates, kind=kind)[0].tolist() == pytest.approx(alone[0].tolist(), rel=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_does_not_matter(memory_format):
    activation = sample(2, 3, 4, 5)
    rows = attention_map(activation.contiguous(memory_format=memory_format))
    assert rows.numpy() == pytest.approx(np.array(oracle_map(activation, 2.0, "power")), rel=1e-11)


# --- gradients and precision ---


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_maps(kind, power):
    activation = sample(2, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: attention_map(a, power, kind), activation)


IMAGES = [((2, 3, 2, 3), (2, 2, 2, 3)), ((2, 3, 4, 5), (2, 2, 2, 3))]
TOKENS = [((2, 6, 3), (2, 4, 2)), ((2, 6, 3), (2, 2, 2, 3))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "kind"),
    [(*shapes, kind) for shapes, kind in [*product(IMAGES, KINDS), *product(TOKENS, KINDS[:-1])]],  # without edges
)
def test_gradcheck_of_losses(student_shape, teacher_shape, kind, mode):
    student, teacher = sample(*student_shape).requires_grad_(), sample(*teacher_shape, seed=1)
    assert torch.autograd.gradcheck(lambda s: attention_transfer_loss(s, teacher, 2.0, kind, mode), student)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind, mode):
    student, teacher = sample(2, 3, 4, 4).requires_grad_(), sample(2, 3, 8, 8, seed=1).requires_grad_()
    attention_transfer_loss(student, teacher, kind=kind, mode=mode).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum().item() > 1e-3


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_activations_give_zero_maps_and_finite_gradients(kind, mode, power):
    zeros = torch.zeros(2, 3, 2, 2, requires_grad=True)
    teacher = sample(2, 3, 2, 2, dtype=torch.float32)
    assert attention_map(zeros, power, kind).tolist() == [[0.0] * 4] * 2
    for other in (teacher, zeros.detach()):
        loss = attention_transfer_loss(zeros, other, power, kind, mode)
        (gradient,) = torch.autograd.grad(loss, zeros)
        assert gradient.abs().max().item() <= 1.0  # an eps of 1e-12 would give 1e12
    assert loss.item() == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_some_zeros_give_a_finite_gradient_at_any_power(mode):
    # what a ReLU leaves; below power 1 the slope of |a|^p at 0 is infinite
    student = sample(2, 3, 4, 4).relu().requires_grad_()
    loss = attention_transfer_loss(student, sample(2, 3, 4, 4, seed=1), 0.5, "power", mode)
    loss.backward()
    assert student.grad.isfinite().all()
    assert student.grad[student == 0].abs().max().item() == 0.0
    assert student.grad.abs().max().item() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_norm_is_zero_where_maps_are_equal(kind):
    student = sample(2, 3, 2, 2).requires_grad_()
    loss = attention_transfer_loss(student, student.detach().clone(), kind=kind, mode="paper")
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.tolist() == torch.zeros(2, 3, 2, 2).tolist()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales_neither_vanish_nor_overflow(kind, scale):
    activation = sample(2, 3, 3, 3, dtype=torch.float32)
    expected = np.array(oracle_map(activation, 4.0, kind))
    assert attention_map(activation * scale, 4.0, kind).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_computed_in_float32(kind, mode, dtype):
    student, teacher = sample(2, 3, 4, 4, dtype=dtype).requires_grad_(), sample(2, 5, 8, 8, seed=1, dtype=dtype)
    loss = attention_transfer_loss(student, teacher, kind=kind, mode=mode)
    loss.backward()
    exact = attention_transfer_loss(student.detach().double(), teacher.double(), kind=kind, mode=mode)
    assert attention_map(student, kind=kind).dtype == loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=5e-6)


def test_the_largest_half_precision_numbers_are_no_problem():
    activation = torch.tensor([[[[65504.0, 0.0]]]], dtype=torch.float16)
    assert attention_map(activation, power=8.0).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_lower_the_precision(kind):
    student, teacher = sample(2, 3, 4, 4, dtype=torch.float32), sample(2, 5, 8, 8, seed=1, dtype=torch.float32)
    plain = attention_transfer_loss(student, teacher, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_transfer_loss(student, teacher, kind=kind)
    assert (loss.dtype, loss.item()) == (torch.float32, plain.item())


def test_double_precision_stays():
    assert attention_map(STUDENT).dtype == attention_transfer_loss(STUDENT, TEACHER).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    student = STUDENT.clone()
    student[0, 0, 0, 0] = torch.nan
    losses = [attention_transfer_loss(student, TEACHER, power, kind).item() for power in (0.5, 2.0)]
    assert [math.isnan(loss) for loss in losses] == [True, True]


def test_an_empty_batch_gives_zero():
    losses = [attention_transfer_loss(STUDENT[:0], TEACHER[:0], kind=k, mode=m).item() for k in KINDS for m in MODES]
    assert losses == [0.0] * 10
    assert gradient_transfer_loss(STUDENT[:0], TEACHER[:0]).item() == 0.0


# --- input gradients ---


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 6), (3,)])
def test_gradient_loss_equals_the_oracle(shape):
    student, teacher = sample(*shape), sample(*shape, seed=1)
    expected = np.mean([np.sqrt(np.sum((s - t) ** 2)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)])
    assert gradient_transfer_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_loss_of_a_linear_network_worked_by_hand():
    # y = w.x and L = y^2 / 2 give J = y w. With r = (J - J_T) / ||J - J_T||: d||J - J_T|| / dw = y r + (w.r) x
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.2, 0.1, -0.4], [1.0, -2.0, 0.0]], dtype=torch.float64)
    task_loss = (inputs @ weight).square().sum() / 2
    (gradient,) = torch.autograd.grad(task_loss, inputs, create_graph=True)
    loss = gradient_transfer_loss(gradient, target)
    loss.backward()
    w, norms, slopes = weight.detach().numpy(), [], []
    for x, t in zip(inputs.detach().numpy(), target.numpy(), strict=True):
        y = float(np.dot(w, x))
        difference = y * w - t
        norms.append(float(np.sqrt(np.dot(difference, difference))))
        r = difference / norms[-1]
        slopes.append(y * r + np.dot(w, r) * x)
    assert loss.item() == pytest.approx(np.mean(norms), rel=1e-12)
    assert weight.grad.tolist() == pytest.approx(np.mean(slopes, axis=0).tolist(), rel=1e-12)


def test_gradient_loss_can_be_differentiated_twice():
    student, teacher = sample(3, 2, 2, 2).requires_grad_(), sample(3, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: gradient_transfer_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: gradient_transfer_loss(s, teacher), student)


def test_gradient_loss_of_equal_gradients_has_no_slope():
    weight = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((inputs @ weight).square().sum(), inputs, create_graph=True)
    loss = gradient_transfer_loss(gradient, gradient.detach().clone())
    loss.backward()
    assert (loss.item(), weight.grad.tolist()) == (0.0, [0.0, 0.0])


def test_no_gradient_reaches_the_teachers_gradient():
    student, teacher = sample(2, 3).requires_grad_(), sample(2, 3, seed=1).requires_grad_()
    gradient_transfer_loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad * 2).norm(dim=1).tolist() == pytest.approx([1.0, 1.0])  # unit vectors over the batch of 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_loss_of_low_precision_is_computed_in_float32(dtype):
    student, teacher = sample(2, 3, dtype=dtype), sample(2, 3, seed=1, dtype=dtype)
    loss = gradient_transfer_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(gradient_transfer_loss(student.double(), teacher.double()).item(), rel=2e-6)


# --- errors ---


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (1, 2, 3, 4, 5)])
def test_other_numbers_of_dimensions_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"activation must be \(N, C, H, W\) or tokens \(N, L, D\), got shape"
    ) as error:
        attention_map(torch.zeros(shape))
    assert str(error.value).endswith(str(shape))
    with pytest.raises(ValueError, match=r"student must be \(N, C, H, W\)"):
        attention_transfer_loss(torch.zeros(shape), TEACHER)
    with pytest.raises(ValueError, match=r"teacher must be \(N, C, H, W\)"):
        attention_transfer_loss(STUDENT, torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [0, -1.0, math.nan, math.inf])
def test_power_must_be_positive_and_finite(power, kind):
    for call in (lambda: attention_map(STUDENT, power, kind), lambda: attention_transfer_loss(STUDENT, TEACHER, power)):
        with pytest.raises(ValueError, match=f"power must be positive and finite, got {power}"):
            call()


def test_an_unknown_kind_lists_the_kinds():
    message = "kind must be one of sum, abs_sum, power, max, edges, got 'mean'"
    with pytest.raises(ValueError, match=message):
        attention_map(STUDENT, kind="mean")
    with pytest.raises(ValueError, match=message):
        attention_transfer_loss(STUDENT, TEACHER, kind="mean")


def test_an_unknown_mode_lists_the_modes():
    with pytest.raises(ValueError, match="mode must be one of code, paper, got 'l2'"):
        attention_transfer_loss(STUDENT, TEACHER, mode="l2")


def test_tokens_have_no_edges():
    tokens = torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"kind 'edges' needs .* got shape \(2, 4, 3\)"):
        attention_map(tokens, kind="edges")
    with pytest.raises(ValueError, match=r"kind 'edges' needs"):
        attention_transfer_loss(tokens, torch.ones(2, 3, 2, 2), kind="edges")


def test_batches_must_be_as_large():
    with pytest.raises(
        ValueError, match=r"batch size, got \(2, 3, 2, 2\) from the student and \(1, 3, 2, 2\) from the"
    ):
        attention_transfer_loss(torch.ones(2, 3, 2, 2), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(("student", "teacher"), [((4, 8), (8, 4)), ((8, 4), (4, 8)), ((3, 2), (2, 3))])
def test_sizes_that_cross_are_refused(student, teacher):
    with pytest.raises(ValueError, match="at least as large as the other in height and in width") as error:
        attention_transfer_loss(torch.ones(1, 2, *student), torch.ones(1, 3, *teacher))
    assert f"{(1, 2, *student)} from the student and {(1, 3, *teacher)} from the teacher" in str(error.value)


def test_an_image_and_tokens_of_other_lengths_are_refused():
    image, tokens = torch.ones(2, 3, 2, 3), torch.ones(2, 7, 4)
    with pytest.raises(ValueError, match=r"H \* W == L .* got \(2, 3, 2, 3\) from the student and \(2, 7, 4\) from"):
        attention_transfer_loss(image, tokens)
    with pytest.raises(ValueError, match=r"H \* W == L .* got \(2, 7, 4\) from the student and \(2, 3, 2, 3\) from"):
        attention_transfer_loss(tokens, image)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"activation must be floating point, got dtype torch.int64"):
        attention_map(STUDENT.long())
    with pytest.raises(TypeError, match=r"teacher must be floating point, got dtype torch.int64"):
        attention_transfer_loss(STUDENT, TEACHER.long())
    with pytest.raises(TypeError, match=r"student_gradient must be floating point, got dtype torch.int64"):
        gradient_transfer_loss(STUDENT.long(), TEACHER)


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((2, 3), (2, 3, 1)), ((), ())])
def test_gradients_must_have_one_shape(student, teacher):
    with pytest.raises(ValueError, match=r"student_gradient and teacher_gradient must have the same shape") as error:
        gradient_transfer_loss(torch.zeros(student), torch.zeros(teacher))
    assert f"got {student} from the student and {teacher} from the teacher" in str(error.value)

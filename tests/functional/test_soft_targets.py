"""The distillation losses against hand-worked numbers, an independent NumPy oracle, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_compress.functional import (
    bernoulli_distillation_loss,
    class_dimension,
    decoupled_distillation_loss,
    dist_loss,
    distillation_loss,
    hard_distillation_loss,
    regression_distillation_loss,
    teacher_agreement,
)

STUDENT = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64)


# --- the oracle: the formulas, position by position, in NumPy float64 ---


def rows_of(logits, class_dim, mask):
    """Positions as a list of vectors, in the order of the mask."""
    array = np.moveaxis(np.asarray(logits, dtype=np.float64), class_dim, -1)
    keep = np.ones(array.shape[:-1], dtype=bool) if mask is None else np.asarray(mask)
    return [array[index] for index in np.ndindex(*array.shape[:-1]) if keep[index]]


def softmax(vector):
    exponentials = np.exp(vector - vector.max())
    return exponentials / exponentials.sum()


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def oracle_softmax(student, teacher, temperature, class_dim=1, mask=None):
    pairs = zip(rows_of(student, class_dim, mask), rows_of(teacher, class_dim, mask), strict=True)
    return temperature**2 * np.mean([kl(softmax(t / temperature), softmax(s / temperature)) for s, t in pairs])


def oracle_bernoulli(student, teacher, temperature, mask=None):
    keep = slice(None) if mask is None else np.asarray(mask)
    p, q = (1 / (1 + np.exp(-np.asarray(z, dtype=np.float64)[keep] / temperature)) for z in (teacher, student))
    return temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def oracle_hard(student, teacher, class_dim=1, mask=None):
    pairs = zip(rows_of(student, class_dim, mask), rows_of(teacher, class_dim, mask), strict=True)
    return np.mean([-math.log(softmax(s)[int(np.argmax(t))]) for s, t in pairs])


def oracle_decoupled(student, teacher, labels, temperature, alpha, beta, class_dim=1, mask=None):
    labels = np.asarray(labels)
    kept_labels = labels.reshape(-1) if mask is None else labels[np.asarray(mask)]
    terms = []
    for s, t, label in zip(
        rows_of(student, class_dim, mask), rows_of(teacher, class_dim, mask), kept_labels, strict=True
    ):
        p, q = softmax(t / temperature), softmax(s / temperature)
        others_p, others_q = np.delete(p, label), np.delete(q, label)
        target = kl([p[label], others_p.sum()], [q[label], others_q.sum()])
        terms.append(alpha * target + beta * kl(others_p / others_p.sum(), others_q / others_q.sum()))
    return temperature**2 * np.mean(terms)


def oracle_dist(student, teacher, temperature, beta, gamma, class_dim=1, mask=None):
    q = np.array([softmax(s / temperature) for s in rows_of(student, class_dim, mask)])
    p = np.array([softmax(t / temperature) for t in rows_of(teacher, class_dim, mask)])
    between = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    within = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (beta * between + gamma * within)


SHAPES = {
    "classes": ((5, 4), 1),
    "pixels": ((2, 4, 3, 5), 1),
    "tokens": ((3, 5, 4), 2),
    "from the end": ((3, 5, 4), -1),
    "voxels": ((2, 3, 2, 3, 2), 1),
    "first": ((4, 6), 0),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def dense(request):
    """Student, teacher, labels, mask (some positions False) and class_dim, in float64."""
    shape, class_dim = request.param
    generator = torch.Generator().manual_seed(sum(shape))
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    positions = list(shape)
    classes = positions.pop(class_dim)
    labels = torch.randint(classes, positions, generator=generator)
    mask = torch.rand(positions, generator=generator) < 0.6
    assert 2 <= int(mask.sum()) < mask.numel()
    return student, teacher, labels, mask, class_dim


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_equals_the_oracle(dense, masked):
    student, teacher, _, mask, class_dim = dense
    mask = mask if masked else None
    ours = distillation_loss(student, teacher, 3.0, class_dim=class_dim, mask=mask)
    assert ours.item() == pytest.approx(oracle_softmax(student, teacher, 3.0, class_dim, mask), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_hard_equals_the_oracle(dense, masked):
    student, teacher, _, mask, class_dim = dense
    mask = mask if masked else None
    ours = hard_distillation_loss(student, teacher, class_dim=class_dim, mask=mask)
    assert ours.item() == pytest.approx(oracle_hard(student, teacher, class_dim, mask), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0)])
def test_decoupled_equals_the_oracle(dense, masked, alpha, beta):
    student, teacher, labels, mask, class_dim = dense
    mask = mask if masked else None
    ours = decoupled_distillation_loss(
        student, teacher, labels, 2.0, alpha=alpha, beta=beta, class_dim=class_dim, mask=mask
    )
    expected = oracle_decoupled(student, teacher, labels, 2.0, alpha, beta, class_dim, mask)
    assert ours.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 2.0)])
def test_dist_equals_the_oracle(dense, masked, beta, gamma):
    student, teacher, _, mask, class_dim = dense
    mask = mask if masked else None
    ours = dist_loss(student, teacher, 4.0, beta=beta, gamma=gamma, class_dim=class_dim, mask=mask)
    expected = oracle_dist(student, teacher, 4.0, beta, gamma, class_dim, mask)
    assert ours.item() == pytest.approx(expected, rel=1e-5)  # the authors' 1e-8 in the denominator


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 3), (2, 1, 3, 3)])
def test_per_label_forms_equal_the_oracle(shape, masked):
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.rand(shape, generator=generator) < 0.7 if masked else None
    expected = oracle_bernoulli(student, teacher, 2.5, mask)
    assert bernoulli_distillation_loss(student, teacher, 2.5, mask=mask).item() == pytest.approx(expected, rel=1e-12)
    difference = (student - teacher).numpy()[slice(None) if mask is None else mask.numpy()]
    ours = regression_distillation_loss(student, teacher, mask=mask)
    assert ours.item() == pytest.approx(np.mean(difference**2), rel=1e-12)


# --- worked by hand ---


def test_hand_worked_softmax():
    student = STUDENT.clone().requires_grad_()
    loss = distillation_loss(student, TEACHER, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.881179, abs=1e-6)
    assert student.grad[0].tolist() == pytest.approx([0.509892, -0.618114, 0.108222], abs=1e-6)


def test_temperature_to_infinity():
    student = STUDENT.clone().requires_grad_()
    loss = distillation_loss(student, TEACHER, 1e5)
    loss.backward()
    assert loss.item() == pytest.approx(7 / 9, abs=1e-4)  # half the mean squared centred difference
    assert student.grad[0].tolist() == pytest.approx([4 / 9, -5 / 9, 1 / 9], abs=1e-4)


def test_hard_labels_are_the_targets_of_temperature_to_zero():
    student, soft, hard = (STUDENT.clone().requires_grad_() for _ in range(3))
    hard_distillation_loss(hard, TEACHER).backward()
    target = (TEACHER / 0.01).softmax(dim=1)
    torch.nn.functional.cross_entropy(soft, target).backward()
    assert torch.equal(soft.grad, hard.grad)
    loss = hard_distillation_loss(student, TEACHER)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + math.e + 1) - 1, abs=1e-12)


def test_hard_labels_of_equal_logits_are_the_first():
    loss = hard_distillation_loss(STUDENT, torch.ones_like(STUDENT))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + math.e + 1) - 2, abs=1e-12)


def test_hand_worked_bernoulli():
    # p = 3/4, q = 1/2: 3/4 log(3/2) + 1/4 log(1/2); its gradient is T (q - p)
    student = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = bernoulli_distillation_loss(student, torch.tensor([math.log(3) * 2], dtype=torch.float64), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), abs=1e-12)
    assert student.grad.item() == pytest.approx(-0.5, abs=1e-12)


def test_bernoulli_is_softmax_over_the_logit_and_zero():
    student, teacher = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    two_classes = [torch.stack([z, torch.zeros_like(z)], dim=1) for z in (student, teacher)]
    expected = distillation_loss(*two_classes, 3.0)
    assert bernoulli_distillation_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_hand_worked_decoupled():
    # log-odds chosen so that the teacher gives (1/2, 1/4, 1/4), the student (1/4, 1/4, 1/2); the label is class 0
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    target_part = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    other_part = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    loss = decoupled_distillation_loss(student, teacher, torch.tensor([0]), 1.0)
    assert loss.item() == pytest.approx(target_part + 8 * other_part, abs=1e-12)


def test_decoupled_parts_add_up_to_the_coupled_loss():
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    not_label = 1 - (teacher / 4.0).softmax(dim=1)[0, 2].item()
    loss = decoupled_distillation_loss(student, teacher, torch.tensor([2]), 4.0, alpha=1.0, beta=not_label)
    assert loss.item() == pytest.approx(distillation_loss(student, teacher, 4.0).item(), rel=1e-12)


def test_decoupled_with_two_classes_has_no_other_part():
    student, teacher = STUDENT[:, :2], TEACHER[:, :2]
    loss = decoupled_distillation_loss(student, teacher, torch.tensor([1]), 4.0)
    assert loss.item() == pytest.approx(distillation_loss(student, teacher, 4.0).item(), rel=1e-12)


def test_dist_of_opposite_and_of_equal_order():
    ascending = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert dist_loss(ascending, ascending * 3).item() == pytest.approx(0.0, abs=1e-6)
    assert dist_loss(ascending, -ascending, 2.0).item() == pytest.approx(4 * (2 + 2), abs=1e-5)


def test_dist_of_one_sample_has_a_constant_relation_within_the_class():
    student = STUDENT.clone().requires_grad_()
    loss = dist_loss(student, STUDENT, gamma=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(3.0, abs=1e-6)
    assert student.grad.abs().max().item() == pytest.approx(0.0, abs=1e-6)


# --- properties ---

finite_logits = hnp.arrays(np.float64, (2, 3, 4), elements=st.floats(-50, 50))
temperatures = st.floats(0.5, 20)


@settings(max_examples=60, deadline=None)
@given(logits=finite_logits, temperature=temperatures, shift=st.floats(-100, 100), label=st.integers(0, 3))
def test_losses_are_non_negative_and_blind_to_a_constant(logits, temperature, shift, label):
    student, teacher = torch.from_numpy(logits)
    labels = torch.tensor([label, 0, 3])
    for loss in (
        lambda s, t: distillation_loss(s, t, temperature),
        lambda s, t: decoupled_distillation_loss(s, t, labels, temperature),
        lambda s, t: dist_loss(s, t, temperature),
        lambda s, t: hard_distillation_loss(s, torch.from_numpy(logits[1])),
    ):
        value = loss(student, teacher).item()
        assert value >= -1e-9 * temperature**2
        assert loss(student + shift, teacher - shift).item() == pytest.approx(value, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(logits=finite_logits, temperature=temperatures)
def test_per_label_losses_are_non_negative(logits, temperature):
    student, teacher = torch.from_numpy(logits)
    assert bernoulli_distillation_loss(student, teacher, temperature).item() >= -1e-9 * temperature**2
    assert regression_distillation_loss(student, teacher).item() >= 0


@settings(max_examples=40, deadline=None)
@given(logits=hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50)), temperature=temperatures)
def test_losses_are_zero_when_equal(logits, temperature):
    student, teacher = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(logits)
    for loss in (
        distillation_loss(student, teacher, temperature),
        bernoulli_distillation_loss(student, teacher, temperature),
        regression_distillation_loss(student, teacher),
        decoupled_distillation_loss(student, teacher, torch.tensor([0, 1, 3]), temperature),
    ):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(2, 6), min_size=2, max_size=5))
def test_class_dimension_names_a_dimension_with_classes(shape):
    assert class_dimension(shape) == (2 if len(shape) == 3 else 1)


# --- gradients and precision ---

LOSSES = {
    "softmax": lambda s, t: distillation_loss(s, t, 4.0),
    "bernoulli": lambda s, t: bernoulli_distillation_loss(s, t, 4.0),
    "mse": regression_distillation_loss,
    "hard": hard_distillation_loss,
    "dkd": lambda s, t: decoupled_distillation_loss(s, t, torch.arange(len(s)) % s.shape[1], 4.0),
    "dist": lambda s, t: dist_loss(s, t, 4.0),
}
MASKED = {
    "softmax": lambda s, t, mask: distillation_loss(s, t, 4.0, mask=mask),
    "bernoulli": lambda s, t, mask: bernoulli_distillation_loss(s, t, 4.0, mask=mask[:, None].expand(s.shape)),
    "mse": lambda s, t, mask: regression_distillation_loss(s, t, mask=mask[:, None].expand(s.shape)),
    "hard": lambda s, t, mask: hard_distillation_loss(s, t, mask=mask),
    "dkd": lambda s, t, mask: decoupled_distillation_loss(s, t, torch.full((len(s),), -100), 4.0, mask=mask),
    "dist": lambda s, t, mask: dist_loss(s, t, 4.0, mask=mask),
}


def sample_pair(dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(11)
    return [(torch.randn(5, 4, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    student, teacher = sample_pair()
    assert torch.autograd.gradcheck(lambda s: LOSSES[kind](s, teacher), student.requires_grad_())


@pytest.mark.parametrize("kind", LOSSES)
def test_no_gradient_reaches_the_teacher(kind):
    student, teacher = (logits.requires_grad_() for logits in sample_pair())
    LOSSES[kind](student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum().item() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_low_precision_is_computed_in_float32(kind, dtype):
    student, teacher = sample_pair(dtype)
    student.requires_grad_()
    loss = LOSSES[kind](student, teacher)
    loss.backward()
    exact = LOSSES[kind](student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_does_not_lower_the_precision(kind):
    student, teacher = sample_pair(torch.float32)
    plain = LOSSES[kind](student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[kind](student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == plain.item()


@pytest.mark.parametrize("kind", LOSSES)
def test_large_logits_stay_finite(kind):
    student, teacher = sample_pair(torch.float32, scale=1e4)
    student.requires_grad_()
    loss = LOSSES[kind](student, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad.isfinite().all()
    exact = LOSSES[kind](student.detach().double(), teacher.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_classes_that_both_exclude_carry_no_term():
    student = torch.tensor([[2.0, 1.0, -torch.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 3.0, -torch.inf, 0.0]], dtype=torch.float64)
    loss = distillation_loss(student, teacher, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.881179, abs=1e-6)
    assert student.grad[0].tolist() == pytest.approx([0.509892, -0.618114, 0.0, 0.108222], abs=1e-6)


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_that_keeps_nothing_gives_zero_with_a_graph(kind):
    student, teacher = sample_pair()
    student.requires_grad_()
    loss = MASKED[kind](student, teacher, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.tolist() == torch.zeros(5, 4).tolist()


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "mse", "hard", "dist"])
def test_nothing_comes_from_masked_positions_not_even_nan(kind):
    student, teacher = sample_pair()
    expected = LOSSES[kind](student[:3], teacher[:3]).item()
    student[3:], teacher[3:] = torch.nan, torch.nan
    student.requires_grad_()
    loss = MASKED[kind](student, teacher, torch.tensor([True, True, True, False, False]))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad[3:].tolist() == [[0.0] * 4] * 2


def test_nan_is_not_hidden():
    student, teacher = sample_pair()
    student[0, 0] = torch.nan
    assert {kind: math.isnan(LOSSES[kind](student, teacher).item()) for kind in LOSSES} == dict.fromkeys(LOSSES, True)


def test_an_empty_batch_gives_zero():
    empty = torch.zeros(0, 4)
    assert [LOSSES[kind](empty, empty).item() for kind in LOSSES] == [0.0] * len(LOSSES)


# --- shapes, agreement, errors ---


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 10), 1), ((8, 21, 4, 4), 1), ((8, 5, 100), 2), ((8, 3, 2, 2, 2), 1), ((8, 1, 10), 2)]
)
def test_class_dimension(shape, expected):
    assert class_dimension(torch.Size(shape)) == expected


@pytest.mark.parametrize("shape", [(), (8,), (8, 1), (8, 1, 4, 4), (8, 5, 1)])
def test_class_dimension_asks_where_shapes_are_ambiguous(shape):
    with pytest.raises(ValueError, match=r"ambiguous.*loss_kind") as caught:
        class_dimension(shape)
    assert str(shape) in str(caught.value)


def test_agreement():
    student = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 3.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    share = teacher_agreement(student, teacher, class_dim=1)
    assert (share.item(), share.shape, share.requires_grad) == (0.75, torch.Size([]), False)
    mask = torch.tensor([True, True, False, False])
    assert teacher_agreement(student, teacher, class_dim=1, mask=mask).item() == 0.5
    assert teacher_agreement(student, teacher, class_dim=1, mask=torch.zeros(4, dtype=torch.bool)).item() == 0.0
    assert teacher_agreement(student.T, teacher.T, class_dim=0).item() == 0.75


def test_agreement_of_one_logit_per_label_is_of_signs():
    student, teacher = torch.tensor([2.0, -1.0, 3.0, -4.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert teacher_agreement(student, teacher, class_dim=None).item() == 0.75


def test_agreement_of_dense_outputs_equals_a_count():
    student, teacher = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    expected = np.mean(np.argmax(student.numpy(), axis=1) == np.argmax(teacher.numpy(), axis=1))
    assert teacher_agreement(student, teacher, class_dim=1).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_shapes_that_differ_are_both_named(kind):
    with pytest.raises(ValueError, match=r"\(5, 4\) from the student and \(5, 3\) from the teacher"):
        LOSSES[kind](torch.zeros(5, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"\(5, 1\) from the student and \(5,\) from the teacher"):
        LOSSES[kind](torch.zeros(5, 1), torch.zeros(5))


@pytest.mark.parametrize("kind", LOSSES)
def test_integer_outputs_are_refused(kind):
    with pytest.raises(TypeError, match=r"the teacher's output must be floating point, got dtype torch.int64"):
        LOSSES[kind](torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "loss",
    [
        distillation_loss,
        bernoulli_distillation_loss,
        dist_loss,
        lambda s, t, temperature: decoupled_distillation_loss(s, t, torch.zeros(1, dtype=torch.long), temperature),
    ],
)
def test_temperature_must_be_positive_and_finite(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        loss(STUDENT, TEACHER, temperature)


def test_class_dim_must_exist_and_hold_classes():
    with pytest.raises(ValueError, match=r"class_dim must be a dimension .*\(1, 3\), between -2 and 1, got 2"):
        distillation_loss(STUDENT, TEACHER, 4.0, class_dim=2)
    with pytest.raises(ValueError, match=r"class_dim must be a dimension .*\(3,\), between -1 and 0, got 1"):
        hard_distillation_loss(STUDENT[0], TEACHER[0])
    with pytest.raises(ValueError, match=r"\(3, 1\) holds 1 class, .*loss_kind='bernoulli'"):
        distillation_loss(STUDENT.T, TEACHER.T, 4.0)
    with pytest.raises(ValueError, match="holds 1 class"):
        teacher_agreement(STUDENT.T, TEACHER.T, class_dim=1)


def test_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask must have shape \(1,\), one entry per position, got \(1, 3\)"):
        distillation_loss(STUDENT, TEACHER, 4.0, mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 3\), one entry per position, got \(1,\)"):
        bernoulli_distillation_loss(STUDENT, TEACHER, 4.0, mask=torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool, .* got dtype torch.int64"):
        dist_loss(STUDENT, TEACHER, 4.0, mask=torch.ones(1, dtype=torch.long))


def test_labels_must_fit():
    with pytest.raises(ValueError, match=r"without dimension 1, \(1,\), got \(2,\)"):
        decoupled_distillation_loss(STUDENT, TEACHER, torch.tensor([0, 1]), 4.0)
    with pytest.raises(TypeError, match=r"labels must be integer classes, got dtype torch.float32"):
        decoupled_distillation_loss(STUDENT, TEACHER, torch.tensor([0.0]), 4.0)
    for label in (3, -100):
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 3\), got {label}; mask"):
            decoupled_distillation_loss(STUDENT, TEACHER, torch.tensor([label]), 4.0)

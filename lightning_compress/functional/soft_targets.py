"""Distillation losses on the outputs of two networks: the student learns what the teacher answers.

- Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531: softened outputs.
- Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679. As in the authors' code
  (megvii-research/mdistiller, ``DKD.py``) both parts carry the factor T^2, which the paper's equations leave out.
  Where that code subtracts 1000 from the labelled logit, the label is left out exactly, so that logits of any size
  are handled.
- Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536. As in the authors'
  code (hunto/DIST_KD) the correlations are taken between softmax outputs, 1e-8 is added to their denominators, the
  pixels of a dense output count as samples, and the temperature enters with the factor T^2.

All losses are dimensionless scalars, are computed in float32 or better, and send gradients to the student only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.functional._checks import check_number, check_numbers, check_positive, check_whole, is_finite
from lightning_compress.functional._features import mean
from lightning_compress.functional._pairs import label_column, paired_rows, paired_values


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    class_dim: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Compare two softened softmax outputs: ``T^2 * KL(teacher || student)``.

    The factor T^2 keeps the size of the gradient about the same whatever the temperature.

    Args:
        student_logits: Logits, shape ``(N, K)`` or with more positions such as ``(N, K, H, W)``; any floating type.
        teacher_logits: Logits of the same shape; no gradient reaches them.
        temperature: Divides both logits; positive, dimensionless. Higher is softer.
        class_dim: Dimension of the K >= 2 classes.
        mask: Bool, the shape of the logits without ``class_dim``; only positions that are True carry a term.

    Returns:
        Scalar >= 0: sum over classes, mean over samples and positions (over those that ``mask`` keeps; 0 if none).

    Raises:
        ValueError: If shapes do not fit, ``class_dim`` does not exist or has one class, or ``temperature`` is not
            positive and finite.
        TypeError: If logits are not floating point or ``mask`` is not bool.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]])
        >>> distillation_loss(student, teacher, temperature=4.0)
        tensor(0.8812)
    """
    _check_temperature(temperature)
    student, teacher = paired_rows(student_logits, teacher_logits, class_dim, mask)
    return temperature**2 * _softmax_divergence(student / temperature, teacher / temperature)


def bernoulli_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, mask: Tensor | None = None
) -> Tensor:
    """Compare two networks that give one logit per label (multi-label or binary): ``T^2 * KL`` of two classes each.

    Args:
        student_logits: One logit per label, any shape, such as ``(N,)``, ``(N, 1)`` or ``(N, labels)``.
        teacher_logits: Logits of the same shape; no gradient reaches them.
        temperature: Divides both logits; positive, dimensionless.
        mask: Bool, the shape of the logits; only labels that are True carry a term.

    Returns:
        Scalar >= 0, the mean over labels and samples (over those that ``mask`` keeps; 0 if none).

    Raises:
        ValueError: If shapes do not fit or ``temperature`` is not positive and finite.
        TypeError: If logits are not floating point or ``mask`` is not bool.

    Example:
        >>> bernoulli_distillation_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]), temperature=1.0)
        tensor(0.0555)
    """
    _check_temperature(temperature)
    student, teacher = paired_values(student_logits, teacher_logits, mask)
    student, teacher = student / temperature, teacher / temperature
    positive = _divergence_terms(F.logsigmoid(student), F.logsigmoid(teacher))
    negative = _divergence_terms(F.logsigmoid(-student), F.logsigmoid(-teacher))
    return temperature**2 * mean(positive + negative)


def regression_distillation_loss(
    student_output: Tensor, teacher_output: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Compare two regressors: the mean squared difference of their outputs.

    Args:
        student_output: Predictions, any shape.
        teacher_output: Predictions of the same shape; no gradient reaches them.
        mask: Bool, the shape of the predictions; only elements that are True carry a term.

    Returns:
        Scalar >= 0, the mean over all elements (over those that ``mask`` keeps; 0 if none).

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If predictions are not floating point or ``mask`` is not bool.

    Example:
        >>> regression_distillation_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    student, teacher = paired_values(student_output, teacher_output, mask)
    return mean((student - teacher).square())


def hard_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, class_dim: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Use the teacher's most likely class as the label: cross-entropy at temperature 1.

    The one-hot target is what the teacher's softened output becomes when its temperature goes to 0.

    Args:
        student_logits: Logits, shape ``(N, K)`` or with more positions such as ``(N, K, H, W)``.
        teacher_logits: Logits of the same shape; of equal logits the first is the label.
        class_dim: Dimension of the K >= 2 classes.
        mask: Bool, the shape of the logits without ``class_dim``; only positions that are True carry a term.

    Returns:
        Scalar >= 0, the mean over samples and positions (over those that ``mask`` keeps; 0 if none).

    Raises:
        ValueError: If shapes do not fit, or ``class_dim`` does not exist or has one class.
        TypeError: If logits are not floating point or ``mask`` is not bool.

    Example:
        >>> hard_distillation_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]]))
        tensor(1.4076)
    """
    student, teacher = paired_rows(student_logits, teacher_logits, class_dim, mask)
    return F.cross_entropy(student, teacher.argmax(dim=1), reduction="sum") / max(len(student), 1)


def decoupled_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    class_dim: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Weigh the two parts of the distillation loss apart: how sure of the label, and how the other classes compare.

    The first part (target class, TCKD) is the divergence between label and not label; the second (non-target
    classes, NCKD) that between the distributions over the other classes. ``distillation_loss`` is the first part
    plus the second times the teacher's probability of "not the label".

    Args:
        student_logits: Logits, shape ``(N, K)`` or with more positions such as ``(N, K, H, W)``.
        teacher_logits: Logits of the same shape; no gradient reaches them.
        labels: Integer classes in [0, K), the shape of the logits without ``class_dim``; other values are allowed
            where ``mask`` is False.
        temperature: Divides both logits; positive, dimensionless.
        alpha: Weight of the target-class part, dimensionless.
        beta: Weight of the part over the other classes, dimensionless.
        class_dim: Dimension of the K >= 2 classes.
        mask: Bool, shaped like ``labels``; only positions that are True carry a term.

    Returns:
        Scalar, times T^2: the mean over samples and positions (over those that ``mask`` keeps; 0 if none).

    Raises:
        ValueError: If shapes do not fit, ``class_dim`` does not exist or has one class, a label is out of range, or
            ``temperature`` is not positive and finite.
        TypeError: If logits are not floating point, ``labels`` not integer, or ``mask`` not bool.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]])
        >>> decoupled_distillation_loss(student, teacher, torch.tensor([1]), temperature=4.0)
        tensor(1.7901)
    """
    _check_temperature(temperature)
    student, teacher = paired_rows(student_logits, teacher_logits, class_dim, mask)
    check_number("alpha", alpha, "a finite number", is_finite)
    check_number("beta", beta, "a finite number", is_finite)
    label = label_column(labels, student_logits, class_dim, mask)  # (P, 1)
    student, teacher = student / temperature, teacher / temperature
    student_others = student.scatter(1, label, -torch.inf)  # (P, K), the label's probability is exactly 0
    teacher_others = teacher.scatter(1, label, -torch.inf)
    target_part = _softmax_divergence(
        _target_or_not(student, student_others, label), _target_or_not(teacher, teacher_others, label)
    )
    other_part = _softmax_divergence(student_others, teacher_others)
    return temperature**2 * (alpha * target_part + beta * other_part)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_dim: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Ask for correlation with the teacher instead of equality: Pearson distances of softmax outputs, times T^2.

    ``beta`` weighs the correlation over the classes of each sample, ``gamma`` that over the samples of each class,
    which needs two samples or more: with one it is 0, and its distance a constant 1.

    Args:
        student_logits: Logits, shape ``(N, K)`` or with more positions such as ``(N, K, H, W)``.
        teacher_logits: Logits of the same shape; no gradient reaches them.
        temperature: Divides both logits; positive, dimensionless.
        beta: Weight of the relation between classes, dimensionless.
        gamma: Weight of the relation within a class, dimensionless.
        class_dim: Dimension of the K >= 2 classes.
        mask: Bool, the shape of the logits without ``class_dim``; only positions that are True take part.

    Returns:
        Scalar; each of the two distances lies in [0, 2] times T^2. 0 if ``mask`` keeps nothing.

    Raises:
        ValueError: If shapes do not fit, ``class_dim`` does not exist or has one class, or ``temperature`` is not
            positive and finite.
        TypeError: If logits are not floating point or ``mask`` is not bool.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 3.0, 0.0], [0.0, 2.0, 0.0]])
        >>> dist_loss(student, teacher)
        tensor(1.2558)
    """
    _check_temperature(temperature)
    student, teacher = paired_rows(student_logits, teacher_logits, class_dim, mask)
    check_number("beta", beta, "a finite number", is_finite)
    check_number("gamma", gamma, "a finite number", is_finite)
    if len(student) == 0:
        return student.sum()  # zero with a graph; the mean over no sample would be NaN
    student, teacher = (student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1)
    between_classes = 1 - _row_correlation(student, teacher).mean()
    within_classes = 1 - _row_correlation(student.T, teacher.T).mean()
    return temperature**2 * (beta * between_classes + gamma * within_classes)


def class_dimension(shape: Sequence[int]) -> int:
    """Find the dimension of the classes from the shape of the logits.

    Args:
        shape: ``(N, K)``, a sequence ``(N, L, K)``, or an image or volume ``(N, K, H, W, ...)``.

    Returns:
        2 for three dimensions, else 1.

    Raises:
        ValueError: If there are fewer than two dimensions or only one class there, which may mean one logit per
            label or a regression.

    Example:
        >>> class_dimension((8, 10)), class_dimension((8, 128, 1000)), class_dimension((8, 21, 64, 64))
        (1, 2, 1)
    """
    for entry in check_numbers("shape", shape):
        check_whole("each of shape", entry, at_least=0)
    dimension = 2 if len(shape) == 3 else 1
    if len(shape) < 2 or shape[dimension] == 1:
        raise ValueError(
            f"logits of shape {tuple(shape)} are ambiguous: one logit per label or a regression; "
            "set loss_kind='bernoulli' or loss_kind='mse', or class_dim where the classes are in another dimension"
        )
    return dimension


def teacher_agreement(
    student_logits: Tensor, teacher_logits: Tensor, *, class_dim: int | None, mask: Tensor | None = None
) -> Tensor:
    """Measure how often student and teacher choose the same class.

    Args:
        student_logits: Logits, shape ``(N, K)`` or with more positions such as ``(N, K, H, W)``.
        teacher_logits: Logits of the same shape.
        class_dim: Dimension of the K >= 2 classes; None for one logit per label, chosen where it is positive.
        mask: Bool, the shape of the logits without ``class_dim``; only positions that are True are counted.

    Returns:
        0-dim tensor in [0, 1], a share of the positions; without gradient. 0 if ``mask`` keeps nothing.

    Raises:
        ValueError: If shapes do not fit, or ``class_dim`` does not exist or has one class.
        TypeError: If logits are not floating point or ``mask`` is not bool.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 3.0], [0.0, 2.0]])
        >>> teacher_agreement(student, teacher, class_dim=1)
        tensor(0.5000)
    """
    if class_dim is None:
        student, teacher = paired_values(student_logits, teacher_logits, mask)
        same = (student > 0) == (teacher > 0)
    else:
        student, teacher = paired_rows(student_logits, teacher_logits, class_dim, mask)
        same = student.argmax(dim=1) == teacher.argmax(dim=1)
    return mean(same.float())


def _softmax_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the rows of ``(P, K)`` logits of KL(teacher || student)."""
    terms = _divergence_terms(student.log_softmax(dim=1), teacher.log_softmax(dim=1))
    return mean(terms.sum(dim=1))


def _divergence_terms(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """Terms of KL(teacher || student) from log-probabilities; 0 where the teacher's probability is 0 (0 log 0)."""
    difference = (teacher_log - student_log).masked_fill(teacher_log == -torch.inf, 0.0)
    return teacher_log.exp() * difference


def _target_or_not(logits: Tensor, others: Tensor, label: Tensor) -> Tensor:
    """Logits ``(P, 2)`` whose softmax gives the probabilities of the label and of anything else."""
    return torch.cat([logits.gather(1, label), others.logsumexp(dim=1, keepdim=True)], dim=1)


def _row_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of each row of two matrices, ``(R, C)`` -> ``(R,)``; 0 for constant rows."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    return (first * second).sum(dim=1) / (lengths + 1e-8)


def _check_temperature(temperature: float) -> None:
    check_positive("temperature", temperature, "positive and finite")

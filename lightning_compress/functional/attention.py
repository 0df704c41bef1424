"""Attention transfer: make the student look where the teacher looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928.

The loss has two forms: the mean squared difference of the maps, as in the authors' code, and the norm of the
difference, as in the paper. The gradient form follows the paper; the authors published no code for it.

Maps and losses are dimensionless and computed in float32 or better; losses send gradients to the student only.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.functional._checks import check_choice, check_positive, check_tensor, check_whole
from lightning_compress.functional._features import (
    as_floats,
    both_shapes,
    check_batches,
    mean,
    pool_larger,
    scaled_to_peak,
    unit_rows,
)

DEEPEST = 64  # no network has as many halvings
MapKind = Literal["sum", "abs_sum", "power", "max", "edges"]


def attention_map(activation: Tensor, power: float = 2.0, kind: MapKind = "power") -> Tensor:
    """Collapse the channels of an activation A into one unit-length map of its positions per sample.

    Args:
        activation: Feature map, shape ``(N, C, H, W)``, or token features, shape ``(N, L, D)``, whose D is collapsed;
            any floating type.
        power: Exponent p applied to ``|A|`` by the kinds "power" and "max"; positive, dimensionless.
        kind: "sum" is ``sum_c A_c``, "abs_sum" ``sum_c |A_c|``, "power" ``sum_c |A_c|^p``, "max" ``max_c |A_c|^p``.
            "edges" is ``sum_c |A[h, w+1] - A[h, w]| + |A[h+1, w] - A[h, w]|``, where a difference across the border
            is 0; it needs a height and a width.

    Returns:
        Shape ``(N, H * W)`` or ``(N, L)``; rows have Euclidean norm 1 (0 for an activation that collapses to zeros).

    Raises:
        ValueError: If ``activation`` has another number of dimensions, ``power`` is not positive and finite, or
            ``kind`` is unknown or is "edges" for tokens.
        TypeError: If ``activation`` is not floating point.

    Example:
        >>> activation = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> attention_map(activation)
        tensor([[0.9285, 0.3714]])
    """
    _check_kind(kind, power)
    _check_activation("activation", activation)
    if activation.ndim == 3:
        if kind == "edges":
            raise ValueError(
                "kind 'edges' needs an activation (N, C, H, W): tokens have no height and width, "
                f"got shape {tuple(activation.shape)}"
            )
        activation = activation.transpose(1, 2)  # (N, D, L)
    activation = as_floats("activation", activation)
    return unit_rows(_collapsed(activation, power, kind).flatten(start_dim=1))


def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    power: float = 2.0,
    kind: MapKind = "power",
    mode: Literal["code", "paper"] = "code",
) -> Tensor:
    """Compare the attention maps of two activations, whose numbers of channels may differ.

    If one activation is larger, it is averaged down to the size of the other before its map is made. An image
    ``(N, C, H, W)`` and tokens ``(N, L, D)`` can be compared where ``H * W == L``.

    Args:
        student: Activation, shape ``(N, C, H, W)`` or ``(N, L, D)``; any floating type.
        teacher: Activation of as many samples; no gradient reaches it.
        power: Exponent of the kinds "power" and "max"; positive, dimensionless.
        kind: How channels are collapsed, see ``attention_map``.
        mode: "code" is the mean over samples and positions of the squared difference of the maps, "paper" the mean
            over samples of its Euclidean norm.

    Returns:
        Scalar >= 0, without a weight (0 for an empty batch).

    Raises:
        ValueError: If the batch sizes differ, sizes cannot be brought together (one is larger in height and the other
            in width, or an image and tokens have different numbers of positions), or ``power``, ``kind`` or ``mode``
            is not one of the above.
        TypeError: If an activation is not floating point.

    Example:
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> teacher = torch.tensor([[0.0, 1.0], [2.0, 2.0]]).reshape(1, 2, 1, 2)
        >>> attention_transfer_loss(student, teacher)
        tensor(0.1300)
    """
    check_choice("mode", mode, ("code", "paper"))
    _check_kind(kind, power)
    for name, activation in (("student", student), ("teacher", teacher)):
        _check_activation(name, activation)
    check_batches(student, teacher)
    student, teacher = _same_positions(as_floats("student", student), as_floats("teacher", teacher).detach())
    difference = attention_map(student, power, kind) - attention_map(teacher, power, kind)  # (N, positions)
    return mean(difference.square() if mode == "code" else _norms(difference))


def attention_transfer_weight(positions: int, depth: int = 0) -> float:
    """The authors' strength of a pair of maps, at any resolution.

    The authors weigh the mean squared difference over positions by 1000, on maps of 8, 16 and 32 pixels a side from the
    deepest pair to the shallowest. That is a weight of ``1000 / 8^2``, ``1000 / 16^2``, ``1000 / 32^2`` of each
    sample's squared distance, and so on, which no longer depends on how many positions the maps have.

    Args:
        positions: Number of positions of the maps that are compared, positive.
        depth: 0 for the deepest pair, 1 for the one before it, and so on.

    Returns:
        The factor of ``attention_transfer_loss`` in its mode "code".

    Raises:
        ValueError: If ``positions`` is not positive or ``depth`` is negative.

    Example:
        >>> attention_transfer_weight(8 * 8), attention_transfer_weight(4 * 4), attention_transfer_weight(14 * 14, 1)
        (1000.0, 250.0, 765.625)
    """
    check_whole("positions", positions, at_least=1)
    check_whole("depth", depth, at_least=0, at_most=DEEPEST)
    return 1000.0 * positions / float(8 * 2**depth) ** 2


def gradient_transfer_loss(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Compare how two networks depend on their input: the distance of their input gradients.

    Each is the gradient of a task loss with respect to the input. The student's must be made with
    ``create_graph=True``, so that the loss reaches the parameters of the student through it.

    Args:
        student_gradient: Shape ``(N, ...)``, that of the input; any floating type.
        teacher_gradient: The same shape; no gradient reaches it.

    Returns:
        Scalar >= 0: the Euclidean norm of each sample's difference, mean over the batch (0 for an empty batch).

    Raises:
        ValueError: If shapes differ or have no batch dimension.
        TypeError: If a gradient is not floating point.

    Example:
        >>> gradient_transfer_loss(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]]))
        tensor(3.)
    """
    check_tensor("student_gradient", student_gradient)
    check_tensor("teacher_gradient", teacher_gradient)
    if student_gradient.shape != teacher_gradient.shape or student_gradient.ndim == 0:
        raise ValueError(
            "student_gradient and teacher_gradient must have the same shape (N, ...), "
            f"got {both_shapes(student_gradient, teacher_gradient)}"
        )
    student = as_floats("student_gradient", student_gradient)
    teacher = as_floats("teacher_gradient", teacher_gradient).detach()
    difference = (student - teacher).unsqueeze(-1).flatten(start_dim=1)  # (N, everything else)
    return mean(_norms(difference))


def _collapsed(activation: Tensor, power: float, kind: MapKind) -> Tensor:
    """The map of ``(N, C, ...)`` before it is scaled to unit length, ``(N, ...)``."""
    if kind == "sum":
        return activation.sum(dim=1)
    if kind == "edges":
        across = F.pad(activation.diff(dim=3).abs(), (0, 1))  # the last column has no right neighbour
        down = F.pad(activation.diff(dim=2).abs(), (0, 0, 0, 1))
        return (across + down).sum(dim=1)
    if kind == "abs_sum":
        return activation.abs().sum(dim=1)
    # a map has no scale, so a power of it may be taken of the scaled activation, where it cannot overflow
    scaled = scaled_to_peak(activation)
    if kind == "max":
        return _powered(scaled.abs().amax(dim=1), power)
    if power == 2:
        return scaled.square().sum(dim=1)  # two passes over the activation less, and two in the backward
    return _powered(scaled.abs(), power).sum(dim=1)


def _powered(magnitude: Tensor, power: float) -> Tensor:
    """Raise to a power whose gradient at 0 is 0, also below 1, where the true one is infinite."""
    if power >= 1:
        return magnitude.pow(power)
    zero = magnitude == 0
    return magnitude.masked_fill(zero, 1.0).pow(power).masked_fill(zero, 0.0)


def _same_positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both activations with as many positions, the larger one averaged down."""
    if student.ndim == teacher.ndim == 4:
        return pool_larger(student, teacher)
    if student.ndim == teacher.ndim == 3:
        student, teacher = pool_larger(student.transpose(1, 2), teacher.transpose(1, 2))
        return student.transpose(1, 2), teacher.transpose(1, 2)
    student_positions, teacher_positions = (
        activation.shape[1] if activation.ndim == 3 else activation.shape[2] * activation.shape[3]
        for activation in (student, teacher)
    )
    if student_positions != teacher_positions:
        raise ValueError(
            "an activation (N, C, H, W) and tokens (N, L, D) need H * W == L (leave out class and register tokens), "
            f"got {both_shapes(student, teacher)}"
        )
    return student, teacher


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row; its gradient at a row of zeros is zeros."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _check_activation(name: str, activation: Tensor) -> None:
    if check_tensor(name, activation).ndim not in (3, 4):
        raise ValueError(f"{name} must be (N, C, H, W) or tokens (N, L, D), got shape {tuple(activation.shape)}")


def _check_kind(kind: str, power: float) -> None:
    check_choice("kind", kind, get_args(MapKind))
    check_positive("power", power, "positive and finite")

"""Check the outputs of student and teacher and lay them out as rows, one per position that carries a term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.functional._checks import LARGEST, check_floating, check_tensor, check_whole
from lightning_compress.functional._dtypes import at_least_float32


def paired_rows(student: Tensor, teacher: Tensor, class_dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both logits, checked, as ``(P, K)``: one row per position that ``mask`` keeps."""
    _check_pair(student, teacher)
    dimension = _class_dim(student, class_dim)
    _check_mask(mask, _without(student.shape, dimension))
    return _rows(student, dimension, mask), _rows(teacher, dimension, mask).detach()


def paired_values(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both outputs, checked; only the elements that ``mask`` keeps, flattened, where there is one."""
    _check_pair(student, teacher)
    _check_mask(mask, student.shape)
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return at_least_float32(student), at_least_float32(teacher).detach()


def label_column(labels: Tensor, logits: Tensor, class_dim: int, mask: Tensor | None) -> Tensor:
    """The labels of the positions that ``mask`` keeps, checked, as a column ``(P, 1)``."""
    dimension = _class_dim(logits, class_dim)
    expected = _without(logits.shape, dimension)
    if check_tensor("labels", labels).is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer classes, got dtype {labels.dtype}")
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must have the shape of the logits without dimension {class_dim}, {expected}, "
            f"got {tuple(labels.shape)}"
        )
    column = (labels.reshape(-1) if mask is None else labels[mask]).long().unsqueeze(1)
    classes = logits.shape[dimension]
    outside = (column < 0) | (column >= classes)
    if outside.any():
        raise ValueError(
            f"labels must lie in [0, {classes}), got {int(column[outside][0])}; mask the positions that have no label"
        )
    return column


def _rows(logits: Tensor, class_dim: int, mask: Tensor | None) -> Tensor:
    last = logits.movedim(class_dim, -1)  # (N, ..., K)
    return at_least_float32(last.reshape(-1, last.shape[-1]) if mask is None else last[mask])  # (P, K)


def _without(shape: torch.Size, dimension: int) -> tuple[int, ...]:
    return tuple(shape[:dimension]) + tuple(shape[dimension + 1 :])


def _class_dim(logits: Tensor, class_dim: int) -> int:
    """``class_dim`` counted from the front, after checking that it holds classes to compare."""
    if not -logits.ndim <= check_whole("class_dim", class_dim, at_least=-LARGEST) < logits.ndim:
        raise ValueError(
            f"class_dim must be a dimension of the logits of shape {tuple(logits.shape)}, "
            f"between {-logits.ndim} and {logits.ndim - 1}, got {class_dim}"
        )
    if logits.shape[class_dim] < 2:
        raise ValueError(
            f"class_dim {class_dim} of logits of shape {tuple(logits.shape)} holds {logits.shape[class_dim]} class, "
            "a softmax needs 2 or more; for one logit per label use bernoulli_distillation_loss (loss_kind='bernoulli')"
        )
    return class_dim % logits.ndim


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    for owner, output in (("student", student), ("teacher", teacher)):
        check_floating(f"the {owner}'s output", output)
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must give outputs of the same shape, "
            f"got {tuple(student.shape)} from the student and {tuple(teacher.shape)} from the teacher"
        )


def _check_mask(mask: Tensor | None, expected: Sequence[int]) -> None:
    if mask is None:
        return
    if check_tensor("mask", mask).dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a position carries a term, got dtype {mask.dtype}")
    if tuple(mask.shape) != tuple(expected):
        raise ValueError(f"mask must have shape {tuple(expected)}, one entry per position, got {tuple(mask.shape)}")

"""Check the features of student and teacher, bring them to one size, and scale rows to unit length."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.functional._checks import check_floating
from lightning_compress.functional._dtypes import at_least_float32


def as_floats(name: str, feature: Tensor) -> Tensor:
    """The feature in float32 or better; integers are refused."""
    return at_least_float32(check_floating(name, feature))


def check_batches(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different numbers of samples."""
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must have the same batch size, got {both_shapes(student, teacher)}")


def both_shapes(student: Tensor, teacher: Tensor) -> str:
    """The two shapes, for error messages."""
    return f"{tuple(student.shape)} from the student and {tuple(teacher.shape)} from the teacher"


def pool_larger(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two features ``(N, C, H, W)`` down to the height and width of the other.

    Features ``(N, D, L)`` are pooled along L in the same way.
    """
    student_size, teacher_size = student.shape[2:], teacher.shape[2:]
    if student_size == teacher_size:
        return student, teacher
    pairs = list(zip(student_size, teacher_size, strict=True))
    if all(own >= other for own, other in pairs):
        return _pooled(student, teacher_size), teacher
    if all(own <= other for own, other in pairs):
        return student, _pooled(teacher, student_size)
    raise ValueError(
        "one of student and teacher must be at least as large as the other in height and in width, "
        f"got {both_shapes(student, teacher)}"
    )


def unit_rows(rows: Tensor) -> Tensor:
    """Scale the rows of a matrix to Euclidean norm 1; a row of zeros stays zero and keeps a finite gradient.

    An eps in the denominator would either change small rows or, as a bound, multiply their gradient by 1/eps.
    """
    scaled = scaled_to_peak(rows)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)  # 1 or more where a row is not zero
    return scaled / torch.where(norm < 0.5, 1.0, norm)


def scaled_to_peak(values: Tensor) -> Tensor:
    """Divide each sample of ``(N, ...)`` by its largest magnitude, so that powers of it stay in the type's range.

    The divisor carries no gradient. What does not depend on the scale of a sample, such as its unit vector, has the
    same value and the same derivatives as without the division.
    """
    peak = values.detach().abs().amax(dim=tuple(range(1, values.ndim)), keepdim=True)
    # the reciprocal of a subnormal number overflows: such samples count as zero
    return values / torch.where(peak < torch.finfo(values.dtype).tiny, 1.0, peak)


def mean(values: Tensor) -> Tensor:
    """Mean that is 0, still with a graph, where there is nothing to average."""
    return values.sum() / max(values.numel(), 1)


def _pooled(feature: Tensor, size: torch.Size) -> Tensor:
    """Adaptive average pooling, as products with averaging matrices: its own backward is not deterministic on a GPU."""
    with torch.autocast(feature.device.type, enabled=False):  # it would lower the precision of products
        feature = feature @ _averaging(feature.shape[-1], size[-1], feature).T
        return feature if len(size) == 1 else _averaging(feature.shape[-2], size[0], feature) @ feature


def _averaging(length: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, length) whose rows average the windows of adaptive pooling."""
    rows = torch.zeros(target, length, dtype=like.dtype, device=like.device)
    for row in range(target):
        begin, end = row * length // target, -(-(row + 1) * length // target)
        rows[row, begin:end] = 1 / (end - begin)
    return rows

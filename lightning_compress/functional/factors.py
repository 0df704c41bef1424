"""Factor transfer: the student imitates the teacher's feature after both went through small convolutional networks.

Kim, Park & Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977. As in the authors' code (Jangho-Kim/Factor-Transfer-pytorch) the distance is L1 averaged over all
elements, and the paraphraser is trained with the mean L1 error.

The losses are dimensionless scalars, computed in float32 or better. The networks are in ``lightning_compress.modules``.
"""

from __future__ import annotations

from torch import Tensor

from lightning_compress.functional._checks import check_tensor
from lightning_compress.functional._features import as_floats, both_shapes, check_batches, mean, pool_larger, unit_rows


def factor_transfer_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Compare two factors, each scaled to unit length per sample over all its channels and positions.

    If one factor is larger, it is averaged down to the height and width of the other first. The mean runs over all
    elements, so the strength of the loss falls as C * H * W grows.

    Args:
        student_factor: Output of the translator, shape ``(N, C, H, W)``; any floating type.
        teacher_factor: The paraphraser's factor of as many samples and channels; no gradient reaches it.

    Returns:
        Scalar >= 0, the mean over samples and elements of the absolute difference (0 for an empty batch).

    Raises:
        ValueError: If a factor is not 4-D, samples or channels differ in number, or one factor is larger in height
            and the other in width.
        TypeError: If a factor is not floating point.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> teacher = torch.tensor([[0.0, 1.0], [2.0, 2.0]]).reshape(1, 2, 1, 2)
        >>> factor_transfer_loss(student, teacher)
        tensor(0.3176)
    """
    for name, factor in (("student_factor", student_factor), ("teacher_factor", teacher_factor)):
        if check_tensor(name, factor).ndim != 4:
            raise ValueError(f"{name} must be (N, C, H, W), got shape {tuple(factor.shape)}")
    check_batches(student_factor, teacher_factor)
    if student_factor.shape[1] != teacher_factor.shape[1]:
        raise ValueError(
            "factors must have as many channels as each other (the translator's factor_channels are those of the "
            f"paraphraser), got {both_shapes(student_factor, teacher_factor)}"
        )
    student, teacher = pool_larger(
        as_floats("student_factor", student_factor), as_floats("teacher_factor", teacher_factor).detach()
    )
    # (N, C * H * W): the channels are part of the factor, not collapsed as in attention transfer
    difference = unit_rows(student.flatten(start_dim=1)) - unit_rows(teacher.flatten(start_dim=1))
    return mean(difference.abs())


def reconstruction_loss(reconstruction: Tensor, feature: Tensor) -> Tensor:
    """Measure how well a paraphraser gives back the teacher's feature: the mean absolute error.

    Args:
        reconstruction: Output of the paraphraser, any shape; any floating type.
        feature: The teacher's feature, the same shape; no gradient reaches it.

    Returns:
        Scalar >= 0 in the unit of the feature, the mean over all elements (0 for an empty batch).

    Raises:
        ValueError: If shapes differ.
        TypeError: If an input is not floating point.

    Example:
        >>> import torch
        >>> reconstruction_loss(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
        tensor(1.5000)
    """
    check_tensor("reconstruction", reconstruction)
    check_tensor("feature", feature)
    if reconstruction.shape != feature.shape:
        raise ValueError(
            "reconstruction and feature must have the same shape, "
            f"got {tuple(reconstruction.shape)} and {tuple(feature.shape)}"
        )
    error = as_floats("reconstruction", reconstruction) - as_floats("feature", feature).detach()
    return mean(error.abs())

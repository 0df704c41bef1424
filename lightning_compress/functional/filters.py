"""Filters: how much each output channel of a layer matters, and which of them stay.

L1 norms as in Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, arXiv:1608.08710; the scale of batch norm
as in Liu et al., "Learning efficient convolutional networks through network slimming", ICCV 2017, arXiv:1708.06519;
Taylor scores as in Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, arXiv:1906.10771.
Filters that can only go together, as those that a residual connection adds up, have one score for all that they hold.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compress.functional._checks import check_choice, check_tensor, check_whole, shown
from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional.masks import Filters

FilterScore = Literal["l1", "l2", "taylor"]


def filter_rows(weight: Tensor, filters: Filters = Filters()) -> Tensor:  # noqa: B008 - frozen
    """A weight as one row of numbers for each output channel.

    Args:
        weight: Such as ``(C_out, C_in, K, K)``, or ``(C_in, C_out / G, K, K)`` of a transposed convolution.
        filters: Where its filters are.

    Returns:
        Shape ``(C_out, n)``.

    Raises:
        ValueError: If ``weight`` has no dimension, or its first does not divide into the groups.
        TypeError: If ``weight`` is no tensor, or ``filters`` are not ``Filters``.

    Example:
        >>> filter_rows(torch.arange(4.0).reshape(1, 2, 2), Filters(groups=1))  # transposed, of one input channel
        tensor([[0., 1.],
                [2., 3.]])
    """
    if not isinstance(filters, Filters):
        raise TypeError(f"filters must be a Filters, got {shown(filters)}")
    if check_tensor("weight", weight).ndim == 0 or (
        filters.groups and (weight.ndim < 2 or len(weight) % filters.groups)
    ):
        raise ValueError(f"weight must have filters as {filters} says, got shape {tuple(weight.shape)}")
    if not filters.groups:
        return weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    by_group = weight.reshape(filters.groups, weight.shape[0] // filters.groups, weight.shape[1], -1)
    return by_group.transpose(1, 2).flatten(2).flatten(0, 1)  # (G, C_out / G, C_in / G * K * K), and then its rows


def filter_scores(rows: Tensor, kind: FilterScore = "l2", gradients: Tensor | None = None) -> Tensor:
    """How much each filter matters.

    Args:
        rows: All that a filter is computed with, one row each: ``(C, n)``. Where filters go together, the rows of all
            of them side by side.
        kind: "l1", the sum of magnitudes; "l2", the Euclidean norm; "taylor", ``|sum(w * g)|``, what the loss would
            change by, to first order, if the filter were gone.
        gradients: Of the loss by ``rows``, for "taylor" only: ``(C, n)``.

    Returns:
        Shape ``(C,)``, at least 0, in at least float32.

    Raises:
        ValueError: If ``kind`` is unknown, the rows are no matrix, or gradients are missing or of another shape.

    Example:
        >>> filter_scores(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    check_choice("kind", kind, get_args(FilterScore))
    if check_tensor("rows", rows).ndim != 2:
        raise ValueError(f"rows must be (C, n), got shape {tuple(rows.shape)}")
    if gradients is not None:
        check_tensor("gradients", gradients)
    rows = at_least_float32(rows)
    if kind == "l1":
        return rows.abs().sum(dim=1)
    if kind == "l2":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms
    if gradients is None or gradients.shape != rows.shape:
        given = "none" if gradients is None else f"shape {tuple(gradients.shape)}"
        raise ValueError(f"kind 'taylor' needs gradients of shape {tuple(rows.shape)}, got {given}")
    return (rows * gradients.to(rows.dtype)).sum(dim=1).abs()


def kept_filters(scores: Tensor, removed: int, blocks: int = 1) -> Tensor:
    """The filters that stay when those of the lowest scores go.

    Args:
        scores: ``(C,)``.
        removed: How many go from each block, from 0 to ``C / blocks``.
        blocks: Into how many blocks of equal length the channels fall that must all lose the same positions, as the
            groups of a grouped convolution; a position counts by its mean over blocks.

    Returns:
        Indices, ascending, ``(C - blocks * removed,)``. Of equal scores the lower index goes first; NaN stays longest.

    Raises:
        ValueError: If the blocks are not of equal length, or ``removed`` is not in the range.

    Example:
        >>> kept_filters(torch.tensor([5.0, 1.0, 4.0, 2.0]), 2)
        tensor([0, 2])
        >>> kept_filters(torch.tensor([5.0, 1.0, 1.0, 2.0]), 1, blocks=2)  # means 3 and 1.5: the second of each goes
        tensor([0, 2])
    """
    check_whole("blocks", blocks, at_least=1)
    if check_tensor("scores", scores).ndim != 1 or scores.numel() % blocks:
        raise ValueError(f"{tuple(scores.shape)} scores do not fall into {blocks} blocks of equal length")
    length = scores.numel() // blocks
    if check_whole("removed", removed, at_least=0) > length:
        raise ValueError(f"removed must be at most {length}, the length of each of blocks={blocks}, got {removed}")
    order = torch.sort(scores.reshape(blocks, length).mean(dim=0), stable=True).indices
    positions = order[removed:].sort().values
    starts = torch.arange(blocks, device=scores.device) * length
    return (starts[:, None] + positions).flatten()

"""What quantisers and scaled gradients share about the steps of grids."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.functional._dtypes import at_least_float32


def largest_magnitude(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude of all elements, or of each entry of a dimension; NaN where there is one."""
    matrix = weight.reshape(1, -1) if axis is None else rows(weight, axis)
    lowest, highest = matrix.amin(dim=1), matrix.amax(dim=1)  # several times as fast as aminmax
    if axis is None:
        lowest, highest = lowest[0], highest[0]
    return at_least_float32(torch.maximum(-lowest, highest))


def rows(weight: Tensor, axis: int) -> Tensor:
    """A weight as a matrix, a row for each entry of a dimension."""
    entries = weight.movedim(axis, 0)
    return entries.reshape(len(entries), entries.shape[1:].numel())  # there may be none, of which -1 tells nothing


def usable(step: Tensor) -> Tensor:
    """A step by which a number can be divided: 1 where it is 0 or no normal number."""
    return torch.where(step >= torch.finfo(step.dtype).tiny, step, torch.ones_like(step))

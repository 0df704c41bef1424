"""In which type functions compute."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or as they are where that is more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def as_wide_as_can_be(values: Tensor) -> Tensor:
    """The values in float64, or in float32 on a device that has no more, as Apple's GPUs."""
    return values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)

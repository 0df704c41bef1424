"""In which type functions compute."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or as they are where that is more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

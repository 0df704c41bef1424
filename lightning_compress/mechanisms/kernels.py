"""What an integer kernel multiplies and adds, for the file and for the module that computes as the file does.

A kernel adds the bias of a layer in the steps of its products, those of the input times those of the weight, with the
batch norm behind the layer folded into both. Jacob et al., CVPR 2018, arXiv:1712.05877, section 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.functional._dtypes import as_wide_as_can_be
from lightning_compress.functional.quantizers import MOST_BITS, integer_limits
from lightning_compress.mechanisms.grids import Grids

LARGEST_BIAS = 2.0**30
"""In steps of the products: kernels add biases as integers of 32 bits."""


class FoldedNorm(NamedTuple):
    """A batch norm that is folded into the layer before it."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Kernel:
    """A layer of ``scale * integers * x + gain * bias + offset``, each of one value for each output channel.

    Attributes:
        scale: float32: what the integers of the weight stand for.
        gain: float64: what the bias of the layer is multiplied by.
        offset: float64: what is added beside it.
        added: float64: both together.
        shift: Integers of few bits are multiplied by this power of two, and fill their byte.
        ratio: float64: integers of a channel so faint that its bias would not fit into 32 bits are multiplied by it.
        step: float64: what the bias is added in; None where activations are float.
    """

    scale: Tensor
    gain: Tensor
    offset: Tensor
    added: Tensor
    shift: int
    ratio: Tensor
    step: Tensor | None

    def rounding(self) -> Tensor | None:
        """By how much more than ``added`` an integer kernel adds; None where it adds float numbers."""
        return None if self.step is None else torch.round(self.added / self.step) * self.step - self.added


def kernel_of(
    grids: Grids,
    site: str,
    rows: int,
    norm: FoldedNorm | None = None,
    bias: Tensor | None = None,
    *,
    step: Tensor | None = None,
    scale: Tensor | float | None = None,
) -> Kernel:
    """The kernel of a layer.

    Args:
        grids: The grids of the network.
        site: Key of the layer.
        rows: Its output channels.
        norm: The batch norm that alone consumes its output; None: there is none to fold.
        bias: Its bias.
        step: That of the grid of its rows, where it is another than in ``grids``, or elsewhere.
        scale: That of its input's grid, likewise.

    Returns:
        What it multiplies and adds.

    Example:
        >>> from lightning_compress.mechanisms.grids import ActivationGrid, WeightGrid, WeightSite
        >>> sites, activations = {"s": WeightSite("w", 0, 1, source="x")}, {"x": ActivationGrid(0.25, 0, 8)}
        >>> grids = Grids(weights={"w": WeightGrid(torch.tensor(0.5), 8)}, sites=sites, activations=activations)
        >>> kernel_of(grids, "s", 1, bias=torch.tensor([0.3])).rounding().item()  # the nearest multiple of .125 is .25
        -0.05...
    """
    place = grids.sites[site]
    grid = grids.weights[place.name]
    step = as_wide_as_can_be(grid.rows(place.start, place.stop).step if step is None else step)
    gain = torch.ones(rows, dtype=step.dtype, device=step.device)
    offset = torch.zeros_like(gain) if norm is None else -as_wide_as_can_be(norm.mean)
    if site in grids.biases:
        offset = offset + grids.biases[site].to(offset)
    if norm is not None:
        gain = torch.rsqrt(as_wide_as_can_be(norm.variance) + norm.eps)
        gain = gain if norm.weight is None else gain * as_wide_as_can_be(norm.weight)
        offset = offset * gain + (0.0 if norm.bias is None else as_wide_as_can_be(norm.bias))
    if site in grids.divisors:
        gain, offset = (value / grids.divisors[site].to(value) for value in (gain, offset))
    added = offset if bias is None else offset + as_wide_as_can_be(bias) * gain
    source = grids.activations.get(place.source or "")
    few = source is not None and source.bits < MOST_BITS  # the same values, in integers that fill their byte
    shift = 2 ** int(math.log2(integer_limits(MOST_BITS)[1] / grid.limits[1])) if few else 1
    own = (step.to(gain).expand(rows) * gain.abs() / shift).float()
    ratio = torch.ones_like(gain)
    if source is None:
        return Kernel(own, gain, offset, added, shift, ratio, None)
    given = source.scale if scale is None else scale
    least = added.abs() / (given * LARGEST_BIAS)
    faint = own < least
    ratio = torch.where(faint, own / least.clamp(min=torch.finfo(gain.dtype).tiny), 1.0)
    own = torch.where(faint, least.float(), own)
    usable = own >= torch.finfo(torch.float32).tiny
    return Kernel(own, gain, offset, added, shift, ratio, as_wide_as_can_be(torch.where(usable, own, 1.0)) * given)

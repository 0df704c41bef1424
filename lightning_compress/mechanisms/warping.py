"""Warped weights: those whose gradients are scaled by their positions, with the grid of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional.gradients import (
    grid_positions,
    mean_scale,
    position_scale,
    scale_gradients_,
    scale_updates_,
)
from lightning_compress.functional.quantizers import nearest_grid_point, quantization_grid
from lightning_compress.mechanisms.selection import listing, plain_name
from lightning_compress.mechanisms.weights import named_weights, select_weights, sites_of

EDGES = (_ConvNd, nn.Linear)
"""What can be the first or the last layer of a network."""


class Summary(NamedTuple):
    """What quantisation would do to weights as they are.

    Attributes:
        error: ``||w - wbar|| / ||w||`` over all of them.
        zeros: How many are 0 once quantised.
        total: How many there are.
    """

    error: float
    zeros: int
    total: int


class WarpableWeights(NamedTuple):
    """What a selection took, and what it left.

    Attributes:
        weights: Name to parameter.
        left: Names of the other weights, those of norms aside.
        idle: Selectors of ``exclude`` that leave out nothing that was selected.
    """

    weights: dict[str, nn.Parameter]
    left: list[str]
    idle: list[str]


class WarpedWeights:
    """Weights with the places where they should end: points of their own grids, or zero.

    Args:
        weights: Name to parameter.
        bits: Of each grid; None: zero is where they should end.
        by_channel: Whether each entry of dimension 0 has a grid of its own, in weights of two dimensions or more.
        eps: Added to each distance.

    Example:
        >>> weight = nn.Parameter(torch.tensor([0.70, 0.33, -0.12]))
        >>> warped = WarpedWeights({"weight": weight}, {"weight": 4})
        >>> weight.grad = torch.full((3,), 0.2)
        >>> warped.scale_gradients(["weight"], 150.0)
        >>> weight.grad
        tensor([0.0000, 0.9000, 0.6000])
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        bits: Mapping[str, int] | None,
        *,
        by_channel: bool = False,
        eps: float = 0.0,
    ) -> None:
        self.weights = dict(weights)
        self.bits = None if bits is None else dict(bits)
        self.axes = {name: 0 if by_channel and weight.ndim > 1 else None for name, weight in weights.items()}
        self.eps = eps

    @property
    def total(self) -> int:
        """How many elements there are."""
        return sum(weight.numel() for weight in self.weights.values())

    def mean(self) -> float:
        """The mean distance, ``eps`` included, over all elements."""
        return mean_scale(list(self.weights.values()), **self._settings(self.weights))

    def scale_gradients(self, names: Sequence[str], scale: float) -> None:
        """Scale the gradients of some weights, in place."""
        weights = [self.weights[name] for name in names]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        scale_gradients_(weights, gradients, scale=scale, **self._settings(names))

    def scale_updates(
        self, names: Sequence[str], before: Sequence[Tensor], scale: float, kept: Sequence[float | Tensor]
    ) -> None:
        """Scale the last step of some weights, in place, given what they were before it."""
        weights = [self.weights[name].detach() for name in names]
        scale_updates_(weights, before, scale=scale, kept=kept, **self._settings(names))

    def grids(self) -> dict[str, tuple[Tensor, int]]:
        """The step of each grid as it is now, and its bits; none where zero is where weights should end."""
        return {
            name: (quantization_grid(self.weights[name], own, axis=self.axes[name]), own)
            for name, own in (self.bits or {}).items()
        }

    def quantised(self, name: str, value: Tensor) -> Tensor:
        """The points of its own grid that are nearest to a tensor that takes the place of a weight."""
        if self.bits is None:
            return value
        axis, bits = self.axes[name], self.bits[name]
        return nearest_grid_point(value, quantization_grid(value, bits, axis=axis), bits, axis=axis)

    def positions(self, name: str) -> Tensor:
        """Where the elements of a weight lie in the cells of its grid; or, of twice the range around zero."""
        weight = self.weights[name].detach()
        if self.bits is not None:
            return grid_positions(weight, self.bits[name], axis=self.axes[name])
        largest = weight.abs().amax()
        return weight / (2 * torch.where(largest > 0, largest, 1.0))

    def summary(self) -> Summary:
        """What quantisation would do now."""
        errors, norms, zeros = [], [], []
        with torch.no_grad():
            for name, weight in self.weights.items():
                value = at_least_float32(weight.detach())
                quantised = self.quantised(name, value)
                errors.append(torch.linalg.vector_norm(value - quantised).cpu())
                norms.append(torch.linalg.vector_norm(value).cpu())
                zeros.append((quantised == 0).sum().cpu())
        error, norm = (torch.linalg.vector_norm(torch.stack(own).double()).item() for own in (errors, norms))
        return Summary(error / norm if norm else 0.0, int(torch.stack(zeros).sum()), self.total)

    def resting(self) -> list[str]:
        """The weights of which each element is on the grid, so that with ``eps=0`` none would ever move."""
        if self.bits is None or self.eps:
            return []
        return [name for name in self.weights if self._rests(name, self.bits[name])]

    def _rests(self, name: str, bits: int) -> bool:
        weight = self.weights[name].detach()
        tolerance = 4 * torch.finfo(torch.float32).eps * weight.abs().amax().float()  # rounding is no distance
        return bool((position_scale(weight, bits, axis=self.axes[name]) <= tolerance).all())

    def _settings(self, names: Iterable[str]) -> dict[str, Any]:
        names = list(names)
        bits = None if self.bits is None else [self.bits[name] for name in names]
        return {"bits": bits, "axes": [self.axes[name] for name in names], "eps": self.eps}


def warpable_weights(root: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] | None) -> WarpableWeights:
    """The weights of layers, each followed by its bias where the layer is linear, or projects for attention.

    Args:
        root: Where the names start.
        layers: As in :func:`~lightning_compress.mechanisms.weights.select_weights`.
        exclude: Likewise.

    Returns:
        Those taken and those left.

    Raises:
        ValueError: As :func:`~lightning_compress.mechanisms.weights.select_weights`; if a weight is NaN or infinite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 1))
        >>> list(warpable_weights(net, None, None).weights)
        ['0.weight', '3.weight', '3.bias']
    """
    selected = select_weights(root, layers, exclude)
    first = {id(parameter): name for name, parameter in reversed(named_weights(root).items())}
    sites = sites_of(root)
    found: dict[str, nn.Parameter] = {}
    for name, weight in selected.weights.items():
        found[name] = weight
        for module in (site.module for site in sites[id(weight)]):
            bias = getattr(module, "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias", None)
            if isinstance(module, (nn.Linear, nn.MultiheadAttention)) and isinstance(bias, nn.Parameter):
                found[first[id(bias)]] = bias
    if broken := [name for name, weight in found.items() if not weight.detach().isfinite().all()]:
        raise ValueError(
            f"{listing(broken)} hold NaN or infinity, which have no place on a grid: start from weights that are "
            "finite, or leave the layers out with exclude="
        )
    return WarpableWeights(found, selected.left, selected.idle)


def edge_layers(root: nn.Module, order: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The first and the last layer of a network.

    Args:
        root: Where the names start.
        order: Layers in the order in which they are called; empty where that is not known, and then they count in the
            order in which the network registers them.

    Returns:
        Name and layer, of both; one entry if they are the same.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> [name for name, _ in edge_layers(net, [])], [name for name, _ in edge_layers(net, [net[2], net[0]])]
        (['0', '2'], ['2', '0'])
    """
    candidates: list[tuple[str, nn.Module]] = [
        (plain_name(name), module) for name, module in root.named_modules() if isinstance(module, EDGES)
    ]
    if order:
        names = {id(module): name for name, module in candidates}
        candidates = [(names[id(module)], module) for module in order if id(module) in names]
    return list(dict.fromkeys([candidates[0], candidates[-1]])) if candidates else []

"""Warped weights: those whose gradients are scaled by their positions, with the grid of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.functional._dtypes import as_wide_as_can_be, at_least_float32
from lightning_compress.functional._steps import largest_magnitude, usable
from lightning_compress.functional.gradients import grid_positions, scale_gradients_, scale_updates_, total_scale
from lightning_compress.functional.quantizers import integer_limits, nearest_grid_point, quantization_grid
from lightning_compress.mechanisms.selection import listing, plain_name
from lightning_compress.mechanisms.sharding import Ranks, own_part
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

    Where FSDP2 shards the weights, each rank works on its own rows, with the grids of whole weights; then all methods
    but :meth:`quantised` and :meth:`part` are for all ranks to call.

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
        self.ranks = Ranks(list(weights.values()))

    def part(self, name: str) -> Tensor:
        """What this rank has of a weight, without autograd: all of it, unless it is sharded."""
        return own_part(self.weights[name])

    @property
    def total(self) -> int:
        """How many elements there are."""
        return sum(weight.numel() for weight in self.weights.values())

    def mean(self) -> float:
        """The mean distance, ``eps`` included, over all elements."""
        parts = [self.part(name) for name in self.weights]
        return float(self.ranks.total(total_scale(parts, **self._settings(self.weights, parts)))) / self.total

    def scale_gradients(self, names: Sequence[str], scale: float) -> None:
        """Scale the gradients of some weights, in place."""
        parts = [self.part(name) for name in names]
        gradients = [own_part(own) for name in names if (own := self.weights[name].grad) is not None]
        scale_gradients_(parts, gradients, scale=scale, **self._settings(names, parts))

    def scale_updates(
        self, names: Sequence[str], before: Sequence[Tensor], scale: float, kept: Sequence[float | Tensor]
    ) -> None:
        """Scale the last step of some weights, in place, given what this rank had of them before it."""
        parts = [self.part(name) for name in names]
        scale_updates_(parts, before, scale=scale, kept=kept, **self._settings(names, before))

    def grids(self) -> dict[str, tuple[Tensor, int]]:
        """The step of each grid as it is now, and its bits; none where zero is where weights should end."""
        steps = self._steps(list(self.bits or {}))
        return {
            name: (self.ranks.rows(step, self.weights[name]) if step.ndim else step, own)
            for (name, own), step in zip((self.bits or {}).items(), steps, strict=True)
        }

    def quantised(self, name: str, value: Tensor) -> Tensor:
        """The points of its own grid that are nearest to a tensor that takes the place of a weight."""
        if self.bits is None:
            return value
        axis, bits = self.axes[name], self.bits[name]
        return nearest_grid_point(value, quantization_grid(value, bits, axis=axis), bits, axis=axis)

    def positions(self, name: str) -> Tensor:
        """Where the elements of this rank lie in the cells of a weight's grid; or, of twice the range around zero."""
        part = self.part(name)
        if self.bits is not None:
            [step] = self._steps([name])
            return grid_positions(part, self.bits[name], axis=self.axes[name], step=step)
        [largest] = self._largest([name], [part])
        return part / (2 * torch.where(largest > 0, largest, 1.0))

    def summary(self) -> Summary:
        """What quantisation would do now."""
        found = []
        with torch.no_grad():
            names = list(self.weights)
            for name, step in zip(names, self._steps(names) if self.bits else [None] * len(names), strict=True):
                value = at_least_float32(self.part(name))
                quantised = value if step is None else self._nearest(name, value, step)
                norms = (as_wide_as_can_be(torch.linalg.vector_norm(own)) for own in (value - quantised, value))
                found.append(torch.stack([*(own.square() for own in norms), (quantised == 0).sum()]).cpu().double())
        error, norm, zeros = self.ranks.total(torch.stack(found).sum(dim=0)).tolist()
        return Summary(math.sqrt(error / norm) if norm else 0.0, int(zeros), self.total)

    def resting(self) -> list[str]:
        """The weights of which each element is on the grid, so that with ``eps=0`` none would ever move."""
        if self.bits is None or self.eps:
            return []
        names = list(self.weights)
        parts = [at_least_float32(self.part(name)) for name in names]
        moving = []
        for name, part, step, largest in zip(
            names, parts, self._steps(names), self._largest(names, parts, by_channel=False), strict=True
        ):
            tolerance = 4 * torch.finfo(torch.float32).eps * largest.float()  # rounding is no distance
            moving.append(((part - self._nearest(name, part, step)).abs() > tolerance).sum().cpu())
        counts = self.ranks.total(torch.stack(moving)).tolist() if moving else []
        return [name for name, count in zip(names, counts, strict=True) if not count]

    def _nearest(self, name: str, value: Tensor, step: Tensor) -> Tensor:
        bits = 0 if self.bits is None else self.bits[name]
        return nearest_grid_point(value, step, bits, axis=self.axes[name])

    def _steps(self, names: Sequence[str], parts: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The step of each grid; of those by channel, for the rows of this rank."""
        bits = self.bits or {}
        largest = self._largest(names, [self.part(name) for name in names] if parts is None else parts)
        if parts is None and not all(
            bool(own.isfinite().all()) for own in largest
        ):  # in a step there is no time for it
            raise ValueError("a weight is NaN or infinite, and has no place on a grid")
        return [usable(own / integer_limits(bits[name])[1]) for name, own in zip(names, largest, strict=True)]

    def _largest(self, names: Sequence[str], parts: Sequence[Tensor], *, by_channel: bool = True) -> list[Tensor]:
        """The largest magnitude of each whole weight, given what this rank has of it; of its own rows, by channel."""
        axes = [self.axes[name] if by_channel else None for name in names]
        found = [
            largest_magnitude(part, axis) if part.numel() or axis is not None else at_least_float32(part.new_zeros(()))
            for part, axis in zip(parts, axes, strict=True)
        ]
        whole = [index for index, axis in enumerate(axes) if axis is None]
        if whole and self.ranks.several:
            joined = self.ranks.largest(torch.stack([found[index].double() for index in whole]))
            for index, own in zip(whole, joined, strict=True):
                found[index] = own.to(found[index].dtype)
        return found

    def _settings(self, names: Iterable[str], parts: Sequence[Tensor]) -> dict[str, Any]:
        """What the functions of many tensors take; of whole weights they find the steps faster themselves."""
        names = list(names)
        bits = None if self.bits is None else [self.bits[name] for name in names]
        steps = self._steps(names, parts) if self.ranks.several and self.bits is not None else None
        return {"bits": bits, "axes": [self.axes[name] for name in names], "eps": self.eps, "steps": steps}


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
    infinite = torch.stack([(~own_part(weight).isfinite()).sum().cpu() for weight in found.values()])
    counts = Ranks(list(found.values())).total(infinite).tolist()
    if broken := [name for name, count in zip(found, counts, strict=True) if count]:
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

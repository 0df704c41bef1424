"""Grids that move while a network trains: they follow what they quantise, or their steps learn.

Learned steps: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153. Here each step is learned
as a factor of where it began, so that one learning rate suits steps of every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.functional._selection import Parts
from lightning_compress.functional._steps import largest_magnitude, usable
from lightning_compress.functional.quantizers import (
    along,
    fake_quantize,
    gradient_scaled,
    learned_rounding,
    range_grids,
)
from lightning_compress.mechanisms.gathering import parts_of, rows_held, rows_of
from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.rounding import Presented, Rounding
from lightning_compress.mechanisms.sharding import Ranks, own_part

SMALLEST_FACTOR = 0.05
"""Of a learned step to where it began: it stays positive."""
MOMENTUM = 0.1
"""Weight of a new step in the averages of what activations reach."""


class MovingGrids(Rounding):
    """Rounds to grids of which :meth:`current` tells what they are now; the base's do not move.

    Args:
        network: The network.
        grids: Where they begin; not changed.
        presented: As in :class:`~lightning_compress.mechanisms.rounding.WeightNames`.

    Attributes:
        frozen: Whether they stay from here on.
        learns: Whether their steps have gradients.
    """

    frozen = True
    learns = False

    def __init__(self, network: nn.Module, grids: Grids, presented: Presented | None = None) -> None:
        own = replace(grids, weights=dict(grids.weights), activations=dict(grids.activations))
        super().__init__(network, own, presented)
        self.network, self.evaluating = network, False
        self.parts = parts_of(self.names.sharded.values())
        """How processes that hold shards of the weights work together; None where weights are whole."""

    def current(self) -> Grids:
        """The grids as they are now, on the CPU."""
        return self.grids

    def finish_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """Move, once an optimizer has stepped.

        Args:
            reduce: Gives the largest of each number over processes.

        Returns:
            Keys of activations that were NaN or infinite, and were left out.
        """
        return []

    def freeze(self) -> None:
        """Keep all grids as they are now."""

    def quantities(self) -> dict[str, float]:
        """What is worth logging, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it takes to go on, beside :meth:`current`: tensors and primitives."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""

    def rows(self, name: str) -> Tensor:
        """What this process holds of a weight as the network sees it: all, but where FSDP2 has split it."""
        parameter = self.names.sharded.get(name)
        return self.weight(name) if parameter is None else own_part(parameter)

    def grid_of_rows(self, name: str) -> WeightGrid:
        """The grid of these rows, as it is now."""
        return self._of_rows(name, self.grids.weights[name])

    def _of_rows(self, name: str, grid: WeightGrid) -> WeightGrid:
        parameter = self.names.sharded.get(name)
        if parameter is None or grid.axis is None:
            return grid
        return WeightGrid(rows_of(grid.step, parameter), grid.bits)

    def clipped(self) -> float:
        """The share of weights that lie beyond the ends of their grids, over all processes."""
        names = list(self.grids.weights)
        own = replace(self.grids, weights={name: self.grid_of_rows(name) for name in names})
        return clipped_share(own, {name: self.rows(name) for name in names}, self.parts)

    def zeros(self) -> list[str]:
        """The weights that are 0 throughout."""
        names = list(self.grids.weights)
        found = [int(self.rows(name).any()) for name in names]
        found = found if self.parts is None else self.parts.totals(found)
        return [name for name, some in zip(names, found, strict=True) if not some]

    def weight(self, name: str) -> Tensor:
        """A weight as the network sees it."""
        owner, _, attribute = name.rpartition(".")
        return _compat.computed_anew(self.network.get_submodule(owner), attribute).detach()


class FollowingGrids(MovingGrids):
    """Weights have the grid of their largest magnitude now, activations that of averages of what they reached.

    Args:
        network: The network.
        grids: Where they begin.
        presented: As in the base.
        watching: Whether a call counts: in training.
    """

    def __init__(
        self, network: nn.Module, grids: Grids, presented: Presented | None = None, *, watching: Callable[[], bool]
    ) -> None:
        super().__init__(network, grids, presented)
        self.frozen = False
        self.bits = {key: grid.bits for key, grid in grids.activations.items()}
        self._watching = watching
        self.ranges = {
            key: (-grid.zero_point * grid.scale, (grid.limits[1] - grid.zero_point) * grid.scale)
            for key, grid in grids.activations.items()
        }
        """Key to the averages of what an activation reached, 0 between them."""
        self._numbers = self._as_numbers().to(next(network.parameters()).device)
        self._scales = dict(zip(self.ranges, self._numbers[:, 0].unbind(), strict=True))
        self._zeros = dict(zip(self.ranges, self._numbers[:, 1].unbind(), strict=True))
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def activation(self, key: str, x: Tensor) -> Tensor:
        """The tensor on the grid of its key, which sees what it reaches."""
        if not self.frozen and self._watching() and x.numel() > 0:
            low, high = x.detach().amin(), x.detach().amax()  # twice as fast as both at once
            if key in self._seen:
                low, high = torch.minimum(self._seen[key][0], low), torch.maximum(self._seen[key][1], high)
            self._seen[key] = low, high
        if torch.compiler.is_compiling() and key in self._scales:  # numbers would be compiled for, each time they move
            limits = (0, 2 ** self.bits[key] - 1)
            return fake_quantize(x, self._scales[key], self._zeros[key], *limits)
        return super().activation(key, x)

    def grid(self, site: str, place: WeightSite, weight: Tensor) -> WeightGrid | None:
        """That of the weight as it is now."""
        known = super().grid(site, place, weight)
        if known is None or self.frozen:
            return known
        whole = weight if known.axis is not None else self.names.whole(place, weight)
        return _followed(known, whole)

    def finish_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """Let the averages take in what was seen since the last time.

        Args:
            reduce: Gives the largest of each number over processes.

        Returns:
            Keys of activations that were NaN or infinite, whose averages are as they were.
        """
        lost: list[str] = []
        if self.frozen or not self.ranges:
            return lost
        device = next((low.device for low, _ in self._seen.values()), next(self.network.parameters()).device)
        nothing = torch.tensor(math.inf, device=device), torch.tensor(-math.inf, device=device)
        lows, highs = zip(*(self._seen.get(key, nothing) for key in self.ranges), strict=True)
        self._seen.clear()
        below, above = (torch.stack([own.float() for own in ends]) for ends in (lows, highs))
        reached = torch.stack((-below, above), dim=1)
        found = (reached if reduce is None else reduce(reached)).tolist()
        moved: dict[str, tuple[float, float]] = {}
        for (key, (low, high)), (down, up) in zip(self.ranges.items(), found, strict=True):
            if down == up == -math.inf:  # processes may take different ways
                continue
            if not (math.isfinite(down) and math.isfinite(up)):
                lost.append(key)
                continue
            moved[key] = low + MOMENTUM * (min(-down, 0.0) - low), high + MOMENTUM * (max(up, 0.0) - high)
        self.ranges.update(moved)
        bits = [self.bits[key] for key in moved]
        for key, grid, own in zip(moved, range_grids(list(moved.values()), bits), bits, strict=True):
            self.grids.activations[key] = ActivationGrid(*grid, own)
        self._numbers.copy_(self._as_numbers())
        return lost

    def _as_numbers(self) -> Tensor:
        """Scale and zero point of each activation, shape ``(activations, 2)``."""
        grids = self.grids.activations.values()
        return torch.tensor([(grid.scale, float(grid.zero_point)) for grid in grids]).reshape(-1, 2)

    def _scale(self, key: str, grid: ActivationGrid, device: torch.device) -> Tensor | float:
        """Where it is; a CPU takes the number."""
        return grid.scale if device.type == "cpu" else self._scales[key]

    def grid_of_rows(self, name: str) -> WeightGrid:
        """That of the largest magnitudes of the rows now."""
        grid = self.grids.weights[name]
        return self._of_rows(name, grid) if self.frozen else _followed(grid, self.rows(name))

    def freeze(self) -> None:
        """Keep all grids as they are now."""
        self.grids.weights.update(self.current().weights)
        self._copies.clear()
        self._seen.clear()
        self.frozen = True

    def current(self) -> Grids:
        """The grids as they are now; those of weights from the weights."""
        if self.frozen:
            return self.grids
        weights = {}
        for name, grid in self.grids.weights.items():
            followed, parameter = _followed(grid, self.rows(name)), self.names.sharded.get(name)
            step = followed.step if parameter is None else Ranks([parameter]).rows(followed.step, parameter)
            weights[name] = WeightGrid(step.cpu(), grid.bits)
        return replace(self.grids, weights=weights, activations=dict(self.grids.activations), following=True)

    def state(self) -> dict[str, Any]:
        """Averages, and whether they stay."""
        return {"ranges": dict(self.ranges), "frozen": self.frozen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.ranges.update(state["ranges"])
        self.frozen = state["frozen"]


class LearnedGrids(MovingGrids):
    """Each step is where it began times a factor that learns; zero points stay.

    Args:
        network: The network.
        grids: Where they begin.
        presented: As in the base.
        factors: One for each activation, and for each step of each weight, in the order of ``grids``; see
            :meth:`count`. Whoever owns them trains them.
    """

    learns = True

    def __init__(
        self, network: nn.Module, grids: Grids, presented: Presented | None = None, *, factors: nn.Parameter
    ) -> None:
        super().__init__(network, grids, presented)
        self.factors = factors
        self._places: dict[str, slice] = {}
        begun = [*(torch.tensor([grid.scale]) for grid in grids.activations.values())]
        begun += [grid.step.reshape(-1) for grid in grids.weights.values()]
        start = 0
        for name, part in zip([*grids.activations, *grids.weights], begun, strict=True):
            self._places[name] = slice(start, start + len(part))
            start += len(part)
        self._begun = torch.cat(begun).to(factors) if begun else factors.detach()

    @staticmethod
    def count(grids: Grids) -> int:
        """How many factors there are.

        Args:
            grids: Where the grids begin.

        Returns:
            The number of steps.
        """
        return len(grids.activations) + sum(grid.step.numel() for grid in grids.weights.values())

    def activation(self, key: str, x: Tensor) -> Tensor:
        """The tensor on the grid of its key, with the gradient of its step."""
        grid = self.grids.activations.get(key)
        if grid is None:
            return super().activation(key, x)  # which says what is wrong
        lowest, highest = grid.limits
        step = self._step(key)[0]
        if not torch.is_grad_enabled():
            return fake_quantize(x, step, grid.zero_point, lowest, highest)
        step = gradient_scaled(step, 1 / math.sqrt(max(1, x.numel()) * highest))
        return learned_rounding(x, step, lowest - grid.zero_point, highest - grid.zero_point)

    def grid(self, site: str, place: WeightSite, weight: Tensor) -> WeightGrid | None:
        """The grid with its learned step."""
        known = super().grid(site, place, weight)
        if known is None:
            return None
        step = self._step(place.name).reshape(self.grids.weights[place.name].step.shape)
        return WeightGrid(step, known.bits).rows(place.start, place.stop)

    def grid_of_rows(self, name: str) -> WeightGrid:
        """With the learned steps as they are now."""
        return self.of_rows_with(name, self.factors_of_rows(name).detach())

    def factors_of_rows(self, name: str) -> Tensor:
        """The factors of the steps of the rows that this process holds, as a view of all factors."""
        return self._of_own(name, self.factors)

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add to the gradient of these factors."""
        if self.factors.grad is None:
            self.factors.grad = torch.zeros_like(self.factors)
        self._of_own(name, self.factors.grad).add_(gradient)

    def _of_own(self, name: str, values: Tensor) -> Tensor:
        part, parameter = values[self._places[name]], self.names.sharded.get(name)
        return part if parameter is None else part[rows_held(parameter)]

    def of_rows_with(self, name: str, factors: Tensor) -> WeightGrid:
        """The grid of the rows that this process holds, with other factors for their steps."""
        grid = self._of_rows(name, self.grids.weights[name])
        return WeightGrid(grid.step.to(factors) * factors.reshape(grid.step.shape), grid.bits)

    def scale_now(self, key: str) -> Tensor | float:
        """The learned scale."""
        return self._step(key)[0].detach()

    def rounded(self, site: str, grid: WeightGrid, weight: Tensor) -> Tensor:
        """The weight on its grid, with the gradient of its step."""
        if not torch.is_grad_enabled():
            return super().rounded(site, WeightGrid(grid.step.detach(), grid.bits), weight)
        lowest, highest = grid.limits
        members = weight.shape[1:].numel() if grid.step.ndim else weight.numel()
        step = gradient_scaled(grid.step, 1 / math.sqrt(members * highest))
        return learned_rounding(weight, step, lowest, highest, axis=grid.axis).to(weight.dtype)

    def clamp_(self) -> None:
        """Keep every step positive."""
        with torch.no_grad():
            self.factors.clamp_(min=SMALLEST_FACTOR)

    def quantities(self) -> dict[str, float]:
        """How far a factor is from 1, on average."""
        far = float((self.factors.detach() - 1).abs().mean()) if self.factors.numel() else 0.0
        return {"step_change": far}

    def state(self) -> dict[str, Any]:
        """Where they began."""
        return {"begun": self.grids.state()}

    def current(self) -> Grids:
        """The grids with the steps as they are now."""
        steps = (self._begun * self.factors.detach()).cpu()
        return replace(
            self.grids,
            weights={
                name: WeightGrid(steps[self._places[name]].reshape(grid.step.shape), grid.bits)
                for name, grid in self.grids.weights.items()
            },
            activations={
                key: ActivationGrid(steps[self._places[key]].item(), grid.zero_point, grid.bits)
                for key, grid in self.grids.activations.items()
            },
        )

    def _step(self, name: str) -> Tensor:
        place = self._places[name]
        return self._begun[place] * self.factors[place]


def _followed(grid: WeightGrid, weight: Tensor, device: torch.device | str | None = None) -> WeightGrid:
    """The grid of a weight's largest magnitude, where the weight is, or elsewhere."""
    _, highest = grid.limits
    step = usable(largest_magnitude(weight.detach(), grid.axis).float() / highest)
    return WeightGrid(step.to(device or step.device), grid.bits)


def as_they_are(grids: Grids, network: nn.Module) -> Grids:
    """The grids of a network's weights as they are, which may not be those that they followed.

    Args:
        grids: Its grids.
        network: The network.

    Returns:
        The same grids, unless they follow.

    Example:
        >>> grids = Grids(weights={"weight": WeightGrid(torch.tensor(9.0), 4)}, following=True)
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.fill_(0.7)
        >>> as_they_are(grids, layer).weights["weight"].step
        tensor(0.1000)
    """
    return FollowingGrids(network, grids, watching=bool).current() if grids.following else grids


def clipped_share(grids: Grids, weights: Mapping[str, Tensor], parts: Parts | None = None) -> float:
    """The share of weights that lie beyond the ends of their grids.

    Args:
        grids: The grids.
        weights: Name to weight, of those that have grids.
        parts: How processes work together that each have other rows of grids and weights; None where they have all.

    Returns:
        From 0 to 1; 0 without weights.

    Example:
        >>> grids = Grids(weights={"w": WeightGrid(torch.tensor(0.1), 4)})
        >>> clipped_share(grids, {"w": torch.tensor([0.2, 0.9, -0.7, -0.8])})
        0.5
    """
    beyond, total = 0.0, 0
    for name, weight in weights.items():
        grid = grids.weights[name]
        step = along(grid.step.to(weight.device), weight, grid.axis)
        beyond += float((weight.detach().abs() > (grid.limits[1] + 0.5) * step).sum())
        total += weight.numel()
    if parts is not None:
        beyond, total = parts.totals([int(beyond), total])
    return beyond / total if total else 0.0

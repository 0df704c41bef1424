"""Weights on grids where FSDP2 has split them: each process rounds its rows before they are gathered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.grids import WeightGrid
from lightning_compress.mechanisms.moving_grids import LearnedGrids, MovingGrids
from lightning_compress.mechanisms.sharding import own_part


class RoundedWeight:
    """The view of a sharded weight that is on its grid, with the gradient of the rounding.

    Args:
        moving: The grids of the network.
        name: Name of the weight inside it.
        weight: The parameter.
        ranks: Over how many processes it is split. What each adds to the gradients of learned steps counts so many
            times, as these are averaged afterwards.
    """

    plain = False
    copies = True

    def __init__(self, moving: MovingGrids, name: str, weight: nn.Parameter, ranks: int) -> None:
        self._moving, self._name, self._weight, self._ranks = moving, name, weight, ranks

    def value(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The rounded rows.

        Args:
            weight: The rows, ``(...)``.
            out: Not needed.

        Returns:
            Of the same shape.
        """
        with torch.no_grad():
            return self._rounded(weight, self._moving.grid_of_rows(self._name))

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the rows; those of their steps are added where they learn.

        Args:
            gradient: That of the rounded rows, ``(...)``.

        Returns:
            Of the same shape.
        """
        own, moving = own_part(self._weight).requires_grad_(), self._moving
        with torch.enable_grad():
            if not isinstance(moving, LearnedGrids):
                rounded = self._rounded(own, moving.grid_of_rows(self._name))
                return torch.autograd.grad(rounded, own, gradient)[0]
            factors = moving.factors_of_rows(self._name).detach().requires_grad_()
            rounded = self._rounded(own, moving.of_rows_with(self._name, factors))
            found, of_factors = torch.autograd.grad(rounded, (own, factors), gradient)
        moving.add_gradient(self._name, of_factors * self._ranks)
        return found

    def _rounded(self, weight: Tensor, grid: WeightGrid) -> Tensor:
        return self._moving.rounded("", grid, weight)

"""Which level each layer gets, for the least predicted loss within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNITS = 100_000
"""Into so many parts a budget falls; costs are rounded up to whole ones, and are exact below this."""
TIE = 1e-9
"""What the movement of weights counts beside a loss."""
SAME = 1e-13
"""Sums that differ by less are equal: they are of floats."""


class BudgetError(ValueError):
    """A budget that nothing fits; ``smallest`` is what could be reached."""

    def __init__(self, smallest: float) -> None:
        super().__init__(f"the budget is below the smallest that can be reached, {smallest}")
        self.smallest = smallest


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a layer.

    Attributes:
        level: How much of it; None: the layer stays as it is.
        cost: What it leaves, in bytes or the like.
        loss: By how much the metric is worse then.
        moved: How far the weights are from what they were: the squared difference as a share of their squares.
    """

    level: float | None
    cost: int
    loss: float
    moved: float = 0.0

    @property
    def weighed(self) -> float:
        """The loss, and what decides between equal ones."""
        return self.loss + TIE * self.moved


def options_of(plain: int, levels: Mapping[float, tuple[int, float, float]]) -> list[Option]:
    """The options of a layer, with losses that never fall as the level goes up, nor below 0.

    Args:
        plain: Cost of the layer as it is.
        levels: Level to cost, loss and movement, from the mildest on.

    Returns:
        "As it is", and each level whose loss is finite.

    Example:
        >>> for option in options_of(4, {0.5: (2, 0.1, 0.2), 0.9: (1, -0.2, 0.8)}):
        ...     print(option)
        Option(level=None, cost=4, loss=0.0, moved=0.0)
        Option(level=0.5, cost=2, loss=0.1, moved=0.2)
        Option(level=0.9, cost=1, loss=0.1, moved=0.8)
    """
    options, worst = [Option(None, plain, 0.0)], 0.0
    for level, (cost, loss, moved) in levels.items():
        worst = max(worst, loss)
        options += [Option(level, cost, worst, moved)] if math.isfinite(worst) else []
    return options


def choose(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option for each layer: of those within the budget, the least sum of losses.

    Of equal sums, as metrics of few samples often give, the one that moves the weights least; of these the
    largest cost. A dynamic programme over the cost so far, exact for budgets below :data:`UNITS`; above, costs are
    rounded up to parts of the budget, so that it is kept, and a choice that uses the last of it may be missed.

    Args:
        options: Of each layer, the mildest first.
        budget: For the sum of costs.

    Returns:
        Layer to option.

    Raises:
        BudgetError: If the smallest costs are too much together.

    Example:
        >>> layer = [Option(None, 4, 0.0), Option(0.5, 2, 0.1)]
        >>> [option.level for option in choose({"a": layer, "b": [Option(None, 4, 0.0), Option(0.5, 1, 0.3)]}, 6)
        ...  .values()]
        [0.5, None]
    """
    smallest = {name: min(own, key=lambda option: option.cost) for name, own in options.items()}
    least = sum(option.cost for option in smallest.values())
    if least > budget:
        raise BudgetError(least)
    unit = max(1.0, budget / UNITS)
    size = int(budget / unit) + 1
    best = np.full(size, np.inf)  # the least loss of what costs exactly so much
    best[0] = 0.0
    picks = []
    for own in options.values():
        best, pick = _with_layer(best, [(math.ceil(option.cost / unit), option.weighed) for option in own])
        picks.append(pick)
    if not np.isfinite(best).any():
        return smallest  # costs that fill the budget to its last part, rounded up
    cost = int(np.flatnonzero(best <= best.min() + SAME)[-1])
    chosen: dict[str, Option] = {}
    for (name, own), pick in zip(reversed(list(options.items())), reversed(picks), strict=True):
        chosen[name] = own[pick[cost]]
        cost -= math.ceil(chosen[name].cost / unit)
    return {name: chosen[name] for name in options}


def _with_layer(best: np.ndarray, own: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The same with one layer more, and which option of it that takes."""
    new, pick = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int32)
    for place, (cost, loss) in enumerate(own):
        if cost >= len(best):
            continue
        tried = best[: len(best) - cost] + loss
        better = tried < new[cost:] - SAME
        new[cost:][better], pick[cost:][better] = tried[better], place
    return new, pick


@dataclass(frozen=True)
class FilterChoice:
    """Which layers lose filters.

    Attributes:
        left: Layers that keep all.
        share: Of the filters of each other layer that go, at least.
        loss: The sum of what the others lose.
    """

    left: tuple[str, ...]
    share: float
    loss: float


def choose_filters(
    macs: Mapping[str, int], losses: Mapping[str, Mapping[float, float]], total: int, budget: float
) -> FilterChoice:
    """Leave the most sensitive layers alone, as many as pays: one share for all others then is larger.

    A layer is taken to save what its own filters cost. That fewer filters save work in the next layer too comes on top.

    Args:
        macs: Multiply-accumulates of each layer that can lose filters.
        losses: Of each, level to loss, from the mildest on.
        total: Of all layers, those that cannot lose filters too.
        budget: How many may be left.

    Returns:
        Of all counts of layers left alone, in the order of their loss for what they save, the one of the least
        predicted loss; losses between levels lie on a line.

    Raises:
        BudgetError: If the highest level of all layers does not save as much.

    Example:
        >>> choose_filters({"a": 10, "b": 10}, {"a": {0.5: 0.0}, "b": {0.5: 0.3}}, 20, 15)
        FilterChoice(left=('b',), share=0.5, loss=0.0)
    """
    curves = {name: loss_curve(own) for name, own in losses.items()}
    highest = min((shares[-1] for shares, _ in curves.values()), default=0.0)
    order = sorted(macs, key=lambda name: -curves[name][1][-1] / macs[name])
    choices = []
    for count in range(len(order)):
        rest = order[count:]
        share = (total - budget) / sum(macs[name] for name in rest)
        if share > highest:
            break
        loss = sum(interpolated(curves[name], share) for name in rest)
        choices.append(FilterChoice(tuple(sorted(order[:count], key=list(macs).index)), share, loss))
    if not choices:
        raise BudgetError(total - highest * sum(macs.values()))
    return min(choices, key=lambda choice: (choice.loss, len(choice.left)))


Curve = tuple[list[float], list[float]]
"""Shares and losses."""


def loss_curve(levels: Mapping[float, float]) -> Curve:
    """Shares and losses, from nothing on, never falling.

    Args:
        levels: Level to loss, from the mildest on.

    Example:
        >>> loss_curve({0.5: 0.2, 0.75: 0.1})
        ([0.0, 0.5, 0.75], [0.0, 0.2, 0.2])
    """
    options = options_of(0, {level: (0, loss, 0.0) for level, loss in levels.items()})
    return [option.level or 0.0 for option in options], [option.loss for option in options]


def interpolated(curve: Curve, share: float) -> float:
    """The loss between levels, on a line.

    Args:
        curve: From :func:`loss_curve`.
        share: Of the filters that go.

    Example:
        >>> interpolated(([0.0, 0.5], [0.0, 0.2]), 0.25)
        0.1
    """
    return float(np.interp(share, *curve))

"""What structured pruning is asked for, and what it will do: data, and the text that is printed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_compress.mechanisms.budgets import Budget
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.report.render import aligned

BUDGETS: dict[str, str] = {"filters": "filters", "params": "parameters", "macs": "MACs"}
"""What a share can be of, and how that is called."""

Change = tuple[int, int]
"""A number before and after."""


@dataclass(frozen=True)
class Wanted:
    """What is to go.

    Attributes:
        ratio: The share of the budget, of what there was before the first round.
        budget: What is counted.
        score: "l1", "l2", "taylor", "bn_scale" or "random".
        min_channels: How many channels each group keeps.
        round_to: What the numbers of channels are multiples of.
        seed: Of random scores.
        last: Whether this is the last round, after which the share must be met.
        layers: Selectors of the layers whose filters may go.
        exclude: Selectors of those that stay.
        network: Dotted name of the network within the module; None: found.
        earlier: What has gone in earlier rounds.
    """

    ratio: float
    budget: Budget
    score: str
    min_channels: int
    round_to: int
    seed: int
    last: bool
    layers: Sequence[str] | None
    exclude: Sequence[str] | None
    network: str | None
    earlier: Shrinkage = field(default_factory=Shrinkage)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        filters: How many it has.
        parameters: How many numbers it holds.
        macs: How many multiply-accumulates it does for one sample.
    """

    filters: Change
    parameters: Change
    macs: Change


@dataclass(frozen=True)
class Plan:
    """What will go, and what that does.

    Attributes:
        shrinkage: What stays of each tensor.
        layers: Name of each layer that changes to what becomes of it.
        left: Layers whose filters stay, with the reason.
        parameters: Of the networks that the step calls.
        macs: Likewise, for one sample.
        share: The share of the budget that is gone, of what there was before the first round.
        difference: Between the smaller network and the one with zeros, of the largest output; None where nothing could
            be compared.
        unchecked: Layers without whose filters the two need not agree, as something over channels sees them.
    """

    shrinkage: Shrinkage = field(repr=False)
    layers: dict[str, LayerPlan]
    left: dict[str, str]
    parameters: Change
    macs: Change
    share: float
    difference: float | None
    unchecked: tuple[str, ...] = ()

    @property
    def filters(self) -> dict[str, Change]:
        """Name of each layer that loses filters to their number before and after."""
        return {name: layer.filters for name, layer in self.layers.items() if layer.filters[0] != layer.filters[1]}

    def totals(self) -> list[str]:
        """Parameters and multiply-accumulates, before and after."""
        pairs = (("parameters", self.parameters), ("MACs", self.macs))
        return [
            f"{what} {_change(*numbers)} ({1 - numbers[1] / max(numbers[0], 1):.1%} less)" for what, numbers in pairs
        ]

    def text(self, title: str) -> str:
        """The plan as lines to print.

        Args:
            title: The first line.

        Returns:
            Several lines.
        """
        rows: list[tuple[str, ...]] = [("layer", "filters", "parameters", "MACs")]
        rows += [
            (name, _change(*layer.filters), _change(*layer.parameters), _change(*layer.macs))
            for name, layer in self.layers.items()
        ]
        lines = [title, *(f"  {line}" for line in [*self.totals(), *aligned(rows).splitlines()])]
        lines += [f"  keep their filters: {line}" for line in by_reason(self.left)]
        if self.unchecked:
            lines.append(f"  not compared with zeros, as something over channels sees them: {listing(self.unchecked)}")
        return "\n".join(lines)


def by_reason(left: Mapping[str, str]) -> list[str]:
    """Layers and the reasons for which their filters stay, those of one reason together.

    Args:
        left: Name to reason.

    Returns:
        One line for each reason.

    Example:
        >>> by_reason({"a": "is small", "b": "is small"})
        ["'a', 'b': is small"]
    """
    found: dict[str, list[str]] = {}
    for name, reason in left.items():
        found.setdefault(reason, []).append(name)
    return [f"{listing(names)}: {reason}" for reason, names in found.items()]


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}" if before != after else f"{before:,}"

"""Budgets: how many channels must go so that filters, parameters or multiply-accumulates fall by a share.

Nothing is cut to find out. What a tensor holds is the product of its lengths, each of which falls by so many entries
for every channel that goes; the multiply-accumulates of a layer are proportional to what its weight holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Budget = Literal["filters", "params", "macs"]
Place = tuple[str, int]
"""A tensor, and one of its dimensions."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of layers that can only go together, as those of all layers that a residual connection adds up.

    Attributes:
        name: Dotted name of the layer whose channels are counted.
        layers: All layers whose filters go.
        channels: How many there are.
        blocks: Into how many blocks of equal length they fall that must all lose the same positions.
        shrinks: By how much each tensor is shorter along a dimension for each position that goes, from all blocks.
        filters: The places at which the tensors of ``layers`` have their filters.
        originally: How many channels there were before the first of several rounds.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    blocks: int
    shrinks: Mapping[Place, int]
    filters: tuple[Place, ...]
    originally: int


@dataclass(frozen=True)
class Sizes:
    """What a network holds and computes.

    Attributes:
        shapes: Name of each parameter, a shared one once, to its shape.
        macs: Name of a weight to the multiply-accumulates of its layer for one sample.
        other_macs: Multiply-accumulates that belong to no weight.
        originally: The shapes before the first of several rounds; of parameters that are not in it they are the same.
    """

    shapes: Mapping[str, Sequence[int]]
    macs: Mapping[str, float]
    other_macs: float = 0.0
    originally: Mapping[str, Sequence[int]] = field(default_factory=dict)


def sizes_of(
    shapes: Mapping[str, Sequence[int]],
    counted: Mapping[str, int],
    originally: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Sizes:
    """Sizes from what was counted layer by layer: what a layer computes is shared out by what its matrices hold.

    Args:
        shapes: Name of each parameter to its shape.
        counted: Layer to its multiply-accumulates for one sample.
        originally: As in :class:`Sizes`.

    Returns:
        The sizes.

    Example:
        >>> sizes_of({"a.weight": (2, 3), "a.bias": (2,)}, {"a": 6, "": 1}).macs
        {'a.weight': 6.0}
    """
    macs: dict[str, float] = {}
    for layer, count in counted.items():
        own = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] == layer and len(shape) > 1}
        whole = sum(map(math.prod, own.values()))
        macs |= {name: count * math.prod(shape) / whole for name, shape in own.items()}
    return Sizes(shapes, macs, float(sum(counted.values()) - sum(macs.values())), originally)


class Costs:
    """What a network would hold and compute if its groups kept fewer channels.

    Args:
        sizes: Of the network as it is.
        groups: Whose channels may go.

    Example:
        >>> group = ChannelGroup("0", ("0",), 8, 1, {("0.weight", 0): 1, ("1.weight", 1): 1}, (("0.weight", 0),), 8)
        >>> sizes = Sizes({"0.weight": (8, 3), "1.weight": (2, 8)}, {"0.weight": 24.0, "1.weight": 16.0})
        >>> costs = Costs(sizes, [group])
        >>> costs.of("params", [8]), costs.of("params", [4]), costs.of("macs", [4]), costs.of("filters", [4])
        (40.0, 20.0, 20.0, 4.0)
    """

    def __init__(self, sizes: Sizes, groups: Sequence[ChannelGroup]) -> None:
        self._sizes, self._groups = sizes, groups
        self._touching: dict[Place, list[tuple[int, int]]] = {}
        for index, group in enumerate(groups):
            for place, entries in group.shrinks.items():
                self._touching.setdefault(place, []).append((index, entries))

    def of(self, budget: Budget, kept: Sequence[int]) -> float:
        """The cost.

        Args:
            budget: What is counted: the filters of the groups' layers, or all parameters or multiply-accumulates.
            kept: How many channels each group keeps.

        Returns:
            A number.
        """
        gone = [(group.channels - own) // group.blocks for group, own in zip(self._groups, kept, strict=True)]

        def length(name: str, dim: int) -> int:
            removed = sum(entries * gone[index] for index, entries in self._touching.get((name, dim), ()))
            return self._sizes.shapes[name][dim] - removed

        return self._cost(budget, length)

    def original(self, budget: Budget) -> float:
        """The cost before the first of several rounds.

        Args:
            budget: As in :meth:`of`.

        Returns:
            A number.
        """
        shapes = {**self._sizes.shapes, **self._sizes.originally}
        return self._cost(budget, lambda name, dim: shapes[name][dim])

    def _cost(self, budget: Budget, length: Callable[[str, int], int]) -> float:
        """The cost of a network whose tensors are so long."""

        def numbers(name: str) -> int:
            return math.prod(length(name, dim) for dim in range(len(self._sizes.shapes[name])))

        if budget == "filters":
            return float(sum(length(*place) for place in {place for group in self._groups for place in group.filters}))
        if budget == "params":
            return float(sum(map(numbers, self._sizes.shapes)))
        per_weight = {name: macs / math.prod(self._sizes.shapes[name]) for name, macs in self._sizes.macs.items()}
        return self._sizes.other_macs + sum(each * numbers(name) for name, each in per_weight.items())


def kept_channels(
    groups: Sequence[ChannelGroup],
    cost: Callable[[Sequence[int]], float],
    ratio: float,
    original: float,
    *,
    at_least: int,
    multiple_of: int = 1,
    uniform: bool = False,
) -> list[int]:
    """How many channels each group keeps so that a cost falls by a share; all lose the same share of their channels.

    Args:
        groups: Whose channels may go.
        cost: What is left where the groups keep so many channels.
        ratio: The share of the cost that shall go, in (0, 1).
        original: The cost before the first of several rounds.
        at_least: How many channels each group keeps.
        multiple_of: What the numbers of kept channels are multiples of; a group of which none can go stays whole.
        uniform: Whether ``ratio`` is the share of each group, where none would be left with less than ``at_least``.

    Returns:
        One number for each group, with which the cost falls by the share that is nearest to ``ratio``.

    Example:
        >>> groups = [ChannelGroup(name, (name,), size, 1, {}, (), size) for name, size in (("a", 16), ("b", 24))]
        >>> kept_channels(groups, sum, 0.5, 40, at_least=8)
        [8, 12]
        >>> kept_channels(groups, sum, 0.6, 40, at_least=8)
        [8, 8]
    """

    def at(share: float) -> list[int]:
        return [_kept(group, share, at_least, multiple_of) for group in groups]

    def gone(kept: Sequence[int]) -> float:
        return 1.0 - cost(kept) / original

    if uniform and at(ratio) == [_kept(group, ratio, 1, multiple_of) for group in groups]:
        return at(ratio)
    low, high = 0.0, 1.0
    if gone(at(high)) <= ratio:
        return at(high)
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if gone(at(middle)) >= ratio else (middle, high)
    # Where many groups step at one share, they go over one after the other.
    below, above = at(low), at(high)
    steps = [index for index, (more, less) in enumerate(zip(below, above, strict=True)) if more != less]
    candidates = [below]
    for index in steps:
        candidates.append([*candidates[-1][:index], above[index], *candidates[-1][index + 1 :]])
    return min(candidates, key=lambda kept: abs(gone(kept) - ratio))


def fewest_channels(groups: Sequence[ChannelGroup], *, at_least: int, multiple_of: int = 1) -> list[int]:
    """How many channels each group keeps at least.

    Args:
        groups: As in :func:`kept_channels`.
        at_least: Likewise.
        multiple_of: Likewise.

    Returns:
        One number for each group.

    Example:
        >>> fewest_channels([ChannelGroup("a", ("a",), 32, 4, {}, (), 32)], at_least=6)
        [8]
    """
    return [_kept(group, 1.0, at_least, multiple_of) for group in groups]


def _kept(group: ChannelGroup, share: float, at_least: int, multiple_of: int) -> int:
    """The channels that a group keeps if it loses a share of what it had originally; half a channel goes."""
    step = math.lcm(group.blocks, multiple_of)
    lowest = step * math.ceil(at_least / step)
    wanted = step * math.ceil((1.0 - share) * group.originally / step - 0.5 - 1e-9)
    return min(max(wanted, lowest), group.channels)

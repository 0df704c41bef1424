"""Dependencies: which channels of a network can only go together, and which may go at all.

Torch-Pruning finds the groups and knows how each kind of layer is cut (:mod:`.channel_graph`); which channels go is
decided elsewhere (:mod:`.budgets`), and what stays of each tensor is a plan that is read off a copy
(:mod:`.shrinking`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.functional.filters import FilterScore, filter_rows, filter_scores
from lightning_compress.mechanisms.budgets import ChannelGroup, Place
from lightning_compress.mechanisms.channel_graph import LAYERS, ChannelGraph, Item
from lightning_compress.mechanisms.selection import joined, listing, plain_name
from lightning_compress.mechanisms.shrinking import Shrinkage, Structure, structure_of
from lightning_compress.mechanisms.weights import Site, computed_parameters, filters_of, sites_of

ATTENTION, OUTPUT = "reaches attention", "is what the network returns"
RECURRENT = "a recurrent layer"


@dataclass(frozen=True)
class Left:
    """A group that stays as it is.

    Attributes:
        layers: The layers whose filters it has.
        reason: Why, as the end of a sentence about the layers.
    """

    layers: tuple[str, ...]
    reason: str


def fixed_modules(
    root: nn.Module, *, excluded: Collection[nn.Module] = (), has: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """The modules that no cut may touch, whatever is selected.

    Args:
        root: What the names are relative to.
        excluded: Attention among them keeps its heads.
        has: Whether the module of a name belongs to the networks that are made smaller.

    Returns:
        Name to the reason, as the end of a sentence; for what is of another network, of its parameters too.

    Example:
        >>> fixed_modules(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.LSTM(4, 4)))
        {'1': 'a recurrent layer'}
    """
    fixed: dict[str, str] = {}
    sites = sites_of(root)
    for given, part in root.named_modules():
        name = plain_name(given)
        if not has(name):
            own = [joined(name, leaf) for leaf, _ in part.named_parameters(recurse=False)]
            fixed.update(dict.fromkeys([name, *own] if name and own else own, "which is of another network"))
        elif isinstance(part, nn.MultiheadAttention) and part in excluded:
            fixed[name] = "which is excluded"
        elif computed_parameters(part):
            fixed[name] = "whose weight is computed from other parameters"
        elif isinstance(part, nn.RNNBase) and not _is_plain_lstm(part):
            fixed[name] = RECURRENT
        elif isinstance(part, _ConvTransposeNd) and 1 < part.groups < part.in_channels:
            fixed[name] = "a transposed convolution with groups"
        elif isinstance(part, nn.Bilinear):
            fixed[name] = "a bilinear layer"
        elif any(len({id(site.module) for site in sites[id(leaf)]}) > 1 for leaf in part.parameters(recurse=False)):
            fixed[name] = "whose weight another layer has too"
    return fixed


def _is_plain_lstm(layer: nn.RNNBase) -> bool:
    one = layer.num_layers == 1 and not layer.bidirectional and not layer.proj_size
    return isinstance(layer, nn.LSTM) and one


class Dependencies:
    """The groups of channels of a copy of a network.

    Args:
        root: A copy that nobody needs: what its names are relative to. In the mode in which it is to be traced.
        run: Calls the network within it once, with gradients, and gives back what it returns.
        outputs: From what ``run`` returned to what must keep its shape.
        selected: Names of the layers whose filters may go.
        fixed: Names of modules that must not be touched, with the reason.
        originally: Shapes of tensors before the first of several rounds, where they were others.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        StructureError: If the network does not run, or the library cannot follow it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> found = Dependencies(network, lambda net: net(torch.ones(1, 3, 4, 4)), selected=["0", "2"])
        >>> [group.name for group in found.groups], found.left
        (['0'], [Left(layers=('2',), reason='is what the network returns')])
        >>> found.cut({"0": [0, 3, 5]}).kept
        {'0.weight': {0: [1, 2, 4, 6, 7]}, '0.bias': {0: [1, 2, 4, 6, 7]}, '2.weight': {1: [1, 2, 4, 6, 7]}}
    """

    def __init__(
        self,
        root: nn.Module,
        run: Callable[[nn.Module], Any],
        *,
        selected: Collection[str],
        outputs: Callable[[Any], Any] = lambda value: value,
        fixed: Mapping[str, str] = MappingProxyType({}),
        originally: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._root, self._before = root, structure_of(root)
        self._selected, self._fixed, self._originally = set(selected), dict(fixed), dict(originally)
        self._graph = ChannelGraph(root, run, outputs)
        self._items: dict[str, list[Item]] = {}
        self.groups: list[ChannelGroup] = []
        """Those whose channels may go."""
        self.left: list[Left] = []
        """Those that stay as they are."""
        seen: set[str] = set()
        for name, layer in self._graph.layers().items():
            if name in self._selected and name not in seen:
                seen.update(self._sort(name, layer))

    def scores(self, group: ChannelGroup, kind: FilterScore) -> Tensor:
        """How much each channel of a group matters, by the filters that go with it.

        Args:
            group: One of :attr:`groups`.
            kind: "taylor" needs gradients on the copy's parameters.

        Returns:
            Shape ``(channels,)``.
        """
        rows, gradients = [], []
        for item in self._items[group.name]:
            if not _has_filters(item):
                continue
            weight = item.module.weight
            where: Any = filters_of([Site(item.module, "weight")])
            rows.append(_aligned(filter_rows(weight.detach(), where), item))
            if kind == "taylor":
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradients.append(_aligned(filter_rows(own, where), item))
        return filter_scores(torch.cat(rows, 1), kind, torch.cat(gradients, 1) if gradients else None)

    def norm_scales(self, group: ChannelGroup) -> Tensor | None:
        """How batch norm scales each channel of a group, added up over the norms in it.

        Args:
            group: One of :attr:`groups`.

        Returns:
            Shape ``(channels,)``; None for a group without batch norm.
        """
        scales = [
            _aligned(item.module.weight.detach()[:, None], item)
            for item in self._items[group.name]
            if isinstance(item.module, _BatchNorm) and item.module.affine
        ]
        return filter_scores(torch.cat(scales, 1), "l1") if scales else None

    def exact(self, names: Collection[str]) -> bool:
        """Whether a network without channels of these groups computes what it does where they are zero.

        Args:
            names: Of groups.

        Returns:
            False where a norm over channels, or the like, sees the channels.
        """
        return not any(item.counts for name in names for item in self._items[name])

    def cut(self, removed: Mapping[str, Sequence[int]]) -> Shrinkage:
        """Cut the copy, which is of no use afterwards.

        Args:
            removed: Name of each group to the channels that go.

        Returns:
            What stays of each tensor.

        Raises:
            StructureError: If the library cannot cut a layer.
        """
        layers = self._graph.layers()
        kept, shapes = self._graph.cut([(layers[name], channels) for name, channels in removed.items()])
        after = structure_of(self._root)
        changed: Structure = {}
        for name, values in self._before.items():
            own = {key: value for key, value in after[name].items() if key in values and value != values[key]}
            if own:
                changed[name] = own
        return Shrinkage(kept, changed, shapes)

    def release(self) -> None:
        """Let go of the activations of the batch; nothing can be asked afterwards."""
        self._graph.release()
        self._items.clear()

    # Private

    def _sort(self, name: str, layer: nn.Module) -> tuple[str, ...]:
        """Put the group of a layer where it belongs, and tell which layers' filters it has."""
        try:
            items = self._graph.group(layer)
            layers = tuple(dict.fromkeys(item.name for item in items if _has_filters(item)))
            blocks, problem = self._blocks(layer, items)
            reason = self._reason(items, layers) or problem
            if reason is None:
                self._take(name, items, layers, blocks)
        except Exception as error:  # the library raises whatever its operations lead to
            layers, reason = (name,), f"has channels that cannot be followed ({type(error).__name__}: {error})"
        if reason is not None:
            self.left.append(Left(layers, reason))
        return layers

    def _take(self, name: str, items: list[Item], layers: tuple[str, ...], blocks: int) -> None:
        channels = _channels(items)
        shrinks: dict[Place, int] = {}
        filters: list[Place] = []
        for item in items:
            gone = item.roots % (channels // blocks) == 0  # one position of each block
            effect = self._graph.effect(item, sorted(set(item.indices[gone].tolist())))
            shrinks |= effect
            filters += [place for place in effect if _has_filters(item) and place[0] == f"{item.name}.weight"]
        weight, dim = filters[0]
        shape = items[0].module.weight.shape
        originally = channels * self._originally.get(weight, list(shape))[dim] // shape[dim]
        self.groups.append(ChannelGroup(name, layers, channels, blocks, shrinks, tuple(filters), originally))
        self._items[name] = items

    def _reason(self, items: Sequence[Item], layers: Sequence[str]) -> str | None:
        """Why a group stays as it is; None if its channels may go."""
        if any(item.returned for item in items):
            return OUTPUT
        for item in items:
            for name, cause in self._fixed.items():
                if item.name == name or item.name.startswith(f"{name}."):
                    return f"reaches '{name}', {cause}"
        if any(item.attention for item in items):
            return ATTENTION
        others = [name for name in layers if name not in self._selected]
        if len(others) == len(layers):
            return "is not selected"
        if others:
            return f"can only go together with {listing(others)}, which is not selected"
        return None

    def _blocks(self, layer: nn.Module, items: Sequence[Item]) -> tuple[int, str | None]:
        """Into how many blocks the channels fall, or what is in the way."""
        channels = _channels(items)
        first = self._graph.group(layer, [0])
        together = sorted({index for item in first if item.module is layer for index in item.indices.tolist()})
        blocks = len(together)
        if channels % blocks or together != list(range(0, channels, channels // blocks)):
            return 1, "has channels that only go together in a way that is not regular"
        for item in items:
            if item.name and self._reaches_past(item):
                return 1, f"meets '{item.name}' in a way that is not regular"
            count = _channel_groups(item)
            if count == 1:
                continue
            if channels % count or len(item.indices) != channels:
                return 1, f"meets the groups of '{item.name}' in a way that is not regular"
            blocks = math.lcm(blocks, count)
        if channels % blocks or blocks == channels > 1:
            return 1, f"has {channels} channels in {blocks} groups, which must all lose the same"
        uneven = next((item for item in items if item.makes and not _is_even(item, channels)), None)
        return (blocks, None) if uneven is None else (1, f"meets '{uneven.name}' in a way that is not regular")

    def _reaches_past(self, item: Item) -> bool:
        """Whether the library means channels that a layer has not."""
        channels = self._graph.channels(item)
        return channels is not None and len(item.indices) > 0 and int(item.indices.max()) >= channels


def _has_filters(item: Item) -> bool:
    """Whether the channels are filters of a layer."""
    return item.makes and isinstance(item.module, LAYERS)


def _channels(items: Sequence[Item]) -> int:
    """How many channels a group has."""
    return int(items[0].roots.max()) + 1


def _channel_groups(item: Item) -> int:
    """Into how many groups a layer's channels fall."""
    module = item.module
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, _ConvNd) and not module.groups == module.out_channels == module.in_channels:
        return module.groups
    return 1


def _is_even(item: Item, channels: int) -> bool:
    """Whether each channel of the group has as many of the layer's."""
    counts = Counter(item.roots.tolist())
    return len(counts) <= channels and len(set(counts.values())) == 1 and (-1 not in counts)


def _aligned(rows: Tensor, item: Item) -> Tensor:
    """The rows of a layer in the order of the channels of the group."""
    order = item.roots.argsort(stable=True)
    chosen = rows[item.indices[order].to(rows.device)]
    return chosen.reshape(int(item.roots.max()) + 1, -1)

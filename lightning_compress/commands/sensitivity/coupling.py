"""Which layers can only lose filters together, and what is left then: what structured pruning will find, beforehand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress.callbacks.rehearsal import POINTS
from lightning_compress.callbacks.structured import StructuredPruningCallback
from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.export.copying import independent_copy
from lightning_compress.mechanisms.budgets import ChannelGroup, Costs, Sizes, kept_channels, sizes_of
from lightning_compress.mechanisms.channel_graph import LAYERS, StructureError
from lightning_compress.mechanisms.dependencies import Dependencies, fixed_modules
from lightning_compress.mechanisms.isolation import evaluating
from lightning_compress.mechanisms.selection import find_module, joined, lies_within, plain_name
from lightning_compress.mechanisms.student import Detector
from lightning_compress.mechanisms.tree import rebuild
from lightning_compress.report.measure import macs_by_layer, single_sample

MIN_CHANNELS: int = inspect.signature(StructuredPruningCallback).parameters["min_channels"].default
"""With as many channels or fewer a layer is left alone by a recipe that says nothing else."""

Shares = Mapping[str, float]
"""Layer to the share of its filters that goes."""


@dataclass(frozen=True)
class Coupling:
    """The channels of a network, as far as they may go.

    Attributes:
        groups: Channels that can only go together.
        sizes: What the network holds and computes.
        unmeasured: Layers with filters that were not to be measured.

    Example:
        >>> group = ChannelGroup("0", ("0", "1"), 16, 1, {("0.weight", 0): 1}, (("0.weight", 0),), 16)
        >>> coupling = Coupling((group,), Sizes({"0.weight": (16, 4)}, {"0.weight": 64.0}))
        >>> coupling.gone(coupling.groups, 0.25), coupling.reach([group], {"0": 0.25, "1": 0.75})[0]
        ((0.25, {'0': 0.25, '1': 0.25}), 0.25)
    """

    groups: Sequence[ChannelGroup]
    sizes: Sizes
    unmeasured: Sequence[str] = field(default=())

    def gone(self, groups: Sequence[ChannelGroup], ratio: float) -> tuple[float, Shares]:
        """What the callback does where some groups lose filters, all of them the same share.

        Args:
            groups: Some of :attr:`groups`.
            ratio: The share of the multiply-accumulates that shall go.

        Returns:
            The share of the multiply-accumulates that goes, the nearest; and of the filters of each layer.
        """
        costs = Costs(self.sizes, groups)
        whole = costs.original("macs")
        kept = kept_channels(groups, lambda own: costs.of("macs", own), ratio, whole, at_least=MIN_CHANNELS)
        shares = {
            name: 1 - stays / group.channels for group, stays in zip(groups, kept, strict=True) for name in group.layers
        }
        return 1 - costs.of("macs", kept) / whole, shares

    def reach(self, groups: Sequence[ChannelGroup], highest: Shares) -> tuple[float, Sequence[ChannelGroup]]:
        """The largest share of the multiply-accumulates that can go.

        Args:
            groups: Some of :attr:`groups`.
            highest: Of each layer, the largest share of its filters; one that bears little would hold back the others,
                and is left alone where that reaches further.

        Returns:
            The share, 0 where nothing can go; and of which groups.
        """
        lowest = {group.name: min(highest[name] for name in group.layers) for group in groups}
        choices = [[group for group in groups if lowest[group.name] >= share] for share in sorted({*lowest.values()})]
        return max(((self._reach(own, highest), own) for own in choices), key=lambda own: own[0], default=(0.0, ()))

    def _reach(self, groups: Sequence[ChannelGroup], highest: Shares) -> float:
        low, high = 0.0, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if within(self.gone(groups, middle)[1], highest) else (low, middle)
        return self.gone(groups, low)[0]


def within(shares: Shares, highest: Shares) -> bool:
    """Whether no layer loses more than was measured.

    Args:
        shares: Of the filters of each layer.
        highest: What may go of each.

    Example:
        >>> within({"a": 0.5}, {"a": 0.75, "b": 0.1})
        True
    """
    return all(share <= highest[name] + 1e-9 for name, share in shares.items())


def choose_groups(
    coupling: Coupling, curves: Mapping[str, Callable[[float], float]], highest: Shares, ratio: float
) -> tuple[float, Shares, float] | None:
    """Leave the most sensitive groups alone, as many as pays, since all others lose the same share.

    Args:
        coupling: The groups.
        curves: Layer to its loss by the share of its filters that goes; a group with a layer that is not in it stays.
        highest: Layer to the largest share that was measured.
        ratio: The share of the multiply-accumulates that shall go.

    Returns:
        The share that goes, the one nearest to ``ratio`` where nothing reaches it; of the filters of each layer that
        loses some; and the sum of their losses. None: nothing can go.
    """
    able = [group for group in coupling.groups if all(name in curves for name in group.layers)]
    most, furthest = coupling.reach(able, highest)
    if most <= 0:
        return None
    ratio = min(ratio, most)

    def loss(shares: Shares) -> float:
        return sum(curves[name](share) for name, share in shares.items())

    def pays(group: ChannelGroup) -> float:
        macs = sum(coupling.sizes.macs.get(joined(name, "weight"), 0.0) for name in group.layers)
        return loss({name: highest[name] for name in group.layers}) / max(macs, 1.0)

    order = sorted(able, key=pays, reverse=True)
    found = []
    for own in (furthest, *(order[count:] for count in range(len(order)))):
        gone, shares = coupling.gone(own, ratio)
        if within(shares, highest) and abs(gone - ratio) <= POINTS:
            found.append((loss(shares), -len(own), gone, shares))
    if not found:  # few channels: nothing is near, and what goes at most is met
        gone, shares = coupling.gone(furthest, most)
        return gone, shares, loss(shares)
    least, _, gone, shares = min(found, key=lambda own: own[:2])
    return gone, shares, least


def find_coupling(module: nn.Module, run: Callable[[], object], layers: Sequence[Layer]) -> Coupling:
    """Look at one batch, on a copy.

    Args:
        module: The LightningModule that is validated.
        run: Runs it on one batch.
        layers: All layers; those that can lose filters count.

    Returns:
        What can go together.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        StructureError: If the structure cannot be told.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> layer = Layer("0", "Linear", ("0.weight",), 64, 64, methods=("filters",))
        >>> found = find_coupling(net, lambda: net(torch.zeros(5, 4)), [layer])
        >>> [group.layers for group in found.groups], found.sizes.macs
        ([('0',)], {'0.weight': 64.0, '2.weight': 32.0})
    """
    with Detector(module) as detector:
        detector.start()
        run()
        calls = [(name, own.args, dict(own.kwargs)) for name, every in detector.stop().items() for own in every]
    if not calls:
        raise StructureError("the validation calls no network")
    calls = rebuild(calls, _own)  # what was made in inference mode is of no use for a graph

    def called(copied: nn.Module, calls: Sequence[tuple[str, Any, Any]] = calls) -> list[Any]:
        return [find_module(copied, name, argument="network")(*args, **kwargs) for name, args, kwargs in calls]

    copied = independent_copy(module)
    with evaluating(copied):
        sizes = _sizes(copied, calls, called)
    copied = independent_copy(module).eval()
    networks = {name for name, *_ in calls}
    fixed = fixed_modules(copied, has=lambda name: lies_within(name, networks))
    able = [layer.name for layer in layers if "filters" in layer.methods and layer.name not in fixed]
    found = Dependencies(copied, called, selected=able, fixed=fixed)
    groups = tuple(group for group in found.groups if group.channels > MIN_CHANNELS)
    found.release()
    return Coupling(groups, sizes, _unmeasured(module, layers))


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _sizes(copied: nn.Module, calls: Sequence[tuple[str, Any, Any]], called: Callable[..., Any]) -> Sizes:
    """Shapes, and multiply-accumulates, of one sample where the network takes one."""
    counted: Mapping[str, int] = {}
    with suppress(Exception):  # some networks run at one size only
        one = [(name, *single_sample((args, kwargs))) for name, args, kwargs in calls]
        counted = macs_by_layer(copied, lambda: called(copied, one))
    counted = counted or macs_by_layer(copied, lambda: called(copied))
    return sizes_of({plain_name(name): tuple(leaf.shape) for name, leaf in copied.named_parameters()}, counted)


def _unmeasured(module: nn.Module, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Layers that the callback would take filters of, and that have no losses."""
    kinds = {layer.name: layer.methods for layer in layers}
    names = [plain_name(name) for name, part in module.named_modules() if isinstance(part, LAYERS)]
    return tuple(name for name in names if "bits" not in kinds.get(name, ()))

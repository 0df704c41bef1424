"""The rehearsal of structured pruning: all of it, on copies, before anything of the user's is touched.

The user's step runs once on a copy, which shows what the network receives. On that its structure is told, and the
channels are chosen; another copy is made smaller, and what it returns is compared with what it should return.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lightning_compress.callbacks.channel_plan import BUDGETS, LayerPlan, Plan, Wanted, by_reason
from lightning_compress.callbacks.copies import TOLERANCE, Copies
from lightning_compress.functional.filters import kept_filters
from lightning_compress.mechanisms.budgets import (
    ChannelGroup,
    Costs,
    Sizes,
    fewest_channels,
    kept_channels,
    sizes_of,
)
from lightning_compress.mechanisms.channel_graph import LAYERS, StructureError
from lightning_compress.mechanisms.dependencies import ATTENTION, RECURRENT, Dependencies, fixed_modules
from lightning_compress.mechanisms.selection import find_module, joined, listing, plain_name, select_modules
from lightning_compress.mechanisms.shrinking import Shrinkage, shrink_
from lightning_compress.mechanisms.weights import select_weights, sites_of

POINTS = 0.02
"""By how much a share of parameters or multiply-accumulates may differ from the one that was asked for."""

Removed = Mapping[str, Sequence[int]]
"""Name of a group to its channels that go."""


class Rehearsal:
    """Structured pruning of a module, on copies.

    Args:
        copies: Of the module.
        module: The LightningModule, which is not touched.
        wanted: What is to go.
    """

    def __init__(self, copies: Copies, module: nn.Module, wanted: Wanted) -> None:
        self._copies, self._module, self._wanted = copies, module, wanted
        self._small: dict[str, str] = {}  # layers that can lose no channels, with the reason
        self._outside: dict[str, str] = {}  # layers of other networks

    def plan(self) -> Plan:
        """Find out what will go, and try it.

        Returns:
            The plan.

        Raises:
            SkippedBatchError: If the step does nothing with this batch.
            ValueError: If it cannot be done; the module is as it was.
        """
        wanted, chosen = self._wanted, self._selected()
        self._refuse_scripted()
        with self._copies.copy() as copied:
            self._copies.look(copied, wanted.network, gradients=wanted.score == "taylor")
            self._outside = {name: self._why_outside(name) for name in chosen if not self._copies.has(name)}
            chosen = [name for name in chosen if name not in self._outside]
            found = self._dependencies(copied, chosen)
            groups = self._groups(found)
            sizes = self._sizes()
            costs = Costs(sizes, groups)
            kept = self._kept(groups, costs, self._left(found, chosen))
            removed = {
                group.name: self._going(found, group, stays)
                for group, stays in zip(groups, kept, strict=True)
                if stays < group.channels
            }
            exact = [name for name in removed if found.exact([name])]
            left = self._left(found, chosen)
            for group, stays in zip(groups, kept, strict=True):
                if stays == group.channels:
                    left.update(dict.fromkeys(group.layers, f"keeps its {stays} channels"))
            shrinkage = found.cut(removed)
            found.release()
        difference = self._tried(chosen, removed, exact, shrinkage)
        self._tell_of_twins(shrinkage)
        after, whole = self._measured(shrinkage), [group.channels for group in groups]
        after["filters"] = costs.of("filters", kept)
        share = 1 - after[wanted.budget] / costs.original(wanted.budget)
        self._check_share(share, groups, costs)
        return Plan(
            shrinkage=shrinkage,
            layers=self._layers(shrinkage, sizes),
            left=left,
            parameters=(round(costs.of("params", whole)), round(after["params"])),
            macs=(round(costs.of("macs", whole)), round(after["macs"])),
            share=share,
            difference=difference,
            unchecked=tuple(name for name in removed if name not in exact),
        )

    # What may go

    def _refuse_scripted(self) -> None:
        for name, part in self._module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                raise StructureError(f"'{plain_name(name)}' is a scripted module, whose structure cannot be told")

    def _selected(self) -> list[str]:
        """The layers whose filters may go."""
        weights = select_weights(self._module, self._wanted.layers, self._wanted.exclude, default=LAYERS).weights
        names = {id(part): plain_name(name) for name, part in self._module.named_modules()}
        sites = sites_of(self._module)
        for weight in weights.values():
            owners = list(dict.fromkeys(names[id(site.module)] for site in sites[id(weight)]))
            if len(owners) > 1:
                raise StructureError(
                    f"{listing(owners)} share one weight, so channels of the one cannot go without those of the "
                    f"other: leave them with exclude={owners}"
                )
        return [name.rpartition(".")[0] for name in weights]

    def _fixed(self) -> dict[str, str]:
        """Modules that must not be touched."""
        excluded: list[nn.Module] = []
        if self._wanted.exclude:
            every = select_modules(self._module, list(self._wanted.exclude), None, types=(nn.Module,))
            excluded += every.values()
        return fixed_modules(self._module, excluded=excluded, has=self._copies.has)

    def _dependencies(self, copied: nn.Module, chosen: Sequence[str]) -> Dependencies:
        return Dependencies(
            copied,
            self._copies.run,
            selected=chosen,
            outputs=lambda value: value[1],
            fixed=self._fixed(),
            originally=self._wanted.earlier.shapes,
        )

    def _groups(self, found: Dependencies) -> list[ChannelGroup]:
        """Those that can lose channels."""
        wanted, groups = self._wanted, []
        for group in found.groups:
            if group.originally <= wanted.min_channels:
                fewest = f"no more than min_channels={wanted.min_channels}"
                reason = f"has {fewest}"
                others = [name for name in group.layers if self._filters(name) > wanted.min_channels]
                self._small.update(dict.fromkeys(others, f"goes together with '{group.name}', which has {fewest}"))
            elif wanted.score == "bn_scale" and found.norm_scales(group) is None:
                reason = "has no batch norm, so score='bn_scale' says nothing of it"
            else:
                groups.append(group)
                continue
            self._small.update({name: reason for name in group.layers if name not in self._small})
        heads = any(isinstance(part, nn.MultiheadAttention) for part in self._module.modules())
        modules = "exclude=['type:MultiheadAttention'], or with " if heads else ""
        attention = [name for entry in found.left if entry.reason == ATTENTION for name in entry.layers]
        every = [*attention, *(name for group in found.groups for name in group.layers)]
        if 2 * len(attention) > len(every):
            raise StructureError(
                f"{len(attention)} of {len(every)} selected layers reach attention, whose channels belong to heads, as "
                f"{listing(attention)} do. They are left alone, and the others pruned, with "
                f"{modules}these layers in exclude="
            )
        if not groups:
            left = {name: entry.reason for entry in found.left for name in entry.layers} | self._small
            reasons = "; ".join(by_reason(left)) or "the network calls no selected layer"
            raise StructureError(f"no filters can go: {reasons}")
        return groups

    # How much of it

    def _sizes(self) -> Sizes:
        """What the networks hold and compute, now and before the first round."""
        with self._copies.copy() as copied:
            shapes = self._shapes(copied)
            counted = self._copies.macs(copied)
        earlier = {name: tuple(shape) for name, shape in self._wanted.earlier.shapes.items() if name in shapes}
        return sizes_of(shapes, counted, earlier)

    def _shapes(self, copied: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of the parameters of the networks that the step calls."""
        networks = [(name, find_module(copied, name, argument="network")) for name in self._copies.names]
        return {
            joined(name, inner): tuple(leaf.shape)
            for name, network in networks
            for inner, leaf in network.named_parameters()
        }

    def _measured(self, shrinkage: Shrinkage) -> dict[str, float]:
        """What the networks hold and compute once they are smaller, counted and not inferred."""
        with self._copies.copy() as copied:
            shrink_(copied, shrinkage)
            parameters = sum(math.prod(shape) for shape in self._shapes(copied).values())
            return {"params": float(parameters), "macs": float(sum(self._copies.macs(copied).values()))}

    def _left(self, found: Dependencies, chosen: Sequence[str]) -> dict[str, str]:
        """The selected layers whose filters stay, and recurrent ones, with the reasons."""
        recurrent = {name: cause for name, cause in self._fixed().items() if cause == RECURRENT}
        left = {name: entry.reason for entry in found.left for name in entry.layers if name in chosen}
        outside = {name: reason for name, reason in self._outside.items() if reason}
        return {**recurrent, **left, **outside, **self._small}

    def _why_outside(self, name: str) -> str:
        """Why a layer is none of what is made smaller; "" for one that is not called."""
        layer = find_module(self._module, name, argument="layers")
        if not any(leaf.requires_grad for leaf in layer.parameters()):
            return "is of a frozen network"
        return "is of another network" if self._wanted.network is not None else ""

    def _filters(self, name: str) -> int:
        layer = find_module(self._module, name, argument="layers")
        return int(getattr(layer, _count(layer)))

    def _kept(self, groups: Sequence[ChannelGroup], costs: Costs, left: Mapping[str, str]) -> list[int]:
        """How many channels each group keeps."""
        wanted, original = self._wanted, costs.original(self._wanted.budget)
        limits = {"at_least": wanted.min_channels, "multiple_of": wanted.round_to}
        fewest = fewest_channels(groups, **limits)
        most = 1 - costs.of(wanted.budget, fewest) / original
        if wanted.last and most < wanted.ratio - POINTS:
            raise StructureError(
                f"ratio={wanted.ratio} of the {BUDGETS[wanted.budget]} cannot go: with "
                f"min_channels={wanted.min_channels}{self._rounded(', ')} and what is left alone {most:.4f} is the "
                f"most; {self._remedies(most, groups, costs)}, or lower min_channels. Left alone: "
                f"{'; '.join(by_reason(left)) or 'nothing'}"
            )
        uniform = wanted.budget == "filters"
        kept = kept_channels(
            groups, lambda sizes: costs.of(wanted.budget, sizes), wanted.ratio, original, uniform=uniform, **limits
        )
        if wanted.last and kept == [group.originally for group in groups]:
            raise StructureError(f"ratio={wanted.ratio} takes none of the channels away; ask for more")
        return kept

    def _check_share(self, share: float, groups: Sequence[ChannelGroup], costs: Costs) -> None:
        wanted = self._wanted
        if wanted.last and wanted.budget != "filters" and not abs(share - wanted.ratio) <= POINTS:
            raise StructureError(
                f"ratio={wanted.ratio} of the {BUDGETS[wanted.budget]} cannot be met within {POINTS:.0%}: {share:.4f} "
                f"is the nearest{self._rounded(' with ')}; {self._remedies(share, groups, costs)}"
            )

    def _remedies(self, possible: float, groups: Sequence[ChannelGroup], costs: Costs) -> str:
        """What to ask for instead: a share that can be had, or the coarsest divisor of ``round_to`` that meets it."""
        wanted, cost = self._wanted, functools.partial(costs.of, self._wanted.budget)
        original = costs.original(wanted.budget)

        def meets(round_to: int) -> bool:
            kept = kept_channels(
                groups, cost, wanted.ratio, original, at_least=wanted.min_channels, multiple_of=round_to
            )
            return abs(1 - cost(kept) / original - wanted.ratio) <= POINTS

        divisors = [own for own in range(wanted.round_to - 1, 0, -1) if wanted.round_to % own == 0]
        finer = next(filter(meets, divisors), None)
        return f"ask for ratio={possible:.3g}" + ("" if finer is None else f", or give round_to={finer}")

    def _rounded(self, before: str) -> str:
        return "" if self._wanted.round_to == 1 else f"{before}round_to={self._wanted.round_to}"

    def _going(self, found: Dependencies, group: ChannelGroup, stays: int) -> list[int]:
        """The channels of a group that go, of which so many stay."""
        kind, scores = self._wanted.score, None
        if kind == "random":
            generator = torch.Generator().manual_seed(_seed(self._wanted.seed, group))
            scores = torch.rand(group.channels, generator=generator, device="cpu")
        elif kind == "bn_scale":
            scores = found.norm_scales(group)
        else:
            scores = found.scores(group, kind)  # type: ignore[arg-type]
        if scores is None or not bool(torch.isfinite(scores).all()):
            raise StructureError(f"score='{kind}' of '{group.name}' is not finite: it comes of NaN or infinity")
        kept = set(kept_filters(scores, (group.channels - stays) // group.blocks, group.blocks).tolist())
        return [index for index in range(group.channels) if index not in kept]

    def _layers(self, shrinkage: Shrinkage, sizes: Sizes) -> dict[str, LayerPlan]:
        """What becomes of each layer whose weight changes."""
        layers = {}
        for name, part in self._module.named_modules():
            weight = f"{plain_name(name)}.weight" if name else "weight"
            if weight not in shrinkage.kept or weight not in sizes.shapes or not isinstance(part, LAYERS):
                continue
            before = part.weight.numel()
            after = shrinkage.take(weight, torch.empty_like(part.weight, device="meta")).numel()
            share, bias = after / before, 0 if part.bias is None else part.bias.numel()
            kept = shrinkage.attributes.get(plain_name(name), {})
            filters = int(getattr(part, _count(part)))
            stays = int(kept.get(_count(part), filters))
            macs = sizes.macs.get(weight, 0.0)
            layers[plain_name(name)] = LayerPlan(
                (filters, stays),
                (before + bias, after + (stays if bias else 0)),
                (round(macs), round(macs * share)),
            )
        return layers

    # Whether it works

    def _tried(
        self, chosen: Sequence[str], removed: Removed, exact: Sequence[str], shrinkage: Shrinkage
    ) -> float | None:
        """Make a copy smaller, and compare what it returns with what it should return."""
        if (problem := self._copies.problem(shrinkage)) is not None:
            name = self._blamed(list(removed), lambda names: self._problem(chosen, removed, names))
            raise StructureError(f"{problem}{_leave(name)}")
        if not exact:
            return None
        part = shrinkage if len(exact) == len(removed) else self._cut(chosen, {name: removed[name] for name in exact})
        difference = self._copies.difference(part)
        if difference is not None and not difference <= TOLERANCE:
            name = self._blamed(exact, lambda names: self._differs(chosen, removed, names))
            raise StructureError(
                "the smaller network computes something else than the network with zeros in the place of what goes: "
                f"it differs by {difference:.1e} of the largest output{_leave(name)}"
            )
        return difference

    def _cut(self, chosen: Sequence[str], removed: Removed) -> Shrinkage:
        with self._copies.copy() as copied:
            found = self._dependencies(copied, chosen)
            shrinkage = found.cut(removed)
            found.release()
            return shrinkage

    def _problem(self, chosen: Sequence[str], removed: Removed, names: Sequence[str]) -> bool:
        return self._copies.problem(self._cut(chosen, {name: removed[name] for name in names})) is not None

    def _differs(self, chosen: Sequence[str], removed: Removed, names: Sequence[str]) -> bool:
        difference = self._copies.difference(self._cut(chosen, {name: removed[name] for name in names}))
        return difference is not None and not difference <= TOLERANCE

    @staticmethod
    def _blamed(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> str:
        """The group that does it: the last of the shortest row of groups without whose channels it does not work."""
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fails(names[:middle]) else (middle, high)
        return names[high - 1]

    def _tell_of_twins(self, shrinkage: Shrinkage) -> None:
        """Warn of what is as large as a network, and stays so: an average of it that the module keeps, say."""
        modules = {plain_name(name): part for name, part in self._module.named_modules()}
        for name in self._copies.names:
            network = modules[name]
            if not any(leaf.startswith(f"{name}." if name else "") for leaf in shrinkage.kept) or not name:
                continue
            shapes = [tuple(leaf.shape) for leaf in network.parameters()]
            for other, part in modules.items():
                alike = type(part) is type(network) and part is not network
                if (
                    alike
                    and not any(leaf.startswith(f"{other}.") for leaf in shrinkage.kept)
                    and [tuple(leaf.shape) for leaf in part.parameters()] == shapes
                ):
                    warnings.warn(
                        f"'{other}' is as large as '{name}', and stays so while '{name}' gets smaller; if it is kept "
                        "as an average of it, its next update fails",
                        stacklevel=2,
                    )


def _count(layer: nn.Module) -> str:
    """The attribute that says how many filters a layer has."""
    return "out_features" if isinstance(layer, nn.Linear) else "out_channels"


def _leave(name: str) -> str:
    return f", without channels of '{name}'; leave these with exclude=['{name}']"


def _seed(seed: int, group: ChannelGroup) -> int:
    """Other numbers for each group and round."""
    return (seed * 1_000_003 + sum(map(ord, group.name)) * 8191 + group.channels) % (1 << 63)

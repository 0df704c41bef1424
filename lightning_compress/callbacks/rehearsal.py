"""The rehearsal of structured pruning: all of it, on copies, before anything of the user's is touched.

The user's step runs once on a copy, which shows what the network receives. On that its structure is told, the channels
are chosen, another copy is made smaller, and what it returns is compared with what it should return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.tracing import users_place
from lightning_compress.functional.filters import kept_filters
from lightning_compress.mechanisms.budgets import Budget, ChannelGroup, Costs, Sizes, fewest_channels, kept_channels
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.dependencies import ATTENTION, LAYERS, Dependencies, StructureError
from lightning_compress.mechanisms.isolation import evaluating
from lightning_compress.mechanisms.replay import traceless
from lightning_compress.mechanisms.selection import find_module, listing, plain_name
from lightning_compress.mechanisms.shrinking import Shrinkage, shrink_
from lightning_compress.mechanisms.student import Detector
from lightning_compress.mechanisms.tree import detached, named_tensors, rebuild
from lightning_compress.mechanisms.weights import select_weights, sites_of
from lightning_compress.report.measure import count_parameters, first_line, macs_by_layer, single_sample

TOLERANCE = 1e-5
"""By how much the smaller network may differ from the one with zeros, of the largest output."""
POINTS = 0.02
"""By how much a share of parameters or multiply-accumulates may differ from the one that was asked for."""


@dataclass(frozen=True)
class Wanted:
    """What is to go.

    Attributes:
        ratio: The share of the budget, of what there was originally.
        budget: What is counted.
        score: "l1", "l2", "taylor", "bn_scale" or "random".
        min_channels: How many channels each group keeps.
        round_to: What the numbers of channels are multiples of.
        seed: Of random scores.
        last: Whether this is the last round, after which the share must be met.
        layers: Selectors of the layers whose filters may go.
        exclude: Selectors of those that stay.
        network: Dotted name of the network within the module; None: found.
        original: Name of a group to its channels before the first round, and under "params" and "macs" the costs then;
            empty in the first round.
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
    original: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What will go, and what that does.

    Attributes:
        shrinkage: What stays of each tensor.
        filters: Name of a layer to its filters before and after.
        left: Layers that stay as they are, with the reason.
        parameters: Before and after.
        macs: Multiply-accumulates before and after.
        share: The share of the budget that is gone, of what there was originally.
        original: For the next round, as in :class:`Wanted`.
        difference: Between the smaller network and the one with zeros, of the largest output; None where the two need
            not agree.
    """

    shrinkage: Shrinkage
    filters: dict[str, tuple[int, int]]
    left: dict[str, str]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    share: float
    original: dict[str, float]
    difference: float | None

    def totals(self) -> list[str]:
        """Parameters and multiply-accumulates, before and after."""
        pairs = (("parameters", self.parameters), ("MACs", self.macs))
        return [
            f"{what} {before:,} -> {after:,} ({1 - after / max(before, 1):.1%} less)" for what, (before, after) in pairs
        ]

    def text(self, title: str) -> str:
        """The plan as lines to print.

        Args:
            title: The first line.

        Returns:
            Several lines.
        """
        width = max(map(len, self.filters), default=0)
        lines = [title, *(f"  {line}" for line in self.totals()), "  filters:"]
        lines += [f"    {name:<{width}}  {before:,} -> {after:,}" for name, (before, after) in self.filters.items()]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  left as they are: {listing(names)}, {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


class Rehearsal:
    """Structured pruning of a module, on copies.

    Args:
        trainer: The Trainer.
        pl_module: The module, which is not touched.
        batch: A training batch, as the step receives it.
        batch_idx: Its number.
        wanted: What is to go.
    """

    def __init__(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int, wanted: Wanted) -> None:
        self._trainer, self._module, self._wanted = trainer, pl_module, wanted
        self._arguments = _compat.step_arguments(trainer, pl_module, batch, batch_idx)
        self._names: tuple[str, ...] = ()  # of the networks that the step calls
        self._call: NetworkCall | None = None  # where that is one

    def plan(self) -> Plan:
        """Find out what will go, and try it.

        Returns:
            The plan.

        Raises:
            ValueError: If it cannot be done; the module is as it was.
        """
        chosen = self._selected()
        with self._copy() as copied:
            self._look(copied)
            found = self._dependencies(copied, chosen)
            groups = self._groups(found)
            sizes = self._sizes()
            wanted = self._wanted
            costs = Costs(sizes, groups)
            original = self._original(groups, costs)
            kept = self._kept(groups, costs, original[wanted.budget])
            removed = {
                group.name: self._goes(found, group, own)
                for group, own in zip(groups, kept, strict=True)
                if own < group.channels
            }
            comparable = found.exact(removed)
            left = {name: entry.reason for entry in found.left for name in entry.layers if name in chosen}
            left.update(self._small)
            left.update({own: f"keeps its {group.channels} channels" for group, stays in zip(groups, kept, strict=True)
                         if stays == group.channels for own in group.layers})  # fmt: skip
            shrinkage = found.cut(removed)
        difference = self._tried(shrinkage, comparable, chosen, removed)
        after = self._after(shrinkage, sizes)
        share = (
            1
            - (costs.of(wanted.budget, kept) if wanted.budget == "filters" else after[wanted.budget])
            / original[wanted.budget]
        )
        self._check_share(share)
        fewer = {
            name: (before, before * own // group.channels)
            for group, own in zip(groups, kept, strict=True)
            for name, before in group_filters(group, sizes).items()
            if own < group.channels
        }
        filters = {name: fewer[name] for name in chosen if name in fewer}
        return Plan(
            shrinkage,
            filters,
            left,
            (count_parameters(self._module), int(after["params"])),
            (round(costs.of("macs", [group.channels for group in groups])), round(after["macs"])),
            share,
            original,
            difference,
        )

    # Private

    def _selected(self) -> list[str]:
        """The layers whose filters may go."""
        wanted = self._wanted
        weights = select_weights(self._module, wanted.layers, wanted.exclude, default=LAYERS).weights
        names = {id(part): plain_name(name) for name, part in self._module.named_modules()}
        sites = {
            name: sites_of_weight
            for name, weight in weights.items()
            for sites_of_weight in [sites_of(self._module)[id(weight)]]
        }
        shared = [name for name, places in sites.items() if len({id(site.module) for site in places}) > 1]
        if shared:
            others = [names[id(site.module)] for site in sites[shared[0]]]
            raise StructureError(
                f"{listing(others)} share one weight, so channels of the one cannot go without those of the other: "
                f"leave them with exclude={others}"
            )
        return [name.rpartition(".")[0] for name in weights]

    @contextmanager
    def _copy(self) -> Iterator[nn.Module]:
        """A copy that may run the user's step, without a trace elsewhere."""
        copied = independent_copy(self._module)
        _compat.attach_trainer_(copied, self._trainer)
        with traceless(copied, parameters=False), ExitStack() as stack:
            stack.callback(_compat.attach_trainer_, copied, None)
            yield copied

    def _step(self, copied: Any) -> Any:
        with self._trainer.precision_plugin.train_step_context():
            return copied.training_step(*self._arguments)

    def _look(self, copied: nn.Module) -> None:
        """Run the step, for what it calls; and its gradients, where these are asked for."""
        taylor = self._wanted.score == "taylor"
        for parameter in copied.parameters() if taylor else ():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), Detector(copied) as detector:
            detector.start()
            output = self._step(copied)
            calls = detector.stop()
        if not calls:
            raise StructureError(f"the training step of {type(self._module).__name__} calls no network")
        self._names = tuple(calls)
        if self._wanted.network is not None:
            find_module(copied, self._wanted.network, argument="network")
            if self._wanted.network not in calls:
                raise StructureError(
                    f"network='{self._wanted.network}' is not what the step calls: {listing(self._names)}"
                )
            self._names = (self._wanted.network,)
        if len(self._names) == 1:
            call = calls[self._names[0]][0]
            args, kwargs = rebuild((call.args, dict(call.kwargs)), detached)
            self._call = NetworkCall(args, kwargs, None)
        if taylor:
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                raise StructureError("score='taylor' needs the gradients of a step, and this one skipped its batch")
            loss.backward()  # type: ignore[no-untyped-call]

    def _run(self, copied: nn.Module) -> Any:
        """The network in a copy; the whole step where it calls several in a row."""
        if self._call is not None:
            network = find_module(copied, self._names[0], argument="network")
            with self._trainer.precision_plugin.train_step_context():
                return network(*self._call.args, **self._call.kwargs)
        outputs: list[Any] = []
        last = find_module(copied, self._names[-1], argument="network")
        hook = last.register_forward_hook(lambda _, args, output: outputs.append(output))
        try:
            loss = self._step(copied)
        finally:
            hook.remove()
        return loss, outputs

    def _dependencies(self, copied: nn.Module, chosen: Sequence[str]) -> Dependencies:
        wanted = self._wanted
        channels = {
            name: int(value) for name, value in wanted.original.items() if name not in ("filters", "params", "macs")
        }
        return Dependencies(
            copied,
            self._run,
            selected=chosen,
            outputs=(lambda value: value) if self._call is not None else (lambda value: value[1]),
            fixed=self._fixed(),
            originally=channels,
        )

    def _fixed(self) -> dict[str, str]:
        """Modules that must not be touched."""
        fixed: dict[str, str] = {}
        sites = sites_of(self._module)
        excluded = set() if not self._wanted.exclude else self._excluded()
        for name, part in self._module.named_modules():
            own = part._parameters
            if isinstance(part, nn.MultiheadAttention) and part in excluded:
                cause = "which is excluded"
            elif hasattr(part, "parametrizations") or any(entry.endswith(("_orig", "_g")) for entry in own):
                cause = "whose weight is computed from other parameters"
            elif isinstance(part, nn.RNNBase) and (
                not isinstance(part, nn.LSTM) or part.num_layers > 1 or part.bidirectional or part.proj_size
            ):
                cause = "a recurrent layer"
            elif isinstance(part, nn.Bilinear):
                cause = "a bilinear layer"
            elif any(
                value is not None and len({id(site.module) for site in sites[id(value)]}) > 1 for value in own.values()
            ):
                cause = "whose weight another layer has too"
            else:
                continue
            fixed[plain_name(name)] = cause
        return fixed

    def _excluded(self) -> set[nn.Module]:
        from lightning_compress.mechanisms.selection import select_modules

        every = select_modules(self._module, list(self._wanted.exclude or []), None, types=(nn.Module,))
        return set(every.values())

    def _groups(self, found: Dependencies) -> list[ChannelGroup]:
        """Those that can lose channels."""
        wanted, groups = self._wanted, []
        self._small: dict[str, str] = {}
        for group in found.groups:
            if group.originally <= wanted.min_channels:
                reason = f"has no more than min_channels={wanted.min_channels}"
            elif wanted.score == "bn_scale" and found.norm_scales(group) is None:
                reason = "has no batch norm, so score='bn_scale' says nothing of it"
            else:
                groups.append(group)
                continue
            self._small.update(dict.fromkeys(group.layers, reason))
        attention = [name for entry in found.left if entry.reason == ATTENTION for name in entry.layers]
        every = [*attention, *(name for group in found.groups for name in group.layers)]
        if 2 * len(attention) > len(every):
            raise StructureError(
                f"{len(attention)} of {len(every)} selected layers reach attention, whose channels belong to heads, as "
                f"{listing(attention)} do. They are left alone, and the others pruned, with "
                "exclude=['type:MultiheadAttention'], or with these layers in exclude="
            )
        if not groups:
            reasons = [*(f"{listing(entry.layers)}: {entry.reason}" for entry in found.left)]
            reasons += [f"'{name}': {reason}" for name, reason in self._small.items()]
            raise StructureError(f"no filters can go: {'; '.join(reasons) or 'the network calls no selected layer'}")
        return groups

    def _sizes(self) -> Sizes:
        with self._copy() as copied, evaluating(copied):
            shapes = {plain_name(name): tuple(own.shape) for name, own in copied.named_parameters()}
            counted = self._macs(copied)
        macs = {f"{name}.weight": float(count) for name, count in counted.items() if f"{name}.weight" in shapes}
        return Sizes(shapes, macs, float(sum(counted.values()) - sum(macs.values())))

    def _macs(self, copied: nn.Module) -> dict[str, int]:
        """Of one sample; of the batch where it cannot be cut."""
        call = self._call
        if call is None:
            return macs_by_layer(copied, lambda: self._run(copied))
        network = find_module(copied, self._names[0], argument="network")
        try:
            args, kwargs = single_sample((call.args, dict(call.kwargs)))
            with self._trainer.precision_plugin.train_step_context():
                return macs_by_layer(copied, lambda: network(*args, **kwargs))
        except Exception:  # some networks run at one size only
            return macs_by_layer(copied, lambda: self._run(copied))

    def _original(self, groups: Sequence[ChannelGroup], costs: Costs) -> dict[str, float]:
        """Counts before the first round."""
        if self._wanted.original:
            return dict(self._wanted.original)
        every = [group.channels for group in groups]
        totals: dict[str, float] = {
            "filters": costs.of("filters", every),
            "params": costs.of("params", every),
            "macs": costs.of("macs", every),
        }
        return {**totals, **{group.name: float(group.channels) for group in groups}}

    def _kept(self, groups: Sequence[ChannelGroup], costs: Costs, original: float) -> list[int]:
        wanted = self._wanted
        kept = kept_channels(
            groups,
            lambda own: costs.of(wanted.budget, own),
            wanted.ratio,
            original,
            at_least=wanted.min_channels,
            multiple_of=wanted.round_to,
            uniform=wanted.budget == "filters",
        )
        fewest = fewest_channels(groups, at_least=wanted.min_channels, multiple_of=wanted.round_to)
        share = 1 - costs.of(wanted.budget, fewest) / original
        if wanted.last and share < wanted.ratio - POINTS:
            raise StructureError(
                f"ratio={wanted.ratio} of the {NAMES[wanted.budget]} cannot go: with min_channels={wanted.min_channels}"
                f"{'' if wanted.round_to == 1 else f', round_to={wanted.round_to}'} and what is left alone "
                f"{share:.4f} is the most; ask for less, or lower min_channels"
            )
        if wanted.last and kept == [group.originally for group in groups]:
            raise StructureError(f"ratio={wanted.ratio} takes none of the channels away; ask for more")
        return kept

    def _goes(self, found: Dependencies, group: ChannelGroup, kept: int) -> list[int]:
        """The channels of a group that go."""
        wanted = self._wanted
        if wanted.score == "random":
            scores = torch.rand(group.channels, generator=torch.Generator().manual_seed(_seed(wanted.seed, group)))
        elif wanted.score == "bn_scale":
            own = found.norm_scales(group)
            scores = torch.zeros(group.channels) if own is None else own
        else:
            scores = found.scores(group, wanted.score)  # type: ignore[arg-type]
        if not bool(torch.isfinite(scores).all()):
            raise StructureError(
                f"score='{wanted.score}' of '{group.name}' is not finite: the weights hold NaN or infinity"
            )
        stays = set(kept_filters(scores, (group.channels - kept) // group.blocks, group.blocks).tolist())
        return [index for index in range(group.channels) if index not in stays]

    def _tried(
        self, shrinkage: Shrinkage, comparable: bool, chosen: Sequence[str], removed: Mapping[str, Sequence[int]]
    ) -> float | None:
        """Make a copy smaller, and compare what it returns with what it should return."""
        problem, difference = self._problem(shrinkage, comparable)
        if problem is None:
            return difference
        name = self._blamed(chosen, removed, comparable)
        hint = f"; leave these channels with exclude=['{name}']" if name else ""
        raise StructureError(f"{problem}{f', without channels of {name!r}' if name else ''}{hint}")

    def _problem(self, shrinkage: Shrinkage, comparable: bool) -> tuple[str | None, float | None]:
        difference = 0.0
        with self._copy() as smaller:
            _fill_zeros_(smaller)
            shrink_(smaller, shrinkage)
            widen_(smaller)
            with self._copy() as other:
                _fill_zeros_(other)
                widen_(other)
                for name, value in _tensors(other):
                    value.data = shrinkage.zeroed(name, value.data)
                for training in (False, True):  # in training, statistics change by random numbers that are not the same
                    try:
                        own = self._outputs(smaller, training)
                    except Exception as error:  # whatever a network raises whose shapes are other ones
                        place = users_place(error)
                        return (
                            f"the smaller network does not run: {type(error).__name__}: {first_line(error)}{place}",
                            None,
                        )
                    expected = self._outputs(other, training)
                    shapes = [[tuple(value.shape) for value in values] for values in (own, expected)]
                    if shapes[0] != shapes[1]:
                        return f"the smaller network returns shapes {shapes[0]} instead of {shapes[1]}", None
                    difference = difference if training else _difference(own, expected)
        if not comparable:
            return None, None
        if not difference <= TOLERANCE:
            return (
                "the smaller network computes something else than the network with zeros in the place of what goes: "
                f"it differs by {difference:.1e} of the largest output"
            ), difference
        return None, difference

    def _outputs(self, copied: nn.Module, training: bool) -> list[Tensor]:
        """What the network returns; in training for its shapes, in evaluation for its values."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _exact_products():
            torch.manual_seed(0)
            if training:
                returned = self._wide_run(copied)
            else:
                with evaluating(copied):
                    returned = self._wide_run(copied)
        if self._call is None:
            returned = returned[1]
        return [value for _, value in named_tensors(returned)]

    def _wide_run(self, copied: nn.Module) -> Any:
        if self._call is None:
            return self._run(copied)

        def wide(leaf: Any) -> Any:
            half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
            return leaf.float() if half else leaf

        args, kwargs = rebuild((self._call.args, dict(self._call.kwargs)), wide)
        return find_module(copied, self._names[0], argument="network")(*args, **kwargs)

    def _blamed(self, chosen: Sequence[str], removed: Mapping[str, Sequence[int]], comparable: bool) -> str | None:
        """The group that does it: the last of the shortest row of groups without whose channels it does not work."""
        names = list(removed)
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            with self._copy() as copied:
                shrinkage = self._dependencies(copied, chosen).cut({name: removed[name] for name in names[:middle]})
            low, high = (middle, high) if self._problem(shrinkage, comparable)[0] is None else (low, middle)
        return names[high - 1] if names else None

    def _after(self, shrinkage: Shrinkage, sizes: Sizes) -> dict[str, float]:
        with self._copy() as smaller:
            shrink_(smaller, shrinkage)
            with evaluating(smaller):
                counted = sum(self._macs(smaller).values())
            return {"params": float(count_parameters(smaller)), "macs": float(counted)}

    def _check_share(self, share: float) -> None:
        wanted = self._wanted
        if wanted.last and wanted.budget != "filters" and not abs(share - wanted.ratio) <= POINTS:
            raise StructureError(
                f"ratio={wanted.ratio} of the {NAMES[wanted.budget]} cannot be met within {POINTS:.0%}: {share:.4f} is "
                f"the nearest{'' if wanted.round_to == 1 else f' with round_to={wanted.round_to}'}"
            )


NAMES = {"filters": "filters", "params": "parameters", "macs": "MACs"}


def group_filters(group: ChannelGroup, sizes: Sizes) -> dict[str, int]:
    """How many filters each layer of a group has."""
    return {name.rpartition(".")[0]: sizes.shapes[name][dim] for name, dim in group.filters}


def _difference(own: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, of the largest that is expected."""
    pairs = [(one.double(), two.double()) for one, two in zip(own, expected, strict=True) if one.numel()]
    largest = max((float(two.abs().max()) for _, two in pairs), default=0.0)
    return max((float((one - two).abs().max()) for one, two in pairs), default=0.0) / (largest or 1.0)


def _fill_zeros_(module: nn.Module) -> None:
    """Put numbers in the place of parameters that are zero, behind which no difference would be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.ndim and not parameter.any():
                generator = torch.Generator().manual_seed(parameter.numel())
                numbers = torch.rand(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
                parameter.copy_(numbers)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        yield plain_name(name), value


def _seed(seed: int, group: ChannelGroup) -> int:
    """Other numbers for each group and round."""
    return (seed * 1_000_003 + sum(map(ord, group.name)) * 8191 + group.channels) % (1 << 63)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products in full precision."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn

"""Dependencies: which channels of a network can only go together, found on a copy of it by Torch-Pruning.

Fang et al., "DepGraph: Towards any structural pruning", CVPR 2023, arXiv:2301.12900. The library finds the groups and
knows how each kind of layer is cut; which channels go is decided elsewhere. What it does to the copy is read off as a
plan: the copy is cut while each of its tensors holds nothing but the numbers of its own entries.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_compress.functional.filters import FilterScore, filter_rows, filter_scores
from lightning_compress.mechanisms.budgets import ChannelGroup, Place
from lightning_compress.mechanisms.selection import listing, plain_name
from lightning_compress.mechanisms.shrinking import Shrinkage, Structure, structure_of, tensors_of
from lightning_compress.mechanisms.student import is_metric
from lightning_compress.mechanisms.tree import named_tensors
from lightning_compress.mechanisms.weights import Site, filters_of

INSTALL = 'pip install "lightning-compress[structured]"'
LAYERS = (_ConvNd, nn.Linear)
"""What has filters."""

ATTENTION, OUTPUT = "reaches attention", "is what the network returns"
OVER_CHANNELS = ("Softmax", "LogSoftmax", "SafeSoftmax", "LinalgVectorNorm", "Norm", "Std", "Var")
"""Operations over channels in which a channel that is zero counts, and one that is gone does not; but for norms with
weights, in whose place something else can be compared."""


class StructureError(ValueError):
    """A network whose structure cannot be told, or cannot be cut."""


def require_torch_pruning() -> Any:
    """Torch-Pruning.

    Returns:
        The package.

    Raises:
        ImportError: With the line that installs it.

    Example:
        >>> require_torch_pruning().__name__
        'torch_pruning'
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"structured pruning needs torch-pruning: {INSTALL}") from error
    return torch_pruning


@dataclass(frozen=True)
class Left:
    """A group that stays as it is.

    Attributes:
        layers: The layers whose filters it has.
        reason: Why, as the end of a sentence about the layers.
    """

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class _Item:
    """What happens to one module, or bare parameter, when channels of a group go."""

    module: Any
    name: str
    handler: Callable[..., Any]
    dimension: int
    makes: bool  # whether the channels are its output's
    indices: Tensor
    roots: Tensor


class Dependencies:
    """The groups of channels of a copy of a network.

    Args:
        root: A copy that nobody needs: what its names are relative to. In the mode in which it is to be traced.
        run: Calls the network within it once, with gradients, and gives back what it returns.
        outputs: From what ``run`` returned to what must keep its shape; None: all of it.
        selected: Names of the layers whose filters may go.
        fixed: Names of modules that must not be touched, with the reason.
        originally: Shapes of tensors before the first of several rounds, where they were others.

    Raises:
        ImportError: If Torch-Pruning is not installed.

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
        self._library = require_torch_pruning()
        self._root = root
        self._names = {part: plain_name(name) for name, part in reversed(list(root.named_modules()))}
        self._selected, self._fixed, self._originally = set(selected), dict(fixed), dict(originally)
        self._graph = self._library.DependencyGraph()
        self._returned: set[Any] = set()  # what the outputs were computed by: functions of autograd, and modules
        self._before = structure_of(root)
        self.groups: list[ChannelGroup] = []
        """Those whose channels may go."""
        self.left: list[Left] = []
        """Those that stay as they are."""
        self._roots: dict[str, tuple[nn.Module, Any]] = {}
        self._items: dict[str, list[_Item]] = {}
        self._incomparable: set[str] = set()
        self._trace(run, outputs)
        self._find()

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
            if not (item.makes and isinstance(item.module, LAYERS)):
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
        return self._incomparable.isdisjoint(names)

    def cut(self, removed: Mapping[str, Sequence[int]]) -> Shrinkage:
        """Cut the copy, which is of no use afterwards.

        Args:
            removed: Name of each group to the channels that go.

        Returns:
            What stays of each tensor.

        Raises:
            StructureError: If the library cannot cut a layer.
        """
        shapes = {name: list(value.shape) for name, value in tensors_of(self._root).items()}
        _number_entries_(self._root)
        for name, channels in removed.items():
            module, handler = self._roots[name]
            try:
                with torch.no_grad():
                    self._graph.get_pruning_group(module, handler, list(channels)).prune()
            except Exception as error:  # the library raises whatever its operations lead to
                raise StructureError(
                    f"the channels of '{name}' cannot be taken away: {type(error).__name__}: {error}; leave them with "
                    f"exclude=['{name}']"
                ) from error
        kept = {}
        for name, value in tensors_of(self._root).items():
            if list(value.shape) != shapes[name]:
                kept[name] = _kept(name, value, shapes[name])
        after = structure_of(self._root)
        changed: Structure = {}
        for name, values in self._before.items():
            own = {key: value for key, value in after[name].items() if key in values and value != values[key]}
            if own:
                changed[name] = own
        return Shrinkage(kept, changed, {name: shapes[name] for name in kept})

    # Private

    def _trace(self, run: Callable[[nn.Module], Any], outputs: Callable[[Any], Any]) -> None:
        flags = [(part, part.training) for part in self._root.modules()]
        by: dict[Any, set[nn.Module]] = {}
        hooks = []

        def note(module: nn.Module, _: Any, returned: Any) -> None:
            for _, tensor in named_tensors(returned):
                by.setdefault(tensor.grad_fn, set()).add(module)

        def forward(*unused: Any) -> Any:
            for part, training in flags:
                part.training = training  # the library calls eval(), which hides what is only there in training
            returned = run(self._root)
            for _, tensor in named_tensors(outputs(returned)):
                self._returned |= {tensor.grad_fn, *by.get(tensor.grad_fn, ())}
            traced = [tensor for _, tensor in named_tensors(returned) if tensor.grad_fn is not None]
            if not traced:
                raise StructureError(
                    f"the network returns no tensor that a gradient could come to, but {type(returned).__name__}, so "
                    "its structure cannot be told"
                )
            return traced

        for parameter in self._root.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # else what is frozen would not be seen
        hooks = [part.register_forward_hook(note) for part in self._root.modules() if not list(part.children())]
        try:
            with torch.enable_grad():
                self._graph.build_dependency(
                    _WithoutMetrics(self._root),
                    None,
                    forward_fn=forward,
                    unwrapped_parameters=_maps(self._root),
                    customized_pruners=_pruners(self._library),
                    verbose=False,
                )
        except StructureError:
            raise
        except Exception as error:  # of the network, or of the library, which raises whatever it meets
            raise StructureError(
                f"the structure of the network cannot be told: {type(error).__name__}: {error}{self._where(error)}; "
                "PruningCallback, which leaves shapes as they are, works for any network"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    def _where(self, error: BaseException) -> str:
        """The operation at which the library was, and the layer before it, where that can be told."""
        frame, node = error.__traceback__, None
        while frame is not None:
            node = next((own for own in frame.tb_frame.f_locals.values() if hasattr(own, "dependencies")), node)
            frame = frame.tb_next
        if node is None:
            return ""
        waiting, seen, layer = [node], {id(node)}, ""
        while waiting and not layer:
            entry = waiting.pop(0)
            layer = self._names.get(entry.module, "")
            waiting += [own for own in getattr(entry, "inputs", ()) if id(own) not in seen]
            seen.update(map(id, waiting))
        operation = getattr(node.grad_fn, "name", str)().partition("Backward")[0]
        return f", at the operation '{operation}'{f' after {layer!r}' if layer else ''}"

    def _find(self) -> None:
        seen: set[str] = set()
        for module in list(self._graph.module2node):
            name = self._names.get(module, "")
            if isinstance(module, LAYERS) and name in self._selected and name not in seen:
                seen.update(self._sort(name, module))

    def _sort(self, name: str, module: Any) -> tuple[str, ...]:
        """Put the group of a layer where it belongs, and tell which layers' filters it has."""
        try:
            pruner = self._graph.get_pruner_of_module(module)
            every = list(range(pruner.get_out_channels(module)))
            group = self._graph.get_pruning_group(module, pruner.prune_out_channels, every)
            items = [self._item(entry) for entry in group]
            layers = tuple(dict.fromkeys(item.name for item in items if item.makes and isinstance(item.module, LAYERS)))
            blocks, problem = self._blocks(group, items)
            reason = self._reason(group, items, layers) or problem
            if reason is None:
                self._take(name, group, items, layers, blocks)
        except Exception as error:  # the library raises whatever its operations lead to
            layers, reason = (name,), f"has channels that cannot be followed ({type(error).__name__}: {error})"
        if reason is not None:
            self.left.append(Left(layers, reason))
        return layers

    def _take(self, name: str, group: Any, items: list[_Item], layers: tuple[str, ...], blocks: int) -> None:
        channels = int(items[0].roots.max()) + 1
        shrinks: dict[Place, int] = {}
        filters: list[Place] = []
        for item in items:
            for place, entries in self._effects(item, channels, blocks).items():
                shrinks[place] = shrinks.get(place, 0) + entries
                if item.makes and isinstance(item.module, LAYERS) and place[0] == f"{item.name}.weight":
                    filters.append(place)
        weight, dim = filters[0]
        shape = items[0].module.weight.shape
        originally = channels * self._originally.get(weight, list(shape))[dim] // shape[dim]
        self.groups.append(ChannelGroup(name, layers, channels, blocks, shrinks, tuple(filters), originally))
        self._roots[name], self._items[name] = (items[0].module, group[0].dep.handler), items
        if any(_counts_channels(entry.dep.target) for entry in group):
            self._incomparable.add(name)

    def _item(self, entry: Any) -> _Item:
        target, handler = entry.dep.target, entry.dep.handler
        own = self._graph.get_pruner_of_module(target.module)
        makes = handler == own.prune_out_channels or handler.__name__ == "prune_out_channels"
        name = self._names.get(target.module, "")
        if isinstance(target.module, nn.Parameter):
            name = plain_name(self._graph._param_to_name.get(target.module, ""))
        return _Item(
            target.module,
            name,
            handler,
            target.pruning_dim,
            makes,
            torch.tensor(list(entry.idxs)),
            torch.tensor([-1 if root is None else root for root in entry.root_idxs]),
        )

    def _reason(self, group: Any, items: Sequence[_Item], layers: Sequence[str]) -> str | None:
        """Why a group stays as it is; None if its channels may go."""
        for entry, item in zip(group, items, strict=True):
            node = entry.dep.target
            if item.makes and (node.grad_fn in self._returned or node.module in self._returned or _is_output(node)):
                return OUTPUT
        for item in items:
            for name, cause in self._fixed.items():
                if item.name == name or item.name.startswith(f"{name}."):
                    return f"reaches '{name}', {cause}"
        if any(_is_attention(entry.dep.target) for entry in group):
            return ATTENTION
        others = [name for name in layers if name not in self._selected]
        if len(others) == len(layers):
            return "is not selected"
        if others:
            return f"can only go together with {listing(others)}, which is not selected"
        return None

    def _blocks(self, group: Any, items: Sequence[_Item]) -> tuple[int, str | None]:
        """Into how many blocks the channels fall, or what is in the way."""
        root = items[0]
        channels = int(root.roots.max()) + 1
        first = self._graph.get_pruning_group(root.module, group[0].dep.handler, [0])
        together = sorted({index for entry in first for index in entry.idxs if entry.dep.target.module is root.module})
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

    def _reaches_past(self, item: _Item) -> bool:
        """Whether the library means channels that a layer has not."""
        pruner = self._graph.get_pruner_of_module(item.module)
        pruner.pruning_dim = item.dimension
        channels = pruner.get_out_channels(item.module) if item.makes else pruner.get_in_channels(item.module)
        return channels is not None and len(item.indices) > 0 and int(item.indices.max()) >= int(channels)

    def _effects(self, item: _Item, channels: int, blocks: int) -> dict[Place, int]:
        """By how much each tensor is shorter if one position goes, along which dimension."""
        if not (
            isinstance(item.module, nn.Parameter) or (item.name in self._names.values() and _has_tensors(item.module))
        ):
            return {}
        gone = item.roots % (channels // blocks) == 0
        indices = sorted(set(item.indices[gone].tolist()))
        empty = _empty_copy(item.module)
        before = _shapes(empty)
        owner = getattr(item.handler, "__self__", None)
        if owner is not None:
            owner.pruning_dim = item.dimension
        cut = item.handler(empty, indices)  # a parameter is made anew; a layer is changed, and need not be returned
        after = _shapes(cut if isinstance(empty, nn.Parameter) else empty)
        found = {}
        for name, shape in before.items():
            for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)):
                if old != new:
                    found[f"{item.name}.{name}" if name and item.name else item.name or name, dim] = old - new
        return found


class _WithoutMetrics:
    """A module as the library reads it: metrics, whose comparisons are metrics again, would be taken for any layer."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root, name)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All but metrics."""
        return ((name, part) for name, part in self._root.named_modules() if not is_metric(part))

    def modules(self) -> Iterator[nn.Module]:
        """All but metrics."""
        return (part for _, part in self.named_modules())


def _pruners(library: Any) -> dict[type[nn.Module], Any]:
    """How layers are cut that the library does not know, or not wholly."""
    functions = library.pruner.function
    base: Any = functions.BasePruningFunc

    class RMSNormPruner(base):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.RMSNorm, idxs: Sequence[int]) -> nn.RMSNorm:
            kept = [index for index in range(layer.normalized_shape[-1]) if index not in set(idxs)]
            if layer.weight is not None:
                layer.weight = self._prune_parameter_and_grad(layer.weight, kept, layer.weight.ndim - 1)
            layer.normalized_shape = (*layer.normalized_shape[:-1], len(kept))
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.RMSNorm) -> int:
            return layer.normalized_shape[-1]

        get_in_channels = get_out_channels

    instance_norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # which may have statistics
    return {nn.RMSNorm: RMSNormPruner(), **dict.fromkeys(instance_norms, functions.BatchnormPruner())}


def _maps(root: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters of the user's own over channels and places, (1, C, ...): the library would take the last dimension."""
    return [
        (leaf, 1)
        for part in root.modules()
        if not type(part).__module__.startswith("torch.nn")
        for leaf in part._parameters.values()
        if leaf is not None and leaf.ndim >= 4 and leaf.shape[0] == 1 and leaf.shape[1] > 1
    ]


def _is_output(node: Any) -> bool:
    return type(node.module).__name__ == "_OutputOp"


def _is_attention(node: Any) -> bool:
    function = getattr(node.grad_fn, "name", str)()
    products = ("ScaledDotProduct", "Bmm", "Baddbmm")  # of activations with one another
    return isinstance(node.module, nn.MultiheadAttention) or any(kind in function for kind in products)


def _counts_channels(node: Any) -> bool:
    """Whether an operation sees channels that are zero: a mean over them, say."""
    function = getattr(node.grad_fn, "name", str)()
    if function.startswith(OVER_CHANNELS):
        rank = len(getattr(node.grad_fn, "_saved_result", torch.empty(0)).shape)
        dim = getattr(node.grad_fn, "_saved_dim", None)
        return rank < 4 or not isinstance(dim, int) or (dim - (1 << 64) if dim >= 1 << 63 else dim) % rank == 1
    if function.startswith("Mean"):  # over the positions of an image it does not
        dims = getattr(node.grad_fn, "_saved_dim", None)
        rank = len(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
        over = {int(dim) - (1 << 64) if int(dim) >= 1 << 63 else int(dim) for dim in dims or ()}
        return not over or any(dim % rank == (1 if rank > 3 else rank - 1) for dim in over) if rank else True
    return False


def _channel_groups(item: _Item) -> int:
    """Into how many groups a layer's channels fall."""
    module = item.module
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, _ConvNd) and not module.groups == module.out_channels == module.in_channels:
        return module.groups
    return 1


def _is_even(item: _Item, channels: int) -> bool:
    """Whether each channel of the group has as many of the layer's."""
    counts = Counter(item.roots.tolist())
    return len(counts) <= channels and len(set(counts.values())) == 1 and (-1 not in counts)


def _aligned(rows: Tensor, item: _Item) -> Tensor:
    """The rows of a layer in the order of the channels of the group."""
    order = item.roots.argsort(stable=True)
    chosen = rows[item.indices[order].to(rows.device)]
    return chosen.reshape(int(item.roots.max()) + 1, -1)


def _has_tensors(module: Any) -> bool:
    return bool(module._parameters or module._buffers)


def _empty_copy(module: Any) -> Any:
    """A layer, or a parameter, with shapes and without contents."""
    if isinstance(module, nn.Parameter):
        return nn.Parameter(torch.empty_like(module, device="meta"))
    empty = copy.copy(module)
    empty._parameters = {
        name: None if own is None else nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=False)
        for name, own in module._parameters.items()
    }
    empty._buffers = {
        name: None if own is None else torch.empty_like(own, device="meta") for name, own in module._buffers.items()
    }
    return empty


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(module, Tensor):
        return {"": tuple(module.shape)}
    tensors = {**module._parameters, **module._buffers}
    return {name: tuple(own.shape) for name, own in tensors.items() if own is not None}


def _number_entries_(root: nn.Module) -> None:
    """Let each tensor hold the numbers of its own entries, in main memory."""
    for value in {id(own): own for own in tensors_of(root).values()}.values():
        exact = torch.float32 if value.numel() <= 1 << 24 else torch.float64
        value.data = torch.arange(value.numel(), dtype=exact).reshape(value.shape)
        value.grad = None


def _kept(name: str, value: Tensor, shape: Sequence[int]) -> dict[int, list[int]]:
    """Which indices of each dimension the numbers of the entries that are left are of."""
    numbers = value.detach().to(torch.int64)
    expected = torch.zeros((), dtype=torch.int64)
    kept, stride = {}, 1
    for dim in reversed(range(len(shape))):
        start = [0] * len(shape)
        line = numbers[tuple(slice(None) if own == dim else start[own] for own in range(len(shape)))]
        indices = line // stride % shape[dim]
        expected = expected + (indices * stride).reshape([-1 if own == dim else 1 for own in range(len(shape))])
        if len(indices) != shape[dim]:
            kept[dim] = indices.tolist()
        stride *= shape[dim]
    if not torch.equal(numbers, expected.expand_as(numbers)):
        raise StructureError(f"'{name}' would be cut in a way that is not whole channels")
    return dict(sorted(kept.items()))

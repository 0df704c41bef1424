"""The graph of channels of a network, as Torch-Pruning sees it on a copy: what it finds, and how it cuts.

Fang et al., "DepGraph: Towards any structural pruning", CVPR 2023, arXiv:2301.12900. All that is known of the library's
insides is in this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_compress.mechanisms.budgets import Place
from lightning_compress.mechanisms.extras import install_line
from lightning_compress.mechanisms.selection import is_metric, plain_name
from lightning_compress.mechanisms.shrinking import Kept, tensors_of
from lightning_compress.mechanisms.tree import named_tensors

LAYERS = (_ConvNd, nn.Linear)
"""What has filters."""

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
        raise ImportError(f"structured pruning needs torch-pruning: {install_line('structured')}") from error
    return torch_pruning


@dataclass(frozen=True)
class Item:
    """What happens to one module, or bare parameter, when channels of a group go.

    Attributes:
        module: The layer, the parameter, or an operation as the library has it.
        name: Its dotted name; "" for an operation.
        handler: How the library cuts it.
        dimension: Of a parameter, along which.
        makes: Whether the channels are its output's.
        indices: Its own channels, and
        roots: for each of them the channel of the group that it goes with; -1 where the library does not know.
        returned: Whether it makes what must keep its shape.
        attention: Whether it is attention, or multiplies activations with one another.
        counts: Whether it sees channels that are zero otherwise than those that are gone.
    """

    module: Any
    name: str
    handler: Callable[..., Any]
    dimension: int
    makes: bool
    indices: Tensor
    roots: Tensor
    returned: bool
    attention: bool
    counts: bool


class ChannelGraph:
    """The graph of a copy of a network.

    Args:
        root: A copy that nobody needs: what its names are relative to. In the mode in which it is to be traced.
        run: Calls the network within it once, with gradients, and gives back what it returns.
        outputs: From what ``run`` returned to what must keep its shape.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        StructureError: If the network does not run, or the library cannot follow it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = ChannelGraph(network, lambda net: net(torch.ones(1, 3, 4, 4)))
        >>> [(item.name, item.makes) for item in graph.group(network[0]) if item.name]
        [('0', True), ('2', False)]
    """

    def __init__(
        self,
        root: nn.Module,
        run: Callable[[nn.Module], Any],
        outputs: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._library = require_torch_pruning()
        self._root = root
        self._names = {part: plain_name(name) for name, part in reversed(list(root.named_modules()))}
        self._graph = self._library.DependencyGraph()
        self._returned: set[Any] = set()  # what the outputs were computed by: functions of autograd, and modules
        self._trace(run, outputs)

    def layers(self) -> dict[str, nn.Module]:
        """The layers with filters that the network calls, by name."""
        return {self._names.get(part, ""): part for part in self._graph.module2node if isinstance(part, LAYERS)}

    def group(self, layer: nn.Module, channels: Sequence[int] | None = None) -> list[Item]:
        """What happens to whom when output channels of a layer go.

        Args:
            layer: One of :meth:`layers`.
            channels: Which; None: all.

        Returns:
            One entry for each module, parameter or operation that takes part, the layer first.
        """
        pruner = self._graph.get_pruner_of_module(layer)
        every = list(range(pruner.get_out_channels(layer))) if channels is None else list(channels)
        group = self._graph.get_pruning_group(layer, pruner.prune_out_channels, every)
        return [self._item(entry) for entry in group]

    def channels(self, item: Item) -> int | None:
        """How many channels a layer has on the side that the item means; None where the library does not say."""
        pruner = self._graph.get_pruner_of_module(item.module)
        pruner.pruning_dim = item.dimension
        count = pruner.get_out_channels(item.module) if item.makes else pruner.get_in_channels(item.module)
        return None if count is None else int(count)

    def effect(self, item: Item, indices: Sequence[int]) -> dict[Place, int]:
        """By how much each tensor of a layer is shorter without some channels, along which dimension.

        Args:
            item: From :meth:`group`.
            indices: Channels of its own.

        Returns:
            Places and numbers; empty for what has no tensors.
        """
        bare = isinstance(item.module, nn.Parameter)
        if not (bare or (item.name in self._names.values() and bool(item.module._parameters or item.module._buffers))):
            return {}
        empty = _empty_copy(item.module)
        before = _shapes(empty)
        owner = getattr(item.handler, "__self__", None)
        if owner is not None:
            owner.pruning_dim = item.dimension
        cut = item.handler(empty, list(indices))  # a parameter is made anew; a layer changes, and need not be returned
        after = _shapes(cut if bare else empty)
        found = {}
        for name, shape in before.items():
            for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)):
                if old != new:
                    found[f"{item.name}.{name}" if name and item.name else item.name or name, dim] = old - new
        return found

    def cut(self, layers: Sequence[tuple[nn.Module, Sequence[int]]]) -> tuple[dict[str, Kept], dict[str, list[int]]]:
        """Cut the copy, which is of no use afterwards.

        Args:
            layers: Layers, each with the output channels that go.

        Returns:
            For each tensor that is shorter, by name: what stays of each dimension, and its shape before.

        Raises:
            StructureError: If the library cannot cut a layer.
        """
        shapes = {name: list(value.shape) for name, value in tensors_of(self._root).items()}
        _number_entries_(self._root)
        for layer, channels in layers:
            handler = self._graph.get_pruner_of_module(layer).prune_out_channels
            try:
                with torch.no_grad():
                    self._graph.get_pruning_group(layer, handler, list(channels)).prune()
            except Exception as error:  # the library raises whatever its operations lead to
                name = self._names.get(layer, "")
                raise StructureError(
                    f"the channels of '{name}' cannot be taken away: {type(error).__name__}: {error}; leave them with "
                    f"exclude=['{name}']"
                ) from error
        tensors = tensors_of(self._root).items()
        kept = {name: _kept(name, own, shapes[name]) for name, own in tensors if list(own.shape) != shapes[name]}
        return kept, {name: shapes[name] for name in kept}

    def release(self) -> None:
        """Let go of the activations of the batch, which the entries of the graph hold, and each other."""
        for node in self._graph.module2node.values():
            for entries in (node.inputs, node.outputs, node.dependencies):
                entries.clear()
            node.grad_fn = None
        self._graph.module2node.clear()
        self._returned.clear()

    # Private

    def _trace(self, run: Callable[[nn.Module], Any], outputs: Callable[[Any], Any]) -> None:
        flags = [(part, part.training) for part in self._root.modules()]
        by: dict[Any, set[nn.Module]] = {}
        calls: list[list[Tensor]] = []
        hooks = []

        def note(module: nn.Module, _: Any, returned: Any) -> None:
            calls.append([tensor for _, tensor in named_tensors(returned)])
            for tensor in calls[-1]:
                by.setdefault(tensor.grad_fn, set()).add(module)

        def forward(*unused: Any) -> Any:
            for part, training in flags:
                part.training = training  # the library calls eval(), which hides what is only there in training
            with _Once():
                returned = run(self._root)
            traced = [tensor for _, tensor in named_tensors(returned) if tensor.grad_fn is not None]
            ends = _dead_ends(calls, traced)  # the layers that made them run all the same
            for tensor in [*(tensor for _, tensor in named_tensors(outputs(returned))), *ends]:
                self._returned |= {tensor.grad_fn, *by.get(tensor.grad_fn, ())}
            if not traced:
                raise StructureError(
                    f"the network returns no tensor that a gradient could come to, but {type(returned).__name__}, so "
                    "its structure cannot be told"
                )
            return [*traced, *ends]

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

    def _item(self, entry: Any) -> Item:
        node, handler = entry.dep.target, entry.dep.handler
        pruner = self._graph.get_pruner_of_module(node.module)
        makes = handler == pruner.prune_out_channels or handler.__name__ == "prune_out_channels"
        name = self._names.get(node.module, "")
        if isinstance(node.module, nn.Parameter):
            name = plain_name(self._graph._param_to_name.get(node.module, ""))
        returned = node.grad_fn in self._returned or node.module in self._returned
        return Item(
            node.module,
            name,
            handler,
            node.pruning_dim,
            makes,
            torch.tensor(list(entry.idxs)),
            torch.tensor([-1 if root is None else root for root in entry.root_idxs]),
            makes and (returned or type(node.module).__name__ == "_OutputOp"),
            _is_attention(node),
            _counts_channels(node),
        )


class _Once(TorchFunctionMode):
    """Gradients that are differentiated again are refused: their graph is not that of the network."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad and (kwargs or {}).get("create_graph", len(args) > 4 and args[4]):
            raise StructureError(
                "what is computed is differentiated on the way (torch.autograd.grad with create_graph=True), so its "
                "structure cannot be told; PruningCallback, which leaves shapes as they are, works for any network"
            )
        return func(*args, **(kwargs or {}))


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


def _dead_ends(calls: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]) -> list[Tensor]:
    """What those calls returned that carry a gradient, and from which none of the outputs was computed."""
    waiting, reached = [tensor.grad_fn for tensor in outputs], set[Any]()
    while waiting:
        function = waiting.pop()
        if function is not None and function not in reached:
            reached.add(function)
            waiting += [earlier for earlier, _ in function.next_functions]
    dead = [returned for returned in calls if reached.isdisjoint(tensor.grad_fn for tensor in returned)]
    return [tensor for returned in dead for tensor in returned if tensor.grad_fn is not None]


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


def _kept(name: str, value: Tensor, shape: Sequence[int]) -> Kept:
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

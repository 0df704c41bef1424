"""The layers that are measured one by one, and what a look at one batch of the validation tells of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.tree import leaves
from lightning_compress.mechanisms.weights import select_weights
from lightning_compress.report.measure import macs_by_layer


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: Dotted name in the LightningModule.
        type: Its class.
        weights: Names of its weights that are measured.
        parameters: Elements of these.
        macs: Multiply-accumulates of one sample; None where they were not seen.
        norm: Name of the batch norm that takes its output; None: there is none.
        methods: What can be done to it.
    """

    name: str
    type: str
    weights: tuple[str, ...]
    parameters: int
    macs: int | None = None
    norm: str | None = None
    methods: tuple[str, ...] = ()


def find_layers(
    module: nn.Module, run: Callable[[], object], layers: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[Layer]:
    """The selected layers of a module.

    Args:
        module: The LightningModule.
        run: Runs it on one batch.
        layers: Selectors; None: all convolutions and linear layers.
        exclude: Selectors of what is left alone.

    Returns:
        In the order of ``named_modules``; a weight that several layers share once.

    Raises:
        ValueError: If a selector matches nothing, or a layer computes its weight.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> for layer in find_layers(net, lambda: net(torch.zeros(5, 4)), None, None):
        ...     print(layer.name, layer.parameters, layer.macs, layer.methods)
        0 12 12 ('bits', 'sparsity', 'filters')
        2 6 6 ('bits', 'sparsity')
    """
    weights = select_weights(module, layers, exclude).weights
    owners: dict[str, list[str]] = {}
    for name in weights:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    modules = {plain_name(name): part for name, part in module.named_modules()}
    look = _Look({name: modules[name] for name in owners}, module)
    macs = look.run(run)
    return [
        Layer(
            name=owner,
            type=type(modules[owner]).__name__,
            weights=tuple(names),
            parameters=sum(weights[name].numel() for name in names),
            macs=macs.get(owner),
            norm=look.norms.get(owner),
            methods=_methods(modules[owner], last=owner in look.last),
        )
        for owner, names in owners.items()
    ]


def _methods(layer: nn.Module, *, last: bool) -> tuple[str, ...]:
    """Transposed convolutions have no integer kernels, and what the network gives keeps its channels."""
    if not isinstance(layer, (_ConvNd, nn.Linear)) or isinstance(layer, _ConvTransposeNd):
        return ("sparsity",)
    return ("bits", "sparsity") if last else ("bits", "sparsity", "filters")


@dataclass
class _Look:
    """Watches one batch."""

    layers: dict[str, nn.Module]
    module: nn.Module
    norms: dict[str, str] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    """Layers whose output is what a network gives."""
    samples: dict[str, int] = field(default_factory=dict)
    """How many each layer was given."""
    _made: list[tuple[str, Tensor]] = field(default_factory=list)
    """Layer and output, kept so that no other tensor takes its place."""
    _depth: int = 0

    def run(self, run: Callable[[], object]) -> dict[str, int]:
        """Run a batch; the multiply-accumulates of each layer, of one sample."""
        names = {id(part): name for name, part in self.layers.items()}
        with ExitStack() as stack:
            for own_name, part in self.module.named_modules():
                if next(part.parameters(), None) is None:
                    continue
                stack.callback(part.register_forward_pre_hook(self._enter).remove)
                if id(part) in names:
                    stack.callback(part.register_forward_hook(self._maker(names[id(part)])).remove)
                if isinstance(part, _BatchNorm):
                    stack.callback(part.register_forward_pre_hook(self._taker(plain_name(own_name))).remove)
                stack.callback(part.register_forward_hook(self._leave).remove)
            counted = {plain_name(name): count for name, count in macs_by_layer(self.module, run).items()}
        self._made.clear()
        first = next((count for count in self.samples.values() if count), 1)
        return {name: counted[name] // first for name in self.layers if name in counted}

    def _enter(self, part: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            given = {id(value) for _, value in leaves(output)}
            self.last |= {name for name, value in self._made if id(value) in given}

    def _maker(self, name: str) -> Callable[..., None]:
        def made(part: nn.Module, args: Any, output: Any) -> None:
            self._made += [(name, output)] if isinstance(output, Tensor) else []
            seen = args[0].shape[0] if args and isinstance(args[0], Tensor) and args[0].ndim else 0
            self.samples[name] = self.samples.get(name, 0) + seen

        return made

    def _taker(self, norm: str) -> Callable[..., None]:
        def took(part: nn.Module, args: Any) -> None:
            for name, value in self._made:
                if args and value is args[0]:
                    self.norms[name] = norm

        return took

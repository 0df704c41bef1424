"""What each choice costs, by method: known before anything is measured, so an impossible budget is told at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.commands.exits import UsageError
from lightning_compress.commands.sensitivity.budgets import Budget, shown_amount
from lightning_compress.commands.sensitivity.coupling import Coupling
from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.commands.sensitivity.sizes import FLOAT_BITS, GRAPH, deflated_bytes, integer_bytes, other_bytes
from lightning_compress.mechanisms.weights import named_weights


@dataclass(frozen=True)
class Costs:
    """Bytes, or multiply-accumulates.

    Attributes:
        whole: Of the network as it is, by which a share is meant.
        fixed: What no choice changes.
        plain: Of each layer as it is.
        levels: Of each layer at each level.
        what: What ``whole`` is, in words.
        coupling: Of filters, what can only go together; None: not known.
    """

    whole: int
    fixed: int
    plain: Mapping[str, int]
    levels: Mapping[str, Mapping[float, int]]
    what: str
    coupling: Coupling | None = None

    @property
    def smallest(self) -> int:
        """The least that all layers together can cost."""
        if self.coupling is not None:
            highest = {name: max(own) for name, own in self.levels.items()}
            return math.ceil(self.whole * (1 - self.coupling.reach(self.coupling.groups, highest)[0]))
        return self.fixed + sum(min(self.plain[name], *own.values()) for name, own in self.levels.items())

    def check(self, budget: Budget) -> None:
        """Refuse a budget that nothing fits.

        Raises:
            UsageError: With the smallest that does.
        """
        if self.smallest > budget.limit(self.whole):
            shown = [
                shown_amount(budget.quantity, value) for value in (self.smallest, budget.limit(self.whole), self.whole)
            ]
            share = 100 * self.smallest / self.whole
            raise UsageError(
                f"--budget {budget} is {shown[1]} of {shown[2]} ({self.what}), and the smallest that these levels "
                f"reach is {shown[0]}, {share:.3g}%"
            )


def _of_bits(module: nn.Module, layers: Sequence[Layer], levels: Sequence[float]) -> Costs:
    named = named_weights(module)
    shapes = {layer.name: tuple(named[layer.weights[0]].shape) for layer in layers}
    plain = {name: integer_bytes(shape, FLOAT_BITS) for name, shape in shapes.items()}
    rest = other_bytes(module, layers)
    sizes = {name: {level: integer_bytes(shape, int(level)) for level in levels} for name, shape in shapes.items()}
    return Costs(rest + sum(plain.values()), rest, plain, sizes, "the file in fp32, about")


def _of_sparsity(module: nn.Module, layers: Sequence[Layer], levels: Sequence[float]) -> Costs:
    named = named_weights(module)
    sizes = {layer.name: deflated_bytes([named[name].detach() for name in layer.weights], levels) for layer in layers}
    whole = 4 * sum(parameter.numel() for parameter in module.parameters()) + GRAPH * len(layers)
    plain = {name: own.pop(0.0) for name, own in sizes.items()}
    fixed = whole - 4 * sum(layer.parameters for layer in layers)
    return Costs(whole, fixed, plain, sizes, "the file in fp32, about, not deflated")


def _of_filters(module: nn.Module, layers: Sequence[Layer], levels: Sequence[float]) -> Costs:
    macs = {layer.name: layer.macs or 0 for layer in layers}
    sizes = {name: {level: round(own * (1 - level)) for level in levels} for name, own in macs.items()}
    return Costs(sum(macs.values()), 0, macs, sizes, "of one sample")


MAKERS: Mapping[str, Callable[[nn.Module, Sequence[Layer], Sequence[float]], Costs]] = {
    "bits": _of_bits,
    "sparsity": _of_sparsity,
    "filters": _of_filters,
}


def costs_of(
    method: str,
    module: nn.Module,
    layers: Sequence[Layer],
    levels: Sequence[float],
    coupling: Coupling | None = None,
) -> Costs:
    """What each choice of a method costs.

    Args:
        method: A method.
        module: The LightningModule, with the weights of the checkpoint.
        layers: All layers.
        levels: Of the method.
        coupling: Of filters, what can only go together.

    Returns:
        Bytes of a file with integers ("bits"), of the deflated weights ("sparsity"), or the multiply-accumulates that a
        layer's own filters save ("filters").

    Example:
        >>> costs = costs_of("bits", nn.Linear(64, 10), [Layer("", "Linear", ("weight",), 640, methods=("bits",))], [4])
        >>> costs.whole, costs.smallest
        (3240, 1040)
    """
    able = [layer for layer in layers if method in layer.methods]
    costs = MAKERS[method](module, able, levels)
    if method != "filters":
        return costs
    rest = sum(layer.macs or 0 for layer in layers if method not in layer.methods)
    return Costs(costs.whole + rest, rest, costs.plain, costs.levels, costs.what, coupling)

"""What is done to one layer at a time: fewer bits, more zeros, or fewer filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.commands.exits import UsageError, checking
from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.functional import (
    filter_rows,
    filter_scores,
    kept_filters,
    magnitude_mask,
    mse_grid,
    nearest_grid_point,
    quantization_grid,
)
from lightning_compress.functional.quantizers import MOST_BITS, check_bits
from lightning_compress.mechanisms.selection import did_you_mean, joined
from lightning_compress.mechanisms.weights import named_weights, weights_replaced

LEVELS: Mapping[str, tuple[float, ...]] = {
    "bits": (8, 4, 3, 2),
    "sparsity": (0.5, 0.75, 0.9),
    "filters": (0.25, 0.5, 0.75),
}
"""Of each method, from the mildest on: bits of a weight, share of zeros, share of filters that go."""


@dataclass(frozen=True)
class Change:
    """One layer, changed.

    Attributes:
        method: A key of :data:`LEVELS`.
        layer: Name of the layer.
        level: How much.
    """

    method: str
    layer: str
    level: float


def parsed_levels(methods: Sequence[str], given: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The levels of each method.

    Args:
        methods: Keys of :data:`LEVELS`.
        given: Such as ``"bits=8,4"``, in the place of the usual ones.

    Returns:
        From the mildest on, each once.

    Raises:
        UsageError: If something is no method that is asked for, or no level of it.

    Example:
        >>> parsed_levels(["bits", "sparsity"], ["bits=4,8"])
        {'bits': (8, 4), 'sparsity': (0.5, 0.75, 0.9)}
    """
    levels = {method: LEVELS[method] for method in methods}
    for entry in given:
        method, _, text = entry.partition("=")
        if method not in levels:
            raise UsageError(
                f"--levels {entry}: must be METHOD=LEVEL,LEVEL with a method that is measured, one of "
                f"{', '.join(levels)}{did_you_mean(method, levels)}"
            )
        chosen = {_level(method, part, entry) for part in text.split(",")}
        levels[method] = tuple(sorted(chosen, reverse=method == "bits"))
    return levels


def _level(method: str, text: str, entry: str) -> float:
    try:
        level = int(text) if method == "bits" else float(text)
    except ValueError:
        level = -1
    if method == "bits":
        with checking(ValueError):
            return check_bits(int(level), f"a level of --levels {entry}")
    if not 0 < level < 1:
        raise UsageError(f"--levels {entry}: a level of {method} is a share between 0 and 1, got '{text}'")
    return level


def planned(layers: Sequence[Layer], levels: Mapping[str, Sequence[float]]) -> list[Change]:
    """All changes, in an order that says the most whenever it is cut short.

    Args:
        layers: The layers.
        levels: Of each method, from the mildest on.

    Returns:
        All layers at the middle level, the largest first, then at the levels beside it, and so on.

    Example:
        >>> layers = [Layer("a", "Linear", ("a.weight",), 4, methods=("bits",))]
        >>> [change.level for change in planned(layers, {"bits": (8, 4, 3, 2)})]
        [4, 8, 3, 2]
    """
    largest = sorted(layers, key=lambda layer: -layer.parameters)
    ordered = {method: _middle_out(own) for method, own in levels.items()}
    return [
        Change(method, layer.name, own[rank])
        for rank in range(max(map(len, ordered.values()), default=0))
        for method, own in ordered.items()
        if rank < len(own)
        for layer in largest
        if method in layer.methods
    ]


def _middle_out(levels: Sequence[float]) -> list[float]:
    middle = (len(levels) - 1) // 2
    return [levels[place] for place in sorted(range(len(levels)), key=lambda place: abs(place - middle))]


@contextmanager
def applied(module: nn.Module, layer: Layer, method: str, level: float) -> Iterator[float]:
    """Let one layer be changed for a while; at the end all is as it was, bit for bit.

    Args:
        module: The LightningModule.
        layer: One of its layers.
        method: One of its methods.
        level: How much.

    Yields:
        How far its weights moved: the squared difference as a share of their squares.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        >>> with applied(net, Layer("0", "Linear", ("0.weight",), 4), "sparsity", 0.5) as moved:
        ...     print(net[0].weight.tolist(), moved)
        [[0.0, 0.0], [2.0, 4.0]] 0.2
    """
    named = named_weights(module)
    weights = {name: named[name].detach() for name in layer.weights}
    if method == "bits":
        changed = {name: _rounded(weight, int(level)) for name, weight in weights.items()}
    elif method == "sparsity":
        masks = magnitude_mask(list(weights.values()), level)
        changed = {name: weights[name].masked_fill(~mask, 0.0) for name, mask in zip(weights, masks, strict=True)}
    else:
        changed = _without_filters(named, layer, level)
    squares = sum(float(weight.double().square().sum()) for weight in weights.values())
    lost = sum(float((weight - changed[name]).double().square().sum()) for name, weight in weights.items())
    with weights_replaced({name: named[name] for name in changed}, lambda name, _: changed[name]):
        yield lost / squares if squares else 0.0


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """On the grid of each output channel that ``PTQCallback`` would find."""
    find = quantization_grid if bits == MOST_BITS else mse_grid
    return nearest_grid_point(weight, find(weight, bits, axis=0), bits, axis=0)


def _without_filters(named: Mapping[str, nn.Parameter], layer: Layer, level: float) -> dict[str, Tensor]:
    """The layer's filters of the smallest norm, their biases, and what batch norm would add to them: all zero."""
    [name] = layer.weights
    scores = filter_scores(filter_rows(named[name].detach()))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[kept_filters(scores, min(round(level * len(scores)), len(scores) - 1))] = True
    channels = [joined(layer.name, "bias")]
    channels += [] if layer.norm is None else [joined(layer.norm, own) for own in ("weight", "bias")]
    changed = {own: named[own].detach() * kept for own in channels if own in named}
    weight = named[name].detach()
    return {name: weight * kept.reshape(-1, *[1] * (weight.ndim - 1)), **changed}

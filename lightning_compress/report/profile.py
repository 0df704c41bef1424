"""Pictures of the layers: which of them hold the parameters, the zeros, the bits, the filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_compress.report import units
from lightning_compress.report.drawing import FONT, PAGE, PLAIN, canvas, fitting, svg
from lightning_compress.report.figure import Mark, Panel, bars
from lightning_compress.report.table import Layer

_FEW = 12  # layers that have a line of their own each
_WIDTH, _HEIGHT = 340, 150  # pixels
_TOP, _BOTTOM = 20, 22  # pixels above and below what is drawn
_NAMED = 3  # layers that the legend names


class _Quantity(NamedTuple):
    """What is drawn of each layer."""

    title: str
    value: Callable[[Layer], float | None]
    show: Callable[[float], str]
    inner: Callable[[Layer], float | None] = lambda layer: None


_QUANTITIES = (
    _Quantity(
        "Parameters",
        lambda layer: layer.parameters,
        units.count,
        lambda layer: None if layer.parameters is None else round(layer.parameters * (1 - layer.sparsity)),
    ),
    _Quantity("Zeros", lambda layer: layer.sparsity, units.share),
    _Quantity("Bits", lambda layer: layer.bits, lambda value: f"{value:g}"),
    _Quantity("Filters", lambda layer: layer.filters, units.count),
)


def layer_panels(layers: Sequence[Layer]) -> list[Panel]:
    """Draw each quantity in which the layers differ: one line a layer for a few, a profile over the depth for many.

    Args:
        layers: In the order of the network.

    Returns:
        Up to four panels; none for fewer than two layers.

    Example:
        >>> layers = [Layer("conv", "Conv2d", 0.9, 32, 16, 144), Layer("fc", "Linear", 0.5, 32, 10, 160)]
        >>> [panel.title for panel in layer_panels(layers)]
        ['Parameters of each layer', 'Zeros of each layer', 'Filters of each layer']
    """
    drawn = []
    for quantity in _QUANTITIES:
        values = [quantity.value(layer) for layer in layers]
        if len(set(values)) > 1:
            drawn.append(_lines(layers, quantity) if len(layers) <= _FEW else _profile(layers, quantity))
    return [panel for panel in drawn if panel is not None]


def _lines(layers: Sequence[Layer], quantity: _Quantity) -> Panel | None:
    marks = []
    for layer in layers:
        value, inner = quantity.value(layer), quantity.inner(layer)
        label = units.MISSING if value is None else quantity.show(value)
        zeros = inner is not None and value is not None and inner < value
        label += f" (non-zero {quantity.show(inner)})" if zeros and inner is not None else ""
        marks.append(Mark(_name(layer), label, value, inner=inner if zeros else None))
    legend = (
        "Thin bar: what is not zero." if any(mark.inner is not None for mark in marks) else "In the network's order."
    )
    return bars(f"{quantity.title} of each layer", legend, marks, first_is_base=False)


def _profile(layers: Sequence[Layer], quantity: _Quantity) -> Panel:
    """One narrow bar a layer, in one path for all of them."""
    values = [quantity.value(layer) or 0.0 for layer in layers]
    parts = [quantity.inner(layer) for layer in layers]
    filled = [value if own is None else own for own, value in zip(parts, values, strict=True)]
    largest = max(values)
    figure, axes = canvas(_WIDTH, _HEIGHT)
    floor, scale = _HEIGHT - _BOTTOM, (_HEIGHT - _BOTTOM - _TOP) / largest
    edges = np.linspace(0, _WIDTH, len(layers) + 1)
    for heights, colour in ((values, PAGE.base), (filled, PAGE.accent)):
        axes.stairs(floor - scale * np.asarray(heights), edges, baseline=floor, fill=True, color=colour, linewidth=0)
    axes.plot([0, _WIDTH], [floor, floor], color=PAGE.base, linewidth=1)
    axes.plot([0, _WIDTH], [_TOP, _TOP], color=PAGE.track, linewidth=1, zorder=0)
    axes.text(0, _TOP - 6, quantity.show(largest), color=PAGE.muted, fontsize=FONT, **PLAIN)
    for layer, place, side in ((layers[0], 0, "left"), (layers[-1], _WIDTH, "right")):
        name = fitting(_name(layer), 0.48 * _WIDTH)
        axes.text(place, _HEIGHT - 5, name, color=PAGE.muted, fontsize=FONT, ha=side, **PLAIN)
    legend = f"{len(layers)} layers in the network's order. {_most(layers, values, quantity)}"
    if any(own < value for own, value in zip(filled, values, strict=True)):
        legend = f"Blue: what is not zero. {legend}"
    return Panel(f"{quantity.title} of each layer", legend, svg(figure, f"{quantity.title}: {legend}"))


def _most(layers: Sequence[Layer], values: Sequence[float], quantity: _Quantity) -> str:
    """The layers with the largest values in words, where they stand out."""
    order = sorted(range(len(layers)), key=lambda index: -values[index])
    if values.count(values[order[0]]) > _NAMED:
        most, least = quantity.show(values[order[0]]), quantity.show(values[order[-1]])
        return f"From {least} to {most}."
    named = [f"{_name(layers[index])} ({quantity.show(values[index])})" for index in order[:_NAMED]]
    return f"Most: {', '.join(named)}."


def _name(layer: Layer) -> str:
    return layer.name or "(the module itself)"

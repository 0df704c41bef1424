"""A picture of a quantity of each layer over the training: a row a layer, a column a stretch of steps.

Drawn with matplotlib's objects, without pyplot, so that no open figure and no chosen backend is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lightning_compress.report import units

_DPI = 110
_WIDTH = 4.6  # inches of the map
_RIGHT = 1.25  # inches beside it, for the last values and the scale
_HEAD, _FOOT = 0.42, 0.5  # inches above and below it
_ROW, _LOWEST, _HIGHEST = 0.19, 0.4, 9.0  # inches of a row, and of all of them
_CHARACTER = 0.068  # inches
_LONGEST = 40  # characters of a name
_GREY = "#555555"


@dataclass(frozen=True)
class HeatMap:
    """A quantity of layers over time.

    Attributes:
        title: What is shown.
        names: Of the layers, from the top to the bottom; at least one.
        steps: Optimizer steps at which columns begin, rising, and that at which the last one ends, shape ``(T + 1,)``.
        values: In [0, 1], shape ``(layers, T)``.
        full: Value of the strongest colour; None: the largest value there is.
    """

    title: str
    names: Sequence[str]
    steps: Sequence[int]
    values: npt.NDArray[Any]
    full: float | None = 1.0


def heat_map_picture(map_: HeatMap) -> npt.NDArray[np.uint8]:
    """Draw a heat map; beside each row its last value.

    Args:
        map_: What to draw.

    Returns:
        The picture, shape (height, width, 3), 0 to 255.

    Raises:
        ValueError: If names, steps and values do not fit together.

    Example:
        >>> values = np.array([[0.0, 0.5], [0.2, 0.9]])
        >>> heat_map_picture(HeatMap("sparsity", ["conv1.weight", "fc.weight"], [0, 10, 20], values)).shape[2]
        3
    """
    rows, columns = len(map_.names), len(map_.steps) - 1
    if rows < 1 or columns < 1 or map_.values.shape != (rows, columns):
        raise ValueError(
            f"values must be (layers, columns) with names and steps to match, got {map_.values.shape} for {rows} names "
            f"and {len(map_.steps)} steps"
        )
    labels = _labels(map_.names)
    left = 0.15 + _CHARACTER * max(6, *map(len, labels))
    tall = min(max(_ROW * rows, _LOWEST), _HIGHEST)
    width, height = left + _WIDTH + _RIGHT, _HEAD + tall + _FOOT
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, _FOOT / height, _WIDTH / width, tall / height))
    scale = Normalize(0.0, map_.full or max(float(map_.values.max()), 1e-12))
    axes.pcolormesh(map_.steps, np.arange(rows + 1), map_.values, norm=scale, cmap="viridis")
    axes.set_ylim(rows, 0)
    axes.set_xlabel("optimizer step", fontsize=7, color=_GREY)
    axes.tick_params(labelsize=7, length=2, color=_GREY)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    every = -(-rows // int(tall / (0.6 * _ROW)))  # where rows are lower than letters, not each has a name
    _write_beside(axes, labels, [units.share(float(value)) for value in map_.values[:, -1]], every)
    figure.text(left / width, 1 - 0.28 / height, map_.title, fontsize=8.5, parse_math=False)
    low = min(tall, 1.6)  # inches of the scale
    place = ((left + _WIDTH + 0.62) / width, (_FOOT + tall - low) / height, 0.1 / width, low / height)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), cax=figure.add_axes(place), format=_percent)
    bar.ax.tick_params(labelsize=6.5, length=2, color=_GREY)
    bar.ax.locator_params(nbins=max(int(low / 0.3), 1))
    bar.outline.set_visible(False)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def _write_beside(axes: Any, names: Sequence[str], values: Sequence[str], every: int) -> None:
    """Names at the left of rows and values at their right: as texts, which are drawn in half of the time of ticks."""
    for row in range(0, len(names), every):
        style = {"fontsize": 7, "va": "center", "transform": axes.transAxes, "parse_math": False}
        middle = 1 - (row + 0.5) / len(names)
        axes.text(-0.012, middle, names[row], ha="right", **style)
        axes.text(1.01, middle, values[row], **style)


def _labels(names: Sequence[str]) -> list[str]:
    """The names; without what all of them begin or end with, and of the rest the end, where they are too long."""
    if max(map(len, names)) <= _LONGEST:
        return list(names)
    parts = [name.split(".") for name in names]
    first = last = 0
    if len(names) > 1:
        shortest = min(map(len, parts))
        most = max(shortest - 2, 0)  # something is left of each
        first = next((at for at in range(most) if len({own[at] for own in parts}) > 1), most)
        most = shortest - first - 1
        last = next((at for at in range(most) if len({own[-1 - at] for own in parts}) > 1), most)
    short = [".".join(own[first : len(own) - last]) for own in parts]
    return [name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}" for name in short]


def _percent(value: float, _: Any) -> str:
    return units.share(value)

"""A picture of where weights lie between the points of their grids, at the start of a training and at its end.

Drawn with matplotlib's objects, without pyplot, so that no open figure and no chosen backend is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

BINS = 31  # odd: the middle one is what is on the grid
_COLUMNS = 5
_WIDTH, _HEIGHT = 2.0, 1.5  # inches of a panel
_HEAD = 0.45  # inches above them, for the legend
_MARGIN = 0.12  # inches left and right of what is drawn
_DPI = 110
_LONGEST = 26  # characters of a name that fit above a panel
_MOST = 60  # panels
START, END = "#9aa5b1", "#0072b2"


class LayerPositions(NamedTuple):
    """Histograms of the positions of one weight.

    Attributes:
        name: Of the weight.
        bits: Of its grid; None: zero is where its weights should end.
        start: Share of the weights in each bin when the training began, shape ``(BINS,)``.
        end: The same at its end.
    """

    name: str
    bits: int | None
    start: Tensor
    end: Tensor


def position_histogram(positions: Tensor, of: int | None = None) -> Tensor:
    """How positions are spread over the bins of the picture.

    Args:
        positions: Any shape, in [-1/2, 1/2].
        of: How many there are in all, where these are a part. None: these.

    Returns:
        Share of all in each of 31 bins, shape ``(31,)``, on the CPU.

    Example:
        >>> position_histogram(torch.tensor([0.0, 0.01, 0.5])).nonzero().flatten()
        tensor([15, 30])
    """
    counts = torch.histc(positions.detach().float().cpu(), bins=BINS, min=-0.5, max=0.5)
    return counts / (positions.numel() if of is None else of)


def positions_picture(layers: Sequence[LayerPositions]) -> npt.NDArray[np.uint8]:
    """Draw a panel a weight: in grey where its elements began, in blue where they ended.

    Args:
        layers: In the order in which they are drawn, row by row; of more than 60 the first are.

    Returns:
        The picture, shape (height, width, 3), 0 to 255.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> flat, peak = torch.full((31,), 1 / 31), torch.eye(31)[15]
        >>> positions_picture([LayerPositions("conv1.weight", 4, flat, peak)]).shape[2]
        3
    """
    if not layers:
        raise ValueError("layers must hold at least one layer")
    shown = layers[:_MOST]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width, height = _WIDTH * max(columns, 2), _HEIGHT * rows + _HEAD
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all panels, in inches: many would take seconds
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    for index, layer in enumerate(shown):
        left = index % columns * width / columns
        _draw(axes, layer, left, width / columns, height - _HEAD - _HEIGHT * (index // columns + 1))
    what = "weight / largest weight" if shown[0].bits is None else "position in the cell of the grid"
    more = "" if len(shown) == len(layers) else f" ({len(shown)} of {len(layers)} weights)"
    axes.text(_MARGIN, height - 0.3, f"{what}{more}", fontsize=8)
    axes.text(width - _MARGIN - 0.35, height - 0.3, "start", fontsize=8, color=START, ha="right")
    axes.text(width - _MARGIN, height - 0.3, "end", fontsize=8, color=END, ha="right", weight="bold")
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def _draw(axes: Any, layer: LayerPositions, left: float, width: float, bottom: float) -> None:
    """One panel, with its corner and its width in inches."""
    floor, tall = bottom + 0.3, _HEIGHT - 0.7
    edges = np.linspace(left + _MARGIN, left + width - _MARGIN, BINS + 1)
    start, end = _numbers(layer.start), _numbers(layer.end)
    unit = tall / max(start.max(), end.max(), 1e-12)
    axes.stairs(floor + start * unit, edges, baseline=floor, fill=True, color=START)
    axes.stairs(floor + end * unit, edges, baseline=floor, color=END, linewidth=1.2)
    axes.plot([edges[0], edges[-1]], [floor, floor], color="black", linewidth=0.7)
    places = (edges[0], (edges[0] + edges[-1]) / 2, edges[-1])
    for place, label in zip(places, ("-1", "0", "1") if layer.bits is None else ("-½", "0", "½"), strict=True):
        axes.text(place, floor - 0.14, label, fontsize=6, ha="center")
    name = layer.name if len(layer.name) <= _LONGEST else f"...{layer.name[-_LONGEST + 3 :]}"
    title = name if layer.bits is None else f"{name}\n{layer.bits} bits"
    axes.text(left + width / 2, floor + tall + 0.06, title, fontsize=7, ha="center", va="bottom")


def _numbers(histogram: Tensor) -> npt.NDArray[Any]:
    return np.asarray(histogram.detach().float().cpu())

"""Pictures of attention: what teacher and student look at, side by side, on the same samples.

Drawn with matplotlib's objects, without pyplot, so that no open figure and no chosen backend is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_CELL = 1.15  # inches a side
_TITLE = 0.62  # inches for the two lines above
_DPI = 110
_LONGEST = 16  # characters of a layer's name that fit above a map


class MapPair(NamedTuple):
    """The maps of one pair of layers.

    Attributes:
        student: Name of the student's layer.
        teacher: Name of the teacher's layer.
        student_maps: Shape ``(N, H, W)``, or ``(N, L)`` for tokens.
        teacher_maps: The same for the teacher; sizes may differ.
    """

    student: str
    teacher: str
    student_maps: Tensor
    teacher_maps: Tensor


def attention_picture(images: Tensor | None, pairs: Sequence[MapPair]) -> npt.NDArray[np.uint8]:
    """Draw maps of several samples: a row a sample, its image first, then teacher and student of each pair.

    Each map has its own scale, from its smallest value, dark, to its largest, bright: what is compared is where a
    network looks, not how much.

    Args:
        images: The samples, shape ``(N, C, H, W)``, or None where they are no images.
        pairs: The maps of at least one pair, of as many samples.

    Returns:
        The picture, shape (height, width, 3), 0 to 255.

    Raises:
        ValueError: If there is no pair.

    Example:
        >>> maps = torch.rand(2, 4, 4)
        >>> attention_picture(None, [MapPair("layer3", "layer4", maps, maps)]).shape[2]
        3
    """
    if not pairs:
        raise ValueError("pairs must hold at least one pair of maps")
    rows = len(pairs[0].student_maps)
    first = 0 if images is None else 1
    columns = first + 2 * len(pairs)
    figure = Figure(figsize=(_CELL * columns, _CELL * rows + _TITLE), dpi=_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    top = 1 - _TITLE / (_CELL * rows + _TITLE)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=top, wspace=0.05, hspace=0.05)
    for row in range(rows):
        if images is not None:
            _show(grid[row][0], _image(images[row]), "input" if row == 0 else "", "gray")
        for index, pair in enumerate(pairs):
            column = first + 2 * index
            titles = (f"teacher\n{_short(pair.teacher)}", f"student\n{_short(pair.student)}") if row == 0 else ("", "")
            _show(grid[row][column], _map(pair.teacher_maps[row]), titles[0], "viridis")
            _show(grid[row][column + 1], _map(pair.student_maps[row]), titles[1], "viridis")
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def _show(axes: Any, values: npt.NDArray[Any], title: str, colours: str) -> None:
    axes.imshow(values, cmap=colours, aspect="equal")  # an image with three channels has its own colours
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=8)


def _image(image: Tensor) -> npt.NDArray[Any]:
    """(C, H, W) as (H, W, 3) if there are three channels, else as the mean over them, (H, W); scaled to [0, 1]."""
    values = image.detach().float().cpu()
    values = values.permute(1, 2, 0) if len(values) == 3 else values.mean(dim=0)
    return np.asarray(_scaled(values))


def _map(values: Tensor) -> npt.NDArray[Any]:
    """(H, W) as it is; (L,) as a square where it can be one, leaving out a first token that is one too many."""
    values = values.detach().float().cpu()
    if values.ndim == 1:
        side = math.isqrt(len(values))
        if len(values) == side * side + 1:
            values = values[1:]
        values = values.reshape(side, side) if len(values) == side * side else values.reshape(1, -1)
    return np.asarray(_scaled(values))


def _scaled(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high > low, high - low, 1.0)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"...{name[-_LONGEST + 3 :]}"

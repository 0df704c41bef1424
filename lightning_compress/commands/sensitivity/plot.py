"""A picture of all losses: a row a layer, a column a level, darker where more is lost."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_compress.commands.sensitivity.findings import NAME_LENGTH, Findings, headline, loss_format, title_of
from lightning_compress.report import units

DPI = 110
ROW, COLUMN, LETTER, HEAD, FOOT = 0.22, 0.62, 0.066, 0.75, 0.25  # inches
GAP = 0.3  # between methods
UNMEASURED = "#e8e8e8"
STRETCH = 0.5
"""Exponent of the colours: small losses are to be told from none."""


def draw(findings: Findings, path: str | os.PathLike[str]) -> None:
    """Write the picture.

    Args:
        findings: What was found.
        path: A PNG file.
    """
    rows = len(findings.layers)
    columns = sum(map(len, findings.levels.values()))
    left = 0.2 + LETTER * max(len(name) for name in _names(findings))
    width = left + COLUMN * columns + GAP * len(findings.levels)
    height = HEAD + ROW * rows + FOOT
    figure = Figure(figsize=(max(width, 6.5), height), dpi=DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    losses = [findings.loss(own.method, own.layer, own.level) for own in findings.found]
    largest = max((loss for loss in losses if loss is not None and math.isfinite(loss)), default=0.0)
    norm = PowerNorm(STRETCH, vmin=0.0, vmax=largest if largest > 0 else 1.0, clip=True)
    total = figure.get_figwidth()
    for place, method in enumerate(findings.levels):
        wide = COLUMN * len(findings.levels[method])
        box = (left / total, FOOT / height, wide / total, ROW * rows / height)
        _panel(figure.add_axes(box), findings, method, norm, names=place == 0)
        left += wide + GAP
    figure.text(0.1 / total, 1 - 0.12 / height, headline(findings), fontsize=8, va="top", ha="left")
    canvas.print_png(os.fspath(path))


def _panel(axes: Any, findings: Findings, method: str, norm: PowerNorm, *, names: bool) -> None:
    levels, show = findings.levels[method], loss_format(findings)
    for row, layer in enumerate(findings.layers):
        for column, level in enumerate(levels):
            loss = findings.loss(method, layer.name, level)
            if method not in layer.methods:
                continue
            shade = 1.0 if loss is not None and math.isinf(loss) else norm(max(loss or 0.0, 0.0))
            colour = UNMEASURED if loss is None else colormaps["YlOrRd"](shade)
            axes.add_patch(_cell(column, row, colour))
            dark = loss is not None and shade > 0.65
            axes.text(column, row, show(loss), fontsize=6, ha="center", va="center", color="white" if dark else "black")
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_ylim(len(findings.layers) - 0.5, -0.5)
    axes.set_xticks(range(len(levels)), [title_of(method, level) for level in levels], fontsize=7)
    axes.xaxis.tick_top()
    shown = _names(findings)
    axes.set_yticks(np.arange(len(shown)), shown if names else [""] * len(shown), fontsize=7)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _names(findings: Findings) -> list[str]:
    return [units.shortened(layer.name or layer.type, NAME_LENGTH) for layer in findings.layers]


def _cell(column: int, row: int, colour: Any) -> Any:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8)

"""The picture of masks that change: held-out accuracy and churn over the training, mean of the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import Arm, Claim
from .store import Store
from .tables import Measured, measured

SHOWN = {"gradual": "#555555", "dpf": "#D55E00", "dcil": "#0072B2"}  # of Okabe and Ito


def draw(claim: Claim, store: Store, seeds: int, path: Path) -> bool:
    """Draw one row of panels for each part of a claim, from what has been measured; whether there is anything."""
    figure = Figure(figsize=(9.0, 3.0 * len(claim.parts)), layout="constrained")
    panels = figure.subplots(len(claim.parts), 2, squeeze=False)
    drawn = False
    for (protocol, arms), (accuracy, churn) in zip(claim.parts, panels, strict=True):
        accuracy.set_title(f"{protocol.title}: accuracy on held-out images, %", fontsize=10)
        churn.set_title("churn: weights that an update moves, per mille", fontsize=10)
        accuracy.set(xlabel="step")
        churn.set(xlabel="step", yscale="log")
        for arm in arms:
            row = measured(protocol, arm, store, seeds) if arm.name in SHOWN else None
            if row is not None:
                drawn = True
                _curves(accuracy, arm, row)
                _line(churn, arm, row, "churn_curve", 1, 1000.0, "-", arm.title)
        for panel in (accuracy, churn):
            panel.grid(visible=True, alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            if panel.lines:
                panel.legend(frameon=False, fontsize=7)
    if drawn:
        figure.savefig(path, dpi=120)
    return drawn


def _curves(panel: Axes, arm: Arm, row: Measured) -> None:
    _line(panel, arm, row, "curve", 1, 100.0, "-", arm.title)
    _line(panel, arm, row, "curve", 2, 100.0, ":", f"{arm.title}, statistics re-estimated")


def _line(panel: Axes, arm: Arm, row: Measured, curve: str, entry: int, factor: float, style: str, label: str) -> None:
    by_seed: list[Sequence[Sequence[float]]] = [result[curve] for result in row.results.values()]
    steps = [point[0] for point in by_seed[0]]
    means = [factor * statistics.mean(points[index][entry] for points in by_seed) for index in range(len(steps))]
    panel.plot(steps, means, style, color=SHOWN[arm.name], label=label, linewidth=1.3)

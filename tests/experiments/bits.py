"""The picture of few bits: test accuracy after rounding and at full precision, mean and interval of the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import FULL, LARGE_STEPS, PSGD, Arm, Claim
from .store import Store
from .tables import Measured, measured, t_interval

# Of Okabe and Ito. Of several arms the one that the held-out images prefer.
LINES: tuple[tuple[str, str, str, str], ...] = (
    ("SGD", "plain", "#555555", "o"),
    ("SGD, larger steps", "large", "#E69F00", "s"),
    ("PSGD", "psgd", "#0072B2", "D"),
    ("PSGD, permuted", "permuted", "#D55E00", "^"),
)
SHIFT = 0.09  # between the lines, that their intervals do not cover each other


def draw(claim: Claim, store: Store, seeds: int, path: Path) -> bool:
    """Draw accuracies against bits, from what has been measured; whether there is anything."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    panel = figure.subplots()
    places: list[str] = []
    drawn = False
    parts = sorted(claim.parts, key=lambda part: part[0].bits or FULL)
    for place, (protocol, arms) in enumerate(parts):
        places.append("full precision" if protocol.bits == FULL else f"{protocol.bits} bits")
        for index, (label, kind, colour, marker) in enumerate(LINES):
            rows = [row for arm in arms if kind_of(arm) == kind and (row := measured(protocol, arm, store, seeds))]
            if rows:
                drawn = True
                best = max(rows, key=lambda row: row.mean("held_out_accuracy"))
                at = place + SHIFT * (index - (len(LINES) - 1) / 2)
                _point(panel, at, best, "test_accuracy", colour, marker, label=label)
                if protocol.bits != FULL:
                    _point(panel, at, best, "test_accuracy_full", colour, marker, hollow=True)
    panel.set_xticks(range(len(places)), places)
    panel.set_xlim(-0.4, len(places) - 0.6)
    panel.set_ylabel("test accuracy, %")
    panel.set_title("Weights rounded on the fly (filled); the same networks at full precision (hollow)", fontsize=10)
    panel.grid(visible=True, axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    panel.legend(handles.values(), handles.keys(), frameon=False, loc="lower right")
    if drawn:
        figure.savefig(path, dpi=120)
    return drawn


def kind_of(arm: Arm) -> str:
    """Which line an arm belongs to."""
    if arm in LARGE_STEPS:
        return "large"
    return "psgd" if arm in PSGD else arm.technique


def _point(
    panel: Axes,
    at: float,
    row: Measured,
    quantity: str,
    colour: str,
    marker: str,
    *,
    hollow: bool = False,
    label: str = "",
) -> None:
    values: Sequence[float] = [100 * value for value in row.values(quantity)]
    mean, low, high = t_interval(values)
    face = "white" if hollow else colour
    bars = [[mean - low], [high - mean]] if len(values) > 1 and not hollow else None
    panel.errorbar(at, mean, bars, fmt=marker, color=colour, markerfacecolor=face, capsize=3, label=label or None)

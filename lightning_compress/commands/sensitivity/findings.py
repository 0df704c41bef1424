"""What was found: the loss of each layer at each level, as a table, as Markdown, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from lightning_compress import __version__
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.journal import Measurement
from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.commands.sensitivity.metrics import Metric
from lightning_compress.report import units
from lightning_compress.report.render import escaped, fitting

SCHEMA = 1
NAME_LENGTH = 60
"""Characters of a layer's name, where longer ones are shortened."""
TITLES = {"bits": "{:g} bits", "sparsity": "{:.3g}% zero", "filters": "{:.3g}% gone"}


@dataclass(frozen=True)
class Findings:
    """The measurements of one checkpoint.

    Attributes:
        layers: The layers.
        levels: Of each method, from the mildest on.
        metric: By which they are judged.
        plain: The metrics of the unchanged network.
        found: What was measured.
        total: How many changes there are to measure.
    """

    layers: Sequence[Layer]
    levels: Mapping[str, Sequence[float]]
    metric: Metric
    plain: Mapping[str, float]
    found: Mapping[Change, Measurement]
    total: int

    def loss(self, method: str, layer: str, level: float) -> float | None:
        """By how much the metric is worse with one change; None: not measured; infinite: it was no number."""
        measured = self.found.get(Change(method, layer, level))
        if measured is None:
            return None
        return self.metric.loss(self.plain[self.metric.name], measured.metrics.get(self.metric.name, math.nan))

    def losses(self, method: str, layer: str) -> dict[float, float]:
        """The losses of one layer that are known, from the mildest level on."""
        known = {level: self.loss(method, layer, level) for level in self.levels[method]}
        return {level: loss for level, loss in known.items() if loss is not None}


def title_of(method: str, level: float) -> str:
    """The heading of a column.

    Example:
        >>> title_of("bits", 4), title_of("sparsity", 0.9), title_of("filters", 0.25)
        ('4 bits', '90% zero', '25% gone')
    """
    return TITLES[method].format(level if method == "bits" else 100 * level)


def tables(findings: Findings, *, name_length: int | None = None) -> dict[str, list[list[str]]]:
    """A table for each method: layer, parameters, MACs, and the loss at each level.

    Args:
        findings: What was found.
        name_length: Longer names of layers are shortened; None: none is.

    Returns:
        Method to rows, the headings first.
    """
    show = loss_format(findings)
    found = {}
    for method, levels in findings.levels.items():
        rows = [["layer", "parameters", "MACs", *(title_of(method, level) for level in levels)]]
        for layer in findings.layers:
            if method not in layer.methods:
                continue
            name = layer.name or layer.type
            rows.append(
                [
                    name if name_length is None else units.shortened(name, name_length),
                    units.count(layer.parameters),
                    units.count(layer.macs),
                    *(show(findings.loss(method, layer.name, level)) for level in levels),
                ]
            )
        found[method] = rows
    return found


def loss_format(findings: Findings) -> Callable[[float | None], str]:
    """How losses are shown: with as many digits as the largest needs; "-" was not measured, "nan" is no number."""
    losses = [findings.loss(own.method, own.layer, own.level) for own in findings.found]
    largest = max((abs(loss) for loss in losses if loss is not None and math.isfinite(loss)), default=0.0)
    digits = min(max(3 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 4

    def shown(loss: float | None) -> str:
        if loss is None:
            return units.MISSING
        return "nan" if math.isinf(loss) else f"{round(loss, digits) + 0.0:.{digits}f}"

    return shown


def headline(findings: Findings) -> str:
    """Which metric, and what it is without any change."""
    name = findings.metric.name
    return f"{name} {units.metric(findings.plain[name])} as it is; below, how much worse it is with one layer changed"


def to_console(findings: Findings, *, width: int | None = None) -> str:
    """All tables as aligned text.

    Args:
        findings: What was found.
        width: Columns of the terminal; None: as many as it takes.

    Returns:
        Lines, each ending in a newline.
    """
    found = tables(findings, name_length=NAME_LENGTH).values()
    return "\n\n".join([headline(findings), *(fitting(rows, width, numbers="right") for rows in found)]) + "\n"


def to_markdown(findings: Findings, notes: Sequence[str]) -> str:
    """A Markdown document.

    Args:
        findings: What was found.
        notes: Sentences above the tables.

    Returns:
        Its text.
    """
    parts = [
        "# Sensitivity",
        headline(findings) + ".",
        "\n".join(f"- {note}" for note in notes),
        "![](sensitivity.png)",
    ]
    for method, rows in tables(findings).items():
        head, *body = [[escaped(entry) for entry in row] for row in rows]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        parts += [f"## {method}", "\n".join(f"| {' | '.join(row)} |" for row in lines)]
    return "\n\n".join(parts) + "\n"


def to_json(findings: Findings, suggestions: Sequence[Mapping[str, object]]) -> str:
    """All numbers.

    Args:
        findings: What was found.
        suggestions: What is suggested.

    Returns:
        JSON; a loss that was no number is null.
    """
    layers = []
    for layer in findings.layers:
        losses = {
            method: {f"{level:g}": _finite(loss) for level, loss in findings.losses(method, layer.name).items()}
            for method in findings.levels
            if method in layer.methods
        }
        layers.append({**asdict(layer), "losses": losses})
    content = {
        "schema": SCHEMA,
        "version": __version__,
        "metric": findings.metric.name,
        "mode": findings.metric.mode,
        "plain": {name: _finite(value) for name, value in findings.plain.items()},
        "measured": len(findings.found),
        "planned": findings.total,
        "layers": layers,
        "suggestions": list(suggestions),
    }
    return json.dumps(content, indent=2) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

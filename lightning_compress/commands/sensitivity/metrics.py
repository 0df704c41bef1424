"""The metric by which a change is judged: which one, and in which direction it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_compress.commands.exits import UsageError
from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.mechanisms.selection import did_you_mean, listing
from lightning_compress.report.directions import direction, preferred


@dataclass(frozen=True)
class Metric:
    """A metric of the validation.

    Attributes:
        name: As it is logged.
        mode: "max": higher is better; "min": lower.
        said: How both were found, in words.
    """

    name: str
    mode: str
    said: str = ""

    def loss(self, plain: float, value: float) -> float:
        """By how much a value is worse than the plain network's; infinite for what is no number.

        Example:
            >>> round(Metric("val_acc", "max").loss(0.9, 0.8), 6), Metric("val_loss", "min").loss(1.0, 1.5)
            (0.1, 0.5)
        """
        worse = plain - value if self.mode == "max" else value - plain
        return math.inf if math.isnan(worse) else worse


def choose_metric(metrics: Mapping[str, float], name: str | None = None, mode: str | None = None) -> Metric:
    """The metric to judge by.

    Args:
        metrics: What the validation gave.
        name: The user's; None: the first that is higher when it is better, such as an accuracy, else the first loss.
        mode: The user's; None: by the name.

    Returns:
        The metric.

    Raises:
        UsageError: If there is no such metric, or its direction cannot be told.

    Example:
        >>> choose_metric({"val_loss": 0.3, "val_acc": 0.9}).name
        'val_acc'
    """
    if not metrics:
        raise UsageError("the validation logs no metric, so there is nothing to judge by; let validation_step log one")
    wanted = None if name is None else logged_as(name, metrics)
    if name is not None and wanted is None:
        raise UsageError(
            f"--metric '{name}' is not among the metrics of the validation, {listing(list(metrics))}"
            f"{did_you_mean(name, metrics)}"
        )
    chosen = preferred(metrics) if wanted is None else wanted
    way = mode or direction(chosen)
    if way is None:
        raise UsageError(
            f"whether '{chosen}' is better when it is higher cannot be told by its name: give --mode min|max"
        )
    value = metrics[chosen]
    if not math.isfinite(value):
        raise UsageError(f"'{chosen}' of the checkpoint is {value}, before anything was changed; give another --metric")
    better = "higher" if way == "max" else "lower"
    others = (
        []
        if name is not None or len(metrics) == 1
        else [f"others: {listing([own for own in metrics if own != chosen])}"]
    )
    return Metric(chosen, way, "; ".join([f"'{chosen}', {better} is better", *others]))

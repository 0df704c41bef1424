"""What a run says of itself: its recipe, versions and callbacks, and which metrics are better when they are higher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_compress.report.compare import versions
from lightning_compress.report.directions import Mode, direction


def goals(callbacks: Iterable[Any]) -> dict[str, Mode]:
    """The metrics that the callbacks of a Trainer judge by, and which way.

    Args:
        callbacks: All of them: what has ``monitor`` and ``mode`` says it itself, ``metric`` goes by its name, if that
            tells.

    Returns:
        Name to "max" or "min".

    Example:
        >>> from types import SimpleNamespace
        >>> goals([SimpleNamespace(metric="val_acc"), SimpleNamespace(monitor="val_loss", mode="min")])
        {'val_acc': 'max', 'val_loss': 'min'}
    """
    callbacks = list(callbacks)
    named = [metric for callback in callbacks if isinstance(metric := getattr(callback, "metric", None), str)]
    found = {metric: way for metric in named if (way := direction(metric)) is not None}
    for callback in callbacks:
        metric, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(metric, str) and mode in ("max", "min"):
            found[metric] = mode
    return found


def recipe_of(callbacks: Iterable[Any]) -> Mapping[str, Any] | None:
    """The recipe that attached callbacks, where one did.

    Args:
        callbacks: Of this package.

    Example:
        >>> recipe_of([]) is None
        True
    """
    return next((found for own in callbacks if (found := getattr(own, "recipe", None)) is not None), None)


def run_settings(callbacks: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is logged as the configuration of a run, below ``compress``.

    Args:
        callbacks: Class and arguments of each, as primitives, by its name.
        recipe: That attached them, or None.

    Returns:
        The same, with the versions.

    Example:
        >>> sorted(run_settings({"kd": {"class": "DistillationCallback", "temperature": 4.0}}, None))
        ['callbacks', 'versions']
    """
    found: dict[str, Any] = {"versions": versions(), "callbacks": {name: dict(own) for name, own in callbacks.items()}}
    return found if recipe is None else {**found, "recipe": dict(recipe)}

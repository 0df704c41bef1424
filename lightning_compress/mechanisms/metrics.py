"""Names of metrics, as a validation gives them."""

from __future__ import annotations

from collections.abc import Collection


def logged_as(name: str, known: Collection[str]) -> str | None:
    """Under which name a validation gives a metric.

    What a step logs with ``on_step=True, on_epoch=True`` can be monitored as ``val_acc``, and a validation gives it as
    ``val_acc_epoch``.

    Args:
        name: As the user calls it.
        known: The names that the validation gives.

    Returns:
        One of them; None if the metric is none of them.

    Example:
        >>> logged_as("acc/dataloader_idx_1", ["loss", "acc_epoch/dataloader_idx_1"]), logged_as("f1", ["loss"])
        ('acc_epoch/dataloader_idx_1', None)
    """
    metric, of, loader = name.partition("/dataloader_idx_")
    return next((own for own in (name, f"{metric}_epoch{of}{loader}") if own in known), None)

"""Divergence: the loss leaves its start by far, as it may where the steps of few bits learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW = 20
"""Batches over which the loss is averaged."""
SMALL = 0.1
"""A loss that was smaller counts as this: it may well be some times as large in another window."""


class LossWatch:
    """Compares the loss of a training with what it was at the start of the watch.

    Args:
        growth: How many times as large is too large, above 1; None: whatever it is.

    Example:
        >>> watch = LossWatch(growth=5.0)
        >>> for step in range(2 * WINDOW):
        ...     grown = watch.see(torch.tensor(0.1 if step < WINDOW else 0.6))
        >>> "from 0.1 to 0.6" in grown
        True
    """

    def __init__(self, growth: float | None) -> None:
        self._growth = growth
        self._first: float | None = None
        self._seen: list[Tensor] = []

    def see(self, outputs: Any, reduce: Callable[[Tensor], Tensor] | None = None) -> str | None:
        """See a step's outputs; a GPU is waited for once a window.

        Args:
            outputs: The loss, or what holds it under "loss"; anything else is not looked at.
            reduce: Averages a tensor over processes, so that all of them see the same.

        Returns:
            How it has grown, where that is too much.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._growth is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            return None
        self._seen.append(loss.detach().float().reshape(()))
        if len(self._seen) < WINDOW:
            return None
        total = torch.stack([own.to(loss.device) for own in self._seen]).mean()
        mean = float(total if reduce is None else reduce(total))
        self._seen.clear()
        if self._first is None and math.isfinite(mean):
            self._first = mean
            return None
        first = math.inf if self._first is None else self._first
        if mean <= self._growth * max(abs(first), SMALL):  # not, if it is NaN
            return None
        return f"from {first:.4g} to {mean:.4g}"

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain numbers."""
        return {"first": self._first, "seen": [float(loss) for loss in self._seen]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._first = state["first"]
        self._seen = [torch.tensor(loss) for loss in state["seen"]]

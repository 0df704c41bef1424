"""Divergence: the loss leaves its start by far, as it may where steps of few bits learn, or batch norm is frozen."""

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

WATCHED: Mapping[str, Any] = {"first": (float, None), "last": (float, None), "batches": int, "seen": [float]}
"""What :meth:`LossWatch.state` gives."""


def flaw_of_watch(state: Mapping[str, Any]) -> str | None:
    """What is wrong with numbers of a watch whose types are right.

    Args:
        state: What :meth:`LossWatch.state` gave.

    Returns:
        A sentence; None where they can be used.

    Example:
        >>> flaw_of_watch({"first": None, "last": None, "batches": 20, "seen": []})
        "'watch.batches' must be from 0 to 19, got 20"
    """
    first, batches, seen = state["first"], state["batches"], state["seen"]
    if first is not None and not math.isfinite(first):
        return f"'watch.first' must be a finite number or None, got {first}"
    if not 0 <= batches < WINDOW:
        return f"'watch.batches' must be from 0 to {WINDOW - 1}, got {batches}"
    if len(seen) > batches:
        return f"'watch.seen' must have no more losses than 'watch.batches', {batches}, got {len(seen)}"
    return None


class LossWatch:
    """Compares the loss of a training, averaged over some batches, with what it was at the start of the watch.

    Example:
        >>> watch = LossWatch()
        >>> for step in range(2 * WINDOW):
        ...     complete = watch.see(torch.tensor(0.1 if step < WINDOW else 0.6))
        >>> complete, watch.grown(5.0)
        (True, 'from 0.1 to 0.6')
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._last: float | None = None
        self._batches = 0
        self._seen: list[Tensor] = []

    def see(
        self,
        outputs: Any,
        reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        device: torch.device | str = "cpu",
        times: float = 1.0,
    ) -> bool:
        """See a step's outputs; a GPU is waited for once a window.

        Args:
            outputs: The loss, or what holds it under "loss"; anything else counts as a batch without one.
            reduce: Averages a tensor over processes, so that all of them see the same.
            device: Where that is done.
            times: What the loss is to be multiplied with, because the Trainer has divided it.

        Returns:
            Whether a window is complete, and its mean another one than before.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._batches += 1  # the same in all processes, whatever their steps return
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._seen.append(loss.detach().float().reshape(()) * times)
        if self._batches < WINDOW:
            return False
        losses = torch.stack([own.to(device) for own in self._seen]) if self._seen else torch.zeros(0, device=device)
        finite = losses.isfinite()  # a scaler leaves out single steps that are not
        found = torch.stack((losses[finite].sum(), finite.sum(), torch.tensor(len(losses), device=device)))
        total, count, seen = (found if reduce is None else reduce(found)).tolist()
        self._batches, self._seen = 0, []
        if seen == 0:
            return False
        self._last = total / count if count else math.nan
        if self._first is None and math.isfinite(self._last):
            self._first = self._last
        return True

    def begin_again(self) -> None:
        """Compare with the last window from here on."""
        finite = self._last is not None and math.isfinite(self._last)
        self._first, self._batches, self._seen = self._last if finite else None, 0, []

    def grown(self, times: float, *, small: float = SMALL) -> str | None:
        """Whether the last window is far above the first.

        Args:
            times: How many times as large is too large, above 1.
            small: What a smaller loss counts as.

        Returns:
            How it has grown, where that is too much; a loss that is NaN has.
        """
        if self._last is None:
            return None
        first = math.inf if self._first is None else self._first
        if self._last <= times * max(abs(first), small):  # not, if it is NaN
            return None
        return f"from {first:.4g} to {self._last:.4g}"

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain numbers."""
        return {
            "first": self._first,
            "last": self._last,
            "batches": self._batches,
            "seen": [float(loss) for loss in self._seen],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._first, self._last, self._batches = state["first"], state["last"], state["batches"]
        self._seen = [torch.tensor(loss) for loss in state["seen"]]

"""Importance: Taylor scores of weights, from the gradients of the steps between two updates of the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.masks import taylor_score
from lightning_compress.mechanisms.gathering import parts_of, rows_of, sharded_as
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.sharding import own_part
from lightning_compress.mechanisms.shrinking import Shrinkage


class TaylorScores:
    """For each weight, the mean of its Taylor scores over the steps since they were last taken.

    A weight that had no gradient since then keeps the mean that it had.

    Args:
        weights: Name to parameter.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> scores = TaylorScores({"weight": weight})
        >>> (weight * torch.tensor([3.0, 1.0])).sum().backward()
        >>> scores.add([weight])
        >>> scores.take()
        [tensor([3., 2.])]
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = dict(weights)
        self._parts = parts_of(weights.values())
        self._sums: dict[str, Tensor] = {}  # of what this process holds of each weight
        self._steps: dict[str, Tensor] = {}  # counted where the weights are: whether a step counts is known there
        self._taken: set[str] = set()  # what begins anew with its next gradient

    def add(self, parameters: Iterable[Tensor], *, scale: float = 1.0) -> None:
        """Add the scores of a step.

        Args:
            parameters: Those that the step is going to change; the weights among them that have a gradient count. A
                step with gradients that are not finite, which a scaler will skip, does not count.
            scale: What their gradients are multiplied by.
        """
        stepping = {id(parameter) for parameter in parameters}
        found = {
            name: (own_part(weight), own_part(weight.grad))
            for name, weight in self._weights.items()
            if id(weight) in stepping and weight.grad is not None
        }
        totals = [gradient.sum(dtype=torch.float32) for _, gradient in found.values()]
        finite = None
        if totals:
            sums = torch.stack([total.to(totals[0].device) for total in totals])
            finite = (sums if self._parts is None else self._parts.total(sums)).isfinite().all()
        for name, (weight, gradient) in found.items():
            if name not in self._sums or name in self._taken:
                self._sums[name] = torch.zeros_like(weight, dtype=torch.float32)
                self._steps[name] = torch.zeros((), dtype=torch.int64, device=weight.device)
                self._taken.discard(name)
            counts = finite.to(weight.device)  # type: ignore[union-attr]
            self._sums[name].add_(torch.where(counts, taylor_score(weight, gradient), 0.0), alpha=1 / scale)
            self._steps[name] += counts

    def follow(self, shrinkage: Shrinkage) -> None:
        """Go on with weights that hold less than before.

        Args:
            shrinkage: What stays of each.
        """
        self._sums = {name: shrinkage.take(name, total) for name, total in self._sums.items()}

    def take(self) -> list[Tensor] | None:
        """The means, one for each weight; they begin anew. None if no step has counted since.

        Raises:
            RuntimeError: If some weights never had a gradient: nothing is known of them.
        """
        if not self._sums:
            return None
        if missing := [name for name in self._weights if name not in self._sums]:
            raise RuntimeError(
                "score='taylor' needs a gradient of each weight before the masks are updated, and these had none: "
                f"{listing(missing)}; leave them out with exclude=, or begin later with start="
            )
        if not all(steps > 0 for steps in self._counts()):
            return None
        self._taken = set(self._weights)
        return [self._sums[name] / self._steps[name] for name in self._weights]

    def _counts(self) -> list[int]:
        device = next(iter(self._steps.values())).device
        return torch.stack([steps.to(device) for steps in self._steps.values()]).tolist()

    def state(self) -> dict[str, Any]:
        """Tensors and primitives, for a checkpoint."""
        sums = {name: sharded_as(total.clone(), self._weights[name]) for name, total in self._sums.items()}
        steps = dict(zip(self._steps, self._counts(), strict=True)) if self._steps else {}
        return {"sums": sums, "steps": steps, "taken": sorted(self._taken)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self._sums = {name: rows_of(total, self._weights[name]).clone() for name, total in state["sums"].items()}
        self._steps = {name: torch.tensor(state["steps"][name], device=own.device) for name, own in self._sums.items()}
        self._taken = set(state["taken"])

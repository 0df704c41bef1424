"""Importance: Taylor scores of weights, from the gradients of the steps between two updates of the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.masks import taylor_score


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
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._taken: set[str] = set()  # what begins anew with its next gradient

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Add the scores of a step.

        Args:
            parameters: Those that the step is going to change; the weights among them that have a gradient count. A
                step with gradients that are not finite, which a scaler will skip, adds zeros.
        """
        stepping = {id(parameter) for parameter in parameters}
        found = {
            name: (weight.detach(), weight.grad)
            for name, weight in self._weights.items()
            if id(weight) in stepping and weight.grad is not None
        }
        totals = [gradient.sum(dtype=torch.float32) for _, gradient in found.values()]
        finite = torch.stack([total.to(totals[0].device) for total in totals]).isfinite().all() if totals else None
        for name, (weight, gradient) in found.items():
            if name not in self._sums or name in self._taken:
                self._sums[name] = torch.zeros_like(weight, dtype=torch.float32)
                self._steps[name] = 0
                self._taken.discard(name)
            score = taylor_score(weight, gradient)
            self._sums[name] += torch.where(finite.to(score.device), score, 0.0)  # type: ignore[union-attr]
            self._steps[name] += 1

    def take(self) -> list[Tensor] | None:
        """The means, one for each weight; they begin anew. None before the first step.

        Raises:
            RuntimeError: If some weights never had a gradient: nothing is known of them.
        """
        if not self._sums:
            return None
        if missing := [name for name in self._weights if name not in self._sums]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise RuntimeError(
                "score='taylor' needs a gradient of each weight before the masks are updated, and these had none: "
                f"{', '.join(map(repr, missing[:5]))}{more}; leave them out with exclude=, or begin later with start="
            )
        self._taken = set(self._weights)
        return [self._sums[name] / max(self._steps[name], 1) for name in self._weights]

    def state(self) -> dict[str, Any]:
        """Tensors and primitives, for a checkpoint."""
        sums = {name: total.clone() for name, total in self._sums.items()}
        return {"sums": sums, "steps": dict(self._steps), "taken": sorted(self._taken)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self._sums = {name: total.clone().to(self._weights[name].device) for name, total in state["sums"].items()}
        self._steps, self._taken = dict(state["steps"]), set(state["taken"])

"""Lessons: whether an optimizer takes the gradients of a term, where a step optimises manually and may clear them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_compress import _compat


class Lesson:
    """Follows the gradients of the losses that have a term, until an optimizer has taken some.

    One parameter is watched at a time: the first that gets a gradient from such a loss. If it moves, the lesson was
    taken; if its gradient is gone before, it was lost.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer, lesson = torch.optim.SGD([weight], lr=0.1), Lesson()
        >>> for _ in range(2):
        ...     loss = (2 * weight).sum()
        ...     lesson.follow([weight], loss)
        ...     loss.backward()
        ...     optimizer.zero_grad()
        >>> lesson.lost, lesson.taken
        (1, False)
    """

    def __init__(self) -> None:
        self.given = 0
        """How many losses with the term had a backward pass."""
        self.lost = 0
        """How often their gradients were cleared before an optimizer took them."""
        self.taken = False
        """Whether an optimizer took one; then nothing is followed any more."""
        self._running = False  # whether the backward pass of a loss with the term is
        self._watched: tuple[Tensor, int] | None = None  # a parameter, and how often it had been written to
        self._hooks: dict[int, Any] = {}

    @property
    def waits(self) -> bool:
        """Whether there is a gradient that was neither taken nor cleared yet."""
        return self._watched is not None

    def follow(self, learners: Iterable[Tensor], loss: Tensor) -> None:
        """Follow the gradients that a loss with the term will give.

        Args:
            learners: The parameters that the term teaches; those that are frozen are passed over.
            loss: The total.
        """
        if self.taken or not loss.requires_grad:
            return
        for own in learners:
            if own.requires_grad and id(own) not in self._hooks:
                self._hooks[id(own)] = own.register_hook(partial(self._coming, own))  # type: ignore[no-untyped-call]
        loss.register_hook(self._begun)  # type: ignore[no-untyped-call]

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped, and has not cleared gradients yet."""
        if self._watched is not None:
            own, _ = self._watched
            if any(own is other for group in optimizer.param_groups for other in group["params"]):
                self._end(taken=not _is_cleared(own))

    def close(self) -> None:
        """Follow nothing any more."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._watched = {}, None

    def _begun(self, gradient: Tensor) -> None:
        self.given, self._running = self.given + 1, True
        _compat.after_backward(self._over)

    def _over(self) -> None:
        self._running = False

    def _coming(self, own: Tensor, gradient: Tensor) -> None:
        """A gradient is about to be added to that of a parameter."""
        if self._watched is not None and self._watched[0] is own:
            moved = own._version != self._watched[1]
            if moved or _is_cleared(own):
                self._end(taken=moved)
        if self.taken or not self._running or _compat.is_batched(gradient):
            return
        if not bool(_entries(gradient).isfinite().all()):  # a scaler is going to skip the step
            self._watched, self._running = None, False
        elif self._watched is None and bool(_entries(gradient).any()):
            self._watched = own, own._version

    def _end(self, *, taken: bool) -> None:
        self.taken, self._watched = taken, None
        if taken:
            self.close()
        else:
            self.lost += 1


def _is_cleared(parameter: Tensor) -> bool:
    return parameter.grad is None or not bool(_entries(parameter.grad).any())


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient

"""Lessons: whether an optimizer takes the gradients of a term, where a step optimises manually and may clear them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_compress import _compat
from lightning_compress.mechanisms.owned import parameters_of

PATIENCE = 8
"""How often gradients may be cleared before any was taken: a step may skip those that are too large."""


class Lesson:
    """Follows the gradients of the losses that have a term, until an optimizer has taken some.

    Watched is each parameter that got a gradient from such a loss. When an optimizer steps one whose gradient is still
    there, the lesson was taken; when the gradients of all are gone before, it was lost. Of parameters that no optimizer
    of torch has, whoever writes into one has taken its gradient. Who asks autograd for gradients, or puts others into
    ``.grad``, is taken to know what he does.

    Args:
        learners: Gives the parameters that the term teaches; those that are frozen are passed over.
        optimizers: Gives the optimizers there are. If one has some of the learners, only these are followed.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> lesson = Lesson(lambda: [weight], lambda: [optimizer])
        >>> for _ in range(2):
        ...     loss = (2 * weight).sum()
        ...     lesson.follow(loss)
        ...     loss.backward()
        ...     optimizer.zero_grad()
        >>> lesson.lost, lesson.taken
        (1, False)
        >>> lesson.close()
    """

    def __init__(self, learners: Callable[[], Iterable[Tensor]], optimizers: Callable[[], Iterable[Any]]) -> None:
        self._learners, self._optimizers = learners, optimizers
        self.given = 0
        """How many losses with the term had a backward pass."""
        self.lost = 0
        """How often their gradients were cleared before an optimizer took them."""
        self.taken = False
        """Whether an optimizer took one; then nothing is followed any more."""
        self.passed_over = False
        """Whether an optimizer stepped parameters that it teaches when the gradients were gone."""
        self._asked = False  # whether there was a loss with the term
        self._came = False  # whether there was a gradient at all, be it zero
        self._running = False  # whether the backward pass of a loss with the term is
        self._told = False  # whether the learners are those of optimizers that tell of their steps
        self._watched: dict[int, tuple[Tensor, int]] = {}  # parameters, and how often each had been written to
        self._given_out: set[int] = set()  # parameters whose gradient is on its way to .grad, or to who asked for it
        self._left: dict[int, weakref.ref[Tensor]] = {}  # what backward passes have left in .grad
        self._hooks: dict[int, list[Any]] = {}
        self._steps: list[Any] = []

    @property
    def waits(self) -> bool:
        """Whether there is a gradient that was neither taken nor cleared yet."""
        return bool(self._watched)

    def problem(self, *, over: bool) -> str | None:
        """What has become of the gradients, if no good.

        Args:
            over: Whether an epoch is over: something has to have come then. Before, a few may be lost.

        Returns:
            Words that go on after "the gradients"; None if some were taken, or may still be.
        """
        if self.taken or not self._asked or not (self.lost >= (1 if over else PATIENCE) or (over and not self.waits)):
            return None
        if self.lost:
            return f"were cleared before an optimizer took them, {self.lost} times of {self.given}"
        if self.given:
            return None if self._came else "never came there"
        return "were never computed, as no total was given to backward"

    def follow(self, loss: Tensor) -> None:
        """Follow the gradients that a loss with the term will give.

        Args:
            loss: The total.
        """
        if self.taken:
            self.close()
        if self.taken or not loss.requires_grad:
            return
        self._asked = True
        for own in self._followed():
            if own.requires_grad and id(own) not in self._hooks:
                hook: Any = own.register_hook(partial(self._coming, own))  # type: ignore[no-untyped-call]
                arrived: Any = own.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
                self._hooks[id(own)] = [hook, arrived]
        if not self._steps:
            self._steps = [
                register_optimizer_step_pre_hook(self._stepping),
                register_optimizer_step_post_hook(self._stepped),
            ]
        self._running, self._given_out = False, set()  # a backward pass that failed has not ended
        loss.register_hook(self._begun)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Follow nothing any more."""
        for hook in chain(*self._hooks.values(), self._steps):
            hook.remove()
        self._hooks, self._steps, self._watched = {}, [], {}

    def _followed(self) -> Collection[Tensor]:
        every = list(self._learners())
        optimizers = [own for own in self._optimizers() if isinstance(own, torch.optim.Optimizer)]
        held = {id(own) for own in parameters_of(*optimizers)}
        theirs = [own for own in every if id(own) in held]
        self._told = bool(theirs)
        return theirs or every

    def _begun(self, gradient: Tensor) -> None:
        self._forget(list(self._watched.values()))
        self.given, self._running = self.given + 1, True
        _compat.after_backward(self._over)

    def _over(self) -> None:
        self._running = False
        if self._given_out:  # to who has asked autograd for it
            self._take()

    def _coming(self, own: Tensor, gradient: Tensor) -> None:
        """A gradient is about to be added to that of a parameter."""
        if id(own) in self._watched:
            self._forget([self._watched[id(own)]])
        if self.taken or not self._running or _compat.is_batched(gradient):
            return
        self._came = True
        self._given_out.add(id(own))
        if not bool(_entries(gradient).isfinite().all()):  # a scaler is going to skip the step
            self._watched, self._running = {}, False
        elif id(own) not in self._watched and bool(_entries(gradient).any()):
            self._watched[id(own)] = own, own._version

    def _arrived(self, own: Tensor) -> None:
        self._given_out.discard(id(own))
        if own.grad is not None:
            self._left[id(own)] = weakref.ref(own.grad)

    def _stepping(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """An optimizer is about to step; some clear gradients when they have, so they are looked at before."""
        replaced = any(
            own.grad is not None and (left := self._left.get(id(own))) is not None and left() is not own.grad
            for own in parameters_of(optimizer)
        )
        if replaced or any(not _is_cleared(own) for own, _ in self._of(optimizer)):
            self._take()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """An optimizer has stepped; a closure may have computed gradients meanwhile."""
        self._stepping(optimizer)
        if theirs := self._of(optimizer):
            self.passed_over = True
            self._forget(theirs)

    def _of(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, int]]:
        """What is watched of an optimizer's parameters."""
        return [self._watched[id(own)] for own in parameters_of(optimizer) if id(own) in self._watched]

    def _forget(self, watched: Collection[tuple[Tensor, int]]) -> None:
        """Watch those no more whose gradients are gone; without any left, the lesson was lost."""
        if not self._told and any(own._version != version for own, version in watched):
            self._take()
            return
        gone = [id(own) for own, _ in watched if _is_cleared(own)]
        for key in gone:
            del self._watched[key]
        self.lost += bool(gone) and not self._watched

    def _take(self) -> None:
        self.taken, self._watched, self._given_out, self._left = True, {}, set(), {}
        # what follows is closed later: optimizers are going through their hooks


def _is_cleared(parameter: Tensor) -> bool:
    return parameter.grad is None or not bool(_entries(parameter.grad).any())


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient

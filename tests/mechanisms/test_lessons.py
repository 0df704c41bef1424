"""Lessons: whether gradients are there when an optimizer steps, whoever clears them, and in whatever order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_compress.mechanisms.lessons import Lesson


class Step:
    """Two layers with an optimizer each, the second taught by nobody; and what a step may do with them."""

    def __init__(self):
        self.model, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
        self.ours, self.others = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model, self.other))
        self.lesson = Lesson()
        self.hook = register_optimizer_step_post_hook(lambda own, *_: self.lesson.stepped(own))

    def loss(self, scale=1.0):
        return scale * self.model(torch.ones(1, 1)).sum() + self.other(torch.ones(1, 1)).sum()

    def teach(self, scale=1.0):
        total = self.loss(scale)
        self.lesson.follow(self.model.parameters(), total)
        total.backward()

    def checkpointed(self):
        """Gradients come from a backward pass within the backward pass."""
        x = torch.ones(1, 1, requires_grad=True)
        total = torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=True).sum()
        self.lesson.follow(self.model.parameters(), total)
        total.backward()

    def plain(self):
        self.loss().backward()

    def skip(self):
        self.teach(float("inf"))

    def in_place(self):
        self.ours.zero_grad(set_to_none=False)

    def outside(self):
        """As an optimizer that torch does not tell of."""
        with torch.no_grad():
            for own in self.model.parameters():
                own.sub_(own.grad)

    def run(self, *actions):
        for action in actions:
            actions_of = {"clear": self.ours.zero_grad, "step": self.ours.step, "other": self.others.step}
            (actions_of.get(action) or getattr(self, action))()
        return self.lesson


@pytest.fixture
def step():
    made = Step()
    yield made
    made.hook.remove()


@pytest.mark.parametrize(
    "actions",
    [
        ("teach", "step"),
        ("checkpointed", "step"),
        ("clear", "teach", "other", "plain", "step"),
        ("teach", "teach", "step"),  # accumulated
        ("teach", "outside", "clear", "teach"),
        ("skip", "clear", "teach", "step"),
        ("teach", "other", "clear", "teach", "step"),  # the first was lost
    ],
)
def test_gradients_that_are_taken(step, actions):
    lesson = step.run(*actions)
    assert lesson.taken
    assert not lesson.waits
    assert not any(own._backward_hooks for own in step.model.parameters())


@pytest.mark.parametrize(
    ("actions", "lost"),
    [
        (("teach", "other", "clear", "plain", "step"), 1),
        (("teach", "other", "in_place", "plain", "step"), 1),
        (("teach", "clear", "step"), 1),
        (("teach", "clear", "teach", "clear", "plain"), 2),
        (("skip", "clear", "plain", "step"), 0),
        (("plain", "step"), 0),
        (("teach",), 0),
    ],
)
def test_gradients_that_are_not(step, actions, lost):
    lesson = step.run(*actions)
    assert (lesson.taken, lesson.lost, lesson.waits) == (False, lost, actions == ("teach",))
    lesson.close()
    assert not any(own._backward_hooks for own in step.model.parameters())


def test_what_is_frozen_now_may_learn_later(step):
    step.model.requires_grad_(False)
    step.teach()
    step.model.requires_grad_(True)
    assert step.run("clear", "teach", "step").taken
    assert step.lesson.given == 2


def test_sparse_gradients_are_followed():
    table, lesson = nn.Embedding(3, 2, sparse=True), Lesson()
    optimizer, taken = torch.optim.SGD(table.parameters(), lr=0.1), []
    for clears in (True, False):
        loss = table(torch.tensor([1])).sum()
        lesson.follow(table.parameters(), loss)
        loss.backward()
        if clears:
            optimizer.zero_grad()
        optimizer.step()
        lesson.stepped(optimizer)
        taken.append(lesson.taken)
    assert (lesson.lost, taken) == (1, [False, True])


def test_gradients_of_many_losses_at_once_are_passed_over():
    weight, lesson = torch.ones(2, requires_grad=True), Lesson()
    losses = 2 * weight
    lesson.follow([weight], losses)
    torch.autograd.grad(losses, weight, torch.eye(2), is_grads_batched=True)
    assert (lesson.given, lesson.waits) == (1, False)

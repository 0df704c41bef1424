"""Lessons: whether gradients are there when an optimizer steps, whoever clears them, and in whatever order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.lessons import PATIENCE, Lesson


class Step:
    """Two layers with an optimizer each, the second taught by nobody; and what a step may do with them."""

    def __init__(self):
        self.model, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
        self.ours, self.others = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model, self.other))
        self.known = [self.ours, self.others]
        self.lesson = Lesson(self.model.parameters, lambda: self.known)

    def loss(self, scale=1.0):
        return scale * self.model(torch.ones(1, 1)).sum() + self.other(torch.ones(1, 1)).sum()

    def teach(self, scale=1.0):
        total = self.loss(scale)
        self.lesson.follow(total)
        total.backward()

    def checkpointed(self):
        """Gradients come from a backward pass within the backward pass."""
        x = torch.ones(1, 1, requires_grad=True)
        total = torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=True).sum()
        self.lesson.follow(total)
        total.backward()

    def fail(self):
        """A backward pass that ends in an error, after gradients have come."""
        total = self.loss()
        self.lesson.follow(total)
        hook = self.other.bias.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            total.backward()
        hook.remove()
        self.ours.zero_grad()

    def unused(self):
        self.lesson.follow(self.loss())

    def plain(self):
        self.loss().backward()

    def skip(self):
        self.teach(float("inf"))

    def zero(self):
        self.teach(0.0)

    def in_place(self):
        self.ours.zero_grad(set_to_none=False)

    def clear_weight(self):
        self.model.weight.grad = None

    def clamp(self):
        """Somebody writes to the parameters, with no gradient."""
        with torch.no_grad():
            for own in self.model.parameters():
                own.clamp_(-1, 1)

    def alone(self):
        """From here on each parameter has an optimizer of its own; steps are those of the bias."""
        self.ours = torch.optim.SGD([self.model.bias], lr=0.1)
        self.known = [torch.optim.SGD([self.model.weight], lr=0.1), self.ours]

    def tidy(self):
        """The optimizer clears gradients itself, once it has stepped."""
        self.ours.register_step_post_hook(lambda own, *_: own.zero_grad())

    def close(self):
        """The optimizer computes the gradients itself."""

        def closure():
            self.ours.zero_grad()
            total = self.loss()
            self.lesson.follow(total)
            total.backward()
            return total

        self.ours.step(closure)

    def unknown(self):
        """As with an optimizer that torch does not tell of."""
        self.known = []

    def outside(self):
        with torch.no_grad():
            for own in self.model.parameters():
                own.sub_(own.grad)

    def asked_for(self):
        """Gradients are taken from autograd, and put in their place by hand."""
        total = self.loss()
        self.lesson.follow(total)
        parameters = list(self.model.parameters())
        self.replaced(torch.autograd.grad(total, parameters))

    def replaced(self, gradients=None):
        """As where gradients of several losses are weighed against each other."""
        for own, gradient in zip(self.model.parameters(), gradients or [torch.ones(1, 1), torch.ones(1)], strict=True):
            own.grad = gradient.clone()

    def run(self, *actions):
        for action in actions:
            actions_of = {"clear": self.clear, "step": self.step, "other": self.others.step}
            (actions_of.get(action) or getattr(self, action))()
        return self.lesson

    def clear(self):
        self.model.zero_grad()

    def step(self):
        self.ours.step()


@pytest.fixture
def step():
    made = Step()
    yield made
    made.lesson.close()


@pytest.mark.parametrize(
    "actions",
    [
        ("teach", "step"),
        ("checkpointed", "step"),
        ("clear", "teach", "other", "plain", "step"),
        ("teach", "teach", "step"),  # accumulated
        ("unknown", "teach", "outside", "clear", "teach"),
        ("alone", "teach", "clear_weight", "step"),  # the other one's gradient is there
        ("alone", "teach", "step"),
        ("tidy", "teach", "step"),
        ("close",),
        ("asked_for",),
        ("teach", "clear", "plain", "replaced", "step"),
        ("skip", "clear", "teach", "step"),
        ("teach", "other", "clear", "teach", "step"),  # the first was lost
    ],
)
def test_gradients_that_are_taken(step, actions):
    lesson = step.run(*actions)
    assert lesson.taken
    assert not lesson.waits
    step.unused()  # from here on nothing is followed
    assert not any(own._backward_hooks for own in step.model.parameters())


@pytest.mark.parametrize(
    ("actions", "lost"),
    [
        (("teach", "other", "clear", "plain", "step"), 1),
        (("teach", "other", "in_place", "plain", "step"), 1),
        (("teach", "clear", "step"), 1),
        (("teach", "clear", "teach", "clear", "plain"), 2),
        (("skip", "clear", "plain", "step"), 0),
        (("teach", "clamp", "clear", "plain", "step"), 1),
        (("alone", "teach", "clear", "step"), 0),  # the other one's may be there
        (("alone", "teach", "clear", "step", "teach"), 1),
        (("fail", "unused", "plain", "step"), 0),
        (("plain", "step"), 0),
        (("teach",), 0),
    ],
)
def test_gradients_that_are_not(step, actions, lost):
    lesson = step.run(*actions)
    assert (lesson.taken, lesson.lost) == (False, lost)
    assert lesson.waits == (actions[-1] == "teach" or actions == ("alone", "teach", "clear", "step"))
    lesson.close()
    assert not any(own._backward_hooks for own in step.model.parameters())


def test_what_is_frozen_now_may_learn_later(step):
    step.model.requires_grad_(False)
    step.teach()
    step.model.requires_grad_(True)
    assert step.run("clear", "teach", "step").taken
    assert step.lesson.given == 2


def test_sparse_gradients_are_followed():
    table, taken = nn.Embedding(3, 2, sparse=True), []
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    lesson = Lesson(table.parameters, lambda: [optimizer])
    for clears in (True, False):
        loss = table(torch.tensor([1])).sum()
        lesson.follow(loss)
        loss.backward()
        if clears:
            optimizer.zero_grad()
        optimizer.step()
        taken.append(lesson.taken)
    assert (lesson.lost, taken) == (1, [False, True])


def test_gradients_of_many_losses_at_once_are_passed_over():
    weight = torch.ones(2, requires_grad=True)
    lesson = Lesson(lambda: [weight], list)
    losses = 2 * weight
    lesson.follow(losses)
    torch.autograd.grad(losses, weight, torch.eye(2), is_grads_batched=True)
    assert (lesson.given, lesson.waits) == (1, False)
    lesson.close()


@pytest.mark.parametrize(
    ("actions", "before", "over"),
    [
        ((), None, None),
        (("plain", "step"), None, None),
        (("teach", "step"), None, None),
        (("teach",), None, None),
        (("zero",), None, None),
        (("unused",), None, "were never computed, as no total was given to backward"),
        (("teach", "clear", "step"), None, "were cleared before an optimizer took them, 1 times of 1"),
        (("teach", "clear", "step") * PATIENCE, *2 * ("were cleared before an optimizer took them, 8 times of 8",)),
    ],
)
def test_what_has_become_of_gradients_is_said_after_some_patience(step, actions, before, over):
    lesson = step.run(*actions)
    assert (lesson.problem(over=False), lesson.problem(over=True)) == (before, over)
    assert lesson.passed_over == ("clear" in actions)


def test_gradients_that_reach_nobody_are_told_of():
    weight = torch.ones(1, requires_grad=True)
    lesson, loss = Lesson(lambda: [torch.ones(1, requires_grad=True)], list), (2 * weight).sum()
    lesson.follow(loss)
    loss.backward()
    assert lesson.problem(over=True) == "never came there"
    lesson.close()

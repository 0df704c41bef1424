"""Mistakes of a new user of manual optimisation, and how they are told; and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from contract.gans import Functions, Gan, Swapped, Untoggled, teacher
from contract.modules import difference, loader, made, trainer

from lightning_compress import (
    DCILCallback,
    DistillationCallback,
    FactorTransferCallback,
    PruningCallback,
    QATCallback,
)
from lightning_compress.mechanisms.capture import CaptureError


def kd(**settings):
    return DistillationCallback(teacher(), **{"student": "generator", "loss_kind": "mse", **settings})


def dcil(**settings):
    return DCILCallback(0.5, **{"layers": ["generator"], "dense_path": "shared", "kl_start": 1.0, **settings})


def fitted(kind, *callbacks, **settings):
    module = made(kind)
    trainer(*callbacks, **settings).fit(module, loader())
    return module


# The term of a loss after which its student does not learn


class Misplaced(Untoggled):
    """The term is given to the discriminator's loss."""

    name = "kd"

    def total(self, loss, batch):
        given = (lambda: loss(batch)) if self.functions else loss(batch)
        return self.compressed_loss(given, callbacks=[self.name] if loss == self.discriminator_loss else [])


class MisplacedFirst(Misplaced, Swapped):
    pass


class MisplacedPlain(Misplaced):
    """The generator's loss does not ask, and is computed after the other."""

    order = "discriminator", "generator"

    def total(self, loss, batch):
        return super().total(loss, batch) if loss == self.discriminator_loss else loss(batch)


CLEARED = r"'kd' teaches nothing: the gradients .* to 'generator' were cleared before an optimizer took them, {} times"


@pytest.mark.parametrize(
    ("kind", "batches", "times"),
    [
        (MisplacedFirst, 1, 1),
        *(
            pytest.param(kind, 8, times, marks=pytest.mark.slow)
            for kind, times in ((Misplaced, 7), (MisplacedFirst, 8), (MisplacedPlain, 8))
        ),
    ],
)
def test_a_term_whose_gradients_are_cleared_is_refused(kind, batches, times):
    module = made(kind)
    with pytest.raises(RuntimeError, match=CLEARED.format(times)):
        trainer(kd(), limit_train_batches=batches).fit(module, loader())
    assert not any(own._backward_hooks for own in module.parameters())


@pytest.mark.slow
def test_a_dense_pass_of_the_wrong_loss_is_refused():
    class Own(Misplaced, Functions):
        name = "dcil"

    with pytest.raises(
        RuntimeError, match=r"the weights that it masks never came there\. Ask for the loss after which"
    ):
        fitted(Own, dcil())


@pytest.mark.slow
def test_a_total_that_nobody_uses_is_refused():
    class Forgets(Gan):
        def total(self, loss, batch):
            value = loss(batch)
            self.compressed_loss(value)
            return value

    with pytest.raises(RuntimeError, match="were never computed, as no total was given to backward"):
        fitted(Forgets, kd())


@pytest.mark.slow
def test_a_term_of_a_student_that_is_toggled_off_is_refused():
    class Own(Misplaced, Gan):
        toggles = True

    with pytest.raises(CaptureError, match=r"carries no gradient.*: toggle_optimizer of another optimizer has frozen"):
        fitted(Own, kd())


# A student that does not learn in every batch


class Rare(Gan):
    every = 9

    def discriminator_loss(self, batch):
        with torch.no_grad():
            fake = self.generator(self.images(batch)[1])
        return torch.nn.functional.softplus(self.discriminator(fake)).mean()


class RareFunctions(Rare):
    functions = True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "build"),
    [
        (Rare, kd),
        (Rare, lambda: FactorTransferCallback(teacher(), pair=("0", "0"), pretrain_epochs=1, student="generator")),
        (RareFunctions, lambda: dcil(kl_start=0.25, student="generator", class_dim=3)),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"fast_dev_run": True}])
def test_a_student_whose_turn_never_came_is_told_of_at_the_end(kind, build, settings):
    with pytest.warns(UserWarning, match="no optimizer has trained what it teaches in this fit: .* no effect so far"):
        module = fitted(kind, build(), **settings)
    assert difference(module, made(kind)) > 0


@pytest.mark.slow
def test_its_turn_may_come_in_a_later_epoch():
    class Late(Gan):
        def training_step(self, batch, batch_idx):
            self.every = 9 if self.current_epoch == 0 else 1
            super().training_step(batch, batch_idx)

    callback = kd()
    fitted(Late, callback, max_epochs=2)
    assert callback.effects[callback.effect] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: PruningCallback(0.5, layers=["generator"]),
        lambda: QATCallback(weight_bits=4, step_size="observed", network="generator"),
    ],
)
def test_what_adds_nothing_to_a_loss_waits_for_nobody(build):
    fitted(Rare, build(), fast_dev_run=True)

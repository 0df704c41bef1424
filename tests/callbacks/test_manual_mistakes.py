"""Mistakes of a new user of manual optimisation, and how they are told; and what only looks like one."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from contract.gans import Functions, Gan, Swapped, Untoggled, teacher
from contract.modules import difference, loader, made, trainer
from torch.nn import functional as F

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    QATCallback,
)
from lightning_compress.mechanisms.capture import CaptureError

STUDENT = {"student": "generator"}


def kd(**settings):
    return DistillationCallback(teacher(), **{**STUDENT, "loss_kind": "mse", **settings})


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


CLEARED = r"'kd': it seems to teach nothing: .* to 'generator' were cleared before an optimizer took them, {} times"


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
def test_a_term_whose_gradients_are_cleared_is_warned_of(kind, batches, times):
    module = made(kind)
    with pytest.warns(UserWarning, match=CLEARED.format(times)) as warned:
        trainer(kd(), limit_train_batches=batches, max_epochs=2).fit(module, loader())
    assert sum("kd" in str(entry.message) for entry in warned) == 1
    assert not any(own._backward_hooks for own in module.parameters())


@pytest.mark.slow
def test_it_is_said_in_the_midst_of_an_epoch():
    """A warning is an error here, and ends the fit where it comes."""
    callback = kd()
    with pytest.raises(UserWarning, match=CLEARED.format(8)):
        trainer(callback).fit(made(MisplacedFirst), loader(rows=80))
    assert callback.effects[callback.effect] == 8


@pytest.mark.slow
def test_a_student_of_two_optimizers_may_be_taught_in_part():
    """The last layer's gradients, which come first, are cleared, and its optimizer does not step."""

    class Part(Untoggled):
        def configure_optimizers(self):
            parts = [(self.generator[0], 0.1), (self.discriminator, 0.1), (self.generator[2], 0.0)]
            return [torch.optim.SGD(part.parameters(), lr=rate) for part, rate in parts]

        def total(self, loss, batch):
            self.generator[2].zero_grad()
            return super().total(loss, batch)

        def optimizers(self, *arguments, **settings):
            return super().optimizers(*arguments, **settings)[:2]

    fitted(Part, kd(), max_epochs=2)


@pytest.mark.slow
def test_a_dense_pass_of_the_wrong_loss_is_warned_of():
    class Own(Misplaced, Functions):
        name = "dcil"

    with pytest.warns(UserWarning, match=r"the weights that it masks never came there\. Ask for the loss after which"):
        fitted(Own, dcil())


@pytest.mark.slow
def test_a_total_that_nobody_uses_is_warned_of():
    class Forgets(Gan):
        def total(self, loss, batch):
            value = loss(batch)
            self.compressed_loss(value)
            return value

    with pytest.warns(UserWarning, match="were never computed, as no total was given to backward"):
        fitted(Forgets, kd())


@pytest.mark.slow
def test_a_term_of_a_student_that_is_toggled_off_is_refused():
    class Own(Misplaced, Gan):
        toggles = True

    with pytest.raises(CaptureError, match=r"carries no gradient.*: toggle_optimizer of another optimizer has frozen"):
        fitted(Own, kd())


class Skipping(Untoggled):
    """The gradients of the generator are cleared in each batch, and its optimizer does not step."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.optimizers()[0].zero_grad()

    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        first.step = lambda *_, **__: None
        return [first, second]


@pytest.mark.slow
def test_who_does_not_step_at_all_has_his_reasons():
    with pytest.warns(UserWarning, match="no optimizer was seen to take a gradient of its term in this fit"):
        module = fitted(Skipping, kd(), max_epochs=2)
    assert difference(module.generator, made(Skipping).generator) == 0


@pytest.mark.slow
def test_of_a_student_only_what_an_optimizer_has_is_followed():
    """Here the first layer; the last one's gradient comes before, and is cleared with all."""

    class Part(Untoggled):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator[0], self.discriminator)]

    module, callback = made(Part), kd()
    trainer(callback, max_epochs=2).fit(module, loader())
    assert difference(module.generator[2], made(Part).generator[2]) == 0
    assert callback.effects[callback.effect] == 16


@pytest.mark.slow
def test_a_gradient_that_nobody_would_take_does_not_hide_that_all_others_are_cleared():
    """The last layer has no optimizer, so its gradient stays."""

    class Cleared(Untoggled):
        clips = 1.0

        def clip_gradients(self, *_):
            self.generator[0].zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator[0], self.discriminator)]

    with pytest.warns(UserWarning, match=r"'kd': it seems to teach nothing: .* were cleared before an optimizer took"):
        fitted(Cleared, kd(), max_epochs=2)


# A student that does not learn in every batch


class Rare(Gan):
    every = 9

    def discriminator_loss(self, batch):
        with torch.no_grad():
            fake = self.generator(self.images(batch)[1])
        return F.softplus(self.discriminator(fake)).mean()


class RareFunctions(Rare):
    functions = True


@pytest.mark.sample
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
    module = fitted(Rare, build(), fast_dev_run=True)
    assert module.global_step == 1  # the discriminator's; the generator's optimizer has not had its turn


# Functions that do more, or less, than compute the loss


class Outside(Functions):
    """What the generator gives is computed before the function is given."""

    def total(self, loss, batch):
        fake = self.generator(self.images(batch)[1])
        return self.compressed_loss(lambda: F.softplus(-self.discriminator(fake)).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dcil(student="generator", class_dim=3, kl_start=0.25), "task_loss is a function that uses what 'gen"),
        (
            lambda: AttentionTransferCallback(teacher(), map_kind="gradient", weight=1.0, student="generator"),
            "uses what 'gen",
        ),
        (dcil, r"what was computed from 'generator.\d.\w+', .* before the loss is used by both passes of 'dcil'"),
    ],
)
def test_a_function_that_is_run_twice_computes_all_of_its_loss(build, message):
    with pytest.raises(RuntimeError, match=message):
        fitted(Outside, build())


@pytest.mark.slow
def test_a_function_that_is_run_once_need_not():
    callback = kd()
    fitted(Outside, callback)
    assert callback.effects[callback.effect] == 8


@pytest.mark.slow
def test_nor_need_one_of_a_loss_that_nobody_runs_twice():
    class Beside(Functions):
        toggles = False  # so that the discriminator's loss has a gradient in the generator

        def total(self, loss, batch):
            if loss == self.generator_loss:
                return self.compressed_loss(lambda: loss(batch), callbacks=["dcil", "kd"])
            fake, real = self.generator(self.images(batch)[1]), self.images(batch)[0]
            return self.compressed_loss(
                lambda: F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean(),
                callbacks=[],
            )

    callback = dcil()
    fitted(Beside, kd(task_weight=1.0), callback)
    assert callback.effects["the dense pass"] == 8


@pytest.mark.slow
def test_what_is_computed_before_a_function_is_found_in_later_steps_too():
    class Late(Outside):
        def total(self, loss, batch):
            if self.trainer.global_step < 3:
                return self.compressed_loss(lambda: loss(batch), callbacks=[] if loss != self.generator_loss else None)
            return super().total(loss, batch)

    with pytest.raises(RuntimeError, match="before the loss is used by both passes of 'dcil'"):
        fitted(Late, dcil())


@pytest.mark.slow
@pytest.mark.parametrize("build", [kd, dcil])
@pytest.mark.parametrize("what", ["backward", "step"])
def test_a_function_that_learns_is_refused(what, build):
    class Learns(Functions):
        def generator_loss(self, batch):
            loss = super().generator_loss(batch)
            if what == "backward":
                self.manual_backward(loss)
            else:
                self.optimizers()[0].step()
            return loss

    with pytest.raises(RuntimeError, match="task_loss is a function that runs a backward pass, clears gradients or"):
        fitted(Learns, build())


# Two students


class Judged(Gan):
    """The discriminator is a student too, called once a loss."""

    def discriminator_loss(self, batch):
        real, noise = self.images(batch)
        judged = self.discriminator(torch.cat([real, self.generator(noise).detach()])).chunk(2)
        return F.softplus(-judged[0]).mean() + F.softplus(judged[1]).mean()

    def total(self, loss, batch):
        return self.compressed_loss(loss(batch), callbacks=["kd"] if loss == self.generator_loss else ["other"])


class JudgedNorm(Judged):
    def build(self):
        super().build()
        self.discriminator.insert(1, torch.nn.BatchNorm2d(3))


def judge(kind=Judged, **settings):
    network = made(kind, seed=9).discriminator
    return DistillationCallback(network, student="discriminator", loss_kind="mse", name="other", **settings)


@pytest.mark.sample
@pytest.mark.parametrize("kind", [Judged, JudgedNorm])
def test_each_loss_is_weighed_by_the_callback_whose_term_it_has(kind):
    judges, network, reference = made(kind, seed=9).discriminator.eval(), teacher(), made(kind)
    first, second = reference.configure_optimizers()
    for batch in loader():
        real, noise = reference.images(batch)
        fake = reference.generator(noise)
        first.zero_grad()
        soft = F.mse_loss(fake, network(noise).detach())
        (0.1 * F.softplus(-reference.discriminator(fake)).mean() + 0.9 * soft).backward()
        first.step()
        both = torch.cat([real, reference.generator(noise).detach()])
        second.zero_grad()
        judged = reference.discriminator(both)
        loss = F.softplus(-judged[: len(real)]).mean() + F.softplus(judged[len(real) :]).mean()
        (0.3 * loss + 0.9 * F.mse_loss(judged, judges(both).detach())).backward()
        second.step()
    module = fitted(kind, kd(), judge(kind, task_weight=0.3))
    assert difference(module, reference) < 1e-7
    for own, by_hand in zip(module.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(own, by_hand)


@pytest.mark.slow
def test_a_loss_that_two_weigh_is_refused():
    class Both(Judged):
        def total(self, loss, batch):
            return self.compressed_loss(loss(batch), callbacks=["kd", "other"])

    message = "'kd' sets task_weight=0.1 and 'other' sets task_weight=0.3; only one callback can weigh the task loss"
    with pytest.raises(ValueError, match=message):
        fitted(Both, kd(), judge(task_weight=0.3))


# Names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pruning", "callbacks names 'pruning', which acts without being asked and adds nothing to a loss: leave it"),
        ("PruningCallback", "callbacks names 'PruningCallback', which acts without being asked and adds nothing to"),
        ("DistillationCallback", "callbacks holds names, and 'DistillationCallback' is a class: that of 'kd'"),
        ("kdd", r"callbacks names 'kdd', and no callback of that name adds to a loss; .*; did you mean 'kd'\?"),
    ],
)
def test_names_of_what_adds_nothing_to_a_loss(name, message):
    class Names(Gan):
        def total(self, loss, batch):
            return self.compressed_loss(loss(batch), callbacks=[name])

    with pytest.raises(ValueError, match=message):
        fitted(Names, kd(), PruningCallback(0.5, layers=["generator"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PruningCallback(0.5, layers=["generato"]),
            r"'generato', which matches no module; did you mean 'gener",
        ),
        (lambda: PruningCallback(0.5, layers=["gen"]), "no module; its parts are 'generator', 'discriminator'"),
        (lambda: kd(student="generatr"), r"student names 'generatr', not a module of Gan; did you mean 'generator'\?"),
        (lambda: kd(student="G"), "student names 'G', not a module of Gan; its parts are 'generator', 'discriminator'"),
    ],
)
def test_the_nearest_name_is_given_or_all_there_are(build, message):
    with pytest.raises(ValueError, match=message):
        fitted(Gan, build())


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        functools.partial(PruningCallback, 0.5),
        functools.partial(DPFCallback, 0.5),
        functools.partial(PSGDCallback, 4, mean_factor=1.0, eps=1e-3),  # else a bias of zeros stays
    ],
)
def test_of_networks_that_are_trained_apart_none_is_taken_unasked(build):
    both = (
        "2 networks that different optimizers train, 'generator' and 'discriminator': name those to be changed, "
        "layers=['generator'] for one of them, layers=['generator', 'discriminator'] for all"
    )
    with pytest.raises(ValueError, match=re.escape(both)):
        fitted(Gan, build())
    fitted(Gan, build(layers=["generator", "discriminator"]))
    fitted(Gan, build(exclude=["discriminator"]))


class OneNetwork(Gan):
    """Two optimizers train parts of one network."""

    def build(self):
        parts = made(Gan)
        self.network = torch.nn.ModuleDict({"generator": parts.generator, "discriminator": parts.discriminator})

    @property
    def generator(self):
        return self.network["generator"]

    @property
    def discriminator(self):
        return self.network["discriminator"]


@pytest.mark.slow
def test_the_weights_of_one_network_may_have_several_optimizers():
    callback = PruningCallback(0.5)
    fitted(OneNetwork, callback)
    assert len(callback.masks) == 4


class Named(Functions):
    def total(self, loss, batch):
        return self.compressed_loss(lambda: loss(batch), callbacks=["dcil"] if loss == self.generator_loss else [])


@pytest.mark.sample
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kl_start": 1.0},
        {"layers": ["generator"]},
        {"layers": ["generator"], "dense_path": "shared"},
        {"temperature": 3.0, "class_dim": 1, "output": 0},
        {"classifier": "generator.2", "exclude": ["generator.2", "discriminator"], "update_interval": 2},
    ],
)
def test_what_the_message_of_collective_intelligence_says_works(given):
    with pytest.raises(ValueError, match="2 optimizers train parts of Named") as caught:
        fitted(Named, DCILCallback(0.5, **given))
    [call] = re.findall(r"To prune .* give (DCILCallback\(.*?\)), compressed_loss a function", str(caught.value))
    callback = eval(call, {"DCILCallback": DCILCallback})
    fitted(Named, callback)
    assert callback.reached == pytest.approx(0.5, abs=0.01)
    assert callback.update_interval == given.get("update_interval", 16)
    assert callback.effects["the dense pass"] == 8


# Networks that nobody named


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_the_argument_that_names_the_network_is_that_of_who_needs_it(first, tmp_path):
    export = ExportCallback(tmp_path / "model.onnx")
    callbacks = [CompressionReport(path=tmp_path / "report", latency=False), export]
    with pytest.raises(CaptureError, match=r"'generator', 'discriminator'; choose the network with network=$"):
        fitted(Gan, *(callbacks if first else callbacks[::-1]))
    with pytest.raises(CaptureError, match=r"choose the network with student= or network=, or give the first and"):
        fitted(Gan, kd(student=None), export)


@pytest.mark.slow
def test_a_network_that_is_not_called_is_named_by_its_argument(tmp_path):
    class Unused(Gan):
        def build(self):
            super().build()
            self.unused = torch.nn.Linear(1, 1)

    with pytest.raises(CaptureError, match="all training steps so far called no unused"):
        fitted(Unused, ExportCallback(tmp_path / "model.onnx", network="unused"))

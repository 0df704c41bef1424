"""CompressionMixin: which terms belong to which losses of a step that optimises manually."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from contract.gans import Functions, Gan, Seldom, Shared, Silent, Swapped, Untoggled, by_hand, teacher
from contract.modules import CLASSES, FEATURES, MixinClassifier, difference, loader, made, trainer
from torch import nn
from torch.nn import functional as F

from lightning_compress import CompressionMixin, DCILCallback, DistillationCallback, PruningCallback
from lightning_compress.functional import distillation_loss
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.passes import Term
from lightning_compress.mechanisms.step import step_controller


class TwoSteps(MixinClassifier):
    """Two optimizer steps a batch, each with its own forward and its own total."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        for half in (slice(0, 4), slice(4, 8)):
            optimizer.zero_grad()
            self.manual_backward(self.compressed_loss(F.cross_entropy(self.model(x[half]), y[half])))
            optimizer.step()


class Forgets(MixinClassifier):
    def total(self, task_loss):
        return task_loss


KINDS = (Swapped, Untoggled, Functions, Shared, Silent, Seldom)


def kd(**settings):
    return DistillationCallback(teacher(), student="generator", loss_kind="mse", task_weight=0.5, **settings)


def distilled(weight=0.9):
    """What a generator learns from by :func:`kd`."""
    network = teacher()
    return lambda module, loss, noise, fake: 0.5 * loss + weight * F.mse_loss(fake, network(noise).detach())


def fitted(kind, *callbacks, **settings):
    module = made(kind)
    trainer(*callbacks, **settings).fit(module, loader())
    return module


def classifier_by_hand(module, network, size):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader(batch_size=size):
        logits = module.model(x)
        soft = distillation_loss(logits, network(x).detach(), 4.0)
        optimizer.zero_grad()
        (0.1 * F.cross_entropy(logits, y) + 0.9 * soft).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(("kind", "size"), [(MixinClassifier, 8), (TwoSteps, 4)])
def test_a_fit_equals_the_loop_by_hand(kind, size):
    network, module = nn.Linear(FEATURES, CLASSES), made(kind)
    run = trainer(DistillationCallback(network))
    run.fit(module, loader())
    assert difference(module, classifier_by_hand(made(kind), network, size)) < 1e-7
    assert run.callback_metrics["compress/kd/loss"] > 0
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    "kind",
    [
        Gan,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (Swapped, Untoggled, Functions, Shared, Silent, Seldom)
        ),
    ],
)
def test_of_two_networks_only_the_student_s_loss_changes(kind):
    """Also where the other loss was computed with the student's output too, but without its graph."""
    order = Swapped if kind in (Shared, Silent) else kind
    callback = kd()
    module = fitted(kind, callback)
    assert difference(module, by_hand(order, distilled())) < 1e-7
    assert difference(module, by_hand(order)) > 1e-3
    assert callback.effects[callback.effect] == (4 if kind is Seldom else 8)


class Whole(Gan):
    """Both losses are computed from both networks, and each is judged in one call."""

    named = True

    def total(self, loss, batch):
        names = ["kd"] if loss == self.generator_loss else ["other"]
        return self.compressed_loss(loss(batch), callbacks=names if self.named else None)

    def discriminator_loss(self, batch):
        real, noise = self.images(batch)
        judged = self.discriminator(torch.cat([real, self.generator(noise).detach()])).chunk(2)
        return F.softplus(-judged[0]).mean() + F.softplus(judged[1]).mean()


class Unnamed(Whole):
    named = False


def judge(network):
    return DistillationCallback(
        network, student="discriminator", loss_kind="mse", task_weight=1.0, kd_weight=0.3, name="other"
    )


def test_terms_that_are_named_belong_to_the_loss():
    judges, taught, losses = made(Gan, seed=9).discriminator, [], []

    class Looks(Whole):
        def total(self, loss, batch):
            losses.append((loss(batch).detach(), total := super().total(loss, batch)))
            taught.append(total.detach())
            return total

    module = fitted(Looks, kd(), judge(judges))
    reference = made(Whole)
    first, second = reference.configure_optimizers()
    network = teacher()
    for batch in loader():
        real, noise = reference.images(batch)
        fake = reference.generator(noise)
        first.zero_grad()
        distilled()(reference, reference.generator_loss(batch), noise, fake).backward()
        first.step()
        both = torch.cat([real, reference.generator(noise).detach()])
        second.zero_grad()
        soft = F.mse_loss(reference.discriminator(both), judges(both).detach())
        (reference.discriminator_loss(batch) + 0.3 * soft).backward()
        second.step()
    assert difference(module, reference) < 1e-7
    assert network(noise).shape == noise.shape
    assert all(bool(total != loss) for loss, total in losses)


def test_what_is_not_said_is_an_error_and_no_guess():
    with pytest.raises(CaptureError, match=r"students of 'kd' and of 'other', so it is not said .*callbacks=\['kd'\]"):
        fitted(Unnamed, kd(), judge(made(Gan, seed=9).discriminator))


class Names(Gan):
    names = ()

    def total(self, loss, batch):
        return self.compressed_loss(loss(batch), callbacks=self.names)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["kdd"], ValueError, r"callbacks names 'kdd', and no callback .* there are \['kd'\]; did you mean 'kd'\?"),
        ("kd", TypeError, r"callbacks must be a list of names, got 'kd'; give \['kd'\]"),
        (["kd"], CaptureError, r"callbacks names 'kd', and its student 'generator' was not called since the last"),
        ([], RuntimeError, r"had no effect so far: no loss .* from 'generator', or its callbacks= left 'kd' out"),
    ],
)
def test_names_are_checked(names, error, message):
    class Own(Names):
        def discriminator_loss(self, batch):
            return F.softplus(-self.discriminator(self.images(batch)[0])).mean()

    Own.names = names
    with pytest.raises(error, match=message):
        fitted(Own, kd())


def test_a_loss_that_is_computed_from_no_student_can_have_a_term_by_name():
    """As where nothing is learned but what the teacher says; the call is the one since the last loss."""

    class Only(MixinClassifier):
        def total(self, task_loss):
            return self.compressed_loss(task_loss.detach(), callbacks=["kd"])

    network, module = nn.Linear(FEATURES, CLASSES), made(MixinClassifier)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for x, _ in loader():
        optimizer.zero_grad()
        (0.9 * distillation_loss(module.model(x), network(x).detach(), 4.0)).backward()
        optimizer.step()
    assert difference(fitted(Only, DistillationCallback(network)), module) < 1e-7


@pytest.mark.parametrize("kind", [Swapped, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Gan, Untoggled))])
def test_a_student_that_was_not_named_is_not_guessed_from_the_first_loss(kind):
    """While it is toggled, the other looks frozen; and another network may only be called for the next loss."""

    class Apart(kind):
        def discriminator_loss(self, batch):
            return F.softplus(-self.discriminator(self.images(batch)[0])).mean()

    network = made(Gan, seed=9).discriminator if kind is Swapped else teacher()
    with pytest.raises(CaptureError, match=r"calls 2 modules with parameters: .*choose the network with student="):
        fitted(Apart, DistillationCallback(network, loss_kind="mse"))


def test_a_student_that_is_called_twice_for_one_loss_is_refused():
    class Twice(Gan):
        def generator_loss(self, batch):
            return super().generator_loss(batch) + super().generator_loss(batch)

    with pytest.raises(CaptureError, match=r"the step calls the student 'generator' 2 times"):
        fitted(Twice, kd())


def test_without_a_callback_the_loss_is_the_task_loss():
    module, loss = made(MixinClassifier), torch.tensor(2.0)
    assert module.compressed_loss(loss) is loss
    assert module.compressed_loss(lambda: loss, callbacks=["kd"]) is loss


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, "task_loss must be a tensor, or a function that computes one, got float"),
        (lambda: {"loss": 0.5}, "task_loss must be a function that returns a tensor, not dict"),
        (torch.ones(3), r"task_loss must be one number, got shape \(3,\); give its mean, or its sum"),
    ],
)
@pytest.mark.parametrize("callbacks", [(), (kd,)])
def test_what_is_no_loss_is_refused(given, message, callbacks):
    class Wrong(Gan):
        def total(self, loss, batch):
            return self.compressed_loss(given)

    with pytest.raises((TypeError, ValueError), match=message):
        fitted(Wrong, *(build() for build in callbacks))


def test_a_loss_without_terms_comes_back_as_it_is():
    class Looks(Gan):
        def total(self, loss, batch):
            value = loss(batch)
            same.append((total := self.compressed_loss(value)) is value)
            return total

    same = []
    fitted(Looks, kd())
    assert same == [False, True] * 8


def test_a_step_that_learns_and_never_asks_is_refused():
    module = made(Forgets)
    with pytest.raises(RuntimeError, match=r"Forgets.training_step never called self.compressed_loss.*\['kd'\]"):
        trainer(DistillationCallback(nn.Linear(FEATURES, CLASSES))).fit(module, loader())
    assert "training_step" not in vars(module)


def test_a_step_that_skips_its_batch_need_not_ask():
    class Skips(Gan):
        def training_step(self, batch, batch_idx):
            if batch_idx % 4 != 0:
                super().training_step(batch, batch_idx)

    class Every(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            effects.append(callback.effects[callback.effect])

    effects, callback = [], kd()
    fitted(Skips, callback, Every())
    assert effects == [0, 1, 2, 3, 3, 4, 5, 6]


def test_it_is_for_modules_only():
    with pytest.raises(TypeError, match=r"Plain is no torch.nn.Module"):
        type("Plain", (CompressionMixin,), {})().compressed_loss(torch.ones(()))


def test_asking_in_a_step_with_automatic_optimisation_is_refused():
    class Automatic(MixinClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return self.compressed_loss(self.task_loss(batch))

    with pytest.raises(RuntimeError, match="compressed_loss is for training_step with automatic_optimization=False"):
        trainer(DistillationCallback(nn.Linear(FEATURES, CLASSES))).fit(made(Automatic), loader())


def test_a_tensor_where_the_step_has_to_run_twice_is_refused():
    with pytest.raises(RuntimeError, match=r"'dcil' runs the step twice, .*: give compressed_loss a function"):
        fitted(MixinClassifier, DCILCallback(0.4, dense_path="shared"))


# In a step without a Trainer: a term of 100 times what the student returns, and half of the task loss


class Loop(CompressionMixin, nn.Module):
    automatic_optimization = False

    def __init__(self, step):
        super().__init__()
        self.model, self.other, self.step = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), step
        nn.init.ones_(self.model.weight)
        nn.init.ones_(self.other.weight)

    def training_step(self, x):
        return [float(loss.detach()) for loss in self.step(self, x)]


def looped(step, student="model"):
    net = Loop(step)
    with step_controller(net) as controller:
        capture = controller.capture(student)
        term = Term("kd", lambda passes: 100 * passes["plain"].call(capture).output.sum(), student=capture)
        with controller.term(term), controller.task_weight("kd", 0.5):
            return net.training_step(torch.ones(1, 1))


@pytest.mark.parametrize("names", [None, ["kd"]])
@pytest.mark.parametrize("student", [None, "model"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_losses_may_all_be_computed_before_the_first_is_asked_for(order, student, names):
    def step(net, x):
        losses = [net.model(x).sum(), net.model(2 * x).sum()]
        return [net.compressed_loss(losses[index], callbacks=names) for index in order]

    assert looped(step, student) == [[100.5, 201.0][index] for index in order]


def test_another_network_s_loss_may_be_asked_for_first():
    def step(net, x):
        ours, others = net.model(x).sum(), net.other(3 * x).sum()
        return net.compressed_loss(others), net.compressed_loss(ours)

    assert looped(step) == [3.0, 100.5]


def test_losses_of_one_call_are_all_weighed_and_its_term_is_added_once():
    def step(net, x):
        out = net.model(x)
        first, second = net.compressed_loss(out.sum()), net.compressed_loss(4 * out.sum())
        return first, second, net.compressed_loss((out + net.model(2 * x)).sum())

    assert looped(step) == [100.5, 2.0, 201.5]


def test_a_loss_without_terms_leaves_the_call_to_the_next():
    def step(net, x):
        loss = net.model(x).sum()
        return net.compressed_loss(loss, callbacks=[]), net.compressed_loss(loss)

    assert looped(step) == [1.0, 100.5]


def test_what_is_written_between_two_losses_does_not_change_the_term():
    def step(net, x):
        out = net.model(x)
        net.compressed_loss(net.other(x).sum())
        return (net.compressed_loss(out.mul_(3).sum()),)

    assert looped(step) == [101.5]


def again(net, x):
    loss = net.model(x).sum()
    return net.compressed_loss(loss), net.compressed_loss(2 * loss, callbacks=["kd"])


def older(net, x):
    out = net.model(x)
    return net.compressed_loss(net.other(x).sum()), net.compressed_loss(out.detach().sum(), callbacks=["kd"])


def twice(net, x):
    return (net.compressed_loss(net.compressed_loss(net.model(x).sum()) + 1),)


def to_log(net, x):
    loss = net.model(x).sum()
    return net.compressed_loss(loss).detach(), net.compressed_loss(loss)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (to_log, "task_loss is one that compressed_loss was asked for before in this step"),
        (
            again,
            "callbacks names 'kd', whose term was added to an earlier loss of this step: it is added once for each",
        ),
        (older, "callbacks names 'kd', and its student 'model' was not called since the last"),
        (twice, "task_loss was computed from a loss that compressed_loss has given back in this step"),
    ],
)
def test_no_call_and_no_loss_counts_twice(step, message):
    with pytest.raises(RuntimeError, match=message):
        looped(step)


def within(net, x):
    return (net.compressed_loss(lambda: net.compressed_loss(net.model(x).sum())),)


def test_a_function_that_asks_itself_is_refused():
    with pytest.raises(RuntimeError, match="task_loss is a function that calls compressed_loss itself; give one"):
        looped(within)


def test_two_losses_of_one_node_are_two():
    def step(net, x):
        first, second = torch.stack([net.model(x).sum(), net.other(x).sum()]).unbind()
        return net.compressed_loss(first, callbacks=["kd"]), net.compressed_loss(second, callbacks=[])

    assert len(looped(step)) == 2


def test_names_may_come_from_a_generator():
    def step(net, x):
        return (net.compressed_loss(net.model(x).sum(), callbacks=(name for name in ["kd"])),)

    assert looped(step) == [100.5]


@pytest.mark.parametrize("given", [3, True, b"kd", ["kd", 3]])
@pytest.mark.parametrize("attached", [True, False])
def test_what_are_no_names_is_refused_by_the_argument_s_name(given, attached):
    def step(net, x):
        return (net.compressed_loss(net.model(x).sum(), callbacks=given),)

    with pytest.raises(TypeError, match="callbacks must be a list of names, got "):
        looped(step) if attached else Loop(step).training_step(torch.ones(1, 1))


class Validated(Loop):
    def validation_step(self, x):
        return self.training_step(x)


def test_in_a_validation_step_the_loss_is_the_task_loss():
    net = Validated(lambda net, x: (net.compressed_loss(net.model(x).sum()),))
    with step_controller(net) as controller, controller.task_weight("kd", 0.5):
        assert net.validation_step(torch.ones(1, 1)) == [1.0]
        with pytest.raises(RuntimeError, match="compressed_loss is for training_step"):
            net.compressed_loss(torch.ones(()))


class Outside(MixinClassifier):
    """It never asks, and its optimizer steps after the step."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.task_loss(batch))

    def on_train_batch_end(self, *_):
        self.optimizers().step()
        self.optimizers().zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: DistillationCallback(nn.Linear(FEATURES, CLASSES)),
        lambda: DCILCallback(0.5, dense_path="shared"),
        lambda: PruningCallback(0.5),
    ],
)
def test_optimizers_that_step_outside_of_a_step_that_never_asks_are_noticed(build):
    with pytest.raises(RuntimeError, match=r"had no effect: in a whole epoch Outside.training_step never called self"):
        fitted(Outside, build())

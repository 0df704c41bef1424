"""DistillationCallback against training loops written by hand: the weights after eight steps are equal, bit for bit."""

from __future__ import annotations

import contextlib
import functools
from importlib import import_module

import lightning.pytorch as L
import pytest
import torch
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    DictClassifier,
    ManualClassifier,
    MixinClassifier,
    NetworkItself,
    NormClassifier,
    difference,
    loader,
    made,
    scaled,
    teacher_for,
    trainer,
    with_schedule,
)
from torch.nn import functional as F

from lightning_compress import CompressionMixin, DistillationCallback
from lightning_compress import functional as C

TASK, KD, TEMPERATURE = 0.3, 0.7, 3.0


def distillation(kind=Classifier, **settings):
    temperature = {} if settings.get("loss_kind") in ("mse", "hard") else {"temperature": TEMPERATURE}
    arguments = {"task_weight": TASK, "kd_weight": KD, **temperature, **settings}
    return DistillationCallback(arguments.pop("teacher", None) or teacher_for(kind), **arguments)


def soft(student, teacher, labels):
    return C.distillation_loss(student, teacher, TEMPERATURE)


def logits_of(network, batch):
    """The network's logits for a batch of any of our kinds."""
    if isinstance(batch, dict):
        return network(features=batch["features"])["logits"], batch["label"]
    return network(batch[0]), batch[1]


class ByHand:
    """A plain loop: forward, both losses, their weighted sum, backward, step."""

    def __init__(self, kind=Classifier, *, kd=soft, task=F.cross_entropy, autocast=None):
        self.module = made(kind)
        self.kind = kind
        self.teacher = teacher_for(kind).eval()
        self.kd, self.task, self.autocast = kd, task, autocast
        settings = self.module.configure_optimizers()
        self.optimizer, self.scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
        self.task_losses, self.kd_losses = [], []

    def loss(self, batch):
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            student, labels = logits_of(getattr(self.module, "model", self.module), batch)
            with torch.no_grad():
                teacher, _ = logits_of(self.teacher, batch)
            task, kd = self.task(student, labels), self.kd(student, teacher, labels)
            self.task_losses.append(task.item())
            self.kd_losses.append(kd.item())
            return task * TASK + kd * KD

    def run(self, *, windows=1, scaler=None, skip=()):
        self.module.train()
        for index, batch in enumerate(loader(self.kind)):
            if index in skip:
                continue
            loss = self.loss(batch) / windows
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (index + 1) % windows:
                continue
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self.module


def fitted(kind=Classifier, callbacks=None, **settings):
    """The same with the callback; validation and its sanity check are on."""
    module = made(kind)
    fitting = trainer(*([distillation(kind)] if callbacks is None else callbacks), **settings)
    fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    return module


# Steps that people write


class OnlyBatch(Classifier):
    def training_step(self, batch):
        return self.task_loss(batch)


class OtherName(Classifier):
    def training_step(self, train_batch, batch_idx, *extra):
        return self.task_loss(train_batch)


class AnyArguments(Classifier):
    def training_step(self, *args, **kwargs):
        return self.task_loss(args[0] if args else kwargs["batch"])


class LoaderIterator(Classifier):
    def training_step(self, dataloader_iter):
        batch, _batch_idx, _dataloader_idx = next(dataloader_iter)
        return self.task_loss(batch)


def decorated(step):
    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


class announced(contextlib.ContextDecorator):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class Wrapped(Classifier):
    @decorated
    def training_step(self, batch, batch_idx):
        return self.task_loss(batch)


class WrappedOnlyBatch(Classifier):
    @decorated
    def training_step(self, batch):
        return self.task_loss(batch)


class TwiceWrapped(Classifier):
    @decorated
    @decorated
    def training_step(self, batch, batch_idx):
        return self.task_loss(batch)


class InContext(Classifier):
    @announced()
    def training_step(self, batch, batch_idx):
        return self.task_loss(batch)


class WithoutForward(Classifier):
    def task_loss(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])


class SelfForward(Classifier):
    def task_loss(self, batch):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


class ItselfForward(NetworkItself):
    def task_loss(self, batch):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


class DictReturn(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": self.task_loss(batch), "batch_idx": batch_idx, "names": ["a"]}


STEPS_WRITTEN = [
    Classifier,
    NormClassifier,
    NetworkItself,
    DictClassifier,
    OnlyBatch,
    OtherName,
    AnyArguments,
    LoaderIterator,
    Wrapped,
    WrappedOnlyBatch,
    TwiceWrapped,
    InContext,
    WithoutForward,
    SelfForward,
    ItselfForward,
    DictReturn,
]


@pytest.mark.parametrize("kind", STEPS_WRITTEN, ids=lambda kind: kind.__name__)
def test_every_way_to_write_a_step(kind):
    by_hand, module = ByHand(kind).run(), fitted(kind)
    assert difference(by_hand, module) == 0
    assert difference(module, made(kind)) > 0.01


def test_what_a_step_returns_beside_the_loss_is_kept():
    returned = []

    class Reading(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            returned.append((outputs["batch_idx"], outputs["names"], outputs["loss"].item()))

    by_hand = ByHand(DictReturn)
    by_hand.run()
    fitted(DictReturn, [distillation(DictReturn), Reading()])
    totals = [task * TASK + kd * KD for task, kd in zip(by_hand.task_losses, by_hand.kd_losses, strict=True)]
    assert [entry[:2] for entry in returned] == [(index, ["a"]) for index in range(STEPS)]
    assert [entry[2] for entry in returned] == pytest.approx(totals, abs=1e-6)


@pytest.mark.parametrize("kind", [Classifier, NormClassifier, DictClassifier], ids=lambda kind: kind.__name__)
def test_accumulation(kind):
    by_hand, module = ByHand(kind).run(windows=4), fitted(kind, accumulate_grad_batches=4)
    assert difference(by_hand, module) == 0
    assert difference(by_hand, ByHand(kind).run()) > 0


@pytest.mark.parametrize("windows", [1, 4])
def test_bfloat16(windows):
    by_hand = ByHand(NormClassifier, autocast=torch.bfloat16).run(windows=windows)
    module = fitted(NormClassifier, precision="bf16-mixed", accumulate_grad_batches=windows)
    assert difference(by_hand, module) == 0
    assert difference(by_hand, ByHand(NormClassifier).run(windows=windows)) > 0


class InBfloat16(ByHand):
    """Weights, teacher and inputs have that type."""

    def __init__(self, kind):
        super().__init__(kind)
        self.module.bfloat16()
        self.teacher.bfloat16()

    def loss(self, batch):
        return super().loss([entry.bfloat16() if entry.is_floating_point() else entry for entry in batch])


def test_bfloat16_throughout():
    by_hand = InBfloat16(NormClassifier).run()
    module = fitted(NormClassifier, precision="bf16-true")
    assert {entry.dtype for entry in module.parameters()} == {torch.bfloat16}
    assert difference(by_hand, module) == 0


@pytest.mark.parametrize("windows", [1, 4])
def test_float16_with_a_scaler(windows):
    scaler = torch.amp.GradScaler("cpu")
    by_hand = ByHand(NormClassifier, autocast=torch.float16).run(windows=windows, scaler=scaler)
    plugin = scaled()
    module = fitted(NormClassifier, plugins=plugin, accumulate_grad_batches=windows)
    assert difference(by_hand, module) == 0
    assert plugin.scaler._growth_tracker.item() == scaler._growth_tracker.item() == STEPS // windows


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "form", ["module", *(pytest.param(form, marks=pytest.mark.slow) for form in ("child", "in place"))]
)
@pytest.mark.sample
def test_compiled(form):
    """The first two forms are among the fast tests of contract/test_compiled.py."""
    module = made(Classifier)
    network, handed = module.model, module
    if form == "child":
        module.model = torch.compile(network, backend="eager")
    elif form == "in place":
        network.compile(backend="eager")
    else:
        handed = torch.compile(module, backend="eager")
    trainer(distillation()).fit(handed, loader())
    assert difference(ByHand().run().model, network) == 0


def test_a_loss_that_ends_in_a_root():
    class Root(Classifier):
        def task_loss(self, batch):
            return super().task_loss(batch).sqrt()

    by_hand = ByHand(task=lambda student, labels: F.cross_entropy(student, labels).sqrt()).run()
    assert difference(by_hand, fitted(Root)) == 0


@pytest.mark.parametrize("skip", [{2}, {0}, {0, 1, 7}])
@pytest.mark.parametrize("early", [True, False])
def test_skipped_batches(skip, early):
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            if early and batch_idx in skip:
                return None
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in skip else loss

    class Counting(L.Callback):
        """The scheduler goes on in a skipped step of Lightning's; here both stand still."""

        def on_fit_start(self, trainer, pl_module):
            trainer.lr_scheduler_configs.clear()

    by_hand = ByHand()
    by_hand.scheduler.step = lambda: None
    assert difference(by_hand.run(skip=skip), fitted(Skipping, [Counting(), distillation()])) == 0


class LBFGS(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, history_size=3)


def test_lbfgs():
    module, teacher, network = fitted(LBFGS), teacher_for(Classifier).eval(), made(LBFGS)
    optimizer, evaluations = network.configure_optimizers(), []
    for x, y in loader():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            student = network(x)
            loss = F.cross_entropy(student, y) * TASK + soft(student, teacher(x).detach(), y) * KD
            loss.backward()
            evaluations.append(loss.item())
            return loss

        optimizer.step(closure)
    assert difference(network, module) == 0
    assert len(evaluations) > 2 * STEPS


KINDS = {
    "softmax": soft,
    "bernoulli": lambda s, t, y: C.bernoulli_distillation_loss(s, t, TEMPERATURE),
    "mse": lambda s, t, y: C.regression_distillation_loss(s, t),
    "hard": lambda s, t, y: C.hard_distillation_loss(s, t, class_dim=1),
    "dkd": lambda s, t, y: C.decoupled_distillation_loss(s, t, y, TEMPERATURE, class_dim=1),
    "dist": lambda s, t, y: C.dist_loss(s, t, TEMPERATURE, class_dim=1),
}


@pytest.mark.parametrize("kind", [Classifier, DictClassifier], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("loss_kind", KINDS)
def test_every_kind_of_loss(loss_kind, kind):
    by_hand = ByHand(kind, kd=KINDS[loss_kind]).run()
    assert difference(by_hand, fitted(kind, [distillation(kind, loss_kind=loss_kind)])) == 0


def test_what_is_logged():
    """The user's loss stays the task loss; ours is unweighted, and each instance has its own name."""
    seen = []

    class Reading(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    by_hand = ByHand()
    by_hand.run()
    module = fitted(callbacks=[Reading(), distillation()])
    assert [step["train_loss"] for step in seen] == pytest.approx(by_hand.task_losses, abs=0)
    assert [step["compress/kd/loss"] for step in seen] == pytest.approx(by_hand.kd_losses, abs=0)
    assert module.trainer.callback_metrics.keys() == {
        "train_loss",
        "val_loss",
        "compress/kd/loss",
        "compress/kd/agreement",
        "compress/kd/val_loss",
        "compress/kd/val_agreement",
    }


def test_validation_measures_the_final_weights_as_a_plain_loop_does():
    module, teacher = fitted(NormClassifier), teacher_for(NormClassifier).eval()
    losses, hits = [], []
    with torch.no_grad():
        for x, y in loader(rows=2 * BATCH):
            student = module.eval()(x)
            losses.append(soft(student, teacher(x), y))
            hits.append((student.argmax(1) == teacher(x).argmax(1)).float().mean())
    metrics = module.trainer.callback_metrics
    assert metrics["compress/kd/val_loss"].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    assert metrics["compress/kd/val_agreement"].item() == pytest.approx(torch.stack(hits).mean().item(), abs=1e-6)


def test_two_instances_log_apart_and_add_up():
    second = teacher_for(Classifier, seed=9)
    callbacks = [
        distillation(name="one"),
        DistillationCallback(second, task_weight=1.0, kd_weight=0.4, temperature=2.0, name="two"),
    ]
    module, network = fitted(callbacks=callbacks), ByHand()
    second = teacher_for(Classifier, seed=9).eval()
    for x, y in loader():
        student = network.module(x)
        task = F.cross_entropy(student, y) * TASK
        one = soft(student, network.teacher(x).detach(), y) * KD
        two = C.distillation_loss(student, second(x).detach(), 2.0)
        (task + one + two * 0.4).backward()
        network.optimizer.step()
        network.optimizer.zero_grad()
        network.scheduler.step()
    assert difference(network.module, module) == 0
    metrics = module.trainer.callback_metrics
    assert metrics["compress/one/loss"].item() == pytest.approx(one.item() / KD, abs=1e-6)
    assert metrics["compress/two/loss"].item() == pytest.approx(two.item(), abs=0)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_trainer_and_module_of_either_package(namespace):
    package = import_module(namespace)

    class Lit(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = made(Classifier).model

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        lr, optimise, configure_optimizers = Classifier.lr, staticmethod(with_schedule), Classifier.configure_optimizers

    module = Lit()
    fitting = package.Trainer(
        callbacks=[distillation()],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fitting.fit(module, loader())
    assert difference(module, ByHand().run()) == 0


# Manual optimisation


def test_manual_optimisation_is_refused_by_name():
    module = made(ManualClassifier)
    message = (
        r"DistillationCallback.*ManualClassifier.*lightning_compress\.CompressionMixin.*compressed_loss\(task_loss\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer(distillation()).fit(module, loader(), loader())
    assert difference(module, made(ManualClassifier)) == 0
    assert "training_step" not in vars(module)


def test_a_step_that_forgets_compressed_loss_is_refused():
    class Forgetful(CompressionMixin, ManualClassifier):
        pass

    with pytest.raises(RuntimeError, match=r"Forgetful.training_step never called self.compressed_loss"):
        trainer(distillation()).fit(made(Forgetful), loader(), loader())


def manual_loop(network, losses, optimizers):
    """By hand: for each optimizer one forward, one loss and one step a batch."""
    teacher = teacher_for(Classifier).eval()
    for x, y in loader():
        for task, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            student = network(x)
            (task(student, y) * TASK + soft(student, teacher(x).detach(), y) * KD).backward()
            optimizer.step()


def test_the_mixin_with_one_optimizer():
    module = fitted(MixinClassifier)
    network = made(MixinClassifier)
    manual_loop(network, [F.cross_entropy], [network.configure_optimizers()["optimizer"]])
    assert difference(network, module) == 0
    plain = fitted(MixinClassifier, [])
    assert difference(plain, fitted(ManualClassifier, [])) == 0
    assert difference(plain, module) > 0


def squared(student, labels):
    return F.mse_loss(student, F.one_hot(labels, 3).float())


class TwoOptimizers(CompressionMixin, Classifier):
    """One for each layer; each with its own forward and loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer, task in zip(self.optimizers(), (F.cross_entropy, squared), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.compressed_loss(task(self(x), y)))
            optimizer.step()

    def configure_optimizers(self):
        first, last = self.model[0], self.model[-1]
        return torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.Adam(last.parameters(), lr=0.01)


def test_the_mixin_with_two_optimizers():
    module, callback = made(TwoOptimizers), distillation()
    trainer(callback).fit(module, loader(), loader())
    network = made(TwoOptimizers)
    manual_loop(network, (F.cross_entropy, squared), network.configure_optimizers())
    assert difference(network, module) == 0
    assert callback.effects["the distillation loss"] == 2 * STEPS

"""AttentionTransferCallback in real fits: its pairs, attention by gradients, pictures, and everything it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import math
import random
import re

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.features import (
    BLOCKS,
    STAGES,
    Block,
    ConvChain,
    ConvClassifier,
    ConvMixin,
    TokenClassifier,
    conv_network,
    conv_teacher,
    feature_fit,
    feature_loader,
    in_a_row,
    token_teacher,
)
from contract.modules import BATCH, CLASSES, STEPS, difference, made, trainer
from contract.traces import condition
from lightning.pytorch.loggers.logger import Logger
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import AttentionTransferCallback, CompressionReport
from lightning_compress import functional as C
from lightning_compress.callbacks.features import Pair
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.report.attention import MapPair, attention_picture

X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(5))


class Plain(L.LightningModule):
    """Any network; the task loss pulls what it returns to four."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch, batch_idx):
        return (self.model(batch[0]) - 4).square().mean()

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Net(nn.Module):
    """Three layers, called as a function says."""

    def __init__(self, run=lambda net, x: net.last(net.first(x)), *, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.spare = nn.Conv2d(4, 4, 3, padding=1)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Wrapped(nn.Module):
    """Gives what a layer returns in a container."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Conv2d(1, 4, 3, padding=1), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


def attention(teacher=None, **settings):
    weight = {} if {"weight", "strength"} & set(settings) else {"strength": 0.1}
    return AttentionTransferCallback(conv_teacher() if teacher is None else teacher, **weight, **settings)


def gradients(teacher=None, **settings):
    teacher = conv_teacher() if teacher is None else teacher
    return AttentionTransferCallback(teacher, map_kind="gradient", **{"weight": 1.0, **settings})


def batches(*tensors, size=2):
    return DataLoader(TensorDataset(*tensors), batch_size=size)


def additions(module):
    """Hooks, and what shadows a method: a compiled module has some of its own."""
    methods = {"forward", "training_step", "validation_step", "log", "log_dict", "print"}
    return [
        (name, len(part._forward_hooks), len(part._forward_pre_hooks), methods & set(vars(part)))
        for name, part in module.named_modules()
    ]


class Watching(L.Callback):
    """The hooks that were reached."""

    def __init__(self) -> None:
        self.reached = []

    def on_fit_start(self, trainer, pl_module):
        self.reached.append("fit")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reached.append("batch")


def refused(message, module, callback, *, error=ValueError, before="step", x=X, **settings):
    """The error comes before the fit, its first batch or its first step; module and teacher are as they were."""
    module = module if isinstance(module, L.LightningModule) else Plain(module)
    state, added, teacher = copy.deepcopy(module.state_dict()), additions(module), condition(callback.teacher)
    watching = Watching()
    data = feature_loader(type(module)) if hasattr(module, "task_loss") else batches(x)
    with pytest.raises(error, match=message):
        trainer(watching, callback, **settings).fit(module, data)
    assert watching.reached == {"fit": [], "start": ["fit"], "step": ["fit", "batch"]}[before]
    assert difference(module, state) == 0
    assert module.global_step == 0
    assert additions(module) == added
    assert condition(callback.teacher) == teacher


# Pairs


TABLE = """
at: proposed pairs, to be given as an argument if others are meant
  student             teacher
  stage1   4 x 6 x 6  stage1   7 x 6 x 6
  stage2   6 x 3 x 3  stage2   10 x 3 x 3
"""


def saved_pairs(callback):
    return callback.state_dict()["pairs"]


def test_the_proposal_is_printed_and_kept(capsys):
    callback = attention()
    feature_fit(made(ConvClassifier), callback)
    assert capsys.readouterr().out.startswith(TABLE)
    assert callback.settled == (Pair("stage1", "stage1"), Pair("stage2", "stage2"))
    assert saved_pairs(callback) == [["stage1", "stage1"], ["stage2", "stage2"]]


def test_pairs_that_are_given_are_not_printed(capsys):
    callback = attention(pairs=STAGES)
    feature_fit(made(ConvClassifier), callback)
    assert "proposed" not in capsys.readouterr().out
    assert callback.settled == (Pair("stage1", "stage1"), Pair("stage2", "stage2"))
    assert saved_pairs(callback) == []


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((4, 6, 6), (7, 10), ["stage1 stage1", "stage2 stage2"]),  # sizes 6, 3, 2 and 6, 3
        ((4, 6), (5, 5, 5), ["stage1 stage1", "stage2 stage2"]),
        ((4,), (7, 10), ["stage1 stage1"]),
    ],
)
def test_stages_of_equal_size_are_proposed(student, teacher, expected):
    callback = attention(conv_teacher(3, *teacher))
    trainer(callback, max_steps=1).fit(Plain(conv_network(*student)), batches(X))
    assert [f"{pair.student} {pair.teacher}" for pair in callback.settled] == expected


def test_stages_of_other_sizes_are_proposed_by_their_order():
    callback = attention(teacher_transform=nn.Upsample(size=(20, 20)))  # 20 and 10 beside the student's 6 and 3
    feature_fit(made(ConvClassifier), callback)
    assert saved_pairs(callback) == [["stage1", "stage1"], ["stage2", "stage2"]]


def test_the_last_block_is_proposed_for_tokens(capsys):
    callback = attention(token_teacher(), strength=0.1)
    feature_fit(made(TokenClassifier), callback)
    assert "\n  block2   5 x 8  block2   5 x 12\n" in capsys.readouterr().out
    assert saved_pairs(callback) == [["block2", "block2"]]


def test_a_chain_is_proposed_with_names_inside_of_the_module():
    callback = attention(student=["backbone", "head"])
    feature_fit(made(ConvChain), callback)
    # of layers that return the very same tensor, the outermost
    assert saved_pairs(callback) == [["backbone.stage1", "stage1"], ["backbone", "stage2"]]


@pytest.mark.sample
@pytest.mark.parametrize("changed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_uses_the_saved_pairs(changed, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    first = attention()
    whole = feature_fit(made(ConvClassifier), first, max_epochs=2)
    module = feature_fit(made(ConvClassifier), attention())
    module.trainer.save_checkpoint(path)
    if changed:
        saved = torch.load(path, weights_only=True)
        saved["callbacks"]["AttentionTransferCallback[at]"]["pairs"] = [["stage2", "stage2"]]
        torch.save(saved, path)
    capsys.readouterr()
    resumed, callback = made(ConvClassifier), attention()
    trainer(callback, max_epochs=2).fit(
        resumed, feature_loader(), feature_loader(), ckpt_path=str(path), weights_only=True
    )
    assert "proposed" not in capsys.readouterr().out
    assert callback.settled == first.settled[changed:]
    assert saved_pairs(callback) == saved_pairs(first)[changed:]
    assert (difference(resumed, whole) == 0) is not changed


def test_given_pairs_go_before_the_saved_ones(tmp_path):
    path = tmp_path / "last.ckpt"
    feature_fit(made(ConvClassifier), attention()).trainer.save_checkpoint(path)
    callback = attention(pairs={"stem": "stem"})
    with pytest.warns(UserWarning, match=r"pairs was 'auto' and is \{'stem': 'stem'\}"):
        trainer(callback, max_epochs=2).fit(
            made(ConvClassifier), feature_loader(), ckpt_path=str(path), weights_only=True
        )
    assert callback.settled == (Pair("stem", "stem"),)


def test_each_fit_proposes_anew(capsys):
    callback = attention()
    feature_fit(made(ConvClassifier), callback)
    assert capsys.readouterr().out.count("proposed pairs") == 1
    trainer(callback, max_steps=1).fit(Plain(nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.Conv2d(3, 3, 1))), batches(X))
    assert capsys.readouterr().out.count("proposed pairs") == 1
    assert callback.settled == (Pair("1", "stage2"),)
    assert saved_pairs(callback) == [["1", "stage2"]]


def test_the_teacher_runs_once_a_batch_and_once_for_the_proposal():
    teacher, forwards = conv_teacher(), []
    teacher.register_forward_hook(lambda *_: forwards.append(1))
    feature_fit(made(ConvClassifier), attention(teacher))
    assert len(forwards) == 1 + STEPS + 2  # validation has two batches; its sanity check is left out


# The strength of the terms


def first_terms(map_kind="power"):
    """The task loss of the first batch, and both terms, unweighted."""
    module = made(ConvClassifier)
    x, y = next(iter(feature_loader()))
    ours = in_a_row(module.model.named_children(), x)
    theirs = in_a_row(conv_teacher().eval().named_children(), x)
    terms = [C.attention_transfer_loss(ours[name], theirs[name], kind=map_kind).item() for name in STAGES]
    return F.cross_entropy(ours["head"], y).item(), *terms


def test_the_terms_of_the_first_batch_are_printed_beside_the_task_loss(capsys):
    task, first, second = first_terms()
    feature_fit(made(ConvClassifier), attention(pairs=STAGES, weight=50.0), max_epochs=2)
    assert capsys.readouterr().out == (
        "\nat: the losses of the first batch, with their weights\n"
        f"  task loss              {task:.4g}\n"
        f"  'stage1' and 'stage1'  {50 * first:.4g}\n"
        f"  'stage2' and 'stage2'  {50 * second:.4g}\n"
    )


def test_a_term_of_more_than_three_times_the_task_loss_is_warned_of():
    task, first, second = first_terms()
    bound = 3 * task / second
    assert second > first
    feature_fit(made(ConvClassifier), attention(pairs=STAGES, weight=0.99 * bound))  # no warning
    message = rf"the term of 'stage2' and 'stage2' is {3.03 * task:.3g}, beside a task loss of {task:.3g}, .* smaller"
    with pytest.warns(UserWarning, match=message) as caught:
        feature_fit(made(ConvClassifier), attention(pairs=STAGES, weight=1.01 * bound))
    assert sum("in the first batch the term of" in str(entry.message) for entry in caught) == 1


def test_the_term_of_the_input_gradients_is_warned_of_too():
    with pytest.warns(UserWarning, match="in the first batch the term of the input gradients is"):
        feature_fit(made(ConvClassifier), gradients(weight=1e6), max_steps=1)


# Validation


def test_validation_is_the_mean_over_all_samples_of_uneven_batches():
    x = torch.randn(7, 1, 6, 6)
    network, teacher = conv_network(4, 6), conv_teacher()
    run = trainer(attention(teacher, pairs=STAGES, weight=10.0), num_sanity_val_steps=2)
    run.fit(Plain(network), batches(x), batches(x, size=4))
    teacher.eval()
    with torch.no_grad():
        ours, theirs = (in_a_row(part.named_children(), x) for part in (network, teacher))
    expected = sum(10.0 * C.attention_transfer_loss(ours[name], theirs[name]).item() for name in STAGES)
    assert run.callback_metrics["compress/at/val_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_validation_with_several_calls_is_not_measured_and_does_not_stop_the_training():
    class Twice(Plain):
        def validation_step(self, batch, batch_idx):
            self.model(batch[0])
            self.model(-batch[0])

    run = trainer(attention(pairs=STAGES))
    with pytest.warns(UserWarning, match="validation calls the student 2 times a step, not once, so it is not mea"):
        run.fit(Twice(conv_network(4, 6)), batches(X), batches(X))
    assert "compress/at/val_loss" not in run.callback_metrics
    assert run.callback_metrics["compress/at/loss"] > 0


def test_attention_by_gradients_is_not_measured_in_validation():
    metrics = feature_fit(made(ConvClassifier), gradients()).trainer.callback_metrics
    assert {key for key in metrics if key.startswith("compress")} == {"compress/at/loss"}


# Attention by gradients


class Linear(L.LightningModule):
    """y = w.x with the loss y^2 / 2, summed over the samples: the gradient by the input is J = y w."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.model = nn.Linear(len(weight), 1, bias=False)
        self.model.weight.data = torch.tensor([weight])

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().sum() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_step_of_a_linear_model_worked_by_hand():
    # The term is weight/2 * mean ||J - J_T||. With r = (J - J_T) / ||J - J_T||: d||J - J_T|| / dw = y r + (w.r) x
    w, v = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.25, -0.5])
    x = np.array([[1.0, 2.0, 0.5], [-1.0, 0.0, 3.0], [0.5, 0.5, 0.5]])
    student, teacher = Linear(w.tolist()), Linear(v.tolist()).model
    run = trainer(gradients(teacher, weight=0.7), precision="64-true")
    run.fit(student, batches(torch.tensor(x), size=3))

    y = x @ w
    distance = np.outer(y, w) - np.outer(x @ v, v)
    norms = np.sqrt((distance**2).sum(axis=1))
    r = distance / norms[:, None]
    slope = y @ x + 0.7 / 2 * np.mean(y[:, None] * r + (r @ w)[:, None] * x, axis=0)
    assert run.callback_metrics["compress/at/loss"].item() == pytest.approx(0.7 / 2 * norms.mean(), rel=1e-7)
    assert student.model.weight[0].tolist() == pytest.approx((w - 0.1 * slope).tolist(), rel=1e-12)


class Augmented(ConvClassifier):
    """With dropout, and noise from three random generators on the input."""

    def build(self):
        super().build()
        self.model.head.insert(0, nn.Dropout2d(0.5))

    def task_loss(self, batch):
        x, y = batch
        noise = random.random() + np.random.random() + torch.randn_like(x)  # noqa: NPY002 - the global generator
        return F.cross_entropy(self.model(x + 0.1 * noise), y)


class RandomStates(L.Callback):
    """The states after each step."""

    def __init__(self) -> None:
        self.states = []

    def on_train_batch_end(self, *_):
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        self.states.append((random.getstate(), numpy_state, torch.get_rng_state().tolist()))


def test_the_teacher_in_the_students_place_gets_the_same_random_input():
    given = {"student": [], "teacher": []}
    module, teacher = made(Augmented), conv_teacher()
    for network, owner in ((module.model.stem, "student"), (teacher, "teacher")):
        network.register_forward_pre_hook(lambda _, args, owner=owner: given[owner].append(args[0].detach().clone()))
    feature_fit(module, gradients(teacher, student="model"), limit_val_batches=0)
    assert len(given["student"]) == len(given["teacher"]) == STEPS
    for ours, theirs in zip(given["student"], given["teacher"], strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_pass_draws_no_random_numbers():
    states = []
    for callbacks in ([], [gradients()]):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        reading = RandomStates()
        feature_fit(made(Augmented), reading, *callbacks, limit_val_batches=0)
        states.append(reading.states)
    assert states[0] == states[1]
    assert len(states[0]) == STEPS


class Recording(Logger):
    """A logger that keeps what it is given."""

    name, version = "recording", 0

    save_dir = None

    def __init__(self) -> None:
        super().__init__()
        self.logged = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.append((metrics, step))


class Bookkeeping(ConvClassifier):
    """A step that leaves something behind wherever a step can."""

    def build(self):
        super().build()
        self.input_norm = nn.BatchNorm2d(1, affine=False)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.seen, self.counts, self.total, self.hits = [], {"steps": 0}, 0, 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(batch_idx)
        self.counts["steps"] += 1
        self.total += len(y)
        logits = self.model(self.input_norm(x))
        self.hits += (logits.argmax(dim=1) == y).sum().item()
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        loss = F.cross_entropy(logits, y)
        self.log("task", loss, on_step=True)
        self.logger.log_metrics({"mine": loss.item()})
        return loss


def test_the_second_pass_leaves_the_users_books_alone():
    runs = []
    for callbacks in ([], [gradients(weight=100.0)]):
        module, logger = made(Bookkeeping), Recording()
        feature_fit(module, *callbacks, logger=logger, log_every_n_steps=1, limit_val_batches=0)
        own = [metrics["mine"] for metrics, _ in logger.logged if "mine" in metrics]
        assert own == [metrics["task"] for metrics, _ in logger.logged if "task" in metrics]
        assert len(own) == STEPS
        assert (module.seen, module.counts, module.total) == (list(range(STEPS)), {"steps": STEPS}, STEPS * BATCH)
        assert module.trainer.callback_metrics["accuracy"].item() == pytest.approx(module.hits / (STEPS * BATCH))
        runs.append((module, own))
    (plain, its_losses), (module, losses) = runs
    assert losses[0] == its_losses[0]
    assert losses[-1] != its_losses[-1]
    for key, value in plain.input_norm.state_dict().items():  # the running statistics and the number of batches
        assert torch.equal(module.input_norm.state_dict()[key], value)
    assert module.input_norm.num_batches_tracked == STEPS


def test_the_gradient_of_the_teachers_pass_reaches_no_parameter():
    """The normalisation before the student is trained: the teacher's loss in the second pass adds nothing to it."""

    class Scaled(ConvClassifier):
        def build(self):
            super().build()
            self.scale = nn.Parameter(torch.ones(()))

        def task_loss(self, batch):
            return F.cross_entropy(self.model(batch[0] * self.scale), batch[1])

    module, by_hand = made(Scaled), made(Scaled)
    trainer(gradients(weight=500.0), max_steps=1).fit(module, feature_loader())
    teacher = conv_teacher().eval()
    x, y = next(iter(feature_loader()))
    x, taught = x * by_hand.scale, x.clone().requires_grad_()
    loss = F.cross_entropy(by_hand.model(x), y)
    (ours,) = torch.autograd.grad(loss, x, create_graph=True)
    (theirs,) = torch.autograd.grad(F.cross_entropy(teacher(taught), y), taught)
    (loss + 250.0 * C.gradient_transfer_loss(ours, theirs)).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    assert difference(module, by_hand) == 0
    assert module.scale.item() != 1


def test_gradients_of_a_network_that_takes_keywords_and_returns_a_dict():
    """The same as of one that does not."""

    class Keyword(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, *, image):
            return {"logits": self.network(image)}

    class KeywordPlain(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": (self.model(image=batch[0])["logits"] - 4).square().mean()}

    first, teacher = conv_network(4, 6), conv_teacher()
    second, started = copy.deepcopy(first), copy.deepcopy(first)
    trainer(gradients(teacher, weight=100.0)).fit(Plain(first), batches(X))
    trainer(gradients(Keyword(teacher), weight=100.0)).fit(KeywordPlain(Keyword(second)), batches(X))
    assert difference(first, second) == 0
    assert difference(first, started) > 0


def test_a_student_may_write_into_the_input_that_is_differentiated():
    """The gradient is that by the input as it was given: the same as of a student that works on a copy."""

    class Shifted(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.inner, self.in_place = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), in_place

        def forward(self, x):
            return self.inner(x.mul_(2.0) if self.in_place else x * 2.0)

    torch.manual_seed(3)
    first = Shifted(True)
    second, teacher = Shifted(False), Shifted(False)
    second.load_state_dict(first.state_dict())
    for network in (first, second):
        trainer(gradients(copy.deepcopy(teacher), weight=5.0)).fit(Plain(network), batches(X.clone()))
    assert difference(first, second) == 0


def test_gradients_refuse_manual_optimisation_that_gives_a_loss_and_not_a_function():
    message = "map_kind='gradient' of 'at' runs the step once more, with the teacher"
    refused(message, made(ConvMixin), gradients(), error=RuntimeError)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_refuse_compiled_code(in_place):
    network = conv_network(4, 6)
    network.compile(backend="eager") if in_place else None
    module = Plain(network if in_place else torch.compile(network, backend="eager"))
    refused("differentiates twice, which compiled code does not allow", module, gradients(), before="fit")


@pytest.mark.parametrize("classes", [2, 5])
def test_gradients_refuse_a_teacher_of_other_classes(classes):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    message = r"teacher's task loss, .*failed: IndexError: Target 2 is out of bounds.* as many classes"
    if classes > CLASSES:
        message = r"map_kind='gradient': the teacher returns .* \(8, 5\) .* the student .* \(8, 3\)"
    refused(message, made(ConvClassifier), gradients(teacher), error=CaptureError)


def test_gradients_refuse_a_step_that_feeds_another_input_each_time():
    counter = itertools.count()

    class Counting(ConvClassifier):
        def task_loss(self, batch):
            return F.cross_entropy(self.model(batch[0] + next(counter)), batch[1])

    message = "gave it another input than the student had; it must prepare the batch in the same way each time"
    refused(message, made(Counting), gradients(), error=CaptureError)


def test_gradients_refuse_a_student_that_is_not_called_in_the_second_pass():
    counter = itertools.count()

    class Once(ConvClassifier):
        def task_loss(self, batch):
            return super().task_loss(batch) if next(counter) == 0 else torch.zeros(())

    module = made(Once)
    message = "with the teacher in its place the student is called 0 times in the step, not once"
    refused(message, module, gradients(student="model"), error=CaptureError)


class Constant(nn.Module):
    """Looks at no pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        return self.logits.expand(len(x), CLASSES)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_gradients_refuse_a_loss_that_does_not_depend_on_the_input(owner):
    networks = {"student": conv_network(4, 6), "teacher": conv_teacher(), owner: Constant()}
    message = rf"the task loss of the {owner} cannot be differentiated by its input, which holds 1 floating tensors"
    refused(message, networks["student"], gradients(networks["teacher"]), error=CaptureError)


def test_gradients_refuse_integers():
    def words():
        return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, CLASSES))

    message = r"task loss of the student cannot be differentiated by its input, which holds 0 floating tensors"
    refused(message, words(), gradients(words()), error=CaptureError, x=torch.randint(5, (4, 3)))


def test_gradients_refuse_reentrant_checkpointing():
    def forward(net, x):
        return checkpoint(lambda x: net.last(net.first(x)), x, use_reentrant=True)

    message = "map_kind='gradient': the task loss of the student cannot be differentiated .*use_reentrant=False"
    refused(message, Net(forward), gradients(Net()), error=CaptureError)


def test_gradients_refuse_a_teacher_whose_loss_is_not_finite():
    teacher = Net()
    nn.init.constant_(teacher.last.weight, math.nan)
    with pytest.raises(ValueError, match="map_kind='gradient': the task loss of the teacher is nan in the first step"):
        trainer(gradients(teacher)).fit(Plain(Net()), batches(X))


def test_gradients_refuse_flash_attention():
    def network(width):
        return nn.Sequential(nn.Linear(9, width), Block(width))

    message = r"differentiates the student twice, .*flash_attention.*not implemented.*torch.nn.attention.sdpa_kernel"
    refused(message, network(8), gradients(network(8)), x=torch.randn(4, 4, 9))


def test_gradients_refuse_a_student_on_which_they_do_not_depend():
    class Head(Plain):
        """A frozen network: the gradient by its input is the same whatever is trained after it."""

        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).requires_grad_(False))
            self.offset = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return self.model(batch[0]).sum() + self.offset

    message = "map_kind='gradient': the student's input gradient does not depend on any trained parameter"
    refused(message, Head(), gradients(student="model"))


# What is refused when the callback is made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"map_kind": "powr"}, "map_kind must be one of sum, .*, gradient, got 'powr'; did you mean 'power'"),
        ({"map_kind": None}, "map_kind must be one of sum, .* got None"),
        ({"mode": "cod"}, "mode must be one of code, paper, got 'cod'; did you mean 'code'"),
        ({"power": 0}, "power must be a positive number, got 0"),
        ({"power": -2.0}, "power must be a positive number, got -2.0"),
        ({"power": math.nan}, "power must be a positive number, got nan"),
        ({"power": math.inf}, "power must be a positive number, got inf"),
        ({"power": "2"}, "power must be a positive number, got '2'"),
        ({"power": True}, "power must be a positive number, got True"),
        ({"weight": 0}, "weight must be 'auto' or a positive number, got 0"),
        ({"weight": -1.0}, "weight must be 'auto' or a positive number, got -1.0"),
        ({"weight": math.nan}, "weight must be 'auto' or a positive number, got nan"),
        ({"weight": "atuo"}, "weight must be 'auto' or a positive number, got 'atuo'"),
        ({"weight": None}, "weight must be 'auto' or a positive number, got None"),
        ({"strength": 0}, "strength must be a positive number, got 0"),
        ({"strength": math.inf}, "strength must be a positive number, got inf"),
        ({"strength": "1"}, "strength must be a positive number, got '1'"),
        ({"pairs": {}}, "pairs must be 'auto', or a dict .*got {}"),
        ({"pairs": "all"}, "pairs must be 'auto', or a dict .*got 'all'"),
        ({"pairs": None}, "pairs must be 'auto', or a dict .*got None"),
        ({"pairs": ["stage1"]}, r"pairs must be 'auto', or a dict .*got \['stage1'\]"),
        ({"pairs": {"stage1": 4}}, "pairs must be 'auto', or a dict .*got {'stage1': 4}"),
        ({"pairs": {1: "stage1"}}, "pairs must be 'auto', or a dict .*got {1: 'stage1'}"),
        ({"drop_tokens": -1}, "drop_tokens must be a whole number of at least 0, got -1"),
        ({"drop_tokens": 1.0}, "drop_tokens must be a whole number of at least 0, got 1.0"),
        ({"drop_tokens": True}, "drop_tokens must be a whole number of at least 0, got True"),
        ({"pictures_every_n_epochs": 0}, "pictures_every_n_epochs must be a whole number of at least 1, got 0"),
        ({"pictures_every_n_epochs": 1.5}, "pictures_every_n_epochs must be a whole number of at least 1, got 1.5"),
        ({"name": "a/b"}, "name must be a non-empty string without '/', got 'a/b'"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionTransferCallback(conv_teacher(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"map_kind": "sum", "power": 3.0}, "power=3.0 has no effect with map_kind='sum': only 'power' and 'max' use"),
        ({"map_kind": "edges", "power": 1}, "power=1 has no effect with map_kind='edges'"),
        ({"map_kind": "gradient", "weight": 1.0, "power": 1.0}, "power=1.0 has no effect with map_kind='gradient'"),
        ({"weight": 5.0, "strength": 2.0}, "strength=2.0 has no effect with weight=5.0: multiply the weight by it"),
        ({"mode": "paper"}, "weight='auto' is the strength of mode 'code' on maps; with mode='paper' and map_kind='po"),
        ({"map_kind": "gradient"}, "weight='auto' is the strength .*map_kind='gradient' give a number"),
        (
            {"map_kind": "gradient", "weight": 1.0, "pairs": {"a": "b"}},
            "pairs, drop_tokens and pictures_every_n_epochs have no effect with map_kind='gradient'",
        ),
        ({"map_kind": "gradient", "weight": 1.0, "drop_tokens": 1}, "drop_tokens and pictures_every_n_epochs have no"),
        ({"map_kind": "gradient", "weight": 1.0, "pictures_every_n_epochs": 1}, "have no effect with map_kind='grad"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionTransferCallback(conv_teacher(), **arguments)


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (nn.Conv2d, TypeError, "teacher must be a module, got the class Conv2d; call it"),
        (None, TypeError, "teacher must be a torch.nn.Module, or a class_path with init_args, got NoneType"),
        ({"class_path": "torch.nn.Conv2D"}, ValueError, "did you mean 'Conv2d'"),
    ],
)
def test_teachers_that_cannot_be_built_are_refused(teacher, error, message):
    with pytest.raises(error, match=message):
        AttentionTransferCallback(teacher)


# What is refused when the fit starts


def test_a_layer_that_is_not_in_the_teacher_is_refused_before_anything_happens():
    message = r"pairs \(teacher's side\) names 'stge2', not a module of Sequential; did you mean 'stage2'"
    refused(message, conv_network(4, 6), attention(pairs={"stage1": "stge2"}), before="fit")


@pytest.mark.parametrize(("student", "before"), [("model", "fit"), (None, "step")])
def test_a_layer_that_is_not_in_the_student_is_refused(student, before):
    """Before anything happens where the student is named, else as soon as it is found."""
    message = r"pairs \(student's side\) names '.*stge1', not a module of (Sequential|Plain); did you mean '.*stage1'"
    callback = attention(pairs={"stge1": "stage1"}, student=student)
    refused(message, conv_network(4, 6), callback, before=before)


def test_a_layer_that_is_not_in_a_chain_is_refused():
    message = r"names 'stage1', not a module of ConvChain; did you mean 'backbone.stage1'"
    callback = attention(pairs=STAGES, student=["backbone", "head"])
    refused(message, made(ConvChain), callback, before="step")


def test_an_unknown_student_is_refused():
    message = "student names 'modle', not a module of Plain; did you mean 'model'"
    refused(message, conv_network(4, 6), attention(pairs=STAGES, student="modle"), before="fit")


def test_two_candidates_are_refused():
    message = r"'backbone', 'head'; .*student=\[\"backbone\", \"head\"\]"
    refused(message, made(ConvChain), attention(), error=CaptureError, before="step")


def test_no_pair_found_says_what_each_network_offers():
    def mlp():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    message = (
        r"pairs='auto' finds no layers of student and teacher to compare. The student has no layer that returns a "
        r"feature map. The teacher offers 'stage1' \(2, 7, 6, 6\), 'stage2' \(2, 10, 3, 3\). Name them: pairs="
    )
    refused(message, mlp(), attention(), before="step")
    message = (
        r"The student offers 'stage1' \(2, 4, 6, 6\), 'stage2' \(2, 6, 3, 3\). "
        "The teacher has no layer that returns a feature map"
    )
    refused(message, conv_network(4, 6), attention(mlp()), before="step")


def test_a_teacher_that_wants_another_input_is_refused():
    message = r"the teacher Conv2d failed on what the student received .*\[\(2, 1, 6, 6\)\]"
    refused(message, conv_network(4, 6), attention(nn.Conv2d(3, 4, 1)), error=RuntimeError, before="step")


def test_a_teacher_that_shares_layers_with_the_student_is_refused():
    network = conv_network(4, 6)
    callback, added = attention(network, pairs=STAGES), additions(network)
    with pytest.raises(ValueError, match="teacher Sequential shares parameters with Plain, the module being trained"):
        trainer(callback).fit(Plain(network), batches(X))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert additions(network) == added


def test_training_data_that_can_be_read_only_once_is_refused():
    module = Plain(conv_network(4, 6))
    added = additions(module)
    with pytest.raises(ValueError, match="the training data is a generator, which can be read only once"):
        trainer(attention()).fit(module, (batch for batch in batches(X)))
    assert additions(module) == added
    trainer(attention(pairs=STAGES, student="model")).fit(module, (batch for batch in batches(X)))  # needs no look
    assert module.global_step == 2


@pytest.mark.parametrize("validates", [True, False])
def test_pictures_without_validation_are_refused(validates):
    message = "pictures_every_n_epochs=2 needs validation samples, and this fit has no validation"
    if validates:
        callback = attention(pairs=STAGES, pictures_every_n_epochs=2)
        refused(message, conv_network(4, 6), callback, before="start", limit_val_batches=0)
    else:
        refused(message, conv_network(4, 6), attention(pairs=STAGES, pictures_every_n_epochs=2), before="start")


# What is refused in the first step


FIRST = {"first": "first"}


@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize(
    ("wrap", "pick", "description"),
    [
        (lambda z: (z, z), lambda out: out[0], "tuple of Tensor, Tensor"),
        (lambda z: [z], lambda out: out[0], "list of Tensor"),
        (lambda z: {"map": z}, lambda out: out["map"], "dict with 'map'"),
    ],
)
def test_layers_that_return_no_tensor_are_refused(wrap, pick, description, owner):
    networks = {"student": Net(), "teacher": Net()}
    networks[owner] = Net(lambda net, x: net.last(pick(net.first(x))), first=Wrapped(wrap))
    message = f"pairs: the layer 'first' of the {owner} returns {description}, not a tensor; choose a layer inside it"
    refused(message, networks["student"], attention(networks["teacher"], pairs=FIRST), error=TypeError)


@pytest.mark.parametrize(("student", "teacher"), [("spare", "first"), ("first", "spare")])
def test_layers_that_do_not_run_are_refused(student, teacher):
    owner = "student" if student == "spare" else "teacher"
    message = f"pairs: the layer 'spare' of the {owner} did not run in the step, or gave None"
    refused(message, Net(), attention(Net(), pairs={student: teacher}), error=CaptureError)


def twice(net, x):
    return net.last(net.last(net.first(x)))


def test_layers_that_run_twice_are_refused():
    message = r"pairs: the student's layer 'model.last' ran 2 times in one step, .*choose a layer that runs"
    refused(message, Net(twice), attention(Net(), pairs={"last": "last"}), error=CaptureError)
    message = "pairs: the teacher's layer 'last' ran 2 times in one step, .*choose a layer that runs once"
    refused(message, Net(), attention(Net(twice), pairs={"last": "last"}), error=CaptureError)


def test_two_calls_of_the_student_are_refused():
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            return (self.model(batch[0]) - self.model(-batch[0])).square().mean()

    message = "the step calls the student 'model' 2 times"
    refused(message, Twice(Net()), attention(Net(), pairs=FIRST), error=CaptureError)


def test_a_student_that_is_never_called_is_refused():
    class Spare(Plain):
        def __init__(self):
            super().__init__(Net())
            self.other = Net()

    message = "without calling the student 'other', so the attention loss has no effect; name the network"
    refused(message, Spare(), attention(Net(), pairs=FIRST, student="other"), error=CaptureError)


NO_GRADIENT = (
    "pairs: what the student's layer 'first' returns carries no gradient, so nothing could be learned from the "
    "teacher: is it frozen with all before it, run under no_grad, or inside of activation checkpointing with use_reent"
)


def test_layers_inside_of_reentrant_checkpointing_are_refused():
    def forward(net, x):
        return checkpoint(lambda x: net.last(net.first(x)), x.requires_grad_(), use_reentrant=True)

    refused(NO_GRADIENT, Net(forward), attention(Net(), pairs=FIRST))


def test_frozen_layers_are_refused():
    network = Net()
    network.first.requires_grad_(False)
    refused(NO_GRADIENT, network, attention(Net(), pairs=FIRST))


def test_layers_under_no_grad_are_refused():
    def forward(net, x):
        with torch.no_grad():
            x = net.first(x)
        return net.last(x)

    refused(NO_GRADIENT, Net(forward), attention(Net(), pairs=FIRST))


def test_layers_before_which_something_is_trained_are_not_refused():
    network = Net()
    network.last.requires_grad_(False)
    module = Plain(network)
    before = copy.deepcopy(network.state_dict())
    trainer(attention(Net(), pairs={"last": "last"}, weight=1.0)).fit(module, batches(X))
    assert torch.equal(network.last.weight, before["last.weight"])
    assert not torch.equal(network.first.weight, before["first.weight"])


def test_checkpointing_without_reentrance_changes_nothing():
    """Its second forward, in the backward pass, is no second run of the layer."""

    def forward(net, x):
        return checkpoint(lambda x: net.last(net.first(x)), x, use_reentrant=False)

    torch.manual_seed(2)
    plain, teacher = Net(), Net()
    other = copy.deepcopy(plain)
    other.run = forward
    for network in (plain, other):
        trainer(attention(copy.deepcopy(teacher), pairs=FIRST, weight=10.0)).fit(Plain(network), batches(X))
    assert difference(plain, other) == 0


@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(owner, value):
    networks = {"student": Net(), "teacher": Net()}
    nn.init.constant_(networks[owner].first.bias, value)
    module, teacher = Plain(networks["student"]), networks["teacher"]
    added = additions(module)
    message = (
        f"pairs: what the layer 'first' of the {owner} returns in the first step is no floating tensor or holds NaN or "
        r"infinity: float32 tensor of shape \(2, 4, 6, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer(attention(teacher, pairs=FIRST)).fit(module, batches(X))
    assert module.global_step == 0
    assert additions(module) == added


def test_features_that_are_no_floats_are_refused():
    teacher = Net(lambda net, x: net.last(net.first(x).float()), first=Wrapped(lambda z: z.long()))
    message = r"the layer 'first' of the teacher returns .*int64 tensor of shape \(2, 4, 6, 6\)"
    refused(message, Net(), attention(teacher, pairs=FIRST))


def test_sizes_that_cannot_be_compared_are_refused():
    tall, wide = (Net(first=nn.Conv2d(1, 4, 3, stride, 1)) for stride in ((1, 2), (2, 1)))
    message = (
        r"pairs: 'first' and 'first' cannot be compared: .* as large as the other in height and in width, got "
        r"\(2, 4, 6, 3\) from the student and \(2, 4, 3, 6\)"
    )
    refused(message, tall, attention(wide, pairs=FIRST))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"map_kind": "edges"}, r"'block2' and 'block2' cannot be compared: kind 'edges' needs .* got shape \(8, 5, 8"),
        ({"drop_tokens": 5}, "drop_tokens=5 leaves nothing of the 5 tokens of 'block2' and 'block2'"),
        ({"pairs": {"head": "head"}}, r"cannot be compared: student must be \(N, C, H, W\) or tokens \(N, L, D\), got"),
    ],
)
def test_tokens_that_cannot_be_compared_are_refused(settings, message):
    callback = attention(token_teacher(), **{"pairs": {"block2": "block2"}, **settings})
    refused(message, made(TokenClassifier), callback)


def test_an_image_and_tokens_of_other_lengths_are_refused():
    teacher = nn.Sequential(nn.Flatten(2), nn.Linear(36, 8))  # one token
    message = r"'stage1' and '1' cannot be compared: .* need H \* W == L .* got \(2, 4, 6, 6\) .* and \(2, 1, 8\)"
    refused(message, conv_network(4, 6), attention(teacher, pairs={"stage1": "1"}))


# Pictures


class Images(Recording):
    """A logger that takes images."""

    def __init__(self) -> None:
        super().__init__()
        self.images = []

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))


@pytest.fixture
def drawn(monkeypatch):
    """What is to be drawn; what is drawn, which would take a while, is noise."""
    calls = []

    def draw(images, pairs):
        picture = np.random.default_rng(len(calls)).integers(256, size=(8, 9, 3), dtype=np.uint8)
        calls.append((images, pairs, picture))
        return picture

    monkeypatch.setattr("lightning_compress.callbacks.attention.attention_picture", draw)
    return calls


def pictured(*loggers, every=1, module=None, callback=None, **settings):
    callback = callback or attention(pairs=STAGES, pictures_every_n_epochs=every)
    return feature_fit(module or made(ConvClassifier), callback, logger=list(loggers) or False, **settings)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def read(path):
    return (imread(path)[:, :, :3] * 255).round().astype(np.uint8)


def first_maps(module, teacher, samples=4):
    """The first images of the validation, and the maps of both by hand, with the weights as they are now."""
    x = next(iter(feature_loader(type(module), rows=2 * BATCH)))[0][:samples]
    with torch.no_grad():
        ours, theirs = (in_a_row(part.eval().named_children(), x) for part in (module.model, teacher))
    maps = [
        [C.attention_map(seen[name]).reshape(samples, *seen[name].shape[2:]) for seen in (ours, theirs)]
        for name in STAGES
    ]
    return x, maps


def test_pictures_show_the_first_samples_of_the_validation_each_time(drawn, tmp_path):
    module = pictured(max_epochs=2, default_root_dir=tmp_path)
    x, maps = first_maps(module, conv_teacher())
    for images, pairs, _ in drawn:
        assert torch.equal(images, x)
        assert [(pair.student, pair.teacher) for pair in pairs] == [("stage1", "stage1"), ("stage2", "stage2")]
        for pair, (_, theirs) in zip(pairs, maps, strict=True):
            assert torch.allclose(pair.teacher_maps, theirs, atol=1e-6)
    first, last = ([pair.student_maps for pair in pairs] for _, pairs, _ in drawn)
    for earlier, now, (ours, _) in zip(first, last, maps, strict=True):
        assert torch.allclose(now, ours, atol=1e-6)
        assert not torch.allclose(earlier, ours, atol=1e-4)


@pytest.mark.parametrize("every", [3, *(pytest.param(every, marks=pytest.mark.slow) for every in (1, 2))])
def test_pictures_are_files_where_no_logger_takes_them(every, drawn, tmp_path):
    pictured(every=every, max_epochs=4, default_root_dir=tmp_path)
    epochs = range(0, 4, every)
    assert files_below(tmp_path) == [f"attention-at/epoch={epoch}.png" for epoch in epochs]
    for epoch, (_, _, picture) in zip(epochs, drawn, strict=True):
        assert np.array_equal(read(tmp_path / f"attention-at/epoch={epoch}.png"), picture)


@pytest.mark.sample
def test_a_file_is_the_picture_of_the_maps(tmp_path):
    module = pictured(default_root_dir=tmp_path)
    x, maps = first_maps(module, conv_teacher())
    pairs = [MapPair(name, name, *both) for name, both in zip(STAGES, maps, strict=True)]
    seen, expected = read(tmp_path / "attention-at/epoch=0.png"), attention_picture(x, pairs)
    assert np.abs(seen.astype(int) - expected.astype(int)).max() <= 2
    assert expected.std() > 50


def test_pictures_go_to_loggers_that_take_images(drawn, tmp_path):
    logger, other = Images(), Recording()
    pictured(logger, other, every=2, max_epochs=3, default_root_dir=tmp_path)
    assert [(key, step) for key, _, step in logger.images] == [
        ("compress/at/attention", STEPS),
        ("compress/at/attention", 3 * STEPS),
    ]
    assert [images for _, images, _ in logger.images] == [[picture] for _, _, picture in drawn]
    assert files_below(tmp_path) == []
    assert not any("attention" in key for metrics, _ in other.logged for key in metrics)


def test_pictures_beside_a_logger_without_images_are_in_its_folder(drawn, tmp_path):
    class Saving(Recording):
        save_dir = tmp_path / "logs"

    pictured(Saving(), default_root_dir=tmp_path)
    assert files_below(tmp_path) == ["logs/attention-at/epoch=0.png"]


def test_pictures_in_tensorboard(drawn, tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, images = TensorBoardLogger(tmp_path), Images()
    pictured(logger, images)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    [image] = events.Images("compress/at/attention")
    path = tmp_path / "read.png"
    path.write_bytes(image.encoded_image_string)
    assert image.step == STEPS
    assert np.array_equal(read(path), drawn[0][2])
    assert len(images.images) == len(drawn) == 1
    assert files_below(tmp_path) == ["read.png"]


@pytest.mark.slow
def test_pictures_in_wandb(drawn, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="pictures")
    pictured(logger)
    [path] = files_below(tmp_path)
    assert re.search(r"media/images/compress/at/attention_\d+_\w+\.png$", path)
    assert np.array_equal(read(tmp_path / path), drawn[0][2])
    logger.experiment.finish()


@pytest.mark.parametrize("logger", [False, True])
def test_pictures_are_not_made_under_fast_dev_run(logger, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = made(ConvClassifier)
    run = trainer(
        attention(pairs=STAGES, pictures_every_n_epochs=1),
        fast_dev_run=True,
        logger=logger,
        default_root_dir=tmp_path,
    )
    run.fit(module, feature_loader(), feature_loader())
    assert run.callback_metrics["compress/at/val_loss"] > 0
    assert (drawn, list(tmp_path.iterdir())) == ([], [])


def test_pictures_and_tables_are_of_rank_zero_alone(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    logger = Images()
    module = pictured(logger, default_root_dir=tmp_path, callback=attention(pictures_every_n_epochs=1))
    assert (drawn, logger.images, files_below(tmp_path)) == ([], [], [])
    assert module.trainer.callback_metrics["compress/at/val_loss"] > 0
    assert capsys.readouterr().out == ""


def test_pictures_of_a_second_fit_start_again(drawn):
    logger, callback = Images(), attention(pairs=STAGES, pictures_every_n_epochs=1)
    for _ in range(2):
        pictured(logger, callback=callback)
    assert [step for _, _, step in logger.images] == [STEPS, STEPS]


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_picture_of_tokens_has_no_images(dropped, drawn):
    settings = {"pairs": BLOCKS, "drop_tokens": dropped, "pictures_every_n_epochs": 1}
    pictured(Images(), module=made(TokenClassifier), callback=attention(token_teacher(), **settings))
    [(images, pairs, _)] = drawn
    assert images is None
    assert [(one.student, one.teacher) for one in pairs] == [("block1", "block1"), ("block2", "block2")]
    assert {maps.shape for one in pairs for maps in one[2:]} == {(4, 5 - dropped)}


def test_a_picture_of_fewer_samples(drawn):
    callback = attention(pairs=STAGES, pictures_every_n_epochs=1)
    trainer(callback, logger=[Images()]).fit(Plain(conv_network(4, 6)), batches(X), batches(X[:3], size=3))
    [(images, pairs, _)] = drawn
    assert torch.equal(images, X[:3])
    assert {maps.shape for one in pairs for maps in one[2:]} == {(3, 6, 6), (3, 3, 3)}


@pytest.mark.sample
def test_pictures_change_no_bit_of_the_training(tmp_path):
    plain = feature_fit(made(ConvClassifier), attention(pairs=STAGES))
    assert difference(plain, pictured(default_root_dir=tmp_path)) == 0


def test_a_logger_that_fails_does_not_stop_the_training(drawn):
    class Failing(Images):
        def log_image(self, *_, **__):
            raise OSError("the disk is full")

    told = "Failing did not take the picture 'compress/at/attention': OSError: the disk is full. The training goes on"
    with pytest.warns(UserWarning, match=told) as caught:
        module = pictured(Failing(), max_epochs=2)
    assert len([entry for entry in caught if "did not take" in str(entry.message)]) == 1
    assert module.global_step == 2 * STEPS


@pytest.mark.sample
def test_of_several_validations_in_an_epoch_the_last_is_kept(tmp_path):
    callback, seen = attention(pairs=STAGES, pictures_every_n_epochs=1), []

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(callback._last_maps)

    feature_fit(made(ConvClassifier), callback, Look(), val_check_interval=2, default_root_dir=tmp_path)
    assert len(seen[1:]) == len(set(map(id, seen[1:]))) == STEPS // 2  # the first is the sanity check


@pytest.mark.sample
@pytest.mark.parametrize("embedded", [True, False])
def test_the_report_gets_the_maps_of_the_last_validation_if_it_wants_them(drawn, tmp_path, embedded):
    callback, report = attention(pairs=STAGES), CompressionReport(path=tmp_path, latency=False, embed_pictures=embedded)
    module = feature_fit(made(ConvClassifier), callback, report, logger=False)
    if not embedded:
        assert callback.pictures() == list(report.result.pictures) == drawn == []
        return
    [picture] = report.result.pictures
    [(images, pairs, pixels)] = drawn
    assert (imread(io.BytesIO(picture.png))[:, :, :3] * 255).round().astype(np.uint8).tolist() == pixels.tolist()
    assert torch.equal(images, next(iter(feature_loader(rows=2 * BATCH)))[0][:4])
    network = module.model.eval()
    with torch.no_grad():
        feature = network.stage1(network.stem(images))
    expected = C.attention_map(feature).reshape(len(images), *feature.shape[2:])
    torch.testing.assert_close(pairs[0].student_maps, expected)

"""DCILCallback: two passes that leave no trace but their gradients, what it refuses, and what the dense path has."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.features import ConvNormClassifier, feature_loader
from contract.modules import (
    BATCH,
    CHANNELS,
    CLASSES,
    FEATURES,
    STEPS,
    Classifier,
    Convolution,
    ManualClassifier,
    NormClassifier,
    difference,
    loader,
    made,
    own_layers,
    small_network,
    trainer,
)
from contract.traces import is_portable, traces
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import CompressionReport, DCILCallback, DPFCallback, PruningCallback
from lightning_compress.functional import distillation_loss
from lightning_compress.mechanisms.capture import CaptureError

AT_ONCE = {"schedule": "one_shot", "end": 0.0, "update_interval": 1}
ONCE = {**AT_ONCE, "update_interval": 1000}
SOME_PATHS = pytest.mark.parametrize(
    "dense_path", ["own", *(pytest.param(path, marks=pytest.mark.slow) for path in ("own_norm", "shared"))]
)
WITHOUT_NORMS = pytest.mark.parametrize("dense_path", ["own", pytest.param("shared", marks=pytest.mark.slow)])
SHARED = {"dense_path": "shared", "kl_start": 1.0}


def fitted(callback, kind=Classifier, *others, **settings):
    module = made(kind)
    fitting = trainer(callback, *others, **settings)
    fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    return module, fitting


# Arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), got 1.0"),
        ({"start": 0.8}, r"start must be at most end, got start=0.8 and end=0.75"),
        ({"update_interval": 0}, r"update_interval must be a whole number of at least 1, got 0"),
        ({"schedule": "qubic"}, r"schedule must be one of .*got 'qubic'; did you mean 'cubic'\?"),
        ({"dense_path": "ovn"}, r"dense_path must be one of .*got 'ovn'; did you mean 'own'\?"),
        ({"dense_path": None}, r"dense_path must be one of .*got None"),
        ({"kl_start": 1.5}, r"kl_start must be a number in \[0, 1\], got 1.5"),
        ({"kl_start": 25}, r"kl_start must be a number in \[0, 1\], got 25"),
        ({"temperature": 0.0}, r"temperature must be .*positive.*got 0.0"),
        ({"classifier": "fc", "dense_path": "own_norm"}, r"classifier='fc' has no effect with dense_path='own_norm'"),
        ({"classifier": "fc", "dense_path": "shared"}, r"classifier='fc' has no effect with dense_path='shared'"),
        ({"norms": ["bn"], "dense_path": "shared"}, r"norms=\['bn'\] has no effect with dense_path='shared'"),
        ({"reestimated_validation": 1}, "reestimated_validation must be True or False, got 1"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DCILCallback(**{"sparsity": 0.5, **settings})


# The gradient: M * g at the masked weights, (1 - M) * g at the dense ones, and of all else what the masked ones give


class Unmasked(Classifier):
    def build(self):
        self.model = nn.Sequential(Convolution(CHANNELS), nn.ReLU(), nn.Flatten(), nn.Linear(CHANNELS * FEATURES, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * self.model(x)


class Tied(Classifier):
    """Two layers with one weight, one of them transposed; both see it."""

    def build(self):
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.model = nn.Sequential(self.first, nn.Tanh(), self.second, nn.Tanh(), nn.Linear(FEATURES, 3))


class Attention(Classifier):
    def build(self):
        self.embed = nn.Linear(1, FEATURES)
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x):
        tokens = self.embed(x[:, :, None])
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(dim=1))


class OwnLSTM(nn.LSTM):
    """A user's own, in which torch keeps what is presented as it does in its own."""


class Recurrent(Classifier):
    def build(self):
        self.lstm = OwnLSTM(1, FEATURES, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * FEATURES, 3)

    def forward(self, x):
        return self.head(self.lstm(x[:, :, None])[0][:, -1])


class Gradients(L.Callback):
    """Compares with those of two networks that hold the weights, the pruned and the dense one."""

    def __init__(self, watched):
        self.watched, self.largest, self.batch = watched, [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = []
        for masked in (True, False):
            other = copy.deepcopy(pl_module)
            other.zero_grad()
            with torch.no_grad():
                for name, mask in self.watched.masks.items():
                    other.get_parameter(name).mul_(mask if masked else 1)
            other.task_loss(self.batch).backward()
            found.append({name: weight.grad for name, weight in other.named_parameters()})
        pruned, dense = found
        for name, weight in pl_module.named_parameters():
            mask = self.watched.masks.get(name, torch.ones(1, dtype=torch.bool))
            expected = torch.where(mask, pruned[name], dense[name])
            self.largest.append(float((weight.grad - expected).abs().max()))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (Unmasked, None),
        (NormClassifier, None),
        (Tied, ["first", "second"]),
        (Attention, ["embed", "attention"]),
        (Recurrent, ["lstm"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_gradient(kind, layers):
    callback = DCILCallback(0.5, layers=layers, **SHARED, **AT_ONCE)
    gradients = Gradients(callback)
    fitted(callback, kind, gradients)
    assert len(gradients.largest) == STEPS * len(list(made(kind).named_parameters()))
    assert max(gradients.largest) <= 1e-7


# What the second pass leaves behind: nothing


class Still(Classifier):
    """Learns nothing, so that what is counted depends on the passes alone."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Statistics(Still):
    """Norms with and without momentum, and one that keeps no statistics."""

    def build(self):
        norms = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS, momentum=None), nn.InstanceNorm2d(CHANNELS)
        tracked = nn.InstanceNorm2d(CHANNELS, track_running_stats=True)
        self.model = nn.Sequential(
            Convolution(CHANNELS), *norms, tracked, nn.Flatten(), nn.Linear(CHANNELS * FEATURES, CLASSES)
        )
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(CHANNELS), persistent=False)

    def forward(self, x):
        self.seen += len(x)
        self.shift = self.shift + x.mean()
        return self.model(x)


@SOME_PATHS
def test_statistics_and_other_buffers_are_those_of_the_first_pass(dense_path):
    module, _ = fitted(DCILCallback(0.5, dense_path=dense_path, **AT_ONCE), Statistics)
    plain, _ = fitted(PruningCallback(0.5, layers=["model.0"], schedule="one_shot", end=0.0), Statistics)
    assert difference(module, plain) == 0
    assert torch.equal(module.shift, plain.shift)
    assert module.model[1].num_batches_tracked == module.model[2].num_batches_tracked == STEPS
    assert module.seen == (2 + STEPS + 2) * BATCH  # in the sanity check, in training and in validation


class Measured(Still):
    """Metrics that are updated, called, logged and kept, of all kinds."""

    def build(self):
        super().build()
        self.kept, self.all = MeanMetric(), CatMetric()
        self.several = MetricCollection({"micro": MulticlassAccuracy(3, average="micro"), "mean": MeanMetric()})
        self.logged = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.kept.update(logits.detach())
        self.all(batch[1].float())
        self.several["micro"](logits, batch[1])
        self.logged(logits, batch[1])
        self.log("logged", self.logged, on_step=True, on_epoch=True)
        loss = F.cross_entropy(logits, batch[1])
        self.log_dict({"loss_of_step": loss}, on_step=True, on_epoch=True)
        return loss


@pytest.mark.sample
def test_metrics_count_each_batch_once():
    results = []
    for callback in (
        DCILCallback(0.5, **SHARED, **AT_ONCE),
        PruningCallback(0.5, layers=["model.0"], schedule="one_shot", end=0.0),
    ):
        module, fitting = fitted(callback, Measured)
        results.append(
            {
                "kept": float(module.kept.compute()),
                "all": module.all.compute().tolist(),
                "micro": float(module.several["micro"].compute()),
                "counts": [module.kept._update_count, module.all._update_count],
                **{name: float(fitting.callback_metrics[name]) for name in ("logged_epoch", "loss_of_step_epoch")},
            }
        )
    assert results[0] == results[1]
    assert results[0]["counts"] == [STEPS, STEPS]
    assert len(results[0]["all"]) == STEPS * BATCH


@pytest.mark.sample
def test_no_hook_stays_on_metrics_that_were_there_while_the_classifier_was_looked_for():
    """They are put back to what they were in the second pass, in which these hooks are taken off."""
    module, _ = fitted(DCILCallback(0.4, **AT_ONCE), Measured)
    plain = made(Measured)
    trainer().fit(plain, loader(Measured), loader(Measured, rows=2 * BATCH))
    assert traces(module) == traces(plain)


class Counting(Logger):
    """What it is given, and how often."""

    name, version = "counting", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.seen.setdefault(name, []).append(value)

    def log_text(self, text):
        self.seen.setdefault("text", []).append(text)


class Talks(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("pruned", loss.detach(), on_step=True, prog_bar=True)
        self.print("a step")
        self.logger.log_text("a step")
        for logger in self.loggers:
            logger.log_metrics({"by_hand": float(loss)})
        return loss


def test_values_are_logged_once_and_are_those_of_the_first_pass(capsys):
    logger, dcil = Counting(), DCILCallback(0.5, dense_path="own", kl_start=0.0, **AT_ONCE)
    fitted(dcil, Talks, logger=logger, log_every_n_steps=1)
    assert capsys.readouterr().out.count("a step") == STEPS
    for name in ("pruned", "by_hand", "text", "train_loss", "compress/dcil/pruned_task_loss", "compress/dcil/kl_dense"):
        assert len(logger.seen[name]) == STEPS, name
    assert logger.seen["pruned"] == logger.seen["by_hand"] == logger.seen["compress/dcil/pruned_task_loss"]
    assert logger.seen["pruned"] != logger.seen["compress/dcil/dense_task_loss"]


class Draws(Classifier):
    """Random numbers of all kinds in each step."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(4)
        self.drawn = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.drawn.append((float(torch.rand(1)), np.random.rand(), float(torch.rand(1, generator=self.generator))))  # noqa: NPY002

    def task_loss(self, batch):
        x, y = batch
        noise = torch.rand(x.shape, generator=self.generator) + np.random.rand() + torch.rand_like(x)  # noqa: NPY002
        return F.cross_entropy(self(F.dropout(x + 0.1 * noise)), y)


@pytest.mark.sample
def test_both_passes_draw_the_same_random_numbers():
    drawn, losses = [], []
    for callback in (
        DCILCallback(0.5, start=1.0, end=1.0, **SHARED),
        PruningCallback(0.5, layers=["model.0"], start=1.0, end=1.0),
    ):

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, *args):
                metrics = trainer.callback_metrics
                if "compress/dcil/dense_task_loss" in metrics:
                    losses.append([float(metrics[f"compress/dcil/{name}_task_loss"]) for name in ("pruned", "dense")])

        torch.manual_seed(2)
        np.random.seed(2)  # noqa: NPY002
        module, _ = fitted(callback, Draws, Look())
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    assert len(losses) == STEPS
    assert all(pruned == dense for pruned, dense in losses)  # nothing is masked yet


# What would be done twice is refused


class Appends(Classifier):
    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


class Counts(Classifier):
    def __init__(self):
        super().__init__()
        self.steps_done = 0

    def training_step(self, batch, batch_idx):
        self.steps_done += 1
        return super().training_step(batch, batch_idx)


class Averages(Classifier):
    """A running average, in a plain tensor of a child of the user's own class."""

    class Tracker(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(())

    def build(self):
        super().build()
        self.tracker = self.Tracker()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.tracker.mean.lerp_(loss.detach(), 0.1)
        return loss


class Remembers(Classifier):
    """A dict in an object that is no module."""

    class Memory:
        def __init__(self):
            self.losses = {}

    def __init__(self):
        super().__init__()
        self.memory = self.Memory()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.memory.losses[len(self.memory.losses)] = float(loss)
        return loss


class Sets(Classifier):
    def training_step(self, batch, batch_idx):
        self.last_loss = super().training_step(batch, batch_idx)
        return self.last_loss


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Appends, "losses"),
        (Counts, "steps_done"),
        (Averages, "tracker.mean"),
        (Remembers, "memory"),
        (Sets, "last_loss"),
    ],
)
@WITHOUT_NORMS
def test_changes_of_attributes_are_refused_and_nothing_is_lost(kind, name, dense_path):
    module, plain = made(kind), made(kind)
    message = (
        rf"the step of {kind.__name__} changes '{name}', and it runs twice on each batch here .*on_train_batch_end"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer(DCILCallback(0.5, dense_path=dense_path, **AT_ONCE)).fit(module, loader())
    assert difference(module, plain) == 0
    trainer(limit_train_batches=1).fit(plain, loader())
    before = traces(plain)
    trainer(limit_train_batches=1).fit(module, loader())
    assert traces(module) == before
    assert difference(module, plain) == 0


class AppendsElsewhere(Appends):
    def training_step(self, batch, batch_idx):
        return Classifier.training_step(self, batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_the_way_out_that_the_error_names():
    module, fitting = fitted(DCILCallback(0.5, **SHARED, **AT_ONCE), AppendsElsewhere)
    assert len(module.losses) == STEPS
    assert module.losses[-1] > float(fitting.callback_metrics["compress/dcil/pruned_task_loss"])  # the sum of both


class Scales(Classifier):
    """In place."""

    def task_loss(self, batch):
        batch[0].mul_(2.0)
        return super().task_loss(batch)


class Augments(Classifier):
    """Puts another tensor into a dict."""

    as_dict = True

    def task_loss(self, batch):
        batch["features"] = 2.0 * batch["features"]
        return F.cross_entropy(self(batch["features"]), batch["label"])


class Pops(Augments):
    def task_loss(self, batch):
        return F.cross_entropy(self(batch["features"]), batch.pop("label"))


@pytest.mark.parametrize("kind", [Scales, Augments, Pops])
def test_changes_of_the_batch_are_refused(kind):
    with pytest.raises(RuntimeError, match=f"the step of {kind.__name__} changes its batch, and it runs twice"):
        trainer(DCILCallback(0.5, **SHARED, **AT_ONCE)).fit(made(kind), loader(kind))


def test_a_step_that_draws_its_batches_itself_is_refused():
    class Draws(Classifier):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return self.task_loss(batch)

    with pytest.raises(ValueError, match="draws its batches itself, from dataloader_iter; let it take a batch"):
        trainer(DCILCallback(0.5)).fit(made(Draws), loader())


class Again(Classifier):
    def task_loss(self, batch):
        x, y = batch
        hidden = checkpoint(self.model[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return F.cross_entropy(self.model[2:](hidden), y)


@pytest.mark.parametrize("reentrant", [False, True])
@WITHOUT_NORMS
def test_activation_checkpointing_is_refused(dense_path, reentrant):
    module = made(Again)
    module.reentrant = reentrant
    with pytest.raises(RuntimeError, match=r"activation checkpointing runs the layer 'model.0' again .*switch it off"):
        trainer(DCILCallback(0.5, dense_path=dense_path, kl_start=1.0, **AT_ONCE)).fit(module, loader())
    assert difference(module, made(Again)) == 0
    assert "weight" not in vars(module.model[0])


def test_manual_optimisation_without_the_mixin_is_refused_before_anything_happens():
    class Prepares(ManualClassifier):
        prepared = False

        def on_fit_start(self):
            self.prepared = True

    module = made(Prepares)
    with pytest.raises(ValueError, match=r"Prepares optimises manually: let it inherit .*CompressionMixin"):
        trainer(DCILCallback(0.5)).fit(module, loader())
    assert not module.prepared


@pytest.mark.parametrize(
    "other",
    [
        lambda: PruningCallback(0.5, layers=["model.3"], name="other"),
        lambda: DPFCallback(0.5, layers=["model.3"], name="other"),
        lambda: DCILCallback(0.5, layers=["model.3"], name="other"),
    ],
    ids=["pruning", "dpf", "dcil"],
)
@pytest.mark.parametrize("first", [True, False])
def test_another_owner_of_masks_is_refused(other, first):
    both = [DCILCallback(0.5), other()]
    with pytest.raises(
        ValueError, match=r"'(dcil|other)' and '(dcil|other)' both mask weights, and the dense pass of DC"
    ):
        trainer(*(both if first else both[::-1])).fit(made(Classifier), loader())


# Steps that return nothing


class Constant(NormClassifier):
    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


class Skips(Constant):
    skipped = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss


@SOME_PATHS
@pytest.mark.parametrize("skipped", [(0,), (3, 4), (0, 1, 5)])
def test_steps_that_are_skipped(skipped, dense_path):
    """As if their batches were not there, but that Lightning counts them, and so does batch norm."""

    class Some(Skips):
        pass

    Some.skipped = skipped
    callback = DCILCallback(0.4, dense_path=dense_path, kl_start=0.0, **AT_ONCE)
    module, fitting = fitted(callback, Some)
    assert fitting.global_step == STEPS
    assert module.model[1].num_batches_tracked == STEPS
    assert callback.effects["the dense pass"] == STEPS - len(skipped)
    data = torch.utils.data.Subset(
        loader(Some).dataset, [row for row in range(STEPS * BATCH) if row // BATCH not in skipped]
    )
    other, plain = DCILCallback(0.4, dense_path=dense_path, kl_start=0.0, **AT_ONCE), made(Constant)
    trainer(other).fit(plain, torch.utils.data.DataLoader(data, batch_size=BATCH))
    for (name, one), (_, two) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_training_in_which_all_steps_are_skipped():
    class All(Skips):
        skipped = tuple(range(STEPS))

    callback = DCILCallback(0.4, **AT_ONCE)
    module, fitting = fitted(callback, All)
    assert fitting.global_step == STEPS
    assert callback.effects["the dense pass"] == 0
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name), made(All).get_parameter(name) * mask)


# Which layers are the dense path's own


class ScaleNorm(nn.Module):
    """A norm layer of the user's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CHANNELS, 1, 1))

    def forward(self, x):
        return self.scale * x / x.norm(dim=1, keepdim=True).clamp(min=1e-3)


class OwnNorm(Classifier):
    def build(self):
        self.model = nn.Sequential(
            Convolution(CHANNELS), ScaleNorm(), nn.Flatten(), nn.Linear(CHANNELS * FEATURES, CLASSES)
        )


@pytest.mark.parametrize("dense_path", ["own", "own_norm"])
def test_norm_layers_of_the_users_are_asked_for(dense_path):
    with pytest.raises(
        ValueError,
        match=r"'model.1' may be norm layers, of a kind that is not known: .*norms=\['type:ScaleNorm'\].*'shared'",
    ):
        fitted(DCILCallback(0.5, dense_path=dense_path), OwnNorm)
    callback = DCILCallback(0.5, dense_path=dense_path, norms=["type:ScaleNorm"], **AT_ONCE)
    fitted(callback, OwnNorm)
    assert callback._own_state["names"] == ["model.1", *(["model.3"] if dense_path == "own" else [])]


class Convolutional(Classifier):
    """Ends in a convolution, which is masked."""

    def build(self):
        self.model = nn.Sequential(
            Convolution(CHANNELS),
            nn.BatchNorm2d(CHANNELS),
            nn.Conv2d(CHANNELS, 3, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


@pytest.mark.sample
def test_a_network_without_a_classifier():
    message = r"the layer that is called last, 'model.2', is masked: leave it dense with exclude=.*path='own_norm'"
    with pytest.raises(ValueError, match=message):
        fitted(DCILCallback(0.5), Convolutional)
    callback = DCILCallback(0.5, dense_path="own_norm", **AT_ONCE)
    fitted(callback, Convolutional)
    assert callback._own_state["names"] == ["model.1"]
    callback = DCILCallback(0.5, exclude=["model.2"], **AT_ONCE)
    fitted(callback, Convolutional)
    assert callback._own_state["names"] == ["model.1", "model.2"]


def test_own_norms_without_norms():
    with pytest.raises(
        ValueError, match=r"dense_path='own_norm' has no effect: Classifier has no norm layers; .*'shared'"
    ):
        fitted(DCILCallback(0.5, dense_path="own_norm"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "model.9"}, "classifier names 'model.9', .*did you mean"),
        ({"classifier": "model.2"}, "classifier names 'model.2', a Re[Ll]U? ?.*without parameters|Flatten without"),
        ({"classifier": "model.0"}, r"classifier names 'model.0', and the weights of 'model.0' are masked; .*exclude="),
        ({"norms": ["model.0"]}, "norms takes 'model.0', whose weights are masked"),
        ({"norms": ["bn"]}, "norms has 'bn', which matches no module"),
    ],
)
def test_layers_that_cannot_be_own(settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(DCILCallback(0.5, **settings), NormClassifier)


class TwoHeads(NormClassifier):
    """The classifier is two layers, and another one is called last."""

    def build(self):
        self.body = nn.Sequential(Convolution(CHANNELS), nn.BatchNorm2d(CHANNELS), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(CHANNELS * FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES))
        self.side = nn.Linear(CHANNELS * FEATURES, 1)

    def forward(self, x):
        hidden = self.body(x)
        logits = self.head(hidden)
        return {"logits": logits, "side": self.side(hidden)}

    def task_loss(self, batch):
        out = self(batch[0])
        return F.cross_entropy(out["logits"], batch[1]) + out["side"].square().mean()


@pytest.mark.sample
@pytest.mark.parametrize(
    ("classifier", "names"),
    [
        (None, ["side"]),  # the layer that is called last
        ("head", ["head.0", "head.2"]),
        (["head.2", "side"], ["head.2", "side"]),
    ],
)
def test_the_classifier(classifier, names):
    callback = DCILCallback(0.5, classifier=classifier, kl_start=0.0, **AT_ONCE)
    report = CompressionReport(latency=False, path="unused")
    _, fitting = fitted(callback, TwoHeads, report, fast_dev_run=4)
    assert callback._own_state["names"] == ["body.1", *names]
    listed = ", ".join(f"'{name}'" for name in names)
    said = f"dcil: the dense path had its own classifier {listed}, and norm layers 'body.1'."
    assert said in report.result.notes
    assert float(fitting.callback_metrics["compress/dcil/kl_pruned"]) > 0


def test_the_dense_paths_own_layers_learn_and_are_in_the_callbacks_state_alone(tmp_path):
    callback = DCILCallback(0.4, kl_start=0.0, **AT_ONCE)
    module, fitting = fitted(callback, NormClassifier)
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    own = file["callbacks"][callback.state_key]["own"]
    assert own["names"] == ["model.1", "model.4"]
    layers = own_layers(own)
    start = made(NormClassifier).state_dict()
    for name in ("1.weight", "1.bias", "4.weight", "4.bias"):
        assert not torch.equal(layers[f"model.{name}"], start[f"model.{name}"]), name
        assert not torch.equal(layers[f"model.{name}"], module.state_dict()[f"model.{name}"]), name
    assert own["layers"]["steps"] == STEPS
    assert len(own["layers"]["optimizer"]["state"]) == 4
    assert list(file["state_dict"]) == list(start)
    assert len(file["optimizer_states"][0]["state"]) == len(list(module.parameters()))


# What the two learn from each other


class Dict(NormClassifier):
    def forward(self, x):
        return {"features": self.model[:4](x), "logits": self.model(x)}

    def task_loss(self, batch):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])


class Segments(Classifier):
    """(N, K, H, W)"""

    def build(self):
        self.model = nn.Sequential(Convolution(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CLASSES, 1))

    def task_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.model(x), y[:, None, None].expand(-1, 2, 4))


class Tokens(Classifier):
    """(N, L, K)"""

    def build(self):
        self.model = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 3), TransposedTo(CLASSES))

    def task_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.model(x).flatten(0, 1), y.repeat_interleave(6))


class TransposedTo(nn.Module):
    """From (N, C, L) to (N, L, K)."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(8, classes)

    def forward(self, x):
        return self.linear(x.transpose(1, 2))


class Regression(Classifier):
    """(N,) or (N, 1)"""

    flat = False

    def build(self):
        self.model = nn.Sequential(Convolution(CHANNELS), nn.ReLU(), nn.Flatten(), nn.Linear(CHANNELS * FEATURES, 1))
        if self.flat:
            self.model.append(nn.Flatten(0))

    def task_loss(self, batch):
        x, y = batch
        return F.mse_loss(self.model(x).flatten(), y.float())


class FlatRegression(Regression):
    flat = True


@pytest.mark.parametrize(
    ("kind", "dim", "own"), [(Dict, 1, {}), (Segments, 1, {"exclude": ["model.2"]}), (Tokens, 2, {})]
)
def test_outputs_of_all_shapes(kind, dim, own):
    """What is logged is the divergence of the outputs of two networks, before anything was trained."""
    callback = DCILCallback(0.5, kl_start=0.0, temperature=3.0, **own, **ONCE)
    module, fitting = made(kind), trainer(callback, limit_train_batches=1)
    fitting.fit(module, loader(kind))
    outputs = []
    for masked in (True, False):
        network = made(kind)
        with torch.no_grad():
            for name, mask in callback.masks.items():
                network.get_parameter(name).mul_(mask if masked else 1)
        out = network(next(iter(loader(kind)))[0])
        outputs.append(out["logits"] if kind is Dict else out)
    metrics = fitting.callback_metrics
    for name, (first, second) in {"kl_pruned": outputs, "kl_dense": outputs[::-1]}.items():
        expected = float(distillation_loss(first, second, 3.0, class_dim=dim))
        assert float(metrics[f"compress/dcil/{name}"]) == pytest.approx(expected, rel=1e-4) != 0


@pytest.mark.parametrize("kind", [Regression, FlatRegression])
def test_outputs_without_classes(kind):
    with pytest.raises(ValueError, match=r"from kl_start=0.25 on the two passes .*give kl_start=1"):
        fitted(DCILCallback(0.5), kind)
    callback = DCILCallback(0.5, kl_start=1.0, **AT_ONCE)
    fitted(callback, kind)
    assert callback.effects["the dense pass"] == STEPS


@pytest.mark.sample
def test_they_learn_from_each_other_from_kl_start_on():
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append({name.rpartition("/")[2] for name in trainer.callback_metrics})

    _, fitting = fitted(DCILCallback(0.5, kl_start=0.5, **AT_ONCE), Classifier)
    trainer(DCILCallback(0.5, kl_start=0.5, **AT_ONCE), Look()).fit(made(Classifier), loader())
    assert ["kl_pruned" in names for names in seen] == [False] * 4 + [True] * 4
    assert ["kl_dense" in names for names in seen] == [False] * 4 + [True] * 4
    assert all({"pruned_task_loss", "dense_task_loss", "sparsity"} <= names for names in seen)
    assert float(fitting.callback_metrics["compress/dcil/kl_pruned"]) > 0
    _, never = fitted(DCILCallback(0.5, kl_start=1.0, **AT_ONCE))
    assert "compress/dcil/kl_pruned" not in never.callback_metrics


def test_a_step_that_calls_no_network():
    class Inline(Classifier):
        def build(self):
            self.convolution, self.linear = Convolution(CHANNELS), nn.Linear(CHANNELS * FEATURES, CLASSES)
            self.other = nn.Linear(2, 2)

        def task_loss(self, batch):
            return F.cross_entropy(self.linear(self.convolution(batch[0]).flatten(1)), batch[1])

    with pytest.raises(CaptureError, match=r"'convolution', 'linear'; choose the network with student="):
        fitted(DCILCallback(0.5), Inline)
    with pytest.raises(ValueError, match="the step called no network 'other'; name it with student="):
        fitted(DCILCallback(0.5, student="other"), Inline)
    _, fitting = fitted(DCILCallback(0.5, kl_start=1.0, **AT_ONCE), Inline)
    assert float(fitting.callback_metrics["compress/dcil/sparsity"]) == 0.5


# Other trainings


def test_a_network_without_convolutions():
    class Linear(Classifier):
        def build(self):
            self.model = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))

    with pytest.raises(ValueError, match="layers selects nothing"):
        fitted(DCILCallback(0.5), Linear)
    callback = DCILCallback(0.5, layers=["model.0"], **AT_ONCE)
    module, _ = fitted(callback, Linear)
    assert int((module.model[0].weight == 0).sum()) == 24
    assert callback._own_state["names"] == ["model.2"]


class FrozenBackbone(NormClassifier):
    def build(self):
        super().build()
        self.model[0].requires_grad_(False)


@SOME_PATHS
def test_a_frozen_backbone(dense_path):
    """Its weights stay, are masked, and the rest learns."""
    callback = DCILCallback(0.5, dense_path=dense_path, **AT_ONCE)
    module, _ = fitted(callback, FrozenBackbone)
    start = made(FrozenBackbone)
    assert torch.equal(callback._dense["model.0.weight"], start.model[0].weight)
    assert torch.equal(module.model[0].weight, start.model[0].weight * callback.masks["model.0.weight"])
    assert not torch.equal(module.model[4].weight, start.model[4].weight)


class UnfreezesNorms(BaseFinetuning):
    """Batch norm begins to learn in the second epoch, with a learning rate of its own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model[1], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[1], optimizer, lr=0.03, train_bn=True)


@pytest.mark.parametrize("dense_path", ["own", pytest.param("own_norm", marks=pytest.mark.slow)])
def test_norms_that_are_unfrozen_later(dense_path):
    states, rates = [], []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            own = callback.extra_state()["own"]
            states.append(own_layers(own))
            rates.append([group["lr"] for group in own["layers"]["optimizer"]["param_groups"] if group["params"]])

    callback = DCILCallback(0.4, dense_path=dense_path, **AT_ONCE)
    module, _ = fitted(callback, Constant, UnfreezesNorms(), Look(), max_epochs=2)
    start = made(Constant).state_dict()
    assert torch.equal(states[0]["model.1.weight"], start["model.1.weight"])
    assert not torch.equal(states[1]["model.1.weight"], start["model.1.weight"])
    assert not torch.equal(states[1]["model.1.weight"], module.model[1].weight)
    assert rates == ([[0.1], [0.1, 0.03]] if dense_path == "own" else [[], [0.03]])


def small_steps(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)


class Cycle(NormClassifier):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": small_steps(optimizer), "interval": "step"}}


def test_the_own_layers_optimizer_follows_one_cycle():
    seen = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if callback._own.layers:
                own, user = callback._own._owned.optimizer.param_groups[0], trainer.optimizers[0].param_groups[0]
                seen.append((own["lr"], own["betas"]) == (user["lr"], user["betas"]))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            own, user = callback._own._owned.optimizer.param_groups[0], optimizer.param_groups[0]
            stepped.append((own["lr"], own["betas"]) == (user["lr"], user["betas"]))

    stepped = []
    callback = DCILCallback(0.4, **AT_ONCE)
    fitted(callback, Cycle, Look())
    assert stepped == [True] * STEPS
    assert not all(seen)  # the rates change after each step, and the own ones only when they are needed


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradient_clipping_acts_on_the_sum(clip):
    """Of the shared weights it sees the gradient of both passes."""
    norms = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if all(parameter.grad is not None for parameter in pl_module.parameters()):
                gradients = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])
                norms.append(float(gradients.norm() if clip == "norm" else gradients.abs().max()))

    fitted(
        DCILCallback(0.5, **SHARED, **AT_ONCE), Clipped, Look(), gradient_clip_val=0.01, gradient_clip_algorithm=clip
    )
    assert len(norms) == STEPS - 1
    assert norms == pytest.approx([0.01] * (STEPS - 1), rel=1e-3)


class Clipped(Classifier):
    """Gradients are cleared after the step."""


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dense_path", ["own", "own_norm", "shared"])
def test_compiled(dense_path):
    """With the sanity check, dense steps first, and validation within the epoch."""
    modules = []
    for compiled in (False, True):
        module = made(ConvNormClassifier)
        if compiled:
            module.model = torch.compile(module.model, backend="eager")
        callback = DCILCallback(0.5, start=0.375, update_interval=1, dense_path=dense_path, kl_start=0.5)
        fitting = trainer(callback, num_sanity_val_steps=2, val_check_interval=3, max_epochs=2)
        torch.manual_seed(1)
        fitting.fit(module, feature_loader(), feature_loader())
        modules.append({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
        modules[-1]["val_loss"] = fitting.callback_metrics["val_loss"]
    assert difference(*modules) == 0


@pytest.mark.sample
def test_a_second_validation_changes_nothing():
    runs = []
    for reestimated in (True, False):
        module = made(NormClassifier)
        callback = DCILCallback(0.4, update_interval=1, kl_start=0.0, reestimated_validation=reestimated)
        fitting = trainer(callback, max_epochs=2)
        torch.manual_seed(3)
        fitting.fit(module, loader(NormClassifier), loader(NormClassifier))
        runs.append((module, callback._own_state["layers"]["module"], torch.get_rng_state(), fitting.callback_metrics))
    (module, own, state, metrics), (plain, plain_own, plain_state, plain_metrics) = runs
    assert difference(module, plain) == 0
    assert difference(own, plain_own) == 0
    assert torch.equal(state, plain_state)
    assert metrics["val_loss"] == plain_metrics["val_loss"]
    assert 0 < abs(float(metrics["compress/dcil/reestimated/val_loss"] - metrics["val_loss"])) < 0.5


def test_nothing_stays():
    module, _ = fitted(DCILCallback(0.5, kl_start=0.0, **AT_ONCE), NormClassifier)
    plain = made(NormClassifier)
    trainer().fit(plain, loader(NormClassifier), loader(NormClassifier))
    assert traces(module) == traces(plain)
    assert is_portable(module)
    assert small_network(norm=True).state_dict().keys() == module.model.state_dict().keys()


# What hides from the second pass


class Tempered(NormClassifier):
    """The network itself has a parameter, and returns last."""

    def build(self):
        super().build()
        self.model = Scaled(self.model)


class Scaled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.temperature = body, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.body(x) / self.temperature


def test_the_classifier_is_a_layer_not_the_network_around_it():
    callback = DCILCallback(0.4, **AT_ONCE)
    fitted(callback, Tempered)
    assert callback._own_state["classifier"] == ["model.body.4"]


class Hidden(Constant):
    """A layer in a plain list, which the optimizer has."""

    def build(self):
        super().build()
        self.held = [nn.Linear(CLASSES, CLASSES)]

    def forward(self, x):
        return self.held[0](self.model(x))

    def task_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.held[0].parameters()], lr=0.1)


class Listed(Constant):
    """A penalty over parameters that it keeps in a list."""

    def build(self):
        super().build()
        self.decayed = [*self.model.parameters()]

    def task_loss(self, batch):
        return super().task_loss(batch) + sum(own.square().sum() for own in self.decayed)


@pytest.mark.parametrize(("kind", "name"), [(Hidden, r"a tensor of shape \(3, 3\)"), (Listed, "model.4.weight")])
def test_what_both_passes_would_teach_is_refused(kind, name):
    with pytest.raises(RuntimeError, match=rf"{name}.* would learn from both passes of 'dcil'"):
        fitted(DCILCallback(0.5, **SHARED, **AT_ONCE), kind)


@pytest.mark.filterwarnings("ignore:.*a part of their gradient past the layer")
def test_a_penalty_over_the_modules_parameters_counts_once():
    class Penalised(Classifier):
        def task_loss(self, batch):
            return 0 * super().task_loss(batch) + sum(own.square().sum() for own in self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback, start = DCILCallback(0.5, **SHARED, **AT_ONCE), made(Penalised)
    module, _ = fitted(callback, Penalised, max_steps=1)
    dense = {**module.state_dict(), **callback._dense}
    for name, value in start.state_dict().items():
        assert torch.allclose(dense[name], 0.8 * value), name  # w - 0.1 * 2w


class Assigns(nn.Module):
    """A norm layer that puts a new tensor in the place of its statistic."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("running_mean", torch.zeros(channels, 1, 1))

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(dim=(0, 2, 3))[:, None, None]
        return (x - self.running_mean) * self.weight


def test_statistics_that_are_assigned_are_the_dense_paths_own():
    class Assigning(Constant):
        def build(self):
            super().build()
            self.model[1] = Assigns(CHANNELS)

    callback = DCILCallback(0.5, norms=["type:Assigns"], kl_start=1.0, **AT_ONCE)
    module, _ = fitted(callback, Assigning)
    own = own_layers(callback._own_state)["model.1.running_mean"]
    assert float(own.abs().max()) > 1e-3
    assert not torch.equal(own, module.model[1].running_mean)


def test_an_optimizer_that_repeats_the_step_is_refused_with_layers_of_its_own():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None:
                closure()
            return super().step(closure)

    class Repeats(NormClassifier):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="cannot follow Twice, which repeats the step"):
        fitted(DCILCallback(0.5, **AT_ONCE), Repeats)


def test_an_optimizer_that_needs_a_closure_is_refused_with_layers_of_its_own():
    class Again(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step()

    class Repeats(NormClassifier):
        def configure_optimizers(self):
            return Again(self.parameters(), lr=0.1)

    with pytest.raises(
        ValueError,
        match=r"'dcil' trains helpers .* Again takes no step without a closure .*; dense_path='shared' has",
    ):
        fitted(DCILCallback(0.5, **AT_ONCE), Repeats)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_part_is_refused():
    class Scripted(NormClassifier):
        def build(self):
            super().build()
            self.model[1] = torch.jit.script(self.model[1])

    with pytest.raises(ValueError, match=r"'model.1' is of torch.jit, and learns .* passes of 'dcil'; use the module"):
        fitted(DCILCallback(0.5, layers=["model.0"], **AT_ONCE), Scripted)


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_part_without_parameters_is_as_any_other():
    class Augmenting(NormClassifier):
        def build(self):
            super().build()
            self.augment = torch.jit.script(nn.Identity())

        def training_step(self, batch, batch_idx):
            return super().training_step([self.augment(batch[0]), batch[1]], batch_idx)

    scripted, _ = fitted(DCILCallback(0.5, layers=["model.0"], **AT_ONCE), Augmenting)
    plain, _ = fitted(DCILCallback(0.5, layers=["model.0"], **AT_ONCE), NormClassifier)
    assert difference(scripted, plain) == 0


def test_other_norms_at_a_resume_are_refused(tmp_path):
    _, fitting = fitted(DCILCallback(0.4, kl_start=1.0, **AT_ONCE), NormClassifier)
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    other = DCILCallback(0.4, kl_start=1.0, norms=["model.3"], classifier="model.4", **AT_ONCE)
    with pytest.warns(UserWarning, match="resumes with"), pytest.raises(ValueError, match="other than those"):
        trainer(other, max_epochs=2).fit(made(NormClassifier), loader(), ckpt_path=tmp_path / "end.ckpt")


def test_in_a_further_fit_the_dense_paths_optimizer_begins_anew_as_the_users_does():
    class WithAdam(NormClassifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    callback, steps = DCILCallback(0.4, kl_start=1.0, **AT_ONCE), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            own = callback.extra_state()["own"]["layers"]["optimizer"]["state"]
            steps.append((float(own[0]["step"]), float(trainer.optimizers[0].state[pl_module.model[1].weight]["step"])))

    module = made(WithAdam)
    for _ in range(2):
        trainer(callback, Look(), limit_train_batches=2).fit(module, loader())
    assert steps == [(1.0, 1.0), (2.0, 2.0), (1.0, 1.0), (2.0, 2.0)]


def test_a_copy_made_within_a_fit_has_no_hook_that_acts(tmp_path):
    copies = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copies.append(copy.deepcopy(pl_module.model))

    fitted(DCILCallback(0.4, kl_start=1.0, **AT_ONCE), NormClassifier, Copies(), max_steps=2)
    torch.save(copies[-1], tmp_path / "copy.pt")
    x = torch.randn(4, FEATURES, requires_grad=True)
    checkpoint(copies[-1], x, use_reentrant=False).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_mode_that_the_step_leaves_behind_is_not_that_of_the_second_pass():
    modes = []

    class Leaves(NormClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.model[1].train()

        def training_step(self, batch, batch_idx):
            modes.append(self.model[1].training)
            loss = super().training_step(batch, batch_idx)
            self.model[1].eval()
            return loss

    module, _ = fitted(DCILCallback(0.4, **AT_ONCE), Leaves, max_steps=2)
    assert modes == [True] * 4
    assert not module.model[1].training


@pytest.mark.slow
def test_both_passes_run_whole_compiled_graphs(fresh_compiler):
    counter = CompileCounter()
    module = made(NormClassifier)
    module.model = torch.compile(module.model, backend=counter)
    callback = DCILCallback(0.4, classifier="model.4", **AT_ONCE)
    trainer(callback).fit(module, loader(), loader())
    assert counter.frame_count <= 6  # one for each kind of pass and mode, not one for each layer


class TwoViews(NormClassifier):
    def forward(self, x):
        return (self.model(x) + self.model(x.flip(0)).flip(0)) / 2

    def task_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Regression, TwoViews])
def test_what_the_two_cannot_learn_from_each_other_is_said_in_the_first_step(kind):
    fitting = trainer(DCILCallback(0.4, kl_start=0.9, student="model", **AT_ONCE))
    with pytest.raises((ValueError, CaptureError), match="kl_start=1"):
        fitting.fit(made(kind), loader())
    assert fitting.global_step == 0


def test_an_interruption_in_the_first_step_leaves_nothing_in_the_callback():
    module, callback = made(NormClassifier), DCILCallback(0.5, **AT_ONCE)
    module.fails_at = 0
    with pytest.raises(RuntimeError, match="the step is broken"):
        trainer(callback).fit(module, loader())
    assert pickle.loads(pickle.dumps(callback)).sparsity == 0.5
    assert callback._first_statistics == {}


@pytest.mark.slow
def test_activation_checkpointing_around_compiled_code_is_refused(fresh_compiler):
    class Compiled(Classifier):
        def build(self):
            super().build()
            self.body = torch.compile(self.model[:2], backend="eager")

        def forward(self, x):
            return self.model[2:](checkpoint(self.body, x, use_reentrant=False))

    with pytest.raises(RuntimeError, match="activation checkpointing runs the layer"):
        fitted(DCILCallback(0.4, **SHARED, **AT_ONCE), Compiled)


def test_a_step_that_takes_gradients_of_its_own_is_told_why_it_cannot():
    class Penalty(Classifier):
        def training_step(self, batch, batch_idx):
            loss = self.task_loss(batch)
            (own,) = torch.autograd.grad(loss, self.model[3].weight, create_graph=True)
            return loss + own.square().sum()

    with pytest.raises(RuntimeError, match="takes gradients by parameters that do not learn in the pass 'dense'"):
        fitted(DCILCallback(0.4, **SHARED, **AT_ONCE), Penalty)

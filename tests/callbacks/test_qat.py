"""QATCallback: what it refuses, what validation shows, what it logs and warns of, odd networks, and both packages."""

from __future__ import annotations

import logging
import math
import warnings
from importlib import import_module

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    DictClassifier,
    Jumping,
    MixinClassifier,
    NetworkItself,
    NormClassifier,
    difference,
    loader,
    made,
    rows_logged,
    small_network,
    trainer,
)
from contract.traces import traces
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from mechanisms.test_rounding import added
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_compress import CompressionReport, ExportCallback, PSGDCallback, PTQCallback, QATCallback
from lightning_compress.export.evaluate import evaluate_quantized
from lightning_compress.mechanisms.moving_grids import MovingGrids

pytestmark = [
    pytest.mark.sample,  # fits on grids
    pytest.mark.filterwarnings("ignore:.*beyond the ends of their grids"),  # as these networks are not trained
]
ROWS = 2 * BATCH  # of the validation
STEP_SIZES = pytest.mark.parametrize("step_size", ["mse", "observed", "learned"])


def fitted(qat, kind=NormClassifier, *callbacks, first=True, validation=True, **settings):
    module = made(kind)
    fitting = trainer(*([qat, *callbacks] if first else [*callbacks, qat]), **settings)
    fitting.fit(module, loader(kind), loader(kind, rows=ROWS) if validation else None)
    fitting.logged = {key: float(value) for key, value in fitting.callback_metrics.items()}
    return module, fitting


def measured(module, *callbacks, run=None):
    data = loader(type(module), rows=ROWS)
    [metrics] = (run or trainer(*callbacks)).validate(module, data, verbose=False)
    return metrics


def bits_of(qat):
    return {name: grid.bits for name, grid in qat.quantization.weights.items()}


def plainly(kind, **settings):
    """A module trained without us."""
    module = made(kind)
    trainer(**settings).fit(module, loader(kind), loader(kind, rows=ROWS))
    return module


# Arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number from 2 to 8, got 1"),
        ({"weight_bits": 9}, "weight_bits must be a whole number from 2 to 8, got 9"),
        ({"weight_bits": None}, "weight_bits must be a whole number from 2 to 8, got None"),
        ({"activation_bits": 4.0}, "activation_bits, if not None, must be a whole number from 2 to 8, got 4.0"),
        ({"activation_bits": 1}, "activation_bits, if not None, must be a whole number from 2 to 8, got 1"),
        ({"edge_bits": True}, "edge_bits, if neither .auto. nor None, must be a whole number from 2 to 8, got True"),
        ({"layer_bits": {"model": 9}}, "layer_bits.'model'. must be a whole number from 2 to 8, got 9"),
        ({"step_size": "lsq"}, "step_size must be one of mse, observed, learned, got 'lsq'"),
        ({"step_size": "learnt"}, r"step_size must be one of .*got 'learnt'; did you mean 'learned'\?"),
        ({"step_size": None}, "step_size must be one of mse, observed, learned, got None"),
        ({"start": -0.1}, r"start must be a number in \[0, 1\], got -0.1"),
        ({"start": 70}, r"start must be a number in \[0, 1\], got 70"),
        (
            {"start": 0.7, "freeze_batchnorm_at": 0.5},
            "freeze_batchnorm_at must be from start=0.7 to 1, or 'auto', got 0.5",
        ),
        ({"freeze_batchnorm_at": 1.5}, r"freeze_batchnorm_at must be a number in \[0, 1\], or auto, got 1.5"),
        ({"freeze_observers_at": -1}, r"freeze_observers_at must be a number in \[0, 1\], or auto, got -1"),
        (
            {"step_size": "observed", "start": 0.8, "freeze_observers_at": 0.75},
            "freeze_observers_at must be from start=0.8 to 1, or 'auto', got 0.75",
        ),
        ({"step_lr": 0.0}, "step_lr must be .*positive.*, got 0.0"),
        ({"step_lr": -1}, "step_lr must be .*positive.*, got -1"),
        ({"max_loss_growth": 1.0}, "max_loss_growth must be a number above 1, or None, got 1.0"),
        ({"max_loss_growth": "5"}, "max_loss_growth must be a number above 1, or None, got '5'"),
        ({"max_loss_growth": math.nan}, "max_loss_growth must be a number above 1, or None, got nan"),
        ({"max_samples": 0}, "max_samples must be a whole number of at least 1, got 0"),
        ({"max_samples": 0.5}, "max_samples must be a whole number of at least 1, got 0.5"),
        ({"name": "a/b"}, "name must be a non-empty string without '/', got 'a/b'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        QATCallback(**settings)


@pytest.mark.parametrize(
    "step_size", ["mse", *(pytest.param(own, marks=pytest.mark.slow) for own in ("observed", "learned"))]
)
def test_layers_with_bits_of_their_own(step_size):
    """Each weight lies on its own grid, in the training too, and the state knows."""
    qat = QATCallback(weight_bits=5, layer_bits={"model": 8, "type:Conv2d": 3}, step_size=step_size)
    module, _ = fitted(qat)
    assert bits_of(qat) == {"0.weight": 3, "4.weight": 8}
    assert measured(module, qat) == qat.metrics
    assert qat.state_dict()["arguments"]["layer_bits"] == {"model": 8, "type:Conv2d": 3}
    for name, grid in qat.quantization.weights.items():
        integers = (module.model.get_parameter(name).detach().flatten(1) / grid.step[:, None]).round()
        assert integers.abs().max() >= 2 ** (grid.bits - 2)  # more than a grid of one bit less has


def test_arguments_at_their_limits():
    qat = QATCallback(start=1.0, freeze_batchnorm_at=1.0, freeze_observers_at=1.0, step_size="observed")
    assert (qat.start, qat.freeze_batchnorm_at, qat.freeze_observers_at) == (1.0, 1.0, 1.0)
    qat = QATCallback(max_loss_growth=1.001, step_lr=1, step_size="learned")
    assert (qat.max_loss_growth, qat.step_lr) == (1.001, 1)
    assert QATCallback(max_loss_growth=None).max_loss_growth is None


# What is refused


def refused(qat, kind, match, *callbacks, error=Exception, steps=0, data=None, **settings):
    """A fit that is refused after so many steps, and leaves nothing on the module."""
    module, fitting = made(kind), trainer(qat, *callbacks, **settings)
    with pytest.raises(error, match=match):
        fitting.fit(module, data or loader(kind), loader(kind, rows=ROWS))
    assert fitting.global_step == steps
    assert {"forward", "training_step", "validation_step"}.isdisjoint(vars(module))
    for part in module.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            assert not part._forward_hooks, part
            assert not part._forward_pre_hooks, part
            assert "forward" not in vars(part), part
    assert torch._C._len_torch_function_stack() == 0
    return module


@pytest.mark.parametrize("first", [True, False])
def test_ptq_beside_it_is_refused(first):
    both = [QATCallback(), PTQCallback()][:: 1 if first else -1]
    message = "would both quantise: QATCallback finds its grids itself and trains them, so leave PTQCallback out"
    refused(both[0], Classifier, message, both[1])


def test_two_of_them_need_a_part_each():
    message = "'qat' and 'other' quantise one network; keep one of them, or give each another part"
    refused(QATCallback(), Classifier, message, QATCallback(name="other"))
    parts = [QATCallback(weight_bits=3, edge_bits=None, network=f"model.{part}", name=part) for part in ("0", "3")]
    module, _ = fitted(parts[0], Classifier, parts[1])
    assert [list(qat.quantization.weights) for qat in parts] == [["weight"], ["weight"]]
    alone, _ = fitted(QATCallback(weight_bits=3, edge_bits=None, network="model.3"), Classifier)
    assert difference(module, alone) > 0
    assert difference(alone, plainly(Classifier)) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["modle.0"]}, "layers has 'modle.0', which matches no module; did you mean 'model.0'?"),
        ({"exclude": ["*.fc"]}, r"exclude has '\*\.fc', which matches no module"),
        ({"network": "net"}, "network names 'net', not a module of Classifier"),
    ],
)
def test_names_that_match_nothing_are_refused_before_the_first_step(settings, message):
    refused(QATCallback(**settings), Classifier, message, error=ValueError)


def test_manual_optimisation_without_the_mixin_is_refused():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    refused(QATCallback(), Manual, "optimises manually: let it inherit lightning_compress.CompressionMixin")


class Scripted(Classifier):
    def build(self):
        super().build()
        self.model[1] = torch.jit.script(self.model[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_part_is_refused():
    refused(QATCallback(), Scripted, r"'1' is scripted \(torch.jit\).*use it unscripted")


class Saving(nn.Module):
    """Runs a part of itself again in the backward pass, to save memory."""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.net = small_network()

    def run(self, x):
        return self.net[:3](x)

    def forward(self, x):
        if not self.training:
            return self.net[3](self.run(x))
        return self.net[3](checkpoint(self.run, x.requires_grad_(), use_reentrant=self.reentrant))


class SavingFunctionally(Saving):
    """As well, through a function that takes its weight."""

    def forward(self, x):
        x = self.net[:3](x)
        last = self.net[3]
        if not self.training:
            return last(x)
        return checkpoint(lambda y: F.linear(y, last.weight, last.bias), x, use_reentrant=self.reentrant)


def saving(network, reentrant):
    class Kind(Classifier):
        def build(self):
            self.model = network()
            self.model.reentrant = reentrant

    return Kind


@pytest.mark.parametrize(
    ("step_size", "reentrant", "start"),
    [("mse", True, 0.0), ("mse", False, 0.0), ("learned", True, 0.5), ("observed", False, 0.5)],
)
def test_activation_checkpointing_inside_of_the_network_is_refused(step_size, reentrant, start):
    """At once, and also where the training began in full precision."""
    message = "activation checkpointing within the network runs parts of it again .*put it around the whole network"
    qat = QATCallback(step_size=step_size, start=start)
    refused(qat, saving(Saving, reentrant), message, steps=int(8 * start))


def test_activation_checkpointing_of_a_function_is_refused():
    """It calls no module, and its gradient would be that of the weight as it is."""
    refused(QATCallback(weight_bits=2), saving(SavingFunctionally, True), "activation checkpointing within the network")


@pytest.mark.parametrize(
    ("step_size", "reentrant"), [("mse", True), ("mse", False), ("observed", False), ("learned", True)]
)
def test_activation_checkpointing_around_the_network_changes_nothing(step_size, reentrant):
    """Its calls are quantised whoever makes them."""

    class Around(Classifier):
        def task_loss(self, batch):
            x = batch[0].requires_grad_(self.training)
            return F.cross_entropy(checkpoint(self.model, x, use_reentrant=reentrant), batch[1])

    settings = {"weight_bits": 3, "activation_bits": 4, "step_size": step_size}
    module, _ = fitted(QATCallback(**settings), Around)
    plain, _ = fitted(QATCallback(**settings), Classifier)
    assert difference(module, plain) == 0


class Parts(Classifier):
    """The step calls two modules in a row."""

    def build(self):
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def task_loss(self, batch):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


def test_several_networks_are_refused_and_network_is_named():
    message = "calls 2 modules with parameters: 'body', 'head'; choose the network with network="
    refused(QATCallback(), Parts, message)
    qat = QATCallback(network="head", weight_bits=3)
    fitted(qat, Parts)
    assert (qat.quantization.network, bits_of(qat)) == ("head", {"weight": 8})


class Around(NormClassifier):
    """Its validation goes around the network, through layers inside."""

    def validation_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.model:
            x = layer(x)
        self.log("val_loss", F.cross_entropy(x, batch[1]))


@pytest.mark.parametrize(("start", "network"), [(0.0, None), (0.5, None), (0.0, "model")])
def test_a_validation_that_goes_around_the_network_is_refused(start, network):
    message = "Around.training_step calls 'model', and validation_step does not, so the quantised network could"
    refused(QATCallback(start=start, network=network), Around, message, steps=1 if start else 0)


class Turning(Classifier):
    """From some batch on it trains another network."""

    def build(self):
        super().build()
        self.other = small_network()

    def training_step(self, batch, batch_idx):
        if batch_idx >= 4:
            return F.cross_entropy(self.other(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)


@STEP_SIZES
def test_a_first_quantised_step_that_never_calls_the_network_is_an_error(step_size):
    message = "had no effect: the training step never called 'model'; name the part that it calls with network="
    qat = QATCallback(step_size=step_size, start=0.5, network="model")
    refused(qat, Turning, message, error=RuntimeError, steps=5)


def test_steps_that_are_skipped_are_no_evidence():
    """The first that trains is the first that is looked at."""

    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 3 else super().training_step(batch, batch_idx)

    for step_size in ("mse", "observed", "learned"):
        qat = QATCallback(weight_bits=3, edge_bits=None, step_size=step_size)
        module, fitting = fitted(qat, Skipping)
        assert difference(module, plainly(Skipping)) > 0
        assert measured(module, run=fitting) == qat.metrics


class Idle(Classifier):
    """A layer that only the validation runs."""

    def build(self):
        self.model = Validating()


def test_where_the_step_is_replayed_nothing_is_quantised():
    """Of two modes at once, each would see the operations of the other, and take them for the network's."""
    callback, counts = QATCallback(), []

    class Counting(L.Callback):
        def on_train_batch_end(self, *_):
            counts.append(callback._fit.calls.count)

    fitted(callback, NormClassifier, Counting(), validation=False)
    assert counts == list(range(1, STEPS + 1))  # though the first step is looked at once more after it


class Validating(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.more = small_network()[:3], nn.Linear(32, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.head(self.body(x))
        return x if self.training else self.more(x)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_steps_of_layers_that_training_does_not_run_cannot_learn(start):
    message = "the steps of 'more.weight' cannot learn: no training step so far runs these layers; .*exclude="
    qat = QATCallback(step_size="learned", start=start)
    epochs = 1 if start == 0 else 2  # it may come later in an epoch, so one that was seen from its start says so
    refused(qat, Idle, message, error=RuntimeError, steps=epochs * STEPS, max_epochs=epochs)
    qat = QATCallback(step_size="learned", exclude=["model.more"])
    module, fitting = fitted(qat, Idle)
    assert list(qat.quantization.weights) == ["body.0.weight", "head.weight"]
    assert measured(module, run=fitting) == qat.metrics


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("step_size", ["mse", "observed"])
def test_layers_that_only_the_validation_runs_are_quantised_and_told(step_size, start):
    qat = QATCallback(weight_bits=4, step_size=step_size, start=start)
    with pytest.warns(UserWarning, match="no training step so far runs 'more.weight', so these weights do not learn"):
        module, fitting = fitted(qat, Idle)
    assert list(qat.quantization.weights) == ["body.0.weight", "head.weight", "more.weight"]
    assert torch.equal(module.model.more.weight, made(Idle).model.more.weight)
    assert measured(module, run=fitting) == qat.metrics != measured(module)


class Alternating(Classifier):
    """One of two heads a batch; the first batches have only the first."""

    def build(self):
        self.model = nn.ModuleDict({"body": small_network()[:3], "one": nn.Linear(32, 3), "two": nn.Linear(32, 3)})
        self.model.forward = lambda x, name: self.model[name](self.model["body"](x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0], "two" if batch_idx >= 3 else "one"), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0], "two" if batch_idx else "one"), batch[1]))


@STEP_SIZES
def test_layers_that_only_some_batches_run(step_size):
    qat = QATCallback(weight_bits=4, step_size=step_size)
    module, fitting = fitted(qat, Alternating)
    assert list(qat.quantization.weights) == ["body.0.weight", "one.weight", "two.weight"]
    assert qat.quantization.left_in_float == ()
    assert measured(module, run=fitting) == qat.metrics != measured(module)
    assert fitting.logged["val_loss"] == qat.metrics["val_loss"]


def test_norms_behind_layers_that_the_first_batches_do_not_run_are_folded():
    class Norms(Alternating):
        def build(self):
            super().build()
            for name in ("one", "two"):
                self.model[name] = nn.Sequential(nn.Linear(32, 3), nn.BatchNorm1d(3))

    qat = QATCallback(weight_bits=4)
    fitted(qat, Norms)
    assert qat.quantization.folds == {"one.0:linear:0": "one.1", "two.0:linear:0": "two.1"}


def test_a_resume_late_in_an_epoch_knows_what_ran_before(tmp_path):
    """Of two heads the last batches have only one."""

    class First(Alternating):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0], "one" if batch_idx >= 5 else "two"), batch[1])

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    fitted(QATCallback(step_size="learned"), First, saver, enable_checkpointing=True)
    module, qat = made(First), QATCallback(step_size="learned")
    run = trainer(qat)
    run.fit(module, loader(), loader(rows=ROWS), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert run.global_step == STEPS
    assert len(qat.quantization.weights) == 3


class Replacing(L.Callback):
    """Puts something new into a network in its second epoch."""

    def __init__(self, replace):
        self.replace = replace

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.replace(pl_module, trainer.optimizers[0])


def new_data(module, optimizer):
    for value in module.parameters():
        value.data = value.data.clone()


def test_modules_without_weights_may_come_later():
    """Such as a loss that is made anew."""

    def renew(module, optimizer):
        module.model[0].loss = nn.CrossEntropyLoss()

    qat = QATCallback()
    module, _ = fitted(qat, Classifier, Replacing(renew), max_epochs=3)
    assert isinstance(module.model[0].loss, nn.CrossEntropyLoss)


@STEP_SIZES
def test_modules_that_come_later_are_refused(step_size):
    module = made(Classifier)
    name = [name for name, part in module.model.named_modules() if isinstance(part, nn.Linear)][-1]

    def replace(module, optimizer):
        setattr(module.model, name, nn.Linear(32, 3))

    message = f"'qat': '{name}' was put into the network after it was quantised, and would run in full precision"
    with pytest.raises(RuntimeError, match=message):
        trainer(QATCallback(step_size=step_size), Replacing(replace), max_epochs=3).fit(
            module, loader(), loader(rows=ROWS)
        )


def new_weight(module, optimizer):
    layer = [part for part in module.model.modules() if isinstance(part, nn.Linear)][-1]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    optimizer.add_param_group({"params": [layer.weight]})


@pytest.mark.parametrize("replace", [new_weight, new_data])
@STEP_SIZES
def test_parameters_that_are_replaced_are_rounded_all_the_same(step_size, replace):
    qat = QATCallback(weight_bits=4, step_size=step_size)
    module, fitting = fitted(qat, Classifier, Replacing(replace), max_epochs=3)
    assert fitting.logged["val_loss"] == qat.metrics["val_loss"] != measured(module)["val_loss"]


class Differentiating(NormClassifier):
    """An adversarial step: the gradient of the input is asked for."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        [gradient] = torch.autograd.grad(F.cross_entropy(self.model(x), batch[1]), x)
        return F.cross_entropy(self.model((x + 0.1 * gradient.sign()).detach()), batch[1])


@pytest.mark.parametrize("validates", [True, False])
@STEP_SIZES
def test_steps_that_differentiate(step_size, validates):
    kind = Differentiating
    if not validates:

        class Untested(Differentiating):
            validation_step = L.LightningModule.validation_step

        kind = Untested
    qat = QATCallback(weight_bits=4, step_size=step_size, start=0.5)
    module, _ = fitted(qat, kind, validation=validates)
    assert difference(module, plainly(kind) if validates else made(kind)) > 0
    assert len(qat.quantization.weights) == 2


def test_a_prediction_that_goes_around_the_network_is_not_lost():
    class Featuring(Classifier):
        def predict_step(self, batch, batch_idx):
            return self.model[0](batch[0])

    qat = QATCallback()
    module, fitting = fitted(qat, Featuring)
    with pytest.warns(UserWarning, match="'qat' had no effect: Featuring never called 'model'"):
        found = fitting.predict(module, loader(rows=ROWS))
    assert sum(len(part) for part in found) == ROWS


def test_steps_learn_as_fast_as_the_fastest_group():
    """Also where the first one is frozen, and not at all where all are."""
    for rates, moves in (((0.0, 0.1), True), ((0.0, 0.0), False)):

        class Groups(Classifier):
            def configure_optimizers(self, rates=rates):
                first, *rest = self.parameters()
                return torch.optim.SGD([{"params": [first], "lr": rates[0]}, {"params": rest, "lr": rates[1]}])

        _, fitting = fitted(QATCallback(step_size="learned"), Groups)
        assert (fitting.logged["compress/qat/step_change"] > 0) == moves


class Remembering(Classifier):
    """Its network keeps what it has computed until the next call."""

    def build(self):
        super().build()

        class Memory(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.kept = nn.Linear(8, 8), nn.Linear(8, 3), None

            def forward(self, x):
                features = F.relu(self.first(x))
                before = features if self.kept is None or len(self.kept) != len(features) else self.kept
                self.kept = features.detach()
                return self.second(features + before)

        self.model = Memory()


def test_what_a_network_keeps_between_calls_is_what_it_was_given():
    qat = QATCallback(weight_bits=4, activation_bits=4, freeze_batchnorm_at=1)
    module, _ = fitted(qat, Remembering)
    assert [name for name in vars(module.model.kept) if name.startswith("_lightning")] == []


class Frozen(Classifier):
    def build(self):
        super().build()
        self.model[0].requires_grad_(False)


@STEP_SIZES
def test_frozen_weights_stay_as_they_are(step_size):
    """And are rounded; their steps learn, as a gradient comes to them."""
    qat = QATCallback(weight_bits=3, step_size=step_size)
    module, fitting = fitted(qat, Frozen)
    assert torch.equal(module.model[0].weight, made(Frozen).model[0].weight)
    assert measured(module, run=fitting) == qat.metrics != measured(module)
    begun = qat.state_dict()["start_grids"]["weights"]["0.weight"]["step"]
    assert torch.equal(begun, qat.quantization.weights["0.weight"].step) == (step_size != "learned")


# Grids of PSGD from a file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of runs with PSGD of 4 bits, of 2, and without it."""
    folder = tmp_path_factory.mktemp("saved")
    for name, callbacks in (
        ("four", [PSGDCallback(4, quantized_validation=False)]),
        ("two", [PSGDCallback(2, edge_bits=None, quantized_validation=False)]),
        ("zero", [PSGDCallback(4, target="zero", eps=1e-3, quantized_validation=False)]),
        ("plain", []),
    ):
        fitting = trainer(*callbacks)
        fitting.fit(made(Classifier), loader())
        fitting.save_checkpoint(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("two", ValueError, "grids_from='.*two' is of a training for 2 bits, and weight_bits=4; give the same"),
        ("zero", ValueError, "grids_from='.*zero' has no grids of PSGDCallback"),
        ("plain", ValueError, "grids_from='.*plain' has no grids of PSGDCallback"),
        ("nothing", FileNotFoundError, "nothing"),
    ],
)
def test_files_without_the_grids_are_refused_before_the_first_step(saved, name, error, message):
    qat = QATCallback(weight_bits=4, grids_from=saved / name)
    refused(qat, Classifier, message, error=error)


def test_the_grids_of_a_file(saved):
    """Of one step for a whole weight, as PSGD has had it; where they begin, whatever is trained."""
    state = torch.load(saved / "four", weights_only=True)["state_dict"]
    module, qat = made(Classifier), QATCallback(weight_bits=4, grids_from=str(saved / "four"))
    module.load_state_dict(state)
    trainer(qat).fit(module, loader())
    for name, grid in qat.quantization.weights.items():
        assert (grid.bits, grid.step.ndim) == (4, 0)
        assert torch.equal(grid.step, state[f"model.{name}"].abs().max() / 7)


# What validation shows


@pytest.mark.parametrize(
    ("kind", "step_size"),
    [
        *((NormClassifier, step_size) for step_size in ("mse", "observed", "learned")),
        (NetworkItself, "learned"),
        (DictClassifier, "observed"),
    ],
)
def test_validation_in_the_fit_afterwards_and_on_a_copy_are_of_one_network(kind, step_size):
    qat = QATCallback(weight_bits=3, activation_bits=4, step_size=step_size)
    module, fitting = fitted(qat, kind)
    logged = fitting.logged["val_loss"]
    assert qat.metrics == {"val_loss": logged}
    assert measured(module, run=fitting) == qat.metrics
    assert evaluate_quantized(module, fitting, qat.quantization) == qat.metrics
    assert abs(measured(module)["val_loss"] - logged) > 1e-3
    [tested] = fitting.test(module, loader(kind, rows=ROWS), verbose=False)
    assert tested == {"test_loss": logged}


def by_formula(module, qat, x):
    """The small network with batch norm, rounded by hand."""
    net, grids = module.model, qat.quantization

    def weight(name, parameter):
        grid = grids.weights[name]
        step, limit = grid.step.reshape(-1, *[1] * (parameter.ndim - 1)), 2 ** (grid.bits - 1) - 1
        return torch.clamp(torch.round(parameter / step), -limit, limit) * step

    def activation(key, value):
        grid = grids.activations[key]
        integers = torch.clamp(torch.round(value / torch.tensor(grid.scale)) + grid.zero_point, 0, 2**grid.bits - 1)
        return (integers - grid.zero_point) * grid.scale

    first = added(grids, "in:0:conv2d:0", "0.weight", net[0].bias, net[1])
    x = activation("in:0:conv2d:0", x.reshape(-1, 1, 2, 4))
    x = F.relu(net[1](F.conv2d(x, weight("0.weight", net[0].weight), first, padding=1)))
    x = activation("2:relu:0", x).flatten(1)
    return F.linear(x, weight("4.weight", net[4].weight), added(grids, "2:relu:0", "4.weight", net[4].bias))


@STEP_SIZES
def test_validation_is_that_of_the_formula(step_size):
    qat = QATCallback(weight_bits=4, activation_bits=3, step_size=step_size)
    module, fitting = fitted(qat)
    module.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(by_formula(module, qat, x), y) for x, y in loader(rows=ROWS)]
    assert float(torch.stack(losses).mean()) == pytest.approx(fitting.logged["val_loss"], abs=1e-6)


@pytest.mark.slow
@STEP_SIZES
def test_the_file_is_that_of_the_network_that_was_validated(step_size, tmp_path):
    qat = QATCallback(weight_bits=4, step_size=step_size)
    export = ExportCallback(
        tmp_path / "n.onnx", precision="int8", metric="val_loss", tolerance=0.02, fp32_comparison=False
    )
    module, fitting = fitted(qat, NormClassifier, export)
    logged = fitting.logged["val_loss"]
    assert export.result.quantization is qat.quantization
    assert evaluate_quantized(module, fitting, export.result.quantization) == {"val_loss": logged}
    assert export.file_metrics["val_loss"] == pytest.approx(logged, abs=5e-3)
    assert abs(measured(module)["val_loss"] - logged) > 5e-3


def test_before_start_validation_is_plain():
    shown = []

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            plain = made(NormClassifier).eval()
            plain.load_state_dict(pl_module.state_dict())
            losses = [F.cross_entropy(plain.model(x), y) for x, y in loader(rows=ROWS)]
            off = float(trainer.callback_metrics["val_loss"]) - float(torch.stack(losses).mean())
            shown.append((trainer.global_step, abs(off) > 1e-3))

    qat = QATCallback(weight_bits=2, edge_bits=None, start=0.5)
    fitted(qat, NormClassifier, Look(), val_check_interval=2)
    assert shown == [(0, False), (2, False), (4, False), (6, True), (8, True)]


def test_a_training_that_ends_before_start_is_calibrated_and_says_so():
    """As after PTQ."""
    qat = QATCallback(weight_bits=4, start=1.0, freeze_batchnorm_at=1.0)
    with pytest.warns(UserWarning, match=r"the training ended before start=1.0, so the network was calibrated"):
        module, fitting = fitted(qat)
    assert difference(module, plainly(NormClassifier)) == 0
    ptq = PTQCallback(weight_bits=4, observer="mse", weight_range="mse")
    fitted(ptq)
    assert qat.quantization.activations == ptq.quantization.activations
    assert qat.metrics == ptq.metrics
    assert measured(module, run=fitting) == qat.metrics
    fitting.fit_loop.max_epochs += 1  # it goes on, and has not begun yet
    with pytest.warns(UserWarning, match=r"the training ended before start=1.0"):
        fitting.fit(module, loader(NormClassifier), loader(NormClassifier, rows=ROWS))
    assert fitting.global_step == 2 * STEPS
    assert measured(module, run=fitting) == qat.metrics


def test_a_checkpoint_of_a_training_that_ended_before_start(tmp_path):
    qat = QATCallback(weight_bits=4, start=1.0, freeze_batchnorm_at=1.0)
    with pytest.warns(UserWarning, match="the training ended before start"):
        _, fitting = fitted(qat)
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    later, module = QATCallback(weight_bits=4), made(NormClassifier)
    again = trainer(later, max_epochs=2)
    with pytest.warns(UserWarning, match="start was 1.0 and is 0.0"):
        again.fit(module, loader(), loader(rows=ROWS), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert later.quantization.statistics == {}
    assert measured(module, run=again) == later.metrics


# What is logged, and said


def told(part, run):
    """What comes of a run, and how often a warning was given that has this in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, len([entry for entry in caught if part in str(entry.message)])


def share_beyond(module, qat):
    """In NumPy."""
    beyond, total = 0, 0
    for name, grid in qat.quantization.weights.items():
        rows = module.model.get_parameter(name).detach().numpy().reshape(len(grid.step), -1)
        beyond += int((np.abs(rows) > (2 ** (grid.bits - 1) - 0.5) * grid.step.numpy()[:, None]).sum())
        total += rows.size
    return beyond / total


@STEP_SIZES
def test_what_is_logged(step_size, tmp_path):
    qat = QATCallback(weight_bits=4, step_size=step_size, name="few")
    module, fitting = fitted(qat, logger=CSVLogger(tmp_path), max_epochs=2)
    metrics = fitting.logged
    assert metrics["compress/few/clipped"] == pytest.approx(share_beyond(module, qat))
    assert ("compress/few/step_change" in metrics) == (step_size == "learned")
    if step_size == "learned":
        start, end = qat.state_dict()["start_grids"], qat.quantization
        changes = [end.activations[key].scale / scale for key, (scale, *_) in start["activations"].items()]
        for name, entry in start["weights"].items():
            changes += (end.weights[name].step / entry["step"]).tolist()
        change = float(np.mean(np.abs(np.array(changes) - 1)))
        assert metrics["compress/few/step_change"] == pytest.approx(change, rel=1e-4)
        assert change > 1e-3
    rows = rows_logged(fitting.logger)
    assert len([row for row in rows if row.get("compress/few/clipped")]) == 2  # epochs
    [row] = [row for row in rows if row.get("compress/few/val_loss")]
    assert float(row["compress/few/val_loss"]) == pytest.approx(qat.metrics["val_loss"], rel=1e-6)
    assert int(row["step"]) == 2 * STEPS


def test_nothing_is_logged_before_start():
    logged = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append("compress/qat/clipped" in trainer.callback_metrics)

    qat = QATCallback(start=0.6, freeze_batchnorm_at=0.6)
    fitted(qat, Classifier, Look(), max_epochs=3)
    assert logged[0] is False
    assert qat.quantization is not None
    _, fitting = fitted(QATCallback(start=0.6, freeze_batchnorm_at=0.6), Classifier, max_epochs=3)
    assert "compress/qat/clipped" in fitting.logged


def test_a_bare_trainer_logs_nothing():
    qat, module = QATCallback(step_size="learned"), made(Bare)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, callbacks=[qat]).fit(module, loader())
    assert difference(module, made(Bare)) > 0
    assert len(qat.quantization.weights) == 2


class Bare(Classifier):
    def log(self, name, *args, **settings):
        if name.startswith("compress"):
            raise AssertionError(name)


@pytest.mark.parametrize(("step_size", "warned"), [("mse", True), ("learned", True), ("observed", False)])
def test_weights_that_outgrow_their_grids(step_size, warned):
    """Grids that follow them are never too small, until they stay."""

    class Growing(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    late = {"freeze_observers_at": 1.0} if step_size == "observed" else {}
    qat = QATCallback(weight_bits=8, step_size=step_size, **late)
    slow = "learn slowly" if step_size == "learned" else "stay"
    message = (
        "% of the weights lie beyond the ends of their grids, which were found at the start, when 0.0% did, and "
        f"{slow}: begin with a trained network, later (start=), or with a smaller learning rate"
    )
    (module, fitting), times = told(message, lambda: fitted(qat, Growing, max_epochs=3))
    share = fitting.logged["compress/qat/clipped"]
    assert share == pytest.approx(share_beyond(module, qat))
    assert times == warned  # once, however many epochs
    assert (share > 0.05) == warned


def test_a_trained_network_does_not_outgrow_them():
    class Slow(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    (_, fitting), times = told("beyond the ends", lambda: fitted(QATCallback(), Slow, max_epochs=3))
    assert times == 0
    assert fitting.logged["compress/qat/clipped"] < 0.05


@STEP_SIZES
def test_remarks(step_size):
    qat = QATCallback(weight_bits=4, step_size=step_size, freeze_batchnorm_at=1)
    report = CompressionReport(latency=False, path="unused")
    assert qat.remarks() == []
    fitted(qat, NormClassifier, report, fast_dev_run=2)
    first, *more = qat.remarks()
    assert first == "qat: 2 weights of 4 bits and 2 activations of 8 bits are quantised."
    assert [note for note in report.result.notes if note.startswith("qat: ")] == [first, *more]
    assert len(more) == (step_size == "learned")
    if more:
        start, end = qat.state_dict()["start_grids"], qat.quantization
        changes = [end.activations[key].scale / scale for key, (scale, *_) in start["activations"].items()]
        for name, entry in start["weights"].items():
            changes += (end.weights[name].step / entry["step"]).tolist()
        off = float(np.mean(np.abs(np.array(changes) - 1)))
        assert more[0].startswith(
            f"qat: learned steps are {min(changes):.3g} to {max(changes):.3g} times what they were"
        )
        assert f"{off:.1%} off on average" in more[0]


# Divergence


class Diverging(Classifier):
    """Its loss grows by itself, in some steps."""

    sizes = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.sizes[self.trainer.global_step]


def diverging(*sizes, each=20):
    class Kind(Diverging):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    Kind.sizes = [size for size in sizes for _ in range(each)]
    return Kind


def test_a_loss_that_grows_ends_the_training():
    """Averaged over 20 steps, and compared with the first 20."""
    kind = diverging(1.0, 4.0, 8.0)
    message = (
        r"'qat': the loss went from 1\.\d* to [89]\.\d* since the steps began to learn, more than max_loss_growth=5.0:"
    )
    with pytest.raises(RuntimeError, match=message + r".*smaller step_lr=.*step_size='mse'.*max_loss_growth=None"):
        fitted(qat := QATCallback(step_size="learned"), kind, max_epochs=-1, max_steps=60)
    assert len(qat.quantization.weights) == 2


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"max_loss_growth": None}, (1.0, 4.0, 80.0)),
        ({"max_loss_growth": 9.0}, (1.0, 4.0, 8.0)),
        ({"step_size": "mse"}, (1.0, 4.0, 80.0)),
        ({"step_size": "observed"}, (1.0, 4.0, 80.0)),
        ({}, (8.0, 1.0, 8.0)),
        ({"start": 0.5, "freeze_batchnorm_at": 1.0}, (0.1, 8.0, 8.0)),
    ],
)
def test_a_loss_that_may_grow(settings, sizes):
    kind = diverging(*sizes)
    module, fitting = fitted(QATCallback(**{"step_size": "learned", **settings}), kind, max_epochs=-1, max_steps=60)
    assert fitting.global_step == 60
    assert difference(module, made(kind)) > 0


class DivergingNorm(NormClassifier):
    """With batch norm, which is frozen after 20 of 60 steps; its loss grows by itself."""

    sizes = ()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.sizes[self.trainer.global_step // 20]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def frozen(monkeypatch, sizes, **settings):
    monkeypatch.setattr(DivergingNorm, "sizes", sizes)
    qat = QATCallback(freeze_batchnorm_at=1 / 3, **settings)
    return fitted(qat, DivergingNorm, max_epochs=-1, max_steps=60)


@pytest.mark.parametrize("step_size", ["mse", "observed", "learned"])
def test_a_loss_that_grows_with_frozen_batch_norm_ends_the_training(monkeypatch, step_size):
    message = r"'qat': the loss went from .* since batch norm was frozen, more than max_loss_growth=5\.0: "
    with pytest.raises(RuntimeError, match=message + r".*freeze batch norm later, .*freeze_batchnorm_at=1"):
        frozen(monkeypatch, (1.0, 1.0, 9.0), step_size=step_size)
    with pytest.warns(UserWarning, match=r"the loss went from .* since batch norm was frozen .freeze_batchnorm_at="):
        _, fitting = frozen(monkeypatch, (1.0, 1.0, 9.0), step_size=step_size, max_loss_growth=None)
    assert fitting.global_step == 60


def test_a_loss_that_grows_a_little_with_frozen_batch_norm(monkeypatch):
    """What it was before counts, not what it was at first."""
    with pytest.warns(UserWarning, match="the learning rate is probably too large for a network without it"):
        frozen(monkeypatch, (0.5, 0.5, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        frozen(monkeypatch, (1.0, 1.5, 1.5))


def test_batches_that_are_accumulated_do_not_make_the_loss_smaller():
    """Lightning divides it by their number, which may change in a training."""

    class Constant(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.0 + 1.0

    scheduler = GradientAccumulationScheduler({0: 8, 3: 1})
    _, fitting = fitted(QATCallback(step_size="learned"), Constant, scheduler, max_epochs=9)
    assert fitting.current_epoch == 9


def test_a_loss_that_is_no_number_ends_the_training():
    kind = diverging(1.0, math.nan)
    with pytest.raises(RuntimeError, match=r"the loss went from .* to nan since the steps began to learn"):
        fitted(QATCallback(step_size="learned"), kind, max_epochs=-1, max_steps=60, num_sanity_val_steps=0)


def test_a_learning_rate_that_is_far_too_large():
    """It comes after the first 20 steps, of which each is small."""

    class Fast(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=30.0)
            warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 if step < 20 else 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}

    settings = {"step_size": "learned", "step_lr": 1.0}
    with pytest.raises(RuntimeError, match=r"since the steps began to learn, more than max_loss_growth=5\.0"):
        fitted(QATCallback(**settings), Fast, max_epochs=5)
    _, fitting = fitted(QATCallback(**settings, max_loss_growth=None), Fast, max_epochs=5)
    assert fitting.global_step == 5 * STEPS


# Networks


class Auxiliary(nn.Module):
    """A second head in training."""

    def __init__(self):
        super().__init__()
        self.body, self.hidden = small_network()[:3], nn.Linear(32, 8)
        self.head, self.second = nn.Linear(8, 3), nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        x = self.body(x)
        output = self.head(F.relu(self.hidden(x)))
        return (output, self.second(x)) if self.training else output


class WithAuxiliary(Classifier):
    def build(self):
        self.model = Auxiliary()

    def task_loss(self, batch):
        outputs = self.model(batch[0])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(share * F.cross_entropy(own, batch[1]) for share, own in zip((1.0, 0.3), outputs, strict=False))


@STEP_SIZES
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_head_that_only_training_runs_gets_grids_too(step_size, start, tmp_path):
    qat = QATCallback(weight_bits=3, edge_bits=8, step_size=step_size, start=start)
    module, fitting = fitted(qat, WithAuxiliary)
    weights = ["body.0.weight", "head.weight", "hidden.weight", "second.0.weight", "second.2.weight"]
    assert sorted(qat.quantization.weights) == weights
    assert "second.1:relu:0" in qat.quantization.activations
    assert difference(module, plainly(WithAuxiliary)) > 0
    assert measured(module, run=fitting) == qat.metrics != measured(module)
    # what the file computes does not have it
    ends = {name: grid.bits for name, grid in qat.quantization.weights.items()}
    assert (ends["body.0.weight"], ends["hidden.weight"], ends["head.weight"]) == (8, 3, 8)


@pytest.mark.slow
@STEP_SIZES
def test_a_head_that_only_training_runs_is_not_in_the_file(step_size, tmp_path):
    qat = QATCallback(weight_bits=4, step_size=step_size)
    export = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", fp32_comparison=False)
    fitted(qat, WithAuxiliary, export)
    assert export.file_metrics["val_loss"] == pytest.approx(qat.metrics["val_loss"], abs=0.02)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(self.first(F.relu(self.first(x)))))


class UsedTwice(Classifier):
    def build(self):
        self.model = Twice()


def rounded(parameter, grid):
    step, limit = grid.step.reshape(-1, *[1] * (parameter.ndim - 1)), 2 ** (grid.bits - 1) - 1
    return torch.clamp(torch.round(parameter / step), -limit, limit) * step


def placed(value, grid):
    integers = torch.clamp(torch.round(value / torch.tensor(grid.scale)) + grid.zero_point, 0, 2**grid.bits - 1)
    return (integers - grid.zero_point) * grid.scale


@STEP_SIZES
def test_a_layer_that_is_used_twice_has_one_grid(step_size):
    qat = QATCallback(weight_bits=4, activation_bits=4, step_size=step_size)
    module, fitting = fitted(qat, UsedTwice)
    grids = qat.quantization
    assert list(grids.weights) == ["first.weight", "head.weight"]
    assert list(grids.activations) == ["in:first:linear:0", ":relu:0", ":relu:1"]
    assert [place.name for place in grids.sites.values()] == ["first.weight", "first.weight", "head.weight"]
    net, [one, two, three] = module.model, grids.activations.values()
    first, head = (rounded(layer.weight.detach(), grids.weights[name]) for layer, name in (
        (net.first, "first.weight"), (net.head, "head.weight")))  # fmt: skip
    with torch.no_grad():
        losses = []
        for x, y in loader(rows=ROWS):
            for before, after in ((one, two), (None, three)):
                x = placed(x, before) if before else x
                key = "in:first:linear:0" if before else ":relu:0"
                x = placed(F.relu(F.linear(x, first, added(grids, key, "first.weight", net.first.bias))), after)
            bias = added(grids, ":relu:1", "head.weight", net.head.bias)
            losses.append(F.cross_entropy(F.linear(x, head, bias), y))
    assert float(torch.stack(losses).mean()) == pytest.approx(fitting.logged["val_loss"], abs=1e-5)
    assert difference(module, plainly(UsedTwice)) > 0


class AttentionNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = x.reshape(-1, 2, 4)
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class Attention(Classifier):
    def build(self):
        self.model = AttentionNetwork()


@STEP_SIZES
def test_projections_of_attention_are_quantised_and_trained(step_size):
    qat = QATCallback(weight_bits=3, edge_bits=None, step_size=step_size)
    module, fitting = fitted(qat, Attention)
    assert bits_of(qat) == {"attention.in_proj_weight": 3, "attention.out_proj.weight": 3, "head.weight": 3}
    assert qat.quantization.weights["attention.in_proj_weight"].step.shape == (12,)
    assert measured(module, run=fitting) == qat.metrics == {"val_loss": fitting.logged["val_loss"]}
    assert abs(measured(module)["val_loss"] - qat.metrics["val_loss"]) > 1e-4
    plain, start = plainly(Attention), made(Attention)
    weights = [each.model.attention.in_proj_weight.detach() for each in (module, plain, start)]
    assert float((weights[0] - weights[1]).abs().max()) > 0
    assert bool(((weights[0] - weights[2]).abs().amax(1) > 0).all())
    if step_size == "learned":
        begun = qat.state_dict()["start_grids"]["weights"]["attention.in_proj_weight"]["step"]
        assert bool((qat.quantization.weights["attention.in_proj_weight"].step != begun).all())


class Normed(Classifier):
    old = False

    def build(self):
        super().build()
        norm = nn.utils.weight_norm if self.old else nn.utils.parametrizations.weight_norm
        self.model[3] = norm(self.model[3])


class NormedAsBefore(Normed):
    old = True


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@STEP_SIZES
@pytest.mark.parametrize("kind", [Normed, NormedAsBefore])
def test_weight_norm(kind, step_size):
    """Rounded is what is computed of the two parameters, which learn."""
    qat = QATCallback(weight_bits=3, edge_bits=None, step_size=step_size)
    module, fitting = fitted(qat, kind)
    assert bits_of(qat) == {"0.weight": 3, "3.weight": 3}
    module.eval()
    with torch.no_grad():
        module.model(torch.zeros(1, 8))  # which computes it
    weight = module.model[3].weight.detach()
    direction = module.model[3].weight_v if kind.old else module.model[3].parametrizations.weight.original1
    size = module.model[3].weight_g if kind.old else module.model[3].parametrizations.weight.original0
    assert torch.allclose(weight, size * direction / direction.flatten(1).norm(dim=1, keepdim=True))
    found = qat.quantization.weights["3.weight"].step
    if step_size == "observed":  # it followed until three quarters
        states = observed_weights(kind)
        assert torch.equal(found, states.flatten(1).abs().amax(1) / 3)
    assert measured(module, run=fitting) == qat.metrics == {"val_loss": fitting.logged["val_loss"]}
    assert difference(module, plainly(kind)) > 0


def observed_weights(kind):
    """The weight that the grids were frozen for, after six steps of eight."""
    kept = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                layer = pl_module.model[3]
                old = hasattr(layer, "weight_g")
                size = layer.weight_g if old else layer.parametrizations.weight.original0
                direction = layer.weight_v if old else layer.parametrizations.weight.original1
                kept["weight"] = torch._weight_norm(direction, size, 0).detach().clone()

    fitted(QATCallback(weight_bits=3, edge_bits=None, step_size="observed"), kind, Keep())
    return kept["weight"]


@STEP_SIZES
def test_weights_only(step_size):
    qat = QATCallback(weight_bits=3, edge_bits=None, activation_bits=None, step_size=step_size)
    module, fitting = fitted(qat)
    assert qat.quantization.activations == {}
    assert not qat.quantization.integer_activations
    net = module.model.eval()
    with torch.no_grad():
        losses = []
        for x, y in loader(rows=ROWS):
            weight = rounded(net[0].weight, qat.quantization.weights["0.weight"])
            x = F.relu(net[1](F.conv2d(x.reshape(-1, 1, 2, 4), weight, net[0].bias, padding=1)))
            head = rounded(net[4].weight, qat.quantization.weights["4.weight"])
            losses.append(F.cross_entropy(F.linear(x.flatten(1), head, net[4].bias), y))
    logged = fitting.logged["val_loss"]
    assert float(torch.stack(losses).mean()) == pytest.approx(logged, abs=1e-6)
    assert qat.metrics == {"val_loss": logged}


@pytest.mark.parametrize(
    ("settings", "quantised"),
    [
        ({}, ["0.weight", "4.weight"]),
        ({"layers": ["type:Linear"], "step_size": "learned"}, ["4.weight"]),
        ({"layers": ["model.0"], "step_size": "observed"}, ["0.weight"]),
        ({"layers": ["model.*"], "exclude": ["type:Conv2d"]}, ["4.weight"]),
        ({"exclude": ["model.4"], "step_size": "learned"}, ["0.weight"]),
    ],
)
def test_layers_and_exclude(settings, quantised, caplog):
    qat = QATCallback(weight_bits=3, edge_bits=None, **settings)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        module, fitting = fitted(qat)
    assert list(qat.quantization.weights) == quantised
    left = [name for name in ("0.weight", "4.weight") if name not in quantised]
    assert [name for name in qat.quantization.left_in_float if name.endswith("weight")] == left
    assert f"qat begins: {len(quantised)} weight{'s' if len(quantised) > 1 else ''} of 3 bits and" in caplog.text
    assert measured(module, run=fitting) == qat.metrics


def test_a_selected_layer_without_an_integer_kernel_is_refused():
    class Recurrent(Classifier):
        def build(self):
            self.model = nn.Sequential(
                nn.Unflatten(1, (2, 4)), nn.LSTM(4, 4, batch_first=True), Last(), nn.Linear(4, 3)
            )

    message = r"layers has 'model.1', and nothing of it \(LSTM\) runs as a convolution or a linear layer"
    refused(QATCallback(layers=["model.1", "model.3"]), Recurrent, message, error=ValueError, steps=1)
    qat = QATCallback()
    fitted(qat, Recurrent)
    assert list(qat.quantization.weights) == ["3.weight"]
    assert {"1.weight_ih_l0", "1.weight_hh_l0"} <= set(qat.quantization.left_in_float)


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


class Deep(Classifier):
    def build(self):
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("settings", "edges", "inner"),
    [
        ({"weight_bits": 3, "activation_bits": 4, "step_size": "observed"}, (8, 8), (3, 4)),
        ({"weight_bits": 3, "activation_bits": 4, "step_size": "learned"}, (8, 8), (3, 4)),
        ({"weight_bits": 4, "activation_bits": 4}, (4, 4), (4, 4)),
        ({"weight_bits": 2, "activation_bits": 4, "edge_bits": None}, (2, 4), (2, 4)),
        ({"weight_bits": 4, "activation_bits": 4, "edge_bits": 6}, (6, 6), (4, 4)),
    ],
)
def test_bits_of_the_edges(settings, edges, inner):
    """The first and the last weight, and the input; they stay what they are when grids move."""
    qat = QATCallback(**settings)
    fitted(qat, Deep)
    expected = [edges[0], inner[0], inner[0], edges[0]]
    assert list(bits_of(qat).values()) == expected
    first, *others = qat.quantization.activations.items()
    assert first[0].startswith("in:")
    assert [first[1].bits, *(grid.bits for _, grid in others)] == [edges[1], inner[1], inner[1], inner[1]]


@STEP_SIZES
def test_manual_optimisation_with_the_mixin(step_size):
    """The same as automatic optimisation, also of steps that learn, and of when it is frozen."""
    qat = QATCallback(weight_bits=3, edge_bits=None, step_size=step_size)
    module, fitting = fitted(qat, MixinClassifier)
    automatic, _ = fitted(QATCallback(weight_bits=3, edge_bits=None, step_size=step_size), Unscheduled)
    assert difference(module, automatic) == 0
    assert measured(module, run=fitting) == qat.metrics


class Unscheduled(Classifier):
    """As it is with manual optimisation, where nobody steps the scheduler."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


# Checkpoints that are the best


class Worse(Classifier):
    """Its metric grows worse with each epoch."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("worse", float(self.current_epoch))


def test_checkpoints_before_start_are_not_compared_with_those_after(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="worse", filename="{epoch}", save_top_k=1)
    last = ModelCheckpoint(tmp_path / "last", filename="{epoch}", save_top_k=-1)
    qat = QATCallback(start=0.5)
    with pytest.warns(UserWarning, match="the best checkpoints so far are of the network in full precision") as caught:
        fitted(qat, Worse, saver, last, max_epochs=4, enable_checkpointing=True)
    assert len([entry for entry in caught if "best checkpoints" in str(entry.message)]) == 1
    assert saver.best_model_path.endswith("epoch=2.ckpt")  # the best of those that are quantised
    assert float(saver.best_model_score) == 2.0
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=2.ckpt"]
    assert len(list((tmp_path / "last").glob("*.ckpt"))) == 4
    assert torch.load(saver.best_model_path, weights_only=True)["callbacks"][qat.state_key]["quantization"] is not None


def test_nothing_is_forgotten_where_it_begins_at_once(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="worse", filename="{epoch}")
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    _, times = told("best checkpoints", lambda: fitted(QATCallback(), Worse, saver, **settings))
    assert times == 0
    assert saver.best_model_path.endswith("epoch=0.ckpt")


def test_early_stopping_waits_anew():
    """A network on few bits may be worse for a while than the best in full precision."""
    stopping = EarlyStopping("score", patience=1)
    _, fitting = fitted(QATCallback(start=0.34, freeze_batchnorm_at=1), Jumping, stopping, max_epochs=6)
    assert fitting.current_epoch == 6
    _, fitting = fitted(PTQCallback(), Jumping, EarlyStopping("score", patience=1), max_epochs=6)
    assert fitting.current_epoch == 3


def test_a_scheduler_that_waits_for_a_plateau_waits_anew(caplog):
    """Its best score is of another network: 2, and then 9, 8, 7 and 6 are no plateau."""
    rates = {}
    for kind in (QATCallback(start=0.34, freeze_batchnorm_at=1), PTQCallback()):
        with caplog.at_level(logging.INFO, logger="lightning_compress"):
            _, fitting = fitted(kind, Jumping, max_epochs=6)
        rates[type(kind)] = fitting.optimizers[0].param_groups[0]["lr"]
    assert rates == {QATCallback: 0.1, PTQCallback: pytest.approx(0.001)}
    assert [entry.message for entry in caplog.records if "Plateau" in entry.message] == [
        "qat: ReduceLROnPlateau begins to wait anew, with the quantised network"
    ]


# Both packages, and YAML


def boring(namespace):
    """A module with a network of two layers, and its datamodule."""
    demos = import_module(f"{namespace}.demos.boring_classes")

    class Boring(demos.BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(self(batch)))

    return Boring, demos.BoringDataModule


SILENT = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "limit_train_batches": 4,
    "limit_val_batches": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize(
    ("namespace", "step_size"),
    [("lightning.pytorch", "learned"), ("pytorch_lightning", "mse"), ("pytorch_lightning", "learned")],
)
def test_the_trainers_of_both_packages(namespace, step_size):
    module_class, data_class = boring(namespace)
    make = import_module(namespace).Trainer
    qat, module, data = QATCallback(weight_bits=4, step_size=step_size), module_class(), data_class()
    fitting = make(**SILENT, callbacks=[qat])
    fitting.fit(module, datamodule=data)
    assert list(qat.quantization.weights) == ["0.weight", "2.weight"]
    assert fitting.validate(module, datamodule=data, verbose=False) == [qat.metrics]
    assert make(**SILENT).validate(module, datamodule=data, verbose=False) != [qat.metrics]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_yaml(namespace, tmp_path):
    cli = import_module(f"{namespace}.cli").LightningCLI
    settings = {
        "weight_bits": 4,
        "activation_bits": None,
        "step_size": "learned",
        "start": 0.25,
        "freeze_batchnorm_at": 0.5,
        "max_loss_growth": None,
        "edge_bits": 8,
    }
    entry = {"class_path": "lightning_compress.QATCallback", "init_args": settings}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {**SILENT, "callbacks": [entry]}}))
    arguments = ["fit", "--config", str(config), "--trainer.callbacks.max_samples=2"]
    done = cli(*boring(namespace), args=arguments, save_config_callback=None)
    [qat] = [callback for callback in done.trainer.callbacks if isinstance(callback, QATCallback)]
    assert {name: getattr(qat, name) for name in settings} == settings
    assert qat.max_samples == 2
    assert bits_of(qat) == {"0.weight": 8, "2.weight": 8}
    assert list(qat.metrics) == ["val_loss"]


def test_the_help_is_short_and_complete(capsys):
    cli = import_module("lightning.pytorch.cli").LightningCLI
    with pytest.raises(SystemExit) as stop:
        cli(
            *boring("lightning.pytorch"),
            args=["fit", "--trainer.callbacks.help=lightning_compress.QATCallback"],
            save_config_callback=None,
        )
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 95
    assert all(
        f".{name} " in text for name in ("weight_bits", "step_size", "start", "freeze_batchnorm_at", "grids_from")
    )


# Precision


@pytest.mark.parametrize(
    "precision", ["bf16-mixed", *(pytest.param(each, marks=pytest.mark.slow) for each in ("64-true", "bf16-true"))]
)
@STEP_SIZES
def test_precision(precision, step_size):
    qat = QATCallback(weight_bits=4, step_size=step_size)
    module, fitting = fitted(qat, precision=precision)
    logged = fitting.logged["val_loss"]
    assert all(grid.step.dtype == torch.float32 for grid in qat.quantization.weights.values())
    [shown] = fitting.validate(module, loader(rows=ROWS), verbose=False)
    assert shown["val_loss"] == pytest.approx(logged, abs=1e-6 if "mixed" in precision or "64" in precision else 0.02)
    assert qat.metrics["val_loss"] == pytest.approx(logged, abs=1e-6 if "64" in precision else 0.02)
    plain = plainly(NormClassifier, precision=precision)
    assert difference(module, plain) > 0
    assert {value.dtype for value in module.state_dict().values()} == {
        value.dtype for value in plain.state_dict().values()
    }
    assert traces(module) == traces(plain)


def test_another_module_in_the_same_trainer_gets_grids_of_its_own():
    qat = QATCallback(weight_bits=3, edge_bits=None)
    fitting = trainer(qat)
    fitting.fit(first := made(Classifier), loader())
    ours = qat.quantization
    second = made(Classifier)
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(10.0)
    fitting.fit_loop.max_epochs += 1
    fitting.fit(second, loader())
    for name, grid in qat.quantization.weights.items():
        assert (grid.step > 3 * ours.weights[name].step).all()
    assert first is not second


def test_layers_that_begin_at_zero_learn_their_steps():
    """A batch norm that begins at 0, as residual blocks do, lets no gradient through at first."""

    class Zero(NormClassifier):
        def build(self):
            super().build()
            nn.init.zeros_(self.model[1].weight)

    qat = QATCallback(weight_bits=4, step_size="learned")
    with pytest.warns(UserWarning, match="all of '2:relu:0' was 0 when the grids were found"):
        module, fitting = fitted(qat, Zero)
    assert measured(module, run=fitting) == qat.metrics


def test_an_error_in_reading_the_grids_at_the_end_is_one_of_the_fit(monkeypatch):
    """They are not replaced by others without a word."""

    class Ends(L.Callback):
        def on_train_end(self, *arguments):
            monkeypatch.setattr(MovingGrids, "current", lambda self: 1 / 0)

    qat, module = QATCallback(), made(Classifier)
    with pytest.raises(ZeroDivisionError):
        trainer(Ends(), qat).fit(module, loader())
    assert qat.quantization is None
    assert "forward" not in vars(module.model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze_observers_at": 0.9}, "freeze_observers_at=0.9 has no effect with step_size='mse'"),
        (
            {"freeze_observers_at": 0.9, "step_size": "learned"},
            "freeze_observers_at=0.9 has no effect with step_size='l",
        ),
        ({"step_lr": 0.1}, "step_lr=0.1 has no effect with step_size='mse'"),
        ({"step_lr": 0.1, "step_size": "observed"}, "step_lr=0.1 has no effect with step_size='observed'"),
    ],
)
def test_arguments_without_effect_are_told_of(settings, said):
    with pytest.warns(UserWarning, match=said):
        QATCallback(**settings)


def test_attributes_of_other_callbacks_are_theirs():
    class Pictures(L.Callback):
        grids = {"images": (torch.zeros(3), 3)}
        quantization = "none"

    qat = QATCallback()
    fitted(qat, Classifier, Pictures())
    assert qat.quantization is not None


def test_an_error_in_reading_the_grids_hides_nothing_and_leaves_nothing(monkeypatch):
    class Fails(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                monkeypatch.setattr(MovingGrids, "current", lambda self: 1 / 0)
                raise KeyError("the user's")

    module = made(Fails)
    with pytest.raises(KeyError, match="the user's"):
        trainer(QATCallback()).fit(module, loader())
    assert not {"training_step", "forward"} & set(vars(module))
    assert all("forward" not in vars(part) and not part._forward_hooks for part in module.modules())

"""QATCallback: resumes, later fits, exceptions, checkpoints and files of them, averages, compiled code, and others."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import onnx
import pytest
import torch
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    NormClassifier,
    difference,
    loader,
    made,
    rows_logged,
    teacher_for,
    trainer,
)
from contract.traces import is_portable, traces
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from onnx import numpy_helper
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
)
from lightning_compress.export import evaluate, to_onnx
from lightning_compress.export.evaluate import evaluate_quantized
from lightning_compress.mechanisms.grids import Grids

pytestmark = [
    pytest.mark.sample,  # fits on grids
    pytest.mark.filterwarnings("ignore:.*beyond the ends of their grids"),  # as these networks are not trained
]
ROWS = 2 * BATCH  # of the validation
SIZES = ("mse", "observed", "learned")
STEP_SIZES = pytest.mark.parametrize("step_size", SIZES)


def fast(*sizes):
    """All kinds of steps, of which the fast tests have these."""
    marked = [pytest.param(own, marks=[pytest.mark.slow] * (own not in sizes)) for own in SIZES]
    return pytest.mark.parametrize("step_size", marked)


def qat_of(step_size, **settings):
    """With those settings that have an effect."""
    for argument, size in (("freeze_observers_at", "observed"), ("step_lr", "learned")):
        if step_size != size:
            settings.pop(argument, None)
    return QATCallback(**{"weight_bits": 4, "activation_bits": 5, "step_size": step_size, **settings})


def fitted(qat, kind=NormClassifier, *callbacks, first=True, validation=True, rows=BATCH * STEPS, **settings):
    module = made(kind)
    ours = [] if qat is None else [qat]
    fitting = trainer(*([*ours, *callbacks] if first else [*callbacks, *ours]), **settings)
    fitting.fit(module, loader(kind, rows=rows), loader(kind, rows=ROWS) if validation else None)
    fitting.logged = {key: float(value) for key, value in fitting.callback_metrics.items()}
    return module, fitting


def measured(module, *callbacks, run=None, **settings):
    data = loader(type(module), rows=ROWS)
    [metrics] = (run or trainer(*callbacks)).validate(module, data, verbose=False, **settings)
    return metrics


def equal(first, second):
    """Whether two nested structures hold the same, tensors bit for bit."""
    (ours, form), (theirs, other) = tree_flatten(first), tree_flatten(second)
    return form == other and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


# Resumes


def resumable(qat, folder, *, kind=NormClassifier, ckpt_path=None, stateful=False, every=1, **settings):
    """A fit that Lightning itself resumes exactly, with a checkpoint after each so many steps."""
    module = made(kind)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    fitting = trainer(qat, saver, **{"max_epochs": 2, "enable_checkpointing": True, **settings})
    fitting.fit(
        module,
        loader(kind, rows=32, stateful=stateful),
        loader(kind, rows=ROWS),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    fitting.save_checkpoint(folder / "end.ckpt")
    return module, fitting


def assert_same_ends(first, second, qat):
    """Weights, optimizers, schedulers, and all that the callback knows."""
    ours, theirs = (torch.load(folder / "end.ckpt", weights_only=True) for folder in (first, second))
    assert ours["global_step"] == theirs["global_step"] == 8
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(ours[key], theirs[key]), key
    own, other = ours["callbacks"][qat.state_key], theirs["callbacks"][qat.state_key]
    for key, value in own.items():
        assert equal(value, other[key]), key
    assert own["quantization"] is not None


# A fit has eight steps. Observers move until the sixth, the network is quantised from the start or from the fourth on.
RESUMES = [
    pytest.param(case, id="-".join(map(str, case)), marks=[pytest.mark.slow] * slow)
    for case, slow in (
        (("mse", 0.0, 4), True),
        (("mse", 0.5, 3), False),
        (("mse", 0.5, 4), True),
        (("mse", 0.5, 6), True),
        (("observed", 0.0, 3), False),
        (("observed", 0.0, 6), False),
        (("observed", 0.0, 7), True),
        (("observed", 0.5, 2), True),
        (("observed", 0.5, 5), True),
        (("observed", 0.0, 7, None), False),
        (("learned", 0.0, 3), False),
        (("learned", 0.0, 4), True),
        (("learned", 0.5, 2), True),
        (("learned", 0.5, 4), True),
        (("learned", 0.5, 5), False),
    )
]


@pytest.mark.parametrize("case", RESUMES)
def test_a_resume_equals_the_whole(case, tmp_path):
    """In the middle of an epoch and at its end, before it begins, while grids move and when they stay."""
    step_size, start, at, *bits = case
    settings = {"start": start, "freeze_batchnorm_at": 0.625} | ({"activation_bits": None} if bits else {})
    resumable(qat_of(step_size, **settings), tmp_path / "whole", stateful=True)
    qat = qat_of(step_size, **settings)
    checkpoint = tmp_path / "whole" / f"step={at}.ckpt"
    kept = torch.load(checkpoint, weights_only=True)["callbacks"][qat.state_key]["quantization"]
    assert (kept is None) == (start == 0.5 and at <= 4)
    module, fitting = resumable(qat, tmp_path / "resumed", ckpt_path=checkpoint, stateful=True)
    assert_same_ends(tmp_path / "whole", tmp_path / "resumed", qat)
    assert measured(module, run=fitting) == qat.metrics
    assert module.model[1].training


@STEP_SIZES
def test_a_resume_with_accumulated_batches_equals_the_whole(step_size, tmp_path):
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2}
    resumable(qat_of(step_size), tmp_path / "whole", **settings)
    qat = qat_of(step_size)
    resumable(qat, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=4.ckpt", **settings)
    assert_same_ends(tmp_path / "whole", tmp_path / "resumed", qat)


@STEP_SIZES
def test_a_resume_where_nothing_is_left_to_be_done(step_size, tmp_path):
    whole = qat_of(step_size)
    module, _ = resumable(whole, tmp_path / "whole")
    qat = qat_of(step_size)
    resumed, fitting = resumable(qat, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "end.ckpt")
    assert difference(resumed, module) == 0
    assert equal(qat.quantization.state(), whole.quantization.state())
    assert qat.metrics == whole.metrics == measured(resumed, run=fitting)


@pytest.mark.parametrize(
    ("argument", "now"),
    [
        ("weight_bits", 3),
        ("activation_bits", None),
        *(pytest.param(own, 8, marks=pytest.mark.slow) for own in ("activation_bits", "edge_bits")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*resumes with other arguments")
def test_a_resume_with_other_bits_is_refused(argument, now, tmp_path):
    resumable(qat_of("mse"), tmp_path / "whole", max_epochs=1)
    qat = qat_of("mse", **{argument: now})
    before = {"weight_bits": 4, "activation_bits": 5, "edge_bits": "auto"}[argument]
    message = f"the checkpoint was trained with {argument}={before}, and {argument}={now} is given now; .*another fit"
    with pytest.raises(ValueError, match=message):
        resumable(qat, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    # before it had begun, nothing was learned of any grid
    resumable(qat_of("mse", start=0.5), tmp_path / "later")
    qat = qat_of("mse", **{"start": 0.5, argument: now})
    resumable(qat, tmp_path / "again", ckpt_path=tmp_path / "later" / "step=2.ckpt")
    assert getattr(qat, argument) == now
    assert qat.quantization is not None


@pytest.mark.parametrize(("then", "now"), [("mse", "learned"), ("learned", "mse"), ("mse", "observed")])
def test_a_resume_with_another_step_size_goes_on_from_the_grids(then, now, tmp_path):
    """And is told in the warning of other arguments."""
    resumable(qat_of(then), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    grids = torch.load(checkpoint, weights_only=True)["callbacks"]["QATCallback[qat]"]["quantization"]
    qat, begun = qat_of(now), {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            begun.setdefault(trainer.global_step, qat.extra_state()["quantization"])

    module = made(NormClassifier)
    with pytest.warns(UserWarning, match=f"step_size was '{then}' and is '{now}'"):
        trainer(qat, Look(), max_epochs=2).fit(
            module, loader(rows=32), loader(rows=ROWS), ckpt_path=checkpoint, weights_only=True
        )
    assert list(begun) == [4, 5, 6, 7]
    assert begun[4]["activations"].keys() == grids["activations"].keys()
    assert begun[4]["activations"] == grids["activations"]
    assert (begun[7]["activations"] == grids["activations"]) == (now == "mse")
    assert measured(module, qat) == qat.metrics


@pytest.mark.parametrize("sizes", [("observed", "learned", "learned"), ("learned", "mse", "learned")])
@pytest.mark.filterwarnings("ignore:.*resumes with other arguments")
def test_a_resume_after_a_resume_with_another_step_size(sizes, tmp_path):
    """Steps that learn go on from where they were, not from where they once began."""
    checkpoint = None
    for turn, size in enumerate(sizes):
        qat, folder, begun = qat_of(size), tmp_path / str(turn), []

        class Look(L.Callback):
            def __init__(self, qat, begun):
                self.qat, self.begun = qat, begun

            def on_train_batch_start(self, *arguments):
                self.begun.append(self.qat.extra_state()["quantization"])

        module, saver = made(NormClassifier), ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2 + 2 * turn)
        trainer(qat, saver, Look(qat, begun), max_epochs=2, enable_checkpointing=True).fit(
            module, loader(rows=32), loader(rows=ROWS), ckpt_path=checkpoint, weights_only=True if checkpoint else None
        )
        if checkpoint is not None:
            kept = torch.load(checkpoint, weights_only=True)["callbacks"][qat.state_key]["quantization"]
            assert equal(begun[0]["weights"], kept["weights"])
            assert begun[0]["activations"] == kept["activations"]
        [checkpoint] = [path for path in folder.glob("*.ckpt") if f"step={2 + 2 * turn}.ckpt" in path.name]
    assert measured(module, qat) == qat.metrics


@pytest.mark.parametrize(
    ("then", "now", "argument"),
    [
        ({}, {"exclude": ["model.4"]}, "exclude"),
        ({"exclude": ["model.4"]}, {}, "exclude"),
        ({"layers": ["model.0"]}, {"layers": ["model.4"]}, "layers"),
        ({"network": "model"}, {"network": "model.0"}, "network"),
        ({"layer_bits": {"model.0": 3}}, {"layer_bits": {"model.0": 5}}, "layer_bits"),
        ({}, {"layer_bits": {"model.0": 3}}, "layer_bits"),
        pytest.param({"layer_bits": {"model.0": 3}}, {"layer_bits": {"type:Conv2d": 3}}, None, marks=pytest.mark.slow),
        ({}, {"network": "model"}, None),
        ({}, {"layers": ["model"]}, None),
        ({"edge_bits": "auto"}, {"edge_bits": None}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*resumes with other arguments")
def test_a_resume_with_other_layers(then, now, argument, tmp_path):
    resumable(qat_of("mse", **then), tmp_path / "whole", max_epochs=1)
    qat, checkpoint = qat_of("mse", **now), tmp_path / "whole" / "step=4.ckpt"
    if argument is None:
        resumable(qat, tmp_path / "again", ckpt_path=checkpoint)
        return
    with pytest.raises(
        ValueError, match=f"the checkpoint was trained with {argument}=.*, and {argument}=.* is given now"
    ):
        resumable(qat, tmp_path / "again", ckpt_path=checkpoint)


class WithData(NormClassifier):
    """Has its training data itself."""

    def train_dataloader(self):
        return loader(rows=32)


def test_a_checkpoint_without_it_begins_anew(tmp_path):
    """And its checkpoint is good for a training without it."""
    module, fitting = fitted(None, WithData, rows=32)
    fitting.save_checkpoint(tmp_path / "plain.ckpt")
    qat, resumed = qat_of("learned"), made(NormClassifier)
    again = trainer(qat, max_epochs=2)
    again.fit(resumed, loader(rows=32), loader(rows=ROWS), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    ptq = PTQCallback(weight_bits=4, activation_bits=5, observer="mse", weight_range="mse")
    trainer(ptq).validate(module.train(), loader(rows=ROWS), verbose=False)
    begun = qat.state_dict()["start_grids"]
    assert begun["activations"] == ptq.quantization.state()["activations"]
    again.save_checkpoint(tmp_path / "ours.ckpt")
    plain = made(NormClassifier)
    trainer(max_epochs=3).fit(plain, loader(rows=32), ckpt_path=tmp_path / "ours.ckpt", weights_only=True)
    assert difference(plain, resumed) > 0
    assert list(contents(tmp_path / "ours.ckpt")["state_dict"]) == list(module.state_dict())


# Fits one after the other


class Steady(NormClassifier):
    """With an optimizer that remembers nothing: a second fit of a Trainer makes a new one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@STEP_SIZES
def test_a_second_fit_of_the_same_trainer_goes_on(step_size):
    """As one fit of twice the length would have gone, of which nothing was frozen in between."""
    settings = {"freeze_batchnorm_at": 1.0, "freeze_observers_at": 1.0}
    whole, qat = qat_of(step_size, **settings), qat_of(step_size, **settings)
    module, _ = fitted(whole, Steady, max_epochs=2)
    again, fitting = fitted(qat, Steady, max_epochs=1)
    begun = qat.state_dict()["start_grids"]
    fitting.fit_loop.max_epochs = 2
    fitting.fit(again, loader(), loader(rows=ROWS))
    assert fitting.global_step == 2 * STEPS
    assert difference(again, module) == 0
    assert equal(qat.state_dict()["start_grids"], begun)
    assert equal(qat.quantization.state(), whole.quantization.state())
    assert qat.metrics == whole.metrics == measured(again, run=fitting)


@STEP_SIZES
def test_a_fit_of_a_new_trainer_begins_anew(step_size):
    qat, fresh = qat_of(step_size), qat_of(step_size)
    module, _ = fitted(qat, Steady)
    other = copy.deepcopy(module)
    first = qat.quantization.state()
    for each, own in ((qat, module), (fresh, other)):
        trainer(each).fit(own, loader(), loader(rows=ROWS))
    assert difference(module, other) == 0
    assert equal(qat.state_dict(), fresh.state_dict())
    assert not equal(qat.quantization.state(), first)
    assert qat.metrics == fresh.metrics


class Other(Classifier):
    """With a network of another name."""

    def build(self):
        self.net = nn.Linear(8, 3)

    def task_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_other_modules_in_turn():
    qat, alone = qat_of("learned"), qat_of("learned")
    fitted(qat)
    fitted(qat, Other)
    module, fitting = fitted(alone, Other)
    assert (qat.quantization.network, list(qat.quantization.weights)) == ("net", ["weight"])
    assert equal(qat.state_dict(), alone.state_dict())
    assert measured(module, run=fitting) == qat.metrics


def test_weights_that_changed_since_are_shown_with_the_scales_and_a_warning():
    qat = qat_of("mse")
    module, fitting = fitted(qat)
    assert measured(module, run=fitting) == qat.metrics
    with torch.no_grad():
        module.model[4].bias.add_(1.0)
    with pytest.warns(UserWarning, match="the weights have changed since the fit, and are shown with the scales that"):
        shown = measured(module, run=fitting)
    assert shown == evaluate_quantized(module, fitting, qat.quantization) != qat.metrics


def test_before_any_fit_the_plain_network_is_shown():
    module = made(NormClassifier)
    with pytest.warns(UserWarning, match="nothing was trained on grids so far, so the plain network is shown"):
        shown = measured(module, qat_of("mse"))
    assert shown == measured(module)


# Exceptions


class Breaking(NormClassifier):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            raise RuntimeError("the step is broken")
        return super().training_step(batch, batch_idx)


def broken_after(qat, *callbacks, **settings):
    module = made(Breaking)
    with pytest.raises(RuntimeError, match="the step is broken"):
        trainer(*([] if qat is None else [qat]), *callbacks, **settings).fit(module, loader(), loader(rows=ROWS))
    return module


@STEP_SIZES
def test_an_exception_in_the_middle_leaves_nothing_and_keeps_the_grids(step_size, tmp_path):
    """Batch norm is frozen when it comes."""
    qat = qat_of(step_size, freeze_batchnorm_at=0.25, freeze_observers_at=0.9)
    saver = OnExceptionCheckpoint(tmp_path)
    module, plain = broken_after(qat, saver, enable_checkpointing=True), broken_after(None)
    assert traces(module) == traces(plain)
    assert is_portable(module)
    assert [part.training for part in module.modules()] == [part.training for part in plain.modules()]
    assert int(module.model[1].num_batches_tracked) == 2
    assert qat.quantization is not None
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert difference(saved["state_dict"], module) == 0
    kept = saved["callbacks"][qat.state_key]
    assert equal(kept["quantization"]["activations"], qat.quantization.state()["activations"])
    assert equal(kept["quantization"]["weights"], qat.quantization.state()["weights"])
    grids = qat.quantization
    for name, grid in grids.weights.items():
        weight = module.model.get_parameter(name).detach().flatten(1)
        if step_size == "observed":
            assert torch.equal(grid.step, weight.abs().amax(1) / 7)
    assert qat.metrics == {}


def test_an_exception_while_it_begins_leaves_nothing():
    class Fragile(NormClassifier):
        def task_loss(self, batch):
            if self.trainer.global_step == 4 and not self.model.training:  # where the calibration replays a step
                raise RuntimeError("the network is broken")
            return super().task_loss(batch)

    module, plain = made(Fragile), made(Fragile)
    message = (
        "calibrates with batches of the training data, and Fragile's step failed on one: RuntimeError: the network"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer(qat_of("learned", start=0.5)).fit(module, loader())
    trainer(max_steps=4).fit(plain, loader())
    assert difference(module, plain) == 0
    assert traces(module) == traces(plain)


@STEP_SIZES
def test_the_module_is_the_plain_one_afterwards(step_size):
    qat = qat_of(step_size)
    module, fitting = fitted(qat)
    plain, _ = fitted(None)
    assert traces(module) == traces(plain)
    assert is_portable(module)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert measured(module) != qat.metrics == measured(module, run=fitting)


def test_batch_norm_that_the_user_froze_stays_so():
    """Of two, the one that trains is frozen in the middle, and trains again afterwards."""

    class Frozen(NormClassifier):
        def build(self):
            super().build()
            self.model.insert(0, nn.Sequential(nn.Unflatten(1, (1, 8)), nn.BatchNorm1d(1), nn.Flatten()))

        def on_train_epoch_start(self):
            self.model[0][1].eval()

    module, _ = fitted(qat_of("mse", freeze_batchnorm_at=0.5), Frozen, validation=False)
    assert (module.model[0][1].training, module.model[2].training) == (False, True)
    assert int(module.model[0][1].num_batches_tracked) == 0
    assert int(module.model[2].num_batches_tracked) == 4


# Checkpoints


class Trained(NormClassifier):
    """Its later checkpoints differ."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Checkpoints of each epoch of a fit of three; one for each kind of steps."""
    done = {}

    def run(step_size, kind=Trained):
        if (step_size, kind) not in done:
            folder = tmp_path_factory.mktemp(step_size)
            qat = qat_of(step_size, freeze_observers_at=1.0, step_lr=0.05)
            saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
            module, fitting = fitted(qat, kind, saver, max_epochs=3, enable_checkpointing=True)
            fitting.save_checkpoint(folder / "after.ckpt")
            done[step_size, kind] = folder, qat, module, fitting
        return done[step_size, kind]

    return run


def contents(path):
    return torch.load(path, weights_only=True)


def grids_in(path):
    return Grids.from_state(contents(path)["callbacks"]["QATCallback[qat]"]["quantization"])


@STEP_SIZES
@pytest.mark.parametrize("name", ["epoch=0.ckpt", "after.ckpt", pytest.param("epoch=2.ckpt", marks=pytest.mark.slow)])
def test_a_checkpoint_shows_its_own_network(step_size, name, run_of):
    """With its weights and its scales, in another Trainer, without any training data."""
    folder, qat, module, _ = run_of(step_size)
    loaded, fresh = made(Trained, seed=9), qat_of(step_size, freeze_observers_at=1.0, step_lr=0.05)
    testing = trainer(fresh)
    [shown] = testing.test(loaded, loader(rows=ROWS), ckpt_path=folder / name, verbose=False, weights_only=True)
    expected = made(Trained)
    expected.load_state_dict(contents(folder / name)["state_dict"])
    grids = grids_in(folder / name)
    assert difference(loaded, expected) == 0
    testing.limit_val_batches = 1.0
    [by_hand] = trainer(Quantised(grids)).test(expected, loader(rows=ROWS), verbose=False)
    assert shown == by_hand
    [plain] = trainer().test(expected, loader(rows=ROWS), verbose=False)
    assert shown != plain
    if name == "epoch=0.ckpt" and step_size != "mse":
        [otherwise] = trainer(Quantised(qat.quantization)).test(expected, loader(rows=ROWS), verbose=False)
        assert shown != otherwise
    if name != "epoch=0.ckpt":
        assert shown["test_loss"] == qat.metrics["val_loss"]
        assert difference(loaded, module) == 0


class Quantised(L.Callback):
    """Tests a module on given grids, with nothing but the mode."""

    def __init__(self, grids):
        self.grids = grids

    def on_test_start(self, trainer, pl_module):
        from lightning_compress.mechanisms.quantization import quantizing
        from lightning_compress.mechanisms.rounding import Rounding

        self.context = quantizing(pl_module.model, Rounding(pl_module.model, self.grids))
        self.context.__enter__()

    def on_test_end(self, trainer, pl_module):
        self.context.__exit__(None, None, None)


@STEP_SIZES
def test_the_best_checkpoint_is_tested_with_its_own_scales(step_size, tmp_path):
    """In the Trainer of the fit, whose callback knows those of the end."""

    class Worsening(Trained):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("worse", float(self.current_epoch))

    saver = ModelCheckpoint(tmp_path, monitor="worse", filename="{epoch}")
    qat = qat_of(step_size, freeze_observers_at=1.0, step_lr=0.05)
    module, fitting = fitted(qat, Worsening, saver, max_epochs=3, enable_checkpointing=True)
    last = qat.quantization
    [tested] = fitting.test(module, loader(rows=ROWS), ckpt_path="best", verbose=False)
    best = grids_in(saver.best_model_path)
    assert saver.best_model_path.endswith("epoch=0.ckpt")
    expected = made(Worsening)
    expected.load_state_dict(contents(saver.best_model_path)["state_dict"])
    [by_hand] = trainer(Quantised(best)).test(expected, loader(rows=ROWS), verbose=False)
    assert tested == by_hand
    assert tested["test_loss"] != qat.metrics.get("val_loss")
    assert (best.activations == last.activations) == (step_size == "mse")


@STEP_SIZES
def test_checkpoints_hold_plain_weights_and_the_scales_of_then(step_size, run_of):
    folder, qat, *_ = run_of(step_size)
    during = [contents(folder / f"epoch={epoch}.ckpt") for epoch in range(3)]
    for checkpoint in during:
        made(Trained).load_state_dict(checkpoint["state_dict"], strict=True)
        grids = checkpoint["callbacks"][qat.state_key]["quantization"]
        assert list(grids["weights"]) == ["0.weight", "4.weight"]
        if step_size == "observed":
            for name, entry in grids["weights"].items():
                weight = checkpoint["state_dict"][f"model.{name}"]
                assert torch.equal(entry["step"], weight.flatten(1).abs().amax(1) / 7)
    first, last = (grids_in(folder / f"epoch={epoch}.ckpt") for epoch in (0, 2))
    assert (first.activations == last.activations) == (step_size == "mse")
    assert last.activations == qat.quantization.activations
    assert all(torch.equal(grid.step, last.weights[name].step) for name, grid in qat.quantization.weights.items())


# Files


def stored(path):
    return {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}


def assert_in_file(path, grids, weights):
    """Every step of a weight, every scale of an activation and every integer, bit for bit.

    Where activations have few bits, integers of weights are multiplied by a power of two, and steps divided by it.
    """
    found = stored(path)
    sites = {place.name: site.replace(".", "_").replace(":", "_") for site, place in grids.sites.items()}
    for name, grid in grids.weights.items():
        weight, limit = weights[name].detach(), grid.limits[1]
        rows = grid.step.reshape(-1, *[1] * (weight.ndim - 1))
        integers = (weight / rows).round().clamp(-limit, limit).numpy()
        in_file, steps = found[f"quantized.{sites[name]}_weight"], found[f"quantized.{sites[name]}_weight_scale"]
        [shift] = {float(ratio) for ratio in grid.step.numpy() / steps}
        assert math.frexp(shift)[0] == 0.5
        np.testing.assert_array_equal(in_file if weight.ndim > 2 else in_file.T, integers * shift)
        np.testing.assert_array_equal(steps * np.float32(shift), grid.step.numpy())
    scales = {float(np.float32(grid.scale)) for grid in grids.activations.values()}
    written = {float(value) for name, value in found.items() if name.endswith("_scale") and value.ndim == 0}
    assert scales <= written
    return found


class Plain(Classifier):
    """Without batch norm, whose statistics would be multiplied into the steps."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("step_size", "name"),
    [
        ("learned", "epoch=1.ckpt"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("learned", "after.ckpt"), ("observed", "epoch=0.ckpt"), ("mse", "epoch=1.ckpt"))
        ),
    ],
)
def test_a_file_from_a_checkpoint_of_the_fit_has_its_scales(step_size, name, run_of, tmp_path):
    """Nothing is calibrated again."""
    folder, qat, *_ = run_of(step_size, Plain)
    sample = next(iter(loader()))[0]
    to_onnx(
        made(Plain, seed=8),
        tmp_path / "n.onnx",
        sample,
        network="model",
        precision="int8",
        checkpoint=folder / name,
    )
    grids = grids_in(folder / name)
    weights = {key.removeprefix("model."): value for key, value in contents(folder / name)["state_dict"].items()}
    assert_in_file(tmp_path / "n.onnx", grids, weights)
    if step_size == "learned":
        begun = contents(folder / name)["callbacks"][qat.state_key]["start_grids"]["activations"]
        assert all(grid.scale != begun[key][0] for key, grid in grids.activations.items())


def test_steps_that_have_learned_are_those_of_the_file(tmp_path):
    """Some of them by more than a twentieth."""
    qat = qat_of("learned", step_lr=0.05)
    export = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", fp32_comparison=False)
    module, fitting = fitted(qat, Plain, export, max_epochs=3)
    start, end = Grids.from_state(qat.state_dict()["start_grids"]), qat.quantization
    changes = [end.activations[key].scale / grid.scale for key, grid in start.activations.items()]
    changes += [float(ratio) for name, grid in start.weights.items() for ratio in end.weights[name].step / grid.step]
    assert max(abs(change - 1) for change in changes) > 0.05
    assert all(change != 1 for change in changes)
    assert all(grid.zero_point == start.activations[key].zero_point for key, grid in end.activations.items())
    assert_in_file(tmp_path / "n.onnx", end, dict(module.model.named_parameters()))
    assert export.file_metrics["val_loss"] == pytest.approx(fitting.logged["val_loss"], abs=0.02)


# Averages


@pytest.mark.parametrize("average", ["EMA", pytest.param("SWA", marks=pytest.mark.slow)])
@fast("observed", "learned")
def test_averages_are_what_is_validated_and_kept(average, step_size):
    """Of the weights that were trained quantised, on the grids of the end; wherever it is in the list."""

    def other():
        if average == "EMA":
            return EMAWeightAveraging(decay=0.5)
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)

    found = []
    for first in (True, False):
        qat = qat_of(step_size, freeze_observers_at=1.0)
        module, fitting = fitted(qat, NormClassifier, other(), first=first, max_epochs=3)
        assert measured(module, run=fitting) == qat.metrics != measured(module)
        if average == "EMA":
            assert fitting.logged["val_loss"] == qat.metrics["val_loss"]
        found.append((module, qat.quantization.state()))
    (module, grids), (same, others) = found
    assert difference(module, same) == 0
    assert equal(grids, others)
    plain, _ = fitted(None, NormClassifier, other(), max_epochs=3)
    assert difference(module, plain) > 0
    alone, _ = fitted(qat_of(step_size, freeze_observers_at=1.0), max_epochs=3)
    assert difference(module, alone) > 0
    if step_size == "observed":  # the grid of the weights that are kept
        for name, entry in grids["weights"].items():
            assert torch.equal(entry["step"], module.model.get_parameter(name).detach().flatten(1).abs().amax(1) / 7)


@pytest.mark.parametrize("name", ["epoch=0.ckpt", "epoch=2.ckpt"])
@STEP_SIZES
def test_a_checkpoint_of_averages_is_tested_as_it_was_validated(step_size, name, tmp_path):
    """Also while grids follow: those of the average, not of what was trained."""
    qat, validated = qat_of(step_size, freeze_observers_at=1.0), []

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                validated.append(float(trainer.callback_metrics["val_loss"]))

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    average = EMAWeightAveraging(decay=0.5)
    fitted(qat, NormClassifier, average, Look(), saver, max_epochs=3, enable_checkpointing=True)
    fresh = qat_of(step_size, freeze_observers_at=1.0)
    shown = measured(made(NormClassifier, seed=9), fresh, ckpt_path=tmp_path / name, weights_only=True)
    assert shown["val_loss"] == pytest.approx(validated[int(name[6])], abs=1e-6)
    module = made(NormClassifier, seed=9)
    to_onnx(
        module,
        tmp_path / "n.onnx",
        loader(rows=8).dataset[:8][0],
        network="model",
        precision="int8",
        checkpoint=tmp_path / name,
    )
    module.load_state_dict(contents(tmp_path / name)["state_dict"])
    found = evaluate(tmp_path / "n.onnx", module, loader(rows=ROWS), network="model")
    assert found["val_loss"] == pytest.approx(shown["val_loss"], abs=0.01)


def test_the_statistics_that_swa_estimates_are_kept():
    """It resets them, and adds an epoch; batch norm that is frozen would leave them at 0 and 1."""
    qat = qat_of("mse", freeze_batchnorm_at=0.25)
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    module, fitting = fitted(qat, NormClassifier, average, max_epochs=3)
    mean = module.model[1].running_mean
    assert float(mean.abs().max()) > 0.01
    with torch.no_grad():
        found = torch.cat([module.model[0](x) for x, _ in loader()])
    torch.testing.assert_close(mean, found.transpose(0, 1).flatten(1).mean(1), rtol=0, atol=0.1)
    assert module.model[1].training
    assert measured(module, run=fitting) == qat.metrics


def test_the_average_equals_one_kept_by_hand():
    weights = []

    class Recording(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            weights.append({key: value.detach().clone() for key, value in pl_module.state_dict().items()})

    module, _ = fitted(qat_of("learned"), Classifier, Recording(decay=0.5))
    trained, _ = fitted(qat_of("learned"), Classifier)
    assert difference(weights[-1], trained) == 0
    average = weights[0]
    for state in weights[1:]:
        average = {key: 0.5 * average[key] + 0.5 * state[key] for key in state}
    assert difference(module, average) < 1e-6


# Compiled code


class CountingBackend:
    """Counts the graphs that are compiled."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["in place", "child"])
@pytest.mark.parametrize("kind", [Classifier, NormClassifier])
@STEP_SIZES
def test_a_compiled_network_is_trained_in_one_graph(step_size, kind, form):
    """One for training and one for validation, plain and quantised, however often grids move."""
    backend, module, qat = CountingBackend(), made(kind), qat_of(step_size)
    if form == "in place":
        module.model.compile(backend=backend, fullgraph=True)
    else:
        module.model = torch.compile(module.model, backend=backend, fullgraph=True)
    fitting = trainer(qat, max_epochs=2)
    fitting.fit(module, loader(), loader(rows=ROWS))
    plain = qat_of(step_size)
    expected, _ = fitted(plain, kind, max_epochs=2)
    own = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}
    assert difference({key: own[key] for key in expected.state_dict()}, expected) <= 1e-6
    # the trial after the first step, and validation, plain at first; grids that follow are then fixed
    assert backend.graphs == 5 + (kind is NormClassifier) + 2 * (step_size == "observed")
    assert measured(module, run=fitting)["val_loss"] == pytest.approx(plain.metrics["val_loss"], abs=1e-5)


# Several processes

PROCESSES = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import lightning.pytorch as L
    import torch
    from contract.modules import BATCH, NormClassifier, loader, made, trainer
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_compress import QATCallback
    from torch import nn
    from torch.nn import functional as F

    class Shifted(NormClassifier):
        '''Each process sees other numbers.'''

        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x * (1 + self.global_rank), y), batch_idx)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)
            self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
            self.ways = ("first", "second")

        def forward(self, x):
            x = self.stem(x)
            first, *more = [getattr(self, way)(x) for way in self.ways]
            return self.head(F.relu(first + more[0] if more else first))

    class Branching(NormClassifier):
        '''Each process takes another way through the network.'''

        def build(self):
            self.model = Two()

        def training_step(self, batch, batch_idx):
            self.model.ways = self.model.ways[self.global_rank :][:1]
            loss = super().training_step(batch, batch_idx)
            self.model.ways = ("first", "second")
            return loss

    class Keep(L.Callback):
        def __init__(self, folder, qat):
            self.folder, self.qat = folder, qat

        def teardown(self, trainer, pl_module, stage):
            found = {"state": self.qat.state_dict(), "weights": pl_module.state_dict()}
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            torch.save({**found, "metrics": metrics}, f"{self.folder}/rank{trainer.global_rank}.pt")

    if __name__ == "__main__":
        torch.set_num_threads(1)
        folder = sys.argv[2]
        for name in ("mse", "observed", "learned", "branching"):
            own = Path(folder) / name
            own.mkdir()
            branching = name == "branching"
            step_size = "observed" if branching else name
            late = {"freeze_observers_at": 1.0} if step_size == "observed" else {}
            qat = QATCallback(weight_bits=4, step_size=step_size, **late)
            strategy = DDPStrategy(
                start_method="fork", process_group_backend="gloo", find_unused_parameters=branching
            )
            fitting = trainer(qat, Keep(own, qat), devices=2, strategy=strategy, max_epochs=2)
            fitting.fit(made(Branching if branching else Shifted), loader(shuffle=True), loader(rows=2 * BATCH))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has at the end of each fit."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(PROCESSES))
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parents[1]), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return lambda name: [contents(folder / name / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@STEP_SIZES
def test_two_processes_have_the_same_grids(step_size, ranks):
    first, second = ranks(step_size)
    for key, value in first["weights"].items():
        if "running" not in key:  # which each process estimates from its own data, as without us
            assert torch.equal(value, second["weights"][key]), key
    for key in ("weights", "activations", "sites"):
        assert equal(first["state"]["quantization"][key], second["state"]["quantization"][key]), key
    for key in ("start_grids", "factors", "moving"):
        assert equal(first["state"][key], second["state"][key]), key
    now, then = (first["state"][key]["activations"] for key in ("quantization", "start_grids"))
    assert (now == then) == (step_size == "mse")
    if step_size == "observed":  # the second process sees twice as large numbers
        assert now["in:0:conv2d:0"][0] > 1.3 * then["in:0:conv2d:0"][0]
    assert first["metrics"]["compress/qat/clipped"] == second["metrics"]["compress/qat/clipped"]


@pytest.mark.slow
def test_processes_that_take_other_ways_tell_activations_apart(ranks):
    """What one of them has not met in a step is seen by the other alone."""
    first, second = ranks("branching")
    ranges = first["state"]["moving"].get("ranges", {})
    assert ranges == second["state"]["moving"].get("ranges", {})
    outputs = {"stem.1:relu:0", "first.1:relu:0", "second.1:relu:0", ":relu:0"}
    assert set(ranges) == {"in:stem.0:linear:0", *outputs}
    assert ranges["in:stem.0:linear:0"][0] < -1.0
    assert {key for key, (low, _) in ranges.items() if low == 0.0} == outputs
    assert all(high > 0 for _, high in ranges.values())


FAILING = """
    import sys
    import time
    sys.path.insert(0, sys.argv[1])
    import torch
    from contract.modules import NormClassifier, loader, made, trainer
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_compress import QATCallback

    class LeavesLate(Callback):
        def on_exception(self, trainer, pl_module, exception):
            time.sleep(10 * trainer.global_rank)

    class Failing(NormClassifier):
        def validation_step(self, batch, batch_idx):
            if self.training or (self.global_rank == 1 and batch_idx == 1 and self.trainer.training):
                raise OSError("no such batch")
            return super().validation_step(batch, batch_idx)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
        run = trainer(QATCallback(max_samples=32), LeavesLate(), devices=2, strategy=strategy)
        run.fit(made(Failing), loader(rows=64), loader(rows=32))
"""


@pytest.mark.slow
def test_a_calibration_that_fails_on_one_rank_ends_all(tmp_path):
    """At once, and not when the others have waited long enough; the rank that fails leaves last, so they are heard."""
    script = tmp_path / "failing.py"
    script.write_text(textwrap.dedent(FAILING))
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parents[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: rank 1 failed: " in done.stderr  # the other says why it ends


# With masks


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = x.reshape(-1, 2, 4)
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class Attention(Classifier):
    def build(self):
        self.model = Attentive()


def integers_in(path):
    """Integers of weights in a file, by the module and operation that they are of."""
    marks = {"quantized.", "_weight"}
    return {
        name.removeprefix("quantized.").removesuffix("_weight"): value
        for name, value in stored(path).items()
        if all(mark in name for mark in marks) and value.dtype == np.int8 and value.ndim > 1
    }


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
@fast("observed")
def test_pruned_weights_are_zeros_in_the_file(step_size, first, tmp_path):
    qat, pruning = qat_of(step_size), PruningCallback(0.5)
    export = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", fp32_comparison=False)
    module, fitting = fitted(qat, Plain, pruning, export, first=first)
    masks = {name.removeprefix("model."): mask for name, mask in pruning.masks.items()}
    assert sum(int((~mask.bool()).sum()) for mask in masks.values()) == 66
    for name, mask in masks.items():
        assert bool((module.model.get_parameter(name)[~mask.bool()] == 0).all())
    found = assert_in_file(tmp_path / "n.onnx", qat.quantization, dict(module.model.named_parameters()))
    assert len(found) > 4
    integers = integers_in(tmp_path / "n.onnx")
    for site, name in (("0_conv2d_0", "0.weight"), ("3_linear_0", "3.weight")):
        own = integers[site] if integers[site].ndim > 2 else integers[site].T
        assert (own[~masks[name].bool().numpy()] == 0).all()
        assert (own != 0).sum() > 0.5 * int(masks[name].sum())
    assert fitting.logged["val_loss"] == qat.metrics["val_loss"]
    assert measured(module, run=fitting) == qat.metrics


@pytest.mark.slow
@STEP_SIZES
def test_masks_of_the_projections_of_attention(step_size, tmp_path):
    qat = qat_of(step_size, edge_bits=None)
    pruning = PruningCallback(0.5, layers=["model.attention"], scope="layer", end=0.5)
    export = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", fp32_comparison=False)
    module, fitting = fitted(qat, Attention, pruning, export)
    mask = pruning.masks["model.attention.in_proj_weight"].bool()
    assert int((~mask).sum()) == 24
    assert bool((module.model.attention.in_proj_weight[~mask] == 0).all())
    integers = [value for name, value in integers_in(tmp_path / "n.onnx").items() if value.shape in ((4, 12), (12, 4))]
    [own] = integers
    own = own.T if own.shape == (4, 12) else own
    assert (own[~mask.numpy()] == 0).all()
    assert (own != 0).sum() > 12
    assert measured(module, run=fitting) == qat.metrics


@fast("observed", "learned")
def test_masks_that_move_go_before_rounding(step_size, tmp_path):
    """The same wherever both are in the list. What is pruned at random may be the largest, which grids follow."""
    found = []
    for first in (True, False):
        saver = ModelCheckpoint(tmp_path / str(first), filename="{epoch}")
        qat, pruning = qat_of(step_size, freeze_observers_at=1.0), PruningCallback(0.6, score="random", seed=3)
        module, fitting = fitted(qat, Plain, pruning, saver, first=first, max_epochs=2, enable_checkpointing=True)
        checkpoint = contents(saver.best_model_path)
        entries = checkpoint["callbacks"][qat.state_key]["quantization"]["weights"]
        for name, grid in qat.quantization.weights.items():
            rows = module.model.get_parameter(name).detach().flatten(1)
            dense = checkpoint["state_dict"][f"model.{name}"].flatten(1)
            assert torch.equal(dense, rows)
            expected = rows.abs().amax(1) / 7
            expected = torch.where(expected > 0, expected, torch.ones(()))
            assert torch.equal(grid.step, expected) == (step_size == "observed")
            assert torch.equal(grid.step, entries[name]["step"])
        assert measured(module, run=fitting) == qat.metrics == {"val_loss": fitting.logged["val_loss"]}
        found.append((module, qat.state_dict()))
    assert difference(found[0][0], found[1][0]) == 0
    assert equal(found[0][1], found[1][1])
    alone, _ = fitted(None, Plain, PruningCallback(0.6, score="random", seed=3), max_epochs=2)
    assert difference(found[0][0], alone) > 0


@pytest.mark.filterwarnings("ignore:.*masked completely")
@fast("observed")
def test_dpf(step_size):
    found = []
    for first in (True, False):
        qat, dpf = qat_of(step_size), DPFCallback(0.5, update_interval=1, end=0.5)
        module, fitting = fitted(qat, NormClassifier, dpf, first=first, max_epochs=2)
        for name, mask in dpf.masks.items():
            assert bool((module.get_parameter(name)[~mask.bool()] == 0).all())
        assert measured(module, run=fitting) == qat.metrics
        found.append((module, qat.state_dict(), dpf))
    assert difference(found[0][0], found[1][0]) == 0
    assert equal(found[0][1], found[1][1])
    zeros = sum(int((value == 0).sum()) for value in found[0][0].parameters() if value.ndim > 1)
    assert zeros == sum(int((~mask.bool()).sum()) for mask in found[0][2].masks.values()) > 0
    alone, _ = fitted(None, NormClassifier, DPFCallback(0.5, update_interval=1, end=0.5), max_epochs=2)
    assert difference(found[0][0], alone) > 0


@pytest.mark.filterwarnings("ignore:.*masked completely")
def test_steps_that_others_replay_are_not_taken_in():
    """To estimate batch norm anew, in training mode; what training reaches is what it reaches without that."""
    found = []
    for again in (False, True):
        qat, dpf = qat_of("observed", freeze_observers_at=1.0), DPFCallback(0.5, reestimated_validation=again)
        module, fitting = fitted(qat, NormClassifier, dpf, max_epochs=3)
        assert ("compress/dpf/reestimated/val_loss" in fitting.logged) == again
        found.append((module, qat.state_dict()))
    assert difference(found[0][0], found[1][0]) == 0
    assert equal(found[0][1], found[1][1])


def test_what_another_replays_before_the_first_step_is_not_taken_in():
    """To find pairs of layers, when QAT is at work already; each order gives what the other does."""
    found = []
    for before in (True, False):
        qat, attention = qat_of("observed"), AttentionTransferCallback(teacher_for(Classifier), strength=0.02)
        callbacks = (qat, attention) if before else (attention, qat)
        trainer(*callbacks, max_steps=1, max_epochs=-1).fit(made(Classifier), loader())
        found.append(qat.state_dict())
    assert equal(*found)


def rounded(value, grid):
    step, limit = grid.step.reshape(-1, *[1] * (value.ndim - 1)), 2 ** (grid.bits - 1) - 1
    return torch.clamp(torch.round(value / step), -limit, limit) * step


def placed(value, grid):
    integers = torch.clamp(torch.round(value / torch.tensor(grid.scale)) + grid.zero_point, 0, 2**grid.bits - 1)
    return (integers - grid.zero_point) * grid.scale


def compared(qat, seen):
    """A module that notes what its network gives in each pass, and what the weights that it then has would give."""

    class Comparing(Classifier):
        def task_loss(self, batch):
            logits, state = self.model(batch[0]), qat.extra_state()["quantization"]
            if not self.training or state is None:
                return F.cross_entropy(logits, batch[1])
            grids, [convolution, _, _, last] = Grids.from_state(state), self.model
            x, (first, second) = batch[0].reshape(-1, 1, 2, 4), grids.activations.values()
            with torch.no_grad():
                plain = F.relu(F.conv2d(x, convolution.weight, convolution.bias, padding=1))
                plain = F.linear(plain.flatten(1), last.weight, last.bias)
                weight = rounded(convolution.weight, grids.weights["0.weight"])
                quantised = F.relu(F.conv2d(placed(x, first), weight, convolution.bias, padding=1))
                weight = rounded(last.weight, grids.weights["3.weight"])
                quantised = F.linear(placed(quantised, second).flatten(1), weight, last.bias)
                near = [bool(torch.allclose(logits, other, atol=1e-5)) for other in (plain, quantised)]
            masked = bool((convolution.weight == 0).any())
            seen.setdefault(self.trainer.global_step, []).append((masked, *near))
            return F.cross_entropy(logits, batch[1])

    return Comparing


@pytest.mark.filterwarnings("ignore:.*masked completely")
@pytest.mark.parametrize(
    ("step_size", "path"),
    [
        ("mse", "shared"),
        ("learned", "own"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("observed", "shared"), ("observed", "own"))),
    ],
)
def test_the_dense_pass_of_dcil_is_in_float(step_size, path):
    """The pruned one is quantised, and its weights are masked before they are rounded."""
    passes = {}
    qat = qat_of(step_size, start=0.25)
    dcil = DCILCallback(0.5, update_interval=1, end=0.25, dense_path=path, kl_start=0.5)
    module, fitting = fitted(qat, compared(qat, passes), dcil)
    assert {step: found[0] for step, found in passes.items()} == dict.fromkeys(range(2, 8), (True, False, True))
    assert {step: found[-1] for step, found in passes.items()} == dict.fromkeys(range(2, 8), (False, True, False))
    assert {len(found) for found in passes.values()} == {2}
    assert measured(module, run=fitting) == qat.metrics
    assert int((module.model[0].weight == 0).sum()) == 18


@pytest.mark.filterwarnings("ignore:.*masked completely")
@fast("learned")
def test_distillation_dcil_and_quantisation_one_after_the_other(step_size, tmp_path):
    """In any order of the list; the file has the zeros, and the metric of the fit."""
    found = []
    for turn in range(3):
        qat = qat_of(step_size, start=0.5, freeze_batchnorm_at=0.75)
        dcil = DCILCallback(0.5, update_interval=1, start=0.125, end=0.5, kl_start=0.25)
        distillation = DistillationCallback(teacher_for(NormClassifier), task_weight=0.5, kd_weight=0.5)
        order = [distillation, dcil, qat]
        order = order[turn:] + order[:turn]
        module, fitting = fitted(order[0], NormClassifier, *order[1:], max_epochs=2)
        assert measured(module, run=fitting) == qat.metrics
        assert fitting.logged["val_loss"] == qat.metrics["val_loss"]
        assert "compress/kd/val_loss" in fitting.logged
        found.append((module, qat.state_dict(), dcil.masks))
    for module, state, masks in found[1:]:
        assert difference(module, found[0][0]) == 0
        assert equal(state, found[0][1])
        assert equal(dict(masks), dict(found[0][2]))
    module, _, masks = found[0]
    [mask] = masks.values()
    assert bool((module.model[0].weight[~mask.bool()] == 0).all())
    assert int((~mask.bool()).sum()) == 18


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*masked completely")
def test_everything_in_one_training_with_its_file_and_its_report(tmp_path):
    qat = qat_of("learned", start=0.5, freeze_batchnorm_at=0.75)
    dcil = DCILCallback(0.5, update_interval=1, start=0.125, end=0.5, kl_start=0.25)
    distillation = DistillationCallback(teacher_for(NormClassifier), task_weight=0.5, kd_weight=0.5)
    export = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", tolerance=0.05)
    report = CompressionReport(path=tmp_path / "report", latency=False)
    _, fitting = fitted(qat, NormClassifier, dcil, distillation, export, report, max_epochs=2)
    logged = fitting.logged["val_loss"]
    assert export.file_metrics["val_loss"] == pytest.approx(logged, abs=0.05)
    [mask] = dcil.masks.values()
    assert (integers_in(tmp_path / "n.onnx")["0_conv2d_0"][~mask.bool().numpy()] == 0).all()
    rows = {row.name: row for row in report.result.rows}
    assert {"before", "after", "after (qat)", "n.onnx"} <= set(rows)
    assert rows["after (qat)"].metrics["val_loss"] == pytest.approx(logged, abs=1e-6)


# With PSGD


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_psgd_first_and_then_its_grids(first, granularity):
    """In one list: the steps are those that PSGD had when quantisation began, in the middle."""
    kept = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                kept.update({name: (step.clone(), bits) for name, (step, bits) in psgd.grids.items()})

    psgd = PSGDCallback(4, granularity=granularity, quantized_validation=False)
    qat = qat_of("mse", start=0.5)
    module, fitting = fitted(qat, Classifier, psgd, Keep(), first=first)
    for name, grid in qat.quantization.weights.items():
        step, bits = kept[f"model.{name}"]
        assert grid.bits == bits == 4
        assert torch.equal(grid.step, step)
        assert grid.step.ndim == (granularity == "channel")
    assert measured(module, run=fitting) == qat.metrics
    plain, _ = fitted(None, Classifier, PSGDCallback(4, granularity=granularity, quantized_validation=False))
    assert difference(module, plain) > 0


@fast("learned")
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_grids_of_a_training_with_psgd(step_size, granularity, tmp_path):
    """In a training of its own, from its checkpoint."""
    psgd = PSGDCallback(4, granularity=granularity, quantized_validation=False)
    module, fitting = fitted(psgd, Classifier)
    path = tmp_path / "psgd.ckpt"
    fitting.save_checkpoint(path)
    grids = dict(psgd.grids)
    qat = qat_of(step_size, grids_from=path)
    trainer(qat).fit(module, loader(), loader(rows=ROWS))
    begun = qat.state_dict()["start_grids"]["weights"]
    for name, entry in begun.items():
        step, bits = grids[f"model.{name}"]
        assert entry["bits"] == bits
        assert torch.equal(entry["step"], step)
    stays = all(torch.equal(grid.step, begun[name]["step"]) for name, grid in qat.quantization.weights.items())
    assert stays == (step_size == "mse")
    assert measured(module, qat) == qat.metrics


def test_psgd_beside_it_from_the_start_has_trained_nothing():
    with pytest.warns(UserWarning, match="'psgd' has trained nothing yet for a grid to be taken over; give start="):
        _, fitting = fitted(qat_of("mse"), Classifier, PSGDCallback(4, quantized_validation=False))
    assert fitting.global_step == STEPS


def test_other_bits_than_psgd_are_a_warning():
    with pytest.warns(UserWarning, match="'psgd' trains for 3 bits, and weight_bits=4: .*give weight_bits=3") as caught:
        fitted(qat_of("mse", start=0.5), Classifier, PSGDCallback(3, edge_bits=None, quantized_validation=False))
    assert len([entry for entry in caught if "trains for 3 bits" in str(entry.message)]) == 1


def test_the_largest_rate_outlives_a_test(tmp_path):
    module, qat = made(NormClassifier), QATCallback()
    fitting = trainer(qat)
    fitting.fit(module, loader(), loader())
    fitting.save_checkpoint(tmp_path / "first.ckpt")
    other = trainer(QATCallback())
    other.validate(made(NormClassifier), loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    other.save_checkpoint(tmp_path / "second.ckpt")
    first, second = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"][qat.state_key]["highest_lr"]
        for name in ("first", "second")
    )
    assert first == second > 0


class Worse(NormClassifier):
    """Its accuracy falls when it is quantised, and does not come back."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("known", (0.9, 0.5, 0.6, 0.6)[self.current_epoch])  # once more after the last epoch


@pytest.mark.filterwarnings("ignore:.*the best checkpoints so far")
def test_the_best_so_far_is_that_of_the_quantised_network(tmp_path):
    logger = CSVLogger(tmp_path)
    saver = ModelCheckpoint(tmp_path, monitor="known", mode="max")
    fitting = trainer(
        QATCallback(start=0.5), saver, max_epochs=3, logger=logger, enable_checkpointing=True, num_sanity_val_steps=0
    )
    fitting.fit(made(Worse), loader(), loader())
    best = [float(row["compress/best/known"]) for row in rows_logged(logger) if row.get("compress/best/known")]
    assert best == pytest.approx([0.9, 0.5, 0.6])
    assert float(saver.best_model_score) == pytest.approx(0.6)


def test_a_checkpoint_from_before_bits_of_layers_is_resumed(tmp_path):
    fitting = trainer(QATCallback())
    fitting.fit(made(NormClassifier), loader(), loader())
    fitting.save_checkpoint(tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    del file["callbacks"][QATCallback().state_key]["arguments"]["layer_bits"]
    torch.save(file, tmp_path / "file.ckpt")
    qat = QATCallback()
    trainer(qat, max_epochs=2).fit(made(NormClassifier), loader(), loader(), ckpt_path=tmp_path / "file.ckpt")
    assert qat.quantization is not None

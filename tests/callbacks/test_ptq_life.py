"""PTQCallback: what it leaves as it was, checkpoints and later runs, validation without a fit, and odd projects."""

from __future__ import annotations

import copy
import logging
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import (
    BATCH,
    STEPS,
    Batches,
    Classifier,
    DictClassifier,
    ManualClassifier,
    NormClassifier,
    difference,
    loader,
    made,
    trainer,
)
from contract.traces import is_portable, traces
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import PTQCallback, QATCallback

pytestmark = pytest.mark.sample  # fits, and a calibration after each
ROWS = 2 * BATCH  # of the validation


def fitted(ptq, kind=NormClassifier, *callbacks, data=None, validation=True, **settings):
    module = made(kind)
    fitting = trainer(*([] if ptq is None else [ptq]), *callbacks, **settings)
    fitting.fit(module, loader(kind) if data is None else data, loader(kind, rows=ROWS) if validation else None)
    return module, fitting


def measured(module, *callbacks, run=None, **settings):
    [metrics] = (run or trainer(*callbacks)).validate(
        module, loader(type(module), rows=ROWS), verbose=False, **settings
    )
    return metrics


def same(first, second):
    """Whether two calibrations found the same."""
    (ours, form), (theirs, other) = (tree_flatten(each.quantization.state()) for each in (first, second))
    return form == other and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


class WithData(NormClassifier):
    """Has its training data itself."""

    def train_dataloader(self):
        return loader()


# Nothing stays, and nothing moves


class Drawing(NormClassifier):
    """Its steps and its data draw from every random generator, and it remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.order, self.count = [], {"validated": 0}

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.order.append(round(float(x[0, 0]) + random.random() + float(np.random.rand()), 6))  # noqa: NPY002
        return super().training_step((x + 0.01 * torch.randn_like(x), y), batch_idx)

    def validation_step(self, batch, batch_idx):
        self.count["validated"] += 1
        self.log("noise", torch.rand(()) + random.random())
        super().validation_step(batch, batch_idx)


def seeded():
    torch.default_generator.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4, "bias_correction": True}])
def test_a_fit_is_bit_for_bit_what_it_is_without(settings):
    """Weights, statistics, flags, optimizers, what was logged, the order of a shuffled loader, all random states."""
    found = {}
    for ptq in (None, PTQCallback(**settings)):
        seeded()
        generator = torch.Generator().manual_seed(9)
        data = loader(shuffle=True, generator=generator)
        module, fitting = fitted(ptq, Drawing, data=data, max_epochs=2)
        [optimizer] = fitting.optimizers
        found[ptq is None] = {
            "module": module,
            "momentum": [state["momentum_buffer"].tolist() for state in optimizer.state.values()],
            "logged": {key: float(value) for key, value in fitting.callback_metrics.items()},
            "order": (module.order, module.count),
            "flags": [part.training for part in module.modules()],
            "random": (torch.get_rng_state().tolist(), generator.get_state().tolist(), random.getstate()),
            "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
            "traces": traces(module),
        }
    ours, plain = found[False], found[True]
    assert difference(ours.pop("module"), plain.pop("module")) == 0
    assert ours == plain
    assert ptq.quantization is not None


def test_a_validation_is_bit_for_bit_what_it_is_without():
    """And so is the fit that follows it, with another order in each epoch."""
    found = []
    for callbacks in ([], [PTQCallback()]):
        seeded()
        module, shuffled = made(WithOwnLoader), torch.Generator().manual_seed(9)
        module.loader = loader(shuffle=True, generator=shuffled)
        fitting = trainer(*callbacks, max_epochs=2)
        fitting.validate(module, loader(rows=ROWS), verbose=False)
        states = torch.get_rng_state().tolist(), shuffled.get_state().tolist(), random.getstate()
        fitting.fit(module, val_dataloaders=loader(rows=ROWS))
        found.append((states, module))
    (plain_states, plain), (states, ours) = found
    assert states == plain_states
    assert difference(ours, plain) == 0
    assert traces(ours) == traces(plain)
    assert ours.order == plain.order
    assert len(ours.order) == 2 * STEPS


class WithOwnLoader(Drawing):
    loader = None

    def train_dataloader(self):
        return self.loader


def test_the_module_is_the_plain_one_and_can_be_pickled():
    ptq = PTQCallback()
    module, fitting = fitted(ptq)
    plain, _ = fitted(None)
    assert traces(module) == traces(plain)
    assert is_portable(module)
    inputs = torch.randn(4, 8)
    assert torch.equal(module.eval()(inputs), plain.eval()(inputs))
    assert measured(module) == measured(plain) != ptq.metrics
    assert measured(module, run=fitting) == ptq.metrics
    assert traces(module.train()) == traces(plain.train())


def test_validation_test_and_prediction_show_the_quantised_network():
    class Predicting(NormClassifier):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    ptq = PTQCallback(weight_bits=4)
    module, fitting = fitted(ptq, Predicting)
    data = loader(rows=ROWS)
    [validated], [tested] = fitting.validate(module, data, verbose=False), fitting.test(module, data, verbose=False)
    logits = torch.cat(fitting.predict(module, data))
    plain = torch.cat(trainer().predict(module, data))
    targets = torch.cat([y for _, y in data])
    assert validated == ptq.metrics
    assert tested == {"test_loss": validated["val_loss"]}
    assert float(F.cross_entropy(logits, targets)) == pytest.approx(validated["val_loss"], abs=1e-6)
    assert float(F.cross_entropy(plain, targets)) == pytest.approx(measured(module)["val_loss"], abs=1e-6)
    assert float((logits - plain).abs().max()) > 1e-3


def test_within_the_fit_the_plain_network_is_validated():
    logged = []

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.append((float(trainer.callback_metrics["val_loss"]), "forward" in vars(pl_module.model)))

    module, _ = fitted(PTQCallback(weight_bits=2), NormClassifier, Look(), max_epochs=2)
    assert [shadowed for _, shadowed in logged] == [False] * 3
    assert logged[-1][0] == measured(module)["val_loss"]


# Checkpoints, and the runs that follow


def test_checkpoints_hold_plain_weights_and_those_after_the_fit_the_scales(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    ptq = PTQCallback()
    module, fitting = fitted(ptq, NormClassifier, saver, enable_checkpointing=True)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    during, after = (torch.load(tmp_path / name, weights_only=True) for name in ("epoch=0.ckpt", "after.ckpt"))
    for checkpoint in (during, after):
        made(NormClassifier).load_state_dict(checkpoint["state_dict"], strict=True)
        assert difference(checkpoint["state_dict"], module) == 0
        assert checkpoint["callbacks"]["PTQCallback[ptq]"]["arguments"]["weight_bits"] == 8
    assert during["callbacks"]["PTQCallback[ptq]"]["quantization"] is None
    scales = after["callbacks"]["PTQCallback[ptq]"]["quantization"]
    assert list(scales["weights"]) == ["0.weight", "4.weight"]
    assert scales["weights"]["4.weight"]["step"].shape == (3,)


def test_a_checkpoint_from_after_the_fit_needs_no_data(tmp_path, monkeypatch):
    """In another process: a module with other weights, a callback that has calibrated nothing, and no training data."""
    ptq = PTQCallback(weight_bits=4, bias_correction=True)
    module, fitting = fitted(ptq)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    fresh = PTQCallback(weight_bits=4, bias_correction=True)
    monkeypatch.setattr(fresh, "_calibrated", None)  # an error if it is called
    other = made(NormClassifier, seed=7)
    assert measured(other, fresh, ckpt_path=tmp_path / "after.ckpt", weights_only=True) == ptq.metrics
    assert difference(other, module) == 0
    assert same(fresh, ptq)


def test_a_change_is_told_whatever_the_number_of_threads(monkeypatch):
    """A sum of floating-point numbers depends on how many threads share it; one weight in four million counts."""
    ptq = PTQCallback(activation_bits=None)
    module, fitting = fitted(ptq, Wide, data=loader(rows=BATCH), validation=False)
    step = ptq.quantization.weights["1.weight"].step[5]
    with monkeypatch.context() as patch:
        patch.setattr(ptq, "_calibrated", None)  # an error if it is called
        try:
            for threads in (2, 3, 4):
                torch.set_num_threads(threads)
                assert list(measured(module, run=fitting)) == ["val_loss"]
        finally:
            torch.set_num_threads(1)
    with torch.no_grad():
        module.model[1].weight[5, 7] += 1.0
    measured(module, run=fitting)
    assert ptq.quantization.weights["1.weight"].step[5] > 2 * step


class Wide(Classifier):
    def build(self):
        self.model = nn.Sequential(nn.Linear(8, 2000), nn.Linear(2000, 2000), nn.Linear(2000, 3))


@pytest.mark.parametrize("given", ["datamodule", "loaders", "loaders and the module"])
def test_the_best_checkpoint_is_calibrated_anew(given, tmp_path):
    """With the training data of the fit, also where that was given to the fit alone."""

    class Worsening(NormClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("worse", float(self.current_epoch))

    saver = ModelCheckpoint(tmp_path, monitor="worse", filename="{epoch}")
    ptq, module = PTQCallback(weight_bits=4), made(Worsening)
    fitting = trainer(ptq, saver, enable_checkpointing=True, max_epochs=3)
    if given == "datamodule":
        fitting.fit(module, datamodule=Data())
    else:
        fitting.fit(module, loader(), loader(rows=ROWS))
    last, found = ptq.quantization, ptq.metrics["val_loss"]
    handed = {"model": module} if given == "loaders and the module" else {}
    data = {"datamodule": Data()} if given == "datamodule" else {"dataloaders": loader(rows=ROWS)}
    [tested] = fitting.test(**handed, **data, ckpt_path="best", verbose=False)
    assert ptq.quantization.fingerprints != last.fingerprints
    best = Worsening.load_from_checkpoint(saver.best_model_path)
    assert difference(best, module) == 0
    fresh = PTQCallback(weight_bits=4)
    again = trainer(fresh)
    [expected] = again.test(best.train(), datamodule=Data(), verbose=False)
    assert tested == expected
    assert tested["test_loss"] != found
    assert same(ptq, fresh)
    assert list(ptq.quantization.statistics) == ["1"]


def test_a_module_that_is_loaded_after_the_fit_is_calibrated_with_its_data(tmp_path):
    """A script that trains, loads the best checkpoint into a new module, and tests that."""
    ptq, kind = PTQCallback(), NormClassifier
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    _, fitting = fitted(ptq, kind, saver, enable_checkpointing=True, max_epochs=2)
    found = ptq.metrics["val_loss"]
    best = kind.load_from_checkpoint(saver.best_model_path)
    with torch.no_grad():
        best.model[4].bias[0].add_(1.0)
    [tested] = fitting.test(best, loader(rows=ROWS), verbose=False)
    assert tested["test_loss"] == pytest.approx(measured(best)["val_loss"], abs=0.01)
    assert tested["test_loss"] != pytest.approx(found, abs=0.01)


def test_changed_weights_are_noticed_and_calibrated_anew(caplog):
    ptq, module = PTQCallback(), made(WithData)
    fitting = trainer(ptq)
    fitting.fit(module, val_dataloaders=loader(rows=ROWS))
    steps = {name: grid.step for name, grid in ptq.quantization.weights.items()}
    assert measured(module, run=fitting) == ptq.metrics
    with torch.no_grad():
        module.model[4].weight.mul_(2.0)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        changed = measured(module, run=fitting)
    assert "ptq: the weights have changed since they were calibrated, so that is done anew" in caplog.text
    assert torch.equal(ptq.quantization.weights["4.weight"].step, 2 * steps["4.weight"])
    assert torch.equal(ptq.quantization.weights["0.weight"].step, steps["0.weight"])
    assert changed["val_loss"] == pytest.approx(measured(module)["val_loss"], abs=0.01)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        assert measured(module, run=fitting) == changed
    assert "changed" not in caplog.text


def test_changed_statistics_are_noticed():
    """What batch norm makes of a layer decides on the ranges behind it."""
    ptq, module = PTQCallback(), made(WithData)
    trainer(ptq).fit(module, val_dataloaders=loader(rows=ROWS))
    with torch.no_grad():
        module.model[1].running_var.mul_(1e-4)
    assert measured(module, ptq)["val_loss"] == pytest.approx(measured(module)["val_loss"], rel=0.05)


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_fit_ends_with_the_scales_of_the_whole_one(done, tmp_path):
    """Also where nothing was left to be done."""
    whole = PTQCallback(weight_bits=4)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, _ = fitted(whole, NormClassifier, saver, enable_checkpointing=True, max_epochs=2)
    ptq, resumed = PTQCallback(weight_bits=4), made(NormClassifier, seed=5)
    trainer(ptq, max_epochs=2).fit(
        resumed, loader(), loader(rows=ROWS), ckpt_path=tmp_path / f"epoch={done - 1}.ckpt", weights_only=True
    )
    assert difference(resumed, module) == 0
    assert same(ptq, whole)
    assert ptq.metrics == whole.metrics


def test_other_arguments_than_in_the_checkpoint_are_named(tmp_path):
    _, fitting = fitted(PTQCallback())
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    ptq = PTQCallback(weight_bits=4)
    with pytest.warns(UserWarning, match="weight_bits was 8 and is 4"):
        measured(made(WithData), ptq, ckpt_path=tmp_path / "after.ckpt", weights_only=True)
    assert {grid.bits for grid in ptq.quantization.weights.values()} == {4}  # those that are given now count


def test_fits_one_after_the_other():
    """Of one module, and of another with a network of another name."""
    ptq, module = PTQCallback(), made(NormClassifier)
    for _ in range(2):
        trainer(ptq).fit(module, loader(), loader(rows=ROWS))
    twice, fresh = made(NormClassifier), PTQCallback()
    trainer().fit(twice, loader(), loader(rows=ROWS))
    trainer(fresh).fit(twice, loader(), loader(rows=ROWS))
    assert same(ptq, fresh)
    assert ptq.metrics == fresh.metrics
    _, fitting = fitted(ptq, Other)
    assert (ptq.quantization.network, list(ptq.quantization.weights)) == ("net", ["weight"])
    alone = PTQCallback()
    fitted(alone, Other)
    assert same(ptq, alone)
    assert measured(fitting.lightning_module, run=fitting) == alone.metrics


def test_a_second_fit_of_the_same_trainer():
    ptq = PTQCallback()
    module, fitting = fitted(ptq)
    first = ptq.quantization
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(), loader(rows=ROWS))
    assert ptq.quantization.fingerprints != first.fingerprints
    assert measured(module, run=fitting) == ptq.metrics


class Other(WithData):
    """With a network of another name."""

    def build(self):
        self.net = nn.Linear(8, 3)

    def task_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_callback_serves_several_modules_in_turn():
    """Weights that belong to another module are not taken for those that were calibrated."""
    ptq, modules = PTQCallback(), [made(WithData), made(WithData, seed=2), made(Other)]
    expected = [measured(module, PTQCallback()) for module in modules]
    assert [measured(module, ptq) for module in modules] == expected
    assert [measured(module, ptq) for module in modules[::-1]] == expected[::-1]
    fitted(ptq, NormClassifier, max_steps=1)
    assert [measured(module, ptq) for module in modules[::-1]] == expected[::-1]


def test_the_data_of_an_earlier_fit_gives_way_to_those_of_the_run():
    class Large(WithData):
        def train_dataloader(self):
            return DataLoader([(4 * x, y) for x, y in Batches()], batch_size=BATCH)

    ptq, fresh, module = PTQCallback(), PTQCallback(), made(Large)
    fitted(ptq)
    assert measured(module, ptq) == measured(module, fresh)
    assert same(ptq, fresh)


def test_a_fit_without_a_batch_calibrates_nothing():
    ptq = PTQCallback()
    with pytest.warns(UserWarning, match="no training step was run"):
        fitted(ptq, limit_train_batches=0)
    assert ptq.quantization is None
    assert ptq.metrics == {}


# Exceptions


class FailsLater(NormClassifier):
    """One of its steps fails once the training is over."""

    fails_in = ""

    def on_train_end(self):
        self.done = True

    def training_step(self, batch, batch_idx):
        if getattr(self, "done", False) and self.fails_in == "training":
            raise RuntimeError("the step is broken")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if getattr(self, "done", False) and self.fails_in == "validation":
            raise RuntimeError("the step is broken")
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("fails_in", ["training", "validation"])
def test_an_exception_in_the_calibration_leaves_nothing(fails_in, tmp_path):
    """The training step is replayed for batch-norm statistics, the validation step for all else."""
    module, ptq = made(FailsLater), PTQCallback(weight_bits=4)
    module.fails_in = fails_in
    fitting = trainer(ptq, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="the step is broken"):
        fitting.fit(module, loader(), loader(rows=ROWS))
    plain, _ = fitted(None, FailsLater)
    plain.fails_in = fails_in
    assert traces(module) == traces(plain)
    assert difference(module, plain) == 0
    assert ptq.quantization is None
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert difference(saved["state_dict"], plain) == 0


def test_training_batches_that_the_validation_step_does_not_take():
    """Two views of each row to train on, one to validate on: the training step is replayed, in evaluation mode."""
    ptq, plain = PTQCallback(), made(Views)
    module, fitting = fitted(ptq, Views, data=DataLoader(TwoViews(), batch_size=BATCH))
    trainer().fit(plain, DataLoader(TwoViews(), batch_size=BATCH), loader(rows=ROWS))
    assert difference(module, plain) == 0
    assert traces(module) == traces(plain)
    seen = torch.cat([x for x, _ in loader()])
    [first, _] = ptq.quantization.activations.values()
    assert first.scale == pytest.approx(float(seen.max() + 0.1 - seen.min()) / 255, rel=1e-5)
    assert measured(module, run=fitting) == ptq.metrics
    assert ptq.metrics["val_loss"] == pytest.approx(measured(module)["val_loss"], abs=0.01)


class Views(NormClassifier):
    def training_step(self, batch, batch_idx):
        (first, second), y = batch
        return self.task_loss((first, y)) + self.task_loss((second, y))


class TwoViews(Batches):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x, x + 0.1), y


@pytest.mark.parametrize("where", ["training", "validation of the fit", "validation afterwards"])
def test_an_exception_anywhere_leaves_nothing(where):
    class Fails(WithData):
        where = ""

        def training_step(self, batch, batch_idx):
            if self.where == "training" and batch_idx == 3:
                raise RuntimeError("the step is broken")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if self.where == "validation of the fit" and not self.trainer.sanity_checking:
                raise RuntimeError("the step is broken")
            if self.where == "validation afterwards" and self.trainer.validating and len(batch[0]) < BATCH:
                raise RuntimeError("the step is broken")
            return super().validation_step(batch, batch_idx)

    found = []
    for callbacks in ([], [PTQCallback()]):
        module = made(Fails)
        module.where = where
        fitting = trainer(*callbacks)
        run, settings = fitting.fit, {"val_dataloaders": loader(rows=ROWS)}
        if where == "validation afterwards":
            run, settings = fitting.validate, {"dataloaders": loader(rows=ROWS + 3), "verbose": False}
        with pytest.raises(RuntimeError, match="the step is broken"):
            run(module, **settings)
        found.append((traces(module), module))
    assert found[0][0] == found[1][0]
    assert difference(found[0][1], found[1][1]) == 0
    assert torch._C._len_torch_function_stack() == 0
    module.where = ""
    plain = {"val_loss": pytest.approx(measured(module)["val_loss"], abs=0.01)}
    assert measured(module, run=fitting) == plain
    assert measured(module, run=fitting) != measured(module)


# Without a fit


class Data(L.LightningDataModule):
    """Says for what it was set up, and holds only what belongs to that."""

    def __init__(self):
        super().__init__()
        self.stages, self.held = [], {}

    def setup(self, stage):
        self.stages.append(stage)
        self.held[stage] = torch.rand(1)
        if stage == "fit":
            self.train, self.val = Batches(), Batches(rows=ROWS)
        else:
            self.val = Batches(rows=ROWS)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=BATCH)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=BATCH)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_a_datamodule_is_set_up_for_a_fit_as_a_copy(method):
    class Predicting(NormClassifier):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    class Look(L.Callback):
        def setup(self, trainer, pl_module, stage):
            self.val = trainer.datamodule.val

        def on_validation_batch_start(self, trainer, *args):
            assert trainer.datamodule.val is self.val

    ptq, module, data = PTQCallback(), made(Predicting), Data()
    settings = {} if method == "predict" else {"verbose": False}
    found = getattr(trainer(ptq, Look()), method)(module, datamodule=data, **settings)
    assert data.stages == [method]
    assert list(data.held) == [method]
    assert not hasattr(data, "train")
    plain = getattr(trainer(), method)(module, datamodule=Data(), **settings)
    assert [str(entry) for entry in found] != [str(entry) for entry in plain]
    from_the_module = PTQCallback()
    same_module = made(WithData)
    measured(same_module, from_the_module)
    assert same(ptq, from_the_module)


def test_a_datamodule_that_draws_does_not_move_the_random_numbers():
    states = []
    for callbacks in ([], [PTQCallback()]):
        seeded()
        trainer(*callbacks).validate(made(NormClassifier), datamodule=Data(), verbose=False)
        states.append(torch.get_rng_state().tolist())
    assert states[0] == states[1]


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_the_same_as_after_a_fit(weight_bits, mode):
    """Batch norm is estimated anew as well, though the module is validated; flags are as they were."""
    after = PTQCallback(weight_bits=weight_bits)
    module, _ = fitted(after, WithData)
    module.train(mode == "training")
    flags = [part.training for part in module.modules()]
    ptq = PTQCallback(weight_bits=weight_bits)
    assert measured(module, ptq) == after.metrics
    assert same(ptq, after)
    assert [part.training for part in module.modules()] == flags
    assert list(ptq.quantization.statistics) == ([] if weight_bits == 8 else ["1"])
    assert ptq.metrics == {}


def test_frozen_batch_norm_is_left_alone_without_a_fit_too():
    """Frozen when the run begins, whatever it was in an earlier run of the same Trainer."""
    module, ptq = made(WithData).train(), PTQCallback(weight_bits=4)
    run = trainer(ptq)
    measured(module, run=run)
    assert list(ptq.quantization.statistics) == ["1"]
    module.model[1].eval()
    with torch.no_grad():
        module.model[4].weight.mul_(2.0)
    run.test(module, loader(rows=ROWS), verbose=False)
    assert ptq.quantization.statistics == {}
    assert (module.training, module.model[1].training) == (True, False)


def test_without_any_data_it_says_what_to_do():
    message = (
        "PTQCallback 'ptq' has nothing to calibrate with: give a datamodule, let NormClassifier have a "
        "train_dataloader, fit first, or load a checkpoint that holds scales"
    )
    module, ptq = made(NormClassifier), PTQCallback()
    before = traces(module)
    with pytest.raises(ValueError, match=message):
        measured(module, ptq)
    assert traces(module)["model"][2] == before["model"][2]
    assert ptq.quantization is None

    class Validating(L.LightningDataModule):
        def val_dataloader(self):
            return loader(rows=ROWS)

    with pytest.raises(ValueError, match=message):
        trainer(PTQCallback()).validate(module, datamodule=Validating(), verbose=False)
    with pytest.raises(ValueError, match="has nothing to calibrate with"):
        trainer(PTQCallback(), limit_train_batches=0).validate(made(WithData), loader(rows=ROWS), verbose=False)


def test_several_networks_ask_for_network_without_a_fit_too():
    class Parts(WithData):
        def build(self):
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def task_loss(self, batch):
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    with pytest.raises(RuntimeError, match=r"calls 2 modules .* 'body', 'head'; choose .* with network="):
        measured(made(Parts), PTQCallback())
    ptq = PTQCallback(network="head")
    measured(made(Parts), ptq)
    assert (ptq.quantization.network, list(ptq.quantization.weights)) == ("head", ["weight"])


class Stream(IterableDataset):
    """Has no length, and remembers how often it was begun."""

    def __init__(self):
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        yield from (Batches()[index] for index in range(BATCH * STEPS))


@pytest.mark.parametrize("fit", [True, False])
def test_a_stream(fit):
    class Streaming(NormClassifier):
        def train_dataloader(self):
            return DataLoader(self.stream, batch_size=BATCH)

    found = {}
    for kind in ("stream", "list"):
        module, ptq = made(Streaming if kind == "stream" else WithData), PTQCallback()
        module.stream = Stream()
        fitting = trainer(ptq)
        if fit:
            fitting.fit(module, val_dataloaders=loader(rows=ROWS))
            assert module.stream.begun == (1 if kind == "stream" else 0)
        found[kind] = measured(module, run=fitting), ptq
    assert found["stream"][0] == found["list"][0]
    assert same(found["stream"][1], found["list"][1])


# Odd projects


class BatchOnly(WithData):
    def validation_step(self, batch):
        super().validation_step(batch, 0)


class WithLoaderIndex(WithData):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class Anything(WithData):
    def validation_step(self, *args, **kwargs):
        super().validation_step(args[0], 0)


class Renamed(WithData):
    def validation_step(self, val_batch, number):
        super().validation_step(val_batch, number)


class Sums(WithData):
    """Its validation returns something, and logs in the end."""

    def on_validation_epoch_start(self):
        self.losses = []

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.task_loss(batch))
        return self.losses[-1]

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.losses).mean())


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("kind", [BatchOnly, WithLoaderIndex, Anything, Renamed, Sums])
def test_every_form_of_the_step(kind, fit):
    expected, ptq = PTQCallback(), PTQCallback()
    if fit:
        fitted(expected, WithData)
        fitted(ptq, kind)
        assert ptq.metrics == {"val_loss": pytest.approx(expected.metrics["val_loss"], abs=1e-6)}
    else:
        measured(made(WithData), expected)
        assert measured(made(kind), ptq)["val_loss"] == pytest.approx(measured(made(kind))["val_loss"], abs=0.01)
    assert same(ptq, expected)


def test_two_validation_loaders():
    class Both(NormClassifier):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log(f"loss{dataloader_idx}", self.task_loss(batch), add_dataloader_idx=False, batch_size=BATCH)

    ptq, module = PTQCallback(), made(Both)
    fitting, data = trainer(ptq), [loader(rows=ROWS), loader(rows=BATCH)]
    fitting.fit(module, loader(), data)
    shown = {key: value for found in fitting.validate(module, data, verbose=False) for key, value in found.items()}
    assert shown == ptq.metrics
    assert set(shown) == {"loss0", "loss1"}


def test_without_a_validation_step_the_training_step_is_replayed_in_evaluation_mode():
    class Untested(NormClassifier):
        validation_step = L.LightningModule.validation_step

        def build(self):
            super().build()
            self.model.insert(3, nn.Dropout(0.5))
            self.modes = []

        def training_step(self, batch, batch_idx):
            self.modes.append((self.model.training, torch.is_grad_enabled()))
            return super().training_step(batch, batch_idx)

    ptq, module = PTQCallback(), made(Untested)
    modes = []
    module.model.register_forward_hook(lambda part, args, output: modes.append(part.training))
    trainer(ptq).fit(module, loader())
    assert module.modes == [(True, True)] * STEPS
    # after the first step a batch is tried, and it is looked at twice: what it is made of, and its activations
    assert modes == [True, False, False, False] + [True] * (STEPS - 1) + [False] * 2 * STEPS
    assert ptq.metrics == {}
    module.eval()
    with torch.no_grad():
        maps = torch.cat([module.model[:3](x) for x, _ in loader()])
    last = list(ptq.quantization.activations.values())[-1]
    assert last.scale == pytest.approx(float(maps.max()) / 255, rel=0.02)


class Around(NormClassifier):
    """Its validation goes around the network, through layers inside."""

    def validation_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.model:
            x = layer(x)
        self.log("val_loss", nn.functional.cross_entropy(x, batch[1]))


def test_a_validation_that_goes_around_the_network_is_told_after_the_first_step():
    module, fitting = made(Around), trainer(PTQCallback())
    message = r"Around.training_step calls 'model', and validation_step does not, so the quantised network could not be"
    with pytest.raises(ValueError, match=message):
        fitting.fit(module, loader(), loader(rows=ROWS))
    assert fitting.global_step == 1


class ReadOnce(IterableDataset):
    """Gives its rows once."""

    def __init__(self):
        self.left = list(loader().dataset)

    def __iter__(self):
        while self.left:
            yield self.left.pop()


def test_training_data_that_are_used_up_are_told_after_the_first_step():
    class Untested(NormClassifier):
        validation_step = L.LightningModule.validation_step

    module, fitting = made(Untested), trainer(PTQCallback())
    with pytest.raises(ValueError, match="the training data give no batch when they are read once more"):
        fitting.fit(module, DataLoader(ReadOnce(), batch_size=32))
    assert fitting.global_step == 1


def test_dict_batches():
    ptq = PTQCallback()
    module, fitting = fitted(ptq, DictClassifier)
    plain = PTQCallback()
    fitted(plain, Classifier)
    assert list(ptq.quantization.weights) == ["body.0.weight", "body.3.weight"]
    assert measured(module, run=fitting) == ptq.metrics
    scales = [[grid.scale for grid in each.quantization.activations.values()] for each in (ptq, plain)]
    assert scales[0] == scales[1]


def test_a_step_that_takes_its_batches_itself():
    """It may take several; the validation step, which takes one, is not what is replayed."""

    class Taking(NormClassifier):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    ptq, expected = PTQCallback(weight_bits=4), PTQCallback(weight_bits=4)
    module, fitting = fitted(ptq, Taking)
    plain, _ = fitted(expected)
    assert difference(module, plain) == 0
    assert same(ptq, expected)
    assert measured(module, run=fitting) == ptq.metrics == expected.metrics


@pytest.mark.parametrize("validates", [True, False])
def test_manual_optimisation(validates):
    class Manual(ManualClassifier):
        if not validates:
            validation_step = L.LightningModule.validation_step

    ptq, plain = PTQCallback(), made(Manual)
    module, _ = fitted(ptq, Manual, validation=validates)
    trainer().fit(plain, loader(), loader(rows=ROWS) if validates else None)
    assert difference(module, plain) == 0
    assert list(ptq.quantization.weights) == ["0.weight", "3.weight"]
    assert len(ptq.quantization.activations) == 2
    assert list(ptq.metrics) == (["val_loss"] if validates else [])


def test_metrics_of_the_module_count_each_batch_once():
    class Measured(WithData):
        def __init__(self):
            super().__init__()
            self.right, self.updates = MulticlassAccuracy(3, average="micro"), []

        def validation_step(self, batch, batch_idx):
            self.right.update(self.model(batch[0]), batch[1])
            self.log("right", self.right)

        def on_validation_epoch_end(self):
            self.updates.append((self.right._update_count, int(self.right.tp + self.right.fn)))

    for callbacks in ([], [PTQCallback()]):
        module = made(Measured)
        fitting = trainer(*callbacks)
        fitting.validate(module, loader(rows=ROWS), verbose=False)
        fitting.fit(module, val_dataloaders=loader(rows=ROWS))
        assert module.updates == [(2, ROWS)] * 3
        assert module.right._update_count == 0
    assert measured(module, run=fitting) == callbacks[0].metrics
    assert set(callbacks[0].metrics) == {"right"}


def test_a_network_that_cannot_be_copied():
    """Nor its module: a lock in it."""
    import threading

    class Locked(NormClassifier):
        def build(self):
            super().build()
            self.model.lock = threading.Lock()

    ptq, plain = PTQCallback(), PTQCallback()
    module, fitting = fitted(ptq, Locked)
    untouched, _ = fitted(plain)
    assert difference(module, untouched) == 0
    assert same(ptq, plain)
    assert ptq.metrics == plain.metrics == measured(module, run=fitting)
    assert "forward" not in vars(module.model)


def test_batches_may_be_skipped():
    """Those that the step passes over are not looked at, and the first one need not be the one that tells."""

    class Skipping(NormClassifier):
        def validation_step(self, batch, batch_idx):
            if not skipped(batch):
                super().validation_step(batch, batch_idx)

    def skipped(batch):
        return float(batch[0][0, 0]) < -0.5

    ptq = PTQCallback()
    fitted(ptq, Skipping, limit_val_batches=0)
    taken = [x for x, y in loader() if not skipped((x, y))]
    assert 1 <= len(taken) < STEPS
    assert skipped(next(iter(loader())))
    seen = torch.cat(taken)
    [first, _] = ptq.quantization.activations.values()
    assert first.scale == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-6)


def test_a_validation_that_differentiates():
    """As that of forces does."""

    class Forces(NormClassifier):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                [force] = torch.autograd.grad(self.model(x).sum(), [x])
            self.log("force", force.norm())

    ptq = PTQCallback()
    module, fitting = fitted(ptq, Forces, inference_mode=False)
    [shown] = fitting.validate(module, loader(rows=ROWS), verbose=False)
    [plain] = trainer(inference_mode=False).validate(module, loader(rows=ROWS), verbose=False)
    assert shown == ptq.metrics
    assert shown["force"] == pytest.approx(plain["force"], rel=0.1)
    assert shown != plain


# Several processes


PROCESSES = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import lightning.pytorch as L
    import torch
    from contract.modules import BATCH, NormClassifier, loader, made, trainer
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_compress import CompressionReport, PTQCallback

    def found(ptq, module):
        return {"state": ptq.extra_state(), "weights": module.state_dict(), "metrics": dict(ptq.metrics)}

    class Keep(L.Callback):
        def __init__(self, folder, ptq):
            self.folder, self.ptq = folder, ptq

        def teardown(self, trainer, pl_module, stage):
            if stage == "fit":
                torch.save(found(self.ptq, pl_module), f"{self.folder}/rank{trainer.global_rank}.pt")

    if __name__ == "__main__":
        torch.set_num_threads(1)
        folder, method = sys.argv[2:]
        ptq, module = PTQCallback(weight_bits=4), made(NormClassifier)
        def run(*callbacks, **settings):
            strategy = DDPStrategy(start_method=method, process_group_backend="gloo")
            return trainer(*callbacks, devices=2, strategy=strategy, **settings)

        fitting = run(ptq, CompressionReport(latency=False), Keep(folder, ptq), max_epochs=2, logger=CSVLogger(folder))
        fitting.fit(module, loader(shuffle=True), loader(rows=2 * BATCH))
        validating = run(ptq, use_distributed_sampler=False)  # so that each process has all data
        [shown] = validating.validate(module, loader(rows=2 * BATCH), verbose=False)
        torch.save({**found(ptq, module), "shown": shown}, f"{folder}/parent{fitting.global_rank}.pt")
"""


@pytest.mark.parametrize("method", ["fork", *(pytest.param(own, marks=pytest.mark.slow) for own in ("spawn", "popen"))])
def test_two_processes_find_the_same_grids_and_the_parent_gets_them(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROCESSES))
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parents[1]), str(tmp_path), method],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    parent = torch.load(tmp_path / "parent0.pt", weights_only=True)
    assert difference(first["weights"], second["weights"]) == difference(first["weights"], parent["weights"]) == 0
    states = [copy.deepcopy(found["state"]["quantization"]) for found in (first, second, parent)]
    for name in ("0.weight", "4.weight"):
        steps = [state["weights"][name]["step"] for state in states]
        assert torch.equal(steps[0], steps[1])
        assert torch.equal(steps[0], steps[2])
    for mean, variance in (state["statistics"]["1"] for state in states[1:]):
        assert torch.equal(mean, states[0]["statistics"]["1"][0])
        assert torch.equal(variance, states[0]["statistics"]["1"][1])
    assert states[0]["activations"] == states[1]["activations"] == states[2]["activations"]
    assert len(states[0]["activations"]) == 2
    assert parent["metrics"] == first["metrics"]
    assert parent["shown"]["val_loss"] == pytest.approx(parent["metrics"]["val_loss"], abs=1e-6)
    assert len(list(tmp_path.rglob("compression_report.json"))) == 1


class Breaking(NormClassifier):
    """Its validation and its test fail before they call the network, where they are told to."""

    breaks = False

    def validation_step(self, batch, batch_idx):
        if self.breaks:
            raise OSError("the data are gone")
        super().validation_step(batch, batch_idx)

    test_step = validation_step


@pytest.mark.parametrize("kind", [PTQCallback, QATCallback])
@pytest.mark.parametrize("run", ["validate", "test"])
@pytest.mark.filterwarnings("ignore:.*beyond the ends of their grids")
def test_after_an_evaluation_that_failed_a_fit_goes_on(kind, run):
    callback = kind()
    module, fitting = fitted(callback, Breaking)
    module.breaks = True
    with pytest.raises(OSError, match="gone"):
        getattr(fitting, run)(module, loader(), verbose=False)
    module.breaks = False
    fitting = trainer(callback)
    fitting.fit(module, loader(), loader(rows=ROWS))
    assert callback.quantization is not None


def test_samples_are_those_that_this_process_has_looked_at(tmp_path):
    ptq = PTQCallback(max_samples=16)
    module, fitting = fitted(ptq)
    assert ptq.samples_seen == 16
    fitting.save_checkpoint(tmp_path / "scales.ckpt")
    other = PTQCallback(max_samples=16)
    fitted(other)
    trainer(other).validate(module, loader(), ckpt_path=tmp_path / "scales.ckpt", verbose=False)
    assert same(ptq, other)
    assert other.samples_seen == 0


def test_a_copy_does_not_bring_the_module_along():
    ptq = PTQCallback()
    module, _ = fitted(ptq)
    assert ptq.log.__self__ is module  # as Lightning has left it
    copied = copy.deepcopy(ptq)
    assert "log" not in vars(copied)
    assert not any(value is module for value in vars(copied).values())

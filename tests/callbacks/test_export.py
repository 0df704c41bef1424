"""ExportCallback: what it refuses before training, what it does at the end, and what it never loses."""

from __future__ import annotations

import logging

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import FEATURES, Classifier, NormClassifier, difference, loader, made, rows_logged, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split

from lightning_compress import CompressionReport, DistillationCallback, ExportCallback, export
from lightning_compress.callbacks.export import _better_checkpoint
from lightning_compress.export.evaluate import evaluate_forward
from lightning_compress.mechanisms.capture import CaptureError


class Measured(Classifier):
    """A classifier that logs what it measures in validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))


def test_file_and_module_agree_at_the_end(tmp_path):
    callback = ExportCallback(tmp_path / "m.onnx", metric="val_loss", tolerance=1e-4)
    module = made(Measured)
    fitting = trainer(callback)
    fitting.fit(module, loader(), loader())
    assert callback.failure is None
    assert callback.result.network == "model"
    assert callback.file_metrics["val_loss"] == pytest.approx(callback.module_metrics["val_loss"], abs=1e-5)
    assert export.evaluate(tmp_path / "m.onnx", module, loader())["val_loss"] == pytest.approx(
        callback.file_metrics["val_loss"], abs=1e-6
    )


@pytest.mark.sample
@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("asked", ["val_acc", "val_acc_epoch"])
def test_a_metric_that_steps_log_too_has_both_its_names(asked, loaders, tmp_path):
    """It is monitored as ``val_acc``, and a validation gives it as ``val_acc_epoch``."""

    class Forked(Measured):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log(
                "val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), on_step=True, on_epoch=True
            )

    of = "/dataloader_idx_1" if loaders == 2 else ""
    callback = ExportCallback(tmp_path / "m.onnx", metric=f"{asked}{of}", tolerance=1e-4)
    logger = CSVLogger(tmp_path)
    fitting = trainer(callback, logger=logger, num_sanity_val_steps=1)
    fitting.fit(made(Forked), loader(), [loader() for _ in range(loaders)])
    assert callback.failure is None
    assert set(callback.file_metrics) == {
        f"val_acc_epoch/dataloader_idx_{index}" if of else "val_acc_epoch" for index in range(loaders)
    }
    [value] = {row[key] for row in rows_logged(logger) if row.get(key := f"compress/export/{asked}{of}")}
    assert float(value) == pytest.approx(callback.file_metrics[f"val_acc_epoch{of}"])


@pytest.mark.sample
@pytest.mark.parametrize("loaders", [[], [DataLoader([])]])
def test_a_module_whose_validation_has_no_batch_has_no_validation(loaders, tmp_path):
    callback, report = ExportCallback(tmp_path / "m.onnx"), CompressionReport(path=tmp_path / "report", latency=False)
    trainer(callback, report).fit(made(Measured), loader(), loaders)
    assert callback.failure is None
    assert callback.result.bytes > 0
    assert (dict(callback.file_metrics), report.result.rows[0].metrics) == ({}, {})
    module = made(Measured)
    with pytest.raises(ValueError, match=r"metric='val_loss' is measured in validation, and Measured has none here"):
        trainer(ExportCallback(tmp_path / "n.onnx", metric="val_loss")).fit(module, loader(), loaders)
    assert difference(module, made(Measured)) == 0
    assert not (tmp_path / "n.onnx").exists()
    later = ExportCallback(tmp_path / "n.onnx", metric="val_loss")  # known when the second epoch is over
    with pytest.warns(UserWarning, match="validation data of at least one batch"):
        trainer(later, max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0).fit(module, loader(), loaders)
    assert "is measured in validation, and Measured has none here" in later.failure


@pytest.mark.sample
@pytest.mark.parametrize("kind", [ExportCallback, CompressionReport])
def test_a_validation_without_a_fit_writes_nothing_and_says_so(tmp_path, kind):
    callback = kind(path=tmp_path / "here.onnx")
    module, run = made(Classifier), trainer(callback)
    with pytest.warns(UserWarning, match=r"acts in a fit: (no file is written|nothing is measured) here"):
        run.validate(module, loader())
    assert callback.result is None
    assert not list(tmp_path.iterdir())
    run.fit(module, loader(), loader())
    run.validate(module, loader())  # of what the fit has left: no warning of ours


@pytest.mark.slow
def test_a_fit_that_was_resumed_at_its_end_has_a_file(tmp_path):
    """No step is run, so the network's input is that of a step which leaves no trace."""
    module = made(Measured)
    first = trainer(max_epochs=1)
    first.fit(module, loader(), loader())
    first.save_checkpoint(tmp_path / "end.ckpt")
    callback, again = ExportCallback(tmp_path / "m.onnx"), made(Measured)
    resumed = trainer(callback, max_epochs=1)
    resumed.fit(again, loader(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert resumed.global_step == first.global_step
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())
    assert (callback.result.network, callback.result.checked_batch_sizes[0]) == ("model", 8)
    assert callback.file_metrics["val_loss"] == pytest.approx(callback.module_metrics["val_loss"], abs=1e-5)


@pytest.mark.parametrize("example", [False, True])
def test_a_module_that_the_step_does_not_call_needs_a_sample(example, tmp_path):
    module, path = made(NormClassifier), tmp_path / "m.onnx"  # its step calls its part
    ending = "; give sample="
    if example:
        module.example_input_array = torch.zeros(1, FEATURES)
        ending += ", as within a fit example_input_array does not count"
    message = f"the first training step never called the module itself{ending}$"
    with pytest.raises(CaptureError, match=message):
        trainer(ExportCallback(path, network="")).fit(module, loader())
    assert not path.exists()


@pytest.mark.sample
def test_what_cannot_be_exported_stops_at_the_first_batch(tmp_path):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    module = made(Measured)
    module.model = Branching(8, 3)
    fitting = trainer(ExportCallback(tmp_path / "m.onnx"))
    with pytest.raises(export.ExportError, match=r"data-dependent branch at .*test_export.py:\d+"):
        fitting.fit(module, loader())
    assert fitting.global_step == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 3}, TypeError, "path must be a string or a path, got 3"),
        ({"precision": "fp16"}, ValueError, "precision must be one of"),
        ({"precision": "int9"}, ValueError, "did you mean 'int8'"),
        ({"metric": "a", "tolerance": -1}, ValueError, "tolerance must be a number of at least 0, got -1"),
        ({"metric": "a", "tolerance": float("nan")}, ValueError, "tolerance must be a number of at least 0, got nan"),
        ({"tolerance": 0.1}, ValueError, "metric is not given"),
        ({"sample": np.ones(3)}, TypeError, "sample must be a tensor"),
    ],
)
def test_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        ExportCallback(**{"path": tmp_path / "m.onnx", **arguments})


def test_refused_before_training(tmp_path):
    for callback, error, message in [
        (ExportCallback(tmp_path / "m.txt"), ValueError, "must end in '.onnx'"),
        (
            ExportCallback(tmp_path / "m.onnx", network="modle"),
            ValueError,
            "names 'modle'.*did you mean 'model'",
        ),
        (
            ExportCallback(tmp_path / "m.onnx", metric="val_loss"),
            ValueError,
            "needs a validation_step",
        ),
    ]:
        fitting = trainer(callback)
        with pytest.raises(error, match=message):
            fitting.fit(made(Measured), loader())
        assert fitting.global_step == 0


@pytest.mark.sample
def test_a_metric_that_is_not_logged_stops_before_training_and_only_warns_later(tmp_path):
    fitting = trainer(ExportCallback(tmp_path / "m.onnx", metric="val_los"), num_sanity_val_steps=1)
    with pytest.raises(ValueError, match="did you mean 'val_loss'"):
        fitting.fit(made(Measured), loader(), loader())
    assert fitting.global_step == 0
    callback = ExportCallback(tmp_path / "m.onnx", metric="val_los")
    with pytest.warns(UserWarning, match="metric='val_los' is not"):
        trainer(callback, num_sanity_val_steps=0).fit(made(Measured), loader(), loader())
    assert "did you mean 'val_loss'" in callback.failure
    assert (tmp_path / "m.onnx").is_file()


@pytest.mark.sample
def test_a_metric_of_the_second_loader_is_known_in_the_sanity_check(tmp_path):
    class TwoLoaders(Measured):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.log("own", 1.0)

    def exported(metric):
        callback = ExportCallback(tmp_path / "m.onnx", metric=metric)
        trainer(callback, num_sanity_val_steps=1).fit(made(TwoLoaders), loader(), [loader(), loader()])
        return callback.file_metrics

    assert "val_loss/dataloader_idx_1" in exported("val_loss/dataloader_idx_1")
    with pytest.raises(ValueError, match=r"which logs \['own', .*dataloader_idx_0.*num_sanity_val_steps=0"):
        exported("val_loss/dataloader_idx_2")


@pytest.mark.sample
def test_a_validation_that_fails_outside_of_the_fit_is_a_failure_and_no_exception(tmp_path):
    class Picky(Measured):
        def validation_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("x", 1.0)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    callback = ExportCallback(tmp_path / "m.onnx")
    from lightning.pytorch.loggers import TensorBoardLogger

    with pytest.warns(UserWarning, match="the validation through .* failed: IndexError"):
        trainer(callback, logger=TensorBoardLogger(tmp_path / "logs")).fit(made(Picky), loader(), loader())
    assert callback.result is not None
    assert "IndexError" in callback.failure


@pytest.mark.sample
def test_fast_dev_run_keeps_the_file_that_was_there(tmp_path, caplog):
    (tmp_path / "m.onnx").write_text("trained for a week")
    callback = ExportCallback(tmp_path / "m.onnx", metric="val_loss", tolerance=1e-4)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        trainer(callback, CompressionReport(latency=False), fast_dev_run=True).fit(made(Measured), loader(), loader())
    assert (tmp_path / "m.onnx").read_text() == "trained for a week"
    assert callback.file_metrics["val_loss"] == pytest.approx(callback.module_metrics["val_loss"], abs=1e-5)
    assert not callback.result.path.exists()
    assert "checked and not kept" in caplog.text


@pytest.mark.sample
def test_the_validation_data_are_those_of_the_fit(tmp_path):
    class Split(L.LightningDataModule):
        torn_down = 0

        def setup(self, stage):
            self.train, self.val = random_split(loader(rows=64).dataset, [32, 32])

        def train_dataloader(self):
            return DataLoader(self.train, 8)

        def val_dataloader(self):
            return DataLoader(self.val, 8)

        def teardown(self, stage):
            self.torn_down += 1

    data, callback = Split(), ExportCallback(tmp_path / "m.onnx")
    fitting = trainer(callback)
    module = made(Measured)
    fitting.fit(module, datamodule=data)
    assert callback.module_metrics["val_loss"] == pytest.approx(fitting.callback_metrics["val_loss"].item(), abs=1e-6)
    assert data.torn_down == 1
    assert data.trainer is fitting


@pytest.mark.sample
def test_numbers_in_the_output_follow_the_batch(tmp_path):
    class Counting(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "rows": len(x)}

    class Lit(Measured):
        def __init__(self):
            super().__init__()
            self.model = Counting(8, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0])["logits"], batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("rows", float(self.model(batch[0])["rows"]), batch_size=1)

    callback = ExportCallback(tmp_path / "m.onnx")
    trainer(callback).fit(made(Lit), loader(), loader(rows=20))
    assert callback.file_metrics["rows"] == callback.module_metrics["rows"] == pytest.approx(20 / 3)


class Worsens(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("known", 0.9 - 0.1 * self.current_epoch)


@pytest.mark.sample
@pytest.mark.parametrize(("mode", "better"), [("max", True), ("min", False)])
def test_a_better_checkpoint_than_the_end_is_named(mode, better, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="known", mode=mode, filename="{epoch}")
    callback = ExportCallback(tmp_path / "m.onnx")
    trainer(callback, saver, max_epochs=2, enable_checkpointing=True).fit(made(Worsens), loader(), loader())
    said = (
        "export: the file has the weights of the end; by known epoch=0.ckpt is better, 0.9 against 0.8: "
        "`lightning-compress export` writes a file of it."
    )
    assert (said in callback.remarks()) == better
    assert "weights of the end" in " ".join(callback.remarks()) or not better


def test_a_checkpoint_of_another_folder_is_not_compared(tmp_path):
    """Lightning resumes its path without its score."""
    saver = ModelCheckpoint(tmp_path, monitor="known", mode="max")
    saver.best_model_path = str(tmp_path / "before.ckpt")
    fitting = trainer(saver, enable_checkpointing=True)
    fitting.callback_metrics["known"] = torch.tensor(0.5)
    assert _better_checkpoint(fitting) is None


def test_a_callback_at_work_is_refused_in_a_second_trainer():
    callback = DistillationCallback(nn.Linear(8, 3))

    class Nested(L.Callback):
        def on_train_start(self, trainer_, module):
            trainer(callback).fit(made(Classifier), loader())

    with pytest.raises(RuntimeError, match="is at work in another Trainer's fit"):
        trainer(callback, Nested()).fit(made(Classifier), loader())


def test_a_frozen_backbone_is_not_left_out_silently(tmp_path):
    class TwoParts(Measured):
        def __init__(self):
            super().__init__()
            del self.model
            self.backbone = nn.Linear(8, 4).requires_grad_(False)
            self.head = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.backbone(batch[0]).relu()), batch[1])

    with pytest.raises(RuntimeError, match="calls 2 modules with parameters: 'backbone', 'head'"):
        trainer(ExportCallback(tmp_path / "m.onnx")).fit(made(TwoParts), loader())


def test_a_scripted_part_is_passed_over_and_leaves_nothing(tmp_path):
    class Scripted(Measured):
        def __init__(self):
            super().__init__()
            self.other = torch.jit.script(nn.Linear(2, 2))

    module = made(Scripted)
    trainer(DistillationCallback(nn.Linear(8, 3))).fit(module, loader())
    assert "forward" not in vars(module)
    assert not module.model._forward_hooks
    with pytest.raises(RuntimeError, match="scripted module, which takes no hooks"):
        trainer(DistillationCallback(nn.Linear(8, 3), student="other")).fit(module, loader())
    assert "training_step" not in vars(module)


def test_a_teacher_that_shares_a_layer_with_buffers_is_refused():
    shared, module = nn.BatchNorm1d(8, affine=False), made(Classifier)
    module.model = nn.Sequential(shared, nn.Linear(8, 3))
    with pytest.raises(ValueError, match="shares buffers with Classifier"):
        trainer(DistillationCallback(nn.Sequential(shared, nn.Linear(8, 3)))).fit(module, loader())
    assert shared.training


@pytest.mark.parametrize("shared", [nn.ReLU(), nn.Dropout(), nn.Sequential(nn.Dropout())])
def test_a_layer_without_weights_that_teacher_and_student_share_is_in_two_modes_at_once(shared):
    """As a loss that is made in a default argument is: all instances of a class hold it."""
    module, seen = made(Classifier), []
    module.model = nn.Sequential(nn.Linear(8, 3), shared)
    teacher = nn.Sequential(nn.Linear(8, 3), shared)
    teacher.register_forward_pre_hook(lambda *_: seen.append((teacher[1] is shared, teacher[1].training)))
    shared.register_forward_pre_hook(lambda *_: seen.append((True, shared.training)))
    fitting = trainer(DistillationCallback(teacher), max_steps=1)
    fitting.fit(module, loader())
    assert (False, False) in seen
    assert (True, True) in seen
    assert teacher[1] is shared is module.model[1]
    assert "compress/kd/loss" in fitting.callback_metrics


def test_a_teachers_buffer_that_its_forward_writes_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += len(x)
            return super().forward(x)

    teacher = Counting()
    trainer(DistillationCallback(teacher)).fit(made(Classifier), loader())
    assert teacher.seen.item() == 0


def test_a_validation_of_another_form_does_not_stop_the_training():
    class Picking(Classifier):
        def validation_step(self, batch, batch_idx):
            self.model(batch[0])

    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.training else {"boxes": [1], "n": 2}

    module = made(Picking)
    module.model = Net(8, 3)
    fitting = trainer(DistillationCallback(nn.Linear(8, 3)))
    with pytest.warns(UserWarning, match="validation is not measured"):
        fitting.fit(module, loader(), loader())
    assert fitting.global_step == 8


def test_the_report_moves_no_buffer_of_a_spectrally_normed_network(tmp_path):
    module = made(Classifier)
    module.model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 3))
    seen = {}

    class Keep(L.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    trainer(CompressionReport(path=tmp_path, latency=False), Keep()).fit(module, loader())
    assert all(torch.equal(value, seen[key]) for key, value in module.state_dict().items())


@pytest.mark.sample
@pytest.mark.parametrize("report_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_network_made_of_parts_is_reported_and_exported_from_copies(tmp_path, report_first):
    class Parts(Measured):
        def __init__(self):
            super().__init__()
            del self.model
            self.encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    module, fresh = made(Parts), made(Parts)
    exporting, reporting = (
        ExportCallback(tmp_path / "m.onnx", network=""),
        CompressionReport(path=tmp_path, latency=False),
    )
    seen = {}

    class Keep(L.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    order = [reporting, exporting] if report_first else [exporting, reporting]
    trainer(*order, Keep()).fit(module, loader(), loader())
    assert all(torch.equal(value, seen[key]) for key, value in module.state_dict().items())
    before = {row.name: row for row in reporting.result.rows}["before"]
    expected = evaluate_forward(fresh, loader())["val_loss"]
    assert before.metrics["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert exporting.file_metrics["val_loss"] == pytest.approx(exporting.module_metrics["val_loss"], abs=1e-5)

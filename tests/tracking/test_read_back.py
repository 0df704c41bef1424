"""What a training leaves in Weights & Biases, TensorBoard and CSV files, read back from what they wrote."""

from __future__ import annotations

import csv
import hashlib
import json
from importlib import import_module
from types import SimpleNamespace

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.report.table import from_json
from lightning_compress.tracking.exported import weights_digest

pytestmark = pytest.mark.slow
EPOCHS, BATCHES = 4, 8


def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def module_of(package):
    class Digits(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network(4)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            output = self.net(batch[0])
            self.log("val_acc", (output.argmax(1) == batch[1]).float().mean())
            self.log("val.loss", F.cross_entropy(output, batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    return Digits()


def loaders():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    train = TensorDataset(images[: 32 * BATCHES], labels[: 32 * BATCHES])
    return DataLoader(train, batch_size=32), DataLoader(TensorDataset(images[-64:], labels[-64:]), batch_size=64)


def fit(folder, loggers, *callbacks, package=None, **settings):
    package = package or lightning.pytorch
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": EPOCHS, "log_every_n_steps": 1, "default_root_dir": folder, **quiet, **settings}
    trainer = package.Trainer(logger=loggers, callbacks=list(callbacks), **settings)
    trainer.fit(module_of(package), *loaders())
    return trainer


@pytest.fixture(scope="module", autouse=True)
def wandb_at_home(tmp_path_factory):
    """All that wandb writes is below a temporary folder, and nothing is sent, whatever other tests have set up."""
    import wandb

    wandb.teardown()
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One fit with all that is tracked, before three loggers at once."""
    from wandb_file import OfflineRun

    folder = tmp_path_factory.mktemp("run")
    (folder / "wandb_logs").mkdir()
    wandb_logger = WandbLogger(project="digits", save_dir=folder / "wandb_logs")
    loggers = [TensorBoardLogger(folder / "tensorboard"), CSVLogger(folder / "csv"), wandb_logger]
    export = lc.ExportCallback(folder / "student.onnx", precision="int8", metric="val_acc", fp32_comparison=False)
    report = lc.CompressionReport(latency=False)
    report.recipe = {"version": 1, "callbacks": []}
    kept = ModelCheckpoint(folder / "kept", save_last=True)
    dcil = lc.DCILCallback(0.8, update_interval=4)
    teachers = [
        lc.DistillationCallback(network(8)),
        lc.AttentionTransferCallback("kd", pairs={"1": "1"}, weight=1.0, pictures_every_n_epochs=2),
    ]
    stopping = EarlyStopping("val.loss", mode="min", patience=EPOCHS)
    trainer = fit(folder, loggers, *teachers, dcil, lc.PTQCallback(), export, report, kept, stopping)
    wandb_logger.experiment.finish()
    read = OfflineRun(folder / "wandb_logs")
    return SimpleNamespace(
        folder=folder, wandb=read, export=export, report=report, dcil=dcil, kept=kept, trainer=trainer, loggers=loggers
    )


def test_what_is_ours_is_defined_and_what_is_not_stays_as_it_is(run):
    metrics = run.wandb.metrics
    assert metrics["compress/*"].step_metric == "trainer/global_step"
    assert metrics["compress/*"].options.step_sync
    assert "val_acc" not in metrics
    accuracies, losses = run.wandb.series("val_acc"), run.wandb.series("val.loss")
    assert run.wandb.summary["val_acc"] == accuracies[-1]
    anew = EPOCHS * 3 // 4 - 1  # the validation right after the final sparsity is reached
    begins = [0 if end < anew else anew for end in range(EPOCHS)]
    best = [max(accuracies[begin : end + 1]) for end, begin in enumerate(begins)]
    assert run.wandb.series("compress/best/val_acc") == best
    assert run.wandb.summary["compress/best/val.loss"] == min(losses[anew:])


def test_numbers_have_the_step_of_the_training(run):
    rows = [row for row in run.wandb.history if "compress/kd/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(EPOCHS * BATCHES))
    assert run.wandb.series("compress/dcil/sparsity")[-1] == pytest.approx(run.dcil.reached)
    assert run.wandb.series("compress/ptq/val_acc") == [run.export.module_metrics["val_acc"]]
    assert run.wandb.series("compress/export/val_acc") == [run.export.file_metrics["val_acc"]]
    assert run.wandb.series("compress/export/bytes") == [run.export.result.bytes]
    at_end = [row for row in run.wandb.history if "compress/report/after/bytes" in row]
    assert [row["trainer/global_step"] for row in at_end] == [EPOCHS * BATCHES]


def test_the_configuration_says_what_was_done_with_what(run):
    config = run.wandb.config["compress"]
    assert config["recipe"] == {"version": 1, "callbacks": []}
    assert config["versions"]["torch"] == torch.__version__
    assert list(config["callbacks"]) == ["kd", "at", "dcil", "ptq", "export", "report"]
    assert config["callbacks"]["dcil"]["class"] == "DCILCallback"
    assert list(config["plan"]) == list(config["callbacks"])
    assert config["plan"]["dcil"]["aims"]["sparsity"] == 0.8
    assert config["plan"]["dcil"]["takes"]
    assert (config["callbacks"]["dcil"]["sparsity"], config["callbacks"]["kd"]["temperature"]) == (0.8, 4.0)


def test_the_report_is_a_table(run):
    rows = run.wandb.table("compress/report")
    expected = {row.name: row for row in run.report.result.rows}
    assert [row["model"] for row in rows] == list(expected)
    for row in rows:
        assert (row["bytes"], row["parameters"]) == (expected[row["model"]].bytes, expected[row["model"]].parameters)
        assert row["val_acc"] == expected[row["model"]].metrics["val_acc"]


def test_pictures_are_those_of_the_fit(run):
    maps = run.wandb.series("compress/dcil/sparsity_map")
    assert len(maps) == len(run.wandb.series("compress/dcil/churn_map")) == EPOCHS
    assert len(run.wandb.series("compress/at/attention")) == 2
    last = imread(run.wandb.path.parent / "files" / maps[-1]["filenames"][0])[:, :, :3]
    [logs] = (run.folder / "csv").rglob("compress")
    assert np.array_equal(last, imread(logs / "dcil/sparsity_map.png")[:, :, :3])
    assert last.std() > 0.1


def test_the_file_is_an_artifact(run):
    artifact = run.wandb.artifacts["student-int8"]
    metadata = json.loads(artifact.metadata)
    path = run.folder / "student.onnx"
    assert (artifact.type, list(artifact.aliases), artifact.use_after_commit) == ("model", ["latest"], False)
    assert [(entry.path, entry.size) for entry in artifact.manifest.contents] == [("student.onnx", path.stat().st_size)]
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata["metrics"]["val_acc"] == run.export.file_metrics["val_acc"]
    assert (metadata["precision"], metadata["step"]) == ("int8", EPOCHS * BATCHES)
    assert metadata["recipe"] == {"version": 1, "callbacks": []}
    assert metadata["weights_sha256"] == weights_digest(run.trainer.lightning_module)


def test_the_artifact_comes_from_the_checkpoint(run):
    [(name, artifact)] = [own for own in run.wandb.artifacts.items() if own[0].startswith("checkpoint-")]
    last = run.folder / "kept" / "last.ckpt"
    assert artifact.use_after_commit  # an input of the run
    assert artifact.user_created  # and not its output
    [entry] = artifact.manifest.contents
    assert (entry.ref, entry.size) == (last.as_uri(), last.stat().st_size)  # told of, not uploaded
    assert not entry.local_path
    metadata = json.loads(run.wandb.artifacts["student-int8"].metadata)
    assert metadata["checkpoint"] == {"artifact": name, "path": str(last), "step": EPOCHS * BATCHES}


def test_tensorboard_has_the_same(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run.loggers[0].log_dir, {"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    for key, count in (("dcil/sparsity_map", EPOCHS), ("dcil/churn_map", EPOCHS), ("at/attention", 2)):
        assert len(events.Images(f"compress/{key}")) == count
    assert events.Scalars("compress/report/student.onnx/bytes")[0].value == run.export.result.bytes
    texts = {
        key: events.Tensors(f"compress/{key}/text_summary")[0].tensor_proto.string_val[0].decode()
        for key in ("config", "report", "export")
    }
    assert "  dcil:\n    class: DCILCallback\n    sparsity: 0.8\n" in texts["config"]
    assert "| student.onnx |" in texts["report"]
    assert f"bytes: {run.export.result.bytes}\n" in texts["export"]


def test_csv_files_have_the_same(run):
    folder = run.loggers[1].log_dir
    [compress] = (run.folder / "csv").rglob("compress")
    assert sorted(str(path.relative_to(compress)) for path in compress.rglob("*.*")) == [
        f"at/attention-step={3 * BATCHES}.png",
        f"at/attention-step={BATCHES}.png",
        "config.yaml",
        "dcil/churn_map.png",
        "dcil/sparsity_map.png",
        "export.json",
        "report.csv",
    ]
    with (compress / "report.csv").open(newline="") as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    assert float(rows["student.onnx"]["bytes"]) == run.export.result.bytes
    known = json.loads((compress / "export.json").read_text())
    assert known["checkpoint"] == {"path": str(run.folder / "kept" / "last.ckpt"), "step": EPOCHS * BATCHES}
    with open(f"{folder}/metrics.csv") as stream:
        logged = {key: value for line in csv.DictReader(stream) for key, value in line.items() if value}
    assert float(logged["compress/report/student.onnx/val_acc"]) == run.export.file_metrics["val_acc"]


def test_the_report_beside_is_as_it_was(run):
    assert from_json(run.report.files.json.read_text()) == run.report.result


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_of_checkpoints_that_the_logger_uploads_no_second_artifact_is_made(tmp_path, namespace):
    from wandb_file import OfflineRun

    package, loggers = import_module(namespace), import_module(f"{namespace}.loggers")
    logger = loggers.WandbLogger(project="digits", save_dir=tmp_path, log_model=True, prefix="mine")
    psgd, export = lc.PSGDCallback(), lc.ExportCallback(tmp_path / "net.onnx", metric="val_acc")
    kept = import_module(f"{namespace}.callbacks").ModelCheckpoint(tmp_path / "kept")
    fit(tmp_path, logger, psgd, export, kept, package=package, max_epochs=1)
    model = f"model-{logger.experiment.id}"
    logger.experiment.finish()
    read = OfflineRun(tmp_path)
    [picture] = read.series("mine-compress/psgd/positions")
    drawn = imread(read.path.parent / "files" / picture["filenames"][0])[:, :, :3]
    assert np.array_equal(np.round(drawn * 255), psgd.picture)
    assert sorted(read.artifacts) == [model, "net-fp32"]
    metadata = json.loads(read.artifacts["net-fp32"].metadata)
    assert metadata["checkpoint"] == {"artifact": model, "path": kept.best_model_path, "step": BATCHES}
    assert read.metrics["mine-compress/*"].step_metric == "trainer/global_step"


def test_without_a_checkpoint_the_weights_are_named(tmp_path):
    from wandb_file import OfflineRun

    logger = WandbLogger(project="digits", save_dir=tmp_path)
    trainer = fit(tmp_path, logger, lc.ExportCallback(tmp_path / "net.onnx"), max_epochs=1, enable_checkpointing=False)
    logger.experiment.finish()
    artifacts = OfflineRun(tmp_path).artifacts
    assert list(artifacts) == ["net-fp32"]
    assert json.loads(artifacts["net-fp32"].metadata)["weights_sha256"] == weights_digest(trainer.lightning_module)


@pytest.mark.parametrize("quiet", [{"fast_dev_run": True}, {"barebones": True}])
def test_nothing_is_tracked_where_lightning_logs_nothing(quiet, tmp_path):
    logger = None if "barebones" in quiet else WandbLogger(project="digits", save_dir=tmp_path / "logs")
    dpf = lc.DPFCallback(0.5, start=0.0, end=0.0)
    trainer = lightning.pytorch.Trainer(**quiet, logger=logger, callbacks=[dpf], max_epochs=1, accelerator="cpu")
    trainer.fit(module_of(lightning.pytorch), *loaders())
    assert dpf.reached == pytest.approx(0.5, abs=0.01)
    assert list(tmp_path.rglob("*.*")) == []


def test_a_run_that_was_finished_too_early_is_told_of_once_and_nothing_else_is_lost(tmp_path):
    class Finishing(lightning.pytorch.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.logger.experiment.finish()

    logger = WandbLogger(project="digits", save_dir=tmp_path)
    report, export = (
        lc.CompressionReport(path=tmp_path / "report", latency=False),
        lc.ExportCallback(tmp_path / "a.onnx"),
    )
    with pytest.warns(UserWarning, match=r"WandbLogger did not take .*is finished.* The training goes on") as caught:
        trainer = fit(tmp_path, logger, Finishing(), report, export, max_epochs=1)
    assert trainer.state.finished
    assert report.files.json.is_file()
    assert export.file_metrics == report.result.rows[-1].metrics
    assert len([entry for entry in caught if "did not take" in str(entry.message)]) == 1


def test_two_files_come_from_one_checkpoint(tmp_path):
    from wandb_file import OfflineRun

    logger = WandbLogger(project="digits", save_dir=tmp_path)
    exports = [lc.ExportCallback(tmp_path / f"{name}.onnx", name=name) for name in ("one", "two")]
    fit(tmp_path, logger, *exports, max_epochs=1)
    logger.experiment.finish()
    artifacts = OfflineRun(tmp_path).artifacts
    assert [name.partition("-")[0] for name in artifacts] == ["checkpoint", "one", "two"]
    assert {json.loads(artifacts[name].metadata)["checkpoint"]["artifact"] for name in ("one-fp32", "two-fp32")} == {
        next(iter(artifacts))
    }

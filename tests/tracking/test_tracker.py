"""What goes to loggers of each kind, without a service: ranks, failures, files, and what is said of a run."""

from __future__ import annotations

import csv
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from contract.modules import Classifier, fit, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.image import imread
from torch import nn

from lightning_compress import DPFCallback, PruningCallback
from lightning_compress.tracking import Exported, Table, Tracker, checkpoint_of, goals, sink_of
from lightning_compress.tracking.exported import weights_digest

PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
TABLE = Table(["model", "bytes"], [["before", 4], ["after", None]], "| model |")


class Plain:
    """A logger of somebody else's, that takes numbers and settings."""

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((metrics, step))

    def log_hyperparams(self, params):
        self.seen.append(params)


class Rich(Plain):
    """One that has the further methods of ``WandbLogger``."""

    def log_image(self, key, images, step=None):
        self.seen.append((key, images, step))

    def log_table(self, key, columns=None, data=None, step=None):
        self.seen.append((key, columns, data, step))


class Texts(Plain):
    def log_text(self, key, columns=None, data=None, step=None):
        self.seen.append((key, columns, data))


def tracker(*loggers, rank_zero=True):
    return Tracker(SimpleNamespace(loggers=list(loggers), is_global_zero=rank_zero, global_step=7))


def everything(own):
    own.define({"val_acc": "max"})
    own.settings(lambda: {"versions": {"torch": "2"}})
    own.numbers({"compress/dcil/sparsity": 0.5})
    own.numbers({"compress/ft/reconstruction": 0.5}, step=3)
    own.picture("compress/dcil/map", PICTURE, newest=True)
    own.table("compress/report", TABLE)


def test_a_logger_gets_what_it_has_methods_for():
    plain, rich, texts = Plain(), Rich(), Texts()
    everything(tracker(plain, rich, texts))
    common = [
        {"compress": {"versions": {"torch": "2"}}},
        ({"compress/dcil/sparsity": 0.5}, 7),
        ({"compress/ft/reconstruction": 0.5}, 3),
    ]
    assert plain.seen == common
    assert rich.seen == [
        *common,
        ("compress/dcil/map", [PICTURE], 7),
        ("compress/report", ["model", "bytes"], [["before", 4], ["after", None]], 7),
    ]
    assert texts.seen == [*common, ("compress/report", ["text"], [["| model |"]])]


def test_settings_add_up():
    plain = Plain()
    own = tracker(plain)
    own.settings(lambda: {"versions": 1})
    own.settings(lambda: {"plan": 2})
    assert plain.seen[-1] == {"compress": {"versions": 1, "plan": 2}}


def test_settings_that_cannot_be_made_cost_no_training():
    plain = Plain()
    with pytest.warns(UserWarning, match="the configuration was not logged: KeyError: 'model.1.weight'"):
        tracker(plain).settings(lambda: {}["model.1.weight"])
    assert plain.seen == []


def test_the_best_of_each_metric_that_counts():
    plain = Plain()
    own = tracker(plain)
    own.validated({"val_acc": 0.5})
    own.define({"val_acc": "max", "val_loss": "min", "elsewhere": "max"})
    for accuracy, loss in ((0.5, 1.0), (0.25, 0.75), (math.nan, 2.0)):
        own.validated({"val_acc": torch.tensor(accuracy), "val_loss": loss, "other": 1.0})
    best = [{"compress/best/val_acc": 0.5, "compress/best/val_loss": loss} for loss in (1.0, 0.75, 0.75)]
    assert plain.seen == [(row, 7) for row in best]


@pytest.mark.parametrize("own", [tracker(Rich(), rank_zero=False), tracker(DummyLogger()), tracker()])
def test_nothing_is_written_on_other_ranks_and_without_loggers(own):
    everything(own)
    assert own.sinks == []
    assert not own.takes_pictures
    assert all(logger.seen == [] for logger in own.trainer.loggers if isinstance(logger, Plain))


def test_a_logger_that_fails_is_told_of_once_and_others_go_on():
    class Failing(Plain):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("the service\nis gone")

    failing, plain = Failing(), Plain()
    own = tracker(failing, plain)
    told = r"Failing did not take 'compress/dcil/sparsity': ConnectionError: the service\. The training goes on"
    with pytest.warns(UserWarning, match=told) as caught:
        everything(own)
    assert len(caught) == 1
    assert failing.seen == plain.seen[:1]
    assert len(plain.seen) == 3


def test_a_logger_whose_attributes_fail_is_told_of_once():
    class Failing(Plain):
        def __getattr__(self, name):
            raise ConnectionError(f"no {name} here")

    own = tracker(Failing(), Rich())
    with pytest.warns(UserWarning, match="Failing did not take pictures: ConnectionError: no log_image here") as caught:
        takes = own.takes_pictures
    everything(own)  # with warnings as errors
    assert takes
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("bases", "kind"),
    [
        (["WandbLogger"], "WandbSink"),
        (["Mine", "TensorBoardLogger", "Logger"], "TensorBoardSink"),
        (["CSVLogger"], "CSVSink"),
        (["Logger"], "Sink"),
    ],
)
def test_a_kind_is_known_by_the_name_of_a_base(bases, kind):
    cls = object
    for name in reversed(bases):
        cls = type(name, (cls,), {})
    assert type(sink_of(cls())).__name__ == kind


def test_files_beside_a_csv_file(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    own = tracker(logger)
    everything(own)
    own.picture("compress/at/attention", PICTURE)
    own.save()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "compress/at/attention-step=7.png",
        "compress/config.yaml",
        "compress/dcil/map.png",
        "compress/report.csv",
        "metrics.csv",
    ]
    assert np.array_equal(np.round(imread(tmp_path / "compress/dcil/map.png")[:, :, :3] * 255), PICTURE)
    assert yaml.safe_load((tmp_path / "compress/config.yaml").read_text()) == {"versions": {"torch": "2"}}
    with (tmp_path / "compress/report.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [["model", "bytes"], ["before", "4"], ["after", ""]]


def test_a_fit_with_masks_leaves_maps_and_settings(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    dpf = DPFCallback(0.5, update_interval=2)
    fit(Classifier, dpf, logger=logger)
    folder = tmp_path / "compress"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "config.yaml",
        "dpf/churn_map.png",
        "dpf/sparsity_map.png",
    ]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    own = settings["callbacks"]["dpf"]
    assert (own["class"], own["sparsity"], own["update_interval"]) == ("DPFCallback", 0.5, 2)
    assert settings["versions"]["torch"] == torch.__version__
    assert dpf._tracker is None  # the callback does not hold on to the Trainer


def test_the_callbacks_of_a_fit_share_what_tells():
    first, second = DPFCallback(0.5), PruningCallback(0.5)
    run = trainer(first, second)
    assert first.tracker(run) is second.tracker(run) is first.tracker(run)
    assert first.tracker(trainer(first)) is not second.tracker(run)


def test_a_callback_that_knows_its_mode_is_believed():
    callbacks = [
        SimpleNamespace(metric="val_loss"),
        SimpleNamespace(monitor="val_loss", mode="max"),
        SimpleNamespace(monitor=None, mode="min"),
        SimpleNamespace(monitor="lr"),
        SimpleNamespace(metric=lambda: 0),
    ]
    assert goals(callbacks) == {"val_loss": "max"}


def test_the_newest_checkpoint_that_exists_is_taken(tmp_path):
    names = ["best.ckpt", "k.ckpt", "last.ckpt"]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    best, k, last = (str(tmp_path / name) for name in names)
    kept = SimpleNamespace(best_model_path=best, last_model_path=str(tmp_path / "gone.ckpt"), best_k_models={k: 1.0})
    assert checkpoint_of(SimpleNamespace(checkpoint_callbacks=[kept])).name == "k.ckpt"
    kept.last_model_path = last
    assert checkpoint_of(SimpleNamespace(checkpoint_callbacks=[SimpleNamespace(), kept])).name == "last.ckpt"
    nothing = SimpleNamespace(best_model_path="", last_model_path="", best_k_models={})
    assert checkpoint_of(SimpleNamespace(checkpoint_callbacks=[nothing])) is None


def test_a_digest_is_of_values_shapes_and_names():
    layers = [nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(1, 2), nn.Linear(2, 1).bfloat16()]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    nn.init.ones_(layers[1].bias)
    assert len({weights_digest(layer) for layer in layers}) == 4
    assert weights_digest(layers[0]) == weights_digest(nn.Linear(2, 1).requires_grad_(False).apply(zeroed))


@torch.no_grad()
def zeroed(layer):
    for parameter in layer.parameters():
        parameter.zero_()


@pytest.mark.parametrize(("steps", "key"), [(4, "checkpoint"), (16, "nearest_checkpoint"), (None, "checkpoint")])
def test_a_file_comes_from_a_checkpoint_of_as_many_steps(tmp_path, steps, key):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"abc")
    torch.save({"global_step": 4, "state_dict": {"weight": torch.zeros(2)}}, tmp_path / "step=4.ckpt")
    result = SimpleNamespace(path=path, bytes=3, precision="fp32", max_logit_difference=0.0)
    exported = Exported(result, checkpoint=tmp_path / "step=4.ckpt", trained_steps=steps)
    assert exported.metadata[key] == {"path": str(tmp_path / "step=4.ckpt"), "step": 4}
    assert len({"checkpoint", "nearest_checkpoint"} & set(exported.metadata)) == 1
    assert (exported.source is None) == (key == "nearest_checkpoint")


def test_a_folder_that_is_elsewhere_is_told_of():
    class CSVLogger(Plain):
        log_dir = "memory://runs"

    with pytest.warns(UserWarning, match="files on this machine, and its folder is memory://runs"):
        tracker(CSVLogger()).table("compress/report", TABLE)


def test_json_is_what_a_csv_logger_keeps_of_a_file(tmp_path):
    path = tmp_path / "my model.onnx"
    path.write_bytes(b"abc")
    result = SimpleNamespace(path=path, bytes=3, precision="int8", max_logit_difference=0.5)
    layer = nn.Linear(2, 1)
    exported = Exported(result, metrics={"val_acc": 0.9}, module=layer, failure="too far")
    assert exported.name == "my_model-int8"
    tracker(CSVLogger(tmp_path, name="logs", version="")).exported(exported)
    known = json.loads((tmp_path / "logs/compress/export.json").read_text())
    assert known.pop("lightning_compress")
    assert known == {
        "file": "my model.onnx",
        "precision": "int8",
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "max_logit_difference": 0.5,
        "metrics": {"val_acc": 0.9},
        "weights_sha256": weights_digest(layer),
        "failure": "too far",
        "step": 7,
    }


def test_the_best_of_another_network_is_forgotten():
    logger = Plain()
    own = tracker(logger)
    own.define({"acc": "max"})
    old, new = torch.tensor(0.5), torch.tensor(0.6)
    for value in (torch.tensor(0.9), old):
        own.validated({"acc": value})
    own.forget({"acc": old})
    own.validated({"acc": old})  # of the training, say, whose epoch is not over
    own.validated({"acc": new})
    assert [metrics["compress/best/acc"] for metrics, _ in logger.seen if "compress/best/acc" in metrics] == [
        pytest.approx(own) for own in (0.9, 0.9, 0.6)
    ]

from __future__ import annotations

import csv
import gc
import importlib
import logging
import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionReport, DistillationCallback, ExportCallback, PTQCallback
from lightning_compress.callbacks.base import CompressionCallback, announce
from lightning_compress.report import from_json, to_html
from lightning_compress.report.pictures import report_picture

torch.set_num_threads(1)


def make_module(pl, *, validates=True, width=4):
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return nn.functional.cross_entropy(self.net(inputs), target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

        def train_dataloader(self):
            return loader()

    if validates:

        def validation_step(self, batch, batch_idx):
            inputs, target = batch
            logits = self.net(inputs)
            self.log("val_loss", nn.functional.cross_entropy(logits, target))
            self.log("val_acc", (logits.argmax(1) == target).float().mean())

        Lit.validation_step = validation_step
        Lit.val_dataloader = lambda self: loader()
    return Lit()


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8)


def teacher(width=16):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def make_trainer(pl, folder, callbacks, **arguments):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(callbacks=callbacks, **{**settings, **arguments})


@pytest.fixture(scope="module", params=["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def pl(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def lightning():
    return importlib.import_module("lightning.pytorch")


def collect(worker):
    gc.collect()


@pytest.mark.slow
def test_workers_of_a_loader_that_collect_garbage_end(pl, tmp_path):
    """What ran a file holds threads of this process; a worker must not wait for them."""
    report, quantising = CompressionReport(), PTQCallback(max_samples=16)
    exports = [ExportCallback(tmp_path / f"{own}.onnx", precision=own, name=own) for own in ("fp32", "int8")]
    module = make_module(pl)
    data = loader().dataset
    module.train_dataloader = module.val_dataloader = lambda: DataLoader(
        data, batch_size=8, num_workers=2, worker_init_fn=collect, timeout=60
    )
    make_trainer(pl, tmp_path, [quantising, *exports, report]).fit(module)
    rows = {row.name: row for row in report.result.rows}
    assert "val_acc" in rows["fp32.onnx"].metrics
    assert "val_acc" in rows["int8.onnx"].metrics


def test_all_rows_in_print_loggers_and_files(pl, tmp_path, capsys):
    report, kd = CompressionReport(), DistillationCallback(teacher())
    export = ExportCallback(tmp_path / "model.onnx")
    module = make_module(pl)
    csv_logger = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger(tmp_path / "logs")
    trainer = make_trainer(pl, tmp_path, [report, kd, export], logger=csv_logger)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.fit(module)

    rows = {row.name: row for row in report.result.rows}
    assert list(rows) == ["teacher", "before", "after", "model.onnx"]
    assert rows["teacher"].latency_ms.ratio == 1  # all others are compared with it
    assert rows["before"].parameters == rows["after"].parameters == sum(tensor.numel() for tensor in before)
    assert rows["before"].macs == 4 * 4 + 4 * 3
    assert rows["teacher"].macs == 4 * 16 + 16 * 3
    assert rows["after"].metrics == trainer.validate(module, verbose=False)[0]
    assert rows["before"].metrics["val_loss"] == pytest.approx(mean_loss(make_module(pl).net.eval()), rel=1e-5)
    assert rows["teacher"].metrics["val_loss"] == pytest.approx(mean_loss(kd.teacher), rel=1e-5)
    assert rows["model.onnx"].metrics == pytest.approx(rows["after"].metrics, rel=1e-5)
    assert {row.latency_ms.runtime for row in rows.values()} == {"torch", "onnxruntime"}
    assert [layer.name for layer in report.result.layers] == ["net.0", "net.3"]
    assert "Parameters, bytes and times are those of 'net' inside Lit." in report.result.notes
    assert "The metrics are of 32 samples of the validation." in report.result.notes

    printed = capsys.readouterr().out
    assert printed.count("Compression report") == 1
    assert "The same as a page: " in printed
    assert re.search(r"val_acc +\S+ +\S+ +\S+ +\S+\n", printed)
    assert report.files.json.parent == tmp_path / "logs" / "lightning_logs" / "version_0"
    assert from_json(report.files.json.read_text(encoding="utf-8")) == report.result
    assert report.files.html.is_file()
    assert "| model.onnx |" in report.files.markdown.read_text(encoding="utf-8")
    with open(report.files.json.parent / "metrics.csv", encoding="utf-8") as stream:
        logged = {key: value for line in csv.DictReader(stream) for key, value in line.items() if value}
    assert float(logged["compress/report/after/bytes"]) == rows["after"].bytes
    assert float(logged["compress/report/model.onnx/latency_ms"]) == rows["model.onnx"].latency_ms.median


def mean_loss(network):
    with torch.no_grad():
        return sum(nn.functional.cross_entropy(network(inputs), target).item() for inputs, target in loader()) / 4


def test_the_training_is_what_it_was_without_the_report(lightning, tmp_path):
    weights = []
    for callbacks in ([], [CompressionReport(latency=False, path=tmp_path)]):
        module = make_module(lightning)
        torch.manual_seed(3)
        make_trainer(lightning, tmp_path, callbacks).fit(module)
        weights.append([*module.state_dict().values(), torch.rand(3)])
        assert set(vars(module.net)) == set(vars(nn.Sequential()))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_before_is_the_start_of_each_fit(lightning, tmp_path):
    report = CompressionReport(latency=False)
    trainer, module = make_trainer(lightning, tmp_path, [report]), make_module(lightning)
    trainer.fit(module)
    first = {row.name: row.metrics for row in report.result.rows}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    second = {row.name: row.metrics for row in report.result.rows}
    assert second["before"] == first["after"]
    assert second["after"] != first["after"]
    assert report._before is None


def test_a_teacher_that_answers_otherwise_has_a_note(lightning, tmp_path):
    class Answer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher()

        def forward(self, inputs):
            return {"logits": self.inner(inputs)}

    report = CompressionReport(latency=False, path=tmp_path)
    make_trainer(lightning, tmp_path, [DistillationCallback(Answer()), report]).fit(make_module(lightning))
    row = next(row for row in report.result.rows if row.name == "teacher")
    assert row.metrics == {}
    assert row.macs == 4 * 16 + 16 * 3
    assert any(note.startswith("The metrics of teacher were not measured: ") for note in report.result.notes)


@pytest.mark.sample
def test_a_teacher_is_measured_with_its_transform(lightning, tmp_path):
    class Double(nn.Module):
        def forward(self, inputs):
            return torch.cat([inputs, inputs], dim=1)

    torch.manual_seed(4)
    wide = nn.Linear(8, 3)
    report = CompressionReport(path=tmp_path)
    callback = DistillationCallback(wide, teacher_transform=Double())
    make_trainer(lightning, tmp_path, [report, callback]).fit(make_module(lightning))
    row = next(row for row in report.result.rows if row.name == "teacher")
    assert (row.parameters, row.macs) == (27, 24)
    assert row.metrics["val_loss"] == pytest.approx(mean_loss(nn.Sequential(Double(), wide)), rel=1e-5)
    assert row.latency_ms.ratio > 0


def test_without_validation_the_metrics_are_empty(lightning, tmp_path):
    report = CompressionReport(latency=False, path=tmp_path / "out")
    make_trainer(lightning, tmp_path, [report]).fit(make_module(lightning, validates=False))
    assert [row.metrics for row in report.result.rows] == [{}, {}]
    assert "There are no metrics: Lit has no validation here." in report.result.notes
    assert all(row.latency_ms is None for row in report.result.rows)
    assert report.files.json == tmp_path / "out" / "compression_report.json"


@pytest.mark.parametrize("name", [None, "mine"])
def test_without_a_logger_the_files_have_a_folder_of_their_own(lightning, tmp_path, name):
    report = CompressionReport(latency=False, name=name)
    make_trainer(lightning, tmp_path, [report]).fit(make_module(lightning, validates=False))
    stem = "compression_report" if name is None else "compression_report_mine"
    assert sorted(path.name for path in (tmp_path / "compression_report").iterdir()) == [
        f"{stem}.html",
        f"{stem}.json",
        f"{stem}.md",
    ]


class Service:
    """A logger whose ``save_dir`` holds all runs, as that of Weights & Biases does."""

    def __new__(cls, pl, **settings):
        base = importlib.import_module(f"{pl.__name__}.loggers.logger").Logger
        methods = {"log_metrics": lambda *_, **__: None, "log_hyperparams": lambda *_, **__: None}
        return type("Service", (base,), {**methods, **settings})()


@pytest.mark.parametrize(("saves", "versions"), [(True, ["a1", "b2"]), (False, [0, 1])])
def test_runs_that_share_a_folder_each_have_a_report(pl, tmp_path, saves, versions):
    found = []
    for version in versions:
        logger = Service(pl, save_dir=str(tmp_path / "all") if saves else None, name="net", version=version)
        report = CompressionReport(latency=False)
        make_trainer(pl, tmp_path, [report], logger=logger).fit(make_module(pl, validates=False))
        found.append(report.files.json.parent.relative_to(tmp_path).as_posix())
    assert found == (["all/net/a1", "all/net/b2"] if saves else ["net/version_0", "net/version_1"])


def test_fast_dev_run_prints_and_writes_nothing(lightning, tmp_path, capsys, caplog):
    report = CompressionReport(latency=False)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        make_trainer(lightning, tmp_path, [report], fast_dev_run=True).fit(make_module(lightning))
    assert list(tmp_path.iterdir()) == []
    assert report.files is None
    assert "Compression report" in capsys.readouterr().out
    assert "report: fast_dev_run, so no file is written" in caplog.messages


def test_tensorboard_gets_the_markdown(lightning, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = importlib.import_module("lightning.pytorch.loggers").TensorBoardLogger(tmp_path)
    report = CompressionReport(latency=False)
    make_trainer(lightning, tmp_path, [report], logger=logger).fit(make_module(lightning))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    [text] = events.Tensors("compress/report/text_summary")
    assert b"| after |" in text.tensor_proto.string_val[0]
    assert events.Scalars("compress/report/after/parameters")[0].value == report.result.rows[1].parameters
    assert report.files.json.parent == type(tmp_path)(logger.log_dir)


def test_a_resumed_fit_says_what_before_is(lightning, tmp_path):
    module, first = make_module(lightning, validates=False), make_trainer(lightning, tmp_path, [])
    first.fit(module)
    checkpoint = tmp_path / "last.ckpt"
    first.save_checkpoint(checkpoint)
    report = CompressionReport(latency=False)
    trainer = make_trainer(lightning, tmp_path, [report], max_epochs=2)
    trainer.fit(make_module(lightning, validates=False), ckpt_path=str(checkpoint), weights_only=True)
    assert report.result.notes[0] == f"The fit was resumed from {checkpoint}: before is the module as it was there."


def test_an_exception_drops_the_copy(lightning, tmp_path):
    report, module = CompressionReport(), make_module(lightning)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_trainer(lightning, tmp_path, [report]).fit(module)
    assert report._before is None
    assert report.result is None


def test_a_module_that_cannot_be_copied_is_reported_without_before(lightning, tmp_path):
    class Stubborn:
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    module = make_module(lightning)
    module.stubborn = Stubborn()
    report = CompressionReport(path=tmp_path)
    with pytest.warns(UserWarning, match="will have no row 'before': .*'stubborn'.*no copies"):
        make_trainer(lightning, tmp_path, [report]).fit(module)
    [row] = report.result.rows
    assert (row.name, row.macs) == ("after", 28)
    assert set(row.metrics) == {"val_loss", "val_acc"}


def test_a_network_that_cannot_be_told_is_noted(lightning, tmp_path):
    module = make_module(lightning)
    first, last = module.net[:3], module.net[3]
    del module.net
    module.first, module.last = first, last
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(last(first(batch[0])), batch[1])
    module.validation_step = lambda batch, batch_idx: module.log("val_sum", last(first(batch[0])).sum())
    report = CompressionReport(path=tmp_path)
    make_trainer(lightning, tmp_path, [report], num_sanity_val_steps=0).fit(module)
    assert any("the step calls 2 modules with parameters: 'first', 'last'" in note for note in report.result.notes)
    assert report.result.rows[0].macs is None
    assert report.result.rows[0].parameters == 43


def test_a_folder_that_cannot_be_written_is_refused_before_training(lightning, tmp_path):
    report = CompressionReport(path=tmp_path / "folder" / "deep", latency=False)
    (tmp_path / "folder").write_text("a file")
    module = make_module(lightning, validates=False)
    trainer = make_trainer(lightning, tmp_path, [report])
    with pytest.raises(ValueError, match=r"deep' cannot be made because '.*folder' is not a directory"):
        trainer.fit(module)
    assert trainer.global_step == 0


def test_a_folder_that_cannot_be_written_any_more_is_a_warning(lightning, tmp_path, capsys):
    blocked = tmp_path / "folder"
    report = CompressionReport(path=blocked, latency=False)
    module = make_module(lightning, validates=False)
    module.on_train_end = lambda: blocked.write_text("a file")
    with pytest.warns(UserWarning, match="the report could not be written to"):
        make_trainer(lightning, tmp_path, [report]).fit(module)
    assert "Compression report" in capsys.readouterr().out
    assert report.files is None


def test_a_terminal_without_the_characters(monkeypatch):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    announce("a\u65e5b\n")
    stream.flush()
    assert stream.buffer.getvalue() == b"\na?b\n"


def test_bad_paths(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"path must be a directory, and '.*file' is a file"):
        CompressionReport(path=tmp_path / "file")
    with pytest.raises(ValueError, match="path must be a local directory, got 's3://bucket/runs'"):
        CompressionReport(path="s3://bucket/runs")
    with pytest.raises(TypeError, match="path must be a string or a path, got 5"):
        CompressionReport(path=5)
    with pytest.raises(ValueError, match="path must not be empty or hold a NUL character"):
        CompressionReport(path="a\0b")


def test_relative_paths_are_taken_from_where_the_callback_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CompressionReport(path="out").path == str(tmp_path / "out")


@pytest.mark.sample
def test_pictures_and_the_command_are_in_the_files(lightning, tmp_path):
    class Drawing(CompressionCallback):
        def pictures(self):
            return [report_picture("drawn", "In grey.", np.full((2, 3, 3), 128, dtype=np.uint8))]

    class Broken(CompressionCallback):
        def pictures(self):
            raise ValueError("no canvas")

    report = CompressionReport(path=tmp_path, latency=False)
    report.command = "lightning-compress run recipe.yaml -- python train.py"
    make_trainer(lightning, tmp_path, [report, Drawing(), Broken(name="broken")]).fit(make_module(lightning))
    kept = from_json((tmp_path / "compression_report.json").read_text(encoding="utf-8"))
    assert [picture.title for picture in kept.pictures] == ["drawn"]
    assert kept == report.result
    assert "broken: its pictures were not drawn: ValueError: no canvas." in kept.notes
    assert kept.command == report.command
    page = report.files.html.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert to_html(kept) == page


@pytest.mark.sample
def test_each_part_of_the_end_of_fit_gives_a_sign(lightning, tmp_path, monkeypatch):
    @contextmanager
    def recorded(trainer, what, total=0):
        shown[what] = [total, 0]
        yield lambda: shown[what].__setitem__(1, shown[what][1] + 1)

    shown = {}
    monkeypatch.setattr(importlib.import_module("lightning_compress.export.evaluate"), "is_shown", lambda trainer: True)
    for module in ("callbacks.report", "callbacks.export", "export.evaluate"):
        monkeypatch.setattr(importlib.import_module(f"lightning_compress.{module}"), "sign", recorded)
    callbacks = [CompressionReport(path=tmp_path), ExportCallback(tmp_path / "model.onnx")]
    make_trainer(lightning, tmp_path, callbacks, max_steps=1).fit(make_module(lightning))
    assert shown == {
        "Trying to export model.onnx": [0, 0],
        "Exporting model.onnx": [0, 0],
        "Validating the network": [4, 4],
        "Validating model.onnx": [4, 4],
        "Measuring sizes and times": [0, 0],
    }


@pytest.mark.sample
def test_files_of_other_parts_are_compared_with_nothing(lightning, tmp_path):
    """A head is not smaller than the network that it is the head of."""
    parts = [
        ExportCallback(tmp_path / f"{name}.onnx", network=network, name=name)
        for name, network in (("whole", "net"), ("head", "net.3"), ("norm", "net.1"))
    ]
    report = CompressionReport(path=tmp_path)
    make_trainer(lightning, tmp_path, [*parts, report]).fit(make_module(lightning))
    assert [row.name for row in report.result.rows] == ["before", "after", "whole.onnx"]
    assert report.result.rows[2].latency_ms is not None
    assert [file.path for file in report.result.files] == [str(tmp_path / "whole.onnx")]
    notes = [note for note in report.result.notes if "holds" in note and "not compared" in note]
    loss = report.result.rows[1].metrics["val_loss"]
    assert re.match(
        rf"'head\.onnx' holds 'net\.3' \(fp32, .*B, val_loss {loss:.3f}.*\), so it is not compared", notes[0]
    )
    assert [note.partition(" holds")[0] for note in notes] == ["'head.onnx'", "'norm.onnx'"]


def test_an_attribute_of_somebody_elses_callback_is_no_teacher(lightning, tmp_path):
    class Other(lightning.Callback):
        teacher_network = "vit_base"

    report = CompressionReport(latency=False)
    make_trainer(lightning, tmp_path, [Other(), report]).fit(make_module(lightning))
    assert [row.name for row in report.result.rows] == ["before", "after"]


def test_no_number_of_samples_stands_beside_metrics_that_were_not_measured(lightning, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("lightning_compress.callbacks.report._validated", fails)
    report = CompressionReport(latency=False, path=tmp_path)
    make_trainer(lightning, tmp_path, [report]).fit(make_module(lightning))
    assert not any("samples" in note for note in report.result.notes)

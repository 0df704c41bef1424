"""A disk that is full: an error that names the file, the older file as it was, no drafts, and the training unharmed."""

from __future__ import annotations

import errno
import re
from contextlib import ExitStack

import lightning.pytorch as L
import pytest
import torch
from cases import CASES
from disks import room_for
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from records import record
from torch import nn

from lightning_compress import CompressionReport, ExportCallback, FactorTransferCallback, PTQCallback
from lightning_compress.cli import main
from lightning_compress.commands.attachment import Events, Order, RecipeAttachment
from lightning_compress.export import ExportError, to_onnx
from lightning_compress.export.integer import optimised
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.report import from_json, write_report
from lightning_compress.report.table import Report, Row
from lightning_compress.tracking.sinks import Table
from lightning_compress.tracking.tracker import Tracker

from .modules import FEATURES, Classifier, difference, loader, made, teacher_for, trainer
from .traces import traces


class Wide(Classifier):
    """Its file is larger than all others that a fit writes."""

    def build(self):
        self.model = nn.Sequential(nn.Linear(FEATURES, 20_000), nn.ReLU(), nn.Linear(20_000, 3))


class FullFrom(L.Callback):
    """At one point of the fit the disk gets full."""

    def __init__(self, stack, size, *, step=None):
        self.stack, self.size, self.step = stack, size, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.stack.enter_context(room_for(self.size))

    def on_train_end(self, trainer, pl_module):
        if self.step is None:
            self.stack.enter_context(room_for(self.size))


def names(folder):
    """All there is, drafts too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def too_large(path):
    return rf"^\[Errno {errno.EFBIG}\] File too large: '{re.escape(str(path))}'$"


# One writer after the other


@pytest.mark.slow
def test_to_onnx(tmp_path):
    (tmp_path / "net.onnx").write_text("an older one")
    with room_for(500), pytest.raises(OSError, match=too_large(tmp_path / "net.onnx")):
        to_onnx(made(Classifier), tmp_path / "net.onnx", torch.zeros(2, FEATURES))
    assert (names(tmp_path), (tmp_path / "net.onnx").read_text()) == (["net.onnx"], "an older one")


@pytest.mark.slow
def test_what_onnx_runtime_writes_for_a_check(tmp_path):
    to_onnx(made(Classifier), tmp_path / "net.onnx", torch.zeros(2, FEATURES))
    with room_for(500), pytest.raises(ExportError, match=r"could not write .*optimised\.onnx'"):
        optimised(OnnxNetwork(tmp_path / "net.onnx"))


def test_the_files_of_a_report_are_all_of_one_measurement(tmp_path):
    old, new = Report((Row("old", bytes=1),)), Report((Row("new", bytes=2),))
    files = write_report(old, tmp_path)
    before = [path.read_bytes() for path in files]
    assert len(before[0]) < 4000 < len(before[2])
    with room_for(4000), pytest.raises(OSError, match=too_large(files.html)):
        write_report(new, tmp_path)
    assert [path.read_bytes() for path in files] == before
    assert len(names(tmp_path)) == 3


@pytest.mark.slow
def test_a_paraphraser(tmp_path):
    callback = FactorTransferCallback(teacher_for(Classifier), weight=3.0, pretrain_epochs=1)
    trainer(callback, max_steps=1).fit(made(Classifier), loader())
    callback.save_paraphraser(tmp_path / "p.pt")
    before = (tmp_path / "p.pt").read_bytes()
    with room_for(500), pytest.raises(OSError, match=too_large(tmp_path / "p.pt")):
        callback.save_paraphraser(tmp_path / "p.pt")
    assert (names(tmp_path), (tmp_path / "p.pt").read_bytes()) == (["p.pt"], before)


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("config.yaml", lambda tracker: tracker.settings(lambda: {"text": "long" * 100})),
        ("table.csv", lambda tracker: tracker.table("compress/table", Table(["name"], [["long" * 100]], ""))),
        ("map.png", lambda tracker: tracker.picture("compress/map", torch.rand(9, 9, 3).numpy(), newest=True)),
    ],
)
def test_files_of_a_logger_cost_a_warning(what, work, tmp_path):
    tracker = Tracker(trainer(logger=CSVLogger(tmp_path, name="", version="")))
    with room_for(50), pytest.warns(UserWarning, match=rf"did not take .*File too large: '{tmp_path}/compress/{what}'"):
        work(tracker)
    assert names(tmp_path) == ["compress"]


def test_events_for_the_parent_process(tmp_path):
    events, path = Events(str(tmp_path / "events.jsonl")), tmp_path / "events.jsonl"
    events.append("factory")
    for room in (path.stat().st_size, path.stat().st_size + 10):  # nothing fits, and half of a line
        with room_for(room), pytest.raises(OSError, match=rf"'{path}'"):
            events.append("fit", module="train.Net")
    events.append("done")
    assert [event["event"] for event in events.read()] == ["factory", "done"]


def test_a_parent_that_cannot_be_told_costs_a_warning(tmp_path):
    attachment = RecipeAttachment(Order("recipe.yaml", ".", str(tmp_path / "events.jsonl")))
    attachment._active = True
    with room_for(0), pytest.warns(UserWarning, match="was not told how the fit ended: .*events.jsonl'"):
        attachment.teardown(trainer(), made(Classifier), "fit")


def test_run_with_a_full_temporary_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("version: 1\nexport: {path: model.onnx}\n")
    with room_for(10):
        assert main(["run", "recipe.yaml", "--", "python", "-c", "1"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"recipe\.yaml' cannot be written, and nothing was started: File too large\n$", told)


# Whole fits


@pytest.mark.slow
def test_a_file_too_many_at_the_end_of_a_fit(tmp_path):
    """The report is written all the same, and says what is missing; weights and checkpoint are as without us."""
    plain, module = made(Wide), made(Wide)
    trainer().fit(plain, loader(), loader(rows=16))
    path = tmp_path / "net.onnx"
    path.write_text("an older one")
    with ExitStack() as stack:
        saving = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
        ours = [ExportCallback(path), CompressionReport(path=tmp_path / "report", latency=False)]
        fitting = trainer(*ours, FullFrom(stack, 500_000), saving, enable_checkpointing=True)
        with pytest.raises(OSError, match=too_large(path)):
            fitting.fit(module, loader(), loader(rows=16))
    files = [f"report/compression_report.{end}" for end in ("html", "json", "md")]
    assert names(tmp_path) == ["last.ckpt", "net.onnx", "report", *files]
    assert path.read_text() == "an older one"
    report = from_json((tmp_path / "report" / "compression_report.json").read_text())
    assert any("net.onnx was not written: [Errno 27] File too large" in note for note in report.notes)
    assert difference(module, plain) == difference(module, torch.load(tmp_path / "last.ckpt")["state_dict"]) == 0
    assert traces(module) == traces(plain)
    record("kills", "ExportCallback + CompressionReport", "a full disk at the end", "refused", "File too large: ...")


@pytest.mark.slow
def test_no_room_for_the_report(tmp_path):
    plain, module = made(Classifier), made(Classifier)
    trainer().fit(plain, loader(), loader(rows=16))
    with ExitStack() as stack:
        ours = [PTQCallback(weight_bits=8), CompressionReport(path=tmp_path / "report", latency=False)]
        with pytest.warns(UserWarning, match=r"could not be written to .*report': .*compression_report\.(json|html)'"):
            trainer(*ours, FullFrom(stack, 1000)).fit(module, loader(), loader(rows=16))
    assert names(tmp_path) == ["report"]
    assert difference(module, plain) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_no_room_for_a_checkpoint(case, tmp_path):
    """Lightning raises; the module is as after any exception, and the fit goes on from the checkpoint before."""
    arms = {"plain": [], "ours": [case.build(tmp_path, Classifier)]}
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    whole = made(Classifier)
    trainer(case.build(tmp_path, Classifier), **settings, default_root_dir=tmp_path / "whole").fit(
        whole, loader(), loader(rows=16)
    )
    found = {}
    for arm, callbacks in arms.items():
        found[arm] = made(Classifier)
        torch.default_generator.manual_seed(0)
        with ExitStack() as stack:
            saving = ModelCheckpoint(tmp_path / arm, filename="{epoch}", save_top_k=-1)
            fitting = trainer(*callbacks, FullFrom(stack, 1500, step=12), saving, **settings)
            with pytest.raises(OSError, match="File too large"):
                fitting.fit(found[arm], loader(), loader(rows=16))
    assert traces(found["ours"]) == traces(found["plain"])
    assert names(tmp_path / "ours") == ["epoch=0.ckpt"]
    module = made(Classifier)
    fitting = trainer(case.build(tmp_path, Classifier), **settings, default_root_dir=tmp_path / "resumed")
    fitting.fit(module, loader(), loader(rows=16), ckpt_path=tmp_path / "ours" / "epoch=0.ckpt", weights_only=True)
    assert difference(module, whole) == 0
    record("kills", case.name, "a full disk in a save", "repeatable", "Lightning raises, and the one before serves")

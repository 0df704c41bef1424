from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract.modules import Classifier, NormClassifier, loader, made, trainer
from export.test_emission import calibrated, holding, kernels
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress import CompressionReport, ExportCallback, PTQCallback
from lightning_compress.export import evaluate, integer, to_onnx
from lightning_compress.export.errors import ExportError
from lightning_compress.export.evaluate import Choices, evaluate_forward, evaluate_quantized
from lightning_compress.export.integer import IntegerExport
from lightning_compress.report import precision, units
from lightning_compress.report.cells import file_table
from lightning_compress.report.page import to_html
from lightning_compress.report.precision import AgainstFp32, against_fp32
from lightning_compress.report.remarks import remarks
from lightning_compress.report.table import ExportedFile, Latency, Report, Row

ROWS = 24  # of the validation: no multiple of the batch


class Measured(NormClassifier):
    """With batch norm, and an accuracy."""

    def validation_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(dim=1) == batch[1]).float().mean())


def fitted(*callbacks, **settings):
    module = made(Measured)
    fitting = trainer(*callbacks, **{"num_sanity_val_steps": 0, **settings})
    fitting.fit(module, loader(Measured), loader(Measured, rows=ROWS))
    return module, fitting


# In a sentence


def against(**changed):
    values = {"precision": "int8", "bytes": 270, "bytes_fp32": 1000, "batch": 1}
    return AgainstFp32(**{**values, "milliseconds": 1.0, "milliseconds_fp32": 2.0, "speed": 2.0, **changed})


def test_a_faster_file_in_a_sentence():
    text = "the int8 file has 0.270 of the bytes of one in fp32 and runs 2.00 times as fast (batch 1, one thread)"
    assert str(against()) == text


def test_a_slower_file_names_the_better_one():
    assert str(against(precision="int4", bytes=132, batch=8, speed=0.5)) == (
        "the int4 file has 0.132 of the bytes of one in fp32, but takes 2.00 times as long (batch 8, one thread): for "
        "speed the better file is that of precision='fp32'"
    )
    assert "as fast" in str(against(speed=1.0))
    assert "times as long" in str(against(speed=0.999))


def test_advice_needs_a_difference():
    text = "the int8 file has 0.270 of the bytes of one in fp32; no difference in time is shown (batch 1, one thread)"
    assert str(against(speed=0.99, speed_low=0.97, speed_high=1.01)) == text
    assert str(against(speed=0.99, speed_low=0.98, speed_high=0.995)) == text  # where tensors lie makes as much
    assert "1.11 times as long" in str(against(speed=0.9, speed_low=0.88, speed_high=0.92))


# Measured


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of 8 bits, and the same network in fp32, of any and of one batch size."""
    torch.default_generator.manual_seed(0)
    folder, x = tmp_path_factory.mktemp("files"), torch.randn(4, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    holding(network, quantization=calibrated(network, x))
    int8 = to_onnx(network, folder / "int8.onnx", x, precision="int8")
    plain = to_onnx(network, folder / "fp32.onnx", x)
    fixed = to_onnx(network, folder / "fixed.onnx", x, dynamic_batch=False)
    return SimpleNamespace(int8=int8, plain=plain, fixed=fixed)


@pytest.mark.sample
@pytest.mark.parametrize(("plain", "batch"), [("plain", 1), ("fixed", 4)])
def test_both_files_run_in_turn_on_one_thread(files, monkeypatch, plain, batch):
    seen = {}

    class Network:
        def __init__(self, path, threads):
            assert threads == 1
            self.name = Path(path).stem

        def run(self, tensors):
            seen.setdefault(self.name, []).append(tuple(tensors[0].shape))

    def measured(candidates, *, seconds):
        assert (list(candidates), seconds) == (["fp32", "file"], 2.5)
        for call in candidates.values():
            call()
        medians = {"fp32": (3.0, 1.0), "file": (1.0, 0.25)}
        return {
            name: SimpleNamespace(median=median, ratio=ratio, ratio_low=0.2, ratio_high=0.5)
            for name, (median, ratio) in medians.items()
        }

    monkeypatch.setattr(precision, "OnnxNetwork", Network)
    monkeypatch.setattr(precision, "measure_latency", measured)
    result = against_fp32(files.int8, getattr(files, plain), seconds=2.5)
    assert seen == {files_name: [(batch, 3, 8, 8)] for files_name in ("int8", Path(getattr(files, plain).path).stem)}
    assert result == AgainstFp32(
        precision="int8",
        bytes=files.int8.bytes,
        bytes_fp32=getattr(files, plain).bytes,
        batch=batch,
        milliseconds=1.0,
        milliseconds_fp32=3.0,
        speed=4.0,  # of the paired ratio, not of the medians
        speed_low=2.0,
        speed_high=5.0,
    )


def test_real_files_are_timed(files):
    result = against_fp32(files.int8, files.plain, seconds=0.2)
    assert result.bytes / result.bytes_fp32 == files.int8.bytes / files.plain.bytes < 0.75
    assert result.milliseconds > 0
    assert 0.05 < result.speed < 20
    paired = result.milliseconds_fp32 / result.milliseconds
    assert result.speed == pytest.approx(paired, rel=0.5)
    assert f"{result.bytes / result.bytes_fp32:.3f} of the bytes" in str(result)


# What file and module choose


def test_choices_are_counted_sample_by_sample_and_position_by_position():
    ours, theirs = Choices(), Choices()
    ours({"logits": torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), "extra": torch.ones(3, 4)})
    theirs({"logits": torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]]), "extra": torch.zeros(3, 4)})
    assert ours.agreement(theirs) == 2 / 3
    maps = torch.zeros(1, 2, 3, 1)  # two classes at three positions
    maps[0, 1, 0] = 1.0
    ours(maps)
    theirs(torch.zeros(1, 2, 3, 1))
    assert ours.agreement(theirs) == 4 / 6
    words = torch.zeros(1, 2, 3)  # three classes for two words
    words[0, 1, 2] = 1.0
    ours(words)
    theirs(torch.zeros(1, 2, 3))
    assert ours.agreement(theirs) == 5 / 8


def test_choices_that_cannot_be_compared():
    nothing, one, two, other = Choices(), Choices(), Choices(), Choices()
    one(torch.eye(2))
    two(torch.eye(2))
    two(torch.eye(2))
    other(torch.eye(3))
    assert one.agreement(nothing) is nothing.agreement(nothing) is one.agreement(two) is one.agreement(other) is None
    for kept_apart in (torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, 2, dtype=torch.long)):
        nothing(kept_apart)
    assert nothing.agreement(nothing) is None


# At the end of a fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit with everything in it, the export before the calibration in the list."""
    torch.default_generator.manual_seed(0)
    folder = tmp_path_factory.mktemp("fit")
    exporting = ExportCallback(folder / "n.onnx", precision="int8", metric="val_loss", tolerance=0.02)
    calibrating, report = PTQCallback(), CompressionReport(path=folder / "report", latency=False)
    module, fitting = fitted(exporting, calibrating, report)
    return SimpleNamespace(
        folder=folder, module=module, trainer=fitting, exporting=exporting, calibrating=calibrating, report=report
    )


@pytest.mark.sample
def test_a_fit_writes_an_integer_file_with_the_scales_of_the_other_callback(run):
    result = run.exporting.result
    assert (result.path, result.precision, result.network) == (run.folder / "n.onnx", "int8", "model")
    assert result.quantization is run.calibrating.quantization
    assert kernels(result.path) == len(result.quantization.sites) == 2
    assert run.exporting.failure is None


def test_metrics_of_the_module_are_those_of_the_quantised_network(run):
    metrics, quantised = run.exporting.module_metrics, run.calibrating.metrics
    assert metrics == quantised
    plain = evaluate_forward(run.module, loader(Measured, rows=ROWS))
    assert plain["val_loss"] != metrics["val_loss"]
    again = evaluate_quantized(run.module, loader(Measured, rows=ROWS), run.calibrating.quantization)
    assert again["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    assert run.exporting.file_metrics["val_loss"] == pytest.approx(metrics["val_loss"], abs=0.02)
    assert run.exporting.file_metrics["val_loss"] != plain["val_loss"]


def test_the_file_in_the_modules_own_validation(run):
    outputs = []
    found = evaluate(run.exporting.result.path, run.module, loader(Measured, rows=ROWS), seen=outputs.append)
    assert found == run.exporting.file_metrics
    assert [tuple(output.shape) for output in outputs] == [(8, 3)] * 3
    file, quantised = Choices(), Choices()
    for output in outputs:
        file(output)
    evaluate_quantized(run.module, loader(Measured, rows=ROWS), run.calibrating.quantization, seen=quantised)
    assert run.exporting.agreement == file.agreement(quantised) >= 22 / 24


def test_the_comparison_with_fp32(run):
    result = run.exporting.against_fp32
    assert (result.precision, result.batch, result.bytes) == ("int8", 1, run.exporting.result.bytes)
    assert result.bytes_fp32 > 0
    assert result.speed > 0
    assert [entry.name for entry in run.folder.glob("*.onnx")] == ["n.onnx"]  # that in fp32 was for the comparison


def test_what_the_report_says(run):
    notes = " ".join(run.report.result.notes)
    agreement = f"for {run.exporting.agreement:.2%} of the validation data the file chooses the class"
    assert f"export: {agreement} that the quantised module chooses." in notes
    assert f"export: {run.exporting.against_fp32}." in notes
    assert "ptq: 2 weights of 8 bits and 2 activations of 8 bits are quantised" in notes
    assert [(file.precision, file.bytes) for file in run.report.result.files] == [("int8", run.exporting.result.bytes)]


def test_the_report_compares_an_integer_file_with_the_quantised_network(run):
    assert [file.quantised for file in run.report.result.files] == ["after (ptq)"]
    gap = abs(run.exporting.file_metrics["val_loss"] - run.calibrating.metrics["val_loss"])
    said = [sentence for sentence in remarks(run.report.result) if "in the same validation" in sentence.lower()]
    assert said == [
        f"In the same validation the metrics of 'n.onnx' and 'after (ptq)' differ by at most {units.metric(gap)} "
        "(val_loss)."
        if gap
        else "'n.onnx' gives exactly the metrics of 'after (ptq)' in the same validation."
    ]
    assert gap < 1e-5


@pytest.mark.slow
def test_weights_of_four_bits_with_activations_of_fewer_than_eight_are_another_network(tmp_path):
    calibrating, report = PTQCallback(weight_bits=4, activation_bits=6), CompressionReport(path=tmp_path, latency=False)
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int4", fp32_comparison=False)
    message = r"'int4' stores weights alone, so the file does not round activations to 6 bits as 'ptq' does, .*int8"
    with pytest.warns(UserWarning, match=message):
        fitted(calibrating, exporting, report)
    assert exporting.result.quantization.activations == {}
    assert [file.quantised for file in report.result.files] == [None]
    for bits in (8, None):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*stores weights alone")
            fitted(PTQCallback(weight_bits=4, activation_bits=bits), exporting)


@pytest.mark.slow
def test_a_file_in_full_precision_alone_is_not_of_the_quantised_network(tmp_path):
    """Unless there is one of integers beside it."""
    with pytest.warns(UserWarning, match=r"'fp32' leaves out the grids of 'ptq', .*: give precision='int8' or 'int4'"):
        fitted(PTQCallback(), ExportCallback(tmp_path / "f.onnx"))
    both = ExportCallback(tmp_path / "f.onnx"), ExportCallback(tmp_path / "n.onnx", precision="int8", name="int8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leaves out the grids")
        fitted(PTQCallback(), *both)


@pytest.mark.sample
def test_a_file_that_is_not_written_ends_the_fit_after_its_report(tmp_path, monkeypatch):
    """The other file is there, and the report says what is missing."""

    def refused(self, file):
        raise ExportError("too far off")

    monkeypatch.setattr(IntegerExport, "check", refused)
    good, bad = ExportCallback(tmp_path / "f.onnx"), ExportCallback(tmp_path / "n.onnx", precision="int8", name="int8")
    report = CompressionReport(path=tmp_path / "report", latency=False)
    with pytest.raises(ExportError, match="too far off"):
        fitted(PTQCallback(), bad, report, good)
    assert good.result is not None
    assert good.file_metrics
    assert bad.result is None
    assert bad.failure == "n.onnx was not written: too far off"
    assert "int8: n.onnx was not written: too far off." in report.result.notes
    assert report.files.html.is_file()
    assert [entry.name for entry in tmp_path.glob("*.onnx")] == ["f.onnx"]


def test_the_report_has_the_metrics_before_and_after_quantisation(run):
    rows = {row.name: row for row in run.report.result.rows}
    assert list(rows) == ["before", "after", "after (ptq)", "n.onnx"]
    plain = evaluate_forward(run.module, loader(Measured, rows=ROWS))
    assert rows["after"].metrics == pytest.approx(plain)
    assert rows["after (ptq)"].metrics == run.calibrating.metrics != plain
    assert rows["after (ptq)"].bytes is None  # the same weights as above
    assert rows["n.onnx"].metrics == run.exporting.file_metrics
    [file] = run.report.result.files
    assert (file.bytes_fp32, file.speed_fp32) == (
        run.exporting.against_fp32.bytes_fp32,
        run.exporting.against_fp32.speed,
    )


@pytest.mark.parametrize(("speed", "words"), [(2.0, "2.0x faster"), (0.5, "2.0x slower"), (1.001, "-")])
def test_the_table_of_files_says_how_it_compares_with_fp32(speed, words):
    file = ExportedFile("n.onnx", "int8", 270, bytes_fp32=270, speed_fp32=speed)
    assert file_table([file])[1][0][3] == words
    row = Row("n.onnx", bytes=270, latency_ms=Latency("onnxruntime", 1, 2.0, 0.1))
    rows = Row("before", latency_ms=Latency("torch", 1, 4.0, 0.1)), row
    assert (f"{words} than in fp32<" in to_html(Report(rows=rows, files=(file,)))) == (words != "-")
    wide = replace(file, speed_fp32_low=speed / 3, speed_fp32_high=speed * 3)
    assert file_table([wide])[1][0][3] == "no difference in time shown"
    assert "no difference to fp32 shown<" in to_html(Report(rows=rows, files=(wide,)))


def test_a_low_agreement_is_said_to_be_low():
    exporting = ExportCallback("n.onnx", precision="int8")
    exporting.agreement = 0.9
    [remark] = exporting.remarks()
    assert remark.endswith("That is little: at 8 bits 99% and more are usual.")
    exporting.agreement = 0.995
    [remark] = exporting.remarks()
    assert "little" not in remark


@pytest.mark.sample
@pytest.mark.parametrize("settings", [{"fp32_comparison": False}, {"fast_dev_run": 2}])
def test_without_the_comparison(settings, tmp_path):
    fast = settings.pop("fast_dev_run", False)
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int8", **settings)
    fitted(PTQCallback(), exporting, fast_dev_run=fast)
    assert exporting.against_fp32 is None
    assert exporting.result.precision == "int8"


def drawing_loader(seed):
    plain = loader(Measured, rows=ROWS)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(plain.dataset, batch_size=8, shuffle=True, generator=generator), generator


@pytest.mark.sample
def test_validations_that_are_compared_see_the_same_data_and_leave_them_as_they_were(tmp_path):
    exporting, ptq = ExportCallback(tmp_path / "n.onnx", precision="int8", fp32_comparison=False), PTQCallback()
    states = []
    for callbacks in ([], [ptq, exporting, CompressionReport(latency=False, path=tmp_path)]):
        module, (data, generator) = made(Measured), drawing_loader(5)
        fitting = trainer(*callbacks, num_sanity_val_steps=0)
        fitting.fit(module, loader(Measured), data)
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert exporting.agreement >= 22 / 24
    assert exporting.module_metrics == ptq.metrics


def test_two_exports_to_one_path_are_refused(tmp_path):
    exports = [ExportCallback(tmp_path / "n.onnx", name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"'a' and 'b' both write '.*n\.onnx'; give one another path"):
        fitted(*exports)


@pytest.mark.sample
def test_a_comparison_that_fails_is_a_warning(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning_compress.callbacks.export.against_fp32", full)
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int8")
    with pytest.warns(UserWarning, match="was not compared with a file in fp32: no space left on device"):
        fitted(PTQCallback(), exporting)
    assert exporting.against_fp32 is None
    assert exporting.file_metrics


# Before the training


def refused(tmp_path, message, kind=Measured, **settings):
    module = made(kind)
    fitting = trainer(ExportCallback(tmp_path / "n.onnx", precision="int8"), PTQCallback(), **settings)
    with pytest.raises(ExportError, match=message):
        fitting.fit(module, loader(kind), loader(kind, rows=ROWS))
    assert fitting.global_step == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample
def test_what_would_not_run_in_integers_is_told_after_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(integer, "KERNELS", ("QGemm",))
    refused(tmp_path, r"ONNX Runtime runs 1 of 2 quantised layers in float: .* leave them out of the quantisation")


def test_double_precision_is_refused_after_the_first_step(tmp_path):
    refused(tmp_path, "go with float32, and 'model.0.weight'|go with float32, and '0.weight'", precision="64-true")


def test_without_a_callback_that_gives_scales_the_fit_does_not_begin(tmp_path):
    module = made(Measured)
    fitting = trainer(ExportCallback(tmp_path / "n.onnx", precision="int8"))
    with pytest.raises(ValueError, match=r"precision 'int8' needs scales, and no callback gives them; add PTQCallback"):
        fitting.fit(module, loader(Measured))
    assert fitting.global_step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_difference_beyond_the_tolerance_is_a_failure(tmp_path, monkeypatch):
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", tolerance=0.01)
    exporting.result = SimpleNamespace(path=tmp_path / "n.onnx", quantization=object())
    from lightning_compress.callbacks import export as export_callback

    monkeypatch.setattr(export_callback, "has_validation", lambda module, fitting: True)
    for ours, theirs, failing in (0.5, 0.509, False), (0.5, 0.511, True), (0.5, float("nan"), True):
        exporting.failure = None
        monkeypatch.setattr(export_callback, "evaluate_quantized", lambda *_, seen, value=ours: {"val_loss": value})
        monkeypatch.setattr(export_callback, "evaluate", lambda *_, seen, value=theirs: {"val_loss": value})
        if failing:
            with pytest.warns(
                UserWarning, match=f"val_loss is {theirs:.6g} in the file .* beyond the tolerance of 0.01"
            ):
                exporting.evaluate(SimpleNamespace(is_global_zero=True), None)
            assert "beyond the tolerance of 0.01" in exporting.failure
        else:
            exporting.evaluate(SimpleNamespace(is_global_zero=True), None)
            assert exporting.failure is None
        assert exporting.agreement is None


@pytest.mark.slow
def test_the_other_order_in_the_list_gives_the_same_file(run, tmp_path):
    exporting, calibrating = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_acc"), PTQCallback()
    fitted(calibrating, exporting)
    assert (tmp_path / "n.onnx").read_bytes() == run.exporting.result.path.read_bytes()
    assert exporting.module_metrics == run.exporting.module_metrics
    assert exporting.file_metrics == run.exporting.file_metrics
    assert exporting.agreement == run.exporting.agreement


@pytest.mark.slow
def test_a_tolerance_of_nothing_is_exceeded(tmp_path, monkeypatch):
    evaluations = itertools.count()

    def validation_step(self, batch, batch_idx):  # no two evaluations give the same number
        self.model(batch[0])
        self.log("val_loss", 1.0 + next(evaluations))

    monkeypatch.setattr(Measured, "validation_step", validation_step)
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", tolerance=0.0)
    with pytest.warns(UserWarning, match="is beyond the tolerance of 0"):
        fitted(exporting, PTQCallback(activation_bits=4))
    ours, theirs = exporting.module_metrics["val_loss"], exporting.file_metrics["val_loss"]
    assert f"the difference {abs(ours - theirs):.3g} is beyond the tolerance of 0" in exporting.failure
    assert exporting.result.path.is_file()


@pytest.mark.slow
def test_fast_dev_run_checks_the_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "n.onnx").write_text("trained for a week")
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss", tolerance=0.1)
    fitted(PTQCallback(), exporting, fast_dev_run=True)
    assert (tmp_path / "n.onnx").read_text() == "trained for a week"
    assert exporting.failure is None
    assert exporting.file_metrics["val_loss"] == pytest.approx(exporting.module_metrics["val_loss"], abs=0.1)
    assert exporting.against_fp32 is None  # nothing is kept that could be compared
    assert not exporting.result.path.exists()


@pytest.mark.slow
def test_a_second_fit_writes_the_new_weights(tmp_path):
    exporting, calibrating = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_acc"), PTQCallback()
    module, _ = fitted(exporting, calibrating)
    first, grids = (tmp_path / "n.onnx").read_bytes(), calibrating.quantization
    weights = copy.deepcopy(module.state_dict())
    fitting = trainer(exporting, calibrating, num_sanity_val_steps=0)
    fitting.fit(module, loader(Measured), loader(Measured, rows=ROWS))
    assert not torch.equal(weights["model.0.weight"], module.state_dict()["model.0.weight"])
    assert (tmp_path / "n.onnx").read_bytes() != first
    assert calibrating.quantization.fingerprints != grids.fingerprints
    assert exporting.result.quantization is calibrating.quantization
    expected = evaluate_quantized(module, loader(Measured, rows=ROWS), calibrating.quantization)
    assert exporting.module_metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)


@pytest.mark.slow
def test_weights_alone_in_four_bits_at_the_end_of_a_fit(tmp_path):
    exporting = ExportCallback(tmp_path / "n.onnx", precision="int4", metric="val_loss", tolerance=1e-4)
    fitted(exporting, PTQCallback(weight_bits=4, activation_bits=None))
    assert exporting.failure is None
    assert exporting.agreement == 1.0
    assert exporting.against_fp32.precision == "int4"
    assert exporting.result.opset == 21


@pytest.mark.slow
def test_a_network_that_is_the_module_itself(tmp_path):
    class Itself(Classifier):
        def build(self):
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    exporting, calibrating = ExportCallback(tmp_path / "n.onnx", precision="int8", metric="val_loss"), PTQCallback()
    trainer(exporting, calibrating).fit(made(Itself), loader(), loader(rows=16))
    assert calibrating.quantization.network == exporting.result.network == ""
    assert kernels(tmp_path / "n.onnx") == 2
    assert exporting.file_metrics["val_loss"] == pytest.approx(exporting.module_metrics["val_loss"], abs=0.02)


@pytest.mark.slow
def test_a_chain_of_two_networks_is_refused_at_the_first_batch(tmp_path):
    class Chain(Classifier):
        def build(self):
            self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

        def task_loss(self, batch):
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    for callbacks in (
        [ExportCallback(tmp_path / "n.onnx", precision="int8"), PTQCallback()],
        [PTQCallback(), ExportCallback(tmp_path / "n.onnx", precision="int8")],
    ):
        fitting = trainer(*callbacks)
        with pytest.raises((ValueError, RuntimeError), match=r"'body'.*'head'"):
            fitting.fit(made(Chain), loader())
        assert fitting.global_step <= 1
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.export import ExportResult, Sample, to_onnx
from lightning_compress.report import compare, count_parameters, table
from lightning_compress.report.remarks import remarks


def small(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    network = small()
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    return network, to_onnx(network, path, sample=torch.randn(4, 6))


def test_everything_in_one_report(exported):
    network, result = exported
    models = {"before": small(), "after": network, "teacher": small(64)}
    network[0].weight.data[:4] = 0
    metrics = {"after": {"val_acc": 0.9}, "model.onnx": {"val_acc": 0.8}}
    report = compare(
        models, [result], sample=Sample((torch.randn(4, 6),)), metrics=metrics, seconds=0.5, compressed="after",
        prefix="net", notes=("A note.",), recipe={"version": 1},
    )  # fmt: skip
    before, after, teacher, file = report.rows
    assert [row.name for row in report.rows] == ["before", "after", "teacher", "model.onnx"]
    assert (before.parameters, teacher.parameters) == (count_parameters(small()), count_parameters(small(64)))
    assert (before.macs, after.macs, teacher.macs) == (6 * 8 + 8 * 3, 6 * 8 + 8 * 3, 6 * 64 + 64 * 3)
    assert before.nonzeros - after.nonzeros == 24
    assert after.bytes_compressed < before.bytes_compressed
    assert (file.bytes, file.parameters) == (result.path.stat().st_size, None)
    assert [row.latency_ms.runtime for row in report.rows] == ["torch", "torch", "torch", "onnxruntime"]
    assert len({row.latency_ms.rounds for row in report.rows}) == 1
    assert before.latency_ms.ratio == 1
    assert (before.metrics, after.metrics, file.metrics) == ({}, {"val_acc": 0.9}, {"val_acc": 0.8})
    assert [layer.name for layer in report.layers] == ["net.0", "net.3"]
    assert report.layers[0].sparsity == 0.5
    assert report.files[0] == table.ExportedFile(
        str(result.path), "fp32", result.bytes, result.max_logit_difference, model="after"
    )
    assert report.notes == ("A note.",)
    assert report.recipe == {"version": 1}
    assert report.versions["torch"] == torch.__version__
    assert table.from_json(table.to_json(report)) == report


def test_the_models_are_left_alone(exported):
    network, result = exported
    network.train()
    seed = torch.get_rng_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    compare({"a": network}, [result], sample=Sample((torch.randn(4, 6),)), seconds=0.1)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.set_rng_state(seed)
    compare({"a": network}, sample=Sample((torch.ones(4, 6),)), latency=False)
    assert torch.equal(torch.get_rng_state(), seed)


def test_half_precision_is_weighed_as_it_is_and_run_in_float32():
    sample = Sample((torch.randn(2, 6, dtype=torch.bfloat16),))
    report = compare({"a": small(256), "half": small(256).bfloat16()}, sample=sample, seconds=0.1)
    assert report.rows[1].bytes < 0.7 * report.rows[0].bytes
    assert report.rows[1].latency_ms.rounds >= 3
    assert report.layers[0].bits == 16


def test_times_are_compared_with_the_first_that_has_one():
    models = {"teacher": nn.Linear(5, 2), "before": small(), "after": small()}
    report = compare(models, sample=Sample((torch.randn(4, 6),)), seconds=0.1)
    assert [row.latency_ms and row.latency_ms.ratio is not None for row in report.rows] == [None, True, True]
    assert report.rows[1].latency_ms.ratio == 1
    assert "Times are compared with that of 'before'." in report.notes


def test_a_model_that_cannot_run_has_a_note_and_no_number():
    models = {"before": nn.Linear(5, 2), "after": small()}
    report = compare(models, sample=Sample((torch.randn(4, 6),)), seconds=0.1)
    assert (report.rows[0].macs, report.rows[0].latency_ms) == (None, None)
    assert report.rows[0].parameters == 12
    assert report.rows[1].latency_ms.ratio == 1  # and no note says what it is compared with
    assert len(report.notes) == 2
    assert report.notes[0].startswith("before: MACs were not counted: RuntimeError: mat1 and mat2")
    assert report.notes[1].startswith("The latency of before was not measured: RuntimeError")


@pytest.mark.parametrize(
    ("sample", "note"),
    [
        (None, "MACs and latency were not measured: no input of the network is known."),
        (
            Sample((object(),)),
            "MACs and latency were not measured: an input of type object cannot be cut to one sample.",
        ),
    ],
)
def test_without_an_input_there_is_a_note(sample, note):
    report = compare({"a": small()}, sample=sample)
    assert report.notes == (note,)
    assert (report.rows[0].macs, report.rows[0].latency_ms) == (None, None)


def test_files_of_one_name_are_told_apart(exported, tmp_path):
    network, result = exported
    copy = tmp_path / "model.onnx"
    copy.write_bytes(result.path.read_bytes())
    values = {name: getattr(result, name) for name in ExportResult.__dataclass_fields__}
    second = ExportResult(**{**values, "path": copy})
    report = compare({"a": network}, [result, second], latency=False)
    assert [row.name for row in report.rows] == ["a", str(result.path), str(copy)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compressed": "after"}, r"compressed names 'after', not one of the models: \['a'\]"),
        ({"metrics": {"b": {}}}, r"metrics names 'b', not one of the rows: \['a'\]"),
    ],
)
def test_names_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": small()}, **arguments)


def test_no_model():
    with pytest.raises(ValueError, match="models is empty"):
        compare({})


def test_a_file_is_compared_with_the_model_it_was_made_of():
    rows = (
        table.Row("teacher", bytes=100, metrics={"acc": 0.5}),
        table.Row("student", bytes=100, metrics={"acc": 0.7}),
        table.Row("t.onnx", bytes=100, metrics={"acc": 0.5}),
    )
    files = (table.ExportedFile("t.onnx", "fp32", 100, model="teacher"),)
    assert remarks(table.Report(rows=rows, files=files)) == [
        "'t.onnx' gives exactly the metrics of 'teacher' in the same validation."
    ]


def test_made_of_names_a_model_for_each_file():
    with pytest.raises(ValueError, match=r"made_of must name one of the models \['before'\] for each file"):
        compare({"before": nn.Linear(4, 2)}, made_of=["other"], latency=False)

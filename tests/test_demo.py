"""The demo: its data, its exit codes, and (slow) the whole of it on both data sets."""

from __future__ import annotations

import gzip
import json
import re
import struct
import sys

import pytest
import torch

from lightning_compress import demo


def tiny() -> demo.DemoData:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 1, 8, 8, generator=generator), torch.arange(128) % 10
    return demo.DemoData((x, y), (x[:40], y[:40]), epochs=(1, 1), teacher_width=16)


def write_idx(path, values, compress):
    shape = values.shape
    raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


def test_digits_are_standardised_and_split_without_overlap():
    data = demo.load_data("digits")
    assert data.train[0].shape == (1297, 1, 8, 8)
    assert data.test[0].shape == (500, 1, 8, 8)
    assert abs(data.train[0].mean()) < 0.02
    assert abs(data.train[0].std() - 1) < 0.02
    assert set(data.test[1].tolist()) == set(range(10))


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, monkeypatch, compress):
    images = torch.arange(3 * 28 * 28, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(3, 28, 28)
    labels = torch.tensor([9, 0, 4], dtype=torch.uint8)
    for name in demo.FASHION_FILES:
        write_idx(tmp_path / (name + ".gz" * compress), images if "images" in name else labels, compress)
    monkeypatch.setattr(demo, "FASHION_FOLDERS", (tmp_path,))
    data = demo.load_data("fashion-mnist")
    assert data.test[0].shape == (3, 1, 14, 14)
    corner = images[0, :2, :2].float().mean() / 255
    torch.testing.assert_close(data.test[0][0, 0, 0, 0], (corner - 0.286) / 0.320)
    assert data.train[1].tolist() == [9, 0, 4]


def test_missing_data_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "FASHION_FOLDERS", (tmp_path,))
    assert demo.run_demo(data="fashion-mnist", out=str(tmp_path / "out")) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_data_names_the_nearest(tmp_path, capsys):
    assert demo.run_demo(data="digts", out=str(tmp_path / "out")) == 2
    assert "got 'digts'; did you mean 'digits'?" in capsys.readouterr().err


def test_students_see_the_same_batches():
    first, second = (list(tiny().loaders(0)[0]) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.sample
def test_the_folder_holds_everything_and_a_deviating_file_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(demo, "load_data", lambda name: tiny())
    real = demo.evaluate
    monkeypatch.setattr(demo, "evaluate", lambda *args, **kwargs: {**real(*args, **kwargs), "val_accuracy": 2.0})
    assert demo.run_demo(out=str(tmp_path)) == 1
    captured, files = capsys.readouterr(), ["teacher.onnx", "student.onnx", "student_pruned.onnx", "student_int8.onnx"]
    assert "val_accuracy of teacher.onnx differs from the module's by" in captured.err
    assert "[3/5] student distilled: " in captured.out
    assert "[4/5] distilled, pruned and quantised in one fit: " in captured.out
    assert f"\nFiles:  {', '.join(f'{tmp_path.name}/{name}' for name in files)}\n" in captured.out
    assert f"\nReport: {tmp_path.name}/compression_report.html\n" in captured.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "teacher", "student_alone", "student_distilled", "student_quantised", *files,
        "compression_report.json", "compression_report.md", "compression_report.html",
    }  # fmt: skip
    rows = json.loads((tmp_path / "compression_report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "teacher", "student alone", "student distilled", "distilled and pruned", "distilled, pruned, quantised", *files,
    ]  # fmt: skip
    assert rows[1]["parameters"] == rows[2]["parameters"] == rows[3]["parameters"] == 19810
    assert [row["nonzeros"] for row in rows[1:4]] == [19810, 19810, 19810 - 17230]  # 90% of 19144 in convolutions


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_every_stage_says_how_it_went(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with demo._quiet():
        demo._fit(tiny(), demo._made(8, 0), 2, tmp_path, 0)
    out = capsys.readouterr().out
    assert ("Epoch 0" in out) == terminal
    last = re.fullmatch(r" {6}\d+ s, val_accuracy (0\.\d+|0|1)", out.splitlines()[-1])
    assert 0 <= float(last[1]) <= 1
    assert terminal or re.fullmatch(r" {6}epoch 1 of 2: \d+\.\d s", out.splitlines()[0])
    assert len(out.splitlines()) == 2 or terminal


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_is_said(tmp_path, monkeypatch, capsys, stop):
    def interrupted(*args):
        raise stop

    monkeypatch.setattr(demo, "load_data", lambda name: tiny())
    monkeypatch.setattr(demo, "_fit", interrupted)
    assert demo.run_demo(out=str(tmp_path)) == 130
    assert capsys.readouterr().err.strip() == "lightning-compress demo: interrupted"


@pytest.mark.slow
def test_with_structured_the_teacher_is_made_smaller_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_data", lambda name: tiny())
    demo.run_demo(out=str(tmp_path), structured=True)
    printed = capsys.readouterr().out
    assert "[5/6] the teacher made smaller: 75% of its multiply-accumulates go with whole filters" in printed
    assert "structured has taken away 7" in printed
    rows = {row["name"]: row for row in json.loads((tmp_path / "compression_report.json").read_text())["rows"]}
    assert list(rows)[4:7] == [
        "distilled, pruned, quantised",
        "teacher made smaller",
        "teacher made smaller, quantised",
    ]
    before, after = rows["teacher"], rows["teacher made smaller"]
    assert after["macs"] / before["macs"] == pytest.approx(0.25, abs=0.02)
    assert rows["smaller_int8.onnx"]["bytes"] < rows["smaller.onnx"]["bytes"] < rows["teacher.onnx"]["bytes"]


def test_structured_without_the_extra_says_so_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert demo.run_demo(out=str(tmp_path / "out"), structured=True) == 2
    assert 'needs torch-pruning: pip install "torch-pruning<2' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capsys):
    assert demo.run_demo(out=str(tmp_path)) == 0
    rows = json.loads((tmp_path / "compression_report.json").read_text())["rows"]
    by_name = {row["name"]: row for row in rows}
    assert min(row["metrics"]["val_accuracy"] for row in rows) > 0.95
    assert by_name["student.onnx"]["metrics"] == pytest.approx(by_name["student distilled"]["metrics"], abs=1e-5)
    assert by_name["student_pruned.onnx"]["metrics"] == pytest.approx(
        by_name["distilled and pruned"]["metrics"], abs=1e-5
    )
    assert by_name["student.onnx"]["bytes"] * 10 < by_name["teacher.onnx"]["bytes"]
    assert by_name["student_pruned.onnx"]["bytes_compressed"] * 4 < by_name["student.onnx"]["bytes_compressed"]

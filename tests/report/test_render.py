from __future__ import annotations

import dataclasses
import sys

from lightning_compress.report import ExportedFile, Latency, Report, Row, to_console, to_markdown
from lightning_compress.report.cells import columns, compressed_row, file_table
from lightning_compress.report.remarks import remarks
from lightning_compress.report.render import for_terminal

from .samples import full_report, nasty_report


def cell(report, title, row):
    return next(column for column in columns(report) if column.title == title).cells[row]


def test_cells_say_what_changed():
    report = full_report()
    assert cell(report, "Non-zero", 1) == ("100", "90% zeros")
    assert cell(report, "Size", 3) == ("1.10 kB", "4.0x smaller")
    assert cell(report, "Deflated", 1) == ("700 B", "5.9x smaller")
    assert cell(report, "Latency", 0) == ("3.00 ms", "IQR 0.20")
    assert cell(report, "Latency", 1) == ("3.10 ms", "no difference shown, IQR 0.20")
    assert cell(report, "Latency", 2) == ("1.50 ms", "IQR 0.10")  # by another runtime
    assert cell(report, "Latency", 3) == ("6.00 ms", "4.0x slower than fp32.onnx, IQR 0.10")
    assert cell(report, "Runtime", 2) == ("onnxruntime", "batch 1")
    assert cell(report, "MACs", 2) == ("-", "")
    assert cell(report, "val_acc", 3) == ("0.89", "")


def test_columns_without_a_number_are_left_out():
    assert [column.title for column in columns(Report(rows=(Row("a", bytes=1), Row("b"))))] == ["Size"]
    assert columns(Report(rows=())) == []


def test_remarks_say_what_the_numbers_do_not():
    assert remarks(full_report()) == [
        "90% of the parameters of 'after' are zero: unstructured zeros make the compressed file smaller, not the "
        "network faster.",
        "'fp32.onnx' is larger than the saved weights of 'after': it holds the graph as well.",
        "'fp32.onnx' gives exactly the metrics of 'after' in the same validation.",
        "The exported file 'int8.onnx' is slower than torch here: 6.00 ms against 3.10 ms.",
        "In the same validation the metrics of 'int8.onnx' and 'after' differ by at most 0.01 (val_acc).",
        "'int8.onnx' (int8) is slower than 'fp32.onnx' (fp32) here: 6.00 ms against 1.50 ms.",
    ]


def test_what_does_not_fit_the_terminal_follows_below(monkeypatch):
    rows = [Row(name, bytes=size) for name, size in (("teacher", 8000), ("before", 4000), ("after", 2000))]
    wide = to_console(Report(rows=tuple(rows)), width=41)
    assert wide.splitlines()[1] == "      teacher  before        after"
    narrow = (
        "Compression report\n"
        "      teacher  before\n"
        "Size  8.00 kB  4.00 kB\n"
        "               2.0x smaller\n"
        "\n"
        "      after\n"
        "Size  2.00 kB\n"
        "      4.0x smaller\n"
    )
    assert to_console(Report(rows=tuple(rows)), width=40) == narrow
    monkeypatch.setenv("COLUMNS", "40")
    assert for_terminal(Report(rows=tuple(rows))) == wide
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert for_terminal(Report(rows=tuple(rows))) == narrow
    one_each = to_console(Report(rows=tuple(rows)), width=1)
    assert one_each.count("Size  ") == 3
    assert to_console(Report(rows=tuple(rows))) == wide


def test_no_remark_without_evidence():
    slower = Latency("torch", 1, 3.0, 0.2, 50, 1.0, 0.95, 1.05)
    overlapping = Latency("onnxruntime", 1, 3.1, 0.2, 50, 1.03, 0.97, 1.2)
    smaller_network = Row("after", 500, 300, 2500, 2000, latency_ms=slower)
    report = Report(
        rows=(
            Row("before", 1000, 900, 5000, 4000),
            smaller_network,
            Row("m.onnx", bytes=2000, latency_ms=overlapping),
        ),
        files=(ExportedFile("m.onnx", "fp32", 2000),),
    )
    assert remarks(report) == []
    assert remarks(Report(rows=())) == []


def test_metrics_that_are_not_numbers_differ_from_those_that_are():
    rows = (
        Row("after", metrics={"a": 1.0, "b": float("nan")}),
        Row("m.onnx", metrics={"a": float("nan"), "b": float("nan")}),
    )
    report = Report(rows=rows, files=(ExportedFile("m.onnx", "fp32", 1),))
    assert remarks(report) == ["In the same validation the metrics of 'm.onnx' and 'after' differ by at most inf (a)."]


def test_the_compressed_row():
    assert compressed_row(full_report()).name == "after"
    runs = Report(rows=(Row("teacher"), Row("student alone"), Row("student distilled"), Row("m.onnx")))
    files = (ExportedFile("x/m.onnx", "fp32", 1),)
    assert compressed_row(dataclasses.replace(runs, files=files)).name == "student distilled"
    assert compressed_row(Report(rows=(Row("teacher"),))) is None


def test_console_is_aligned_ascii_and_narrow():
    text = to_console(full_report())
    lines = text.splitlines()
    assert text.isascii()
    assert lines[1].split() == ["before", "after", "fp32.onnx", "int8.onnx"]
    start = lines[1].index("after")
    assert {line[start - 1] for line in lines[1:15] if len(line) > start} == {" "}
    assert [line[start : start + 7] for line in lines if line.startswith("Size")] == ["4.40 kB"]
    assert max(len(line) for line in lines if not line.startswith("*")) < 110
    assert lines[-1] == "* The teacher was not measured."


def test_files_are_shown_as_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / "out" / "a.onnx"), "b.onnx", "", "/c.onnx"]
    _, rows = file_table([ExportedFile(path, "fp32", 1) for path in paths])
    assert [row[0] for row in rows] == ["out/a.onnx", "b.onnx", "", "/c.onnx"]


def test_markdown_has_every_part():
    text = to_markdown(full_report())
    assert "| int8.onnx | - | - | - | 1.10 kB (4.0x smaller) | 300 B (14x smaller) |" in text
    assert "| runs/int8.onnx | int8 | 1.10 kB | - | 0.2 | softmax |" in text
    assert "| (the module itself) | GRU | - | 0% | 16 | - |" in text
    assert "- The teacher was not measured." in text
    assert "callbacks:\n- class_path: PruningCallback\n" in text
    assert text.endswith("lightning_compress 0.1.0, torch 2.14.1\n")


def test_markdown_cells_cannot_be_broken():
    text = to_markdown(nasty_report())
    assert "<script" not in text.split("~~~~")[0]
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in table[:4]} == {4}

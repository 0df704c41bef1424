"""``lightning-compress report``: what it finds, shows, writes, logs and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_compress.cli import main
from lightning_compress.report import ExportedFile, Report, Row, from_json, to_json, write_report
from lightning_compress.report.find import find_reports, run_names


def left(folder: Path, accuracy: float = 0.9, size: int = 100, name: str = "compression_report") -> Path:
    metrics = {"val_acc": accuracy}
    rows = (Row("after", bytes=2 * size, metrics=metrics), Row("m.onnx", bytes=size, metrics=metrics))
    report = Report(rows, files=(ExportedFile("m.onnx", "fp32", size),))
    return write_report(report, folder, name).json


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_report_is_shown_again_and_nothing_is_written(here, capsys):
    left(here / "run")
    before = sorted(here.rglob("*"))
    assert main(["report", "run"]) == 0
    out = capsys.readouterr().out
    assert "run/compression_report.json" in out
    assert "Compression report\n" in out
    assert sorted(here.rglob("*")) == before


def test_one_report_is_written_again_where_it_is_asked_for(here):
    json_file = left(here / "run")
    assert main(["report", "run", "--out", "again"]) == 0
    names = [f"compression_report{suffix}" for suffix in (".html", ".json", ".md")]
    assert sorted(path.name for path in (here / "again").iterdir()) == names
    for name in names:
        assert (here / "again" / name).read_bytes() == (json_file.parent / name).read_bytes()


def test_several_reports_make_one_pareto_table(here, capsys):
    left(here / "runs" / "kd" / "version_0", 0.95, 300)
    left(here / "runs" / "qat" / "version_0", 0.9, 100)
    assert main(["report", "runs"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith(("kd ", "qat "))]
    assert [(line[0], line[1], "yes" in line) for line in lines] == [
        ("qat", "m.onnx", True),
        ("qat", "after", False),
        ("kd", "m.onnx", True),
        ("kd", "after", False),
    ]
    assert "kd: runs/kd/version_0/compression_report.json" in out
    written = json.loads((here / "compression_pareto" / "pareto.json").read_text())
    assert (written["schema"], written["metric"], written["mode"], written["guessed"]) == (1, "val_acc", "max", True)
    assert (written["points"][0]["run"], written["points"][0]["front"]) == ("qat", True)
    assert "| qat | m.onnx | yes | 100 B | 0.9 |" in (here / "compression_pareto" / "pareto.md").read_text()
    assert "<svg" in (here / "compression_pareto" / "pareto.html").read_text()


def test_options_choose_metric_cost_and_place(here, capsys):
    left(here / "a")
    assert main(["report", "a", "--metric", "val_acc", "--cost", "bytes_compressed", "--out", "x"]) == 2
    assert "no model has both Deflated and val_acc" in capsys.readouterr().err
    assert main(["report", "a", "--metric", "val_acc", "--mode", "min", "--out", "x"]) == 0
    assert "Size against val_acc, lower is better\n" in capsys.readouterr().out
    assert (here / "x" / "pareto.html").is_file()


@pytest.mark.sample
@pytest.mark.parametrize(
    ("runs", "files"), [(["kd"], "compression_report.json"), (["kd", "qat"], "pareto.json")], ids=["one", "several"]
)
@pytest.mark.parametrize("stdout", ["| true", ">&-"])
def test_files_are_written_whoever_reads_what_is_said(runs, files, stdout, here):
    for own in runs:
        left(here / own)
    command = f"{sys.executable} -m lightning_compress.cli report {' '.join(runs)} --out X {stdout}"
    assert subprocess.run(["bash", "-o", "pipefail", "-c", command], stderr=subprocess.PIPE, check=True).stderr == b""
    assert (here / "X" / files).is_file()


def test_of_each_folder_the_newest_report_is_read(here):
    old, new = left(here / "run"), left(here / "run", name="compression_report_second")
    os.utime(old, (1, 1))
    other = left(here / "run" / "below")
    assert find_reports(here) == [new, other]
    os.utime(new, (0, 0))
    assert find_reports(here) == [old, other]


def test_a_report_that_is_found_twice_counts_once(here, capsys):
    left(here / "runs" / "a")
    assert main(["report", "runs", "runs/a", "runs/a/compression_report.json"]) == 0
    assert "Compression report\n" in capsys.readouterr().out  # of one


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["r/a", "r/b"], ["a", "b"]),
        (["r/a/v", "r/b/v"], ["a", "b"]),
        (["r/a/v0", "r/b/v1"], ["a/v0", "b/v1"]),
        (["r/a", "r/a/v"], ["r/a", "v"]),
        (["x/r/a", "y/r/a"], ["x", "y"]),
    ],
)
def test_runs_are_called_by_what_differs(here, folders, names):
    assert run_names([f"{folder}/compression_report.json" for folder in folders]) == names


def test_two_files_of_one_folder_have_names_of_their_own(here):
    assert run_names(["r/one.json", "r/two.json"]) == ["r/one", "r/two"]


NEWER = to_json(Report(())).replace('"schema": 1', '"schema": 9')
BROKEN = {
    "{": "a compression report must be JSON",
    "[]": "a compression report has a whole number from 1 under 'schema'",
    NEWER: "this report has schema 9, this package reads up to 1: a newer lightning-compress wrote it",
    '{"schema": 1, "rows": [{"name": "a", "bytes": "x"}]}': "'bytes' in 'rows' of a compression report must be a",
    '{"schema": 1, "rows": [{"name": "a", "metrics": [1]}]}': "'metrics' of a compression report must be an object",
    '{"schema": 1, "rows": [{"name": "a", "metrics": {"m": "x"}}]}': "'m' in 'metrics' of a compression report",
    '{"schema": 1, "rows": [{"name": "a", "bytes": 1%s}]}'
    % (400 * "0"): "'bytes' in 'rows' of a compression report must",
    '{"schema": 1, "rows": [{"name": "a", "metrics": {"m": 1%s}}]}' % (400 * "0"): "'m' in 'metrics' of a compression",
    '{"schema": 1, "rows": [{"name": 5}]}': "'name' in 'rows' of a compression report must be text, got 5",
    '{"schema": 1, "rows": [{"name": "\\ud800"}]}': "must be text, and holds half a character",
    '{"schema": 1, "layers": [{"name": "a", "type": "b", "sparsity": null, "bits": 8}]}': "'sparsity' in 'layers' of a",
    '{"schema": 1, "versions": [1]}': "'versions' of a compression report must be an object, got [1]",
    '{"schema": 1, "recipe": "x"}': "'recipe' of a compression report must be an object, got 'x'",
    '{"schema": 1, "command": {}}': "'command' of a compression report must be text, got {}",
    "[" * 100_000: "nested too deeply",
    '{"schema": 1, "pictures": [{"title": "a", "legend": "", "png": "!"}]}': "is no base64",
}


@pytest.mark.parametrize("text", BROKEN, ids=[text[:70] for text in BROKEN])
def test_a_damaged_file_is_named(here, capsys, text):
    (here / "run").mkdir()
    (here / "run" / "compression_report.json").write_text(text)
    assert main(["report", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-compress report: 'run/compression_report.json': ")
    assert BROKEN[text] in error


def test_a_link_to_nothing_is_left_out_and_told_of(here, capsys, caplog):
    left(here / "runs" / "a")
    (here / "runs" / "b").mkdir()
    (here / "runs" / "b" / "compression_report.json").symlink_to(here / "gone.json")
    assert main(["report", "runs"]) == 0
    assert caplog.messages == [
        "'runs/b/compression_report.json' is left out: it is a link to a file that does not exist"
    ]


def test_where_there_is_no_report_it_says_what_there_is(here, capsys):
    (here / "runs" / "a").mkdir(parents=True)
    (here / "runs" / "train.log").touch()
    assert main(["report", "runs"]) == 2
    assert "no compression_report.json in 'runs' or below it; it holds 'a/', 'train.log'." in capsys.readouterr().err
    assert main(["report", "runs/a"]) == 2
    assert "it is empty" in capsys.readouterr().err
    assert main(["report", "rnus"]) == 2
    assert capsys.readouterr().err == "lightning-compress report: 'rnus' does not exist; did you mean 'runs'?\n"
    assert main(["report", "runs/train.log"]) == 2
    assert "'runs/train.log' is a file, and no compression_report.json" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything(here, capsys):
    left(here / "a")
    (here / "file").touch()
    assert main(["report", "a", "--out", "file"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "lightning-compress report: --out must be a directory, and 'file' is a file\n"
    assert captured.out == ""


def test_a_fault_of_our_own_is_no_bad_usage(here, monkeypatch):
    left(here / "a")
    monkeypatch.setattr("lightning_compress.commands.report.write_pareto", lambda *_: int("ours"))
    with pytest.raises(ValueError, match="ours"):
        main(["report", "a", "--metric", "val_acc"])


def test_without_wandb_nothing_is_begun(here, capsys, monkeypatch):
    left(here / "a")
    monkeypatch.setattr("lightning_compress.tracking.pareto_run.find_spec", lambda name: None)
    assert main(["report", "a", "--wandb", "project"]) == 2
    captured = capsys.readouterr()
    assert 'pip install "wandb<1' in captured.err
    assert captured.out == ""
    assert not (here / "compression_pareto").exists()


def test_what_wandb_does_not_take_is_told_and_the_table_stays(here, capsys, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.Error("no such\nentity")

    left(here / "a")
    monkeypatch.setattr(wandb, "init", fail)
    assert main(["report", "a", "--wandb", "project"]) == 1
    message = "lightning-compress report: the table was written, and W&B did not take it: no such entity\n"
    assert capsys.readouterr().err == message
    assert (here / "compression_pareto" / "pareto.html").is_file()


@pytest.mark.slow
def test_the_table_and_the_plot_are_in_an_offline_run(here):
    left(here / "kd", 0.95, 300)
    left(here / "qat", float("nan"), 100)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(here)}
    command = [sys.executable, "-m", "lightning_compress.cli", "report", "kd", "qat", "--wandb", "project"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    media = here / "wandb" / "latest-run" / "files" / "media"
    [table] = [json.loads(path.read_text()) for path in media.rglob("*.table.json")]
    records = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(record["run"], record["model"], record["front"], record["bytes"]) for record in records] == [
        ("qat", "m.onnx", "", 100),
        ("qat", "after", "", 200),
        ("kd", "m.onnx", "yes", 300),
        ("kd", "after", "", 600),
    ]
    [plot] = media.rglob("*.png")
    assert plot.read_bytes()[1:4] == b"PNG"
    [page] = media.rglob("*.html")
    assert page.read_text() == (here / "compression_pareto" / "pareto.html").read_text()


def test_a_report_of_the_first_schema_is_shown(here, capsys):
    stored = Path(__file__).parent / "report" / "data" / "schema_1.json"
    assert main(["report", str(stored)]) == 0
    assert all(row.name in capsys.readouterr().out for row in from_json(stored.read_text()).rows[:1])

from __future__ import annotations

import os

import pytest

from lightning_compress.mechanisms import drafts
from lightning_compress.report import from_json, to_html, to_markdown, write, write_report

from .samples import full_report


@pytest.mark.sample
def test_three_files(tmp_path):
    report = full_report()
    files = write_report(report, tmp_path / "new" / "folder")
    assert sorted(path.name for path in files.json.parent.iterdir()) == [
        "compression_report.html",
        "compression_report.json",
        "compression_report.md",
    ]
    assert from_json(files.json.read_text(encoding="utf-8")) == report
    assert files.markdown.read_text(encoding="utf-8") == to_markdown(report)
    assert files.html.read_text(encoding="utf-8") == to_html(report)


@pytest.mark.sample
def test_a_failed_write_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch):
    first = write_report(full_report(), tmp_path)
    before = first.json.read_bytes()

    def full_disk(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(drafts.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(full_report(), tmp_path)
    assert first.json.read_bytes() == before
    assert len(os.listdir(tmp_path)) == 3


def test_nothing_is_written_when_a_format_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "to_html", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(full_report(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()

"""The pages of what was tried say what the records say, and nothing else."""

from __future__ import annotations

import sys

import pytest
import reliability
from contract.conditions import CONDITIONS
from records import Record, record, records

KD, BOTH = "DistillationCallback", "DistillationCallback + DCILCallback"
FIRST, SECOND = (condition.title for condition in CONDITIONS[:2])
FOUND = [
    Record("matrix", KD, FIRST, "repeatable"),
    Record("matrix", KD, SECOND, "exact", "within 1e-06"),
    Record("matrix", "PTQCallback", SECOND, "works", "by a rank of its own"),
    Record("matrix", BOTH, FIRST, "refused", "'a' | <b>\nno"),
    Record("memory", KD, "peak", "works", "1.25"),
    Record("strangers", KD, "lightly: Sim (images)", "works"),
    Record("strangers", "PTQCallback", "lightly: Sim (images)", "refused", "of no use"),
]


def test_each_cell_says_what_was_recorded():
    page = reliability.page(FOUND)
    cells = reliability.shown(page)
    assert len(cells) == 2 * 2 + 1  # of the circumstances that were tried
    assert (cells[FIRST, "KD"], cells[SECOND, "KD"], cells[SECOND, "PTQ"]) == ("repeatable", "1e-6", "works (1)")
    assert (cells[FIRST, "PTQ"], cells[FIRST, "KD + DCIL"]) == ("not run", "refused (1)")
    assert "- (1) by a rank of its own\n" in page
    assert r"- (1) 'a' \| \<b\> no" in page
    told = "1 exact but for sums in another order, 1 repeatable, 1 work, 1 refused as"
    assert f"4 cells were run: {told} planned." in page
    assert "## Memory\n\n1 cells were run: 1 work.\n\n|  | peak |\n|---|---|\n| KD | works 1.25 |" in page
    assert "lightly" not in page


def test_what_was_done_to_few_callbacks_only_is_a_list():
    found = [
        Record("sharded", KD, "one", "exact", "d = 1e-08"),
        Record("sharded", "PTQCallback", "two", "refused", "in whole parts only"),
        Record("sharded", BOTH, "three", "works", "two processes, and no reference"),
        Record("sharded", "PSGDCallback", "one", "exact", "d = 0e+00"),
    ]
    assert reliability.page(found).partition("4 cells were run: 2 exact, 1 work, 1 refused as planned.")[2] == (
        "\n\n|  | exact | works | refused |\n|---|---|---|---|\n"
        "| one | KD d = 1e-8, PSGD d = 0 |  |  |\n| three |  | KD + DCIL (1) |  |\n| two |  |  | PTQ (2) |\n\n"
        "- (1) two processes, and no reference\n- (2) in whole parts only\n"
    )


def test_other_peoples_modules_have_a_page_of_their_own():
    page = reliability.compatibility(FOUND, "lightly==1.6.0  # of images\npytest>=8.2\n")
    assert "|  | KD | PTQ |\n|---|---|---|\n| lightly: Sim (images) | works | refused (1) |" in page
    assert page.endswith("Versions: lightly==1.6.0.\n")


def test_the_command_writes_both_pages(tmp_path, monkeypatch, capsys):
    folder, page, other = tmp_path / "records", tmp_path / "page.md", tmp_path / "other.md"
    monkeypatch.setattr(sys, "argv", ["reliability", str(folder), "--page", str(page)])
    with pytest.raises(SystemExit):
        reliability.main()
    assert f"{folder} holds no records" in capsys.readouterr().err
    monkeypatch.setenv("COMPRESS_RECORDS", str(folder))
    for own in FOUND:
        record(own.table, own.row, own.column, own.outcome, own.detail)
    monkeypatch.setattr(sys, "argv", ["reliability", str(folder), "--page", str(page), "--compatibility", str(other)])
    reliability.main()
    assert page.read_text() == reliability.page(records(folder))
    assert "lightly: Sim" in other.read_text()

"""What was measured, kept line by line."""

from __future__ import annotations

import json

import pytest

from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.journal import NAME, Journal, Measurement, files_hash

HEADER = {"checkpoint": "abc", "config": "def"}
CHANGE = Change("sparsity", "net.conv", 0.5)


def filled(folder):
    journal = Journal(folder, HEADER)
    journal.add(None, {"val_acc": 0.9})
    journal.add(CHANGE, {"val_acc": 0.8}, 0.1)
    return journal


def test_it_goes_on(tmp_path):
    filled(tmp_path / "new" / "folder")
    again = Journal(tmp_path / "new" / "folder", HEADER)
    assert (again.plain, again.found) == ({"val_acc": 0.9}, {CHANGE: Measurement({"val_acc": 0.8}, 0.1)})


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path, cut):
    path = filled(tmp_path).path
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, HEADER)
    assert (again.plain, again.found) == ({"val_acc": 0.9}, {})
    again.add(CHANGE, {"val_acc": float("nan")}, 0.2)
    assert [len(json.loads(line)) for line in path.read_text().splitlines()] == [3, 1, 5]
    assert str(Journal(tmp_path, HEADER).found[CHANGE].metrics["val_acc"]) == "nan"


def test_a_header_that_was_cut_off_begins_anew(tmp_path):
    (tmp_path / NAME).write_text('{"schema"')
    assert Journal(tmp_path, HEADER).plain is None
    assert json.loads((tmp_path / NAME).read_text()) == {"schema": 1, **HEADER}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        "[]",
        '{"metrics": {"val_acc": null}}',
        '{"metrics": 0.5}',
        '{"method": "bits", "level": 4, "moved": 0.1, "metrics": {"val_acc": 0.5}}',
        '{"method": "bits", "layer": "a", "level": null, "moved": 0.1, "metrics": {"val_acc": 0.5}}',
    ],
)
def test_a_damaged_line_is_told(tmp_path, line):
    path = filled(tmp_path).path
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    with pytest.raises(ValueError, match=rf"{NAME}: line 2 is damaged; begin anew with --restart"):
        Journal(tmp_path, HEADER)


def test_measurements_of_something_else_are_refused_unless_thrown_away(tmp_path):
    filled(tmp_path)
    other = {"checkpoint": "xyz", "config": "ghi"}
    with pytest.raises(ValueError, match="of another checkpoint and another config: give --restart to throw them away"):
        Journal(tmp_path, other)
    assert Journal(tmp_path, other, restart=True).found == {}
    assert Journal(tmp_path, other).plain is None


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    first, second = (str(tmp_path / name) for name in "ab")
    assert files_hash([first, second]) != files_hash([second, first])

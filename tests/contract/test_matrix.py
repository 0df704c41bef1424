"""Each row in each of the circumstances in which projects train: exact, or refused as was planned."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
from cases import CASES, REFUSED, WARNED
from pages import ROOT
from records import record
from reliability import NOT_RUN, heading, shown
from rows import ROWS

from .conditions import CONDITIONS, kind_of


def expected(table, row, condition):
    """What is written down for the members of a row, or for the row as a whole."""
    return [entry for name, entry in table.get(condition.key, {}).items() if re.search(rf"\b{name}\b", row.name)]


def marks_of(row, condition):
    """All cells of one callback are a sample; where each takes seconds, one in three, with every kind of module.

    Those that a few callbacks alone are tried in take too long for it, and so do processes that are spawned.
    """
    turn = ROWS.index(row) // len(condition.kinds) + CONDITIONS.index(condition)
    whole = row in CASES and condition.sampled and not condition.alone
    sampled = whole and (turn % 3 == 0 or not (row.heavy or condition.heavy))
    return [pytest.mark.slow, *[pytest.mark.sample] * sampled]


CELLS = [
    pytest.param(row, condition, id=f"{row.name}-{condition.key}", marks=marks_of(row, condition))
    for condition in CONDITIONS
    for row in ROWS
    if condition.has(row)
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("row", "condition"), CELLS)
def test_cell(row, condition, tmp_path):
    kind = kind_of(row, condition)
    refusals = expected(REFUSED, row, condition)
    if refusals:
        with pytest.raises(Exception, match="|".join(refusals)) as caught:
            condition.run(row, kind, tmp_path)
        record("matrix", row.name, condition.title, "refused", reason(caught.value, row))
        return
    warnings = expected(WARNED, row, condition)
    with pytest.warns(UserWarning, match="|".join(warnings)) if warnings else nullcontext():
        found = condition.run(row, kind, tmp_path)
    outcome, within = condition.passed(row)
    assert {key: gap for key, gap in found.items() if gap > within} == {}
    detail = f"within {within:g}" if within else "".join(f"warns: {told}" for told in warnings[:1])
    record("matrix", row.name, condition.title, outcome, detail)


def reason(error, row):
    """What a refusal says, whoever it is of; of an error that was raised in another process, the end."""
    said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    return re.sub("|".join(row.name.split(" + ")), "this callback", said)


def test_each_kind_of_module_is_in_the_sample_of_each_of_the_circumstances():
    for condition in (own for own in CONDITIONS if own.sampled and not own.alone):
        sampled = [cell.values[0] for cell in CELLS if cell.values[1] is condition and pytest.mark.sample in cell.marks]
        assert {kind_of(row, condition) for row in sampled} == set(condition.kinds)


def test_what_is_expected_is_of_rows_and_circumstances_that_there_are():
    for table in (REFUSED, WARNED):
        assert set(table) <= {condition.key for condition in CONDITIONS}
        names = {name for entries in table.values() for name in entries}
        assert [name for name in names if not any(re.search(rf"\b{name}\b", row.name) for row in ROWS)] == []


def test_the_page_shows_the_cells_that_there_are():
    """Made anew by ``python -m tests.reliability`` where it does not."""
    page = shown((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    cells = {place: text for place, text in page.items() if text != NOT_RUN}
    refused = {
        (condition.title, heading(row.name)): bool(expected(REFUSED, row, condition)) for row, condition in grid()
    }
    assert {place: text.startswith("refused") for place, text in cells.items()} == refused


def grid():
    return [(row, condition) for row in ROWS for condition in CONDITIONS if condition.has(row)]

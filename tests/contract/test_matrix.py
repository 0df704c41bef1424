"""Each row in each of the circumstances in which projects train: exact, or refused as was planned."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from cases import REFUSED, WARNED, WITHIN
from records import record
from rows import ROWS

from .conditions import CONDITIONS, kind_of


def expected(table, row, condition):
    """What is written down for the members of a row."""
    entries = table.get(condition.key, {})
    return [entries[name] for name in row.name.split(" + ") if name in entries]


CELLS = [pytest.param(row, condition, id=f"{row.name}-{condition.key}") for condition in CONDITIONS for row in ROWS]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("row", "condition"), CELLS)
def test_cell(row, condition, tmp_path):
    kind = kind_of(row, condition)
    refusals = expected(REFUSED, row, condition)
    if refusals:
        with pytest.raises(Exception, match="|".join(refusals)) as caught:
            condition.run(row, kind, tmp_path)
        record("matrix", row.name, condition.title, "refused", str(caught.value))
        return
    warnings = expected(WARNED, row, condition)
    with pytest.warns(UserWarning, match="|".join(warnings)) if warnings else nullcontext():
        found = condition.run(row, kind, tmp_path)
    within = max(expected(WITHIN, row, condition), default=condition.within)
    assert {key: gap for key, gap in found.items() if gap > within} == {}
    record("matrix", row.name, condition.title, "exact", f"within {within:g}" if within else "")

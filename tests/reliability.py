"""Makes the pages of what was tried out of what the tests have recorded; nothing in their tables is written by hand.

COMPRESS_RECORDS=records python -m pytest -m slow tests
python -m tests.reliability records --page docs/reliability.md --compatibility docs/compatibility.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))  # so that this runs as a module, and as a script

from contract.conditions import CONDITIONS
from records import Outcome, Record, records

SHORT = {
    "DistillationCallback": "KD",
    "AttentionTransferCallback": "AT",
    "FactorTransferCallback": "FT",
    "PSGDCallback": "PSGD",
    "PTQCallback": "PTQ",
    "QATCallback": "QAT",
    "PruningCallback": "Pruning",
    "DPFCallback": "DPF",
    "DCILCallback": "DCIL",
    "StructuredPruningCallback": "Structured",
    "ExportCallback": "Export",
    "CompressionReport": "Report",
}
"""Headings, in the order of the rows of ``cases.py``."""
NOT_RUN = "not run"
BRIEF = 12
"""A detail of so many characters stands in its cell; a longer one, and what a refusal says, below the table."""

INTRODUCTION = """# Reliability

What was tried, with what came of it. The tables are made by a program from what the tests recorded when they passed;
nothing in them is written by hand.

```console
COMPRESS_RECORDS=records python -m pytest -m slow tests
python -m tests.reliability records --page docs/reliability.md
```

- **exact**: equal to an independent reference: a loop by hand, or the circumstances made by hand.
- **repeatable**: equal to the same fit in other circumstances that must not matter, or to the fit that is resumed from
  its middle. What both have in common is not checked by that.
- A figure beside these words is the largest difference that was allowed, as sums in another order make one; without one
  both are equal bit for bit. A figure alone is that of an exact cell.
- **works**: the callback had its effect and left nothing behind; there is no reference to be equal to.
- **refused**: the error that was planned came, before anything of the module had changed.
"""

MATRIX = """## Circumstances

How projects train, down; callbacks, across. Each cell is a fit of a small network with that callback in these
circumstances, and another fit that it has to equal: in its weights, in the dense weights beside them, and in the state
of the callback. Beside that it asserts that the callback had an effect, that the keys of the `state_dict` are as
before, that the checkpoint loads strictly into the plain module (with `load_shrunk`, where filters went), that no hook
and no attribute is left, and that nothing was warned of but what a note says. Four kinds of module take turns: with a
network in it, with batch norm, one that is the network itself, and one with dict batches and keyword arguments.
"""

TITLES = {
    "combinations": "Callbacks together",
    "kills": "Kills and damage",
    "sharded": "Sharded weights (FSDP2)",
    "memory": "Memory",
}


def order_of(row: str) -> tuple[int, list[int], str]:
    """One callback before several, and each in the order of the rows of ``cases.py``."""
    names, known = row.split(" + "), list(SHORT)
    return len(names), [known.index(name) if name in known else len(known) for name in names], row


def heading(row: str) -> str:
    """What a row is called where there is little room."""
    return " + ".join(SHORT.get(name, name) for name in row.split(" + "))


class Notes:
    """Remarks below a table, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, remark: str) -> str:
        return f"({self._numbers.setdefault(remark, len(self._numbers) + 1)})"

    def lines(self) -> list[str]:
        return [f"- ({number}) {_plain(remark)}" for remark, number in self._numbers.items()]


def cell(record: Record | None, notes: Notes) -> str:
    """The outcome, with a short detail beside it or a number that leads to a long one."""
    if record is None:
        return NOT_RUN
    detail = re.sub(r"e([+-])0(\d)\b", r"e\1\2", record.detail).replace("0e+0", "0")
    if detail.startswith("within "):
        number = detail.removeprefix("within ")
        return number if record.outcome == "exact" else f"{record.outcome} {number}"
    if not detail:
        return record.outcome
    long = len(detail) > BRIEF or record.outcome == "refused"
    return f"{record.outcome} {notes.mark(detail) if long else _plain(detail)}"


def table(found: Iterable[Record], down: Sequence[str], across: Sequence[str], *, by_row: bool) -> list[str]:
    """Markdown: rows of the records down and their columns across if ``by_row``, else the other way round."""
    places = {(own.row, own.column) if by_row else (own.column, own.row): own for own in found}
    notes = Notes()
    lines = [
        f"|  | {' | '.join(heading(name) for name in across)} |",
        f"|---|{'---|' * len(across)}",
        *(
            f"| {heading(name)} | {' | '.join(cell(places.get((name, other)), notes) for other in across)} |"
            for name in down
        ),
    ]
    return [*lines, "", *notes.lines(), ""]


def counts(found: Sequence[Record]) -> str:
    """How many cells there are, and what came of them."""
    numbers = {}
    for outcome in ("exact", "repeatable"):
        within = [own.detail.startswith("within ") for own in found if own.outcome == outcome]
        numbers[outcome] = within.count(False)
        numbers[f"{outcome} but for sums in another order"] = within.count(True)
    numbers |= {
        "work": sum(own.outcome == "works" for own in found),
        "refused as planned": sum(own.outcome == "refused" for own in found),
    }
    return (
        f"{len(found)} cells were run: {', '.join(f'{number} {what}' for what, number in numbers.items() if number)}."
    )


def matrix(found: Sequence[Record]) -> list[str]:
    """The circumstances: one table for single callbacks, and one for those that are attached together."""
    titles = [condition.title for condition in CONDITIONS]
    rows = sorted({own.row for own in found}, key=order_of)
    lines = [MATRIX, counts(found), ""]
    for together in (False, True):
        across = [row for row in rows if (" + " in row) == together]
        if across:
            lines += ["Several callbacks together:", ""] if together else []
            some = [own for own in found if own.row in across]
            tried = {own.column for own in some}
            lines += table(some, [title for title in titles if title in tried], across, by_row=False)
    references = [f"| {condition.title} | {condition.reference} |" for condition in CONDITIONS]
    return [*lines, "What each has to equal:", "", "| circumstances | reference |", "|---|---|", *references, ""]


def section(title: str, found: Sequence[Record]) -> list[str]:
    """Any other table: what was attached, down; what was done to it, across; a list where few of these cells ran."""
    down = sorted({own.row for own in found}, key=order_of)
    across = sorted({own.column for own in found})
    full = len(found) > len(down) * len(across) / 2
    body = table(found, down, across, by_row=True) if full else listed(found, across)
    return [f"## {title}", "", counts(found), "", *body]


def listed(found: Sequence[Record], down: Sequence[str]) -> list[str]:
    """Markdown: what was done, down; the outcomes, across; in the cells the callbacks, each with its detail."""
    across = [outcome for outcome in get_args(Outcome) if any(own.outcome == outcome for own in found)]
    notes = Notes()
    lines = [f"|  | {' | '.join(across)} |", f"|---|{'---|' * len(across)}"]
    for column in down:
        here = sorted((own for own in found if own.column == column), key=lambda own: order_of(own.row))
        cells = [", ".join(entry(own, notes) for own in here if own.outcome == outcome) for outcome in across]
        lines.append(f"| {_plain(column)} | {' | '.join(cells)} |")
    return [*lines, "", *notes.lines(), ""]


def entry(record: Record, notes: Notes) -> str:
    """A callback, with the detail of its outcome beside it or the number that leads to it."""
    return f"{heading(record.row)} {cell(record, notes).removeprefix(record.outcome).strip()}".strip()


def page(found: Sequence[Record]) -> str:
    """``docs/reliability.md``."""
    own = {name: [entry for entry in found if entry.table == name] for name in {entry.table for entry in found}}
    lines = [INTRODUCTION, *matrix(own.pop("matrix", []))]
    own.pop("strangers", None)
    for name in sorted(own, key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name)):
        lines += section(TITLES.get(name, name.capitalize()), own[name])
    return "\n".join(lines).rstrip() + "\n"


COMPATIBILITY = """# Compatibility

Modules that other people wrote and published, unmodified, with each callback. A cell works if the callback had its
effect, and left nothing on the module that the same fit without it does not leave; otherwise the planned refusal came,
with a message that says why.

```console
python -m pip install -e ".[onnx,structured]" -r tests/strangers/requirements.txt
python -m pip install --no-deps -r tests/strangers/requirements-alone.txt
COMPRESS_RECORDS=records python -m pytest -o addopts="" tests/strangers
python -m tests.reliability records --compatibility docs/compatibility.md
```
"""


def compatibility(found: Sequence[Record], requirements: str) -> str:
    """``docs/compatibility.md``."""
    own = [entry for entry in found if entry.table == "strangers"]
    own = [replace(entry, detail="") if entry.outcome == "works" else entry for entry in own]  # there is room for whys
    modules, callbacks = sorted({entry.column for entry in own}), sorted({entry.row for entry in own}, key=order_of)
    versions = re.findall(r"^([\w.-]+==[\w.]+)", requirements, flags=re.MULTILINE)
    lines = [COMPATIBILITY, counts(own), "", *table(own, modules, callbacks, by_row=False)]
    return "\n".join([*lines, f"Versions: {', '.join(versions)}."]) + "\n"


def shown(text: str) -> dict[tuple[str, str], str]:
    """Cells of the tables of circumstances on a page: title and heading to what stands there."""
    part = text.split("## Circumstances")[1].split("What each has to equal")[0]
    cells, across = {}, []
    for line in re.findall(r"^\|(.*)\|$", part, flags=re.MULTILINE):
        first, *others = (entry.strip() for entry in re.split(r"(?<!\\)\|", line))
        if not first:
            across = others
        elif not first.startswith("---"):
            cells.update({(first, name): entry for name, entry in zip(across, others, strict=True)})
    return cells


def _plain(text: str) -> str:
    """One line, without what Markdown would take for its own."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder that COMPRESS_RECORDS named when the tests ran")
    parser.add_argument("--page", type=Path, help="write the page of circumstances, combinations, kills and the rest")
    parser.add_argument("--compatibility", type=Path, help="write the page of other people's modules")
    arguments = parser.parse_args()
    found = records(arguments.records)
    if not found:
        parser.error(f"{arguments.records} holds no records: run the tests with COMPRESS_RECORDS={arguments.records}")
    if arguments.page:
        arguments.page.write_text(page(found), encoding="utf-8")
    if arguments.compatibility:
        requirements = Path(__file__).with_name("strangers") / "requirements.txt"
        arguments.compatibility.write_text(compatibility(found, requirements.read_text()), encoding="utf-8")


if __name__ == "__main__":
    main()

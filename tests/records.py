"""What the tests of reliability ran and found, one file each, of which the tables in the documentation are made.

Nothing is written unless the environment variable names a folder:

    COMPRESS_RECORDS=records python -m pytest -m "slow or not slow" tests/contract
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VARIABLE = "COMPRESS_RECORDS"

Outcome = Literal["exact", "repeatable", "works", "refused"]


@dataclass(frozen=True, order=True)
class Record:
    """One cell of a table.

    Attributes:
        table: Which table, such as "matrix", "combinations", "kills", "sharded", "strangers", "memory".
        row: What was attached: the class of a callback, or several joined by " + ".
        column: The circumstances.
        outcome: "exact": equal to an independent reference, such as a loop by hand; "repeatable": equal to the same fit
            in other circumstances that must not matter, or to itself resumed; both bit for bit, or within what
            ``detail`` says, such as "within 1e-6";
            "works": it had its effect, and there is no reference to be equal to; "refused": the error that was planned.
        detail: The largest difference, a ratio, or the message of the refusal, in a few words.
    """

    table: str
    row: str
    column: str
    outcome: Outcome
    detail: str = ""


def record(table: str, row: str, column: str, outcome: Outcome, detail: str = "") -> None:
    """Write down a cell that was run, after all that it asserts has held."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    cell = Record(table, row, column, outcome, _without_traceback(detail))
    name = hashlib.sha256("\0".join((table, row, column)).encode()).hexdigest()[:20]
    path = Path(folder) / table / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(cell), indent=1))


def _without_traceback(text: str) -> str:
    """What an error of a process says, where its parent repeats all of what led to it."""
    if "Traceback (most recent call last)" not in text:
        return text
    begins = [match.end() for match in re.finditer(r"^[\w.]+: ", text, re.MULTILINE)]
    return text[begins[-1] :].strip() if begins else text.strip().splitlines()[-1]


def records(folder: Path) -> list[Record]:
    """All cells in a folder, sorted."""
    return sorted(Record(**json.loads(path.read_text())) for path in folder.rglob("*.json"))

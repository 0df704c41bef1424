"""What was measured so far, a line each, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_compress.commands.exits import UsageError
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.mechanisms.drafts import write_whole
from lightning_compress.tracking.exported import file_digest

SCHEMA = 1
NAME = "sensitivity.jsonl"


@dataclass(frozen=True)
class Measurement:
    """What one change did.

    Attributes:
        metrics: What the validation gave.
        moved: How far the weights moved, as :func:`~lightning_compress.commands.sensitivity.changes.applied` tells.
    """

    metrics: Mapping[str, float]
    moved: float


class Journal:
    """The file of measurements.

    Args:
        folder: Where it is.
        header: What the measurements depend on.
        restart: Begin anew, whatever is there.

    Attributes:
        plain: The metrics of the unchanged network; None: not measured yet.
        found: What was measured of each change.

    Raises:
        UsageError: If the file that is there is of something else, or damaged.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Journal(folder, {"checkpoint": "a"}).add(Change("bits", "conv1", 4), {"val_acc": 0.9}, 0.01)
        ...     Journal(folder, {"checkpoint": "a"}).found
        {Change(method='bits', layer='conv1', level=4): Measurement(metrics={'val_acc': 0.9}, moved=0.01)}
    """

    def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = Path(folder) / NAME
        self.plain: Mapping[str, float] | None = None
        self.found: dict[Change, Measurement] = {}
        self._header = {"schema": SCHEMA, **header}
        entries = [] if restart or not self.path.exists() else self._read()
        if entries:
            self._check(entries[0])
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._header) + "\n")
        for entry in entries[1:]:
            self._take(entry)

    def add(self, change: Change | None, metrics: Mapping[str, float], moved: float = 0.0) -> None:
        """Write one measurement down.

        Args:
            change: What was changed; None: nothing.
            metrics: What the validation gave.
            moved: How far the weights moved.

        Raises:
            OSError: If it cannot be written. What stands there stays: a line that was cut off is passed over.
        """
        what = {} if change is None else {**asdict(change), "moved": moved}
        entry = {**what, "metrics": dict(metrics)}
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "method" in entry:
            change = Change(entry["method"], entry["layer"], entry["level"])
            self.found[change] = Measurement(entry["metrics"], entry["moved"])
        else:
            self.plain = entry["metrics"]

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; the rest of one that was cut off is removed."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                complete = line.endswith(b"\n") and (_is_measurement(entry) if number > 1 else isinstance(entry, dict))
            except ValueError:
                complete = False
            if not complete and number < len(lines):
                raise UsageError(
                    f"{self.path}: line {number} is damaged; begin anew with --restart, or in another --out"
                )
            if not complete:
                os.truncate(self.path, sum(map(len, lines[:-1])))
                break
            entries.append(entry)
        return entries

    def _check(self, before: Mapping[str, Any]) -> None:
        schema = before.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise UsageError(
                f"{self.path} has schema {schema}, newer than {SCHEMA}, the newest that this version of "
                "lightning_compress reads: upgrade the package, or give another --out"
            )
        different = [name for name in self._header if before.get(name) != self._header[name]]
        if different:
            raise UsageError(
                f"{self.path} holds measurements of another {' and another '.join(different)}: give --restart to throw "
                "them away, or another --out"
            )


def _is_measurement(entry: Any) -> bool:
    """Whether a line below the header says what was changed, if anything, and what the validation gave then."""
    if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
        return False
    numbers = [*entry["metrics"].values(), *([entry.get("level"), entry.get("moved")] if "method" in entry else [])]
    names = [entry["method"], entry.get("layer")] if "method" in entry else []
    return all(isinstance(own, (int, float)) for own in numbers) and all(isinstance(own, str) for own in names)


def files_hash(paths: Sequence[str]) -> str:
    """SHA-256 of the contents of several files, in their order.

    Example:
        >>> files_hash([])[:8]
        'e3b0c442'
    """
    return hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()

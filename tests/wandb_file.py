"""A reader for what Weights & Biases writes offline: wandb has none in Python.

A ``.wandb`` file is a header of 7 bytes, then a LevelDB log: blocks of 32 KiB, filled with chunks. A chunk is a header
of 7 bytes (checksum, length, kind) and data; a record is one whole chunk, or a first, middle ones and a last.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Record]:
    """Every record of a ``.wandb`` file, in its order."""
    data, position, pending = path.read_bytes(), HEADER, b""
    while position + CHUNK <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK:  # no header fits any more: zeros until the next block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += CHUNK
        pending = (b"" if kind in (FULL, FIRST) else pending) + data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(pending)


class OfflineRun:
    """The only offline run below a folder, which has been finished: its last records are written a little later."""

    def __init__(self, folder: Path, patience: float = 60.0) -> None:
        [self.path] = Path(folder).rglob("offline-run-*/*.wandb")
        until = time.monotonic() + patience
        while not (found := list(records(self.path))) or not found[-1].HasField("exit"):
            assert time.monotonic() < until, f"{self.path} has no end"
            time.sleep(0.05)
        self.records = found

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, a row a call."""
        rows = [record.history.item for record in self.records if record.HasField("history")]
        return [_nested(row) for row in rows]

    def series(self, key: str) -> list[Any]:
        """All values of a key."""
        return [row[key] for row in self.history if key in row]

    @property
    def metrics(self) -> dict[str, Any]:
        """Definition of each metric; those with a star are by their pattern."""
        found = [record.metric for record in self.records if record.HasField("metric")]
        return {metric.name or metric.glob_name: metric for metric in found}

    @property
    def config(self) -> dict[str, Any]:
        """What the configuration was at the end."""
        found: dict[str, Any] = {}
        for record in self.records:
            updates = [*record.run.config.update, *record.config.update]
            found |= _nested(updates)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What was kept of each key at the end."""
        found: dict[str, Any] = {}
        for record in self.records:
            found |= _nested(record.summary.update)
        return found

    @property
    def artifacts(self) -> dict[str, Any]:
        """The artifacts by name."""
        found = [record.artifact for record in self.records if record.HasField("artifact")]
        names = [artifact.name for artifact in found]
        assert len(names) == len({*names}), f"logged twice: {names}"
        return dict(zip(names, found, strict=True))

    def file(self, value: dict[str, Any]) -> Path:
        """The file of a picture or a table that was logged."""
        return self.path.parent / "files" / value["path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of a table that was logged."""
        [value] = self.series(key)
        content = json.loads(self.file(value).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def _nested(items: Iterable[Any]) -> dict[str, Any]:
    """Keys and values; what pictures and tables say of themselves comes piece by piece."""
    found: dict[str, Any] = {}
    for item in items:
        place = found
        *outer, last = item.nested_key or [item.key]
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found

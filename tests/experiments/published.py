"""The records of runs as the documentation keeps them: whoever has them writes its tables without making a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .experiment import Experiment
from .store import Store, write_atomically


def publish(experiments: Mapping[str, Experiment], store: Store, seeds: int, folder: Path) -> None:
    """Write what is there of each experiment into a file of its own, a line a record.

    What several share is in the file of the first of them only, so that there is one of it.
    """
    done: set[Path] = set()
    for name, experiment in experiments.items():
        own = {job.record for job in experiment.jobs(store, seeds) if store.has(job.record)} - done
        done |= own
        lines = (f"{json.dumps(path.as_posix())}: {json.dumps(store.load(path))}" for path in sorted(own))
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        if own:
            write_atomically(folder / f"{name}.json", lambda part, text=text: Path(part).write_text(text))


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """All records, by their paths in the folder of whoever makes runs."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        own = json.loads(path.read_text())
        if twice := sorted(own.keys() & records.keys()):
            raise ValueError(f"{twice[0]} is in {path} and in another file of its folder: one of them must go")
        records |= own
    return records

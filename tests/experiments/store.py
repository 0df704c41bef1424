"""The folder that keeps each run in a file of its own, so that what was made is not made again."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import CHOICE_SEED, PLAIN, Arm, Protocol, Run


class Store:
    """Records by their paths in a folder; where it has none, those that were published."""

    def __init__(self, folder: Path, published: Mapping[str, dict[str, Any]] | None = None):
        self.folder, self.published = folder, published or {}

    def has(self, record: Path) -> bool:
        return (self.folder / record).is_file() or record.as_posix() in self.published

    def load(self, record: Path) -> dict[str, Any] | None:
        """None if there is none."""
        path = self.folder / record
        return json.loads(path.read_text()) if path.is_file() else self.published.get(record.as_posix())

    def save(self, record: Path, known: dict[str, Any]) -> None:
        text = json.dumps(known, indent=1)
        write_atomically(self.folder / record, lambda path: Path(path).write_text(text))

    def read(self, run: Any) -> dict[str, Any] | None:
        """The run's result, or None if it has not been made."""
        return self.load(path_of(run))

    def write(self, run: Any, result: dict[str, Any]) -> None:
        self.save(path_of(run), result)

    def of_file(self, path: Path) -> dict[str, Any] | None:
        """The record beside a file, or None."""
        return self.load(beside(path))


def path_of(run: Any) -> Path:
    """Of a run's record."""
    return Path("runs") / f"{run.key}.json"


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone, at what the held-out images choose among some candidates.

    With `follow`, the candidates are those of another series, whose choice is taken over.
    """

    candidates: tuple[Any, ...]
    follow: Callable[[Any], Any] | None = None

    @property
    def own(self) -> tuple[Any, ...]:
        """The candidates that are runs of this series."""
        return () if self.follow else self.candidates

    def chosen(self, store: Store) -> Any:
        """The best candidate on the held-out images, of equals the first; None if one is missing, or none is known."""
        found = [store.read(run) for run in self.candidates]
        if not found or None in found:
            return None
        best, _ = max(zip(self.candidates, found, strict=True), key=lambda own: own[1]["held_out_accuracy"])
        return self.follow(best) if self.follow else best

    def runs(self, store: Store, seeds: int) -> list[Any]:
        """One a seed; none before the choice is complete."""
        chosen = self.chosen(store)
        return [] if chosen is None else [dataclasses.replace(chosen, seed=seed) for seed in range(seeds)]


def series(protocol: Protocol, arm: Arm) -> Series:
    """An arm's runs; of rates that do equally well, the lowest is chosen."""
    if arm.steps is not None:
        return Series(
            tuple(candidates(protocol, PLAIN)),
            lambda run: dataclasses.replace(run, arm=arm, rate=round(arm.steps * run.rate, 6)),
        )
    return Series(tuple(candidates(protocol, arm)))


def candidates(protocol: Protocol, arm: Arm) -> list[Run]:
    """The runs that choose an arm's learning rate."""
    if arm.steps is not None:
        return []
    return [Run(protocol, arm, rate, CHOICE_SEED) for rate in protocol.rates]


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write beside the path first: an interrupted write leaves no half file under the name that resume looks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    write(part)
    os.replace(part, path)


def beside(path: Path) -> Path:
    """The record of a file that is no record itself; it may be there without the file."""
    return path.with_name(f"{path.name}.json")


def write_with_record(folder: Path, path: Path, write: Callable[[str], object], begin: float, **known: Any) -> None:
    """Write a file, and what it took of one thread since `begin`, a reading of `time.process_time`.

    The record first: whoever finds the file finds that too.
    """
    Store(folder).save(beside(path), {**known, "cpu_seconds": time.process_time() - begin})
    write_atomically(folder / path, write)

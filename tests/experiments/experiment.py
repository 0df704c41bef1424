"""What all experiments have in common: what is made, in which order, and what is said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .store import Store, beside


@dataclass(frozen=True)
class Job:
    """Something that is made once: a call that leaves a file in the folder, and says what came out.

    `make` gets `arguments` and the folder, in a process of its own.
    """

    path: Path  # in the folder
    make: Callable[..., str]
    arguments: tuple[Any, ...] = ()

    @classmethod
    def of(cls, measure: Callable[[Any, Path], dict[str, Any]], run: Any) -> Job:
        """A run that is measured, and whose result is kept under its key."""
        return cls(Store(Path()).path(run), keep, (measure, run))

    def there(self, folder: Path) -> bool:
        return (folder / self.path).is_file()

    def seconds(self, folder: Path) -> dict[str, float | None]:
        """What it took of one thread, by file, None where that was not kept.

        A network that several runs share has a file of its own.
        """
        path, name = folder / self.path, self.path.name
        if not self.there(folder):
            return {}
        if beside(path).is_file():
            return {name: Store.load(beside(path))["cpu_seconds"]}
        if path.suffix not in (".json", ".pt"):
            return {name: None}
        kept = Store.load(path) if path.suffix == ".json" else torch.load(path, weights_only=True)
        network = {kept["network"]: kept["network_seconds"]} if "network" in kept else {}
        return {name: kept["cpu_seconds"] - sum(network.values()) if "cpu_seconds" in kept else None} | network


@dataclass(frozen=True)
class Named:
    """Something other than a training, whose result is kept as that of a run is."""

    key: str


def keep(measure: Callable[[Any, Path], dict[str, Any]], run: Any, folder: Path) -> str:
    result = measure(run, folder)
    Store(folder).write(run, result)
    said = (f"{name} {result[name]:.4g}" for name in ("held_out_accuracy", "cpu_seconds") if name in result)
    return ", ".join(said) or "measured"


@dataclass(frozen=True)
class Line:
    """A claim in one line; `difference` in points of test accuracy."""

    compared: str
    protocol: str
    difference: str
    minutes: float


class Experiment(ABC):
    """A page of tables, and all that has to be made for it."""

    page: str
    picture: str | None = None
    caption = ""  # of the picture

    @abstractmethod
    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        """What is made, one batch after the other; what is chosen for one is read from those before it."""

    @abstractmethod
    def tables(self, store: Store, seeds: int) -> str:
        """The tables, from what has been made."""

    def lines(self, store: Store, seeds: int) -> list[Line]:
        """The claims, in a line each."""
        return []

    def draw(self, store: Store, seeds: int, path: Path) -> bool:
        """Draw the picture; whether there is anything to be seen."""
        return False

    def jobs(self, store: Store, seeds: int) -> list[Job]:
        """All that can be named by now, each once."""
        return list({job.path: job for batch in self.batches(store, seeds) for job in batch}.values())


def minutes(jobs: Iterable[Job], folder: Path) -> float:
    """What jobs took of one thread; what several share is counted once, what is not known not at all."""
    return sum(value or 0.0 for value in seconds(jobs, folder).values()) / 60


def seconds(jobs: Iterable[Job], folder: Path) -> dict[str, float | None]:
    """What jobs took, by file, None where that was not kept."""
    return {name: value for job in jobs for name, value in job.seconds(folder).items()}

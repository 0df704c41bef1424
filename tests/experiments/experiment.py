"""What all experiments have in common: what is made, in which order, and what is said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .store import Store, beside, path_of


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
        return cls(path_of(run), measure_and_keep, (measure, run))

    @classmethod
    def again(cls, file: Path, measure: Callable[[Any, Path], dict[str, Any]], run: Any) -> Job:
        """A run that is made once more for a file that it leaves last: its result was kept without the file."""
        return cls(file, measure_again, (measure, run))

    def there(self, store: Store) -> bool:
        return store.has(self.path) if self.is_result else (store.folder / self.path).is_file()

    @property
    def is_result(self) -> bool:
        """Whether it is a record itself; anything else is a file that others begin with, its record beside it."""
        return self.path.suffix == ".json"

    @property
    def record(self) -> Path:
        """In the folder."""
        return self.path if self.is_result else beside(self.path)

    def seconds(self, store: Store) -> dict[str, float]:
        """What it took of one thread, by file; a network that several runs share has a file of its own."""
        if (kept := store.load(self.record)) is None:
            return {}
        network = {kept["network"]: kept["network_seconds"]} if "network" in kept else {}
        return {self.path.name: kept["cpu_seconds"] - sum(network.values())} | network


@dataclass(frozen=True)
class Named:
    """Something other than a training, whose result is kept as that of a run is."""

    key: str


def measure_and_keep(measure: Callable[[Any, Path], dict[str, Any]], run: Any, folder: Path) -> str:
    result = measure(run, folder)
    Store(folder).write(run, result)
    said = (f"{name} {result[name]:.4g}" for name in ("held_out_accuracy", "cpu_seconds") if name in result)
    return ", ".join(said) or "measured"


def measure_again(measure: Callable[[Any, Path], dict[str, Any]], run: Any, folder: Path) -> str:
    measure(run, folder)
    return "made again"


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
        """What is made, one batch after the other; what is chosen for one is read from results of those before it.

        Never from files: a batch of these is only made once a result after it is missing.
        """

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


def minutes(jobs: Iterable[Job], store: Store) -> float:
    """What jobs took of one thread; what several share is counted once."""
    return sum({name: value for job in jobs for name, value in job.seconds(store).items()}.values()) / 60

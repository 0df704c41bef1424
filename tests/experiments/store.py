"""The folder that keeps each run in a file of its own, so that what was made is not made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plan import CHOICE_SEED, PLAIN, Arm, Calibrated, Protocol, Run


class Store:
    """Runs by their configuration."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, run: Run | Calibrated) -> Path:
        return self.folder / "runs" / f"{run.key}.json"

    def read(self, run: Run | Calibrated) -> dict[str, Any] | None:
        """The run's result, or None if it has not been made."""
        path = self.path(run)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, run: Run | Calibrated, result: dict[str, Any]) -> None:
        text = json.dumps(result, indent=1)
        write_atomically(self.path(run), lambda path: Path(path).write_text(text))

    def chosen_rate(self, protocol: Protocol, arm: Arm) -> float | None:
        """The arm's learning rate by the held-out images, of equals the lowest; None if a run for it is missing."""
        if arm.steps is not None:
            alone = self.chosen_rate(protocol, PLAIN)
            return None if alone is None else round(arm.steps * alone, 6)
        accuracies = {}
        for run in candidates(protocol, arm):
            result = self.read(run)
            if result is None:
                return None
            accuracies[run.rate] = result["held_out_accuracy"]
        return max(accuracies, key=lambda rate: (accuracies[rate], -rate))


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

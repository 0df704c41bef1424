"""What is measured of ONNX files: the classes that they give, their bytes, and how fast they are beside one another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_compress import ExportCallback
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.report.latency import measure_latency
from lightning_compress.report.measure import compressed_bytes

from .data import Images
from .experiment import Job
from .plan import digest
from .store import Series, Store
from .watch import share

LOOK = 500  # images at a time
SESSIONS = 5


def exports(files: Mapping[str, Path]) -> list[Callback]:
    """What writes several files in one fit, by their precision."""
    return [
        ExportCallback(path, precision=precision, name=f"export-{precision}", fp32_comparison=False)
        for precision, path in files.items()
    ]


def key(arm: Any, precision: str) -> str:
    """One of the files of an arm, among those whose times are compared."""
    return f"{arm.name}-{precision}"


def classes(path: Path, inputs: Tensor) -> Tensor:
    file = OnnxNetwork(path, threads=1)
    return torch.cat([file.run([part])[0].argmax(dim=1) for part in inputs.split(LOOK)])


def looked_at(path: Path, test: Images) -> dict[str, Any]:
    """Accuracy and bytes of a file."""
    return {
        "test_accuracy": share(classes(path, test[0]), test[1]),
        "bytes": path.stat().st_size,
        "deflated": compressed_bytes(path),
    }


@dataclass(frozen=True)
class Times:
    """Files whose times are compared with that of the first; measured once all are chosen."""

    name: str
    files: tuple[tuple[str, Path | None], ...]  # in the folder; None: not chosen yet
    side: int  # of the image

    @property
    def key(self) -> str:
        return f"{self.name}-times-{digest({name: str(path) for name, path in self.files})}"

    @property
    def jobs(self) -> list[Job]:
        return [] if None in dict(self.files).values() else [Job.of(measure, self)]

    def read(self, store: Store) -> dict[str, dict[str, float]]:
        """By file: how many times as fast as the first one it is, and milliseconds; {} where not measured yet."""
        return (store.read(self) or {}).get("files", {})


def chosen_files(arms: Iterable[Any], series: Callable[[Any], Series], store: Store) -> list[tuple[str, Path | None]]:
    """The files of the first seed of each arm, by their keys; None where its rate is not chosen yet."""
    chosen = [(arm, series(arm).chosen(store)) for arm in arms]
    return [(key(arm, own), run and run.file(own)) for arm, run in chosen for own in arm.files]


def files_again(
    arms: Iterable[Any], series: Callable[[Any], Series], store: Store, measure: Callable[[Any, Path], dict[str, Any]]
) -> list[Job]:
    """The same runs once more, where those files are missing."""
    chosen = (series(arm).chosen(store) for arm in arms)
    return [Job.again(run.file(run.arm.files[-1]), measure, run) for run in chosen if run is not None]


def measure(times: Times, folder: Path) -> dict[str, Any]:
    """Batch 1, one thread, all files in turns."""
    begin = time.process_time()
    found = speeds({name: folder / path for name, path in times.files}, times.side)
    return {"files": found, "cpu_seconds": time.process_time() - begin}


def speeds(files: dict[str, Path], side: int) -> dict[str, dict[str, float]]:
    """The median of a few sessions each: where a session lies in memory may cost a tenth for as long as it lives."""
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))

    def call(path: Path) -> Callable[[], Any]:
        network = OnnxNetwork(path, threads=1)
        return lambda: network.run([image])

    rounds = [
        measure_latency({name: call(path) for name, path in files.items()}, repeats=700, seconds=10.0)
        for _ in range(SESSIONS)
    ]
    median = {name: statistics.median(own[name].ratio or 1.0 for own in rounds) for name in files}
    first = statistics.median(own[next(iter(files))].median for own in rounds)
    return {name: {"faster": 1 / ratio, "ms": ratio * first} for name, ratio in median.items()}

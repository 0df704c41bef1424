"""The whole library in one protocol: each technique's files beside those of the student alone, and the Pareto front."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_compress import (
    AttentionTransferCallback,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)
from lightning_compress.export import to_onnx

from . import plan
from .calibrated import counted
from .data import Batches, fashion_mnist
from .experiment import Experiment, Job, Named, minutes
from .files import Times, chosen_files, classes, exports, files_again, key, looked_at
from .front import Point, draw
from .plan import CHOICE_SEED, FT, HINTON, LEARNING_RATES, SHORT, STATIC, Run, Teacher, digest
from .store import Series, Store
from .tables import NOT_YET, Measured, difference, interval, rate_of, t_interval
from .training import (
    Classifier,
    fit,
    make_teacher,
    paraphraser_path,
    teacher_path,
    train_paraphraser,
    train_teacher,
)
from .watch import share

VERSION = f"{plan.VERSION}.0"  # raised in its second number when only what is here changes
WIDTH, EPOCHS = 16, 6
PREPARED = 2  # of the epochs, at a tenth of the rate, with PSGD
SPARSITY, QUANTISED_FROM = 0.9, 0.7
MASKED = {"layers": ["type:Conv2d"]}
TAUGHT = Run(SHORT, FT[1], LEARNING_RATES[0], CHOICE_SEED)  # its teacher, and the paraphraser of that


@dataclass(frozen=True)
class Way:
    """A training, and the files that it leaves; the first one chooses the learning rate."""

    name: str
    title: str
    files: tuple[str, ...] = ("fp32",)


WAYS = (
    Way("plain", "student alone", ("fp32", "int8", "int4")),
    Way("kd", "KD", ("fp32", "int8")),
    Way("at", "AT"),
    Way("ft", "FT"),
    Way("pruning", f"pruning {SPARSITY:.0%}"),
    Way("dpf", f"DPF {SPARSITY:.0%}"),
    Way("dcil", f"DCIL {SPARSITY:.0%}"),
    Way("structured", "structured 50%, KD", ("fp32", "int8")),
    Way("psgd", "PSGD", ("int4",)),
    Way("qat", "QAT", ("int8",)),
    Way("all", "KD, pruning 50%, QAT", ("int8",)),
)
TAUGHT_BY = Way("teacher", "teacher")
CALIBRATED = ("plain", "kd", "structured")  # their integer files are those of PTQ


def kd(folder: Path) -> Callback:
    return DistillationCallback(teacher(folder), **HINTON)


def teacher(folder: Path) -> nn.Module:
    return make_teacher(TAUGHT.teacher, TAUGHT.arm, folder)


TECHNIQUES: dict[str, Callable[[Path], list[Callback]]] = {
    "plain": lambda folder: [PTQCallback()],
    "kd": lambda folder: [kd(folder), PTQCallback()],
    "at": lambda folder: [AttentionTransferCallback(teacher(folder), strength=0.25)],
    "ft": lambda folder: [
        FactorTransferCallback(
            teacher(folder), **TAUGHT.arm.arguments, paraphraser=str(folder / paraphraser_path(TAUGHT))
        )
    ],
    "pruning": lambda folder: [PruningCallback(SPARSITY, **STATIC, **MASKED)],
    "dpf": lambda folder: [DPFCallback(SPARSITY, **MASKED)],
    "dcil": lambda folder: [DCILCallback(SPARSITY, dense_path="own", **MASKED)],
    "structured": lambda folder: [
        StructuredPruningCallback(0.5, budget="macs", schedule="iterative", start=0.2, end=0.5, round_to=4),
        kd(folder),
        PTQCallback(),
    ],
    "psgd": lambda folder: [PSGDCallback(bits=4)],
    "qat": lambda folder: [QATCallback(start=QUANTISED_FROM)],
    "all": lambda folder: [
        kd(folder),
        PruningCallback(0.5, update_interval=16, end=QUANTISED_FROM),
        QATCallback(start=QUANTISED_FROM),
    ],
}


@dataclass(frozen=True)
class Training:
    """One run of a way."""

    arm: Way
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"library-v{VERSION}-{self.arm.name}-lr{self.rate:g}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return EPOCHS

    def file(self, precision: str) -> Path:
        """In the folder."""
        return Path("files") / f"{self.key}-{precision}.onnx"


def series(way: Way) -> Series:
    return Series(tuple(Training(way, rate, CHOICE_SEED) for rate in LEARNING_RATES))


class Clock(Callback):
    """CPU seconds from the first to the last step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time() - self.begin


def measure(run: Training, folder: Path) -> dict[str, Any]:
    """Train, write all files, and look at them."""
    begin, data, clock = time.process_time(), fashion_mnist(), Clock()
    torch.manual_seed(run.seed)
    module, batches = Classifier(WIDTH, run.rate), Batches(data.train, seed=run.seed)
    epochs, callbacks = EPOCHS, [clock, *TECHNIQUES[run.arm.name](folder)]
    files = {precision: folder / run.file(precision) for precision in run.arm.files}
    later = "int4" if run.arm.name in CALIBRATED else None  # a fit calibrates a network once
    callbacks += exports({precision: path for precision, path in files.items() if precision != later})
    if run.arm.name == "psgd":  # it prepares what has been trained
        epochs = PREPARED
        fit(module, batches, EPOCHS - PREPARED, [clock])
        module.rate /= 10
    fit(module, batches, epochs, callbacks)
    if later in files:
        ptq = PTQCallback(weight_bits=4, activation_bits=None)
        quantised = counted(ptq, module.network, batches, data.held_out, limit_test_batches=1)
        to_onnx(quantised, files[later], data.test[0][:4], later, network="network")
    held_out = classes(files[run.arm.files[0]], data.held_out[0])
    return {
        "held_out_accuracy": share(held_out, data.held_out[1]),
        "files": {precision: looked_at(path, data.test) for precision, path in files.items()},
        "batches": f"{module.seen:08x}",
        "training_seconds": clock.seconds,
        "cpu_seconds": time.process_time() - begin,
    }


TEACHERS_FILE = Path(f"files/library-teacher-v{VERSION}.onnx")
TEACHER = Named(f"library-v{VERSION}-teacher-{digest(vars(Teacher()))}")


def measure_teacher(named: Named, folder: Path) -> dict[str, Any]:
    begin, taught = time.process_time(), Store(folder).of_file(teacher_path(TAUGHT.teacher))
    to_onnx(teacher(folder), folder / TEACHERS_FILE, fashion_mnist().test[0][:4])
    return {
        **looked_at(folder / TEACHERS_FILE, fashion_mnist().test),
        "training_seconds": taught["cpu_seconds"],
        "cpu_seconds": time.process_time() - begin,
    }


class Library(Experiment):
    """The teacher and its file; all ways; the times of all files."""

    page = "library.md"
    picture = "library.png"
    caption = "Accuracy of each file against its bytes, and against its time"

    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        yield [Job(teacher_path(TAUGHT.teacher), train_teacher, (TAUGHT.teacher,))]
        yield [
            Job(paraphraser_path(TAUGHT), train_paraphraser, (TAUGHT,)),
            Job.of(measure_teacher, TEACHER),
        ]
        yield [Job.of(measure, run) for way in WAYS for run in series(way).own]
        yield [Job.of(measure, run) for way in WAYS for run in series(way).runs(store, seeds)]
        yield [*files_again(WAYS, series, store, measure), Job.again(TEACHERS_FILE, measure_teacher, TEACHER)]
        yield self.times(store).jobs

    def times(self, store: Store) -> Times:
        """Of the first seed, against the file of the student alone."""
        files = (*chosen_files(WAYS, series, store), (key(TAUGHT_BY, "fp32"), TEACHERS_FILE))
        return Times(f"library-v{VERSION}", files, side=14)

    def rows(self, store: Store, seeds: int) -> dict[tuple[Way, str], Measured | None]:
        """By training and file, as if each file were an arm; None where a run is missing."""
        whole = store.read(TEACHER)
        rows: dict[tuple[Way, str], Measured | None] = {}
        for way in WAYS:
            row = Measured.of(series(way), store, seeds)
            rows |= {(way, own): None if row is None else row.of_file(own) for own in way.files}
        return {**rows, (TAUGHT_BY, "fp32"): whole and Measured(TAUGHT.teacher, {TAUGHT.teacher.seed: whole}, 0.0)}

    def tables(self, store: Store, seeds: int) -> str:
        rows, fast = self.rows(store, seeds), self.times(store).read(store)
        plain = rows[WAYS[0], "fp32"]
        lines = [
            "| file | learning rate | test accuracy | over the student alone, fp32 | kB | deflated | times as fast "
            "| minutes of a training |",
            f"|{'---|' * 8}",
        ]
        for (way, own), row in rows.items():
            title = f"{way.title}, {own}{' (PTQ)' if way.name in CALIBRATED and own != 'fp32' else ''}"
            if row is None:
                lines.append(f"| {title} | {NOT_YET} |{' |' * 6}")
                continue
            cells = [
                title,
                rate_of(row),
                f"{100 * row.mean('test_accuracy'):.2f}",
                "" if plain is None or row is plain else over(row, plain),
                *(f"{row.first[size] / 1e3:.0f}" for size in ("bytes", "deflated")),
                f"{fast[key(way, own)]['faster']:.2f}" if fast else NOT_YET,
                f"{row.mean('training_seconds') / 60:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        cost = minutes(self.jobs(store, seeds), store)
        lines += [
            "",
            f"{seeds} seeds; {cost:.0f} minutes of one thread, teacher, paraphraser, choice of learning rates and "
            "times included.",
        ]
        return "\n".join(lines) + "\n"

    def draw(self, store: Store, seeds: int, path: Path) -> bool:
        return draw(self.points(store, seeds), path)

    def image(self, store: Store, seeds: int, folder: str) -> str:
        """The picture as a page elsewhere shows it."""
        if not self.points(store, seeds):
            return f"{NOT_YET.capitalize()}."
        return f"![{self.caption}]({folder}{self.picture})"

    def points(self, store: Store, seeds: int) -> list[Point]:
        """What the picture shows."""
        fast = self.times(store).read(store)
        return [
            Point(
                way.title,
                own,
                t_interval([100 * accuracy for accuracy in row.values("test_accuracy")]),
                row.first["deflated"] / 1e3,
                fast[key(way, own)]["ms"],
            )
            for (way, own), row in self.rows(store, seeds).items()
            if row is not None and key(way, own) in fast
        ]


def over(row: Measured, plain: Measured) -> str:
    """A file over that of the student alone; the teacher is one network for all seeds."""
    if isinstance(row.run, Training):
        return difference(row, plain)
    return interval([100 * (row.first["test_accuracy"] - own) for own in plain.values("test_accuracy")])

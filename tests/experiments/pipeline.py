"""Distilled, pruned and quantised in one fit, against the teacher's file; each stage's share, each on its own file."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import DistillationCallback, ExportCallback, PruningCallback, PTQCallback, QATCallback
from lightning_compress.demo import FASHION_FILES, ResidualBlock, _read_idx
from lightning_compress.export import to_onnx

from .data import HELD_OUT, Batches, Split
from .experiment import Experiment, Job, Line, Named
from .files import Times, classes, looked_at
from .plan import CHOICE_SEED, LEARNING_RATES
from .store import Series, Store, write_atomically
from .tables import NOT_YET, Measured, difference, interval, t_interval
from .training import Classifier, fit
from .watch import predictions, share

VERSION = 2
EPOCHS, TEACHER_WIDTH, TEACHER_RATE = 16, 16, 0.1
SPARSITY, QUANTISED_FROM = 0.5, 0.7
KD_WEIGHTS = (0.3, 0.9)  # what is left of 1 is the weight of the labels
WIDTH = 12
SMALLER, FASTER, LOST = 20.0, 4.0, 0.5  # the target: times, times, points


class ResNet20(nn.Module):
    """The residual network of 20 layers, three stages of three blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        channels = (width, width, width, width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width)
        pairs = itertools.pairwise(channels)
        self.stages = nn.Sequential(*(ResidualBlock(before, after) for before, after in pairs))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W) to logits (N, 10)."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Stage:
    """One way to the student's file."""

    name: str
    title: str
    distilled: bool = False
    pruned: bool = False
    quantised: str | None = None  # "ptq" or "qat"
    chosen_with: str | None = None  # the stage whose choice is taken


STAGES = (
    Stage("alone", "student alone"),
    Stage("alone-ptq", "student alone, calibrated (PTQ)", quantised="ptq", chosen_with="alone"),
    Stage("distilled", "distilled", distilled=True),
    Stage("pruned", f"distilled, {SPARSITY:.0%} pruned", distilled=True, pruned=True, chosen_with="distilled"),
    Stage(
        "quantised",
        f"distilled, {SPARSITY:.0%} pruned, 8 bits (QAT), one fit",
        distilled=True,
        pruned=True,
        quantised="qat",
        chosen_with="distilled",
    ),
)


@functools.cache
def images() -> Split:
    """Fashion-MNIST at 28x28: 18,000 images to train on, 2,000 to choose learning rates by, 10,000 to test with."""
    train_x, train_y, test_x, test_y = (_read_idx(name) for name in FASHION_FILES)

    def prepared(own: Tensor) -> Tensor:
        return (own[:, None].float() / 255 - 0.286) / 0.353

    kept = 20000 - HELD_OUT
    x, y = prepared(train_x[:20000]), train_y[:20000].long()
    return Split((x[:kept], y[:kept]), (x[kept:], y[kept:]), (prepared(test_x), test_y.long()))


class TeacherClassifier(Classifier):
    """The network of 20 layers in the experiments' module, whose own has 8."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__(1, rate)
        self.network = ResNet20(width)  # type: ignore[assignment]


@dataclass(frozen=True)
class Student:
    """One training."""

    arm: Stage
    rate: float
    kd_weight: float | None
    seed: int

    @property
    def key(self) -> str:
        chosen = f"lr{self.rate:g}" + ("" if self.kd_weight is None else f"-kd{self.kd_weight:g}")
        return f"pipeline-v{VERSION}-w{WIDTH}-{self.arm.name}-{chosen}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return EPOCHS

    @property
    def file(self) -> Path:
        """In the folder."""
        return Path("files") / f"{self.key}.onnx"


def series(stage: Stage) -> Series:
    """A stage's runs: rate and weight of distillation are chosen together, or taken over from another stage."""
    if stage.chosen_with is not None:
        chooses = next(own for own in STAGES if own.name == stage.chosen_with)
        return Series(series(chooses).candidates, lambda run: dataclasses.replace(run, arm=stage))
    weights = KD_WEIGHTS if stage.distilled else (None,)
    return Series(tuple(Student(stage, *own, CHOICE_SEED) for own in itertools.product(LEARNING_RATES, weights)))


def teacher_path(folder: Path) -> Path:
    return folder / f"pipeline-teacher-v{VERSION}.pt"


TEACHERS_FILE = Path("files/teacher.onnx")
TEACHER = Named(f"pipeline-v{VERSION}-teacher")


def measure_teacher(named: Named, folder: Path) -> dict[str, Any]:
    """Train the teacher, write its file, and look at it."""
    path, begin = teacher_path(folder), time.process_time()
    if not path.is_file():
        torch.manual_seed(0)
        module = TeacherClassifier(TEACHER_WIDTH, TEACHER_RATE)
        fit(module, Batches(images().train, seed=0), EPOCHS, [])
        kept = {"weights": module.network.state_dict(), "cpu_seconds": time.process_time() - begin}
        write_atomically(path, lambda part: torch.save(kept, part))
    to_onnx(teacher(folder), folder / TEACHERS_FILE, images().test[0][:4])
    seconds = torch.load(path, weights_only=True)["cpu_seconds"]
    return {**looked_at(folder / TEACHERS_FILE, images().test), "cpu_seconds": seconds}


def teacher(folder: Path) -> ResNet20:
    network = ResNet20(TEACHER_WIDTH)
    network.load_state_dict(torch.load(teacher_path(folder), weights_only=True)["weights"])
    return network


def measure(run: Student, folder: Path) -> dict[str, Any]:
    """Train a student, write its file, and look at it."""
    begin, data, file, stage = time.process_time(), images(), folder / run.file, run.arm
    export = ExportCallback(file, precision="fp32" if stage.quantised is None else "int8", fp32_comparison=False)
    callbacks: list[Callback] = [export]
    if run.kd_weight is not None:
        weights = {"task_weight": 1 - run.kd_weight, "kd_weight": run.kd_weight}
        callbacks.append(DistillationCallback(teacher(folder), temperature=4.0, **weights))
    if stage.pruned:
        callbacks.append(PruningCallback(SPARSITY, update_interval=16, end=QUANTISED_FROM))
    if stage.quantised == "qat":
        callbacks.append(QATCallback(start=QUANTISED_FROM))
    if stage.quantised == "ptq":
        callbacks.append(PTQCallback())
    torch.manual_seed(run.seed)
    module = Classifier(WIDTH, run.rate)
    fit(module, Batches(data.train, seed=run.seed), EPOCHS, callbacks)
    return {
        "held_out_accuracy": share(classes(file, data.held_out[0]), data.held_out[1]),
        "module_accuracy": share(predictions(module.network, data.test), data.test[1]),
        **looked_at(file, data.test),
        "batches": f"{module.seen:08x}",
        "cpu_seconds": time.process_time() - begin,
    }


class Pipeline(Experiment):
    """The teacher and its file; the students; the times of all files."""

    page = "pipeline.md"

    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        yield [Job.of(measure_teacher, TEACHER)]
        yield [Job.of(measure, run) for stage in STAGES for run in series(stage).own]
        yield [Job.of(measure, run) for stage in STAGES for run in series(stage).runs(store, seeds)]
        yield self.times(store).jobs

    def times(self, store: Store) -> Times:
        """Of the first seed."""
        chosen = [(stage.name, series(stage).chosen(store)) for stage in STAGES]
        files = [(name, run and run.file) for name, run in chosen]
        return Times(f"pipeline-v{VERSION}", (("teacher", TEACHERS_FILE), *files), side=28)

    def found(self, store: Store, seeds: int) -> tuple[list[Measured], dict[str, Any]] | None:
        """All stages, and the teacher's file; None if anything is missing."""
        rows, whole = [Measured.of(series(stage), store, seeds) for stage in STAGES], store.read(TEACHER)
        return None if whole is None or None in rows else (rows, whole)

    def tables(self, store: Store, seeds: int) -> str:
        """The headline, and each stage's share."""
        if (found := self.found(store, seeds)) is None:
            return f"{NOT_YET.capitalize()}.\n"
        (rows, whole), fast = found, self.times(store).read(store)
        lines = [
            f"Teacher: ResNet-20 of width {TEACHER_WIDTH}, {EPOCHS} epochs; its fp32 file has "
            f"{whole['bytes'] / 1e3:.0f} kB ({whole['deflated'] / 1e3:.0f} kB deflated) and is right for "
            f"{100 * whole['test_accuracy']:.2f}% of the 10,000 test images. Students of width {WIDTH}:",
            "",
            "| file | learning rate | KD's weight | test accuracy | less the teacher's file | over the stage before "
            "| kB | smaller | deflated | times as fast | minutes |",
            f"|{'---|' * 11}",
        ]
        before: Measured | None = None
        for row in rows:
            cells = [
                row.arm.title,
                f"{row.run.rate:g}",
                f"{row.run.kd_weight or ''}",
                f"{100 * row.mean('test_accuracy'):.2f}",
                interval(over_teacher(row, whole)),
                "" if before is None else difference(row, before),
                f"{row.first['bytes'] / 1e3:.0f}",
                *(f"{whole[size] / row.first[size]:.1f}x" for size in ("bytes", "deflated")),
                f"{fast[row.arm.name]['faster']:.2f}" if fast else NOT_YET,
                f"{row.minutes:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            before = row if row.arm.quantised != "ptq" else before
        lines += [
            "",
            f"{seeds} seeds; {cost(*found):.0f} minutes of one thread, teacher and choice of learning rates included.",
        ]
        return "\n".join(lines) + "\n"

    def lines(self, store: Store, seeds: int) -> list[Line]:
        found, title = self.found(store, seeds), f"{STAGES[-1].title}, over the teacher's file"
        said = NOT_YET if found is None else interval(over_teacher(found[0][-1], found[1]))
        return [Line(title, f"28x28, {EPOCHS} epochs", said, 0.0 if found is None else cost(*found))]

    def headline(self, store: Store, seeds: int) -> str:
        """The file of all stages in one fit against the target, as a table."""
        found, fast = self.found(store, seeds), self.times(store).read(store)
        if found is None or not fast:
            return f"{NOT_YET.capitalize()}."
        (*_, row), whole = found
        smaller, deflated = (whole[size] / row.first[size] for size in ("bytes", "deflated"))
        faster, lost = fast[row.arm.name]["faster"], [-own for own in over_teacher(row, whole)]
        mean, low, high = t_interval(lost)
        kept = "yes" if high <= LOST else "no" if mean > LOST else "by the mean; not shown"
        return "\n".join(
            [
                "| | target | measured | reached |",
                "|---|---|---|---|",
                f"| smaller, bytes | {SMALLER:g} times | {smaller:.1f} times, deflated {deflated:.1f} "
                f"| {'yes' if smaller >= SMALLER else 'no'} |",
                f"| faster, one image on one thread | {FASTER:g} times | {faster:.2f} times "
                f"| {'yes' if faster >= FASTER else 'no'} |",
                f"| points of test accuracy lost | at most {LOST:g} | {mean:.2f} [{low:.2f}, {high:.2f}] | {kept} |",
            ]
        )


def cost(rows: list[Measured], whole: dict[str, Any]) -> float:
    """Minutes of all trainings, that of the teacher included."""
    return whole["cpu_seconds"] / 60 + sum(row.minutes for row in rows)


def over_teacher(row: Measured, whole: dict[str, Any]) -> list[float]:
    """Points over the teacher's file, by seed."""
    return [100 * (own - whole["test_accuracy"]) for own in row.values("test_accuracy")]

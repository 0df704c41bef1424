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

from lightning_compress import DistillationCallback, PTQCallback, QATCallback, StructuredPruningCallback
from lightning_compress.demo import FASHION_FILES, ResidualBlock, _read_idx
from lightning_compress.report.measure import count_parameters

from . import plan
from .data import HELD_OUT, Batches, Split
from .experiment import Experiment, Job, Line, minutes
from .files import Times, chosen_files, classes, exports, files_again, key, looked_at
from .plan import CHOICE_SEED, LEARNING_RATES
from .store import Series, Store, write_atomically
from .tables import NOT_YET, Measured, difference, interval, rate_of, t_interval
from .training import Classifier, fit
from .watch import share

VERSION = f"{plan.VERSION}.0"  # raised in its second number when only what is here changes
EPOCHS = 32
TEACHER_WIDTH = 16
WIDTH = 16  # of the student
PRUNED = {"ratio": 0.5, "budget": "params", "schedule": "iterative", "start": 0.1, "end": 0.4, "round_to": 16}
QUANTISED_FROM = 0.7
KD_WEIGHTS = (0.3, 0.9)  # what is left of 1 is the weight of the labels
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
    """A training, and the files that it leaves; the first one chooses. Integers are calibrated, or trained on."""

    name: str
    title: str
    files: tuple[str, ...] = ("fp32", "int8")
    teaches: bool = False  # one network, larger than the students, whose weights are kept for them
    distilled: bool = True
    pruned: bool = False
    trained_on_bits: bool = False
    chosen_with: str | None = None  # the stage whose choice is taken

    def seeds(self, published: int) -> int:
        """Of so many, how many trainings there are of this stage."""
        return 1 if self.teaches else published


TEACHER = Stage("teacher", f"teacher, ResNet-20 of width {TEACHER_WIDTH}", teaches=True, distilled=False)
STUDENTS = (
    Stage("alone", "student alone", distilled=False),
    Stage("distilled", "distilled"),
    Stage("pruned", f"distilled, {PRUNED['ratio']:.0%} pruned", pruned=True, chosen_with="distilled"),
    Stage(
        "quantised",
        f"distilled, {PRUNED['ratio']:.0%} pruned, trained on 8 bits, one fit",
        files=("int8",),
        pruned=True,
        trained_on_bits=True,
        chosen_with="distilled",
    ),
)
STAGES = (TEACHER, *STUDENTS)


@functools.cache
def images() -> Split:
    """Fashion-MNIST at 28x28: 18,000 images to train on, 2,000 to choose learning rates by, 10,000 to test with."""
    train_x, train_y, test_x, test_y = (_read_idx(name) for name in FASHION_FILES)

    def prepared(own: Tensor) -> Tensor:
        return (own[:, None].float() / 255 - 0.286) / 0.353

    kept = 20000 - HELD_OUT
    x, y = prepared(train_x[:20000]), train_y[:20000].long()
    return Split((x[:kept], y[:kept]), (x[kept:], y[kept:]), (prepared(test_x), test_y.long()))


def large_network() -> ResNet20:
    """The teacher's, with its channels where those of the students are."""
    return ResNet20(TEACHER_WIDTH).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Training:
    """One training, of the teacher or of a student; `teacher` is that of a distilled one."""

    arm: Stage
    rate: float
    seed: int
    kd_weight: float | None = None
    teacher: Training | None = None

    @property
    def key(self) -> str:
        chosen = f"lr{self.rate:g}" + ("" if self.kd_weight is None else f"-kd{self.kd_weight:g}")
        taught = "" if self.teacher is None else f"-teacher{self.teacher.rate:g}"
        return f"pipeline-v{VERSION}-{self.arm.name}-{chosen}{taught}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return EPOCHS

    def file(self, precision: str) -> Path:
        """In the folder."""
        return Path("files") / f"{self.key}-{precision}.onnx"

    @property
    def weights(self) -> Path:
        """Those of a teacher, in the folder."""
        return Path(f"{self.key}.pt")


def series(stage: Stage, store: Store) -> Series:
    """A stage's runs: rate and weight of distillation are chosen together, or taken over from another stage.

    A distilled student has none before its teacher is chosen.
    """
    if stage.chosen_with is not None:
        chooses = next(own for own in STAGES if own.name == stage.chosen_with)
        return Series(series(chooses, store).candidates, lambda run: dataclasses.replace(run, arm=stage))
    if not stage.distilled:
        return Series(tuple(Training(stage, rate, CHOICE_SEED) for rate in LEARNING_RATES))
    if (taught := series(TEACHER, store).chosen(store)) is None:
        return Series(())
    pairs = itertools.product(LEARNING_RATES, KD_WEIGHTS)
    return Series(tuple(Training(stage, rate, CHOICE_SEED, weight, taught) for rate, weight in pairs))


def trained(teacher: Training, folder: Path) -> ResNet20:
    network = large_network()
    network.load_state_dict(torch.load(folder / teacher.weights, weights_only=True))
    return network


def callbacks(run: Training, folder: Path) -> list[Callback]:
    """Those of a stage, in one list."""
    stage = run.arm
    techniques: list[Callback] = [QATCallback(start=QUANTISED_FROM) if stage.trained_on_bits else PTQCallback()]
    if run.teacher is not None and run.kd_weight is not None:
        weights = {"task_weight": 1 - run.kd_weight, "kd_weight": run.kd_weight}
        techniques.append(DistillationCallback(trained(run.teacher, folder), temperature=4.0, **weights))
    if stage.pruned:
        techniques.append(StructuredPruningCallback(**PRUNED))
    return [*exports({precision: folder / run.file(precision) for precision in stage.files}), *techniques]


def measure(run: Training, folder: Path) -> dict[str, Any]:
    """Train, write the files, and look at them."""
    begin, data = time.process_time(), images()
    torch.manual_seed(run.seed)
    module = Classifier(WIDTH, run.rate)
    if run.arm.teaches:
        module.network = large_network()
    fit(module, Batches(data.train, seed=run.seed), run.epochs, callbacks(run, folder))
    if run.arm.teaches:
        write_atomically(folder / run.weights, lambda part: torch.save(module.network.state_dict(), part))
    held_out = classes(folder / run.file(run.arm.files[0]), data.held_out[0])
    return {
        "held_out_accuracy": share(held_out, data.held_out[1]),
        "files": {precision: looked_at(folder / run.file(precision), data.test) for precision in run.arm.files},
        "parameters": count_parameters(module.network),
        "batches": f"{module.seen:08x}",
        "cpu_seconds": time.process_time() - begin,
    }


class Pipeline(Experiment):
    """The teacher and its file; the students; the times of all files."""

    page = "pipeline.md"

    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        of = functools.partial(series, store=store)
        yield [Job.of(measure, run) for stage in STAGES if not stage.distilled for run in of(stage).own]
        yield [Job.again(run.weights, measure, run) for run in of(TEACHER).runs(store, 1)]
        yield [Job.of(measure, run) for stage in STAGES for run in of(stage).own]
        yield [Job.of(measure, run) for stage in STAGES for run in of(stage).runs(store, stage.seeds(seeds))]
        yield files_again(STAGES, of, store, measure)
        yield self.times(store).jobs

    def times(self, store: Store) -> Times:
        """Of the first seed."""
        files = chosen_files(STAGES, functools.partial(series, store=store), store)
        return Times(f"pipeline-v{VERSION}", tuple(files), side=28)

    def rows(self, store: Store, seeds: int) -> dict[tuple[Stage, str], Measured] | None:
        """By stage and file, as if each file were an arm, the teacher first; None if a run is missing."""
        found = {stage: Measured.of(series(stage, store), store, stage.seeds(seeds)) for stage in STAGES}
        if None in found.values():
            return None
        return {(stage, own): row.of_file(own) for stage, row in found.items() if row for own in stage.files}

    def cost(self, store: Store, seeds: int) -> float:
        """Minutes of all that is there."""
        return minutes(self.jobs(store, seeds), store)

    def tables(self, store: Store, seeds: int) -> str:
        """The headline, and each stage's share."""
        if (rows := self.rows(store, seeds)) is None:
            return f"{NOT_YET.capitalize()}.\n"
        whole, fast = rows[TEACHER, "fp32"], self.times(store).read(store)
        lines = [
            f"The teacher is one network; the students begin with width {WIDTH}. All learn for {EPOCHS} epochs:",
            "",
            "| file | learning rate | KD's weight | test accuracy | less the teacher's fp32 file "
            "| over the stage before in the same precision | kB | smaller | deflated | times as fast "
            "| minutes of a training |",
            f"|{'---|' * 11}",
        ]
        before: dict[str, Measured] = {}
        for (stage, own), row in rows.items():
            kind = "" if own == "fp32" or stage.trained_on_bits else " (PTQ)"
            cells = [
                f"{stage.title}, {own}{kind}",
                rate_of(row),
                f"{row.run.kd_weight or ''}",
                f"{100 * row.mean('test_accuracy'):.2f}",
                "" if row is whole else over_teacher(row, whole),
                "" if own not in before else difference(row, before[own]),
                f"{row.first['bytes'] / 1e3:.0f}",
                *(f"{whole.first[size] / row.first[size]:.1f}x" for size in ("bytes", "deflated")),
                f"{fast[key(stage, own)]['faster']:.2f}" if fast else NOT_YET,
                f"{row.mean('cpu_seconds') / 60:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            if not stage.teaches:
                before[own] = row
        whole_student, left = (rows[stage, "int8"].first["parameters"] for stage in (STUDENTS[0], STUDENTS[-1]))
        lines += [
            "",
            f"{left:,} parameters are left of {whole_student:,}. {seeds} seeds; {self.cost(store, seeds):.0f} minutes "
            "of one thread, teacher, choice of learning rates and times included.",
        ]
        return "\n".join(lines) + "\n"

    def lines(self, store: Store, seeds: int) -> list[Line]:
        rows, last = self.rows(store, seeds), STUDENTS[-1]
        title, protocol = f"{last.title}, over the teacher's file", f"28x28, {EPOCHS} epochs"
        if rows is None:
            return [Line(title, protocol, NOT_YET, 0.0)]
        said = over_teacher(rows[last, "int8"], rows[TEACHER, "fp32"])
        return [Line(title, protocol, said, self.cost(store, seeds))]

    def headline(self, store: Store, seeds: int) -> str:
        """The file of all stages in one fit against the target, as a table."""
        rows, fast = self.rows(store, seeds), self.times(store).read(store)
        if rows is None or not fast:
            return f"{NOT_YET.capitalize()}."
        row, whole = rows[STUDENTS[-1], "int8"], rows[TEACHER, "fp32"]
        smaller, deflated = (whole.first[size] / row.first[size] for size in ("bytes", "deflated"))
        faster = fast[key(STUDENTS[-1], "int8")]["faster"]
        mean, low, high = t_interval([-own for own in points(row, whole)])
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


def points(row: Measured, teacher: Measured) -> list[float]:
    """Test accuracy over the teacher's file, which is one, by seed of the row."""
    return [100 * (own - teacher.first["test_accuracy"]) for own in row.values("test_accuracy")]


def over_teacher(row: Measured, teacher: Measured) -> str:
    """The same with an interval; the teacher's own other file has none."""
    own = points(row, teacher)
    return f"{own[0]:+.2f}" if row.arm.teaches else interval(own)

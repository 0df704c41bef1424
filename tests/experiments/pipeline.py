"""Distilled, pruned and quantised in one fit, against the teacher's file; each stage's share, each on its own file.

python -m tests.experiments.pipeline [--out FOLDER] [--seeds 3] [--jobs 2] [--pages]

Runs that are in the folder already are not made again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import DistillationCallback, ExportCallback, PruningCallback, PTQCallback, QATCallback
from lightning_compress.demo import FASHION_FILES, ResidualBlock, _read_idx
from lightning_compress.export import to_onnx
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.report.latency import measure_latency
from lightning_compress.report.measure import compressed_bytes

from .data import HELD_OUT, Batches, Split
from .plan import LEARNING_RATES
from .schedule import make_in_turn
from .store import write_atomically
from .tables import splice, t_interval
from .training import Classifier, fit, quiet
from .watch import predictions, share

PAGE = Path("docs/experiments/pipeline.md")
VERSION = 2
EPOCHS, TEACHER_WIDTH, TEACHER_RATE = 16, 16, 0.1
SPARSITY, QUANTISED_FROM = 0.5, 0.7
KD_WEIGHTS = (0.3, 0.9)  # what is left of 1 is the weight of the labels
WIDTHS = (12,)
LOOK = 500  # images at a time


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

    @property
    def choices(self) -> list[Choice]:
        weights = KD_WEIGHTS if self.distilled else (None,)
        return [Choice(rate, weight) for rate in LEARNING_RATES for weight in weights]


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
class Choice:
    """What is chosen on held-out images."""

    rate: float
    kd_weight: float | None = None

    def __str__(self) -> str:
        return f"lr{self.rate:g}" + ("" if self.kd_weight is None else f"-kd{self.kd_weight:g}")


def teacher_path(folder: Path) -> Path:
    return folder / f"pipeline-teacher-v{VERSION}.pt"


def make_teacher(folder: Path) -> str:
    """Train the teacher, and write its file."""
    path = teacher_path(folder)
    if not path.is_file():
        torch.manual_seed(0)
        module, begin = TeacherClassifier(TEACHER_WIDTH, TEACHER_RATE), time.process_time()
        fit(module, Batches(images().train, seed=0), EPOCHS, [])
        kept = {"weights": module.network.state_dict(), "cpu_seconds": time.process_time() - begin}
        write_atomically(path, lambda part: torch.save(kept, part))
    to_onnx(teacher(folder), folder / "files" / "teacher.onnx", images().test[0][:4])
    return f"teacher, {torch.load(path, weights_only=True)['cpu_seconds']:.0f} s"


def teacher(folder: Path) -> ResNet20:
    network = ResNet20(TEACHER_WIDTH)
    network.load_state_dict(torch.load(teacher_path(folder), weights_only=True)["weights"])
    return network


Job = tuple[int, Stage, Choice, int]
"""Width, stage, what is chosen, and seed."""


def stem(width: int, stage: Stage, choice: Choice, seed: int) -> str:
    return f"pipeline-v{VERSION}-w{width}-{stage.name}-{choice}-seed{seed}"


def file_path(width: int, stage: Stage, choice: Choice, seed: int, folder: Path) -> Path:
    return folder / "files" / f"{stem(width, stage, choice, seed)}.onnx"


def result_path(width: int, stage: Stage, choice: Choice, seed: int, folder: Path) -> Path:
    return folder / "runs" / f"{stem(width, stage, choice, seed)}.json"


def make(job: Job, folder: Path) -> str:
    """Train a student, write its file, and look at it."""
    width, stage, choice, seed = job
    begin, data, file = time.process_time(), images(), file_path(*job, folder)
    export = ExportCallback(file, precision="fp32" if stage.quantised is None else "int8", fp32_comparison=False)
    callbacks: list[Callback] = [export]
    if choice.kd_weight is not None:
        weights = {"task_weight": 1 - choice.kd_weight, "kd_weight": choice.kd_weight}
        callbacks.append(DistillationCallback(teacher(folder), temperature=4.0, **weights))
    if stage.pruned:
        callbacks.append(PruningCallback(SPARSITY, update_interval=16, end=QUANTISED_FROM))
    if stage.quantised == "qat":
        callbacks.append(QATCallback(start=QUANTISED_FROM))
    if stage.quantised == "ptq":
        callbacks.append(PTQCallback())
    torch.manual_seed(seed)
    module = Classifier(width, choice.rate)
    fit(module, Batches(data.train, seed=seed), EPOCHS, callbacks)
    result = {
        "held_out_accuracy": share(classes(file, data.held_out[0]), data.held_out[1]),
        "test_accuracy": share(classes(file, data.test[0]), data.test[1]),
        "module_accuracy": share(predictions(module.network, data.test), data.test[1]),
        "bytes": file.stat().st_size,
        "deflated": compressed_bytes(file),
        "cpu_seconds": time.process_time() - begin,
    }
    path = result_path(*job, folder)
    write_atomically(path, lambda part: Path(part).write_text(json.dumps(result, indent=1)))
    return f"{path.stem}: {result['test_accuracy']:.4f}, {result['cpu_seconds']:.0f} s"


def classes(path: Path, inputs: Tensor) -> Tensor:
    file = OnnxNetwork(path, threads=1)
    return torch.cat([file.run([part])[0].argmax(dim=1) for part in inputs.split(LOOK)])


def read(width: int, stage: Stage, choice: Choice, seed: int, folder: Path) -> dict[str, Any] | None:
    path = result_path(width, stage, choice, seed, folder)
    return json.loads(path.read_text()) if path.is_file() else None


def chosen(width: int, stage: Stage, folder: Path) -> Choice | None:
    """By the held-out images with seed 0, of those that choose."""
    stage = next(own for own in STAGES if own.name == (stage.chosen_with or stage.name))
    found = {choice: read(width, stage, choice, 0, folder) for choice in stage.choices}
    if None in found.values():
        return None
    return max(found, key=lambda choice: (found[choice]["held_out_accuracy"], -choice.rate))  # type: ignore[index]


def jobs_left(folder: Path, widths: Sequence[int], seeds: int, *, choosing: bool) -> list[Job]:
    jobs: list[Job]
    if choosing:
        jobs = [
            (w, stage, choice, 0)
            for w in widths
            for stage in STAGES
            if not stage.chosen_with
            for choice in stage.choices
        ]
    else:
        jobs = [
            (w, stage, choice, seed)
            for w in widths
            for stage in STAGES
            if (choice := chosen(w, stage, folder)) is not None
            for seed in range(seeds)
        ]
    return [job for job in jobs if read(*job, folder) is None]


def make_all(folder: Path, widths: Sequence[int], seeds: int, jobs: int) -> int:
    """Make what is missing, in processes side by side; the number of failures."""

    def runs(choosing: bool) -> list[tuple[Any, ...]]:
        return [(make, job, folder) for job in jobs_left(folder, widths, seeds, choosing=choosing)]

    return make_in_turn(jobs, [lambda: [(make_teacher, folder)], lambda: runs(True), lambda: runs(False)], say)


def speeds(reference: Path, files: Mapping[str, Path], image: Tensor) -> dict[str, float]:
    """How many times as fast as the first file each of the others runs: batch 1, one thread, in turns."""

    def call(path: Path) -> Any:
        network = OnnxNetwork(path, threads=1)
        return lambda: network.run([image])

    every = {"reference": reference, **files}
    times = measure_latency({name: call(path) for name, path in every.items()}, repeats=2000, seconds=30.0)
    return {name: 1 / (found.ratio or 1.0) for name, found in times.items()}


def table(folder: Path, widths: Sequence[int], seeds: int) -> str:
    """The headline, and each stage's share."""
    data, reference = images(), folder / "files" / "teacher.onnx"
    best = share(classes(reference, data.test[0]), data.test[1])
    size, deflated = reference.stat().st_size, compressed_bytes(reference)
    minutes = torch.load(teacher_path(folder), weights_only=True)["cpu_seconds"] / 60
    lines = [
        f"Teacher: ResNet-20 of width {TEACHER_WIDTH}, {EPOCHS} epochs; its fp32 file has {size / 1e3:.0f} kB "
        f"({deflated / 1e3:.0f} kB deflated) and is right for {100 * best:.2f}% of the 10,000 test images."
    ]
    for width in widths:
        choices = {stage.name: chosen(width, stage, folder) or stage.choices[0] for stage in STAGES}
        rows = {
            stage.name: [read(width, stage, choices[stage.name], seed, folder) for seed in range(seeds)]
            for stage in STAGES
        }
        if any(None in own for own in rows.values()):
            lines += ["", f"### Students of width {width}", "", "Not measured yet."]
            continue
        paths = {stage.name: file_path(width, stage, choices[stage.name], 0, folder) for stage in STAGES}
        fast = speeds(reference, paths, data.test[0][:1])
        lines += [
            "",
            f"### Students of width {width}",
            "",
            "| file | learning rate | KD's weight | test accuracy | less the teacher's file | over the stage before "
            "| kB | smaller | deflated | times as fast | minutes |",
            f"|{'---|' * 11}",
        ]
        before: Sequence[Mapping[str, Any]] | None = None
        for stage in STAGES:
            own: Any = rows[stage.name]
            accuracy = [100 * row["test_accuracy"] for row in own]
            others = (read(width, stage, choice, 0, folder) for choice in stage.choices)
            cost = own + [row for row in others if row is not None and row not in own]
            choice = choices[stage.name]
            minutes += sum(row["cpu_seconds"] for row in cost) / 60
            lines.append(
                f"| {stage.title} | {choice.rate:g} | {choice.kd_weight or ''} | {sum(accuracy) / len(accuracy):.2f} | "
                f"{interval([own - 100 * best for own in accuracy])} | "
                f"{'' if before is None else interval(gains(own, before))} | {own[0]['bytes'] / 1e3:.0f} | "
                f"{size / own[0]['bytes']:.1f}x | {deflated / own[0]['deflated']:.1f}x | {fast[stage.name]:.2f} | "
                f"{sum(row['cpu_seconds'] for row in cost) / 60:.1f} |"
            )
            before = own if stage.quantised != "ptq" else before
    lines += ["", f"{seeds} seeds; {minutes:.0f} minutes of one thread, teacher and choice of learning rates included."]
    return "\n".join(lines) + "\n"


def gains(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[float]:
    pairs = zip(ones, others, strict=True)
    return [100 * (one["test_accuracy"] - other["test_accuracy"]) for one, other in pairs]


def interval(differences: Sequence[float]) -> str:
    mean, low, high = t_interval(differences)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{'' if low > 0 or high < 0 else ', not shown'}"


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder that keeps the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a stage")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="channels of the students")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--pages", action="store_true", help=f"put the table into {PAGE} too")
    options = parser.parse_args()
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    failures = make_all(options.out, options.widths, options.seeds, options.jobs)
    torch.set_num_threads(1)
    text = table(options.out, options.widths, options.seeds)
    (options.out / PAGE.name).write_text(text)
    if options.pages:
        splice(PAGE, text)
    say(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

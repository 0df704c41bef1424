"""What whole filters are worth: a trained network made smaller, against the same small shape trained from the start.

python -m tests.experiments.structured [--out FOLDER] [--seeds 3] [--jobs 2] [--pages]

Runs that are in the folder already are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_compress import DistillationCallback, ExportCallback, PTQCallback, StructuredPruningCallback
from lightning_compress.demo import SmallResNet
from lightning_compress.export import to_onnx
from lightning_compress.mechanisms.channel_graph import StructureError
from lightning_compress.mechanisms.shrinking import restructure_, structure_of
from lightning_compress.report.measure import count_macs, count_parameters

from .data import Batches, fashion_mnist
from .pipeline import classes, gains, interval, say, speeds
from .plan import HINTON, LATER_RATES, LEARNING_RATES
from .schedule import make_in_turn
from .store import write_atomically
from .tables import splice
from .training import Classifier, fit, quiet
from .watch import predictions, share

PAGE = Path("docs/experiments/structured-pruning.md")
VERSION = 1
WIDTH, BASE_EPOCHS, BASE_RATE, LATER_EPOCHS = 16, 8, 0.1, 8
RATIOS = (0.3, 0.5, 0.7)
MULTIPLES = (1, 4, 8)
LATER_BATCHES = 1000  # added to the seed: those of the base are others


@dataclass(frozen=True)
class Arm:
    """One way to a network; `score` makes a trained one smaller, `scratch` begins with the small shape."""

    name: str
    title: str
    score: str | None = None
    scratch: bool = False
    distilled: bool = True

    @property
    def rates(self) -> tuple[float, ...]:
        return LEARNING_RATES if self.scratch else LATER_RATES

    @property
    def epochs(self) -> int:
        return LATER_EPOCHS + (BASE_EPOCHS if self.scratch else 0)


WHOLE = Arm("whole", "nothing removed, trained on with KD")
ARMS = (
    Arm("l2", "filters of the smallest norm", score="l2"),
    Arm("random", "random filters", score="random"),
    Arm("scratch", "the small shape, from the start, all steps", scratch=True),
)


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    ratio: float
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"structured-v{VERSION}-{self.ratio:g}-{self.arm.name}-lr{self.rate:g}-seed{self.seed}"

    def result(self, folder: Path) -> dict[str, Any] | None:
        path = folder / "runs" / f"{self.key}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def file(self, folder: Path, precision: str) -> Path:
        return folder / "files" / f"{self.key}-{precision}.onnx"


def base_path(seed: int, folder: Path) -> Path:
    return folder / f"structured-base-v{VERSION}-seed{seed}.pt"


def make_base(seed: int, folder: Path) -> str:
    """Train the network that all arms but one go on from."""
    path, begin, data = base_path(seed, folder), time.process_time(), fashion_mnist()
    if not path.is_file():
        torch.manual_seed(seed)
        module = Classifier(WIDTH, BASE_RATE)
        fit(module, Batches(data.train, seed=seed), BASE_EPOCHS, [])
        test = share(predictions(module.network, data.test), data.test[1])
        seconds = time.process_time() - begin
        kept = {"weights": module.network.state_dict(), "test_accuracy": test, "cpu_seconds": seconds}
        write_atomically(path, lambda part: torch.save(kept, part))
    if seed == 0:
        to_onnx(base(seed, folder), folder / "files" / "base.onnx", data.test[0][:4])
    return f"base of seed {seed}: {torch.load(path, weights_only=True)['test_accuracy']:.4f}"


def base(seed: int, folder: Path) -> SmallResNet:
    network = SmallResNet(WIDTH)
    network.load_state_dict(torch.load(base_path(seed, folder), weights_only=True)["weights"])
    return network


def pruning(arm: Arm, ratio: float, seed: int, round_to: int = 1) -> StructuredPruningCallback:
    return StructuredPruningCallback(ratio, budget="macs", score=arm.score or "l2", seed=seed, round_to=round_to)


def small_shape(ratio: float, folder: Path, round_to: int = 1) -> nn.Module:
    """A network of which so much is gone: its sizes are the same for all seeds and scores."""
    module = Classifier(WIDTH, 0.0)
    module.network = base(0, folder)
    fit(module, Batches(fashion_mnist().train, seed=0), 1, [pruning(ARMS[0], ratio, 0, round_to)], max_steps=1)
    return module.network.eval()


def fresh(ratio: float, seed: int, folder: Path) -> SmallResNet:
    """The small shape, with weights that are drawn for it."""
    small = small_shape(ratio, folder)
    torch.manual_seed(seed)
    network = SmallResNet(WIDTH)
    restructure_(network, structure_of(small), small.state_dict())
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            part.reset_parameters()
    return network


def make(job: Job, folder: Path) -> str:
    """Train, write both files, and look at them."""
    begin, data, arm = time.process_time(), fashion_mnist(), job.arm
    files = {precision: job.file(folder, precision) for precision in ("fp32", "int8")}
    callbacks: list[Callback] = [
        ExportCallback(path, precision=precision, name=f"export-{precision}", fp32_comparison=False)
        for precision, path in files.items()
    ]
    callbacks += [PTQCallback(), DistillationCallback(base(job.seed, folder), **HINTON)]
    if arm.score is not None:
        callbacks.append(pruning(arm, job.ratio, job.seed))
    module = Classifier(WIDTH, job.rate)
    module.network = fresh(job.ratio, job.seed, folder) if arm.scratch else base(job.seed, folder)
    torch.manual_seed(job.seed)
    fit(module, Batches(data.train, seed=LATER_BATCHES + job.seed), arm.epochs, callbacks)
    network, image = module.network.eval(), data.test[0][:1]
    result = {
        "held_out_accuracy": share(predictions(network, data.held_out), data.held_out[1]),
        "test_accuracy": share(predictions(network, data.test), data.test[1]),
        **{f"{key}_accuracy": share(classes(path, data.test[0]), data.test[1]) for key, path in files.items()},
        **{f"{key}_bytes": path.stat().st_size for key, path in files.items()},
        "parameters": count_parameters(network),
        "macs": count_macs(network, (image,)).value,
        "cpu_seconds": time.process_time() - begin,
    }
    text = json.dumps(result, indent=1)
    write_atomically(folder / "runs" / f"{job.key}.json", lambda part: Path(part).write_text(text))
    return f"{job.key}: {result['test_accuracy']:.4f}, {result['cpu_seconds']:.0f} s"


def parts() -> list[tuple[Arm, float]]:
    return [(WHOLE, 0.0), *((arm, ratio) for ratio in RATIOS for arm in ARMS)]


def chosen_rate(arm: Arm, ratio: float, folder: Path) -> float | None:
    """By the held-out images, with seed 0; of equals the lowest."""
    found = {rate: Job(arm, ratio, rate, 0).result(folder) for rate in arm.rates}
    if any(result is None for result in found.values()):
        return None
    return max(found, key=lambda rate: (found[rate]["held_out_accuracy"], -rate))  # type: ignore[index]


def jobs_left(folder: Path, seeds: int, *, choosing: bool) -> list[Job]:
    jobs = []
    for arm, ratio in parts():
        rate = chosen_rate(arm, ratio, folder)
        if choosing:
            jobs += [Job(arm, ratio, own, 0) for own in arm.rates]
        elif rate is not None:
            jobs += [Job(arm, ratio, rate, seed) for seed in range(seeds)]
    return [job for job in jobs if job.result(folder) is None]


def make_all(folder: Path, seeds: int, jobs: int) -> int:
    """Make what is missing, in processes side by side; the number of failures."""

    def runs(choosing: bool) -> list[tuple[Any, ...]]:
        return [(make, job, folder) for job in jobs_left(folder, seeds, choosing=choosing)]

    bases = [(make_base, seed, folder) for seed in range(seeds)]
    return make_in_turn(jobs, [lambda: bases, lambda: runs(True), lambda: runs(False)], say)


def shapes(folder: Path) -> str:
    """How fast shapes are whose numbers of channels are multiples: nothing that training could change."""
    image, files, rows = fashion_mnist().test[0][:1], {}, {}
    for ratio, multiple in itertools.product(RATIOS, MULTIPLES):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                network = small_shape(ratio, folder, multiple)
        except StructureError:
            rows[ratio, multiple] = "cannot be met within 2 points | | | |"
            continue
        channels = "/".join(str(stage.conv1.out_channels) for stage in network.stages)
        files[f"{ratio:g}-{multiple}"] = path = folder / "files" / f"shape-{ratio:g}-{multiple}.onnx"
        to_onnx(network, path, image)
        macs, size = count_macs(network, (image,)).value, path.stat().st_size
        rows[ratio, multiple] = f"{channels} | {macs:,} | {size / 1e3:.0f}"
    fast = speeds(folder / "files" / "base.onnx", files, image)
    lines = [
        "| MACs removed | round_to | channels of the three stages | MACs | kB | times as fast |",
        f"|{'---|' * 6}",
    ]
    for (ratio, multiple), said in rows.items():
        times = fast.get(f"{ratio:g}-{multiple}")
        lines.append(f"| {ratio:.0%} | {multiple} | {said}{'' if times is None else f' | {times:.2f} |'}")
    return "\n".join(lines) + "\n"


def table(folder: Path, seeds: int) -> str:
    """Accuracy of each arm, and bytes and times of both files."""
    rates = {(arm, ratio): chosen_rate(arm, ratio, folder) for arm, ratio in parts()}
    rows: dict[tuple[Arm, float], list[Any]] = {}
    for (arm, ratio), rate in rates.items():
        rows[arm, ratio] = [
            None if rate is None else Job(arm, ratio, rate, seed).result(folder) for seed in range(seeds)
        ]
    if any(None in own for own in rows.values()):
        return "Not measured yet.\n"
    bases = [torch.load(base_path(seed, folder), weights_only=True) for seed in range(seeds)]
    base = folder / "files" / "base.onnx"
    shown = [WHOLE, *ARMS[::2]]
    fast = speeds(
        base,
        {
            f"{ratio:g}-{arm.name}-{precision}": Job(arm, ratio, rate or 0.0, 0).file(folder, precision)
            for (arm, ratio), rate in rates.items()
            if arm in shown
            for precision in ("fp32", "int8")
        },
        fashion_mnist().test[0][:1],
    )
    accuracy = 100 * sum(own["test_accuracy"] for own in bases) / seeds
    lines = [
        f"The network that is made smaller: 8 layers, {WIDTH} channels, {BASE_EPOCHS} epochs; {accuracy:.2f}% of the "
        f"test images, {base.stat().st_size / 1e3:.0f} kB as an fp32 file.",
        "",
        "| MACs removed | arm | learning rate | test accuracy | over training on the whole network | over the same "
        "shape from the start | parameters | MACs | fp32: kB, times as fast | int8: accuracy, kB, times as fast | "
        "minutes |",
        f"|{'---|' * 11}",
    ]
    minutes = sum(own["cpu_seconds"] for own in bases) / 60
    for (arm, ratio), own in rows.items():
        others = [Job(arm, ratio, rate, 0).result(folder) for rate in arm.rates]
        cost = sum(row["cpu_seconds"] for row in [*own[1:], *(row for row in others if row is not None)]) / 60
        minutes += cost
        mean = 100 * sum(row["test_accuracy"] for row in own) / seeds
        int8 = 100 * sum(row["int8_accuracy"] for row in own) / seeds
        scratch = rows.get((ARMS[-1], ratio))
        against = "" if scratch is None or arm is ARMS[-1] else interval(gains(own, scratch))
        times = {key: fast.get(f"{ratio:g}-{arm.name}-{key}") for key in ("fp32", "int8")}
        said = {key: "" if value is None else f", {value:.2f}" for key, value in times.items()}
        lines.append(
            f"| {ratio:.0%} | {arm.title} | {rates[arm, ratio]:g} | {mean:.2f} | "
            f"{'' if arm is WHOLE else interval(gains(own, rows[WHOLE, 0.0]))} | {against} | "
            f"{own[0]['parameters']:,} | {own[0]['macs']:,} | {own[0]['fp32_bytes'] / 1e3:.0f}{said['fp32']} | "
            f"{int8:.2f}, {own[0]['int8_bytes'] / 1e3:.0f}{said['int8']} | {cost:.1f} |"
        )
    lines += ["", f"{seeds} seeds; {minutes:.0f} minutes of one thread, the choice of learning rates included."]
    return "\n".join([*lines, "", "### Numbers of channels", "", shapes(folder)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder that keeps the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds an arm")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--tables-only", action="store_true", help="write the table from the runs that are there")
    parser.add_argument("--pages", action="store_true", help=f"put the table into {PAGE} too")
    options = parser.parse_args()
    quiet()
    (options.out / "files").mkdir(parents=True, exist_ok=True)
    failures = 0 if options.tables_only else make_all(options.out, options.seeds, options.jobs)
    torch.set_num_threads(1)
    text = table(options.out, options.seeds)
    (options.out / PAGE.name).write_text(text)
    if options.pages:
        splice(PAGE, text)
    say(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

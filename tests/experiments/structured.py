"""What whole filters are worth: a trained network made smaller, against the same small shape trained from the start."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress import DistillationCallback, PTQCallback, StructuredPruningCallback
from lightning_compress.demo import SmallResNet
from lightning_compress.export import to_onnx
from lightning_compress.mechanisms.channel_graph import StructureError
from lightning_compress.mechanisms.shrinking import restructure_, structure_of
from lightning_compress.report.measure import count_macs, count_parameters

from . import plan
from .data import Batches, fashion_mnist
from .experiment import Experiment, Job, Line, Named, minutes
from .files import Times, classes, exports, files_again, speeds
from .plan import CHOICE_SEED, HINTON, LATER_RATES, LEARNING_RATES
from .store import Series, Store, write_with_record
from .tables import NOT_YET, Measured, difference, rate_of
from .training import Classifier, fit, small_network
from .watch import predictions, share

VERSION = f"{plan.VERSION}.0"  # raised in its second number when only what is here changes
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
    files: tuple[str, ...] = ("fp32", "int8")

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


PARTS = ((WHOLE, 0.0), *((arm, ratio) for ratio in RATIOS for arm in ARMS))
TIMED = tuple((arm, ratio) for arm, ratio in PARTS if arm.score != "random")  # that has the shape of another


@dataclass(frozen=True)
class Training:
    """One training."""

    arm: Arm
    ratio: float
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"structured-v{VERSION}-{self.ratio:g}-{self.arm.name}-lr{self.rate:g}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return self.arm.epochs

    def file(self, precision: str) -> Path:
        """In the folder."""
        return Path("files") / f"{self.key}-{precision}.onnx"


def series(arm: Arm, ratio: float) -> Series:
    return Series(tuple(Training(arm, ratio, rate, CHOICE_SEED) for rate in arm.rates))


def base_path(seed: int) -> Path:
    """In the folder."""
    return Path(f"structured-base-v{VERSION}-seed{seed}.pt")


BASES_FILE = Path(f"files/structured-base-v{VERSION}.onnx")
EXPORTED = Named(f"structured-v{VERSION}-base")
SHAPES = Named(f"structured-v{VERSION}-shapes")


def make_base(seed: int, folder: Path) -> str:
    """Train the network that all arms but one go on from."""
    begin, data = time.process_time(), fashion_mnist()
    torch.manual_seed(seed)
    module = Classifier(WIDTH, BASE_RATE)
    fit(module, Batches(data.train, seed=seed), BASE_EPOCHS, [])
    test = share(predictions(module.network, data.test), data.test[1])
    weights = module.network.state_dict()
    write_with_record(folder, base_path(seed), lambda part: torch.save(weights, part), begin, test_accuracy=test)
    return f"test accuracy {test:.4f}"


def export_base(named: Named, folder: Path) -> dict[str, Any]:
    begin, path = time.process_time(), folder / BASES_FILE
    to_onnx(base(0, folder), path, fashion_mnist().test[0][:4])
    return {"bytes": path.stat().st_size, "cpu_seconds": time.process_time() - begin}


def base(seed: int, folder: Path) -> SmallResNet:
    network = small_network(WIDTH)
    network.load_state_dict(torch.load(folder / base_path(seed), weights_only=True))
    return network


def pruning(arm: Arm, ratio: float, seed: int, round_to: int = 1) -> StructuredPruningCallback:
    more = {"seed": seed} if arm.score == "random" else {}  # no other score draws
    return StructuredPruningCallback(ratio, budget="macs", score=arm.score or "l2", round_to=round_to, **more)


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
    network = small_network(WIDTH)
    restructure_(network, structure_of(small), small.state_dict())
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            part.reset_parameters()
    return network


def base_jobs(seeds: int) -> list[Job]:
    return [Job(base_path(seed), make_base, (seed,)) for seed in range(seeds)]


def measure(run: Training, folder: Path) -> dict[str, Any]:
    """Train, write both files, and look at them."""
    begin, data, arm = time.process_time(), fashion_mnist(), run.arm
    files = {precision: folder / run.file(precision) for precision in arm.files}
    callbacks = [*exports(files), PTQCallback(), DistillationCallback(base(run.seed, folder), **HINTON)]
    if arm.score is not None:
        callbacks.append(pruning(arm, run.ratio, run.seed))
    module = Classifier(WIDTH, run.rate)
    module.network = fresh(run.ratio, run.seed, folder) if arm.scratch else base(run.seed, folder)
    torch.manual_seed(run.seed)
    fit(module, Batches(data.train, seed=LATER_BATCHES + run.seed), arm.epochs, callbacks)
    network, image = module.network.eval(), data.test[0][:1]
    return {
        "held_out_accuracy": share(predictions(network, data.held_out), data.held_out[1]),
        "test_accuracy": share(predictions(network, data.test), data.test[1]),
        **{f"{key}_accuracy": share(classes(path, data.test[0]), data.test[1]) for key, path in files.items()},
        **{f"{key}_bytes": path.stat().st_size for key, path in files.items()},
        "parameters": count_parameters(network),
        "macs": count_macs(network, (image,)).value,
        "batches": f"{module.seen:08x}",
        "cpu_seconds": time.process_time() - begin,
    }


def measure_shapes(named: Named, folder: Path) -> dict[str, Any]:
    """How fast shapes are whose numbers of channels are multiples: nothing that training could change."""
    begin, image, files = time.process_time(), fashion_mnist().test[0][:1], {"base": folder / BASES_FILE}
    found: dict[str, Any] = {}
    for ratio, multiple in itertools.product(RATIOS, MULTIPLES):
        name = f"{ratio:g}-{multiple}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                network = small_shape(ratio, folder, multiple)
        except StructureError:
            found[name] = None
            continue
        files[name] = path = folder / "files" / f"shape-{name}.onnx"
        to_onnx(network, path, image)
        channels = "/".join(str(stage.conv1.out_channels) for stage in network.stages)
        macs = count_macs(network, (image,)).value
        found[name] = {"channels": channels, "macs": macs, "bytes": path.stat().st_size}
    fast = speeds(files, side=image.shape[-1])
    shapes = {name: own and own | fast[name] for name, own in found.items()}
    return {"shapes": shapes, "cpu_seconds": time.process_time() - begin}


class Structured(Experiment):
    """The trained networks; what goes on from them, or begins with the small shape; the times of all files."""

    page = "structured-pruning.md"

    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        yield base_jobs(seeds)
        yield [Job.of(export_base, EXPORTED)]
        yield [Job.of(measure, run) for part in PARTS for run in series(*part).own]
        yield [Job.of(measure, run) for part in PARTS for run in series(*part).runs(store, seeds)]
        yield [Job.again(BASES_FILE, export_base, EXPORTED)]
        yield [Job.of(measure_shapes, SHAPES)]
        yield files_again(TIMED, lambda part: series(*part), store, measure)
        yield self.times(store).jobs

    def times(self, store: Store) -> Times:
        """Of the first seed."""
        chosen = [(f"{ratio:g}-{arm.name}", series(arm, ratio).chosen(store)) for arm, ratio in TIMED]
        files = [(f"{name}-{own}", run and run.file(own)) for name, run in chosen for own in WHOLE.files]
        return Times(f"structured-v{VERSION}", (("base", BASES_FILE), *files), side=14)

    def rows(self, store: Store, seeds: int) -> dict[tuple[Arm, float], Measured] | None:
        """By arm and share; None if a run is missing."""
        rows = {part: row for part in PARTS if (row := Measured.of(series(*part), store, seeds)) is not None}
        return rows if len(rows) == len(PARTS) else None

    def tables(self, store: Store, seeds: int) -> str:
        """Accuracy of each arm, and bytes and times of both files."""
        rows, exported = self.rows(store, seeds), store.read(EXPORTED)
        bases = [own for seed in range(seeds) if (own := store.of_file(base_path(seed))) is not None]
        if rows is None or exported is None or len(bases) < seeds:
            return f"{NOT_YET.capitalize()}.\n"
        accuracy = 100 * sum(own["test_accuracy"] for own in bases) / seeds
        fast = self.times(store).read(store)
        lines = [
            f"The network that is made smaller: 8 layers, {WIDTH} channels, {BASE_EPOCHS} epochs; {accuracy:.2f}% of "
            f"the test images, {exported['bytes'] / 1e3:.0f} kB as an fp32 file.",
            "",
            "| MACs removed | arm | learning rate | test accuracy | over training on the whole network | over the same "
            "shape from the start | parameters | MACs | fp32: kB, times as fast | int8: accuracy, kB, times as fast | "
            "minutes |",
            f"|{'---|' * 11}",
        ]
        for (arm, ratio), row in rows.items():
            scratch = rows.get((ARMS[-1], ratio))
            both = [fast.get(f"{ratio:g}-{arm.name}-{precision}") for precision in arm.files]
            fp32, int8 = ("" if own is None else f", {own['faster']:.2f}" for own in both)
            cells = [
                f"{ratio:.0%}",
                arm.title,
                rate_of(row),
                f"{100 * row.mean('test_accuracy'):.2f}",
                "" if arm is WHOLE else difference(row, rows[WHOLE, 0.0]),
                "" if scratch is None or arm is ARMS[-1] else difference(row, scratch),
                f"{row.first['parameters']:,}",
                f"{row.first['macs']:,}",
                f"{row.first['fp32_bytes'] / 1e3:.0f}{fp32}",
                f"{100 * row.mean('int8_accuracy'):.2f}, {row.first['int8_bytes'] / 1e3:.0f}{int8}",
                f"{row.minutes:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        norm, random, _ = ARMS
        gains = (f"{ratio:.0%}: {difference(rows[norm, ratio], rows[random, ratio])}" for ratio in RATIOS)
        said = f"{norm.title} less {random.title}, test accuracy: {'; '.join(gains)}."
        lines += ["", said[0].upper() + said[1:]]
        cost = minutes(base_jobs(seeds), store) + sum(row.minutes for row in rows.values())
        lines += ["", f"{seeds} seeds; {cost:.0f} minutes of one thread, the choice of learning rates included."]
        return "\n".join([*lines, "", "### Numbers of channels", "", shapes_table(store)])

    def lines(self, store: Store, seeds: int) -> list[Line]:
        """The small network that was trained over the one that begins small, at each share."""
        rows, pruned, scratch = self.rows(store, seeds), ARMS[0], ARMS[-1]
        title = "a trained network made smaller over the small shape from the start"
        found = []
        for ratio in RATIOS:
            said, cost = NOT_YET, 0.0
            if rows is not None:
                said = difference(rows[pruned, ratio], rows[scratch, ratio])
                cost = minutes(base_jobs(seeds), store)  # all go on from these, or are compared with who does
                cost += sum(row.minutes for (_, own), row in rows.items() if own in (0.0, ratio))
            found.append(
                Line(title, f"{ratio:.0%} of the MACs removed, {BASE_EPOCHS + LATER_EPOCHS} epochs", said, cost)
            )
        return found


def shapes_table(store: Store) -> str:
    if (kept := store.read(SHAPES)) is None:
        return f"{NOT_YET.capitalize()}.\n"
    lines = [
        "| MACs removed | round_to | channels of the three stages | MACs | kB | times as fast |",
        f"|{'---|' * 6}",
    ]
    for ratio, multiple in itertools.product(RATIOS, MULTIPLES):
        own = kept["shapes"][f"{ratio:g}-{multiple}"]
        said = "cannot be met within 2 points | | |"
        if own is not None:
            said = f"{own['channels']} | {own['macs']:,} | {own['bytes'] / 1e3:.0f} | {own['faster']:.2f}"
        lines.append(f"| {ratio:.0%} | {multiple} | {said} |")
    return "\n".join(lines) + "\n"

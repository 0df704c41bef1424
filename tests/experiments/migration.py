"""Lightning's ModelPruning beside PruningCallback on scikit-learn's digits; every number is read from tensors.

python -m tests.experiments.migration [--seeds 8] [--pages]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import PruningCallback
from lightning_compress.demo import load_data
from lightning_compress.functional.schedules import cubic_schedule

from .data import Images, Split
from .tables import interval, splice
from .training import Classifier, predictions, quiet, share

PAGE = Path("docs/migration.md")
WIDTH, BATCH, HELD_OUT = 8, 64, 297
EPOCHS, SHORT, RATES = 20, 8, (0.03, 0.1, 0.3)
END = 0.75  # both callbacks reach the final sparsity after this part of the training
SPARSITIES = (0.9, 0.97)

Make = Callable[[L.LightningModule], list[Callback]]  # parameters_to_prune wants the layers themselves


@functools.cache
def digits() -> Split:
    """1,000 images to train on, 297 to choose learning rates by, 500 to test with."""
    data = load_data("digits")
    (images, labels), kept = data.train, len(data.train[0]) - HELD_OUT
    return Split((images[:kept], labels[:kept]), (images[kept:], labels[kept:]), data.test)


# The callbacks


def prunable(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """All convolutions and linear layers: what PruningCallback selects, as ModelPruning wants it."""
    return [(layer, "weight") for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def lightnings(amount: Any, **more: Any) -> Make:
    """ModelPruning, by magnitude over all convolutions and linear layers, without going back to the first weights."""

    def make(module: L.LightningModule) -> list[Callback]:
        return [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=prunable(module),
                amount=amount,
                use_lottery_ticket_hypothesis=False,
                **more,
            )
        ]

    return make


def ours(sparsity: float, **more: Any) -> Make:
    return lambda module: [PruningCallback(sparsity, end=END, **more)]


def dense(module: L.LightningModule) -> list[Callback]:
    return []


def shares(sparsities: Sequence[float]) -> Callable[[int], float]:
    """What `amount` has to return, epoch by epoch, so that these sparsities are reached: shares of what remains."""
    before = [0.0, *sparsities]
    amounts = [1 - (1 - after) / (1 - old) for old, after in zip(before, sparsities, strict=False)]
    return lambda epoch: amounts[epoch] if epoch < len(amounts) else 0.0


def equal_shares(sparsity: float, epochs: int) -> Make:
    """The one `amount` that compounds to a sparsity, and an end of the pruning."""
    pruned = int(END * epochs)
    return lightnings(1 - (1 - sparsity) ** (1 / pruned), apply_pruning=lambda epoch: epoch < pruned)


def cubic(sparsity: float, epochs: int, **more: Any) -> Make:
    """The schedule of PruningCallback, at the end of each epoch instead of each step."""
    pruned = int(END * epochs)
    return lightnings(shares([cubic_schedule((e + 1) / pruned, 0.0, sparsity) for e in range(pruned)]), **more)


def classifier(rate: float) -> Classifier:
    """The module of both; Lightning's callback fails on weights whose channels are last."""
    return Classifier(WIDTH, rate).to(memory_format=torch.contiguous_format)


# One training


@dataclass
class Watch(Callback):
    """Notes the share of zeros in the weights that each step's forward read, and the keys of the module meanwhile."""

    read: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def note(network: nn.Module, *_: Any) -> None:
            self.read.append(zeros(getattr(layer, name) for layer, name in prunable(network)))

        self.handle = pl_module.network.register_forward_hook(note)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.keys = list(pl_module.state_dict())

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.handle.remove()


def zeros(weights: Iterable[Tensor]) -> float:
    weights = [weight.detach() for weight in weights]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def sparsity_of(state: Mapping[str, Tensor]) -> float:
    """The share of zeros among the weights of convolutions and linear layers in a state_dict."""
    plain = classifier(RATES[0])
    chosen = {id(layer.weight) for layer, _ in prunable(plain)}
    return zeros(state[name] for name, parameter in plain.named_parameters() if id(parameter) in chosen)


def fit(
    make: Make,
    images: Images,
    epochs: int,
    *,
    rate: float = 0.1,
    seed: int = 0,
    folder: Path | None = None,
    resume: Path | None = None,
) -> tuple[Classifier, Watch]:
    """Train; with a folder, write the checkpoint of each epoch to it and watch each step."""
    torch.manual_seed(seed)
    module, watch = classifier(rate), Watch()
    saving = [] if folder is None else [watch, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*make(module), *saving],
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(*images)
    # its order is one of seed and epoch, so that a resumed training sees the batches of the uninterrupted one
    order = DistributedSampler(data, num_replicas=1, rank=0, seed=seed)
    trainer.fit(module, DataLoader(data, BATCH, sampler=order), ckpt_path=resume)
    return module, watch


def saved(folder: Path, epoch: int) -> dict[str, Tensor]:
    """The state_dict in the checkpoint of an epoch, counted from 1."""
    return torch.load(checkpoint(folder, epoch), weights_only=True)["state_dict"]


def checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch={epoch - 1}.ckpt"


# What `amount` means


def sparsity_by_epoch(make: Make, images: Images, epochs: int) -> list[float]:
    """The share of zeros in the checkpoint of each epoch."""
    with tempfile.TemporaryDirectory() as name:
        fit(make, images, epochs, folder=Path(name))
        return [sparsity_of(saved(Path(name), epoch)) for epoch in range(1, epochs + 1)]


def amount_table(images: Images, epochs: int) -> str:
    rows = {
        "`ModelPruning(amount=0.5)`": lightnings(0.5),
        "`ModelPruning(amount=1000)`, an int": lightnings(1000),
        **{f'`PruningCallback(0.5, schedule="{name}")`': ours(0.5, schedule=name) for name in SCHEDULES},
    }
    lines = [f"| sparsity after epoch | {' | '.join(map(str, range(1, epochs + 1)))} |", "|---" * (epochs + 1) + "|"]
    for title, make in rows.items():
        lines.append(f"| {title} | {' | '.join(percent(s) for s in sparsity_by_epoch(make, images, epochs))} |")
    return "\n".join(lines)


SCHEDULES = ("one_shot", "iterative", "linear", "cubic")


# Resuming


@dataclass(frozen=True)
class Resumed:
    """What became of a training that was resumed from the checkpoint of an epoch, and of the one that was not."""

    in_file: float
    first_steps: tuple[float, float]
    end: float
    uninterrupted_end: float
    largest_difference: float


def resumed(make: Make, images: Images, epochs: int, after: Sequence[int]) -> list[Resumed]:
    """Train once without interruption; then resume it from some of its checkpoints, in new modules and Trainers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = fit(make, images, epochs, folder=folder / "whole")[0].state_dict()
        results = []
        for epoch in after:
            file = checkpoint(folder / "whole", epoch)
            module, watch = fit(make, images, epochs, folder=folder / f"from {epoch}", resume=file)
            results.append(
                Resumed(
                    sparsity_of(saved(folder / "whole", epoch)),
                    (watch.read[0], watch.read[1]),
                    sparsity_of(module.state_dict()),
                    sparsity_of(whole),
                    max(float((module.state_dict()[key] - whole[key]).abs().max()) for key in whole),
                )
            )
        return results


def resume_table(images: Images, epochs: int, sparsity: float = 0.9) -> str:
    after = (epochs // 2, epochs - 1)  # in the middle of the schedule, and in the fine-tuning after it
    lines = [
        "| | resumed after epoch | in the checkpoint | first step | second step | at the end "
        "| uninterrupted, at the end | largest difference of a weight |",
        "|---" * 8 + "|",
    ]
    for title, make in {
        "no callback": dense,
        "`ModelPruning`": cubic(sparsity, epochs),
        "`PruningCallback`": ours(sparsity),
    }.items():
        for epoch, row in zip(after, resumed(make, images, epochs, after), strict=True):
            figures = (row.in_file, *row.first_steps, row.end, row.uninterrupted_end)
            difference = f"{row.largest_difference:.2g}"
            lines.append(f"| {title} | {epoch} of {epochs} | {' | '.join(map(percent, figures))} | {difference} |")
    return "\n".join(lines)


# Names


@dataclass(frozen=True)
class Names:
    """Keys that a plain module lacks: in the module during the fit, and in a checkpoint; and what the latter is for."""

    in_module: list[str]
    in_file: list[str]
    loads: bool
    resumes: bool


def names(make: Make, images: Images) -> Names:
    plain = classifier(RATES[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, watch = fit(make, images, 3, folder=folder)
        state = saved(folder, 2)
        return Names(
            sorted(set(watch.keys) - set(plain.state_dict())),
            sorted(set(state) - set(plain.state_dict())),
            works(lambda: plain.load_state_dict(state, strict=True)),
            works(lambda: fit(make, images, 3, folder=folder / "resumed", resume=checkpoint(folder, 2))),
        )


def works(action: Callable[[], Any]) -> bool:
    try:
        action()
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        return False
    return True


def names_table(images: Images) -> str:
    lines = [
        "| | new keys in the module during the fit | new keys in its checkpoints "
        "| loads with `strict=True` | `fit(ckpt_path=...)` |",
        "|---" * 5 + "|",
    ]
    for title, make in {
        "`ModelPruning`": lightnings(0.5),
        "`ModelPruning(make_pruning_permanent=False)`": lightnings(0.5, make_pruning_permanent=False),
        "`PruningCallback`": ours(0.5),
    }.items():
        row = names(make, images)
        cells = [kinds(row.in_module), kinds(row.in_file), yes(row.loads), "runs" if row.resumes else "`RuntimeError`"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds(keys: Sequence[str]) -> str:
    """How many keys, by the last part of their names."""
    ends = [key.rpartition(".")[2] for key in keys]
    return ", ".join(f"{ends.count(end)} `{end}`" for end in sorted(set(ends))) or "none"


# Accuracy at equal sparsity


@dataclass(frozen=True)
class Arm:
    title: str
    make: Make
    rate: float
    test: list[float]  # accuracy by seed, after the last epoch
    sparsity: list[float]
    batches: list[int]  # a checksum by seed
    seconds: list[float]


def measure(title: str, make: Make, data: Split, epochs: int, seeds: int) -> Arm:
    """Choose the learning rate on the held-out images with seed 0; then look at the test images once for each seed."""

    def run(rate: float, seed: int) -> tuple[Classifier, float]:
        begin = time.process_time()
        module, _ = fit(make, data.train, epochs, rate=rate, seed=seed)
        return module, time.process_time() - begin

    first = {rate: run(rate, 0) for rate in RATES}
    rate = max(RATES, key=lambda rate: share(predictions(first[rate][0].network, data.held_out), data.held_out[1]))
    runs = [first[rate], *(run(rate, seed) for seed in range(1, seeds))]
    return Arm(
        title,
        make,
        rate,
        [share(predictions(module.network, data.test), data.test[1]) for module, _ in runs],
        [sparsity_of(module.state_dict()) for module, _ in runs],
        [module.seen for module, _ in runs],
        [seconds for _, seconds in runs],
    )


def over(one: Arm, other: Arm) -> str:
    """Mean difference in points, paired by seed, with its 95% t interval."""
    if one.batches != other.batches:
        raise ValueError(f"{one.title} and {other.title} saw different batches")
    return interval([100 * (a - b) for a, b in zip(one.test, other.test, strict=True)])


def accuracy_table(data: Split, epochs: int, seeds: int, sparsities: Sequence[float] = SPARSITIES) -> str:
    plain = measure("no callback", dense, data, epochs, seeds)
    lines = [
        "| | sparsity | learning rate | test accuracy | over no callback | `PruningCallback` over this "
        "| seconds a run |",
        "|---" * 7 + "|",
        accuracy_row(plain),
    ]
    for sparsity in sparsities:
        arms = [
            measure("`ModelPruning`, equal shares", equal_shares(sparsity, epochs), data, epochs, seeds),
            measure("`ModelPruning`, cubic", cubic(sparsity, epochs), data, epochs, seeds),
            measure("`PruningCallback(update_interval=16)`", ours(sparsity, update_interval=16), data, epochs, seeds),
            measure("`PruningCallback`", ours(sparsity), data, epochs, seeds),
        ]
        lines += [accuracy_row(arm, over(arm, plain), "" if arm is arms[-1] else over(arms[-1], arm)) for arm in arms]
    return "\n".join(lines)


def accuracy_row(arm: Arm, over_plain: str = "", beaten_by: str = "") -> str:
    figures = [percent(statistics.mean(arm.sparsity)), f"{arm.rate:g}", f"{100 * statistics.mean(arm.test):.2f}"]
    return f"| {' | '.join([arm.title, *figures, over_plain, beaten_by, f'{statistics.mean(arm.seconds):.1f}'])} |"


# The page


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def page(data: Split, seeds: int, epochs: int = EPOCHS, short: int = SHORT) -> str:
    begin = time.process_time()
    parts = [
        "### What the number means",
        amount_table(data.train, 4),
        f"### Resuming, on the way to {percent(SPARSITIES[0])}",
        resume_table(data.train, short),
        "### Names",
        names_table(data.train),
        "### Accuracy at equal sparsity",
        accuracy_table(data, epochs, seeds),
    ]
    minutes = (time.process_time() - begin) / 60
    return "\n\n".join([*parts, f"{seeds} seeds of {epochs} epochs; all tables: {minutes:.1f} CPU minutes."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the last table")
    parser.add_argument("--pages", action="store_true", help=f"put the tables into {PAGE} too")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    text = page(digits(), options.seeds)
    print(text)
    if options.pages:
        splice(PAGE, text)


if __name__ == "__main__":
    main()

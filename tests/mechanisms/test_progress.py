"""Progress: the share of a training that is behind, told after each batch of real fits."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from contract.modules import BATCH, STEPS, Batches, Classifier, ManualClassifier, loader, made, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.mechanisms.progress import Progress


class Watch(L.Callback):
    """Steps and fraction at the start and after each batch."""

    def __init__(self):
        self.progress, self.steps, self.fractions = None, [], []

    def look(self):
        self.steps.append(self.progress.steps)
        self.fractions.append(self.progress.fraction)

    def on_train_start(self, trainer, pl_module):
        self.progress = Progress(trainer, pl_module)
        self.look()

    def on_train_batch_end(self, *args):
        self.look()


class Two(ManualClassifier):
    """Two optimizers, of which the second steps at every other batch."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(self.task_loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()


class WatchWithin(Watch):
    """What is over at the start of each batch, and after it."""

    def look(self):
        self.steps.append(self.progress.steps_over)

    def on_train_batch_start(self, *args):
        self.look()


class Skipping(Classifier):
    """Every other batch teaches nothing."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        data = Batches()
        return (data[index] for index in range(len(data)))


def stream():
    return DataLoader(Stream(), batch_size=BATCH)


def watched(kind, data=None, path=None, **settings):
    watch = Watch()
    trainer(watch, **settings).fit(made(kind), loader() if data is None else data, ckpt_path=path)
    return watch


@pytest.mark.parametrize("kind", [Classifier, ManualClassifier])
def test_a_step_is_over_when_its_batch_is(kind):
    watch = WatchWithin()
    trainer(watch).fit(made(kind), loader())
    assert watch.steps == [0, *(step for count in range(STEPS) for step in (count, count + 1))]


@pytest.mark.parametrize("kind", [Classifier, ManualClassifier])
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, STEPS),
        ({"max_epochs": 3}, 3 * STEPS),
        ({"max_steps": 11, "max_epochs": None}, 11),
        ({"max_steps": 11, "max_epochs": 2}, 11),  # what comes first counts
        ({"max_steps": 11, "max_epochs": 1}, STEPS),
        ({"limit_train_batches": 3, "max_epochs": 2}, 6),
        ({"limit_train_batches": 0.5}, STEPS // 2),
        ({"fast_dev_run": 2}, 2),
    ],
    ids=str,
)
def test_each_step_is_an_equal_share_of_the_whole(kind, settings, count):
    watch = watched(kind, **settings)
    assert watch.steps == list(range(count + 1))
    assert watch.fractions == [step / count for step in range(count + 1)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"accumulate_grad_batches": 3}, [0, 0, 0, 1, 1, 1, 2, 2, 3]),  # one after the last batch of an epoch
        ({"accumulate_grad_batches": 3, "max_steps": 2}, [0, 0, 0, 1, 1, 1, 2]),
        ({"accumulate_grad_batches": 4, "max_epochs": 2}, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]),
    ],
)
def test_steps_are_those_of_the_optimizer(settings, steps):
    watch = watched(Classifier, **settings)
    assert watch.steps == steps
    assert watch.fractions == [step / steps[-1] for step in steps]


@pytest.mark.parametrize("kind", [Classifier, ManualClassifier])
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"max_steps": 5, "max_epochs": None}, 5),
        ({"max_steps": 10, "max_epochs": None}, 10),  # more than one pass
        ({"max_steps": 5, "max_epochs": 2}, 5),
        ({"limit_train_batches": 3, "max_epochs": 2}, 6),
    ],
    ids=str,
)
def test_a_stream_without_a_length_needs_an_end_in_steps_or_batches(kind, settings, count):
    watch = watched(kind, stream(), **settings)
    assert watch.steps == list(range(count + 1))
    assert watch.fractions == [step / count for step in range(count + 1)]


@pytest.mark.parametrize("kind", [Classifier, ManualClassifier])
@pytest.mark.parametrize(
    ("streamed", "settings"),
    [
        (True, {"max_epochs": 2}),
        (False, {"max_epochs": -1}),
        (False, {"max_epochs": None, "max_time": {"hours": 1}}),
        (True, {"max_epochs": None, "max_time": {"hours": 1}}),
    ],
    ids=str,
)
def test_a_training_without_an_end_is_an_error(kind, streamed, settings):
    with pytest.raises(ValueError) as caught:
        watched(kind, stream() if streamed else None, **settings)
    assert str(caught.value) == (
        "a schedule needs to know how long the training is, and here it has no end in batches: give the Trainer "
        "max_steps, or max_epochs with a training set that has a length"
    )


def test_with_manual_optimisation_batches_are_counted():
    watch = watched(Two, max_epochs=2)
    assert watch.steps == list(range(2 * STEPS + 1))
    assert watch.fractions == [step / (2 * STEPS) for step in range(2 * STEPS + 1)]


def test_with_manual_optimisation_max_steps_are_those_of_all_optimizers():
    """Three for each two batches; the training ends before its epochs do."""
    watch = watched(Two, max_epochs=2, max_steps=12)
    assert watch.steps == list(range(9))
    assert watch.fractions == [steps / 12 for steps in (0, 1, 3, 4, 6, 7, 9, 10, 12)]
    watch = watched(Two, max_epochs=2, max_steps=1000)
    assert watch.fractions == [step / 16 for step in range(17)]


def test_a_batch_that_is_skipped_counts():
    """Lightning calls the optimizer for it too."""
    assert watched(Skipping).fractions == [step / STEPS for step in range(STEPS + 1)]


def test_a_training_that_goes_on_longer_than_foreseen_stays_at_one():
    class Lengthen(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop.max_epochs = 2

    watch = Watch()
    trainer(watch, Lengthen()).fit(made(Classifier), loader())
    assert watch.steps == list(range(2 * STEPS + 1))
    assert watch.fractions == [min(step / STEPS, 1.0) for step in watch.steps]


@pytest.mark.parametrize("kind", [Classifier, ManualClassifier])
def test_a_resumed_training_goes_on_where_it_was(kind, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer(saver, enable_checkpointing=True, max_epochs=2).fit(made(kind), loader())
    watch = watched(kind, loader(), tmp_path / "step=10.ckpt", max_epochs=2)
    assert watch.steps == list(range(10, 2 * STEPS + 1))
    assert watch.fractions == [step / (2 * STEPS) for step in watch.steps]
    longer = watched(kind, loader(), tmp_path / "step=15.ckpt", max_epochs=4)
    assert (longer.fractions[0], longer.fractions[-1]) == (15 / 32, 1.0)
    assert longer.fractions == sorted(longer.fractions)

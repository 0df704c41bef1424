"""Replay: the user's step runs on the training data, and afterwards nothing tells that it did."""

# ruff: noqa: PT012 -- the step is to fail inside of the context
from __future__ import annotations

import copy
import itertools
import random
from collections import deque
from contextlib import contextmanager
from importlib import import_module

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_compress import CompressionMixin
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.replay import TRIES, Replay, replay, traceless
from lightning_compress.mechanisms.step import step_controller

ROWS, BATCH = 24, 4
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def rows(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, 4, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Again:
    """Training data that is no DataLoader, but can be read from the start each time."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def loader(**settings) -> DataLoader:
    return DataLoader(rows(), **{"batch_size": BATCH, **settings})


# Harness: a Trainer that is stopped where the training would start


class Stopped(Exception):
    """Ends a fit where the work was done."""


def made_trainer(*callbacks, package=L, **settings):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def at_start(module, data, work, *, package=L, datamodule=None, **settings):
    """What ``work`` gives where the training starts; the fit ends there."""
    results = []

    class Work(package.Callback):
        def on_train_start(self, trainer, pl_module):
            with step_controller(pl_module) as controller:
                results.append(work(controller, trainer))
            raise Stopped

    with pytest.raises(Stopped):
        made_trainer(Work(), package=package, **settings).fit(module, data, datamodule=datamodule)
    return results[0]


def replayed(module, data, look, **settings):
    """What ``look`` sees in a replay where the training starts."""

    def work(controller, trainer):
        with replay(controller, trainer) as again:
            return look(again)

    return at_start(module, data, work, **settings)


def inputs(again: Replay, student=("net",)) -> list[list[float]]:
    """The first column of what the student is given, batch by batch."""
    return [again.received(student, arguments).args[0][:, 0].tolist() for arguments in again.batches()]


IN_ORDER = [batch[0][:, 0].tolist() for batch in loader()]


# What can be told afterwards


def frozen(value):
    """A value as plain data that can be compared: contents, bit by bit, and which object holds them."""
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        return ("tensor", id(value), value.requires_grad, plain.dtype, plain.shape, plain.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", id(value), value.tobytes())
    if isinstance(value, torch.Generator):
        return ("generator", id(value), value.get_state().numpy().tobytes())
    if isinstance(value, np.random.Generator):
        return ("generator", id(value), str(value.bit_generator.state))
    if isinstance(value, (np.random.RandomState, random.Random)):
        return ("generator", id(value), str(value.get_state() if hasattr(value, "get_state") else value.getstate()))
    if isinstance(value, dict):
        return {"id": id(value), **{str(key): frozen(entry) for key, entry in value.items()}}
    if isinstance(value, (list, tuple, deque)):
        return (type(value).__name__, id(value), [frozen(entry) for entry in value])
    if isinstance(value, (set, frozenset)):
        return ("set", id(value), set(value))
    if isinstance(value, Meter):
        return {"id": id(value), **attributes(value)}
    return value if isinstance(value, (bool, int, float, str, type(None))) else ("object", id(value))


def attributes(thing):
    """Those of an object, except for what leads back to the Trainer."""
    return {name: frozen(value) for name, value in vars(thing).items() if name not in ("_trainer", "trainer")}


def everything(trainer, module, *others):
    """All that a replay might have touched."""
    loaders = trainer.fit_loop._combined_loader.flattened
    data = [entry for one in loaders for entry in (one, one.sampler, one.batch_sampler, one.dataset)]
    return {
        **{f"module {name}": attributes(part) for name, part in module.named_modules()},
        **{f"data {type(part).__name__}": attributes(part) for part in data if part is not None},
        **{f"{type(other).__name__}": attributes(other) for other in others},
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "optimizers": [str(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
        "logged": dict(trainer.callback_metrics),
        "loggers": [id(logger) for logger in trainer.loggers],
    }


def changed(before, after, path=""):
    """Where two snapshots differ."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [path]
    names = sorted({**before, **after})
    return [place for name in names for place in changed(before.get(name), after.get(name), f"{path}/{name}")]


class Notes(Logger):
    """Writes down whatever it is told."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def experiment(self):
        return self

    def add_scalar(self, name, value):
        self.told.append((name, value))

    def log_metrics(self, metrics, step=None):
        self.told.append(metrics)

    def log_hyperparams(self, *_):
        pass


class Meter:
    """A plain object of the user's."""

    def __init__(self):
        self.total, self.values = 0.0, []

    def update(self, value):
        self.total += value
        self.values.append(value)


class Restless(L.LightningModule):
    """Whatever a step may do beside a loss, this one does."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.mean = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection(
            {"all": torchmetrics.Accuracy("multiclass", num_classes=2), "f1": torchmetrics.F1Score("binary")}
        )
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("average", torch.zeros(2))
        self.moving = torch.zeros(2)
        self.history, self.recent, self.names = [], deque(maxlen=2), {"a"}
        self.counts = {"steps": 0, "inner": {"sums": [0.0]}}
        self.table = np.zeros(2)
        self.steps, self.gone = 0, "here"
        self.own = torch.Generator().manual_seed(1)
        self.numpy, self.python = np.random.default_rng(1), random.Random(1)
        self.meter, self.unused = Meter(), nn.Identity()
        self.fails_at = fails_at

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.note(x)
        if batch_idx == self.fails_at:
            raise OSError("the disk is gone")
        x = x + 0.1 * torch.randn(x.shape, generator=self.own) + self.numpy.random() + self.python.random()
        logits = self.net(x)
        self.change()
        loss = F.cross_entropy(logits, y) * (1 + 0.1 * np.random.rand() + 0.1 * random.random())  # noqa: NPY002
        for metric in (self.mean, self.kept):
            metric.update(loss.detach())
        self.both.update(logits.argmax(dim=1), y)
        self.log("loss", loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict({"a": loss, "b": loss})
        self.print("nobody is to see this")
        if self.logger is not None:
            self.logger.experiment.add_scalar("loss", loss.item())
            self.logger.log_metrics({"loss": loss.item()}, step=batch_idx)
        return loss

    def note(self, x):
        self.steps += 1
        self.added = x.mean()
        self.history.append(x.mean().item())
        self.recent.append(self.steps)
        self.names.add(str(self.steps))
        self.counts["steps"] += 1
        self.counts["inner"]["sums"][0] += 1.0
        self.counts[self.steps] = [x.detach()]
        self.table += 1
        self.meter.update(self.steps)
        self.trainer.should_stop = True
        if hasattr(self, "gone"):
            del self.gone

    def change(self):
        self.queue.add_(1)
        self.average = self.average * 0.9 + 0.1
        self.moving.mul_(0.5).add_(torch.rand(2))
        with torch.no_grad():
            self.net[0].weight.mul_(0.99)
        self.net[3].bias.data = torch.ones(2)
        self.net[2].train(not self.net[2].training)
        self.net[1].momentum *= 0.9
        self.net[3].weight.requires_grad_(False)
        self.net.register_forward_hook(lambda *_: None)
        self.extra = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def stopped_at_the_input(again):
    return [again.received(("net",), arguments).args[0].shape for arguments in again.batches()]


def stopped_at_the_output(again):
    return [len(again.outputs(("net",), arguments)) for arguments in again.batches()]


def whole_steps(again):
    """What the steps never call stops none of them."""
    return [again.received(("unused",), arguments) for arguments in again.batches()]


def found(again):
    return again.students()


def failing(again):
    with pytest.raises(OSError, match="the disk is gone"):
        whole_steps(again)


def all_of_it(again):
    return [look(again) for look in (found, whole_steps, stopped_at_the_output, stopped_at_the_input)]


EVERY_STEP = ROWS // BATCH


# Nothing can be told


@pytest.mark.parametrize(
    ("look", "fails_at", "expected"),
    [
        (stopped_at_the_input, None, [(BATCH, 4)] * EVERY_STEP),
        (stopped_at_the_output, None, [4] * EVERY_STEP),
        (whole_steps, None, [None] * EVERY_STEP),
        (found, None, ("net",)),
        (failing, 3, None),
        (all_of_it, None, [("net",), [None] * EVERY_STEP, [4] * EVERY_STEP, [(BATCH, 4)] * EVERY_STEP]),
    ],
    ids=["input", "output", "whole", "found", "failing", "all"],
)
def test_nothing_can_be_told_afterwards(look, fails_at, expected, capsys):
    module, notes = Restless(fails_at), Notes()

    def work(controller, trainer):
        before = everything(trainer, module)
        with replay(controller, trainer) as again:
            assert look(again) == expected
        assert changed(before, everything(trainer, module)) == []

    at_start(module, loader(shuffle=True, generator=torch.Generator().manual_seed(3)), work, logger=notes)
    assert notes.told == []
    assert "nobody" not in capsys.readouterr().out


def test_an_error_of_who_replays_leaves_nothing_either():
    module = Restless()

    def work(controller, trainer):
        before = everything(trainer, module)
        with pytest.raises(OSError, match="mine"), replay(controller, trainer) as again:
            next(again.batches())
            whole_steps(again)
            raise OSError("mine")
        assert controller.replaying is False
        assert changed(before, everything(trainer, module)) == []

    at_start(module, loader(shuffle=True), work)


CHANGES = (
    *("steps", "history", "recent", "names", "table", "moving", "added", "gone", "own", "numpy", "python"),
    *("meter/total", "meter/values", "counts/steps", "counts/inner/sums", "_buffers/queue", "_buffers/average"),
)
CHANGES_BELOW = (
    *("net/_forward_hooks", "net.0/_parameters/weight", "net.1/_buffers/running_mean", "net.1/momentum"),
    *("net.1/_buffers/num_batches_tracked", "net.2/training", "net.3/_parameters/bias", "net.3/_parameters/weight"),
    *("mean/mean_value", "mean/_update_count", "kept/value", "both.all/tp", "extra"),
)


def test_the_snapshot_does_tell_a_step_that_was_no_replay():
    module, notes = Restless(), Notes()

    def work(controller, trainer):
        before = everything(trainer, module)
        module.training_step(next(iter(trainer.train_dataloader)), 0)
        return changed(before, everything(trainer, module))

    told = at_start(module, loader(shuffle=True, generator=torch.Generator().manual_seed(3)), work, logger=notes)
    assert len(notes.told) == 2
    expected = [f"/module /{name}" for name in CHANGES] + [f"/module {name}" for name in CHANGES_BELOW]
    expected += [
        "/torch",
        "/numpy",
        "/python",
        "/progress",
        "/data DataLoader/generator",
        "/data RandomSampler/generator",
    ]
    assert [place for place in expected if not any(entry.startswith(place) for entry in told)] == []


class Dropping(L.LightningModule):
    """Learns, with dropout and batch norm, and logs."""

    package = L

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.unused = nn.Identity()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Drawing(Dataset):
    """Draws noise from generators of its own and from the global ones."""

    def __init__(self):
        self.data = rows()
        self.own, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.python, self.legacy = random.Random(1), np.random.RandomState(1)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        x, y = self.data[index]
        noise = torch.randn(4, generator=self.own) + self.numpy.random() + self.python.random() + self.legacy.rand()
        return x + 0.1 * noise.float() + 0.1 * random.random() + 0.1 * np.random.rand(), y  # noqa: NPY002


class Streaming(IterableDataset):
    """Shuffles in place, and goes on where it was."""

    def __init__(self):
        self.order, self.epochs, self.data = list(range(ROWS)), 0, rows()

    def __iter__(self):
        self.epochs += 1
        random.shuffle(self.order)
        return (self.data[(index + self.epochs) % ROWS] for index in self.order)


class Shuffling:
    """A sampler that shuffles its own arrays and lists in place."""

    def __init__(self):
        self.buckets = [list(range(12)), np.arange(12, ROWS)]

    def __len__(self):
        return ROWS

    def __iter__(self):
        random.shuffle(self.buckets)
        for bucket in self.buckets:
            np.random.shuffle(bucket)  # noqa: NPY002
            yield from map(int, bucket)


def shuffled_with_its_own():
    own = torch.Generator().manual_seed(3)
    return loader(generator=own, sampler=RandomSampler(range(ROWS), generator=torch.Generator().manual_seed(4)))


DATA = {
    "shuffled": lambda: loader(shuffle=True),
    "its own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "a sampler's generator": shuffled_with_its_own,
    "a dataset's generators": lambda: DataLoader(Drawing(), batch_size=BATCH, shuffle=True),
    "a stream": lambda: DataLoader(Streaming(), batch_size=BATCH),
    "a sampler that shuffles in place": lambda: loader(sampler=Shuffling()),
    "several": lambda: CombinedLoader([loader(shuffle=True), loader(shuffle=True)], "max_size_cycle"),
}


class Both(Dropping):
    def training_step(self, batch, batch_idx):
        (x, y), (other, _) = batch
        return super().training_step((x + other, y), batch_idx)


class Replaying(L.Callback):
    """Goes through all of the data, in whole steps and in stopped ones, and through a part of it once more."""

    def __init__(self, *, late=False):
        self.late = late

    def on_train_start(self, trainer, pl_module):
        if not self.late:
            self.replay(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.late and batch_idx == 3 and trainer.current_epoch == 0:
            self.replay(trainer, pl_module)

    def replay(self, trainer, pl_module):
        with step_controller(pl_module) as controller, replay(controller, trainer) as again:
            again.students()
            whole_steps(again)
            stopped_at_the_output(again)
            for arguments in itertools.islice(again.batches(), 2):
                again.received(("net",), arguments)


def trained(kind, data, *callbacks, **settings):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    module = kind()
    trainer = made_trainer(*callbacks, **settings)
    trainer.fit(module, data())
    state = {name: value.numpy().tobytes() for name, value in module.state_dict().items()}
    return state, {name: value.item() for name, value in trainer.callback_metrics.items()}


def assert_a_replay_changes_no_bit(data, kind=Dropping, **settings):
    state, logged = trained(kind, data, **settings)
    for late in (False, True):
        assert trained(kind, data, Replaying(late=late), **settings) == (state, logged)
    assert set(logged) == {"loss", "loss_step", "loss_epoch"}
    assert trained(kind, lambda: data(), L.Callback(), **settings) == (state, logged)  # and it can be repeated at all


@pytest.mark.parametrize("name", DATA)
def test_a_run_after_a_replay_equals_one_without(name):
    assert_a_replay_changes_no_bit(DATA[name], Both if name == "several" else Dropping)


def test_different_random_numbers_do_make_a_difference():
    """What the tests above compare does depend on the random states."""

    class Draw(L.Callback):
        def on_train_start(self, trainer, pl_module):
            torch.rand(1)

    assert trained(Dropping, DATA["shuffled"]) != trained(Dropping, DATA["shuffled"], Draw())


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_run_with_worker_processes_equals_one_without_a_replay(persistent):
    def data():
        own = torch.Generator().manual_seed(3)
        return DataLoader(Drawing(), BATCH, shuffle=True, generator=own, num_workers=1, persistent_workers=persistent)

    assert_a_replay_changes_no_bit(data)


# Which steps


class Plain(L.LightningModule):
    """A base whose step comes from the test."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = nn.Linear(4, 2), nn.Identity()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)


class OneArgument(Plain):
    def training_step(self, batch):
        return self.loss(*batch)


class TwoArguments(Plain):
    def training_step(self, batch, batch_idx):
        assert isinstance(batch_idx, int)
        return self.loss(*batch)


class OtherNames(Plain):
    def training_step(self, sample, number):
        assert isinstance(number, int)
        return self.loss(*sample)


class AnyArguments(Plain):
    def training_step(self, *args, **kwargs):
        batch, number = args
        assert isinstance(number, int)
        return self.loss(*batch)


class TakesItself(Plain):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(*batch)


class ReturnsDict(Plain):
    def training_step(self, batch):
        return {"loss": self.loss(*batch), "extra": 1}


class Catches(Plain):
    def training_step(self, batch):
        try:
            return self.loss(*batch)
        except Exception:
            return None


class CatchesAll(Plain):
    def training_step(self, batch):
        try:
            return self.loss(*batch)
        except:  # noqa: E722 - as users do
            return None


class CallsItself(Plain):
    def forward(self, x):
        return self.net(x) * 2

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class CallsForward(CallsItself):
    def training_step(self, batch):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "student"),
    [
        *((kind, "net") for kind in (OneArgument, TwoArguments, OtherNames, AnyArguments, TakesItself, ReturnsDict)),
        (Catches, "net"),
        (CatchesAll, "net"),
        (CallsItself, ""),
        (CallsForward, ""),
    ],
)
def test_forms_of_steps(kind, student):
    def look(again):
        call, arguments = again.first_received((student,))
        assert call.output is None
        assert call.args[0][:, 0].tolist() == IN_ORDER[0]
        return again.students(), inputs(again, (student,)), len(arguments)

    many = 2 if kind in (TwoArguments, OtherNames, AnyArguments) else 1
    module = kind()
    assert replayed(module, loader(), look) == ((student,), IN_ORDER, many)
    assert "forward" not in vars(module)
    assert not module.net._forward_hooks


def test_a_step_that_only_hands_on_has_the_child_as_its_student():
    class HandsOn(CallsItself):
        def forward(self, x):
            return self.net(x)

    assert replayed(HandsOn(), loader(), lambda again: again.students()) == ("net",)


def test_a_step_may_take_several_batches_itself():
    class Two(Plain):
        def training_step(self, dataloader_iter):
            (first, _, _), (second, index, _) = next(dataloader_iter), next(dataloader_iter)
            self.seen.append(index)
            return self.loss(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))

    def look(again):
        seen = inputs(again)
        assert again.students() == ("net",)
        return seen, list(module.seen)

    module = Two()
    module.seen = []
    pairs = [first + second for first, second in zip(IN_ORDER[::2], IN_ORDER[1::2], strict=True)]
    assert replayed(module, loader(), look) == (pairs, [1, 3, 5, 1])
    assert module.seen == []


def test_the_batches_of_such_a_step_may_end_in_the_middle():
    class Four(Plain):
        def training_step(self, dataloader_iter):
            batches = [next(dataloader_iter)[0] for _ in range(4)]
            return self.loss(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))

    def look(again):
        return [again.received(("net",), arguments) is not None for arguments in again.batches()]

    assert replayed(Four(), loader(), look) == [True, False]


def test_batches_of_dicts_and_networks_with_keywords():
    class Keyword(nn.Linear):
        def forward(self, *, features, scale=1.0):
            return {"logits": super().forward(features) * scale}

    class Dicts(Plain):
        def __init__(self):
            super().__init__()
            self.net = Keyword(4, 2)

        def training_step(self, batch):
            return F.cross_entropy(self.net(features=batch["x"], scale=2.0)["logits"], batch["y"])

    data = DataLoader([{"x": x, "y": y} for x, y in rows()], batch_size=BATCH)
    calls = replayed(
        Dicts(), data, lambda again: [again.received(("net",), arguments) for arguments in again.batches()]
    )
    assert [call.args for call in calls] == [()] * EVERY_STEP
    assert [call.kwargs["features"][:, 0].tolist() for call in calls] == IN_ORDER
    assert {call.kwargs["scale"] for call in calls} == {2.0}


@pytest.mark.parametrize(("mode", "count"), [("max_size_cycle", 6), ("min_size", 3), ("max_size", 6)])
def test_several_loaders(mode, count):
    class Several(Plain):
        def training_step(self, batch, batch_idx):
            first, second = batch["first"], batch["second"]
            return self.loss(first[0] if second is None else first[0] + 0 * second[0][:1], first[1])

    data = CombinedLoader({"first": loader(), "second": DataLoader(rows(1), batch_size=8)}, mode)

    def work(controller, trainer):
        before = trainer.fit_loop._combined_loader, trainer.fit_loop._combined_loader._iterator
        with replay(controller, trainer) as again:
            seen = inputs(again)
        assert (trainer.fit_loop._combined_loader, trainer.fit_loop._combined_loader._iterator) == before
        return seen

    assert at_start(Several(), data, work) == IN_ORDER[:count]


@pytest.mark.parametrize(("limit", "count"), [(2, 2), (0.5, 3), (1.0, 6), (100, 6)])
def test_a_limit_holds(limit, count):
    assert replayed(OneArgument(), loader(), inputs, limit_train_batches=limit) == IN_ORDER[:count]


def test_any_iterable_that_can_be_read_again_is_training_data():
    assert replayed(OneArgument(), Again(list(loader())), inputs) == IN_ORDER

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    stream = DataLoader(Stream(), batch_size=BATCH)
    assert replayed(OneArgument(), stream, inputs) == IN_ORDER
    assert replayed(OneArgument(), stream, lambda again: inputs(again) + inputs(again)) == IN_ORDER * 2
    assert replayed(OneArgument(), stream, inputs, limit_train_batches=2) == IN_ORDER[:2]


def test_training_data_that_can_be_read_once_only_is_refused():
    def work(controller, trainer):
        message = "the training data is a generator, which can be read only once, .* give data that starts anew"
        with pytest.raises(ValueError, match=message), replay(controller, trainer):
            pass
        assert controller.replaying is False
        batch, *_ = next(trainer.fit_loop._data_fetcher)
        return batch[0][:, 0].tolist()

    assert at_start(OneArgument(), (batch for batch in loader()), work) == IN_ORDER[0]  # and nothing of it is lost


def test_samplers_that_shuffle_by_the_epoch_are_told_it_and_forget_it():
    class ByEpoch:
        epoch = 7

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return ROWS

        def __iter__(self):
            return iter([(index + self.epoch * BATCH) % ROWS for index in range(ROWS)])

    def work(controller, trainer):
        before = sampler.epoch
        with replay(controller, trainer) as again:
            seen = [again.received(("net",), next(again.batches(*epoch))).args[0][:, 0].tolist() for epoch in epochs]
        assert sampler.epoch == before
        return seen

    sampler, epochs = ByEpoch(), [(), (0,), (1,), (3,)]
    seen = at_start(OneArgument(), loader(sampler=sampler), work)
    assert seen == [IN_ORDER[0], IN_ORDER[0], IN_ORDER[1], IN_ORDER[3]]


def test_batches_that_are_none_are_passed_over():
    data = Again([None, *list(loader())[:2], None])
    assert replayed(OneArgument(), data, inputs) == IN_ORDER[:2]


class Skips(Plain):
    """Calls another network, and then says that the batch does not count."""

    def __init__(self, skipped):
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        if batch_idx < self.skipped:
            self.other(batch[0])
            return None
        return self.loss(*batch)


def test_skipped_batches_are_no_evidence():
    def look(again):
        call, arguments = again.first_received(("net",))
        return again.students(), call.args[0][:, 0].tolist(), arguments[1]

    assert replayed(Skips(3), loader(), look) == (("net",), IN_ORDER[3], 3)


def test_a_student_that_is_never_called_is_an_error():
    def look(again):
        with pytest.raises(CaptureError, match="the training step of Skips does not call the student 'net'; choose an"):
            again.first_received(("net",))
        told = f"calls no network: it returned None for each of {EVERY_STEP} batches; name the network with network=$"
        with pytest.raises(CaptureError, match=f"the training step of Skips {told}"):
            again.students("network")
        with pytest.raises(ValueError, match=r"student names 'nett', .*did you mean 'net'"):
            again.first_received(("nett",))
        return [again.received(("net",), arguments) for arguments in again.batches()]

    assert replayed(Skips(100), loader(), look) == [None] * EVERY_STEP


def test_only_the_first_batches_are_tried():
    class Counts(Skips):
        def training_step(self, batch, batch_idx):
            self.tried.append(batch_idx)
            return super().training_step(batch, batch_idx)

    module = Counts(100)
    module.tried = tried = []

    def look(again):
        with pytest.raises(CaptureError, match="calls no network"):
            again.students()
        return list(tried)

    assert replayed(module, DataLoader(rows(), batch_size=1), look) == list(range(ROWS))
    assert replayed(module, Again([(torch.ones(1, 4), torch.ones(1).long())] * (TRIES + 5)), look) == list(range(TRIES))


class Chain(L.LightningModule):
    """Calls two networks in a row."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2)

    def training_step(self, batch):
        return F.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_chain_of_two():
    def look(again):
        with pytest.raises(CaptureError, match="the step calls 2 modules with parameters: 'encoder', 'head'"):
            again.students()
        _, arguments = again.first_received(("encoder", "head"))
        seen = [(output.name, output.shape) for output in again.outputs(("encoder", "head"), arguments)]
        alone = [(output.name, output.shape) for output in again.outputs(("encoder",), arguments)]
        return inputs(again, ("encoder", "head")), seen, alone

    layers = [("encoder.0", (4, 3)), ("encoder.1", (4, 3)), ("encoder", (4, 3)), ("head", (4, 2))]
    assert replayed(Chain(), loader(), look) == (IN_ORDER, layers, [("0", (4, 3)), ("1", (4, 3))])


class Manual(CompressionMixin, Plain):
    """Two optimizers, of which each sets aside what the other trains."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.second = nn.Linear(4, 4)
        self.after = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, network in ((first, self.net), (second, self.second)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.compressed_loss(network(batch[0]).square().sum()))
            self.after.append(batch_idx)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.second.parameters(), lr=0.1)]


def test_manual_optimisation_learns_nothing_and_ends_before_its_first_backward_pass():
    module = Manual()

    def work(controller, trainer):
        before = everything(trainer, module)
        with replay(controller, trainer) as again:
            assert again.students() == ("net",)
            assert inputs(again) == IN_ORDER
            whole_steps(again)
            assert module.after == []
        assert changed(before, everything(trainer, module)) == []
        assert trainer.global_step == 0
        assert "manual_backward" not in vars(module)
        return all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())

    assert at_start(module, loader(), work)


def test_a_backward_pass_without_lightning_ends_a_manual_step_too():
    class Direct(Manual):
        def training_step(self, batch, batch_idx):
            self.compressed_loss(self.net(batch[0]).square().sum()).backward()
            self.after.append(batch_idx)

    module, backward = Direct(), torch.Tensor.backward

    def look(again):
        seen = again.students(), inputs(again)
        whole_steps(again)
        return seen, module.after, all(parameter.grad is None for parameter in module.parameters())

    assert replayed(module, loader(), look) == ((("net",), IN_ORDER), [], True)
    assert torch.Tensor.backward is backward


def test_a_manual_run_after_a_replay_equals_one_without():
    def state(*callbacks):
        return trained(Manual, DATA["shuffled"], *callbacks)[0]

    assert state(Replaying()) == state()


class Transfers(Restless):
    """Augments on the device, and counts."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.history.append("before")
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.recent.append("after")
        return [batch[0] * 10 + torch.rand(()) * 0, batch[1]]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_what_the_module_does_to_batches_on_their_way_is_done_and_undone():
    module = Transfers()

    def work(controller, trainer):
        before = everything(trainer, module)
        with replay(controller, trainer) as again:
            seen = inputs(again)
        assert changed(before, everything(trainer, module)) == []
        return seen

    expected = [[pytest.approx((value + 1) * 10) for value in batch] for batch in IN_ORDER]
    assert at_start(module, loader(shuffle=False), work) == expected


def test_a_datamodule_is_put_back_too():
    class Data(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.own, self.count, self.seen = torch.Generator().manual_seed(0), 0, []

        def train_dataloader(self):
            return loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.count += 1
            self.seen.append(self.count)
            return [batch[0] + torch.rand(1, generator=self.own), batch[1]]

    data = Data()

    def work(controller, trainer):
        before = everything(trainer, trainer.lightning_module, data)
        with replay(controller, trainer) as again:
            first = inputs(again)
            assert data.count == EVERY_STEP
        assert changed(before, everything(trainer, trainer.lightning_module, data)) == []
        with replay(controller, trainer) as again:
            return first, inputs(again)

    first, second = at_start(OneArgument(), None, work, datamodule=data)
    assert first == second
    assert first != IN_ORDER


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages(namespace):
    package = import_module(namespace)

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.unused = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), nn.Identity()

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            self.logger.experiment.add_scalar("loss", loss.item())
            return loss

        configure_optimizers = Plain.configure_optimizers

    class Told(import_module(f"{namespace}.loggers.logger").Logger):
        name, version, log_metrics, log_hyperparams = "told", 0, None, lambda *_: None
        told = []

        @property
        def experiment(self):
            return self

        def add_scalar(self, *told):
            self.told.append(told)

    module = Module()

    def work(controller, trainer):
        before = everything(trainer, module)
        with replay(controller, trainer) as again:
            seen = inputs(again), again.students(), whole_steps(again)
            assert type(trainer.logger).__mro__[1].__name__ == "DummyLogger"
        assert changed(before, everything(trainer, module)) == []
        return seen

    logger = Told()
    seen = at_start(module, loader(), work, package=package, logger=logger)
    assert seen == (IN_ORDER, ("net",), [None] * EVERY_STEP)
    assert logger.told == []


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["wrapped", pytest.param("in place", marks=pytest.mark.slow)])
def test_a_compiled_network(how):
    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
            if how == "wrapped":
                self.net = torch.compile(self.net, backend="eager")
            else:
                self.net.compile(backend="eager")

        def training_step(self, batch):
            return self.loss(*batch)

    module = Compiled()
    with torch.no_grad():
        for x, _ in loader():
            module.net(x)  # compiled before any hook was there, for the very batches

    def look(again):
        inner, arguments = again.first_received(("net.2",))
        layers = [(output.name, output.calls) for output in again.outputs(("net",), arguments)]
        return inputs(again), again.students(), layers, again.first_received(("net.2",))[0].args[0].equal(inner.args[0])

    layers = [("0", 1), ("1", 1), ("2", 1)]
    assert replayed(module, loader(), look) == (IN_ORDER, ("net",), layers, True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_lightning_module():
    module = Dropping()

    def look(again):
        first = stopped_at_the_output(again), again.students()
        second = stopped_at_the_output(again), inputs(again)
        whole_steps(again)
        return first, second, stopped_at_the_output(again), inputs(again)

    layers = [4] * EVERY_STEP
    seen = ((layers, ("net",)), (layers, IN_ORDER), layers, IN_ORDER)
    assert replayed(torch.compile(module, backend="eager"), loader(), look) == seen
    assert module.net[1].num_batches_tracked == 0


# How a step runs


def test_steps_run_in_the_given_context_and_no_further_than_the_students_return():
    entered, dtypes = [], []

    class Looks(Plain):
        def training_step(self, batch):
            self.net(batch[0])
            pytest.fail("the student has returned")

    @contextmanager
    def context():
        entered.append(len(dtypes))
        with torch.autocast("cpu", torch.bfloat16):
            yield

    def work(controller, trainer):
        with replay(controller, trainer, context) as again:
            for arguments in itertools.islice(again.batches(), 3):
                again.outputs(("net",), arguments)

    module = Looks()
    module.net.register_forward_hook(lambda part, args, output: dtypes.append(output.dtype))
    at_start(module, loader(), work)
    assert dtypes == [torch.bfloat16] * 3
    assert entered == [0, 1, 2]


def test_a_stopped_step_goes_no_further_than_the_students_input():
    class Diary(Plain):
        def training_step(self, batch):
            diary.append("before")
            loss = self.loss(*batch)
            diary.append("after")
            return loss

    def look(again):
        for arguments in itertools.islice(again.batches(), 2):
            again.received(("net",), arguments)
        return list(diary)

    diary = []
    assert replayed(Diary(), loader(), look) == ["before", "before"]


def test_a_step_that_is_stopped_at_the_input_runs_without_gradients():
    class Looks(Plain):
        def training_step(self, batch):
            seen.append(torch.is_grad_enabled())
            return self.loss(*batch)

    seen = []
    replayed(Looks(), loader(), inputs, limit_train_batches=2)
    assert seen == [False, False]


def test_a_step_may_differentiate_its_network():
    """Where the student is to be found, and where its layers are shown, gradients can be had."""

    class Forces(Plain):
        def training_step(self, batch):
            x = batch[0].requires_grad_()
            features = self.net(x)
            [forces] = torch.autograd.grad(features.square().sum(), x, create_graph=True)
            return forces.square().mean()

    def look(again):
        _, arguments = again.first_received(("net",))
        again.outputs(("net",), arguments)
        return again.students(), all(parameter.grad is None for parameter in module.parameters())

    module = Forces()
    assert replayed(module, loader(), look) == (("net",), True)

    class Differentiating(nn.Linear):
        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).square().sum(), x, create_graph=True)[0]

    module = OneArgument()
    module.net = Differentiating(4, 2)
    assert replayed(module, loader(), look) == (("net",), True)


def test_a_step_that_differentiates_is_run_to_its_end():
    class Adversarial(Plain):
        def training_step(self, batch):
            x = batch[0].clone().requires_grad_()
            [gradient] = torch.autograd.grad(self.net(x).square().sum(), x)
            ended.append(float(gradient.abs().sum()) > 0)
            return self.loss(x.detach() + gradient.sign(), batch[1])

    ended = []

    def look(again):
        for arguments in itertools.islice(again.batches(), 2):
            again.run(arguments)

    replayed(Adversarial(), loader(), look)
    assert ended == [True, True]


def test_what_callbacks_add_to_steps_is_left_out():
    from lightning_compress.mechanisms.passes import Term

    asked = []

    def work(controller, trainer):
        capture = controller.capture("net")
        with (
            controller.term(Term("kd", lambda passes: asked.append(passes))),
            replay(controller, trainer) as again,
        ):
            assert controller.replaying is True
            whole_steps(again)
            assert (controller.steps, capture.last_call) == (0, None)
        assert controller.replaying is False

    at_start(OneArgument(), loader(), work)
    assert asked == []


def test_lazy_modules_are_refused():
    """Their shapes come with the first step, and cannot be taken back."""

    class Lazy(OneArgument):
        def __init__(self):
            super().__init__()
            self.lazy = nn.LazyLinear(2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def work(controller, trainer):
        message = r"Lazy has lazy modules, .*: call the network once on an example before"
        with pytest.raises(ValueError, match=message), replay(controller, trainer):
            pass
        return controller.replaying, type(controller.module.lazy)

    assert at_start(Lazy(), loader(), work) == (False, nn.LazyLinear)


# Without a Trainer


def test_traceless_serves_any_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.seen, self.told = nn.BatchNorm1d(2), [], []

        def log(self, *told):
            self.told.append(told)

    net = Net()
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with traceless(net):
        net.norm(torch.rand(4, 2))
        net.seen.append(1)
        net.log("loss", 1)
        assert net.told == []
        with torch.no_grad():
            net.norm.weight.fill_(7)
    assert {name: value.tolist() for name, value in net.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert (net.seen, "log" in vars(net)) == ([], False)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_parameters_can_be_left_out_of_what_is_put_back():
    net = nn.BatchNorm1d(2)
    data = net.weight.data_ptr()
    with traceless(net, parameters=False), torch.no_grad():
        net.weight.fill_(7)
        net.running_mean.fill_(7)
    assert net.weight.tolist() == [7.0, 7.0]
    assert net.running_mean.tolist() == [0.0, 0.0]
    assert net.weight.data_ptr() == data

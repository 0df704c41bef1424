"""A further pass draws the same numbers, says nothing and leaves metrics alone; what else it changes is an error."""

from __future__ import annotations

import random
from collections import Counter, deque
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import BATCH, CLASSES, FEATURES, STEPS, loader, trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch import nn
from torch.nn import functional as F
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_compress.mechanisms.further import FurtherPass


def global_state():
    """The random states of Python, NumPy and torch, as something that can be compared."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


# Random numbers


class Noisy(nn.Module):
    """Draws from every kind of generator, of its own and not, and has dropout."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.drop.generator = torch.Generator().manual_seed(1)
        self.torch = torch.Generator().manual_seed(2)
        self.numpy, self.old = np.random.default_rng(3), np.random.RandomState(4)
        self.python = random.Random(5)

    def forward(self):
        own = [torch.rand((), generator=each).item() for each in (self.torch, self.drop.generator)]
        own += [self.numpy.random(), self.old.rand(), self.python.random()]
        return [*own, random.random(), np.random.rand(), torch.rand(()).item(), *self.drop(torch.ones(20)).tolist()]  # noqa: NPY002

    def states(self):
        return [
            *(each.get_state().tolist() for each in (self.torch, self.drop.generator)),
            self.numpy.bit_generator.state,
            self.old.get_state()[1].tolist(),
            self.old.get_state()[2],
            self.python.getstate(),
        ]


def test_each_further_pass_draws_what_the_first_one_drew():
    net = Noisy()
    drawn = []
    for _ in range(2):
        further = FurtherPass(net)
        drawn.append(net())
        after, own = global_state(), net.states()
        for name in ("dense", "another"):
            with further.traceless(name):
                assert net() == drawn[-1]
                random.random()  # it may draw more, or less
                torch.rand(3)
            assert global_state() == after
            assert net.states() == own
    assert not set(drawn[0][:8]) & set(drawn[1][:8])


@pytest.mark.parametrize("draws", [0, 3])
def test_an_error_in_the_pass_puts_random_states_back_too(draws):
    net = Noisy()
    further = FurtherPass(net)
    net()
    after, own = global_state(), net.states()

    def broken():
        for _ in range(draws):
            net()
        net.torch = None
        raise OSError("broken")

    generator = net.torch
    with pytest.raises(OSError, match="broken"), further.traceless("dense"):
        broken()
    net.torch = generator
    assert global_state() == after
    assert net.states() == own


# What is said


class Speaking(nn.Module):
    """Has the methods of a LightningModule, and notes their calls."""

    def __init__(self):
        super().__init__()
        self.said = []

    def log(self, name, value, **settings):
        self.said.append((name, value, settings))

    def log_dict(self, values):
        self.said.append(values)

    def print(self, *words):
        self.said.append(words)

    def forward(self, x):
        self.log("loss", x, on_epoch=True)
        self.log_dict({"a": 1})
        self.print("hello", x)


def test_what_is_logged_and_printed_is_muted_and_back_again():
    net = Speaking()
    for step in range(2):
        further = FurtherPass(net)
        net(step)
        with further.traceless("dense"):
            net(step + 10)
            assert net.log("more", 1) is None
        assert not {"log", "log_dict", "print"} & set(vars(net))
    expected = [[("loss", step, {"on_epoch": True}), {"a": 1}, ("hello", step)] for step in range(2)]
    assert net.said == [*expected[0], *expected[1]]
    with pytest.raises(OSError, match="broken"), FurtherPass(net).traceless("dense"):
        raise OSError("broken")
    assert not {"log", "log_dict", "print"} & set(vars(net))


class Notes(Logger):
    """Keeps what is logged, in whichever way."""

    def __init__(self):
        super().__init__()
        self.rows, self.written = [], []

    name, version = "notes", 0

    @property
    @rank_zero_experiment
    def experiment(self):
        return self.written

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, *args):
        pass


class Twice(L.LightningModule):
    """Its step runs twice on each batch, the second time on another one."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(FEATURES, CLASSES)
        self.accuracy, self.loss = MulticlassAccuracy(CLASSES, average="micro"), MeanMetric()
        self.twice = True

    def step(self, x, y):
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits.detach(), y)
        self.loss(loss.detach())
        self.log("rows", float(len(x)), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "loss": self.loss}, on_step=True, on_epoch=True)
        self.logger.experiment.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        further = FurtherPass(self)
        loss = self.step(*batch)
        if self.twice:
            with further.traceless("dense"):
                self.step(-batch[0][:3], batch[1][:3])
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_logs_and_measures_as_if_each_step_ran_once():
    found = []
    for twice in (True, False):
        torch.manual_seed(0)
        module, notes = Twice(), Notes()
        module.twice = twice
        fitting = trainer(logger=notes, max_epochs=2, log_every_n_steps=1)
        fitting.fit(module, loader())
        assert fitting.loggers == [notes]
        assert fitting.callback_metrics["rows"] == BATCH * STEPS
        found.append(
            (notes.rows, notes.written, {name: value.item() for name, value in fitting.callback_metrics.items()})
        )
    assert found[0] == found[1]
    assert len(found[0][1]) == 2 * STEPS


# Metrics


METRICS = {
    "mean": (MeanMetric, lambda: (torch.rand(4),)),
    "list": (CatMetric, lambda: (torch.rand(4),)),
    "lists": (BinaryAUROC, lambda: (torch.rand(8), torch.tensor([0, 1] * 4))),
    "counts": (lambda: MulticlassAccuracy(3), lambda: (torch.randn(8, 3), torch.randint(3, (8,)))),
    "collection": (
        lambda: MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3), MulticlassRecall(3, average=None)]),
        lambda: (torch.randn(8, 3), torch.randint(3, (8,))),
    ),
    "collection of lists": (
        lambda: MetricCollection({"auroc": BinaryAUROC(), "again": BinaryAUROC()}, compute_groups=False),
        lambda: (torch.rand(8), torch.tensor([0, 1] * 4)),
    ),
}


class Measured(nn.Module):
    """A metric deeper down."""

    def __init__(self, metric):
        super().__init__()
        self.parts = nn.ModuleDict({"metric": metric})


def values_of(metric):
    value = metric.compute()
    return {name: own.tolist() for name, own in value.items()} if isinstance(value, dict) else value.tolist()


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("kind", list(METRICS))
def test_metrics_are_put_back(kind, forward):
    make, draw = METRICS[kind]
    net, reference = Measured(make()), make()
    metric = net.parts["metric"]
    update = metric.forward if forward else metric.update
    for _ in range(3):
        further = FurtherPass(net)
        batch = draw()
        update(*batch)
        reference.update(*batch)
        before = values_of(metric)
        with further.traceless("dense"):
            for _ in range(2):
                update(*draw())
            assert values_of(metric) != before
        assert values_of(metric) == before == values_of(reference)
    with further.traceless("dense"):
        metric.reset()
    assert values_of(metric) == values_of(reference)


# What it changes


class Meter:
    """A user's plain object."""

    def __init__(self):
        self.count, self.values = 0, []


class Outer:
    def __init__(self):
        self.meter = Meter()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0


class Keeper(nn.Module):
    """Attributes of all kinds; what is done to them is chosen by each test."""

    def __init__(self):
        super().__init__()
        self.history, self.table, self.seen, self.recent = [], {"seen": 0}, {0}, deque([0, 1], maxlen=2)
        self.counts, self.nested, self.pair = Counter(), {"deep": [[]]}, ([], 1)
        self.steps, self.average, self.text, self.maybe, self.missing = 0, 1.0, "", None, float("nan")
        self.array, self.moving = np.zeros(3), torch.ones(2)
        self.meter, self.outer, self.group = Meter(), Outer(), [Meter()]
        self.long, self.wide, self.again = [0] * 20_000, dict.fromkeys(range(20_000)), []
        self.again.append(self.again)  # it contains itself
        self.child = nn.Sequential(nn.Linear(1, 1), Layer())


def setting(name, value):
    return lambda net: setattr(net, name, value(net))


CHANGES = {
    "list": ("history", lambda net: net.history.append(1)),
    "list of another length": ("history", setting("history", lambda net: [0])),
    "dict": ("table", lambda net: net.table.update({str(len(net.table)): 1})),
    "entry": ("table", lambda net: net.table.update(seen=net.table["seen"] + 1)),
    "set": ("seen", lambda net: net.seen.add(len(net.seen))),
    "deque": ("recent", lambda net: net.recent.append(net.recent[-1] + 1)),
    "Counter": ("counts", lambda net: net.counts.update("a")),
    "nested": ("nested", lambda net: net.nested["deep"][0].append(0)),
    "in a tuple": ("pair", lambda net: net.pair[0].append(0)),
    "counter": ("steps", setting("steps", lambda net: net.steps + 1)),
    "float": ("average", setting("average", lambda net: net.average * 0.9)),
    "string": ("text", setting("text", lambda net: net.text + "a")),
    "None": ("maybe", setting("maybe", lambda net: 1 if net.maybe is None else None)),
    "array in place": ("array", lambda net: net.array.__iadd__(1)),
    "another array": ("array", setting("array", lambda net: net.array + 1)),
    "tensor in place": ("moving", lambda net: net.moving.mul_(0.9)),
    "another tensor": ("moving", setting("moving", lambda net: net.moving * 0.9)),
    "tensor in a list": ("history", lambda net: net.history.__setitem__(slice(None), [torch.ones(1)])),
    "object": ("meter", lambda net: setattr(net.meter, "count", net.meter.count + 1)),
    "list of an object": ("meter", lambda net: net.meter.values.append(1)),
    "object in an object": ("outer", lambda net: setattr(net.outer.meter, "count", net.outer.meter.count + 1)),
    "list of an object in an object": ("outer", lambda net: net.outer.meter.values.append(1)),
    "object in a list": ("group", lambda net: setattr(net.group[0], "count", net.group[0].count + 1)),
    "new attribute of an object": ("meter", lambda net: setattr(net.meter, f"at{len(vars(net.meter))}", 1)),
    "long list": ("long", lambda net: net.long.append(0)),
    "long dict": ("wide", lambda net: net.wide.update({-len(net.wide): 0})),
    "module deeper down": ("child.1.count", lambda net: setattr(net.child[1], "count", net.child[1].count + 1)),
    "new attribute": ("at1", lambda net: setattr(net, "at1" if hasattr(net, "at0") else "at0", 1)),
}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_what_would_be_done_twice_is_an_error_that_names_it(kind):
    name, change = CHANGES[kind]
    net = Keeper()
    further = FurtherPass(net)
    change(net)
    with pytest.raises(RuntimeError) as caught, further.traceless("dense"):
        change(net)
    assert str(caught.value) == (
        f"the step of Keeper changes '{name}', and it runs twice on each batch here (again for the pass 'dense'), so "
        "that would be done twice. Change it outside of the step, in on_train_batch_end say, or take a technique that "
        "runs the step once, such as DPFCallback"
    )


def test_all_that_changes_is_named_at_most_five():
    net = Keeper()
    further = FurtherPass(net)

    def step():
        for kind in ("list", "dict", "set", "counter", "float", "string", "module deeper down"):
            CHANGES[kind][1](net)

    step()
    with (
        pytest.raises(RuntimeError, match="'history', 'table', 'seen', 'steps', 'average' and 2 more"),
        further.traceless("dense"),
    ):
        step()


def kept_batch(net, batch):
    net.batch, net.moving = batch, net.moving
    net.history[:] = [batch, *batch]


UNCHANGED = {
    "batch": kept_batch,
    "same value": lambda net, batch: vars(net).update(steps=5, average=0.5, text="a", maybe=None, missing=float("nan")),
    "same entries": lambda net, batch: (net.history.clear(), net.history.extend([1, 2.0, "a", None, (), float("nan")])),
    "same object again": lambda net, batch: setattr(net, "meter", net.meter),
    "counted from the start": lambda net, batch: (setattr(net, "steps", 0), setattr(net, "steps", net.steps + 1)),
    "there and back": lambda net, batch: (net.child.eval(), net.child.train()),
    "made once": lambda net, batch: None if hasattr(net, "made") else setattr(net, "made", torch.rand(2)),
    "inside of a long list": lambda net, batch: net.long.__setitem__(0, net.long[0] + 1),
    "inside of a long dict": lambda net, batch: net.wide.update({0: random.random()}),
    "read": lambda net, batch: (net.moving * 2, net.array + 1, net.table["seen"], net.again[0][0][0]),
}


@pytest.mark.parametrize("kind", list(UNCHANGED))
def test_what_is_the_same_afterwards_is_no_change(kind):
    net, batch = Keeper(), (torch.ones(3, 2), torch.zeros(3))
    for _ in range(2):
        further = FurtherPass(net)
        UNCHANGED[kind](net, batch)
        with further.traceless("dense"):
            UNCHANGED[kind](net, batch)
    assert (net.meter.count, net.child[1].count) == (0, 0)


def test_buffers_and_parameters_are_left_to_whoever_presents_them():
    net = Keeper()
    net.child.append(nn.BatchNorm1d(1))
    net.register_buffer("total", torch.zeros(1))

    def step():
        net.child[2](net.child[0](torch.randn(4, 1)))
        net.total += 1
        net.child[0].weight.data.mul_(2)

    further, weight = FurtherPass(net), net.child[0].weight.item()
    step()
    with further.traceless("dense"):
        step()
    assert (net.total.item(), net.child[2].num_batches_tracked.item()) == (2, 2)
    assert net.child[0].weight.item() == 4 * weight


def test_tensors_of_inference_mode_can_be_told_apart():
    net = Keeper()
    with torch.inference_mode():
        net.moving = torch.ones(2)
    with FurtherPass(net).traceless("dense"):
        pass
    with pytest.raises(RuntimeError, match="changes 'moving'"), FurtherPass(net).traceless("dense"):
        net.moving = torch.ones(2)


def test_of_the_modules_of_a_library_numbers_are_looked_at():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

    def step(net):
        net[0].count, net[1].p = 1, net[1].p + 0.1

    with pytest.raises(RuntimeError, match=r"changes '1\.p', '0\.count'|changes '0\.count', '1\.p'|changes '1\.p'"):
        twice(net, step)


def test_after_the_error_metrics_and_random_states_are_as_the_first_pass_left_them():
    net = Noisy()
    net.metric, net.history = MeanMetric(), []

    def step():
        net.history.append(net())
        net.metric(torch.rand(3))

    further = FurtherPass(net)
    step()
    mean, after, own = net.metric.compute().item(), global_state(), net.states()
    with pytest.raises(RuntimeError, match="the step of Noisy changes 'history'"), further.traceless("dense"):
        step()
    assert global_state() == after
    assert net.states() == own
    assert net.metric.compute().item() == mean
    assert net.history[0] == net.history[1]
    assert "log" not in vars(net)


# Where changes hide


def twice(net, step):
    further = FurtherPass(net, closely=True)
    step(net)
    with further.traceless("dense"):
        step(net)


class OwnMetric(Metric):
    """A metric of the user's own."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x):
        self.total += x.sum()

    def compute(self):
        return self.total


def test_a_metric_of_the_users_own_is_put_back():
    net = nn.Module()
    net.own = OwnMetric()
    twice(net, lambda net: net.own(torch.ones(3)))
    assert net.own.compute() == 3.0


def with_attribute(**attributes):
    net = type("Net", (nn.Linear,), {})(2, 1)
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def renewed(net):
    net.outs.clear()
    net.outs.append(torch.rand(3))


def flipped(net):
    if hasattr(net, "warm"):
        del net.warm
    else:
        net.warm = 1


def averaged(net):
    with torch.no_grad():
        net.bias.mul_(0.5)


def averaged_past_autograd(net):
    net.bias.data.mul_(0.5)


def frozen(**attributes):
    net = with_attribute(**attributes)
    net.bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("net", "step", "name"),
    [
        (lambda: with_attribute(outs=[]), renewed, "outs"),
        (with_attribute, flipped, "warm"),
        (lambda: with_attribute(held=[MeanMetric()]), lambda net: net.held[0].update(1.0), "held"),
        (lambda: with_attribute(held=[nn.BatchNorm1d(2)]), lambda net: net.held[0](torch.rand(4, 2)), "held"),
        (frozen, averaged, "bias"),
        (frozen, averaged_past_autograd, "bias"),
    ],
)
def test_changes_that_hide_are_found(net, step, name):
    with pytest.raises(RuntimeError, match=f"changes '{name}', and it runs twice"):
        twice(net(), step)


@pytest.mark.parametrize(
    "attributes",
    [
        lambda made: {"gens": {"a": made}},
        lambda made: {"gens": [made]},
        lambda made: {"gens": SimpleNamespace(inner=SimpleNamespace(made=made))},
    ],
)
def test_generators_at_any_depth_are_wound_back(attributes):
    made = torch.Generator().manual_seed(1)
    net, drawn = with_attribute(**attributes(made)), []
    twice(net, lambda net: drawn.append(torch.rand((), generator=made).item()))
    assert drawn[0] == drawn[1]
    assert torch.rand((), generator=made) == torch.rand(2, generator=torch.Generator().manual_seed(1))[1]


def test_an_iterator_is_refused():
    with pytest.raises(RuntimeError, match="keeps an iterator, list_iterator, and a step that draws from it"):
        twice(with_attribute(batches=iter([1, 2, 3])), lambda net: next(net.batches))


@pytest.mark.parametrize(
    ("batch", "step"),
    [
        (lambda: [torch.ones(2)], lambda batch: batch.__setitem__(0, batch[0] - 0.5)),
        (lambda: {"x": torch.ones(2)}, lambda batch: batch.pop("x", None)),
        (lambda: (torch.ones(2),), lambda batch: batch[0].sub_(0.5)),
        (lambda: SimpleNamespace(x=torch.ones(2)), lambda batch: setattr(batch, "x", batch.x * 2)),
    ],
)
def test_a_batch_that_the_first_pass_changes_is_refused(batch, step):
    net, given = nn.Linear(1, 1), batch()
    further = FurtherPass(net, ((given,), {}))
    step(given)
    with pytest.raises(RuntimeError, match="Linear changes its batch, and it runs twice"), further.traceless("dense"):
        raise AssertionError("the pass must not run")


def test_what_an_index_of_pandas_remembers_is_no_change_of_the_batch():
    class Index:
        """As those of pandas do, it keeps what it has looked up."""

        def look_up(self):
            self._cache = {"columns": [0, 1]}

    Index.__module__ = "pandas.core.indexes.base"
    given = {"columns": Index()}
    further = FurtherPass(nn.Linear(1, 1), ((given,), {}))
    given["columns"].look_up()
    with further.traceless("dense"):
        given["columns"].look_up()

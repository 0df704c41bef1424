"""Batch-norm statistics estimated anew, against means over batches in NumPy; and all that must not change."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import CLASSES, FEATURES, Classifier, ManualClassifier, loader, made, trainer
from contract.traces import traces
from torch import nn
from torch.nn import functional as F

from lightning_compress.mechanisms.batchnorm import BATCHES, batch_norms, reestimate_batchnorm_, statistics_kept

ROWS = 8  # of one batch


class Normed(Classifier):
    """A linear layer, the batch norm that is looked at, and dropout."""

    def build(self):
        self.model = nn.Sequential(
            nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, CLASSES)
        )


class Chained(Normed):
    """Two batch norms, of which the user freezes the first."""

    def build(self):
        super().build()
        self.model.insert(0, nn.BatchNorm1d(FEATURES))


class Frozen(Chained):
    def build(self):
        super().build()
        self.model[0].eval()  # Lightning leaves the modes as they are


class ManuallyNormed(ManualClassifier):
    build = Normed.build


class Estimate(L.Callback):
    """Estimates where a fit ends, and notes what was there before and after."""

    def __init__(self, hook="on_train_end"):
        self.found = None
        setattr(self, hook, self._look)

    def _look(self, trainer, pl_module, *args):
        if self.found is None:
            self.before, self.traces = self.condition(trainer, pl_module), traces(pl_module)
            self.found = reestimate_batchnorm_(trainer, pl_module)
            self.after = self.condition(trainer, pl_module)
            assert traces(pl_module) == self.traces  # hooks, attributes, and training flags

    def condition(self, trainer, module):
        layers = batch_norms(module).values()
        return {
            "state": copy.deepcopy(module.state_dict()),
            "gradients": [None if value.grad is None else value.grad.clone() for value in module.parameters()],
            "random": torch.get_rng_state(),
            "momentum": [layer.momentum for layer in layers],
            "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()["state"]),
            "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
            "progress": (trainer.global_step, trainer.current_epoch),
        }


def estimated(kind, batches=20, hook="on_train_end", **settings):
    module, estimate = made(kind), Estimate(hook)
    trainer(estimate, **settings).fit(module, loader(rows=ROWS * batches))
    return module, estimate


def statistics(inputs):
    """Mean and unbiased variance of each batch, averaged over batches."""
    return np.mean([x.mean(axis=0) for x in inputs], axis=0), np.mean([x.var(axis=0, ddof=1) for x in inputs], axis=0)


def first_outputs(module, batches):
    """What the linear layer gives for the first batches, in NumPy."""
    weight, bias = (value.detach().double().numpy() for value in module.model[0].parameters())
    data = loader(rows=ROWS * batches)
    return [x.double().numpy() @ weight.T + bias for x, _ in data][:BATCHES]


def assert_statistics(layer, expected):
    for found, value in zip((layer.running_mean, layer.running_var), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), value, rtol=1e-5, atol=1e-6)


# --- which layers ---


def test_layers_that_keep_statistics():
    net = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Sequential(nn.BatchNorm3d(2, affine=False), nn.InstanceNorm2d(2)),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.SyncBatchNorm(2),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
    ).eval()
    assert {name: type(layer).__name__ for name, layer in batch_norms(net).items()} == {
        "0": "BatchNorm1d",
        "2.0": "BatchNorm3d",
        "4": "SyncBatchNorm",
    }
    assert batch_norms(nn.Linear(1, 1)) == {}


# --- what is estimated ---


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "on_train_start", "on_train_epoch_end"])
@pytest.mark.parametrize("kind", [Normed, ManuallyNormed])
@pytest.mark.parametrize("batches", [20, 16, 5, 1])
def test_statistics_are_means_over_the_first_batches(kind, batches, hook):
    _, estimate = estimated(kind, batches, hook)
    assert estimate.found == ["model.1"]
    found = {name: estimate.after["state"][f"model.1.{name}"] for name in ("running_mean", "running_var")}
    at_that_time = made(kind)
    at_that_time.load_state_dict(estimate.after["state"])
    for value, expected in zip(found.values(), statistics(first_outputs(at_that_time, batches)), strict=True):
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)
    changed = [
        float((value - estimate.before["state"][f"model.1.{name}"]).abs().max()) for name, value in found.items()
    ]
    assert min(changed) > 1e-3


def test_only_so_many_batches_are_read():
    calls = []

    class Counting(Normed):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    estimated(Counting, 20)
    assert calls == [*range(20), *range(BATCHES)]


def test_nothing_but_the_statistics_changes():
    _, estimate = estimated(Normed, max_epochs=2)
    before, after = estimate.before, estimate.after
    assert estimate.before["momentum"] == [0.3]
    assert [name for name, value in before["state"].items() if not torch.equal(value, after["state"][name])] == [
        "model.1.running_mean",
        "model.1.running_var",
    ]
    assert before["state"]["model.1.num_batches_tracked"] == after["state"]["model.1.num_batches_tracked"] == 40
    for part in ("momentum", "logged", "progress"):
        assert before[part] == after[part], part
    for part in ("gradients", "random", "optimizer"):
        torch.testing.assert_close(before[part], after[part], rtol=0, atol=0)


def test_a_training_goes_on_as_if_nothing_had_been_estimated():
    """Where statistics have no part in it, as in training mode; shuffled batches and dropout included."""
    plain, module = made(Normed), made(Normed)
    for each, callbacks in ((plain, []), (module, [Estimate("on_train_batch_end")])):
        torch.manual_seed(1)
        trainer(*callbacks, max_epochs=2).fit(each, loader(shuffle=True))
    for (name, one), (_, other) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_layer_after_another_sees_what_training_mode_gives_it():
    """The first normalises with the statistics of each batch, not with those that it keeps."""
    module, estimate = estimated(Chained)
    assert estimate.found == ["model.0", "model.2"]
    inputs = [x.double() for x, _ in loader(rows=ROWS * 20)][:BATCHES]
    assert_statistics(module.model[0], statistics([x.numpy() for x in inputs]))
    normed = [F.batch_norm(x, None, None, *(v.double() for v in module.model[0].parameters()), True) for x in inputs]
    outputs = [F.linear(x, *(value.double() for value in module.model[1].parameters())) for x in normed]
    assert_statistics(module.model[2], statistics([x.detach().numpy() for x in outputs]))


def test_frozen_layers_keep_theirs_and_are_not_named():
    module, estimate = estimated(Frozen)
    assert estimate.found == ["model.2"]
    assert not module.model[0].training
    assert torch.equal(module.model[0].running_mean, torch.zeros(FEATURES))
    assert torch.equal(module.model[0].running_var, torch.ones(FEATURES))
    first, second = module.model[:2]
    normed = [
        F.batch_norm(x, torch.zeros(FEATURES), torch.ones(FEATURES), *first.parameters()) for x, _ in loader(rows=160)
    ]
    outputs = [F.linear(x, *second.parameters()) for x in normed[:BATCHES]]
    assert_statistics(module.model[2], statistics([x.detach().numpy() for x in outputs]))


@pytest.mark.parametrize("frozen", [True, False])
def test_without_such_layers_no_batch_is_read(frozen):
    class Still(Classifier):
        norm = frozen

        def build(self):
            super().build()
            self.model[1].eval()

        def training_step(self, batch, batch_idx):
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(batch, batch_idx)

    module, estimate = estimated(Still, 3)
    assert estimate.found == []
    assert module.steps == 3
    assert len(batch_norms(module)) == int(frozen)


def test_a_step_that_fails_leaves_everything_as_it_was():
    class Failing(Normed):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4 and batch_idx == 2:
                raise RuntimeError("the step is broken")
            return super().training_step(batch, batch_idx)

    module, estimate = made(Failing), Estimate()
    with pytest.raises(RuntimeError, match="the step is broken"):
        trainer(estimate, limit_train_batches=4).fit(module, loader())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in estimate.before["state"].items())
    assert module.model[1].momentum == 0.3
    assert traces(module) == estimate.traces


# --- what is kept meanwhile ---


def norms():
    """Two layers that keep statistics, one of them a cumulative mean, and one of another kind."""
    others = nn.InstanceNorm1d(2, track_running_stats=True)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2, momentum=None)), others)
    net[:2](torch.randn(8, 2))
    return net


@pytest.mark.parametrize("fails", [False, True])
def test_statistics_are_put_back_into_the_same_buffers(fails):
    net = norms()
    before, buffers = copy.deepcopy(net.state_dict()), dict(net.named_buffers())
    with pytest.raises(OSError, match="broken") if fails else nullcontext(), statistics_kept(net):
        for _ in range(3):
            net[:2](torch.randn(8, 2) + 5)
        net[2](torch.randn(8, 2, 3) + 5)
        net[0].weight.data.mul_(2)
        assert net[0].running_mean.min() > 1
        assert [net[0].num_batches_tracked.item(), net[1][0].num_batches_tracked.item()] == [4, 4]
        if fails:
            raise OSError("broken")
    changed = [name for name, value in net.state_dict().items() if not torch.equal(before[name], value)]
    assert changed == ["0.weight", "2.running_mean", "2.running_var"]  # nothing else is put back
    assert all(buffer is buffers[name] for name, buffer in net.named_buffers())


def test_a_cumulative_mean_goes_on_where_it_was():
    net, first, second = nn.BatchNorm1d(1, momentum=None), torch.randn(8, 1), torch.randn(8, 1)
    net(first)
    with statistics_kept(net):
        net.reset_running_stats()
        net(torch.randn(8, 1) + 100)
    net(second)
    assert net.running_mean.item() == pytest.approx((first.mean() + second.mean()).item() / 2, abs=1e-6)


def test_statistics_are_kept_one_within_another():
    net = nn.BatchNorm1d(1)
    with statistics_kept(net):
        net.running_mean.fill_(1.0)
        with statistics_kept(net):
            net.running_mean.fill_(2.0)
        assert net.running_mean.item() == 1
    assert net.running_mean.item() == 0

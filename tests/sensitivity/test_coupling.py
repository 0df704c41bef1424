"""Layers that can only lose filters together: what is found of them, and that the callback does what is suggested."""

from __future__ import annotations

import builtins
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_compress
from lightning_compress.commands.sensitivity.budgets import Budget
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.costs import costs_of
from lightning_compress.commands.sensitivity.coupling import Coupling, choose_groups, find_coupling
from lightning_compress.commands.sensitivity.findings import Findings
from lightning_compress.commands.sensitivity.journal import Measurement
from lightning_compress.commands.sensitivity.layers import find_layers
from lightning_compress.commands.sensitivity.metrics import Metric
from lightning_compress.commands.sensitivity.suggest import suggest
from lightning_compress.mechanisms.budgets import ChannelGroup, Sizes

from . import projects

LEVELS = (0.25, 0.5, 0.75)


class Residual(nn.Module):
    """The stem and the second layer are added up."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 1)
        self.head = nn.Linear(16, projects.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x.reshape(-1, 1, 2, projects.FEATURES // 2)))
        x = self.up(F.relu(x + self.second(F.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


class Lit(projects.Lit):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = Residual()


def suggestion(module, losses, budget, layers=None):
    """Losses are in points of accuracy at the highest level, on a line."""
    x = torch.randn(4, projects.FEATURES)

    def run():
        with torch.inference_mode():
            return module.net(x)

    layers = find_layers(module.eval(), run, layers, None)
    found = {
        Change("filters", layer.name, level): Measurement(
            {"val_acc": 0.9 - losses.get(layer.name, 0.01) * level / LEVELS[-1]}, 0.1
        )
        for layer in layers
        for level in LEVELS
        if "filters" in layer.methods
    }
    metric, plain = Metric("val_acc", "max"), {"val_acc": 0.9}
    own = Findings(layers, {"filters": LEVELS}, metric, plain, found, len(found))
    costs = costs_of("filters", module, layers, LEVELS, find_coupling(module, run, layers))
    return suggest("filters", own, costs, module, budget)


@pytest.mark.parametrize("layers", [None, ["net.first"]])
@pytest.mark.parametrize("losses", [{}, {"net.stem": 0.4}, {"net.second": 0.4}, {"net.first": 0.4}])
def test_the_callback_does_what_is_suggested(losses, layers):
    """One of two coupled layers is sensitive: both stay, and the recipe runs, with the shares that were predicted."""
    module = Lit()
    found = suggestion(module, losses, Budget("macs", 0.7, True), layers)
    if layers is None:
        stay = "net.first" not in losses  # with {} too: two layers lose more than one
        assert [found.levels[name] is None for name in ("net.stem", "net.second")] == [stay, stay]
    [entry] = found.callbacks
    callback = getattr(lightning_compress, entry["class_path"])(**entry["init_args"])
    trainer = projects.trainer(callbacks=[callback], limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module.train(), projects.Data())
    assert callback.reached == pytest.approx(entry["init_args"]["ratio"], abs=0.02)
    gone = {name: 1 - after / before for name, (before, after) in callback.plan.filters.items()}
    assert gone == pytest.approx({name: share for name, share in found.levels.items() if share})
    assert found.loss == pytest.approx(sum(losses.get(name, 0.01) * share / LEVELS[-1] for name, share in gone.items()))


def test_the_nearest_is_suggested_where_coupled_layers_do_not_reach_the_budget():
    found = suggestion(Lit(), {}, Budget("macs", 0.01, True))
    assert "is out of reach by what was measured; taken instead is the smallest: " in found.said
    assert max(share for share in found.levels.values() if share) <= LEVELS[-1]
    ratio = found.callbacks[0]["init_args"]["ratio"]
    assert 0.5 < ratio < 0.9
    assert found.callbacks[0]["init_args"]["exclude"] == ["net.up"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "coupled"), [(nn.LSTM, True), (nn.GRU, False)])
def test_recurrent_layers_are_what_they_are_for_the_callback(kind, coupled):
    """A plain LSTM takes fewer inputs, and a GRU does not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell, self.head = nn.Linear(4, 16), kind(16, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.cell(self.first(x))[0][:, -1])

    net = Net().eval()
    run = functools.partial(net, torch.zeros(2, 3, 4))
    found = find_coupling(net, run, find_layers(net, run, None, None))
    assert [group.layers for group in found.groups] == ([("first",)] if coupled else [])


def test_narrow_and_tied_layers_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 16)
            self.third = nn.Linear(16, 16)
            self.third.weight = self.second.weight
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.third(self.second(self.first(self.narrow(x)))))

    net = Net().eval()
    layers = find_layers(net, lambda: net(torch.zeros(2, 4)), None, None)
    found = find_coupling(net, lambda: net(torch.zeros(2, 4)), layers)
    assert found.groups == ()
    assert found.unmeasured == ("third",)
    assert choose_groups(found, {}, {}, 0.5) is None


def test_by_hand():
    """Two layers of 16 filters, each half of the work, which do not meet; 20% of all is 40% of one."""
    groups = tuple(ChannelGroup(name, (name,), 16, 1, {(f"{name}.weight", 0): 1}, (), 16) for name in "ab")
    coupling = Coupling(groups, Sizes({"a.weight": (16, 4), "b.weight": (16, 4)}, {"a.weight": 50, "b.weight": 50}))
    curves = {"a": lambda share: share, "b": lambda share: 0.1 * share}
    gone, shares, loss = choose_groups(coupling, curves, {"a": 0.5, "b": 0.5}, 0.2)
    assert (gone, shares) == (pytest.approx(3 / 16), {"b": 6 / 16})
    assert loss == pytest.approx(0.0375)
    gone, shares, loss = choose_groups(coupling, curves, {"a": 0.25, "b": 0.5}, 0.4)
    assert (gone, shares) == (pytest.approx(0.25), {"b": 0.5})  # "a" would let no more than 0.25 of each go


def test_without_torch_pruning_it_is_said_that_coupling_is_unknown(monkeypatch, capsys, tmp_path):
    from lightning_compress.commands.sensitivity import command

    original = builtins.__import__

    def missing(name, *rest):
        if name == "torch_pruning":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: stands for itself\n")
    projects.checkpoint("last.ckpt")
    monkeypatch.setattr("lightning_compress.commands.project.load_project", lambda *_, **__: projects.project())
    options = projects.options("last.ckpt", "--config", "config.yaml", "--method", "filters", "--budget", "macs=60%")
    assert command.sensitivity(options) == 0
    assert "can only lose filters together is not known, so the recipe may be refused: " in capsys.readouterr().out
    assert "is not known, so the run may refuse the recipe" in " ".join(
        (tmp_path / "sensitivity/recipe.yaml").read_text().split("\n#   ")
    )

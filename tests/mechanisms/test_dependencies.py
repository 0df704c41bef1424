"""Dependencies: groups, what stays and why, and plans read off a copy that is cut."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.functional import filter_scores
from lightning_compress.mechanisms.channel_graph import StructureError, require_torch_pruning
from lightning_compress.mechanisms.dependencies import Dependencies, Left
from lightning_compress.mechanisms.shrinking import shrink_


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.c, self.head = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        first = F.relu(self.a(x))
        both = torch.cat([first, first + self.b(first)], dim=1)
        return {"maps": self.head(F.relu(self.c(both))), "note": 3}


X = torch.ones(2, 2, 5, 5)


def found(net=None, **arguments):
    return Dependencies(net or Branches(), lambda own: own(X), **{"selected": ["a", "b", "c", "head"], **arguments})


def test_groups_and_what_stays():
    own = found()
    assert {group.name: group.layers for group in own.groups} == {"c": ("c",), "b": ("b", "a")} or {
        group.name: set(group.layers) for group in own.groups
    } == {"c": {"c"}, "a": {"a", "b"}}
    assert own.left == [Left(("head",), "is what the network returns")]
    coupled = next(group for group in own.groups if len(group.layers) == 2)
    assert coupled.channels == 8
    assert coupled.shrinks["c.weight", 1] == 2  # of each half of what is concatenated
    assert coupled.shrinks["b.weight", 0] == coupled.shrinks["b.weight", 1] == 1


def test_scores_are_of_all_filters_that_go_together():
    net = Branches()
    own = found(net)
    coupled = next(group for group in own.groups if len(group.layers) == 2)
    rows = torch.cat([net.a.weight.flatten(1), net.b.weight.flatten(1)], dim=1)
    for kind in ("l1", "l2"):
        assert torch.allclose(own.scores(coupled, kind), filter_scores(rows, kind))
    assert own.norm_scales(coupled) is None


def test_the_plan_is_what_the_library_does():
    net, other = Branches(), Branches()
    own = found(net)
    coupled = next(group for group in own.groups if len(group.layers) == 2)
    plan = own.cut({coupled.name: [1, 5], "c": [0]})
    kept = [0, 2, 3, 4, 6, 7]
    assert plan.kept["a.weight"] == {0: kept}
    assert plan.kept["b.weight"] == {0: kept, 1: kept}
    assert plan.kept["c.weight"] == {0: [1, 2, 3, 4, 5], 1: [*kept, *(8 + index for index in kept)]}
    assert plan.attributes["c"] == {"in_channels": 12, "out_channels": 5}
    assert "head.bias" not in plan.kept
    shrink_(other, plan)
    assert other(X)["maps"].shape == (2, 4, 5, 5)


def test_nothing_of_the_copy_matters_but_its_shapes():
    """A layer that is frozen, or in evaluation mode, is followed too."""
    net = Branches().requires_grad_(False).eval()
    assert {name for group in found(net).groups for name in group.layers} == {"a", "b", "c"}


def test_what_must_not_be_touched_is_not():
    left = {name: entry.reason for entry in found(fixed={"c": "which is a secret"}).left for name in entry.layers}
    assert left["a"] == left["b"] == "reaches 'c', which is a secret"


def test_a_group_goes_as_a_whole():
    own = found(selected=["a", "c"])
    assert [group.name for group in own.groups] == ["c"]
    assert own.left == [Left(own.left[0].layers, "can only go together with 'b', which is not selected")]


class Norms(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.a, self.b, self.mean = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1), mean

    def forward(self, x):
        x = self.a(x)
        return self.b(x * self.mean(x))


@pytest.mark.parametrize(
    ("mean", "exact"),
    [
        (lambda x: x.mean(dim=(2, 3), keepdim=True), True),
        (lambda x: x.mean(dim=1, keepdim=True), False),
        (lambda x: x.mean(), False),
        (lambda x: x.softmax(dim=1), False),
        (lambda x: x.sigmoid(), True),
        (lambda x: x.norm(dim=1, keepdim=True), False),
        (lambda x: x.std(dim=1, keepdim=True), False),
    ],
)
def test_where_zeros_count_is_known(mean, exact):
    own = Dependencies(Norms(mean), lambda net: net(X), selected=["a", "b"])
    assert own.exact(["a"]) is exact


def test_a_network_that_does_not_run_says_where():
    class Broken(Branches):
        def forward(self, x):
            return super().forward(x)["nothing"]

    with pytest.raises(StructureError, match=r"the structure of the network cannot be told: KeyError: 'nothing'"):
        found(Broken())


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r'structured pruning needs torch-pruning: pip install "torch-pruning<2'):
        require_torch_pruning()


def test_channels_that_come_twice_take_twice_as_much():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 8), nn.Linear(16, 3)

        def forward(self, x):
            x = self.a(x)
            return self.fc(torch.cat([x, x.relu()], 1))

    (group,) = Dependencies(Twice(), lambda net: net(torch.ones(2, 4)), selected=["a"]).groups
    assert group.shrinks == {("a.weight", 0): 1, ("a.bias", 0): 1, ("fc.weight", 1): 2}


def test_activations_are_let_go_of():
    kept = []

    def run(net):
        features = net[0](torch.ones(1, 3, 8, 8))
        kept.append(weakref.ref(features))
        return net[1:](features)

    gc.disable()
    try:
        found = Dependencies(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), run, selected=["0"])
        found.cut({"0": [1]})
        found.release()
        del found
        assert [features() for features in kept] == [None]
    finally:
        gc.enable()


class DeadEnd(nn.Module):
    """The last layer of one of its two ways runs, and nobody uses what it returns: as in the last of some blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.skip, self.residual = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        inner = self.first(x).relu()
        return self.skip(inner), x[:, :, 1:-1, 1:-1] + self.residual(inner)


def test_a_layer_whose_output_nobody_uses_takes_what_is_left_all_the_same():
    own = Dependencies(DeadEnd(), lambda net: net(X)[0], selected=["first", "skip", "residual"])
    assert [group.name for group in own.groups] == ["first"]
    assert {name for left in own.left for name in left.layers} == {"skip", "residual"}
    shrinkage = own.cut({"first": [0, 3, 5]})
    assert shrinkage.kept["residual.weight"] == {1: [1, 2, 4, 6, 7]}
    net = DeadEnd()
    shrink_(net, shrinkage)
    assert [tuple(part.shape) for part in net(X)] == [(2, 4, 3, 3), (2, 2, 3, 3)]

"""Saved grids: the numbers that cannot be, and networks that they do not belong to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.saved_grids import flaw_of_grids, unfit
from lightning_compress.mechanisms.states import GRIDS, damage

SOUND = Grids(
    weights={"0.weight": WeightGrid(torch.tensor([0.1, 0.2]), 4), "1.weight": WeightGrid(torch.tensor(0.1), 2)},
    activations={"in": ActivationGrid(0.5, 3, 8)},
    sites={"0:linear": WeightSite("0.weight", 0, 2, "0.bias", "in"), "1:linear": WeightSite("1.weight", 0, 5)},
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))


def test_what_is_sound_is_found_so():
    state = SOUND.state()
    assert damage(state, GRIDS) is None
    assert flaw_of_grids(state, "quantization") is None
    assert unfit(Grids.from_state(state), network()) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"activations": {"a": ActivationGrid(0.5, 256, 8)}}, "'q.activations.a' must be a positive scale"),
        ({"activations": {"a": ActivationGrid(0.5, -1, 8)}}, "'q.activations.a' must be a positive scale"),
        ({"activations": {"a": ActivationGrid(float("inf"), 0, 8)}}, "'q.activations.a' must be a positive scale"),
        ({"activations": {"a": ActivationGrid(0.5, 0, 1)}}, "'q.activations.a' must be a positive scale"),
        (
            {"weights": {"0.weight": WeightGrid(torch.ones(2), 9)}},
            "'q.weights.0.weight.bits' must be from 2 to 8, got 9",
        ),
        (
            {"weights": {"0.weight": WeightGrid(torch.zeros(2), 4)}},
            "'q.weights.0.weight.step' must be a positive number",
        ),
        ({"sites": {"a": WeightSite("0.weight", 2, 2)}}, "'q.sites.a' must be rows of a weight that has a grid"),
        ({"sites": {"a": WeightSite("2.weight", 0, 2)}}, "'q.sites.a' must be rows of a weight that has a grid"),
        ({"sites": {}}, "'q.sites' has no place for the weight '0.weight'"),
        ({"sites": {"0:linear": SOUND.sites["0:linear"]}}, "'q.sites' has no place for the weight '1.weight'"),
        ({"activations": {}}, "'q.activations' has no grid for 'in', which '0:linear' takes"),
        ({"folds": {"9:linear": "1"}}, "'q.folds' names '9:linear', which is not among the sites"),
    ],
)
def test_numbers_that_cannot_be(change, expected):
    assert str(flaw_of_grids(replace(SOUND, **change).state(), "q")).startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weights": {"2.weight": WeightGrid(torch.tensor(1.0), 4)}}, "the network has no weight '2.weight'"),
        (
            {"weights": {"1.weight": WeightGrid(torch.ones(4), 4)}},
            "'1.weight' has 4 steps in the checkpoint, and 5 rows in the network",
        ),
        (
            {"sites": {"a": WeightSite("0.weight", 0, 3)}},
            "'a' uses '0.weight' up to row 3, and the network has 2 rows",
        ),
        ({"network": "nonsense"}, "the module has no network 'nonsense'"),
        ({"folds": {"0:linear": "7"}}, "the network has no batch norm '7'"),
        ({"statistics": {"7": (torch.ones(2), torch.ones(2))}}, "the network has no batch norm '7'"),
    ],
)
def test_another_network(change, expected):
    assert unfit(replace(SOUND, **change), network()) == expected


def test_weights_alone_need_no_grid_of_what_they_take():
    alone = replace(SOUND, activations={}, integer_activations=False)
    assert flaw_of_grids(alone.state(), "q") is None


def test_the_network_is_found_where_it_is_compiled_or_has_two_names():
    module = nn.Module()
    module.first = module.net = torch.compile(network(), backend="eager")
    grids = replace(SOUND, network="net", folds={"0:linear": "1"})
    assert unfit(grids, module) is None

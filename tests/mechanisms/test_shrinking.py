"""Shrinking: what is taken, what optimizers keep, what stays linked, and sizes read off tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.shrinking import (
    Shrinkage,
    restructure_,
    shrink_,
    structure_of,
    structure_told_by,
)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


PLAN = Shrinkage(
    {
        "0.weight": {0: [0, 3]},
        "0.bias": {0: [0, 3]},
        **{f"1.{key}": {0: [0, 3]} for key in ("weight", "bias", "running_mean", "running_var")},
        "2.weight": {1: [0, 3]},
    },
    {"0": {"out_features": 2}, "1": {"num_features": 2}, "2": {"in_features": 2}},
    {
        "0.weight": [4, 3],
        "0.bias": [4],
        **{f"1.{key}": [4] for key in ("weight", "bias", "running_mean", "running_var")},
        "2.weight": [2, 4],
    },
)


def stepped(optimizer, net):
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
    "adamw": lambda own: torch.optim.AdamW(own, lr=0.1, amsgrad=True),
    "adafactor": lambda own: torch.optim.Adafactor(own, lr=0.1),
    "asgd": lambda own: torch.optim.ASGD(own, lr=0.1),
    "rprop": lambda own: torch.optim.Rprop(own, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_gradients_and_states_of_what_stays(name):
    net = two_layers()
    optimizer = OPTIMIZERS[name](net.parameters())
    stepped(optimizer, net)
    before = {key: own.clone() for key, own in net.state_dict().items()}
    gradients = {key: own.grad.clone() for key, own in net.named_parameters()}
    names = {id(own): key for key, own in net.named_parameters()}
    states = {
        names[id(own)]: {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        for own, state in optimizer.state.items()
    }
    ids = [id(own) for own in net.parameters()]
    shrink_(net, PLAN, [optimizer])
    assert [id(own) for own in net.parameters()] == ids
    assert torch.equal(net[0].weight, before["0.weight"][[0, 3]])
    assert torch.equal(net[2].weight, before["2.weight"][:, [0, 3]])
    assert torch.equal(net[1].running_var, before["1.running_var"][[0, 3]])
    assert torch.equal(net[2].bias, before["2.bias"])
    assert torch.equal(net[2].weight.grad, gradients["2.weight"][:, [0, 3]])
    for key, value in states["2.weight"].items():
        own = optimizer.state[net[2].weight][key]
        whole = value.ndim < 2 or value.shape[1] == 1  # a count, or a factor of rows
        assert torch.equal(own, value if whole else value[:, [0, 3]])
    stepped(optimizer, net)
    assert repr(net[0]) == "Linear(in_features=3, out_features=2, bias=True)"


def test_a_graph_of_before_does_not_break_the_next_backward_pass():
    net = two_layers()
    kept = net(torch.randn(5, 3)).sum()
    shrink_(net, PLAN)
    net(torch.randn(5, 3)).sum().backward()
    assert net[0].weight.grad.shape == (2, 3)
    assert kept.requires_grad


def test_half_precision_and_integers_keep_their_types():
    net = two_layers().to(torch.bfloat16)
    shrink_(net, PLAN)
    assert {own.dtype for own in net.parameters()} == {torch.bfloat16}
    net = nn.Sequential()
    net.register_buffer("counts", torch.arange(4))
    shrink_(net, Shrinkage({"counts": {0: [1, 3]}}, {}, {"counts": [4]}))
    assert net.counts.tolist() == [1, 3]


def test_frozen_stays_frozen():
    net = two_layers().requires_grad_(False)
    shrink_(net, PLAN)
    assert not any(own.requires_grad for own in net.parameters())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            lambda own: torch.zeros(own.numel() + 1),
            "what SGD keeps as 'extra' cannot be made smaller with it: '0.weight'",
        ),
        (lambda own: [torch.zeros(2)], "what SGD keeps as 'extra' of '0.weight' is a list of tensors"),
        (lambda own: {"a": (torch.zeros(2),)}, "is a dict of tensors"),
    ],
)
def test_a_refusal_touches_nothing(entry, message):
    net = two_layers()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    stepped(optimizer, net)
    optimizer.state[net[0].weight]["extra"] = entry(net[0].weight)
    before = {key: own.clone() for key, own in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        shrink_(net, PLAN, [optimizer])
    assert all(torch.equal(own, before[key]) for key, own in net.state_dict().items())
    assert net[0].out_features == 4


def test_numbers_and_names_in_a_state_stay():
    net = two_layers()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net[0].weight] = {"step": 3, "name": "a", "one": torch.tensor(2.0), "list": [1, 2]}
    shrink_(net, PLAN, [optimizer])
    assert optimizer.state[net[0].weight]["step"] == 3


def test_a_plan_of_another_module_is_refused():
    with pytest.raises(ValueError, match=r"the plan is of another module than Linear: '0\.weight'"):
        shrink_(nn.Linear(3, 4), PLAN)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 3\), and what goes with it \(5, 3\)"):
        shrink_(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), PLAN)


def test_a_tied_parameter_is_cut_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    cut = {0: [0, 1], 1: [2, 3]}
    shape = [4, 4]
    shrink_(net, Shrinkage({"0.weight": cut, "1.weight": cut}, {}, {"0.weight": shape, "1.weight": shape}))
    assert net[0].weight.shape == (2, 2)
    assert net[1].weight is net[0].weight


def test_two_plans_are_one():
    net, other = two_layers(), two_layers()
    first = Shrinkage({"2.weight": {1: [1, 2, 3]}}, {"2": {"in_features": 3}}, {"2.weight": [2, 4]})
    second = Shrinkage({"2.weight": {0: [1], 1: [0, 2]}}, {"2": {"in_features": 2}}, {"2.weight": [2, 3]})
    both = second.after(first)
    assert both.kept == {"2.weight": {0: [1], 1: [1, 3]}}
    assert both.shapes == {"2.weight": [2, 4]}
    shrink_(net, first)
    shrink_(net, second)
    shrink_(other, both)
    assert torch.equal(net[2].weight, other[2].weight)
    assert net[2].in_features == other[2].in_features == 2


def test_a_plan_goes_through_a_checkpoint():
    assert Shrinkage.of(PLAN.state()) == PLAN


LAYERS = {
    "conv": (lambda n: nn.Conv2d(3, n, 3), 8, 4),
    "conv's inputs": (lambda n: nn.Conv2d(n, 6, 3, groups=2), 8, 4),
    "depthwise": (lambda n: nn.Conv2d(n, n, 3, groups=n), 8, 4),
    "transposed": (lambda n: nn.ConvTranspose2d(3, n, 3), 8, 4),
    "transposed inputs": (lambda n: nn.ConvTranspose2d(n, 4, 3, groups=2), 8, 4),
    "linear": (lambda n: nn.Linear(n, n + 1), 8, 4),
    "batch norm": (lambda n: nn.BatchNorm2d(n), 8, 4),
    "batch norm without weights": (lambda n: nn.BatchNorm2d(n, affine=False), 8, 4),
    "layer norm": (lambda n: nn.LayerNorm([2, n]), 8, 4),
    "group norm": (lambda n: nn.GroupNorm(2, n), 8, 4),
    "embedding": (lambda n: nn.Embedding(10, n), 8, 4),
    "prelu": (lambda n: nn.PReLU(n), 8, 4),
    "lstm": (lambda n: nn.LSTM(n, n + 2), 8, 4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("told", [True, False])
def test_a_layer_takes_the_sizes_of_another(name, told):
    """In both directions; from what was saved, or from tensors alone."""
    make, large, small = LAYERS[name]
    for own, other in ((large, small), (small, large)):
        module, saved = nn.Sequential(make(own)), nn.Sequential(make(other))
        structure = structure_of(saved) if told else structure_told_by(module, saved.state_dict())
        restructure_(module, structure, saved.state_dict())
        module.load_state_dict(saved.state_dict(), strict=True)
        assert repr(module) == repr(saved)
        assert structure_of(module) == structure_of(saved)


def test_sizes_may_be_numbers_of_numpy():
    found = structure_of(nn.Linear(np.prod((2, 3)), np.int64(4)))
    assert found == {"": {"in_features": 6, "out_features": 4}}
    assert [type(value) for value in found[""].values()] == [int, int]


def test_another_network_is_no_smaller_one():
    with pytest.raises(ValueError, match="it was saved from another network, not from a smaller one of this class"):
        restructure_(nn.Linear(2, 2), {}, {"weight": torch.zeros(2, 2, 3, 3)})

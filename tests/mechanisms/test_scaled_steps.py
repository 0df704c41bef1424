"""Scaled steps in a plain loop, and what tells optimizers, layers and weights apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.functional import position_scale, quantization_grid
from lightning_compress.mechanisms.optimizers import around_steps, way_of, weight_kept
from lightning_compress.mechanisms.order import call_order
from lightning_compress.mechanisms.scaled_steps import ScaledSteps
from lightning_compress.mechanisms.warping import WarpedWeights, edge_layers, warpable_weights
from lightning_compress.mechanisms.weights import weights_replaced


class Lamb(torch.optim.Optimizer):
    """Of no package here; it has betas."""

    def __init__(self, params):
        super().__init__(params, {"betas": (0.9, 0.99), "lr": 0.1, "weight_decay": 0.5})


class Plain(torch.optim.Optimizer):
    """Shows nothing of what it does."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "gradient"),
        (lambda p: torch.optim.ASGD(p, lr=0.1), "gradient"),
        (type("MySGD", (torch.optim.SGD,), {}), "gradient"),
        *((getattr(torch.optim, name), "update") for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")),
        *((getattr(torch.optim, name), "update") for name in ("Adagrad", "Adadelta", "RMSprop", "Rprop", "Adafactor")),
        (type("Mine", (torch.optim.Adam,), {}), "update"),
        (Lamb, "update"),
        (Plain, None),
    ],
)
def test_the_way_of_an_optimizer(make, way):
    assert way_of(make([torch.ones(2, 2)])) == way


def test_an_unknown_one_shows_its_way_by_its_state():
    weight = torch.ones(2)
    optimizer = Plain([weight])
    optimizer.state[weight] = {"exp_avg": torch.ones(2)}
    assert way_of(optimizer) is None
    optimizer.state[weight]["exp_avg_sq"] = torch.ones(2)
    assert way_of(optimizer) == "update"


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), 0.95),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0), 1.0),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5), 1.0),
        (lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True), 0.95),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), 1.0),
        (Lamb, 1.0),
    ],
)
def test_what_decoupled_decay_leaves(make, kept):
    optimizer = make([torch.ones(2)])
    assert weight_kept(optimizer, optimizer.param_groups[0]) == pytest.approx(kept)


def test_the_first_error_of_a_step_leaves_no_hook():
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    with pytest.raises(RuntimeError, match="broken"), around_steps(optimizer, print, print):
        raise RuntimeError("broken")
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Watched(torch.optim.SGD):
    """Its step is that of its base class, and something after it; it raises when told to."""

    breaks = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.breaks:
            raise RuntimeError("broken")
        return loss


def test_the_step_of_a_base_class_is_a_part_of_the_step():
    torch.optim.SGD([torch.ones(1)])  # from here on the step of the base class calls hooks, too
    weight = nn.Parameter(torch.ones(1))
    optimizer, seen = Watched([weight], lr=0.5), []
    weight.grad = torch.ones(1)
    with around_steps(optimizer, lambda own: seen.append("before"), lambda own: seen.append(weight.item())):
        optimizer.step()
        optimizer.breaks = True
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step()
        optimizer.breaks = False
        optimizer.step(lambda: seen.append("closure"))
    assert seen == ["before", 0.5, "before", "before", "closure", -0.5]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_loop(make):
    torch.manual_seed(0)
    layer, other = nn.Linear(5, 4), nn.Linear(5, 4)
    other.load_state_dict(layer.state_dict())
    optimizer, control = make(layer.parameters(), lr=0.1), make(other.parameters(), lr=0.1)
    steps = ScaledSteps(WarpedWeights({"weight": layer.weight}, {"weight": 3}))
    steps.scale, x = 2.0, torch.randn(6, 5)
    with steps.attached([optimizer]):
        for _ in range(3):
            for own in (layer, other):
                own.zero_grad()
                own(x).square().mean().backward()
            factor = 2.0 * position_scale(other.weight, 3)
            old = other.weight.detach().clone()
            if make is torch.optim.SGD:
                other.weight.grad *= factor
            steps.prepare(optimizer)
            optimizer.step()
            control.step()
            if make is torch.optim.AdamW:
                base = old * (1 - 0.1 * 0.01)
                other.weight.data = base + factor * (other.weight.data - base)
            assert torch.equal(layer.weight, other.weight)
            assert torch.equal(layer.bias, other.bias)  # which is left alone
    assert (steps.taken, steps.optimizers, steps.unreached) == (3, 1, [])


def test_a_step_that_nobody_prepared_is_noticed():
    weight = nn.Parameter(torch.tensor([0.7, 0.33]))
    optimizer, passed = torch.optim.SGD([weight], lr=0.1), []
    steps = ScaledSteps(WarpedWeights({"weight": weight}, {"weight": 4}), passed_by=lambda: passed.append(True))
    weight.grad = torch.ones(2)
    with steps.attached([optimizer]):
        steps.prepare(optimizer)
        optimizer.step()
        assert passed == []
        optimizer.step()
        assert passed == [True]


def test_weights_without_a_gradient_are_noted_once():
    first, second = nn.Parameter(torch.tensor([0.7, 0.33])), nn.Parameter(torch.tensor([0.7, 0.2]))
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    steps = ScaledSteps(WarpedWeights({"a": first, "b": second}, {"a": 4, "b": 4}))
    assert not steps.has_work(optimizer)
    first.grad = torch.ones(2)
    assert steps.has_work(optimizer)
    for _ in range(2):
        steps.prepare(optimizer)
    assert (steps.unreached, second.grad) == (["b"], None)


def test_calls_are_ordered_by_the_first():
    layers = [nn.Linear(2, 2) for _ in range(3)]
    with call_order(layers) as order:
        for index in (2, 0, 2):
            layers[index](torch.ones(2))
        assert order == [layers[2], layers[0]]
        order.clear()
        layers[1](torch.ones(2))
        assert order == [layers[1]]
    assert all(not layer._forward_pre_hooks for layer in layers)


def test_edges_of_a_network():
    net = nn.ModuleDict({"last": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2), "first": nn.Conv1d(1, 1, 1)})
    assert [name for name, _ in edge_layers(net, [])] == ["last", "first"]
    assert [name for name, _ in edge_layers(net, [net["first"], net["last"]])] == ["first", "last"]
    assert [name for name, _ in edge_layers(net["last"], [])] == [""]
    assert edge_layers(nn.ReLU(), []) == []


def test_weights_that_can_be_warped():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 4), nn.Linear(4, 4))
    net[4].weight = nn.Parameter(torch.randn(4, 4))
    weights, left, idle = warpable_weights(net, None, ["1"])
    assert left == []
    assert list(weights) == ["0.weight", "3.weight", "3.bias", "4.weight", "4.bias"]
    assert idle == ["1"]
    assert list(warpable_weights(net, ["4"], None).weights) == ["4.weight", "4.bias"]
    net[3].bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"'3.bias' hold NaN or infinity"):
        warpable_weights(net, None, None)


def test_projections_of_attention_are_taken_where_they_are_named():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "norm": nn.LayerNorm(4)})
    weights, left, _ = warpable_weights(net, None, None)
    assert list(weights) == ["attention.out_proj.weight", "attention.out_proj.bias"]
    assert left == ["attention.in_proj_weight"]
    weights, left, _ = warpable_weights(net, ["attention"], None)
    assert list(weights) == [
        f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert left == []
    apart = nn.MultiheadAttention(4, 2, kdim=3, bias=False)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert (
        list(warpable_weights(apart, ["type:MultiheadAttention", "type:NonDynamicallyQuantizableLinear"], None).weights)
        == names
    )


def test_weights_that_rest_are_all_on_the_grid():
    values = {"constant": [0.3, -0.3], "ternary": [0.3, 0.0, -0.3], "zero": [0.0, 0.0], "free": [0.3, 0.01]}
    weights = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    bits = dict.fromkeys(weights, 3)
    assert WarpedWeights(weights, bits).resting() == ["constant", "ternary", "zero"]
    assert WarpedWeights(weights, bits, eps=0.1).resting() == []
    assert WarpedWeights(weights, None).resting() == []


def test_a_summary_of_quantised_weights():
    weight = nn.Parameter(torch.tensor([[0.9, 0.1], [-0.4, 0.3]]))
    error, zeros, total = WarpedWeights({"w": weight}, {"w": 2}).summary()
    assert error == pytest.approx(((0.1**2 + 0.4**2 + 0.3**2) / (0.9**2 + 0.1**2 + 0.4**2 + 0.3**2)) ** 0.5)
    assert (zeros, total) == (3, 4)
    by_channel = WarpedWeights({"w": weight}, {"w": 2}, by_channel=True)
    assert by_channel.summary().zeros == 1
    assert torch.equal(by_channel.grids()["w"][0], quantization_grid(weight, 2, axis=0))


def test_positions_towards_zero_are_shares_of_the_range():
    weight = nn.Parameter(torch.tensor([0.8, -0.4, 0.0]))
    assert WarpedWeights({"w": weight}, None, eps=0.1).positions("w").tolist() == pytest.approx([0.5, -0.25, 0.0])


def test_replaced_weights_come_back():
    layer = nn.Linear(2, 2)
    before = F.linear(torch.ones(2), layer.weight).tolist()
    seen = []

    def break_off():
        with weights_replaced({"w": layer.weight}, lambda name, weight: weight * 0):
            seen.extend(F.linear(torch.ones(2), layer.weight).tolist())
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        break_off()
    assert seen == [0, 0]
    assert F.linear(torch.ones(2), layer.weight).tolist() == before

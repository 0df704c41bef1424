"""One layer at a time: what its weights are meanwhile, and that they come back."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.commands.sensitivity.changes import Change, applied, parsed_levels, planned
from lightning_compress.commands.sensitivity.layers import Layer

from .projects import Net


@pytest.fixture
def net():
    return Net().eval()


def layer(name, weights, **settings):
    return Layer(name, "", tuple(weights), 1, **settings)


@pytest.mark.parametrize(("method", "level"), [("bits", 3), ("sparsity", 0.5), ("filters", 0.5)])
def test_all_comes_back_bit_for_bit_after_an_error_too(net, method, level):
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def change():
        with applied(net, layer("conv", ["conv.weight"], norm="norm"), method, level):
            assert not torch.equal(net.conv.weight, before["conv.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("bits", [8, 2])
def test_bits_are_those_of_the_grid_of_each_channel(net, bits):
    weight = net.hidden.weight.detach().clone()
    with applied(net, layer("hidden", ["hidden.weight"]), "bits", bits) as moved:
        rounded = net.hidden.weight.detach().clone()
    most = 2 ** (bits - 1) - 1
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True) / most
        assert torch.allclose(rounded, (weight / step).round() * step, atol=1e-7)
    assert all(len(row.unique()) <= 2 * most + 1 for row in rounded)
    assert moved == pytest.approx(float(((rounded - weight) ** 2).sum() / (weight**2).sum()), rel=1e-5)
    assert moved < {8: 1e-4, 2: 0.4}[bits]


def test_zeros_are_of_the_smallest_weights(net):
    weight = net.hidden.weight.detach().clone()
    with applied(net, layer("hidden", ["hidden.weight"]), "sparsity", 0.75):
        kept = net.hidden.weight != 0
    assert int(kept.sum()) == weight.numel() // 4
    assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_filters_that_go_give_nothing_behind_batch_norm(net):
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.weight.normal_()
        net.norm.bias.normal_()
    norms = net.conv.weight.detach().flatten(1).norm(dim=1)
    x = torch.randn(2, 1, 2, 3)
    plain = net.norm(net.conv(x))
    with applied(net, layer("conv", ["conv.weight"], norm="norm"), "filters", 0.25):
        maps = net.norm(net.conv(x))
    gone = norms.argsort()[:2]
    kept = norms.argsort()[2:]
    assert not maps[:, gone].any()
    assert torch.equal(maps[:, kept], plain[:, kept])
    with applied(net, layer("hidden", ["hidden.weight"]), "filters", 0.99):
        assert int((net.hidden(torch.randn(3, 48)) != 0).any(0).sum()) == 1  # biases go too, and one filter stays


def test_the_order_says_most_first():
    layers = [
        layer("small", [], methods=("bits", "sparsity")),
        Layer("large", "", (), 9, methods=("bits", "sparsity", "filters")),
    ]
    levels = {"bits": (8, 4, 2), "filters": (0.5, 0.75)}
    assert planned(layers, levels) == [
        Change("bits", "large", 4),
        Change("bits", "small", 4),
        Change("filters", "large", 0.5),
        Change("bits", "large", 8),
        Change("bits", "small", 8),
        Change("filters", "large", 0.75),
        Change("bits", "large", 2),
        Change("bits", "small", 2),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("bits", "a level of --levels bits must be a whole number from 2 to 8"),
        ("bits=16", "a level of --levels bits=16 must be a whole number from 2 to 8, got 16"),
        ("sparsity=0.5,90", "--levels sparsity=0.5,90: a level of sparsity is a share between 0 and 1, got '90'"),
        ("filters=0.5", "with a method that is measured, one of bits, sparsity"),
        ("sparsty=0.5", "did you mean 'sparsity'?"),
    ],
)
def test_levels_that_are_none(given, message):
    with pytest.raises(ValueError) as raised:
        parsed_levels(["bits", "sparsity"], [given])
    assert message in str(raised.value)


def test_levels_are_ordered_from_the_mildest():
    levels = parsed_levels(["bits", "sparsity"], ["bits=3,6,3", "sparsity=.9,.1"])
    assert levels == {"bits": (6, 3), "sparsity": (0.1, 0.9)}

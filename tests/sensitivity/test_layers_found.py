"""The layers that are measured, and what one batch tells of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.commands.sensitivity.layers import find_layers

from .projects import Net


def found(net, *inputs, layers=None, exclude=None):
    net.eval()
    return {own.name: own for own in find_layers(net, lambda: net(*inputs), layers, exclude)}


def test_what_a_batch_tells():
    layers = found(Net(), torch.zeros(5, 6))
    assert list(layers) == ["conv", "hidden", "head"]
    assert [own.parameters for own in layers.values()] == [72, 768, 48]
    assert [own.macs for own in layers.values()] == [6 * 72, 768, 48]  # of one sample
    assert [own.norm for own in layers.values()] == ["norm", None, None]
    assert layers["hidden"].methods == ("bits", "sparsity", "filters")
    assert layers["head"].methods == ("bits", "sparsity")  # its channels are the network's output


def test_transposed_convolutions_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.up = nn.ConvTranspose1d(4, 2, 2)

        def forward(self, x):
            return self.up(self.second(self.first(x))[..., None])

    layers = found(Tied(), torch.zeros(2, 4))
    assert {name: own.methods for name, own in layers.items()} == {
        "first": ("bits", "sparsity", "filters"),
        "up": ("sparsity",),
    }


def test_selectors():
    assert list(found(Net(), torch.zeros(1, 6), layers=["type:Linear"], exclude=["head"])) == ["hidden"]
    assert list(found(nn.LSTM(3, 2), torch.zeros(1, 1, 3), layers=["type:LSTM"])) == [""]
    with pytest.raises(ValueError, match="layers has 'convv', which matches no module; did you mean 'conv'"):
        found(Net(), torch.zeros(1, 6), layers=["convv"])


def test_it_leaves_no_hook():
    net = Net()
    found(net, torch.zeros(1, 6))
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())

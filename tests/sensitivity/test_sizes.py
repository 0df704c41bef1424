"""Sizes by arithmetic, against files that were written."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import nn

from lightning_compress.commands.sensitivity.costs import costs_of
from lightning_compress.commands.sensitivity.layers import Layer, find_layers
from lightning_compress.commands.sensitivity.sizes import GRAPH, deflated_bytes, integer_bytes, other_bytes

from .projects import Net


def test_by_hand():
    """A convolution of 8 filters of 9 weights; a linear layer of 10 by 200, of which 4 bits go in blocks of 128."""
    assert integer_bytes((8, 1, 3, 3), 32) == 4 * 72 + 4 * 8 + GRAPH
    assert integer_bytes((8, 1, 3, 3), 6) == 72 + 4 * 8 + 8 + 4 * 8 + GRAPH
    assert integer_bytes((8, 1, 3, 3), 4) == 36 + 4 * 8 + 4 + 4 * 8 + GRAPH
    assert integer_bytes((10, 200), 8) == 2000 + 40 + 10 + 40 + GRAPH
    assert integer_bytes((10, 200), 3) == 10 * 2 * (64 + 4) + 40 + GRAPH


def test_what_is_no_layer_stays_in_float():
    class WithMore(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.net, self.norm = nn.Embedding(7, 3), Net(), nn.LayerNorm(5)

    layers = [Layer(f"net.{name}", "", (f"net.{name}.weight",), 1) for name in ("conv", "hidden", "head")]
    assert other_bytes(WithMore(), layers) == 4 * (21 + 10)
    assert other_bytes(WithMore(), layers[:1]) == 4 * (21 + 10 + 768 + 16 + 48 + 3)


def test_deflated():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    sizes = deflated_bytes([weight], [0.5, 0.9])
    kept = torch.where(weight.abs() >= weight.abs().flatten().sort().values[128], weight, 0.0)
    assert abs(sizes[0.5] - len(zlib.compress(kept.numpy().tobytes(), 9))) < 10
    assert sizes[0.0] > sizes[0.5] > sizes[0.9] > 0


def test_costs_of_filters_count_what_cannot_lose_any():
    net = Net().eval()
    layers = find_layers(net, lambda: net(torch.zeros(2, 6)), None, None)
    costs = costs_of("filters", net, layers, (0.5,))
    assert (costs.whole, costs.fixed) == (432 + 768 + 48, 48)
    assert costs.levels == {"conv": {0.5: 216}, "hidden": {0.5: 384}}
    assert costs.smallest == 216 + 384 + 48


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{}, {"conv": 4}, {"hidden": 4, "head": 4}, {"conv": 4, "hidden": 4, "head": 4}])
def test_the_file_is_about_as_large(bits, tmp_path):
    from lightning_compress.export import to_onnx
    from lightning_compress.functional.quantizers import quantization_grid
    from tests.export.test_emission import holding

    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 50)
    )
    names, net = {"conv": "0", "hidden": "4"}, net.eval()
    own = {name: bits.get(key, 8) for key, name in names.items()}
    steps = {
        f"{name}.weight": (quantization_grid(net.get_parameter(f"{name}.weight"), few, axis=0), few)
        for name, few in own.items()
    }
    precision = "int4" if 4 in own.values() else "int8"
    result = to_onnx(
        holding(net, trained_steps=steps), tmp_path / "n.onnx", torch.zeros(2, 3, 10, 10), precision=precision
    )
    layers = [Layer(name, "", (f"{name}.weight",), 1) for name in names.values()]
    predicted = other_bytes(net, layers)
    predicted += sum(integer_bytes(net.get_parameter(f"{name}.weight").shape, few) for name, few in own.items())
    assert result.bytes == pytest.approx(predicted, rel=0.05)
    plain = to_onnx(net, tmp_path / "p.onnx", torch.zeros(2, 3, 10, 10)).bytes
    whole = sum(integer_bytes(net.get_parameter(f"{name}.weight").shape, 32) for name in own)
    assert plain == pytest.approx(whole, rel=0.05)

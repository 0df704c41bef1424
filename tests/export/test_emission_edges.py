"""Networks whose integer files need care: limits, outputs nobody takes or that are given twice, names, pooling."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from export.test_emission import calibrated, holding, initializers, kernels, operators, rounded, run
from lightning_compress.export import to_onnx
from lightning_compress.mechanisms.calibration import Settings, calibrate

pytestmark = pytest.mark.sample  # a file a test, and its kernels

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = forward

    def forward(self, *args):
        return self.call(self, *args)


def written(tmp_path, network, x, **settings):
    torch.manual_seed(0)
    grids = calibrated(network.eval(), x, **settings)
    to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", x, precision="int8")
    return grids


def agree(tmp_path, network, grids, x, most=0.03):
    expected = rounded(network, grids, x)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    for found, wanted in zip(run(tmp_path / "n.onnx", x), expected, strict=True):
        assert (found - wanted).norm() <= most * wanted.norm()


def test_a_tensor_that_is_returned_twice(tmp_path):
    def forward(net, x):
        y = net.c(x).relu()
        return y, y

    network = Net(forward, c=nn.Conv2d(3, 4, 3))
    grids = written(tmp_path, network, MAPS)
    first, second = rounded(network, grids, MAPS)
    assert torch.equal(first, second)
    assert kernels(tmp_path / "n.onnx") == 1


def test_a_layer_whose_output_nobody_takes(tmp_path):
    def forward(net, x):
        net.aux(x)
        return net.l(x)

    network = Net(forward, aux=nn.Linear(6, 2), l=nn.Linear(6, 3))
    grids = written(tmp_path, network, ROWS)
    assert kernels(tmp_path / "n.onnx") == 1
    agree(tmp_path, network, grids, ROWS)


def test_a_child_called_quantized(tmp_path):
    network = Net(lambda net, x: net.l(net.quantized(x)), l=nn.Linear(6, 3), quantized=nn.LayerNorm(6))
    grids = written(tmp_path, network, ROWS)
    agree(tmp_path, network, grids, ROWS)


LIMITED = {
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0.1),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_between_two_grid_points(tmp_path, name):
    network = Net(lambda net, x: net.d(LIMITED[name](net.c(x))), c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 6, 3, padding=1))
    grids = written(tmp_path, network, MAPS)
    assert operators(tmp_path / "n.onnx")["QLinearConv"] == 2
    agree(tmp_path, network, grids, MAPS)


def test_average_pooling_over_the_edge(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(4, 4, ceil_mode=True), nn.Conv2d(4, 6, 1))
    agree(tmp_path, network, written(tmp_path, network, MAPS), MAPS)


def test_weights_that_are_used_twice_are_stored_once(tmp_path):
    network = Net(
        lambda net, x: net.e(net.e(net.c(x)).relu()), c=nn.Conv2d(3, 64, 3), e=nn.Conv2d(64, 64, 3, padding=1)
    )
    written(tmp_path, network, MAPS)
    assert (tmp_path / "n.onnx").stat().st_size < 1.3 * sum(value.numel() for value in network.parameters())


def test_layers_that_are_left_in_float(tmp_path):
    """A convolution with its batch norm, and a linear layer; their neighbours have integers in the file."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        *(nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)),
    ).eval()
    network[3].running_var.uniform_(0.5, 2)
    chosen = {"0.weight", "5.weight", "9.weight"}
    with torch.no_grad():
        grids = calibrate(
            network, lambda: (network(MAPS) for _ in range(2)), Settings(), selected=lambda name: name in chosen
        )
    assert set(grids.weights) == chosen
    result = to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", MAPS, precision="int8")
    assert {"2.weight", "7.weight", "batch_norm (1)", "conv2d (1)", "linear (1)"} <= set(result.left_in_float)
    stored = initializers(tmp_path / "n.onnx")
    weights = {tuple(entry.dims): entry.data_type for entry in stored.values() if len(entry.dims) > 1}
    assert {shape for shape, kind in weights.items() if kind == onnx.TensorProto.INT8} == {
        *((4, 3, 3, 3), (2, 4, 1, 1), (8, 3)),  # a matrix is (in, out)
    }
    assert {shape for shape, kind in weights.items() if kind == onnx.TensorProto.FLOAT} >= {(4, 4, 3, 3), (8, 32)}
    expected = rounded(network, grids, MAPS)
    step = network[9].weight.abs().sum(dim=1).max() * grids.activations["8:relu:0"].scale
    assert (run(tmp_path / "n.onnx", MAPS, optimised=False)[0] - expected).abs().max() <= step

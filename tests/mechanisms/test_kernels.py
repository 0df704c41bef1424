"""What integer kernels add: in whole steps of input times weight, in the module as in the file."""

from __future__ import annotations

import pytest
import torch
from export.test_emission import calibrated, holding, operators, rounded, run, varied_
from torch import nn

from lightning_compress.export import to_onnx
from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.kernels import FoldedNorm, kernel_of


def grids_of(step=0.5, bits=8, scale=0.25, activation_bits=8, **more):
    return Grids(
        weights={"w": WeightGrid(torch.tensor(step), bits)},
        sites={"s": WeightSite("w", 0, 2, source="x")},
        activations={} if scale is None else {"x": ActivationGrid(scale, 0, activation_bits)},
        **more,
    )


def test_a_bias_by_hand():
    """Steps of .5 * .25 = .125: .3 becomes .25, and -.07 becomes -.125."""
    bias = torch.tensor([0.3, -0.07])
    kernel = kernel_of(grids_of(), "s", 2, bias=bias)
    assert kernel.step.tolist() == [0.125, 0.125]
    assert kernel.added.tolist() == pytest.approx([0.3, -0.07])
    assert kernel.rounding().tolist() == pytest.approx([-0.05, -0.055])
    assert kernel_of(grids_of(), "s", 2).rounding().tolist() == [0.0, 0.0]


def test_few_bits_fill_their_byte():
    """Integers up to 7 are multiplied by 16, so the steps of the bias are 16 times as fine."""
    kernel = kernel_of(grids_of(bits=4, activation_bits=4), "s", 2)
    assert kernel.shift == 16
    assert kernel.step.tolist() == [0.125 / 16] * 2
    assert kernel_of(grids_of(bits=4), "s", 2).shift == 1


def test_a_batch_norm_that_is_folded_in():
    """(x - 2) * 3 / 2 + 1, and with a factor of -1 the steps are as large."""
    half, mean = torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0])
    norm = FoldedNorm(mean, torch.tensor([4.0, 4.0]), torch.tensor([3.0, -2.0]), torch.tensor([1.0, 1.0]), 0.0)
    kernel = kernel_of(grids_of(), "s", 2, norm, half)
    assert kernel.gain.tolist() == [1.5, -1.0]
    assert kernel.added.tolist() == [-2 * 1.5 + 1 + 0.5 * 1.5, 2 + 1 - 0.5]
    assert kernel.step.tolist() == [0.125 * 1.5, 0.125]
    assert kernel.rounding().tolist() == pytest.approx([-7 * 0.1875 + 1.25, 0.0])  # 6.67 steps become 7


def test_without_integer_activations_nothing_is_rounded():
    bias = torch.tensor([0.3, 0.3])
    assert kernel_of(grids_of(scale=None), "s", 2, bias=bias).rounding() is None


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.one, self.two = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.sample
@pytest.mark.parametrize("bits", [*(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 4)), 8])
def test_a_module_gives_what_its_file_gives(tmp_path, bits):
    """With all kernels at work, to the last step."""
    network, x = varied_(Residual()).eval(), torch.randn(64, 2, 9, 9)
    grids = calibrated(network, x, weight_bits=bits, activation_bits=bits)
    to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", x[:4], precision="int8")
    assert operators(tmp_path / "n.onnx")["QLinearConv"] == 3
    found, expected = run(tmp_path / "n.onnx", x)[0], rounded(network, grids, x)
    assert ((found - expected).abs() <= 1e-5).float().mean() > 0.99

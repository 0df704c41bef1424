"""Paraphraser and translator: their layers one by one, shapes, parameters, and what they compute."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.functional import factor_transfer_loss, reconstruction_loss
from lightning_compress.modules import Paraphraser, Translator


def layers(module):
    """The leaves in order, each as a tuple of what defines it."""
    found = []
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = "transposed" if isinstance(layer, nn.ConvTranspose2d) else "conv"
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            assert geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            found.append((kind, layer.in_channels, layer.out_channels, layer.bias is not None))
        elif isinstance(layer, nn.LeakyReLU):
            found.append(("leaky", layer.negative_slope))
        else:
            assert isinstance(layer, (nn.Sequential, Paraphraser, Translator))
    return found


def with_activations(*convolutions):
    return [layer for convolution in convolutions for layer in (convolution, ("leaky", 0.1))]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def image(channels, dtype=torch.float64):
    return torch.randn(2, channels, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_the_layers_of_the_paraphraser():
    assert layers(Paraphraser(8)) == with_activations(
        ("conv", 8, 8, True),
        ("conv", 8, 4, True),
        ("conv", 4, 4, True),
        ("transposed", 4, 4, True),
        ("transposed", 4, 8, True),
        ("transposed", 8, 8, True),
    )


def test_the_layers_of_the_translator():
    assert layers(Translator(6, 4)) == with_activations(
        ("conv", 6, 6, True), ("conv", 6, 4, True), ("conv", 4, 4, True)
    )


def test_parameters_counted_by_hand():
    # 9 * in * out + out for each convolution
    assert parameters(Paraphraser(8)) == 584 + 292 + 148 + 148 + 296 + 584
    assert parameters(Translator(6, 4)) == 330 + 220 + 148
    assert sorted(dict(Translator(6, 4).named_buffers())) == []


@pytest.mark.parametrize(
    ("channels", "ratio", "expected"), [(64, 0.5, 32), (10, 0.75, 8), (8, 1.0, 8), (8, 1.5, 12), (3, 0.1, 1), (1, 1, 1)]
)
def test_channels_and_sizes(channels, ratio, expected):
    paraphraser = Paraphraser(channels, ratio).double()
    feature = image(channels)
    assert paraphraser.factor_channels == expected
    assert paraphraser.factor(feature).shape == (2, expected, 5, 4)
    assert paraphraser(feature).shape == feature.shape
    assert Translator(7, paraphraser.factor_channels).double()(image(7)).shape == (2, expected, 5, 4)


def test_the_factor_is_the_first_half():
    paraphraser, feature = seeded(lambda: Paraphraser(4).double()), image(4)
    weights = paraphraser.state_dict()
    out = feature
    for index in (0, 2, 4):
        name = f"encoder.{index}"
        out = F.leaky_relu(F.conv2d(out, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1), 0.1)
    assert torch.equal(paraphraser.factor(feature), out)
    for index in (0, 2, 4):
        name = f"decoder.{index}"
        out = F.leaky_relu(F.conv_transpose2d(out, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1), 0.1)
    assert torch.equal(paraphraser(feature), out)
    assert out.min().item() < 0  # the last layer has a leaky ReLU, not a ReLU


def test_the_translator_computes_what_an_encoder_does():
    paraphraser, translator = Paraphraser(6, 0.5).double(), Translator(6, 3).double()
    translator.encoder.load_state_dict(paraphraser.encoder.state_dict())
    assert torch.equal(translator(image(6)), paraphraser.factor(image(6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_have_the_type_of_the_weights(dtype):
    paraphraser, translator = Paraphraser(4).to(dtype), Translator(4, 2).to(dtype)
    feature = image(4, dtype)
    assert {out.dtype for out in (paraphraser(feature), paraphraser.factor(feature), translator(feature))} == {dtype}


@pytest.mark.sample
def test_the_reconstruction_improves_with_training():
    # one pattern at several strengths, which half as many channels can hold
    paraphraser = seeded(lambda: Paraphraser(4))
    feature = image(1, torch.float32).relu() * torch.arange(1.0, 5.0).reshape(4, 1, 1)
    optimizer = torch.optim.Adam(paraphraser.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = reconstruction_loss(paraphraser(feature), feature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_student_step_leaves_the_paraphraser_alone():
    paraphraser, translator = Paraphraser(6), Translator(4, 3)
    feature = image(4, torch.float32).requires_grad_()
    loss = factor_transfer_loss(translator(feature), paraphraser.factor(image(6, torch.float32)))
    loss.backward()
    assert [parameter.grad for parameter in paraphraser.parameters()] == [None] * 12
    moved = [parameter.grad.abs().sum().item() > 0 for parameter in translator.parameters()]
    assert moved == [True] * 6
    assert feature.grad.abs().sum().item() > 0


@pytest.mark.parametrize("channels", [0, -1, 2.0, "8", True, None])
def test_channels_must_be_a_positive_int(channels):
    for make in (lambda: Paraphraser(channels), lambda: Translator(channels, 2)):
        with pytest.raises(
            ValueError, match=rf"^channels must be a whole number from 1 to 268435456, got {channels!r}"
        ):
            make()
    with pytest.raises(
        ValueError, match=rf"^factor_channels must be a whole number from 1 to 268435456, got {channels!r}"
    ):
        Translator(2, channels)


@pytest.mark.parametrize("ratio", [0, -0.5, math.nan, math.inf])
def test_the_ratio_must_be_positive_and_finite(ratio):
    with pytest.raises(ValueError, match=f"factor_ratio must be positive and finite, got {ratio}"):
        Paraphraser(8, ratio)

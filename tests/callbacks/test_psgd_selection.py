"""Which parameters PSGD scales: the biases that go with a layer, and no norm, however the layers are chosen."""

from __future__ import annotations

import pytest
from contract.modules import Classifier, NormClassifier, difference, loader, made, trainer
from torch import nn

from lightning_compress import PSGDCallback
from lightning_compress.mechanisms.warping import warpable_weights


def network() -> nn.Sequential:
    """Every kind of layer; biases of convolutions, of norms, of recurrent layers and of embeddings are none's."""
    return nn.Sequential(
        nn.Conv1d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        nn.BatchNorm1d(2),
        nn.LayerNorm(2),
        nn.GroupNorm(1, 2),
        nn.Linear(2, 2),
        nn.Linear(2, 2, bias=False),
        nn.MultiheadAttention(2, 1),
        nn.LSTM(2, 2),
        nn.Embedding(3, 2),
        nn.PReLU(2),
        nn.Bilinear(2, 2, 2),
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["0.weight", "1.weight", "5.weight", "5.bias", "6.weight", "7.out_proj.weight", "7.out_proj.bias"]),
        (["type:Linear"], ["5.weight", "5.bias", "6.weight", "7.out_proj.weight", "7.out_proj.bias"]),
        (["type:Conv1d", "1"], ["0.weight", "1.weight"]),
        (["7"], ["7.in_proj_weight", "7.in_proj_bias", "7.out_proj.weight", "7.out_proj.bias"]),
        (["8"], ["8.weight_ih_l0", "8.weight_hh_l0"]),
        (["9"], ["9.weight"]),
    ],
)
def test_the_biases_of_linear_layers_go_with_them_and_no_others(layers, expected):
    found = warpable_weights(network(), layers, None).weights
    assert list(found) == [*expected, "11.weight"] if layers is None else list(found) == expected


NORMS = ("2", "3", "4", "type:BatchNorm1d", "type:LayerNorm", "type:GroupNorm")


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_is_named_is_refused_alone_and_beside_others(norm):
    for layers in ([norm], ["5", norm], [norm, "type:Conv1d"]):
        with pytest.raises(ValueError, match=rf"^layers names '{norm}', of type \w+ and without any "):
            warpable_weights(network(), layers, None)


@pytest.mark.parametrize("selector", ["5.bias", "0.bias", "*.bias", r"re:.*\.bias", "2.weight", "8.bias_ih_l0"])
def test_a_parameter_is_not_a_layer(selector):
    for layers, exclude, argument in (([selector], None, "layers"), (None, [selector], "exclude")):
        with pytest.raises(ValueError, match=rf"^{argument} has '.*', which matches no module but a parameter, '\d\."):
            warpable_weights(network(), layers, exclude)


def test_a_fit_is_refused_before_anything_has_changed():
    for kind, layers in ((NormClassifier, ["type:BatchNorm2d"]), (Classifier, ["model.3.bias"])):
        module = made(kind)
        with pytest.raises(ValueError, match=r"^layers (names 'type:BatchNorm2d'|has 'model\.3\.bias')"):
            trainer(PSGDCallback(layers=layers)).fit(module, loader())
        assert difference(module, made(kind)) == 0


def test_a_module_with_norms_in_it_gives_its_layers_alone():
    psgd = PSGDCallback(layers=["model"])
    trainer(psgd).fit(made(NormClassifier), loader())
    assert sorted(psgd.grids) == ["model.0.weight", "model.4.bias", "model.4.weight"]

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lightning_compress import PSGDCallback, PTQCallback
from lightning_compress.export import ExportError, to_onnx
from lightning_compress.export.scales import Scales, for_precision
from lightning_compress.mechanisms.calibration import fingerprints

from . import networks
from .networks import CLASSES, FEATURES, mlp
from .test_emission import calibrated, holding, initializers, kernels, operators, rounded, run

X = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
NAMESPACE = "lightning.pytorch"


class Holder(nn.Module):
    """A network inside of a module."""

    def __init__(self, network=None):
        super().__init__()
        self.model = mlp().eval() if network is None else network
        self.other = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.model(x)


def grids_of(module, name="model"):
    grids = calibrated(module.get_submodule(name), X)
    grids.network = name
    return grids


def steps_of(module, bits=4):
    """What PSGD has: names inside the module to steps and bits; of biases too."""
    weights = {
        name: value.detach() for name, value in module.named_parameters() if name.startswith(("model.0", "model.4"))
    }
    return {name: (value.abs().max() / (2 ** (bits - 1) - 1), bits) for name, value in weights.items()}


# From a callback


def test_the_grids_of_a_callback_and_the_network_that_they_are_of(tmp_path):
    module = Holder()
    grids = grids_of(module)
    holding(module, SimpleNamespace(quantization=None), SimpleNamespace(), SimpleNamespace(quantization=grids))
    scales = Scales.of(module, None, "int8")
    assert scales.network == "model"
    assert scales.for_network("model", module.model, None) is grids
    result = to_onnx(module, tmp_path / "n.onnx", X, precision="int8")
    assert (result.network, result.quantization) == ("model", grids)
    assert kernels(tmp_path / "n.onnx") == 2
    expected = rounded(module.model, grids, X)
    assert (run(tmp_path / "n.onnx", X)[0] - expected).abs().max() < 0.02 * expected.abs().max()


def test_steps_alone_quantise_the_weights_of_the_network_inside(tmp_path):
    module = Holder()
    steps = steps_of(module)
    assert sorted(steps) == ["model.0.bias", "model.0.weight", "model.4.bias", "model.4.weight"]
    holding(module, trained_steps=steps)
    assert Scales.of(module, None, "int8").network is None
    result = to_onnx(module, tmp_path / "n.onnx", X, precision="int4", network="model")
    grids = result.quantization
    assert (grids.network, grids.integer_activations, grids.activations) == ("model", False, {})
    assert {name: (grid.step.item(), grid.bits) for name, grid in grids.weights.items()} == {
        "0.weight": (steps["model.0.weight"][0].item(), 4),
        "4.weight": (steps["model.4.weight"][0].item(), 4),
    }
    assert grids.folds == {"0:linear:0": "1"}
    assert operators(tmp_path / "n.onnx")["MatMulNBits"] == 2
    network = copy.deepcopy(module.model)
    for layer in network[0], network[4]:
        step = layer.weight.abs().max() / 7
        layer.weight.data = (layer.weight.data / step).round() * step
    np.testing.assert_allclose(run(tmp_path / "n.onnx", X)[0], network(X).detach(), atol=1e-5)


def test_a_step_for_a_whole_weight_stays_one_until_batch_norm_is_folded(tmp_path):
    module = Holder()
    norm = module.model[1]
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, -1.0, 1.0, 0.25])
    norm.running_var.uniform_(0.5, 2.0)
    steps = steps_of(module, bits=8)
    to_onnx(holding(module, trained_steps=steps), tmp_path / "n.onnx", X, precision="int8", network="model")
    stored = {name: numpy_helper.to_array(entry) for name, entry in initializers(tmp_path / "n.onnx").items()}
    gain = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).detach()
    expected = (steps["model.0.weight"][0].double() * gain.abs()).float()
    np.testing.assert_array_equal(stored["quantized.0_linear_0_weight_scale"], expected)
    integers = (module.model[0].weight / steps["model.0.weight"][0]).round() * gain.sign()[:, None]
    np.testing.assert_array_equal(stored["quantized.0_linear_0_weight"], integers.t().detach().numpy())
    np.testing.assert_array_equal(stored["quantized.4_linear_0_weight_scale"], np.full(3, steps["model.4.weight"][0]))


def test_calibrated_grids_come_before_steps_alone():
    module = Holder()
    grids = grids_of(module)
    holding(module, SimpleNamespace(trained_steps=steps_of(module)), SimpleNamespace(quantization=grids))
    assert Scales.of(module, None, "int8").for_network("model", module.model, None) is grids


def test_of_two_calibrated_networks_the_one_that_is_exported():
    module = Holder()
    grids = grids_of(module)
    others = calibrated(module.other, X)
    others.network = "other"
    holding(module, SimpleNamespace(quantization=grids), SimpleNamespace(quantization=others))
    scales = Scales.of(module, None, "int8")
    assert scales.network is None
    assert scales.for_network("other", module.other, None) is others
    assert scales.for_network("model", module.model, None) is grids


def test_steps_of_two_callbacks_are_taken_together():
    module = Holder()
    steps = steps_of(module)
    first, second = ({name: steps[name] for name in steps if part in name} for part in ("model.0", "model.4"))
    strangers = [SimpleNamespace(grids=other) for other in ({"images": 3}, {"images": (3,)}, [8, 8])]
    holding(module, SimpleNamespace(trained_steps=first), *strangers, SimpleNamespace(trained_steps=second))
    grids = Scales.of(module, None, "int8").for_network("model", module.model, lambda: module.model(X))
    assert list(grids.weights) == ["0.weight", "4.weight"]


# What is refused, before anything is written


def refused(tmp_path, module, message, **options):
    (tmp_path / "n.onnx").write_text("an older file")
    with pytest.raises(ValueError, match=message):
        to_onnx(module, tmp_path / "n.onnx", X, **{"precision": "int8", **options})
    assert (tmp_path / "n.onnx").read_text() == "an older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["n.onnx"]


def test_no_scales(tmp_path):
    message = r"precision 'int8' needs scales, and its Trainer's callbacks hold none; add PTQCallback\(\)"
    refused(tmp_path, mlp(), message)
    refused(tmp_path, holding(mlp()), message)
    refused(tmp_path, holding(mlp(), quantization=None, trained_steps={}), message)
    refused(tmp_path, holding(mlp(), trained_steps={}), "precision 'int4' needs scales", precision="int4")


def test_scales_of_another_network(tmp_path):
    module = Holder()
    holding(module, quantization=grids_of(module))
    refused(
        tmp_path, module, "calibrated for 'model', not for 'other'; name that network with network=", network="other"
    )
    refused(tmp_path, module, "calibrated for 'model', not for ''", network="")
    holding(module, trained_steps=steps_of(module))
    refused(tmp_path, module, "none of the weights that have scales belongs to 'other'", network="other")


def test_weights_that_have_changed_since(tmp_path):
    module = Holder()
    holding(module, quantization=grids_of(module))
    with torch.no_grad():
        module.model[4].weight[0, 0] += 1e-4
    refused(tmp_path, module, "the weights have changed since their scales were found; calibrate again")


def test_provisional_scales_are_not_held_to_the_weights():
    module = Holder()
    grids = grids_of(module)
    with torch.no_grad():
        module.model[4].weight[0, 0] += 1e-4
    assert Scales([grids], provisional=True).for_network("model", module.model, None) is grids
    with pytest.raises(ValueError, match="the weights have changed"):
        Scales([grids]).for_network("model", module.model, None)
    with pytest.raises(ValueError, match="calibrated for 'model', not for 'other'"):
        Scales([grids], provisional=True).for_network("other", module.other, None)


def test_a_weight_whose_elements_have_changed_places_has_changed():
    layer = nn.Linear(4, 3)
    before = fingerprints(layer)
    assert list(before) == ["weight", "bias"]
    layer.weight.data = layer.weight.data.flip(1)
    assert fingerprints(layer)["bias"] == before["bias"]
    assert fingerprints(layer)["weight"] != before["weight"]
    layer.weight.data = layer.weight.data.flip(1)
    assert fingerprints(layer) == before


def test_for_precision():
    module = Holder()
    grids = grids_of(module)
    assert for_precision(grids, "int8") is grids
    with pytest.raises(ValueError, match="precision 'int4' needs weights of at most 4 bits"):
        for_precision(grids, "int4")
    few = calibrated(module.model, X, weight_bits=3, edge_bits=None)
    alone = for_precision(few, "int4")
    assert (alone.integer_activations, alone.activations) == (False, {})
    assert {name: grid.bits for name, grid in alone.weights.items()} == {"0.weight": 3, "4.weight": 3}
    assert few.activations


# From a checkpoint


def fitted(folder, *callbacks):
    """A module that was fitted, and its checkpoint."""
    torch.default_generator.manual_seed(0)
    module = networks.lightning_module(NAMESPACE)
    fitting = networks.trainer(NAMESPACE, callbacks=list(callbacks), max_epochs=1)
    fitting.fit(module, networks.loader(), networks.loader())
    fitting.save_checkpoint(folder / "n.ckpt")
    return module, folder / "n.ckpt"


@pytest.fixture(scope="module")
def calibrated_fit(tmp_path_factory):
    """The module and the checkpoint of a fit with PTQ, and the grids."""
    callback = PTQCallback()
    module, checkpoint = fitted(tmp_path_factory.mktemp("ptq"), callback)
    return module, checkpoint, callback.quantization


def test_a_checkpoint_with_calibrated_grids(calibrated_fit, tmp_path):
    module, checkpoint, grids = calibrated_fit
    fresh = networks.lightning_module(NAMESPACE)
    scales = Scales.of(fresh, torch.load(checkpoint, weights_only=True), "int8")
    assert scales.network == "model"
    found = scales.for_network("model", module.model, None)
    assert found.state().keys() == grids.state().keys()
    assert found.activations == grids.activations
    assert all(torch.equal(found.weights[name].step, grid.step) for name, grid in grids.weights.items())
    to_onnx(module, tmp_path / "attached.onnx", X, precision="int8")
    result = to_onnx(fresh, tmp_path / "loaded.onnx", X, precision="int8", checkpoint=checkpoint)
    assert result.network == "model"
    assert (tmp_path / "loaded.onnx").read_bytes() == (tmp_path / "attached.onnx").read_bytes()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_checkpoint_of_psgd(tmp_path, granularity):
    callback = PSGDCallback(bits=4, granularity=granularity, quantized_validation=False)
    module, checkpoint = fitted(tmp_path, callback)
    scales = Scales.of(networks.lightning_module(NAMESPACE), torch.load(checkpoint, weights_only=True), "int8")
    assert scales.network is None
    network = module.model.eval()
    grids = scales.for_network("model", network, lambda: network(X))
    assert {name: grid.bits for name, grid in grids.weights.items()} == {"0.weight": 4, "4.weight": 4}
    for name, grid in grids.weights.items():
        step, bits = callback.grids[f"model.{name}"]
        assert (step.ndim, bits) == (0 if granularity == "tensor" else 1, 4)
        assert torch.equal(grid.step, step)
    assert grids.network == "model"
    attached = Scales.of(module, None, "int8").for_network("model", network, lambda: network(X))
    assert attached.activations == grids.activations == {}
    assert all(torch.equal(attached.weights[name].step, grid.step) for name, grid in grids.weights.items())


def test_a_checkpoint_of_psgd_that_gathers_weights_at_zero_has_no_grids(tmp_path):
    callback = PSGDCallback(target="zero", eps=1e-3)
    module, checkpoint = fitted(tmp_path, callback)
    assert callback.grids == {}
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", module, "the checkpoint holds none", checkpoint=checkpoint)


def test_a_checkpoint_of_two_psgd_callbacks():
    network = nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, 2))

    def state(name, bits):
        return {"lambda": 1.0, "arguments": {"granularity": "channel", "target": "grid"}, "bits": {name: bits}}

    states = [("0.weight", 4), ("1.weight", 3), ("0.bias", 4), ("elsewhere.weight", 4)]
    others = {"counter": 3, "nothing": None, "history": [1.0], "stranger": {"arguments": {"target": "zero"}}}
    contents = {"callbacks": {**{name: state(name, bits) for name, bits in states}, **others}}
    grids = Scales.of(network, contents, "int8").for_network("", network, lambda: network(X))
    assert {name: grid.bits for name, grid in grids.weights.items()} == {"0.weight": 4, "1.weight": 3}
    assert torch.equal(grids.weights["1.weight"].step, network[1].weight.detach().abs().amax(dim=1) / 3)


def test_a_checkpoint_without_scales(tmp_path):
    module, checkpoint = fitted(tmp_path)
    refused_at = tmp_path / "out"
    refused_at.mkdir()
    refused(refused_at, module, "precision 'int8' needs scales, and the checkpoint holds none", checkpoint=checkpoint)


def test_a_checkpoint_of_before_the_calibration(tmp_path):
    network = nn.Linear(2, 2)
    contents = {"callbacks": {"PTQCallback[ptq]": {"schema": 1, "quantization": None}}}
    message = (
        r"the checkpoint holds none; it was saved before they were found; .*trainer\.save_checkpoint, or calibrate"
    )
    with pytest.raises(ValueError, match=message):
        Scales.of(network, contents, "int8")


def test_a_checkpoint_whose_weights_are_not_those_that_were_calibrated(calibrated_fit, tmp_path):
    module, checkpoint, _ = calibrated_fit
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["model.0.weight"] *= 2
    torch.save(contents, tmp_path / "other.ckpt")
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", module, "the weights have changed", checkpoint=tmp_path / "other.ckpt")


# What goes in and comes out


class Structured(nn.Module):
    """A dict in, and a dict with a list in it out."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, CLASSES)

    def forward(self, batch):
        hidden = torch.relu(self.left(batch["u"]) + self.right(batch["deep"]["v"]))
        return {"logits": self.head(hidden), "more": [hidden, batch["u"]]}


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dicts_at_several_batch_sizes(tmp_path, dynamic):
    network = Structured().eval()

    def batch(rows):
        generator = torch.Generator().manual_seed(rows)
        u, v = (torch.randn(rows, width, generator=generator) for width in (4, 3))
        return {"u": u, "deep": {"v": v}}

    grids = calibrated(network, batch(6))
    holding(network, quantization=grids)
    result = to_onnx(network, tmp_path / "n.onnx", batch(6), precision="int8", dynamic_batch=dynamic)
    assert result.input_names == ("batch_u", "batch_deep_v")
    assert result.output_names == ("logits", "more_0", "more_1")
    assert result.checked_batch_sizes == ((6, 1, 5) if dynamic else (6,))
    assert kernels(tmp_path / "n.onnx") == 3
    for rows in (6, 1, 11) if dynamic else (6,):
        given = batch(rows)
        expected = rounded(network, grids, given)
        found = run(tmp_path / "n.onnx", given["u"], given["deep"]["v"])
        assert (found[0] - expected["logits"]).abs().max() <= 0.02 * expected["logits"].abs().max()
        assert (found[1] - expected["more"][0]).abs().max() <= 1e-4
        assert torch.equal(found[2], given["u"])


def test_a_sample_that_the_network_does_not_take_is_an_error_before_anything_is_written(tmp_path):
    network = Structured().eval()
    u, v = torch.randn(4, 4), torch.randn(4, 3)
    grids = calibrated(network, {"u": u, "deep": {"v": v}})
    holding(network, quantization=grids)
    with pytest.raises(ExportError, match="does not run on the sample"):
        to_onnx(network, tmp_path / "n.onnx", {"u": u}, precision="int8")
    assert list(tmp_path.iterdir()) == []

"""PTQCallback: what it refuses, its numbers by hand, what it logs and shows, and the callbacks beside it."""

from __future__ import annotations

import copy
import json
import logging
import math
from importlib import import_module

import lightning.pytorch as L
import onnx
import pytest
import torch
import yaml
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    DictClassifier,
    NetworkItself,
    NormClassifier,
    difference,
    loader,
    made,
    rows_logged,
    teacher_for,
    trainer,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from mechanisms.test_rounding import added
from torch import nn
from torch.nn import functional as F

from lightning_compress import (
    CompressionReport,
    DistillationCallback,
    ExportCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
)
from lightning_compress.functional.quantizers import mse_grid, quantization_grid, range_grid
from lightning_compress.mechanisms.calibration import Calibration, Settings
from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid

ROWS = 2 * BATCH  # of the validation


def fitted(ptq, kind=NormClassifier, *callbacks, first=True, **settings):
    module = made(kind)
    fitting = trainer(*([ptq, *callbacks] if first else [*callbacks, ptq]), **settings)
    fitting.fit(module, loader(kind), loader(kind, rows=ROWS))
    return module, fitting


def measured(module, *callbacks):
    [metrics] = trainer(*callbacks).validate(module, loader(type(module), rows=ROWS), verbose=False)
    return metrics


def bits_of(ptq):
    return {name: grid.bits for name, grid in ptq.quantization.weights.items()}


# By hand


def on_weight_grid(weight, bits):
    """The nearest points of the grid of each output channel."""
    step = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(weight / step) * step


def on_activation_grid(x, seen, bits):
    """The nearest points of the grid over the range that was seen, and 0."""
    low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
    step = torch.tensor((high - low) / (2**bits - 1))
    zero = torch.round(torch.tensor(-low) / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 2**bits - 1) - zero) * step


def by_hand(module, bits=(8, 8), activation_bits=8, statistics=None):
    """The loss of the small network of the contract with quantised weights and activations, in its validation."""
    convolution, linear = module.model[0], module.model[-1]
    norm = module.model[1] if isinstance(module.model[1], nn.BatchNorm2d) else None
    first, second = (
        on_weight_grid(layer.weight.detach(), own) for layer, own in ((convolution, bits[0]), (linear, bits[1]))
    )

    grids = None  # whose steps say what integer kernels add

    def convolved(x):
        bias = convolution.bias
        if grids is not None:
            folded = None if norm is None else copy.copy(norm)
            if statistics is not None and folded is not None:
                folded._buffers = {**norm._buffers, "running_mean": statistics[0], "running_var": statistics[1]}
            bias = added(grids, "x", "first", bias, folded)
        maps = F.conv2d(x, first, bias, padding=1)
        if norm is not None:
            mean, variance = statistics or (norm.running_mean, norm.running_var)
            maps = F.batch_norm(maps, mean, variance, norm.weight, norm.bias)
        return F.relu(maps)

    def images(**settings):
        return torch.cat([x for x, _ in loader(**settings)]).reshape(-1, 1, 2, 4)

    losses = []
    with torch.no_grad():
        seen = images()
        maps_seen = convolved(seen)
        if activation_bits is not None:
            grids = Grids(
                weights={
                    name: WeightGrid(quantization_grid(layer.weight, own, axis=0), own)
                    for name, layer, own in (("first", convolution, bits[0]), ("second", linear, bits[1]))
                },
                activations={
                    name: ActivationGrid(
                        *range_grid(own.min().item(), own.max().item(), activation_bits), activation_bits
                    )
                    for name, own in (("x", seen), ("maps", maps_seen))
                },
            )
        bias = linear.bias if grids is None else added(grids, "maps", "second", linear.bias)
        for x, y in loader(rows=ROWS):
            x = x.reshape(-1, 1, 2, 4)
            x = x if activation_bits is None else on_activation_grid(x, seen, activation_bits)
            maps = convolved(x)
            maps = maps if activation_bits is None else on_activation_grid(maps, maps_seen, activation_bits)
            losses.append(F.cross_entropy(F.linear(maps.flatten(1), second, bias), y))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("kind", [Classifier, NormClassifier])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (8, None), (6, 5), (4, None)])
def test_the_metrics_are_those_computed_by_hand(kind, weight_bits, activation_bits):
    ptq = PTQCallback(
        weight_bits=weight_bits, activation_bits=activation_bits, weight_range="max", reestimate_batchnorm=False
    )
    module, fitting = fitted(ptq, kind)
    expected = by_hand(module, (weight_bits, weight_bits), activation_bits)
    assert ptq.metrics == {"val_loss": pytest.approx(expected, abs=1e-5)}
    plain = measured(module)["val_loss"]
    assert plain == float(fitting.callback_metrics["val_loss"])
    assert abs(plain - expected) > 5e-6
    assert len(ptq.quantization.activations) == (0 if activation_bits is None else 2)


@pytest.mark.parametrize("activation_bits", [8, None])
def test_batch_norm_is_estimated_for_the_quantised_weights(activation_bits):
    """And the module keeps its own statistics."""
    settings = {"weight_bits": 3, "edge_bits": None, "weight_range": "max", "activation_bits": activation_bits}
    plain, _ = fitted(PTQCallback(**settings, reestimate_batchnorm=False))
    ptq = PTQCallback(**settings)
    module, _ = fitted(ptq)
    assert difference(module, plain) == 0
    convolution = module.model[0]
    weight = on_weight_grid(convolution.weight.detach(), 3)
    maps = [F.conv2d(x.reshape(-1, 1, 2, 4), weight, convolution.bias, padding=1) for x, _ in loader()]
    statistics = [torch.stack([getattr(x, which)((0, 2, 3)) for x in maps]).mean(0) for which in ("mean", "var")]
    [(name, found)] = ptq.quantization.statistics.items()
    assert name == "1"
    assert all(torch.allclose(ours, by, atol=1e-6) for ours, by in zip(found, statistics, strict=True))
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module, (3, 3), activation_bits, statistics), abs=1e-5)
    assert ptq.metrics["val_loss"] != pytest.approx(by_hand(module, (3, 3), activation_bits), abs=1e-3)


@pytest.mark.parametrize(
    ("weight_bits", "reestimate", "expected"),
    [(8, "auto", False), (5, "auto", False), (4, "auto", True), (4, False, False), (8, True, True)],
)
def test_when_batch_norm_is_estimated(weight_bits, reestimate, expected):
    ptq = PTQCallback(weight_bits=weight_bits, reestimate_batchnorm=reestimate)
    fitted(ptq)
    assert list(ptq.quantization.statistics) == (["1"] if expected else [])


def test_a_batch_norm_that_the_user_froze_keeps_its_statistics():
    class Frozen(NormClassifier):
        def build(self):
            super().build()
            self.model.insert(0, nn.Sequential(nn.Unflatten(1, (1, 8)), nn.BatchNorm1d(1), nn.Flatten()))

        def on_train_start(self):
            self.model[0][1].eval()

    ptq = PTQCallback(weight_bits=4)
    module, _ = fitted(ptq, Frozen)
    assert list(ptq.quantization.statistics) == ["2"]
    assert (module.model[0][1].training, module.model[2].training) == (False, True)


def test_the_clipped_range_has_the_least_squared_error():
    ptq, largest = PTQCallback(weight_bits=4), PTQCallback(weight_bits=4, weight_range="max")
    module, _ = fitted(ptq, Classifier)
    fitted(largest, Classifier)
    for name, grid in ptq.quantization.weights.items():
        rows = module.model.get_parameter(name).detach().flatten(1)

        def error(step, rows=rows):
            return ((torch.clamp(torch.round(rows / step), -7, 7) * step - rows) ** 2).sum(1)

        whole = largest.quantization.weights[name].step[:, None]
        tried = torch.stack([error(whole * share / 100) for share in range(1, 101)])
        assert torch.allclose(whole[:, 0], rows.abs().amax(1) / 7)
        assert torch.allclose(error(grid.step[:, None]), tried.amin(0), atol=1e-7)
        assert bool((grid.step < whole[:, 0]).any())


class Deep(Classifier):
    def build(self):
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("settings", "edges", "inner"),
    [
        ({"weight_bits": 3, "activation_bits": 4}, (8, 8), (3, 4)),
        ({"weight_bits": 4, "activation_bits": 4}, (4, 4), (4, 4)),
        ({"weight_bits": 3, "activation_bits": 4, "edge_bits": None}, (3, 4), (3, 4)),
        ({"weight_bits": 4, "activation_bits": 4, "edge_bits": 6}, (6, 6), (4, 4)),
    ],
)
def test_bits_of_the_edges(settings, edges, inner):
    """The first and the last weight, and the input, which is an edge of the activations."""
    ptq = PTQCallback(**settings)
    fitted(ptq, Deep)
    assert bits_of(ptq) == {
        "0.0.weight": edges[0],
        "1.0.weight": inner[0],
        "2.0.weight": inner[0],
        "3.weight": edges[0],
    }
    first, *others = ptq.quantization.activations.items()
    assert first[0].startswith("in:")
    assert [first[1].bits, *(grid.bits for _, grid in others)] == [edges[1], inner[1], inner[1], inner[1]]


@pytest.mark.parametrize(("bits", "activation_bits"), [((4, 8), 8), ((8, 3), None)])
def test_layers_with_bits_of_their_own_by_hand(bits, activation_bits):
    own = dict(zip(("type:Conv2d", "model.4"), bits, strict=True))
    ptq = PTQCallback(layer_bits=own, activation_bits=activation_bits, weight_range="max", reestimate_batchnorm=False)
    module, _ = fitted(ptq)
    assert bits_of(ptq) == {"0.weight": bits[0], "4.weight": bits[1]}
    assert ptq.metrics == {"val_loss": pytest.approx(by_hand(module, bits, activation_bits), abs=1e-5)}
    assert ptq.weight_bits_given == min(bits)


def test_the_last_selector_of_bits_counts_and_ranges_go_by_bits():
    """Also before those of the edges; new statistics of batch norm are worth it for the fewest bits."""
    ptq = PTQCallback(weight_bits=3, layer_bits={"model": 8, "model.1": 4, "re:model[.]3": 5})
    module, _ = fitted(ptq, Deep)
    assert bits_of(ptq) == {"0.0.weight": 8, "1.0.weight": 4, "2.0.weight": 8, "3.weight": 5}
    for name, grid in ptq.quantization.weights.items():
        find = quantization_grid if grid.bits == 8 else mse_grid
        assert torch.equal(grid.step, find(module.model.get_parameter(name), grid.bits, axis=0))
    few = PTQCallback(layer_bits={"model.4": 4})
    fitted(few)
    assert list(few.quantization.statistics) == ["1"]


@pytest.mark.parametrize(
    ("settings", "match", "error"),
    [
        (
            {"layer_bits": ["model"]},
            r"layer_bits must be a mapping from selectors of layers to bits, .*\['model'\]",
            TypeError,
        ),
        (
            {"layer_bits": {"modl.0": 4}},
            r"layer_bits has 'modl.0', which matches no module; did you mean 'model.0'\?",
            ValueError,
        ),
        (
            {"layer_bits": {"model.0": 4}, "exclude": ["model.0"]},
            r"layer_bits has 'model.0', and nothing of it \(Convolution\) runs as a convolution or a linear layer of",
            ValueError,
        ),
    ],
)
def test_bits_of_layers_that_cannot_have_them(settings, match, error):
    with pytest.raises(error, match=match):
        fitted(PTQCallback(**settings), Classifier)


@pytest.mark.slow
def test_bits_of_layers_in_file_report_and_checkpoint(tmp_path):
    """The file packs what fits into 4 bits; scales of a checkpoint count for the same bits, as written before too."""
    ptq = PTQCallback(layer_bits={"model.0": 4}, activation_bits=None)
    export = ExportCallback(tmp_path / "n.onnx", precision="int4", fp32_comparison=False)
    report = CompressionReport(path=tmp_path, latency=False)
    fitted(ptq, Classifier, export, report)
    types = {entry.name: entry.data_type for entry in onnx.load(tmp_path / "n.onnx").graph.initializer}
    assert types["quantized.0_conv2d_0_weight"] == onnx.TensorProto.INT4
    assert types["quantized.3_linear_0_weight"] == onnx.TensorProto.INT8
    layers = json.loads((tmp_path / "compression_report.json").read_text())["layers"]
    assert {layer["name"]: layer["bits"] for layer in layers} == {"model.0": 4, "model.3": 8}
    state = ptq.state_dict()
    same, other = (PTQCallback(layer_bits=bits, activation_bits=None) for bits in ({"model.0": 4}, None))
    same.load_extra_state(state)
    assert bits_of(same) == bits_of(ptq)
    other.load_extra_state(state)
    assert other.quantization is None
    del state["arguments"]["layer_bits"]
    other.load_extra_state(state)
    assert bits_of(other) == bits_of(ptq)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trains for 4 bits")
def test_bits_of_layers_come_before_what_psgd_has_trained():
    ptq = PTQCallback(weight_bits=4, layer_bits={"model.0": 8})
    with pytest.warns(UserWarning, match="layer_bits gives '0.weight' other bits than they were trained for"):
        fitted(ptq, Classifier, PSGDCallback(4, quantized_validation=False))
    assert bits_of(ptq) == {"0.weight": 8, "3.weight": 4}


@pytest.mark.parametrize("observer", ["moving_average", "percentile", "mse", "entropy"])
def test_observers(observer):
    """Those that clip lie inside of what was seen."""
    ranges = {}
    for kind in ("minmax", observer):
        ptq = PTQCallback(observer=observer if kind == observer else "minmax", activation_bits=4)
        fitted(ptq, Classifier)
        ranges[kind] = [grid.scale * 15 for grid in ptq.quantization.activations.values()]
    seen = torch.cat([x for x, _ in loader()])
    assert ranges["minmax"][0] == pytest.approx(float(seen.max() - seen.min()), rel=1e-6)
    assert ranges[observer] != ranges["minmax"]
    assert all(own <= 1.01 * whole for own, whole in zip(ranges[observer], ranges["minmax"], strict=True))
    assert all(math.isfinite(own) and own > 0.3 for own in ranges[observer])


def test_the_share_of_the_data_that_is_looked_at():
    """The cap counts samples, of whole batches; they are run once to tell what there is to be quantised."""
    scales = {}
    for most, batches in ((1, 1), (20, 3), (64, 8), (512, 8)):
        sizes = []

        class Counting(Classifier):
            def on_train_end(self, sizes=sizes):
                self.model.register_forward_hook(lambda part, args, output: sizes.append((part.training, len(output))))

        ptq = PTQCallback(max_samples=most)
        trainer(ptq, limit_val_batches=0).fit(made(Counting), loader())
        assert sizes == [(False, BATCH)] * 2 * batches
        [first, _] = ptq.quantization.activations.values()
        seen = torch.cat([x for x, _ in list(loader())[:batches]])
        assert first.scale == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-6)
        scales[most] = first.scale
        assert ptq.metrics == {}
    assert scales[1] < scales[64]


class Uneven(Classifier):
    """The channels between its layers have ranges that differ by far."""

    def build(self):
        super().build()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            scale = torch.logspace(-1.5, 1.5, 8)
            self.model[0].weight *= scale[:, None]
            self.model[0].bias *= scale
            self.model[2].weight /= scale

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_equalisation_helps_where_channels_differ():
    losses, module = {}, None
    for equalise in (False, True):
        ptq = PTQCallback(activation_bits=4, cross_layer_equalization=equalise)
        module, fitting = fitted(ptq, Uneven)
        losses[equalise] = ptq.metrics["val_loss"]
        assert list(ptq.quantization.divisors) == (["0:linear:0", "2:linear:0"] if equalise else [])
        assert fitting.validate(module, loader(rows=ROWS), verbose=False) == [ptq.metrics]
    plain = measured(module)["val_loss"]
    assert abs(losses[True] - plain) < 0.5 * abs(losses[False] - plain)


def test_bias_correction_takes_the_mean_error_of_each_channel_back():
    ptq = PTQCallback(weight_bits=3, edge_bits=None, weight_range="max", bias_correction=True, activation_bits=None)
    module, _ = fitted(ptq, Classifier)
    convolution = module.model[0]
    x = torch.cat([x for x, _ in loader()]).reshape(-1, 1, 2, 4)
    lost = convolution.weight.detach() - on_weight_grid(convolution.weight.detach(), 3)
    found = ptq.quantization.biases["0:conv2d:0"]
    assert torch.allclose(found, F.conv2d(x, lost, padding=1).mean((0, 2, 3)), atol=1e-6)
    assert float(found.abs().max()) > 1e-4
    assert list(ptq.quantization.biases) == ["0:conv2d:0", "3:linear:0"]


# What is selected


@pytest.mark.parametrize(
    ("settings", "quantised"),
    [
        ({}, ["0.weight", "3.weight"]),
        ({"layers": ["type:Linear"]}, ["3.weight"]),
        ({"layers": ["model.0"]}, ["0.weight"]),
        ({"layers": ["model"]}, ["0.weight", "3.weight"]),
        ({"layers": ["re:model[.]3"]}, ["3.weight"]),
        ({"exclude": ["model.3"]}, ["0.weight"]),
        ({"layers": ["model.*"], "exclude": ["type:Conv2d"]}, ["3.weight"]),
    ],
)
def test_layers_and_exclude(settings, quantised, caplog):
    ptq = PTQCallback(**settings)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        fitted(ptq, Classifier)
    assert list(ptq.quantization.weights) == quantised
    left = [name for name in ("0.weight", "3.weight") if name not in quantised]
    assert [name for name in ptq.quantization.left_in_float if name.endswith("weight")] == left
    assert f"ptq: {len(quantised)} weight{'s' if len(quantised) > 1 else ''} of 8 bits and" in caplog.text
    assert all(f"'{name}'" in caplog.text for name in left)


class Attention(Classifier):
    def build(self):
        self.model = AttentionNetwork()


class AttentionNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = x.reshape(-1, 2, 4)
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


def test_projections_of_attention_are_quantised_and_named():
    ptq = PTQCallback()
    module, _ = fitted(ptq, Attention)
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert list(ptq.quantization.weights) == names
    assert ptq.metrics["val_loss"] == pytest.approx(measured(module)["val_loss"], abs=0.02)
    assert ptq.metrics != measured(module)
    alone = PTQCallback(exclude=["model.attention"])
    fitted(alone, Attention)
    assert list(alone.quantization.weights) == ["head.weight"]


@pytest.mark.parametrize(
    ("kind", "network", "names"),
    [
        (NetworkItself, "", ["first.weight", "second.weight"]),
        (DictClassifier, "model", ["body.0.weight", "body.3.weight"]),
        (Classifier, "model", ["0.weight", "3.weight"]),
    ],
)
def test_the_network_is_the_one_that_the_step_calls(kind, network, names):
    ptq = PTQCallback()
    module, fitting = fitted(ptq, kind)
    assert ptq.quantization.network == network
    assert list(ptq.quantization.weights) == names
    assert fitting.validate(module, loader(kind, rows=ROWS), verbose=False) == [ptq.metrics]
    assert ptq.metrics != measured(module)


class Parts(Classifier):
    """The step calls two modules in a row."""

    def build(self):
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def task_loss(self, batch):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


def test_the_network_may_be_named():
    ptq = PTQCallback(network="body")
    module, _ = fitted(ptq, Parts)
    assert (ptq.quantization.network, list(ptq.quantization.weights)) == ("body", ["0.weight"])
    other = PTQCallback(network="head")
    same, _ = fitted(other, Parts)
    assert list(other.quantization.weights) == ["weight"]
    assert difference(module, same) == 0
    assert ptq.metrics != other.metrics


def test_two_parts_are_quantised_by_a_callback_each():
    """Each leaves the other's part in float, and after the fit both are shown."""
    parts = [PTQCallback(weight_bits=4, network=name, name=name) for name in ("body", "head")]
    module, fitting = fitted(parts[0], Parts, parts[1])
    alone = PTQCallback(weight_bits=4, network="body")
    fitted(alone, Parts)
    assert [list(ptq.quantization.weights) for ptq in parts] == [["0.weight"], ["weight"]]
    [shown] = fitting.validate(module, loader(rows=ROWS), verbose=False)
    assert parts[0].metrics == parts[1].metrics == shown
    assert shown not in [measured(module), alone.metrics]
    assert shown["val_loss"] == pytest.approx(measured(module)["val_loss"], abs=0.1)
    with pytest.raises(ValueError, match="'ptq' and 'other' quantise one network; keep one of them"):
        fitted(PTQCallback(), Parts, PTQCallback(name="other"))


@pytest.mark.parametrize(("inner", "outer"), [("model.0", "model"), ("model", "")])
def test_a_part_and_what_it_lies_in_are_refused(inner, outer):
    parts = [PTQCallback(network=inner, name="inner"), PTQCallback(network=outer, name="outer")]
    message = (
        f"'inner' quantises '{inner}', which lies in '{outer or 'self'}' of 'outer', so it would be quantised twice"
    )
    for order in (parts, parts[::-1]):
        with pytest.raises(ValueError, match=message):
            fitted(order[0], Classifier, order[1])
    fitted(PTQCallback(network="body"), Parts, PTQCallback(network="head", name="body2"))


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number from 2 to 8, got 1"),
        ({"weight_bits": 16}, "weight_bits must be a whole number from 2 to 8, got 16"),
        ({"weight_bits": None}, "weight_bits must be a whole number from 2 to 8, got None"),
        ({"activation_bits": 8.0}, "activation_bits, if not None, must be a whole number from 2 to 8, got 8.0"),
        ({"edge_bits": True}, "edge_bits, if neither .auto. nor None, must be a whole number from 2 to 8, got True"),
        ({"layer_bits": {"model": 1}}, "layer_bits.'model'. must be a whole number from 2 to 8, got 1"),
        ({"observer": "min_max"}, "observer must be one of minmax, .*, got 'min_max'; did you mean 'minmax'?"),
        ({"weight_range": "mae"}, "weight_range must be one of auto, max, mse, got 'mae'"),
        ({"reestimate_batchnorm": "yes"}, "reestimate_batchnorm must be True or False, got 'yes'"),
        ({"max_samples": 0}, "max_samples must be a whole number of at least 1, got 0"),
        ({"max_samples": 0.5}, "max_samples must be a whole number of at least 1, got 0.5"),
        ({"cross_layer_equalization": 1}, "cross_layer_equalization must be True or False, got 1"),
        ({"bias_correction": "no"}, "bias_correction must be True or False, got 'no'"),
        ({"name": "a/b"}, "name must be a non-empty string without '/', got 'a/b'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        PTQCallback(**settings)


def refused(ptq, kind, match, *callbacks, error=Exception, steps=1):
    """A fit that is refused after so many steps, and leaves nothing on the module."""
    module = made(kind)
    fitting = trainer(ptq, *callbacks, num_sanity_val_steps=0)
    with pytest.raises(error, match=match):
        fitting.fit(module, loader(kind), loader(kind, rows=ROWS))
    assert fitting.global_step == steps
    assert {"forward", "training_step"}.isdisjoint(vars(module))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert ptq.quantization is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["modle.0"]}, "layers has 'modle.0', which matches no module; did you mean 'model.0'?"),
        (
            {"layers": ["type:Conv3d"]},
            r"layers has 'type:Conv3d', which matches no module; did you mean 'type:Conv.*'\?",
        ),
        ({"exclude": ["*.fc"]}, r"exclude has '\*\.fc', which matches no module"),
        ({"network": "net"}, "network names 'net', not a module of Classifier"),
    ],
)
def test_names_that_match_nothing_are_refused_before_the_first_step(settings, message):
    refused(PTQCallback(**settings), Classifier, message, error=ValueError, steps=0)


class Mixed(Classifier):
    """With layers that have no integer kernel."""

    def build(self):
        self.model = MixedNetwork()


class MixedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8)
        self.first, self.widen = nn.Linear(8, 4), nn.ConvTranspose1d(1, 1, 3)
        self.recurrent, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x + self.table((x[:, 0] > 0).long()))
        return self.head(self.recurrent(self.widen(x[:, None]))[0][:, -1])


@pytest.mark.parametrize("name", ["table", "widen", "recurrent"])
def test_a_selected_layer_without_an_integer_kernel_is_refused(name):
    kind = type(getattr(MixedNetwork(), name)).__name__
    message = rf"layers has 'model.{name}', and nothing of it \({kind}\) runs as a convolution or a linear layer"
    refused(PTQCallback(layers=["model.head", f"model.{name}"]), Mixed, message, error=ValueError)
    refused(PTQCallback(layers=[f"type:{kind}"]), Mixed, "no weight would be quantised|nothing of it")


def test_layers_without_an_integer_kernel_are_listed_as_left_in_float():
    ptq, report = PTQCallback(), CompressionReport(latency=False, path="unused")
    module, _ = fitted(ptq, Mixed, report, fast_dev_run=2)
    assert list(ptq.quantization.weights) == ["first.weight", "head.weight"]
    left = ptq.quantization.left_in_float
    assert {"table.weight", "widen.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"} <= set(left)
    assert any("embedding (1)" in entry for entry in left)
    assert any("ptq: 2 weights of 8 bits and" in note and "'table.weight'" in note for note in report.result.notes)
    assert difference(made(Mixed), module) > 0


class Spectrum(nn.Module):
    """Computes with complex numbers."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Linear(5, 5, dtype=torch.complex64)

    def forward(self, x):
        return torch.fft.irfft(self.mixing(torch.fft.rfft(x)), n=8)


class Fourier(Classifier):
    def build(self):
        self.model = nn.Sequential(nn.Linear(8, 8), Spectrum(), nn.Linear(8, 3))


def test_complex_layers_are_left_in_float():
    ptq = PTQCallback()
    fitted(ptq, Fourier, fast_dev_run=2)
    assert list(ptq.quantization.weights) == ["0.weight", "2.weight"]
    assert "1.mixing.weight" in ptq.quantization.left_in_float
    refused(PTQCallback(layers=["model.1"]), Fourier, "no weight would be quantised.* of real numbers")


class Scripted(Classifier):
    def build(self):
        super().build()
        self.model[1] = torch.jit.script(self.model[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_part_is_refused():
    refused(PTQCallback(), Scripted, r"'1' is scripted \(torch.jit\).*use it unscripted")


def test_several_networks_are_refused_and_network_is_named():
    refused(
        PTQCallback(),
        Parts,
        "calls 2 modules with parameters: 'body', 'head'; choose the network with network=",
        steps=0,
    )


def test_a_chain_is_refused():
    distillation = DistillationCallback(teacher_for(Parts), student=["body", "head"])
    message = "the student is the chain 'body' to 'head', and one network is quantised: name it with network="
    refused(PTQCallback(), Parts, message, distillation, error=ValueError)


def test_a_step_without_a_network_is_refused():
    class Bare(Classifier):
        def build(self):
            self.weight = nn.Parameter(torch.zeros(3, 8))

        def task_loss(self, batch):
            return F.cross_entropy(batch[0] @ self.weight.T, batch[1])

    refused(PTQCallback(), Bare, "first training step called no module with parameters")


def test_nan_weights_are_refused():
    class Broken(Classifier):
        def build(self):
            super().build()
            self.model[3].weight.data[0, 0] = float("nan")

    refused(PTQCallback(), Broken, "the weight '0.weight' cannot be quantised: a weight is NaN or infinite")


def test_new_statistics_without_batch_norm_are_refused_after_the_first_step():
    message = "reestimate_batchnorm has no effect: no layer of the network keeps batch-norm statistics"
    refused(PTQCallback(weight_bits=4, reestimate_batchnorm=True), Classifier, message, error=ValueError)


def test_a_network_that_is_never_called_in_a_test_is_no_silent_float():
    class Elsewhere(Classifier):
        def build(self):
            super().build()
            self.other = nn.Linear(8, 3)

        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self.other(batch[0]), batch[1]))

    module, fitting = fitted(PTQCallback(), Elsewhere)
    with pytest.raises(
        RuntimeError, match=r"had no effect: Elsewhere never called 'model'.*name the part that it calls"
    ):
        fitting.test(module, loader(), verbose=False)
    assert "forward" not in vars(module.model)


# What is logged, and said


def test_loggers_get_the_quantised_metrics(tmp_path):
    ptq = PTQCallback(name="w8")
    module, fitting = fitted(ptq, Classifier, logger=CSVLogger(tmp_path))
    rows = rows_logged(fitting.logger)
    [row] = [row for row in rows if row.get("compress/w8/val_loss")]
    assert float(row["compress/w8/val_loss"]) == pytest.approx(ptq.metrics["val_loss"], rel=1e-6)
    assert int(row["step"]) == STEPS
    assert "compress/w8/val_loss" not in fitting.callback_metrics
    assert "val_loss" in measured(module)


def test_remarks():
    ptq = PTQCallback(activation_bits=None, exclude=["model.3"])
    assert ptq.remarks() == []
    fitted(ptq, Classifier)
    [remark] = ptq.remarks()
    assert remark.startswith("ptq: 1 weight of 8 bits and no activations are quantised; left in float: '3.weight'")


def test_a_validation_that_fails_on_the_copy_is_a_warning():
    class OnlyInItsFit(Classifier):
        def validation_step(self, batch, batch_idx):
            if not getattr(self.trainer, "callbacks", None):
                raise OSError("needs what the user's Trainer has")
            super().validation_step(batch, batch_idx)

    ptq = PTQCallback()
    with pytest.warns(UserWarning, match="the validation of the quantised network failed: OSError: needs what"):
        fitted(ptq, OnlyInItsFit)
    assert ptq.metrics == {}
    assert bits_of(ptq) == {"0.weight": 8, "3.weight": 8}


# Beside others


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_grids_that_psgd_has_trained_for(first, granularity):
    psgd = PSGDCallback(4, granularity=granularity, quantized_validation=False)
    ptq = PTQCallback(weight_bits=4, activation_bits=None)
    module, _ = fitted(ptq, Classifier, psgd, first=first)
    for name, grid in ptq.quantization.weights.items():
        step, bits = psgd.grids[f"model.{name}"]
        assert grid.bits == bits == 4
        assert torch.equal(grid.step, step)
        rows = module.model.get_parameter(name).detach().flatten(1).abs()
        assert torch.allclose(step, (rows.max() if granularity == "tensor" else rows.amax(1)) / 7)
    own = PTQCallback(weight_bits=4, activation_bits=None, weight_range="mse")
    fitted(own, Classifier, PSGDCallback(4, granularity=granularity, quantized_validation=False), first=first)
    assert all(grid.step.shape == (len(grid.step),) for grid in own.quantization.weights.values())
    assert own.metrics != ptq.metrics


def test_edges_have_the_bits_that_psgd_gave_them():
    psgd, ptq = PSGDCallback(3, quantized_validation=False), PTQCallback(weight_bits=3, activation_bits=None)
    fitted(ptq, Deep, psgd)
    assert bits_of(ptq) == {name.removeprefix("model."): psgd.grids[name][1] for name in psgd.grids if "weight" in name}
    assert list(bits_of(ptq).values()) == [8, 3, 3, 8]


@pytest.mark.parametrize("first", [True, False])
def test_other_bits_than_psgd_are_a_warning(first):
    psgd, ptq = PSGDCallback(4, quantized_validation=False), PTQCallback(weight_bits=8, activation_bits=None)
    with pytest.warns(UserWarning, match="'psgd' trains for 4 bits, and weight_bits=8: .*give weight_bits=4") as caught:
        module, _ = fitted(ptq, Classifier, psgd, first=first)
    assert len([entry for entry in caught if "trains for 4 bits" in str(entry.message)]) == 1
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module, activation_bits=None), abs=1e-5)


def test_psgd_towards_zero_has_no_grid_to_lose():
    psgd = PSGDCallback(4, target="zero", eps=1e-3, quantized_validation=False)
    ptq = PTQCallback(activation_bits=None)
    module, _ = fitted(ptq, Classifier, psgd)  # a warning would be an error
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module, activation_bits=None), abs=1e-5)


def test_two_psgd_each_give_the_grids_of_their_layers():
    parts = [
        PSGDCallback(4, layers=[f"model.{index}"], name=f"p{index}", quantized_validation=False) for index in (0, 3)
    ]
    ptq = PTQCallback(weight_bits=4, activation_bits=None)
    fitted(ptq, Classifier, *parts)
    assert [grid.step.ndim for grid in ptq.quantization.weights.values()] == [0, 0]


def test_equalised_weights_are_not_put_on_the_grids_of_others():
    """The grids of PSGD are those of the weights as they are; scaled channels would fall off them."""
    psgd = PSGDCallback(4, gradient_scale=1e-3, granularity="channel", quantized_validation=False)
    ptq = PTQCallback(weight_bits=4, activation_bits=None, cross_layer_equalization=True)
    module, _ = fitted(ptq, Uneven, psgd)
    assert len(ptq.quantization.factors) == 2
    assert ptq.metrics["val_loss"] == pytest.approx(measured(module)["val_loss"], abs=5e-3)


def test_a_stranger_with_grids_is_left_alone():
    class ImageGrids(L.Callback):
        grids = {"images": 3}

    ptq = PTQCallback()
    module, _ = fitted(ptq, Classifier, ImageGrids())
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module), abs=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_pruned_weights_stay_zero(first):
    ptq = PTQCallback()
    module, fitting = fitted(ptq, Classifier, PruningCallback(0.5), first=first)
    assert sum(int((value == 0).sum()) for value in module.parameters() if value.ndim > 1) == 66
    assert list(ptq.quantization.weights) == ["0.weight", "3.weight"]
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module), abs=1e-5)
    seen = {}
    module.model[3].register_forward_hook(lambda part, args, out: seen.update(zeros=int((part.weight == 0).sum())))
    assert fitting.validate(module, loader(rows=ROWS), verbose=False) == [ptq.metrics]
    assert seen["zeros"] == int((module.model[3].weight == 0).sum())


@pytest.mark.parametrize("average", ["EMA", "SWA"])
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_averaged_weights_are_what_is_quantised(average):
    def other():
        if average == "EMA":
            return EMAWeightAveraging(decay=0.5)
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)

    found = {}
    for first in (True, False):
        ptq = PTQCallback()
        module, _ = fitted(ptq, NormClassifier, other(), first=first, max_epochs=3)
        assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module), abs=1e-5)
        found[first] = ptq.quantization.state()["activations"]
    assert found[True] == found[False]
    plain = made(NormClassifier)
    trainer(other(), max_epochs=3).fit(plain, loader(NormClassifier), loader(NormClassifier, rows=ROWS))
    assert difference(module, plain) == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_distilled_network_is_quantised(first):
    ptq = PTQCallback()
    module, fitting = fitted(ptq, Classifier, DistillationCallback(teacher_for(Classifier)), first=first)
    alone = made(Classifier)
    trainer(DistillationCallback(teacher_for(Classifier))).fit(alone, loader(), loader(rows=ROWS))
    assert difference(module, alone) == 0
    assert ptq.metrics["val_loss"] == pytest.approx(by_hand(module), abs=1e-5)
    assert set(ptq.metrics) == {"val_loss"}
    assert "compress/kd/val_loss" in fitting.callback_metrics


def compiled(module, form):
    """What the user hands to the Trainer."""
    if form == "child":
        module.model = torch.compile(module.model, backend="eager")
    elif form == "in place":
        module.model.compile(backend="eager")
    else:
        return torch.compile(module, backend="eager")
    return module


class WithData(NormClassifier):
    def train_dataloader(self):
        return loader()


@pytest.mark.usefixtures("fresh_compiler")
def test_batch_norm_is_folded_in_a_compiled_network_too():
    """Otherwise what it is given would be rounded."""
    network, found = made(NormClassifier).model.eval(), []
    for each in (network, torch.compile(network, backend="eager")):
        calibration = Calibration(each, Settings())
        calibration.discover(lambda each=each: (each(x) for x, _ in loader()))
        found.append(calibration.grids)
    assert found[0].folds == found[1].folds == {"0:conv2d:0": "1"}
    assert list(found[0].sites) == list(found[1].sites)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_is_calibrated_without_a_fit():
    plain, ptq = PTQCallback(), PTQCallback()
    metrics = measured(made(WithData), plain)
    assert measured(compiled(made(WithData), "child"), ptq) == metrics
    assert ptq.quantization.activations == plain.quantization.activations
    assert len(plain.quantization.activations) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["child", "in place", "module"])
def test_a_compiled_fit(form):
    """The same grids and metrics as without, and the module shows them when it is validated."""
    plain, ptq, module = PTQCallback(weight_bits=4), PTQCallback(weight_bits=4), made(NormClassifier)
    untouched, _ = fitted(plain)
    handed, fitting = compiled(module, form), trainer(ptq)
    fitting.fit(handed, loader(), loader(rows=ROWS))
    assert ptq.quantization.network == "model"
    assert ptq.quantization.activations == plain.quantization.activations
    assert ptq.metrics == plain.metrics
    assert fitting.validate(handed, loader(rows=ROWS), verbose=False) == [ptq.metrics]
    assert trainer().validate(handed, loader(rows=ROWS), verbose=False) == [measured(untouched)]


@pytest.mark.sample
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision(precision, weight_bits):
    ptq = PTQCallback(weight_bits=weight_bits)
    module, fitting = fitted(ptq, precision=precision)
    plain_loss = float(fitting.callback_metrics["val_loss"])
    plain = made(NormClassifier)
    trainer(precision=precision).fit(plain, loader(), loader(rows=ROWS))
    assert difference(module, plain) == 0
    assert bits_of(ptq) == {"0.weight": weight_bits, "4.weight": weight_bits}
    assert list(ptq.quantization.statistics) == (["1"] if weight_bits == 4 else [])
    assert all(grid.step.dtype == torch.float32 for grid in ptq.quantization.weights.values())
    [shown] = fitting.validate(module, loader(rows=ROWS), verbose=False)
    assert shown["val_loss"] == pytest.approx(ptq.metrics["val_loss"], abs=1e-6 if "64" in precision else 0.02)
    assert shown["val_loss"] == pytest.approx(plain_loss, abs=0.05 if weight_bits == 8 else 0.3)
    assert shown["val_loss"] != plain_loss


# Both packages, and YAML


def boring(namespace):
    """A module with a network of two layers, and its datamodule."""
    demos = import_module(f"{namespace}.demos.boring_classes")

    class Boring(demos.BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(self(batch)))

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(self(batch)))

    return Boring, demos.BoringDataModule


SILENT = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "limit_train_batches": 4,
    "limit_val_batches": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_trainers_of_both_packages(namespace):
    module_class, data_class = boring(namespace)
    make = import_module(namespace).Trainer
    ptq, module, data = PTQCallback(), module_class(), data_class()
    fitting = make(**SILENT, callbacks=[ptq])
    fitting.fit(module, datamodule=data)
    assert list(ptq.quantization.weights) == ["0.weight", "2.weight"]
    assert fitting.validate(module, datamodule=data, verbose=False) == [ptq.metrics]
    assert make(**SILENT).validate(module, datamodule=data, verbose=False) != [ptq.metrics]
    fresh = PTQCallback()
    again = make(**SILENT, callbacks=[fresh])
    assert again.validate(module, datamodule=data_class(), verbose=False) == [
        {"val_loss": pytest.approx(ptq.metrics["val_loss"], abs=0.1)}
    ]
    assert list(fresh.quantization.weights) == ["0.weight", "2.weight"]


@pytest.mark.sample
@pytest.mark.parametrize("namespace", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_yaml(namespace, tmp_path):
    cli = import_module(f"{namespace}.cli").LightningCLI
    settings = {"weight_bits": 4, "activation_bits": None, "reestimate_batchnorm": False, "edge_bits": 8}
    entry = {"class_path": "lightning_compress.PTQCallback", "init_args": settings}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {**SILENT, "callbacks": [entry]}}))
    arguments = ["fit", "--config", str(config), "--trainer.callbacks.max_samples=2"]
    done = cli(*boring(namespace), args=arguments, save_config_callback=None)
    [ptq] = [callback for callback in done.trainer.callbacks if isinstance(callback, PTQCallback)]
    assert {name: getattr(ptq, name) for name in settings} == settings
    assert ptq.max_samples == 2
    assert bits_of(ptq) == {"0.weight": 8, "2.weight": 8}
    assert list(ptq.metrics) == ["val_loss"]


def test_the_help_is_short_and_complete(capsys):
    cli = import_module("lightning.pytorch.cli").LightningCLI
    with pytest.raises(SystemExit) as stop:
        cli(
            *boring("lightning.pytorch"),
            args=["fit", "--trainer.callbacks.help=lightning_compress.PTQCallback"],
            save_config_callback=None,
        )
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 80
    assert all(f".{name} " in text for name in ("weight_bits", "observer", "reestimate_batchnorm", "max_samples"))


# Tensors that outlive a call


class Queries(nn.Module):
    """Learned queries go through a layer; its weight is taken in the type of the input."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 8))
        self.register_buffer("offset", torch.randn(8))
        self.register_buffer("seen", torch.zeros(8))
        self.to_query, self.to_key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(2, 3)

    def forward(self, x):
        self.seen.mul_(0.5).add_(x.detach().mean(0))
        x = x + self.offset.to(x.dtype)
        keys = F.linear(x, self.to_key.weight.to(x.dtype), self.to_key.bias)
        return self.head(keys @ self.to_query(self.queries).T)


class Asking(Classifier):
    def build(self):
        self.model = Queries()


def test_parameters_and_buffers_bear_no_marks_and_are_rounded_each_time():
    ptq, plain = PTQCallback(activation_bits=2), made(Asking)
    module, fitting = fitted(ptq, Asking)
    trainer().fit(plain, loader(), loader(rows=ROWS))
    assert difference(module, plain) == 0
    assert list(ptq.quantization.weights) == ["to_key.weight", "to_query.weight", "head.weight"]
    assert "in:to_query:linear:0" in ptq.quantization.activations
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert [attribute for attribute in vars(tensor) if "compress" in attribute] == [], name
    assert fitting.validate(module, loader(rows=ROWS), verbose=False) == [ptq.metrics]
    assert ptq.metrics != measured(module)

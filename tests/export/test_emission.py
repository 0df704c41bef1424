from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.export import integer, to_onnx
from lightning_compress.export.emission import Emitting, integer_layer
from lightning_compress.export.integer import KERNELS
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.mechanisms.calibration import Settings, calibrate
from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.quantization import quantizing
from lightning_compress.mechanisms.rounding import Rounding

pytestmark = pytest.mark.sample  # a file a test, and its kernels

MOVES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "MaxPool", "NhwcMaxPool"}
INTEGER = {
    *KERNELS,
    *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool"),
    "QLinearAveragePool",
}
CURVES = (F.silu, F.hardswish, torch.sigmoid, F.leaky_relu, F.relu6)


# What the tests of integer files share


def calibrated(network, *inputs, **settings):
    """The grids of a network for some inputs."""
    with torch.no_grad():
        return calibrate(network, lambda: (network(*inputs) for _ in range(2)), Settings(**settings))


def holding(module, *callbacks, **found):
    """The module, attached to a Trainer with a callback that has found something."""
    module._trainer = SimpleNamespace(callbacks=[*callbacks, *([SimpleNamespace(**found)] if found else [])])
    return module


def rounded(network, grids, *inputs):
    """What the quantised network gives."""
    with torch.no_grad(), quantizing(network, Rounding(network, grids)):
        return network(*inputs)


def session(path, *, optimised=True, saved=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs, optimised=True):
    """What ONNX Runtime makes of a file."""
    opened = session(path, optimised=optimised)
    feed = {entry.name: value.numpy() for entry, value in zip(opened.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in opened.run(None, feed)]


def operators(path):
    """How often each operator is run by ONNX Runtime."""
    saved = path.with_suffix(".optimised")
    session(path, saved=saved)
    return Counter(node.op_type for node in onnx.load(saved).graph.node)


def kernels(path):
    """How many layers run in integers."""
    counts = operators(path)
    return sum(counts[kind] for kind in KERNELS)


def initializers(path):
    """The tensors that a file holds, by name."""
    return {entry.name: entry for entry in onnx.load(path).graph.initializer}


def varied_(network):
    """Batch norms with statistics and weights of either sign, as training leaves them, and weights of some size."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out" if isinstance(layer, nn.Conv2d) else "fan_in")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return network


class Vision(nn.Module):
    """Every operation on maps that runs in integers."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.curved = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in CURVES])
        self.joined = nn.Conv2d(16, 4, 3, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x += F.relu(self.depthwise_norm(self.depthwise(x)))
        x = F.max_pool2d(x, 2)
        x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        small = F.avg_pool2d(x, 3, 1, padding=1)
        for layer, curve in zip(self.curved, CURVES, strict=True):
            x = curve(layer(x))
        x = self.joined(torch.cat([x, small], dim=1))
        return x, self.head(x.mean((2, 3)))


class Text(nn.Module):
    """Linear layers of all kinds."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.pooled, self.pooled_norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.bare = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        seen = x.flip(1)
        x = x + self.attention(x, seen, seen, need_weights=False)[0]
        x = x + self.narrow(F.gelu(self.wide(x)))
        x = F.relu(self.pooled_norm(self.pooled(x.mean(dim=1))))
        return self.head(F.relu(self.bare(x)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both networks, their grids, an input, and the file."""
    torch.default_generator.manual_seed(0)
    folder, found = tmp_path_factory.mktemp("written"), {}
    for kind, x in (Vision, torch.randn(4, 3, 12, 12)), (Text, torch.randint(20, (4, 7))):
        network = varied_(kind()).eval()
        grids = calibrated(network, x)
        path = folder / f"{kind.__name__}.onnx"
        to_onnx(holding(network, quantization=grids), path, x, precision="int8")
        found[kind] = SimpleNamespace(network=network, grids=grids, x=x, path=path)
    return found


# Folding, against float64

LAYERS = {
    "conv2d": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4), (2, 6, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 7)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (6, 5)),
}


def norm_like_trained_(norm):
    """Weights of either sign and 0."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3.0)
    if norm.affine:
        norm.weight.data.copy_(torch.tensor([1.5, -0.7, 0.0, 1e-3]))
        norm.bias.data.normal_()
    return norm.eval()


def folded(weight, step, **more):
    """Grids of one layer before a batch norm."""
    site = WeightSite("layer.weight", 0, len(weight))
    return Grids(weights={site.name: WeightGrid(step, 8)}, sites={"s": site}, folds={"s": "norm"}, **more)


@pytest.mark.parametrize("by_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("kind", LAYERS)
def test_folding_keeps_the_integers_up_to_their_sign(kind, by_channel):
    layer, norm, shape = LAYERS[kind]
    norm_like_trained_(norm)
    weight = layer.weight.detach()
    step = (weight.flatten(1).abs().amax(1) if by_channel else weight.abs().max()) / 127
    divisor = torch.tensor([1.0, 2.0, 3.0, 0.5])
    correction = torch.tensor([0.1, -0.2, 0.3, 0.0])
    grids = folded(weight, step, divisors={"s": divisor}, biases={"s": correction})
    result = integer_layer(grids, "s", weight, norm)

    rows = [-1, *[1] * (weight.ndim - 1)]
    plain = np.clip(np.round(weight.numpy() / np.broadcast_to(step.numpy(), 4).reshape(rows)), -127, 127)
    gamma, beta = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    gain = gamma / np.sqrt(variance + norm.eps) / divisor.double().numpy()
    np.testing.assert_array_equal(result.integers.numpy(), plain * np.sign(gamma).reshape(rows))
    expected = (np.broadcast_to(step.double().numpy(), 4) * np.abs(gain)).astype(np.float32)
    np.testing.assert_array_equal(result.scale.numpy(), np.where(gamma == 0, np.float32(1), expected))
    np.testing.assert_allclose(result.gain.numpy(), gain, rtol=1e-7)
    offset = (correction.double().numpy() - mean) * gain + beta / divisor.double().numpy()
    np.testing.assert_allclose(result.offset.numpy(), offset, rtol=1e-6, atol=1e-9)
    assert (result.integers.dtype, result.scale.dtype) == (torch.int8, torch.float32)

    x, operation = torch.randn(shape).double(), F.linear if kind == "linear" else getattr(F, kind, F.conv2d)
    options = {} if kind == "linear" else {"groups": layer.groups}
    along = [1, -1, *[1] * (len(shape) - 2)]
    grid_points = torch.from_numpy(plain).double() * step.double().expand(4).reshape(rows)
    before = operation(x, grid_points, layer.bias.double() + correction.double(), **options)
    reference = F.batch_norm(
        before, *(value.double() for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    ) / divisor.double().reshape(along)
    bias = (layer.bias.double() * result.gain.double()) + result.offset.double()
    ours = operation(x, result.integers.double() * result.scale.double().reshape(rows), bias, **options)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_folding_without_affine_and_with_other_statistics():
    weight, norm = torch.tensor([[1.0, -0.5]]), nn.BatchNorm1d(1, affine=False, eps=0.0)
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(4.0)
    result = integer_layer(folded(weight, torch.tensor([0.25])), "s", weight, norm)
    assert result.integers.tolist() == [[4, -2]]
    assert (result.scale.item(), result.gain.item(), result.offset.item()) == (0.125, 0.5, -1.5)
    statistics = {"norm": (torch.tensor([1.0]), torch.tensor([16.0]))}
    result = integer_layer(folded(weight, torch.tensor([0.25]), statistics=statistics), "s", weight, norm)
    assert (result.scale.item(), result.gain.item(), result.offset.item()) == (0.0625, 0.25, -0.25)
    assert norm.running_mean.item() == 3.0


def test_rows_of_a_weight_and_the_factors_of_its_inputs():
    weight = torch.tensor([[9.0, 9.0], [1.0, 2.0], [4.0, 8.0]])
    grids = Grids(
        weights={"w": WeightGrid(torch.tensor([1.0, 0.5, 2.0]), 4)},
        sites={"s": WeightSite("w", 1, 3)},
        factors={"s": torch.tensor([2.0, 1.0])},
    )
    result = integer_layer(grids, "s", weight[1:])
    assert result.integers.tolist() == [[4, 4], [4, 4]]
    assert result.scale.tolist() == [0.5, 2.0]
    assert (result.gain.tolist(), result.offset.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_steps_grow_until_the_bias_fits_into_32_bits():
    """And the integers become less in return; in channels where it fits anyway nothing changes."""
    grids = Grids(
        weights={"w": WeightGrid(torch.tensor([1e-9, 0.01]), 8)},
        sites={"s": WeightSite("w", 0, 2, source="x")},
        activations={"x": ActivationGrid(0.5, 3, 8)},
        biases={"s": torch.tensor([0.4, 0.0])},
    )
    weight, bias = torch.tensor([[1.27e-7, -0.5e-7], [1.27, -0.5]]), torch.tensor([0.6, 0.3])
    result = integer_layer(grids, "s", weight, bias=bias)
    np.testing.assert_allclose(result.scale.numpy(), [2.0**-29, 0.01], rtol=1e-6)  # 1 is 2**30 steps of 0.5 times that
    assert result.integers.tolist() == [[round(127e-9 * 2**29), round(-50e-9 * 2**29)], [127, -50]]
    np.testing.assert_allclose(result.offset.numpy(), [0.4, 0.0])
    for unchanged in (torch.tensor([-0.4, 0.3]), None):
        assert integer_layer(grids, "s", weight, bias=unchanged).integers.tolist()[1] == [127, -50]
    assert integer_layer(grids, "s", weight, bias=torch.tensor([-0.4, 0.3])).integers.tolist()[0] == [127, -50]


def test_the_bias_of_a_linear_layer_is_written_in_steps_of_the_products():
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].weight.data.copy_(torch.tensor([[1.27, 0.0], [0.0, -2.54]]))
    network[0].bias.data.copy_(torch.tensor([0.5, -0.33333]))
    site = "0:linear:0"
    place = WeightSite("0.weight", 0, 2, bias="0.bias", source="in:0:linear:0")
    grids = Grids(
        weights={"0.weight": WeightGrid(torch.tensor([0.01, 0.02]), 8)},
        sites={site: place},
        activations={"in:0:linear:0": ActivationGrid(0.5, 3, 8)},
    )
    held = dict(Emitting(network, grids, opset=20).held.named_buffers())
    assert held["0_linear_0_weight"].tolist() == [[127, 0], [0, -127]]  # (in, out)
    assert held["0_linear_0_bias"].tolist() == [100, -33]
    np.testing.assert_allclose(held["0_linear_0_bias_scale"].numpy(), [0.005, 0.01], rtol=1e-6)
    assert held["in_0_linear_0_scale"].item() == 0.5
    assert held["in_0_linear_0_zero_point"].item() == 3


def test_products_of_four_bits_hold_two_integers_in_a_byte():
    network = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((150, 64), (64, 3), (3, 2))))
    grids = calibrated(network, torch.randn(2, 150), weight_bits=4, activation_bits=None)
    held = dict(Emitting(network, grids, opset=21, products=True).held.named_buffers())
    for index, block, blocks in (0, 128, 2), (1, 64, 1), (2, 16, 1):
        site, name = f"{index}:linear:0", f"{index}.weight"
        weight = network.get_parameter(name).detach()
        packed = held[f"{site.replace(':', '_')}_weight"]
        assert (packed.dtype, packed.shape) == (torch.uint8, (len(weight), blocks, block // 2))
        integers = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(len(weight), -1).int() - 8
        step = grids.weights[name].step
        assert torch.equal(integers[:, : weight.shape[1]], (weight / step[:, None]).round().clamp(-7, 7).int())
        assert not integers[:, weight.shape[1] :].any()
        scales = held[f"{site.replace(':', '_')}_weight_scale"]
        assert torch.equal(scales, step.repeat_interleave(blocks))


# The files of small networks


def test_maps_run_in_integers_from_the_first_layer_to_the_last(written):
    vision = written[Vision]
    assert len(vision.grids.sites) == 10
    assert vision.grids.left_in_float == ()
    counts = operators(vision.path)
    assert (counts["QLinearConv"], counts["QGemm"]) == (9, 1)
    assert set(counts) <= MOVES | INTEGER
    assert {"QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearAdd", "QLinearMul"} <= set(counts)
    assert (counts["QLinearGlobalAveragePool"], counts["QLinearAveragePool"], counts["NhwcMaxPool"]) == (2, 1, 1)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 1)  # the input, and the maps that come out


def test_maps_are_those_of_the_quantised_network(written):
    vision = written[Vision]
    maps, classes = rounded(vision.network, vision.grids, vision.x)
    step = vision.grids.activations["joined:conv2d:0"].scale
    assert len((maps / step).round().unique()) > 40  # of 64: this is no network that gives the same for everything
    reach = vision.network.head.weight.abs().sum(dim=1).max() * vision.grids.activations[":mean:0"].scale
    for optimised, most in (False, 1), (True, 4):
        found = run(vision.path, vision.x, optimised=optimised)
        assert (found[0] - maps).abs().max() <= most * step * 1.001
        assert (found[1] - classes).abs().max() <= most * reach


def test_linear_layers_run_in_integers_and_attention_and_norm_in_float(written):
    text = written[Text]
    parts = [(site.start, site.stop) for site in text.grids.sites.values() if site.name == "attention.in_proj_weight"]
    assert parts == [(0, 8), (8, 24)]
    assert len(text.grids.sites) == 8
    counts = operators(text.path)
    assert (counts["MatMulIntegerToFloat"], counts["QGemm"], counts["QLinearMatMul"]) == (4, 3, 1)
    assert counts["Gemm"] == 0
    assert counts["MatMul"] + counts["FusedMatMul"] == 2  # of queries with keys, and of what comes of it with values
    assert text.grids.left_in_float == (
        *("embedding.weight", "add (2)", "embedding (1)", "gelu (1)", "layer_norm (1)", "mean (1)"),
        "scaled_dot_product_attention (1)",
    )


def test_linear_layers_give_what_the_quantised_network_gives(written):
    text = written[Text]
    logits = rounded(text.network, text.grids, text.x)
    assert logits.std() > 0.1
    reach = text.network.head.weight.abs().sum(dim=1).max() * text.grids.activations[":relu:1"].scale
    for optimised in False, True:
        assert (run(text.path, text.x, optimised=optimised)[0] - logits).abs().max() <= reach


# What is easily folded, scaled or named wrongly


class Net(nn.Module):
    """Some layers, and what is done with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def agree(path, network, x, most=0.03, **settings):
    """Write a file, and hold each of its outputs to the quantised network's; the grids."""
    grids = calibrated(network.eval(), x, **settings)
    to_onnx(holding(network, quantization=grids), path, x, precision="int8")
    expected = rounded(network, grids, x)
    for found, wanted in zip(run(path, x), expected if isinstance(expected, tuple) else [expected], strict=True):
        assert wanted.norm() > 0
        assert (found - wanted).norm() <= most * wanted.norm()
    return grids


def test_a_layer_whose_output_is_returned_and_normed_is_not_folded(tmp_path):
    def forward(net, x):
        maps = net.layer(x)
        return maps, net.norm(maps).relu()

    network = varied_(Net(forward, layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    assert agree(tmp_path / "n.onnx", network, torch.randn(4, 3, 8, 8)).folds == {}


@pytest.mark.parametrize("length", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_batch_norm_over_other_channels_than_those_of_the_linear_layer_is_not_folded(tmp_path, length):
    network = Net(lambda net, x: net.norm(net.layer(x)).relu(), layer=nn.Linear(6, length), norm=nn.BatchNorm1d(5))
    assert agree(tmp_path / "n.onnx", varied_(network), torch.randn(4, 5, 6)).folds == {}


def test_equalised_channels_that_are_also_returned_keep_their_size():
    def forward(net, x):
        features = net.first(x).relu()
        return features, net.second(features)

    network, x = Net(forward, first=nn.Linear(6, 8), second=nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    network.first.weight.data[0] *= 100
    grids = calibrated(network, x, equalize=True)
    features, plain = rounded(network, grids, x)[0], network(x)[0]
    assert (features - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(
    "kind", ["conv2d", pytest.param("linear", marks=pytest.mark.slow), pytest.param("row", marks=pytest.mark.slow)]
)
def test_a_bias_far_beyond_the_steps_of_its_channel(tmp_path, kind):
    x = torch.randn(4, 3, 8, 8) if kind == "conv2d" else torch.randn(4, 6)
    layer = nn.Conv2d(3, 4, 3) if kind == "conv2d" else nn.Linear(6, 4)
    norm = nn.BatchNorm2d(4) if kind == "conv2d" else nn.BatchNorm1d(4)
    network = layer if kind == "row" else nn.Sequential(layer, norm, nn.ReLU())
    if kind == "row":
        layer.weight.data[0] *= 1e-8
        layer.bias.data[0] = 1.0
    else:
        norm.weight.data[0] = 1e-9
        norm.bias.data.copy_(torch.tensor([0.5, 0.3, 0.2, 0.1]))
    agree(tmp_path / "n.onnx", network, x)
    assert kernels(tmp_path / "n.onnx") == 1
    faint = (slice(None), 0)
    value = network.eval()(x)[faint].detach()
    assert (run(tmp_path / "n.onnx", x)[0][faint] - value).abs().max() < 0.02 * value.abs().max()


def test_a_layer_on_a_parameter_and_one_on_a_buffer(tmp_path):
    network = Net(
        lambda net, x: net.layer(x) + net.query(net.queries).mean(0) + net.place(net.places).mean(0),
        layer=nn.Linear(6, 3),
        query=nn.Linear(8, 3),
        place=nn.Linear(2, 3),
    )
    network.queries = nn.Parameter(torch.randn(2, 8))
    network.register_buffer("places", torch.randn(5, 2))
    grids = agree(tmp_path / "n.onnx", network, torch.randn(4, 6))
    assert {"in:query:linear:0", "in:place:linear:0"} <= set(grids.activations)
    assert vars(network.queries) == vars(network.places) == {}


class Around(nn.Module):
    """An operation between two layers."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.operation = operation

    def forward(self, x):
        return self.second(self.operation(self.first(x)))


AROUND = {
    "relu": (F.relu, {}),
    "relu6": (nn.ReLU6(inplace=True), {}),
    "clamp": (lambda x: x.clamp(0.0, 0.25), {}),
    "silu": (F.silu, {"QLinearSigmoid", "QLinearMul"}),
    "hardswish": (F.hardswish, {"QLinearAdd", "QLinearMul"}),
    "hardsigmoid": (F.hardsigmoid, {"QLinearAdd"}),
    "sigmoid": (torch.sigmoid, {"QLinearSigmoid"}),
    "leaky_relu": (nn.LeakyReLU(0.2, inplace=True), {"QLinearLeakyRelu"}),
    "residual": (lambda x: F.relu(x + x.flip(1)), {"QLinearAdd"}),
    "product": (lambda x: x * x.sigmoid(), {"QLinearSigmoid", "QLinearMul"}),
    "cat": (lambda x: torch.cat([x, x.flip(1)], dim=1)[:, 2:6], {"QLinearConcat"}),
    "max_pool": (nn.MaxPool2d(3, 1, padding=1), {}),
    "avg_pool": (nn.AvgPool2d(3, 1, padding=1), {"QLinearAveragePool"}),
    "avg_pool_inside": (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), {"QLinearAveragePool"}),
    "squeeze": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), {"QLinearGlobalAveragePool"}),
    "gelu": (F.gelu, {"Gelu"}),
    "tanh": (torch.tanh, {"Tanh"}),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), {"Resize"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND)
def test_one_operation_between_two_layers(tmp_path, name):
    operation, kinds = AROUND[name]
    network, x = Around(operation).eval(), torch.randn(4, 3, 9, 9)
    grids = calibrated(network, x)
    path = tmp_path / "n.onnx"
    to_onnx(holding(network, quantization=grids), path, x, precision="int8")
    expected = rounded(network, grids, x)
    step = grids.activations["second:conv2d:0"].scale
    assert (run(path, x, optimised=False)[0] - expected).abs().max() <= 1.001 * step
    assert (run(path, x)[0] - expected).abs().max() <= 2.001 * step
    counts = operators(path)
    assert counts["QLinearConv"] == 2
    assert set(kinds) <= set(counts)
    if all(kind.startswith("Q") for kind in kinds):
        assert set(counts) <= MOVES | INTEGER | {"Slice", "Gather"}


SHARED = {
    "sum": (lambda x: x + x.relu(), {"QLinearAdd": 1}),
    "product": (lambda x: x.relu() * x, {"QLinearMul": 1}),
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_a_relu_is_not_a_part_of_a_kernel_whose_output_others_take(tmp_path, name, normed):
    """It takes that output on its grid, in the file as in the module."""
    operation, kinds = SHARED[name]
    network, x = Around(operation).eval(), torch.randn(4, 3, 9, 9)
    if normed:
        network.first = varied_(nn.Sequential(network.first, nn.BatchNorm2d(4))).eval()
    grids = calibrated(network, x)
    [key] = grids.shared
    assert key == ("first.1:batch_norm:0" if normed else "first:conv2d:0")
    path = tmp_path / "n.onnx"
    to_onnx(holding(network, quantization=grids), path, x, precision="int8")
    expected, step = rounded(network, grids, x), grids.activations["second:conv2d:0"].scale
    assert (run(path, x, optimised=False)[0] - expected).abs().max() <= 1.001 * step
    assert (run(path, x)[0] - expected).abs().max() <= 2.001 * step
    counts = operators(path)
    assert counts["QLinearConv"] == 2
    assert {kind: counts[kind] for kind in kinds} == kinds


def test_a_relu_alone_is_a_part_of_the_kernel():
    assert calibrated(Around(F.relu).eval(), torch.randn(4, 3, 9, 9)).shared == frozenset()


LINEAR = {
    "rows": (lambda bias: nn.Linear(6, 5, bias=bias), (4, 6)),
    "sequences": (lambda bias: nn.Linear(6, 5, bias=bias), (4, 3, 6)),
    "norm": (lambda bias: nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5)), (4, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_one_linear_layer(tmp_path, name, bias):
    make, shape = LINEAR[name]
    network, x = varied_(nn.Sequential(make(bias), nn.ReLU(), nn.Linear(5, 2))).eval(), torch.randn(shape)
    grids = calibrated(network, x)
    path = tmp_path / "n.onnx"
    to_onnx(holding(network, quantization=grids), path, x, precision="int8")
    expected = rounded(network, grids, x)
    reach = network[2].weight.abs().sum(dim=1).max() * grids.activations["1:relu:0"].scale
    for optimised in False, True:
        assert (run(path, x, optimised=optimised)[0] - expected).abs().max() <= reach
    assert kernels(path) == len(grids.sites) == 2
    assert not {"Gemm", "MatMul", "BatchNormalization", "DequantizeLinear"} & set(operators(path))


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_of_other_dimensions(tmp_path, dimensions):
    convolution, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
    network = varied_(nn.Sequential(convolution(3, 4, 3), norm(4), nn.ReLU(), convolution(4, 2, 1))).eval()
    x = torch.randn(4, 3, *[6] * dimensions)
    grids = calibrated(network, x)
    to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", x, precision="int8")
    step = grids.activations[f"3:conv{dimensions}d:0"].scale
    expected = rounded(network, grids, x)
    assert (run(tmp_path / "n.onnx", x, optimised=False)[0] - expected).abs().max() <= 1.001 * step
    assert operators(tmp_path / "n.onnx")["QLinearConv"] == 2


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU(), nn.LayerNorm(16)),
        (nn.BatchNorm1d(16), nn.ReLU6(), nn.Softmax(1)),
        (nn.ReLU(), nn.Dropout(0.5), nn.Tanh()),
    ],
)
def test_a_linear_layer_with_relu_before_a_float_operation_runs_in_integers(between, tmp_path):
    network, x = nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 4)).eval(), torch.randn(32, 8)
    grids = calibrated(network, x)
    holding(network, quantization=grids)
    to_onnx(network, tmp_path / "n.onnx", x, precision="int8")
    assert Counter(node.op_type for node in integer.optimised(OnnxNetwork(tmp_path / "n.onnx")))["QGemm"] == 2


@pytest.mark.parametrize("options", [{"keepdim": True}, {"keepdims": True}, {"keepdims": False}, {}])
def test_the_mean_of_maps_in_either_spelling(options, tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3), **options).flatten(1))

    network, x = Mean().eval(), torch.randn(8, 1, 5, 5)
    holding(network, quantization=calibrated(network, x))
    to_onnx(network, tmp_path / "n.onnx", x, precision="int8")
    assert (
        Counter(node.op_type for node in integer.optimised(OnnxNetwork(tmp_path / "n.onnx")))[
            "QLinearGlobalAveragePool"
        ]
        == 1
    )


@pytest.mark.parametrize(("bits", "shift"), [(2, 64), (3, 32), (4, 16), (5, 8), (7, 2), (8, 1)])
def test_integers_fill_their_byte_where_activations_have_few_bits(bits, shift):
    """Biases are added in steps of the product of the scales: with both coarse they would be rounded coarsely."""
    weight, step = torch.randn(3, 4), torch.tensor([0.3, 0.21, 0.17])
    made = {}
    for own in (4, 8):
        grids = Grids(
            weights={"w": WeightGrid(step, bits)},
            activations={"x": ActivationGrid(0.2, 0, own)},
            sites={"s": WeightSite("w", 0, 3, source="x")},
        )
        made[own] = integer_layer(grids, "s", weight)
    assert torch.equal(made[8].scale, step)
    assert torch.equal(made[4].integers, made[8].integers * shift)
    assert torch.equal(made[4].scale * shift, step)
    assert made[4].integers.abs().max() <= 127


@pytest.mark.parametrize(
    ("middle", "operator"),
    [
        (lambda: nn.Conv2d(4, 4, 3), "Conv"),
        (lambda: nn.ConvTranspose2d(4, 4, 2, 2), "ConvTranspose"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 144), nn.Unflatten(1, (4, 6, 6))), "Gemm"),
    ],
)
def test_a_layer_left_in_float_between_quantised_ones_is_run_in_float(middle, operator, tmp_path):
    """ONNX Runtime would round its weights to one grid for the whole tensor, in which small channels vanish."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), middle(), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    weight = next(value for name, value in network[2].named_parameters() if value.ndim > 1)
    weight.data[:, :1] *= 100
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        steps, selected = lambda: (network(x) for _ in range(1)), lambda name: not name.startswith("2.")
        grids = calibrate(network, steps, Settings(), selected=selected)
    holding(network, quantization=grids)
    to_onnx(network, tmp_path / "n.onnx", x, precision="int8")
    counts = Counter(node.op_type for node in integer.optimised(OnnxNetwork(tmp_path / "n.onnx")))
    assert (counts["QLinearConv"], counts["QGemm"], counts[operator]) == (2, 0, 1)
    expected = rounded(network, grids, x)
    assert (run(tmp_path / "n.onnx", x)[0] - expected).norm() <= 1e-3 * expected.norm()

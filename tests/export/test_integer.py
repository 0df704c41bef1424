from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from lightning_compress.export import ExportError, integer, to_onnx
from lightning_compress.export.emission import Emitting
from lightning_compress.export.integer import IntegerExport
from lightning_compress.export.parity import references
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.export.sample import Sample, bind

from .test_emission import calibrated, holding, initializers, kernels, operators, rounded, run, varied_

pytestmark = pytest.mark.sample  # files, and their kernels


def odd_network():
    """Sizes of which none is a multiple of anything: 5 * 3 * 3 * 3 and 5 weights, 180 and 17 columns."""
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 17), nn.ReLU()]
    return varied_(nn.Sequential(*layers, nn.Linear(17, 5))).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def export(path, network, grids, precision="int8", **options):
    return to_onnx(holding(network, quantization=grids), path, X, precision=precision, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A network, its grids, and its file of 8 bits."""
    torch.default_generator.manual_seed(0)
    network, path = odd_network(), tmp_path_factory.mktemp("written") / "n.onnx"
    grids = calibrated(network, X)
    result = export(path, network, grids)
    return SimpleNamespace(network=network, grids=grids, path=path, result=result)


# What the file holds


def test_the_result_says_what_was_written(written):
    result = written.result
    assert (result.precision, result.opset, result.checked_batch_sizes) == ("int8", 20, (4, 1, 5))
    assert result.left_in_float == ()
    assert result.bytes == written.path.stat().st_size
    assert result.quantization is written.grids
    assert torch.equal(result.tensors[0], X)
    found = [(run(written.path, x)[0] - rounded(written.network, written.grids, x)).abs().max() for x in (X, X[:1])]
    assert max(found) <= result.max_logit_difference + 1e-7


def test_scales_and_integers_in_the_file_are_the_given_ones_bit_for_bit(written):
    grids, network = written.grids, written.network
    stored = {name: numpy_helper.to_array(entry) for name, entry in initializers(written.path).items()}
    norm, gain = network[1], network[1].weight.detach().double()
    gain = gain * torch.rsqrt(norm.running_var.double() + norm.eps)
    for site, name, factor in (
        ("0_conv2d_0", "0.weight", gain),
        ("4_linear_0", "4.weight", torch.ones(17).double()),
        ("6_linear_0", "6.weight", torch.ones(5).double()),
    ):
        weight, step = network.get_parameter(name).detach(), grids.weights[name].step
        rows = step.reshape(-1, *[1] * (weight.ndim - 1))
        integers = (weight / rows).round().clamp(-127, 127) * factor.sign().reshape(rows.shape)
        scale = (step.double() * factor.abs()).float()
        in_file = stored[f"quantized.{site}_weight"]
        assert in_file.dtype == np.int8
        np.testing.assert_array_equal(in_file if weight.ndim > 2 else in_file.T, integers.numpy().astype(np.int8))
        np.testing.assert_array_equal(stored[f"quantized.{site}_weight_scale"], scale.numpy())
    assert (gain < 0).any()  # so some integers have been negated
    kept = 0
    for key, grid in grids.activations.items():
        part = key.replace(":", "_")
        if f"quantized.{part}_scale" in stored:  # equal ones are stored once
            kept += 1
            assert stored[f"quantized.{part}_scale"] == np.float32(grid.scale)
            assert stored.get(f"quantized.{part}_zero_point", grid.zero_point) == grid.zero_point
    assert kept == len(grids.activations) == 3


def test_each_scale_of_the_grids_is_used_by_a_quantiser(written):
    model = onnx.load(written.path)
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    used = [node.input for node in model.graph.node if node.op_type == "QuantizeLinear"]
    pairs = sorted((float(values[scale]), int(values[zero])) for _, scale, zero in used)
    assert pairs == sorted((grid.scale, grid.zero_point) for grid in written.grids.activations.values())
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert all(not node.name for node in model.graph.node)
    assert not model.graph.value_info


class Alike(nn.Module):
    """Scales whose names in the file would be the same: of what enters "proj", and of what leaves "in_proj"."""

    def __init__(self):
        super().__init__()
        self.proj, self.in_proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.in_proj(self.proj(x)))


def test_names_that_are_spelled_alike_are_two(tmp_path):
    network = varied_(Alike()).eval()
    network.proj.weight.data *= 0.1
    x = torch.randn(4, 6)
    grids = calibrated(network, x)
    emitting = Emitting(network, grids, opset=20)
    assert len(set(emitting.buffers.values())) == len(emitting.buffers) == len(dict(emitting.held.named_buffers()))
    assert {"in:proj:linear:0:scale", "in_proj:linear:0:scale"} <= emitting.buffers.keys()
    to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", x, precision="int8")
    assert (run(tmp_path / "n.onnx", x)[0] - rounded(network, grids, x)).abs().max() < 1e-5


# What is no file


@pytest.fixture(scope="module")
def graph(written):
    """What the exporter makes of the network, before it is checked."""
    return written.path.read_bytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("quantized.0_conv2d_0_weight_scale", lambda value: np.nextafter(value, np.float32(1))),
        ("quantized.4_linear_0_weight", lambda value: value + (np.arange(value.size).reshape(value.shape) == 7)),
        ("quantized.2_relu_0_scale", lambda value: np.nextafter(value, np.float32(1))),
        ("quantized.in_0_conv2d_0_zero_point", lambda value: value + 1),
        ("quantized.4_linear_0_bias", lambda value: value + 1),
        ("quantized.4_linear_0_weight_scale", lambda value: value.astype(np.float64)),
    ],
)
def test_a_scale_or_an_integer_that_the_exporter_changes_is_found(written, graph, monkeypatch, tmp_path, name, change):
    def corrupting(*arguments, **options):
        model = onnx.load_from_string(graph)
        [entry] = [entry for entry in model.graph.initializer if entry.name == name]
        value = numpy_helper.to_array(entry)
        changed = change(value)
        changed = changed if changed.dtype == np.float64 else changed.astype(value.dtype)
        assert changed.tobytes() != value.tobytes()
        entry.CopyFrom(numpy_helper.from_array(changed, name))
        return model.SerializeToString()

    monkeypatch.setattr(integer, "convert", corrupting)
    (tmp_path / "n.onnx").write_text("an older file")
    with pytest.raises(ExportError, match=f"the exporter changed '{name}'"):
        export(tmp_path / "n.onnx", written.network, written.grids)
    assert (tmp_path / "n.onnx").read_text() == "an older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["n.onnx"]


def test_a_file_without_scales_is_found(written, monkeypatch, tmp_path):
    def plain(*arguments, **options):
        model = onnx.load(written.path)
        for entry in model.graph.initializer:
            entry.name = f"plain.{entry.name}"
        return model.SerializeToString()

    monkeypatch.setattr(integer, "convert", plain)
    with pytest.raises(ExportError, match="the exporter left no scale in the file"):
        export(tmp_path / "n.onnx", written.network, written.grids)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_does_not_run_in_integers_is_named(written, monkeypatch, tmp_path):
    quantiser = Emitting.activation
    monkeypatch.setattr(
        Emitting, "activation", lambda self, key, x: x if key == "2:relu:0" else quantiser(self, key, x)
    )
    (tmp_path / "n.onnx").write_text("an older file")
    message = r"ONNX Runtime runs 2 of 3 quantised layers in float: '0', '4'; leave them out .* with exclude="
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "n.onnx", written.network, written.grids)
    assert (tmp_path / "n.onnx").read_text() == "an older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["n.onnx"]


def prepared(network, grids, precision="int8", max_difference=None):
    call = bind(inspect.signature(network.forward), Sample((X,)))
    return IntegerExport(
        network, call, grids, references(network, call, True), precision=precision, max_difference=max_difference
    )


def test_a_file_of_another_network_is_further_away_than_quantisation_moves_it(written, tmp_path):
    other = copy.deepcopy(written.network)
    other[6].weight.data.mul_(-1)
    check = prepared(written.network, written.grids).check
    assert check(OnnxNetwork(written.path)) == written.result.max_logit_difference
    other_check = prepared(other, written.grids).check
    with pytest.raises(ExportError, match=r"differs from that of the quantised network by 1\.\d+ of its size"):
        other_check(OnnxNetwork(written.path))


def test_a_network_in_float64_is_refused_by_name(written):
    network = copy.deepcopy(written.network).double()
    call = bind(inspect.signature(network.forward), Sample((X.double(),)))
    plain = references(network, call, dynamic=False)
    with pytest.raises(ExportError, match=r"go with float32, and '0\.weight', .* are float64, as with precision='64-t"):
        IntegerExport(network, call, written.grids, plain, precision="int8", max_difference=None)
    mixed = copy.deepcopy(written.network)
    mixed.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with pytest.raises(ExportError, match=r"go with float32, and 'scale' is float64"):
        prepared(mixed, written.grids)


def test_a_trial_needs_integer_kernels_too(written, monkeypatch):
    trial = prepared(written.network, written.grids)
    monkeypatch.setattr(trial, "_layers", 4)
    for check in (trial.check, trial.check_trial):
        with pytest.raises(ExportError, match="ONNX Runtime runs 1 of 4 quantised layers in float"):
            check(OnnxNetwork(written.path))


def test_a_trial_finds_a_network_that_draws_random_numbers(tmp_path):
    """Such as dropout that does not know of evaluation."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(27 * 27, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.second(nn.functional.dropout(self.first(x.flatten(1)[:, : 27 * 27]), 0.5))

    network = Dropping().eval()
    x = torch.randn(4, 27 * 27)
    grids = calibrated(network, x)
    call = bind(inspect.signature(network.forward), Sample((x,)))
    plain = references(network, call, dynamic=True)
    trial = IntegerExport(network, call, grids, plain, precision="int8", max_difference=None)
    with pytest.raises(
        ExportError, match=r"output 'output' of the quantised network is another one each time: .*random"
    ):
        trial.check_trial(None)


class Changed(OnnxNetwork):
    """A file whose output is changed."""

    def __init__(self, path, change):
        super().__init__(path)
        self.change = change

    def run(self, tensors):
        return [self.change(output) for output in super().run(tensors)]


def test_a_file_of_four_bits_is_held_to_the_given_difference(tmp_path):
    """There is nothing that ONNX Runtime would round."""
    network = odd_network()
    grids = calibrated(network, X, weight_bits=4, activation_bits=None)
    export(tmp_path / "n.onnx", network, grids, "int4")
    check = prepared(network, grids, "int4", max_difference=1e-4).check
    assert check(Changed(tmp_path / "n.onnx", lambda output: output)) < 1e-4
    with pytest.raises(ExportError, match=r"more than max_difference=0\.0001"):
        check(Changed(tmp_path / "n.onnx", lambda output: output + 0.01 * output.abs().max()))


def test_an_output_of_another_shape_is_found(written):
    with pytest.raises(ExportError, match=r"has shape \(4, 5\), and \(4, 1, 5\) in the file"):
        prepared(written.network, written.grids).check(Changed(written.path, lambda output: output[:, None]))


def test_outputs_of_integers_and_without_elements(tmp_path):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = odd_network()

        def forward(self, x):
            logits = self.body(x)
            return logits, logits.argmax(1), logits[:, :0]

    network = Choosing().eval()
    grids = calibrated(network, X)
    result = export(tmp_path / "n.onnx", network, grids)
    logits, choices, nothing = run(tmp_path / "n.onnx", X)
    assert (choices.dtype, nothing.shape) == (torch.int64, (4, 0))
    assert torch.equal(choices, logits.argmax(1))
    assert 0 < result.max_logit_difference < 0.02 * logits.abs().max()


class Off:
    """A file whose output is off by so much of what is still accepted."""

    def __init__(self, network, grids, share, most=0.5):
        self.network, self.grids, self.share, self.limit, self.most = network, grids, share, most, []

    def run(self, tensors):
        [x] = tensors
        exact, expected = self.network(x).detach(), rounded(self.network, self.grids, x)
        quarter = exact.abs().flatten().sort().values[exact.numel() // 4 - 1]
        weight = (10 * quarter / exact.abs()).clamp(max=1.0)  # what is larger counts as if it were that
        size, noise = (exact * weight).norm(), 2 * ((expected - exact) * weight).norm()
        most = noise.clamp(0.02 * size, self.limit * size)
        self.most.append((most / size).item())
        direction = torch.randn_like(expected)
        off = self.share * most * direction / (direction * weight).norm()
        self.largest = off.abs().max().item()
        return [expected + off]


@pytest.mark.parametrize(("bits", "least", "largest"), [(8, 0.02, 0.02), (4, 0.05, 0.45), (2, 0.5, 0.5)])
def test_how_far_off_a_file_may_be(bits, least, largest):
    """By twice what quantisation moves the output, but from a fiftieth to a half of its size, in Euclidean norms."""
    network = odd_network()
    grids = calibrated(network, X, weight_bits=bits, activation_bits=None)
    check = prepared(network, grids).check
    near = Off(network, grids, 0.99)
    assert check(near) >= near.largest * (1 - 1e-4)
    assert len(near.most) == 3  # batch sizes
    assert all(least - 1e-6 < most < largest + 1e-6 for most in near.most)
    for share in (1.01, float("nan")):
        with pytest.raises(ExportError, match=r"and at most .* is accepted"):
            check(Off(network, grids, share))


def test_activations_of_few_bits_may_be_further_off():
    """Up to nine tenths of the output's size: one step of few bits is many of eight."""
    network = odd_network()
    grids = calibrated(network, X, weight_bits=2, activation_bits=2)
    check = prepared(network, grids)
    check._check_kernels = lambda file: None
    near = Off(network, grids, 0.99, most=0.9)
    assert check.check(near) >= near.largest * (1 - 1e-4)
    assert max(near.most) > 0.5
    with pytest.raises(
        ExportError, match=r"and at most .* is accepted here.*; to_onnx\(max_difference=\) sets another"
    ):
        check.check(Off(network, grids, 1.01, most=0.9))


def test_a_given_difference_holds_for_integer_files_too(written):
    unchanged, most = OnnxNetwork(written.path), written.result.max_logit_difference
    largest = max(1.0, rounded(written.network, written.grids, X).abs().max().item())
    allowed = prepared(written.network, written.grids, max_difference=1.01 * most)
    assert allowed.check(unchanged) == pytest.approx(most)
    with pytest.raises(ExportError, match="more than max_difference="):
        prepared(written.network, written.grids, max_difference=0.5 * most / (10 * largest)).check(unchanged)
    far = Changed(written.path, lambda output: output + 3.0)
    with pytest.raises(ExportError, match="is accepted here"):
        prepared(written.network, written.grids).check(far)
    assert prepared(written.network, written.grids, max_difference=4.0).check(far) == pytest.approx(3.0, abs=0.1)


def test_weights_that_the_sample_does_not_reach_are_named(written):
    grids = copy.deepcopy(written.grids)
    grids.weights["9.weight"] = grids.weights["4.weight"]
    with pytest.raises(ExportError, match=r"\['9.weight'\] have scales, and the network did not use them"):
        prepared(written.network, grids)


# Fewer bits, and weights alone


def close(path, network, grids, most, *, optimised=True):
    """Whether a file gives what the quantised network gives, in units of its largest output."""
    expected = rounded(network, grids, X)
    return (run(path, X, optimised=optimised)[0] - expected).abs().max() <= most * expected.abs().max()


def stored_integers(path, name):
    """Data type and values of the integers of a weight."""
    entry = initializers(path)[name]
    return entry.data_type, numpy_helper.to_array(entry).astype(np.int8)


def test_weights_alone_of_eight_bits(tmp_path):
    network = odd_network()
    grids = calibrated(network, X, activation_bits=None)
    result = export(tmp_path / "n.onnx", network, grids)
    counts = operators(tmp_path / "n.onnx")
    assert counts["QuantizeLinear"] == counts["QLinearConv"] == counts["QGemm"] == 0
    assert stored_integers(tmp_path / "n.onnx", "quantized.4_linear_0_weight")[0] == onnx.TensorProto.INT8
    assert close(tmp_path / "n.onnx", network, grids, 1e-5, optimised=False)
    assert close(tmp_path / "n.onnx", network, grids, 1e-2)  # ONNX Runtime rounds activations in its own 8-bit product
    assert result.quantization.activations == {}


def test_int4_packs_convolutions_and_multiplies_linear_layers_in_blocks(tmp_path):
    network = odd_network()
    grids = calibrated(network, X, weight_bits=4, activation_bits=None)
    result = export(tmp_path / "n.onnx", network, grids, "int4")
    assert result.opset == 21
    data_type, integers = stored_integers(tmp_path / "n.onnx", "quantized.0_conv2d_0_weight")
    assert data_type == onnx.TensorProto.INT4
    packed = initializers(tmp_path / "n.onnx")["quantized.0_conv2d_0_weight"]
    assert len(packed.raw_data) == (5 * 3 * 3 * 3 + 1) // 2 == 68
    step, norm = grids.weights["0.weight"].step.reshape(-1, 1, 1, 1), network[1]
    expected = (network[0].weight.detach() / step).round().clamp(-7, 7) * norm.weight.sign().reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(integers, expected.detach().numpy())
    counts = operators(tmp_path / "n.onnx")
    assert (counts["DequantizeLinear"], counts["MatMulNBits"]) == (1, 2)
    used = {name for node in onnx.load(tmp_path / "n.onnx").graph.node for name in node.input}
    assert set(initializers(tmp_path / "n.onnx")) <= used
    assert counts["MatMul"] == counts["Gemm"] == counts["QuantizeLinear"] == 0
    for optimised in False, True:
        assert close(tmp_path / "n.onnx", network, grids, 1e-5, optimised=optimised)
    assert result.max_logit_difference <= 1e-5 * rounded(network, grids, X).abs().max()


def test_int4_leaves_activations_in_float_and_edges_in_eight_bits(tmp_path):
    network = odd_network()
    grids = calibrated(network, X, weight_bits=4, activation_bits=8, edge_bits=8)
    assert [grid.bits for grid in grids.weights.values()] == [8, 4, 8]
    result = export(tmp_path / "n.onnx", network, grids, "int4")
    assert len(grids.activations) == 3
    assert result.quantization.activations == {}
    assert stored_integers(tmp_path / "n.onnx", "quantized.0_conv2d_0_weight")[0] == onnx.TensorProto.INT8
    assert stored_integers(tmp_path / "n.onnx", "quantized.4_linear_0_weight")[0] == onnx.TensorProto.UINT8  # packed
    assert stored_integers(tmp_path / "n.onnx", "quantized.6_linear_0_weight")[0] == onnx.TensorProto.INT8
    assert close(tmp_path / "n.onnx", network, result.quantization, 1e-5, optimised=False)
    assert close(tmp_path / "n.onnx", network, result.quantization, 1e-2)


def test_int4_needs_weights_of_four_bits(tmp_path):
    network = odd_network()
    with pytest.raises(
        ValueError, match=r"precision 'int4' needs weights of at most 4 bits, .* have 8: .*weight_bits=4"
    ):
        export(tmp_path / "n.onnx", network, calibrated(network, X), "int4")
    with pytest.raises(ValueError, match="opset must be at least 21 for precision 'int4', got 20"):
        export(tmp_path / "n.onnx", network, None, "int4", opset=20)
    assert list(tmp_path.iterdir()) == []


def test_four_bits_in_an_int8_file_run_in_integer_kernels(tmp_path):
    network = odd_network()
    grids = calibrated(network, X, weight_bits=4)
    export(tmp_path / "n.onnx", network, grids)
    data_type, integers = stored_integers(tmp_path / "n.onnx", "quantized.4_linear_0_weight")
    assert data_type == onnx.TensorProto.INT8
    assert (integers.min(), integers.max()) == (-7, 7)
    assert kernels(tmp_path / "n.onnx") == 3
    reach = network[6].weight.abs().sum(dim=1).max() * grids.activations["5:relu:0"].scale
    expected = rounded(network, grids, X)
    assert (run(tmp_path / "n.onnx", X, optimised=False)[0] - expected).abs().max() <= reach


def test_activations_of_four_bits_are_clipped_in_the_file(tmp_path):
    network = odd_network()
    grids = calibrated(network, X, activation_bits=4)
    export(tmp_path / "n.onnx", network, grids)
    assert {grid.bits for grid in grids.activations.values()} == {4}
    assert kernels(tmp_path / "n.onnx") == 3
    far = 3 * X  # beyond what was calibrated, where integers of 8 bits would go on
    expected = rounded(network, grids, far)
    unclipped = copy.deepcopy(grids)
    unclipped.activations = {key: type(grid)(grid.scale, grid.zero_point, 8) for key, grid in grids.activations.items()}
    clipped = (rounded(network, unclipped, far) - expected).norm()
    assert clipped > 0.3 * expected.norm()
    assert (run(tmp_path / "n.onnx", far, optimised=False)[0] - expected).norm() < 0.1 * clipped


class Twice(nn.Module):
    """Layers that are used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.conv(x)))).mean((2, 3))
        return self.linear(F.relu(self.linear(x)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_that_are_used_twice(tmp_path, precision):
    network = Twice().eval()
    few = {"weight_bits": 4, "activation_bits": None} if precision == "int4" else {}
    grids = calibrated(network, X, **few)
    assert len(grids.sites) == 4
    export(tmp_path / "n.onnx", network, grids, precision)
    assert close(tmp_path / "n.onnx", network, grids, 1e-5 if few else 1e-2, optimised=False)
    counts = operators(tmp_path / "n.onnx")
    assert counts["MatMulNBits"] == 2 if few else kernels(tmp_path / "n.onnx") == 4


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_other_operator_sets(tmp_path, opset):
    network = odd_network()
    grids = calibrated(network, X)
    export(tmp_path / "n.onnx", network, grids, opset=opset)
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "n.onnx").opset_import}[""] == opset
    assert kernels(tmp_path / "n.onnx") == 3


@pytest.mark.slow
def test_equalised_and_corrected_layers(tmp_path):
    network = odd_network()
    network[4].weight.data[3] *= 50
    grids = calibrated(network, X, equalize=True, correct_bias=True)
    assert len(grids.divisors) == 1
    assert grids.biases
    export(tmp_path / "n.onnx", network, grids)
    plain = network(X).detach()
    assert (rounded(network, grids, X) - plain).norm() < 0.05 * plain.norm()
    assert kernels(tmp_path / "n.onnx") == 3
    expected = rounded(network, grids, X)
    assert (run(tmp_path / "n.onnx", X, optimised=False)[0] - expected).norm() < 0.02 * expected.norm()


# Large networks, with random weights


def large(name, size, samples=2):
    from torchvision import models

    network = getattr(models, name)(weights=None).eval()
    if name == "vit_b_16":
        nn.init.normal_(network.heads.head.weight, std=0.02)  # torchvision begins with zeros
    return network, torch.randn(samples, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "bytes_", "expected"),
    [
        ("resnet18", 64, 0.26, {"QLinearConv": 20, "QLinearAdd": 8, "QGemm": 1}),
        ("mobilenet_v2", 64, 0.27, {"QLinearConv": 52, "QLinearAdd": 10, "QGemm": 1}),
        ("mobilenet_v3_small", 64, 0.27, {"QLinearConv": 52, "QGemm": 2, "QLinearGlobalAveragePool": 10}),
        ("vit_b_16", 224, 0.26, {"MatMulIntegerToFloat": 36, "QGemm": 13, "QLinearConv": 1}),
    ],
)
def test_large_networks_run_in_integers(tmp_path, name, size, bytes_, expected):
    network, x = large(name, size)
    grids = calibrated(network, x)
    assert not [left for left in grids.left_in_float if left.endswith("weight")]
    result = to_onnx(holding(network, quantization=grids), tmp_path / "n.onnx", x, precision="int8")
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert result.bytes <= bytes_ * weights
    counts = operators(tmp_path / "n.onnx")
    assert {kind: counts[kind] for kind in expected} == expected
    assert sum(counts[kind] for kind in integer.KERNELS) == len(grids.sites)
    assert not {"Conv", "FusedConv", "Gemm", "HardSigmoid", "HardSwish", "BatchNormalization"} & set(counts)
    quantised = rounded(network, grids, x)
    assert (run(tmp_path / "n.onnx", x)[0] - quantised).norm() <= 0.1 * quantised.norm()


class Scores:
    """A file whose output is that of the quantised network, but for what a test does to it."""

    def __init__(self, network, grids, change):
        self.network, self.grids, self.change = network, grids, change

    def run(self, tensors):
        return [self.change(rounded(self.network, self.grids, tensors[0]).clone())]


class Masked(nn.Module):
    """One score is masked with a huge or an infinite number."""

    def __init__(self, value):
        super().__init__()
        self.linear, self.value = nn.Linear(8, 6), value

    def forward(self, x):
        return torch.cat([self.linear(x), torch.full((len(x), 1), self.value)], dim=1)


def halved(output):
    output[:, :6] *= 0.5
    return output


def finite(output):
    output[:, 6] = 0.0
    return output


@pytest.mark.parametrize("value", [-1e9, float("-inf")])
def test_a_masked_score_hides_nothing_and_is_no_error(value):
    network, x = Masked(value).eval(), torch.randn(8, 8)
    grids = calibrated(network, x)
    call = bind(inspect.signature(network.forward), Sample((x,)))
    plain = references(network, call, dynamic=True)
    integer = IntegerExport(network, call, grids, plain, precision="int8", max_difference=None)
    integer._check_kernels = lambda file: None
    assert integer.check(Scores(network, grids, lambda output: output)) == 0
    for change in (halved, finite):
        with pytest.raises(ExportError, match=r"differs .* and at most .* is accepted"):
            integer.check(Scores(network, grids, change))
        with pytest.raises(ExportError, match=r"differs .* and at most .* is accepted"):
            integer.check_trial(Scores(network, grids, lambda output: -output))


@pytest.mark.parametrize("case", ["beyond the clip", "few bits", "within the clip"])
def test_a_clip_that_the_grid_does_not_make_itself_leaves_the_layer_in_integers(case, tmp_path):
    """As that of ReLU6 behind a step that has learned: the grid reaches beyond 6."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3), nn.ReLU6(), nn.Flatten()).eval()
    varied_(network)
    with torch.no_grad():
        network[0].bias.add_(4.0)
    x = 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grids = calibrated(network, x, activation_bits=4 if case == "few bits" else 8)
    stretch = 1.37 if case == "beyond the clip" else 1.0
    wide = {
        key: replace(grid, scale=float(np.float32(grid.scale * stretch))) for key, grid in grids.activations.items()
    }
    holding(network, quantization=replace(grids, activations=wide))
    result = to_onnx(network, tmp_path / "m.onnx", x, precision="int8")
    assert kernels(result.path) == 2
    assert (operators(result.path)["Clip"] > 0) == (case != "within the clip")
    assert result.max_logit_difference < 1e-4

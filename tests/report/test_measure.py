from __future__ import annotations

import io
import zipfile

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_compress.report import measure
from lightning_compress.report.table import Layer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)
        self.calls = []

    def forward(self, x, *, other, scale):
        self.calls.append(tuple(x.shape))
        return (self.left(x) + self.right(other["values"])) * scale


def test_shared_parameters_count_once():
    tied = Tied()
    tied.head.weight.data[:2] = 0
    assert measure.count_parameters(tied) == 28
    assert measure.count_nonzeros(tied) == 20


def test_a_lazy_parameter_is_named():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    for function in (measure.count_parameters, measure.count_nonzeros, measure.layer_table):
        with pytest.raises(ValueError, match=r"parameter '1\.weight' of a lazy module has no shape yet"):
            function(module)
    module(torch.zeros(1, 2))
    assert measure.count_parameters(module) == 6 + 9


def test_meta_weights_have_no_zeros_to_count():
    module = nn.Linear(2, 2, device="meta")
    assert measure.count_parameters(module) == 6
    with pytest.raises(ValueError, match="'weight' has no values: it is on the meta device"):
        measure.count_nonzeros(module)


def test_layer_table_measures_the_tensors():
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.GRU(3, 5))
    module[0].weight.data[:3] = 0
    module[2].half()
    first, transposed, recurrent = measure.layer_table(module)
    assert first == Layer("0", "Conv2d", 0.75, 32, 4, 72)
    assert transposed == Layer("2", "ConvTranspose2d", 0.0, 16, 6, 48)
    assert (recurrent.type, recurrent.filters) == ("GRU", None)


def test_layer_table_sees_what_a_parametrization_makes():
    class Half(nn.Module):
        def forward(self, weight):
            return torch.cat([torch.zeros_like(weight[:1]), weight[1:]])

    layer = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    assert measure.layer_table(nn.Sequential(layer)) == [Layer("0", "Linear", 0.5, 32, 2, 6)]


MACS = {
    "convolution": (nn.Conv2d(2, 3, 3), (torch.randn(4, 2, 5, 5),), 3 * 2 * 9 * 9),
    "recurrent": (nn.LSTM(4, 3, batch_first=True), (torch.randn(6, 5, 4),), 5 * 12 * 7),
    # projections in and out, the two products of attention, and the two linear layers
    "encoder": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (torch.randn(3, 5, 8),),
        5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 64 + 5 * 8 * 16 * 2,
    ),
    "shared": (Tied(), (torch.zeros(4, 2, dtype=torch.long),), 2 * 28),
}


@pytest.mark.parametrize("case", MACS)
def test_macs_of_one_sample(case):
    network, inputs, expected = MACS[case]
    assert measure.count_macs(network, inputs) == (expected, None)


def test_macs_of_layers_beside_a_metric():
    """Whose hash changes with each value that it has seen."""

    class Measuring(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.mean = nn.Linear(3, 2), MeanMetric()

        def forward(self, x):
            self.mean(self.layer(x).mean())

    network = Measuring()
    assert measure.macs_by_layer(network, lambda: network(torch.zeros(4, 3))) == {"layer": 24}


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_macs_of_a_compiled_network(how):
    network = nn.Linear(3, 4)
    if how == "in place":
        network.compile(backend="eager")
    else:
        network = torch.compile(network, backend="eager")
    network(torch.zeros(2, 3))
    assert measure.count_macs(network, (torch.zeros(2, 3),)).value == 12


def test_counting_cuts_every_batched_input_and_leaves_no_trace():
    network = TwoInputs()
    network.left.eval()
    hook_calls = []
    network.register_forward_hook(lambda *call: hook_calls.append(1))
    hooks = dict(network._forward_hooks)
    fastpath, seed = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    other = {"values": torch.ones(4, 5)}
    assert measure.count_macs(network, (torch.ones(4, 3),), {"other": other, "scale": 2.0}).value == 6 + 10
    assert network.calls == []
    assert [module.training for module in network.modules()] == [True, False, True]
    assert dict(network._forward_hooks) == hooks
    assert other["values"].shape == (4, 5)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_counting_leaves_batch_norm_and_dropout_as_they_were():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert measure.count_macs(network, (torch.randn(8, 3),)).value == 12
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


REASONS = {
    "failing": (nn.Linear(3, 2), (torch.ones(4, 5),), "RuntimeError: mat1 and mat2"),
    "no tensor": (nn.Linear(3, 2), (1.0,), "the inputs hold no tensor with a batch dimension"),
    "opaque": (nn.Linear(3, 2), (torch.ones(1, 3), object()), "an input of type object cannot be cut to one sample"),
    "unseen": (nn.Bilinear(3, 4, 5), (torch.ones(2, 3), torch.ones(2, 4)), "the counter saw no matrix product"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_missing_count_has_a_reason(case):
    network, inputs, reason = REASONS[case]
    count = measure.count_macs(network, inputs)
    assert count.value is None
    assert reason in count.reason


def test_bytes_are_those_of_the_saved_file(tmp_path):
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    # Equal but for the archive's own folder name, which torch takes from the file.
    assert abs(measure.bytes_of_state(module) - (tmp_path / "state.pt").stat().st_size) < 100
    loaded = torch.load(io.BytesIO(measure.serialized_state(module)), weights_only=True)
    assert torch.equal(loaded["head.weight"], module.head.weight)


def test_compressed_bytes_equal_a_zip_archive(tmp_path):
    data = bytes(3_000_000) + torch.randn(1000).numpy().tobytes()
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("data.bin", data)
        expected = archive.getinfo("data.bin").compress_size
    assert abs(measure.compressed_bytes(data) - expected) < 16
    assert measure.compressed_bytes(path) == measure.compressed_bytes(data)


def test_zeros_make_the_compressed_state_smaller():
    dense, sparse = nn.Linear(64, 64), nn.Linear(64, 64)
    sparse.weight.data[torch.rand(64, 64) < 0.9] = 0
    assert measure.bytes_of_state(dense) == measure.bytes_of_state(sparse)
    smaller = measure.compressed_bytes(measure.serialized_state(sparse))
    assert smaller < 0.35 * measure.compressed_bytes(measure.serialized_state(dense))

from __future__ import annotations

import gc
import importlib.util
import inspect
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lightning_compress
from lightning_compress.demo import ResidualBlock
from lightning_compress.export import ExportError, Sample, to_onnx
from lightning_compress.export import tracing as tracing_module

from . import networks
from .networks import CLASSES, FEATURES, Branch, Conv, DictInput, KeywordNet, ShapeBranch, Structured, mlp


def run(path, *arrays):
    session = onnxruntime.InferenceSession(str(path))
    feed = {entry.name: np.asarray(array) for entry, array in zip(session.get_inputs(), arrays, strict=True)}
    return session.run(None, feed)


def everything(module):
    """What must be the same before and after: values, flags, hooks, instance attributes, random states."""
    return (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        [part.training for part in module.modules()],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        [{name: id(value) for name, value in vars(part).items()} for part in module.modules()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),  # noqa: NPY002
    )


def assert_same(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4][0], after[4][0])
    assert before[4][1] == after[4][1]
    assert (before[4][2] == after[4][2]).all()


def test_result_file_and_untouched_module(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    network = Conv()
    network(torch.randn(8, 1, 6, 6))  # statistics other than the initial ones
    network.drop.eval()
    network.register_forward_hook(lambda *arguments: None)
    sample = torch.randn(2, 1, 6, 6)
    before = everything(network)
    path = tmp_path / "new" / "deep" / "conv.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = to_onnx(network, path, sample)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert_same(before, everything(network))
    assert os.listdir(path.parent) == ["conv.onnx"]
    assert (result.path, result.bytes) == (path, path.stat().st_size)
    assert (result.precision, result.left_in_float, result.network, result.opset) == ("fp32", (), "", 20)
    assert result.checked_batch_sizes == (2, 1, 5)
    assert (result.input_names, result.output_names) == (("x",), ("output",))
    network.eval()
    for rows in (1, 2, 7):
        x = torch.randn(rows, 1, 6, 6)
        (found,) = run(path, x)
        np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)
    assert result.max_logit_difference < 1e-5


def test_contents_of_the_file(tmp_path):
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for path in paths:
        to_onnx(nn.Sequential(mlp()).eval(), path, torch.zeros(2, FEATURES), opset=18, network="0")
    assert len({path.stat().st_size for path in paths}) == 1
    model = onnx.load(paths[0])
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "lightning_compress.network": "0",
        "lightning_compress.precision": "fp32",
        "lightning_compress.version": lightning_compress.__version__,
        "lightning_compress.constants": "{}",
    }
    assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
    assert all(not value.metadata_props and not value.doc_string for value in model.graph.value_info)
    assert {"4.weight", "4.bias"} <= {entry.name for entry in model.graph.initializer}
    assert all(not entry.external_data for entry in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(tmp_path, request):
    network = mlp()
    to_onnx(network, tmp_path / "one.onnx", torch.ones(2, FEATURES))
    request.getfixturevalue("fresh_operator_table")
    to_onnx(network, tmp_path / "two.onnx", torch.ones(2, FEATURES))
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("list", ("output_0", "output_1_0", "output_1_1")),
        ("namedtuple", ("first", "second")),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("tuple", ("output_0", "output_1")),
                ("dataclass", ("logits", "embedding")),
                ("twice", ("output_0", "output_1")),
            )
        ),
    ],
)
def test_output_structures(tmp_path, kind, names):
    network = Structured(kind)
    x = torch.randn(3, FEATURES)
    result = to_onnx(network, tmp_path / "n.onnx", x)
    assert result.output_names == names
    assert result.checked_batch_sizes == (3, 1, 5)
    np.testing.assert_allclose(run(tmp_path / "n.onnx", x)[0], network.layer(x).detach().numpy(), atol=1e-5)


def test_dict_input_and_dict_output(tmp_path):
    batch = {"u": torch.randn(2, 4), "deep": {"v": torch.randn(2, 3)}}
    result = to_onnx(DictInput(), tmp_path / "n.onnx", batch)
    assert result.input_names == ("batch_u", "batch_deep_v")
    assert result.output_names == ("total", "u")


def test_names_that_clash(tmp_path):
    class Clash(nn.Module):
        def forward(self, x, x_0):
            return {"x": x[0] + x_0, "x 0": x[0]}

    result = to_onnx(Clash(), tmp_path / "n.onnx", ((torch.ones(2, 3),), torch.ones(2, 3)))
    assert result.input_names == ("x_0", "x_0_1")
    assert result.output_names == ("x", "x_0_2")


@pytest.mark.parametrize(
    "sample",
    [
        {"features": torch.ones(2, FEATURES), "scale": 2.0},
        Sample(kwargs={"features": torch.ones(2, FEATURES), "scale": 2.0}),
    ],
)
def test_keyword_samples_bake_constants_in(tmp_path, sample):
    network = KeywordNet()
    result = to_onnx(network, tmp_path / "n.onnx", sample)
    assert (result.input_names, result.output_names) == (("features",), ("logits",))
    x = torch.randn(4, FEATURES)
    expected = network.eval()(features=x, scale=2.0)["logits"]
    np.testing.assert_allclose(run(tmp_path / "n.onnx", x)[0], expected.detach().numpy(), atol=1e-5)
    assert '"scale": "2.0"' in str(onnx.load(tmp_path / "n.onnx").metadata_props).replace("\\", "")


def test_tensors_that_are_no_batch_stay_fixed(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x, scale, *, offset=None):
            return x * scale + (0 if offset is None else offset)

    result = to_onnx(
        Scaled(), tmp_path / "n.onnx", Sample((torch.ones(2, 3), torch.tensor(2.0)), {"offset": torch.ones(3)})
    )
    assert result.input_names == ("x", "scale", "offset")
    shapes = [entry.shape for entry in onnxruntime.InferenceSession(str(tmp_path / "n.onnx")).get_inputs()]
    assert shapes == [["batch", 3], [], [3]]


def test_fixed_batch(tmp_path):
    result = to_onnx(ShapeBranch(values=False), tmp_path / "n.onnx", torch.ones(6, FEATURES), dynamic_batch=False)
    assert result.checked_batch_sizes == (6,)
    assert onnxruntime.InferenceSession(str(tmp_path / "n.onnx")).get_inputs()[0].shape == [6, FEATURES]


def test_half_precision_is_widened(tmp_path):
    network = mlp().to(torch.bfloat16)
    to_onnx(network, tmp_path / "n.onnx", torch.ones(2, FEATURES, dtype=torch.bfloat16))
    assert onnxruntime.InferenceSession(str(tmp_path / "n.onnx")).get_inputs()[0].type == "tensor(float)"
    assert network[0].weight.dtype == torch.bfloat16


def test_a_network_is_compared_in_full_float32(rounded_float32, tmp_path):
    precisions = set()

    class Wide(nn.Linear):
        def forward(self, x):
            precisions.update(rounded_float32())
            return super().forward(x)

    assert to_onnx(Wide(256, 256), tmp_path / "network.onnx", torch.randn(4, 256)).max_logit_difference < 1e-4
    assert precisions == {"ieee"}


@pytest.mark.slow
def test_compiled_networks(tmp_path):
    network, x = mlp().eval(), torch.randn(2, FEATURES)
    expected = network(x).detach().numpy()
    outer = nn.Sequential(torch.compile(network, backend="eager"))
    outer(x)
    for number, (module, name) in enumerate([(torch.compile(network, backend="eager"), None), (outer, "0")]):
        to_onnx(module, tmp_path / f"{number}.onnx", x, network=name)
        np.testing.assert_allclose(run(tmp_path / f"{number}.onnx", x)[0], expected, atol=1e-5)
    assert isinstance(outer[0], torch._dynamo.OptimizedModule)


# Where the input comes from


def with_captured(*captured):
    module = networks.lightning_module("lightning.pytorch")
    module._trainer = SimpleNamespace(callbacks=[object(), *(SimpleNamespace(captured_sample=one) for one in captured)])
    return module


def captured_sample(network, rows=3):
    return SimpleNamespace(network=network, args=(torch.ones(rows, FEATURES),), kwargs={})


def test_captured_input_chooses_network_and_sample(tmp_path):
    module = with_captured(None, captured_sample("model._orig_mod"))
    module.example_input_array = torch.ones(9, FEATURES)
    result = to_onnx(module, tmp_path / "n.onnx")
    assert (result.network, result.input_names, result.checked_batch_sizes[0]) == ("model", ("input",), 3)
    result = to_onnx(module, tmp_path / "n.onnx", network="")
    assert (result.network, result.input_names, result.checked_batch_sizes[0]) == ("", ("x",), 9)
    result = to_onnx(module, tmp_path / "n.onnx", sample=torch.ones(4, FEATURES))
    assert (result.network, result.checked_batch_sizes[0]) == ("model", 4)


def test_captured_inputs_of_two_networks_need_a_choice(tmp_path):
    module = with_captured(captured_sample("model"), captured_sample(""))
    with pytest.raises(ValueError, match=r"input of several networks, \['', 'model'\]; choose one with network="):
        to_onnx(module, tmp_path / "n.onnx")
    assert to_onnx(module, tmp_path / "n.onnx", network="model").network == "model"


def test_example_input_array_and_none_at_all(tmp_path):
    module = networks.lightning_module("pytorch_lightning")
    with pytest.raises(ValueError, match="no input to export 'Classifier' with: pass sample=, set example_input_array"):
        to_onnx(module, tmp_path / "n.onnx")
    module.example_input_array = (torch.ones(2, FEATURES),)
    assert to_onnx(module, tmp_path / "n.onnx").input_names == ("x",)
    assert module._trainer is None


def test_a_sample_of_one_row_does_not_decide_on_the_layout_of_channels(tmp_path):
    network = ResidualBlock(2, 2).to(memory_format=torch.channels_last)  # adds what has one layout to what has another
    x = torch.randn(5, 2, 6, 6)
    to_onnx(network, tmp_path / "n.onnx", x[:1])
    np.testing.assert_allclose(run(tmp_path / "n.onnx", x)[0], network.eval()(x).detach().numpy(), atol=1e-5)


def test_checkpoint_weights_go_into_the_copy(tmp_path):
    module, other = (networks.lightning_module("lightning.pytorch") for _ in range(2))
    trainer = networks.trainer("lightning.pytorch", max_epochs=1)
    trainer.fit(other, networks.loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    x = torch.randn(3, FEATURES)
    before = everything(module)
    to_onnx(module, tmp_path / "n.onnx", x, checkpoint=tmp_path / "other.ckpt", network="model")
    assert_same(before, everything(module))
    np.testing.assert_allclose(run(tmp_path / "n.onnx", x)[0], other.eval()(x).detach().numpy(), atol=1e-5)


def test_checkpoint_that_does_not_fit(tmp_path):
    module = networks.lightning_module("lightning.pytorch")
    weights = dict(list(module.state_dict().items())[1:])
    torch.save({"state_dict": weights}, tmp_path / "short.ckpt")
    with pytest.raises(ExportError, match=r"short\.ckpt' does not fit Classifier(.|\n)*Missing key.*model\.0\.weight"):
        to_onnx(module, tmp_path / "n.onnx", torch.ones(2, FEATURES), checkpoint=tmp_path / "short.ckpt")


def test_checkpoint_of_a_module_that_leaves_weights_out(tmp_path):
    """As those of a frozen backbone, which ``strict_loading = False`` is for."""
    module = networks.lightning_module("lightning.pytorch")
    module.strict_loading = False
    weights = {name: torch.zeros_like(value) for name, value in list(module.state_dict().items())[2:]}
    torch.save({"state_dict": weights}, tmp_path / "short.ckpt")
    x = torch.ones(2, FEATURES)
    told = (
        r"only one of the two has 'model\.0\.weight'.*: checkpoint '.*short\.ckpt' and Classifier, whose strict_loading"
    )
    with pytest.warns(UserWarning, match=told):
        to_onnx(module, tmp_path / "n.onnx", x, checkpoint=tmp_path / "short.ckpt", network="model")
    assert not run(tmp_path / "n.onnx", x)[0].any()
    torch.save({"state_dict": {f"of.another.{name}": value for name, value in weights.items()}}, tmp_path / "n.ckpt")
    with pytest.raises(ExportError, match=r"n\.ckpt' does not fit Classifier"):
        to_onnx(module, tmp_path / "n.onnx", x, checkpoint=tmp_path / "n.ckpt", network="model")


def test_checkpoint_of_the_module_that_the_network_is_a_part_of(tmp_path):
    module = networks.lightning_module("lightning.pytorch")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "whole.ckpt")
    hint = "but its part 'model' does: pass the LightningModule that it is of, and network='model'"
    with pytest.raises(ExportError, match=rf"does not fit {type(module.model).__name__}, {hint}"):
        to_onnx(module.model, tmp_path / "n.onnx", torch.ones(2, FEATURES), checkpoint=tmp_path / "whole.ckpt")


def test_checkpoint_hook_of_the_user_is_called(tmp_path):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x)

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"layer.{key}": value for key, value in checkpoint["state_dict"].items()}

    torch.save({"state_dict": {"weight": torch.ones(1, 2), "bias": torch.ones(1)}}, tmp_path / "old.ckpt")
    to_onnx(Renamed(), tmp_path / "n.onnx", torch.ones(2, 2), checkpoint=tmp_path / "old.ckpt")
    assert run(tmp_path / "n.onnx", torch.ones(1, 2))[0].item() == 3


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"precision": "int8"},
            ValueError,
            "precision 'int8' needs scales, and its Trainer's callbacks hold none; add PTQCallback",
        ),
        ({"precision": "int4", "opset": 20}, ValueError, "opset must be at least 21 for precision 'int4', got 20"),
        ({"precision": "in8"}, ValueError, r"one of fp32, int8, int4, got 'in8'; did you mean 'int8'"),
        ({"opset": 17}, ValueError, "opset must be at least 18 for precision 'fp32', got 17"),
        ({"max_difference": 0.0}, ValueError, "max_difference must be a positive number, or None, got 0.0"),
        ({"network": "boddy"}, ValueError, "network names 'boddy', not .* of Net; did you mean 'body'"),
        ({"sample": 3}, TypeError, "sample must be a tensor, a tuple of arguments, a dict, a Sample.*got int"),
        ({"sample": ()}, ValueError, "sample holds no tensor"),
        ({"sample": {}}, ValueError, "sample holds no tensor"),
        (
            {"sample": (torch.ones(2, 2), torch.ones(2, 2))},
            TypeError,
            r"sample does not fit Net\.forward\(x\): too many",
        ),
        (
            {"sample": torch.ones(2, 2)},
            ExportError,
            "Net does not run on the sample: RuntimeError: .*shapes cannot be mul",
        ),
        ({"checkpoint": "missing.ckpt"}, FileNotFoundError, r"missing\.ckpt' does not exist"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x)

    network = Net()
    before = everything(network)
    with pytest.raises(error, match=message):
        to_onnx(network, **{"path": tmp_path / "n.onnx", "sample": torch.ones(2, FEATURES), **arguments})
    assert_same(before, everything(network))
    assert os.listdir(tmp_path) == []


def test_bad_paths(tmp_path, monkeypatch):
    def refused(**settings):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    for path, message in [
        (tmp_path / "n.pt", r"path must end in '\.onnx', got"),
        (tmp_path / "folder.onnx", r"folder\.onnx' is a directory"),
        (tmp_path / "file" / "n.onnx", "file' is not a directory"),
        (tmp_path / "file" / "deep" / "n.onnx", "file' is not a directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_onnx(mlp(), path, torch.ones(2, FEATURES))
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"cannot be written because '.*' is not writable"):
        to_onnx(mlp(), tmp_path / "n.onnx", torch.ones(2, FEATURES))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (5, TypeError, "path must be a string or a path, got 5"),
        (True, TypeError, "path must be a string or a path, got True"),
        (["a.onnx"], TypeError, r"path must be a string or a path, got \['a.onnx'\]"),
        (b"a.onnx", TypeError, "path must be a string or a path, got b'a.onnx'"),
        ("a\0b.onnx", ValueError, r"path must not be empty or hold a NUL character, got 'a\\x00b.onnx'"),
        ("\u00e9" * 118 + ".onnx", ValueError, "has a name of 241 bytes; at most 237 are accepted"),
        ("a" * 256 + "/a.onnx", ValueError, "has a name of 256 bytes; at most 255 are accepted"),
    ],
)
def test_what_no_file_can_be_called(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "pathconf", lambda folder, name: 255)
    with pytest.raises(error, match=message):
        to_onnx(mlp(), path, torch.ones(2, FEATURES))
    assert os.listdir(tmp_path) == []


def test_the_longest_name_is_written(tmp_path):
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - len("-.") - 16
    name = "a" * (most - len(".onnx")) + ".onnx"
    assert to_onnx(mlp(), tmp_path / name, torch.ones(2, FEATURES)).path.name == name
    with pytest.raises(ValueError, match=f"has a name of {most + 1} bytes; at most {most} are accepted"):
        to_onnx(mlp(), tmp_path / f"a{name}", torch.ones(2, FEATURES))
    (tmp_path / "link.onnx").symlink_to(tmp_path / f"a{name}")
    with pytest.raises(ValueError, match=f"has a name of {most + 1} bytes"):
        to_onnx(mlp(), tmp_path / "link.onnx", torch.ones(2, FEATURES))


def test_module_without_a_forward(tmp_path):
    for module in (networks.lightning_module("lightning.pytorch"), nn.ModuleDict({"model": mlp()})):
        if hasattr(type(module), "training_step"):
            type(module).forward = type(module).__mro__[1].forward
        with pytest.raises(ValueError, match=r"has no forward; pass .* inside it, such as network='model'"):
            to_onnx(module, tmp_path / "n.onnx", torch.ones(2, FEATURES))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"good": x, "bad": x * float("nan")}, "output 'bad' of Net is NaN on the sample"),
        (lambda x: torch.distributions.Normal(x, 1.0), "Net gives no tensor on the sample but a Normal"),
    ],
)
def test_outputs_that_cannot_be_exported(tmp_path, output, message):
    class Net(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(ExportError, match=message):
        to_onnx(Net(), tmp_path / "n.onnx", torch.ones(2, 2))
    assert os.listdir(tmp_path) == []


def test_infinite_outputs_are_no_difference(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, float("-inf"))

    assert to_onnx(Masked(), tmp_path / "n.onnx", torch.tensor([[1.0, -1.0], [2.0, 0.0]])).max_logit_difference == 0


class Causal(nn.Module):
    """Attention that is given the mask of the causal one, which torch would recognise by its values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.layers(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class Distributed(nn.Module):
    """The mean of a distribution, whose parameters torch checks when it is made."""

    def forward(self, x):
        return torch.distributions.Normal(x, x.exp()).mean * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Causal, Distributed])
def test_a_network_at_whose_values_only_torch_looks_is_exported(kind, tmp_path):
    network, x = kind().eval(), torch.randn(2, 3, 4)
    result = to_onnx(network, tmp_path / "n.onnx", x)
    [output] = onnxruntime.InferenceSession(str(result.path)).run(None, {result.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(x))


def test_what_fails_in_the_exporter_itself_says_what_else_to_do():
    message = tracing_module._explain("Net", RuntimeError("no operation for clamp"), dynamic_batch=False)
    assert message == (
        "Net cannot be exported: no operation for clamp; it fails in torch's exporter: name a part of the network "
        "that does without"
    )


def test_a_number_that_python_takes_from_a_tensor_is_named(tmp_path):
    class Number(nn.Module):
        def forward(self, x):
            dimensions = torch.arange(1, x.ndim).tolist()
            return x.mean(dim=dimensions)

    with pytest.raises(
        ExportError, match=r"a number that Python takes from a tensor.*\.item\(\), \.tolist\(\) and int\(\)"
    ):
        to_onnx(Number(), tmp_path / "n.onnx", torch.ones(2, 3))


def test_branch_on_data_names_file_and_line(tmp_path, capfd):
    lines, start = inspect.getsourcelines(Branch.forward)
    line = start + next(number for number, text in enumerate(lines) if "# the branch" in text)
    network = Branch()
    before = everything(network)
    with pytest.raises(ExportError) as caught:
        to_onnx(network, tmp_path / "n.onnx", torch.ones(2, FEATURES))
    assert f"data-dependent branch at {networks.__file__}:{line}: `if x.sum() > 0:" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert_same(before, everything(network))
    assert os.listdir(tmp_path) == []


def test_loggers_are_put_back_after_a_failure(tmp_path):
    logging.getLogger("onnx_ir").setLevel(logging.INFO)
    with pytest.raises(ExportError):
        to_onnx(Branch(), tmp_path / "n.onnx", torch.ones(2, FEATURES))
    assert logging.getLogger("onnx_ir").level == logging.INFO
    logging.getLogger("onnx_ir").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("network", "rows", "bounds"),
    [
        (ShapeBranch(values=True), 2, "from 0 to 4"),
        (ShapeBranch(values=True), 8, "from 5"),
        (ShapeBranch(values=False), 2, "from 0 to 4"),
    ],
)
def test_branch_on_the_batch_size(tmp_path, network, rows, bounds):
    (tmp_path / "n.onnx").write_text("an older file")
    message = f"branches on the batch size, and .* for batch sizes {bounds} only; pass dynamic_batch=False"
    with pytest.raises(ExportError, match=message):
        to_onnx(network, tmp_path / "n.onnx", torch.ones(rows, FEATURES))
    assert os.listdir(tmp_path) == ["n.onnx"]
    assert (tmp_path / "n.onnx").read_text() == "an older file"


def test_a_branch_for_one_row_is_told_as_one(tmp_path):
    class Alone(nn.Module):
        def forward(self, x):
            return 2 * x if x.shape[0] == 1 else x

    with pytest.raises(ExportError, match=r"at batch size 1 .* probably branches on the batch size"):
        to_onnx(Alone(), tmp_path / "n.onnx", torch.ones(1, 2))


def test_branch_beyond_every_size_that_is_run(tmp_path):
    class Wide(nn.Module):
        def forward(self, x):
            return x * 0 if x.shape[0] > 16 else x

    with pytest.raises(ExportError, match="for batch sizes from 0 to 16 only"):
        to_onnx(Wide(), tmp_path / "n.onnx", torch.ones(4, 2))


def test_names_of_weights_that_are_taken_by_inputs_and_nodes(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.tensor([3.0, 4.0]))
            self.add = nn.Parameter(torch.tensor([5.0, 6.0]))

        def forward(self, x):
            return (x + self.x) * self.add

    assert to_onnx(Named(), tmp_path / "n.onnx", torch.ones(4, 2)).max_logit_difference < 1e-5


def test_an_object_whose_tensors_a_file_cannot_take(tmp_path):
    class Holder:
        x = torch.ones(4, 2)

    class Scaled(nn.Module):
        def forward(self, x, holder):
            return x * holder.x

    with pytest.raises(TypeError, match="argument 'holder' is of type Holder"):
        to_onnx(Scaled(), tmp_path / "n.onnx", (torch.ones(4, 2), Holder()))


def test_a_read_only_file_stays_and_a_link_is_followed(tmp_path):
    target = tmp_path / "real.onnx"
    target.write_text("kept")
    target.chmod(0o444)
    with pytest.raises(ValueError, match="is a read-only file"):
        to_onnx(nn.Linear(2, 1), target, torch.ones(4, 2))
    assert target.read_text() == "kept"
    target.chmod(0o644)
    (tmp_path / "link.onnx").symlink_to(target)
    to_onnx(nn.Linear(2, 1), tmp_path / "link.onnx", torch.ones(4, 2))
    assert (tmp_path / "link.onnx").is_symlink()
    assert target.stat().st_size > 100


def test_network_that_needs_its_batch_size(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            if x.shape[0] != 4:
                raise RuntimeError("four rows or nothing")
            return x * 2

    message = r"Fixed itself fails at batch size 1 \(RuntimeError: four rows or nothing\); pass dynamic_batch=False"
    with pytest.raises(ExportError, match=message):
        to_onnx(Fixed(), tmp_path / "n.onnx", torch.ones(4, 2))
    assert to_onnx(Fixed(), tmp_path / "n.onnx", torch.ones(4, 2), dynamic_batch=False).checked_batch_sizes == (4,)


def test_batch_size_baked_in_by_the_forward(tmp_path):
    class Baked(nn.Module):
        def forward(self, x):
            return x.reshape(4, -1) * 2

    with pytest.raises(ExportError, match=r"Baked itself fails at batch size 1 .*pass dynamic_batch=False"):
        to_onnx(Baked(), tmp_path / "n.onnx", torch.ones(4, 2))
    assert os.listdir(tmp_path) == []


def test_operation_without_an_onnx_form(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x @ x.mT).real

    with pytest.raises(ExportError, match="Odd cannot be exported: "):
        to_onnx(Odd(), tmp_path / "n.onnx", torch.ones(2, 3, 3))
    assert os.listdir(tmp_path) == []


def test_weights_beyond_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing_module, "MAX_BYTES", 100)
    with pytest.raises(
        ExportError, match=r"Linear holds 168 bytes of weights; one self-contained file holds at most 100"
    ):
        to_onnx(nn.Linear(6, 6), tmp_path / "n.onnx", torch.ones(2, 6))


def test_missing_extra(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_compress.export.runtime.find_spec",
        lambda name: None if name in ("onnx", "onnxscript") else found(name),
    )
    with pytest.raises(ImportError) as caught:
        to_onnx(mlp(), tmp_path / "n.onnx", torch.ones(2, FEATURES))
    assert "onnx and onnxscript, which are not installed" in str(caught.value)
    assert 'run: pip install "onnx<2' in str(caught.value)


@pytest.mark.slow  # test_layers.py reads the imports
def test_import_brings_in_nothing_heavy():
    code = (
        "import sys; from lightning_compress import export;"
        "heavy = {'onnx', 'onnxscript', 'onnxruntime', 'lightning', 'pytorch_lightning'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Networks of other people


@pytest.mark.slow
def test_resnet18(tmp_path):
    from torchvision.models import resnet18

    result = to_onnx(resnet18(num_classes=CLASSES), tmp_path / "n.onnx", torch.randn(2, 3, 32, 32))
    assert result.max_logit_difference < 1e-4
    assert 44e6 < result.bytes < 46e6


@pytest.mark.slow
def test_torchvision_segmentation(tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    result = to_onnx(network, tmp_path / "n.onnx", torch.randn(2, 3, 32, 32))
    assert result.output_names == ("out",)
    assert result.checked_batch_sizes == (2, 1, 5)


@pytest.mark.slow
def test_transformers_classifier(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    sample = {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    result = to_onnx(BertForSequenceClassification(config), tmp_path / "n.onnx", sample)
    assert (result.input_names, result.output_names) == (("input_ids", "attention_mask"), ("logits",))
    assert result.max_logit_difference < 1e-4


def test_arguments_without_tensors_are_constants_of_the_file(tmp_path):
    class Casting(nn.Module):
        def forward(self, x, dtype=torch.float32, activation=torch.relu):
            return activation(x.to(dtype))

    assert to_onnx(Casting(), tmp_path / "n.onnx", torch.ones(4, 2)).input_names == ("x",)


@pytest.mark.slow
def test_no_weights_are_kept(tmp_path):
    network = nn.Sequential(nn.Linear(300, 301), nn.ReLU(), nn.Linear(301, 3))
    to_onnx(network, tmp_path / "wide.onnx", torch.randn(2, 300))
    gc.collect()
    shapes = {(300, 301), (301, 300)}
    kept = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter, np.ndarray)]
    assert [value for value in kept if tuple(value.shape) in shapes and value is not network[0].weight] == []

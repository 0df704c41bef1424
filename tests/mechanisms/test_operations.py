"""What each operation is called and what becomes of it, against what torch calls it and what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_compress.mechanisms.operations import (
    CONVOLUTIONS,
    KINDS,
    Kind,
    is_global_average,
    kind_of,
    operation_name,
    writes,
)


class Noting(TorchFunctionMode):
    """Notes what is said of each operation that arrives."""

    def __init__(self):
        super().__init__()
        self.names, self.kinds, self.writing = [], [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = operation_name(func)
        self.names.append(name)
        self.kinds.append(kind_of(name, args, kwargs or {}))
        self.writing.append(writes(func))
        return func(*args, **(kwargs or {}))


def noted(run):
    with Noting() as mode:
        run()
    return mode


X, Y, MAPS = torch.rand(2, 3), torch.rand(2, 3), torch.rand(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("add", [lambda x: x + Y, lambda x: torch.add(x, Y), lambda x: x.add(Y), lambda x: x.add_(Y), lambda x: 1 + x]),
        ("mul", [lambda x: x * Y, lambda x: torch.mul(x, Y), lambda x: x.mul_(Y), lambda x: 2 * x]),
        ("multiply", [lambda x: torch.multiply(x, Y), lambda x: x.multiply_(Y)]),
        ("relu", [F.relu, torch.relu, torch.relu_, F.relu_, nn.ReLU(), nn.ReLU(inplace=True), Tensor.relu]),
        ("sigmoid", [torch.sigmoid, F.sigmoid, nn.Sigmoid(), Tensor.sigmoid_]),
        ("silu", [F.silu, nn.SiLU(), lambda x: F.silu(x, inplace=True)]),
        ("hardswish", [F.hardswish, nn.Hardswish(), nn.Hardswish(inplace=True)]),
        ("hardsigmoid", [F.hardsigmoid, nn.Hardsigmoid()]),
        ("leaky_relu", [F.leaky_relu, nn.LeakyReLU(0.1), nn.LeakyReLU(inplace=True)]),
        ("hardtanh", [nn.ReLU6(), F.hardtanh, nn.Hardtanh()]),
        ("relu6", [F.relu6]),
        ("clamp", [lambda x: x.clamp(0, 1), lambda x: torch.clamp(x, min=0)]),
        ("linear", [lambda x: F.linear(x, Y), nn.Linear(3, 1)]),
        ("getitem", [lambda x: x[0], lambda x: x[:, None]]),
        ("dropout", [F.dropout, nn.Dropout(), lambda x: F.dropout(x, inplace=True)]),
        ("flatten", [nn.Flatten(), torch.flatten, Tensor.flatten]),
        ("transpose", [lambda x: x.transpose(0, 1), lambda x: torch.transpose(x, 0, 1), lambda x: x.transpose_(0, 1)]),
        ("mean", [torch.mean, lambda x: x.mean(1)]),
        ("get", [lambda x: x.shape, lambda x: x.device, lambda x: x.grad]),
        ("len", [len]),
    ],
)
def test_operations_have_one_name_however_they_are_called(name, spellings):
    for spelled in spellings:
        assert noted(lambda spelled=spelled: spelled(X.clone())).names[1:] == [name]  # after the clone


@pytest.mark.parametrize(
    ("name", "run", "writing"),
    [
        ("add", lambda x: x.__iadd__(Y), True),
        ("mul", lambda x: x.mul_(Y), True),
        ("sub_", lambda x: x.__isub__(Y), True),
        ("setitem", lambda x: x.__setitem__(0, 1.0), True),
        ("relu", F.relu_, True),
        ("exp_", Tensor.exp_, True),
        ("add", lambda x: x + Y, False),
        ("sub", lambda x: x - Y, False),
        ("invert", lambda x: ~(x > 0), False),
        ("getitem", lambda x: x[0], False),
    ],
)
def test_operations_that_write_into_their_operand_are_told(name, run, writing):
    """By what they do to it."""
    x = X.clone()
    seen = noted(lambda: run(x))
    assert (seen.names[-1], seen.writing[-1]) == (name, writing)
    assert torch.equal(x, X) is not (writing and name != "relu")  # nothing here is below 0


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("conv1d", lambda: nn.Conv1d(2, 3, 1)(MAPS[:, :, 0])),
        ("conv2d", lambda: nn.Conv2d(2, 3, 1)(MAPS)),
        ("conv3d", lambda: nn.Conv3d(1, 3, 1)(MAPS)),
        ("batch_norm", lambda: nn.BatchNorm2d(2).eval()(MAPS)),
        ("max_pool2d", lambda: nn.MaxPool2d(2)(MAPS)),
        ("avg_pool2d", lambda: nn.AvgPool2d(2)(MAPS)),
        ("adaptive_avg_pool2d", lambda: nn.AdaptiveAvgPool2d(1)(MAPS)),
        ("adaptive_max_pool2d", lambda: nn.AdaptiveMaxPool2d(1)(MAPS)),
        ("pixel_shuffle", lambda: nn.PixelShuffle(1)(MAPS)),
        ("unflatten", lambda: nn.Unflatten(1, (1, 2))(MAPS)),
        ("cat", lambda: torch.cat([MAPS, MAPS])),
        ("chunk", lambda: MAPS.chunk(2)),
        ("split", lambda: torch.split(MAPS, 1)),
        ("pad", lambda: nn.ZeroPad2d(1)(MAPS)),
        ("pad", lambda: nn.ReflectionPad2d(1)(MAPS)),
        ("interpolate", lambda: nn.Upsample(scale_factor=2)(MAPS)),
        ("dropout", lambda: nn.Dropout()(MAPS)),
        ("feature_dropout", lambda: torch.feature_dropout(MAPS, 0.5, False)),
        ("dropout2d", lambda: nn.Dropout2d()(MAPS)),
    ],
)
def test_modules_arrive_under_the_names_of_their_functions(name, run):
    seen = noted(run)
    assert name in seen.names
    assert seen.kinds[seen.names.index(name)] is not Kind.FLOAT


def test_each_name_is_that_of_an_operation_of_torch():
    of_attributes, of_functions = (
        {"get", "set", "delete"},
        {"identity", "hash", "len", "bool", "getitem", "format", "repr"},
    )
    for name in KINDS.keys() - of_attributes - of_functions:
        assert any(hasattr(owner, name) for owner in (torch, Tensor, F)), name
    assert all(hasattr(Tensor, f"__{name}__") for name in of_functions - {"identity"})


def test_kinds():
    assert {name for name, kind in KINDS.items() if kind is Kind.WEIGHTED} == {*CONVOLUTIONS, "linear"}
    assert CONVOLUTIONS == {"conv1d": 1, "conv2d": 2, "conv3d": 3}
    names = ("batch_norm", "relu", "cat", "mean", "hardswish", "view", "chunk", "size")
    kinds = "NORM", "FUSED", "JOINED", "POOLED", "CURVED", "MOVED", "CUT", "ASKED"
    assert tuple(kind_of(name).name for name in names) == kinds
    for name in ("softmax", "conv_transpose2d", "layer_norm", "matmul", "gelu", "sub", "lstm", "anything"):
        assert kind_of(name) is Kind.FLOAT


MOVES = {
    "MOVED": [
        lambda x: x.view(-1),
        lambda x: x.permute(3, 2, 1, 0),
        lambda x: x.unsqueeze(0),
        lambda x: x.contiguous(),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.dropout(x, 0.5, False),
        lambda x: F.dropout2d(x, training=False),
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.pad(x, (1, 1), value=0.0),
    ],
    "CUT": [
        lambda x: x.roll(1, 0),
        lambda x: x.flip(0),
        lambda x: x.expand(2, 2, 4, 4),
        lambda x: x.repeat(2, 1, 1, 1),
        lambda x: F.pixel_shuffle(x.view(1, 4, 2, 4), 2),
        lambda x: torch.chunk(x, 2, 1)[0],
        lambda x: x.unbind(1)[1],
        lambda x: x.narrow(1, 0, 1),
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    ],
}


@pytest.mark.parametrize(("kind", "move"), [(kind, move) for kind, moves in MOVES.items() for move in moves])
def test_what_moves_numbers_makes_no_new_ones_but_zeros(kind, move):
    assert Kind[kind] in noted(lambda: move(MAPS)).kinds
    assert set(move(MAPS).flatten().tolist()) <= {0.0, *MAPS.flatten().tolist()}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.pad(x, (1, 1), value=2.0),
        lambda x: F.pad(x, (1, 1), "constant", 2.0),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, (3, 3), None, "bicubic"),
    ],
)
def test_what_makes_new_numbers_runs_in_float(change):
    assert noted(lambda: change(MAPS)).kinds == [Kind.FLOAT]
    assert not set(change(MAPS).flatten().tolist()) <= {0.0, *MAPS.flatten().tolist()}


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("mean", [(2, 3)], {}),
        ("mean", [[3, 2]], {}),
        ("mean", [(-1, -2)], {}),
        ("mean", [(-2, 3), True], {}),
        ("mean", [], {"dim": (2, 3)}),
        ("mean", [], {"dim": [-1, -2], "keepdim": True}),
        ("adaptive_avg_pool2d", [1], {}),
        ("adaptive_avg_pool2d", [(1, 1)], {}),
        ("adaptive_avg_pool2d", [[1, 1]], {}),
        ("adaptive_avg_pool2d", [], {"output_size": 1}),
        ("mean", [], {}),
        ("mean", [2], {}),
        ("mean", [(1, 2)], {}),
        ("mean", [(1, 2, 3)], {}),
        ("mean", [], {"dim": 1}),
        ("mean", [(2, 3)], {"dtype": torch.float64}),
        ("adaptive_avg_pool2d", [2], {}),
        ("adaptive_avg_pool2d", [(1, None)], {}),
        ("adaptive_avg_pool2d", [(2, 1)], {}),
    ],
)
def test_means_over_all_positions_are_told(name, args, options):
    """By what they compute: one number for each map, in the type of the maps."""
    function = torch.mean if name == "mean" else F.adaptive_avg_pool2d
    result, means = function(MAPS, *args, **options), MAPS.sum((2, 3)) / 16
    same = result.numel() == 2 and result.dtype == MAPS.dtype and torch.allclose(result.flatten(), means.flatten())
    assert is_global_average(name, MAPS, args, options) is same


def test_a_mean_of_tokens_is_none_over_positions():
    assert not is_global_average("mean", torch.zeros(2, 3, 4), [(1, 2)], {})
    assert not is_global_average("adaptive_avg_pool2d", MAPS[0], [1], {})  # one map without a batch

"""The quantisation mode against networks written by hand: where it rounds, by which name, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_compress.mechanisms.quantization import (
    MARKS,
    ModulePaths,
    QuantizationError,
    Quantizers,
    module_of,
    quantizing,
    unmark,
)


def r(x):
    """To the nearest quarter; the gradient passes straight through."""
    return x + (torch.round(x * 4) / 4 - x).detach()


class Quarters(Quantizers):
    """Rounds activations and weights to quarters, and notes what it is asked."""

    def __init__(self, active=True, in_float=(), folded=True):
        self.active, self.in_float, self.folded = active, in_float, folded
        self.keys, self.sites, self.norms, self.lefts, self.consumers = [], [], [], [], []

    def activation(self, key, x):
        self.keys.append(key)
        return r(x)

    def layer(self, site, function, take, weight, bias, *rest, **options):
        if site in self.in_float:
            return None
        self.sites.append(site)
        return function(take(), r(weight), bias, *rest, **options)

    def norm(self, module, layer, function, x, *rest, **options):
        self.norms.append((module, layer))
        return function(x, *rest, **options) if self.folded else None

    def left(self, site):
        self.lefts.append(site)

    def consumed(self, layer, channels, site):
        self.consumers.append((layer, channels, site))


def run(net, *args, quarters=None):
    """The network's output within the mode, and what was noted."""
    quarters = quarters or Quarters()
    with quantizing(net, quarters):
        return net(*args), quarters


def marks(*tensors):
    return [mark for tensor in tensors for mark in MARKS if hasattr(tensor, mark)]


class Net(nn.Module):
    """A few layers, and what a test lets them do."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.f, self.g = nn.Linear(2, 2), nn.Linear(2, 2)
        self._forward = forward

    def forward(self, *args):
        return self._forward(self, *args)


class Hand:
    """The same layers, with inputs and weights on the grid."""

    def __init__(self, net):
        self.a, self.b = (partial(self._layer, F.conv2d, layer) for layer in (net.a, net.b))
        self.f, self.g = (partial(self._layer, F.linear, layer) for layer in (net.f, net.g))

    def _layer(self, function, layer, x):
        return function(r(x), r(layer.weight), layer.bias)


MAPS = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
IN, A, B = "in:a:conv2d:0", "a:conv2d:0", "b:conv2d:0"


def written(operation):
    """An operation whose caller goes on with the operand that it writes to."""

    def forward(net, x):
        y = net.a(x)
        operation(y, net.b(x))
        return y

    return forward


def accumulated(net, x):
    y = net.a(x)
    same = y
    y += net.b(x)
    return same


def gated(net, x):
    y = net.a(x)
    return F.hardsigmoid(y) * y


# name: what the network does, what that is by hand, the keys of activations, what is left in float
PLACEMENTS = {
    "an output": (lambda n, x: n.a(x), lambda h, x: r(h.a(x)), [IN, A], []),
    "relu": (lambda n, x: F.relu(n.a(x)), lambda h, x: r(F.relu(h.a(x))), [IN, ":relu:0"], []),
    "relu6": (lambda n, x: F.relu6(n.a(x)), lambda h, x: r(F.relu6(h.a(x))), [IN, ":relu6:0"], []),
    "clamp": (
        lambda n, x: n.a(x).clamp(0.0, 0.7),
        lambda h, x: r(h.a(x).clamp(0.0, 0.7)),
        [IN, ":clamp:0"],
        [],
    ),
    "two layers": (lambda n, x: n.b(n.a(x)), lambda h, x: r(h.b(h.a(x))), [IN, A, B], []),
    "add": (lambda n, x: n.a(x) + n.b(x), lambda h, x: r(r(h.a(x)) + r(h.b(x))), [IN, A, B, ":add:0"], []),
    "add and relu": (
        lambda n, x: F.relu(n.a(x) + n.b(x)),
        lambda h, x: r(F.relu(r(h.a(x)) + r(h.b(x)))),
        [IN, A, B, ":relu:0"],
        [],
    ),
    "+= and what else has the operand": (accumulated, lambda h, x: r(r(h.a(x)) + r(h.b(x))), [IN, A, B, ":add:0"], []),
    "add_": (written(torch.Tensor.add_), lambda h, x: r(r(h.a(x)) + r(h.b(x))), [IN, A, B, ":add:0"], []),
    "mul": (lambda n, x: n.a(x) * n.b(x), lambda h, x: r(r(h.a(x)) * r(h.b(x))), [IN, A, B, ":mul:0"], []),
    "mul_": (written(torch.Tensor.mul_), lambda h, x: r(r(h.a(x)) * r(h.b(x))), [IN, A, B, ":mul:0"], []),
    "multiply_": (
        written(torch.Tensor.multiply_),
        lambda h, x: r(r(h.a(x)) * r(h.b(x))),
        [IN, A, B, ":multiply:0"],
        [],
    ),
    "a square": (lambda n, x: n.a(x).square(), lambda h, x: r(h.a(x)).square(), [IN, A], [":square:0"]),
    "a product with itself": (
        lambda n, x: (lambda y: y * y)(n.a(x)),
        lambda h, x: r(r(h.a(x)) * r(h.a(x))),
        [IN, A, ":mul:0"],
        [],
    ),
    "cat": (
        lambda n, x: torch.cat([n.a(x), F.relu(n.b(x))], 1),
        lambda h, x: r(torch.cat([r(h.a(x)), r(F.relu(h.b(x)))], 1)),
        [IN, A, ":relu:0", ":cat:0"],
        [],
    ),
    "dense connections": (
        lambda n, x: (lambda y: torch.cat((y, n.b(y)), dim=1))(F.relu(n.a(x))),
        lambda h, x: r(torch.cat([r(F.relu(h.a(x))), r(h.b(F.relu(h.a(x))))], 1)),
        [IN, ":relu:0", B, ":cat:0"],
        [],
    ),
    "a number": (
        lambda n, x: n.b(n.a(x) * 0.3),
        lambda h, x: r(h.b(r(h.a(x)) * 0.3)),
        [IN, A, ":mul:0", B],
        [":mul:0"],
    ),
    "a number in place": (
        lambda n, x: (lambda y: (y.add_(0.3), y)[1])(n.a(x)),
        lambda h, x: r(h.a(x)) + 0.3,
        [IN, A],
        [":add:0"],
    ),
    "a number in place, and a layer behind it": (
        lambda n, x: (lambda y: (y.add_(0.3), n.b(y))[1])(n.a(x)),
        lambda h, x: r(h.b(r(h.a(x)) + 0.3)),
        [IN, A, ":add:0", B],
        [":add:0"],
    ),
    "an element is set": (
        lambda n, x: (lambda y: (y.__setitem__((slice(None), 0), 0.0), n.b(y))[1])(n.a(x)),
        lambda h, x: r(h.b(torch.cat([torch.zeros_like(x[:, :1]), r(h.a(x))[:, 1:]], 1))),
        [IN, A, "in:b:conv2d:0", B],
        [],
    ),
    "of the type that it has": (
        lambda n, x: n.b(n.a(x).to(torch.float32)),
        lambda h, x: r(h.b(h.a(x))),
        [IN, A, ":to:0", B],
        [":to:0"],
    ),
    "asked about": (
        lambda n, x: (lambda y: n.b(y) if (y.ndim, y.dtype, y.dim()) == (4, torch.float32, 4) else y)(n.a(x)),
        lambda h, x: r(h.b(h.a(x))),
        [IN, A, B],
        [],
    ),
    "by name": (
        lambda n, x: torch.sigmoid(input=torch.mean(input=torch.permute(input=n.a(x), dims=(0, 1, 3, 2)), dim=(2, 3))),
        lambda h, x: r(torch.sigmoid(r(r(h.a(x)).permute(0, 1, 3, 2).mean((2, 3))))),
        [IN, A, ":mean:0", ":sigmoid:0"],
        [],
    ),
    "gathered": (
        lambda n, x: torch.gather(n.a(x), 1, torch.ones(2, 1, 4, 4, dtype=torch.long)),
        lambda h, x: r(h.a(x))[:, 1:],
        [IN, A],
        [":gather:0"],
    ),
    "cat by name": (
        lambda n, x: torch.cat(tensors=[n.a(x), n.b(x)], dim=1),
        lambda h, x: torch.cat([r(h.a(x)), r(h.b(x))], 1),
        [IN, A, B],
        [":cat:0"],
    ),
    "a factor": (
        lambda n, x: torch.add(n.a(x), n.b(x), alpha=2),
        lambda h, x: r(h.a(x)) + 2 * r(h.b(x)),
        [IN, A, B],
        [":add:0"],
    ),
    "with the input": (lambda n, x: x + n.a(x), lambda h, x: x + r(h.a(x)), [IN, A], [":add:0"]),
    "float between": (
        lambda n, x: n.b(F.gelu(n.a(x))),
        lambda h, x: r(h.b(F.gelu(r(h.a(x))))),
        [IN, A, ":gelu:0", B],
        [":gelu:0"],
    ),
    "avg_pool2d": (
        lambda n, x: F.avg_pool2d(n.a(x), 2),
        lambda h, x: r(F.avg_pool2d(r(h.a(x)), 2)),
        [IN, A, ":avg_pool2d:0"],
        [],
    ),
    "a mean over positions": (
        lambda n, x: n.a(x).mean((2, 3)),
        lambda h, x: r(r(h.a(x)).mean((2, 3))),
        [IN, A, ":mean:0"],
        [],
    ),
    "adaptive_avg_pool2d": (
        lambda n, x: F.adaptive_avg_pool2d(n.a(x), 1),
        lambda h, x: r(F.adaptive_avg_pool2d(r(h.a(x)), 1)),
        [IN, A, ":adaptive_avg_pool2d:0"],
        [],
    ),
    "adaptive_avg_pool2d to more": (
        lambda n, x: F.adaptive_avg_pool2d(n.a(x), 2),
        lambda h, x: F.adaptive_avg_pool2d(r(h.a(x)), 2),
        [IN, A],
        [":adaptive_avg_pool2d:0"],
    ),
    "a mean over channels": (lambda n, x: n.a(x).mean(1), lambda h, x: r(h.a(x)).mean(1), [IN, A], [":mean:0"]),
    "sigmoid": (
        lambda n, x: n.a(x).sigmoid(),
        lambda h, x: r(torch.sigmoid(r(h.a(x)))),
        [IN, A, ":sigmoid:0"],
        [],
    ),
    "sigmoid_": (
        written(lambda y, _: y.sigmoid_()),
        lambda h, x: r(torch.sigmoid(r(h.a(x)))),
        [IN, A, ":sigmoid:0"],
        [],
    ),
    "leaky_relu": (
        lambda n, x: F.leaky_relu(n.a(x), 0.3),
        lambda h, x: r(F.leaky_relu(r(h.a(x)), 0.3)),
        [IN, A, ":leaky_relu:0"],
        [],
    ),
    "leaky_relu in place": (
        written(lambda y, _: F.leaky_relu(y, 0.3, True)),
        lambda h, x: r(F.leaky_relu(r(h.a(x)), 0.3)),
        [IN, A, ":leaky_relu:0"],
        [],
    ),
    "silu": (
        lambda n, x: F.silu(n.a(x)),
        lambda h, x: r(r(h.a(x)) * r(torch.sigmoid(r(h.a(x))))),
        [IN, A, ":silu:0:gate", ":silu:0"],
        [],
    ),
    "silu in place": (
        written(lambda y, _: F.silu(y, inplace=True)),
        lambda h, x: r(r(h.a(x)) * r(torch.sigmoid(r(h.a(x))))),
        [IN, A, ":silu:0:gate", ":silu:0"],
        [],
    ),
    "hardswish": (
        lambda n, x: F.hardswish(n.a(x)),
        lambda h, x: r(r(h.a(x)) * torch.clamp((r(h.a(x)) + 3) / 6, 0, 1)),
        [IN, A, ":hardswish:0"],
        [],
    ),
    "hardsigmoid, on a grid of its own": (
        lambda n, x: F.hardsigmoid(n.a(x)),
        lambda h, x: torch.clamp((r(h.a(x)) + 3) / 6, 0, 1),
        [IN, A],
        [],
    ),
    "a gate": (
        gated,
        lambda h, x: r(torch.clamp((r(h.a(x)) + 3) / 6, 0, 1) * r(h.a(x))),
        [IN, A, ":mul:0"],
        [],
    ),
    "max_pool2d": (lambda n, x: F.max_pool2d(n.a(x), 2), lambda h, x: F.max_pool2d(r(h.a(x)), 2), [IN, A], []),
    "max_pool2d and relu": (
        lambda n, x: F.relu(F.max_pool2d(n.a(x), 2)),
        lambda h, x: r(F.relu(F.max_pool2d(r(h.a(x)), 2))),
        [IN, A, ":relu:0"],
        [],
    ),
    "moved": (
        lambda n, x: n.b(n.a(x).permute(0, 1, 3, 2).contiguous().view(2, 2, 8, 2)),
        lambda h, x: r(h.b(r(h.a(x)).permute(0, 1, 3, 2).reshape(2, 2, 8, 2))),
        [IN, A, B],
        [],
    ),
    "moved in place": (
        lambda n, x: (lambda y: (y.unsqueeze_(0), n.b(y.view(y.shape[1:])))[1])(n.a(x)),
        lambda h, x: r(h.b(h.a(x))),
        [IN, A, B],
        [],
    ),
    "a view by an attribute": (lambda n, x: n.b(n.a(x).mT), lambda h, x: r(h.b(h.a(x).mT)), [IN, A, A, B], []),
    "zeros around": (lambda n, x: F.pad(n.a(x), (1, 1)), lambda h, x: F.pad(r(h.a(x)), (1, 1)), [IN, A], []),
    "cut and joined": (
        lambda n, x: torch.cat(n.a(x).chunk(2, 1)[::-1], 1),
        lambda h, x: r(torch.cat([r(h.a(x))[:, 1:], r(h.a(x))[:, :1]], 1)),
        [IN, A, A, A, ":cat:0"],  # each part is put on the same grid again
        [],
    ),
    "taken twice, rounded once": (
        lambda n, x: (lambda y: (n.b(y) + y) * y)(F.relu(n.a(x))),
        lambda h, x: r(r(r(h.b(F.relu(h.a(x)))) + r(F.relu(h.a(x)))) * r(F.relu(h.a(x)))),
        [IN, ":relu:0", B, ":add:0", ":mul:0"],
        [],
    ),
    "relu in place, and taken before": (
        lambda n, x: (lambda y: y * 2 + F.relu_(y))(n.a(x).clone()),
        lambda h, x: r(h.a(x)) * 2 + r(F.relu(r(h.a(x)))),
        [IN, A, ":relu:0"],
        [":mul:0", ":add:0"],
    ),
    "squeeze and excite": (
        lambda n, x: (lambda y: y * F.hardsigmoid(n.b(F.relu(n.b(y.mean((2, 3), keepdim=True))))))(n.a(x)),
        lambda h, x: r(
            torch.clamp((r(h.b(F.relu(h.b(r(h.a(x)).mean((2, 3), keepdim=True))))) + 3) / 6, 0, 1) * r(h.a(x))
        ),
        [IN, A, ":mean:0", ":relu:0", "b#1:conv2d:0", ":mul:0"],
        [],
    ),
    "squeeze and excite with linear layers": (
        lambda n, x: (lambda y: n.g(F.relu(n.f(y.mean((2, 3))))).sigmoid()[:, :, None, None] * y)(n.a(x)),
        lambda h, x: r(r(torch.sigmoid(r(h.g(F.relu(h.f(r(h.a(x)).mean((2, 3)))))))).view(2, 2, 1, 1) * r(h.a(x))),
        [IN, A, ":mean:0", ":relu:0", "g:linear:0", ":sigmoid:0", ":sigmoid:0", ":mul:0"],
        [],
    ),
    "no layer at all": (
        lambda n, x: F.relu(x + 1) * x,
        lambda h, x: F.relu(x + 1) * x,
        [],
        [":add:0", ":relu:0", ":mul:0"],
    ),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_where_maps_are_rounded(name):
    forward, by_hand, keys, left = PLACEMENTS[name]
    net = Net(forward)
    with torch.no_grad():
        output, noted = run(net, MAPS.clone())
        assert torch.equal(output, by_hand(Hand(net), MAPS))
    assert noted.keys == keys
    assert noted.lefts == left
    assert marks(output) == []


def test_what_gives_integers_is_not_left_in_float():
    net = Net(lambda n, x: n.a(x).argmax(1))
    output, noted = run(net, MAPS)
    assert torch.equal(output, r(Hand(net).a(MAPS)).argmax(1))
    assert (noted.keys, noted.lefts) == ([IN, A], [])


F_IN, F_OUT = "in:f:linear:0", "f:linear:0"
VECTORS = {
    "an output": (lambda n, x: n.f(x), lambda h, x: h.f(x), [F_IN], []),
    "two layers": (lambda n, x: n.g(n.f(x)), lambda h, x: h.g(h.f(x)), [F_IN, F_OUT], []),
    "relu": (lambda n, x: n.g(F.relu(n.f(x))), lambda h, x: h.g(F.relu(h.f(x))), [F_IN, ":relu:0"], []),
    "relu at the end": (lambda n, x: F.relu(n.f(x)), lambda h, x: F.relu(h.f(x)), [F_IN], []),
    "a curve first": (
        lambda n, x: n.f(x.sigmoid()),
        lambda h, x: h.f(x.sigmoid()),
        [":sigmoid:0"],
        [":sigmoid:0"],
    ),
    "pooled": (
        lambda n, x: F.avg_pool1d(n.f(x), 2),
        lambda h, x: F.avg_pool1d(h.f(x), 2),
        [F_IN],
        [":avg_pool1d:0"],
    ),
    "a residual": (lambda n, x: n.f(x) + n.g(x), lambda h, x: h.f(x) + h.g(x), [F_IN], [":add:0"]),
    "gelu": (lambda n, x: n.g(F.gelu(n.f(x))), lambda h, x: h.g(F.gelu(h.f(x))), [F_IN, ":gelu:0"], [":gelu:0"]),
    "normalised": (
        lambda n, x: n.g(F.layer_norm(n.f(x), (2,))),
        lambda h, x: h.g(F.layer_norm(h.f(x), (2,))),
        [F_IN, ":layer_norm:0"],
        [":layer_norm:0"],
    ),
    "moved": (
        lambda n, x: n.g(n.f(x).unsqueeze(1).squeeze(1)),
        lambda h, x: h.g(h.f(x)),
        [F_IN, F_OUT],
        [],
    ),
    "taken twice, rounded once": (
        lambda n, x: (lambda y: n.f(y) - n.g(y))(x.clone()),
        lambda h, x: h.f(x) - h.g(x),
        [F_IN],
        [":sub:0"],
    ),
}


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2)], ids=["vectors", "tokens"])
@pytest.mark.parametrize("name", VECTORS)
def test_of_vectors_and_tokens_the_inputs_of_linear_layers_are_rounded(name, shape):
    forward, by_hand, keys, left = VECTORS[name]
    net, x = Net(forward), torch.randn(shape)
    with torch.no_grad():
        output, noted = run(net, x)
        assert torch.equal(output, by_hand(Hand(net), x))
    assert (noted.keys, noted.lefts) == (keys, left)


def test_a_curve_between_linear_layers_runs_in_integers_for_vectors_only():
    net = Net(lambda n, x: n.g(n.f(x).sigmoid()))
    hand = Hand(net)
    with torch.no_grad():
        for x in (torch.randn(3, 2), torch.randn(3, 5, 2)):
            output, noted = run(net, x)
            inside = r(hand.f(x)) if x.ndim == 2 else hand.f(x)
            assert torch.equal(output, hand.g(torch.sigmoid(inside)))
            assert noted.keys == [F_IN, *([F_OUT] if x.ndim == 2 else []), ":sigmoid:0"]


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 2), nn.Conv3d(2, 3, 2), nn.Conv2d(2, 4, 2, groups=2, dilation=2)])
def test_convolutions_of_all_kinds(layer):
    x = torch.randn(1, 2, *[4] * (layer.weight.ndim - 2))
    by_hand = copy.deepcopy(layer)
    by_hand.weight.data = r(layer.weight).data
    net = nn.Sequential(layer)
    output, noted = run(net, x)
    assert torch.equal(output, r(by_hand(r(x))))
    name = f"conv{layer.weight.ndim - 2}d"
    assert noted.keys == [f"in:0:{name}:0", f"0:{name}:0"]


def test_arguments_by_name_and_weights_without_a_layer():
    net = Net(
        lambda n, x: F.conv2d(weight=n.a.weight, input=F.relu(input=F.conv2d(x, n.b.weight, stride=2)), bias=n.a.bias)
    )
    output, noted = run(net, MAPS)
    first = F.relu(F.conv2d(r(MAPS), r(net.b.weight), stride=2))
    assert torch.equal(output, r(F.conv2d(r(first), r(net.a.weight), net.a.bias)))
    assert noted.keys == ["in::conv2d:0", ":relu:0", ":conv2d:1"]
    assert noted.sites == [":conv2d:0", ":conv2d:1"]


# --- batch norm ---


def normed():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def test_convolution_batch_norm_and_relu_are_one_piece():
    net = normed()
    output, noted = run(net, MAPS)
    one = F.relu(net[1](F.conv2d(r(MAPS), r(net[0].weight), net[0].bias)))
    assert torch.equal(output, r(F.conv2d(r(one), r(net[3].weight), net[3].bias)))
    assert noted.keys == ["in:0:conv2d:0", "2:relu:0", "3:conv2d:0"]
    assert noted.norms == [("1", "0:conv2d:0")]
    assert noted.lefts == []


def test_a_batch_norm_that_is_no_part_of_the_layer_runs_in_float():
    net = normed()
    output, noted = run(net, MAPS, quarters=Quarters(folded=False))
    one = F.relu(net[1](r(F.conv2d(r(MAPS), r(net[0].weight), net[0].bias))))
    assert torch.equal(output, r(F.conv2d(r(one), r(net[3].weight), net[3].bias)))
    assert noted.keys == ["in:0:conv2d:0", "0:conv2d:0", "2:relu:0", "3:conv2d:0"]
    assert noted.lefts == ["1:batch_norm:0", "2:relu:0"]


def test_a_batch_norm_elsewhere_runs_in_float():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)).eval()
    output, noted = run(net, MAPS)
    assert torch.equal(output, net[2](r(F.relu(F.conv2d(r(MAPS), r(net[0].weight), net[0].bias)))))
    assert (noted.norms, noted.lefts) == ([], ["2:batch_norm:0"])


def test_a_batch_norm_called_with_its_arguments_in_another_order_runs_in_float():
    def forward(net, x):
        mean, variance = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
        return torch.batch_norm(net.a(x), torch.ones(2), torch.zeros(2), mean, variance, False, 0.1, 0.0, False)

    net = Net(forward)
    output, noted = run(net, MAPS)
    mean, variance = torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.tensor([2.0, 3.0]).view(2, 1, 1)
    torch.testing.assert_close(output, (r(Hand(net).a(MAPS)) - mean) / variance.sqrt())
    assert noted.norms == []


def test_who_takes_what_a_layer_has_made():
    """The direct output, and its channels behind batch norm and ReLU; the network's output takes it too."""
    net = normed()
    _, noted = run(net, MAPS)
    first, second = "0:conv2d:0", "3:conv2d:0"
    assert [entry for entry in noted.consumers if entry[0] == first] == [(first, first, "1:batch_norm:0")]
    assert [site for _, channels, site in noted.consumers if channels == first] == [
        "1:batch_norm:0",
        "2:relu:0",
        second,
    ]
    assert [site for layer, _, site in noted.consumers if layer == second] == [":output:0"]


# --- weights only, and layers in float ---


def test_weights_only():
    net = normed()
    output, noted = run(net, MAPS, quarters=Quarters(active=False))
    one = F.relu(net[1](F.conv2d(MAPS, r(net[0].weight), net[0].bias)))
    assert torch.equal(output, F.conv2d(one, r(net[3].weight), net[3].bias))
    assert noted.keys == []
    assert noted.norms == [("1", "0:conv2d:0")]


def test_a_layer_left_in_float_and_its_neighbours():
    net = Net(lambda n, x: n.a(n.b(n.a(x))))
    output, noted = run(net, MAPS, quarters=Quarters(in_float=[B]))
    hand = Hand(net)
    assert torch.equal(output, r(hand.a(net.b(r(hand.a(MAPS))))))
    assert noted.keys == [IN, A, B, "a#1:conv2d:0"]
    assert noted.lefts == [B]


def test_what_has_no_integer_kernel_stays_in_float():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(5, 2), nn.LSTM(2, 2, batch_first=True)
            self.linear, self.up = nn.Linear(2, 2), nn.ConvTranspose1d(2, 2, 1)

        def forward(self, tokens):
            return self.up(self.linear(self.lstm(self.embedding(tokens))[0]).transpose(1, 2))

    net, tokens = Other(), torch.tensor([[1, 4, 2]])
    output, noted = run(net, tokens)
    states, _ = net.lstm(net.embedding(tokens))
    expected = net.up(F.linear(r(states), r(net.linear.weight), net.linear.bias).transpose(1, 2))
    assert torch.equal(output, expected)
    assert noted.sites == ["linear:linear:0"]
    assert noted.keys == ["in:linear:linear:0"]  # nothing that has a name made what comes out of an LSTM
    assert noted.lefts == ["embedding:embedding:0", "lstm:lstm:0", "up:conv_transpose1d:0"]


def test_quantisers_that_do_nothing_change_nothing():
    net = nn.Sequential(normed(), nn.Flatten(), nn.Linear(32, 4), nn.LeakyReLU(), nn.Linear(4, 2)).train()
    plain = copy.deepcopy(net)
    x = MAPS.clone()
    output, expected = run(net, x, quarters=Quantizers())[0], plain(x)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


# --- training ---


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "no layer at all"])
def test_gradients_are_those_of_the_network_written_by_hand(name):
    forward, by_hand, *_ = PLACEMENTS[name]
    net = Net(forward)
    other, x, y = copy.deepcopy(net), MAPS.clone().requires_grad_(), MAPS.clone().requires_grad_()
    run(net, x.clone())[0].square().sum().backward()
    by_hand(Hand(other), y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for (name, one), (_, wanted) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, wanted.grad, msg=name)


def test_dropout_in_training_keeps_the_names_of_evaluation():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(2, 2, 1))
    _, evaluated = run(net.eval(), MAPS)
    torch.manual_seed(1)
    output, noted = run(net.train(), MAPS)
    assert noted.keys == evaluated.keys == ["in:0:conv2d:0", "1:relu:0", "3:conv2d:0"]
    torch.manual_seed(1)
    one = F.dropout(r(F.relu(F.conv2d(r(MAPS), r(net[0].weight), net[0].bias))), 0.5)
    assert torch.equal(output, r(F.conv2d(one, r(net[3].weight), net[3].bias)))


# --- names ---


def test_paths_of_calls():
    paths = ModulePaths()

    def site(*calls):
        """Of an operation in the innermost of nested calls of modules, each called by its owner or by another."""
        for name, *owner in calls:
            paths.enter(name, *owner)
        found = paths.site("add")
        for _ in calls:
            paths.leave()
        return found

    assert site() == ":add:0"
    assert site() == ":add:1"
    assert site(["a", ""]) == "a:add:0"
    assert site(["a", ""]) == "a#1:add:0"
    assert site(["a", ""], ["a.b", "a"]) == "a#2.b:add:0"
    assert site(["a", ""], ["other.b", "other"]) == "a#3>other.b:add:0"
    assert site(["list.0", ""], ["list.0.c.d", "list.0"]) == "list.0.c.d:add:0"
    assert site(["a.b", "a"]) == ">a.b:add:0"  # by the root, past its own parent
    assert site(["c"], ["c.d"]) == "c.d:add:0"
    paths.leave()  # there is always the root
    assert site() == ":add:2"
    paths.restart()
    assert [site(), site(["a", ""]), paths.module] == [":add:0", "a:add:0", ""]


def test_different_calls_have_different_paths():
    """A module that its parent calls, and that the parent's parent calls as well."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.c(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(self.inner.c(x))

    _, noted = run(Outer(), MAPS)
    assert len(set(noted.sites)) == 2
    assert [module_of(site) for site in noted.sites] == ["inner.c", "inner.c"]


@pytest.mark.parametrize(
    ("site", "module"),
    [
        ("a.b:conv2d:0", "a.b"),
        ("a#1.b#12:conv2d:3", "a.b"),
        ("in:a#1>c.d:linear:0", "c.d"),
        (":add:0", ""),
        (">a.b:add:0", "a.b"),
        ("in::linear:0", ""),
        ("a:silu:0:gate", "a"),
    ],
)
def test_the_module_of_a_site(site, module):
    assert module_of(site) == module


def test_a_module_that_is_called_twice_has_a_name_for_each_call():
    """A block with one ReLU for two edges, which must not share a scale."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.relu = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.two(self.relu(self.one(x)))
            out += x
            return self.relu(out)

    net = nn.Sequential(nn.Conv2d(2, 2, 1), Block(), Block())
    _, noted = run(net, MAPS)
    blocks = [[f"{n}.relu:relu:0", f"{n}.two:conv2d:0", f"{n}.relu#1:relu:0"] for n in "12"]
    assert noted.keys == ["in:0:conv2d:0", "0:conv2d:0", *blocks[0], *blocks[1]]


def test_the_owner_of_what_is_in_a_list_is_who_has_the_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 2, 1))])
            self.named = nn.ModuleDict({"deep": nn.ModuleList([nn.Conv2d(2, 2, 1)])})

        def forward(self, x):
            return self.named["deep"][0](self.blocks[1](self.blocks[0](x)))

    _, noted = run(nn.Sequential(Listed()), MAPS)
    assert noted.sites == ["0.blocks.0:conv2d:0", "0.blocks.1.0:conv2d:0", "0.named.deep.0:conv2d:0"]


def test_children_of_a_module_that_is_called_twice_and_a_child_called_from_elsewhere():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), None

        def forward(self, x):
            return self.two(self.one(self.one(x)))

    class Borrowing(nn.Module):
        def __init__(self, lender):
            super().__init__()
            self.lender = [lender]

        def forward(self, x):
            return self.lender[0][0](x)

    net = Parts()
    net.two = Borrowing(net.one)
    _, noted = run(net, MAPS)
    assert noted.sites == ["one.0:conv2d:0", "one#1.0:conv2d:0", "two>one.0:conv2d:0"]
    assert noted.keys == ["in:one.0:conv2d:0", "one.1:relu:0", "one#1.1:relu:0", "two>one.0:conv2d:0"]


def test_each_call_of_the_network_has_the_same_names():
    net, other = Net(lambda n, x: n.a(F.relu(n.a(x)))), torch.randn(5, 2, 3, 3)
    quarters = Quarters()
    with quantizing(net, quarters) as calls:
        first, second = net(MAPS), net(other)
    assert noted_twice(quarters.keys) == [IN, ":relu:0", "a#1:conv2d:0"]
    assert (calls.count, calls.samples, calls.depth) == (2, 7, 0)
    for output, x in ((first, MAPS), (second, other)):
        assert torch.equal(output, r(Hand(net).a(F.relu(Hand(net).a(x)))))


@pytest.mark.sample
def test_what_compiled_code_returns_bears_no_mark():
    net = Net(lambda n, x: n.a(F.relu(n.a(x))))
    with quantizing(net, Quarters()) as calls:
        output = torch.compile(net, backend="eager")(MAPS)
    assert calls.compiled
    assert {mark: value for mark in MARKS if (value := getattr(output, mark, None)) is not None} == {}


def noted_twice(keys):
    half = len(keys) // 2
    assert keys[:half] == keys[half:]
    return keys[:half]


def test_an_exception_inside_leaves_no_path_behind():
    class Failing(nn.Module):
        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one sample")
            return x

    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU(), Failing()), nn.Conv2d(2, 2, 1))
    _, undisturbed = run(net, MAPS)
    quarters = Quarters()
    with quantizing(net, quarters) as calls:
        with pytest.raises(ValueError, match="one sample"):
            net(MAPS[:1])
        assert (calls.count, calls.samples, calls.depth) == (0, 0, 0)
        assert torch.equal(torch.ones(1) * 0.3, torch.tensor([0.3]))  # the mode is off
        quarters.keys.clear()
        net(MAPS)
    assert quarters.keys == undisturbed.keys == ["in:0:conv2d:0", "1.0:relu:0", "2:conv2d:0"]


def test_a_network_that_catches_an_exception_of_its_own_goes_on_with_the_right_path():
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError

    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.failing, self.conv = Failing(), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            try:
                return self.failing(x)
            except ValueError:
                return self.conv(x)

    _, noted = run(Careful(), MAPS)
    assert noted.sites == ["conv:conv2d:0"]


def test_a_part_of_a_network_can_be_quantised_alone():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), nn.Conv2d(2, 2, 1))
    quarters = Quarters()
    with quantizing(net[1], quarters) as calls:
        output = net(MAPS)
    one = r(F.relu(F.conv2d(r(net[0](MAPS)), r(net[1][0].weight), net[1][0].bias)))
    assert torch.equal(output, net[2](one))
    assert (quarters.keys, calls.count) == (["in:0:conv2d:0", "1:relu:0"], 1)


def test_a_part_that_is_called_past_the_network_runs_in_float():
    net, quarters = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), Quarters()
    with quantizing(net, quarters) as calls:
        assert torch.equal(net[0](MAPS), F.conv2d(MAPS, net[0].weight, net[0].bias))
    assert (quarters.keys, quarters.sites, calls.count) == ([], [], 0)


def test_a_network_that_calls_itself_is_one_call():
    class Halving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(x) if len(x) == 1 else torch.cat([self(x[:1]), self(x[1:])])

    net, quarters = Halving(), Quarters()
    with quantizing(net, quarters) as calls:
        output = net(MAPS)
    expected = r(F.conv2d(r(MAPS), r(net.conv.weight), net.conv.bias))
    torch.testing.assert_close(output, r(expected))
    assert (calls.count, calls.samples, calls.depth) == (1, 2, 0)
    assert quarters.sites == ["conv:conv2d:0", "conv#1:conv2d:0"]


def test_networks_that_branch_have_the_same_names_where_the_ways_meet():
    """As with auxiliary heads: in training another layer is the first to take the tensor."""

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head, self.two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = F.relu(self.one(x))
            return (self.head(y), self.two(y)) if self.training else self.two(y)

    net = Headed()
    training, evaluation = run(net.train(), MAPS)[1].keys, run(net.eval(), MAPS)[1].keys
    assert evaluation == ["in:one:conv2d:0", ":relu:0", "two:conv2d:0"]
    assert set(training) - set(evaluation) == {"head:conv2d:0"}


# --- inputs and outputs ---

Pair = namedtuple("Pair", "first second")


@dataclass
class Found:
    maps: torch.Tensor
    number: int


@pytest.mark.parametrize(
    ("wrap", "get"),
    [
        (lambda y: {"a": [y], "n": 3}, lambda out: out["a"][0]),
        (lambda y: (y, None), lambda out: out[0]),
        (lambda y: Pair(1, y), lambda out: out.second),
        (lambda y: Found(y, 2), lambda out: out.maps),
    ],
)
def test_outputs_of_any_structure_are_rounded(wrap, get):
    net = Net(lambda n, x: wrap(n.a(x)))
    output, noted = run(net, MAPS)
    expected = wrap(r(Hand(net).a(MAPS)))
    assert type(output) is type(expected)
    assert torch.equal(get(output), get(expected))
    assert (noted.keys, marks(get(output))) == ([IN, A], [])


def test_an_output_that_is_also_taken_inside_is_rounded_once():
    net = Net(lambda n, x: (lambda y: (y, n.b(y), F.relu(y)))(n.a(x)))
    (first, second, third), noted = run(net, MAPS)
    hand = Hand(net)
    assert torch.equal(first, r(hand.a(MAPS)))
    assert torch.equal(second, r(hand.b(hand.a(MAPS))))
    assert torch.equal(third, r(F.relu(hand.a(MAPS))))
    assert noted.keys == [IN, A, B, ":relu:0"]


def test_inputs_by_name_within_structures_and_those_given_back():
    net = Net(lambda n, batch, scale: (n.a(batch["x"]), batch["x"], n.b(scale)))
    x, y, quarters = MAPS.clone(), MAPS + 1, Quarters()
    with quantizing(net, quarters) as calls:
        one, same, two = net({"x": x}, y)
    assert torch.equal(one, r(Hand(net).a(x)))
    assert torch.equal(two, r(Hand(net).b(y)))
    assert same is x
    assert marks(x, y, one, two) == []
    assert calls.samples == 2
    assert quarters.keys == [IN, "in:b:conv2d:0", A, B]


# --- what is left behind ---


def test_the_network_is_the_same_afterwards():
    net = nn.Sequential(normed(), nn.ModuleDict({"x": nn.Conv2d(2, 2, 1)})["x"])
    state, before = copy.deepcopy(net.state_dict()), net(MAPS)
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    with quantizing(net, Quarters()):
        within = net(MAPS)
        assert "forward" in vars(net)
        assert sum(len(module._forward_pre_hooks) for module in net.modules()) == 6  # of all but the network itself
    assert not torch.equal(within, before)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks] == []
    assert marks(*net.parameters(), *net.buffers()) == []
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(MAPS), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_network_is_the_same_after_an_exception():
    net = Net(lambda n, x: n.a(x).view(-1, 7))
    x = MAPS.clone()
    with quantizing(net, Quarters()), pytest.raises(RuntimeError, match="invalid"):
        net(x)
    assert marks(x, *net.parameters()) == []
    with pytest.raises(OSError, match="broken"), quantizing(net, Quarters()):
        raise OSError("broken")
    assert "forward" not in vars(net)
    assert [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks] == []


class Learned(nn.Module):
    """Takes a parameter and a buffer, which no operation makes, as inputs of its layers, and keeps a mean."""

    def __init__(self):
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2)
        self.register_buffer("constant", torch.randn(3, 2))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen.mul_(0.5).add_(x.mean(0))
        return x + self.linear(self.query) + self.linear(self.constant)


def test_parameters_and_buffers_as_inputs_are_rounded_in_each_call():
    net, quarters, seen = Learned(), Quarters(), torch.zeros(2)
    with quantizing(net, quarters):
        for _ in range(2):
            x = torch.randn(3, 2)
            output, seen = net(x), 0.5 * seen + x.mean(0)
            wanted = x + sum(
                F.linear(r(value), r(net.linear.weight), net.linear.bias) for value in (net.query, net.constant)
            )
            torch.testing.assert_close(output, wanted)
            torch.testing.assert_close(net.seen, seen)
            output.sum().backward()  # nothing of the graph of an earlier call is used again
            with torch.no_grad():
                net.query += 1
                net.constant += 1
            assert marks(net.query, net.constant, net.seen) == []
    assert noted_twice(quarters.keys) == ["in:linear:linear:0", "in:linear#1:linear:0"]


def test_tensors_in_objects_of_the_user_bear_no_marks():
    class Batch:
        def __init__(self, x):
            self.x = x

    net, batch, quarters = Net(lambda n, batch: n.f(batch.x)), Batch(torch.randn(3, 2)), Quarters()
    with quantizing(net, quarters):
        for _ in range(2):
            assert torch.equal(net(batch), Hand(net).f(batch.x))
            assert marks(batch.x) == []
    assert noted_twice(quarters.keys) == [F_IN]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Quarters, pytest.param(Quantizers, marks=pytest.mark.slow)])
def test_activations_are_freed_without_the_garbage_collector(kind, training):
    net, references = normed().requires_grad_(training), []
    for module in net:
        module.register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with quantizing(net, kind()):
            x = MAPS.clone()
            references.append(weakref.ref(x))
            output = net(x)
            if training:
                output.sum().backward()
            del x, output
            assert len(references) == 5
            assert [reference() for reference in references] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    net = Net(lambda n, x: (lambda y: (n.b(y) + y) * y)(F.relu(n.a(x))))
    expected = run(net, MAPS)[0]
    with context():
        assert torch.equal(run(net, MAPS.clone())[0], expected)


# --- hooks of the backward pass ---


class Joining(nn.Module):
    """Takes its input twice, and the output of a layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.act = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU()
        self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(2, 2)

    def forward(self, x):
        y = self.act(self.first(x))
        return self.head(self.pool(y + self.beside(x)) + self.pool(y))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook", None])
def test_full_backward_hooks_change_nothing(register):
    """Torch gives the modules copies of what they take and return, which are told as what they were made of."""
    net, gradients, seen = Joining(), [], []
    for hooked in (False, True):
        if hooked and register is None:
            handles = [nn.modules.module.register_module_full_backward_hook(lambda *_: seen.append(1))]
        else:
            parts = list(net.modules()) if hooked else []
            handles = [getattr(part, register)(lambda *_: seen.append(1)) for part in parts]
        x = MAPS.clone().requires_grad_()
        output, noted = run(net, x)
        output.square().sum().backward()
        gradients.append((noted.keys, output, x.grad, *(own.grad.clone() for own in net.parameters())))
        net.zero_grad()
        for handle in handles:
            handle.remove()
    (keys, *plain), (same, *others) = gradients
    assert len(seen) >= len(list(net.modules()))
    assert {*same} == {*keys}
    for one, other in zip(plain, others, strict=True):
        torch.testing.assert_close(one, other)
    assert all(not hasattr(own, mark) for own in (x, output) for mark in MARKS)


def test_a_view_whose_shape_is_given_by_name_is_a_view():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.layer(x).view_as(other=x)

    net = Shaped()
    torch.testing.assert_close(run(net, MAPS)[0], run(nn.Sequential(net.layer), MAPS)[0])


@pytest.mark.sample
def test_full_backward_hooks_within_compiled_code_are_refused(fresh_compiler):
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    net[0].register_full_backward_hook(lambda module, *gradients: None)
    net.compile(backend="eager")
    with quantizing(net, Quarters()), pytest.raises(QuantizationError, match="'0': its full backward hook makes"):
        net(MAPS)


# --- activation checkpointing ---


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body, self.options = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)), options

    def forward(self, x):
        return checkpoint(self.body, x, **self.options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused(reentrant):
    net, x = Checkpointed(use_reentrant=reentrant), MAPS.clone().requires_grad_()
    with quantizing(net, Quarters()) as calls:
        with pytest.raises(QuantizationError, match=r"activation checkpointing within the network .* turn it off"):
            net(x)
        assert (calls.count, calls.depth) == (0, 0)
    net(x).sum().backward()  # outside of the mode as ever
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_whole_network_runs_it_quantised_again(reentrant):
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    other, x, y = copy.deepcopy(net), MAPS.clone().requires_grad_(), MAPS.clone().requires_grad_()
    with quantizing(net, Quarters()):
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    run(other, y)[0].square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(net.parameters(), other.parameters(), strict=True))


def test_checkpointing_without_gradients_is_fine():
    net = Checkpointed(use_reentrant=False)
    with torch.no_grad():
        output, noted = run(net, MAPS)
        assert torch.equal(output, run(net.body, MAPS)[0])
    assert noted.keys == ["in:body.0:conv2d:0", "body.1:relu:0", "body.2:conv2d:0"]


# --- networks of others ---


def test_marks_come_off():
    tensor = torch.ones(1)
    for mark in MARKS:
        setattr(tensor, mark, "x")
    unmark(tensor)
    unmark(tensor)
    assert vars(tensor) == {}


@pytest.mark.sample
def test_a_residual_network_of_torchvision():
    """Each block's one ReLU serves two edges: 8 blocks of 3 edges, 3 of them with a downsampling edge more, and the
    input, the stem and the mean; the pooled stem stays on the stem's grid, and the last linear layer gives floats."""
    import torchvision

    net = torchvision.models.resnet18().eval()
    with torch.no_grad():
        _, noted = run(net, torch.randn(1, 3, 32, 32))
    assert len(noted.keys) == len(set(noted.keys)) == 8 * 3 + 3 + 3
    counts = Counter(key.split(":")[-2] for key in noted.keys)
    assert counts == {"conv2d": 1, "relu": 1 + 2 * 8, "batch_norm": 8 + 3, "adaptive_avg_pool2d": 1}
    assert len(noted.norms) == 20
    assert noted.lefts == []
    assert {key for key in noted.keys if key.startswith("layer1.0")} == {
        "layer1.0.relu:relu:0",
        "layer1.0.bn2:batch_norm:0",
        "layer1.0.relu#1:relu:0",
    }

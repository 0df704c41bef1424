"""Networks that compute with the values of integers, against ones written by hand from what a grid is."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_compress.mechanisms.calibration import Settings, calibrate
from lightning_compress.mechanisms.grids import COMPUTED, ActivationGrid, Grids, WeightSite
from lightning_compress.mechanisms.quantization import QuantizationError, quantizing
from lightning_compress.mechanisms.rounding import Rounding, WeightNames, multiplied, norm_arguments, spread
from lightning_compress.mechanisms.views import Source


def on_grid(x, scale, zero_point, lowest, highest):
    """The definition; the gradient passes straight through within the limits."""
    integers = torch.round(x / scale) + zero_point
    inside = ((integers >= lowest) & (integers <= highest)).to(x.dtype)
    rounded = (integers.clamp(lowest, highest) - zero_point) * scale
    return x * inside + (rounded - x * inside).detach()


def weight_of(grids, name, weight, rows=slice(None)):
    """A weight on its grid, one step for each row."""
    grid = grids.weights[name]
    highest = 2 ** (grid.bits - 1) - 1
    step = grid.step[rows].view(-1, *[1] * (weight.ndim - 1))
    return on_grid(weight, step, 0, -highest, highest)


def activation_of(grids, key, x):
    grid = grids.activations[key]
    return on_grid(x, torch.tensor(grid.scale), grid.zero_point, 0, 2**grid.bits - 1)


def added(grids, source, name, bias, norm=None, rows=slice(None)):
    """The bias that an integer kernel adds: whole steps of input times weight, with the batch norm behind it folded in.

    Weights of few bits are multiplied by the power of two with which they fill their byte where activations have few.
    """
    source, grid = grids.activations[source], grids.weights[name]
    step = grid.step[rows].double() * source.scale
    if source.bits < 8:
        step = step / 2 ** math.floor(math.log2(127 / (2 ** (grid.bits - 1) - 1)))
    bias = torch.zeros_like(step) if bias is None else bias.double()
    gain, shift = torch.ones_like(step), torch.zeros_like(step)
    if norm is not None:
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * gain
    total, step = (bias * gain + shift).detach(), (step * gain.abs()).detach()
    return (bias + (torch.round(total / step) * step - total) / gain.detach()).float()


def calibrated(net, *batches, **settings):
    training = net.training
    net.eval()
    grids = calibrate(net, lambda: (net(*batch) for batch in batches), Settings(**settings))
    net.train(training)
    return grids


def run(net, grids, *args, **options):
    rounding = Rounding(net, grids)
    rounding.evaluating = not net.training
    with quantizing(net, rounding):
        return net(*args, **options), rounding


def assert_gradients(net, other, missing=()):
    """That each parameter got that of the same name, and got one unless it is said to be missing."""
    for (name, one), (_, two) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert (one.grad is None) is (two.grad is None) is (name in missing), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)
            assert one.grad.abs().sum() > 0, name


MAPS = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A stem, a residual block with one ReLU for two edges, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(3, 5)

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.norm(self.stem(x))), 2)
        out = self.two(self.relu(self.one(x)))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


def small_by_hand(net, grids, x):
    a, w = partial(activation_of, grids), partial(weight_of, grids)

    def b(source, name, bias):
        return bias if net.training else added(grids, source, name, bias)

    x = net.norm(F.conv2d(a("in:stem:conv2d:0", x), w("stem.weight", net.stem.weight)))
    if not net.training:
        gain = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
        more = gain * added(grids, "in:stem:conv2d:0", "stem.weight", None, net.norm)
        x = x + more.detach().view(1, -1, 1, 1)
    x = F.max_pool2d(a("relu:relu:0", F.relu(x)), 2)
    bias = b("relu:relu:0", "one.weight", net.one.bias)
    out = a("relu#1:relu:0", F.relu(F.conv2d(x, w("one.weight", net.one.weight), bias)))
    bias = b("relu#1:relu:0", "two.weight", net.two.bias)
    out = a("two:conv2d:0", F.conv2d(out, w("two.weight", net.two.weight), bias, padding=1))
    out = a("relu#2:relu:0", F.relu(out + x)).mean((2, 3))
    bias = b(":mean:0", "head.weight", net.head.bias)
    return F.linear(a(":mean:0", out), w("head.weight", net.head.weight), bias)


@pytest.fixture
def small():
    net = Small().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net


# --- against a network written by hand ---


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (2, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients(small, training, weight_bits, activation_bits):
    grids = calibrated(small, (MAPS[:2],), weight_bits=weight_bits, activation_bits=activation_bits)
    other = copy.deepcopy(small.train(training))
    x, y = MAPS.clone().requires_grad_(), MAPS.clone().requires_grad_()  # of which half were not seen: some are clipped
    output, rounding = run(small, grids, x)
    expected = small_by_hand(other, grids, y)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert_gradients(small, other)
    assert torch.equal(small.norm.running_mean, other.norm.running_mean)
    assert rounding.used == {"stem.weight", "one.weight", "two.weight", "head.weight"}


def test_weights_only(small):
    grids = calibrated(small, (MAPS,), weight_bits=3, activation_bits=None)
    w = partial(weight_of, grids)
    x = F.max_pool2d(F.relu(small.norm(F.conv2d(MAPS, w("stem.weight", small.stem.weight)))), 2)
    out = F.relu(F.conv2d(x, w("one.weight", small.one.weight), small.one.bias))
    out = F.relu(F.conv2d(out, w("two.weight", small.two.weight), small.two.bias, padding=1) + x)
    expected = F.linear(out.mean((2, 3)), w("head.weight", small.head.weight), small.head.bias)
    torch.testing.assert_close(run(small, grids, MAPS)[0], expected, rtol=0, atol=1e-6)
    assert grids.activations == {}


@pytest.mark.parametrize("act", [F.hardswish, F.hardsigmoid, F.silu])
def test_curves_of_weights_only_are_those_of_float(act):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    net[0].register_forward_hook(lambda module, args, output: act(output))
    grids = calibrated(net, (x,), activation_bits=None)
    first, second = (weight_of(grids, f"{n}.weight", net[n].weight) for n in range(2))
    expected = F.linear(act(F.linear(x, first, net[0].bias)), second, net[1].bias)
    torch.testing.assert_close(run(net, grids, x)[0], expected, rtol=0, atol=1e-6)


def test_the_plain_network_is_bit_for_bit_the_same_afterwards(small):
    before = small(MAPS)
    grids = calibrated(small, (MAPS,))
    assert not torch.equal(run(small, grids, MAPS)[0], before)
    assert torch.equal(small(MAPS), before)


@pytest.mark.parametrize("x", [torch.linspace(-9, 9, 180), torch.tensor([0.01, -0.011, 2.99])])
def test_hardsigmoid_in_steps_of_a_255th(x):
    rounding = Rounding(nn.Linear(1, 1), Grids())
    expected = torch.round(torch.clamp((x + 3) / 6, 0, 1) * 255) / 255
    torch.testing.assert_close(rounding.gate("any", x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("act", [F.hardswish, F.hardsigmoid, F.silu, torch.sigmoid, F.leaky_relu])
def test_curves(act):
    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return act(self.conv(x))

    net = Curved()
    grids = calibrated(net, (MAPS * 4,))
    a, name = partial(activation_of, grids), act.__name__
    x = a("in:conv:conv2d:0", MAPS * 4)
    x = a("conv:conv2d:0", F.conv2d(x, weight_of(grids, "conv.weight", net.conv.weight), net.conv.bias))
    gate = torch.round(torch.clamp((x + 3) / 6, 0, 1) * 255) / 255
    expected = {
        "hardsigmoid": lambda: gate,
        "hardswish": lambda: a(":hardswish:0", x * gate),
        "silu": lambda: a(":silu:0", x * a(":silu:0:gate", torch.sigmoid(x))),
    }.get(name, lambda: a(f":{name}:0", act(x)))()
    torch.testing.assert_close(run(net, grids, MAPS * 4)[0], expected, rtol=0, atol=1e-6)


# --- batch norm, biases, equalisation ---


def test_statistics_that_were_estimated_stand_in_in_evaluation_only(small):
    grids = calibrated(small, (MAPS,))
    other, mean, variance = copy.deepcopy(small), torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.3, 2.0, 1.0])
    grids.statistics["norm"] = mean, variance
    other.norm.running_mean, other.norm.running_var = mean, variance
    output = run(small, grids, MAPS)[0]
    torch.testing.assert_close(output, small_by_hand(other, grids, MAPS), rtol=0, atol=1e-6)
    assert not torch.equal(small.norm.running_mean, mean)
    estimated, plain = (mean.clone(), variance.clone()), copy.deepcopy(small).train()
    output = run(small.train(), grids, MAPS)[0]
    torch.testing.assert_close(output, small_by_hand(plain, grids, MAPS), rtol=0, atol=1e-6)
    for ours, own in zip(small.norm.buffers(), plain.norm.buffers(), strict=True):  # but its own, moved on
        torch.testing.assert_close(ours, own)
    assert all(torch.equal(*pair) for pair in zip(grids.statistics["norm"], estimated, strict=True))


def test_a_batch_norm_that_is_no_part_of_the_layer_takes_what_is_rounded(small):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = small.stem, small.norm

        def forward(self, x):
            maps = self.stem(x)
            return maps, self.norm(maps)

    net = Both().eval()
    grids = calibrated(net, (MAPS,), activation_bits=3)
    assert (grids.folds, list(grids.activations)) == ({}, ["in:stem:conv2d:0", "stem:conv2d:0"])
    a = partial(activation_of, grids)
    maps = a("stem:conv2d:0", F.conv2d(a("in:stem:conv2d:0", MAPS), weight_of(grids, "stem.weight", net.stem.weight)))
    found = run(net, grids, MAPS)[0]
    torch.testing.assert_close(found, (maps, net.norm(maps)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_correction_is_added_to_the_bias_or_in_its_place(bias):
    net = nn.Sequential(nn.Linear(3, 2, bias=bias))
    grids, x = calibrated(net, (torch.randn(8, 3),)), torch.randn(5, 3)
    plain, shift = run(net, grids, x)[0], torch.tensor([0.25, -3.0])
    grids.biases["0:linear:0"] = shift
    torch.testing.assert_close(run(net, grids, x)[0], plain + shift)


def test_divisors_and_factors_stand_for_scaled_channels(small):
    """Behind the batch norm of a layer, and in the weight of the next."""
    net = nn.Sequential(small.stem, small.norm, nn.ReLU(), nn.Conv2d(3, 2, 1))
    divisors = torch.tensor([2.0, 0.5, 4.0])
    grids = calibrated(net, (MAPS,), activation_bits=None)
    grids.divisors["0:conv2d:0"] = grids.factors["3:conv2d:0"] = divisors
    w = partial(weight_of, grids)
    x = F.relu(net[1](F.conv2d(MAPS, w("0.weight", net[0].weight)))) / divisors.view(3, 1, 1)
    expected = F.conv2d(x, w("3.weight", net[3].weight * divisors.view(1, 3, 1, 1)), net[3].bias)
    torch.testing.assert_close(run(net, grids, MAPS)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "layer"),
    [
        (4, nn.Conv2d(4, 6, 3, bias=False)),
        (4, nn.Conv2d(4, 4, 3, groups=4, bias=False)),
        (4, nn.Conv2d(4, 8, 3, groups=4, bias=False)),
        (4, nn.Conv2d(4, 6, 3, groups=2, bias=False)),
        (4, nn.Conv1d(4, 2, 2, bias=False)),
        (4, nn.Linear(4, 3, bias=False)),
    ],
)
def test_factors_of_input_channels_are_those_of_the_input(channels, layer):
    """A layer with its weight multiplied gives what it gives for the input multiplied."""
    factors, dims = torch.tensor([2.0, 0.5, 4.0, 8.0]), layer.weight.ndim - 2
    x = torch.randn(2, channels, *[4] * dims)
    expected = layer(x * factors.view(-1, *[1] * dims))
    by_site = multiplied(Grids(factors={"site": factors}), "site", layer.weight)
    assert torch.equal(by_site, layer.weight * spread(factors, layer.weight))
    assert multiplied(Grids(), "site", layer.weight) is layer.weight
    layer.weight.data = by_site.detach()
    torch.testing.assert_close(layer(x), expected)


def test_arguments_of_batch_norm():
    assert norm_arguments(1, 2, 3, eps=4) == {"running_mean": 1, "running_var": 2, "weight": 3, "eps": 4}
    x, mean, variance = torch.randn(4, 2), torch.randn(2), torch.rand(2) + 1
    expected = F.batch_norm(x, mean, variance, torch.ones(2), torch.zeros(2), False, 0.1, 0.5)
    given = norm_arguments(mean, variance, torch.ones(2), torch.zeros(2), False, 0.1, 0.5)
    assert torch.equal(F.batch_norm(x, **given), expected)


# --- which weight it is ---


def test_names_of_weights():
    net = nn.ModuleDict({"a": nn.Linear(2, 6), "b": nn.Sequential(nn.Conv2d(2, 4, 1)), "c": nn.Linear(3, 3)})
    names, weight = WeightNames(net), net["a"].weight
    assert names.find(weight, "x") == WeightSite("a.weight", 0, 6)
    assert names.find(net["b"][0].weight, "") == WeightSite("b.0.weight", 0, 4)
    assert names.find(weight[2:5], "x") == WeightSite("a.weight", 2, 5)
    assert names.find(weight.detach()[:1], "x") == WeightSite("a.weight", 0, 1)
    assert [place.start for place in (names.find(part, "a") for part in weight.chunk(3))] == [0, 2, 4]
    for other in (weight[::2], weight[:, :1], weight.clone(), weight * 2, net["c"].weight.t(), torch.ones(6, 2)):
        assert names.find(other, "a") is None
    assert names.name_of(net["a"].bias) == "a.bias"
    assert names.name_of(None) is names.name_of(torch.ones(6)) is None
    place = names.find(weight[2:5], "x")
    assert names.whole(place, weight[2:5]) is weight
    other = weight[2:5]
    assert names.whole(WeightSite("other", 0, 3), other) is other


def test_names_of_parameters_in_one_storage():
    """As libraries lay them out that work on all of them at once."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Linear(2, 4), nn.Linear(2, 3))
    flat = torch.randn(sum(value.numel() for value in net.parameters()))
    place = 0
    for value in net.parameters():
        value.data = flat[place : place + value.numel()].view_as(value)
        place += value.numel()
    names = WeightNames(net)
    for index, layer in enumerate(net):
        own = WeightSite(f"{index}.weight", 0, len(layer.weight))
        assert names.find(layer.weight, "") == own
        assert names.find(layer.weight.detach(), "") == own
        assert names.find(layer.weight[1:3], "") == WeightSite(f"{index}.weight", 1, 3)
        assert names.whole(own, layer.weight.detach()) is layer.weight


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_names_of_weights_that_are_computed(norm):
    net = nn.ModuleDict({"a": norm(nn.Linear(2, 3)), "b": nn.Module()})
    for name in ("weight_g", "weight_v"):
        net["b"].register_parameter(name, nn.Parameter(torch.ones(3, 2)))
    del net["b"].weight_g
    names = WeightNames(net)
    assert names.find(net["a"].weight, "a") == WeightSite("a.weight", 0, 3)
    assert names.find(net["a"].weight, "b") is None
    made = {
        names.stands_for(name) for name, _ in net.named_parameters() if name.startswith("a.") and "bias" not in name
    }
    assert made == {"a.weight"}
    assert [names.stands_for(name) for name in ("a.bias", "b.weight_v")] == ["a.bias", "b.weight_v"]
    whole = norm(nn.Linear(2, 3))
    assert WeightNames(whole).find(whole.weight, "") == WeightSite("weight", 0, 3)


def standing_for(parameter, shown):
    """What says that a tensor, and each part of it, stands for a parameter."""

    def source(tensor):
        same = tensor.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr()
        return Source("of.another.name", parameter, shown) if same else None

    return source


def test_names_of_weights_that_something_stands_for():
    net = nn.Linear(2, 3)
    masked = net.weight * 0.5
    assert WeightNames(net).find(masked, "") is None
    names = WeightNames(net, standing_for(net.weight, masked))
    assert names.find(masked, "") == WeightSite("weight", 0, 3)
    assert names.find(masked[1:], "") == WeightSite("weight", 1, 3)
    assert names.whole(WeightSite("weight", 1, 3), masked[1:]) is masked
    assert WeightNames(nn.Linear(2, 3), standing_for(net.weight, masked)).find(masked, "") is None  # of another network
    assert names.find(torch.ones(3, 2), "") is None


def test_a_weight_that_stands_for_another_is_rounded_and_its_gradient_arrives():
    net = nn.Sequential(nn.Linear(3, 2))
    grids, x = calibrated(net, (torch.randn(8, 3),), weight_bits=3), torch.randn(5, 3)
    parameter, mask = net[0].weight, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    masked = parameter * mask
    vars(net[0])["weight"] = masked
    rounding = Rounding(net, grids, standing_for(parameter, masked))
    rounding.evaluating = False
    with quantizing(net, rounding):
        output = net(x)
    expected = F.linear(
        activation_of(grids, "in:0:linear:0", x), weight_of(grids, "0.weight", parameter * mask), net[0].bias
    )
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert torch.equal(parameter.grad != 0, mask != 0)


def test_one_weight_for_two_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(F.relu(self.one(x)))

    net, x = Tied(), torch.randn(5, 3)
    grids = calibrated(net, (x,), weight_bits=4)
    other = copy.deepcopy(net)
    a, w = partial(activation_of, grids), weight_of(grids, "one.weight", other.one.weight)
    hidden = a(":relu:0", F.relu(F.linear(a("in:one:linear:0", x), w, other.one.bias)))
    expected = F.linear(hidden, w, other.two.bias)
    output, rounding = run(net, grids, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert rounding.used == set(grids.weights) == {"one.weight"}
    assert {place.name for place in grids.sites.values()} == {"one.weight"}
    output.sum().backward()
    expected.sum().backward()
    assert_gradients(net, other)


def test_an_embedding_tied_to_the_last_layer_is_rounded_there_only():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.last = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.last.weight = self.embedding.weight

        def forward(self, tokens):
            return self.last(self.embedding(tokens))

    net, tokens = Tied(), torch.tensor([[0, 3, 5]])
    grids = calibrated(net, (tokens,), weight_bits=4)
    x = activation_of(grids, "embedding:embedding:0", net.embedding(tokens))
    expected = F.linear(x, weight_of(grids, "embedding.weight", net.last.weight))
    torch.testing.assert_close(run(net, grids, tokens)[0], expected)


def test_a_parameter_of_the_module_that_a_function_takes():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.scale = nn.Parameter(torch.randn(3, 2, 1, 1)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return F.conv2d(x, self.kernel, self.scale, stride=2)

    net = Functional()
    grids = calibrated(net, (MAPS,))
    x = F.conv2d(
        activation_of(grids, "in::conv2d:0", MAPS), weight_of(grids, "kernel", net.kernel), net.scale, stride=2
    )
    torch.testing.assert_close(run(net, grids, MAPS)[0], activation_of(grids, ":conv2d:0", x), rtol=0, atol=1e-6)
    assert grids.sites[":conv2d:0"] == WeightSite("kernel", 0, 3, "scale", "in::conv2d:0")


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_are_computed(norm):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Conv2d(2, 3, 1)), nn.ReLU(), norm(nn.Conv2d(3, 2, 1))).eval()

    net, other = made(), made()  # the older weight norm cannot be copied
    grids = calibrated(net, (MAPS,), weight_bits=4)
    a = partial(activation_of, grids)
    other(MAPS)
    first, second = (
        added(grids, source, name, layer.bias)
        for source, name, layer in (("in:0:conv2d:0", "0.weight", other[0]), ("1:relu:0", "2.weight", other[2]))
    )
    x = F.conv2d(a("in:0:conv2d:0", MAPS), weight_of(grids, "0.weight", other[0].weight), first)
    x = F.conv2d(a("1:relu:0", F.relu(x)), weight_of(grids, "2.weight", other[2].weight), second)
    expected = a("2:conv2d:0", x)
    output, rounding = run(net, grids, MAPS)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert rounding.used == {"0.weight", "2.weight"}
    output.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(net, other)


# --- attention ---


def heads(x, n=2):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attended(q, k, v):
    """Of (N, T, E) in two heads, written out."""
    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    net, x = Net().train(), torch.randn(3, 5, 8)
    grids = calibrated(net, (x,), weight_bits=4)
    other = copy.deepcopy(net)
    own, a, w = other.attention, partial(activation_of, grids), partial(weight_of, grids)
    packed = F.linear(
        a("in:attention:linear:0", x), w("attention.in_proj_weight", own.in_proj_weight), own.in_proj_bias
    )
    inside = attended(*packed.chunk(3, -1)).transpose(0, 1).flatten(0, 1)
    key = grids.sites["attention:linear:1"].source
    expected = F.linear(a(key, inside), w("attention.out_proj.weight", own.out_proj.weight), own.out_proj.bias)
    expected = expected.unflatten(0, (5, 3)).transpose(0, 1)
    output, rounding = run(net, grids, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert set(grids.activations) == {"in:attention:linear:0", key}
    assert [place.bias for place in grids.sites.values()] == ["attention.in_proj_bias", "attention.out_proj.bias"]
    assert rounding.used == {"attention.in_proj_weight", "attention.out_proj.weight"}
    output.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(net, other)


@pytest.mark.parametrize("dims", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "apart"])
def test_cross_attention(dims):
    """Packed, the query takes some rows of the weight, and keys and values the others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **dims)

        def forward(self, q, k, v):
            return self.attention(q, k, v, need_weights=False)[0]

    net, q = Net().train(), torch.randn(3, 5, 8)
    k, v = torch.randn(3, 7, dims.get("kdim", 8)), torch.randn(3, 7, dims.get("vdim", 8))
    grids = calibrated(net, (q, k, v), weight_bits=4)
    other = copy.deepcopy(net)
    own, a = other.attention, partial(activation_of, grids)
    if dims:
        names = [f"attention.{letter}_proj_weight" for letter in "qkv"]
        weights = [weight_of(grids, name, getattr(own, name.split(".")[1])) for name in names]
    else:
        names = ["attention.in_proj_weight"] * 3
        weights = weight_of(grids, names[0], own.in_proj_weight).chunk(3)
        rows = [(place.start, place.stop) for place in grids.sites.values()]
        assert rows == [(0, 8), (8, 16), (16, 24), (0, 8)]
    keys = [f"in:attention:linear:{number}" for number in range(3)]
    assert [place.bias for place in grids.sites.values()] == [*[COMPUTED] * 3, "attention.out_proj.bias"]
    parts = zip((q, k, v), keys, weights, own.in_proj_bias.chunk(3), strict=True)
    inside = attended(*[F.linear(a(key, x), weight, bias) for x, key, weight, bias in parts])
    last = grids.sites["attention:linear:3"].source
    rounded = weight_of(grids, "attention.out_proj.weight", own.out_proj.weight)
    expected = F.linear(a(last, inside), rounded, own.out_proj.bias)
    output, rounding = run(net, grids, q, k, v)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert rounding.used == {*names, "attention.out_proj.weight"}
    output.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(net, other)


def test_an_encoder_layer_takes_no_fast_path_in_evaluation():
    net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    grids = calibrated(net, (x,), weight_bits=3)
    with torch.no_grad():
        output, rounding = run(net, grids, x)
    assert (
        rounding.used
        == set(grids.weights)
        == {
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        }
    )
    with_gradients, _ = run(net, grids, x)
    torch.testing.assert_close(output, with_gradients)  # where there is no fast path
    assert (output - net(x)).abs().max() > 0.01


# --- what was not calibrated ---


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.times, self.relu = nn.Linear(3, 3), 1, True

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
            x = F.relu(x) if self.relu else x
        return x


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_called_more_often_than_in_calibration_is_an_error(fresh_compiler, compiled):
    net, x = Looping(), torch.randn(4, 3)
    grids = calibrated(net, (x,))
    net.times = 2
    if compiled:
        net.compile(backend="eager")
    with pytest.raises(QuantizationError, match="the layer 'layer#1:linear:0' was never calibrated"):
        run(net, grids, x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_activation_that_was_not_calibrated_is_an_error(fresh_compiler, compiled):
    net, x = Looping(), torch.randn(4, 3)
    net.times = 2
    grids = calibrated(net, (x,))
    net.relu = False
    if compiled:
        net.compile(backend="eager")
    with pytest.raises(QuantizationError, match="the activation 'layer:linear:0' was never calibrated"):
        run(net, grids, x)


def test_weights_without_a_grid_stay_in_float(small):
    small.requires_grad_(False)
    grids = calibrated(small, (MAPS,))
    del grids.weights["one.weight"], grids.sites["one:conv2d:0"]
    output, rounding = run(small, grids, MAPS)
    a, w, b = (partial(own, grids) for own in (activation_of, weight_of, added))
    bias = b("in:stem:conv2d:0", "stem.weight", None, small.norm)
    x = F.relu(small.norm(F.conv2d(a("in:stem:conv2d:0", MAPS), w("stem.weight", small.stem.weight), bias)))
    x = F.max_pool2d(a("relu:relu:0", x), 2)
    out = a("relu#1:relu:0", F.relu(small.one(x)))
    bias = b("relu#1:relu:0", "two.weight", small.two.bias)
    out = a("two:conv2d:0", F.conv2d(out, w("two.weight", small.two.weight), bias, padding=1))
    out = a("relu#2:relu:0", F.relu(out + x)).mean((2, 3))
    bias = b(":mean:0", "head.weight", small.head.bias)
    expected = F.linear(a(":mean:0", out), w("head.weight", small.head.weight), bias)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert "one.weight" not in rounding.used


# --- half precision ---


def test_in_half_precision_numbers_are_rounded_in_float32():
    """Rounded in bfloat16, every tenth would get another integer."""
    x = torch.randn(10_000).bfloat16()
    rounding = Rounding(nn.Linear(1, 1), Grids(activations={"x": ActivationGrid(0.03, 128, 8)}))
    expected = on_grid(x.float(), torch.tensor(0.03), 128, 0, 255).bfloat16()
    assert torch.equal(rounding.activation("x", x), expected)
    assert not torch.equal(on_grid(x, torch.tensor(0.03).bfloat16(), 128, 0, 255), expected)


def test_autocast():
    net, x = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)), MAPS
    grids = calibrated(net, (x,))
    other, a = copy.deepcopy(net), partial(activation_of, grids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = run(net, grids, x)
        one = F.conv2d(a("in:0:conv2d:0", x), weight_of(grids, "0.weight", other[0].weight), other[0].bias)
        one = a("1:relu:0", F.relu(one).float()).bfloat16()
        two = F.conv2d(one, weight_of(grids, "2.weight", other[2].weight), other[2].bias)
        expected = a("2:conv2d:0", two.float()).bfloat16()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0.02, atol=1e-3)


# --- compiled ---


class CountingBackend:
    """Counts the graphs that are compiled."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


class Joined(nn.Module):
    """What moves, joins, cuts and curves; two outputs, one of them on a grid."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 2, 3)
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1))

    def forward(self, x):
        y, z = torch.cat([self.a(x), F.silu(self.b(x))], 1).chunk(2, 1)
        y = F.hardswish(y)
        y *= z
        maps = F.conv2d(self.c(torch.cat([F.max_pool2d(z, 2), F.avg_pool2d(y, 2)], 1)), self.kernel)
        return {"maps": maps, "mean": maps.sigmoid().mean((2, 3))}


class Writing(nn.Module):
    """What works in place, its result not used, and what torch.compile knows by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 1) for _ in range(4))

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        F.relu_(y)
        z.sigmoid_()
        y.mul_(z)
        z = F.pad(self.c(F.hardswish(y)), (1, 1))
        z.add_(0.1)
        z[:, 0] = 0.0
        first, second = self.d(F.gelu(z)).unbind(1)
        return F.sigmoid(first) * F.hardsigmoid(second)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.query = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Parameter(torch.randn(1, 8))
        self.project, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.layer(x + self.project(self.query))[:, 0])


COMPILED = {
    "residual": (Small, MAPS),
    "joined": (Joined, MAPS),
    "writing": (Writing, MAPS),
    "attention": (Attending, torch.randn(3, 4, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "in_place"),
    [
        ("residual", True),
        ("residual", False),
        ("joined", True),
    ],
)
def test_compiled_networks_compute_the_same_in_one_graph(fresh_compiler, name, in_place):
    """Compiled before or after, and plain again outside of the mode."""
    kind, x = COMPILED[name]
    net = kind().eval()
    plain, grids, backend = copy.deepcopy(net), calibrated(net, (x,)), CountingBackend()
    other = copy.deepcopy(net)
    compiled = net
    if in_place:
        net.compile(backend=backend, fullgraph=True)
    else:
        compiled = torch.compile(net, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-6)
    assert backend.graphs == 1
    rounding, expected = Rounding(compiled, grids), run(other, grids, x)[0]
    rounding.evaluating = not other.training
    with quantizing(compiled, rounding) as calls:
        outputs = [compiled(x.clone()) for _ in range(3)]
        assert backend.graphs == 2  # one for all calls
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=0, atol=step_of(grids) if name == "joined" else 1e-6)
    assert calls.count == 3
    if name == "residual":  # after a tie there is nothing to compare
        total(outputs[0]).backward()
        total(expected).backward()
        assert_gradients(net, other)
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_attention_is_quantised_outside_of_the_graph_or_refused_in_one(fresh_compiler):
    kind, x = COMPILED["attention"]
    net = kind().eval()
    grids = calibrated(net, (x,))
    expected = run(copy.deepcopy(net), grids, x)[0]
    whole, parts = (torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=own) for own in (True, False))
    with quantizing(whole, Rounding(whole, grids)), pytest.raises(Exception, match="MultiheadAttention cannot be"):
        whole(x)
    with torch.no_grad(), quantizing(parts, Rounding(parts, grids)):
        torch.testing.assert_close(parts(x), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_code_that_writes_in_place_in_a_statement_of_its_own_is_told(fresh_compiler):
    """There ``F.relu_(y)`` does not give ``y`` back, so nobody knows what has become of it."""
    kind, x = COMPILED["writing"]
    net = kind().eval()
    grids = calibrated(net, (x,))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    message = "the activation 'a:conv2d:0' was never calibrated"
    with torch.no_grad(), quantizing(compiled, Rounding(compiled, grids)), pytest.raises(Exception, match=message):
        compiled(x.clone())


def step_of(grids):
    """A number that lies on a boundary may be rounded to either side: it is off by one step."""
    return max(grid.scale for grid in grids.activations.values())


def total(output):
    return sum(value.square().sum() for value in (output.values() if isinstance(output, dict) else [output]))


@pytest.mark.slow
def test_compiled_training_of_a_network_with_batch_norm(fresh_compiler, small):
    grids = calibrated(small, (MAPS,))
    one, two, backend = copy.deepcopy(small).train(), copy.deepcopy(small).train(), CountingBackend()
    one.compile(backend=backend, fullgraph=True)
    losses = []
    for net in (one, two):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with quantizing(net, Rounding(net, grids)):
            for _ in range(4):
                optimizer.zero_grad()
                loss = net(MAPS).square().sum()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert losses[3] < losses[0]
    assert backend.graphs == 1
    torch.testing.assert_close(one.norm.running_mean, two.norm.running_mean)


@pytest.mark.slow
def test_a_compiled_module_that_calls_the_network_runs_it_quantised(fresh_compiler, small):
    grids, backend = calibrated(small, (MAPS,)), CountingBackend()
    expected = run(small, grids, MAPS)[0].sum() * 2

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small

        def forward(self, x):
            return self.net(x).sum() * 2

    outer = torch.compile(Outer(), backend=backend, fullgraph=True)
    with quantizing(small, Rounding(small, grids)) as calls:
        for _ in range(4):
            torch.testing.assert_close(outer(MAPS.clone()), expected)
    assert backend.graphs == 1
    assert calls.count >= 1


class WritesThroughAView(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        half = x[:, :1]
        used = self.second(x)
        half.mul_(2.0)
        return used + self.third(x)


def test_a_tensor_that_is_written_to_through_a_view_after_its_use():
    network, x = WritesThroughAView().eval(), torch.randn(2, 2, 3, 3)
    with pytest.raises(QuantizationError, match=r"'first:conv2d:0' made and views of it, one was written"):
        calibrate(network, lambda: (network(x) for _ in range(1)), Settings())


@pytest.mark.parametrize(
    "write", [F.relu_, lambda y: y.mul_(2.0), lambda y: y.sub_(0.3).tanh_(), lambda y: y.add_(3.0)]
)
def test_a_tensor_that_is_written_to_after_a_view_of_it_was_taken(write):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Linear(18, 2)

        def forward(self, x):
            y = self.first(x)
            view = y.flatten(1)
            write(y)
            return self.second(view)

    network, x = Writes().eval(), torch.randn(2, 2, 3, 3)
    with pytest.raises(QuantizationError, match=r"'first:conv2d:0' made and views of it, one was written"):
        calibrate(network, lambda: (network(x) for _ in range(1)), Settings())


def test_a_view_that_is_not_used_after_the_write_does_no_harm():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.first(x)
            assert y.flatten(1).shape[1] == 18
            return self.second(F.relu_(y))

    network, x = Writes().eval(), torch.randn(2, 2, 3, 3)
    grids = calibrate(network, lambda: (network(x) for _ in range(1)), Settings())
    assert list(grids.weights) == ["first.weight", "second.weight"]


def test_a_part_that_is_written_to_leaves_the_other_parts():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            one, two = self.first(x).chunk(2, dim=1)
            one.mul_(2.0)
            return self.second(one) + self.third(two)

    network, x = Parts().eval(), torch.randn(2, 2, 3, 3)
    with torch.no_grad():
        grids = calibrate(network, lambda: (network(x) for _ in range(1)), Settings())
        with quantizing(network, Rounding(network, grids)):
            near = network(x)
        assert (near - network(x)).norm() <= 0.05 * network(x).norm()

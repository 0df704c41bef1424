"""What calibration finds, against ranges, means and scales worked out by hand; and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_compress.functional.quantizers import fake_quantize, mse_grid, quantization_grid, range_grid
from lightning_compress.mechanisms.calibration import (
    LOOKS,
    Calibration,
    Settings,
    calibrate,
    fingerprints,
    statistics_of,
)
from lightning_compress.mechanisms.grids import COMPUTED, ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.observers import OBSERVERS, make_observer
from lightning_compress.mechanisms.quantization import MARKS, QuantizationError, module_of, quantizing
from lightning_compress.mechanisms.rounding import Rounding, multiplied


def calibrated(net, *batches, selected=lambda name: True, given=None, **settings):
    steps = lambda: (net(batch) for batch in batches)  # noqa: E731 - from the start each time
    return calibrate(net, steps, Settings(**settings), selected=selected, given=given or {})


def run(net, grids, x, kind=Rounding):
    rounding = kind(net, grids)
    rounding.evaluating = not net.training
    with quantizing(net, rounding), torch.no_grad():
        return net(x)


class Unrounded(Rounding):
    """Equalises channels and rounds nothing."""

    def __init__(self, network, grids):
        super().__init__(network, grids)
        self.active = False

    def rounded(self, site, grid, weight):
        return multiplied(self.grids, site, weight)


def rounded(weight, bits=8, find=quantization_grid):
    step, highest = find(weight, bits, axis=0), 2 ** (bits - 1) - 1
    return fake_quantize(weight, step, 0, -highest, highest, axis=0)


def grid_of(bits, *tensors):
    """Over the extremes of all, and zero."""
    low, high = min(x.min().item() for x in tensors), max(x.max().item() for x in tensors)
    return ActivationGrid(*range_grid(min(low, 0.0), max(high, 0.0), bits), bits)


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(48, 5)
    ).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.data.uniform_(0.5, 2)
    return net


MAPS = [torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


# --- ranges ---


@pytest.mark.parametrize(("weight_range", "find"), [("max", quantization_grid), ("mse", mse_grid)])
@pytest.mark.parametrize("bits", [8, 3])
def test_grids_are_those_of_the_network_with_rounded_weights(weight_range, find, bits):
    net = convolutional()
    grids = calibrated(net, *MAPS[:2], weight_bits=bits, activation_bits=bits, weight_range=weight_range)
    w = {name: rounded(net.get_parameter(name).detach(), bits, find) for name in ("0.weight", "3.weight", "5.weight")}
    assert set(grids.weights) == set(w)
    for name, grid in grids.weights.items():
        assert torch.equal(grid.step, find(net.get_parameter(name), bits, axis=0))
        assert grid.bits == bits
    edges = {key: [] for key in ("in:0:conv2d:0", "2:relu:0", "3:conv2d:0")}
    with torch.no_grad():
        for x in MAPS[:2]:
            one = F.relu(net[1](F.conv2d(x, w["0.weight"], net[0].bias)))
            two = F.conv2d(one, w["3.weight"], net[3].bias)
            for seen, value in zip(edges.values(), (x, one, two), strict=True):
                seen.append(value)
    assert grids.activations == {key: grid_of(bits, *values) for key, values in edges.items()}
    assert grids.folds == {"0:conv2d:0": "1"}
    assert grids.sites == {
        "0:conv2d:0": WeightSite("0.weight", 0, 4, "0.bias", "in:0:conv2d:0"),
        "3:conv2d:0": WeightSite("3.weight", 0, 3, "3.bias", "2:relu:0"),
        "5:linear:0": WeightSite("5.weight", 0, 5, "5.bias", "3:conv2d:0"),
    }
    assert (grids.left_in_float, grids.integer_activations) == ((), True)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_each_observer_sees_each_batch_once(kind):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(16, 3) * scale for scale in (1, 3, 2)]
    grids = calibrated(net, *batches, observer=kind, activation_bits=4)
    first, second = make_observer(kind, 4), make_observer(kind, 4)
    for x in batches:
        first.observe(x)
        second.observe(F.relu(F.linear(x, rounded(net[0].weight), net[0].bias)))
    assert grids.activations == {
        "in:0:linear:0": ActivationGrid(*range_grid(*first.range(), 4), 4),
        "1:relu:0": ActivationGrid(*range_grid(*second.range(), 4), 4),
    }


def test_a_tensor_with_many_consumers_is_looked_at_once():
    """A moving average would notice."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x)

    net, batches = Net(), [torch.rand(4, 3), torch.rand(4, 3) * 9]
    grids = calibrated(net, *batches, observer="moving_average")
    observer = make_observer("moving_average", 8)
    for x in batches:
        observer.observe(x)
    assert grids.activations == {"in:a:linear:0": ActivationGrid(*range_grid(*observer.range(), 8), 8)}


def test_weights_only():
    net = convolutional()
    grids = calibrated(net, *MAPS, activation_bits=None)
    assert (grids.activations, grids.integer_activations, len(grids.weights)) == ({}, False, 3)
    assert grids.folds == {"0:conv2d:0": "1"}
    one = F.relu(net[1](F.conv2d(MAPS[0], rounded(net[0].weight), net[0].bias)))
    expected = F.linear(
        F.conv2d(one, rounded(net[3].weight), net[3].bias).flatten(1), rounded(net[5].weight), net[5].bias
    )
    torch.testing.assert_close(run(net, grids, MAPS[0]), expected)


@pytest.mark.parametrize(("bits", "edge"), [(4, 8), (8, 4), (4, None)])
def test_edges_have_bits_of_their_own(bits, edge):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    grids = calibrated(net, torch.randn(8, 3), weight_bits=bits, activation_bits=bits, edge_bits=edge)
    assert [grid.bits for grid in grids.weights.values()] == [edge or bits, bits, edge or bits]
    assert {key: grid.bits for key, grid in grids.activations.items()} == {
        "in:0:linear:0": edge or bits,
        "1:relu:0": bits,
        "3:relu:0": bits,
    }
    for name, grid in grids.weights.items():
        assert torch.equal(grid.step, quantization_grid(net.get_parameter(name), grid.bits, axis=0))


def test_given_grids_are_taken():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    given = {"2.weight": WeightGrid(torch.tensor(0.3), 3), "other": WeightGrid(torch.tensor(1.0), 2)}
    grids = calibrated(net, torch.randn(8, 3), given=given)
    assert grids.weights["2.weight"] is given["2.weight"]
    assert list(grids.weights) == ["0.weight", "2.weight"]
    assert torch.equal(grids.weights["0.weight"].step, quantization_grid(net[0].weight, 8, axis=0))


# --- how much is looked at ---


@pytest.mark.parametrize(("most", "batches"), [(1, 1), (4, 1), (5, 2), (8, 2), (12, 3), (1000, 5)])
def test_so_many_samples_are_looked_at(most, batches):
    net, seen = convolutional(), []

    def steps():
        seen.append([])
        for x in MAPS:
            seen[-1].append(len(x))
            yield net(x)

    grids = calibrate(net, steps, Settings(max_samples=most))
    assert [len(run) for run in seen] == [batches, batches]
    assert grids.activations["in:0:conv2d:0"] == grid_of(8, *MAPS[:batches])


def test_for_weights_alone_a_few_batches_are_looked_at():
    net, seen = convolutional(), []

    def steps():
        for x in [*MAPS, *MAPS]:
            seen.append(len(x))
            yield net(x)

    calibrate(net, steps, Settings(activation_bits=None))
    assert seen == [4] * LOOKS


def test_layers_that_only_some_batches_reach_are_quantised():
    """Listed once as left in float, however often they run."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 2)
    net = nn.ModuleDict({"a": first, "b": second})
    net.forward = lambda x, turn: F.gelu(first(x)) if turn % 2 else second(F.gelu(first(x)))
    grids = calibrate(net, lambda: (net(torch.randn(4, 3), turn) for turn in range(1, 5)), Settings())
    assert set(grids.weights) == {"a.weight", "b.weight"}
    assert grids.left_in_float == ("gelu (1)",)


def test_the_first_and_the_last_layer_are_those_of_the_first_batch():
    """A branch of later batches is no end of the network."""
    layers = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("first", "mid", "last", "branch")})
    net = nn.Module()
    net.layers = layers
    net.forward = lambda x, turn: layers["last"](
        layers["mid"](layers["first"](x)) + (layers["branch"](x) if turn else 0.0)
    )
    steps = lambda: (net(torch.randn(4, 3), turn) for turn in range(3))  # noqa: E731
    grids = calibrate(net, steps, Settings(weight_bits=3, edge_bits=8))
    bits = {name.split(".")[1]: grid.bits for name, grid in grids.weights.items()}
    assert bits == {"first": 8, "mid": 3, "last": 8, "branch": 3}


def test_what_was_zero_throughout_is_known():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    for x, expected in ((torch.randn(4, 3), []), (torch.zeros(4, 3), ["in:0:linear:0"])):
        calibration = Calibration(net, Settings())
        for find in (calibration.discover, calibration.observe):
            find(lambda x=x: (net(own) for own in [x]))
        assert calibration.nothing == expected


def test_each_call_of_the_network_counts_and_steps_without_one_do_not():
    net, seen = nn.Sequential(nn.Linear(2, 2)), []

    def steps():
        for number in range(6):
            if number:  # the first step is skipped
                net(torch.full((3, 2), float(number)))
                net(torch.full((3, 2), -float(number)))
            seen.append(number)
            yield

    grids = calibrate(net, steps, Settings(max_samples=12))
    assert seen == [0, 1, 2, 0, 1, 2]
    assert grids.activations["in:0:linear:0"] == ActivationGrid(*range_grid(-2.0, 2.0, 8), 8)


def test_statistics_of_batch_norm_are_estimated_between_weights_and_activations():
    net = convolutional()
    calibration = Calibration(net, Settings(weight_bits=3, activation_bits=8))
    steps = lambda: (net(x) for x in MAPS[:2])  # noqa: E731
    calibration.discover(steps)
    with quantizing(net, calibration.weights_only()), torch.no_grad():
        output = net(MAPS[0])
    inner = F.conv2d(MAPS[0], rounded(net[0].weight, 3), net[0].bias)
    two = F.conv2d(F.relu(net[1](inner)), rounded(net[3].weight, 3), net[3].bias)
    torch.testing.assert_close(output, F.linear(two.flatten(1), rounded(net[5].weight, 3), net[5].bias))
    mean, variance = inner.mean((0, 2, 3)).detach(), inner.var((0, 2, 3)).detach()
    calibration.grids.statistics["1"] = mean, variance
    calibration.observe(steps)
    with torch.no_grad():
        inner = [F.conv2d(x, rounded(net[0].weight, 3), net[0].bias) for x in MAPS[:2]]
        normed = [F.relu(F.batch_norm(x, mean, variance, net[1].weight, net[1].bias)) for x in inner]
    assert calibration.grids.activations["2:relu:0"] == grid_of(8, *normed)


def test_copies_of_statistics():
    net = convolutional()
    found = statistics_of(["1"], net)["1"]
    assert torch.equal(found[0], net[1].running_mean)
    assert torch.equal(found[1], net[1].running_var)
    net[1].reset_running_stats()
    assert found[0].abs().sum() > 0


# --- what belongs together ---


class Branching(nn.Module):
    """A convolution and a batch norm, whose input somebody else may take as well."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), other

    def forward(self, x):
        y = self.conv(x)
        return self.other(self.norm(y), y)


@pytest.mark.parametrize(
    ("other", "folded"),
    [
        (lambda normed, y: normed, True),
        (lambda normed, y: (normed, y), False),
        (lambda normed, y: normed + y, False),
        (lambda normed, y: normed * y.shape[0], True),
        (lambda normed, y: normed.mean() + y.relu().mean(), False),
        (lambda normed, y: normed.mean() + F.avg_pool2d(y, 2).mean(), False),
        (lambda normed, y: normed.mean() + y.sigmoid().mean(), False),
        (lambda normed, y: normed.mean() + y.flatten(1).mean(), False),
        (lambda normed, y: normed.mean() + y.mT.mean(), False),
        (lambda normed, y: normed.mean() + F.gelu(y).mean(), False),
        (lambda normed, y: normed.mean() + torch.cat([y, y]).mean(), False),
        (lambda normed, y: normed.mean() + torch.softmax(input=y, dim=1)[0, 0, 0, 0], False),
    ],
)
def test_a_batch_norm_is_a_part_of_the_layer_whose_output_nobody_else_takes(other, folded):
    net = Branching(other).eval()
    assert calibrated(net, MAPS[0]).folds == ({"conv:conv2d:0": "norm"} if folded else {})


def test_a_batch_norm_of_a_module_of_the_user_is_not_folded():
    """A file could not read its statistics."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("variance", torch.ones(3))

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.variance)

    grids = calibrated(nn.Sequential(nn.Conv2d(2, 3, 1), Own()).eval(), MAPS[0])
    assert grids.folds == {}
    assert grids.left_in_float == ("batch_norm (1)",)


@pytest.mark.parametrize("length", [3, 5])
def test_a_batch_norm_over_tokens_is_no_part_of_the_linear_layer(length):
    """Its channels are the positions, also where there are as many of them as the layer has channels."""
    net = nn.Sequential(nn.Linear(4, length), nn.BatchNorm1d(5)).eval()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(6, 5, 4)
    assert calibrated(net, x).folds == {}
    assert calibrated(nn.Sequential(net[0], nn.BatchNorm1d(length)).eval(), x[0]).folds == {"0:linear:0": "1"}


@pytest.mark.sample
@pytest.mark.parametrize(
    "compile_",
    [
        lambda net: torch.compile(net, backend="eager"),
        pytest.param(lambda net: net.compile(backend="eager", fullgraph=True) or net, marks=pytest.mark.slow),
        pytest.param(
            lambda net: nn.Sequential(*[torch.compile(layer, backend="eager") for layer in net]), marks=pytest.mark.slow
        ),
    ],
    ids=["wrapped", "in place", "children"],
)
def test_of_a_compiled_network_the_same_is_found(fresh_compiler, compile_):
    net = convolutional()
    expected = calibrated(net, *MAPS)
    compiled = compile_(copy.deepcopy(net))
    compiled(MAPS[0])
    grids = calibrated(compiled, *MAPS)
    assert grids.folds == expected.folds == {"0:conv2d:0": "1"}
    for part in ("activations", "sites", "fingerprints", "left_in_float"):
        assert getattr(grids, part) == getattr(expected, part), part
    assert all(torch.equal(grids.weights[name].step, grid.step) for name, grid in expected.weights.items())


def test_activations_are_freed_after_each_batch():
    net, references = convolutional(), []
    for module in net:
        module.register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        calibrated(net, *MAPS)
        assert len(references) == 6 * (5 + 5)
        assert sum(reference() is not None for reference in references) == 0
    finally:
        gc.enable()


class Learned(nn.Module):
    """Queries that are learned go through two layers, made ready in some way."""

    def __init__(self, ready):
        super().__init__()
        self.query, self.one, self.two = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2), nn.Linear(2, 2)
        self.ready = ready

    def forward(self, x):
        return x + self.one(self.ready(self.query)) + self.two(self.ready(self.query))


@pytest.mark.parametrize(
    "ready",
    [
        lambda query: query,
        lambda query: query.detach(),
        lambda query: query.unsqueeze(0).expand(2, -1, -1),
        lambda query: query + 0,
    ],
    ids=["itself", "detached", "expanded", "computed"],
)
def test_a_parameter_as_input_is_observed_with_the_data(ready):
    net, x = Learned(ready), torch.randn(2, 3, 2)
    grids = calibrated(net, x, torch.randn(2, 3, 2), observer="moving_average")
    grid = grid_of(8, net.query.detach())
    assert list(grids.activations.values()) == [grid, grid]
    assert [place.source for place in grids.sites.values()] == list(grids.activations)
    assert vars(net.query) == {}
    query = fake_quantize(net.query.detach(), grid.scale, grid.zero_point, *grid.limits)
    with torch.no_grad():
        one, two = (F.linear(query, rounded(layer.weight), layer.bias) for layer in (net.one, net.two))
    torch.testing.assert_close(run(net, grids, x), x + one + two, rtol=0, atol=1e-6)


def test_the_network_is_left_as_it_was():
    net = convolutional()
    state, x, plain = copy.deepcopy(net.state_dict()), MAPS[0].clone(), net(MAPS[0])
    calibrated(net, x, equalize=True, correct_bias=True)
    assert torch.equal(net(MAPS[0]), plain)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks] == []
    assert [mark for value in (x, *net.parameters()) for mark in MARKS if hasattr(value, mark)] == []
    assert [value for value in net.parameters() if value.grad is not None] == []


def test_a_network_that_computes_a_gradient_inside():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.body(x).sum(), x)[0]

    net, x = Forces(), torch.randn(8, 3)
    grids = calibrated(net, x)
    assert set(grids.activations) == {"in:body.0:linear:0", "body.1:relu:0"}
    first, second = rounded(net.body[0].weight), rounded(net.body[2].weight)
    a = [grids.activations[key] for key in ("in:body.0:linear:0", "body.1:relu:0")]
    hidden = F.linear(fake_quantize(x, a[0].scale, a[0].zero_point, 0, 255), first, net.body[0].bias)
    expected = ((hidden > 0) * second) @ first
    torch.testing.assert_close(run(net, grids, x), expected)


# --- bias correction ---


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (64, 6)),
        (nn.Linear(6, 4, bias=False), (16, 5, 6)),
        (nn.Conv2d(6, 4, 3), (16, 6, 5, 5)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (16, 6, 5, 5)),
        (nn.Conv1d(6, 4, 2), (16, 6, 5)),
    ],
)
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_bias_correction_takes_the_mean_shift_back(layer, shape, activation_bits):
    net, batches = nn.Sequential(layer), [torch.rand(shape) + 1, torch.rand(shape) * 2]
    channel = 1 if layer.weight.ndim > 2 else -1
    settings = {"weight_bits": 3, "activation_bits": activation_bits}
    plain, corrected = (calibrated(net, *batches, correct_bias=own, **settings) for own in (False, True))

    def shift(grids):
        """Mean difference of each channel to float weights, with all that the layer takes as it is."""
        names, apart = list(grids.sites), []
        for x in batches:
            with torch.no_grad():
                if activation_bits:
                    grid = grids.activations[f"in:{names[0]}"]
                    x = fake_quantize(x, grid.scale, grid.zero_point, *grid.limits)
                apart.append((run(net, replaced(grids), x) - layer(x)).movedim(channel, 0).flatten(1))
        return torch.cat(apart, 1).mean(1)

    def replaced(grids):
        """Weights only, as the input is rounded already and the output shall not be."""
        return Grids(**{**vars(grids), "integer_activations": False, "activations": {}})

    assert plain.biases == {}
    assert shift(plain).abs().max() > 0.02
    torch.testing.assert_close(shift(corrected), torch.zeros(len(layer.weight)), rtol=0, atol=1e-5)
    (correction,) = corrected.biases.values()
    torch.testing.assert_close(correction, -shift(plain), rtol=0, atol=1e-5)


def test_a_batch_norm_with_new_statistics_has_taken_the_shift_back_already():
    net = convolutional()
    calibration = Calibration(net, Settings(weight_bits=3, correct_bias=True))
    steps = lambda: (net(x) for x in MAPS)  # noqa: E731
    calibration.discover(steps)
    calibration.grids.statistics["1"] = torch.zeros(4), torch.ones(4)
    calibration.observe(steps)
    assert set(calibration.grids.biases) == {"3:conv2d:0", "5:linear:0"}


# --- equalisation ---


def spread_out(net):
    """Let ranges of channels differ by a factor of thousands."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.data *= torch.logspace(-1.5, 1.5, len(module.weight))[
                torch.randperm(len(module.weight))
            ].view(-1, *[1] * (module.weight.ndim - 1))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_var.uniform_(0.1, 4)
            module.running_mean.normal_()
            if module.affine:
                module.weight.data.uniform_(-2, 2)
    return net.eval()


EQUALISED = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        (8, 3),
        2,
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (4, 5, 3), 1),
    "no relu": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), (8, 3), 1),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1)), (3, 2, 6), 1),
    "vectors with batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
        (8, 3),
        1,
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.5), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1)
        ),
        (3, 2, 6, 6),
        1,
    ),
    "batch norm without a weight": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        (3, 2, 6, 6),
        1,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 3, 1),
        ),
        (3, 2, 6, 6),
        2,
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4)),
        (3, 4, 6, 6),
        1,
    ),
}


@pytest.mark.parametrize("name", EQUALISED)
def test_equalisation_leaves_the_function_and_makes_ranges_equal(name):
    make, shape, pairs = EQUALISED[name]
    net, x = spread_out(make()), torch.randn(shape)
    grids = calibrated(net, x, activation_bits=None, equalize=True)
    layers = list(grids.sites)
    assert list(grids.divisors) == layers[:-1]
    assert list(grids.factors) == layers[1:]
    assert len(grids.divisors) == pairs
    plain = net(x).detach()
    torch.testing.assert_close(run(net, grids, x, Unrounded), plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    for first, second in pairwise(layers):
        assert torch.equal(grids.divisors[first], grids.factors[second])
        assert grids.divisors[first].log2().abs().max() > 0.5  # something was to be done
        rows, columns = ranges(net, grids, first, second)
        torch.testing.assert_close(rows, columns, rtol=0.05 if pairs > 1 else 1e-4, atol=0)


def ranges(net, grids, first, second):
    """The largest magnitude of each channel that leaves a layer, and of what the next multiplies it by, by hand."""
    one, two = (net.get_submodule(module_of(site)) for site in (first, second))
    before = grids.factors.get(first, torch.ones(one.weight.shape[1] * getattr(one, "groups", 1)))
    rows, columns = [], []
    for channel, divisor in enumerate(grids.divisors[first]):
        width = one.weight.shape[1]  # of a group
        group = channel // (len(one.weight) // getattr(one, "groups", 1))
        own = before[group * width : (group + 1) * width].view(-1, *[1] * (one.weight.ndim - 2))
        gain = 1.0
        if first in grids.folds:
            norm = net.get_submodule(grids.folds[first])
            gain = (norm.weight[channel].abs() if norm.affine else 1) / (norm.running_var[channel] + norm.eps).sqrt()
        rows.append((one.weight[channel] * own).abs().max() * gain / divisor)
        inside = two.weight.shape[1]
        size = len(two.weight) // getattr(two, "groups", 1)
        taking = two.weight[channel // inside * size : (channel // inside + 1) * size, channel % inside]
        columns.append(taking.abs().max() * grids.factors[second][channel])
    return torch.stack(rows).detach(), torch.stack(columns).detach()


def test_equalisation_makes_quantisation_better_where_channels_differ():
    net, x = spread_out(EQUALISED["depthwise"][0]()), torch.randn(16, 2, 6, 6)
    errors = []
    for equalize in (False, True):
        grids = calibrated(net, x, weight_bits=5, activation_bits=5, equalize=equalize)
        errors.append(((run(net, grids, x) - net(x)).norm() / net(x).norm()).item())
    assert errors[1] < 0.8 * errors[0]


class Taken(nn.Module):
    """Two layers, and what else is done with what is between them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self._forward = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), forward

    def forward(self, x):
        return self._forward(self, x)


@pytest.mark.parametrize(
    ("forward", "equalised"),
    [
        (lambda n, x: n.b(F.relu(n.a(x))), True),
        (lambda n, x: n.b(F.relu(F.relu(n.a(x)))), True),
        (lambda n, x: (lambda y: (n.b(y), y))(F.relu(n.a(x))), False),
        (lambda n, x: (lambda y: (n.b(F.relu(y)), y))(n.a(x)), False),
        (lambda n, x: (lambda y: n.b(y) + y)(F.relu(n.a(x))), False),
        (lambda n, x: (lambda y: n.b(y) * y.mean())(F.relu(n.a(x))), False),
        (lambda n, x: n.b(F.relu6(n.a(x))), False),
        (lambda n, x: n.b(F.leaky_relu(n.a(x))), False),
        (lambda n, x: n.b(F.max_pool2d(n.a(x), 2)), False),
        (lambda n, x: n.b(n.a(x) + 1), False),
        (lambda n, x: (lambda y: n.b(y) + F.batch_norm(y, torch.zeros(2), torch.ones(2)))(F.relu(n.a(x))), False),
        (lambda n, x: n.b(n.b(n.a(x))), False),
        (lambda n, x: n.b(n.a(n.a(x))), False),
    ],
)
def test_channels_are_scaled_only_where_nobody_else_takes_them(forward, equalised):
    net = spread_out(Taken(forward))
    grids = calibrated(net, MAPS[0], activation_bits=None, equalize=True)
    assert set(grids.divisors) == ({"a:conv2d:0"} if equalised else set())
    outputs, plain = run(net, grids, MAPS[0], Unrounded), net(MAPS[0])
    torch.testing.assert_close(outputs, plain, rtol=1e-4, atol=1e-4)


def test_channels_that_are_dead_on_either_side_are_left_as_they_are():
    net, x = spread_out(EQUALISED["tokens"][0]()), torch.randn(64, 3)
    net[0].weight.data[2] = 0
    net[2].weight.data[:, 5] = 0
    grids = calibrated(net, x, equalize=True)
    [divisors] = grids.divisors.values()
    assert torch.equal(divisors == 1, torch.arange(8).eq(2) | torch.arange(8).eq(5))
    assert ((run(net, grids, x) - net(x)).norm() / net(x).norm()).item() < 0.03


@pytest.mark.parametrize(("channels", "length"), [(8, 4), (4, 8), (4, 4)])
def test_a_linear_layer_over_the_positions_of_maps_takes_other_channels(channels, length):
    net, x = nn.Sequential(nn.Conv1d(1, channels, 1), nn.ReLU(), nn.Linear(length, 3)), torch.randn(5, 1, length)
    spread_out(net)
    grids = calibrated(net, x, equalize=True)
    assert grids.divisors == {}
    assert ((run(net, grids, x) - net(x)).norm() / net(x).norm()).item() < 0.02


def test_a_weight_with_a_given_grid_is_not_scaled_away_from_it():
    net, x = spread_out(EQUALISED["tokens"][0]()), torch.randn(64, 3)
    given = {
        name: WeightGrid(quantization_grid(net.get_parameter(name), 8, axis=0), 8) for name in ("0.weight", "2.weight")
    }
    grids = calibrated(net, x, equalize=True, given=given)
    assert grids.weights["0.weight"] is given["0.weight"]
    scaled = net[2].weight.detach() * grids.factors["2:linear:0"]
    assert torch.equal(grids.weights["2.weight"].step, quantization_grid(scaled, 8, axis=0))
    assert ((run(net, grids, x) - net(x)).norm() / net(x).norm()).item() < 0.03


# --- fingerprints ---


def noticed(net, value, index, change):
    """The names under which the change of one element is seen; it is taken back."""
    before, flat = fingerprints(net), value.detach().view(-1)
    kept = flat[index].clone()
    flat[index] = change(kept)
    after = fingerprints(net)
    flat[index] = kept
    assert fingerprints(net) == before
    assert after.keys() == before.keys()
    return [name for name in before if after[name] != before[name]]


CHANGES = (lambda value: value.nextafter(torch.tensor(9.0)), lambda value: -value - 1e-30, lambda value: value + 1)


def test_any_change_is_noticed():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net.register_buffer("constant", torch.randn(2, 2), persistent=False)
    net.frozen = nn.Parameter(torch.tensor(0.5), requires_grad=False)
    before = fingerprints(net)
    assert set(before) == {*net.state_dict(), "constant"} - {"1.num_batches_tracked"}
    assert fingerprints(copy.deepcopy(net)) == fingerprints(net) == before
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        for index in range(value.numel() if name in before else 0):
            assert [noticed(net, value, index, change) for change in CHANGES] == [[name]] * 3
    net[0].weight.data = net[0].weight.data[:, [2, 1, 0, 3]]  # the same numbers elsewhere
    assert fingerprints(net) != before


def test_complex_numbers_count():
    net = nn.Linear(2, 2).to(torch.complex64)
    before = fingerprints(net)
    assert set(before) == {"weight", "bias"}
    net.weight.data[1, 0] += 1e-3j
    after = fingerprints(net)
    assert after["bias"] == before["bias"]
    assert after["weight"] != before["weight"]
    net.weight.data = net.weight.data.conj()
    assert fingerprints(net)["weight"] not in (before["weight"], after["weight"])


def test_buffers_of_integers_do_not_count():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("seen", torch.zeros(3, dtype=torch.int32))
    net.register_buffer("mask", torch.tensor([True, False]))
    before = fingerprints(net)
    net.seen += 1
    net.mask[0] = False
    net[1].num_batches_tracked += 1
    assert fingerprints(net) == before
    assert set(before) == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}


@pytest.mark.parametrize("value", [-1.0, -2.0, 0.0])
def test_a_change_of_a_weight_of_one_element_is_noticed(value):
    net = nn.Linear(1, 1)
    net.weight.data.fill_(value)
    before = fingerprints(net)
    net.weight.data -= 1
    assert fingerprints(net) != before


def test_fingerprints_depend_on_nothing_but_the_numbers():
    net = nn.Linear(700, 700)
    before, threads = fingerprints(net), torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert fingerprints(net) == before
    finally:
        torch.set_num_threads(threads)
    net.weight.data = net.weight.data.t().contiguous().t()  # in another order in memory
    assert fingerprints(net) == before
    assert fingerprints(torch.compile(net, backend="eager")) == before
    assert fingerprints(net.requires_grad_(False)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_as_the_float32_that_it_equals(dtype):
    net = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20))
    before = fingerprints(net)
    half = copy.deepcopy(net).to(dtype)
    assert fingerprints(half) == fingerprints(copy.deepcopy(half).float())
    assert fingerprints(half)["0.weight"] != before["0.weight"]
    assert fingerprints(half)["1.running_var"] == before["1.running_var"]  # ones, in either
    half[0].weight.data[3, 4] += 1
    assert fingerprints(half) != fingerprints(copy.deepcopy(net).to(dtype))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_change_of_what_a_weight_is_computed_from_is_noticed(norm):
    net = nn.Sequential(norm(nn.Linear(3, 2)))
    before = calibrated(net, torch.randn(4, 3)).fingerprints
    assert len(before) == 3  # magnitudes, directions and the bias, and not the weight that they make
    net.train()(torch.randn(4, 3)).sum().backward()
    assert fingerprints(net) == before
    for name, value in net.named_parameters():
        for index in range(value.numel()):
            assert [noticed(net, value, index, change) for change in CHANGES] == [[name]] * 3


def test_a_change_of_a_tied_weight_is_noticed_once():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.Linear(3, 4))
    net[1].weight = net[2].weight = net[0].weight
    before = fingerprints(net)
    assert set(before) == {"0.weight", "1.bias", "2.bias"}
    for index in range(12):
        assert noticed(net, net[2].weight, index, CHANGES[0]) == ["0.weight"]
    assert fingerprints(copy.deepcopy(net)) == before
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())  # as large, and no longer tied
    assert fingerprints(net) != before


def test_weights_that_are_first_met_after_the_discovery():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) if x.max() > 0 else self.b(x)

    net = Choosing()
    grids = calibrated(net, torch.rand(4, 2), -torch.rand(4, 2))
    assert list(grids.weights) == ["a.weight", "b.weight"]
    assert "b.weight" not in grids.left_in_float
    assert grids.fingerprints == fingerprints(net)


def test_tied_weights_have_one_grid():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    grids = calibrated(net, torch.randn(4, 3))
    assert list(grids.weights) == ["0.weight"]
    assert set(grids.fingerprints) == {"0.weight", "0.bias", "2.bias"}


# --- kept in a file ---


def same_from_a_file(net, grids, x, path):
    """The grids that were read again, which give bit-equal outputs."""
    torch.save(grids.state(), path)
    again = Grids.from_state(torch.load(path, weights_only=True))
    assert torch.equal(run(net, again, x), run(net, grids, x))
    assert not torch.equal(run(net, again, x), net(x))
    assert again.fingerprints == fingerprints(net)
    return again


def test_a_network_runs_the_same_with_grids_from_a_file(tmp_path):
    net = spread_out(EQUALISED["depthwise"][0]())
    x = torch.randn(8, 2, 6, 6)
    grids = calibrated(net, x, weight_bits=4, activation_bits=4, edge_bits=8, equalize=True, correct_bias=True)
    grids.statistics["1"] = torch.zeros(6), torch.ones(6)
    again = same_from_a_file(net, grids, x, tmp_path / "grids")
    assert (len(again.divisors), len(again.factors), len(again.biases), len(again.statistics)) == (2, 2, 3, 1)
    for part in (again.divisors, again.factors, again.biases, again.statistics):  # each of them counts
        kept = dict(part)
        part.clear()
        assert not torch.equal(run(net, again, x), run(net, grids, x))
        part.update(kept)


@pytest.mark.parametrize("settings", [{"activation_bits": None}, {"weight_bits": 3}, {"observer": "entropy"}])
def test_attention_runs_the_same_with_grids_from_a_file(tmp_path, settings):
    """Rows of a weight, and names of calls."""
    net, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval(), torch.randn(3, 5, 8)
    grids = calibrated(net, x, torch.randn(3, 5, 8), **settings)
    again = same_from_a_file(net, grids, x, tmp_path / "grids")
    assert len(again.activations) == (0 if settings.get("activation_bits", 8) is None else 4)


def test_steps_for_whole_weights_run_the_same_from_a_file(tmp_path):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    grids = calibrated(net, x, given={"0.weight": WeightGrid(torch.tensor(0.07), 4)})
    again = same_from_a_file(net, grids, x, tmp_path / "grids")
    assert [grid.step.ndim for grid in again.weights.values()] == [0, 1]


# --- what is left in float ---


class Computing(nn.Module):
    """Computes a weight, and a bias, from parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        x = F.linear(x, self.weight * 2, self.bias)
        return self.last(F.linear(x, self.weight, self.bias * 2))


def test_computed_weights_are_left_in_float_and_computed_biases_are_told():
    net = Computing()
    grids = calibrated(net, torch.randn(4, 3), correct_bias=True)
    assert grids.sites == {
        ":linear:1": WeightSite("weight", 0, 3, COMPUTED, ":linear:0"),
        "last:linear:0": WeightSite("last.weight", 0, 2, None, ":linear:1"),
    }
    assert "linear (1)" in grids.left_in_float
    assert list(grids.biases) == [":linear:1", "last:linear:0"]


def test_the_discovery_rounds_nothing():
    """A network that goes by the size of what it computes goes the same way."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2, bias=False), nn.Linear(2, 2), nn.Linear(2, 2)
            self.a.weight.data.fill_(0.1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if x.sum() > 0 else self.c(x)

    assert list(calibrated(Choosing(), torch.ones(1, 2)).weights) == ["a.weight", "b.weight"]


def test_what_is_left_in_float_is_listed():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(5, 4), nn.LSTM(4, 4, batch_first=True)
            self.linear, self.skipped = nn.Linear(4, 4), nn.Linear(4, 4)
            self.up, self.kernel = nn.ConvTranspose1d(4, 2, 1), nn.Parameter(torch.randn(4, 4))
            self.norm, self.idle = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, tokens):
            x = self.norm(self.linear(self.lstm(self.embedding(tokens))[0])) @ self.kernel
            return self.up(F.gelu(self.skipped(x)).transpose(1, 2)).softmax(1)

    net = Mixed().requires_grad_(False)  # what is frozen is quantised too
    grids = calibrated(net, torch.tensor([[1, 2, 0]]), selected=lambda name: name != "skipped.weight")
    assert list(grids.weights) == ["linear.weight"]
    weights = {name for name in grids.left_in_float if not name.endswith(")")}
    assert weights == {
        "embedding.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "skipped.weight",
        "up.weight",
        "kernel",
        "idle.weight",
    }
    operations = {"conv_transpose1d (1)", "embedding (1)", "gelu (1)", "layer_norm (1)", "linear (1)", "softmax (1)"}
    assert set(grids.left_in_float) - weights >= operations


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_what_a_quantised_weight_is_computed_from_is_not_listed(norm):
    net = nn.Sequential(norm(nn.Linear(3, 2)), nn.ReLU(), norm(nn.Linear(2, 2)))
    grids = calibrated(net, torch.randn(4, 3), selected=lambda name: name == "0.weight")
    assert list(grids.weights) == ["0.weight"]
    left = [name for name in grids.left_in_float if not name.endswith(")")]
    assert left
    assert all(name.startswith("2.") for name in left)


# --- what is refused ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_are_refused_by_name(value):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    net[0].bias.data[1] = value
    if value < 0:
        net[1] = nn.Identity()
    key = "1:relu:0" if value > 0 or value != value else "0:linear:0"
    with pytest.raises(QuantizationError, match=f"the activation '{key}' cannot be calibrated: an activation is "):
        calibrated(net, torch.randn(4, 2))
    with pytest.raises(QuantizationError, match="the activation 'in:0:linear:0' cannot be calibrated"):
        calibrated(net, torch.full((4, 2), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_range", ["max", "mse"])
def test_weights_that_are_no_numbers_are_refused_by_name(value, weight_range):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    net[2].weight.data[0, 1] = value
    with pytest.raises(QuantizationError, match=r"the weight '2\.weight' cannot be quantised: a weight is NaN or inf"):
        calibrated(net, torch.randn(4, 2), weight_range=weight_range)


def test_networks_without_anything_to_quantise_are_refused():
    for net, selected in ((nn.ReLU(), lambda name: True), (nn.Linear(2, 2), lambda name: False)):
        with pytest.raises(QuantizationError, match="no weight would be quantised"):
            calibrated(net, torch.ones(1, 2), selected=selected)


def test_data_that_never_reaches_the_network_is_refused():
    net = nn.Linear(2, 2)
    for steps in (lambda: iter(()), lambda: iter([1, 2])):
        with pytest.raises(QuantizationError, match="no batch reached the network"):
            calibrate(net, steps, Settings())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(1, 2))])
def test_scripted_parts_are_refused_by_name(make):
    part = make(nn.Linear(2, 2))
    with pytest.raises(QuantizationError, match="'1' is scripted"):
        calibrated(nn.Sequential(nn.Linear(2, 2), part), torch.ones(1, 2))
    with pytest.raises(QuantizationError, match=f"'{type(part).__name__}' is scripted"):
        calibrated(part, torch.ones(1, 2))
    deep = nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), part)})
    with pytest.raises(QuantizationError, match=r"'body\.1' is scripted"):
        Calibration(deep, Settings())


# --- auxiliary heads ---


@pytest.mark.slow
@pytest.mark.parametrize("first", ["train", "eval"])
def test_a_network_with_auxiliary_heads(first):
    """Calibrated in one mode and run in the other: each layer gets its own weight, and only the heads are idle."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.googlenet(init_weights=False, num_classes=10).train(first == "train")
    batches = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    grids = calibrated(net, *batches)
    main = {key for key in grids.activations if "aux" not in key}
    assert len(main) == 57 + 9 + 1 + 1  # convolutions with ReLU, concatenations, the input and the mean
    for site, place in grids.sites.items():
        assert place.name == f"{module_of(site)}.weight"
    heads = {name for name in grids.weights if name.startswith("aux")}
    assert (len(heads), len(grids.weights)) == ((6, 64) if first == "train" else (0, 58))
    noted = Noting(net.train(first != "train"), grids)
    with quantizing(net, noted), torch.no_grad():
        net(batches[0])
    assert set(grids.activations) - noted.keys == {key for key in grids.activations if "aux" in key}
    assert noted.keys <= set(grids.activations)
    assert set(grids.weights) - noted.used == heads
    for site, name in noted.names_by_site.items():
        assert name == f"{module_of(site)}.weight"
    net.eval()
    plain = net(batches[0])
    assert ((run(net, grids, batches[0]) - plain).norm() / plain.norm()).item() < (0.5 if first == "train" else 0.2)


class Noting(Rounding):
    """Notes which activations and weights are rounded."""

    def __init__(self, network, grids):
        super().__init__(network, grids)
        self.keys, self.names_by_site = set(), {}

    def activation(self, key, x):
        self.keys.add(key)
        return super().activation(key, x)

    def place(self, site, weight):
        place = super().place(site, weight)
        self.names_by_site[site] = place.name
        return place


class MaskedAgain(nn.Module):
    """Goes on with the weight that its layer computes."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.mask = torch.ones(4, 4).tril()
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(F.linear(x, self.layer.weight * self.mask, self.layer.bias))


class MaskedInside(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.mask = torch.ones(4, 4).tril()

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


@pytest.mark.parametrize(
    "make",
    [MaskedAgain, lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(MaskedInside()), nn.Linear(4, 2))],
)
def test_a_computed_weight_that_is_changed_once_more_stays_in_float(make):
    network, x = make().eval(), torch.randn(8, 4)
    grids = calibrate(network, lambda: (network(x) for _ in range(1)), Settings())
    assert list(grids.weights) == ["last.weight" if isinstance(network, MaskedAgain) else "1.weight"]
    assert any("weight" in name for name in grids.left_in_float)


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_the_older_norms_compute(norm):
    network, x = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    network(x)
    grids = calibrate(network, lambda: (network(x) for _ in range(1)), Settings())
    assert list(grids.weights) == ["0.weight", "2.weight"]
    assert not any("weight" in name and "norm" not in name for name in grids.left_in_float)


def test_a_weight_of_one_dimension_stays_in_float():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.last = nn.Parameter(torch.randn(4)), nn.Linear(1, 2)

        def forward(self, x):
            return self.last(F.linear(x, self.row).unsqueeze(1))

    network, x = Vector().eval(), torch.randn(8, 4)
    grids = calibrate(network, lambda: (network(x) for _ in range(1)), Settings())
    assert list(grids.weights) == ["last.weight"]


def test_what_another_way_has_more_is_added():
    """A head that runs in training only."""

    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Conv2d(1, 2, 3), nn.Linear(2, 3), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            x = F.relu(self.body(x))
            scores = self.head(x.mean(dim=(2, 3)))
            return (scores, self.aux(x)) if self.training else scores

    network, x = WithHead(), torch.randn(4, 1, 5, 5)

    def steps(samples=x):
        return (network(samples) for _ in range(1))

    network.eval()
    calibration = Calibration(network, Settings())
    calibration.discover(steps)
    calibration.observe(steps)
    before = copy.deepcopy(calibration.grids)
    network.train()
    calibration.extend(lambda: steps(100 * x))
    assert set(calibration.grids.weights) - set(before.weights) == {"aux.weight"}
    assert set(calibration.grids.activations) - set(before.activations) == {"aux:conv2d:0"}
    assert {key: calibration.grids.activations[key] for key in before.activations} == before.activations
    assert calibration.grids.left_in_float == ()
    again = copy.deepcopy(calibration.grids)
    network.eval()
    calibration.extend(lambda: steps(1000 * x))
    assert calibration.grids.activations == again.activations

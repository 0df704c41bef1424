"""Grids that move, against independent computations: where they begin, what they see, and what their steps learn."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.mechanisms.calibration import Settings, calibrate
from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.moving_grids import FollowingGrids, LearnedGrids, MovingGrids, clipped_share
from lightning_compress.mechanisms.quantization import quantizing
from lightning_compress.mechanisms.rounding import Rounding

X = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(3))
INPUT, HIDDEN = "in:0:conv2d:0", "1:relu:0"


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def grids_of(net, x=X, **settings):
    settings = {"weight_bits": 4, "activation_bits": 4, **settings}
    with torch.no_grad():
        return calibrate(net, lambda: (net(x) for _ in range(2)), Settings(**settings))


def on(x, step, lowest, highest):
    """The nearest points of a grid, with the gradient of nothing."""
    return torch.clamp(torch.round(x / step), lowest, highest) * step


def outputs(net, scales, steps, x=X, bits=4, zero_points=(0, 0), points=on):
    """The small network by hand, on steps for its two activations and its two weights."""
    (first, second), (one, two), highest = scales, steps, 2 ** (bits - 1) - 1
    low, last = zero_points, 2**bits - 1
    x = points(x, first, -low[0], last - low[0])
    weight = points(net[0].weight, one.reshape(-1, 1, 1, 1), -highest, highest)
    maps = points(F.relu(F.conv2d(x, weight, net[0].bias, padding=1)), second, -low[1], last - low[1])
    return F.linear(maps.flatten(1), points(net[3].weight, two.reshape(-1, 1), -highest, highest), net[3].bias)


def parts(grids):
    """Scales, zero points and steps, in the order of the layers."""
    first, second = (grids.activations[key] for key in (INPUT, HIDDEN))
    steps = tuple(grids.weights[name].step for name in ("0.weight", "3.weight"))
    return (first.scale, second.scale), (first.zero_point, second.zero_point), steps


def run(net, rounding, x=X):
    with quantizing(net, rounding) as calls:
        output = net(x)
    assert calls.count == 1
    return output


def state(grids):
    """Everything in it, so that it can be compared."""
    return (
        dict(grids.activations),
        {name: (grid.step.tolist(), grid.bits) for name, grid in grids.weights.items()},
        dict(grids.sites),
    )


# Grids that stay


def test_the_base_rounds_as_it_was_told_and_notes_what_it_met():
    net = network()
    grids = grids_of(net)
    met = set()

    class Noting(MovingGrids):
        def activation(self, key, x):
            met.add(key)
            return super().activation(key, x)

    before, moving = state(grids), Noting(net, grids)
    assert moving.used == set()
    scales, zeros, steps = parts(grids)
    torch.testing.assert_close(run(net, moving), outputs(net, scales, steps, zero_points=zeros), rtol=0, atol=1e-6)
    assert met == {INPUT, HIDDEN}
    assert moving.used == {"0.weight", "3.weight"}
    assert state(moving.current()) == before
    moving.grids.activations.clear()
    moving.grids.weights.clear()
    assert state(grids) == before  # those that were given are not touched


# Grids that follow


def following(net, grids, *, watching=lambda: True):
    return FollowingGrids(net, grids, watching=watching)


def affine(low, high, bits=4):
    """Scale and zero point of the grid over a range, in NumPy."""
    scale = float(np.float32((high - low) / (2**bits - 1)))
    return scale, int(np.clip(np.round(-low / scale), 0, 2**bits - 1))


def test_averages_begin_with_the_ends_of_the_grids():
    net = network()
    grids = grids_of(net)
    ranges = following(net, grids).ranges
    for key, grid in grids.activations.items():
        low, high = ranges[key]
        assert low == -grid.zero_point * grid.scale <= 0
        assert high == (15 - grid.zero_point) * grid.scale
        assert affine(low, high) == (pytest.approx(grid.scale, rel=1e-6), grid.zero_point)
    assert ranges[HIDDEN][0] == 0.0


def test_averages_take_in_what_was_reached_in_a_step():
    """Of all calls since the last one, the extremes; a tenth of the way, with 0 in every range."""
    net = network()
    grids = grids_of(net)
    rounding = following(net, grids)
    ranges = dict(rounding.ranges)
    inputs = (3 * X, 2 * X.abs(), X[:1])
    for x in inputs:
        run(net, rounding, x)
    assert state(rounding.current())[0] == state(grids)[0]  # not before the step
    rounding.finish_step()
    seen = torch.cat([x.flatten() for x in inputs]).double()
    low, high = ranges[INPUT]
    expected = 0.9 * low + 0.1 * float(seen.min()), 0.9 * high + 0.1 * float(seen.max())
    assert rounding.ranges[INPUT] == pytest.approx(expected, rel=1e-12)
    assert rounding.grids.activations[INPUT] == ActivationGrid(*affine(*expected), 4)
    assert rounding.ranges[HIDDEN][0] == 0.0
    run(net, rounding, 2 * X.abs() + 5)  # nothing below 0, so that end moves towards 0
    rounding.finish_step()
    assert rounding.ranges[INPUT] == pytest.approx(
        (0.9 * expected[0], 0.9 * expected[1] + 0.1 * float(2 * X.abs().max() + 5))
    )
    low, high = rounding.ranges[INPUT]
    run(net, rounding, -2 * X.abs() - 5)  # nothing above it
    rounding.finish_step()
    expected = 0.9 * low - 0.1 * float(2 * X.abs().max() + 5), 0.9 * high
    assert rounding.ranges[INPUT] == pytest.approx(expected)
    found = state(rounding.current())[0]
    rounding.finish_step()  # nothing was seen
    assert state(rounding.current())[0] == found


def test_the_network_is_rounded_to_what_the_averages_have_become():
    net = network()
    rounding = following(net, grids_of(net))
    for scale in (4.0, 3.0):
        run(net, rounding, scale * X)
        rounding.finish_step()
    (low, high), (_, most) = rounding.ranges[INPUT], rounding.ranges[HIDDEN]
    (first, zero), (second, none) = affine(low, high), affine(0.0, most)
    steps = [layer.weight.detach().flatten(1).abs().amax(1) / 7 for layer in (net[0], net[3])]
    expected = outputs(net, (first, second), steps, zero_points=(zero, none))
    torch.testing.assert_close(run(net, rounding), expected, rtol=0, atol=1e-6)


def test_what_is_not_watched_does_not_count():
    net, watched = network(), [False]
    rounding = following(net, grids_of(net), watching=lambda: watched[0])
    before = dict(rounding.ranges)
    run(net, rounding, 9 * X)
    rounding.finish_step()
    assert rounding.ranges == before
    watched[0] = True
    run(net, rounding, X[:0])  # nor what is not there
    rounding.finish_step()
    assert rounding.ranges == before
    run(net, rounding, 9 * X)
    rounding.finish_step()
    assert rounding.ranges != before


def test_all_processes_take_in_the_largest():
    """One call for all activations: what was reached below 0, and above."""
    net, given = network(), []
    rounding = following(net, grids_of(net))
    ranges = dict(rounding.ranges)
    with quantizing(net, rounding), torch.no_grad():
        net(X)
        maps = F.relu(F.conv2d(X, net[0].weight, net[0].bias, padding=1))

    def largest(reached):
        given.append(reached)
        return reached + torch.tensor([[0.0, 3.0], [1.0, 2.0]])

    rounding.finish_step(largest)
    [reached] = given
    assert list(ranges) == [INPUT, HIDDEN]
    assert reached.shape == (2, 2)
    assert reached[0].tolist() == [-float(X.min()), float(X.max())]
    assert reached[1, 0] == 0.0
    assert float(reached[1, 1]) == pytest.approx(float(maps.max()), abs=0.3)
    (low, high), (_, most) = ranges[INPUT], ranges[HIDDEN]
    assert rounding.ranges[INPUT] == (
        pytest.approx(0.9 * low + 0.1 * float(X.min())),
        pytest.approx(0.9 * high + 0.1 * (float(X.max()) + 3.0)),
    )
    assert rounding.ranges[HIDDEN] == (
        pytest.approx(-0.1),
        pytest.approx(0.9 * most + 0.1 * (float(reached[1, 1]) + 2.0)),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_activation_without_a_range(value):
    net = network()
    rounding = following(net, grids_of(net))
    x = X.clone()
    x[1, 0, 2, 2] = value
    run(net, rounding, x)
    before, grids = dict(rounding.ranges), dict(rounding.grids.activations)
    lost = rounding.finish_step()
    assert INPUT in lost
    assert all(rounding.ranges[key] == before[key] for key in lost)
    assert all(rounding.grids.activations[key] == grids[key] for key in lost)
    run(net, rounding)
    assert rounding.finish_step() == []
    assert rounding.ranges[INPUT] != before[INPUT]


def test_weights_have_the_grid_of_what_they_are_now():
    """Also a weight of zeros, and one grid for a whole weight."""
    net = network()
    grids = grids_of(net)
    grids.weights["3.weight"] = WeightGrid(torch.tensor(0.5), 4)
    rounding = following(net, grids)
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.0, 7.0]).reshape(2, 1, 1, 1))
        net[3].weight.mul_(3.0)
    steps = torch.stack([torch.tensor(1.0), net[0].weight[1].abs().max() / 7]).detach(), net[3].weight.abs().max() / 7
    scales, zeros, _ = parts(grids)
    expected = outputs(net, scales, steps, zero_points=zeros)
    torch.testing.assert_close(run(net, rounding), expected, rtol=0, atol=1e-5)
    found = rounding.current().weights
    assert torch.equal(found["0.weight"].step, steps[0])
    assert torch.equal(found["3.weight"].step, steps[1].detach())
    assert found["3.weight"].step.ndim == 0
    assert [grid.bits for grid in found.values()] == [4, 4]
    assert torch.equal(grids.weights["3.weight"].step, torch.tensor(0.5))


def test_rows_of_a_weight_follow_the_whole_of_it():
    """Where one weight has one grid, an operation that takes some of its rows is on the grid of them all."""
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    grids = calibrate(net, lambda: (net(x, x, x) for _ in range(1)), Settings(weight_bits=4, activation_bits=None))
    assert {(site.start, site.stop) for site in grids.sites.values() if site.name == "in_proj_weight"} == {(0, 12)}
    whole, rows = WeightGrid(torch.tensor(9.0), 4), WeightGrid(torch.full((12,), 9.0), 4)
    for grid in (whole, rows):
        grids.weights["in_proj_weight"] = grid
        with torch.no_grad():
            net.in_proj_weight[8:].mul_(3.0)
        rounding = following(net, grids)
        own = net.in_proj_weight.detach()
        expected = own.abs().max() / 7 if grid is whole else own.abs().amax(1) / 7
        assert torch.equal(rounding.current().weights["in_proj_weight"].step, expected)
        for start, stop in ((0, 4), (4, 12)):
            part = net.in_proj_weight[start:stop]
            site = next(key for key, place in grids.sites.items() if place.name == "in_proj_weight")
            found = rounding.grid(site, WeightSite("in_proj_weight", start, stop), part)
            assert torch.equal(found.step, expected if grid is whole else expected[start:stop])


def test_gradients_of_weights_that_are_followed_go_straight_through():
    """Nothing is clipped, and the step, though it is made of the weight, has no gradient."""
    net = network()
    rounding = following(net, grids_of(net))
    other = copy.deepcopy(net)
    run(net, rounding).square().sum().backward()
    for name in ("0.weight", "3.weight"):
        weight = other.get_parameter(name)
        with torch.no_grad():
            weight.copy_(on(weight, rounding.current().weights[name].step.reshape(-1, *[1] * (weight.ndim - 1)), -7, 7))
    scales, zeros, _ = parts(rounding.grids)

    def straight(x, scale, lowest, highest):
        inside = ((x / scale).round() >= lowest) & ((x / scale).round() <= highest)
        y = x * inside
        return on(x, scale, lowest, highest).detach() + (y - y.detach())

    x = straight(X, scales[0], -zeros[0], 15 - zeros[0])
    maps = straight(F.relu(other[0](x)), scales[1], -zeros[1], 15 - zeros[1])
    other[3](maps.flatten(1)).square().sum().backward()
    for own, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_frozen_grids_stay():
    net = network()
    rounding = following(net, grids_of(net))
    run(net, rounding, 5 * X)
    rounding.finish_step()
    with torch.no_grad():
        net[3].weight.mul_(0.5)
    now = state(rounding.current())
    run(net, rounding, 7 * X)  # of a step that is not finished
    assert not rounding.frozen
    rounding.freeze()
    assert rounding.frozen
    with torch.no_grad():
        net[0].weight.mul_(3.0)
    run(net, rounding, 9 * X)
    rounding.finish_step()
    assert state(rounding.current()) == now
    scales, zeros, steps = parts(rounding.current())
    assert steps[1].tolist() == (net[3].weight.detach().abs().amax(1) / 7).tolist()
    expected = outputs(net, scales, steps, zero_points=zeros)
    torch.testing.assert_close(run(net, rounding), expected, rtol=0, atol=1e-5)


def test_what_is_current_does_not_move_on():
    net = network()
    rounding = following(net, grids_of(net))
    kept = rounding.current()
    before = state(kept)
    run(net, rounding, 5 * X)
    rounding.finish_step()
    with torch.no_grad():
        net[3].weight.mul_(2.0)
    assert state(kept) == before
    assert state(rounding.current()) != before


def test_a_weight_without_a_grid_is_left_alone():
    net = network()
    grids = grids_of(net)
    del grids.weights["3.weight"]
    rounding = following(net, grids)
    assert rounding.grid("3:linear:0", WeightSite("3.weight", 0, 3), net[3].weight) is None
    assert list(rounding.current().weights) == ["0.weight"]
    grid = grids.activations[INPUT]
    weight = on(net[0].weight, (net[0].weight.flatten(1).abs().amax(1) / 7).reshape(-1, 1, 1, 1), -7, 7)
    maps = F.conv2d(on(X, grid.scale, -grid.zero_point, 15 - grid.zero_point), weight, net[0].bias, padding=1)
    maps = on(F.relu(maps), grids.activations[HIDDEN].scale, 0, 15)
    torch.testing.assert_close(run(net, rounding), net[3](maps.flatten(1)), rtol=0, atol=1e-6)


# Steps that learn


def learned(net, grids, values=None):
    count = LearnedGrids.count(grids)
    factors = nn.Parameter(torch.ones(count) if values is None else torch.as_tensor(values))
    return LearnedGrids(net, grids, factors=factors), factors


def test_how_many_factors_there_are():
    grids = Grids(
        weights={"a": WeightGrid(torch.ones(5), 4), "b": WeightGrid(torch.tensor(1.0), 4)},
        activations={"c": ActivationGrid(0.1, 0, 4), "d": ActivationGrid(0.1, 0, 4)},
    )
    assert LearnedGrids.count(grids) == 2 + 5 + 1
    assert LearnedGrids.count(Grids()) == 0
    assert LearnedGrids.count(grids_of(network())) == 2 + 2 + 3


FACTORS = [0.5, 2.0, 0.8, 1.0, 1.25, 0.9, 1.1]  # of two activations, and of the two and three rows of two weights


def by_hand(grids, factors):
    scales, zeros, (one, two) = parts(grids)
    order = list(grids.activations)
    assert order == [INPUT, HIDDEN]
    return (scales[0] * factors[0], scales[1] * factors[1]), zeros, (one * factors[2:4], two * factors[4:])


@pytest.mark.parametrize("values", [[1.0] * 7, FACTORS])
def test_learned_steps_are_factors_of_where_they_began(values):
    net = network()
    grids = grids_of(net)
    before, (rounding, _) = state(grids), learned(net, grids, values)
    scales, zeros, steps = by_hand(grids, torch.tensor(values))
    expected = outputs(net, scales, steps, zero_points=zeros)
    torch.testing.assert_close(run(net, rounding), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(net, rounding), expected, rtol=0, atol=1e-5)
    now = rounding.current()
    for name, step in zip(("0.weight", "3.weight"), steps, strict=True):
        assert torch.equal(now.weights[name].step, step)
    for key, scale, zero in zip((INPUT, HIDDEN), scales, zeros, strict=True):
        assert now.activations[key] == ActivationGrid(scale.item(), zero, 4)
    assert state(grids) == before
    fixed = Rounding(net, now)
    fixed.evaluating = False
    plain = run(net, fixed)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_learned_steps(bits):
    """That of the paper, by autograd: of each factor, each weight and the input.

    At the ends of a grid it is that of outside, as hardtanh has it; clamp has had it only since torch 2.14.
    """
    net = network()
    grids = grids_of(net, weight_bits=bits, activation_bits=bits)
    rounding, factors = learned(net, grids, FACTORS)
    x, other = X.clone().requires_grad_(), copy.deepcopy(net)
    run(net, rounding, x).square().sum().backward()

    theirs, y, highest = torch.tensor(FACTORS, requires_grad=True), X.clone().requires_grad_(), 2 ** (bits - 1) - 1
    scales, zeros, (one, two) = by_hand(grids, theirs)
    last = 2**bits - 1

    def activation(value, scale, zero):
        scaled = 1 / math.sqrt(value.numel() * last)  # of one sample after another: all that share the step
        scale = scale * scaled + (scale - scale * scaled).detach()
        ratio = F.hardtanh(value / scale, -zero, last - zero)
        return (ratio + (ratio.round() - ratio).detach()) * scale

    def weight(value, step):
        scaled = 1 / math.sqrt(value[0].numel() * highest)
        step = (step * scaled + (step - step * scaled).detach()).reshape(-1, *[1] * (value.ndim - 1))
        ratio = F.hardtanh(value / step, -highest, highest)
        return (ratio + (ratio.round() - ratio).detach()) * step

    maps = F.conv2d(activation(y, scales[0], zeros[0]), weight(other[0].weight, one), other[0].bias, padding=1)
    maps = activation(F.relu(maps), scales[1], zeros[1])
    F.linear(maps.flatten(1), weight(other[3].weight, two), other[3].bias).square().sum().backward()
    assert bool((theirs.grad != 0).all())
    torch.testing.assert_close(factors.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    for own, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_step_worked_by_hand():
    """One weight of one step: 0.9, 0.2 and -3 on steps of 0.5 with 2 bits are 1, 0 and -1 of them."""
    net = nn.Linear(3, 1, bias=False)
    net.weight.data = torch.tensor([[0.9, 0.2, -3.0]])
    grids = Grids(
        weights={"weight": WeightGrid(torch.tensor([0.25]), 2)},
        sites={":linear:0": WeightSite("weight", 0, 1)},
        integer_activations=False,
    )
    rounding, factors = learned(net, grids, [2.0])
    output = run(net, rounding, torch.tensor([[1.0, 10.0, 100.0]]))
    assert output.tolist() == [[0.5 - 50.0]]
    output.backward()
    # 0.9 and -3 lie beyond the ends, whose gradients are 1 and -1; 0.2 gives round(0.4) - 0.4
    slope = 1.0 * 1 + 10.0 * (0 - 0.4) + 100.0 * -1
    assert factors.grad.tolist() == pytest.approx([0.25 * slope / math.sqrt(3 * 1)])
    assert net.weight.grad.tolist() == [[0.0, 10.0, 0.0]]


def test_nothing_learns_without_gradients():
    net = network()
    rounding, factors = learned(net, grids_of(net))
    with torch.no_grad():
        assert not run(net, rounding).requires_grad
    with torch.inference_mode():
        assert run(net, rounding).is_inference()
    assert factors.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_keep_theirs(dtype):
    net = network()
    grids = grids_of(net)
    net.to(dtype)
    rounding, factors = learned(net, grids)
    output = run(net, rounding, X.to(dtype))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert factors.grad.dtype == torch.float32
    assert bool(factors.grad.isfinite().all())
    assert float(factors.grad.abs().max()) > 0


def test_steps_stay_positive():
    net = network()
    rounding, factors = learned(net, grids_of(net), [-1.0, 0.0, 0.01, 0.05, 0.06, 1.0, 3.0])
    rounding.clamp_()
    assert factors.tolist() == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.06, 1.0, 3.0])
    assert factors.requires_grad
    assert all(grid.scale > 0 for grid in rounding.current().activations.values())


def test_how_far_they_have_moved():
    net = network()
    rounding, _ = learned(net, grids_of(net), FACTORS)
    assert rounding.quantities()["step_change"] == pytest.approx((0.5 + 1.0 + 0.2 + 0.0 + 0.25 + 0.1 + 0.1) / 7)
    assert learned(net, Grids())[0].quantities() == {"step_change": 0.0}
    assert learned(net, grids_of(net))[0].quantities() == {"step_change": 0.0}


def test_the_share_of_what_is_clipped():
    grids = Grids(
        weights={
            "a": WeightGrid(torch.tensor([0.1, 1.0]), 4),
            "b": WeightGrid(torch.tensor(0.5), 2),
            "unused": WeightGrid(torch.tensor(0.5), 2),
        }
    )
    generator = np.random.default_rng(0)
    weights = {
        "a": generator.normal(size=(2, 3, 5)).astype(np.float32),
        "b": generator.normal(size=(7, 3)).astype(np.float32),
    }
    beyond = [
        np.abs(weights["a"][0]) > 0.75,
        np.abs(weights["a"][1]) > 7.5,
        np.abs(weights["b"]) > 0.75,
    ]
    share = sum(int(part.sum()) for part in beyond) / 51
    assert 0.1 < share < 0.9
    found = {name: torch.from_numpy(value).requires_grad_() for name, value in weights.items()}
    assert clipped_share(grids, found) == pytest.approx(share)
    assert clipped_share(grids, {}) == 0.0
    assert clipped_share(grids, {"b": torch.tensor([[0.75, -0.75], [0.7, 0.0]])}) == 0.0
    assert clipped_share(grids, {"b": torch.tensor([[0.76, -0.76], [5.0, -5.0]])}) == 1.0


def test_a_way_that_only_another_process_took():
    net = network()
    rounding = following(net, grids_of(net))
    low, high = rounding.ranges[HIDDEN]
    rounding.finish_step(lambda reached: torch.tensor([[-torch.inf, -torch.inf], [0.0, 5.0]]))
    assert rounding.ranges[HIDDEN] == (pytest.approx(0.9 * low), pytest.approx(0.9 * high + 0.5))

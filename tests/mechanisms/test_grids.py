"""Grids as plain data: their limits and parts, and what comes back from a file."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.mechanisms.grids import ActivationGrid, Grids, WeightGrid, WeightSite


@pytest.mark.parametrize("bits", range(2, 9))
def test_limits(bits):
    """Weights have as many integers below zero as above, activations none below."""
    assert WeightGrid(torch.tensor(0.1), bits).limits == (-(2**bits - 2) // 2, (2**bits - 2) // 2)
    assert ActivationGrid(0.1, 0, bits).limits == (0, 2**bits - 1)


def test_rows():
    one_each, one_for_all = WeightGrid(torch.tensor([0.1, 0.2, 0.3, 0.4]), 4), WeightGrid(torch.tensor(0.1), 4)
    assert (one_each.axis, one_for_all.axis) == (0, None)
    part = one_each.rows(1, 3)
    assert (part.step.tolist(), part.bits, part.axis) == (one_each.step[1:3].tolist(), 4, 0)
    assert one_for_all.rows(1, 3) is one_for_all


def full():
    return Grids(
        network="model.net",
        weights={"a.weight": WeightGrid(torch.rand(3), 4), "b": WeightGrid(torch.tensor(0.25), 8)},
        activations={"in:a:conv2d:0": ActivationGrid(torch.tensor(0.1).item(), 3, 8)},
        sites={
            "a:conv2d:0": WeightSite("a.weight", 0, 3, "a.bias", "in:a:conv2d:0"),
            ":linear:0": WeightSite("b", 2, 5),
        },
        folds={"a:conv2d:0": "norm"},
        biases={":linear:0": torch.randn(3)},
        statistics={"norm": (torch.randn(3), torch.rand(3))},
        divisors={"a:conv2d:0": torch.rand(3)},
        factors={":linear:0": torch.rand(3)},
        fingerprints={"a.weight": 12345, "b": 6},
        left_in_float=("lstm.weight_ih_l0", "gelu (2)"),
        integer_activations=False,
        shared=frozenset({"b:conv2d:0", "a:conv2d:0"}),
    )


def flat(value):
    """Nested containers as a list of numbers and strings, with their types."""
    if isinstance(value, dict):
        return [entry for key, child in value.items() for entry in (key, *flat(child))]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(entry for child in value for entry in flat(child))]
    return [value.dtype, value.tolist()] if isinstance(value, torch.Tensor) else [value]


@pytest.mark.parametrize("make", [full, Grids])
def test_what_comes_back_from_a_file_is_the_same(make, tmp_path):
    grids = make()
    torch.save(grids.state(), tmp_path / "grids")
    again = Grids.from_state(torch.load(tmp_path / "grids", weights_only=True))
    assert flat(again.state()) == flat(grids.state())
    assert {name: type(value) for name, value in vars(again).items()} == {
        name: type(value) for name, value in vars(grids).items()
    }
    same = (
        "activations",
        "sites",
        "folds",
        "fingerprints",
        "left_in_float",
        "network",
        "integer_activations",
        "shared",
    )
    for name in same:
        assert getattr(again, name) == getattr(grids, name)
    for name, grid in grids.weights.items():
        assert again.weights[name].bits == grid.bits
        assert torch.equal(again.weights[name].step, grid.step)


def test_the_state_holds_tensors_and_primitives_only():
    allowed = (bool, int, float, str, type(None), torch.dtype, list)
    state = full().state()
    assert all(isinstance(entry, allowed) for entry in flat(state))
    assert "tuple" not in flat(state)


def test_a_state_is_no_part_of_the_grids():
    grids = full()
    state = grids.state()
    state["folds"].clear()
    state["activations"].clear()
    assert (len(grids.folds), len(grids.activations)) == (1, 1)

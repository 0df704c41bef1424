"""Saved optimizers: what is damaged in the state of helpers is found, and what a training leaves is not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.owned import OwnedParameters
from lightning_compress.mechanisms.saved_optimizers import flaw_of_owned


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1, eps=1e-12)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def saved(make=adam, *, steps=2):
    owned = OwnedParameters(lambda: nn.Linear(3, 2), make)
    for _ in range(steps):
        owned.get()(torch.ones(1, 3)).sum().backward()
        owned.step(lr=0.05)
    owned.get()
    return copy.deepcopy(owned.state_dict())


@pytest.mark.parametrize("make", [adam, sgd])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_training_leaves_is_sound(make, steps):
    state = saved(make, steps=steps)
    assert flaw_of_owned(state, "own", make) is None
    assert flaw_of_owned(state, "own") is None
    assert flaw_of_owned({**state, "optimizer": None}, "own", make) is None
    for group in state["optimizer"]["param_groups"]:  # as torch saved it once
        for key in ("maximize", "foreach", "fused", "differentiable"):
            del group[key]
    assert flaw_of_owned(state, "own", make) is None


def test_of_an_unknown_optimizer_numbers_count():
    state = saved(sgd)
    state["optimizer"]["state"] = {"bound": torch.tensor(math.inf), 0: {"best": math.inf, "root": torch.ones(2) * 1j}}
    assert flaw_of_owned(state, "own") is None
    state["optimizer"]["state"][0]["best"] = math.nan
    assert flaw_of_owned(state, "own") == "'own.optimizer.state.0.best' must be finite, got nan"


NAN, FULL = torch.full((2, 3), math.nan), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("steps",), -1, "'own.steps' must be at least 0, got -1"),
        (("steps",), ..., "'own.steps' is missing"),
        (("module", "weight"), NAN, "'own.module.weight' must be finite"),
        (("optimizer", "state", 0, "exp_avg"), NAN, "'own.optimizer.state.0.exp_avg' must be finite"),
        (("optimizer", "state", 0, "exp_avg"), FULL / 0, "'own.optimizer.state.0.exp_avg' must be finite"),
        (("optimizer", "state", 0, "exp_avg"), FULL[0], r"state.0.exp_avg' must be of shape \(2, 3\)"),
        (("optimizer", "state", 0, "exp_avg"), "zz", r"state.0.exp_avg' must be of shape \(2, 3\), got 'zz'"),
        (("optimizer", "state", 0, "exp_avg"), ..., r"state.0' must hold \['exp_avg', 'exp_avg_sq', 'step'\]"),
        (("optimizer", "state", 0, "exp_avg_sq"), -FULL, "exp_avg_sq' must be finite and at least 0"),
        (("optimizer", "state", 0, "step"), torch.tensor(-1.0), "step' must be finite and at least 0"),
        (("optimizer", "state", 0, "step"), math.nan, "step' must be finite and at least 0, got nan"),
        (("optimizer", "state", 0, "step"), torch.ones(7), r"step' must be of shape \(\)"),
        (("optimizer", "state", 0), {}, "state.0' must hold"),
        (("optimizer", "state", 7), {}, r"optimizer.state' must be of \[0, 1\], got 7"),
        (("optimizer", "param_groups"), [], "param_groups' must have 1 entries, got 0"),
        (("optimizer", "param_groups", 0, "params"), [0], r"param_groups.0.params' must be \[0, 1\], got \[0\]"),
        (("optimizer", "param_groups", 0, "params"), ..., "params' is missing"),
        (("optimizer", "param_groups", 0, "amsgrad"), True, "amsgrad' must be False, got True"),
        (("optimizer", "param_groups", 0, "capturable"), True, "capturable' must be False, got True"),
        (("optimizer", "param_groups", 0, "betas"), (0.9, math.nan), r"betas' must be \(0.9, 0.999\)"),
        (("optimizer", "param_groups", 0, "betas"), ..., "betas' is missing"),
        (("optimizer", "param_groups", 0, "lr"), -0.1, "lr' must be finite and at least 0, got -0.1"),
    ],
)
def test_what_is_damaged_is_named(path, value, expected):
    state = saved()
    part = state
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    found = flaw_of_owned(state, "own", adam)
    assert found is not None
    with pytest.raises(ValueError, match=expected):
        raise ValueError(found)

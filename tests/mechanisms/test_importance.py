"""Taylor scores: means over steps against NumPy, what begins anew, what counts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.importance import TaylorScores

SHAPES = {"a": (3, 2), "b": (4,)}


def weights():
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def step(scores, parameters, chosen="ab"):
    """One step with random gradients; gives the scores by hand."""
    by_hand = {}
    for name, weight in parameters.items():
        weight.grad = torch.randn_like(weight) if name in chosen else None
        if weight.grad is not None:
            by_hand[name] = np.abs(weight.detach().numpy() * weight.grad.numpy())
    scores.add(parameters.values())
    return by_hand


def close(taken, expected):
    return all(np.allclose(own.numpy(), other, rtol=1e-6) for own, other in zip(taken, expected, strict=True))


def test_means_since_the_last_time():
    parameters = weights()
    scores = TaylorScores(parameters)
    assert scores.take() is None
    for count in (3, 1, 2):
        steps = [step(scores, parameters) for _ in range(count)]
        assert close(scores.take(), [np.mean([own[name] for own in steps], axis=0) for name in "ab"])


def test_a_weight_without_a_gradient_keeps_its_mean():
    parameters = weights()
    scores = TaylorScores(parameters)
    first = [step(scores, parameters), step(scores, parameters, "a")]
    expected = [(first[0]["a"] + first[1]["a"]) / 2, first[0]["b"]]
    assert close(scores.take(), expected)
    later = step(scores, parameters, "a")
    assert close(scores.take(), [later["a"], expected[1]])


def test_what_never_had_a_gradient_is_refused():
    parameters = weights()
    scores = TaylorScores(parameters)
    step(scores, parameters, "a")
    with pytest.raises(RuntimeError, match=r"score='taylor' needs a gradient of each weight .* had none: 'b'; leave"):
        scores.take()
    first = step(scores, parameters, "b")
    assert close(scores.take()[1:], [first["b"]])


def test_only_what_steps_counts():
    parameters = weights()
    scores = TaylorScores(parameters)
    both = step(scores, parameters)
    scores.add([parameters["a"]])
    assert close(scores.take(), [both["a"], both["b"]])
    step(scores, parameters)
    foreign = TaylorScores(parameters)
    foreign.add([nn.Parameter(torch.ones(2))])
    assert foreign.take() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_a_scaler_skips_does_not_count(value):
    parameters = weights()
    scores = TaylorScores(parameters)
    good = step(scores, parameters)
    parameters["a"].grad = torch.ones(SHAPES["a"])
    parameters["b"].grad = torch.full(SHAPES["b"], value)
    scores.add(parameters.values())
    assert close(scores.take(), [good["a"], good["b"]])
    scores.add(parameters.values())
    assert scores.take() is None  # of nothing that has counted since
    later = step(scores, parameters)
    assert close(scores.take(), [later["a"], later["b"]])


@pytest.mark.parametrize("taken", [True, False])
def test_the_state_goes_on(taken, tmp_path):
    parameters = weights()
    scores = TaylorScores(parameters)
    step(scores, parameters)
    if taken:
        scores.take()
    torch.save(scores.state(), tmp_path / "state")
    again = TaylorScores(parameters)
    again.load(torch.load(tmp_path / "state", weights_only=True))
    step(scores, parameters, "a")
    again.add(parameters.values())
    for own, other in zip(again.take(), scores.take(), strict=True):
        assert torch.equal(own, other)


def test_half_precision_is_summed_in_float32():
    weight = nn.Parameter(torch.full((2,), 0.01, dtype=torch.float16))
    scores = TaylorScores({"a": weight})
    weight.grad = torch.full((2,), 1e-6, dtype=torch.float16)
    scores.add([weight])
    (mean,) = scores.take()
    assert mean.dtype == torch.float32
    assert np.allclose(mean.numpy(), 1e-8, rtol=0.1)

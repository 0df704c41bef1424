"""Every argument of ``evaluate``, with whatever anybody may give: of use, or refused by name with nothing changed."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from odd import Unwilling, anything, check_refusal, for_values

from lightning_compress.export import evaluate, to_onnx

from . import networks
from .networks import FEATURES, NAMESPACES


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A module, a Trainer that has fitted it, and a file of its network."""
    torch.manual_seed(0)
    module, trainer = networks.lightning_module(NAMESPACES[0], "child"), networks.trainer(NAMESPACES[0])
    trainer.fit(module, networks.loader(), networks.loader(batch_size=7))
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    to_onnx(module, path, torch.randn(4, FEATURES), network="model")
    return path, module, trainer


ARGUMENTS = ["path", "module", "trainer_or_dataloaders", "network", "seen"]


def is_accepted(argument: str, value: Any, exported: Any) -> bool:
    path, module, trainer = exported
    accepted = {"path": [path, str(path)], "module": [module], "network": [None, "model"]}
    if argument in accepted:
        return any(type(value) is type(own) and value == own for own in accepted[argument])
    if argument == "seen":
        return value is None or callable(value)
    return value is trainer or gives_batches(value)


def gives_batches(value: Any) -> bool:
    """A loader, or something else that is gone through; collections of some, which are not empty."""
    if isinstance(value, (list, tuple, dict)):
        inside = list(value.values() if isinstance(value, dict) else value)
        return bool(inside) and all(map(gives_batches, inside))
    unfit = isinstance(value, (str, bytes, bytearray, torch.Tensor, np.ndarray, np.generic))
    return not unfit and hasattr(type(value), "__iter__")


def outcome(arguments: dict[str, Any]) -> tuple[dict[str, float] | None, Exception | None]:
    """The metrics, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return evaluate(**arguments), None
        except Exception as error:
            return None, error


@pytest.mark.slow
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_is_accepted_or_refused_by_name(argument, exported, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, module, trainer = exported
    good = {"path": path, "module": module, "trainer_or_dataloaders": trainer, "network": None, "seen": None}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = evaluate(**good)

    @for_values(value=st.one_of(anything, st.sampled_from([path, str(path), module, trainer, networks.loader()])))
    def holds(value):
        accepted = not isinstance(value, Unwilling) and is_accepted(argument, value, exported)
        found, error = outcome({**good, argument: value})
        if error is None:
            assert accepted, f"accepted, and should be refused: {value!r}"
            assert argument == "trainer_or_dataloaders" or found == expected
        elif argument == "network" and value == "":  # a module, and not the one that the validation calls
            assert str(error).startswith("Classifier.validation_step never called 'self'")
        elif argument == "trainer_or_dataloaders" and (value is None or value is module):
            assert str(error).startswith("nothing to validate on: Classifier has no val_dataloader; pass a Trainer")
        elif not accepted:
            check_refusal(error, value, argument)
        else:  # what is no batch, or no good listener, is found out by the user's own code
            assert argument in ("trainer_or_dataloaders", "seen"), error

    holds()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_every_argument_is_tried():
    assert list(inspect.signature(evaluate).parameters) == ARGUMENTS

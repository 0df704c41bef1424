"""The table of rows is complete, and each row does what it says in the plainest fit."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import CASES, each_case, public_callbacks

from lightning_compress import CompressionCallback
from lightning_compress.mechanisms.shrinking import restructure_, structure_of

from .grid import each_case_and_some_modules
from .modules import Classifier, difference, fit, loader, made, trainer


@functools.cache
def untouched(kind):
    """A module after a fit without any callback of ours; only looked at."""
    return fit(kind)


def test_every_public_callback_has_one_row():
    assert sorted(case.name for case in CASES) == sorted(public_callbacks())


@each_case()
def test_a_row_builds_the_class_it_names(case, tmp_path):
    assert type(case.build(tmp_path, Classifier)).__name__ == case.name


@each_case_and_some_modules()
def test_the_weights_change_only_if_the_row_says_so(case, kind, tmp_path):
    plain, compressed = untouched(kind), fit(kind, case.build(tmp_path, kind))
    assert (difference(plain, compressed) > 0) == case.changes_loss
    assert list(compressed.state_dict()) == list(made(kind).state_dict())


@each_case()
def test_two_of_one_name_are_refused(case, tmp_path):
    """Of one class, Lightning does it where the Trainer is made; otherwise we do, before the fit begins."""
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(case.build(tmp_path, Classifier), case.build(tmp_path, Classifier))

    class Other(CompressionCallback):
        """Of another class, with the same name."""

    module, callback = made(Classifier), case.build(tmp_path, Classifier)
    with pytest.raises(ValueError, match=f"two callbacks are named '{callback.name}'; give one another name="):
        trainer(callback, Other(name=callback.name)).fit(module, loader())
    late = trainer(callback)
    late.callbacks.append(case.build(tmp_path, Classifier))  # as a module's configure_callbacks does
    with pytest.raises(ValueError, match="two callbacks are named"):
        late.fit(module, loader())
    assert difference(module, made(Classifier)) == 0


@each_case(heavy_is_slow=True)
def test_predictions_after_the_fit_are_those_of_the_weights(case, tmp_path):
    module = fit(Classifier, case.build(tmp_path, Classifier))
    plain = made(Classifier)
    if case.shrinks:
        restructure_(plain, structure_of(module), module.state_dict())
    plain.load_state_dict(module.state_dict(), strict=True)
    inputs = torch.randn(4, 8)
    assert torch.equal(module.eval()(inputs), plain.eval()(inputs))

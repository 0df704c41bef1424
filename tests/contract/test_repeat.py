"""The same callback and module again: a second fit, another Trainer, validation and test afterwards."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from cases import each_case
from torch import nn

from lightning_compress.mechanisms.checkpoints import dense_of

from .grid import each_case_and_some_modules
from .modules import BATCH, Classifier, NormClassifier, difference, loader, made, trainer
from .traces import traces


def trained(kind, fits, dense_in=None):
    """One module through several fits, each with its Trainer and its callbacks.

    If a folder is given, the dense weights that callbacks keep are put into the module between the fits.
    """
    module = made(kind)
    for callbacks in fits:
        fitting = trainer(*callbacks)
        fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH))
        if dense_in is not None and callbacks is not fits[-1]:
            fitting.save_checkpoint(dense_in / "dense.ckpt")
            for own in callbacks:
                if hasattr(own, "masks"):
                    dense = dense_of(torch.load(dense_in / "dense.ckpt", weights_only=True), own.name)
                    assert set(dense) == set(own.masks)
                    module.load_state_dict({**module.state_dict(), **dense})
    return module


@functools.cache
def untouched(kind):
    """The same without any callback of ours; only looked at."""
    return trained(kind, [[], []])


@pytest.mark.sample
@each_case_and_some_modules()
def test_a_second_fit_with_the_same_callback_equals_one_with_a_fresh_callback(case, kind, tmp_path):
    callback = case.build(tmp_path, kind)
    reused = trained(kind, [[callback], [callback]])
    if case.shrinks:  # it stays as small as it is, while a fresh callback would make it smaller still
        assert difference(reused, trained(kind, [[case.build(tmp_path, kind)], []])) == 0
        return
    fresh = trained(
        kind, [[case.build(tmp_path, kind)], [case.build(tmp_path, kind)]], tmp_path if case.keeps_dense else None
    )
    assert difference(reused, fresh) == 0
    assert (difference(reused, untouched(kind)) > 0) == case.changes_loss
    assert traces(reused) == traces(untouched(kind))


@each_case("DistillationCallback", "CompressionReport")
def test_a_second_fit_of_the_same_trainer(case, tmp_path):
    module, callback = made(Classifier), case.build(tmp_path, Classifier)
    fitting = trainer(callback)
    fitting.fit(module, loader(), loader())
    first = {key: value.clone() for key, value in module.state_dict().items()}
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(), loader())
    assert difference(module, first) > 0.01
    assert fitting.global_step == 16
    assert "training_step" not in vars(module)


@each_case("DistillationCallback")
def test_the_same_callback_for_another_module(case, tmp_path):
    callback = case.build(tmp_path, Classifier)
    trainer(callback).fit(made(NormClassifier), loader(), loader())
    second, alone = made(Classifier), made(Classifier)
    trainer(callback).fit(second, loader(), loader())
    trainer(case.build(tmp_path, Classifier)).fit(alone, loader(), loader())
    assert difference(second, alone) == 0


@each_case(heavy_is_slow=True)
def test_validation_and_test_see_the_plain_module(case, tmp_path):
    """After the fit the same Trainer measures what a Trainer without the callback measures, unless it quantises."""
    module = made(Classifier)
    fitting = trainer(case.build(tmp_path, Classifier))
    fitting.fit(module, loader(), loader())
    [validated], [tested] = fitting.validate(module, loader()), fitting.test(module, loader())
    assert ([validated] == trainer().validate(module, loader())) is not case.quantises
    assert ([tested] == trainer().test(module, loader())) is not case.quantises
    assert list(validated) == ["val_loss"]


@each_case()
def test_validation_without_a_fit_is_left_alone(case, tmp_path):
    module = made(Classifier)
    before = traces(module)
    validating = trainer(case.build(tmp_path, Classifier))
    if case.name == "PTQCallback":
        with pytest.raises(ValueError, match="has nothing to calibrate with"):
            validating.validate(module, loader())
        return
    told = pytest.warns(UserWarning, match="so the plain network is shown") if case.quantises else nullcontext()
    with told:
        results = validating.validate(module, loader())
    assert results == trainer().validate(made(Classifier), loader())
    assert traces(module)["model"] == before["model"]
    assert not list(tmp_path.iterdir())


@each_case("DistillationCallback")
def test_the_teacher_is_in_eval_though_the_user_calls_train(case, tmp_path):
    """Validation, and anybody's `train()`, leave a teacher of ours alone."""
    callback = case.build(tmp_path, NormClassifier)
    teacher, modes = callback.teacher_network, []
    statistics = teacher[1].running_mean.clone()
    teacher.register_forward_hook(lambda part, args, out: modes.append({child.training for child in part.modules()}))

    class Meddling(NormClassifier):
        def on_validation_end(self):
            teacher.train()

    module = Meddling()
    trainer(callback, val_check_interval=2).fit(module, loader(), loader())
    assert modes == [{False}] * len(modes)
    assert len(modes) > 8
    assert torch.equal(teacher[1].running_mean, statistics)
    assert isinstance(teacher, nn.Sequential)
    assert teacher.training

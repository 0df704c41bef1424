"""Weight averaging by other callbacks, before and after ours in the list."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cases import CASES
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_compress import DistillationCallback

from .modules import BATCH, Classifier, NormClassifier, difference, loader, made, teacher_for, trainer
from .traces import is_portable, traces


def ema():
    return EMAWeightAveraging(decay=0.5)


def swa():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


AVERAGES = [pytest.param(ema, id="EMA"), pytest.param(swa, id="SWA")]


class UncopyableTeacher(nn.Linear):
    """Complains if somebody copies it along with the module."""

    def __deepcopy__(self, memo):
        raise AssertionError("the teacher was copied")


def trained(kind, callbacks):
    module = made(kind)
    fitting = trainer(*callbacks, max_epochs=3)
    fitting.fit(module, loader(kind, rows=32), loader(kind, rows=2 * BATCH))
    return module


@functools.cache
def only(average):
    """A module after a fit with that average and without any callback of ours; only looked at."""
    return trained(NormClassifier, [average()])


# The first row with both averages, and others with one: of those that train layers of their own, that mask, and that
# only look. Averages of masks that move are in test_dynamic_life.py.
WITH_ONE_AVERAGE = ("FactorTransferCallback", "PruningCallback", "CompressionReport")
ROWS_AND_AVERAGES = [
    pytest.param(
        case,
        average,
        id=f"{case.name}-{name}",
        marks=[pytest.mark.slow] * (case is not CASES[0] and (average is swa or case.name not in WITH_ONE_AVERAGE)),
    )
    for case in CASES
    for name, average in (("EMA", ema), ("SWA", swa))
]


@pytest.mark.parametrize(("case", "average"), ROWS_AND_AVERAGES)
@pytest.mark.sample
def test_before_and_after_are_the_same(case, average, tmp_path):
    first = trained(NormClassifier, [average(), case.build(tmp_path / "a", NormClassifier)])
    last = trained(NormClassifier, [case.build(tmp_path / "b", NormClassifier), average()])
    plain = only(average)
    alone = trained(NormClassifier, [case.build(tmp_path / "c", NormClassifier)])
    assert difference(first, last) == 0
    assert (difference(first, plain) > 0) == case.changes_loss
    assert difference(first, alone) > 0  # the average was really taken
    assert traces(first) == traces(plain)
    assert is_portable(first)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_teacher_is_not_copied(average, before):
    averaging, ours = average(), DistillationCallback(UncopyableTeacher(8, 3))
    module = made(Classifier)
    fitting = trainer(*([averaging, ours] if before else [ours, averaging]), max_epochs=3)
    fitting.fit(module, loader(rows=32), loader())
    copied = averaging._average_model
    assert copied is not None
    assert not [part for part in copied.modules() if isinstance(part, UncopyableTeacher)]
    with pytest.raises(AssertionError, match="was copied"):
        copy.deepcopy(ours.teacher)


def test_the_average_equals_one_kept_by_hand():
    """Distillation and the average do not disturb each other: the average is over the distilled weights."""
    weights: list[dict[str, torch.Tensor]] = []

    class Recording(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            weights.append({key: value.detach().clone() for key, value in pl_module.state_dict().items()})

    module = trained(Classifier, [DistillationCallback(teacher_for(Classifier)), Recording(decay=0.5)])
    average = weights[0]
    for state in weights[1:]:
        average = {key: 0.5 * average[key] + 0.5 * state[key] for key in state}
    assert difference(module, average) < 1e-6

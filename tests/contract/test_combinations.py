"""The contract for callbacks that are used together: in every order, killed, again, and after an exception."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import public_callbacks
from combinations import COMBINATIONS, REFUSED, SHORT, WORKS, Combination, combination, each_combination
from lightning.pytorch.callbacks import ModelCheckpoint
from records import record

from lightning_compress.export import load_shrunk

from .modules import BATCH, Classifier, NormClassifier, difference, loader, made, trainer, twin
from .test_cleanup import broken_fit, broken_without_us, untouched
from .test_repeat import trained
from .test_resume import resumed_at_the_end_of_an_epoch
from .traces import is_portable, traces

TABLE = "combinations"


@dataclass
class Fit:
    """What a fit has left."""

    module: Classifier
    metrics: dict[str, float]
    callbacks: list[Any]
    checkpoint: Path


def fitted(own: Combination, kind: type[Classifier], folder: Path, order: tuple[int, ...]) -> Fit:
    """A fit with the callbacks in an order; those that it does not name are left out."""
    torch.manual_seed(0)
    built, module = own.build(folder, kind), made(kind)
    callbacks = [built[index] for index in order]
    saving = ModelCheckpoint(folder, filename="last", save_top_k=-1)
    fitting = trainer(*callbacks, saving, enable_checkpointing=True)
    fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    metrics = {key: float(value) for key, value in fitting.callback_metrics.items()}
    return Fit(module, metrics, [built[index] for index in sorted(order)], folder / "last.ckpt")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The fit of a combination in the order of the table; only looked at."""

    @functools.cache
    def fit(name: str, kind: type[Classifier]) -> Fit:
        own = next(own for own in COMBINATIONS if own.name == name)
        return fitted(own, kind, tmp_path_factory.mktemp("first"), tuple(range(len(own.members))))

    return lambda own, kind: fit(own.name, kind)


def test_every_pair_of_callbacks_is_planned():
    names = {name.removesuffix("Callback") for name in public_callbacks()}
    every = [frozenset(pair) for pair in combinations(names, 2)]
    works = [frozenset((one, other)) for one, others in WORKS.items() for other in others.split()]
    planned = [*works, *(frozenset(pair.split()) for pair in REFUSED)]
    assert sorted(map(sorted, planned)) == sorted(map(sorted, every))


@pytest.mark.parametrize("pair", REFUSED)
def test_what_does_not_go_together_is_refused_in_both_orders(pair, tmp_path):
    own = combination(pair)
    for order in (1, -1):
        module = made(Classifier)
        before = traces(module)
        with pytest.raises(ValueError, match=REFUSED[pair]):
            trainer(*own.build(tmp_path, Classifier)[::order]).fit(module, loader(), loader())
        assert difference(module, made(Classifier)) == 0
        assert {key: entry[2:] for key, entry in traces(module).items() if key.startswith("model")} == {
            key: entry[2:] for key, entry in before.items() if key.startswith("model")
        }
        assert "training_step" not in vars(module)
    record(TABLE, own.name, "every order", "refused", REFUSED[pair])


def assert_effect(callback) -> None:
    """It says itself that it did what it is for."""
    assert all(callback.effects[effect] > 0 for effect in callback.expected_effects)
    for holds in ("masks", "quantization", "shrinkage", "grids", "result"):
        assert not hasattr(callback, holds) or getattr(callback, holds), holds


@each_combination()
@pytest.mark.parametrize("kind", [Classifier, NormClassifier], ids=lambda kind: kind.__name__)
def test_the_order_does_not_matter(own, kind, first, tmp_path):
    reference = first(own, kind)
    for index, order in enumerate(permutations(range(len(own.members)))):
        again = fitted(own, kind, tmp_path / str(index), order)
        assert difference(again.module, reference.module) == 0
        assert again.metrics == reference.metrics
        for one, other in zip(again.callbacks, reference.callbacks, strict=True):
            assert one.effects == other.effects
            assert_effect(one)
    record(TABLE, own.name, "every order", "repeatable", f"{index + 1} orders, weights and metrics bit for bit")


@each_combination()
def test_each_member_has_its_effect(own, first, tmp_path):
    """Without one of them the weights are others, if its row says that it changes them."""
    reference = first(own, NormClassifier)
    everyone = range(len(own.members))
    for index, case in enumerate(own.members):
        others = tuple(other for other in everyone if other != index)
        if case.quantises and own.has("Export"):
            with pytest.raises(ValueError, match="precision 'int8' needs scales, and no callback gives them"):
                fitted(own, NormClassifier, tmp_path / case.name, others)
            continue
        without = fitted(own, NormClassifier, tmp_path / case.name, others)
        assert (difference(without.module, reference.module) > 0) == case.changes_loss
    record(TABLE, own.name, "each has its effect", "works", "the fit differs from the one without it")


@each_combination()
@pytest.mark.parametrize("kind", [Classifier, NormClassifier], ids=lambda kind: kind.__name__)
def test_the_checkpoint_is_a_plain_one_and_gives_what_was_logged(own, kind, first, tmp_path):
    reference = first(own, kind)
    saved = torch.load(reference.checkpoint, weights_only=True)
    module, shown = twin(kind, saved), []
    if own.shrinks:
        module = load_shrunk(made(kind), reference.checkpoint)
    assert list(module.state_dict()) == list(made(kind).state_dict())
    if own.has("QAT"):  # what was logged is of the network on the grids that the checkpoint has
        [shown] = [[built] for built in own.build(tmp_path, kind) if built.name == "qat"]
    validating = trainer(*shown)
    validating.validate(module, loader(kind, rows=2 * BATCH), ckpt_path=reference.checkpoint if shown else None)
    found = float(validating.callback_metrics["val_loss"])
    assert found == (pytest.approx(reference.metrics["val_loss"], abs=1e-6) if shown else reference.metrics["val_loss"])
    record(TABLE, own.name, "checkpoint", "exact", "strict into the plain module, with the validation that was logged")


@each_combination()
def test_a_fit_that_is_resumed_equals_a_whole_one(own, tmp_path):
    resumed_at_the_end_of_an_epoch(own, NormClassifier, tmp_path)
    record(TABLE, own.name, "resumed", "repeatable", "from the end of an epoch: weights, optimizer and all states")


@each_combination()
def test_a_second_fit_with_the_same_callbacks_equals_one_with_fresh_ones(own, tmp_path):
    same = own.build(tmp_path, NormClassifier)
    reused = trained(NormClassifier, [same, same])
    fresh, again = own.build(tmp_path, NormClassifier), own.build(tmp_path, NormClassifier)
    again = [built for built in again if built.name != "structured"]  # it stays as small as it is
    expected = trained(NormClassifier, [fresh, again], tmp_path if own.keeps_dense else None)
    assert difference(reused, expected) == 0
    assert traces(reused) == traces(expected)
    record(TABLE, own.name, "second fit", "repeatable", "as with fresh callbacks")


@each_combination()
@pytest.mark.parametrize("end", ["the step", "Ctrl-C"])
def test_after_an_exception_nothing_stays(own, end, tmp_path):
    for order in (1, -1):
        module = broken_fit(end, *own.build(tmp_path, Classifier)[::order])
        assert traces(module) == traces(broken_without_us(end))
        assert is_portable(module)
    record(TABLE, own.name, "exception", "works", "nothing stays on the module")


@each_combination()
def test_after_the_fit_nothing_stays(own, first):
    module = first(own, Classifier).module
    assert traces(module) == traces(untouched(Classifier))
    assert is_portable(module)


def test_what_is_tried_without_us_is_what_is_tried_with_us():
    """Each name of a row is found, and no combination is there twice."""
    assert len({own.name for own in COMBINATIONS}) == len(COMBINATIONS)
    assert set(SHORT) == {name.removesuffix("Callback") for name in public_callbacks()}

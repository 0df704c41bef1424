"""The contract for two networks that optimise manually, with all techniques on one of them."""

from __future__ import annotations

import pytest
import torch
from records import record

from lightning_compress import DCILCallback

from .gans import ON_THE_GENERATOR, Functions, Gan, alike_on_ranks, techniques
from .modules import BATCH, difference, loader, made, trainer
from .ranks import run
from .test_cleanup import broken_fit
from .test_ranks import launched
from .test_repeat import trained
from .test_resume import assert_same_checkpoints, exact_fit
from .traces import is_portable, traces

pytestmark = pytest.mark.slow


def two_passes():
    return [DCILCallback(0.4, update_interval=1, dense_path="shared", **ON_THE_GENERATOR)]


EACH = pytest.mark.parametrize(("kind", "build"), [(Gan, techniques), (Functions, two_passes)])


class Keeps:
    """What a combination says of itself, as far as it matters here."""

    keeps_dense, shrinks = True, False


def row(callbacks):
    return " + ".join(type(own).__name__ for own in callbacks)


@pytest.mark.sample
@EACH
def test_a_fit_that_is_resumed_equals_a_whole_one(kind, build, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    module, _ = exact_fit(kind, whole, build())
    callbacks = build()
    _, fitting = exact_fit(kind, resumed, callbacks, ckpt_path=whole / "step=8.ckpt")
    assert fitting.global_step == 16
    assert difference(module, made(kind)) > 0.01
    assert_same_checkpoints(whole, resumed, Keeps, callbacks)
    plain, logged = made(kind), fitting.callback_metrics["val_loss"]
    saved = torch.load(whole / "end.ckpt", weights_only=True)
    plain.load_state_dict(saved["state_dict"], strict=True)
    [validated] = trainer().validate(plain, loader(kind, rows=2 * BATCH))
    assert kind is Gan or validated["val_loss"] == pytest.approx(float(logged), abs=1e-6)  # Gan's is on grids
    record("combinations", row(callbacks), "manual optimisation, resumed", "repeatable")


@EACH
def test_a_second_fit_equals_one_with_fresh_callbacks(kind, build, tmp_path):
    same = build()
    reused = trained(kind, [same, same])
    assert difference(reused, trained(kind, [build(), build()], tmp_path)) == 0
    assert traces(reused) == traces(trained(kind, [[], []]))
    record("combinations", row(same), "manual optimisation, second fit", "repeatable")


@EACH
@pytest.mark.parametrize("end", ["the step", "validation", "the loader", "Ctrl-C"])
def test_after_an_exception_nothing_stays(kind, build, end):
    module = broken_fit(end, *build(), kind=kind)
    assert traces(module) == traces(broken_fit(end, kind=kind))
    assert is_portable(module)
    record("combinations", row(build()), "manual optimisation, exception", "works")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("ranks"), ["Gan", "Functions"], "fork", 180)


@pytest.mark.parametrize(("name", "build"), [("Gan", alike_on_ranks), ("Functions", two_passes)])
def test_ranks_are_identical_and_equal_one_process(ranks, name, build, tmp_path):
    first, second = ranks[name]
    alone = run(name, tmp_path, ranks=1)
    assert difference(first["state_dict"], second["state_dict"]) == 0
    assert difference(first["state_dict"], alone) <= 1e-6
    assert first["effects"] == second["effects"]
    assert "training_step" not in first["attributes"]
    record("combinations", row(build()), "manual optimisation, 2 ranks", "repeatable", "within 1e-6 of one process")

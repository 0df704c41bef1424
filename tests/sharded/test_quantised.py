"""Quantised weights under FSDP2: those of one process on whole batches, with the same steps of their grids."""

from __future__ import annotations

import itertools

import pytest
import torch
from records import record

from .circumstances import EXACT, Imaging
from .place import Classifier, alone, farthest, in_ranks, made

TOLERANCE = 1e-6
SIZES = ("mse", "observed", "learned")
FIRST = [("learned", EXACT[0])]
CELLS = [
    pytest.param(*FIRST[0], marks=pytest.mark.sample),
    *[(size, where) for size, where in itertools.product(SIZES, EXACT[:2]) if (size, where) not in FIRST],
    *itertools.product(["learned"], EXACT[2:]),
]
SAVED = [("mse", "full"), ("observed", "sharded"), ("learned", "full"), ("learned", "sharded")]
REFUSED = {
    "activations": "activation_bits=8 quantises activations too; give activation_bits=None",
    "manual": "Manual optimises manually",
    "masked": "'model.second.weight', 'model.last.weight', which 'qat' would round, and with ModelParallelStrategy",
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    names = [f"quantised:fitted:{size}:{where}" for size, where in FIRST]
    return in_ranks(tmp_path_factory.mktemp("first"), *names)


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    cells = [cell for cell in (getattr(cell, "values", cell) for cell in CELLS) if cell not in FIRST]
    names = [f"quantised:fitted:{size}:{where}" for size, where in cells]
    names += [f"quantised:saved:{size}:{kind}" for size, kind in SAVED]
    names += [f"quantised:refused:{what}" for what in REFUSED]
    names += [f"quantised:fitted:{size}:bf16 policy" for size in SIZES]
    return in_ranks(tmp_path_factory.mktemp("further"), *names)


def equal_one_process(ranks, name, folder, kind):
    """The same weights, steps and validation; the largest difference of a weight."""
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(name, folder)
    d = farthest(ranks[0]["state_dict"], reference["state_dict"])
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert d <= TOLERANCE
    assert farthest(ranks[0]["steps"], ranks[1]["steps"]) == 0
    assert farthest(ranks[0]["steps"], reference["steps"]) <= TOLERANCE
    assert ranks[0]["fingerprints"] == ranks[1]["fingerprints"] != {}
    assert ranks[0]["metrics"] == pytest.approx(reference["metrics"], abs=1e-5)
    assert ranks[0]["attributes"] == reference["attributes"]
    assert farthest(ranks[0]["state_dict"], made(kind).state_dict()) > 0.001
    return d


@pytest.mark.slow
@pytest.mark.parametrize(("size", "circumstance"), CELLS)
def test_ranks_equal_one_process(request, size, circumstance, tmp_path):
    ranks = request.getfixturevalue("first" if (size, circumstance) in FIRST else "further")
    name = f"quantised:fitted:{size}:{circumstance}"
    d = equal_one_process(ranks[name], name, tmp_path, Imaging)
    found = ranks[name][0]
    assert found["after"] == pytest.approx(found["metrics"]["val_loss"], abs=1e-6)  # of the quantised network
    plain = made(Imaging)
    plain.load_state_dict(found["state_dict"])
    for key, step in found["steps"].items():
        weight = plain.get_parameter(f"model.{key}").detach()
        assert not torch.equal((weight / step.view(-1, *[1] * (weight.ndim - 1))).round(), weight)
    record("sharded", "QATCallback", f"step_size='{size}', {circumstance}", "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_with_bfloat16_the_rows_are_rounded_before_they_are_narrowed(further, size, tmp_path):
    ranks = further[f"quantised:fitted:{size}:bf16 policy"]
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(f"quantised:fitted:{size}:{EXACT[0]}", tmp_path)
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert 0 < farthest(ranks[0]["state_dict"], reference["state_dict"]) < 0.1
    assert farthest(ranks[0]["steps"], reference["steps"]) < 1e-2
    assert ranks[0]["metrics"]["val_loss"] == pytest.approx(reference["metrics"]["val_loss"], abs=0.05)
    record("sharded", "QATCallback", f"step_size='{size}', bf16 policy", "works")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), SAVED)
def test_a_resumed_fit_equals_one_that_went_on(further, size, kind, tmp_path):
    name = f"quantised:saved:{size}:{kind}"
    d = equal_one_process(further[name], name, tmp_path, Classifier)
    for rank in further[name]:
        assert farthest(rank["resumed"], rank["state_dict"]) == 0
        assert farthest(rank["resumed_steps"], rank["steps"]) == 0
    record(
        "sharded", "QATCallback", f"step_size='{size}', {kind} checkpoints, and a resume", "repeatable", f"d = {d:.0e}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(further, what):
    for rank in further[f"quantised:refused:{what}"]:
        assert rank["error"].startswith("ValueError")
        assert REFUSED[what] in rank["error"]
    row = "QATCallback + PruningCallback" if what == "masked" else "QATCallback"
    column = {"activations": "activations", "manual": "manual optimisation", "masked": "the same weights"}[what]
    record("sharded", row, column, "refused", REFUSED[what])


@pytest.mark.slow
def test_a_backward_pass_past_the_module_is_told_though_that_of_others_was_not(tmp_path):
    ranks = in_ranks(tmp_path, "quantised:refused:past")["quantised:refused:past"]
    for rank in ranks:
        assert rank["error"].startswith(
            "RuntimeError: the backward pass of the first step of 'qat' did not call the mod"
        )
        assert "gradients of 'model.second.weight' are not those" in rank["error"]

"""Scaled gradients under FSDP2: the grids are those of whole weights, and the steps equal those of one process."""

from __future__ import annotations

import pytest
import torch
from records import record
from torch.nn import functional as F

from lightning_compress.functional import position_scale

from .circumstances import EXACT, narrowed_by_hand
from .place import STEPS, Classifier, alone, farthest, in_ranks, made
from .scaled import SETTINGS

TOLERANCE = 1e-6
FIRST = "scaled:fitted:parameters kept after the forward pass"
CELLS = [
    *[(f"scaled:fitted:{circumstance}", circumstance) for circumstance in (*EXACT, "AdamW")],
    *[(f"scaled:fitted::{setting}", setting) for setting in SETTINGS if setting],
]
RESUMED = {
    "scaled:resumed": "resumed from a full checkpoint",
    "scaled:resumed:distributed": "resumed from a sharded checkpoint",
}
BF16 = "scaled:fitted:bf16 policy"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("first"), FIRST)


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    names = [
        *(name for name, _ in CELLS if name != FIRST),
        *RESUMED,
        BF16,
        "scaled:uninterrupted",
        "scaled:broken",
        "scaled:uncopied",
    ]
    return in_ranks(tmp_path_factory.mktemp("further"), *names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "column"), [pytest.param(*cell, marks=pytest.mark.sample if cell[0] == FIRST else []) for cell in CELLS]
)
def test_ranks_equal_one_process(request, name, column, tmp_path):
    ranks = request.getfixturevalue("first" if name == FIRST else "further")[name]
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(name, tmp_path)
    d = farthest(ranks[0]["state_dict"], reference["state_dict"])
    assert d <= TOLERANCE
    assert farthest(ranks[0]["state_dict"], made().state_dict()) > 0.01
    for rank in ranks:
        assert farthest(rank["state_dict"], ranks[0]["state_dict"]) == 0
        assert rank["lambda_s"] == pytest.approx(reference["lambda_s"], rel=1e-7)
        assert rank["effects"] == reference["effects"] == {"the scaled step": 2 if "accumulation" in name else STEPS}
        assert rank["metrics"] == pytest.approx(reference["metrics"], abs=1e-6)  # of the rounded network too
        assert list(rank["grids"]) == list(reference["grids"])
        for weight, step in rank["grids"].items():
            assert torch.allclose(step, reference["grids"][weight], atol=1e-6, rtol=0)
        for weight, histogram in rank["start"].items():
            assert torch.allclose(histogram, reference["start"][weight], atol=1e-7, rtol=0)
        assert "on_before_optimizer_step" not in rank["attributes"]
    assert ranks[0]["remarks"] == reference["remarks"]
    assert ranks[0]["picture"] is not None
    record("sharded", "PSGDCallback", column, "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_fit_equals_an_uninterrupted_one(further, name):
    """FSDP2 restores within the fit, and steps the optimizers for it."""
    ranks, whole = further[name], further["scaled:uninterrupted"]
    assert [rank.get("error") for rank in ranks] == [None, None]
    assert farthest(ranks[0]["state_dict"], whole[0]["state_dict"]) == 0
    assert ranks[0]["lambda_s"] == whole[0]["lambda_s"]
    assert ranks[0]["effects"] == {"the scaled step": 3}
    record("sharded", "PSGDCallback", RESUMED[name], "repeatable", "d = 0 to a fit that was not interrupted")


@pytest.mark.slow
def test_under_a_policy_positions_are_those_of_the_weights_in_full_precision(further):
    ranks = further[BF16]

    def scaled(weights):
        for weight in weights.values():
            weight.grad *= ranks[0]["lambda_s"] * position_scale(weight, 4)

    expected = narrowed_by_hand(Classifier, lambda narrow, x, y: F.cross_entropy(narrow(x).float(), y), scaled)
    d = farthest(ranks[0]["state_dict"], expected)
    assert d <= TOLERANCE
    record("sharded", "PSGDCallback", "bf16 policy", "exact", f"d = {d:.0e} to a loop by hand")


@pytest.mark.slow
def test_a_weight_that_is_infinite_in_the_rows_of_one_rank_is_refused_on_all(further):
    for rank in further["scaled:broken"]:
        assert rank["error"].startswith("ValueError: 'model.first.weight' hold NaN or infinity")


@pytest.mark.slow
def test_where_the_module_cannot_be_copied_all_ranks_do_without_the_second_validation(further):
    first, second = further["scaled:uncopied"]
    assert len(first["told"]) == 1
    assert "quantized_validation=False says so without a warning" in first["told"][0]
    assert second["told"] == []
    assert first["epochs"] == second["epochs"] == 2

"""Distillation and attention transfer under FSDP2: equal to one process on whole batches."""

from __future__ import annotations

import itertools

import pytest
from records import record
from torch.nn import functional as F

from .circumstances import EXACT, Imaging, narrowed_by_hand, teacher
from .place import BATCH, STEPS, alone, farthest, in_ranks
from .teachers import KD

TOLERANCE = 1e-6
KINDS = ("DistillationCallback", "AttentionTransferCallback")
BOTH = "+".join(KINDS)
FIRST = [(BOTH, EXACT[1])]
CELLS = [
    *[pytest.param(*cell, marks=pytest.mark.sample) for cell in FIRST],
    *itertools.product(KINDS, EXACT),
    (BOTH, "accumulation over 3 batches"),
    ("+".join(reversed(KINDS)), "gradients clipped by norm"),
]
OTHERS = {
    "teachers:manual:" + BOTH: (BOTH, "manual optimisation with CompressionMixin"),
    "teachers:itself": ("DistillationCallback", "the LightningModule is a sharded unit itself"),
    "teachers:proposed": ("AttentionTransferCallback", "pairs proposed"),
    "teachers:from_checkpoint": ("DistillationCallback", "teacher from a checkpoint of a LightningModule"),
}
FACTORS = ("teachers:factors", "teachers:factors:ddp", "teachers:factors_resumed", "teachers:factors_resumed:halves")
BF16 = [f"teachers:fitted:{kind}:bf16 policy" for kind in KINDS]


def scenario(which, circumstance):
    return f"teachers:fitted:{which}:{circumstance}"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("first"), *(scenario(*cell) for cell in FIRST))


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    cells = [getattr(cell, "values", cell) for cell in CELLS]
    names = [*(scenario(*cell) for cell in cells if cell not in FIRST), *OTHERS, *BF16, *FACTORS, "teachers:twice"]
    return in_ranks(tmp_path_factory.mktemp("further"), *names)


def check(ranks, name, folder, row, column):
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(name, folder)
    d = farthest(ranks[0]["state_dict"], reference["state_dict"])
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert d <= TOLERANCE
    assert ranks[0]["effects"] == ranks[1]["effects"] == reference["effects"]
    assert all(list(effects.values()) == [STEPS] for effects in reference["effects"])
    for key in ("val_loss", *(key for key in reference["metrics"] if key.endswith("/val_loss"))):
        assert ranks[0]["metrics"][key] == ranks[1]["metrics"][key]
        assert ranks[0]["metrics"][key] == pytest.approx(reference["metrics"][key], abs=1e-6)
    assert ranks[0]["shapes"] == [[BATCH // 2, 8]] * STEPS
    assert "training_step" not in ranks[0]["attributes"]
    record("sharded", row.replace("+", " + "), column, "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "circumstance"), CELLS)
def test_ranks_equal_one_process(request, which, circumstance, tmp_path):
    ranks = request.getfixturevalue("first" if (which, circumstance) in FIRST else "further")
    name = scenario(which, circumstance)
    check(ranks[name], name, tmp_path, which, circumstance)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ranks_equal_one_process_with_other_modules(further, name, tmp_path):
    check(further[name], name, tmp_path, *OTHERS[name])
    if name == "teachers:proposed":
        assert [rank["pairs"] for rank in further[name]] == [[["second", "second"]]] * 2


def distilled(narrow, x, y):
    """Each loss widens the logits for itself, so their gradients are added in bf16."""
    logits, theirs = narrow(x), teacher()(x.float())
    temperature = KD["temperature"]
    ours = F.log_softmax(logits.float() / temperature, 1)
    soft = F.kl_div(ours, F.softmax(theirs / temperature, 1), reduction="batchmean")
    return KD["task_weight"] * F.cross_entropy(logits.float(), y) + KD["kd_weight"] * temperature**2 * soft


@pytest.mark.slow
def test_under_a_policy_the_teacher_gets_the_narrowed_input(further):
    ranks = further[BF16[0]]
    d = farthest(ranks[0]["state_dict"], narrowed_by_hand(Imaging, distilled))
    assert d <= TOLERANCE
    assert ranks[0]["types"] == ["torch.bfloat16"] * STEPS
    record("sharded", "DistillationCallback", "bf16 policy", "exact", f"d = {d:.0e} to a loop by hand")


@pytest.mark.slow
def test_two_calls_of_the_student_are_refused_as_in_one_process(further):
    for rank in further["teachers:twice"]:
        assert "calls the student 'model' 2 times" in rank["error"]
    record("sharded", "DistillationCallback", "two calls of the student", "refused", "calls the student 2 times")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other", "column"),
    [
        (*FACTORS[:2], "parameters resharded after the forward pass"),
        (*FACTORS[2:], "resumed from a full checkpoint"),
    ],
)
def test_factor_transfer_equals_ddp_and_a_resumed_fit_an_uninterrupted_one(further, name, other, column):
    """Its helpers are whole on each rank; their batch norm keeps them from equalling one process."""
    ranks, others = further[name], further[other]
    assert [rank.get("error") for rank in (*ranks, *others)] == [None] * 4
    d = farthest(ranks[0]["state_dict"], others[0]["state_dict"])
    assert d <= TOLERANCE
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert ranks[0]["errors"] == ranks[1]["errors"] == pytest.approx(others[0]["errors"], rel=1e-6)
    against = "two processes under DDP" if "ddp" in other else "a fit that was not interrupted"
    record("sharded", "FactorTransferCallback", column, "repeatable", f"d = {d:.0e} to {against}")

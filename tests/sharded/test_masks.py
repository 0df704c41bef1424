"""Masks under FSDP2: those of one process on whole batches, in weights, checkpoints and validation."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from records import record
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from . import masks as scenarios
from .circumstances import EXACT
from .masks import ACTIONS, CALLBACKS, ROUNDED
from .place import BATCH, STEPS, Classifier, Place, alone, farthest, in_ranks, made, rows

TOLERANCE = 1e-6
ROWS = {"pruning": "PruningCallback", "dpf": "DPFCallback", "dcil": "DCILCallback"}
OF_EACH_RANK = ("task_loss", "kl_pruned", "kl_dense")  # in a training step, of its part of the batch
OF_FSDP = ("_device_mesh", "_fsdp_", "_is_fsdp_", "__composable_api_state_key")  # on a module that is itself a unit
FIRST = [("pruning", EXACT[0]), ("dpf", EXACT[1])]
CELLS = [
    *[pytest.param(*cell, marks=pytest.mark.sample) for cell in FIRST],
    *[cell for cell in itertools.product(ROWS, EXACT) if cell not in FIRST],
    *[(callback, EXACT[0]) for callback in CALLBACKS if callback not in ROWS],
]
VARIANTS = {
    "linear": "schedule='linear', regrow=True",
    "cosine": "schedule='cosine', scope='layer'",
    "one_shot": "schedule='one_shot', scope='erk'",
    "iterative": "schedule='iterative', rewind='weights'",
    "rates": "schedule='iterative', rewind='lr'",
    "taylor": "score='taylor'",
    "random": "score='random'",
    "pattern": "pattern='1:4'",
    "keep": "dead_filters='keep', freeze_at=0.8",
    "dcil apart": "dense_path='shared', kl_start=1",
    "dcil own": "dense_path='own', kl_start=0.3",
    "dcil own norms": "dense_path='own_norm', kl_start=1",
}
KINDS = ("full", "sharded")
SAVED = list(itertools.product(["pruning", "dpf", "dcil own", "taylor", "iterative"], KINDS))
KEPT = EXACT[1]
ON_NETWORKS = {
    "mixed": "attention and tied weights, one unit",
    "checkpointed": "activation checkpointing",
    "penalised": "a penalty over parameters()",
}
ON = list(itertools.product(ON_NETWORKS, ROWS))
NARROWED = ("dpf", "dcil", "dcil own")
ACTED = list(itertools.product(ACTIONS, EXACT[:2]))


def launched(tmp_path_factory, name, names):
    return in_ranks(tmp_path_factory.mktemp(name), *names)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    names = [f"masks:fitted:{name}:{where}" for name, where in FIRST]
    return launched(tmp_path_factory, "first", [*names, "masks:read:{}:{}".format(*READ_FIRST)])


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    cells = [cell for cell in (getattr(cell, "values", cell) for cell in CELLS) if cell not in FIRST]
    names = [f"masks:fitted:{name}:{where}" for name, where in cells]
    names += [f"masks:on:{network}:{callback}" for network, callback in ON]
    return launched(tmp_path_factory, "further", [*names, *(f"masks:twice:{where}" for where in EXACT[:2])])


def equal_one_process(ranks, name, folder):
    """The same weights, masks and metrics, and nothing left on the module; the largest difference of a weight."""
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(name, folder)
    d = farthest(ranks[0]["state_dict"], reference["state_dict"])
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert d <= TOLERANCE
    assert list(ranks[0]["masks"]) == list(reference["masks"]) != []
    assert all(torch.equal(mask, reference["masks"][key]) for key, mask in ranks[0]["masks"].items())
    assert sum(int((~mask).sum()) for mask in ranks[0]["masks"].values()) > 0
    assert all(not ranks[0]["state_dict"][key][~mask].any() for key, mask in ranks[0]["masks"].items())
    metrics = [
        {key: value for key, value in found["metrics"].items() if not key.endswith(OF_EACH_RANK)}
        for found in (*ranks, reference)
    ]
    assert metrics[0] == metrics[1] == pytest.approx(metrics[2], abs=1e-5)
    more = set(ranks[0]["attributes"]) - set(reference["attributes"])
    assert all(name.startswith(OF_FSDP) for name in more)
    return d


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(does not fit|at their floor|masked completely):UserWarning")
@pytest.mark.parametrize(("callback", "circumstance"), CELLS)
def test_ranks_equal_one_process(request, callback, circumstance, tmp_path):
    ranks = request.getfixturevalue("first" if (callback, circumstance) in FIRST else "further")
    name = f"masks:fitted:{callback}:{circumstance}"
    d = equal_one_process(ranks[name], name, tmp_path)
    row = type(CALLBACKS[callback]()).__name__
    record("sharded", row, circumstance if callback in ROWS else VARIANTS[callback], "repeatable", f"d = {d:.0e}")


@pytest.mark.filterwarnings("ignore:.*get a part of their gradient past the layer")  # a penalty does
@pytest.mark.slow
@pytest.mark.parametrize(("network", "callback"), ON)
def test_ranks_equal_one_process_on_other_networks(further, network, callback, tmp_path):
    name = f"masks:on:{network}:{callback}"
    # in one process DCIL refuses checkpointing, as one backward pass goes through both of its passes there
    reference = "masks:on:plain:dcil" if (network, callback) == ("checkpointed", "dcil") else name
    d = equal_one_process(further[name], reference, tmp_path)
    row = next(row for key, row in ROWS.items() if key == callback)
    record("sharded", row, ON_NETWORKS[network], "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("circumstance", EXACT[:2])
def test_a_fit_after_a_plain_one_and_after_its_own_goes_on_from_the_dense_weights(further, circumstance, tmp_path):
    name = f"masks:twice:{circumstance}"
    found, reference = further[name], alone(name, tmp_path)
    assert [rank.get("error") for rank in found] == [None, None]
    assert farthest(found[0]["state_dict"], reference["state_dict"]) <= TOLERANCE
    assert found[0]["validated"] == pytest.approx(reference["validated"], abs=1e-6)
    assert all(torch.equal(mask, reference["masks"][key]) for key, mask in found[0]["masks"].items())
    record("sharded", "PruningCallback", f"a second fit, {circumstance}", "repeatable")


THAWED = list(itertools.product(["pruning", "dpf"], EXACT[:2]))
READ_FIRST = ("pruning", EXACT[0])
READ = [
    pytest.param(*READ_FIRST, marks=pytest.mark.sample),
    ("pruning", EXACT[1]),
    ("dcil", EXACT[0]),
    ("dcil apart", EXACT[1]),
    ("qat", EXACT[0]),
    ("qat", EXACT[1]),
    ("dpf", "a penalty"),
    ("qat", "a penalty"),
]


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    names = [f"masks:read:{callback}:{where}" for callback, where in READ[1:]]
    return launched(tmp_path_factory, "reading", [*names, *(f"masks:thawed:{own}:{where}" for own, where in THAWED)])


@pytest.mark.filterwarnings("ignore:.*get a part of their gradient past the layer")  # a penalty does
@pytest.mark.slow
@pytest.mark.parametrize(("callback", "circumstance"), THAWED)
def test_a_weight_that_learns_from_a_later_step_on_gets_a_penalty_whole(reading, callback, circumstance, tmp_path):
    name = f"masks:thawed:{callback}:{circumstance}"
    d = equal_one_process(reading[name], name, tmp_path)
    record("sharded", ROWS[callback], f"frozen at first, a penalty, {circumstance}", "exact", f"d = {d:.0e}")


@pytest.mark.filterwarnings("ignore:.*get a part of their gradient past the layer")  # a penalty does
@pytest.mark.slow
@pytest.mark.parametrize(("callback", "circumstance"), READ)
def test_whoever_stands_before_ours_reads_the_gradients_of_one_process(request, callback, circumstance, tmp_path):
    name = f"masks:read:{callback}:{circumstance}"
    launch = request.getfixturevalue("first" if (callback, circumstance) == READ_FIRST else "reading")
    ranks, reference = launch[name], alone(name, tmp_path)
    assert [rank.get("error") for rank in ranks] == [None, None]
    assert sorted({key.partition(" ")[0] for key in reference["seen"]}) == [
        "on_after_backward",
        "on_before_optimizer_step",
    ]
    assert len(reference["seen"]) == STEPS + STEPS // 2
    d = max(farthest(rank["seen"], reference["seen"]) for rank in ranks)
    assert d <= TOLERANCE
    assert farthest(ranks[0]["state_dict"], reference["state_dict"]) <= TOLERANCE
    row = {"qat": "QATCallback"}.get(callback) or type(CALLBACKS[callback]()).__name__
    column = f"gradients that a callback before it reads, {circumstance}"
    record("sharded", row, column, "exact", f"d = {d:.0e}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    names = [f"masks:saved:{callback}:{kind}" for callback, kind in SAVED]
    return folder, in_ranks(folder, *names)


def read(path, kind):
    """A checkpoint as whoever has no ranks reads it, and the weights that Lightning and torch make of its shards."""
    if kind == "full":
        return torch.load(path, weights_only=True)
    found = torch.load(path / "meta.pt", weights_only=True)
    whole = path.with_suffix(".whole")
    dcp_to_torch_save(path, whole)
    state = torch.load(whole, weights_only=True)["state_dict"]
    assert farthest(state, _load_distributed_checkpoint(path)["state_dict"]) == 0
    return {**found, "state_dict": state}


def validated(state, callback):
    """The validation loss of plain weights."""
    module = made(scenarios.KINDS.get(callback, Classifier))
    module.load_state_dict(state, strict=True)
    return float(module.task_loss(rows(2 * BATCH).tensors).detach())


@pytest.mark.slow
@pytest.mark.parametrize(("callback", "kind"), SAVED)
def test_checkpoints_hold_compressed_weights_and_a_fit_goes_on_from_the_dense_ones(saved, callback, kind, tmp_path):
    name = f"masks:saved:{callback}:{kind}"
    folder, ranks = saved[0] / name.replace(":", "-").replace(" ", "_"), saved[1][name]
    d = equal_one_process(ranks, name, tmp_path)
    for rank in ranks:
        assert farthest(rank["resumed"], rank["state_dict"]) == 0
        assert all(torch.equal(mask, rank["masks"][key]) for key, mask in rank["resumed_masks"].items())
    [own] = [value for key, value in read(folder / "epoch=1.ckpt", kind)["callbacks"].items() if "Callback[" in key]
    assert all(torch.equal(mask, ranks[0]["masks"][key]) for key, mask in own["masks"].items())
    for file in ("epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"):
        found = read(folder / file, kind)
        [section] = found["lightning_compress"].values()
        masks = next(value for key, value in found["callbacks"].items() if "Callback[" in key)["masks"]
        for key, mask in masks.items():
            dense = section["dense"][key]
            assert torch.equal(found["state_dict"][key], torch.where(mask, dense, 0.0))
            assert callback == "iterative" or dense[~mask].any()
        assert sum(int((~mask).sum()) for mask in masks.values()) > 0
    last = read(folder / "last.ckpt", kind)["state_dict"]
    assert farthest(last, ranks[0]["state_dict"]) == 0
    assert validated(last, callback) == pytest.approx(ranks[0]["metrics"]["val_loss"], abs=1e-6)
    weights = read(folder / "weights.ckpt", kind)
    assert "lightning_compress" not in weights
    assert farthest(weights["state_dict"], read(folder / "epoch=0.ckpt", kind)["state_dict"]) == 0
    row = type(CALLBACKS[callback]()).__name__
    which = f"{kind} checkpoints, and a resume" + ("" if callback in ROWS else f" ({callback})")
    record("sharded", row, which, "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("callback", sorted({callback for callback, _ in SAVED}))
def test_one_process_goes_on_from_the_full_checkpoint_of_two(saved, callback, tmp_path):
    name = f"masks:saved:{callback}:full"
    path = saved[0] / name.replace(":", "-").replace(" ", "_") / "epoch=0.ckpt"
    again, other = scenarios.resumed(Place(tmp_path), callback, path, max_epochs=2, count=BATCH * STEPS // 2)
    whole = saved[1][name][0]
    assert farthest(again.state_dict(), whole["state_dict"]) <= TOLERANCE
    assert all(torch.equal(mask, whole["masks"][key]) for key, mask in other.masks.items())
    which = "resumed in one process" + ("" if callback in ROWS else f" ({callback})")
    record("sharded", type(other).__name__, which, "repeatable")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    names = [f"masks:rounded:{kind}:{whose}" for kind in ROUNDED for whose in ("ours", "by hand")]
    names += [f"masks:fitted:{callback}:bf16 policy" for callback in NARROWED]
    return launched(tmp_path_factory, "rounded", names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUNDED)
def test_bfloat16_equals_masks_by_hand(rounded, kind):
    ours, hand = (rounded[f"masks:rounded:{kind}:{whose}"][0] for whose in ("ours", "by hand"))
    assert farthest(ours["state_dict"], hand["state_dict"]) == 0
    assert sum(int((value == 0).sum()) for value in ours["state_dict"].values()) == 252
    record("sharded", "PruningCallback", kind, "exact", "beside masks by hand")


@pytest.mark.slow
@pytest.mark.parametrize("callback", NARROWED)
def test_bfloat16_is_near_float32(rounded, callback, tmp_path):
    ranks = rounded[f"masks:fitted:{callback}:bf16 policy"]
    assert [rank.get("error") for rank in ranks] == [None, None]
    reference = alone(f"masks:fitted:{callback}:{EXACT[0]}", tmp_path)
    assert farthest(ranks[0]["state_dict"], ranks[1]["state_dict"]) == 0
    assert ranks[0]["reached"] == reference["reached"] > 0.8
    other = sum(int((mask != reference["masks"][key]).sum()) for key, mask in ranks[0]["masks"].items())
    assert other < 0.02 * sum(mask.numel() for mask in reference["masks"].values())
    record("sharded", type(CALLBACKS[callback]()).__name__, f"bf16 policy, {callback}", "works")


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    return launched(tmp_path_factory, "acted", [f"masks:acted:{action}:{where}" for action, where in ACTED])


@pytest.mark.slow
@pytest.mark.parametrize(("action", "circumstance"), ACTED)
def test_what_would_take_a_view_away_is_an_error_and_nothing_is_left(acted, action, circumstance):
    for rank in acted[f"masks:acted:{action}:{circumstance}"]:
        assert rank.get("error") is None
        assert rank["left_on"] == []
        zeros = sum(int((value == 0).sum()) for key, value in rank["state_dict"].items() if "weight" in key)
        if action in ("assigned", "cast", "moved"):
            assert rank["raised"].startswith("RuntimeError: the weight 'model.first.weight', which 'dpf' presents, was")
            assert zeros == 0  # no mask was left in the shards
        elif action == "interrupted":
            assert (rank["raised"], zeros) == ("KeyError: 'interrupted'", 0)
        else:
            assert (rank["raised"], zeros) == (None, 378)
            again = 1 if circumstance == KEPT else 2
            assert action == "evaluated" or set(rank["gathers"].values()) == {again * STEPS}


REFUSED = {
    "whole": "the weight 'model.last.weight' is whole in each process",
    "offloaded": "offload_policy=",
    "manual": "Manual optimises manually",
    "reestimated": "reestimate_batchnorm=True needs whole weights",
    "validated": "reestimated_validation=True validates on one rank",
    "transposed": "are of transposed convolutions",
    "transposed_pattern": "pattern='1:2' groups the input channels of",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return launched(tmp_path_factory, "refused", [f"masks:refused:{what}" for what in REFUSED])


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(refused, what):
    for rank in refused[f"masks:refused:{what}"]:
        assert REFUSED[what] in rank["error"]
        assert rank["error"].startswith("ValueError")

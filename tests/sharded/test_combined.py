"""Several callbacks at once under FSDP2: equal to one process, in any order of the list."""

from __future__ import annotations

import pytest
from records import record

from .place import alone, farthest, in_ranks

TOLERANCE = 1e-6
CLASSES = {
    "kd": "DistillationCallback",
    "dpf": "DPFCallback",
    "pruning": "PruningCallback",
    "dcil": "DCILCallback",
    "psgd": "PSGDCallback",
    "qat": "QATCallback",
    "int4": "ExportCallback",
    "fp32": "ExportCallback",
    "report": "CompressionReport",
}
EQUAL_ONE = ("kd+dpf", "dpf+kd:keeping", "report+pruning+fp32", "dcil+kd+report", "kd+qat+int4+report")
EQUAL_DDP = ("psgd+pruning:keeping", "pruning+psgd")
DDP = ("psgd+pruning:ddp", "pruning+psgd:ddp")


def columns(name):
    which, _, how = name.partition(":")
    row = " + ".join(CLASSES[word] for word in which.split("+"))
    files = [f"{word} file" for word in which.split("+") if word in ("int4", "fp32")]
    kept = ["parameters kept after the forward pass"] if how == "keeping" else []
    return row, ", ".join(kept + files) or "parameters resharded after the forward pass"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    names = [f"combined:fitted:{name}" for name in (*EQUAL_ONE, *EQUAL_DDP, *DDP)]
    found = in_ranks(tmp_path_factory.mktemp("combined"), *names)
    assert [rank.get("error") for ranks in found.values() for rank in ranks] == [None] * 2 * len(names)
    return {name.removeprefix("combined:fitted:"): ranks for name, ranks in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL_ONE)
def test_callbacks_together_equal_one_process(ranks, name, tmp_path):
    first, second = ranks[name]
    reference = alone(f"combined:fitted:{name}", tmp_path)
    d = farthest(first["state_dict"], reference["state_dict"])
    assert d <= TOLERANCE
    assert farthest(first["state_dict"], second["state_dict"]) == 0
    for key in (key for key in reference["metrics"] if "val_" in key):
        assert first["metrics"][key] == pytest.approx(reference["metrics"][key], abs=1e-6)
    assert first.get("bytes") == reference.get("bytes")
    assert first.get("failure") is None
    for row, expected in reference.get("rows", {}).items():
        metrics, ours = expected.pop("metrics"), first["rows"][row]
        assert ours.pop("metrics") == pytest.approx(metrics, abs=1e-6)
        assert ours == expected
    record("sharded", *columns(name), "repeatable", f"d = {d:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), list(zip(EQUAL_DDP, DDP, strict=True)))
def test_scaled_gradients_with_masks_equal_ddp(ranks, name, other):
    """What rounds otherwise grows from step to step where gradients are scaled: one process is no exact reference."""
    first, second = ranks[name]
    reference = ranks[other][0]
    d = farthest(first["state_dict"], reference["state_dict"])
    assert d <= TOLERANCE
    assert farthest(first["state_dict"], second["state_dict"]) == 0
    assert first["metrics"] == pytest.approx(reference["metrics"], abs=1e-6)  # of masked, rounded weights too
    assert first["metrics"]["compress/psgd/val_loss"] != first["metrics"]["val_loss"]
    record("sharded", *columns(name), "repeatable", f"d = {d:.0e} to two processes under DDP")

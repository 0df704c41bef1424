"""Two gloo ranks: identical, equal to one process on the doubled batch, and nothing hangs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES

from .modules import BATCH, STEPS, difference, made
from .ranks import run

FIRST = ["DistillationCallback-NetworkItself"]
FURTHER = [
    "DistillationCallback",
    "DistillationCallback-Spare",
    "AttentionTransferCallback",
    "AttentionTransferCallback-NetworkItself",
]
FIRST_AND_FURTHER = [
    *(pytest.param(name, marks=pytest.mark.sample) for name in FIRST),
    *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER),
]
LOGGED = {
    "DistillationCallback": ("compress/kd/val_loss", "compress/kd/val_agreement"),
    "AttentionTransferCallback": ("compress/at/val_loss",),
}
EFFECTS = {"DistillationCallback": "the distillation loss", "AttentionTransferCallback": "the attention loss"}
HEAVY = [case.name for case in CASES if case.heavy] + ["ExportCallback-logged", "CompressionReport-logged"]
TOLERANCE = 6e-8


def launched(folder, scenarios, start_method, seconds):
    """The scenarios in processes of their own; a hang is an error."""
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), *scenarios],
        env={**os.environ, "START_METHOD": start_method, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=True,
    )
    return {
        name: [torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)] for name in scenarios
    }


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """What the ranks of a scenario leave; those of its group run with it, so that the imports are paid for once."""

    @functools.cache
    def group(first):
        return launched(tmp_path_factory.mktemp("forked"), FIRST if first else FURTHER, "fork", 120)

    return lambda name: group(name in FIRST)[name]


@pytest.fixture(scope="module")
def ignored(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("ignored"), ["DistillationCallback-HalfIgnored"], "fork", 120)


@pytest.mark.parametrize("name", FIRST_AND_FURTHER)
def test_ranks_are_identical_and_equal_one_process(forked, name, tmp_path):
    first, second = forked(name)
    alone = run(name, tmp_path, ranks=1)
    assert difference(first["state_dict"], second["state_dict"]) == 0
    assert difference(first["state_dict"], alone) <= TOLERANCE
    assert difference(alone, made(type(alone))) > 0.01
    for key in LOGGED[name.partition("-")[0]]:
        assert first["metrics"][key] == second["metrics"][key]
        assert first["metrics"][key] == pytest.approx(float(alone.trainer.callback_metrics[key]), abs=1e-6)


@pytest.mark.slow
def test_ranks_scale_the_reduced_gradients_and_validate_rounded_weights_together(tmp_path):
    first, second = launched(tmp_path, ["PSGDCallback"], "fork", 120)["PSGDCallback"]
    alone = run("PSGDCallback", tmp_path / "alone", ranks=1)
    assert difference(first["state_dict"], second["state_dict"]) == 0
    assert difference(first["state_dict"], alone) <= 1e-6
    assert first["effects"] == second["effects"] == {"the scaled step": STEPS}
    key = "compress/psgd/val_loss"
    assert first["metrics"][key] == second["metrics"][key] > 0
    assert "on_before_optimizer_step" not in first["attributes"]


@pytest.mark.slow
def test_a_rank_without_labels_takes_part_in_what_is_logged(ignored):
    first, second = ignored["DistillationCallback-HalfIgnored"]
    assert difference(first["state_dict"], second["state_dict"]) == 0
    assert first["metrics"]["compress/kd/val_loss"] == second["metrics"]["compress/kd/val_loss"] > 0


@pytest.mark.slow
def test_a_failing_end_of_fit_ends_all_ranks(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        launched(tmp_path, ["FullDisk"], "fork", 90)
    assert "no room" in caught.value.stderr


@pytest.mark.parametrize("name", FIRST_AND_FURTHER)
def test_each_rank_captures_its_half_of_the_batch_once_a_step(forked, name):
    """Also where the step calls the LightningModule itself, through which DDP routes the step with other arguments."""
    for rank in forked(name):
        assert rank["shapes"] == [[(BATCH // 2, 8)]] * STEPS
        assert rank["effects"] == {EFFECTS[name.partition("-")[0]]: STEPS}
        assert "training_step" not in rank["attributes"]


@pytest.mark.slow
def test_a_head_that_only_distillation_uses_is_trained(forked):
    from .ranks import Spare

    start = made(Spare).state_dict()
    trained = forked("DistillationCallback-Spare")[0]["state_dict"]
    assert float((trained["model.distilled.weight"] - start["model.distilled.weight"]).abs().max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_method", "scenarios"),
    [
        ("fork", [*HEAVY, "DistillationCallback-logged"]),
        ("popen", ["CompressionReport-logged"]),
        ("spawn", ["CompressionReport-logged"]),
    ],
)
def test_the_end_of_fit_hangs_no_rank(start_method, scenarios, tmp_path):
    """Export and report are made by one rank, and reading the log directory is a broadcast: both are easy to hang."""
    for first, second in launched(tmp_path, scenarios, start_method, 300).values():
        assert difference(first["state_dict"], second["state_dict"]) == 0
    exports = [name for name in scenarios if name.startswith("Export")]
    assert sorted(path.parent.name for path in tmp_path.rglob("*.onnx")) == sorted(exports)
    reports = [name for name in scenarios if name.startswith("CompressionReport")]
    assert len(list(tmp_path.rglob("compression_report.json"))) == len(reports)

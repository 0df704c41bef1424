"""What must be true of an untouched project after a run with a recipe."""

from __future__ import annotations

from pathlib import Path

from .programs import Program
from .running import Compressed, compressed, copied

DIGITS = 0.93
"""Share of the 597 images that must be right: chance is 0.1, and these trainings reach 0.97 and more."""


def check(program: Program, recipe: str, folder: Path) -> Compressed:
    """Run it and look at the exit code, the project's files, the exported file and the report."""
    place = copied(program, folder)
    run = compressed(program, recipe, place)
    assert run.code == 0, run.output[-3000:]
    assert run.output.splitlines()[-1].startswith("lightning-compress run: wrote "), run.output[-3000:]
    assert list(run.changed) == []
    (file,) = run.report["files"]
    assert (place / Path(file["path"]).name).stat().st_size == file["bytes"]
    assert run.row(".onnx")["metrics"][program.metric] > DIGITS
    assert run.report["recipe"]["export"]["metric"] == program.metric  # as --set has it, not as the file
    EFFECTS[recipe](run, file)
    return run


def _distilled(run, file):
    assert run.row("teacher")["parameters"] > 10 * run.row("after")["parameters"]


def _sparse(run, file):
    (largest, *_) = sorted(run.report["layers"], key=lambda layer: -(layer["sparsity"] or 0))
    assert largest["sparsity"] > 0.85
    assert run.row("after")["nonzeros"] < 0.3 * run.row("after")["parameters"]


def _pruned_integers(run, file):
    assert (file["precision"], file["left_in_float"]) == ("int8", [])
    assert 0.45 < run.row("after")["nonzeros"] / run.row("after")["parameters"] < 0.6


def _four_bits(run, file):
    assert file["precision"] == "int4"
    assert {layer["bits"] for layer in run.report["layers"] if layer["bits"]} == {4}
    assert file["bytes"] < 0.3 * run.row("after")["bytes"]


def _integers(run, file):
    assert (file["precision"], file["left_in_float"]) == ("int8", [])
    assert file["bytes"] < 0.35 * run.row("after")["bytes"]
    assert run.row("(ptq)")["metrics"]["val_acc"] > DIGITS


def _smaller_integers(run, file):
    assert file["precision"] == "int8"
    assert abs(run.row("after")["macs"] / run.row("before")["macs"] - 0.5) < 0.02
    assert file["bytes"] < 0.3 * run.row("before")["bytes"]


EFFECTS = {
    "distil": _distilled,
    "dcil": _sparse,
    "distil-prune-int8": _pruned_integers,
    "int8": _integers,
    "prune": _sparse,
    "psgd-4bit": _four_bits,
    "structured-distil-int8": _smaller_integers,
}

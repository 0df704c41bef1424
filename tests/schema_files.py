"""The program that made the files below tests/data: one of each kind that a later version of the package must read.

A change of a schema adds a folder beside the old ones, which stay as they are: ``python tests/schema_files.py FOLDER``.
The report of the first schema is in tests/report/data.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from cases import CASES, Case
from contract.modules import BATCH, Classifier, loader, made, teacher_for, trainer

from lightning_compress import FactorTransferCallback
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.journal import Journal

STEPS_BEFORE = 6
"""Optimizer steps before the checkpoint, of eight: some rounds are done, and some are not."""
HEADER = {"checkpoint": "0123", "metric": "val_loss"}
PLAIN = {"val_loss": 1.125}
CHANGE, CHANGED, MOVED = Change("bits", "model.0", 4), {"val_loss": 1.25}, 0.5
RECIPE = """\
version: 1
callbacks:
  - class_path: PruningCallback
    init_args: {sparsity: 0.5, pattern: "2:4", layers: ["type:Linear"]}
  - class_path: QATCallback
    init_args: {weight_bits: 4, layer_bits: {model.0: 8}}
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: val_loss}
export: {path: net.onnx, precision: int8}
apply_to: {module: Classifier, fit: 2}
"""


class SaveInTheMiddle(L.Callback):
    """As ``ModelCheckpoint`` with a number of steps, which would be in the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS_BEFORE:
            trainer.save_checkpoint(self.path)


def write_checkpoint(case: Case, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fitting = trainer(case.build(Path(folder), Classifier), SaveInTheMiddle(path))
        fitting.fit(made(Classifier), loader(), loader(rows=BATCH))


def write_paraphraser(path: Path) -> None:
    callback = FactorTransferCallback(teacher_for(Classifier), pretrain_epochs=1)
    trainer(callback, max_steps=1).fit(made(Classifier), loader())
    callback.save_paraphraser(path)


def write_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    for case in CASES:
        write_checkpoint(case, folder / f"{case.name}.ckpt")
    write_paraphraser(folder / "paraphraser.pt")
    journal = Journal(folder, HEADER)
    journal.add(None, PLAIN)
    journal.add(CHANGE, CHANGED, MOVED)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))

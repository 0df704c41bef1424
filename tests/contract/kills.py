"""Fits that are killed and resumed, each in a process of its own, forked here so that the imports are paid for once.

``python kills.py`` reads one request a line, ``{"row": ..., "folder": ..., "point": ..., "resume": ...}``, and answers
each with the exit code of its fit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as L
import torch
from cases import CASES
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint

from contract.modules import BATCH, Classifier, loader, made, trainer
from lightning_compress import CompressionCallback
from lightning_compress.mechanisms import drafts

SETTINGS: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True}
"""Two epochs of four steps, of two batches each, with a checkpoint after each step."""
POINTS = {
    "the first batch": None,
    "an accumulation window": 6,
    "the end of an epoch": 4,
    "a save": 5,
    "the last step": 8,
    "the end of the fit": 8,
    "writing a file": 8,
}
"""Where a fit is killed, and the step of the newest checkpoint then; the last one where there is a file to write."""


class Kill(L.Callback):
    """Ends the process as the system does when memory is short, at one point of the fit."""

    def __init__(self, point: str) -> None:
        self.point = point

    def kill_at(self, point: str) -> None:
        if self.point == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        if self.point == "a save":
            LocalFileOpener.write = killed_in_the_middle(LocalFileOpener.write, trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        place = (trainer.current_epoch, batch_idx)
        if place == (0, 0):
            self.kill_at("the first batch")
        if place == (1, 4):
            self.kill_at("an accumulation window")

    def on_train_epoch_end(self, trainer, pl_module):
        self.kill_at("the end of an epoch")

    def on_train_end(self, trainer, pl_module):
        self.kill_at("the last step")
        if self.point == "the end of the fit":
            ours = [own for own in trainer.callbacks if isinstance(own, CompressionCallback)]
            for own in ours[:1]:  # all of them are baked then, and nothing is exported or reported
                own.export = lambda *_: self.kill_at(self.point)
        if self.point == "writing a file":
            drafts.os.replace = killed_before_it(drafts.os.replace)

    def on_fit_end(self, trainer, pl_module):
        self.kill_at("the end of the fit")


def killed_in_the_middle(write, trainer):
    """Writing a checkpoint, of which half comes to the disk from step 6 on."""

    def written(opener, content):
        if trainer.global_step < 6:
            return write(opener, content)
        write(opener, content[: len(content) // 2])
        opener.f.flush()
        return os.kill(os.getpid(), signal.SIGKILL)

    return written


def killed_before_it(replace):
    """Giving a draft its place, up to the first exported file, and the last one of a report."""

    def replaced(draft, target):
        if Path(target).suffix in (".onnx", ".html"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(draft, target)

    return replaced


def callbacks_of(row: str, folder: Path) -> list[CompressionCallback]:
    """Those of the cases whose names a row joins by " + "."""
    rows = {case.name: case for case in CASES}
    return [rows[name].build(folder, Classifier) for name in row.split(" + ") if name]


def fit(row: str, folder: Path, point: str = "", resume: str | None = None) -> None:
    """One fit, up to where it is killed, or to its end."""
    module = made(Classifier)
    torch.manual_seed(0)  # what a callback trains beside the network begins from the seed
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fitting = trainer(*callbacks_of(row, folder), Kill(point), saving, default_root_dir=folder, **SETTINGS)
    training, validation = loader(stateful=True), loader(rows=2 * BATCH)
    fitting.fit(module, training, validation, ckpt_path=resume, weights_only=True if resume else None)
    fitting.save_checkpoint(folder / "end.ckpt")


def forked(request: dict[str, Any]) -> int:
    """The exit code of a fit in a child process; below 0 the signal that ended it."""
    child = os.fork()
    if child == 0:
        folder, code = Path(request["folder"]), 1
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            fit(request["row"], folder, request["point"], request["resume"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(forked(json.loads(line)), flush=True)

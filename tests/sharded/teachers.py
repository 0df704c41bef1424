"""Callbacks with a teacher under FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_compress import (
    AttentionTransferCallback,
    CompressionCallback,
    DistillationCallback,
    FactorTransferCallback,
    teacher_from_checkpoint,
)
from sharded.circumstances import MODULE, NOTHING, TRAINER, Imaging, Itself, Manual, Twice, teacher
from sharded.place import CLASSES, FEATURES, Found, Place, left, made

KD = {"temperature": 2.0, "task_weight": 0.5, "kd_weight": 0.5}
PAIRS = {"second": "second"}


def callbacks_of(which: str, own: nn.Module | None = None) -> list[CompressionCallback]:
    """By the names of their classes, joined by "+"; the second one shares the teacher of the first."""
    shared: Any = teacher() if own is None else own
    made: list[CompressionCallback] = []
    for name in which.split("+"):
        if name == "DistillationCallback":
            made.append(DistillationCallback(shared, **KD))
        else:
            made.append(AttentionTransferCallback(shared, pairs=PAIRS, strength=0.1))
        shared = "kd" if isinstance(made[0], DistillationCallback) else "at"
    return made


class Shapes(L.Callback):
    """What each step gave to the student."""

    def __init__(self, watched: CompressionCallback) -> None:
        self.watched = watched
        self.shapes: list[list[int]] = []
        self.types: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        capture = self.watched.student_capture
        if capture is not None and capture.last_call is not None:
            [x] = capture.last_call.args
            self.shapes.append(list(x.shape))
            self.types.append(str(x.dtype))


def fitted(place: Place, which: str, circumstance: str = "") -> Found:
    return _fitted(place, callbacks_of(which), made(Imaging, **MODULE.get(circumstance, NOTHING)), circumstance)


def manual(place: Place, which: str) -> Found:
    return _fitted(place, callbacks_of(which), made(Manual))


def itself(place: Place) -> Found:
    """The LightningModule is sharded itself, and found to be the student."""
    callback = DistillationCallback(nn.Linear(FEATURES, CLASSES).requires_grad_(False), **KD)
    with torch.no_grad():
        callback.teacher.weight.copy_(torch.eye(CLASSES, FEATURES))
        callback.teacher.bias.zero_()
    return _fitted(place, [callback], made(Itself))


def proposed(place: Place) -> Found:
    """Pairs are proposed on a replayed step, which must leave FSDP2 as it was."""
    callback = AttentionTransferCallback(teacher(), strength=0.1)
    found = _fitted(place, [callback], made(Imaging, reshard=False))
    return {**found, "pairs": [[pair.student, pair.teacher] for pair in callback.settled]}


def twice(place: Place) -> Found:
    return _fitted(place, callbacks_of("DistillationCallback"), made(Twice))


def factors(place: Place, strategy: str = "") -> Found:
    """Helpers have batch norm, whose statistics are those of a rank's batches: compared with DDP."""
    callback = _factors()
    other = {"strategy": DDPStrategy(process_group_backend="gloo")} if strategy else {}
    found = _fitted(place, [callback], made(Imaging), **other)
    return {**found, "errors": callback.reconstruction_errors}


def factors_resumed(place: Place, halves: str = "") -> Found:
    """Two epochs; with a checkpoint between if wanted."""
    settings: dict[str, Any] = {"limit_train_batches": 3, "limit_val_batches": 0}
    path = place.folder / "half.ckpt"
    if halves:
        first = place.trainer(_factors(), **settings)
        first.fit(made(Imaging), place.loader())
        first.save_checkpoint(path)
    module, callback = made(Imaging), _factors()
    trainer = place.trainer(callback, **settings, max_epochs=2)
    trainer.fit(module, place.loader(), ckpt_path=path if halves else None)
    return left(trainer, module, errors=callback.reconstruction_errors)


def _factors() -> FactorTransferCallback:
    return FactorTransferCallback(teacher(), pair=("second", "second"), weight=3.0, pretrain_epochs=2)


def from_checkpoint(place: Place) -> Found:
    """The teacher is a LightningModule that was saved."""
    own = Plain()
    path = place.folder / f"teacher{place.rank}.ckpt"
    torch.save({"state_dict": own.state_dict(), "pytorch-lightning_version": L.__version__}, path)
    callback = DistillationCallback(teacher_from_checkpoint(f"{__name__}.Plain", str(path)), **KD)
    return _fitted(place, [callback], made(Imaging))


class Plain(L.LightningModule):
    """The teacher as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.network = teacher()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _fitted(
    place: Place, callbacks: Sequence[CompressionCallback], module: Any, circumstance: str = "", **settings: Any
) -> Found:
    shapes = Shapes(callbacks[0])
    trainer = place.fit(module, *callbacks, shapes, **{**TRAINER.get(circumstance, NOTHING), **settings})
    return left(
        trainer,
        module,
        effects=[dict(callback.effects) for callback in callbacks],
        shapes=shapes.shapes,
        types=shapes.types,
    )

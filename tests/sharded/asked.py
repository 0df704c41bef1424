"""Manual optimisation in which only the first rank asks for the loss that a callback adds to."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from sharded.circumstances import Manual
from sharded.place import Found, Place, left, made
from sharded.teachers import callbacks_of


class ForNobody(Manual):
    """The others ask for a loss to which no callback adds."""

    def asked(self, loss: Tensor) -> Tensor:
        return self.compressed_loss(loss, callbacks=[])

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 0:
            super().training_step(batch, batch_idx)
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.asked(self.task_loss(batch)))
        self.step(optimizer)


class Never(ForNobody):
    """The others do not ask."""

    def asked(self, loss: Tensor) -> Tensor:
        return loss


class ByThemselves(Never):
    """The others do not ask, and step without an optimizer."""

    def step(self, optimizer: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(0.1 * parameter.grad)


class OfNoOne(Manual):
    """No process asks for a loss to which a callback adds."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch), callbacks=[]))
        optimizer.step()


KINDS: dict[str, type[Manual]] = {"for nobody": ForNobody, "never": Never, "by themselves": ByThemselves}


def fitted(place: Place, kind: str, strategy: str) -> Found:
    """A fit that must fail on all ranks."""
    other = {"strategy": DDPStrategy(process_group_backend="gloo")} if strategy == "ddp" else {}
    module = made(KINDS[kind])
    return left(place.fit(module, *callbacks_of("DistillationCallback"), limit_val_batches=0, **other), module)


def validated(place: Place) -> Found:
    """A fit that must fail too, after a validation that has left parameters gathered."""
    module = made(OfNoOne, reshard=False)
    return left(place.fit(module, *callbacks_of("DistillationCallback"), limit_val_batches=2), module)

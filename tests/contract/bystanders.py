"""What belongs to other people in the fits of the matrix: their callbacks, data and averages kept by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import timer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.base import callbacks_of
from lightning_compress.callbacks.calibrating import CalibratingCallback

from .modules import BATCH, Batches, Classifier, Convolution, loader


class Endless(IterableDataset):
    """The same rows, whose number it does not tell."""

    def __init__(self, rows: int, *, as_dict: bool) -> None:
        self.rows = Batches(rows, as_dict=as_dict)

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[index] for index in range(len(self.rows)))


class Sized(L.LightningDataModule):
    """Batches of a size that a tuner can set."""

    def __init__(self, kind: type[Classifier], rows: int, batch_size: int) -> None:
        super().__init__()
        self.kind, self.rows, self.batch_size = kind, rows, batch_size

    def train_dataloader(self) -> DataLoader:
        return loader(self.kind, rows=self.rows, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader(self.kind, rows=2 * BATCH)


class Leaving(L.Callback):
    """What each process of a fit has at its end, in ``folder/rank<n>.pt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        effects = {type(own).__name__: sum(own.effects.values()) for own in callbacks_of(trainer)}
        torch.save({"weights": pl_module.state_dict(), "effects": effects}, rank_file(self.folder, trainer.global_rank))


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"


class StopAfter(L.Callback):
    """Ends the fit after so many epochs, or after a step in the midst of one."""

    def __init__(self, epochs: int | None = None, *, steps: int | None = None) -> None:
        self.epochs, self.steps = epochs, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.epochs is not None:
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class Clock(L.Callback):
    """Lets Lightning's timer see one second pass with each step, and nothing else."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._time, timer.time = timer.time, SimpleNamespace(monotonic=lambda: float(trainer.global_step))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        timer.time = self._time

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        timer.time = self._time


class CountingEpochs(L.Callback):
    """Logs how many there were."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("epochs", float(trainer.current_epoch + 1))


class Watching(L.Callback):
    """The types in which the first convolution computes."""

    def __init__(self) -> None:
        self.types: list[torch.dtype] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        first = next(part for part in pl_module.modules() if isinstance(part, Convolution))
        self._hook = first.register_forward_hook(lambda part, args, out: self.types.append(out.dtype))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._hook.remove()


@contextmanager
def calibrating_as_rank_zero() -> Iterator[None]:
    """Let one process calibrate on what rank 0 of two sees: every second row of each batch."""

    @contextmanager
    def replayed(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(self, *args, **kwargs) as again:
            whole = again.batches
            again.batches = lambda *epoch: (tree_map(_every_second, arguments) for arguments in whole(*epoch))
            yield again

    original = CalibratingCallback._replayed
    with patch.object(CalibratingCallback, "_replayed", replayed):
        yield


def _every_second(leaf: Any) -> Any:
    return leaf[::2] if isinstance(leaf, Tensor) else leaf


def clip_norm(optimizer: torch.optim.Optimizer, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
    """Written out, not called: all gradients as one vector of length 0.2 at most."""
    gradients = [entry.grad for group in optimizer.param_groups for entry in group["params"] if entry.grad is not None]
    length = torch.stack([entry.norm() for entry in gradients]).norm()
    for entry in gradients:
        entry.mul_((0.2 / (length + 1e-6)).clamp(max=1.0))


def clip_value(optimizer: torch.optim.Optimizer, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
    for group in optimizer.param_groups:
        for entry in group["params"]:
            if entry.grad is not None:
                entry.grad.copy_(entry.grad.clamp(-0.01, 0.01))


class HalfOfTheLast(L.Callback):
    """Halves all gradients of an epoch's last batch: those of what our callbacks train beside the network, too."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_last_batch:
            return
        owned = [own.module for callback in callbacks_of(trainer) for own in callback._owned if own.module is not None]
        for module in (pl_module, *owned):
            for entry in module.parameters():
                if entry.grad is not None:
                    entry.grad.mul_(0.5)


class AverageByHand(L.Callback):
    """An average of the weights, kept with one line of arithmetic; it takes their place at the end.

    Args:
        decay: Of an exponential average of weights and buffers after each step; None: the mean of the weights at the
            start of each epoch.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay, self.count = decay, 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._average_model = copy.deepcopy(pl_module)  # by this name, channels are taken out of it too

    @property
    def average(self) -> nn.Module:
        return self._average_model

    def _pairs(self, pl_module: Any) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = (
            [*module.parameters(), *(module.buffers() if self.decay is not None else ())]
            for module in (self._average_model, pl_module)
        )
        return [(mean.data, now.data) for mean, now in zip(ours, theirs, strict=True)]

    def _move(self, pl_module: Any, share: float) -> None:
        for mean, now in self._pairs(pl_module):
            mean.copy_((1 - share) * mean + share * now)
        self.count += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.decay is not None:
            self._move(pl_module, 1 - self.decay if self.count else 1.0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.decay is None:
            self._move(pl_module, 1 / (self.count + 1))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for mean, now in self._pairs(pl_module):
            now.copy_(mean)


class Evaluations(L.Callback):
    """What each evaluation of the loss gave the optimizer, and the weights at the end of the training."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.losses: list[float] = []
        self.weights: list[Tensor] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(float(loss))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        parameters = [entry for group in optimizer.param_groups for entry in group["params"]]
        self.gradients.append([entry.grad.clone() for entry in parameters])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = [entry.detach().clone() for entry in pl_module.parameters()]

    def replayed(self, weights: list[Tensor], make: Any, steps: int) -> list[Tensor]:
        """The weights after as many steps of another optimizer that is told the same."""
        parameters = [nn.Parameter(entry.clone()) for entry in weights]
        optimizer, told = make(parameters), iter(list(zip(self.losses, self.gradients, strict=True)))

        def closure() -> float:
            loss, gradients = next(told)
            for entry, gradient in zip(parameters, gradients, strict=True):
                entry.grad = gradient.clone()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        assert next(told, None) is None
        return [entry.detach() for entry in parameters]

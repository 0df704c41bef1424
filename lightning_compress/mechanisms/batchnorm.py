"""Batch-norm statistics, estimated again with the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress import _compat
from lightning_compress.mechanisms.isolation import on_device
from lightning_compress.mechanisms.replay import replay
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.step import step_controller

BATCHES = 16
"""More training batches than this change little."""


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep running statistics.

    Args:
        module: The root.

    Returns:
        Name to layer.

    Example:
        >>> list(batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


class FrozenNorms:
    """Batch norm that uses its running statistics in training too, and leaves them as they are.

    Args:
        module: The root.

    Example:
        >>> layers = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
        >>> norms = FrozenNorms(layers)
        >>> norms.freeze(), layers[0].training
        (True, False)
        >>> norms.thaw()
        >>> layers[0].training, layers[1].training
        (True, False)
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = list(batch_norms(module).values())
        self._averages = [layer.momentum is not None for layer in self._layers]
        self._trained: list[nn.Module] = []

    def freeze(self) -> bool:
        """Freeze what trains, also where somebody has called ``train()`` since the last time.

        Returns:
            Whether anything has trained so far.
        """
        for layer, averages in zip(self._layers, self._averages, strict=True):
            if averages and layer.momentum is None:  # somebody estimates the statistics anew, as Lightning's SWA does
                layer.training = layer.training or layer in self._trained
            elif layer.training:
                layer.training = False
                self._trained.append(layer)
        return bool(self._trained)

    @property
    def trains(self) -> bool:
        """Whether there is something to freeze."""
        return any(layer.training for layer in self._layers)

    def thaw(self) -> None:
        """Let train again what did, unless all of it was set to evaluation since."""
        for layer in self._trained:
            layer.training = self._module.training
        self._trained.clear()


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Put the running statistics back at the end.

    Args:
        module: The root.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with statistics_kept(norm):
        ...     norm.running_mean += 1.0
        >>> norm.running_mean
        tensor([0.])
    """
    buffers = [buffer for layer in batch_norms(module).values() for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def reestimate_batchnorm_(trainer: Any, module: Any, *, shared: bool = True) -> list[str]:
    """Estimate the running statistics anew, as the mean over training batches, in place.

    The user's step is replayed on :data:`BATCHES` batches; nothing else in the module changes. Layers that are in
    evaluation mode, because the user froze them, and those that these batches do not reach keep their statistics.

    Args:
        trainer: The Trainer, whose training data is set up.
        module: The LightningModule.
        shared: Whether all processes get what rank 0 has estimated; each keeps its own otherwise.

    Returns:
        The names of the layers that were estimated.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> module.layer = nn.Sequential(nn.Unflatten(1, (1, 32)), nn.BatchNorm1d(1), nn.Flatten(), module.layer)
        >>> class Estimate(L.Callback):
        ...     def on_fit_end(self, trainer, pl_module):
        ...         print(reestimate_batchnorm_(trainer, pl_module))
        >>> L.Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        ...           enable_model_summary=False, callbacks=[Estimate()]).fit(module)
        ['layer.1']
    """
    layers = {name: layer for name, layer in batch_norms(module).items() if layer.training}
    if not layers:
        return []
    with (
        on_device(module, trainer.strategy.root_device),  # at the end of a fit Lightning has moved it to the CPU
        step_controller(module) as controller,
        replay(controller, trainer, trainer.precision_plugin.train_step_context) as again,
        sign(trainer, "Estimating the statistics of batch norm", BATCHES) as step,
    ):
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative mean
        for _, arguments in zip(range(BATCHES), again.batches(trainer.current_epoch), strict=False):
            again.run(arguments)
            step()
        found = {name: _statistics(layer) for name, layer in layers.items() if layer.num_batches_tracked}
    found = trainer.strategy.broadcast(found) if shared else found
    with torch.no_grad():
        for name, (mean, variance) in found.items():
            for buffer, value in (("running_mean", mean), ("running_var", variance)):
                getattr(layers[name], buffer).copy_(value)
    return list(found)


def _statistics(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.running_mean.cpu().clone(), layer.running_var.cpu().clone()


def reestimate_all_(trainer: Any, module: Any, warn: Callable[[str], None]) -> None:
    """As :func:`reestimate_batchnorm_`, also in averages that callbacks keep of the module, as files are written from.

    Where some layers keep the statistics that they have, it is said.

    Args:
        trainer: Likewise.
        module: Likewise.
        warn: Called with what is to be said.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Estimate(L.Callback):
        ...     def on_fit_end(self, trainer, pl_module):
        ...         reestimate_all_(trainer, pl_module, print)  # nothing to say: there is no such layer
        >>> L.Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        ...           enable_model_summary=False, callbacks=[Estimate()]).fit(BoringModel())
    """
    estimated, layers = reestimate_batchnorm_(trainer, module), batch_norms(module)
    for average in _compat.averages_of(trainer, module):
        copies = batch_norms(average)
        for name in estimated:
            for copied, own in zip(copies[name].buffers(), layers[name].buffers(), strict=True):
                copied.copy_(own)
    if rest := [name for name in layers if name not in estimated]:
        what = "leaves some statistics as they were" if estimated else "has no effect"
        warn(
            f"reestimate_batchnorm {what}: {listing(rest)} are in evaluation mode, or the training batches do not "
            "reach them"
        )

"""What callbacks share to validate a network once more, with other values of its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.ranks import found_by_rank_zero, shards
from lightning_compress.export.copying import independent_copy, whole_copy
from lightning_compress.export.errors import ExportError
from lightning_compress.export.evaluate import evaluate_forward
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.sharding import own_part
from lightning_compress.mechanisms.weights import sites_of, weights_replaced

LONG = 60.0  # seconds that this may take without a word
_FAILED = ""  # in the place of a metric: it was not possible


def own_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The user's "val_acc", or "val/acc", becomes "acc", which is logged as "val_acc" of a callback.

    Args:
        metrics: By the user's names.

    Returns:
        By these; where two would have one, as "loss" beside "val_loss", all keep the user's.

    Example:
        >>> own_names({"val_acc": 0.9, "loss": 0.5}), own_names({"val_loss": 0.4, "loss": 0.5})
        ({'acc': 0.9, 'loss': 0.5}, {'val_loss': 0.4, 'loss': 0.5})
    """
    short = [loggable(metric.removeprefix("val_").removeprefix("val/")) for metric in metrics]
    names = short if len({*short}) == len(short) else map(loggable, metrics)
    return dict(zip(names, metrics.values(), strict=True))


def loggable(metric: str) -> str:
    """A metric's name where ``self.log`` takes it once more: it adds the loader's number to names itself."""
    return metric.replace("/dataloader_idx_", "/loader_")


class SecondValidation:
    """The module's own validation once more, on a copy with other weights, on the CPU of rank 0.

    Args:
        what: What is validated, for messages.
        argument: What the user gives to have none of it.
        warn: Called with a message.

    Attributes:
        possible: Whether nothing has gone wrong so far.
    """

    def __init__(self, what: str, argument: str, warn: Callable[[str], None]) -> None:
        self.possible = True
        self._what, self._argument, self._warn = what, argument, warn
        self._copy: nn.Module | None = None
        self._failed = False  # on rank 0
        self._began = 0.0

    def begin(
        self,
        trainer: Any,
        pl_module: nn.Module,
        change: Callable[[str, Tensor], Tensor],
        rows: Callable[[Tensor], Tensor] = own_part,
    ) -> None:
        """Copy the module, as the validation that has just begun sees it, with other values.

        Args:
            trainer: The user's Trainer.
            pl_module: The module; it is as it was afterwards.
            change: From the name of a parameter, and the value of it that is seen, to the value in the copy.
            rows: From a sharded parameter to what is seen of the rows that this process has of it.
        """
        self._began = time.monotonic()
        if shards(trainer):
            self._copy_whole(trainer, pl_module, change, rows)
            return
        if not trainer.is_global_zero:
            return
        sites = sites_of(pl_module)
        weights = {plain_name(name): weight for name, weight in pl_module.named_parameters()}

        def value(name: str, weight: Tensor) -> Tensor:
            site = sites[id(weights[name])][0]
            seen: Tensor = vars(site.module).get(site.attribute, weight)  # masked, where weights are masked
            return change(name, seen.detach())

        with torch.inference_mode(False), weights_replaced(weights, value):
            try:
                self._copy = independent_copy(pl_module)
            except ExportError as error:
                self._give_up(error)

    def _copy_whole(
        self,
        trainer: Any,
        pl_module: nn.Module,
        change: Callable[[str, Tensor], Tensor],
        rows: Callable[[Tensor], Tensor],
    ) -> None:
        """The same where each rank has a part of each parameter: a copy of whole ones, then with other values."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._copy = whole_copy(pl_module, wanted=trainer.is_global_zero, rows=rows)
            except ExportError as error:
                self._give_up(error)
            for name, weight in self._copy.named_parameters() if self._copy is not None else ():
                weight.copy_(change(name, weight.detach().clone()))

    def metrics(self, trainer: Any, pl_module: nn.Module) -> dict[str, float]:
        """Validate the copy; an error in it is a warning, and ends these validations.

        Args:
            trainer: The user's Trainer.
            pl_module: The module.

        Returns:
            The metrics, on every rank; none where it was not possible.
        """
        took = time.monotonic() - self._began

        def measured() -> dict[str, float]:
            return self._measured(trainer, took) | ({_FAILED: 1.0} if self._failed else {})

        found = found_by_rank_zero(trainer, pl_module, measured)
        self.possible = found.pop(_FAILED, None) is None  # on all ranks, or some would wait for those who gave up
        return found

    def _measured(self, trainer: Any, users: float) -> dict[str, float]:
        module, self._copy = self._copy, None
        if module is None:
            return {}
        began = time.monotonic()
        try:
            with torch.inference_mode(False):
                found = evaluate_forward(module, trainer)
        except Exception as error:  # the user's validation may raise anything on another device
            self._give_up(error)
            return {}
        took = time.monotonic() - began
        if took > max(LONG, 2 * users):
            self._warn(f"the validation of {self._what} took {took:.0f} s on the CPU; {self._argument} leaves it out")
        return found

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self._warn(
            f"{self._what} cannot be validated on a copy of the module on the CPU: {type(error).__name__}: {error}; "
            f"{self._argument} says so without a warning"
        )

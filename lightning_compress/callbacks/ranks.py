"""What the processes of a fit do together: no rank leaves before the others are done, or fails alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lightning_compress import _compat
from lightning_compress.export.copying import whole_copy

SHARDING_STRATEGY = "ModelParallelStrategy"
_TOLD = "_lightning_compress_told"
"""Attribute of an exception that all ranks know of."""


def is_of_kind(strategy: Any, *names: str) -> bool:
    """Whether a strategy is of a class of one of these names, or of one that inherits from it: of either package."""
    return any(base.__name__ in names for base in type(strategy).__mro__)


def shards(trainer: Any) -> bool:
    """Whether a Trainer has its parameters sharded by FSDP2."""
    return is_of_kind(trainer.strategy, SHARDING_STRATEGY)


def whole(trainer: Any, pl_module: Any) -> Any:
    """What rank 0 exports and measures: the module, or, where it is sharded, a copy without shards.

    Args:
        trainer: The user's Trainer.
        pl_module: The module; every rank has to call, to give its shards.

    Returns:
        On rank 0 the copy, attached to the Trainer; on the others, and where nothing is sharded, the module itself.

    Raises:
        ExportError: On rank 0, if the module is sharded and cannot be copied.
        RuntimeError: Then on the others.
    """
    if not shards(trainer):
        return pl_module
    copies: list[Any] = []

    def copy(trainer: Any, pl_module: Any) -> None:
        copies.append(whole_copy(pl_module, wanted=trainer.is_global_zero))

    with _compat.patient_group(trainer.world_size) as tell:
        together(tell, copy, trainer, pl_module)
    if copies[0] is None:
        return pl_module
    _compat.attach_trainer_(copies[0], trainer)
    return copies[0]


def averaging(trainer: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What averages a tensor over the processes; None where there is one."""
    return functools.partial(trainer.strategy.reduce, reduce_op="mean") if trainer.world_size > 1 else None


def together(
    tell: Callable[[str | None], str | None], work: Callable[[Any, Any], None], trainer: Any, pl_module: Any
) -> None:
    """Do some work of which rank 0 may do the most, and go on, or fail, with all ranks at once.

    The others wait in a process group of our own, without Lightning's time limit: exporting and validating on one rank
    may take longer. Without this, a failure on one rank would leave the others in their next collective for ever.

    Args:
        tell: From :func:`lightning_compress._compat.patient_group`.
        work: Called with the Trainer and the module, on every rank.
        trainer: The user's Trainer.
        pl_module: The module.

    Raises:
        RuntimeError: On the other ranks, if the work failed on one, which raises its own error.
    """
    try:
        work(trainer, pl_module)
    except BaseException as error:
        if not getattr(error, _TOLD, False):  # by what was done together within
            setattr(error, _TOLD, True)
            tell(f"{type(error).__name__}: {error}")
        raise
    problem = tell(None)
    if problem is not None:
        told = RuntimeError(problem)
        setattr(told, _TOLD, True)
        raise told


def found_by_rank_zero(trainer: Any, pl_module: Any, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What rank 0 measures while the others wait for it; told to all of them.

    Args:
        trainer: The user's Trainer.
        pl_module: The module.
        measure: Called on rank 0 only.

    Returns:
        Its result, on every rank.
    """
    found: dict[str, float] = {}

    def work(trainer: Any, pl_module: Any) -> None:
        found.update(measure() if trainer.is_global_zero else {})

    with _compat.patient_group(trainer.world_size) as tell:
        together(tell, work, trainer, pl_module)
    result: dict[str, float] = trainer.strategy.broadcast(found)
    return result

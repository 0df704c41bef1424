"""The end of a fit: one sequence over all callbacks of this package, whatever their order in the Trainer's list."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_compress import _compat
from lightning_compress.callbacks.ranks import together, whole

if TYPE_CHECKING:
    from lightning_compress.callbacks.base import CompressionCallback

STAGES = ("bake", "estimate_statistics", "calibrate", "export", "evaluate", "report")
WHOLE_STAGES = ("export", "evaluate", "report")
"""Rank 0 works in them, on all of each parameter."""


def run_end_of_fit(callbacks: Sequence[CompressionCallback], trainer: Any, pl_module: Any) -> None:
    """Run every stage for every callback before the next stage; no rank leaves before the others are done.

    Where a file cannot be written, the others still are, and the report: the training was not in vain.

    Args:
        callbacks: Those of this package, in the Trainer's order.
        trainer: The user's Trainer.
        pl_module: The trained module.
    """
    unwritten: list[Exception] = []
    shown = pl_module
    with _compat.patient_group(trainer.world_size) as tell:
        for stage in STAGES:
            if stage == WHOLE_STAGES[0] and any(own.needs_whole for own in callbacks):
                shown = whole(trainer, pl_module)
            for callback in callbacks:
                unwritten += _unwritten(
                    stage, functools.partial(together, tell, getattr(callback, stage)), trainer, shown
                )
    for further in unwritten[1:]:
        warnings.warn(f"one more file was not written: {further}", stacklevel=2)
    if unwritten:
        raise unwritten[0]
    if trainer.is_global_zero and _compat.runs_in_children(trainer):
        for callback in callbacks:
            callback.send_home()


def _unwritten(stage: str, work: Callable[[Any, Any], None], trainer: Any, pl_module: Any) -> list[Exception]:
    """Do the work of a stage; what has kept a file from being written is for later."""
    try:
        work(trainer, pl_module)
    except Exception as error:
        if stage != "export":
            raise
        return [error]
    return []

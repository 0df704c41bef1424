"""Scores of another network: what chooses by the best so far begins anew once the network computes otherwise."""

from __future__ import annotations

from typing import Any

from lightning_compress import _compat


def forget_scores(trainer: Any) -> list[str]:
    """Let checkpoints, early stopping and schedulers that wait for a plateau begin anew; files stay.

    Args:
        trainer: The Trainer.

    Returns:
        The classes of those that had seen a score.

    Example:
        >>> import lightning.pytorch as L
        >>> forget_scores(L.Trainer(logger=False, accelerator="cpu"))
        []
    """
    savers = [_compat.forget_best(own) for own in trainer.callbacks if _compat.keeps_best(own)]
    waiting = [_compat.forget_best_score(own) for own in trainer.callbacks]
    seen = {
        "ModelCheckpoint": any(savers),
        "EarlyStopping": any(waiting),
        "ReduceLROnPlateau": _compat.forget_plateaus(trainer),
    }
    return [kind for kind, had in seen.items() if had]

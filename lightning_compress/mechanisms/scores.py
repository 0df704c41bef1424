"""Scores of another network: what chooses by the best so far begins anew once the network computes otherwise."""

from __future__ import annotations

from typing import Any

from lightning_compress import _compat


def forget_bests(trainer: Any) -> bool:
    """Let each ``ModelCheckpoint`` that keeps the best choose anew; files stay.

    Args:
        trainer: The Trainer.

    Returns:
        Whether one had a best.

    Example:
        >>> import lightning.pytorch as L
        >>> forget_bests(L.Trainer(logger=False, accelerator="cpu"))
        False
    """
    had = [_compat.forget_best(own) for own in trainer.callbacks if _compat.keeps_best(own)]
    return any(had)


def wait_anew(trainer: Any) -> list[str]:
    """Let early stopping, and schedulers that wait for a plateau, begin to wait anew.

    Args:
        trainer: The Trainer.

    Returns:
        The classes of those that had seen a score.

    Example:
        >>> import lightning.pytorch as L
        >>> wait_anew(L.Trainer(logger=False, accelerator="cpu"))
        []
    """
    stopping = [_compat.forget_best_score(own) for own in trainer.callbacks]
    seen = {"EarlyStopping": any(stopping), "ReduceLROnPlateau": _compat.forget_plateaus(trainer)}
    return [kind for kind, had in seen.items() if had]

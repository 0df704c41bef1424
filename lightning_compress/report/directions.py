"""Whether a metric is better when it is higher or lower, which only its name can tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

Mode = Literal["min", "max"]

_SMALLER = {"loss", "error", "err", "perplexity", "ppl", "mae", "mse", "rmse", "mape", "nll", "wer", "cer", "fid"}
_SMALLER |= {"ece", "brier", "bpd", "bpc", "distance", "divergence", "kl", "lpips"}
_LARGER = {"acc", "accuracy", "f1", "auroc", "auc", "precision", "recall", "specificity", "iou", "miou", "jaccard"}
_LARGER |= {"dice", "map", "ap", "mrr", "ndcg", "bleu", "rouge", "psnr", "ssim", "r2", "kappa", "mcc", "score", "top1"}
_LARGER |= {"top5", "agreement", "correlation"}
_ENDINGS: Mapping[str, Mode] = {"loss": "min", "error": "min", "acc": "max", "accuracy": "max"}


def direction(metric: str) -> Mode | None:
    """Whether a metric should be small or large, going by the words in its name.

    Args:
        metric: As it is logged.

    Returns:
        "min", "max", or ``None`` where the name says neither, or both.

    Example:
        >>> direction("val_loss"), direction("val/MulticlassAccuracy"), direction("quality")
        ('min', 'max', None)
    """
    name = metric.partition("/dataloader_idx_")[0]
    words = [*re.split(r"[^A-Za-z0-9]+", name), *re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)]
    found: set[Mode] = set()
    for word in (word.lower() for word in words):
        ending = next((way for end, way in _ENDINGS.items() if word.endswith(end)), None)
        if word in _SMALLER or ending == "min":
            found.add("min")
        elif word in _LARGER or ending == "max":
            found.add("max")
    return found.pop() if len(found) == 1 else None


def preferred(metrics: Iterable[str]) -> str:
    """The metric to judge by where nobody says: what should be large, such as an accuracy, before a loss.

    Args:
        metrics: Names, at least one.

    Returns:
        The first that should be large, else the first that should be small, else the first.

    Example:
        >>> preferred(["quality", "val_loss", "val_acc"]), preferred(["quality", "val_loss"])
        ('val_acc', 'val_loss')
    """
    ranks: Mapping[Mode | None, int] = {"max": 0, "min": 1, None: 2}
    return min(metrics, key=lambda name: ranks[direction(name)])

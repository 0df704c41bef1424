"""What masks do under FSDP2: each scenario also in one process, with whole weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_compress import DPFCallback, PruningCallback
from lightning_compress.callbacks import base
from sharded.place import Classifier, Found, Place, full, left, made

base.UNSUPPORTED_STRATEGIES = ()

EVERY = {"end": 1.0, "update_interval": 1}


def fitted(place: Place, callback: Any, *, module: dict[str, Any] | None = None, **settings: Any) -> Found:
    """A fit, and its masks."""
    network = made(**(module or {}))
    trainer = place.fit(network, callback, **settings)
    return left(trainer, network, masks=full(callback.masks))


def pruning(place: Place) -> Found:
    return fitted(place, PruningCallback(0.9, **EVERY))


def dpf(place: Place) -> Found:
    return fitted(place, DPFCallback(0.9, **EVERY))

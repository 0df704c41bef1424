"""FSDP2 without us: what all else is compared with."""

from __future__ import annotations

from sharded.place import Found, Place, gathers_counted, left, made


def validated(place: Place) -> Found:
    module = made()
    return left(place.fit(module), module)


def resharding(place: Place) -> Found:
    module = made()
    with gathers_counted() as gathers:
        trainer = place.fit(module, limit_val_batches=0)
    return left(trainer, module, gathers=len(gathers))


def keeping(place: Place) -> Found:
    """With whole parameters between forward and backward pass."""
    module = made(reshard=False)
    with gathers_counted() as gathers:
        trainer = place.fit(module, limit_val_batches=0)
    return left(trainer, module, gathers=len(gathers))

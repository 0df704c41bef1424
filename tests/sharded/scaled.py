"""Scaled gradients under FSDP2."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lightning_compress import PSGDCallback
from sharded.circumstances import MODULE, NOTHING, TRAINER, Uncopied
from sharded.place import BATCH, Classifier, Found, Place, full, left, made, rows

SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "granularity='channel'": {"granularity": "channel"},
    "target='zero'": {"target": "zero", "eps": 1e-3},
    "gradient_scale=20": {"gradient_scale": 20.0, "mean_factor": 3.0},
    "edge_bits=8 with 3 bits": {"bits": 3, "edge_bits": 8},
}


class Adaptive(Classifier):
    """Its optimizer would cancel a scale of gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Whole(L.LightningDataModule):
    """Each rank trains on its part, and validates on all."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def train_dataloader(self) -> Any:
        return self.place.loader()

    def val_dataloader(self) -> Any:
        return DataLoader(rows(2 * BATCH), batch_size=BATCH)


def psgd(setting: str = "") -> PSGDCallback:
    return PSGDCallback(**{"bits": 4, "mean_factor": 1.5, **SETTINGS[setting]})


def fitted(place: Place, circumstance: str = "", setting: str = "") -> Found:
    kind = Adaptive if circumstance == "AdamW" else Classifier
    module, callback = made(kind, **MODULE.get(circumstance, NOTHING)), psgd(setting)
    trainer = place.trainer(callback, **TRAINER.get(circumstance, NOTHING))
    trainer.fit(module, datamodule=Whole(place))
    return _left(trainer, module, callback)


THREE: dict[str, Any] = {"limit_train_batches": 3, "limit_val_batches": 0}


def resumed(place: Place, distributed: str = "") -> Found:
    """Three steps, and three more from a checkpoint."""
    first = place.trainer(psgd(), distributed_checkpoint=bool(distributed), **THREE)
    first.fit(made(), place.loader())
    path = place.folder / "three.ckpt"
    first.save_checkpoint(path)
    module, callback = made(seed=2), psgd()
    second = place.trainer(callback, max_epochs=2, **THREE)
    second.fit(module, place.loader(), ckpt_path=path)
    return _left(second, module, callback)


def uninterrupted(place: Place) -> Found:
    module, callback = made(), psgd()
    trainer = place.trainer(callback, max_epochs=2, **THREE)
    trainer.fit(module, place.loader())
    return _left(trainer, module, callback)


def uncopied(place: Place) -> Found:
    """The module cannot be copied, so the first of two validations with rounded weights is the last."""
    module, callback = made(), psgd()
    module.lock = Uncopied()
    trainer = place.trainer(callback, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Whole(place))
    told = [str(own.message) for own in caught if "cannot be validated on a copy" in str(own.message)]
    return {"told": told, "epochs": trainer.current_epoch}


def broken(place: Place) -> Found:
    """A weight is infinite in the rows of one rank."""
    module = made()
    with torch.no_grad():
        module.model.first.weight[0, 0] = torch.inf
    place.fit(module, psgd())
    return {}


def _left(trainer: L.Trainer, module: L.LightningModule, callback: PSGDCallback) -> Found:
    return left(
        trainer,
        module,
        lambda_s=callback.lambda_s,
        first_mean=callback._first_mean,
        grids={name: full(step) for name, (step, _) in callback.grids.items()},
        effects=dict(callback.effects),
        start=dict(callback._start),
        remarks=callback.remarks(),
        picture=None if callback.picture is None else int(callback.picture.sum()),
    )

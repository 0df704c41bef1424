"""What quantisation-aware training of weights does under FSDP2: each scenario also in one process."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import PruningCallback, QATCallback
from sharded.circumstances import MODULE, NOTHING, TRAINER, Imaging, Manual
from sharded.place import BATCH, STEPS, Classifier, Found, Place, full, left, made


def quantising(size: Any, **settings: Any) -> QATCallback:
    return QATCallback(weight_bits=4, activation_bits=None, step_size=size, edge_bits=None, **settings)


def found(trainer: Any, network: Any, own: QATCallback, **more: Any) -> Found:
    """What was left, and the steps of the grids at the end."""
    grids = own.quantization
    steps = {} if grids is None else {name: grid.step for name, grid in grids.weights.items()}
    prints = {} if grids is None else grids.fingerprints
    return left(trainer, network, steps=steps, fingerprints=prints, own_metrics=dict(own.metrics), **more)


def fitted(place: Place, size: str, circumstance: str) -> Found:
    """Six optimizer steps, the first of them in full precision."""
    settings = dict(TRAINER.get(circumstance, NOTHING))
    network, own = made(Imaging, **MODULE.get(circumstance, NOTHING)), quantising(size, start=0.16)
    count = BATCH * STEPS * settings.get("accumulate_grad_batches", 1)
    trainer = place.fit(network, own, count=count, **settings)
    after = place.trainer(own).validate(network, place.loader(2 * BATCH))
    return found(trainer, network, own, after=after[0]["val_loss"])


def saved(place: Place, size: str, kind: str) -> Found:
    """Two epochs, and a fit that is resumed after the first of them."""
    settings = place.two_epochs(kind)
    network, own = made(), quantising(size)
    trainer = place.fit(
        network, own, ModelCheckpoint(dirpath=place.folder, filename="{epoch}", save_top_k=-1), **settings
    )
    again, other = made(seed=9), quantising(size)
    place.fit(again, other, ckpt_path=place.folder / "epoch=0.ckpt", **settings)
    resumed = {name: grid.step for name, grid in other.quantization.weights.items()}
    return found(trainer, network, own, resumed=full(again.state_dict()), resumed_steps=resumed)


class Past(Callback):
    """Runs backward passes past the module, once the step is the first that is rounded."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.precision_plugin.backward = lambda loss, *others: loss.backward()


def refused(place: Place, what: str) -> Found:
    """A fit that must not go on."""
    callbacks = {
        "activations": [QATCallback()],
        "manual": [quantising("mse")],
        "masked": [quantising("mse"), PruningCallback(0.5)],
        "past": [
            PruningCallback(0.5, layers=["model.first"]),
            quantising("mse", layers=["model.second"], start=0.5),
            Past(),
        ],
    }
    network = made(Manual if what == "manual" else Classifier)
    return left(place.fit(network, *callbacks[what]), network)

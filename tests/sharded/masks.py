"""What masks do under FSDP2: each scenario also in one process, with whole weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor

from lightning_compress import DPFCallback, PruningCallback
from sharded.place import BATCH, STEPS, Classifier, Found, Place, full, left, made

EVERY: dict[str, Any] = {"end": 1.0, "update_interval": 1}
CALLBACKS: dict[str, Callable[[], Any]] = {
    "pruning": lambda: PruningCallback(0.9, **EVERY),
    "dpf": lambda: DPFCallback(0.9, **EVERY),
    "linear": lambda: PruningCallback(0.9, schedule="linear", regrow=True, **EVERY),
    "cosine": lambda: PruningCallback(0.9, schedule="cosine", scope="layer", **EVERY),
    "one_shot": lambda: PruningCallback(0.7, schedule="one_shot", start=0.4, scope="erk", end=0.8),
    "iterative": lambda: PruningCallback(0.8, schedule="iterative", rounds=3, end=0.6, rewind="weights"),
    "rates": lambda: PruningCallback(0.8, schedule="iterative", rounds=2, end=0.6, rewind="lr"),
    "taylor": lambda: PruningCallback(0.8, score="taylor", start=0.1, **EVERY),
    "random": lambda: PruningCallback(0.8, score="random", **EVERY),
    "pattern": lambda: PruningCallback(pattern="1:4", **EVERY),
    "keep": lambda: DPFCallback(0.95, dead_filters="keep", freeze_at=0.8, **{**EVERY, "end": 0.5}),
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "resharding": {},
    "keeping": {"module": {"reshard": False}},
    "accumulating": {"accumulate_grad_batches": 3, "count": 3 * BATCH * STEPS},
    "clipping": {"gradient_clip_val": 0.05},
}


class Falling(Classifier):
    """With a learning rate that falls."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fitted(place: Place, callback: str, *, module: dict[str, Any] | None = None, **settings: Any) -> Found:
    """A fit, and its masks."""
    network = made(Falling if callback == "rates" else Classifier, **(module or {}))
    own = CALLBACKS[callback]()
    trainer = place.fit(network, own, **settings)
    return left(trainer, network, masks=full(own.masks), reached=own.reached)


class WeightsAlone(L.Callback):
    """Saves the weights when the first epoch ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=True)


def saved(place: Place, callback: str, distributed: bool) -> Found:
    """Two epochs, and a fit that is resumed after the first of them."""
    settings: dict[str, Any] = {
        "distributed_checkpoint": distributed,
        "enable_checkpointing": True,
        "max_epochs": 2,
        "count": BATCH * STEPS // 2,
    }
    network, own = made(), CALLBACKS[callback]()
    epochs = ModelCheckpoint(dirpath=place.folder, filename="{epoch}", save_top_k=-1)
    trainer = place.fit(network, own, epochs, WeightsAlone(place.folder / "weights.ckpt"), **settings)
    trainer.save_checkpoint(place.folder / "last.ckpt")
    again, other = made(seed=9), CALLBACKS[callback]()
    place.fit(again, other, ckpt_path=place.folder / "epoch=0.ckpt", **settings)
    resumed = {"resumed": full(again.state_dict()), "resumed_masks": full(other.masks)}
    return left(trainer, network, masks=full(own.masks), **resumed)


class ByHand(L.Callback):
    """What one-shot pruning does, by the shards of a layer's weight themselves, put in and out around each step."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.dense: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: own for name, own in pl_module.named_parameters() if own.ndim > 1}
        whole = torch.cat([own.full_tensor().flatten() for own in self.weights.values()]).abs()
        kept = torch.ones_like(whole)
        kept[whole.sort(stable=True).indices[: round(self.sparsity * len(whole))]] = 0
        parts = torch.split(kept, [own.numel() for own in self.weights.values()])
        self.masks = {
            name: distribute_tensor(part.view(own.shape), own.device_mesh, own.placements).to_local()
            for (name, own), part in zip(self.weights.items(), parts, strict=True)
        }

    def put_in(self) -> None:
        for name, own in self.weights.items():
            self.dense[name] = own.to_local().detach().clone()
            own.to_local().detach().mul_(self.masks[name])

    def on_train_batch_start(self, *_: Any) -> None:
        self.put_in()

    def on_before_optimizer_step(self, *_: Any) -> None:
        for name, own in self.weights.items():
            own.to_local().detach().copy_(self.dense[name])
            own.grad.to_local().detach().mul_(self.masks[name])

    def on_train_end(self, *_: Any) -> None:
        self.put_in()


def rounded(place: Place, ours: bool, **settings: Any) -> Found:
    """With bfloat16, by our callback or by hand."""
    own = PruningCallback(0.6, schedule="one_shot", end=0.0) if ours else ByHand(0.6)
    network = made(**settings.pop("module", {}))
    return left(place.fit(network, own, limit_val_batches=0, **settings), network)


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ROUNDED: dict[str, dict[str, Any]] = {
    "policy": {"module": {"policy": POLICY}},
    "kept_policy": {"module": {"policy": POLICY, "reshard": False}},
    "mixed": {"precision": "bf16-mixed"},
    "true": {"precision": "bf16-true"},
}

SCENARIOS = {
    **{
        f"{callback}_{condition}": partial(fitted, callback=callback, **settings)
        for callback in CALLBACKS
        for condition, settings in CONDITIONS.items()
    },
    **{
        f"{callback}_{kind}": partial(saved, callback=callback, distributed=kind == "sharded")
        for callback in CALLBACKS
        for kind in ("full", "sharded")
    },
}
SCENARIOS |= {f"{kind}_ours": partial(rounded, ours=True, **settings) for kind, settings in ROUNDED.items()}
SCENARIOS |= {f"{kind}_by_hand": partial(rounded, ours=False, **settings) for kind, settings in ROUNDED.items()}
globals().update(SCENARIOS)

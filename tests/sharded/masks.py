"""What masks do under FSDP2: each scenario also in one process, with whole weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_compress import DCILCallback, DPFCallback, PruningCallback
from sharded.circumstances import IMAGE, MODULE, NOTHING, TRAINER, Manual
from sharded.place import BATCH, CLASSES, FEATURES, STEPS, Classifier, Found, Place, full, left, made
from sharded.quantised import quantising

EVERY: dict[str, Any] = {"end": 1.0, "update_interval": 1}
CALLBACKS: dict[str, Callable[[], Any]] = {
    "pruning": lambda: PruningCallback(0.9, **EVERY),
    "dpf": lambda: DPFCallback(0.9, **EVERY),
    "linear": lambda: PruningCallback(0.9, schedule="linear", regrow=True, **EVERY),
    "cosine": lambda: PruningCallback(0.9, schedule="cosine", scope="layer", **EVERY),
    "one_shot": lambda: PruningCallback(0.7, schedule="one_shot", start=0.4, scope="erk"),
    "iterative": lambda: PruningCallback(0.8, schedule="iterative", rounds=3, end=0.6, rewind="weights"),
    "rates": lambda: PruningCallback(0.8, schedule="iterative", rounds=2, end=0.6, rewind="lr"),
    "taylor": lambda: PruningCallback(0.8, score="taylor", start=0.1, **EVERY),
    "random": lambda: PruningCallback(0.8, score="random", **EVERY),
    "pattern": lambda: PruningCallback(pattern="1:4", **EVERY),
    "dcil": lambda: DCILCallback(0.9, dense_path="shared", kl_start=0.0, **EVERY),
    "dcil apart": lambda: DCILCallback(0.9, dense_path="shared", kl_start=1.0, **EVERY),
    "dcil own": lambda: DCILCallback(0.9, dense_path="own", kl_start=0.3, **EVERY),
    "dcil own norms": lambda: DCILCallback(0.9, dense_path="own_norm", kl_start=1.0, **EVERY),
    "keep": lambda: DPFCallback(0.95, dead_filters="keep", freeze_at=0.8, **{**EVERY, "end": 0.5}),
}


class Falling(Classifier):
    """With a learning rate that falls."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Normed(Classifier):
    """Convolutions with norms between them."""

    def build(self) -> None:
        self.model = nn.Sequential(
            nn.Unflatten(1, IMAGE),
            nn.Conv2d(1, 15, 3, padding=1),
            nn.GroupNorm(3, 15),
            nn.Tanh(),
            nn.Conv2d(15, 15, 3, padding=1),
            nn.GroupNorm(5, 15),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(15 * FEATURES, CLASSES),
        )

    def units(self) -> Sequence[nn.Module]:
        return [*(part for part in self.model if next(part.parameters(), None) is not None), self.model]


KINDS = {"rates": Falling, **dict.fromkeys(("dcil", "dcil apart", "dcil own", "dcil own norms"), Normed)}


def fitted(place: Place, callback: str, circumstance: str) -> Found:
    """A fit of six optimizer steps, and its masks."""
    settings = dict(TRAINER.get(circumstance, NOTHING))
    network = made(KINDS.get(callback, Classifier), **MODULE.get(circumstance, NOTHING))
    own = CALLBACKS[callback]()
    count = BATCH * STEPS * settings.get("accumulate_grad_batches", 1)
    trainer = place.fit(network, own, count=count, **settings)
    return left(trainer, network, masks=full(own.masks), reached=own.reached)


class WeightsAlone(L.Callback):
    """Saves the weights when the first epoch ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=True)


def saved(place: Place, callback: str, kind: str) -> Found:
    """Two epochs, and a fit that is resumed after the first of them; checkpoints of a kind, "full" or "sharded"."""
    settings = place.two_epochs(kind)
    kind = KINDS.get(callback, Classifier)
    network, own = made(kind), CALLBACKS[callback]()
    epochs = ModelCheckpoint(dirpath=place.folder, filename="{epoch}", save_top_k=-1)
    trainer = place.fit(network, own, epochs, WeightsAlone(place.folder / "weights.ckpt"), **settings)
    trainer.save_checkpoint(place.folder / "last.ckpt")
    again, other = resumed(place, callback, place.folder / "epoch=0.ckpt", **settings)
    found = {"resumed": full(again.state_dict()), "resumed_masks": full(other.masks)}
    return left(trainer, network, masks=full(own.masks), **found)


class Mixed(Classifier):
    """Attention, whose output layer never runs as a module, and a weight that two layers share; one unit."""

    def build(self) -> None:
        self.model = nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(4, 2, batch_first=True),
                "first": nn.Linear(FEATURES, FEATURES),
                "second": nn.Linear(FEATURES, FEATURES),
                "last": nn.Linear(FEATURES, CLASSES),
            }
        )
        self.model["second"].weight = self.model["first"].weight

    def units(self) -> Sequence[nn.Module]:
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        x = self.model["second"](torch.tanh(self.model["first"](x)))
        steps = x.unflatten(1, (2, 4))
        return self.model["last"](self.model["attention"](steps, steps, steps)[0].flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class Checkpointed(Classifier):
    """Runs its layers once more in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.model.children()
        body = lambda x: torch.tanh(second(torch.tanh(first(x))))  # noqa: E731
        return last(checkpoint(body, x, use_reentrant=False))

    def units(self) -> Sequence[nn.Module]:
        return [self]


class Penalised(Classifier):
    """Its steps, those of a validation too, read weights themselves."""

    def task_loss(self, batch: Any) -> Tensor:
        weights: Any = [
            own for name, own in self.named_parameters() if name.endswith(("first.weight", "second.weight"))
        ]
        whole = [own.full_tensor() if isinstance(own, DTensor) else own for own in weights]
        return super().task_loss(batch) + 0.01 * sum(own.square().sum() for own in whole)


NETWORKS: dict[str, type[Classifier]] = {
    "plain": Classifier,
    "mixed": Mixed,
    "checkpointed": Checkpointed,
    "penalised": Penalised,
}


class Reading(L.Callback):
    """Keeps the gradients that it sees in two hooks of each step."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def read(self, hook: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        count = sum(key.startswith(hook) for key in self.seen)
        gradients = [own.grad for own in pl_module.parameters() if own.grad is not None]
        self.seen[f"{hook} {count}"] = torch.cat([full(own).flatten() for own in gradients])

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.read("on_after_backward", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.read("on_before_optimizer_step", trainer, pl_module)


def read(place: Place, callback: str, circumstance: str) -> Found:
    """A callback that stands before ours in the list reads gradients, which accumulate over two batches."""
    kind = Penalised if circumstance == "a penalty" else KINDS.get(callback, Classifier)
    network = made(kind, **MODULE.get(circumstance, NOTHING))
    reading, own = Reading(), CALLBACKS[callback]() if callback in CALLBACKS else quantising("learned")
    trainer = place.fit(network, reading, own, accumulate_grad_batches=2)
    return left(trainer, network, seen=reading.seen)


class Thawing(L.Callback):
    """Lets the first layer learn from the third step on."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.first.requires_grad_(False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            pl_module.model.first.requires_grad_(True)


def thawed(place: Place, callback: str, circumstance: str) -> Found:
    """With a penalty on weights of which one is frozen when the fit begins."""
    network, own = made(Penalised, **MODULE.get(circumstance, NOTHING)), CALLBACKS[callback]()
    trainer = place.fit(network, Thawing(), own, limit_val_batches=0)
    return left(trainer, network, masks=full(own.masks))


def on(place: Place, network: str, callback: str) -> Found:
    """Six steps on a network of another kind, of which the LightningModule is the outermost unit."""
    module = made(NETWORKS[network])
    layers = {"layers": ["model"], "exclude": ["model.last"], **EVERY}
    own = {
        "pruning": lambda: PruningCallback(0.7, **layers),
        "dpf": lambda: DPFCallback(0.7, **layers),
        "dcil": lambda: DCILCallback(0.7, dense_path="shared", kl_start=1.0, **layers),
    }[callback]()
    trainer = place.fit(module, own)
    return left(trainer, module, masks=full(own.masks))


def resumed(place: Place, callback: str, path: Path, **settings: Any) -> tuple[Classifier, Any]:
    """Another module and another callback after a fit that goes on from a file."""
    again, other = made(KINDS.get(callback, Classifier), seed=9), CALLBACKS[callback]()
    place.fit(again, other, ckpt_path=path, **settings)
    return again, other


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


def rounded(place: Place, kind: str, whose: str) -> Found:
    """With bfloat16, by our callback or by hand."""
    settings = dict(ROUNDED[kind])
    own = PruningCallback(0.6, schedule="one_shot", end=0.0) if whose == "ours" else ByHand(0.6)
    network = made(**settings.pop("module", {}))
    return left(place.fit(network, own, limit_val_batches=0, **settings), network)


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ROUNDED: dict[str, dict[str, Any]] = {
    "bf16 policy": {"module": {"policy": POLICY}},
    "bf16 policy, parameters kept": {"module": {"policy": POLICY, "reshard": False}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


class Acting(L.Callback):
    """Does something to the module after the second step, and counts what was gathered of each weight."""

    def __init__(self, own: Any, act: Callable[[Any], Any]) -> None:
        self.own, self.act = own, act
        self.gathers: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            self.act(pl_module)
        weights = self.own._controller.weights.sharded.weights
        self.gathers = {name: weight.gathers for name, weight in weights.items()}


def interrupt(module: Any) -> None:
    raise KeyError("interrupted")


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda module: None,
    "assigned": lambda module: module.load_state_dict(module.state_dict(), assign=True),
    "loaded": lambda module: module.load_state_dict(module.state_dict()),
    "cast": lambda module: module.double(),
    "moved": lambda module: module.to("cpu"),
    "interrupted": interrupt,
    "evaluated": lambda module: module.model(torch.ones(2, 8)),
}


def acted(place: Place, action: str, circumstance: str) -> Found:
    """A fit in which somebody acts between two steps; what it raised is told."""
    network, own = made(**MODULE.get(circumstance, NOTHING)), CALLBACKS["dpf"]()
    acting, error = Acting(own, ACTIONS[action]), None
    trainer = place.trainer(own, acting, limit_val_batches=0)
    try:
        trainer.fit(network, place.loader())
    except (KeyError, RuntimeError, AttributeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    left_on = [
        name
        for name, part in network.named_parameters()
        for held in [getattr(part, "_local_tensor", part)]
        if vars(held)
    ]
    return left(trainer, network, raised=error, gathers=acting.gathers, left_on=left_on)


def twice(place: Place, circumstance: str) -> Found:
    """A plain fit, then two with the same callback, and a plain one after its validation."""
    network, own = made(**MODULE.get(circumstance, NOTHING)), CALLBACKS["pruning"]()
    place.fit(network)
    place.fit(network, own)
    masks = full(own.masks)
    place.fit(network, own)
    validated = place.trainer(own).validate(network, place.loader(2 * BATCH))
    trainer = place.fit(network)
    return left(trainer, network, masks=masks, validated=validated[0]["val_loss"])


class Whole(Classifier):
    """Does not shard its last layer."""

    def units(self) -> Sequence[nn.Module]:
        return [self.model.first, self.model.second]


class Offloading(Classifier):
    def configure_model(self) -> None:
        for unit in self.units():
            fully_shard(unit, mesh=self.device_mesh["data_parallel"], offload_policy=CPUOffloadPolicy(pin_memory=False))


class Transposed(Classifier):
    def build(self) -> None:
        self.model = nn.Sequential(nn.ConvTranspose1d(8, 4, 1), nn.Flatten(), nn.Linear(4, 5))


def refused(place: Place, what: str) -> Found:
    """A fit that must not begin."""
    kinds: dict[str, type[Classifier]] = {
        "whole": Whole,
        "offloaded": Offloading,
        "manual": Manual,
        "transposed": Transposed,
        "transposed_pattern": Transposed,
    }
    callbacks: dict[str, Callable[[], Any]] = {
        "reestimated": lambda: PruningCallback(0.5, reestimate_batchnorm=True),
        "validated": lambda: DPFCallback(0.5, reestimated_validation=True),
        "transposed_pattern": lambda: PruningCallback(pattern="1:2"),
    }
    network = made(kinds.get(what, Classifier))
    return left(place.fit(network, callbacks.get(what, CALLBACKS["dpf"])()), network)

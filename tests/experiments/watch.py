"""What is measured of masks while they change: held-out accuracy, with statistics as they are and re-estimated."""

from __future__ import annotations

import copy
import itertools
import statistics
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from .data import BATCH, Images, Split
from .plan import MASKS_FINAL

RECALIBRATION = 16  # training batches
LOOKS = 4  # an epoch, in the last third of the training; before it one. Steadiness is of those after the schedule


class Watch(Callback):
    """Looks at a copy of the network with its masks applied, on held-out training images; comes after the technique."""

    def __init__(self, data: Split, techniques: list[Callback]):
        self.data = data
        self.technique: Any = next((own for own in techniques if hasattr(own, "masks")), None)
        self.curve: list[tuple[int, float, float]] = []
        self.churn: list[tuple[int, float]] = []
        self.masks: dict[str, Tensor] = {}
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = int(trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step, an_epoch = trainer.global_step, trainer.num_training_batches
        if self.technique is not None and step % self.technique.update_interval == 0:
            masks, self.masks = self.masks, self.technique.masks
            changed = any(not torch.equal(mask, self.masks[name]) for name, mask in masks.items())
            churn = float(trainer.callback_metrics.get(f"compress/{self.technique.name}/churn", 0.0))
            self.churn.append((step, churn if changed or not masks else 0.0))  # what was logged stands for a while
        if step % (an_epoch // LOOKS if step >= self.steps * 2 / 3 else an_epoch) == 0:
            network = copy.deepcopy(pl_module.network)
            masks = {} if self.technique is None else self.technique.masks
            for name, mask in masks.items():
                network.get_parameter(name.removeprefix("network.")).data.mul_(mask)
            held_out, labels = self.data.held_out, self.data.held_out[1]
            now = share(predictions(network, held_out), labels)
            again = share(predictions(reestimated(network, self.data.train), held_out), labels)
            self.curve.append((step, now, again))

    def found(self, network: nn.Module) -> dict[str, Any]:
        """What the whole run showed, and the test accuracy of the final network with re-estimated statistics."""
        late = [entry for entry in self.curve if entry[0] >= self.steps * MASKS_FINAL]
        again = predictions(reestimated(copy.deepcopy(network), self.data.train), self.data.test)
        masks = {} if self.technique is None else self.technique.masks
        churn = [value for step, value in self.churn if step >= self.steps * MASKS_FINAL]
        return {
            "curve": self.curve,
            "churn_curve": self.churn,
            "swing": swing([entry[1] for entry in late]),
            "swing_reestimated": swing([entry[2] for entry in late]),
            "test_accuracy_reestimated": share(again, self.data.test[1]),
            "churn": statistics.mean(churn) if churn else 0.0,
            "dead_filters": sum(int((~mask.flatten(1).any(dim=1)).sum()) for mask in masks.values()),
            "zeros": sum(int((~mask).sum()) for mask in masks.values()),
        }


def swing(accuracies: list[float]) -> float:
    """The standard deviation of the differences between successive accuracies."""
    return statistics.pstdev(after - before for before, after in itertools.pairwise(accuracies))


def reestimated(network: nn.Module, images: Images) -> nn.Module:
    """The network with batch-norm statistics of the first training batches, in place."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        for batch in images[0][: RECALIBRATION * BATCH].split(BATCH):
            network(batch)
    return network


@torch.no_grad()
def predictions(network: nn.Module, images: Images) -> Tensor:
    network.eval()
    return torch.cat([network(part).argmax(dim=1) for part in images[0].split(500)])


def share(one: Tensor, other: Tensor) -> float:
    return float((one == other).float().mean())

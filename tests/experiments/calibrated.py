"""What post-training quantisation makes of a trained network, through `PTQCallback` as users have it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import PTQCallback

from .data import Batches, Images, fashion_mnist
from .plan import Calibrated
from .rounded import network_of
from .training import Classifier

SAMPLES = 512  # of the training images, to calibrate with


class Counting(Classifier):
    """Counts the images that a network names rightly; it is calibrated on training batches."""

    def __init__(self, network: nn.Module, batches: Batches):
        super().__init__(width=1, rate=0.0)
        self.network, self.batches = network, batches
        self.right = self.looked_at = 0

    def train_dataloader(self) -> DataLoader:
        return self.batches.loader()

    def test_step(self, batch: Images, batch_idx: int) -> None:
        images, labels = batch
        self.right += int((self.network(images).argmax(dim=1) == labels).sum())
        self.looked_at += len(labels)


def measure(quantised: Calibrated, folder: Path) -> dict[str, Any]:
    """Quantise the network of a run that is there, and look at it with the test images once."""
    data, run, network = fashion_mnist(), quantised.run, network_of(quantised.run, folder)
    cpu = time.process_time()
    ptq = PTQCallback(
        weight_bits=quantised.weight_bits,
        activation_bits=quantised.activation_bits,
        max_samples=SAMPLES,
        **quantised.option.arguments,
    )
    torch.manual_seed(run.seed)
    module = counted(ptq, network, Batches(data.train, seed=run.seed), data.test)
    return {
        "test_accuracy": module.right / module.looked_at,
        "images": module.looked_at,
        "cpu_seconds": time.process_time() - cpu,
        "configuration": quantised.configuration(),
    }


def counted(ptq: PTQCallback, network: nn.Module, batches: Batches, images: Images, **limits: int) -> Counting:
    """Calibrate a network on training batches, and count the images that the quantised one names rightly."""
    module = Counting(network, batches)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[ptq],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )
    trainer.test(module, DataLoader(TensorDataset(*images), batch_size=500), verbose=False)
    return module

"""Small networks, modules and fits for the tests of structured pruning; importable, so that other processes can."""

from __future__ import annotations

import logging

import lightning.pytorch as L
import torch
from contract.modules import StatefulLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

BATCH, EPOCH = 8, 8


class Net(nn.Module):
    """Convolution, norm, convolution, norm, and a linear layer behind a flattening."""

    def __init__(self, first=16, second=24, classes=3, *, norm=True, dropout=0.0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, first, 3, padding=1), nn.BatchNorm2d(first) if norm else nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3), nn.BatchNorm2d(second) if norm else nn.Identity()
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(second * 4, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.dropout(F.relu(self.bn2(self.conv2(x))).flatten(1)))


def rows():
    """Images and labels of one epoch."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(EPOCH * BATCH, 2, 4, 4, generator=generator)
    return inputs, torch.randint(0, 3, (EPOCH * BATCH,), generator=generator)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Lit(L.LightningModule):
    """A classifier around any network."""

    def __init__(self, optimizer="sgd", *, net=None, **settings):
        super().__init__()
        torch.manual_seed(3)
        self.build(Net(**settings) if net is None else net)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
        self.optimizer = optimizer

    def build(self, net):
        self.net = net

    def logits(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.logits(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return StatefulLoader(TensorDataset(*rows()), batch_size=BATCH)

    def val_dataloader(self):
        return DataLoader(Subset(TensorDataset(*rows()), range(16)), batch_size=BATCH)


class Half(L.LightningDataModule):
    """Each rank's half of each batch."""

    def train_dataloader(self):
        mine = range(self.trainer.global_rank, EPOCH * BATCH, self.trainer.world_size)
        return DataLoader(Subset(TensorDataset(*rows()), mine), batch_size=BATCH // self.trainer.world_size)

    val_dataloader = train_dataloader


def fitted(module, *callbacks, steps=EPOCH, ckpt_path=None, weights_only=None, **settings):
    """Train for so many batches, without a sound, and give the Trainer back."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any("Checkpoint" in type(own).__name__ for own in callbacks)
    trainer = L.Trainer(
        max_epochs=steps // EPOCH,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=saves,
        num_sanity_val_steps=0,
        **quiet,
        **settings,
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer

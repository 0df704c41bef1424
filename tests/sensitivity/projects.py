"""A small project, as `load_project` gives it, whose layers matter in known ways; and its checkpoint."""

from __future__ import annotations

import argparse

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.cli import _parser
from lightning_compress.commands.project import Project

ROWS, FEATURES, CLASSES = 24, 6, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * FEATURES, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x.reshape(-1, 1, 2, FEATURES // 2))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = Net()
        self.calls, self.failing = 0, None

    def validation_step(self, batch, batch_idx):
        if self.failing is not None:
            self.failing()
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    """Its targets are what the plain network says, so that a change can only be worse."""

    setups = []  # of the class: what is written into the instance is undone

    def setup(self, stage=None):
        self.setups.append(stage)
        x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            self.rows = TensorDataset(x, Lit().eval().net(x).argmax(1))

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=8)


def trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{"enable_checkpointing": False, "max_epochs": 1, **quiet, **settings})


def project(module=None, **settings):
    return Project(module or Lit(), Data(), trainer(**settings))


def checkpoint(path, module=None):
    module = module or Lit()
    torch.save({"state_dict": module.state_dict(), "epoch": 2, "pytorch-lightning_version": "2.6.0"}, path)
    return path


def options(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args(["sensitivity", *map(str, arguments)])

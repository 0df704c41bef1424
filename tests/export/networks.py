"""Small networks and LightningModules that the export tests share."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from importlib import import_module

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]
CLASSES, FEATURES = 3, 6


def dataset(rows: int = 20, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


def loader(rows: int = 20, batch_size: int = 6) -> DataLoader:
    return DataLoader(dataset(rows), batch_size=batch_size)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


class KeywordNet(nn.Module):
    """Takes keyword arguments only and gives a dict, one entry of which is None."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, *, features: Tensor, scale: float = 1.0):
        return {"logits": self.body(features) * scale, "nothing": None}


def lightning_module(namespace: str, kind: str = "child") -> nn.Module:
    """A classifier whose network is itself, ``self.model``, or ``self.model`` called with keywords."""
    base = import_module(namespace).LightningModule

    class Classifier(base):
        def __init__(self):
            super().__init__()
            self.model = {"itself": mlp, "child": mlp, "keywords": KeywordNet, "layers": mlp}[kind]()
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)
            self.val_confusion = torchmetrics.MeanMetric()

        def forward(self, x):
            return self.model(x)

        def logits(self, x):
            if kind == "itself":
                return self(x)
            if kind == "keywords":
                return self.model(features=x)["logits"]
            if kind == "layers":
                for layer in self.model:
                    x = layer(x)
                return x
            return self.model(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            logits = self.logits(batch[0])
            self.accuracy(logits, batch[1])
            self.val_confusion(logits.max(dim=1).values)
            self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("val_acc", self.accuracy)
            self.log("val_max", self.val_confusion, on_epoch=True, sync_dist=True)
            self.log("val_epoch", float(self.current_epoch))
            self.log("val_step", float(self.global_step))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def datamodule(namespace: str) -> object:
    base = import_module(namespace).LightningDataModule

    class Data(base):
        def __init__(self):
            super().__init__()
            self.history = []

        def prepare_data(self):
            self.prepared = True

        def setup(self, stage):
            self.history = [*self.history, stage]
            self.rows = dataset()

        def train_dataloader(self):
            return DataLoader(self.rows, batch_size=5)

        def val_dataloader(self):
            return DataLoader(self.rows, batch_size=6)

        def teardown(self, stage):
            self.rows = None

    return Data()


def trainer(namespace: str, **settings):
    return import_module(namespace).Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        }
    )


class Conv(nn.Module):
    """An untidy network: batch norm, dropout, a non-leaf attribute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, CLASSES)
        self.last = self.conv.weight.sum()

    def forward(self, x):
        hidden = self.norm(self.conv(x)).relu()
        return self.head(self.drop(hidden).mean(dim=(2, 3)))


class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, batch):
        return {"total": self.left(batch["u"]) + self.right(batch["deep"]["v"]), "u": batch["u"] * 2}


Pair = namedtuple("Pair", ["first", "second"])


@dataclass(frozen=True)
class Prediction:
    logits: Tensor
    embedding: Tensor
    note: str = "plain"


class Structured(nn.Module):
    """One linear layer whose output comes in a structure of choice."""

    def __init__(self, kind: str):
        super().__init__()
        self.layer, self.kind = nn.Linear(FEATURES, CLASSES), kind

    def forward(self, x):
        y = self.layer(x)
        return {
            "tuple": (y, x.sum(dim=1)),
            "list": [y, (x, y + 1)],
            "namedtuple": Pair(y, x.sum(dim=1)),
            "dataclass": Prediction(y, x * 2),
            "twice": (y, y),
        }[self.kind]


class Branch(nn.Module):
    """Branches on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        if x.sum() > 0:  # the branch
            return self.layer(x)
        return x[:, :CLASSES]


class ShapeBranch(nn.Module):
    """Branches on the batch size: the same shape (``values``) or another one."""

    def __init__(self, values: bool):
        super().__init__()
        self.layer, self.values = nn.Linear(FEATURES, CLASSES), values

    def forward(self, x):
        y = self.layer(x)
        if x.shape[0] > 4:
            return y + 1 if self.values else torch.cat([y, y], dim=1)
        return y

"""Training scripts that know nothing of this package, for the tests that attach something to them from outside."""

from __future__ import annotations

import re
import sys
from types import ModuleType

HEAD = """
import torch
from torch import nn
import {package} as L
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Sequential):
    def __init__(self, hidden=16):
        super().__init__(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))

class Lit(L.LightningModule):
    rounds = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        Lit.rounds += 1
        self.log("val_round", float(Lit.rounds))  # another value each time, so that no file can agree with it

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Other(Lit):
    pass

def loader():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 8, generator=generator), torch.arange(32) % 3)
    return DataLoader(data, batch_size=8)

def trainer(**arguments):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return L.Trainer(**{{"max_epochs": 1, "enable_checkpointing": False, **quiet, **arguments}})
"""


def script(body: str, *, package: str = "lightning.pytorch", guarded: bool = False) -> str:
    """The text of a script: networks, data, a Trainer, and then the body."""
    lines = [f"    {line}" for line in body.splitlines()]
    tail = "\n".join(["if __name__ == '__main__':", *lines]) if guarded else body
    return f"{HEAD.format(package=package)}\n{tail}\n"


def definitions(package: str) -> ModuleType:
    """What such a script defines, as a module of this process."""
    name = f"untouched_{package.replace('.', '_')}"
    if name not in sys.modules:
        module = ModuleType(name)
        exec(HEAD.format(package=package), vars(module))
        sys.modules[name] = module
    return sys.modules[name]


def of_paths(said: str) -> str:
    """A message as the newest jsonargparse leaves it to us; before 4.52 it names the callback, or asks for "a text"."""
    earlier = r"\S+ \(\w+\): path must be a (?:text|text or null|string or a path),"
    return re.sub(earlier, "path must be a string or a path,", said)

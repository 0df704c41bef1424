"""A small LightningCLI project on disk, of either package, for the tests of the commands that read its config."""

from __future__ import annotations

import textwrap

import yaml

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")

SOURCE = """
    import {namespace} as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset


    class Net(nn.Sequential):
        def __init__(self, width: int = 8):
            super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


    class LitNet(L.LightningModule):
        def __init__(self, width: int = 8, fail: bool = False):
            super().__init__()
            self.save_hyperparameters()
            self.model = Net(width)
            self.fail = fail

        def forward(self, images):
            return self.model(images)

        def training_step(self, batch, batch_idx):
            if self.fail:
                raise ZeroDivisionError("of the user's own")
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.model(batch[0]).argmax(1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)


    class Other(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)


    class Data(L.LightningDataModule):
        def __init__(self, batch_size: int = 32):
            super().__init__()
            self.batch_size = batch_size

        def setup(self, stage=None):
            from sklearn.datasets import load_digits

            images, labels = load_digits(n_class=10, return_X_y=True)
            self.data = TensorDataset(torch.tensor(images[:256], dtype=torch.float32) / 16, torch.tensor(labels[:256]))

        def train_dataloader(self):
            return DataLoader(self.data, batch_size=self.batch_size)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Project:
    """The project in a folder, as a module of its own name."""

    def __init__(self, folder, namespace="lightning.pytorch"):
        self.folder = folder
        self.name = f"digits_{namespace.partition('.')[0]}_{folder.name}".replace("-", "_")
        self.write(f"{self.name}.py", textwrap.dedent(SOURCE).format(namespace=namespace))
        self.base = self.yaml("base.yaml", self.config())

    def config(self, callbacks=(), **model):
        return {
            "seed_everything": 1,
            "trainer": {**TRAINER, "default_root_dir": str(self.folder / "out"), "callbacks": list(callbacks)},
            "model": {"class_path": f"{self.name}.LitNet", "init_args": model},
            "data": {"class_path": f"{self.name}.Data"},
        }

    def write(self, name, text):
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def yaml(self, name, content):
        return self.write(name, yaml.safe_dump(content, sort_keys=False))


def callback(name, /, **init_args):
    return {"class_path": name, "init_args": init_args}

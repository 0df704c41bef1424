"""A LightningCLI project."""

import lightning.pytorch as L
import torch
from digits import ConvNet, loaders
from lightning.pytorch.cli import LightningCLI
from torch import nn


class LitDigits(L.LightningModule):
    def __init__(self, width: int = 4, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.model = ConvNet(width)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loaders(self.batch_size)[0]

    def val_dataloader(self):
        return loaders(self.batch_size)[1]


if __name__ == "__main__":
    LightningCLI(LitDigits, Digits, save_config_callback=None)

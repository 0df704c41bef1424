"""A package that is started with ``python -m``, and that imports pytorch_lightning."""

import sys

import pytorch_lightning as L
import torch
from digits import ConvNet, loaders
from torch import nn


class LitDigits(L.LightningModule):
    def __init__(self, width: int = 16, lr: float = 0.1):
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


def main(start="", save=""):
    L.seed_everything(1)
    module = LitDigits(lr=0.03 if start else 0.1)
    if start:
        module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
    trainer = L.Trainer(max_epochs=15, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, *loaders())
    if save:
        trainer.save_checkpoint(save)


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))

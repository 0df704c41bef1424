"""A project that Hydra configures, and that works in a directory which Hydra makes for each run."""

from pathlib import Path

import hydra
import lightning.pytorch as L
import torch
from digits import loaders
from torch import nn


class LitDigits(L.LightningModule):
    def __init__(self, network, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.model = network

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


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    L.seed_everything(config.seed)
    module = LitDigits(hydra.utils.instantiate(config.network), config.lr)
    if config.start_from:
        start = Path(hydra.utils.get_original_cwd()) / config.start_from
        module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
    trainer = L.Trainer(**config.trainer)
    trainer.fit(module, *loaders(config.batch_size))
    trainer.save_checkpoint("last.ckpt")


if __name__ == "__main__":
    main()

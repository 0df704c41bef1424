"""A plain script, without any guard, around a LightningModule that pip has installed."""

import argparse

import torch
from digits import ConvNet, loaders
from lightning.pytorch import Trainer, seed_everything
from torch_uncertainty.routines import ClassificationRoutine

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=4)
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--save")
options = parser.parse_args()

seed_everything(1)
network = ConvNet(options.width)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
module = ClassificationRoutine(
    model=network,
    num_classes=10,
    loss=torch.nn.CrossEntropyLoss(),
    optim_recipe={"optimizer": optimizer, "lr_scheduler": scheduler},
)
trainer = Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, *loaders())
if options.save:
    trainer.save_checkpoint(options.save)

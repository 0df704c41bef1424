"""DPFCallback and DCILCallback against loops by hand after their papers, with a backward pass for each network."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as L
import pytest
import torch
from contract.modules import BATCH, STEPS, trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DCILCallback, DPFCallback
from lightning_compress.functional import cubic_schedule, magnitude_mask

CLASSES = 3


class Network(nn.Module):
    """Convolutions, batch norm with and without momentum, group norm, dropout and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=None)
        self.norm, self.drop, self.fc = nn.GroupNorm(2, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        self.conv2.weight.data[:2] *= 0.1  # filters that are soon masked completely

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.drop(F.relu(self.norm(self.bn2(self.conv2(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class Lit(L.LightningModule):
    """An ordinary module, with a metric of the training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.model = Network()
        self.train_accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.train_accuracy(logits.detach(), batch[1])
        self.log("accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * STEPS, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.mean(dim=(1, 2, 3)).argsort().argsort() % CLASSES), batch_size=BATCH)


class ByHand:
    """Both techniques: a pruned network, and for DCIL a dense one that shares the weights that are masked."""

    def __init__(self, *, dense_path=None, kl_start=1.0, sparsity=0.8, interval=2, end=0.75, temperature=2.0):
        torch.manual_seed(5)
        self.network = Network()
        self.dense = copy.deepcopy(self.network)
        kinds = {"own": ("bn", "norm", "fc"), "own_norm": ("bn", "norm")}.get(dense_path, ())
        self.own = {name: own for name, own in self.dense.named_parameters() if name.startswith(kinds or "-")}
        layers = ("conv1", "conv2") if dense_path else ("conv1", "conv2", "fc")
        self.weights = {f"{layer}.weight": self.network.get_submodule(layer).weight for layer in layers}
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.dense_path, self.kl_start, self.temperature = dense_path, kl_start, temperature
        self.sparsity, self.interval, self.end = sparsity, interval, end

    def update(self, step, steps):
        if step % self.interval and not (step - 1) / steps < self.end <= step / steps:
            return
        sparsity = cubic_schedule(min(step / steps / self.end, 1.0), 0.0, self.sparsity)
        masks = magnitude_mask([weight.detach() for weight in self.weights.values()], sparsity)
        self.masks = dict(zip(self.weights, masks, strict=True))

    def passes(self, batch, share):
        """Gradients of the pruned and of the dense network, each from its own backward pass."""
        start = torch.get_rng_state()
        pruned = {name: (self.masks[name] * weight).detach().requires_grad_() for name, weight in self.weights.items()}
        logits = functional_call(self.network, pruned, (batch[0],))
        after = torch.get_rng_state()
        loss = F.cross_entropy(logits, batch[1])
        if self.dense_path is None:
            return pruned, None, loss, None
        torch.set_rng_state(start)
        dense = {name: weight.detach().clone().requires_grad_() for name, weight in self.weights.items()}
        shared = {
            name: own.detach()
            for name, own in self.network.named_parameters()
            if name not in self.own and name not in dense
        }
        others = functional_call(self.dense, {**dense, **shared}, (batch[0],))
        torch.set_rng_state(after)
        dense_loss = F.cross_entropy(others, batch[1])
        if share >= self.kl_start:
            loss, dense_loss = loss + self.kl(logits, others), dense_loss + self.kl(others, logits)
        return pruned, dense, loss, dense_loss

    def kl(self, learning, target):
        learning, target = ((logits / self.temperature).float() for logits in (learning, target.detach()))
        return self.temperature**2 * F.kl_div(
            learning.log_softmax(dim=1), target.log_softmax(dim=1), log_target=True, reduction="batchmean"
        )

    def run(self, batches, *, windows=1, autocast=None):
        parameters = [*self.network.parameters(), *self.own.values()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        steps = len(batches) // windows
        self.update(0, steps)
        for index, batch in enumerate(batches):
            share = (index // windows) / steps
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
                pruned, dense, loss, dense_loss = self.passes(batch, share)
            (loss / windows).backward()
            if dense_loss is not None:
                (dense_loss / windows).backward()
            for name, weight in self.weights.items():
                gradient = pruned[name].grad
                if dense is None:
                    mask = self.masks[name].flatten(1).any(dim=1) if name != "fc.weight" else torch.ones(CLASSES)
                    gradient = gradient * mask.view(-1, *[1] * (gradient.ndim - 1))
                else:
                    gradient = self.masks[name] * gradient + ~self.masks[name] * dense[name].grad
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
            if (index + 1) % windows == 0:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                self.update((index + 1) // windows, steps)
        return self


def fitted(callback, **settings):
    """What a fit leaves: the module, its dense weights, and the Trainer."""
    module = Lit()
    fitting = trainer(callback, **{"accumulate_grad_batches": 1, **settings})
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(masked completely|held at their floor).*")
        fitting.fit(module, images())
    return module, callback._dense, fitting


def assert_equal(by_hand, module, dense, tolerance=0.0):
    for name, value in by_hand.network.state_dict().items():
        ours = dense.get(f"model.{name}", module.state_dict()[f"model.{name}"])
        assert float((ours.double() - value.double()).abs().max()) <= tolerance, name
    for name, mask in by_hand.masks.items():
        assert torch.equal(module.get_parameter(f"model.{name}"), mask * by_hand.network.get_parameter(name)), name


def run_by_hand(by_hand, **settings):
    torch.manual_seed(2)
    return by_hand.run(list(images()), **settings)


@pytest.mark.parametrize("windows", [1, 2])
def test_dpf(windows):
    by_hand = run_by_hand(ByHand(sparsity=0.87), windows=windows)
    module, dense, _ = fitted(DPFCallback(0.87, update_interval=2), accumulate_grad_batches=windows)
    assert_equal(by_hand, module, dense)
    assert any(not bool(mask.flatten(1).any(dim=1).all()) for mask in by_hand.masks.values())  # some filters are dead


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("kl_start", [0.3, 1.0])
@pytest.mark.parametrize("dense_path", ["own", "own_norm", "shared"])
def test_dcil(dense_path, kl_start, windows):
    by_hand = run_by_hand(ByHand(dense_path=dense_path, kl_start=kl_start), windows=windows)
    callback = DCILCallback(0.8, update_interval=2, dense_path=dense_path, kl_start=kl_start)
    module, dense, _ = fitted(callback, accumulate_grad_batches=windows)
    assert_equal(by_hand, module, dense, tolerance=0.0 if kl_start == 1 else 1e-6)

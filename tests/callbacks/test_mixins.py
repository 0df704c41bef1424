"""CompressionMixin: manual optimisation with the terms of the callbacks."""

from __future__ import annotations

import pytest
import torch
from contract.modules import CLASSES, FEATURES, MixinClassifier, difference, loader, made, trainer
from torch import nn
from torch.nn import functional as F

from lightning_compress import CompressionMixin, DistillationCallback
from lightning_compress.functional import distillation_loss


class TwoSteps(MixinClassifier):
    """Two optimizer steps a batch, each with its own forward and its own total."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        for half in (slice(0, 4), slice(4, 8)):
            optimizer.zero_grad()
            self.manual_backward(self.compressed_loss(F.cross_entropy(self.model(x[half]), y[half])))
            optimizer.step()


class Forgets(MixinClassifier):
    def total(self, task_loss):
        return task_loss


def by_hand(module: nn.Module, teacher: nn.Module, size: int) -> nn.Module:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader(batch_size=size):
        logits = module.model(x)
        soft = distillation_loss(logits, teacher(x).detach(), 4.0)
        optimizer.zero_grad()
        (0.1 * F.cross_entropy(logits, y) + 0.9 * soft).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(("kind", "size"), [(MixinClassifier, 8), (TwoSteps, 4)])
def test_a_fit_equals_the_loop_by_hand(kind, size):
    teacher, module = nn.Linear(FEATURES, CLASSES), made(kind)
    run = trainer(DistillationCallback(teacher))
    run.fit(module, loader())
    assert difference(module, by_hand(made(kind), teacher, size)) < 1e-7
    assert run.callback_metrics["compress/kd/loss"] > 0
    assert "training_step" not in vars(module)


def test_without_a_callback_the_loss_is_the_task_loss():
    module, loss = made(MixinClassifier), torch.tensor(2.0)
    assert module.compressed_loss(loss) is loss


def test_a_step_that_never_asks_is_refused():
    module = made(Forgets)
    with pytest.raises(RuntimeError, match=r"Forgets.training_step never called self.compressed_loss.*\['kd'\]"):
        trainer(DistillationCallback(nn.Linear(FEATURES, CLASSES))).fit(module, loader())
    assert "training_step" not in vars(module)


def test_it_is_for_modules_only():
    with pytest.raises(TypeError, match=r"Plain is no torch.nn.Module"):
        type("Plain", (CompressionMixin,), {})().compressed_loss(torch.ones(()))


def test_asking_in_a_step_with_automatic_optimisation_is_refused():
    class Automatic(MixinClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return self.compressed_loss(self.task_loss(batch))

    with pytest.raises(RuntimeError, match="compressed_loss is for training_step with automatic_optimization=False"):
        trainer(DistillationCallback(nn.Linear(FEATURES, CLASSES))).fit(made(Automatic), loader())

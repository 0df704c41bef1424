"""A generator and a discriminator, which optimise manually, and their training written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_compress import (
    AttentionTransferCallback,
    CompressionCallback,
    CompressionMixin,
    DistillationCallback,
    DPFCallback,
    FactorTransferCallback,
    PSGDCallback,
    QATCallback,
)

from .modules import FEATURES, IMAGE, Classifier, loader, made

PIXELS = 1  # channels of an image


def generator(width: int = 4) -> nn.Sequential:
    """From an image of noise to an image."""
    return nn.Sequential(nn.Conv2d(PIXELS, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, PIXELS, 3, padding=1))


def teacher() -> nn.Sequential:
    """A wider generator, from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return generator(6)


ON_THE_GENERATOR: dict[str, Any] = {"layers": ["generator"], "student": "generator", "class_dim": 3}
"""For collective intelligence; of a row of pixels as classes, as far as losses care."""


def techniques(*names: str) -> list[CompressionCallback]:
    """All that go together in training, on the generator, or those of these names."""
    every = [
        DistillationCallback(teacher(), loss_kind="mse", task_weight=0.5, student="generator"),
        AttentionTransferCallback("kd", pairs={"0": "0"}, weight=20.0, student="generator"),
        FactorTransferCallback("kd", pair=("0", "0"), weight=3.0, pretrain_epochs=1, student="generator"),
        PSGDCallback(4, mean_factor=1.0, layers=["generator"]),
        DPFCallback(0.5, update_interval=1, layers=["generator"]),
        QATCallback(weight_bits=4, step_size="observed", network="generator", start=0.25),
    ]
    return [own for own in every if not names or own.name in names]


def alike_on_ranks() -> list[CompressionCallback]:
    """Those that do not look at batches of their own before the training."""
    return techniques("kd", "at", "psgd", "dpf")


class Gan(CompressionMixin, Classifier):
    """Two networks, two optimizers, two losses a batch; all by hand."""

    order = "generator", "discriminator"
    toggles = True
    window = 1  # batches whose gradients a step of the generator has
    clips: float | None = None
    functions = False  # whether losses are given as functions that compute them
    every = 1  # batches of which one trains the generator

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        self.generator = generator()
        self.discriminator = nn.Sequential(
            nn.Conv2d(PIXELS, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * FEATURES, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(x)

    @staticmethod
    def images(batch: Any) -> tuple[Tensor, Tensor]:
        """Real images and noise."""
        x, _ = batch
        return x.reshape(-1, *IMAGE), x.flip(1).reshape(-1, *IMAGE)

    def generator_loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.discriminator(self.generator(self.images(batch)[1]))).mean()

    def discriminator_loss(self, batch: Any) -> Tensor:
        real, noise = self.images(batch)
        fake = self.generator(noise).detach()
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def total(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return self.compressed_loss((lambda: loss(batch)) if self.functions else loss(batch))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.fails_at:
            self.failure()
        parts = dict(zip(("generator", "discriminator"), self.optimizers(), strict=True))
        for name in self.order:
            if name == "generator" and batch_idx % self.every != self.every - 1:
                continue
            optimizer, loss = parts[name], getattr(self, f"{name}_loss")
            window = self.window if name == "generator" else 1
            with optimizer.toggle_model() if self.toggles else nullcontext():
                if batch_idx % window == 0:
                    optimizer.zero_grad()
                self.manual_backward(self.total(loss, batch) / window)
                if self.clips is not None:
                    self.clip_gradients(optimizer, self.clips, "norm")
                if batch_idx % window == window - 1:
                    optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails_in_validation and not self.trainer.sanity_checking:
            raise RuntimeError("validation is broken")
        real, noise = self.images(batch)
        self.log("val_loss", F.mse_loss(self(noise), real), batch_size=len(real))

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]


class Swapped(Gan):
    order = "discriminator", "generator"


class Untoggled(Gan):
    toggles = False


class Functions(Gan):
    functions = True


class Accumulating(Gan):
    window, order = 2, ("discriminator", "generator")


class Clipped(Gan):
    clips = 0.05


class Seldom(Gan):
    """The generator learns in every second batch only."""

    every = 2


class Silent(Swapped):
    """The discriminator's loss, for which the generator is called too, does not ask."""

    def total(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return super().total(loss, batch) if loss == self.generator_loss else loss(batch)


class Shared(Gan):
    """One call of the generator for both losses; the discriminator learns first, and does not ask."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = self.images(batch)
        first, second = self.optimizers()
        fake = self.generator(noise)
        apart = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        second.zero_grad()
        self.manual_backward(apart)
        second.step()
        first.zero_grad()
        self.manual_backward(self.compressed_loss(F.softplus(-self.discriminator(fake)).mean()))
        first.step()


def by_hand(
    kind: type[Gan],
    total: Callable[[Gan, Tensor, Tensor, Tensor], Tensor] = lambda module, loss, noise, fake: loss,
    *,
    shown: Callable[[Gan, int], dict[str, Tensor]] = lambda module, batch: {},
    scaled: Callable[[Gan], None] = lambda module: None,
    stepped: Callable[[Gan], None] = lambda module: None,
) -> Gan:
    """The same training in a plain loop.

    Args:
        kind: Whose settings count.
        total: From the generator's loss, its input and its output to what it learns from.
        shown: What the generator reads in the place of weights, by name, in a batch of a number.
        scaled: Called before the generator's optimizer steps, and before its gradients are clipped.
        stepped: Called after it has stepped.
    """
    module = made(kind)
    optimizers = dict(zip(("generator", "discriminator"), module.configure_optimizers(), strict=True))
    for index, batch in enumerate(loader()):
        real, noise = module.images(batch)
        for name in kind.order:
            if name == "generator" and index % kind.every != kind.every - 1:
                continue
            parameters, optimizer = list(getattr(module, name).parameters()), optimizers[name]
            window = kind.window if name == "generator" else 1
            fake = functional_call(module.generator, shown(module, index), (noise,))
            if name == "generator":
                loss = total(module, F.softplus(-module.discriminator(fake)).mean(), noise, fake)
            else:
                judged = module.discriminator(real), module.discriminator(fake.detach())
                loss = F.softplus(-judged[0]).mean() + F.softplus(judged[1]).mean()
            if index % window == 0:
                optimizer.zero_grad()
            (loss / window).backward(inputs=parameters if name == "discriminator" else None)
            if index % window == window - 1:
                if name == "generator":
                    scaled(module)
                if kind.clips is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, kind.clips)
                optimizer.step()
                if name == "generator":
                    stepped(module)
    return module

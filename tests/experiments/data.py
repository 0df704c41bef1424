"""Fashion-MNIST at 14x14: 18,000 images to train on, 2,000 to choose by, 10,000 to test with, and the batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.demo import load_data

BATCH = 128
HELD_OUT = 2000
NO_LABEL = -1
BACKGROUND = -0.286 / 0.320  # what a black pixel is after standardising

Images = tuple[Tensor, Tensor]  # (N, 1, H, W) and labels (N,)


@dataclass(frozen=True)
class Split:
    train: Images
    held_out: Images
    test: Images


@functools.cache
def fashion_mnist() -> Split:
    data = load_data("fashion-mnist")
    (images, labels), kept = data.train, len(data.train[0]) - HELD_OUT
    return Split((images[:kept], labels[:kept]), (images[kept:], labels[kept:]), data.test)


class Batches(IterableDataset):
    """Augmented batches that depend on the seed alone.

    With `labels=L`, half of each batch is drawn from L labelled images, as many of each class, and half from all
    images, without their labels.
    """

    def __init__(self, source: Images, *, seed: int, labels: int | None = None, batch: int = BATCH):
        self.images, self.targets = source
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        self.labelled = None if labels is None else balanced(self.targets, labels, self.generator)

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[Images]:
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        for count, batch in enumerate(self._epoch(generator), start=1):
            if count == len(self):  # whoever looks at a few batches only leaves the next epoch as it was
                self.generator = generator
            yield batch

    def _epoch(self, generator: torch.Generator) -> Iterator[Images]:
        everything = torch.arange(len(self.images))
        if self.labelled is None:
            for chosen in self._drawn(everything, self.batch, generator):
                yield augmented(self.images[chosen], generator), self.targets[chosen]
            return
        with_label = self._drawn(self.labelled, self.batch // 2, generator)
        without = self._drawn(everything, self.batch - self.batch // 2, generator)
        for first, second in zip(with_label, without, strict=True):
            targets = torch.cat([self.targets[first], torch.full_like(second, NO_LABEL)])
            yield augmented(self.images[torch.cat([first, second])], generator), targets

    def _drawn(self, pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """An epoch of `count` draws a step: all of the pool in random order, again and again as needed."""
        needed = len(self) * count
        rounds = -(-needed // len(pool))
        order = torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])
        return order[:needed].reshape(len(self), count)

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)


def balanced(targets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` images, as many of each class."""
    classes = targets.unique()
    order = torch.randperm(len(targets), generator=generator)
    return torch.cat([order[targets[order] == label][: count // len(classes)] for label in classes])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and shifted by at most a pixel in each direction."""
    count, _, height, width = images.shape
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    padded = F.pad(torch.where(flip, images.flip(-1), images), (1, 1, 1, 1), value=BACKGROUND)
    shift = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)  # (N, H), (N, W)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)

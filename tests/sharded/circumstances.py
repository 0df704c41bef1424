"""The circumstances in which callbacks are tried under FSDP2, and the networks that they are tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F

from lightning_compress import CompressionMixin
from sharded.place import BATCH, CLASSES, FEATURES, Classifier, made, rows

IMAGE = (1, 2, 4)  # of a row of features

NOTHING: Mapping[str, Any] = MappingProxyType({})
MODULE: Mapping[str, Mapping[str, Any]] = {
    "parameters kept after the forward pass": {"reshard": False},
    "torch's choice of reshard_after_forward": {"reshard": None},
    "bf16 policy": {"policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}
"""Arguments of the module, by circumstance."""
TRAINER: Mapping[str, Mapping[str, Any]] = {
    "accumulation over 3 batches": {"accumulate_grad_batches": 3},
    "gradients clipped by norm": {"gradient_clip_val": 0.05},
}
"""Settings of the Trainer, by circumstance."""
EXACT = (
    "parameters resharded after the forward pass",
    "parameters kept after the forward pass",
    "torch's choice of reshard_after_forward",
    *TRAINER,
)
"""Those in which the weights equal those of one process."""


class Images(nn.Module):
    """Convolutions over rows of features, with filters that two ranks cannot share evenly; then a linear layer."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        self.first = nn.Conv2d(IMAGE[0], width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Linear(width * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.reshape(-1, *IMAGE)))
        return self.last(torch.tanh(self.second(x)).flatten(1))


class Imaging(Classifier):
    def build(self) -> None:
        self.model = Images()


class Itself(Classifier):
    """The LightningModule is the network, and the outermost unit."""

    def build(self) -> None:
        self.network_first, self.network_last = nn.Linear(FEATURES, 15), nn.Linear(15, CLASSES)

    def units(self) -> Sequence[nn.Module]:
        return [self.network_first, self.network_last, self]

    def forward(self, x: Tensor) -> Tensor:
        return self.network_last(torch.tanh(self.network_first(x)))


class Manual(CompressionMixin, Imaging):
    """Optimises manually, with our mixin."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(super().training_step(batch, batch_idx)))
        optimizer.step()


class Twice(Imaging):
    """Calls its network twice a step."""

    def task_loss(self, batch: Any) -> Tensor:
        return super().task_loss(batch) + F.mse_loss(self(batch[0] + 1).mean(), torch.ones(()))


class Uncopied:
    """Of which there can be one only."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of me")


def teacher(width: int = 6, seed: int = 3) -> nn.Module:
    """A frozen network for the same rows, from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Images(width)


def narrowed_by_hand(
    kind: type[Classifier],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    scale: Callable[[Mapping[str, nn.Parameter]], None] = lambda weights: None,
) -> dict[str, Tensor]:
    """What the bf16 policy does: SGD on float32 weights, whose bf16 copies each of two ranks runs on half of a batch.

    Args:
        kind: Of the module.
        loss: Of a narrowed network, its narrowed input, and the targets.
        scale: Changes the gradients before each step, given the module's weights by name.

    Returns:
        The module's state.
    """
    module = made(kind)
    optimizer = module.configure_optimizers()
    inputs, targets = rows().tensors
    for start in range(0, len(inputs), BATCH):
        optimizer.zero_grad()
        for rank in (0, 1):
            x, y = (own[start + rank : start + BATCH : 2] for own in (inputs, targets))
            narrow = copy.deepcopy(module.model).bfloat16()
            loss(narrow, x.bfloat16(), y).backward()
            for parameter, half in zip(module.model.parameters(), narrow.parameters(), strict=True):
                gradient = half.grad.float() / 2
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        scale(dict(module.named_parameters()))
        optimizer.step()
    return module.state_dict()

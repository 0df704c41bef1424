"""Trainings with LBFGS as loops in 64 bits, without Lightning and the package: what two callbacks do in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .modules import Classifier, by_lbfgs, made, teacher_for


def loop(kind: type[Classifier], batches: list[Any], epochs: int) -> Iterator[tuple[Classifier, float, Any, Any]]:
    """The module, the share of the training that is done, a batch, and what takes the step that a loss leads to."""
    module = made(kind).double()
    optimizer = by_lbfgs(module)

    def step(loss_of: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)

    for index in range(epochs * len(batches)):
        yield module, index / (epochs * len(batches)), batches[index % len(batches)], step


def logits_of(network: nn.Module, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a network, or the module that holds it, makes of a batch."""
    given = () if isinstance(batch, dict) else (batch[0].double(),)
    named = {"features": batch["features"].double()} if isinstance(batch, dict) else {}
    out = network(*given, **named) if weights is None else functional_call(network, dict(weights), given, named)
    return out["logits"] if isinstance(out, dict) else out


def inner(module: Classifier) -> nn.Module:
    """What is called: the child, where there is one."""
    return getattr(module, "model", module)


def labels_of(batch: Any) -> Tensor:
    return batch["label"] if isinstance(batch, dict) else batch[1]


def distilled(kind: type[Classifier], batches: list[Any], epochs: int) -> dict[str, Tensor]:
    """Half the task loss, and half the divergence from soft targets at temperature 2."""
    teacher = teacher_for(kind).double().eval()
    for module, _, batch, step in loop(kind, batches, epochs):
        with torch.no_grad():
            target = F.softmax(logits_of(teacher, batch) / 2, dim=1)

        def loss_of(module: Classifier = module, batch: Any = batch, target: Tensor = target) -> Tensor:
            logits = logits_of(inner(module), batch)
            soft = (target * (target.log() - F.log_softmax(logits / 2, dim=1))).sum(dim=1).mean()
            return 0.5 * F.cross_entropy(logits, labels_of(batch)) + 0.5 * 2**2 * soft

        step(loss_of)
    return module.state_dict()


def pruned(kind: type[Classifier], batches: list[Any], epochs: int) -> dict[str, Tensor]:
    """60% of the weights go by a cubic schedule until 60% of the training, and may come back until then."""
    sparsity = end = 0.6
    stays = False
    for module, done, batch, step in loop(kind, batches, epochs):
        network = inner(module)
        weights = {name: own for name, own in network.named_parameters() if own.ndim > 1}
        if not stays:
            masks = smallest_away(weights, sparsity * (1 - (1 - min(done / end, 1.0)) ** 3))
            stays = done >= end

        def loss_of(
            network: nn.Module = network, batch: Any = batch, weights: Any = weights, masks: Any = masks
        ) -> Tensor:
            shown = {name: own * masks[name] for name, own in weights.items()}
            return F.cross_entropy(logits_of(network, batch, shown), labels_of(batch))

        step(loss_of)
    with torch.no_grad():
        for name, own in weights.items():
            own.mul_(masks[name])
    return module.state_dict()


def smallest_away(weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks without a share of all entries, the smallest."""
    flat = torch.cat([own.detach().abs().flatten() for own in weights.values()])
    zeros = math.floor(share * len(flat) + 0.5)
    limit = flat.sort().values[zeros - 1] if zeros else -1.0
    return {name: (own.detach().abs() > limit).double() for name, own in weights.items()}


LOOPS: dict[str, Callable[[type[Classifier], list[Any], int], dict[str, Tensor]]] = {
    "DistillationCallback": distilled,
    "PruningCallback": pruned,
}
"""Rows of the matrix that there is a loop for."""

"""Paraphrasing: train a paraphraser on a teacher's features, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_compress import functional as F
from lightning_compress.mechanisms.isolation import drawn_from
from lightning_compress.modules import Paraphraser


def authors_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer with which the authors train paraphraser and translator.

    Args:
        parameters: Those of either.

    Returns:
        SGD, momentum 0.9, weight decay 5e-4; the learning rate of 0.1 is the paraphraser's.

    Example:
        >>> authors_optimizer(Paraphraser(2).parameters()).defaults["momentum"]
        0.9
    """
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def train_paraphraser(
    paraphraser: Paraphraser,
    features: Callable[[int], Iterable[Tensor]],
    *,
    epochs: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Train a paraphraser to reconstruct features, as the authors do: mean L1, SGD .1, momentum .9, weight decay 5e-4.

    Args:
        paraphraser: Trained in place; frozen afterwards.
        features: Gives the features of one epoch, each of shape ``(N, channels, H, W)``; takes its number.
        epochs: How often to go through them.
        reduce: Averages a gradient, or a number in a tensor, over processes.

    Returns:
        Each epoch's reconstruction error, relative to the features: the mean of ``|reconstruction - feature|`` over
        that of ``|feature|``. 1 is what zeros would reach.

    Raises:
        ValueError: If there are no features.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> paraphraser = Paraphraser(2)
        >>> errors = train_paraphraser(paraphraser, lambda epoch: [torch.ones(4, 2, 3, 3)] * 20, epochs=3)
        >>> errors[-1] < errors[0], paraphraser.training
        (True, False)
    """
    parameters = list(paraphraser.parameters())
    optimizer = authors_optimizer(parameters)
    paraphraser.train()
    errors = []
    for epoch in range(epochs):
        total = torch.zeros(2, device=parameters[0].device)  # of the errors, and of the features
        for feature in features(epoch):
            loss = F.reconstruction_loss(paraphraser(feature), feature)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            for parameter in parameters:
                if reduce is not None and parameter.grad is not None:
                    parameter.grad = reduce(parameter.grad)
            optimizer.step()
            size = F.reconstruction_loss(torch.zeros_like(feature), feature)
            total += torch.stack([loss.detach(), size]).float() * len(feature)
        if reduce is not None:
            total = reduce(total)
        if total[1] == 0:
            raise ValueError(f"the paraphraser saw no features in epoch {epoch}, or only zeros")
        errors.append(float(total[0] / total[1]))
        if not math.isfinite(errors[-1]):
            raise ValueError(
                f"the paraphraser's error is {errors[-1]} in epoch {epoch}: the features hold NaN or infinity, or are "
                "so large that its training diverged"
            )
    optimizer.zero_grad()
    paraphraser.eval().requires_grad_(False)
    return errors


def paraphraser_from(state: dict[str, Tensor], factor_ratio: float, *, argument: str) -> Paraphraser:
    """A trained paraphraser from its weights, frozen.

    Args:
        state: Its ``state_dict``.
        factor_ratio: That it was trained with.
        argument: Where the weights come from, for error messages.

    Returns:
        The paraphraser, in evaluation mode and without gradients.

    Raises:
        ValueError: If these are not the weights of a paraphraser of this ratio.

    Example:
        >>> paraphraser_from(Paraphraser(4).state_dict(), 0.5, argument="paraphraser").factor_channels
        2
    """
    first = state.get("encoder.0.weight") if isinstance(state, dict) else None
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise ValueError(f"{argument} holds no weights of a lightning_compress.modules.Paraphraser")
    with drawn_from(0):  # nothing of it is kept, and the main run's random numbers are left alone
        paraphraser = Paraphraser(first.shape[1], factor_ratio).to(first.dtype)
    try:
        paraphraser.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{argument} holds weights of another shape than a paraphraser of {first.shape[1]} channels and "
            f"factor_ratio={factor_ratio}: {error}"
        ) from error
    return paraphraser.eval().requires_grad_(False)

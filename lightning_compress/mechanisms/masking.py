"""Masked weights: what a mask makes of a weight and of its gradient, and the masks of a whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.functional._selection import dropped
from lightning_compress.functional.masks import Filters, changes, fewest_kept, live_filters
from lightning_compress.mechanisms.gathering import parts_of, rows_of, sharded_as
from lightning_compress.mechanisms.sharding import own_part
from lightning_compress.mechanisms.shrinking import Shrinkage


class MaskedWeight:
    """The view ``M * W`` of a weight, with the gradient ``M * g``: static pruning.

    Args:
        mask: Boolean, of the weight's shape, True where it is kept; None keeps all of it.

    Example:
        >>> MaskedWeight(torch.tensor([True, False])).value(torch.tensor([1.0, 2.0]))
        tensor([1., 0.])
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self._multiplier: Tensor | None = None
        self.mask = mask

    @property
    def mask(self) -> Tensor | None:
        """The mask; None before there is one."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._mask, self._changed = mask, True
        self._renew()

    def _renew(self) -> None:
        """Derive from a new mask what a view needs of it."""

    @property
    def plain(self) -> bool:
        """Whether the weight is kept whole, because there is no mask yet."""
        return self._mask is None

    @property
    def copies(self) -> bool:
        """Whether there is a mask, to multiply with."""
        return self._mask is not None

    def retire(self) -> None:
        """Keep the mask in main memory, and nothing that is only needed while the weight is presented."""
        self._multiplier = None
        if self._mask is not None:
            self.mask = self._mask.cpu()

    def value(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The masked weight.

        Args:
            weight: The dense weight, ``(...)``.
            out: Where to write it; None for a new tensor.

        Returns:
            ``M * W``.
        """
        return torch.mul(weight, self._factors(weight), out=out)

    def gradient(self, gradient: Tensor) -> Tensor:
        """The dense weight's gradient.

        Args:
            gradient: That of the masked weight, ``(...)``.

        Returns:
            ``M * g``.
        """
        return gradient * self._factors(gradient)

    def lost(self, gradient: Tensor) -> Tensor:
        """The part of a gradient that does not come through the mask.

        Args:
            gradient: ``(...)`` as the weight.

        Returns:
            ``(1 - M) * g``.
        """
        return torch.addcmul(gradient, gradient, self._factors(gradient), value=-1)

    def _factors(self, like: Tensor) -> Tensor:
        """The mask as numbers: multiplying by a boolean tensor takes twice as long."""
        if self._mask is None:
            raise RuntimeError("there is no mask yet")
        factors = self._multiplier
        if factors is None or (factors.dtype, factors.device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # what is made in inference mode cannot be used in training
                factors = self._multiplier = torch.empty_like(self._mask, dtype=like.dtype, device=like.device)
            self._changed = True
        if self._changed:
            factors.copy_(self._mask.view(torch.uint8))  # several times as fast as from booleans
            self._changed = False
        return factors


class FeedbackWeight(MaskedWeight):
    """The view ``M * W`` with the gradient ``g``, as if the mask were not there: masked weights learn, and may return.

    Args:
        mask: As in :class:`MaskedWeight`.
        filters: Where the filters of the weight are, if those that are masked completely get no gradient; None: all of
            the gradient passes.

    Example:
        >>> weight = FeedbackWeight(torch.tensor([[True, False], [False, False]]), filters=Filters())
        >>> weight.gradient(torch.ones(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """

    def __init__(self, mask: Tensor | None = None, filters: Filters | None = None) -> None:
        self.filters = filters
        self._alive: Tensor | None = None
        super().__init__(mask)

    def _renew(self) -> None:
        self._alive = None
        if self._mask is not None and self.filters is not None:
            alive = live_filters(self._mask, self.filters)
            self._alive = None if bool(alive.all()) else alive

    def gradient(self, gradient: Tensor) -> Tensor:
        """The dense weight's gradient.

        Args:
            gradient: That of the masked weight, ``(...)``.

        Returns:
            ``g``, with zeros in the filters that are masked completely if so wished.
        """
        return gradient if self._alive is None else gradient * self._alive.to(gradient.device)


class DenseWeight:
    """The weight ``W`` itself with the gradient ``(1 - M) * g``: what learns here are the masked weights.

    Args:
        masked: The view whose mask this is the other side of.

    Example:
        >>> DenseWeight(MaskedWeight(torch.tensor([True, False]))).gradient(torch.ones(2))
        tensor([0., 1.])
    """

    plain = False
    copies = False

    def __init__(self, masked: MaskedWeight) -> None:
        self._masked = masked

    def value(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The dense weight, ``(...)``.

        Args:
            weight: The dense weight.
            out: Not needed.

        Returns:
            The same.
        """
        return weight

    def gradient(self, gradient: Tensor) -> Tensor:
        """The dense weight's gradient.

        Args:
            gradient: That of the presented weight, ``(...)``.

        Returns:
            ``(1 - M) * g``: ``g`` where the weight is masked, else 0.
        """
        return torch.zeros_like(gradient) if self._masked.mask is None else self._masked.lost(gradient)


class Masks:
    """The masks of some weights, all kept at first; where weights are sharded, each process has those of its rows.

    Args:
        weights: Name to parameter.
        make: Makes the view of the weight of a name.

    Example:
        >>> masks = Masks({"weight": nn.Parameter(torch.tensor([3.0, 1.0]))})
        >>> masks.replace([torch.tensor([True, False])]), masks.sparsity, masks.masked("weight", torch.ones(2)).tolist()
        (0.5, 0.5, [1.0, 0.0])
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], make: Callable[[str], MaskedWeight] | None = None) -> None:
        self.weights = dict(weights)
        self.parts = parts_of(weights.values())
        """How processes choose masks together; None where weights are whole."""
        self.views = {name: MaskedWeight() if make is None else make(name) for name in weights}
        self.total = sum(weight.numel() for weight in weights.values())
        self.counts = [0] * len(self.weights)
        """How many weights of each tensor are masked."""
        self.changed = [0] * len(self.weights)
        """How many entries of each mask the last update changed."""

    @property
    def zeros(self) -> int:
        """How many weights are masked."""
        return sum(self.counts)

    @property
    def sparsity(self) -> float:
        """The share of the weights that is masked."""
        return self.zeros / max(self.total, 1)

    def at_floor(self) -> list[str]:
        """The tensors that can lose no more."""
        return [
            name for name, lost, limit in zip(self.weights, self.counts, self.limits, strict=True) if lost == limit > 0
        ]

    @property
    def limits(self) -> list[int]:
        """The most weights that each tensor may lose."""
        return [weight.numel() - fewest_kept(weight.numel()) for weight in self.weights.values()]

    def values(self) -> list[Tensor]:
        """What this process holds of each weight."""
        return [own_part(weight) for weight in self.weights.values()]

    def current(self) -> list[Tensor]:
        """One mask for each weight, on its device."""
        return [
            torch.ones_like(own, dtype=torch.bool) if (mask := view.mask) is None else mask
            for view, own in zip(self.views.values(), self.values(), strict=True)
        ]

    def replace(self, masks: Sequence[Tensor]) -> float:
        """Take other masks.

        Args:
            masks: One for each weight, in their order.

        Returns:
            The share of entries that changed.
        """
        changed = changes(self.current(), masks)
        for name, mask in zip(self.weights, masks, strict=True):
            self.views[name].mask = mask
        counts = dropped(masks)
        if self.parts is not None:
            both = self.parts.totals([*changed, *counts])
            changed, counts = both[: len(changed)], both[len(changed) :]
        self.changed, self.counts = changed, counts
        return sum(self.changed) / max(self.total, 1)

    def shares(self, counts: Sequence[int]) -> list[float]:
        """Counts of each tensor as shares of its size."""
        return [count / max(weight.numel(), 1) for count, weight in zip(counts, self.weights.values(), strict=True)]

    def follow(self, shrinkage: Shrinkage) -> None:
        """Go on with weights that hold less than before.

        Args:
            shrinkage: What stays of each.
        """
        self.total = sum(weight.numel() for weight in self.weights.values())
        for name, view in self.views.items():
            view.retire()
            if view.mask is not None:
                view.mask = shrinkage.take(name, view.mask).to(self.weights[name].device)
        self.counts = dropped(self.current())

    def masked(self, name: str, value: Tensor) -> Tensor:
        """A dense tensor with zeros where this weight is masked.

        Args:
            name: Of the weight.
            value: Of its shape, on any device, or this process's rows of such a tensor.

        Returns:
            A new tensor, sharded as the value is; the same if there is no mask yet.
        """
        mask = self.views[name].mask
        if mask is None:
            return value
        own = own_part(value)
        return sharded_as(own.masked_fill(~mask.to(own.device), 0.0), value)

    def retire(self) -> None:
        """Keep the masks in main memory, and nothing that is only needed while weights are presented."""
        for view in self.views.values():
            view.retire()

    def state(self) -> dict[str, Tensor]:
        """The masks there are, by name; sharded as their weights are."""
        return {
            name: sharded_as(view.mask, self.weights[name])
            for name, view in self.views.items()
            if view.mask is not None
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            ValueError: If it belongs to other weights.
        """
        expected = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        given = {name: tuple(mask.shape) for name, mask in state.items()}
        if expected != given:
            problems = [
                *(f"'{name}' has none" for name in expected if name not in given),
                *(f"'{name}' is not selected any more" for name in given if name not in expected),
                *(
                    f"'{name}' has shape {given[name]} there and {shape} here"
                    for name, shape in expected.items()
                    if name in given and given[name] != shape
                ),
            ]
            raise ValueError(
                f"the masks of the checkpoint are of other weights: {'; '.join(problems[:5])}. Select the same with "
                "layers= and exclude=, or begin a new training"
            )
        self.replace([rows_of(state[name], weight) for name, weight in self.weights.items()])

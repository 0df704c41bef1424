"""Masks: which weights are pruned, exact to one weight, for weights of any number and type.

A mask is boolean and True where a weight is kept. Selection goes by magnitude (Han et al., "Learning both weights and
connections for efficient neural networks", NeurIPS 2015, arXiv:1506.02626) or by any other score: Taylor's (Molchanov
et al., "Importance estimation for neural network pruning", CVPR 2019, arXiv:1906.10771), random. Sparsity is spread
over layers by one threshold for all, equally, or as an Erdos-Renyi kernel (Evci et al., "Rigging the lottery", ICML
2020, arXiv:1911.11134). N:M patterns are those of Mishra et al., "Accelerating sparse deep neural networks", 2021,
arXiv:2104.08378.

Every selection gives the masks of a stable sort of all magnitudes, NaN last, but in linear time, and with memory for
little more than the masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compress.functional._checks import (
    LARGEST,
    check_choice,
    check_floating,
    check_numbers,
    check_tensor,
    check_tensors,
    check_unit,
    check_whole,
    shown,
)
from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional._selection import Parts, dropped, grouped, held, n_of_m, smallest, smallest_within

Scope = Literal["global", "layer", "erk"]


def magnitude_mask(weights: Sequence[Tensor], sparsity: float, scope: Scope = "global") -> list[Tensor]:
    """Prune the weights of smallest magnitude.

    Args:
        weights: Tensors of any shapes and floating types, at least one.
        sparsity: Share of the weights to prune, in [0, 1].
        scope: "global" prunes ``floor(sparsity * n + 0.5)`` of all n weights together, "layer" as many of each
            tensor's own n. "erk" prunes as many of all together as "global", shared out by ``erk_sparsities``.

    Returns:
        One mask per tensor, of its shape and device, True where a weight is kept. Of equal magnitudes, those of the
        earlier tensor and of the lower index in it are pruned first; NaN is larger than anything.

    Raises:
        ValueError: If there are no weights, ``sparsity`` is not in [0, 1], or ``scope`` is unknown.
        TypeError: If a tensor is not floating point.

    Example:
        >>> magnitude_mask([torch.tensor([0.1, -0.5]), torch.tensor([[0.3, -0.1]])], 0.5)
        [tensor([False,  True]), tensor([[ True, False]])]
    """
    check_choice("scope", scope, get_args(Scope))
    check_tensors("weights", weights, "floating point")
    _check_sparsity(sparsity)
    sizes = [weight.numel() for weight in weights]
    total = _zeros(sum(sizes), sparsity)
    if scope == "global":
        return smallest_masks(weights, total)
    if scope == "layer":
        zeros = [_zeros(size, sparsity) for size in sizes]
    else:
        zeros = layer_zeros(sizes, erk_sparsities([weight.shape for weight in weights], sparsity), total=total)
    return [smallest_masks([weight], own)[0] for weight, own in zip(weights, zeros, strict=True)]


def smallest_masks(
    scores: Sequence[Tensor],
    pruned: int,
    *,
    kept: Sequence[Tensor] | None = None,
    limits: Sequence[int] | None = None,
    parts: Parts | None = None,
) -> list[Tensor]:
    """Prune the smallest scores, as many as asked for, over all tensors together.

    Args:
        scores: Tensors of any shapes and floating types, at least one. They are compared by ``|score|``, where -0
            equals 0 and NaN is larger than infinity.
        pruned: How many entries of all tensors together become False.
        kept: Masks of the same shapes; what is False there is pruned before anything else, so it stays pruned.
        limits: The most entries that each tensor may lose. What a limit holds back is taken from the next smallest
            scores of the tensors that are below theirs.
        parts: Where processes hold parts of each tensor, which are those given here: how they select together. All
            else that is given is of the whole tensors.

    Returns:
        One mask per tensor, of its shape and device, with ``pruned`` entries False in all. Of equal scores, those of
        the earlier tensor and of the lower (row-major) index in it are pruned first.

    Raises:
        ValueError: If there are no scores; ``pruned`` is negative, more than there are entries, fewer than are False
            in ``kept`` or more than ``limits`` allow; ``kept`` and ``limits`` contradict each other; or there are not
            as many of them as scores, or of other shapes.
        TypeError: If a tensor of scores is not floating point, or one of ``kept`` not boolean.

    Example:
        >>> smallest_masks([torch.tensor([3.0, -1.0]), torch.tensor([0.0, 2.0])], 2, limits=[2, 0])
        [tensor([False, False]), tensor([True, True])]
    """
    check_tensors("scores", scores, "floating point")
    check_whole("pruned", pruned, at_least=-LARGEST)
    scores = [score.detach() for score in scores]
    sizes, gone = _sizes_and_gone(scores, kept, parts)
    if not 0 <= pruned <= sum(sizes):
        raise ValueError(f"pruned must be in [0, {sum(sizes)}], the number of scores, got {pruned}")
    if pruned < sum(gone):
        raise ValueError(f"pruned must be at least {sum(gone)}, what kept has pruned already, got {pruned}")
    if limits is None:
        return smallest(scores, kept, pruned, parts)
    limits = _checked_limits(sizes, limits, pruned)
    for index, (lost, limit) in enumerate(zip(gone, limits, strict=True)):
        if lost > limit:
            raise ValueError(f"kept has pruned {lost} entries of tensor {index}, more than its limit of {limit}")
    return smallest_within(scores, kept, pruned, limits, parts)


def erk_sparsities(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """The Erdos-Renyi kernel: layers with more weights per input and output get sparser.

    The density of a layer is proportional to the sum of its dimensions over their product. A layer whose share would
    be more than 1 is left dense, and the others are scaled again.

    Args:
        shapes: Shapes of the weights, such as ``(C_out, C_in, K, K)``.
        sparsity: Share of zeros over all weights, in [0, 1].

    Returns:
        One sparsity in [0, 1] per layer; weighted with the sizes they give ``sparsity``.

    Raises:
        ValueError: If ``sparsity`` is not in [0, 1].

    Example:
        >>> [round(value, 4) for value in erk_sparsities([(10, 10), (40, 10)], 0.5)]
        [0.2857, 0.5536]
    """
    _check_sparsity(sparsity)
    for shape in check_numbers("shapes", shapes):
        for entry in check_numbers("each of shapes", shape):
            check_whole("each of shapes", entry, at_least=0)
    sizes = [math.prod(shape) for shape in shapes]
    ones = [sum(shape) if shape else 1 for shape in shapes]  # weights kept for each unit of the common factor
    dense = {index for index, size in enumerate(sizes) if size == 0}
    while len(dense) < len(sizes):
        rest = [index for index in range(len(sizes)) if index not in dense]
        kept = (1.0 - sparsity) * sum(sizes) - sum(sizes[index] for index in dense)
        factor = kept / sum(ones[index] for index in rest)
        full = {index for index in rest if factor * ones[index] > sizes[index]}
        if not full:
            return [
                0.0 if index in dense else min(max(1.0 - factor * ones[index] / sizes[index], 0.0), 1.0)
                for index in range(len(sizes))
            ]
        dense |= full
    return [0.0] * len(sizes)


def layer_zeros(
    sizes: Sequence[int],
    sparsities: Sequence[float],
    *,
    total: int | None = None,
    limits: Sequence[int] | None = None,
) -> list[int]:
    """Whole numbers of zeros per layer.

    Args:
        sizes: Number of weights of each layer.
        sparsities: Share of zeros of each layer, in [0, 1].
        total: How many zeros there are to be in all; None rounds each layer for itself, ``floor(s * n + 0.5)``.
            Otherwise each layer gets the whole part of its share of the total, and the largest remainders one more.
        limits: The most zeros of each layer. What a limit holds back goes to the others in proportion to what each
            has left to its own.

    Returns:
        One number of zeros per layer.

    Raises:
        ValueError: If there are not as many sparsities or limits as sizes, a sparsity is not in [0, 1], or the
            total is negative or more than the sizes or limits allow.

    Example:
        >>> layer_zeros([10, 10, 10], [0.55, 0.55, 0.9], total=20)
        [6, 5, 9]
        >>> layer_zeros([10, 10, 10], [0.5, 0.5, 0.9], limits=[10, 10, 7])
        [6, 6, 7]
    """
    for size in check_numbers("sizes", sizes):
        check_whole("each of sizes", size, at_least=0)
    if len(check_numbers("sparsities", sparsities)) != len(sizes):
        raise ValueError(f"sparsities must be as many as sizes, {len(sizes)}, got {len(sparsities)}")
    for sparsity in sparsities:
        _check_sparsity(sparsity, "each of sparsities")
    if total is None:
        zeros = [_zeros(size, sparsity) for size, sparsity in zip(sizes, sparsities, strict=True)]
        total = sum(zeros)
    elif check_whole("total", total, at_least=-LARGEST) < 0:
        raise ValueError(f"total must not be negative, got {total}")
    else:
        zeros = _apportioned(total, [Fraction(own) * size for size, own in zip(sizes, sparsities, strict=True)])
    limits = _checked_limits(sizes, sizes if limits is None else limits, total)
    zeros = [min(own, limit) for own, limit in zip(zeros, limits, strict=True)]
    rooms = [limit - own for own, limit in zip(zeros, limits, strict=True)]
    return [own + more for own, more in zip(zeros, _apportioned(total - sum(zeros), rooms), strict=True)]


def fewest_kept(size: int) -> int:
    """The weights that a layer must keep, so that it still passes something on: 1% of them, rounded up.

    Args:
        size: Number of weights of the layer.

    Returns:
        ``ceil(size / 100)``: at least 1, except for a layer without weights.

    Raises:
        ValueError: If ``size`` is negative.

    Example:
        >>> fewest_kept(27), fewest_kept(100), fewest_kept(101)
        (1, 1, 2)
    """
    if check_whole("size", size, at_least=-LARGEST) < 0:
        raise ValueError(f"size must not be negative, got {size}")
    return -(-size // 100)


@dataclass(frozen=True)
class Filters:
    """Where the filters of a weight are: what one output channel is computed with.

    Attributes:
        groups: 0 where output channels are dimension 0, as in convolutions and linear layers. Else the number of groups
            of a transposed convolution, which has them in dimension 1, those of each group along dimension 0.
    """

    groups: int = 0


def live_filters(mask: Tensor, filters: Filters) -> Tensor:
    """Which filters keep at least one weight.

    Args:
        mask: Boolean, such as ``(C_out, C_in, K, K)``, True where a weight is kept.
        filters: Where its filters are.

    Returns:
        Boolean, of a shape that broadcasts with the mask, such as ``(C_out, 1, 1, 1)``.

    Example:
        >>> live_filters(torch.tensor([[True, False], [False, False]]), Filters())
        tensor([[ True],
                [False]])
    """
    if not filters.groups:
        return mask.flatten(1).any(dim=1).view(-1, *[1] * (mask.ndim - 1))
    by_group = mask.reshape(filters.groups, -1, mask.shape[1], mask[0, 0].numel())  # (G, C_in / G, C_out / G, K * K)
    alive: Tensor = by_group.any(dim=3).any(dim=1, keepdim=True).expand(-1, by_group.shape[1], -1)
    return alive.reshape(*mask.shape[:2], *[1] * (mask.ndim - 2))


def count_dead_filters(mask: Tensor, filters: Filters) -> int:
    """How many filters keep no weight.

    Args:
        mask: As in :func:`live_filters`.
        filters: Where its filters are.

    Returns:
        Between 0 and the number of output channels.

    Example:
        >>> count_dead_filters(torch.tensor([[True, False], [False, False]]), Filters())
        1
    """
    dead = int((~live_filters(mask, filters)).sum())
    return dead * filters.groups // len(mask) if filters.groups else dead  # each row of its group has an entry


def magnitude_score(weight: Tensor) -> Tensor:
    """How much a weight matters by its size alone.

    Args:
        weight: Any shape and floating type.

    Returns:
        ``|weight|``, the same shape and type, without a graph.

    Example:
        >>> magnitude_score(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    return check_floating("weight", weight).detach().abs()


def l2_score(weight: Tensor, dims: int | Sequence[int]) -> Tensor:
    """How much a filter, or another slice of a weight, matters by its Euclidean norm.

    Args:
        weight: Any shape and floating type, such as ``(C_out, C_in, K, K)``.
        dims: Dimensions that the norm is taken over, such as ``(1, 2, 3)`` for filters.

    Returns:
        The shape of the other dimensions, at least float32, without a graph.

    Example:
        >>> l2_score(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 1)
        tensor([5., 1.])
    """
    check_floating("weight", weight)
    given = [dims] if isinstance(dims, int) else check_numbers("dims", dims)
    places = [check_whole("dims", own, at_least=-weight.ndim, at_most=weight.ndim - 1) % weight.ndim for own in given]
    if len({*places}) < len(places):
        raise ValueError(f"dims must differ from one another, got {shown(dims)}")
    norms: Tensor = torch.linalg.vector_norm(at_least_float32(weight.detach()), dim=places)
    return norms


def random_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Chance, the baseline of every other score.

    Args:
        weight: Any shape; only its shape and device matter.
        generator: Source of the draws, on the CPU, so that they are the same for every device.

    Returns:
        Uniform in [0, 1), float32, the shape and device of the weight.

    Example:
        >>> random_score(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    check_tensor("weight", weight)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {shown(generator)}")
    draws = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return draws.to(weight.device)


def taylor_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """How much the loss changes, to first order, when a weight becomes zero.

    Args:
        weight: Any shape and floating type.
        gradient: That of the loss with respect to the weight, the same shape.

    Returns:
        ``|weight * gradient|``, at least float32, without a graph.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> taylor_score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 3.])
    """
    check_floating("weight", weight)
    if weight.shape != check_tensor("gradient", gradient).shape:
        raise ValueError(f"gradient must have the shape of weight, {tuple(weight.shape)}, got {tuple(gradient.shape)}")
    return (at_least_float32(weight.detach()) * at_least_float32(gradient.detach())).abs_()


def n_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of each m consecutive input channels, at each output channel and kernel position.

    Args:
        weight: Shape ``(C_out, C_in, ...)`` with ``C_in`` a multiple of m; any floating type.
        n: Weights to keep of each group, from 1 to m.
        m: Size of a group.

    Returns:
        Mask of the shape and device of the weight. Of equal magnitudes, the lower channel is pruned first.

    Raises:
        ValueError: If ``n`` is not in [1, m], or the weight has no dimension 1 or one that m does not divide.
        TypeError: If the weight is not floating point.

    Example:
        >>> n_m_mask(torch.tensor([[0.1, -0.4, 0.3, 0.2]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    _check_n_m("weight", [weight], n, m)
    return n_of_m(weight.detach(), n, m)[0]


def n_m_masks(
    scores: Sequence[Tensor],
    n: int,
    m: int,
    groups: int,
    *,
    kept: Sequence[Tensor] | None = None,
    parts: Parts | None = None,
) -> list[Tensor]:
    """Give so many groups an n:m pattern, those first that lose least by it, and leave the others full.

    Args:
        scores: Tensors ``(C_out, C_in, ...)`` with ``C_in`` a multiple of m, at least one; compared by ``|score|``.
        n: Entries to keep of each group, from 1 to m.
        m: Size of a group: consecutive input channels at one output channel and kernel position.
        groups: How many groups of all tensors together are to be n:m.
        kept: Masks of an earlier call; groups that are n:m there come first and keep their choice.
        parts: As in :func:`smallest_masks`; each process holds whole groups.

    Returns:
        One mask per tensor. The loss of a group is the sum of what it prunes; of equal losses, the earlier tensor and
        group (row-major in ``(C_out, C_in / m, ...)``) comes first.

    Raises:
        ValueError: If ``groups`` is not between the number of groups that are n:m in ``kept`` and that of all; a group
            of ``kept`` is neither n:m nor full; shapes differ; or as for ``n_m_mask``.
        TypeError: If a tensor of scores is not floating point, or one of ``kept`` not boolean.

    Example:
        >>> n_m_masks([torch.tensor([[0.3, 0.9, 0.1, 0.2]])], 1, 2, groups=1)
        [tensor([[ True,  True, False,  True]])]
    """
    _check_n_m("scores", scores, n, m)
    if kept is None:
        kept = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    _check_kept(scores, kept)
    held = [grouped(mask, m).sum(dim=2) for mask in kept]  # (C_out, C_in / m, ...)
    if any(bool(((own != n) & (own != m)).any()) for own in held):
        raise ValueError(f"kept must hold {n} or all of each {m} consecutive input channels")
    full = [own == m for own in held]
    sizes, gone = _sizes_and_gone(full, full, parts)
    fewest, most = sum(gone), sum(sizes)
    if not fewest <= check_whole("groups", groups, at_least=-LARGEST) <= most:
        raise ValueError(f"groups must be in [{fewest}, {most}], those of kept to all there are, got {groups}")
    choices, losses = zip(*(n_of_m(score.detach(), n, m) for score in scores), strict=True)
    stay = smallest(losses, full, groups, parts)  # True where a group stays full
    return [
        mask & (choice | (was_full & ~stays).logical_not_().repeat_interleave(m, dim=1))
        for mask, choice, was_full, stays in zip(kept, choices, full, stay, strict=True)
    ]


def sparsity_of(masks: Sequence[Tensor]) -> float:
    """The share of pruned weights over all masks.

    Args:
        masks: Boolean tensors, at least one.

    Returns:
        In [0, 1]; 0 where the masks have no entries.

    Raises:
        ValueError: If there are no masks.

    Example:
        >>> sparsity_of([torch.tensor([True, False]), torch.tensor([[False, False]])])
        0.75
    """
    check_tensors("masks", masks, "boolean")
    return sum(dropped(masks)) / max(sum(mask.numel() for mask in masks), 1)


def churn(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The share of weights that one mask keeps and the other prunes.

    Args:
        before: Boolean tensors, at least one.
        after: As many, of the same shapes.

    Returns:
        In [0, 1]; 0 where the masks have no entries.

    Raises:
        ValueError: If there are no masks, or their numbers or shapes differ.

    Example:
        >>> churn([torch.tensor([True, False, True, True])], [torch.tensor([False, True, True, True])])
        0.5
    """
    return sum(changes(before, after)) / max(sum(mask.numel() for mask in before), 1)


def changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[int]:
    """How many weights of each tensor one mask keeps and the other prunes.

    Args:
        before: Boolean tensors, at least one.
        after: As many, of the same shapes.

    Returns:
        One number a tensor.

    Raises:
        ValueError: If there are no masks, or their numbers or shapes differ.

    Example:
        >>> before, after = torch.tensor([True, False]), torch.tensor([False, True])
        >>> changes([before, before], [after, before])
        [2, 0]
    """
    check_tensors("before", before, "boolean")
    check_tensors("after", after, "boolean")
    shapes = [[tuple(mask.shape) for mask in masks] for masks in (before, after)]
    if not shapes[0] or shapes[0] != shapes[1]:
        raise ValueError(f"before and after must have the same shapes, got {shapes[0]} and {shapes[1]}")
    return held(old ^ new for old, new in zip(before, after, strict=True))


def _zeros(size: int, sparsity: float) -> int:
    return math.floor(sparsity * size + 0.5)


def _apportioned(total: int, shares: Sequence[int | Fraction]) -> list[int]:
    """Whole numbers with this sum, in proportion to the shares; all 0 where the shares are."""
    whole = sum(shares)
    if not whole:
        return [0] * len(shares)
    exact = [Fraction(total * share, whole) for share in shares]  # fractions, so that no sum misses by one
    counts = [math.floor(own) for own in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _check_sparsity(sparsity: float, argument: str = "sparsity") -> None:
    check_unit(argument, sparsity)


def _sizes_and_gone(
    scores: Sequence[Tensor], kept: Sequence[Tensor] | None, parts: Parts | None
) -> tuple[list[int], list[int]]:
    """The number of entries of each tensor, and how many of them are pruned already."""
    if kept is not None:
        _check_kept(scores, kept)
    sizes, gone = [score.numel() for score in scores], [0] * len(scores) if kept is None else dropped(kept)
    if parts is not None:
        both = parts.totals([*sizes, *gone])
        sizes, gone = both[: len(sizes)], both[len(sizes) :]
    return sizes, gone


def _check_kept(scores: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    check_tensors("kept", kept)
    expected, given = ([tuple(tensor.shape) for tensor in tensors] for tensors in (scores, kept))
    if expected != given:
        raise ValueError(f"kept must have the shapes of scores, {expected}, got {given}")
    for mask in kept:
        if mask.dtype != torch.bool:
            raise TypeError(f"kept must be boolean, got dtype {mask.dtype}")


def _checked_limits(sizes: Sequence[int], limits: Sequence[int], wanted: int) -> list[int]:
    """The limits, none more than the size of its layer."""
    for limit in check_numbers("limits", limits):
        check_whole("each of limits", limit, at_least=-LARGEST)
    if len(limits) != len(sizes):
        raise ValueError(f"limits must be one per tensor, {len(sizes)}, got {len(limits)}")
    if any(limit < 0 for limit in limits):
        raise ValueError(f"limits must not be negative, got {list(limits)}")
    within = [min(limit, size) for limit, size in zip(limits, sizes, strict=True)]
    if sum(within) < wanted:
        raise ValueError(f"limits allow {sum(within)} entries to be pruned, fewer than the {wanted} asked for")
    return within


def _check_n_m(name: str, scores: Sequence[Tensor], n: int, m: int) -> None:
    check_tensors(name, scores, "floating point")
    if check_whole("m", m, at_least=-LARGEST) < 1:
        raise ValueError(f"m must be positive, got {m}")
    if not 1 <= check_whole("n", n, at_least=-LARGEST) <= m:
        raise ValueError(f"n must be in [1, m], the size of a group, got n={n} and m={m}")
    for score in scores:
        if score.ndim < 2 or score.shape[1] % m:
            raise ValueError(f"{name} must have a dimension 1 that m={m} divides, got shape {tuple(score.shape)}")

"""Position-based scaling: each gradient is scaled by the distance of its weight to where it should end.

Kim, Yoo & Kwak, "Position-based Scaled Gradient for Model Quantization and Pruning", NeurIPS 2020, arXiv:2005.11035.
Gradient descent in a space that is warped this way moves weights less the nearer they are to a point of the grid that
quantisation will use, or to zero, so they gather there. The authors' code has no ``eps``.

:func:`position_scale` and :func:`zero_scale` are the factors of one tensor. What callbacks run in each step gives the
same numbers for many tensors, a few elements at a time, so that what lies between stays in the cache of a CPU and takes
little memory on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional._checks import check_floating, check_number, check_positive
from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional._steps import largest_magnitude, usable
from lightning_compress.functional.quantizers import along, integer_limits, nearest_grid_point, quantization_grid

CPU_ELEMENTS = 2**17  # few enough for the cache of a core, enough that calls take no time
GPU_ELEMENTS = 2**24


def position_scale(weight: Tensor, bits: int, eps: float = 0.0, *, axis: int | None = None) -> Tensor:
    """Distance of each weight to the nearest point of its grid.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8.
        eps: Added to each distance, at least 0. With 0, a weight on the grid never moves.
        axis: Dimension that has a grid for each of its entries; None: one grid for all.

    Returns:
        ``|w - wbar| + eps``, shape of ``weight``; float32, or float64 for float64 weights.

    Raises:
        ValueError: If ``bits``, ``eps`` or ``axis`` is out of range, or a weight is NaN or infinite.
        TypeError: If ``weight`` is not floating point.

    Example:
        >>> position_scale(torch.tensor([0.70, 0.33, -0.12, 0.06, -0.70]), bits=4)
        tensor([0.0000, 0.0300, 0.0200, 0.0400, 0.0000])
    """
    check_number("eps", eps, "at least 0", lambda number: number >= 0)
    step = quantization_grid(weight, bits, axis=axis)
    weight = at_least_float32(weight.detach())
    return (weight - nearest_grid_point(weight, step, bits, axis=axis)).abs() + eps


def zero_scale(weight: Tensor, eps: float) -> Tensor:
    """Distance of each weight to zero.

    Args:
        weight: Any shape, floating.
        eps: Added to each distance, positive: without it a weight that is 0 would stay so.

    Returns:
        ``|w| + eps``, shape of ``weight``; float32, or float64 for float64 weights.

    Raises:
        ValueError: If ``eps`` is not positive.
        TypeError: If ``weight`` is not floating point.

    Example:
        >>> zero_scale(torch.tensor([0.5, -0.25, 0.0]), eps=0.01)
        tensor([0.5100, 0.2600, 0.0100])
    """
    check_positive("eps", eps, "positive, or weights that are 0 could never change")
    return at_least_float32(check_floating("weight", weight).detach()).abs() + eps


def grid_positions(weight: Tensor, bits: int, *, axis: int | None = None, step: Tensor | None = None) -> Tensor:
    """Where each weight lies in the cell of its grid.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8.
        axis: As in :func:`position_scale`.
        step: Of the grid, where the weight is a part of a larger one, as of :func:`quantization_grid`. None: its own.

    Returns:
        ``(w - wbar) / D`` in [-1/2, 1/2], 0 on the grid; shape of ``weight``, float32 or float64.

    Raises:
        ValueError: If ``bits`` is out of range, or ``step`` is None and a weight is NaN or infinite.

    Example:
        >>> grid_positions(torch.tensor([0.70, 0.33, -0.12]), bits=4)
        tensor([ 0.0000,  0.3000, -0.2000])
    """
    step = quantization_grid(weight, bits, axis=axis) if step is None else step
    weight = at_least_float32(weight.detach())
    positions = (weight - nearest_grid_point(weight, step, bits, axis=axis)) / along(step, weight, axis)
    return positions.clamp_(-0.5, 0.5)  # rounding


def total_scale(
    weights: Sequence[Tensor],
    bits: Sequence[int] | None,
    *,
    axes: Sequence[int | None] | None = None,
    eps: float = 0.0,
    steps: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum of the factors of many tensors over all of their elements.

    Args:
        weights: Any shapes, floating.
        bits: Of each weight's grid; None: zero is where they should end.
        axes: As ``axis`` in :func:`position_scale`, for each weight; None: one grid for each.
        eps: Added to each distance, at least 0.
        steps: Of the grids, where weights are parts of larger ones, as of :func:`quantization_grid`. None: their own.

    Returns:
        The sum of ``|w - wbar| + eps``, or of ``|w| + eps``: float64, of 0 dimensions, on the CPU.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> total_scale([torch.tensor([0.70, 0.33]), torch.tensor([0.1, -0.06])], bits=[4, 2])
        tensor(0.0700, dtype=torch.float64)
    """
    with torch.no_grad():
        steps = _steps(weights, bits, axes, steps)
        sums = [factor.sum().cpu().double() for (factors,) in _factors(weights, steps, eps, 1.0) for factor in factors]
    return torch.stack(sums).sum()


def scale_gradients_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    bits: Sequence[int] | None,
    *,
    axes: Sequence[int | None] | None = None,
    scale: float = 1.0,
    eps: float = 0.0,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """Scale gradients by the positions of their weights, in place.

    Args:
        weights: Any shapes, floating.
        gradients: One for each weight, of its shape: ``g`` becomes ``g * (scale * (|w - wbar| + eps))``.
        bits: Of each weight's grid; None: zero is where they should end.
        axes: As ``axis`` in :func:`position_scale`, for each weight; None: one grid for each.
        scale: The authors' ``lambda_s``.
        eps: Added to each distance, at least 0.
        steps: As in :func:`total_scale`.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> gradient = torch.full((3,), 0.2)
        >>> scale_gradients_([torch.tensor([0.70, 0.33, -0.12])], [gradient], bits=[4], scale=150)
        >>> gradient
        tensor([0.0000, 0.9000, 0.6000])
    """
    with torch.no_grad():
        steps = _steps(weights, bits, axes, steps)
        for factors, parts in _factors(weights, steps, eps, scale, gradients):
            torch._foreach_mul_(parts, factors)


def scale_updates_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    bits: Sequence[int] | None,
    *,
    axes: Sequence[int | None] | None = None,
    scale: float = 1.0,
    eps: float = 0.0,
    steps: Sequence[Tensor] | None = None,
    kept: Sequence[float | Tensor] | None = None,
) -> None:
    """Scale what an optimizer has added to weights by the positions that these had before, in place.

    Args:
        weights: Any shapes, floating, after the step: ``w`` becomes ``b + scale * (|w0 - wbar0| + eps) * (w - b)``
            with ``b = kept * w0``.
        before: The same before it, ``w0``.
        bits: Of each weight's grid; None: zero is where they should end.
        axes: As ``axis`` in :func:`position_scale`, for each weight; None: one grid for each.
        scale: The authors' ``lambda_s``.
        eps: Added to each distance, at least 0.
        steps: As in :func:`total_scale`.
        kept: For each weight what decoupled weight decay leaves of it, which is not to be scaled. None: all.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> weight = torch.tensor([0.60, 0.43, -0.02])
        >>> scale_updates_([weight], [torch.tensor([0.70, 0.33, -0.12])], bits=[4], scale=10)
        >>> weight
        tensor([ 0.7000,  0.3600, -0.1000])
    """
    with torch.no_grad():
        steps = _steps(before, bits, axes, steps)
        starts = before if kept is None else [own * keep for own, keep in zip(before, kept, strict=True)]
        for factors, parts, bases in _factors(before, steps, eps, scale, weights, starts):
            moves = torch._foreach_sub([at_least_float32(part) for part in parts], bases)
            torch._foreach_mul_(moves, factors)
            torch._foreach_add_(moves, bases)
            torch._foreach_copy_(parts, moves)


def _factors(
    weights: Sequence[Tensor], steps: Sequence[Tensor] | None, eps: float, scale: float, *others: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], ...]]:
    """``scale * (|w - wbar| + eps)``, bit for bit as :func:`position_scale`, a few elements at a time.

    No point needs to be clamped, because no weight lies beyond the range that its own largest magnitude sets.

    Yields:
        Factors of some weights, or parts of them, in memory that the next ones use again; then what the other tensors
        have at their places.
    """
    columns = [[weight.detach() for weight in weights], [None] * len(weights) if steps is None else steps, *others]
    rows: list[tuple[Any, ...]] = list(zip(*columns, strict=True))
    block = torch.empty(CPU_ELEMENTS)
    for row in (row for row in rows if row[0].device.type == "cpu"):
        for weight, step, *rest in _split(row, CPU_ELEMENTS):
            wide = at_least_float32(weight)
            usual = wide.is_contiguous() and wide.dtype == block.dtype and wide.numel() <= block.numel()
            factor = block[: wide.numel()].view(wide.shape) if usual else torch.empty_like(wide)
            if step is None:
                torch.abs(wide, out=factor)
            else:
                torch.div(wide, step, out=factor).round_().mul_(step).sub_(wide).abs_()
            if eps:
                factor.add_(eps)
            yield [factor.mul_(scale)], *([part] for part in rest)
    for group in _groups([row for row in rows if row[0].device.type != "cpu"], GPU_ELEMENTS):
        pieces, own, *rest = (list(column) for column in zip(*group, strict=True))
        yield factors_together(pieces, None if steps is None else own, eps, scale), *rest


def factors_together(weights: list[Tensor], steps: list[Tensor] | None, eps: float, scale: float) -> list[Tensor]:
    """The same in few calls for many weights, of which each would cost a GPU more time than its work.

    Args:
        weights: Floating, on one device.
        steps: Of their grids, one for each, which broadcast along it; None: zero is where they should end.
        eps: Added to each distance.
        scale: Of the sum.

    Returns:
        The factors.

    Example:
        >>> factors_together([torch.tensor([0.70, 0.33])], [torch.tensor(0.1)], eps=0.0, scale=10.0)
        [tensor([0.0000, 0.3000])]
    """
    wide = [at_least_float32(weight) for weight in weights]
    if steps is None:
        factors = torch._foreach_abs(wide)
    else:
        factors = torch._foreach_div(wide, steps)
        torch._foreach_round_(factors)
        torch._foreach_mul_(factors, steps)
        torch._foreach_sub_(factors, wide)
        torch._foreach_abs_(factors)
    if eps:
        torch._foreach_add_(factors, eps)
    torch._foreach_mul_(factors, scale)
    return list(factors)


def _steps(
    weights: Sequence[Tensor],
    bits: Sequence[int] | None,
    axes: Sequence[int | None] | None,
    given: Sequence[Tensor] | None,
) -> list[Tensor] | None:
    """The grid of each weight, shaped to broadcast along it; None where there are none.

    As :func:`quantization_grid`, with few calls for many weights, and without its look for NaN, for which a GPU would
    have to be waited for: the weights of a training that has diverged get the gradient NaN.
    """
    if bits is None:
        return None
    axes = [None] * len(weights) if axes is None else axes
    if given is not None:
        return [along(step, weight, axis) for step, weight, axis in zip(given, weights, axes, strict=True)]
    magnitudes = [largest_magnitude(weight.detach(), axis) for weight, axis in zip(weights, axes, strict=True)]
    steps = [*magnitudes]
    kinds = [(own.device, own.dtype, entry) for own, entry in zip(magnitudes, bits, strict=True)]
    for kind in dict.fromkeys(kinds):
        chosen = [index for index, own in enumerate(kinds) if own == kind]
        _, highest = integer_limits(kind[2])
        joined = usable(torch.cat([magnitudes[index].reshape(-1) for index in chosen]) / highest)
        for index, step in zip(
            chosen, torch.split(joined, [magnitudes[index].numel() for index in chosen]), strict=True
        ):
            steps[index] = along(step.reshape(magnitudes[index].shape), weights[index], axes[index])
    return steps


def _groups(rows: Sequence[tuple[Any, ...]], most: int) -> Iterator[list[tuple[Any, ...]]]:
    """Rows of a weight and what belongs to it, in groups of few elements on one device."""
    waiting: dict[torch.device, list[tuple[Any, ...]]] = {}
    elements: Counter[torch.device] = Counter()
    for row in rows:
        device = row[0].device
        group = waiting.setdefault(device, [])
        for piece in _split(row, most):
            if group and elements[device] + piece[0].numel() > most:
                yield group.copy()
                group.clear()
                elements[device] = 0
            group.append(piece)
            elements[device] += piece[0].numel()
    yield from waiting.values()


def _split(row: tuple[Any, ...], most: int) -> Iterator[tuple[Any, ...]]:
    """A row in pieces of few elements; what has one entry along dimension 0, or none, goes with each."""
    weight = row[0]
    if weight.numel() <= most:
        yield row
        return
    rows = len(weight)
    length = max(1, most * rows // weight.numel())
    for start in range(0, rows, length):
        yield tuple(
            own[start : start + length] if own is not None and own.ndim and len(own) == rows else own for own in row
        )

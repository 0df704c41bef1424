"""Quantisers: grids of few bits, and the rounding of tensors to them.

A grid is a step (``scale``) and an integer that stands for zero (``zero_point``). Weights get symmetric grids with as
many points below zero as above, activations affine grids that contain zero. Integers and values are those of ONNX's
``QuantizeLinear`` and ``DequantizeLinear``: ``clamp(round(x / scale) + zero_point)``, ties to even.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877. Learned steps: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional._checks import (
    LARGEST,
    check_axis,
    check_flag,
    check_floating,
    check_number,
    check_positive,
    check_tensor,
    check_whole,
    is_finite,
)
from lightning_compress.functional._dtypes import at_least_float32
from lightning_compress.functional._steps import largest_magnitude, rows, usable

FEWEST_BITS, MOST_BITS = 2, 8
SHRINKAGES = 100  # clipped ranges that are tried, down to a hundredth of the largest


def check_bits(bits: int, argument: str = "bits") -> int:
    """Refuse a number of bits that no grid here has.

    Args:
        bits: 2 to 8.
        argument: Its name in the error message.

    Returns:
        The same.

    Raises:
        ValueError: If it is no whole number from 2 to 8.

    Example:
        >>> check_bits(4)
        4
    """
    return check_whole(argument, bits, at_least=FEWEST_BITS, at_most=MOST_BITS)


def integer_limits(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """The smallest and the largest integer of a grid.

    Args:
        bits: 2 to 8.
        signed: Symmetric and narrow, +-(2^(bits-1) - 1); otherwise from 0 to 2^bits - 1.

    Returns:
        Both.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> integer_limits(4), integer_limits(4, signed=False)
        ((-7, 7), (0, 15))
    """
    check_bits(bits)
    check_flag("signed", signed)
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (-highest if signed else 0), highest


def quantization_grid(weight: Tensor, bits: int, *, axis: int | None = None) -> Tensor:
    """Step of the symmetric grid whose last point is the largest magnitude.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8.
        axis: Dimension that has a grid for each of its entries; None: one grid for all.

    Returns:
        ``max|w| / (2^(bits-1) - 1)``, of 0 dimensions, or with ``axis`` of shape ``(weight.shape[axis],)``; float32, or
        float64 for float64 weights. 1 where the magnitudes are 0, or too small for a normal step.

    Raises:
        ValueError: If ``bits`` or ``axis`` is out of range, there is no weight, or one is NaN or infinite.
        TypeError: If ``weight`` is not floating point.

    Example:
        >>> quantization_grid(torch.tensor([0.70, 0.33, -0.12, 0.05, -0.70]), bits=4)
        tensor(0.1000)
    """
    _, highest = integer_limits(bits)
    return usable(_magnitude(weight, axis) / highest)


def mse_grid(weight: Tensor, bits: int, *, axis: int | None = None) -> Tensor:
    """Step of the symmetric grid with the least squared error, large magnitudes clipped.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8.
        axis: As in :func:`quantization_grid`.

    Returns:
        The best of 100 evenly spaced fractions of :func:`quantization_grid`'s step, that itself among them; of equally
        good ones the largest. Shape and type as there.

    Raises:
        ValueError: As :func:`quantization_grid`.
        TypeError: As :func:`quantization_grid`.

    Example:
        >>> weight = torch.tensor([1.0, *[0.33] * 40])  # one outlier: with 2 bits the grid is better off without it
        >>> mse_grid(weight, bits=2)
        tensor(0.3500)
    """
    lowest, highest = integer_limits(bits)
    largest = quantization_grid(weight, bits, axis=axis)
    scaled = weight.detach().to(largest.dtype) / along(largest, weight, axis)  # of the size of 1: squares are numbers
    matrix = scaled.reshape(1, -1) if axis is None else rows(scaled, axis)
    steps = torch.ones_like(largest).reshape(-1)
    best = steps.clone()
    least = torch.full_like(best, torch.inf)
    rounded = torch.empty_like(matrix)
    for tried in range(SHRINKAGES, 0, -1):
        step = steps * (tried / SHRINKAGES)
        torch.div(matrix, step[:, None], out=rounded)
        rounded.round_().clamp_(lowest, highest).mul_(step[:, None]).sub_(matrix)
        error = torch.linalg.vector_norm(rounded, dim=1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return usable(best.reshape(largest.shape) * largest)


def nearest_grid_point(weight: Tensor, step: Tensor, bits: int, *, axis: int | None = None) -> Tensor:
    """The point of a symmetric grid that is nearest to each weight.

    Args:
        weight: Any shape, floating.
        step: Of 0 dimensions, or of shape ``(weight.shape[axis],)``; positive.
        bits: 2 to 8.
        axis: Dimension that ``step`` belongs to, where it has one.

    Returns:
        ``step * clamp(round(weight / step), -limit, limit)``, ties to even; shape and type of ``weight``.

    Raises:
        ValueError: If ``bits`` is out of range, or ``step`` does not belong to dimension ``axis``.
        TypeError: If ``weight`` is not floating point.

    Example:
        >>> nearest_grid_point(torch.tensor([0.33, -0.12, 0.9]), torch.tensor(0.1), bits=4)
        tensor([ 0.3000, -0.1000,  0.7000])
    """
    lowest, highest = integer_limits(bits)
    check_axis(axis, check_floating("weight", weight))
    _check_along("step", step, weight, axis)
    step = along(step, weight, axis)
    wide = weight.to(step.dtype)
    return torch.div(wide, step).round_().clamp_(lowest, highest).mul_(step).to(weight.dtype)


def range_grid(minimum: float, maximum: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of the affine grid over a range, widened so that it contains 0.

    Args:
        minimum: Smallest value.
        maximum: Largest value.
        bits: 2 to 8.

    Returns:
        ``scale = (maximum - minimum) / (2^bits - 1)``, a number that float32 represents, and ``zero_point =
        clamp(round(-minimum / scale), 0, 2^bits - 1)``. For a range of nothing but 0 the scale is 1.

    Raises:
        ValueError: If ``bits`` is out of range, a limit is NaN or infinite, or the minimum above the maximum.

    Example:
        >>> range_grid(-1.0, 2.0, bits=2)
        (1.0, 1)
    """
    minimum = check_number("minimum", minimum, "a finite number", is_finite)
    maximum = check_number("maximum", maximum, "a finite number", is_finite)
    if minimum > maximum:
        raise ValueError(f"minimum must not be above maximum, got {minimum!r} and {maximum!r}")
    [grid] = range_grids([(minimum, maximum)], [bits])
    return grid


def range_grids(ranges: Sequence[tuple[float, float]], bits: Sequence[int]) -> list[tuple[float, int]]:
    """As :func:`range_grid`, of many ranges at once.

    Args:
        ranges: The smallest and the largest value of each.
        bits: Those of each.

    Returns:
        Scale and zero point of each.

    Raises:
        ValueError: As :func:`range_grid`, for the first that it is raised for.

    Example:
        >>> range_grids([(-1.0, 2.0), (0.0, 0.0)], [2, 8])
        [(1.0, 1), (1.0, 0)]
    """
    limits = torch.tensor(ranges, dtype=torch.float64, device="cpu").reshape(-1, 2)
    highest = torch.tensor([integer_limits(own, signed=False)[1] for own in bits], dtype=torch.float64, device="cpu")
    for place in (~limits.isfinite().all(dim=1) | (limits[:, 0] > limits[:, 1])).nonzero():
        minimum, maximum = ranges[int(place)]
        raise ValueError(f"a range must go from a finite number to one not below it, got {minimum!r} to {maximum!r}")
    low, high = limits[:, 0].clamp(max=0.0), limits[:, 1].clamp(min=0.0)
    scales = usable(((high - low) / highest).float())
    for place in (~scales.isfinite()).nonzero():
        minimum, maximum = ranges[int(place)]
        raise ValueError(f"a range from {minimum!r} to {maximum!r} has a step that float32 does not represent")
    zero_points = torch.minimum(torch.round(-low / scales.double()).clamp(min=0), highest)
    return list(zip(scales.tolist(), zero_points.int().tolist(), strict=True))


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
) -> Tensor:
    """The integers of a tensor on a grid.

    Args:
        x: Any shape, floating.
        scale: Step of the grid, a number, of 0 dimensions or of shape ``(x.shape[axis],)``; positive.
        zero_point: Integer that stands for 0, likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: Dimension that ``scale`` and ``zero_point`` belong to, where they have one.

    Returns:
        ``clamp(round(x / scale) + zero_point, quant_min, quant_max)``, ties to even; int32, shape of ``x``.

    Raises:
        ValueError: If ``scale``, ``zero_point``, ``quant_min`` or ``quant_max`` is out of range, or ``scale`` or
            ``zero_point`` does not belong to dimension ``axis``.
        TypeError: If ``x`` is not floating point.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.25, 0.75, 9.0]), 0.5, 1, 0, 3)
        tensor([0, 1, 3, 3], dtype=torch.int32)
    """
    _check_grid(x, scale, zero_point, quant_min, quant_max, axis)
    step = _step(scale, x, axis)
    offset = along(zero_point, x, axis) if isinstance(zero_point, Tensor) else zero_point
    return (torch.div(x.detach().to(step.dtype), step).round_() + offset).clamp_(quant_min, quant_max).to(torch.int32)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
) -> Tensor:
    """Round a tensor to a grid; its gradient passes straight through.

    Args:
        x: Any shape, floating. Half precision is rounded in float32; the result is as near to the grid as its type has
            numbers.
        scale: As in :func:`quantize`.
        zero_point: As in :func:`quantize`.
        quant_min: As in :func:`quantize`.
        quant_max: As in :func:`quantize`.
        axis: As in :func:`quantize`.

    Returns:
        ``(quantize(x, ...) - zero_point) * scale``, shape and type of ``x``. The gradient is 1 where ``quant_min <=
        round(x / scale) + zero_point <= quant_max`` and 0 elsewhere; neither scale nor zero point get one.

    Raises:
        ValueError: As :func:`quantize`.
        TypeError: As :func:`quantize`.

    Example:
        >>> x = torch.tensor([-1.0, 0.25, 0.75, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, 0.5, 1, 0, 3)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([-0.5, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    _check_grid(x, scale, zero_point, quant_min, quant_max, axis)
    step = _step(scale, x, axis)
    offset: Any = along(zero_point, x, axis).to(step) if isinstance(zero_point, Tensor) else zero_point
    lowest, highest = quant_min - offset, quant_max - offset  # of round(x / scale), which saves two passes over x
    if not (torch.is_grad_enabled() and x.requires_grad):  # nothing is kept: in place, half the time
        return torch.div(x.to(step.dtype), step).round_().clamp_(lowest, highest).mul_(step).to(x.dtype)
    quantised: Tensor = _Rounded.apply(x, step, lowest, highest)
    return quantised


def learned_step_quantize(
    x: Tensor,
    step: Tensor,
    bits: int,
    signed: bool = True,
    *,
    zero_point: int = 0,
    narrow: bool = False,
    axis: int | None = None,
) -> Tensor:
    """Round to a grid whose step learns too (LSQ).

    Args:
        x: Any shape, floating.
        step: Of 0 dimensions, or of shape ``(x.shape[axis],)``; positive.
        bits: 2 to 8.
        signed: From ``-2^(bits-1)`` to ``2^(bits-1) - 1``; otherwise from 0 to ``2^bits - 1``.
        zero_point: Integer that stands for 0, where not ``signed``; from 0 to ``2^bits - 1``, and it does not learn.
        narrow: Whether a signed grid has as many points below 0 as above, as weights in a file have.
        axis: Dimension that ``step`` belongs to, where it has one.

    Returns:
        ``round(clamp(x / step, lowest, highest)) * step``, shape and type of ``x``, with the limits less
        ``zero_point``. The gradient is 1 for ``x`` where ``lowest < x / step < highest`` and 0 elsewhere; for ``step``
        it is ``round(x / step) - x / step`` there and ``lowest`` or ``highest`` elsewhere, not scaled.

    Raises:
        ValueError: If ``bits`` or ``zero_point`` is out of range, ``step`` is not positive or of another shape.

    Example:
        >>> step = torch.tensor(0.5, requires_grad=True)
        >>> learned_step_quantize(torch.tensor([0.9, -0.4, 0.1, -2.0]), step, bits=3).tolist()
        [1.0, -0.5, 0.0, -2.0]
    """
    check_flag("signed", signed)
    check_flag("narrow", narrow)
    check_bits(bits)
    check_axis(axis, check_floating("x", x))
    if check_tensor("step", step).ndim != (0 if axis is None else 1) or (
        axis is not None and len(step) != x.shape[axis]
    ):
        expected = "of 0 dimensions" if axis is None else f"of shape ({x.shape[axis]},) with axis={axis}"
        raise ValueError(f"step must be {expected}, got shape {tuple(step.shape)}")
    if not torch.compiler.is_compiling() and step.device.type == "cpu" and not (step.detach() > 0).all():
        raise ValueError(f"step must be positive, got {step.detach().tolist()}")
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    lowest = (-highest if narrow else -highest - 1) if signed else 0
    if not lowest <= check_whole("zero_point", zero_point, at_least=-LARGEST) <= highest or (signed and zero_point):
        raise ValueError(f"zero_point must be {0 if signed else f'from 0 to {highest}'}, got {zero_point!r}")
    return learned_rounding(x, step, lowest - zero_point, highest - zero_point, axis=axis)


def learned_rounding(x: Tensor, step: Tensor, lowest: int, highest: int, *, axis: int | None = None) -> Tensor:
    """As :func:`learned_step_quantize`, between any two integers, and without its look at the step.

    Args:
        x: As there.
        step: As there.
        lowest: Of ``round(x / step)``.
        highest: Likewise.
        axis: As there.

    Returns:
        ``round(clamp(x / step, lowest, highest)) * step``, with the gradients of there.

    Example:
        >>> learned_rounding(torch.tensor([0.9, -2.0]), torch.tensor(0.5), -3, 3)
        tensor([ 1.0000, -1.5000])
    """
    quantised: Tensor = _LearnedStep.apply(x, along(step, x, axis), lowest, highest)
    return quantised


def gradient_scaled(x: Tensor, factor: float) -> Tensor:
    """The same tensor, whose gradient is multiplied.

    Args:
        x: Any shape.
        factor: What by.

    Returns:
        The values of ``x``.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> gradient_scaled(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000])
    """
    scaled: Tensor = _GradientScaled.apply(x, factor)
    return scaled


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Values of one dimension, shaped so that they broadcast along a dimension of a tensor.

    Args:
        values: Of 0 dimensions, which stay as they are, or of shape ``(x.shape[axis],)``.
        x: The tensor.
        axis: Its dimension.

    Returns:
        A view with as many dimensions as ``x``.

    Example:
        >>> along(torch.ones(3), torch.ones(2, 3, 4), axis=1).shape
        torch.Size([1, 3, 1])
    """
    if values.ndim == 0 or axis is None:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


class _Rounded(torch.autograd.Function):
    """Rounding to a grid, straight through within its limits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lowest: Tensor | int, highest: Tensor | int) -> Tensor:
        integers = torch.div(x.to(step.dtype), step).round_()
        fixed = not isinstance(lowest, Tensor)
        ctx.limits = (lowest, highest) if fixed else None
        ctx.save_for_backward(integers, *(() if fixed else (lowest, highest)))
        return integers.clamp(lowest, highest).mul_(step).to(x.dtype)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        integers, *limits = ctx.saved_tensors
        if limits:
            lowest, highest = limits
            return torch.where((integers >= lowest) & (integers <= highest), gradient, 0), None, None, None
        lowest, highest = ctx.limits
        return _within(gradient, integers, lowest - 0.5, highest + 0.5), None, None, None


class _LearnedStep(torch.autograd.Function):
    """Rounding to a grid, with the gradient of its step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
        ratio = torch.div(at_least_float32(x), step).clamp_(lowest, highest)
        rounded = ratio.round().mul_(step)
        ctx.limits = lowest, highest
        ctx.save_for_backward(ratio, rounded, step)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, rounded, step = ctx.saved_tensors
        wide = gradient.to(ratio.dtype)
        within = _within(wide, ratio, *ctx.limits)
        # round(clamp(x / step)) - x / step, the latter only inside: two products and no tensor in between
        slope = _products(wide, rounded, step) / step - _products(within, ratio, step)
        return within.to(gradient.dtype), slope.to(step.dtype), None, None


class _GradientScaled(torch.autograd.Function):
    """Nothing, and a multiplied gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _products(one: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """The sum of the products of two tensors, over all that broadcasts in a third."""
    if like.ndim == 0:
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).sum_to_size(like.shape)


def _within(values: Tensor, where: Tensor, lowest: float, highest: float) -> Tensor:
    """Values where others are strictly between two limits, 0 elsewhere: one vectorised pass."""
    passed: Tensor = torch.ops.aten.hardtanh_backward(values.to(where.dtype), where, lowest, highest)
    return passed.to(values.dtype)


def _check_grid(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int, axis: int | None
) -> None:
    """Refuse what is no grid for a tensor; numbers within tensors are not looked at: a GPU would be waited for."""
    check_axis(axis, check_floating("x", x))
    if not isinstance(scale, Tensor):
        check_positive("scale", scale)
    if not isinstance(zero_point, Tensor):
        check_whole("zero_point", zero_point, at_least=-LARGEST)
    for argument, values in (("scale", scale), ("zero_point", zero_point)):
        if isinstance(values, Tensor):
            _check_along(argument, values, x, axis)
    check_whole("quant_min", quant_min, at_least=-LARGEST)
    check_whole("quant_max", quant_max, at_least=quant_min)


def _check_along(argument: str, values: Tensor, x: Tensor, axis: int | None) -> None:
    """Refuse what does not belong to a dimension, or to all of a tensor."""
    shape = check_tensor(argument, values).shape
    if values.ndim and (axis is None or tuple(shape) != (x.shape[axis],)):
        expected = "" if axis is None else f", or of shape ({x.shape[axis]},)"
        raise ValueError(f"{argument} must be of 0 dimensions{expected}, got shape {tuple(shape)}")


def _magnitude(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude, of all or along a dimension."""
    check_axis(axis, check_floating("weight", weight))
    if weight.numel() == 0:
        raise ValueError(f"a grid needs at least one weight, got shape {tuple(weight.shape)}")
    magnitude = largest_magnitude(weight.detach(), axis)
    if not magnitude.isfinite().all():
        raise ValueError("a weight is NaN or infinite, and has no place on a grid")
    return magnitude


def _step(scale: Tensor | float, x: Tensor, axis: int | None) -> Tensor:
    """A scale as a tensor in the type that a tensor is rounded in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(scale, Tensor):
        return torch.tensor(scale, dtype=dtype, device=x.device)
    return along(scale, x, axis).to(x.device, dtype)

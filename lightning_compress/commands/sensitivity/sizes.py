"""How large a file will be, before it is written: the integers, scales and packing of ``export``, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.export.emission import block_size
from lightning_compress.functional import magnitude_mask
from lightning_compress.mechanisms.selection import joined
from lightning_compress.mechanisms.weights import named_weights
from lightning_compress.report.measure import compressed_bytes

FLOAT_BITS = 32
"""A layer that is left as it is."""
GRAPH = 640
"""Bytes of operators and names that go with a layer, about."""


def integer_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of one layer in a file with ``precision="int4"``, or in fp32.

    Args:
        shape: Of the weight.
        bits: Up to 4: two integers a byte; up to 8: one; 32: float32.

    Returns:
        Weight, scales, zero points, bias and operators.

    Example:
        >>> [integer_bytes((16, 8, 3, 3), bits) for bits in (32, 8, 4)]
        [5312, 1936, 1352]
    """
    rows, elements = shape[0], 1
    for length in shape:
        elements *= length
    rest = 4 * rows + GRAPH  # a bias, its own or that of the batch norm folded in
    if bits == FLOAT_BITS:
        return 4 * elements + rest
    if bits > 4:
        return elements + 4 * rows + rows + rest
    if len(shape) > 2:
        return (elements + 1) // 2 + 4 * rows + (rows + 1) // 2 + rest
    size = block_size(shape[1])
    blocks = rows * -(-shape[1] // size)
    return blocks * (size // 2 + 4) + rest


def other_bytes(module: nn.Module, layers: Sequence[Layer]) -> int:
    """Bytes in float32 of all parameters but those of some layers, and of batch norm, which is folded.

    Args:
        module: The LightningModule.
        layers: The layers.

    Returns:
        Bytes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
        >>> other_bytes(net, [Layer("0", "Linear", ("0.weight",), 4)])
        16
    """
    named = named_weights(module)
    left_out = {id(named[name]) for layer in layers for name in layer.weights}
    left_out |= {id(named[bias]) for layer in layers if (bias := joined(layer.name, "bias")) in named}
    left_out |= {id(own) for part in module.modules() if isinstance(part, _BatchNorm) for own in part.parameters()}
    return 4 * sum(own.numel() for own in module.parameters() if id(own) not in left_out)


def deflated_bytes(weights: Sequence[Tensor], sparsities: Sequence[float]) -> dict[float, int]:
    """Bytes of a layer's weights in float32, deflated, at some sparsities.

    Args:
        weights: Of the layer.
        sparsities: Shares of zeros, by magnitude.

    Returns:
        Sparsity to bytes, 0.0 among them.

    Example:
        >>> import torch
        >>> sizes = deflated_bytes([torch.randn(64, 64)], [0.9])
        >>> sizes[0.9] < 0.25 * sizes[0.0]
        True
    """
    found = {}
    for sparsity in (0.0, *sparsities):
        masks = magnitude_mask(list(weights), sparsity)
        masked = [weight.masked_fill(~mask, 0.0) for weight, mask in zip(weights, masks, strict=True)]  # no -0.0
        found[sparsity] = sum(compressed_bytes(weight.float().cpu().numpy().tobytes()) for weight in masked)
    return found

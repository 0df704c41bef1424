"""From the grids of a network to the operators of an ONNX file: the same mode, but it writes where it would round.

Weights become integers in the file, with their scales; activations pass ``QuantizeLinear`` and ``DequantizeLinear``,
which ONNX Runtime fuses with the operators between them into integer kernels. Batch norm is folded exactly: with
symmetric weights and a grid for each output channel the integers stay as they are, up to the sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.functional.quantizers import along, quantize
from lightning_compress.mechanisms.grids import COMPUTED, Grids
from lightning_compress.mechanisms.kernels import FoldedNorm, kernel_of
from lightning_compress.mechanisms.operations import CONVOLUTIONS, keeps_dimensions
from lightning_compress.mechanisms.rounding import GATE_STEP, Rounding, multiplied

CHILD = "quantized"
"""What the names of integers and scales in the file begin with."""
BLOCK = 128  # input channels that share a scale in a 4-bit product; all blocks of a row have the same here
SMALLEST_BLOCK = 16
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer as it stands in the file: ``scale * integers * x + gain * bias + offset``.

    Attributes:
        integers: int8, the shape of the weight.
        scale: float32, one for each output channel.
        gain: float32, one for each output channel.
        offset: float32, one for each output channel.
    """

    integers: Tensor
    scale: Tensor
    gain: Tensor
    offset: Tensor


def integer_layer(
    grids: Grids, site: str, weight: Tensor, norm: _BatchNorm | None = None, bias: Tensor | None = None
) -> IntegerLayer:
    """Integers and scales of a layer, and what becomes of its bias, the batch norm behind it folded in.

    Args:
        grids: The grids of the network.
        site: Key of the layer.
        weight: What it was given as its weight.
        norm: The batch norm that alone consumes its output; None: there is none to fold.
        bias: Its bias.

    Returns:
        The layer. A channel that batch norm multiplies by a negative number has its integers negated; one that it
        multiplies by 0 has zeros. A channel so faint that its bias would not fit into 32 bits has larger steps.

    Example:
        >>> from lightning_compress.mechanisms.grids import WeightGrid, WeightSite
        >>> grids = Grids(weights={"w": WeightGrid(torch.tensor(0.5), 8)}, sites={"s": WeightSite("w", 0, 1)})
        >>> layer = integer_layer(grids, "s", torch.tensor([[1.0, -0.6]]))
        >>> layer.integers, layer.scale
        (tensor([[ 2, -1]], dtype=torch.int8), tensor([0.5000]))
    """
    place = grids.sites[site]
    grid = grids.weights[place.name].rows(place.start, place.stop)
    weight = multiplied(grids, site, weight.detach().float())
    integers = quantize(weight, grid.step, 0, *grid.limits, axis=grid.axis)
    kernel = kernel_of(grids, site, len(weight), None if norm is None else _folded(grids, site, norm), bias)
    integers, scale = integers * kernel.shift, kernel.scale
    shrunk = (integers * along(kernel.ratio, integers, 0)).round().int()
    integers = torch.where(along(kernel.ratio < 1.0, integers, 0), shrunk, integers)
    usable = scale >= TINY
    integers = torch.where(along(usable, integers, 0), integers * along(kernel.gain.sign().int(), integers, 0), 0)
    scale = torch.where(usable, scale, 1.0)
    return IntegerLayer(integers.to(torch.int8), scale, kernel.gain.float(), kernel.offset.float())


def _folded(grids: Grids, site: str, norm: _BatchNorm) -> FoldedNorm:
    mean, variance = grids.statistics.get(grids.folds[site], (norm.running_mean, norm.running_var))
    return FoldedNorm(mean, variance, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]


class Emitting(Rounding):
    """Writes quantisers as ONNX operators while the network is traced.

    Args:
        network: A copy of the network, in evaluation mode, on the CPU.
        grids: Its grids.
        opset: ONNX operator set.
        products: Whether linear layers of up to 4 bits become ``MatMulNBits``.

    Attributes:
        held: What goes into the file, as buffers, which the trace reads.
        buffers: For each key and part, ``site:part``, the name of its buffer.
    """

    def __init__(self, network: nn.Module, grids: Grids, *, opset: int, products: bool = False) -> None:
        super().__init__(network, grids)
        self._opset = opset
        self._products = products
        self.held = nn.Module()
        self.buffers: dict[str, str] = {}
        self._multiplied: set[str] = set()  # layers that become ``MatMulNBits``
        for site in grids.sites:
            self._hold_layer(site, network)
        for key, grid in grids.activations.items():
            self._hold(
                key,
                scale=torch.tensor(grid.scale, dtype=torch.float32),
                zero_point=torch.tensor(grid.zero_point, dtype=torch.uint8),
            )
        step = torch.tensor(GATE_STEP, dtype=torch.float32)
        zero, largest = torch.tensor([0, 255], dtype=torch.uint8)
        self._hold("gate", scale=step, half=step / 2, out=step / 6, three=largest, zero_point=zero)

    def activation(self, key: str, x: Tensor) -> Tensor:
        """``QuantizeLinear`` and ``DequantizeLinear``; with fewer than 8 bits, the integers are clipped."""
        grid = self.grids.activations.get(key)
        if grid is None:
            return super().activation(key, x)  # says what is wrong
        scale, zero_point = self._tensor(key, "scale"), self._tensor(key, "zero_point")
        x = self._through(x, scale, zero_point)
        if grid.bits < 8:
            lowest, highest = (limit - grid.zero_point for limit in grid.limits)
            x = self._through(x.clamp(lowest * grid.scale, highest * grid.scale), scale, zero_point)
        return x

    def gate(self, key: str, x: Tensor) -> Tensor:
        """``x + 3`` in steps of 6/255 from 0 to 6, read in steps of 1/255."""
        parts = ("scale", "half", "out", "three", "zero_point")
        scale, half, out, three, zero_point = (self._tensor("gate", part) for part in parts)
        raised = x + self._read(three, half, zero_point)
        return self._read(self._write(raised, scale, zero_point), out, zero_point)

    def average(self, key: str, function: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> Tensor:
        """``GlobalAveragePool``, which has an integer kernel."""
        shape = (*x.shape[:2], 1, 1)
        pooled = self._symbol("GlobalAveragePool", (x,), torch.float32, shape)
        keeps = function.__name__ != "mean" or (args[1] if len(args) > 1 else keeps_dimensions(options))
        return pooled if keeps else pooled.flatten(1)

    def entered(self, x: Tensor) -> Tensor:
        """The maximum of one tensor: ONNX Runtime would round the weights of a float layer between two quantisers."""
        return self._symbol("Max", (x,), torch.float32, x.shape)

    def layer(
        self,
        site: str,
        function: Callable[..., Any],
        take: Callable[[], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """The layer on the integers of its weight."""
        if site not in self.grids.sites:
            return None
        x, offset = take(), self._offset(site, bias)
        if function.__name__ in CONVOLUTIONS:
            result: Tensor = function(x, self._weight(site, axis=0), offset, *rest, **options)
            return result
        if site in self._multiplied:
            return self._product(site, x, weight.shape[0], weight.shape[1], offset)
        matrix = self._weight(site, axis=1)  # (in, out): no transposition is left between it and the product
        if x.ndim == 2 and f"{site}:bias" in self.buffers:
            parts = (self._tensor(site, "bias"), self._tensor(site, "bias_scale"))
            offset = self._symbol("DequantizeLinear", parts, torch.float32, parts[0].shape, axis=0)
            return torch.addmm(offset, x, matrix)
        return torch.matmul(x, matrix) if offset is None else torch.matmul(x, matrix) + offset

    def norm(
        self, module: str, layer: str, function: Callable[..., Any], x: Tensor, *rest: Any, **options: Any
    ) -> Tensor | None:
        """Nothing is left of a batch norm that was folded."""
        return x if self.grids.folds.get(layer) == module and layer in self.grids.sites else None

    def _hold_layer(self, site: str, network: nn.Module) -> None:
        place = self.grids.sites[site]
        owner, _, attribute = place.name.rpartition(".")
        weight: Tensor = getattr(network.get_submodule(owner), attribute)[place.start : place.stop]
        fold = self.grids.folds.get(site)
        norm: Any = None if fold is None else network.get_submodule(fold)
        bias = network.get_parameter(place.bias) if place.bias not in (None, COMPUTED) else None
        layer = integer_layer(self.grids, site, weight, norm, bias)
        self._hold(site, gain=layer.gain, offset=layer.offset)
        if weight.ndim == 2 and self._products and self.grids.weights[place.name].bits <= 4:
            self._multiplied.add(site)
            self._hold(site, **_blocks(layer.integers, layer.scale))
            return
        integers = layer.integers.t().contiguous() if weight.ndim == 2 else layer.integers
        zeros = torch.zeros(len(layer.scale), dtype=torch.int8)
        self._hold(site, weight=integers, weight_scale=layer.scale, weight_zero_point=zeros)
        if weight.ndim == 2 and self.active and place.source in self.grids.activations and place.bias != COMPUTED:
            self._hold_bias(site, layer, bias)

    def _hold_bias(self, site: str, layer: IntegerLayer, bias: Tensor | None) -> None:
        """The bias in the steps that the products of integers have, as an integer kernel adds it."""
        source = self.grids.sites[site].source or ""
        step = layer.scale.double() * self.grids.activations[source].scale
        shift = layer.offset.double() + (0.0 if bias is None else bias.detach().double() * layer.gain)
        limits = torch.iinfo(torch.int32)
        integers = (shift / step).round().clamp(limits.min, limits.max)
        if bias is not None or bool(shift.any()):
            self._hold(site, bias=integers.to(torch.int32), bias_scale=step.float())

    def _hold(self, site: str, **tensors: Tensor) -> None:
        for part, tensor in tensors.items():
            key = f"{site}:{part}"
            spelled = _spelled(key)  # "a.b" and "a__b" alike
            names = (spelled, *(f"{spelled}_{number}" for number in range(2, len(self.buffers) + 3)))
            self.buffers[key] = next(name for name in names if not hasattr(self.held, name))
            self.held.register_buffer(self.buffers[key], tensor)

    def _tensor(self, site: str, part: str) -> Tensor:
        value: Tensor = getattr(self.held, self.buffers[f"{site}:{part}"])
        return value

    def _weight(self, site: str, *, axis: int) -> Tensor:
        parts = tuple(self._tensor(site, f"weight{part}") for part in ("", "_scale", "_zero_point"))
        return self._symbol("DequantizeLinear", parts, torch.float32, parts[0].shape, axis=axis)

    def _offset(self, site: str, bias: Tensor | None) -> Tensor | None:
        """What is added to each output channel; None where that is nothing."""
        if not {site} & (self.grids.folds.keys() | self.grids.biases.keys() | self.grids.divisors.keys()):
            return bias
        offset = self._tensor(site, "offset")
        return offset if bias is None else bias * self._tensor(site, "gain") + offset

    def _product(self, site: str, x: Tensor, rows: int, columns: int, bias: Tensor | None) -> Tensor:
        packed, scale = self._tensor(site, "weight"), self._tensor(site, "weight_scale")
        result = self._symbol(
            "com.microsoft::MatMulNBits",
            (x, packed, scale),
            torch.float32,
            (*x.shape[:-1], rows),
            K=columns,
            N=rows,
            bits=4,
            block_size=block_size(columns),
        )
        return result if bias is None else result + bias

    def _through(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self._read(self._write(x, scale, zero_point), scale, zero_point)

    def _write(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self._symbol("QuantizeLinear", (x, scale, zero_point), torch.uint8, x.shape)

    def _read(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self._symbol("DequantizeLinear", (x, scale, zero_point), torch.float32, x.shape)

    def _symbol(
        self, name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any
    ) -> Tensor:
        version = 1 if "::" in name else self._opset
        result: Tensor = torch.onnx.ops.symbolic(
            name, inputs, attrs=attributes, dtype=dtype, shape=shape, version=version
        )
        return result


def _spelled(key: str) -> str:
    """A key in letters, digits and underscores."""

    def sign(found: re.Match[str]) -> str:
        return {".": "__", ":": "_"}.get(found[0], f"_{ord(found[0])}_")

    return re.sub(r"[^A-Za-z0-9_]", sign, key)


def block_size(columns: int) -> int:
    """How many input channels of a 4-bit product share a scale.

    Args:
        columns: How many there are.

    Returns:
        A power of two from 16 to 128.

    Example:
        >>> block_size(10), block_size(100), block_size(1000)
        (16, 64, 128)
    """
    size = BLOCK
    while size > SMALLEST_BLOCK and size > columns:
        size //= 2
    return size


def _blocks(integers: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Two integers of 4 bits in a byte, the lower half first, in blocks of input channels that have a scale each."""
    rows, columns = integers.shape
    size = block_size(columns)
    blocks = -(-columns // size)
    padded = nn.functional.pad(integers.to(torch.int16), (0, blocks * size - columns)) + 8
    halves = padded.reshape(rows, blocks, size // 2, 2)
    packed = (halves[..., 0] | (halves[..., 1] << 4)).to(torch.uint8)
    return {"weight": packed, "weight_scale": scale[:, None].expand(rows, blocks).reshape(-1).contiguous()}

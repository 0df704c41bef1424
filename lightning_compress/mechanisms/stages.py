"""Stages of a network, seen in one forward: where its resolution changes, and which layer ends each resolution."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from lightning_compress import _compat
from lightning_compress.mechanisms.selection import is_metric, plain_name
from lightning_compress.mechanisms.wrapping import marked

MAP_LAYERS = (_ConvNd, _BatchNorm, _MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, nn.GroupNorm)


@dataclass(frozen=True)
class LayerOutput:
    """What one layer returned.

    Attributes:
        name: Dotted name.
        shape: Of the tensor that it returned, the batch first.
        calls: How often it ran.
        same_as: Name of the layer inside it whose very tensor it handed on.
        sequence: Whether it only runs its children in a row.
        weights: Whether it has a weight of its own, of two dimensions or more.
        makes_maps: Whether its type says that the channels come first: a convolution, a pooling, batch norm.
        channels_last: Whether what it ends with says that they come last: layer norm or a linear layer on maps.
    """

    name: str
    shape: tuple[int, ...]
    calls: int = 1
    same_as: str | None = None
    sequence: bool = False
    weights: bool = False
    makes_maps: bool = False
    channels_last: bool = False

    @property
    def size(self) -> tuple[int, ...] | None:
        """Height and width of a map, length of a sequence of tokens; None for what is neither, or a single point."""
        if len(self.shape) == 4 and not self.channels_last:
            size: tuple[int, ...] = self.shape[2:]
        elif len(self.shape) == 3:
            size = self.shape[1:2]
        else:
            return None
        return None if all(length == 1 for length in size) else size


@dataclass(frozen=True)
class Stage:
    """A run of layers of one resolution.

    Attributes:
        layer: Dotted name of the layer that ends it.
        shape: What that layer returns, the batch first.
        size: Height and width, or the number of tokens.
    """

    layer: str
    shape: tuple[int, ...]
    size: tuple[int, ...]


@contextmanager
def record_outputs(root: nn.Module) -> Iterator[Callable[[], list[LayerOutput]]]:
    """Record the shape of what each layer below a network returns; a metric is no layer.

    Args:
        root: The network.

    Yields:
        A function that gives the records so far, in the order in which the layers first returned.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> with record_outputs(network) as outputs:
        ...     _ = network(torch.ones(1, 1, 8, 8))
        >>> [(output.name, output.shape) for output in outputs()]
        [('0', (1, 4, 6, 6)), ('1', (1, 4, 6, 6))]
    """
    seen: dict[str, tuple[nn.Module, tuple[int, ...], int, str | None]] = {}
    returned: list[tuple[weakref.ref[Tensor], str]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                inner = next((other for tensor, other in reversed(returned) if tensor() is output), None)
                calls = seen[name][2] + 1 if name in seen else 1
                seen[name] = (module, tuple(output.shape), calls, inner)
                returned.append((weakref.ref(output), name))

        return note

    layers: dict[str, nn.Module] = {}
    for own_name, module in root.named_modules():
        layers.setdefault(plain_name(own_name), module)  # of a compiled layer the wrapper, not what is inside
    with ExitStack() as stack:
        for name, layer in layers.items():
            if layer is not root and not isinstance(layer, torch.jit.ScriptModule) and not is_metric(layer):
                stack.callback(layer.register_forward_hook(marked(hook(name))).remove)
        _compat.reset_compiled_code()
        yield lambda: [
            _described(name, module, shape, calls, inner) for name, (module, shape, calls, inner) in seen.items()
        ]


def stages(outputs: Sequence[LayerOutput]) -> list[Stage]:
    """The ends of a network's resolutions, from the first to the last.

    A layer counts as a whole unless it is a sequence, or itself goes through several resolutions: so the end of a
    residual stage is its last block, and not what lies inside of the next, before its stride. Resolutions with a
    single weighted layer, such as a stem, are left out where there are others.

    Args:
        outputs: As :func:`record_outputs` gives them.

    Returns:
        One stage a resolution; the last is the deepest.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))
        >>> with record_outputs(network) as outputs:
        ...     _ = network(torch.ones(1, 1, 8, 8))
        >>> [(stage.layer, stage.size) for stage in stages(outputs())]
        [('1', (6, 6)), ('3', (3, 3))]
    """
    # What a 1-D convolution makes is (N, C, L), and cannot be told from tokens further on.
    if any(output.makes_maps and len(output.shape) == 3 for output in outputs):
        outputs = [output for output in outputs if len(output.shape) != 3]
    # What has another length than the batch is no sample's: windows and heads, say.
    batch = next((output.shape[0] for output in outputs if output.size is not None), None)
    outputs = [output for output in outputs if output.shape[:1] == (batch,)]
    named = {output.name: output for output in outputs}
    found: list[tuple[Stage, int]] = []
    for unit in _units(outputs):
        if unit.size is None or unit.calls != 1:
            continue
        weights = sum(output.weights for output in outputs if _is_at_or_below(output.name, unit.name))
        stage = Stage(_outermost(unit, named), unit.shape, unit.size)
        if found and found[-1][0].size == stage.size:
            found[-1] = (stage, found[-1][1] + weights)
        else:
            found.append((stage, weights))
    enough = 2 if any(weights >= 2 for _, weights in found) else 0
    return [stage for stage, weights in found if weights >= enough]


def match_stages(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[tuple[Stage, Stage]]:
    """Pair the stages of two networks, by their size and order.

    Args:
        student: The student's stages.
        teacher: The teacher's.

    Returns:
        Pairs of stages of one size, from the first to the last: as many as can be had in order. Where no size is
        common to both, they are paired by order alone, from the deepest up.

    Example:
        >>> ours = [Stage("a", (1, 4, 8, 8), (8, 8)), Stage("b", (1, 8, 4, 4), (4, 4))]
        >>> theirs = [Stage("c", (1, 4, 16, 16), (16, 16)), Stage("d", (1, 9, 4, 4), (4, 4))]
        >>> [(one.layer, other.layer) for one, other in match_stages(ours, theirs)]
        [('b', 'd')]
    """
    # best[i][j]: the pairs, by place, of the first i and the first j; of equally many, those that lie deepest
    best: list[list[list[tuple[int, int]]]] = [[[] for _ in range(len(teacher) + 1)] for _ in range(len(student) + 1)]
    for i, ours in enumerate(student, start=1):
        for j, theirs in enumerate(teacher, start=1):
            candidates = [best[i - 1][j], best[i][j - 1]]
            if ours.size == theirs.size:
                candidates.append([*best[i - 1][j - 1], (i, j)])
            best[i][j] = max(candidates, key=lambda pairs: (len(pairs), sum(map(sum, pairs))))
    if best[-1][-1]:
        return [(student[i - 1], teacher[j - 1]) for i, j in best[-1][-1]]
    count = min(len(student), len(teacher))
    return list(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))


def _units(outputs: Sequence[LayerOutput]) -> list[LayerOutput]:
    """The layers that count as a whole, in their order."""
    opened = {output.name for output in outputs if output.sequence or _is_multistage(output, outputs)}
    # What returned no single tensor is not among the outputs: a backbone that returns a dict is looked into as well.
    closed = {output.name for output in outputs} - opened
    return [
        output
        for output in outputs
        if output.name in closed and not any(_is_below(output.name, other) for other in closed)
    ]


def _is_multistage(output: LayerOutput, outputs: Sequence[LayerOutput]) -> bool:
    """Whether a layer goes through three resolutions or more, or leaves them behind."""
    inside = [other for other in outputs if _is_below(other.name, output.name)]
    maps = {other.size for other in inside if other.makes_maps} - {None}
    tokens = {other.size for other in inside if len(other.shape) == 3} - {None}  # not a third size of attention on maps
    if output.size is not None or output.channels_last:
        return max(len(maps), len(tokens)) >= 3
    is_point = len(output.shape) in (3, 4)  # a block whose stride ends at a single point is still one block
    return len(maps | tokens) >= (2 if is_point else 1)


def _outermost(unit: LayerOutput, named: dict[str, LayerOutput]) -> str:
    """The name of the sequence that ends with this layer, if there is one."""
    for output in named.values():
        if output.same_as == unit.name and _is_below(unit.name, output.name):
            return _outermost(output, named)
    return unit.name


def _is_below(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _is_at_or_below(name: str, other: str) -> bool:
    return name == other or _is_below(name, other)


def _described(name: str, module: nn.Module, shape: tuple[int, ...], calls: int, same_as: str | None) -> LayerOutput:
    module = _compat.uncompiled(module)
    parts = list(module.modules())
    last = any(
        (isinstance(part, nn.LayerNorm) and part.normalized_shape == shape[-1:])
        or (isinstance(part, nn.Linear) and part.out_features == shape[-1])
        for part in parts
    )
    return LayerOutput(
        name,
        shape,
        calls,
        same_as,
        sequence=isinstance(module, nn.Sequential),
        weights=any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)),
        makes_maps=isinstance(module, MAP_LAYERS),
        channels_last=last and len(shape) == 4 and not any(isinstance(part, MAP_LAYERS) for part in parts),
    )

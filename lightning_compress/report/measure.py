"""What a network costs: parameters, zeros, multiply-accumulates, bytes.

Nothing is inferred: zeros are counted in the tensors, bytes in what was written, and a number that could not be
measured is ``None`` with the reason beside it. Time is measured in ``latency.py``.
"""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.export.errors import first_line
from lightning_compress.mechanisms.isolation import evaluating, module_kept, random_state_kept
from lightning_compress.mechanisms.selection import lies_within
from lightning_compress.mechanisms.tree import is_constant, leaves, rebuild
from lightning_compress.report.table import Layer

_CHUNK = 1 << 20  # bytes that the compressor is fed at a time


class MacCount(NamedTuple):
    """Multiply-accumulates of one sample, or the reason why there is no number."""

    value: int | None
    reason: str | None = None


def count_parameters(module: nn.Module) -> int:
    """Count the elements of all parameters, a shared parameter once.

    Args:
        module: Any module.

    Returns:
        Number of elements.

    Raises:
        ValueError: If a parameter of a lazy module has no shape yet.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for _, parameter in _parameters(module))


def count_nonzeros(module: nn.Module) -> int:
    """Count the parameter elements that are not zero, a shared parameter once.

    Args:
        module: Any module; its weights are read where they are.

    Returns:
        Number of elements.

    Raises:
        ValueError: If a parameter of a lazy module has no shape yet, or one on the meta device has no values.

    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]))
        >>> count_nonzeros(layer)
        3
    """
    total = 0
    for name, parameter in _parameters(module):
        if parameter.is_meta:
            raise ValueError(f"parameter '{name}' has no values: it is on the meta device; materialise it first")
        total += int(parameter.count_nonzero())
    return total


def layer_table(module: nn.Module) -> list[Layer]:
    """List the layers that hold a weight of two or more dimensions, with what is in it.

    One-dimensional weights (norms) carry no connections and are left out. Recurrent and attention layers with
    several weights are one row.

    Args:
        module: Any module.

    Returns:
        One record a layer, in the order of ``named_modules()``.

    Raises:
        ValueError: If a weight of a lazy module has no shape yet.

    Example:
        >>> layer_table(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
        [Layer(name='0', type='Conv2d', sparsity=0.0, bits=32, filters=4, parameters=36)]
    """
    for _ in _parameters(module):
        pass  # names a lazy parameter before its shape is asked for
    table = []
    for name, layer in module.named_modules():
        weights = [] if isinstance(layer, ParametrizationList) else _weights(layer)
        if not weights:
            continue
        elements = sum(weight.numel() for weight in weights)
        nonzeros = sum(int(weight.count_nonzero()) for weight in weights)
        table.append(
            Layer(
                name=name,
                type=_layer_type(layer),
                sparsity=1 - nonzeros / elements if elements else 0.0,
                bits=8 * weights[0].element_size(),
                filters=_filters(layer, weights[0]),
                parameters=elements,
            )
        )
    return table


def count_macs(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> MacCount:
    """Count the multiply-accumulates of one forward of one sample: half of what torch's ``FlopCounterMode`` counts.

    The forward runs in evaluation mode without gradients. Fused attention and recurrent kernels, which the counter
    does not see, and compiled graphs are switched off meanwhile. The network and the random states are put back.

    Args:
        network: What is called.
        args: Its positional inputs; tensors whose dimension 0 has the size of the first tensor's are cut to 1.
        kwargs: Its keyword inputs, treated alike.

    Returns:
        The count, or ``None`` with the reason.

    Example:
        >>> count_macs(nn.Linear(3, 2), (torch.zeros(8, 3),))
        MacCount(value=6, reason=None)
    """
    try:
        one_args, one_kwargs = single_sample((tuple(args), dict(kwargs or {})))
        counter = FlopCounterMode(display=False)
        with random_state_kept(), module_kept(network), evaluating(network), _plain_kernels(), counter:
            network(*one_args, **one_kwargs)
    except Exception as error:  # a report says what failed, whatever a network may raise
        return MacCount(None, f"MACs were not counted: {type(error).__name__}: {first_line(error)}")
    flops = int(counter.get_total_flops())
    if flops == 0 and any(parameter.ndim > 1 for parameter in network.parameters()):
        return MacCount(None, "MACs were not counted: the counter saw no matrix product and no convolution")
    return MacCount(flops // 2)


def macs_by_layer(
    root: nn.Module, run: Callable[[], object], *, within: Collection[str] | None = None
) -> dict[str, int]:
    """Count the multiply-accumulates of a run, apart for each layer without children.

    Args:
        root: What the names are relative to.
        run: Calls networks within it, which are left as the calls leave them.
        within: Names of the networks whose calls count; None: all that is computed.

    Returns:
        Name of a layer to the count of all its calls; under "" what belongs to none. Layers that count nothing are
        left out.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> macs_by_layer(network, lambda: network(torch.zeros(1, 3)))
        {'0': 6}
    """
    counter = FlopCounterMode(display=False)
    began: dict[int, int] = {}  # by identity: the hash of a metric changes with what it has seen
    counted: dict[str, int] = {}
    networks: dict[str, int] = {}

    def before(layer: nn.Module, _: object) -> None:
        began[id(layer)] = counter.get_total_flops()

    def after(counts: dict[str, int], name: str, layer: nn.Module) -> None:
        counts[name] = counts.get(name, 0) + counter.get_total_flops() - began[id(layer)]

    with ExitStack() as stack:
        for name, layer in root.named_modules():
            leaf, whole = not list(layer.children()), within is not None and name in within
            inside = within is None or lies_within(name, within)
            for counts in [counted] * (leaf and inside) + [networks] * whole:
                stack.callback(layer.register_forward_pre_hook(before).remove)
                done = partial(lambda counts, name, layer, *_: after(counts, name, layer), counts, name)
                stack.callback(layer.register_forward_hook(done).remove)
        with torch.no_grad(), _plain_kernels(), counter:
            run()
    total = counter.get_total_flops() if within is None else sum(networks.values())
    counted[""] = counted.get("", 0) + total - sum(counted.values())
    return {name: flops // 2 for name, flops in counted.items() if flops}


def single_sample(inputs: Any, *, samples: int = 1) -> Any:
    """Cut a nest of inputs to one sample.

    Args:
        inputs: Lists, tuples, dicts and dataclasses of tensors, numbers, strings and ``None``.
        samples: How many at most, instead of one.

    Returns:
        The same nest; tensors whose dimension 0 has the size of the first tensor's are copies of their first entry
        ``(1, ...)``, others are copies as they are.

    Raises:
        ValueError: If there is no tensor with a batch dimension, or a leaf may hide one.

    Example:
        >>> single_sample((torch.zeros(4, 2), {"mask": torch.ones(4), "scale": 2.0}))
        (tensor([[0., 0.]]), {'mask': tensor([1.]), 'scale': 2.0})
    """
    values = [leaf for _, leaf in leaves(inputs)]
    for value in values:
        if not isinstance(value, (Tensor, torch.dtype, torch.device)) and not is_constant(value):
            raise ValueError(f"an input of type {type(value).__name__} cannot be cut to one sample")
    batch = next((value.size(0) for value in values if isinstance(value, Tensor) and value.ndim), None)
    if not batch:
        raise ValueError("the inputs hold no tensor with a batch dimension")

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf[:samples] if leaf.ndim and leaf.size(0) == batch else leaf).detach().clone()

    return rebuild(inputs, cut)


def serialized_state(module: nn.Module) -> bytes:
    """Write a module's ``state_dict`` as ``torch.save`` writes it, in memory.

    Args:
        module: Any module; tensors on an accelerator are copied to the CPU.

    Returns:
        The bytes of the file.

    Example:
        >>> len(serialized_state(nn.Linear(3, 2))) > 4 * 8
        True
    """
    state = module.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.detach().cpu()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def bytes_of_state(module: nn.Module) -> int:
    """Size of a module's saved ``state_dict``.

    Args:
        module: Any module.

    Returns:
        Bytes.

    Example:
        >>> bytes_of_state(nn.Linear(100, 100)) > 4 * 10_100
        True
    """
    return len(serialized_state(module))


def compressed_bytes(source: bytes | str | os.PathLike[str], *, level: int = 9) -> int:
    """Size after deflate, as in a zip archive: what a download of a sparse model costs.

    Args:
        source: The data itself, or the path of a file.
        level: From 1 to 9, the smallest size; 6 takes a tenth of the time for sparse weights, and a tenth more bytes.

    Returns:
        Bytes, without an archive's header.

    Raises:
        FileNotFoundError: If the path does not exist.

    Example:
        >>> compressed_bytes(bytes(10_000)) < 100
        True
    """
    deflate = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return sum(len(deflate.compress(chunk)) for chunk in _chunks(source)) + len(deflate.flush())


def _chunks(source: bytes | str | os.PathLike[str]) -> Iterable[bytes]:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter '{name}' of a lazy module has no shape yet; run one forward pass first")
        yield name, parameter


def _weights(layer: nn.Module) -> list[Tensor]:
    """The layer's own weights of two or more dimensions, as its forward uses them."""
    own = [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim > 1]
    if is_parametrized(layer):
        own += [getattr(layer, name).detach() for name in layer.parametrizations]  # type: ignore[union-attr]
    return [weight for weight in own if weight.ndim > 1]


def _layer_type(layer: nn.Module) -> str:
    """The class as the user wrote it: a parametrized layer's class is generated from it."""
    return type(layer).__mro__[1 if is_parametrized(layer) else 0].__name__


def _filters(layer: nn.Module, weight: Tensor) -> int | None:
    """Output channels, read from the tensor: attributes go stale when a layer is cut."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return int(weight.size(1)) * layer.groups
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear)):
        return int(weight.size(0))
    return None


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Make torch take kernels that the counter knows: it counts 0 for fused attention, encoder layers and LSTMs."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch's on TF32 and on hooks of compiled modules: nothing for the user to do
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield

"""The quantisation mode: an untouched network computes with weights and activations of few bits.

A ``TorchFunctionMode`` sees every operation of a network, also those between its modules. It is on while the network
runs, and at no other time: the loss is not the network's. An activation is named by the operation that made it, ``path
of the module:operation:number in that call``, so that training, calibration, evaluation and export agree on it whoever
consumes it. What happens to a tensor is up to :class:`Quantizers`: they observe, round, or write into a file.

The names and what was made of a tensor are kept as attributes on the tensors, which compiled code can trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.operations import (
    CONVOLUTIONS,
    LAYERS,
    Kind,
    is_global_average,
    is_operator,
    kind_of,
    operation_name,
    writes,
)
from lightning_compress.mechanisms.pausing import PausableMode
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.tree import named_tensors, rebuild
from lightning_compress.mechanisms.wrapping import copied_plainly, marked, shadowed

KEY = "_lightning_compress_key"
"""Attribute of a tensor: the operation that made it."""
ROUNDED = "_lightning_compress_rounded"
"""Attribute of a tensor: itself on its grid, for all that consume it."""
VERSION = "_lightning_compress_version"
"""Attribute of a tensor: how often it had been written to when that was made."""
OWNS = "_lightning_compress_owns"
"""Attribute of a tensor of whose rounded version there are views: a list, not empty once it was itself written to."""
ORIGIN = "_lightning_compress_origin"
"""Attribute of such a view: the same list."""
STATE = "_lightning_compress_state"
"""Attribute of a tensor: one of the following."""
PENDING, GRID, FREE, PRODUCT = "pending", "grid", "free", "product"
"""It needs a quantiser behind the kernel that made it; it is on a grid; it may be put on one; it may, and must where a
float operation follows, for ONNX Runtime would make one float kernel of a linear layer and what is fused into it."""
LAYER = "_lightning_compress_layer"
"""Attribute of a tensor: the key of the convolution or linear layer that has just made it."""
CHANNELS = "_lightning_compress_channels"
"""Attribute of a tensor: the key of the layer whose channels these still are, but for batch norm and ReLU."""
STEP = "_lightning_compress_step"
"""Attribute of a layer's output that goes into a batch norm: the step of its weight's grid."""
BIAS = "_lightning_compress_bias"
"""Attribute of such an output: the bias in it."""
COPIED = "_lightning_compress_copied"
"""Attribute of a tensor: what it is a copy of, which torch makes for a full backward hook."""
OUTPUT = ":output:0"
"""The key under which a network's return consumes tensors."""
MARKS = (KEY, ROUNDED, VERSION, OWNS, ORIGIN, STATE, LAYER, CHANNELS, STEP, BIAS, COPIED)


_WRITTEN = (
    "of the tensor that '{key}' made and views of it, one was written to after the other was used, which a quantised "
    "network cannot follow; write to a clone"
)


_CHECKPOINTING = (
    "activation checkpointing within the network runs parts of it again in the backward pass, where they would not be "
    "quantised; turn it off, or put it around the whole network"
)


_BACKWARD_HOOK = (
    "its full backward hook makes copies of what it takes and returns, which cannot be followed between pieces of "
    "compiled code; remove it, or do not compile the network"
)


class QuantizationError(RuntimeError):
    """A network cannot be quantised, or not in the way that it was calibrated."""


class Quantizers:
    """What is done to the tensors of a quantised network; the base does nothing.

    Attributes:
        active: Whether activations have quantisers at all.
    """

    active = True

    def activation(self, key: str, x: Tensor) -> Tensor:
        """The tensor on its grid."""
        return x

    def gate(self, key: str, x: Tensor) -> Tensor:
        """``hardsigmoid(x)`` of a tensor on a grid, itself on the grid of 255 steps from 0 to 1."""
        return torch.clamp((x + 3.0) / 6.0, 0.0, 1.0)

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
        """What a convolution or a linear layer gives for the input that it takes; None: it is left in float."""
        return None

    def norm(
        self, module: str, layer: str, function: Callable[..., Any], x: Tensor, *rest: Any, **options: Any
    ) -> Tensor | None:
        """What a batch norm gives right after a layer; None: it is no part of the layer."""
        return None

    def average(self, key: str, function: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The mean of maps over all positions."""
        result: Tensor = function(x, *args, **options)
        return result

    def entered(self, x: Tensor) -> Tensor:
        """A tensor on a grid that a convolution or linear layer takes that is left in float."""
        return x

    def left(self, site: str) -> None:
        """An operation stays in float."""

    def consumed(self, layer: str | None, channels: str | None, site: str) -> None:
        """An operation takes a tensor, and which layer has just made it, or whose channels it has."""

    def shared(self, key: str, site: str) -> bool:
        """Whether what would run as a part of a kernel is not the only one that takes the kernel's output."""
        return False


class ModulePaths:
    """Where in a network an operation runs: the path of calls, and its number within the innermost one."""

    def __init__(self) -> None:
        self._frames: list[tuple[str, str, dict[str, int]]] = [("", "", {})]

    def restart(self) -> None:
        """Begin a call of the network."""
        self._frames[:] = [("", "", {})]

    def enter(self, name: str, owner: str | None = None) -> None:
        """A module below the network is called; by its owner, or by another that knows it."""
        outer_name, outer_path, counts = self._frames[-1]
        below = name.removeprefix(f"{outer_name}.") if outer_name else name
        inside = not outer_name or below != name
        if owner is not None and owner != outer_name:
            below, inside = name, False
        step = "." if inside else ">"
        earlier = counts.get(name, 0)
        counts[name] = earlier + 1
        path = f"{outer_path}{step if outer_path or not inside else ''}{below}" + (f"#{earlier}" if earlier else "")
        self._frames.append((name, path, {}))

    def leave(self) -> None:
        """It has returned."""
        if len(self._frames) > 1:
            self._frames.pop()

    def site(self, operation: str) -> str:
        """The key of an operation that runs now."""
        _, path, counts = self._frames[-1]
        number = counts.get(f":{operation}", 0)
        counts[f":{operation}"] = number + 1
        return f"{path}:{operation}:{number}"

    @property
    def module(self) -> str:
        """Dotted name of the module that runs."""
        return self._frames[-1][0]


class QuantizationMode(PausableMode):
    """Sees every operation while it is on, and hands its tensors to quantisers.

    Args:
        quantizers: What is done to them.
        paths: Where operations run.
    """

    def __init__(self, quantizers: Quantizers, paths: ModulePaths) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.paths = paths
        self._borrowed: list[Tensor] = []
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if self.paused:
            return func(*args, **options)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        views: list[bool] | None = None if target is None else getattr(target, OWNS, None)
        result = self._dispatched(func, args, options)
        if views is not None and (result is target or writes(func)):
            views.append(True)
        return result

    def _dispatched(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        name = operation_name(func)
        kind = kind_of(name, args, options)
        if kind is Kind.ASKED:
            result = func(*args, **options)
            pending = isinstance(result, Tensor) and getattr(args[0], STATE, None) == PENDING  # ``x.T``, say
            return self._moved(Kind.CUT, "", func, args[0], args[1:], options) if pending else result
        if name == "view_as" and len(args) == 2 and args[0] is args[1]:
            return self._copied(func, args[0])
        if name == "multi_head_attention_forward":
            if torch.compiler.is_dynamo_compiling():  # which cannot be told to look into it
                raise QuantizationError(
                    "nn.MultiheadAttention cannot be quantised within one compiled graph; compile without "
                    "fullgraph=True, or not at all"
                )
            with self, _compat.attention_in_python():
                return func(*args, **options)
        site = self.paths.site(name)
        if kind is not Kind.FLOAT and (result := self._quantised(kind, name, site, func, args, options)) is not None:
            return result
        return self._in_float(site, func, args, options)

    def outputs(self, output: Any) -> Any:
        """What a network returns: a kernel's output is on a grid, and nothing bears a mark."""

        def finished(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            self._consume(leaf, OUTPUT)
            return leaf if getattr(leaf, STATE, None) == PRODUCT else self._needed(leaf)

        result = rebuild(output, finished)
        for _, tensor in [*named_tensors(output), *named_tensors(result)]:  # only now: one may be there twice
            unmark(tensor)
        return result

    def _quantised(
        self, kind: Kind, name: str, site: str, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """The result of an operation that a quantised network knows; None: it runs in float."""
        if kind is Kind.WEIGHTED:
            return self._weighted(name, site, func, *args, **options)
        if kind is Kind.JOINED:
            return self._joined(name, site, func, args, options)
        x = args[0] if args else options.get("input")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        rest = args[1:]
        options = {key: value for key, value in options.items() if key != "input"}
        if kind in (Kind.MOVED, Kind.CUT):
            return self._moved(kind, site, func, x, rest, options)
        if kind is Kind.NORM:
            return self._norm(site, func, x, rest, options)
        state = getattr(x, STATE, None)
        if kind is Kind.FUSED:
            return None if state is None else self._fused(name, site, func, x, rest, options)
        vector = kind is Kind.CURVED and state in (FREE, PRODUCT) and x.ndim == 2  # between two linear layers
        if not self.quantizers.active or not (vector or state in (PENDING, GRID)):
            return None
        if kind is Kind.POOLED:
            return self._pooled(name, site, func, x, rest, options)
        return self._curved(name, site, func, x, rest, options)

    def _weighted(
        self,
        name: str,
        site: str,
        func: Callable[..., Any],
        input: Tensor,  # noqa: A002 - as torch calls it
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        def take() -> Tensor:
            self._consume(input, site)
            return self._on_grid(input, site)

        result = self.quantizers.layer(site, func, take, weight, bias, *rest, **options)
        if result is None:
            return None
        integer, step, own = name in CONVOLUTIONS and self.quantizers.active, *_kernel_marks(result)
        self._mark(result, site, PENDING if integer else FREE)
        if step is not None:
            setattr(result, STEP, step)
            setattr(result, BIAS, own)
        setattr(result, LAYER, site)
        setattr(result, CHANNELS, site)
        return result

    def _norm(
        self, site: str, func: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        layer, state = getattr(x, LAYER, None), getattr(x, STATE, None)
        if layer is None:
            return None
        self._consume(x, site)
        result = self.quantizers.norm(self.paths.module, layer, func, x, *rest, **options)
        if result is None:
            return None
        self._mark(result, site, state)
        setattr(result, CHANNELS, layer)
        return result

    def _fused(
        self, name: str, site: str, func: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        self._consume(x, site)
        state, channels = getattr(x, STATE), getattr(x, CHANNELS, None)
        in_place = writes(func) or options.get("inplace") or (bool(rest) and rest[-1] is True)
        if state == PENDING and not in_place and self.quantizers.shared(getattr(x, KEY), site):
            return self._mark(func(self._on_grid(x, site), *rest, **options), site, PENDING)
        result = func(x, *rest, **options)
        product = PRODUCT if state == FREE and x.ndim == 2 else state
        self._mark(result, site, PENDING if state == GRID else product)
        if name == "relu":
            setattr(result, CHANNELS, channels)
        return result

    def _joined(
        self, name: str, site: str, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        many = name not in ("add", "mul", "multiply")
        operands = list(args[0]) if many and args and isinstance(args[0], (list, tuple)) else list(args)
        states = [getattr(operand, STATE, None) for operand in operands if isinstance(operand, Tensor)]
        known = len(states) == len(operands) > 1 and None not in states
        if not self.quantizers.active or not known or (options and not many) or {*states} <= {FREE, PRODUCT}:
            return None
        for operand in operands:
            self._consume(operand, site)
        rounded = [self._on_grid(operand, site) for operand in operands]
        if many:
            result = torch.cat(rounded, *args[1:], **options)
        else:
            result = torch.add(*rounded) if name == "add" else torch.mul(*rounded)
            result = _kept(func, options, operands[0], result)
        return self._mark(result, site, PENDING)

    def _pooled(
        self, name: str, site: str, func: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        whole = name in ("mean", "adaptive_avg_pool2d")
        if whole and not is_global_average(name, x, rest, options):
            return None
        if len(rest) > 4 and rest[3] and rest[2] in (0, (0,), (0, 0)):  # ceil_mode: ONNX Runtime counts otherwise
            rest = (*rest[:4], False, *rest[5:])  # nothing is padded, so nothing changes
        self._consume(x, site)
        rounded = self._on_grid(x, site)
        result = (
            self.quantizers.average(site, func, rounded, *rest, **options) if whole else func(rounded, *rest, **options)
        )
        return self._mark(result, site, PENDING)

    def _curved(
        self, name: str, site: str, func: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        self._consume(x, site)
        rounded = self._on_grid(x, site)
        if name in ("hardswish", "hardsigmoid"):
            gate = self.quantizers.gate(site, rounded)
            result = gate if name == "hardsigmoid" else rounded * gate
        elif name == "silu":
            gate = self._mark(torch.sigmoid(rounded), f"{site}:gate", PENDING)
            result = rounded * self._on_grid(gate, site)
        elif name == "sigmoid":
            result = torch.sigmoid(rounded)
        else:
            slope = rest[0] if rest else options.get("negative_slope", 0.01)
            result = nn.functional.leaky_relu(rounded, slope)
        if rest and rest[-1] is True:  # leaky_relu, silu, hardswish, hardsigmoid: the last that they take
            options = {**options, "inplace": True}
        result = _kept(func, options, x, result)
        return self._mark(result, site, GRID if name == "hardsigmoid" else PENDING)

    def _moved(
        self, kind: Kind, site: str, func: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Numbers that are moved stay on the grid that they are on, and keep their name."""
        key = getattr(x, KEY, None)
        if key is None:
            return func(x, *rest, **options)
        self._consume(x, site)
        rounded = self._needed(x)
        state = GRID if rounded is not x else getattr(x, STATE, None)
        if writes(func) and rounded is not x:
            rounded = x.copy_(rounded)
        state = PENDING if kind is Kind.CUT and state == GRID else state
        result = func(rounded, *rest, **options)
        if torch.compiler.is_compiling() and not isinstance(result, Tensor):  # what can bear a mark there
            result = tuple(part.view_as(part) if isinstance(part, Tensor) else part for part in result)
        for tensor in [result] if isinstance(result, Tensor) else result:
            if isinstance(tensor, Tensor):
                self._mark(tensor, key, state)
                _note_origin(tensor, x, rounded)
        return result

    def _in_float(self, site: str, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run an operation without an integer kernel, on what the kernels before it can give."""
        met, layer = False, site.rsplit(":", 2)[-2] in LAYERS
        replaced: list[tuple[Tensor, Tensor]] = []

        def needed(leaf: Any) -> Any:
            nonlocal met
            if not isinstance(leaf, Tensor):
                return leaf
            met = met or leaf.is_floating_point() or leaf.is_complex()
            self._consume(leaf, site)
            rounded = self._needed(leaf)
            if rounded is not leaf:
                replaced.append((leaf, rounded))
            return self.quantizers.entered(rounded) if layer and getattr(rounded, STATE, None) == GRID else rounded

        if writes(func) and args and isinstance(args[0], Tensor):  # to be found in that very tensor
            rounded = needed(args[0])
            target = args[0] if rounded is args[0] else args[0].copy_(rounded)
            unmark(target)
            args = (target, *rebuild(args[1:], needed))
        else:
            args = rebuild(args, needed)
        result = func(*args, **rebuild(options, needed))
        if isinstance(result, Tensor):
            unmark(result)
            if any(result is given for given in args):  # a buffer that is counted up, a weight of the right type
                self._borrow(result)
            if met and result.is_floating_point():
                self._mark(result, site, None)
            for leaf, rounded in replaced:
                _note_origin(result, leaf, rounded)
        made = [tensor for _, tensor in named_tensors(result)]
        if met and any(tensor.is_floating_point() or tensor.is_complex() for tensor in made):
            self.quantizers.left(site)
        return result

    def _needed(self, x: Tensor) -> Tensor:
        """A tensor for whoever takes it in float: on its grid, if the kernel that made it needs a quantiser."""
        return self._on_grid(x, "") if getattr(x, STATE, None) in (PENDING, PRODUCT) else x

    def _on_grid(self, x: Tensor, site: str) -> Tensor:
        """A tensor on its grid, the same for all that consume it."""
        if not self.quantizers.active or getattr(x, STATE, None) == GRID:
            return x
        rounded: Tensor | None = getattr(x, ROUNDED, None)
        if rounded is not None:
            known = getattr(x, VERSION, None)  # compiled code does not count
            if known is not None and known != _version(x):
                raise QuantizationError(_WRITTEN.format(key=getattr(x, KEY, "an operation")))
            return rounded
        key = getattr(x, KEY, None)
        if key is None:
            key = f"in:{site}"
            own: Tensor | None = x
            while own is not None and not isinstance(own, nn.Parameter):  # which outlives the call, and may be others'
                setattr(own, KEY, key)
                self._borrow(own)
                own = getattr(own, COPIED, None)
        rounded = self.quantizers.activation(key, x)
        if rounded is not x:  # never on itself: a cycle would hold it until the garbage collector runs
            self._mark(rounded, key, GRID)
            if hasattr(x, KEY):
                setattr(x, ROUNDED, rounded)
                setattr(x, VERSION, _version(x))
        return rounded

    def _mark(self, tensor: Tensor, key: str, state: str | None) -> Tensor:
        unmark(tensor)
        setattr(tensor, KEY, key)
        if state is not None:
            setattr(tensor, STATE, state)
        if not torch.compiler.is_compiling():
            self._made.append(weakref.ref(tensor))
        return tensor

    def _copied(self, func: Callable[..., Any], x: Tensor) -> Tensor:
        """What torch makes for a full backward hook: it bears the marks of what it is a copy of.

        But for the rounded tensor, which is made anew, from the copy: the hook is to get the gradient of that.
        """
        result: Tensor = func(x, x)
        for mark in MARKS:
            if mark not in (ROUNDED, VERSION) and hasattr(x, mark):
                setattr(result, mark, getattr(x, mark))
        setattr(result, COPIED, x)
        if not torch.compiler.is_compiling():
            self._made.append(weakref.ref(result))
        return result

    def _borrow(self, x: Tensor) -> None:
        """Nobody made it in this call: take the marks off it when the call ends."""
        if not torch.compiler.is_compiling():
            self._borrowed.append(x)

    def finish(self) -> None:
        """The network has returned, or failed; what it keeps until the next call is then nobody's."""
        for tensor in self._borrowed:
            unmark(tensor)
        self._borrowed.clear()
        for made in self._made:
            if (kept := made()) is not None:
                unmark(kept)
        self._made.clear()

    def _consume(self, x: Tensor, site: str) -> None:
        if getattr(x, ORIGIN, None):
            raise QuantizationError(_WRITTEN.format(key=getattr(x, KEY, "an operation")))
        self.quantizers.consumed(getattr(x, LAYER, None), getattr(x, CHANNELS, None), site)


def _kernel_marks(result: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return getattr(result, STEP, None), getattr(result, BIAS, None)


def _kept(func: Callable[..., Any], options: dict[str, Any], x: Tensor, result: Tensor) -> Tensor:
    """The result of an operation, in the tensor that it works in: whoever called it may go on with that.

    In a trace for a file it is not: what is written would stand between two kernels, and the file is compared anyway.
    """
    in_place = (writes(func) and not is_operator(func)) or options.get("inplace")
    return x.copy_(result) if in_place and not torch.compiler.is_exporting() else result


def _note_origin(view: Tensor, x: Tensor, rounded: Tensor) -> None:
    """Note of a view of a rounded tensor what it should be a view of."""
    if not torch.compiler.is_compiling() and rounded is not x and view._is_view():
        views: list[bool] | None = getattr(x, OWNS, None)
        views = [] if views is None else views  # also an empty one is theirs
        setattr(x, OWNS, views)
        setattr(view, ORIGIN, views)


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to, itself or through views; None where torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def unmark(tensor: Tensor) -> None:
    """Take the marks off a tensor.

    Args:
        tensor: Any.

    Example:
        >>> tensor = torch.ones(1)
        >>> setattr(tensor, KEY, "0:relu:0")
        >>> unmark(tensor)
        >>> hasattr(tensor, KEY)
        False
    """
    for mark in MARKS:
        if torch.compiler.is_compiling():  # which cannot trace that an attribute goes
            setattr(tensor, mark, None)
        elif hasattr(tensor, mark):
            delattr(tensor, mark)


class GuardedCalls:
    """How often a network has run quantised, and with how many samples."""

    def __init__(self) -> None:
        self.eager = 0
        self.compiled = 0
        """1 once compiled code has run; it would be compiled again for each number that it reads."""
        self.samples = 0
        self.depth = 0

    @property
    def count(self) -> int:
        """Calls so far; all those in compiled code count as one."""
        return self.eager + self.compiled


@contextmanager
def quantizing(
    network: nn.Module, quantizers: Quantizers, *, when: Callable[[], bool] = lambda: True
) -> Iterator[GuardedCalls]:
    """Let a network run with quantisers, whoever calls it.

    Args:
        network: The network; it may be compiled.
        quantizers: What is done to its tensors.
        when: Whether it shall in the call that begins.

    Yields:
        A counter of its calls.

    Raises:
        QuantizationError: When activation checkpointing runs a part of it again, which would not be quantised, or a
            part of it that is compiled has a full backward hook.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with quantizing(network, Quantizers()) as calls:
        ...     _ = network(torch.ones(1, 2))
        >>> calls.count
        1
    """
    paths, calls, compiled = ModulePaths(), GuardedCalls(), _compat.holds_compiled_code(network)
    mode = QuantizationMode(quantizers, paths)

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls.depth or not when():
                return original(*args, **kwargs)
            tensors = [tensor for _, tensor in named_tensors((args, kwargs))]
            batch = [] if torch.compiler.is_compiling() else tensors  # where a length would be taken for a constant
            samples = next((len(tensor) for tensor in batch if tensor.ndim), 0)
            for tensor in tensors:
                unmark(tensor)
            paths.restart()
            calls.depth += 1
            try:
                with mode:
                    output = original(*args, **kwargs)
                if torch.compiler.is_compiling():
                    calls.compiled = 1
                else:
                    calls.eager += 1
                    calls.samples += samples
                return mode.outputs(output)
            finally:
                calls.depth -= 1
                mode.finish()
                for tensor in tensors:
                    unmark(tensor)

        return call

    def entering(name: str) -> Callable[..., None]:
        owner = _owner(network, name)

        def enter(module: nn.Module, args: Any) -> None:
            if calls.depth:
                paths.enter(name, owner)
                if compiled and _compat.copies_its_tensors(module):
                    raise QuantizationError(f"'{plain_name(name) or class_name(module)}': {_BACKWARD_HOOK}")
            elif _compat.runs_again() and when():
                raise QuantizationError(f"'{name}': {_CHECKPOINTING}")

        return enter

    def refuse_checkpointing() -> None:
        if calls.depth and torch.is_grad_enabled():
            raise QuantizationError(_CHECKPOINTING)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if calls.depth:
            paths.leave()

    def unmark_all() -> None:
        for tensor in (*network.parameters(), *network.buffers()):
            unmark(tensor)

    with ExitStack() as stack:
        stack.enter_context(copied_plainly(network))
        stack.callback(unmark_all)  # such as `weight.to(x.dtype)`, which gives back the weight, leaves
        for name, module in network.named_modules():
            if name and _compat.uncompiled(module) is module and not isinstance(module, torch.jit.ScriptModule):
                entered = module.register_forward_pre_hook(marked(entering(plain_name(name))))
                stack.callback(entered.remove)
                stack.callback(module.register_forward_hook(marked(leave), always_call=True).remove)
        stack.enter_context(_compat.checkpointing_told(refuse_checkpointing))
        for method in _compat.entry_points(network):
            stack.enter_context(shadowed(network, method, guarded))
        _compat.reset_compiled_code()
        stack.callback(_compat.reset_compiled_code)
        yield calls


def _owner(network: nn.Module, name: str) -> str:
    """The module that a module belongs to: the nearest above it that can be called."""
    named = {plain_name(own): part for own, part in network.named_modules()}
    above = name.rpartition(".")[0]
    while above and isinstance(named[above], (nn.ModuleList, nn.ModuleDict)):
        above = above.rpartition(".")[0]
    return above


def module_of(site: str) -> str:
    """The module whose call an operation belongs to.

    Args:
        site: Key of an operation.

    Returns:
        Its dotted name, without what tells its calls apart.

    Example:
        >>> module_of("a.b#1:conv2d:0"), module_of("in:a>b.c:linear:0")
        ('a.b', 'b.c')
    """
    path = site.removeprefix("in:").split(":", 1)[0].rsplit(">", 1)[-1]
    return ".".join(part.split("#")[0] for part in path.split("."))

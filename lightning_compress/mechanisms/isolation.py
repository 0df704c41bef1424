"""Work that leaves no trace: no output, no random numbers drawn, every attribute as it was."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.sharding import shards_in_place


class RandomState:
    """The random states of Python, NumPy and torch as they are now.

    Args:
        device: An accelerator whose state is kept too; the CPU's always is.

    Example:
        >>> state = RandomState()
        >>> first = torch.rand(1)
        >>> state.restore()
        >>> torch.equal(torch.rand(1), first)
        True
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global generator is the one that users draw from
        self._torch = torch.get_rng_state()
        accelerated = device is not None and device.type not in ("cpu", "meta")
        devices: Any = torch.get_device_module(device) if accelerated else None
        self._devices = devices
        self._which = () if device is None or device.type == "mps" else (device,)  # of "mps" there is one
        self._accelerator = None if self._devices is None else self._devices.get_rng_state(*self._which)

    def restore(self) -> None:
        """Go back to them."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._devices is not None:
            self._devices.set_rng_state(self._accelerator, *self._which)


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's first parameter is.

    Args:
        module: The module.

    Returns:
        The device; None for a module without parameters.

    Example:
        >>> device_of(nn.Linear(1, 1))
        device(type='cpu')
    """
    first = next(module.parameters(), None)
    return None if first is None else first.device


@contextlib.contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back at the end.

    Args:
        device: An accelerator whose state is kept too; the CPU's always is.

    Example:
        >>> state = torch.get_rng_state()
        >>> with random_state_kept():
        ...     _ = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on a device, and then where it was; nothing is moved to where it is, nor any parameter renewed.

    Args:
        module: The module.
        device: Where it is to be.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with on_device(layer, torch.device("cpu")):
        ...     layer.weight.device
        device(type='cpu')
    """
    before = next(module.parameters()).device
    if all(tensor.device == device for tensor in (*module.parameters(), *module.buffers())):
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(before)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute in float32 what is float32 on the CPU, within ``torch.autocast`` too, as ONNX Runtime does.

    Where ``torch.set_float32_matmul_precision`` allows it, processors that multiply bfloat16 round to it, and a network
    is then thousandths off its own file.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_float32():
        ...     torch.backends.mkldnn.matmul.fp32_precision
        'ieee'
        >>> torch.backends.mkldnn.matmul.fp32_precision
        'bf16'
        >>> torch.set_float32_matmul_precision("highest")
    """
    backend: Any = torch.backends.mkldnn
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        for place in (backend, backend.matmul, backend.conv, backend.rnn):  # from the first the others may have theirs
            if place.fp32_precision not in ("none", "ieee"):
                stack.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
        yield


ANY_DEPTH = 1 << 30
LONG = 10_000  # entries; what lies inside of a longer list is data
LARGE = ("Dataset", "DataLoader", "LightningDataModule", "Trainer", "Callback", "Logger")
LIBRARIES = {
    *sys.stdlib_module_names,
    *("torch", "torchmetrics", "torchvision", "numpy", "pandas"),
    *("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"),
}

MUTED = ("log", "log_dict", "print")
"""What a LightningModule says with."""

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Classes of random generators that keep a state of their own."""


def generator_restorer(value: Any) -> Callable[[], object] | None:
    """What brings a random generator back to the state that it has now.

    Args:
        value: Anything.

    Returns:
        A function without arguments; None for what is no generator, or has no state to go back to.

    Example:
        >>> generator = random.Random(0)
        >>> restore, first = generator_restorer(generator), generator.random()
        >>> restore()
        >>> generator.random() == first
        True
    """
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    return None


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed of their own, for parameters that can be trained; the global state is left alone.

    Args:
        seed: The seed.

    Example:
        >>> with drawn_from(0):
        ...     first = nn.Linear(2, 1)
        >>> with drawn_from(0):
        ...     torch.equal(nn.Linear(2, 1).weight, first.weight)
        True
    """
    # In validation, in inference mode, parameters are made that could not be trained later.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the devices' states too
        yield


@contextlib.contextmanager
def quiet(loggers: Sequence[str], streams: bool = True) -> Iterator[None]:
    """Silence warnings, the named loggers with those below them and, if ``streams``, stdout and stderr.

    Args:
        loggers: Dotted names of loggers.
        streams: Whether what is written to ``sys.stdout`` and ``sys.stderr`` is thrown away.

    Example:
        >>> with quiet([]):
        ...     print("nobody sees this")
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    nowhere = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if streams:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        for name in loggers:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run with the whole module in evaluation mode and without gradients; each training flag is put back.

    Args:
        module: The module.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in flags:
            part.training = training


@contextlib.contextmanager
def attributes_kept(owner: Any, *, whole: bool = False, data: Sequence[str] = ()) -> Iterator[None]:
    """Put the instance attributes of a plain object back at the end, each bound to the object it was bound to.

    Lists, dicts and sets among them, and random generators, get back what was in them.

    Args:
        owner: The object.
        whole: Whether what is written into at any depth, arrays and tensors included, is put back too.
        data: Names of attributes that may be too large for that.

    Example:
        >>> from types import SimpleNamespace
        >>> owner = SimpleNamespace(a=1, order=[2, 0])
        >>> with attributes_kept(owner):
        ...     owner.a, owner.b = 2, 3
        ...     owner.order.sort()
        >>> owner
        namespace(a=1, order=[2, 0])
    """
    seen = {id(owner)}
    before = {
        name: _snapshot(value, tensors=(Tensor,), depth=ANY_DEPTH, seen=seen)
        if whole and name not in data
        else _snapshot(value, tensors=(), depth=1, seen=seen)
        for name, value in vars(owner).items()
    }
    try:
        yield
    finally:
        restored = {name: _restored(*entry) for name, entry in before.items()}
        vars(owner).clear()
        vars(owner).update(restored)


@contextlib.contextmanager
def module_kept(module: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Put a module, and all below it, back at the end: attributes, lists, dicts, flags, devices, values, generators.

    For a module that cannot be copied. What hangs on plain objects of the user's is put back too; what libraries hold
    outside of modules, files, and services are not.

    Args:
        module: The module.
        parameters: Whether the values of parameters are copied and put back, for work that may write into them.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with module_kept(layer):
        ...     _ = layer(torch.ones(4, 2))
        >>> layer.num_batches_tracked
        tensor(0)
    """
    shards_in_place(module)  # FSDP2 remembers whether a module holds shards, which are what is put back
    # A tensor of another kind than torch's own is only kept, never written to.
    seen = {id(part) for part in module.modules()}
    snapshot = functools.partial(
        _snapshot, tensors=(Tensor, nn.Parameter) if parameters else (Tensor,), depth=ANY_DEPTH, seen=seen
    )
    before = [(vars(part), {name: snapshot(value) for name, value in vars(part).items()}) for part in module.modules()]
    try:
        yield
    finally:
        shards_in_place(module)
        # All contents first: nothing is cleared before everything that takes its place is at hand.
        restored = [{name: _restored(*entry) for name, entry in saved.items()} for _, saved in before]
        for (attributes, _), values in zip(before, restored, strict=True):
            attributes.clear()
            attributes.update(values)


def _snapshot(value: Any, *, tensors: tuple[type, ...], depth: int, seen: set[int]) -> tuple[Any, Any]:
    """An object and what is needed to bring its contents back: those of tensors and arrays only where these count."""
    if isinstance(value, (str, bytes, int, float, complex, type(None))) or id(value) in seen:
        return value, None
    seen.add(id(value))
    inside = functools.partial(_snapshot, tensors=tensors, depth=depth - 1, seen=seen)
    contents = _contents(value, tensors, depth, inside)
    if contents is None:
        seen.remove(id(value))  # it may be met again, nearer to the surface
    return value, contents


def _contents(value: Any, tensors: tuple[type, ...], depth: int, inside: Callable[[Any], tuple[Any, Any]]) -> Any:
    """What :func:`_restored` needs; None for what is only kept."""
    if isinstance(value, Tensor):
        if not value.is_leaf:  # it carries a graph
            return None
        saved = (value.data, value.detach().clone()) if type(value) in tensors else None
        return value.requires_grad, saved
    if isinstance(value, GENERATORS):
        return generator_restorer(value)
    if isinstance(value, np.ndarray):
        return value.copy() if tensors and value.flags.writeable else None
    if depth <= 0:
        return None
    if isinstance(value, dict):
        return {key: inside(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list, deque)):
        looked_into = [inside(entry) for entry in value] if len(value) <= LONG else []
        looked_into = [entry for entry in looked_into if entry[1] is not None]
        return (looked_into or None) if isinstance(value, tuple) else (list(value), looked_into)
    if isinstance(value, set):
        return set(value)
    return {name: inside(entry) for name, entry in vars(value).items()} if is_users(value) else None


def is_users(value: Any) -> bool:
    """Whether an object is one of the user's: a meter, say, or a module that is no child; data is left out.

    Args:
        value: Anything.

    Returns:
        True for instances of the user's classes, and for modules.

    Example:
        >>> is_users(1), is_users(torch.Generator()), is_users(SimpleNamespace(count=1))
        (False, False, True)
    """
    if isinstance(value, nn.Module):
        return True  # modules that are children are seen to by themselves
    package = type(value).__module__.partition(".")[0]
    known = package in LIBRARIES or isinstance(value, (type, ModuleType))
    is_large = any(base.__name__ in LARGE for base in type(value).__mro__)
    return hasattr(value, "__dict__") and (not known or type(value) is SimpleNamespace) and not is_large


def _restored(value: Any, contents: Any) -> Any:
    """The object of a snapshot with its contents as they were."""
    if contents is None:
        return value
    if isinstance(value, Tensor):
        _restore_tensor(value, *contents)
    elif isinstance(value, GENERATORS):
        contents()
    elif isinstance(value, np.ndarray):
        value[...] = contents
    elif isinstance(value, tuple):
        for entry in contents:
            _restored(*entry)
    elif isinstance(value, (list, deque)):
        entries, looked_into = contents
        for entry in looked_into:
            _restored(*entry)
        value.clear()
        value.extend(entries)
    elif isinstance(value, set):
        value.clear()
        value.update(contents)
    else:
        restored = {key: _restored(*entry) for key, entry in contents.items()}
        holder = value if isinstance(value, dict) else vars(value)
        holder.clear()
        holder.update(restored)
    return value


def _once(tensor: Tensor, expanded: Tensor | None = None) -> Tensor:
    """A tensor with each number once, where one was expanded over many places."""
    strides = (tensor if expanded is None else expanded).stride()
    for dimension, (stride, size) in enumerate(zip(strides, tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _restore_tensor(value: Tensor, requires_grad: bool, saved: tuple[Tensor, Tensor] | None) -> None:
    if saved is not None:
        value.data, contents = saved
        # Unseen by autograd: a graph that is still to be used saved the same values.
        _once(value.data).copy_(_once(contents, value.data))
    if value.is_leaf and value.requires_grad != requires_grad:
        value.requires_grad_(requires_grad)

"""The teacher: a frozen network that is in nobody's parameters, checkpoints or data-parallel wrappers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.capture import Capture, NetworkCall, only_call
from lightning_compress.mechanisms.selection import find_module
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.tree import named_tensors, rebuild
from lightning_compress.mechanisms.wrapping import copied_plainly

HALVES = (torch.float16, torch.bfloat16)


class Teacher:
    """A network that is only ever run, on what the student received.

    Args:
        module: The network; never a child of the module being trained.
        transform: Called with the student's arguments; returns what the teacher receives: a tensor (its only
            argument), a tuple (positional arguments) or a dict (keyword arguments). None: the same arguments.

    Raises:
        TypeError: If one of them is no module.
        ValueError: If one of them has no ``forward``.

    Example:
        >>> teacher = Teacher(nn.Linear(2, 1))
        >>> with teacher.prepared():
        ...     output = teacher(NetworkCall((torch.ones(3, 2),), {}, None))
        >>> output.requires_grad
        False
    """

    def __init__(self, module: nn.Module, transform: nn.Module | None = None) -> None:
        _check_callable(module, "teacher")
        if transform is not None:
            _check_callable(transform, "teacher_transform")
        self.module = module
        self.transform = transform
        self.forwards = 0
        self.layers: dict[str, Sequence[NetworkCall]] = {}
        """Calls of the watched layers in the last forward, by the names that they were watched under."""
        self._captures: dict[str, Capture] = {}
        self._copies = True  # the first input is copied, to learn whether the teacher writes into it

    @contextmanager
    def prepared(
        self, device: torch.device | str | None = None, convert: Callable[[nn.Module], nn.Module] | None = None
    ) -> Iterator[Teacher]:
        """Freeze the network in evaluation mode on a device, and put everything back afterwards.

        Args:
            device: Where to run; None leaves it where it is.
            convert: What the Trainer's precision does to a module (a cast to bfloat16, say).

        Yields:
            The teacher itself.
        """
        modules = [module for module in (self.module, self.transform) if module is not None]
        with _restored(modules), ExitStack() as stack:
            for module in modules:
                stack.enter_context(copied_plainly(module))
                if convert is not None:
                    convert(module)
                if device is not None:
                    module.to(device)
                module.eval()
                for parameter in module.parameters():  # a scripted module does not do it by itself
                    parameter.requires_grad_(False)
            yield self

    def watch(self, name: str, stack: ExitStack, *, argument: str) -> None:
        """Record what a layer returns in each forward from now on, under :attr:`layers`.

        Args:
            name: Dotted name inside the teacher.
            stack: Closes the record.
            argument: The user's argument that holds the name, for error messages.

        Raises:
            ValueError: If there is no such layer.
        """
        layer = find_module(self.module, name, argument=argument)
        if name not in self._captures:
            self._captures[name] = stack.enter_context(Capture(layer, direct=layer is self.module))
            stack.callback(self._captures.pop, name, None)
            _compat.reset_compiled_code()

    def __call__(self, call: NetworkCall, *, gradients: bool = False) -> Any:
        """Run the teacher on the arguments of a call of the student.

        Args:
            call: The student's call; its output is not looked at.
            gradients: Run it such that what is computed from the output can be differentiated with respect to those of
                the arguments that carry a gradient.

        Returns:
            Whatever the network returns, without a graph if not ``gradients``.

        Raises:
            RuntimeError: If the network does not take these arguments.
        """
        self.forwards += 1
        for module in (self.module, self.transform):  # somebody may have called train() on a part since
            if module is not None and any(part.training for part in module.modules()):
                module.eval()
        args: tuple[Any, ...] = call.args
        kwargs: Mapping[str, Any] = dict(call.kwargs)
        if self._computes_in_full_precision(call):
            args, kwargs = rebuild((args, kwargs), _widened)  # a policy of FSDP2 narrows what the student receives
        given = _tensors((args, kwargs))
        if self._copies:
            args, kwargs = rebuild((args, kwargs), lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        else:
            args, kwargs = rebuild((args, kwargs), lambda leaf: leaf)  # the dict it is given is its own
        used = _tensors((args, kwargs))
        versions = [None if tensor.is_inference() else tensor._version for tensor in used]
        for capture in () if gradients else self._captures.values():
            capture.start()
        try:
            with nullcontext() if gradients else torch.no_grad():
                if self.transform is not None:
                    args, kwargs = _as_arguments(self.transform(*args, **kwargs))
                output = self.module(*args, **kwargs)
        except Exception as error:  # whatever the user's network raises, said in the student's terms
            raise RuntimeError(
                f"the teacher {type(self.module).__name__} failed on what the student received (tensors of shapes "
                f"{[tuple(tensor.shape) for tensor in given]}): {type(error).__name__}: {error}. It may want another "
                "input (see teacher_transform), or the student may be another module than the one meant (see student)"
            ) from error
        if not gradients:
            self.layers = {name: capture.stop() for name, capture in self._captures.items()}
        self._note_writing(used, versions)
        return output

    def _computes_in_full_precision(self, call: NetworkCall) -> bool:
        mixed = any(torch.is_autocast_enabled(own.device.type) for own in call.tensors)
        return not mixed and not any(parameter.dtype in HALVES for parameter in self.module.parameters())

    def _note_writing(self, used: list[Tensor], versions: list[int | None]) -> None:
        """Learn whether the teacher writes into its input, which is the user's own batch unless it is copied."""
        if None in versions:
            return
        written = any(tensor._version != version for tensor, version in zip(used, versions, strict=True))
        if written and not self._copies:
            raise RuntimeError(
                f"the teacher {type(self.module).__name__} wrote into its input in this step and in none before, and "
                "so into the user's batch; let its first operation work out of place"
            )
        self._copies = written


@dataclass(eq=False)
class SharedTeacher:
    """A teacher that several callbacks use, with its outputs of the current step.

    Attributes:
        teacher: The teacher itself.
    """

    teacher: Teacher
    _seen: dict[object, tuple[Any, Mapping[str, Sequence[NetworkCall]]]] = field(default_factory=dict)

    def __call__(self, call: NetworkCall) -> Any:
        """The teacher's output for what the student received; computed once for all who ask."""
        return self._run(call)[0]

    def layer(self, call: NetworkCall, name: str, *, argument: str) -> Any:
        """What a watched layer of the teacher returned in the same forward; None if it did not run.

        Args:
            call: The student's call.
            name: As it was watched.
            argument: The user's argument that named it, for the error message.

        Raises:
            CaptureError: If the layer ran more than once.
        """
        calls = self._run(call)[1].get(name, ())
        found = only_call(calls, f"the teacher's layer '{name}'", argument=argument)
        return None if found is None else found.output

    def forget(self) -> None:
        """Let go of the step's outputs."""
        self._seen.clear()

    def _run(self, call: NetworkCall) -> tuple[Any, Mapping[str, Sequence[NetworkCall]]]:
        if call.key not in self._seen:
            output = self.teacher(call)
            layers, self.teacher.layers = self.teacher.layers, {}
            self._seen[call.key] = (output, layers)
        return self._seen[call.key]


@contextmanager
def own_copies(module: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Give a teacher, for a time, copies of the layers without weights that it shares with the module being trained.

    A loss that is made in a default argument, or an activation, is in all instances of a class; whoever switched the
    teacher to evaluation would switch it in the other too.

    Args:
        module: The teacher, or its transform.
        trained: The module being trained.

    Example:
        >>> dropout = nn.Dropout()
        >>> teacher, trained = nn.Sequential(dropout), nn.Sequential(dropout)
        >>> with own_copies(teacher, trained):
        ...     teacher[0] is trained[0]
        False
        >>> teacher[0] is trained[0]
        True
    """
    theirs = set(trained.modules())
    with ExitStack() as stack:
        for parent in [part for part in module.modules() if part not in theirs]:
            for name, child in parent._modules.items():
                if child in theirs and next(itertools.chain(child.parameters(), child.buffers()), None) is None:
                    stack.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = copy.deepcopy(child)
        yield


def refuse_shared(module: nn.Module, trained: nn.Module, *, argument: str) -> None:
    """Refuse a teacher that has parts in common with the module being trained, which it would freeze.

    Args:
        module: The teacher, or its transform.
        trained: The module being trained.
        argument: The user's argument that gave it, for the error message.

    Raises:
        ValueError: If they share parameters or buffers, or are one.

    Example:
        >>> refuse_shared(nn.Linear(1, 1), nn.Linear(1, 1), argument="teacher")
    """
    shared = _shared(module, trained)
    if shared is not None:
        raise ValueError(
            f"{argument} {type(module).__name__} shares {shared} with {class_name(trained)}, the module being "
            f"trained, and would freeze it; give a copy: copy.deepcopy({argument})"
        )


def _shared(module: nn.Module, other: nn.Module) -> str | None:
    """What two modules have in common that freezing or switching one would change in the other, in words."""
    parameters, buffers, parts = set(other.parameters()), set(other.buffers()), set(other.modules())
    if any(parameter in parameters for parameter in module.parameters()):
        return "parameters"
    if any(buffer in buffers for buffer in module.buffers()):
        return "buffers"
    shared = next((part for part in module.modules() if part in parts), None)
    return None if shared is None else f"the {class_name(shared)}"


def _as_arguments(value: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return (), value
    return (tuple(value), {}) if isinstance(value, tuple) else ((value,), {})


def _check_callable(module: Any, argument: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(module).__name__}: {module!r}")
    owner = next((base for base in type(module).__mro__ if "forward" in vars(base)), nn.Module)
    if "forward" not in vars(module) and (owner is nn.Module or owner.__name__ == "LightningModule"):
        raise ValueError(
            f"{argument} {type(module).__name__} has no forward, so it cannot be called; give the network inside it "
            f"({', '.join(name for name, _ in module.named_children()) or 'it holds none'})"
        )


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALVES else leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(tree)]


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    """Put back training flags, ``requires_grad``, and the very tensors, so device and dtype too."""
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    flags = [(part, part.training) for part in parts]
    parameters = {parameter for part in parts for parameter in part.parameters(recurse=False)}
    values = [(parameter, parameter.data, parameter.grad, parameter.requires_grad) for parameter in parameters]
    places = [(part, _compat.placement(part)) for part in parts]
    buffers = [
        (part, name, value, None if value is None else value.detach().clone())
        for part in parts
        for name, value in part._buffers.items()
    ]
    for parameter in parameters:
        parameter.grad = None  # left by the teacher's own training; a cast would move it too
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
        for parameter, data, gradient, requires_grad in values:
            parameter.data = data
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for part, name, value, saved in buffers:
            if value is not None and saved is not None:
                value.detach().copy_(saved)  # a forward may write into a buffer
            part._buffers[name] = value
        for part, place in places:
            vars(part).update(place)

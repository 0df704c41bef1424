"""Capture: what a module was given and what it returned, recorded while a step runs and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_compress import _compat
from lightning_compress.mechanisms.selection import find_module, plain_name

OWN_MARK = "_lightning_compress"
"""Attribute that marks a hook or a wrapper as ours, so that copies of a module can be made without it."""


class CaptureError(RuntimeError):
    """A step did not call the network in the way that was asked for."""


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call of a network.

    Attributes:
        args: Positional arguments as the network received them.
        kwargs: Keyword arguments.
        output: What it returned, attached to the graph.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class Capture(AbstractContextManager["Capture"]):
    """Record the calls of one module between :meth:`start` and :meth:`stop`.

    Outside of the two it costs one attribute look-up a call: activation checkpointing, which runs the forward again in
    the backward pass, and DDP, which routes the step through the module's own forward, leave no record.

    Args:
        module: What to record. Calls of ``module.forward`` are recorded too if ``direct``.
        direct: Shadow ``forward`` on the instance instead of registering hooks.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with Capture(network) as capture:
        ...     capture.start()
        ...     _ = network(torch.ones(3, 2))
        ...     [call] = capture.stop()
        >>> call.args[0].shape, call.output.shape
        (torch.Size([3, 2]), torch.Size([3, 1]))
    """

    def __init__(self, module: nn.Module, *, direct: bool = False) -> None:
        self._module = module
        self._direct = direct
        self._stack = ExitStack()
        self._recording = False
        self._clones = True  # the first call is copied, to learn whether the network writes into its input
        self._pending: list[tuple[tuple[Any, ...], Mapping[str, Any], list[tuple[Tensor, int]]]] = []
        self.calls: list[NetworkCall] = []

    def __enter__(self) -> Capture:
        if self._direct:
            self._stack.enter_context(shadowed(self._module, "forward", self._shadow))
        else:
            before = self._module.register_forward_pre_hook(marked(self._before), with_kwargs=True)
            self._stack.callback(before.remove)
            after = self._module.register_forward_hook(marked(self._after), with_kwargs=True)
            self._stack.callback(after.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._recording = False
        self.calls, self._pending = [], []
        self._stack.close()

    def start(self) -> None:
        """Begin to record, with nothing recorded yet."""
        self.calls, self._pending = [], []
        self._recording = True

    def stop(self) -> list[NetworkCall]:
        """Stop recording and give back the calls since :meth:`start`."""
        self._recording = False
        calls, self.calls = self.calls, []
        return calls

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._recording:
            return
        if torch.compiler.is_compiling():
            self._pending.append((args, kwargs, []))
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [(leaf, leaf._version) for leaf in tensors if not leaf.is_inference()]
        if self._clones:
            args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        self._pending.append((args, kwargs, versions))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._recording or not self._pending:
            return
        seen_args, seen_kwargs, versions = self._pending.pop()
        changed = any(tensor._version != version for tensor, version in versions)
        if changed and not self._clones:
            raise CaptureError(
                f"{type(module).__name__} wrote into its own input in this step and not in the first one, so what it "
                "received is lost; let its first operation work out of place"
            )
        self._clones = changed
        if not changed:
            seen_args, seen_kwargs = args, kwargs  # the user's own tensors: nothing is kept twice
        self.calls.append(NetworkCall(seen_args, seen_kwargs, output))

    def _shadow(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._before(self._module, args, kwargs)
            output = original(*args, **kwargs)
            self._after(self._module, args, kwargs, output)
            return output

        return forward


class Detector(AbstractContextManager["Detector"]):
    """Record, in one step, every outermost call of a module with parameters: the candidates for the student.

    Args:
        root: The module whose children are watched, itself included.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._stack = ExitStack()
        self._captures: dict[str, Capture] = {}
        self._depth = 0
        self._outermost: list[str] = []
        self._inside_root: list[tuple[str, NetworkCall]] = []

    def __enter__(self) -> Detector:
        for name, module in _watched(self._root):
            self._captures[name] = self._stack.enter_context(Capture(module, direct=module is self._root))
            if module is not self._root:
                for handle in self._counting(name, module):
                    self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Begin to record."""
        self._depth, self._outermost = 0, []
        for capture in self._captures.values():
            capture.start()

    def stop(self) -> dict[str, list[NetworkCall]]:
        """Stop and give back the outermost calls by the dotted name of the module, in the order of the first calls."""
        calls = {name: capture.stop() for name, capture in self._captures.items()}
        root_calls = calls.pop("", [])
        found = {name: calls[name] for name in dict.fromkeys(self._outermost) if calls[name]}
        if not root_calls:
            return _trained_first(self._root, found)
        # The module itself was called. Where that only hands on to one child, the child is the network.
        for name, inner in found.items():
            if len(inner) == len(root_calls) and all(
                child.output is own.output and _same_leaves(child, own)
                for child, own in zip(inner, root_calls, strict=True)
            ):
                return {name: inner}
        return {"": root_calls}

    def _counting(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: Any) -> None:
            if self._depth == 0:
                self._outermost.append(name)
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1

        return [
            module.register_forward_pre_hook(marked(enter), prepend=True),
            module.register_forward_hook(marked(leave), always_call=True),
        ]


class StudentCapture(AbstractContextManager["StudentCapture"]):
    """The calls of the student network in a step: named by the user, or found in the first training step.

    Args:
        root: The LightningModule, or any module that contains the student.
        student: Dotted name of the student; two names where the step calls its parts in a row (the input of the first
            and the output of the second are recorded); None to find it.
        argument: The user's argument, for error messages.

    Raises:
        ValueError: If a name does not exist.
    """

    def __init__(self, root: nn.Module, student: str | Sequence[str] | None = None, *, argument: str = "student"):
        self._root = root
        self._argument = argument
        self._stack = ExitStack()
        self._detector: Detector | None = None
        self._ends: tuple[Capture, ...] = ()
        self.names: tuple[str, ...] | None = None if student is None else _names(student, argument)
        self.required = False
        self.problem: str | None = None
        self.last_call: NetworkCall | None = None
        for name in self.names or ():
            find_module(root, name, argument=argument)

    @property
    def network(self) -> str | None:
        """Dotted name of the student; None while unknown, and where it is a chain of modules."""
        return self.names[0] if self.names is not None and len(self.names) == 1 else None

    def __enter__(self) -> StudentCapture:
        if self.names is None:
            self._detector = self._stack.enter_context(Detector(self._root))
        else:
            self._open(self.names)
        _compat.reset_compiled_code(self._root)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._detector, self._ends = None, ()

    def use(self, names: tuple[str, ...]) -> None:
        """Record these modules instead of looking for the student."""
        self._stack.close()
        self._detector, self.names, self.problem = None, names, None
        self._open(names)
        _compat.reset_compiled_code(self._root)

    def start(self, *, detect: bool) -> None:
        """Begin to record; without ``detect`` an unknown student stays unknown."""
        if self._detector is not None and detect:
            self._detector.start()
        for end in self._ends:
            end.start()

    def stop(self) -> list[NetworkCall]:
        """Stop and give back the student's calls; in the first training step this is where the student is found.

        Raises:
            CaptureError: If the student is required and cannot be told.
        """
        if self._detector is not None:
            calls = self._detected(self._detector.stop())
        elif len(self._ends) == 2:
            first, last = (end.stop() for end in self._ends)
            calls = [NetworkCall(a.args, a.kwargs, b.output) for a, b in zip(first, last, strict=False)]
        else:
            calls = [call for end in self._ends for call in end.stop()]
        if calls:
            self.last_call = calls[-1]
        return calls

    def abort(self) -> None:
        """Stop recording and forget the step."""
        if self._detector is not None:
            self._detector.stop()
        for end in self._ends:
            end.stop()

    def drain(self) -> list[NetworkCall]:
        """Give back the calls so far and go on recording: for steps that compute several losses."""
        calls = self.stop()
        self.start(detect=True)
        return calls

    def _detected(self, found: dict[str, list[NetworkCall]]) -> list[NetworkCall]:
        if not found:
            return []
        if len(found) > 1:
            names = ", ".join(f"'{name}'" for name in found)
            ends = list(found)
            self.problem = (
                f"the step calls {len(found)} modules with parameters: {names}; choose the network with "
                f"{self._argument}=, or give the first and the last of a chain, "
                f'{self._argument}=["{ends[0]}", "{ends[-1]}"]'
            )
            if self.required:
                raise CaptureError(self.problem)
            return []
        [(name, calls)] = found.items()
        self.use((plain_name(name),))
        return calls

    def _open(self, names: tuple[str, ...]) -> None:
        modules = [find_module(self._root, name, argument=self._argument) for name in names]
        self._ends = tuple(
            self._stack.enter_context(Capture(module, direct=module is self._root)) for module in modules
        )


def marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function into one that carries our mark."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    setattr(hook, OWN_MARK, True)
    return hook


@contextmanager
def shadowed(
    module: nn.Module, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[Callable[..., Any]]:
    """Shadow a method of one instance by a wrapper, and put back afterwards what was there.

    Lightning reads ``__wrapped__`` once to learn a step's signature, so the wrapper names the innermost function. If
    somebody wrapped the method again meanwhile, their wrapper stays and ours hands on to the original.

    Args:
        module: The instance.
        method: Name of the method.
        make: From the original bound method to its replacement.

    Yields:
        The wrapper that was installed.
    """
    entry = vars(module).get(method)
    original = getattr(module, method)
    replacement = make(original)
    state = {"active": True}

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs) if state["active"] else original(*args, **kwargs)

    wrapper.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    wrapper.__name__ = method
    wrapper.__doc__ = original.__doc__
    setattr(wrapper, OWN_MARK, True)
    setattr(wrapper, f"{OWN_MARK}_original_entry", entry)
    vars(module)[method] = wrapper
    try:
        yield wrapper
    finally:
        state["active"] = False
        if vars(module).get(method) is wrapper:
            del vars(module)[method]
            if entry is not None:
                vars(module)[method] = entry


def _names(student: str | Sequence[str], argument: str) -> tuple[str, ...]:
    names = (student,) if isinstance(student, str) else tuple(student)
    if len(names) not in (1, 2) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{argument} must be one dotted name, or two (the first and the last of a chain), got {student!r}"
        )
    return tuple(plain_name(name) for name in names)


def _watched(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The root and every module below it with parameters, but nothing inside a metric or a compiled module."""
    yield "", root
    hidden: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if name == "" or name.startswith(hidden):
            continue
        if _is_metric(module) or _compat.is_compiled(module):
            hidden = (*hidden, f"{name}.")
        if not _is_metric(module) and next(module.parameters(), None) is not None:
            yield name, module


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchmetrics.") for base in type(module).__mro__)


def _trained_first(root: nn.Module, found: dict[str, list[NetworkCall]]) -> dict[str, list[NetworkCall]]:
    """Without the networks that are wholly frozen (a perceptual loss, say), unless there are no others."""
    modules = dict(root.named_modules())
    trained = {
        name: calls
        for name, calls in found.items()
        if any(parameter.requires_grad for parameter in modules[name].parameters())
    }
    return trained or found


def _same_leaves(first: NetworkCall, second: NetworkCall) -> bool:
    """Whether two calls received the same tensors."""
    ours, theirs = (tree_leaves((call.args, dict(call.kwargs))) for call in (first, second))
    tensors = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (ours, theirs)]
    return len(tensors[0]) == len(tensors[1]) and all(a is b for a, b in zip(*tensors, strict=True))

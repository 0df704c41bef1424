"""Which network of a module is the student: named by the user, or found in the first training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.capture import Capture, CaptureError, NetworkCall
from lightning_compress.mechanisms.selection import find_module, is_metric, plain_name
from lightning_compress.mechanisms.tree import detached, rebuild
from lightning_compress.mechanisms.wrapping import marked, shadowed


class Detector(AbstractContextManager["Detector"]):
    """Record, in one step, every outermost call of a module with parameters: the candidates for the student.

    Args:
        root: The module whose children are watched, itself included.

    Example:
        >>> import torch
        >>> root = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))})
        >>> with Detector(root) as detector:
        ...     detector.start()
        ...     _ = root["net"](torch.ones(4, 2))
        ...     sorted(detector.stop())
        ['net']
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._stack = ExitStack()
        self._captures: dict[str, Capture] = {}
        self._recording = False
        self._depth = 0
        self._root_depth = 0
        self._outermost: dict[str, bool] = {}  # name -> whether it was called from the root's own forward alone

    def __enter__(self) -> Detector:
        with ExitStack() as stack:  # closed again if a module refuses its hooks
            for name, module in _watched(self._root):
                if module is self._root:
                    self._captures[name] = stack.enter_context(Capture(module, direct=True))
                    stack.enter_context(shadowed(module, "forward", self._counting_root))
                else:
                    capture = Capture(module, when=lambda: self._depth == 1)
                    self._captures[name] = stack.enter_context(capture)
                    self._count(name, module, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._recording = False
        self._stack.close()
        self._captures = {}

    def start(self) -> None:
        """Begin to record."""
        self._recording, self._depth, self._root_depth, self._outermost = True, 0, 0, {}
        for capture in self._captures.values():
            capture.start()

    def stop(self) -> dict[str, list[NetworkCall]]:
        """Stop and give back the outermost calls by the dotted name of the module, in the order of the first calls.

        Where the root itself was called, it stands for what it calls; where it only hands on to one child, that
        child stands for it. Frozen networks called after a trained one (a perceptual loss, say) are left out.

        Returns:
            Name (empty for the root) to calls.
        """
        self._recording = False
        calls = {name: capture.stop() for name, capture in self._captures.items()}
        root_calls = calls.pop("", [])
        found = {name: calls[name] for name in self._outermost if calls[name]}
        if root_calls:
            inside = {name: inner for name, inner in found.items() if self._outermost[name]}
            outside = {name: inner for name, inner in found.items() if not self._outermost[name]}
            network = next((name for name, inner in inside.items() if _hands_on(root_calls, inner)), "")
            found = {network: inside.get(network, root_calls), **outside}
        return _trained_first(self._root, found)

    def _count(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        def enter(*_: Any) -> None:
            if self._recording:
                if self._depth == 0:
                    self._outermost[name] = self._outermost.get(name, True) and self._root_depth > 0
                self._depth += 1

        def leave(*_: Any) -> None:
            if self._recording:
                self._depth -= 1

        # Around the capture's own hooks, so that a module is at depth 1 while its own outermost call is recorded.
        stack.callback(module.register_forward_pre_hook(marked(enter), prepend=True).remove)
        stack.callback(module.register_forward_hook(marked(leave), always_call=True).remove)

    def _counting_root(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._root_depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._root_depth -= 1

        return forward


class StudentCapture(AbstractContextManager["StudentCapture"]):
    """The calls of the student network in a step: named by the user, or found in the first training step.

    Args:
        root: The LightningModule, or any module that contains the student.
        student: Dotted name of the student; two names where the step calls its parts in a row (the input of the first
            and the output of the second are recorded); None to find it.
        argument: The user's argument, for error messages; "" where there is none.

    Raises:
        ValueError: If a name does not exist.

    Example:
        >>> import torch
        >>> root = nn.ModuleDict({"net": nn.Linear(2, 1)})
        >>> with StudentCapture(root) as student:
        ...     student.start(detect=True)
        ...     _ = root["net"](torch.ones(4, 2))
        ...     [call] = student.stop()
        >>> student.network, call.output.shape
        ('net', torch.Size([4, 1]))
    """

    def __init__(
        self, root: nn.Module, student: str | Sequence[str] | None = None, *, argument: str = "student"
    ) -> None:
        self._root = root
        self._arguments = {argument: None} if argument else {}  # in the order in which callbacks came
        self._stack = ExitStack()
        self._detector: Detector | None = None
        self._further = ExitStack()  # of a detector that goes on to the end of the step
        self._others: Detector | None = None
        self._ends: tuple[Capture, ...] = ()
        self.names: tuple[str, ...] | None = None if student is None else _names(student, argument)
        self.required = False
        self.problem: str | None = None
        self.on_input: Callable[[object, tuple[Any, ...], Mapping[str, Any]], None] | None = None
        self.last_call: NetworkCall | None = None  # arguments only, detached: nothing of a step's graph is kept
        self._differentiable = False
        for name in self.names or ():
            find_module(root, name, argument=argument)

    @property
    def network(self) -> str | None:
        """Dotted name of the student; None while unknown, and where it is a chain of modules."""
        return self.names[0] if self.names is not None and len(self.names) == 1 else None

    def also(self, argument: str) -> None:
        """Somebody else wants to know the student, and has this argument for it."""
        self._arguments |= {argument: None} if argument else {}

    def differentiable_inputs(self) -> None:
        """Give the student inputs that carry gradients from now on, so that a loss can be differentiated by them."""
        self._differentiable = True
        for end in self._ends[:1]:
            end.differentiable = True

    def __enter__(self) -> StudentCapture:
        if self.names is None:
            self._detector = self._stack.enter_context(Detector(self._root))
        else:
            self._open(self.names)
        _compat.reset_compiled_code()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._further.close()
        self._detector, self._others, self._ends = None, None, ()

    def use(self, names: tuple[str, ...]) -> None:
        """Record these modules instead of looking for the student.

        Args:
            names: One dotted name, or the first and the last of a chain.
        """
        self._stack.close()
        self._detector, self.names, self.problem = None, names, None
        self._open(names)
        _compat.reset_compiled_code()

    def start(self, *, detect: bool) -> None:
        """Begin to record.

        Args:
            detect: Look for a student that is not known yet; otherwise it stays unknown.
        """
        if self._detector is not None and detect:
            self._detector.start()
        for end in self._ends:
            end.start()

    def stop(self) -> list[NetworkCall]:
        """Stop and give back the student's calls; in the first training step this is where the student is found.

        Returns:
            The calls in their order.

        Raises:
            CaptureError: If the student is required and cannot be told, or a chain was called in part only.
        """
        if self._others is not None:
            self._look_further(self._others)
        if self._detector is not None:
            calls = self._detected(self._detector.stop())
        elif len(self._ends) == 2:
            calls = self._joined(*(end.stop() for end in self._ends))
        else:
            calls = [call for end in self._ends for call in end.stop()]
        if calls:
            args, kwargs = rebuild((calls[-1].args, dict(calls[-1].kwargs)), detached)
            self.last_call = NetworkCall(args, kwargs, None)
        return calls

    def abort(self) -> None:
        """Stop recording and forget the step."""
        self._further.close()
        self._others = None
        if self._detector is not None:
            self._detector.start()  # forgets
            self._detector.stop()
        for end in self._ends:
            end.start()
            end.stop()

    def drain(self) -> list[NetworkCall]:
        """Give back the calls so far and go on recording: for steps that compute several losses.

        If the student was not known, what else the step calls up to :meth:`stop` may still show that there are two.

        Returns:
            The calls since the last one.
        """
        others, self._others = self._others, None
        unknown, calls = self._detector is not None, self.stop()
        if unknown and self._detector is None:
            others = self._further.enter_context(Detector(self._root))
            _compat.reset_compiled_code()
            others.start()
        self._others = others
        self.start(detect=True)
        return calls

    def _look_further(self, others: Detector) -> None:
        """At the end of the step in which the student was found: was it the only network that learns?"""
        found = [plain_name(name) for name in others.stop()]
        self._further.close()
        self._others = None
        parts = dict(self._root.named_modules())
        learning = [name for name in found if any(own.requires_grad for own in parts[name].parameters())]
        self._is_one(list(dict.fromkeys((*(self.names or ()), *learning))))

    def _is_one(self, ends: Sequence[str]) -> bool:
        """Whether a step has called one network; several are a problem."""
        if len(ends) > 1:
            names = ", ".join(f"'{name}'" if name else "the LightningModule itself ('')" for name in ends)
            choose = f"choose the network with {self._said()}"
            if "student" in self._arguments:  # others take one network
                choose += f', or give the first and the last of a chain, student=["{ends[0]}", "{ends[-1]}"]'
            self.problem = f"the step calls {len(ends)} modules with parameters: {names}; {choose}"
            if self.required:
                raise CaptureError(self.problem)
        return len(ends) == 1

    def _detected(self, found: dict[str, list[NetworkCall]]) -> list[NetworkCall]:
        if not self._is_one([plain_name(name) for name in found]):
            return []
        [(name, calls)] = found.items()
        self.use((plain_name(name),))
        return calls

    def _joined(self, first: list[NetworkCall], last: list[NetworkCall]) -> list[NetworkCall]:
        if len(first) != len(last):
            start, end = self.names or ("", "")
            raise CaptureError(
                f"the step calls '{start}' {len(first)} times and '{end}' {len(last)} times, so they are not the ends "
                f"of one chain; choose others with {self._said()}"
            )
        return [
            NetworkCall(a.args, a.kwargs, b.output, a.key, b.nodes, (*a.seen[:1], *b.seen[1:]))
            for a, b in zip(first, last, strict=True)
        ]

    def _said(self) -> str:
        """The arguments that name the student."""
        return " or ".join(f"{own}=" for own in self._arguments or ("student", "network"))

    def _open(self, names: tuple[str, ...]) -> None:
        modules = [find_module(self._root, name, argument="student") for name in names]  # whose names were checked
        self._ends = tuple(
            self._stack.enter_context(Capture(module, direct=module is self._root)) for module in modules
        )
        self._ends[0].on_input = self._tell
        self._ends[0].differentiable = self._differentiable

    def _tell(self, key: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.on_input is not None:
            self.on_input(key, args, kwargs)


def _names(student: str | Sequence[str], argument: str) -> tuple[str, ...]:
    names = (student,) if isinstance(student, str) else tuple(student) if isinstance(student, Sequence) else ()
    if len(names) not in (1, 2) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{argument} must be one dotted name, or two (the first and the last of a chain), got {student!r}"
        )
    return tuple(plain_name(name) for name in names)


def _watched(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The root and every module below it with parameters; nothing inside a metric, a compiled or a scripted module."""
    yield "", root
    hidden: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if name == "" or name.startswith(hidden):
            continue
        scripted = isinstance(module, torch.jit.ScriptModule)  # takes no hooks with keyword arguments
        if is_metric(module) or scripted or _compat.is_compiled(module):
            hidden = (*hidden, f"{name}.")
        if not is_metric(module) and not scripted and next(module.parameters(), None) is not None:
            yield name, module


def _trained_first(root: nn.Module, found: dict[str, list[NetworkCall]]) -> dict[str, list[NetworkCall]]:
    """Without the frozen networks that were called after a trained one (a perceptual loss, say).

    A frozen network called before is the backbone of what is trained, or at least may be: it stays a candidate.
    """
    modules = dict(root.named_modules())
    trained = [name for name in found if any(parameter.requires_grad for parameter in modules[name].parameters())]
    if not trained:
        return found
    before = list(found).index(trained[0])
    return {name: calls for index, (name, calls) in enumerate(found.items()) if index < before or name in trained}


def _hands_on(own: list[NetworkCall], inner: list[NetworkCall]) -> bool:
    """Whether each call of a module only handed on to a call of its child."""
    return len(own) == len(inner) and all(
        child.output is call.output and _same_tensors(child, call) for child, call in zip(inner, own, strict=True)
    )


def _same_tensors(first: NetworkCall, second: NetworkCall) -> bool:
    """Whether two calls received the same tensors, or, as under a policy of FSDP2, the first one casts of them."""
    pairs = list(zip_longest(first.tensors, second.tensors))
    return all(a is not None and b is not None and (a is b or _is_cast(a, b)) for a, b in pairs)


def _is_cast(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype != other.dtype and tensor.shape == other.shape and torch.equal(tensor, other.to(tensor.dtype))

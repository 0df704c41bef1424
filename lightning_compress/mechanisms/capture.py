"""Capture: what a module was given and what it returned, recorded while a step runs and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.pausing import modes_paused
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.tree import named_tensors, rebuild
from lightning_compress.mechanisms.wrapping import marked, shadowed


class CaptureError(RuntimeError):
    """A step did not call the network in the way that was asked for."""


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call of a network.

    Attributes:
        args: Positional arguments as the network received them.
        kwargs: Keyword arguments.
        key: The same object that :attr:`Capture.on_input` was called with, before the network ran.
        output: What it returned, attached to the graph.
        nodes: What made that, in the graph of autograd; see :func:`computed_from`.
        seen: What :meth:`current` reads it from; empty for a call that nobody recorded.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    key: object = field(default_factory=object)
    nodes: frozenset[Any] = frozenset()
    seen: tuple[_Snapshot, ...] = field(default=(), repr=False)

    def current(self) -> NetworkCall:
        """As the network was called, whatever was written into the tensors since the record was read.

        Raises:
            CaptureError: If that is lost.
        """
        if not any(snapshot.written for snapshot in self.seen):
            return self
        given, returned = self.seen
        _refuse_lost(given, returned, "the network")
        args, kwargs = given.tree
        return replace(self, args=args, kwargs=kwargs, output=returned.tree)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return [tensor for _, tensor in named_tensors((self.args, dict(self.kwargs)))]


class Capture(AbstractContextManager["Capture"]):
    """Record the calls of one module between :meth:`start` and :meth:`stop`.

    Outside of the two it costs one attribute look-up a call: activation checkpointing, which runs the forward again in
    the backward pass, and DDP, which routes the step through the module's own forward, leave no record.

    Arguments and outputs are given back as they were during the call, even if the network or the step writes into
    them later. To know whether anybody does, the first call is copied; after that only those of networks that do are.

    Args:
        module: What to record.
        direct: Shadow ``forward`` on the instance instead of registering hooks, so that ``module.forward(x)`` is
            recorded too.
        when: Asked at each call whether to record it; None: always.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with Capture(network) as capture:
        ...     capture.start()
        ...     _ = network(torch.ones(3, 2))
        ...     [call] = capture.stop()
        >>> call.args[0].shape, call.output.shape
        (torch.Size([3, 2]), torch.Size([3, 1]))
    """

    def __init__(self, module: nn.Module, *, direct: bool = False, when: Callable[[], bool] | None = None) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{class_name(module)} is a scripted module, which takes no hooks; use it unscripted")
        self._module = module
        self._direct = direct
        self._when = when
        self._stack = ExitStack()
        self._recording = False
        self._written: dict[bool, bool] = {}  # by training mode: in-place dropout writes in one of them only
        self._open: list[_Snapshot] = []
        self._records: list[tuple[_Snapshot, _Snapshot]] = []
        self.on_input: Callable[[object, tuple[Any, ...], Mapping[str, Any]], None] | None = None
        self.on_output: Callable[[], None] | None = None
        self.differentiable = False
        """Whether the module is given inputs that carry gradients, in the place of floating ones that do not."""

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
        self._forget()
        self._stack.close()

    def start(self) -> None:
        """Begin to record, with nothing recorded yet."""
        self._forget()
        self._recording = True

    def stop(self) -> list[NetworkCall]:
        """Stop recording and give back the calls since :meth:`start`.

        Returns:
            The calls in their order; nothing of them is kept.

        Raises:
            CaptureError: If what was seen was overwritten, and had not been in the first call.
        """
        records = self._records
        self._forget()
        return [self._settled(given, returned) for given, returned in records]

    def _forget(self) -> None:
        self._recording = False
        self._open, self._records = [], []

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._recording or not (self._when is None or self._when()):
            return None
        with modes_paused():
            return self._kept_input(args, kwargs)

    def _kept_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        watched: Any = (args, kwargs)
        if self.differentiable and torch.is_grad_enabled():
            watched = rebuild(watched, differentiable)
            args, kwargs = rebuild(watched, _writable)
        given = _Snapshot(watched, copy=self._written.get(self._module.training, True), containers=True)
        self._open.append(given)
        if self.on_input is not None and not torch.compiler.is_compiling():
            self.on_input(given, *given.tree)
        return (args, kwargs) if self.differentiable else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._recording and self._open and (self._when is None or self._when()):
            given = self._open.pop()
            with modes_paused():
                self._records.append((given, _Snapshot(output, copy=self._written.get(module.training, True))))
            if self.on_output is not None and not torch.compiler.is_compiling():
                self.on_output()

    def _settled(self, given: _Snapshot, returned: _Snapshot) -> NetworkCall:
        written = given.written or returned.written
        if written is not None:
            self._written[self._module.training] = written
        _refuse_lost(given, returned, class_name(self._module))
        args, kwargs = given.tree
        return NetworkCall(args, kwargs, returned.tree, given, returned.nodes, (given, returned))

    def _shadow(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._before(self._module, args, kwargs) or (args, kwargs)
            output = original(*args, **kwargs)
            self._after(self._module, args, kwargs, output)
            return output

        return forward


def only_call(calls: Sequence[NetworkCall], what: str, *, argument: str) -> NetworkCall | None:
    """The one call of a layer; None if there was none.

    Args:
        calls: All its calls in a step.
        what: The layer, in words.
        argument: The user's argument that named it, for the error message.

    Returns:
        The call.

    Raises:
        CaptureError: If there were several.

    Example:
        >>> only_call([], "the layer 'a'", argument="pairs") is None
        True
    """
    if len(calls) > 1:
        raise CaptureError(
            f"{argument}: {what} ran {len(calls)} times in one step, so it is not said which of its outputs is meant; "
            "choose a layer that runs once"
        )
    return calls[0] if calls else None


def computed_from(loss: Tensor, calls: Sequence[NetworkCall]) -> list[NetworkCall]:
    """Those of several calls whose outputs a loss was computed from, by the graph of autograd.

    Args:
        loss: With its graph; without one it was computed from none.
        calls: Any calls.

    Returns:
        Those, in their order.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with Capture(network) as capture:
        ...     capture.start()
        ...     first, second = network(torch.ones(3, 2)), network(torch.zeros(3, 2))
        ...     calls = capture.stop()
        >>> computed_from(second.sum() + first.detach().sum(), calls) == calls[1:]
        True
    """
    wanted = {node for call in calls for node in call.nodes}
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting and not wanted <= seen:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [call for call in calls if not seen.isdisjoint(call.nodes)]


def differentiable(leaf: Any) -> Any:
    """A leaf of a network's arguments such that a loss can be differentiated with respect to it.

    Args:
        leaf: Anything.

    Returns:
        A floating tensor that carries no gradient as a new leaf of the graph that does; anything else as it is.

    Example:
        >>> differentiable(torch.ones(2)).requires_grad, differentiable(3)
        (True, 3)
    """
    if not isinstance(leaf, Tensor) or leaf.requires_grad or not leaf.is_floating_point():
        return leaf
    return leaf.detach().requires_grad_()


def _writable(leaf: Any) -> Any:
    """A leaf that a network may write into: not the tensor by which a loss is to be differentiated."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_leaf else leaf


def _refuse_lost(given: _Snapshot, returned: _Snapshot, who: str) -> None:
    for snapshot, what in ((given, "its input"), (returned, "its output")):
        if snapshot.written and not snapshot.copied:
            raise CaptureError(
                f"{what} was overwritten in place in this step and in no step before, so what {who} was given or "
                "returned is lost; let the operation work out of place"
            )


def _makers(tensors: Sequence[Tensor]) -> frozenset[Any]:
    """What made tensors, in the graph; of views also what made their bases, as writing makes views anew."""
    bases = [tensor._base for tensor in tensors if tensor._is_view() and tensor._base is not None]
    return frozenset(tensor.grad_fn for tensor in (*tensors, *bases) if tensor.grad_fn is not None)


class _Snapshot:
    """A tree of tensors as it is now, in spite of what is written into it later."""

    def __init__(self, tree: Any, *, copy: bool, containers: bool = False) -> None:
        # Containers are copied in any case: a network may replace an entry of the dict that it is given.
        self._tree = tree if torch.compiler.is_compiling() or not containers else rebuild(tree, lambda leaf: leaf)
        self._copy: Any = None
        self._versions: list[tuple[Tensor, int]] | None = None  # None: writing leaves no trace that could be read
        self.copied = False
        self._nodes: frozenset[Any] | None = None
        if torch.compiler.is_compiling():
            return
        tensors = [tensor for _, tensor in named_tensors(tree)]
        self._nodes = _makers(tensors)
        if not any(tensor.is_inference() for tensor in tensors):
            self._versions = [(tensor, tensor._version) for tensor in tensors]
        if copy:
            self._copy = rebuild(tree, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            self.copied = True

    @property
    def written(self) -> bool | None:
        """Whether somebody wrote into it since; None if that cannot be known."""
        if self._versions is None:
            return None
        return any(tensor._version != version for tensor, version in self._versions)

    @property
    def nodes(self) -> frozenset[Any]:
        """What made the tensors; where compiled code made them, which cannot tell, as it is now."""
        return _makers([tensor for _, tensor in named_tensors(self._tree)]) if self._nodes is None else self._nodes

    @property
    def tree(self) -> Any:
        """The tree as it was: the very tensors where nobody wrote into them."""
        return self._copy if self.copied and self.written is not False else self._tree

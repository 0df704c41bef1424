"""Weight views: a step and an evaluation see other weights than the module stores, and nothing is renamed.

A weight is shadowed by an instance attribute of its name, which Python finds before it asks ``nn.Module``. Forward
passes therefore read the view, while optimizers, ``state_dict``, ``named_parameters`` and DDP go on with the parameter;
autograd leads from the view to it through the view's own rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.weights import Site, named_weights, sites_of


class WeightView(Protocol):
    """How one weight is presented: a function of it, and the chain rule of its gradient."""

    @property
    def plain(self) -> bool:
        """Whether the value is the weight itself, with its own gradient."""

    def value(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """What is presented, ``(...)`` as the weight; written to ``out`` if given."""

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the weight from that of the presented value, both ``(...)``."""


@dataclass(eq=False)
class _Presented:
    """One weight with a view."""

    owner: str
    name: str
    weight: nn.Parameter
    sites: list[Site]
    view: WeightView
    buffer: Tensor | None = None
    shown: Tensor | None = None
    below: list[Tensor | None] = field(default_factory=list)  # what each site showed before
    version: int = 0
    required_grad: bool = False
    reached: bool = False  # by a gradient, through the view

    def show(self) -> None:
        if self.view.plain:
            self.shown = self.weight.view_as(self.weight)
            if self.shown.requires_grad and not self.reached:
                self.shown.register_hook(self._reached)  # type: ignore[no-untyped-call]
        else:
            self._prepare_buffer()
            self.shown = _Shown.apply(self.weight, self)
        self.version, self.required_grad = self.shown._version, self.weight.requires_grad
        # a copy of the module gets the parameter itself, which is where its own optimizer writes
        self.shown.__deepcopy__ = partial(copy.deepcopy, self.weight)  # type: ignore[method-assign]
        self.below = [vars(site.module).get(site.attribute) for site in self.sites]
        for site in self.sites:
            vars(site.module)[site.attribute] = self.shown
            _compat.refresh_flat_weights(site.module)

    def drop(self, *, compare: bool) -> str | None:
        """Let the sites show what they showed before; say what somebody did to the shown weight in vain."""
        shown, self.shown = self.shown, None
        if shown is None:
            return None
        entries = []
        for site, below in zip(self.sites, self.below, strict=True):
            entries.append(vars(site.module).pop(site.attribute, None))
            if below is not None:
                vars(site.module)[site.attribute] = below
            _compat.refresh_flat_weights(site.module)
        if any(entry is not shown for entry in entries):
            return "was replaced"
        if self.view.plain:  # the weight itself: what is written to it stays
            return None
        with torch.no_grad():
            same = not compare or torch.allclose(shown, self.view.value(self.weight), rtol=0, atol=0, equal_nan=True)
        return None if same and shown._version == self.version else "was written to"

    def _prepare_buffer(self) -> None:
        if self.buffer is None or not _compat.is_unshared(self.buffer):  # a graph that is still alive has saved it
            with torch.inference_mode(False):  # else it could not be written to in training
                self.buffer = torch.empty_like(self.weight, requires_grad=False)

    def _reached(self, _: Tensor) -> None:
        self.reached = True


class _Shown(torch.autograd.Function):
    """From a weight to what is presented of it, with the view's own rule for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, presented: _Presented) -> Tensor:
        ctx.presented = presented
        return presented.view.value(weight.detach(), presented.buffer).detach()  # another tensor on the same memory

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.presented.reached = True
        return ctx.presented.view.gradient(gradient), None


class WeightViews:
    """All weights of a module that are presented otherwise than they are stored, whoever owns them.

    Args:
        module: The root; names are those of its ``named_parameters``.

    Example:
        >>> from lightning_compress.mechanisms.masking import MaskedWeight
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> views = WeightViews(layer)
        >>> with views.owned("example", {"weight": MaskedWeight(torch.tensor([[True, False]]))}), views.presented():
        ...     layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.tolist(), layer.weight.grad.tolist()
        ([[1.0, 1.0]], [[1.0, 0.0]])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._weights: dict[str, _Presented] = {}
        self._others: list[_Presented] = []  # of a further pass in a step
        self._compare_next = True
        self._traced: list[_compat.Traced] = []  # by torch.compile, while nothing was presented

    @property
    def active(self) -> bool:
        """Whether the views are presented now."""
        return any(weight.shown is not None for weight in self._weights.values())

    @property
    def owners(self) -> list[str]:
        """Who presents weights, sorted."""
        return sorted({weight.owner for weight in self._weights.values()})

    @contextmanager
    def owned(self, owner: str, views: Mapping[str, WeightView]) -> Iterator[None]:
        """Present these weights through these views, for as long as the context lasts.

        Args:
            owner: Name of who does, for messages.
            views: Full name of a parameter to its view.

        Raises:
            ValueError: If somebody owns the view of a weight already, also under another of its names.
        """
        parameters = named_weights(self.module)
        taken = {id(weight.weight): weight.owner for weight in self._weights.values()}
        for name in views:
            other = taken.get(id(parameters[name]))
            taken[id(parameters[name])] = owner
            if other is not None:
                raise ValueError(
                    f"'{other}' and '{owner}' both present the weight '{name}'; leave it to one of them with layers= "
                    "or exclude="
                )
        sites = sites_of(self.module)
        added = {
            name: _Presented(owner, name, parameters[name], sites[id(parameters[name])], view)
            for name, view in views.items()
        }
        self._weights.update(added)
        _compat.reset_compiled_code()
        _compat.watch_compilations(self._tracing)
        try:
            yield
        finally:
            for name, weight in added.items():
                weight.drop(compare=False)
                del self._weights[name]
            _compat.unwatch_compilations(self._tracing)
            _compat.reset_compiled_code()

    def show(self) -> None:
        """Present all weights, with their values as they are now."""
        if self.active:
            self._remove()
        unwatched = _compat.watch_compilations(self._tracing)  # somebody has reset torch.compile
        attributes = {site.attribute for _, site in self._all_sites()}
        if unwatched or any(_compat.reads_parameters(traced, attributes) for traced in self._traced):
            _compat.reset_compiled_code()  # it would go on reading the parameters
            _compat.watch_compilations(self._tracing)  # which a reset ends
        self._traced.clear()
        present = {id(module) for module in self.module.modules()}
        for weight, site in self._all_sites():
            parameter = site.module._parameters.get(site.attribute)
            if id(site.module) not in present or parameter is not weight.weight:
                raise RuntimeError(
                    f"the weight '{weight.name}', which '{weight.owner}' presents, was replaced by another, or its "
                    "layer was, since the fit began: do so before the fit, or leave it out with "
                    f"{_excluding(weight.name)}"
                )
        for weight in self._weights.values():
            weight.show()

    def compare_next(self) -> None:
        """After the next step, compare each value with what it should be, at the cost of a pass over all weights.

        What autograd can know of is noticed anyway.
        """
        self._compare_next = True

    def drop(self, *, evaluation: bool = False) -> None:
        """Let the module read its parameters again.

        Args:
            evaluation: Whether this ends an evaluation, not a step. Meanwhile other weights may have been put in, as
                averages are, and layers frozen.

        Raises:
            RuntimeError: If somebody wrote to a presented weight, or replaced it: what they did is lost.
        """
        if evaluation:
            self._remove()
            return
        for name, weight in self._weights.items():
            if weight.shown is not None and weight.weight.requires_grad != weight.required_grad:
                self.abandon()
                raise RuntimeError(
                    f"requires_grad of the weight '{name}' was changed within a step, after '{weight.owner}' had "
                    f"presented it; change it between steps, or leave the layer out with {_excluding(name)}"
                )
        compare, self._compare_next = self._compare_next, False
        self._remove(compare=compare)

    def refresh(self) -> None:
        """Present the values anew, because the weights have changed; nothing if nothing is presented."""
        if self.active:
            self.show()

    def abandon(self) -> None:
        """Let the module read its parameters again, whatever was done to the views: after an error that says more."""
        for weight in self._weights.values():
            weight.drop(compare=False)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Present the weights from here on, beyond the context, until :meth:`drop`; an error within ends it.

        For a forward pass whose backward pass comes later and may run parts of it again.
        """
        self.show()
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    @contextmanager
    def presented(self) -> Iterator[None]:
        """Present the weights within the context."""
        with self.shown():
            yield
        self.drop()

    @contextmanager
    def owned_for_another_pass(
        self, owner: str, views: Mapping[str, WeightView]
    ) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Own further views of weights, for another forward pass in a step, for as long as the context lasts.

        Args:
            owner: Name of who does, as in :meth:`owned`, whose weights these are.
            views: Full name of a weight to its other view.

        Yields:
            What gives a context within which the weights are presented so. After it they are presented as before; one
            backward pass goes through both.

        Raises:
            ValueError: If a weight is not owned by this owner.

        Example:
            >>> from lightning_compress.mechanisms.masking import MaskedWeight
            >>> layer = nn.Linear(2, 1, bias=False)
            >>> views, mask = WeightViews(layer), torch.tensor([[True, False]])
            >>> with views.owned("example", {"weight": MaskedWeight(mask)}):
            ...     with views.owned_for_another_pass("example", {"weight": MaskedWeight(~mask)}) as another:
            ...         with views.presented():
            ...             loss = layer(torch.tensor([[1.0, 2.0]])).sum()
            ...             with another():
            ...                 loss = loss + 10 * layer(torch.tensor([[1.0, 2.0]])).sum()
            ...         loss.backward()
            >>> layer.weight.grad
            tensor([[ 1., 20.]])
        """
        for name in views:
            if name not in self._weights or self._weights[name].owner != owner:
                raise ValueError(f"the weight '{name}' is not presented by '{owner}'")
        others = [
            _Presented(owner, name, self._weights[name].weight, self._weights[name].sites, view)
            for name, view in views.items()
        ]

        @contextmanager
        def another() -> Iterator[None]:
            try:
                for other in others:
                    other.show()
                yield
            finally:
                lost = {other.name: other.drop(compare=False) for other in reversed(others)}
            self._complain(lost)

        self._others += others
        try:
            yield another
        finally:
            for other in others:
                self._others.remove(other)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of the weight that a tensor presents, for whoever meets it in an operation; None for others."""
        shown = (*self._weights.values(), *self._others)
        return next((weight.name for weight in shown if weight.shown is tensor), None)

    @contextmanager
    def watched(self) -> Iterator[Callable[[], list[str]]]:
        """Watch the first step for views without effect.

        Yields:
            A function to be called after the backward pass, once: gives the names of the weights that the step did not
            use at all. It raises RuntimeError if a gradient, or a call, went past a view.
        """
        called: set[int] = set()
        past: dict[str, str] = {}  # weights that were used otherwise than through their views
        graded: set[str] = set()
        stack = ExitStack()
        read_by: dict[int, list[tuple[_Presented, str]]] = {}
        for presented, place in self._all_sites():
            read_by.setdefault(id(place.module), []).append((presented, place.attribute))

        def before(module: nn.Module, _: Any) -> None:
            if not self.module.training:  # a validation comes before the first step
                return
            called.update(map(id, [module, *(module.children() if isinstance(module, nn.MultiheadAttention) else [])]))
            for weight, attribute in read_by.get(id(module), ()):
                if module._parameters.get(attribute) is not weight.weight:
                    past[weight.name] = "gets other parameters, as torch.func.functional_call gives"

        def finish() -> list[str]:
            stack.close()
            for name in graded:
                if not self._weights[name].reached:
                    past.setdefault(name, "gets a gradient past its view: something holds on to the parameter itself")
            for name, what in past.items():
                raise RuntimeError(
                    f"the weight '{name}' {what}, so what '{self._weights[name].owner}' presents in its place has no "
                    f"effect; leave the layer out with {_excluding(name)}"
                )
            used = graded | {weight.name for weight, site in self._all_sites() if id(site.module) in called}
            return [] if not called else [name for name in self._weights if name not in used]

        with stack:
            for name, weight in self._weights.items():
                weight.reached = False
                if weight.weight.requires_grad:
                    handle: Any = weight.weight.register_hook(partial(_add, graded, name))  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            if not _compat.holds_compiled_code(self.module):  # which would be compiled again without the hook
                stack.callback(nn.modules.module.register_module_forward_pre_hook(before).remove)
            yield finish

    def _remove(self, *, compare: bool = False) -> None:
        self._complain({name: weight.drop(compare=compare) for name, weight in self._weights.items()})

    def _complain(self, lost: Mapping[str, str | None]) -> None:
        for name, what in lost.items():
            if what is not None:
                raise RuntimeError(
                    f"the weight '{name}' {what} within a step, where '{self._weights[name].owner}' presents a masked "
                    "one in its place, so the change would be lost. Make it between steps, for example in "
                    f"on_train_batch_end, or leave the layer out with {_excluding(name)}"
                )

    def _all_sites(self) -> Iterator[tuple[_Presented, Site]]:
        for weight in self._weights.values():
            for site in weight.sites:
                yield weight, site

    def _tracing(self, event: Any) -> None:
        if not self.active:
            self._traced.append(_compat.being_traced(event))


def _excluding(name: str) -> str:
    """How to leave out the layer of a weight; the root itself can only be left out by naming others."""
    layer = name.rpartition(".")[0]
    return f"exclude={[layer]}" if layer else "layers="


def _add(names: set[str], name: str, _: Tensor) -> None:
    names.add(name)

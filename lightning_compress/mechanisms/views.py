"""Weight views: a step and an evaluation see other weights than the module stores, and nothing is renamed.

A weight is shadowed by an instance attribute of its name, which Python finds before it asks ``nn.Module``. Forward
passes therefore read the view, while optimizers, ``state_dict``, ``named_parameters`` and DDP go on with the parameter;
autograd leads from the view to it through the view's own rule.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.gathering import Gathered, GatheredWeights, freed_or_frozen
from lightning_compress.mechanisms.selection import excluding, plain_name
from lightning_compress.mechanisms.sharding import sharded_units, shards_in_place
from lightning_compress.mechanisms.weights import Site, named_weights, sites_of
from lightning_compress.mechanisms.wrapping import OWN_MARK


class WeightView(Protocol):
    """How one weight is presented: a function of it, and the chain rule of its gradient."""

    @property
    def plain(self) -> bool:
        """Whether the value is the weight itself, with its own gradient."""

    @property
    def copies(self) -> bool:
        """Whether the value is computed, into memory of its own, not the weight itself."""

    def value(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """What is presented, ``(...)`` as the weight; written to ``out`` if given."""

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the weight from that of the presented value, both ``(...)``."""


class Usage(NamedTuple):
    """How the first step used the weights that are presented.

    Attributes:
        unused: Names of those that it did not use at all.
        partly: Names of those that got a part of their gradient otherwise than through the view.
    """

    unused: list[str]
    partly: list[str]


class Source(NamedTuple):
    """Where a presented tensor comes from.

    Attributes:
        name: Name of the weight.
        weight: The parameter.
        shown: The whole of what is presented in its place.
    """

    name: str
    weight: nn.Parameter
    shown: Tensor


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
    place: int = 0  # of what is shown
    source: tuple[int, int] = (0, 0)  # version and place of the weight when it was shown
    required_grad: bool = False
    original: Tensor | None = None  # a copy of what is shown, to see writes that autograd does not
    note: Callable[[_Presented, Tensor], None] | None = None  # told the gradients that come through the view

    def show(self, *, keep_original: bool = False) -> None:
        if self.view.plain:
            # a view that was made without gradients cannot even be looked at once the weight was written to
            self.shown = self.weight.view_as(self.weight) if torch.is_grad_enabled() else self.weight.detach()
            if self.shown.requires_grad and self.note is not None:
                self.shown.register_hook(partial(self.note, self))  # type: ignore[no-untyped-call]
        else:
            if self.view.copies:
                self._prepare_buffer()
            self.shown = _Shown.apply(self.weight, self)
        self.version, self.required_grad = self.shown._version, self.weight.requires_grad
        self.place, self.source = self.shown.data_ptr(), self._state()
        self.original = self.shown.detach().clone() if keep_original and self.view.copies else None
        # a copy of the module gets the parameter itself, which is where its own optimizer writes
        self.shown.__deepcopy__ = partial(copy.deepcopy, self.weight)  # type: ignore[method-assign]
        itself = operator.getitem, ((self.weight,), 0)
        self.shown.__reduce_ex__ = lambda _: itself  # type: ignore[method-assign]
        self.below = [vars(site.module).get(site.attribute) for site in self.sites]
        for site in self.sites:
            vars(site.module)[site.attribute] = self.shown
            _compat.refresh_flat_weights(site.module)

    def drop(self) -> str | None:
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
        if any(entry is not shown for entry in entries) or shown.data_ptr() != self.place:
            return "was replaced"
        original, self.original = self.original, None
        if not self.view.copies:  # the weight itself: what is written to it stays
            return None
        same = original is None or torch.allclose(shown.detach(), original, rtol=0, atol=0, equal_nan=True)
        return None if same and shown._version == self.version else "was written to"

    @property
    def is_stale(self) -> bool:
        """Whether somebody has changed the weight since it was shown, other than through what is shown."""
        return self.shown is not None and self._state() != self.source

    def _state(self) -> tuple[int, int]:
        return self.weight._version if self.view.copies else 0, self.weight.data_ptr()

    def _prepare_buffer(self) -> None:
        if self.buffer is None or not _compat.is_unshared(self.buffer):  # a graph that is still alive has saved it
            with torch.inference_mode(False):  # else it could not be written to in training
                self.buffer = torch.empty_like(self.weight, requires_grad=False)


class _Shown(torch.autograd.Function):
    """From a weight to what is presented of it, with the view's own rule for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, presented: _Presented) -> Tensor:
        ctx.presented = presented
        return presented.view.value(weight.detach(), presented.buffer).detach()  # another tensor on the same memory

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = ctx.presented.view.gradient(gradient)
        if ctx.presented.note is not None:
            ctx.presented.note(ctx.presented, own)
        return own, None


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
        self.sharded = GatheredWeights(module)
        """Those of its weights that FSDP2 has split over processes, which are presented when they are gathered."""
        self._weights: dict[str, _Presented] = {}
        self._others: list[_Presented] = []  # of a further pass in a step
        self._compare_next = True
        self._traced: list[_compat.Traced] = []  # by torch.compile, while nothing was presented

    @property
    def active(self) -> bool:
        """Whether the views are presented now."""
        return self.sharded.shown or any(weight.shown is not None for weight in self._weights.values())

    @property
    def owners(self) -> list[str]:
        """Who presents weights, sorted."""
        return sorted({weight.owner for weight in self._all()})

    @contextmanager
    def owned(self, owner: str, views: Mapping[str, WeightView]) -> Iterator[None]:
        """Present these weights through these views, for as long as the context lasts.

        Args:
            owner: Name of who does, for messages.
            views: Full name of a parameter to its view.

        Raises:
            ValueError: If somebody owns the view of a weight already, also under another of its names.
        """
        shards_in_place(self.module)
        parameters = named_weights(self.module)
        taken = {id(weight.weight): weight.owner for weight in self._all()}
        for name in views:
            other = taken.get(id(parameters[name]))
            taken[id(parameters[name])] = owner
            if other is not None:
                raise ValueError(
                    f"'{other}' and '{owner}' both present the weight '{name}'; leave it to one of them with layers= "
                    "or exclude="
                )
        if sharded_units(self.module):
            with self.sharded.owned(owner, parameters, views):
                yield
            return
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
                weight.drop()
                del self._weights[name]
            _compat.unwatch_compilations(self._tracing)
            _compat.reset_compiled_code()

    def resized(self) -> None:
        """Forget the memory of views: the weights have other shapes, between two steps."""
        for weight in (*self._weights.values(), *self._others):
            weight.buffer = None

    def show(self) -> None:
        """Present all weights, with their values as they are now; nothing if nobody owns any."""
        self.sharded.show()
        if not self._weights:
            return
        if self.active:
            self._remove()
        unwatched = _compat.watch_compilations(self._tracing)  # somebody has reset torch.compile
        if unwatched or self._stale():
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
                    f"{excluding(weight.name)}"
                )
        for weight in self._weights.values():
            weight.show(keep_original=self._compare_next)

    def compare_next(self) -> None:
        """Notice in the next step what is written to a view behind autograd's back, at the cost of a copy of it.

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
        self.sharded.drop()
        if evaluation:
            self._remove()
            return
        for name, weight in self._weights.items():
            if weight.shown is not None and weight.weight.requires_grad != weight.required_grad:
                self.abandon()
                raise freed_or_frozen(name, weight.owner)
        self._compare_next = False
        self._remove()

    def refresh(self) -> None:
        """Present the values anew, because the weights have changed; nothing if nothing is presented."""
        if self.active:
            self.show()

    def abandon(self) -> None:
        """Let the module read its parameters again, whatever was done to the views: after an error that says more."""
        self.sharded.drop()
        for weight in self._weights.values():
            weight.drop()

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
    def followed(self) -> Iterator[None]:
        """Present the weights within the context, anew before a layer is called whose weight somebody has changed.

        That is how SAM moves weights between two passes of a step. Where code is compiled, nobody can look so often.
        """
        readers: dict[int, list[_Presented]] = {}
        for weight, site in self._all_sites():
            readers.setdefault(id(site.module), []).append(weight)

        def before(module: nn.Module, _: Any) -> None:
            parts = module.children() if isinstance(module, nn.MultiheadAttention) else ()  # read, and never called
            if any(weight.is_stale for part in (module, *parts) for weight in readers.get(id(part), ())):
                with torch.inference_mode(False), torch.enable_grad():
                    self.refresh()

        with self.presented(), ExitStack() as stack:
            if not _compat.holds_compiled_code(self.module):
                stack.callback(nn.modules.module.register_module_forward_pre_hook(before).remove)
            yield

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
            ValueError: If a weight is not owned by this owner, or a part of ``torch.jit`` learns or keeps buffers.
            RuntimeError: In the backward pass, if activation checkpointing runs a layer again: for which of the passes
                is not known then.

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
        owned = {weight.name: weight.owner for weight in self._all()}
        for name in views:
            if owned.get(name) != owner:
                raise ValueError(f"the weight '{name}' is not presented by '{owner}'")
        if self.sharded.weights:  # whose layers may run again: there is a backward pass for each of the passes
            yield partial(self.sharded.seen_as, views)
            return
        others = [
            _Presented(owner, name, self._weights[name].weight, self._weights[name].sites, view)
            for name, view in views.items()
        ]

        @contextmanager
        def another() -> Iterator[None]:
            try:
                for other in others:
                    other.note = self._weights[other.name].note
                    other.show()
                yield
            finally:
                lost = {other.name: other.drop() for other in reversed(others)}
            self._complain(lost)

        self._others += others
        with ExitStack() as stack:
            for other in others:
                stack.callback(self._others.remove, other)
            for name, module in self.module.named_modules():  # all: the pass may see also what has no view otherwise
                if isinstance(module, torch.jit.ScriptModule):
                    learns = any(own.requires_grad for own in module.parameters())
                    if learns or next(module.buffers(), None) is not None:
                        raise ValueError(
                            f"'{plain_name(name)}' is of torch.jit, and learns or keeps buffers, which cannot be "
                            f"followed through the two passes of '{owner}'; use the module that it was made of"
                        )
                    continue
                reads = any(parameter is not None for parameter in module._parameters.values())
                if reads or _compat.is_compiled(module):  # within compiled code a hook cannot tell
                    hook = _RefusesAgain(owner, plain_name(name), module)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield another

    def source_of(self, tensor: Tensor) -> Source | None:
        """What a tensor presents, or is a part of, for whoever meets it in an operation; None for all others."""
        sources = [weight for weight in (*self._weights.values(), *self._others) if weight.shown is not None]
        found = next((weight for weight in sources if weight.shown is tensor), None)
        if found is None and sources:
            place = tensor.untyped_storage().data_ptr()
            alike = (own for own in sources if own.shown.untyped_storage().data_ptr() == place)  # type: ignore[union-attr]
            found = next(alike, None)
        return None if found is None or found.shown is None else Source(found.name, found.weight, found.shown)

    @contextmanager
    def watched(self, owner: str) -> Iterator[Callable[[], Usage]]:
        """Watch the first step, and the validation before it, for views without effect.

        Args:
            owner: Whose weights to watch.

        Yields:
            A function to be called after the backward pass, once: says how the step used the weights. It raises
            RuntimeError if a gradient, or a call, went past a view, or requires_grad was changed after it was shown.
        """
        if self.sharded.weights:  # a step has an error of its own for those that were not presented

            def used() -> Usage:
                self.sharded.check_learnt(owner)
                return Usage(self.sharded.unused(owner), self.sharded.passed(owner))

            yield used
            return
        own = {name: weight for name, weight in self._weights.items() if weight.owner == owner}
        called: set[int] = set()
        past: dict[str, str] = {}  # weights that were used otherwise than through their views
        graded: set[str] = set()
        through: dict[str, dict[int, Tensor]] = {}  # the last gradient that came through each view
        partly: set[str] = set()
        stack = ExitStack()
        read_by: dict[int, list[tuple[_Presented, str]]] = {}
        for presented in own.values():
            for site in presented.sites:
                read_by.setdefault(id(site.module), []).append((presented, site.attribute))

        def before(module: nn.Module, _: Any) -> None:
            for weight, attribute in read_by.get(id(module), ()):
                own = module._parameters.get(attribute)
                if own is None or own.data_ptr() != weight.weight.data_ptr():
                    past[weight.name] = "gets other parameters, as torch.func.functional_call gives"
                elif weight.shown is not None and weight.weight.requires_grad != weight.required_grad:
                    past[weight.name] = "was frozen or freed within the step, otherwise than by toggle_optimizer"
            if self.module.training or module.training:  # a validation is no step; frozen parts may stay in evaluation
                parts = module.children() if isinstance(module, nn.MultiheadAttention) else ()
                called.update(map(id, [module, *parts]))

        def note(weight: _Presented, gradient: Tensor) -> None:
            through.setdefault(weight.name, {})[id(weight)] = gradient

        def arrived(name: str, gradient: Tensor) -> None:
            graded.add(name)
            seen, shown = [*through.pop(name, {}).values()], own[name].shown
            written = shown is not None and shown._version != own[name].version
            if _compat.is_batched(gradient):
                return
            if not seen and not written:  # a write takes the hook of a dense view away
                past.setdefault(name, "gets a gradient past its view: something holds on to the parameter itself")
            elif seen and not torch.allclose(torch.stack(seen).sum(dim=0), gradient, equal_nan=True):
                partly.add(name)

        def finish() -> Usage:
            stack.close()
            for name, what in past.items():
                raise RuntimeError(
                    f"the weight '{name}' {what}, so what '{owner}' presents in its place has no effect; leave the "
                    f"layer out with {excluding(name)}"
                )
            used = graded | {weight.name for part in called for weight, _ in read_by.get(part, ())}
            return Usage([] if not called else [name for name in own if name not in used], sorted(partly))

        with stack:
            for name, weight in own.items():
                weight.note = note
                stack.callback(setattr, weight, "note", None)
                if weight.weight.requires_grad:
                    stack.callback(_compat.hook_first(weight.weight, partial(arrived, name)).remove)
            if not _compat.holds_compiled_code(self.module):  # which would be compiled again without the hook
                stack.callback(nn.modules.module.register_module_forward_pre_hook(before).remove)
            yield finish

    def _remove(self) -> None:
        self._complain({name: weight.drop() for name, weight in self._weights.items()})

    def _complain(self, lost: Mapping[str, str | None]) -> None:
        for name, what in lost.items():
            if what is not None:
                raise RuntimeError(
                    f"the weight '{name}' {what} within a step, where '{self._weights[name].owner}' presents another "
                    "in its place, so the change would be lost. Make it between steps, for example in "
                    f"on_train_batch_end, or leave the layer out with {excluding(name)}"
                )

    def _all(self) -> list[_Presented | Gathered]:
        return [*self._weights.values(), *self.sharded.weights.values()]

    def _all_sites(self) -> Iterator[tuple[_Presented, Site]]:
        for weight in self._weights.values():
            for site in weight.sites:
                yield weight, site

    def _stale(self) -> bool:
        """Whether code that was traced while nothing was presented reads parameters of these names."""
        if not self._traced:
            return False
        attributes = {site.attribute for _, site in self._all_sites()}
        return any(_compat.reads_parameters(traced, attributes) for traced in self._traced)

    def _tracing(self, event: Any) -> None:
        if not self.active:
            self._traced.append(_compat.being_traced(event))


class _RefusesAgain:
    """A hook that refuses to run a layer in a backward pass; in copies of the layer it does nothing."""

    def __init__(self, owner: str, name: str, module: nn.Module) -> None:
        self._owner, self._name, self._module = owner, name, weakref.ref(module)
        setattr(self, OWN_MARK, True)

    def __call__(self, module: nn.Module, _: Any) -> None:
        if _compat.runs_again() and self._module() is module:
            raise RuntimeError(
                f"activation checkpointing runs the layer '{self._name}' again in the backward pass, when it is not "
                f"known to which of the two passes of '{self._owner}' this belongs, so which weights it saw; switch it "
                "off"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _compat.do_nothing

"""A further pass of a step: it sees what the first one saw, and leaves nothing behind.

The user's step runs once more on the same batch. It draws the same random numbers; what it logs is muted; metrics are
put back. What else it changes in the module cannot be done twice unnoticed, so it is an error that names it.
"""

from __future__ import annotations

import io
import math
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.isolation import (
    GENERATORS,
    LIBRARIES,
    LONG,
    MUTED,
    RandomState,
    attributes_kept,
    device_of,
    generator_restorer,
    is_users,
)
from lightning_compress.mechanisms.selection import is_metric, listing
from lightning_compress.mechanisms.sharding import class_name, own_part, shards_in_place
from lightning_compress.mechanisms.wrapping import shadowed

TABLES = ("_parameters", "_buffers", "_modules")
SIMPLE = (int, float, bool, str)
# Modes among them, which are put back; and what recurrent layers keep of the weights that are presented to them.
TORCHS_OWN = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


class FurtherPass:
    """A step that is about to run for the first time, and will run again; made before each step.

    Buffers are not its business: who presents other weights to the pass lets it write to other buffers too.

    Args:
        module: The LightningModule; in a plain loop any module.
        arguments: Those of the step.
        closely: Whether to compare the values of frozen parameters too, which may be written to past autograd.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> further = FurtherPass(layer)
        >>> first = layer(torch.ones(100))
        >>> with further.traceless("dense"):
        ...     again = layer(torch.ones(100))
        >>> torch.equal(first, again)
        True
    """

    def __init__(self, module: nn.Module, arguments: Any = (), *, closely: bool = False) -> None:
        self._module = module
        self._closely = closely
        self._children = {id(part) for part in module.modules()}
        self._start = [*self._random_states(), self._training_flags()]
        self._arguments = arguments
        self._batch = _fingerprint(arguments, set())

    @contextmanager
    def traceless(self, name: str) -> Iterator[None]:
        """Run the step again within this context.

        Args:
            name: Of the pass, for messages.

        Raises:
            RuntimeError: If the first pass changed its batch, or this one attributes of the module, or it takes
                gradients of its own; metrics and random states are as the first pass left them then.
        """
        module = self._module
        if _fingerprint(self._arguments, set()) != self._batch:
            raise RuntimeError(
                f"the step of {class_name(module)} changes its batch, and it runs twice on each batch here (again "
                f"for the pass '{name}'), the second time on what the first made of it. Change a copy"
            )
        with ExitStack() as stack:
            for restore in (*self._random_states(), self._training_flags()):
                stack.callback(restore)
            for restore in self._start:
                restore()
            stack.enter_context(_compat.silenced_loggers(module))
            for method in MUTED:
                if callable(getattr(module, method, None)):
                    stack.enter_context(shadowed(module, method, lambda _: lambda *args, **kwargs: None))
            for part in module.modules():
                if is_metric(part):
                    stack.enter_context(attributes_kept(part, whole=True, data=TABLES))
            before, values = self._fingerprints(), self._frozen_values()
            try:
                yield
            except RuntimeError as error:
                if "require grad" not in str(error):
                    raise
                raise RuntimeError(
                    f"the step of {class_name(module)} takes gradients by parameters that do not learn in the pass "
                    f"'{name}', in which it runs once more: a technique that runs the step once, such as DPFCallback, "
                    f"can have that ({error})"
                ) from error
            after = self._fingerprints()
        changed = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        changed += [name for name, (own, value) in values.items() if name not in changed and not _equal(own, value)]
        if changed:
            raise RuntimeError(
                f"the step of {class_name(module)} changes {listing(changed)}, and it runs twice on each batch here "
                f"(again for the pass '{name}'), so that would be done twice. Change it outside of the step, in "
                "on_train_batch_end say, or take a technique that runs the step once, such as DPFCallback"
            )

    def _random_states(self) -> list[Any]:
        """What brings the global random states, and the module's own generators, back to where they are now."""
        seen = set(self._children)
        parts = self._module.modules()
        own = [value for part in parts for value in vars(part).values() if isinstance(value, GENERATORS)]
        own += [generator for _, value in self._attributes() for generator in _generators(value, seen)]
        restorers = [restorer for generator in own if (restorer := generator_restorer(generator)) is not None]
        return [RandomState(device_of(self._module)).restore, *restorers]

    def _training_flags(self) -> Callable[[], None]:
        """What puts all parts into the mode that they are in now."""
        flags = [(part, part.training) for part in self._module.modules()]

        def restore() -> None:
            for part, training in flags:
                if part.training != training:
                    part.training = training

        return restore

    def _fingerprints(self) -> dict[str, Any]:
        """What tells whether an attribute, or a parameter, has changed, by its dotted name."""
        shards_in_place(self._module)
        parameters = {
            name: (_Same(own), own._version, own_part(own).data_ptr()) for name, own in self._module.named_parameters()
        }
        seen = set(self._children)  # what several attributes hold is looked into once
        attributes = {place: _fingerprint(value, seen) for place, value in self._attributes()}
        return {**parameters, **attributes, **self._simple_attributes()}

    def _simple_attributes(self) -> dict[str, Any]:
        """Numbers and the like of the libraries' modules, such as the rate of a dropout; for speed, nothing deeper."""
        return {
            f"{name}.{attribute}": value
            for name, part in self._module.named_modules()
            if _compat.users_class(part).__module__.partition(".")[0] in LIBRARIES and not is_metric(part)
            for attribute, value in vars(part).items()
            if type(value) in SIMPLE and attribute != "training"
        }

    def _frozen_values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Frozen parameters, such as those of an average of the network, and copies of them."""
        named = self._module.named_parameters() if self._closely else ()
        frozen = {name: own_part(own) for name, own in named if not own.requires_grad}
        return {name: (own, own.clone()) for name, own in frozen.items()}

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """What the user's modules hold beside parameters, buffers and modules; metrics are put back instead."""
        for name, part in self._module.named_modules():
            if _compat.users_class(part).__module__.partition(".")[0] not in LIBRARIES and not is_metric(part):
                for attribute, value in list(vars(part).items()):
                    if attribute not in TORCHS_OWN:
                        yield f"{name}.{attribute}" if name else attribute, value


class _Same:
    """An object that is equal to itself only; it is kept alive, so that no other takes its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _fingerprint(value: Any, seen: set[int]) -> Any:
    """Equal before and after if, and only if, nothing was changed, at any depth of the user's objects."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        return value
    if isinstance(value, GENERATORS):  # wound back instead
        return _Same(value)
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        raise RuntimeError(
            f"the module, or its batch, keeps an iterator, {type(value).__name__}, and a step that draws from it would "
            "draw twice here; let the training data give what the step needs"
        )
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return _Same(value), None if value.dtype.hasobject else zlib.crc32(value.tobytes())
    if isinstance(value, bytearray):
        return _Same(value), bytes(value)
    entries = _entries(value)
    if entries is None or id(value) in seen:
        return _Same(value)
    seen.add(id(value))
    return _Same(value), len(entries), [(_key(key), _fingerprint(entry, seen)) for key, entry in _first(entries)]


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int)) else _Same(key)


def _generators(value: Any, seen: set[int]) -> Iterator[Any]:
    """The random generators at any depth of the user's objects."""
    if isinstance(value, GENERATORS):
        yield value
    elif id(value) not in seen and (entries := _entries(value)) is not None:
        seen.add(id(value))
        for _, entry in _first(entries):
            yield from _generators(entry, seen)


def _entries(value: Any) -> Collection[tuple[Any, Any]] | None:
    """What is inside of a container or of a user's object, with keys; None for what is looked at from outside."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple, deque, set)):
        return [(None, entry) for entry in value] if len(value) <= LONG else [(None, None)] * len(value)
    if isinstance(value, nn.Module):  # one that is no child, such as a metric in a list
        states = [entry for part in value.modules() if is_metric(part) for entry in vars(part).items()]
        return [*value.named_parameters(), *value.named_buffers(), *states]
    return list(vars(value).items()) if is_users(value) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _first(entries: Collection[tuple[Any, Any]]) -> Collection[tuple[Any, Any]]:
    """The entries of what is not too long; what lies inside of a longer list is data."""
    return list(entries) if len(entries) <= LONG else []

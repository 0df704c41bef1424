"""A further pass of a step: it sees what the first one saw, and leaves nothing behind.

The user's step runs once more on the same batch. It draws the same random numbers; what it logs is muted; metrics are
put back. What else it changes in the module cannot be done twice unnoticed, so it is an error that names it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
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
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.student import is_metric
from lightning_compress.mechanisms.wrapping import shadowed

TABLES = ("_parameters", "_buffers", "_modules")
TORCHS_OWN = set(vars(nn.Module())) - {"training"}


class FurtherPass:
    """A step that is about to run for the first time, and will run again; made before each step.

    Buffers are not its business: who presents other weights to the pass lets it write to other buffers too.

    Args:
        module: The LightningModule; in a plain loop any module.

    Example:
        >>> import torch
        >>> layer = nn.Dropout(0.5)
        >>> further = FurtherPass(layer)
        >>> first = layer(torch.ones(100))
        >>> with further.traceless("dense"):
        ...     again = layer(torch.ones(100))
        >>> torch.equal(first, again)
        True
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._start = self._random_states()

    @contextmanager
    def traceless(self, name: str) -> Iterator[None]:
        """Run the step again within this context.

        Args:
            name: Of the pass, for messages.

        Raises:
            RuntimeError: If the pass changed attributes of the module, which are as the first pass left them then.
        """
        module = self._module
        with ExitStack() as stack:
            for restore in self._random_states():
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
            before = self._fingerprints()
            yield
            changed = [place for place, value in self._fingerprints().items() if before.get(place) != value]
        if changed:
            raise RuntimeError(
                f"the step of {type(module).__name__} changes {listing(changed)}, and it runs twice on each batch here "
                f"(again for the pass '{name}'), so that would be done twice. Change it outside of the step, for "
                "example in on_train_batch_end"
            )

    def _random_states(self) -> list[Any]:
        """What brings the global random states, and the module's own generators, back to where they are now."""
        own = [
            restorer
            for part in self._module.modules()
            for value in vars(part).values()
            if isinstance(value, GENERATORS) and (restorer := generator_restorer(value)) is not None
        ]
        return [RandomState(device_of(self._module)).restore, *own]

    def _fingerprints(self) -> dict[str, Any]:
        """What tells whether an attribute has changed, by the dotted names of attributes of the user's modules."""
        return {
            f"{name}.{attribute}" if name else attribute: _fingerprint(value, set())
            for name, part in self._module.named_modules()
            if type(part).__module__.partition(".")[0] not in LIBRARIES
            for attribute, value in vars(part).items()
            if attribute not in TORCHS_OWN
        }


def _fingerprint(value: Any, seen: set[int]) -> Any:
    """Equal before and after if, and only if, nothing was changed, at any depth of the user's objects."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        return value
    if isinstance(value, GENERATORS):
        return None
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if value.size <= LONG and not value.dtype.hasobject else None
    if isinstance(value, Mapping):
        return id(value), [(id(key), _fingerprint(entry, seen)) for key, entry in _first(value.items())], len(value)
    if isinstance(value, (list, tuple, deque, set)):
        return id(value), [_fingerprint(entry, seen) for entry in _first(value)], len(value)
    if is_users(value) and not isinstance(value, nn.Module):
        return id(value), [(key, _fingerprint(entry, seen)) for key, entry in list(vars(value).items())]
    return id(value)


def _first(entries: Any) -> list[Any]:
    """The entries of what is not too long; what lies inside of a longer list is data."""
    return list(entries) if len(entries) <= LONG else []

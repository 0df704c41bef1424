"""Results that come back from spawned processes, where Lightning returns weights and metrics but no callback's state.

With ``ddp_spawn`` and ``ddp_fork`` the fit runs in children, on copies of the callbacks. Rank 0 leaves what a callback
found in a temporary file, whose name the callback has had since it was made; the first look at it in the parent reads
the file and removes it.
"""

from __future__ import annotations

import io
import os
import secrets
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch

from lightning_compress.mechanisms.drafts import remove_abandoned, write_whole

T = TypeVar("T")

FOUND = "_returned_"
"""How the entries begin under which a callback has its results."""


class Returned(Generic[T]):
    """An attribute of a callback that its original in the parent process gets back.

    Args:
        default: Value before anything was found; not mutable.

    Example:
        >>> class Found(ReturnsResults):
        ...     count = Returned(0)
        >>> found = Found()
        >>> found.count += 1
        >>> found.count
        1
    """

    def __init__(self, default: T) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.entry = f"{FOUND}{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Returned[T]: ...
    @overload
    def __get__(self, instance: ReturnsResults, owner: type) -> T: ...
    def __get__(self, instance: ReturnsResults | None, owner: type) -> Returned[T] | T:
        if instance is None:
            return self
        instance.recall()
        value: T = vars(instance).get(self.entry, self.default)
        return value

    def __set__(self, instance: ReturnsResults, value: T) -> None:
        instance.recall()  # what was left before is older
        vars(instance)[self.entry] = value


class ReturnsResults:
    """Owner of :class:`Returned` attributes."""

    def __init__(self) -> None:
        super().__init__()
        self._home, self._looked = os.getpid(), False
        self._parcel = str(Path(tempfile.gettempdir()) / f"lightning_compress-{secrets.token_hex(16)}.pt")
        weakref.finalize(self, _remove, self._parcel, self._home)

    @property
    def is_away(self) -> bool:
        """Whether this is a copy in another process than that in which the original was made."""
        return os.getpid() != self._home

    def send_home(self) -> None:
        """In a child process: leave all results for the parent."""
        entries = [vars(kind) for kind in type(self).__mro__]
        results = {
            value.entry: vars(self)[value.entry]
            for attributes in entries
            for value in attributes.values()
            if isinstance(value, Returned) and value.entry in vars(self)
        }
        contents = io.BytesIO()
        torch.save(results, contents)
        write_whole(Path(self._parcel), contents.getvalue())

    def recall(self) -> None:
        """In the parent: take what a child has left, if it has; in a later child, what the parent never looked at."""
        if self.is_away and self._looked:
            return
        self._looked = self.is_away
        if os.path.exists(self._parcel):
            # written by a child of this process; a parent that has never used the GPU can still fork
            results: dict[str, Any] = torch.load(self._parcel, map_location="cpu", weights_only=False)
            if not self.is_away:
                os.remove(self._parcel)
            vars(self).update(results)


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:
        remove_abandoned(Path(path))
        with suppress(OSError):
            os.remove(path)

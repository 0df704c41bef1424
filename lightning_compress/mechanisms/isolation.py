"""Work that leaves no trace: no output, no random numbers drawn, every attribute as it was."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (CPU) back at the end."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global generator is the one that users draw from
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def quiet(loggers: Sequence[str], streams: bool = True) -> Iterator[None]:
    """Silence warnings, the named loggers with those below them and, if ``streams``, stdout and stderr.

    Args:
        loggers: Dotted names of loggers.
        streams: Whether what is written to ``sys.stdout`` and ``sys.stderr`` is thrown away.
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
    """Run with the whole module in evaluation mode and without gradients; each training flag is put back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in flags:
            part.training = training


@contextlib.contextmanager
def attributes_kept(owner: Any) -> Iterator[None]:
    """Put the instance attributes of a plain object back at the end, each bound to the object it was bound to."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)


@contextlib.contextmanager
def module_kept(module: nn.Module) -> Iterator[None]:
    """Put a module, and all below it, back at the end: attributes, lists, dicts, flags, devices, values.

    For a module that cannot be copied. Values inside objects that are neither containers nor tensors are not covered.
    """
    before = [(vars(part), {name: _snapshot(value) for name, value in vars(part).items()}) for part in module.modules()]
    try:
        yield
    finally:
        # All contents first: nothing is cleared before everything that takes its place is at hand.
        restored = [{name: _restored(*entry) for name, entry in saved.items()} for _, saved in before]
        for (attributes, _), values in zip(before, restored, strict=True):
            attributes.clear()
            attributes.update(values)


def _snapshot(value: Any) -> tuple[Any, Any]:
    """An object and what is needed to bring its contents back."""
    if isinstance(value, Tensor):
        # A tensor that carries a graph, or of another kind than torch's own, is only kept, never written to.
        plain = value.is_leaf and type(value) in (Tensor, nn.Parameter)
        return value, (value.data, value.detach().clone()) if plain else None
    if isinstance(value, dict):
        return value, {key: _snapshot(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return value, [_snapshot(entry) for entry in value]
    if isinstance(value, set):
        return value, set(value)
    return value, None


def _restored(value: Any, contents: Any) -> Any:
    """The object of a snapshot with its contents as they were."""
    if contents is None:
        return value
    if isinstance(value, Tensor):
        storage, saved = contents
        value.data = storage
        if not torch.equal(value.detach(), saved):
            with torch.no_grad():
                value.copy_(saved)
    elif isinstance(value, dict):
        restored = {key: _restored(*entry) for key, entry in contents.items()}
        value.clear()
        value.update(restored)
    elif isinstance(value, list):
        value[:] = [_restored(*entry) for entry in contents]
    else:
        value.clear()
        value.update(contents)
    return value

"""Marked hooks and reversible wrappers: whatever this package puts on a module can be told and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

OWN_MARK = "_lightning_compress"
"""Attribute that marks a hook or a wrapper as ours, so that copies of a module can be made without it."""

HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_GETSTATE = "__getstate__"
_ORIGINAL_ENTRY = f"{OWN_MARK}_original_entry"
_OPENERS = f"{OWN_MARK}_openers"
_CLOSED = f"{OWN_MARK}_closed"


def marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function into one that carries our mark.

    Args:
        function: A hook.

    Returns:
        A function that does the same.

    Example:
        >>> getattr(marked(abs), OWN_MARK), marked(abs)(-1)
        (True, 1)
    """

    def hook(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    setattr(hook, OWN_MARK, True)
    return hook


@contextmanager
def shadowed(
    owner: Any, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[Callable[..., Any]]:
    """Shadow a method of one instance by a wrapper, and put back afterwards what was there.

    Lightning reads ``__wrapped__`` once to learn a step's signature, so the wrapper names the innermost function. If
    somebody wrapped the method again meanwhile, their wrapper stays and ours hands on to the original. The wrapper is
    a plain function: a deep copy of the module refers to it and copies nothing of what it holds.

    Args:
        owner: The instance.
        method: Name of the method.
        make: From the original bound method to its replacement.

    Yields:
        The wrapper that was installed.

    Example:
        >>> from torch import nn
        >>> relu = nn.ReLU()
        >>> with shadowed(relu, "extra_repr", lambda original: lambda: "shadowed"):
        ...     print(relu)
        ReLU(shadowed)
        >>> relu, "extra_repr" in vars(relu)
        (ReLU(), False)
    """
    entry = _living_entry(owner, method)
    original = getattr(owner, method)
    replacement = make(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if hasattr(wrapper, _CLOSED) else replacement(*args, **kwargs)

    wrapper.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    wrapper.__name__ = method
    wrapper.__doc__ = original.__doc__
    setattr(wrapper, OWN_MARK, True)
    setattr(wrapper, _ORIGINAL_ENTRY, entry)
    vars(owner)[method] = wrapper
    try:
        yield wrapper
    finally:
        setattr(wrapper, _CLOSED, True)
        _living_entry(owner, method)


@contextmanager
def copied_plainly(root: Any) -> Iterator[None]:
    """Let a deep copy, or a pickle, of an object be one without our hooks and wrappers; of a module, its parts too.

    These are bound to what they are on: a copy of a module that had them would go on running the original's step.

    Args:
        root: A module, or another object with wrappers; what it gets as a part later is copied as it is.

    Example:
        >>> from copy import deepcopy
        >>> relu = nn.ReLU()
        >>> with copied_plainly(relu), shadowed(relu, "extra_repr", lambda original: lambda: "shadowed"):
        ...     relu, deepcopy(relu)
        (ReLU(shadowed), ReLU())
    """
    parts = list(root.modules()) if isinstance(root, nn.Module) else [root]
    opened: list[tuple[Any, Any]] = []
    for part in parts:
        entry = vars(part).get(_GETSTATE)
        if isinstance(part, torch.jit.ScriptModule) or not (entry is None or is_own(entry)):
            continue
        if entry is None:
            entry = vars(part)[_GETSTATE] = marked(partial(_plain_state, part))
        setattr(entry, _OPENERS, getattr(entry, _OPENERS, 0) + 1)
        opened.append((part, entry))
    try:
        yield
    finally:
        for part, entry in opened:
            setattr(entry, _OPENERS, getattr(entry, _OPENERS) - 1)
            if getattr(entry, _OPENERS) == 0 and vars(part).get(_GETSTATE) is entry:  # the last closes
                del vars(part)[_GETSTATE]


def is_own(value: Any) -> bool:
    """Whether a callable was put there by this package.

    Args:
        value: Any.

    Returns:
        False for what is no callable.

    Example:
        >>> is_own(marked(abs)), is_own(abs)
        (True, False)
    """
    return callable(value) and getattr(value, OWN_MARK, False) is True  # some objects have any attribute


def unwrapped(entry: Any) -> Any:
    """What an instance held under a name before the first wrapper of ours.

    Args:
        entry: A wrapper of ours; one may lie on another.

    Returns:
        None where the instance held nothing.

    Example:
        >>> relu = nn.ReLU()
        >>> with shadowed(relu, "extra_repr", lambda original: original) as wrapper:
        ...     unwrapped(wrapper) is None
        True
    """
    while is_own(entry):
        entry = getattr(entry, _ORIGINAL_ENTRY, None)
    return entry


def own_hooks(attributes: Mapping[str, Any]) -> set[int]:
    """The numbers of our hooks.

    Args:
        attributes: Of a module, its tables of hooks among them.

    Returns:
        Keys of any of the tables; one number is in one table only.

    Example:
        >>> relu = nn.ReLU()
        >>> handle = relu.register_forward_hook(marked(lambda *_: None))
        >>> own_hooks(vars(relu)) == {handle.id}
        True
    """
    return {key for table in HOOK_TABLES for key, hook in (attributes.get(table) or {}).items() if is_own(hook)}


def _plain_state(part: Any) -> Any:
    """What a copy of an object is made from."""
    inherited = getattr(type(part), _GETSTATE, None)  # LightningModules leave their Trainer out
    state = vars(part) if inherited is None else inherited(part)
    if not isinstance(state, dict):
        return state
    entries = {name: unwrapped(entry) if is_own(entry) else entry for name, entry in state.items()}
    plain = {name: entry for name, entry in entries.items() if entry is not None or not is_own(state[name])}
    if ours := own_hooks(plain):
        for table in (*HOOK_TABLES, *HOOK_FLAGS):
            if hooks := plain.get(table):
                plain[table] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in ours)
    return plain


def _living_entry(owner: Any, method: str) -> Any:
    """What the instance itself holds under a name, after taking off closed wrappers of ours.

    They are there where several were closed in the order in which they were opened, and if somebody had wrapped ours,
    and put back what they had seen after we had closed.
    """
    entry = vars(owner).get(method)
    while hasattr(entry, _CLOSED) and not hasattr(entry, "__self__") and vars(entry).get(OWN_MARK) is True:
        entry = getattr(entry, _ORIGINAL_ENTRY)
        del vars(owner)[method]
        if entry is not None:
            vars(owner)[method] = entry
    return entry

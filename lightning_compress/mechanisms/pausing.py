"""Pausing: what this package does inside of a network's call, such as keeping a layer's output, is not the network's.

A mode that sees every operation of a network would take it for a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from lightning_compress import _compat


class PausableMode(TorchFunctionMode):
    """A mode of this package that looks away while it is paused.

    Attributes:
        paused: By how many contexts it is.
    """

    paused = 0


@contextmanager
def modes_paused() -> Iterator[None]:
    """Let no mode of this package see what is done here; those of the user go on. Compiled code sees nothing anyway.

    Example:
        >>> with PausableMode() as mode, modes_paused():
        ...     mode.paused
        1
    """
    if torch.compiler.is_compiling():
        yield
        return
    modes = [mode for mode in _compat.function_modes() if isinstance(mode, PausableMode)]
    for mode in modes:
        mode.paused += 1
    try:
        yield
    finally:
        for mode in modes:
            mode.paused -= 1

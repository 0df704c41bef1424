"""Order: in which order a network calls its layers, seen in the first step that is trained anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_compress.mechanisms.wrapping import marked


@contextmanager
def call_order(layers: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Note which layers are called, and which of them first.

    Compiled code would have to be compiled again, so nothing in it may be watched.

    Args:
        layers: Any modules.

    Yields:
        The layers that were called so far, in the order of their first calls. Whoever clears it begins anew.

    Example:
        >>> import torch
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> with call_order([first, second]) as order:
        ...     _ = first(second(torch.ones(2)))
        >>> [layer is second for layer in order]
        [True, False]
    """
    order: list[nn.Module] = []

    def note(layer: nn.Module, args: Any) -> None:
        if all(layer is not other for other in order):
            order.append(layer)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(marked(note)).remove)
        yield order

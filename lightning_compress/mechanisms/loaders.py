"""Data loaders that can be read without a trace: the run that reads them later sees the batches it would have seen."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Sampler

from lightning_compress import _compat
from lightning_compress.mechanisms.isolation import attributes_kept

DATA = ("dataset", "datasets", "data_source")
"""Attributes that lead to the data itself, which may be too large to look into."""

WORKINGS = ("sampler", "batch_sampler", "collate_fn", "transform", "transforms", "target_transform")
"""Attributes of a loader, a sampler or a dataset that lead to what else may remember where it is."""


@contextmanager
def independent_loaders(loaders: Sequence[Any]) -> Iterator[list[Any]]:
    """Copies of loaders to iterate over; afterwards the originals are as they were.

    A copy shares the dataset and the samplers, but not the iterator, so worker processes of the original stay
    untouched. What the loaders, their samplers and their datasets remember is put back, as in :func:`data_kept`.

    Args:
        loaders: Data loaders, or other iterables that can be iterated over several times.

    Yields:
        One copy for each.

    Raises:
        ValueError: If one of them can be read only once, as a generator can.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> generator = torch.Generator().manual_seed(0)
        >>> loader = DataLoader(range(4), shuffle=True, generator=generator)
        >>> with independent_loaders([loader]) as [copied]:
        ...     first = [int(batch) for batch in copied]
        >>> first == [int(batch) for batch in loader]
        True
    """
    with data_kept(loaders):  # to begin to read a stream may change it
        for loader in loaders:
            _refuse_read_once(loader)
    copies = []
    for loader in loaders:
        copied = copy.copy(loader)
        _compat.forget_workers_(copied)
        copies.append(copied)
    with data_kept(loaders):
        yield copies


def _refuse_read_once(loader: Any) -> None:
    """Refuse a generator, and a dataset that hands out the same one each time."""
    dataset = getattr(loader, "dataset", None)
    once: Any = loader if isinstance(loader, Iterator) else None
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        once = dataset
    if once is not None:
        raise ValueError(
            f"the training data is a {type(once).__name__}, which can be read only once, so no batch of it can be "
            "looked at before training; give data that starts anew each time it is iterated over"
        )


@contextmanager
def data_kept(parts: Sequence[Any]) -> Iterator[None]:
    """Put back at the end what loaders, or a datamodule, remember, and what hangs on them: samplers, datasets.

    Their random generators, their attributes, and what is written into these; of datasets and datamodules, which may
    hold much, only lists, dicts and sets at the surface. The global random states are not looked after here.

    Args:
        parts: Data loaders, datasets, a datamodule.

    Example:
        >>> from types import SimpleNamespace
        >>> sampler = SimpleNamespace(order=[2, 0, 1])
        >>> with data_kept([SimpleNamespace(sampler=sampler)]):
        ...     sampler.order.sort()
        >>> sampler.order
        [2, 0, 1]
    """
    with ExitStack() as stack:
        for part, is_data in _hanging_on(parts):
            if hasattr(part, "__dict__") and not isinstance(part, type):
                stack.enter_context(attributes_kept(part, whole=not is_data, data=DATA))
        yield


def _hanging_on(parts: Sequence[Any]) -> list[tuple[Any, bool]]:
    """The parts and what hangs on them, each once; and whether it is data."""
    found: dict[int, tuple[Any, bool]] = {}
    waiting = [(part, True) for part in parts]
    while waiting:
        part, is_data = waiting.pop()
        if part is None or id(part) in found:
            continue
        found[id(part)] = (part, is_data)
        for name, value in getattr(part, "__dict__", {}).items():
            leads_on = name in DATA or name in WORKINGS or isinstance(value, (Dataset, Sampler))
            if leads_on:
                entries = value if isinstance(value, (list, tuple)) and len(value) < 1000 else [value]
                waiting += [(entry, name in DATA or isinstance(entry, Dataset)) for entry in entries]
    return list(found.values())

"""What the entry point costs a program that does not ask for it: a Trainer with it, over one without.

    python -m tests.benchmarks.entry_point

Lightning asks the entry points of all installed packages whenever a Trainer is made. Both arms look them up in the
metadata, as Lightning does; one then drops ours. They take turns in one process, in random order. Shown is the median
over the rounds of the ratio within a round, with its 95% interval; and the time of the first load in a process, which
imports the module.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities import registry

from lightning_compress.report.latency import median_interval

MODULE = "_lightning_compress_factory"
OURS = EntryPoint("lightning_compress", f"{MODULE}:callbacks", "lightning.pytorch.callbacks_factory")


def entry_points(original: Callable[..., Any], *, with_ours: bool) -> Callable[..., list[EntryPoint]]:
    """What Lightning asks, with ours at its end or without."""

    def found(**selection: str) -> list[EntryPoint]:
        others = [entry for entry in original(**selection) if entry.name != OURS.name]
        return [*others, OURS] if with_ours else others

    return found


def seconds(lookup: Callable[..., Any]) -> float:
    """Of making a Trainer."""
    registry.entry_points = lookup
    begin = time.perf_counter()
    L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return time.perf_counter() - begin


def first_load() -> float:
    """Seconds of the first load in a process."""
    sys.modules.pop(MODULE, None)
    begin = time.perf_counter()
    OURS.load()()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    original = registry.entry_points
    lookups = {with_ours: entry_points(original, with_ours=with_ours) for with_ours in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for with_ours in lookups:
            seconds(lookups[with_ours])
        for _ in range(rounds):
            for with_ours in random.sample([True, False], 2):
                times[with_ours].append(seconds(lookups[with_ours]))
    finally:
        registry.entry_points = original
    ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
    low, high = median_interval(ratios) or (float("nan"), float("nan"))
    print(f"a Trainer without the entry point: {statistics.median(times[False]) * 1e3:.2f} ms, {rounds} rounds")
    print(f"with it, over that: {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]")
    loads = [first_load() for _ in range(rounds)]
    print(f"its first load in a process: {statistics.median(loads) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()

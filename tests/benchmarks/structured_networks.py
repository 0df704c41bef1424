"""Which networks structured pruning makes smaller, how exactly, and how long finding out takes.

python -m tests.benchmarks.structured_networks [NETWORK ...]
"""

from __future__ import annotations

import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_compress import StructuredPruningCallback
from lightning_compress.callbacks import structured
from lightning_compress.callbacks.rehearsal import Rehearsal

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "callbacks")]
networks = import_module("test_structured_torchvision")

RATIO = 0.5


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| network | parameters | MACs removed | difference from the network with zeros | seconds |")
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or [*networks.WORK, *networks.REFUSED]:
        print(row(name), flush=True)
    return 0


def row(name: str) -> str:
    size = 224 if name in ("vit_b_16", "swin_t") else 64
    module, callback, seconds = (
        networks.Lit(networks.made(name), size),
        StructuredPruningCallback(RATIO, budget="macs"),
        0.0,
    )
    original = Rehearsal.plan

    def timed(self: Any) -> Any:
        nonlocal seconds
        begin = time.perf_counter()
        try:
            return original(self)
        finally:
            seconds = time.perf_counter() - begin

    silent = structured.announce
    Rehearsal.plan, structured.announce = timed, lambda text: None  # type: ignore[method-assign]
    try:
        networks.fitted(module, callback)
    except ValueError as error:
        return f"| {name} | refused: {error} | | | {seconds:.1f} |"
    finally:
        Rehearsal.plan, structured.announce = original, silent  # type: ignore[method-assign]
    plan = callback.plan
    difference = "not compared" if plan.difference is None else f"{plan.difference:.0e}"
    before, after = (count / 1e6 for count in plan.parameters)
    return f"| {name} | {before:.2f} M -> {after:.2f} M | {plan.share:.1%} | {difference} | {seconds:.1f} |"


if __name__ == "__main__":
    sys.exit(main())

"""What new masks cost: time per million weights, and memory beyond the masks.

    python -m tests.benchmarks.mask_update [--sizes 1000000 10000000 100000000]

All weights are pruned together to 90%, in eight float32 tensors of very different sizes. Beside ``magnitude_mask``
stand the two obvious ways on the concatenated magnitudes: ``torch.kthvalue``, which misses the count where magnitudes
are equal, and a stable sort. Each case has a process of its own. Time is the CPU time of that process on one thread,
the median over the rounds. Memory is how far the resident memory rose above that before the call, less the masks; it
is read from Linux's ``/proc``, after glibc has given back what is free.

Target: 10 ms per million, and neither the time per million nor the memory grows with the number of weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.functional import magnitude_mask

SPARSITY = 0.9


def by_kthvalue(weights: Sequence[Tensor]) -> list[Tensor]:
    """Keep what is larger than the magnitude of the last to be pruned."""
    flat = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = flat.kthvalue(math.floor(SPARSITY * flat.numel() + 0.5)).values
    return [weight.abs() > threshold for weight in weights]


def by_sort(weights: Sequence[Tensor]) -> list[Tensor]:
    """Prune the first of a stable sort, exact to one weight."""
    flat = torch.cat([weight.abs().flatten() for weight in weights])
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: math.floor(SPARSITY * flat.numel() + 0.5)]] = False
    parts = mask.split([weight.numel() for weight in weights])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


METHODS: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "magnitude_mask": lambda weights: magnitude_mask(weights, SPARSITY),
    "kthvalue": by_kthvalue,
    "stable sort": by_sort,
}


def normal_weights(total: int) -> list[Tensor]:
    """Tensors of a half of all weights, a quarter, and so on; the last two are alike."""
    generator = torch.Generator().manual_seed(0)
    sizes = [total >> part for part in range(1, 8)]
    return [0.02 * torch.randn(size, generator=generator) for size in [*sizes, total - sum(sizes)]]


def measure(case: tuple[str, int, int]) -> tuple[float, int]:
    """Median seconds of a call, and the bytes that it needs beyond its masks."""
    name, total, rounds = case
    torch.set_num_threads(1)
    method = METHODS[name]
    method(normal_weights(1 << 10))  # so that the code is loaded
    weights = normal_weights(total)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but still the process's own, would hide the memory of the call
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes that of now
    masks = method(weights)
    beyond = _resident("VmHWM") - before - sum(mask.numel() for mask in masks)
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        method(weights)
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds), beyond


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    """Measure every method at every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="numbers of weights")
    parser.add_argument("--rounds", type=int, help="measured calls a case; as many as take some seconds if not given")
    arguments = parser.parse_args()
    print(f"{'':16}{'weights':>12}{'ms per million':>16}{'growth':>8}{'MiB beyond':>12}{'growth':>8}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name in METHODS:
            last: tuple[float, float] | None = None
            for total in arguments.sizes:
                rounds = arguments.rounds or min(max(10**8 // total, 3), 31)
                seconds, beyond = fresh.apply(measure, ((name, total, rounds),))
                growth = ["", ""] if last is None else [f"{seconds / last[0]:.2f}", f"{beyond / last[1]:.2f}"]
                line = f"{name:16}{total:12,}{1e9 * seconds / total:16.2f}{growth[0]:>8}"
                print(f"{line}{beyond / 2**20:12.2f}{growth[1]:>8}", flush=True)
                last = seconds, beyond


if __name__ == "__main__":
    main()

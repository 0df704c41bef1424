"""How long a call takes, compared fairly: all candidates in turn within each round, on one thread.

A machine that slows down for a second then slows every candidate alike, so the ratio within a round stays meaningful
where two separate averages would not.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from lightning_compress.report.table import Latency

NEGLIGIBLE = 0.03
"""A ratio of times that says nothing, however narrow its interval: as much depends on where tensors lie in memory."""


def measure_latency(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 100,
    warmup: int = 5,
    threads: int = 1,
    seconds: float = 10.0,
) -> dict[str, Latency]:
    """Time several calls in interleaved rounds.

    Each round calls every candidate once, in an order of its own. The work ends after ``repeats`` rounds
    or, once three rounds are done, when ``seconds`` are over; warm-up ends after a quarter of that. One round of
    warm-up and three timed rounds run whatever ``seconds`` says: slow candidates take longer.

    Args:
        candidates: Name to a call without arguments that returns when its work is done. The first one is the
            reference of the ratios.
        repeats: Most rounds that are timed; at least 3.
        warmup: Most rounds before that; at least 1.
        threads: Threads of torch meanwhile; put back afterwards. Another runtime's threads are set by whoever made
            its session.
        seconds: When to stop, in seconds from the start; positive. No call is cut short.

    Returns:
        One record a candidate, in the same order, in milliseconds; ``runtime`` is ``"torch"`` and ``batch`` 1, to be
        replaced by whoever knows better.

    Raises:
        ValueError: If there is no candidate or a number is out of range.

    Example:
        >>> times = measure_latency({"short": lambda: sum(range(10)), "long": lambda: sum(range(10_000))})
        >>> times["long"].ratio > 1
        True
    """
    if not candidates:
        raise ValueError("candidates is empty; give at least one call to time")
    for name, value, least in (("repeats", repeats, 3), ("warmup", warmup, 1), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    start = time.perf_counter()
    with _torch_threads(threads):
        for _ in range(warmup):
            _round(list(candidates.items()))
            if time.perf_counter() - start > seconds / 4:
                break
        times = _timed_rounds(candidates, repeats, deadline=start + seconds)
    reference = next(iter(times.values()))
    return {name: _latency(own, reference) for name, own in times.items()}


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A 95% confidence interval of the median from order statistics: no distribution is assumed.

    Args:
        values: Independent measurements.

    Returns:
        Lower and upper end, both among the values; ``None`` for fewer than 6, whose full range covers less than 95%.

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        (1.0, 6.0)
    """
    count = len(values)
    ordered = sorted(values)
    outside, rank = 0, -1  # rank: the largest one with P(Binomial(count, 1/2) <= rank) <= 0.025
    while rank + 1 < count and (outside + math.comb(count, rank + 1)) * 40 <= 2**count:
        rank += 1
        outside += math.comb(count, rank)
    return None if rank < 0 else (ordered[rank], ordered[count - 1 - rank])


def shows_difference(low: float | None, high: float | None) -> bool:
    """Whether the interval of a ratio of times lies beyond what is negligible.

    Args:
        low: Lower end of the 95% interval of the ratio; ``None`` where too few rounds tell.
        high: Its upper end.

    Returns:
        True, too, where there is no interval.

    Example:
        >>> shows_difference(0.94, 0.99), shows_difference(1.1, 1.2)
        (False, True)
    """
    return low is None or high is None or low > 1 + NEGLIGIBLE or high < 1 / (1 + NEGLIGIBLE)


def _timed_rounds(
    candidates: Mapping[str, Callable[[], object]], repeats: int, deadline: float
) -> dict[str, list[float]]:
    """Milliseconds of each candidate, one entry a round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, generator = list(candidates.items()), random.Random(0)
    for done in range(repeats):
        if done >= 3 and time.perf_counter() > deadline:
            break
        generator.shuffle(order)  # else each candidate would run on the cache that the same other one leaves
        for name, elapsed in _round(order):
            times[name].append(elapsed)
    return times


def _round(order: Sequence[tuple[str, Callable[[], object]]]) -> list[tuple[str, float]]:
    elapsed = []
    for name, call in order:
        begin = time.perf_counter_ns()
        call()
        elapsed.append((name, (time.perf_counter_ns() - begin) / 1e6))
    return elapsed


def _latency(own: list[float], reference: list[float]) -> Latency:
    ratios = [mine / theirs for mine, theirs in zip(own, reference, strict=True) if theirs > 0]
    low, high = median_interval(ratios) or (None, None)
    first, _, third = statistics.quantiles(own, n=4, method="inclusive")
    return Latency(
        runtime="torch",
        batch=1,
        median=statistics.median(own),
        spread=third - first,
        rounds=len(own),
        ratio=statistics.median(ratios) if ratios else None,
        ratio_low=low,
        ratio_high=high,
    )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

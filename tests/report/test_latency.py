from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_compress.report import latency


def test_rounds_are_interleaved_and_nobody_always_follows_the_same():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = latency.measure_latency(candidates, repeats=90, warmup=1)
    assert [record.rounds for record in times.values()] == [90, 90, 90]
    assert all(sorted(calls[start : start + 3]) == list("abc") for start in range(0, len(calls), 3))
    followed = Counter(itertools.pairwise(calls))
    for first, second in itertools.permutations("abc", 2):
        assert 0.25 < followed[first, second] / 90 < 0.6  # of 90, in a rotation 2/3 and 1/3 of one side alone


def test_median_spread_and_paired_ratio(monkeypatch):
    # A clock that the candidates advance themselves; the machine gets slower from round to round.
    clock = itertools.count()
    now = [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 0.0)
    speed = {"first": 1_000_000, "second": 2_000_000}

    def work(name):
        now[0] += speed[name] * (1 + next(clock) // 2)

    # the second candidate starts every other round; a step of the clock is one call, two calls are a round
    times = latency.measure_latency({name: lambda name=name: work(name) for name in speed}, repeats=8, warmup=1)
    milliseconds = np.arange(2, 10)  # round 0 was warm-up
    assert times["first"].median == np.median(milliseconds)
    assert times["first"].spread == np.subtract(*np.percentile(milliseconds, [75, 25]))
    assert times["second"].median == 2 * np.median(milliseconds)
    assert (times["second"].ratio, times["second"].ratio_low, times["second"].ratio_high) == (2, 2, 2)
    assert (times["first"].ratio, times["first"].ratio_low, times["first"].ratio_high) == (1, 1, 1)


def test_a_longer_call_is_measured_as_longer():
    times = latency.measure_latency({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, repeats=10)
    assert times["short"].median >= 1.0  # in milliseconds; how much longer is up to the machine
    assert times["long"].median >= 4.0
    assert times["long"].ratio_low > 1.0


def test_time_is_boxed():
    begin = time.perf_counter()
    times = latency.measure_latency({"slow": lambda: time.sleep(0.02)}, repeats=1000, warmup=1000, seconds=0.2)
    assert time.perf_counter() - begin < 1.0
    assert 3 <= times["slow"].rounds < 20
    once = latency.measure_latency({"slow": lambda: time.sleep(0.01)}, seconds=1e-9)
    assert once["slow"].rounds == 3
    assert once["slow"].ratio_low is None


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_put_back(fails):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def call():
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("broken")

    try:
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                latency.measure_latency({"call": call})
        else:
            latency.measure_latency({"call": call}, repeats=3)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [5, 6, 9, 17, 60])
def test_interval_has_at_least_its_coverage(count):
    interval = latency.median_interval([float(value) for value in range(count)])
    if count == 5:
        assert interval is None
        return
    low, high = interval
    # P(the median lies below the k-th smallest value) is the chance of fewer than k heads in n throws.
    outside = 2 * sum(math.comb(count, heads) for heads in range(int(low) + 1)) / 2**count
    narrower = 2 * sum(math.comb(count, heads) for heads in range(int(low) + 2)) / 2**count
    assert outside <= 0.05 < narrower
    assert low + high == count - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 2}, "repeats must be at least 3, got 2"),
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"seconds": math.nan}, "seconds must be positive, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        latency.measure_latency({"call": int}, **arguments)


def test_nothing_to_time():
    with pytest.raises(ValueError, match="candidates is empty"):
        latency.measure_latency({})

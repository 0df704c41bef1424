"""Schedules against hand-worked numbers, formulas written out, and what every one of them promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.functional import (
    constant_schedule,
    cosine_schedule,
    cubic_schedule,
    iterative_schedule,
    linear_schedule,
)

SCHEDULES = [constant_schedule, linear_schedule, cubic_schedule, cosine_schedule, iterative_schedule]
QUARTERS = [0.0, 0.25, 0.5, 0.75, 1.0]
sparsities = st.floats(0, 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant_schedule, [0.9, 0.9, 0.9, 0.9, 0.9]),
        (linear_schedule, [0.0, 0.225, 0.45, 0.675, 0.9]),
        (cubic_schedule, [0.0, 0.5203125, 0.7875, 0.8859375, 0.9]),
        (cosine_schedule, [0.0, 0.45 * (1 - 0.5**0.5), 0.45, 0.45 * (1 + 0.5**0.5), 0.9]),
        (iterative_schedule, [0.0, 1 - 0.1**0.2, 1 - 0.1**0.4, 1 - 0.1**0.6, 0.9]),
    ],
)
def test_hand_worked(schedule, expected):
    assert [schedule(progress, 0.0, 0.9) for progress in QUARTERS] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_from_another_start():
    assert linear_schedule(0.5, 0.4, 0.8) == pytest.approx(0.6)
    assert cubic_schedule(0.5, 0.4, 0.8) == pytest.approx(0.75)
    assert cosine_schedule(1 / 3, 0.4, 0.8) == pytest.approx(0.5)
    assert iterative_schedule(0.5, 0.5, 0.875, rounds=2) == pytest.approx(0.75)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(start=sparsities, end=sparsities, progress=sparsities)
def test_ends_are_exact_and_all_between(schedule, start, end, progress):
    assert schedule(1.0, start, end) == end
    if schedule is not constant_schedule:
        assert schedule(0.0, start, end) == start
    assert schedule(progress, end, end) == pytest.approx(end, abs=1e-15)
    tolerance = 1e-15
    assert min(start, end) - tolerance <= schedule(progress, start, end) <= max(start, end) + tolerance


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(start=sparsities, end=sparsities, progresses=st.tuples(sparsities, sparsities))
def test_monotone(schedule, start, end, progresses):
    start, end = sorted((start, end))
    earlier, later = sorted(progresses)
    assert schedule(earlier, start, end) <= schedule(later, start, end) + 1e-15


@pytest.mark.parametrize("schedule", [linear_schedule, cubic_schedule, cosine_schedule])
def test_not_only_sparsities(schedule):
    assert schedule(0.0, 20, -3) == 20.0
    assert schedule(1.0, 20, -3) == -3.0
    assert isinstance(schedule(0.0, 20, -3), float)
    assert isinstance(schedule(1.0, 20, -3), float)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 7, 10, 49])
def test_rounds_take_equal_shares_of_what_remains(rounds):
    values = [iterative_schedule(index / rounds, 0.2, 0.95, rounds) for index in range(rounds + 1)]
    shares = [(1 - after) / (1 - before) for before, after in pairwise(values)]
    assert shares == pytest.approx([(0.05 / 0.8) ** (1 / rounds)] * rounds, rel=1e-12)
    for index in range(rounds):  # nothing happens within a round
        assert iterative_schedule((index + 0.99) / rounds, 0.2, 0.95, rounds) == values[index]


def test_a_round_that_was_reached_by_adding_is_done():
    progress = sum([0.1] * 8)  # a little less than 0.8
    assert progress < 0.8
    assert iterative_schedule(progress, 0.0, 0.9, 5) == iterative_schedule(0.8, 0.0, 0.9, 5)


def test_iterative_limits():
    assert iterative_schedule(0.5, 1.0, 1.0) == 1.0
    assert iterative_schedule(0.5, 0.0, 1.0) == 1.0  # any share of nothing left
    assert iterative_schedule(0.1, 0.0, 1.0) == 0.0
    assert iterative_schedule(0.4, 0.5, 0.0, 2) == 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf])
def test_progress_outside(schedule, progress):
    with pytest.raises(ValueError, match=rf"progress must be in \[0, 1\], got {progress}"):
        schedule(progress, 0.0, 0.9)


def test_errors_of_iterative():
    with pytest.raises(ValueError, match=r"start must be in \[0, 1\], got -0.1"):
        iterative_schedule(0.5, -0.1, 0.9)
    with pytest.raises(ValueError, match=r"end must be in \[0, 1\], got 1.1"):
        iterative_schedule(0.5, 0.0, 1.1)
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, got 0"):
        iterative_schedule(0.5, 0.0, 0.9, rounds=0)

from __future__ import annotations

import math

import pytest

from lightning_compress.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (999.9, "1.00 k"),
        (999_900, "1.00 M"),
        (123_456, "123 k"),
        (2.5e12, "2500 G"),
    ],
)
def test_count(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(
    ("value", "reference", "text"),
    [
        (None, 1, ""),
        (1, None, ""),
        (0, 1, ""),
        (1, 0, ""),
        (math.nan, 1, ""),
        (1.004, 1, ""),
        (1.02, 1, "1.02x more"),
        (1, 3.71, "3.7x less"),
        (1, 24.7, "25x less"),
    ],
)
def test_times(value, reference, text):
    assert units.times(value, reference, "less", "more") == text


def test_infinities_are_named():
    assert units.metric(math.inf) == "inf"
    assert units.significant(math.nan) == "nan"


def test_long_names_keep_both_ends():
    assert units.shortened("a" * 20 + "z" * 20, 13) == "aaaaa...zzzzz"
    assert units.shortened("abcdef", 1) == "a...f"

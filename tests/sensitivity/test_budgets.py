"""Budgets as they are written."""

from __future__ import annotations

import pytest

from lightning_compress.commands.sensitivity.budgets import Budget, parsed_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes=25%", Budget("bytes", 0.25, True)),
        ("bytes=200kB", Budget("bytes", 2e5, False)),
        ("bytes=1.5MiB", Budget("bytes", 1.5 * 2**20, False)),
        ("bytes=3000", Budget("bytes", 3000, False)),
        ("macs=50%", Budget("macs", 0.5, True)),
        ("macs=1.2M", Budget("macs", 1.2e6, False)),
    ],
)
def test_what_is_understood(text, expected):
    assert parsed_budget(text) == expected
    assert expected.limit(1000) == (1000 * expected.amount if expected.is_share else expected.amount)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("25%", "--budget 25%: must be bytes=25%, bytes=200kB, macs=50% or the like"),
        ("byte=25%", "or the like; did you mean 'bytes'?"),
        ("bytes=", "'' must be a percentage, or a number of bytes such as 200kB"),
        ("bytes=25%B", "'25%B' must be a percentage"),
        ("macs=3kB", "'3kB' must be a percentage, or 1.2M"),
        ("bytes=-3", "'-3' must be a percentage"),
        ("bytes=0", "must be above 0"),
        ("bytes=120%", "a percentage must be between 0 and 100, got 120%"),
    ],
)
def test_what_is_not(text, message):
    with pytest.raises(ValueError) as raised:
        parsed_budget(text)
    assert message in str(raised.value)


def test_as_text():
    assert [str(parsed_budget(text)) for text in ("bytes=200kB", "macs=12.5%")] == ["bytes=200kB", "macs=12.5%"]

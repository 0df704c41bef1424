from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.mechanisms.states import Each, Row, Sometimes, damage

KINDS = {
    "masks": Each(Tensor),
    "scale": (float, None),
    "names": [str],
    "begun": bool,
    "own": Sometimes({"bits": int}),
    "more": Sometimes(list, beside="own"),
    "site": Row((str, int, (int, None)), 2),
}
SOUND = {
    "masks": {"a": torch.ones(1)},
    "scale": 1,
    "names": ("a",),
    "begun": False,
    "site": ["a", 1],
    "further": object(),
}


@pytest.mark.parametrize(
    "change",
    [{}, {"scale": None}, {"own": {"bits": 4}, "more": []}, {"more": []}, {"masks": {}}, {"site": ("a", 1, None)}],
)
def test_what_is_as_it_should_be(change):
    assert damage({**SOUND, **change}, KINDS) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"masks": None}, "'masks' must be a mapping, got None"),
        ({"masks": {"a": "zz"}}, "'masks.a' must be a tensor, got 'zz'"),
        ({"scale": "x"}, "'scale' must be a number, got 'x'"),
        ({"scale": True}, "'scale' must be a number, got True"),
        ({"names": "ab"}, "'names' must be a list, got 'ab'"),
        ({"names": ["a", 1]}, "'names.1' must be a string, got 1"),
        ({"begun": 1}, "'begun' must be True or False, got 1"),
        ({"own": {"bits": True}, "more": []}, "'own.bits' must be a whole number, got True"),
        ({"own": {}, "more": []}, "'own.bits' is missing"),
        ({"own": {"bits": 4}}, "'more' is missing"),
        ({"site": "ab"}, "'site' must be a list, got 'ab'"),
        ({"site": ["a"]}, "'site' must have 3 entries, got ['a']"),
        ({"site": ["a", 1, 2, 3]}, "'site' must have 3 entries, got ['a', 1, 2, 3]"),
        ({"site": ["a", "b"]}, "'site.1' must be a whole number, got 'b'"),
    ],
)
def test_what_is_wrong(change, problem):
    assert damage({**SOUND, **change}, KINDS) == problem


def test_what_is_no_state_at_all():
    assert damage(None, KINDS) == "it must be a mapping, got None"

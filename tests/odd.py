"""Values that anybody may give for an argument, what would be accepted of them, and what a refusal must say."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract.modules import FEATURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

MANY = 25  # values of each argument


class Unwilling:
    """Its text is of no use, and it equals nothing."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __hash__ = None


def half(progress: float, start: float, end: float) -> float:
    return end if progress > 0.5 else start


def nowhere(progress: float, start: float, end: float) -> float:
    return float("nan")


# What is shared by all tests is never changed; what is used up by a look at it is made anew.
ODD: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (
        None, True, False, 0, 1, -1, 2, 3, 4, 8, 9, 10**400, 10**5000, 2**63, 0.0, 0.25, 0.5, 1.0, 1.5, 50.0, -0.5,
        float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, Fraction(1, 2), 1j, "0.5", "", "auto", "none",
        "unstructured", "4:2", "0:4", "2:4", "2:4:8", "1:2", " 2:4", "re:(", "re:model.*", "type:Linear", "model",
        "modell", "model.0", "no.such.thing", "a/b", "a\0b", "x" * 300, b"model", Path("model"), (), ("model",),
        np.int64(3), np.int64(0), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("model"),
        torch.float32, nn.Linear, print, half, nowhere, slice(3), range(2), object, ...,
    )),
    *(lambda make=make: make() for make in (
        list, dict, set, object, Unwilling, lambda: [0], lambda: ["model"], lambda: ["model", 1], lambda: [["model"]],
        lambda: ["re:("], lambda: ["no.such.layer"], lambda: (name for name in ["model"]), lambda: {"model"},
        lambda: {"model": "model"}, lambda: {"model": 1}, lambda: {1: "model"}, lambda: {"type:Linear": 4},
        lambda: {"type:Linear": 9}, lambda: {"class_path": "torch.nn.Identity"}, lambda: {"class_pat": "torch.nn.ReLU"},
        lambda: np.ones(2), lambda: np.array("auto"), lambda: torch.tensor(0.5), lambda: torch.ones(2),
        lambda: torch.ones(2, FEATURES), nn.Identity, bytearray,
    )),
]  # fmt: skip
NAMES = ("model", "model.0", "no.such.layer", "modell", "")
WORDS = (
    "one_shot", "cubic", "linear", "cosine", "iterative", "cubik", "power", "max", "abs_sum", "code", "mse", "dkd",
    "softmax", "tensor", "channel", "grid", "gradient", "minmax", "entropy", "learned", "observed", "taylor", "l1",
    "random", "global", "erk", "zero_grad", "keep", "own", "own_norm", "shared", "fp32", "int8", "params", "macs",
)  # fmt: skip
anything = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(ODD).map(lambda make: make()),
    st.integers(),
    st.integers(-2, 10),
    st.floats(),
    st.floats(0.0, 1.0),
    st.text(max_size=5),
    st.lists(st.one_of(st.sampled_from(NAMES), st.integers(0, 3), st.none()), max_size=2),
    st.dictionaries(st.sampled_from(NAMES), st.one_of(st.sampled_from(NAMES), st.integers(1, 9)), max_size=2),
)


# --- what is accepted ---


def is_number(value: Any) -> bool:
    kinds = (int, float, Fraction, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(abs(value) <= sys.float_info.max)


def is_whole(value: Any, low: int, high: int = 2**63 - 1) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value <= high


def is_fraction(value: Any, low: float = 0.0, high: float = 1.0) -> bool:
    return is_number(value) and low <= value <= high


def is_share(value: Any) -> bool:
    """In [0, 1)."""
    return is_fraction(value) and value != 1


def is_word(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list_of_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)


def are_names(value: Any) -> bool:
    return value is None or is_text(value) or (is_list_of_text(value) and len(value) > 0)


def are_selectors(value: Any) -> bool:
    return is_list_of_text(value) and "re:(" not in value


def is_path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value)) and "\0" not in str(value)


def is_bits(value: Any) -> bool:
    return is_whole(value, 2, 8)


def is_pattern(value: Any) -> bool:
    return is_word(value, "unstructured", "2:4", "1:2") or (is_whole(value, 61, 3599) and 0 < value // 60 < value % 60)


Accepts = Callable[[Any], bool]


def or_none(accepts: Accepts) -> Accepts:
    return lambda value: value is None or accepts(value)


def or_auto(accepts: Accepts) -> Accepts:
    return lambda value: is_word(value, "auto") or accepts(value)


def whole(low: int) -> Accepts:
    return lambda value: is_whole(value, low)


def word(*words: str) -> Accepts:
    return lambda value: is_word(value, *words)


def positive(value: Any) -> bool:
    return is_number(value) and value > 0


def at_least_zero(value: Any) -> bool:
    return is_number(value) and value >= 0


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def locator(value: Any) -> bool:
    return value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))


def dimension(value: Any) -> bool:
    return value is None or is_whole(value, -(2**63) + 1)


def name(value: Any) -> bool:
    return value is None or (is_text(value) and value != "" and "/" not in value)


def bits_of_layers(value: Any) -> bool:
    return isinstance(value, dict) and all(is_text(key) and is_bits(bits) for key, bits in value.items())


def student_of(value: Any) -> bool:
    return value is None or is_text(value) or (is_list_of_text(value) and len(value) > 0)


def is_schedule(*words: str) -> Accepts:
    return lambda value: value is half or is_word(value, *words)


def never(value: Any) -> bool:
    return False


def says(message: str, value: Any) -> bool:
    """Whether a message shows a value or an entry of it, by its beginning if it is long, or by its type."""
    if isinstance(value, (list, tuple, dict)) and not value:
        return any(nothing in message for nothing in ("()", "[]", "{}", " 0", f"got {type(value).__name__}"))
    if isinstance(value, (list, tuple)) and (
        f"got {len(value)}" in message or any(says(message, entry) for entry in value)
    ):
        return True
    if isinstance(value, dict) and any(says(message, entry) for pair in value.items() for entry in pair):
        return True
    try:
        texts = [" ".join(repr(value).split()), str(value), *([str(float(value))] if is_number(value) else [])]
    except (RuntimeError, ValueError):
        texts = []
    if is_whole(value, 61, 3599):
        texts.append(f"'{value // 60}:{value % 60}'")  # what YAML reads such a number from
    kinds = {kind.__name__ for kind in type(value).__mro__[:-1]} | {type(value).__name__}
    return any(text[:15] in message for text in texts) or any(kind in message for kind in kinds)


def check_refusal(error: Exception, value: Any, *arguments: str) -> None:
    message = str(error)
    assert isinstance(error, (ValueError, TypeError, FileNotFoundError)), f"{type(error).__name__}: {message}"
    assert any(re.search(rf"\b{argument}\b", message) for argument in arguments), message
    assert says(message, value), message


def for_values(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same values each time, without a database in the checkout; as many as ``MANY``."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        return settings(
            max_examples=MANY, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck
        )(given(**drawn)(test))

    return decorated

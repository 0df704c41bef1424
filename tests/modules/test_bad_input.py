"""Every argument of the modules and of their methods, with whatever anybody may give: accepted, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd import Accepts, Unwilling, anything, check_refusal, for_values, is_whole, positive
from torch import Tensor

from lightning_compress import modules
from lightning_compress.modules import Paraphraser, Translator

MOST = 2**28
CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[Any, Accepts]]]] = {
    "Paraphraser": (
        Paraphraser,
        {
            "channels": (8, lambda value: is_whole(value, 1, MOST)),
            "factor_ratio": (0.5, lambda value: positive(value) and 8 * float(value) <= MOST),
        },
    ),
    "Translator": (
        Translator,
        {
            "channels": (8, lambda value: is_whole(value, 1, MOST)),
            "factor_channels": (4, lambda value: is_whole(value, 1, MOST)),
        },
    ),
    **{
        f"{kind}.{method}": (lambda feature, kind=kind, method=method: run(kind, method, feature), {"feature": ...})
        for kind, method in (("Paraphraser", "forward"), ("Paraphraser", "factor"), ("Translator", "forward"))
    },
}
"""Of each call: the function, and of each argument a good value and what is accepted."""


def is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3


def run(kind: str, method: str, feature: Any) -> Tensor:
    return getattr(getattr(modules, kind)(3, **({"factor_channels": 2} if kind == "Translator" else {})), method)(
        feature
    )


def refusal(call: Callable[..., Any], given: dict[str, Any]) -> Exception | None:
    try:
        with torch.device("meta"):  # nothing is allocated, however many channels there are
            call(**given)
    except Exception as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), [(name, own) for name, (_, row) in CALLS.items() for own in row])
def test_an_argument_of_a_module_is_accepted_or_refused_by_name(name, argument):
    call, row = CALLS[name]
    accepts = is_feature if argument == "feature" else row[argument][1]

    @for_values(value=anything)
    def holds(value):
        given = {own: pair[0] for own, pair in row.items() if own != argument} | {argument: value}
        error = refusal(call, given)
        accepted = not isinstance(value, Unwilling) and accepts(value)
        assert accepted == (error is None), f"{error or 'accepted'}: {value!r}"
        if error is not None:
            check_refusal(error, tuple(value.shape) if isinstance(value, Tensor) else value, argument)

    holds()


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 5, 4), (2, 3, 5), (2, 3, 5, 4, 1), (3,), ()])
def test_a_feature_of_another_shape_is_refused_and_one_of_its_own_is_not(shape):
    for kind, method in (("Paraphraser", "forward"), ("Paraphraser", "factor"), ("Translator", "forward")):
        with pytest.raises(ValueError, match=r"feature must be \(N, 3, H, W\), got shape \("):
            run(kind, method, torch.zeros(shape))
        assert run(kind, method, torch.zeros(2, 3, 5, 4)).shape[2:] == (5, 4)


def test_every_argument_of_every_module_is_tried():
    tried = {name: set(row) for name, (_, row) in CALLS.items()}
    expected = {name: set(inspect.signature(getattr(modules, name)).parameters) for name in modules.__all__}
    methods = {
        f"{kind}.{method}": set(inspect.signature(getattr(getattr(modules, kind), method)).parameters) - {"self"}
        for kind in modules.__all__
        for method, own in vars(getattr(modules, kind)).items()
        if inspect.isfunction(own) and not method.startswith("_")
    }
    assert tried == expected | methods

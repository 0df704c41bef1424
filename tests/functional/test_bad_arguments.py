"""Every argument of every public function, with whatever anybody may give: accepted, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd import (
    Unwilling,
    anything,
    at_least_zero,
    check_refusal,
    flag,
    for_values,
    is_bits,
    is_fraction,
    is_number,
    is_whole,
    never,
    or_none,
    positive,
    whole,
    word,
)

from lightning_compress import functional
from lightning_compress.functional._checks import shown
from lightning_compress.functional.masks import Filters

TENSOR, PERHAPS, TENSORS = "a tensor", "a tensor or None", "a list of tensors"


def logits() -> torch.Tensor:
    return torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])


def image() -> torch.Tensor:
    return torch.arange(16.0).reshape(1, 2, 2, 4)


def weight() -> torch.Tensor:
    return torch.tensor([[0.1, -0.4, 0.3, 0.2], [0.5, 0.6, -0.7, 0.8]])


def weights() -> list[torch.Tensor]:
    return [weight(), weight()]


def masks() -> list[torch.Tensor]:
    return [weight() > 0]


def number(value: Any) -> bool:
    return is_number(value)


def axis(value: Any) -> bool:
    return value is None or is_whole(value, -2, 1)


def counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 1 and is_whole(value[0], 0)


LOGITS = {"student_logits": (logits, TENSOR), "teacher_logits": (logits, TENSOR)}
CLASSES_OF = {"class_dim": (lambda: 1, lambda value: is_whole(value, -2, 1)), "mask": (lambda: None, PERHAPS)}
SOFT = {"temperature": (lambda: 2.0, positive)}
MAPS = {"power": (lambda: 2.0, positive), "kind": (lambda: "power", word("sum", "abs_sum", "power", "max", "edges"))}
BITS = {"weight": (weight, TENSOR), "bits": (lambda: 4, is_bits), "axis": (lambda: None, axis)}
GRID = {
    "x": (weight, TENSOR),
    "scale": (lambda: 0.5, lambda value: positive(value) or (isinstance(value, torch.Tensor) and value.ndim == 0)),
    "zero_point": (
        lambda: 1,
        lambda value: is_whole(value, -(2**63) + 1) or (isinstance(value, torch.Tensor) and value.ndim == 0),
    ),
    "quant_min": (lambda: 0, lambda value: is_whole(value, -(2**63) + 1, 15)),
    "quant_max": (lambda: 15, whole(0)),
    "axis": (lambda: None, axis),
}
SCHEDULED = {"progress": (lambda: 0.5, is_fraction), "start": (lambda: 0.0, number), "end": (lambda: 0.9, number)}
FUNCTIONS: dict[str, dict[str, tuple[Callable[[], Any], Any]]] = {
    "distillation_loss": {**LOGITS, **SOFT, **CLASSES_OF},
    "bernoulli_distillation_loss": {**LOGITS, **SOFT, "mask": (lambda: None, PERHAPS)},
    "regression_distillation_loss": {
        "student_output": (logits, TENSOR), "teacher_output": (logits, TENSOR), "mask": (lambda: None, PERHAPS)
    },
    "hard_distillation_loss": {**LOGITS, **CLASSES_OF},
    "decoupled_distillation_loss": {
        **LOGITS, **SOFT, **CLASSES_OF, "labels": (lambda: torch.tensor([0, 1]), TENSOR),
        "alpha": (lambda: 1.0, number), "beta": (lambda: 8.0, number),
        "class_dim": (lambda: 1, lambda value: is_whole(value, 1, 1) or is_whole(value, -1, -1)),
    },
    "dist_loss": {**LOGITS, **SOFT, **CLASSES_OF, "beta": (lambda: 1.0, number), "gamma": (lambda: 1.0, number)},
    "class_dimension": {
        "shape": (
            lambda: (8, 10),
            lambda value: isinstance(value, (tuple, list, range)) and len(value) == 2
            and all(is_whole(own, 0) for own in value) and value[1] != 1,
        )
    },
    "teacher_agreement": {
        **LOGITS, **CLASSES_OF, "class_dim": (lambda: 1, or_none(lambda value: is_whole(value, -2, 1)))
    },
    "attention_map": {"activation": (image, TENSOR), **MAPS},
    "attention_transfer_loss": {
        "student": (image, TENSOR), "teacher": (image, TENSOR), **MAPS, "mode": (lambda: "code", word("code", "paper"))
    },
    "attention_transfer_weight": {
        "positions": (lambda: 64, whole(1)), "depth": (lambda: 0, lambda value: is_whole(value, 0, 64))
    },
    "gradient_transfer_loss": {"student_gradient": (logits, TENSOR), "teacher_gradient": (logits, TENSOR)},
    "factor_transfer_loss": {"student_factor": (image, TENSOR), "teacher_factor": (image, TENSOR)},
    "reconstruction_loss": {"reconstruction": (image, TENSOR), "feature": (image, TENSOR)},
    "quantization_grid": BITS,
    "mse_grid": BITS,
    "nearest_grid_point": {**BITS, "step": (lambda: torch.tensor(0.1), TENSOR)},
    "range_grid": {
        "minimum": (lambda: -1.0, lambda value: is_number(value) and -1e38 < value <= 2),
        "maximum": (lambda: 2.0, lambda value: is_number(value) and -1 <= value < 1e38),
        "bits": (lambda: 4, is_bits),
    },
    "integer_limits": {"bits": (lambda: 4, is_bits), "signed": (lambda: True, flag)},
    "quantize": GRID,
    "fake_quantize": GRID,
    "learned_step_quantize": {
        "x": (weight, TENSOR), "step": (lambda: torch.tensor(0.1), TENSOR), "bits": (lambda: 4, is_bits),
        "signed": (lambda: False, flag), "zero_point": (lambda: 3, lambda value: is_whole(value, 0, 15)),
        "narrow": (lambda: False, flag), "axis": (lambda: None, lambda value: value is None),
    },
    "position_scale": {**BITS, "eps": (lambda: 0.0, at_least_zero)},
    "zero_scale": {"weight": (weight, TENSOR), "eps": (lambda: 0.1, positive)},
    "filter_rows": {"weight": (weight, TENSOR), "filters": (Filters, never)},
    "filter_scores": {
        "rows": (weight, TENSOR), "kind": (lambda: "l2", word("l1", "l2")), "gradients": (lambda: None, PERHAPS)
    },
    "kept_filters": {
        "scores": (lambda: torch.tensor([5.0, 1.0, 4.0, 2.0]), TENSOR),
        "removed": (lambda: 2, lambda value: is_whole(value, 0, 4)),
        "blocks": (lambda: 1, lambda value: is_whole(value, 1, 2)),
    },
    "magnitude_mask": {
        "weights": (weights, TENSORS), "sparsity": (lambda: 0.5, is_fraction),
        "scope": (lambda: "global", word("global", "layer", "erk")),
    },
    "n_m_mask": {
        "weight": (weight, TENSOR), "n": (lambda: 2, lambda value: is_whole(value, 1, 4)),
        "m": (lambda: 4, lambda value: is_whole(value, 2, 4) and value != 3),
    },
    "smallest_masks": {
        "scores": (weights, TENSORS), "pruned": (lambda: 3, lambda value: is_whole(value, 0, 16)),
        "kept": (lambda: None, "a list of tensors or None"), "limits": (lambda: None, lambda value: value is None),
    },
    "n_m_masks": {
        "scores": (weights, TENSORS), "n": (lambda: 2, lambda value: is_whole(value, 1, 4)),
        "m": (lambda: 4, lambda value: is_whole(value, 2, 4) and value != 3),
        "groups": (lambda: 2, lambda value: is_whole(value, 0, 4)), "kept": (lambda: None, "a list of tensors or None"),
    },
    "magnitude_score": {"weight": (weight, TENSOR)},
    "l2_score": {
        "weight": (weight, TENSOR),
        "dims": (
            lambda: 1,
            lambda value: is_whole(value, -2, 1)
            or (isinstance(value, (list, tuple, range))
            and all(is_whole(own, -2, 1) for own in value)
            and len({own % 2 for own in value}) == len(value)),
        ),
    },
    "random_score": {"weight": (weight, TENSOR), "generator": (torch.Generator, never)},
    "taylor_score": {"weight": (weight, TENSOR), "gradient": (weight, TENSOR)},
    "erk_sparsities": {
        "shapes": (lambda: [(10, 10)], lambda value: isinstance(value, (list, tuple)) and all(
            isinstance(shape, (list, tuple)) and all(is_whole(own, 0) for own in shape) for shape in value
        )),
        "sparsity": (lambda: 0.5, is_fraction),
    },
    "layer_zeros": {
        "sizes": (lambda: [10], counts), "sparsities": (lambda: [0.5], lambda value: isinstance(value, (list, tuple))
            and len(value) == 1 and is_fraction(value[0])),
        "total": (lambda: None, or_none(lambda value: is_whole(value, 0, 10))),
        "limits": (lambda: None, or_none(lambda value: counts(value) and value[0] >= 5)),
    },
    "fewest_kept": {"size": (lambda: 10, whole(0))},
    "sparsity_of": {"masks": (masks, TENSORS)},
    "churn": {"before": (masks, TENSORS), "after": (masks, TENSORS)},
    "constant_schedule": {"progress": SCHEDULED["progress"], "end": SCHEDULED["end"]},
    "linear_schedule": SCHEDULED,
    "cubic_schedule": SCHEDULED,
    "cosine_schedule": SCHEDULED,
    "iterative_schedule": {
        "progress": (lambda: 0.5, is_fraction), "start": (lambda: 0.0, is_fraction), "end": (lambda: 0.9, is_fraction),
        "rounds": (lambda: 5, whole(1)),
    },
}  # fmt: skip
IGNORED = {
    "constant_schedule": {"start"},  # there so that all schedules are called alike
    "smallest_masks": {"parts"},  # of tensors that processes share, which callbacks give
    "n_m_masks": {"parts"},
}


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value could be accepted; its shape and its type are not looked at."""
    if value is None or isinstance(value, torch.Tensor):
        return ("None" in kind) if value is None else kind in (TENSOR, PERHAPS)
    return "list" in kind and isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], torch.Tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "argument"), [(name, argument) for name, row in FUNCTIONS.items() for argument in row]
)
def test_an_argument_of_a_function_is_accepted_or_refused_by_name(function, argument):
    row = FUNCTIONS[function]
    accepts = row[argument][1]
    run = getattr(functional, function)

    @for_values(value=anything)
    def holds(value):
        given = {name: make() for name, (make, _) in row.items()} | {
            name: 0.0 if name == "start" else None for name in IGNORED.get(function, ())
        }
        error = None
        try:
            run(**{**given, argument: value})
        except Exception as raised:
            error = raised
        if error is not None:
            check_refusal(error, value, argument, argument.split("_")[0])
        if isinstance(accepts, str):
            assert error is not None or is_kind(value, accepts), f"accepted, and should be refused: {value!r}"
        else:
            accepted = not isinstance(value, Unwilling) and accepts(value)
            assert accepted == (error is None), f"{error or 'accepted'}: {value!r}"

    holds()


def test_every_argument_of_every_function_is_tried():
    documented = {name: getattr(functional, name) for name in functional.__all__ if name != "Schedule"}
    arguments = {name: set(inspect.signature(value).parameters) for name, value in documented.items()}
    assert {name: set(row) | IGNORED.get(name, set()) for name, row in FUNCTIONS.items()} == arguments


def test_a_value_that_cannot_be_shown_is_told_by_its_class():
    class Failing:
        def __len__(self) -> int:
            raise ArithmeticError("mine")

    Failing.__name__ = "deque"  # by which reprlib goes
    assert shown(Failing()) == "a deque that cannot be shown"

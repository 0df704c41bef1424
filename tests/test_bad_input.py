"""Every argument of every public callback, with whatever anybody may give: accepted and of use, or refused by name.

For each argument an oracle says what is accepted with the other arguments at their usual values. What is, must build,
show itself, come back from a checkpoint, and start a fit or be refused there by its name; what is not, must be refused
with a message that names the argument and says what was given.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from cases import public_callbacks
from contract.modules import Classifier, loader, small_network
from odd import (
    Accepts,
    Unwilling,
    anything,
    are_names,
    are_selectors,
    at_least_zero,
    bits_of_layers,
    check_refusal,
    dimension,
    flag,
    for_values,
    is_bits,
    is_fraction,
    is_list_of_text,
    is_number,
    is_path,
    is_pattern,
    is_schedule,
    is_share,
    is_text,
    locator,
    name,
    or_auto,
    or_none,
    positive,
    student_of,
    whole,
    word,
)
from torch import nn

import lightning_compress


def teacher() -> nn.Module:
    return small_network()


SELECTION = {
    "layers": or_none(lambda value: are_selectors(value) and len(value) > 0),
    "exclude": or_none(are_selectors),
}
TEACHING = {
    "teacher": lambda value: (
        isinstance(value, nn.Module)
        or (isinstance(value, dict) and value == {"class_path": "torch.nn.Identity"})
        or (is_text(value) and value != "" and "." not in value and "\0" not in value)
    ),
    "teacher_transform": or_none(
        lambda value: (
            isinstance(value, nn.Module) or (isinstance(value, dict) and value == {"class_path": "torch.nn.Identity"})
        )
    ),
    "student": student_of,
    "name": name,
}
MASKS = {
    "sparsity": is_share,
    "schedule": is_schedule("one_shot", "cubic", "linear", "cosine"),
    "start": lambda value: is_fraction(value, 0, 0.75),
    "end": is_fraction,
    "update_interval": whole(1),
    "guard_checkpoints": flag,
    "reestimate_batchnorm": flag,
    "name": name,
    **SELECTION,
}
QUANTISING = {
    "weight_bits": is_bits,
    "activation_bits": or_none(is_bits),
    "edge_bits": or_none(or_auto(is_bits)),
    "layer_bits": or_none(bits_of_layers),
    "max_samples": whole(1),
    "network": or_none(is_text),
    "name": name,
    **SELECTION,
}


@dataclass(frozen=True)
class Row:
    """A callback, what each of its arguments accepts, what it needs, and without which others some have no effect."""

    accepts: dict[str, Accepts]
    given: dict[str, Callable[[], Any]] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)


ROWS = {
    "DistillationCallback": Row(
        {
            **TEACHING,
            "output": locator,
            "temperature": positive,
            "task_weight": at_least_zero,
            "kd_weight": at_least_zero,
            "loss_kind": word("auto", "softmax", "bernoulli", "mse", "hard", "dkd", "dist"),
            "class_dim": dimension,
            "ignore_index": dimension,
            "labels": lambda value: value is None,
        },
        {"teacher": teacher},
    ),
    "AttentionTransferCallback": Row(
        {
            **TEACHING,
            "pairs": or_auto(
                lambda value: (
                    isinstance(value, dict)
                    and len(value) > 0
                    and all(is_text(entry) for pair in value.items() for entry in pair)
                )
            ),
            "map_kind": word("sum", "abs_sum", "power", "max", "edges"),
            "power": positive,
            "weight": or_auto(positive),
            "strength": positive,
            "mode": word("code"),
            "drop_tokens": whole(0),
            "pictures_every_n_epochs": or_none(whole(1)),
        },
        {"teacher": teacher},
    ),
    "FactorTransferCallback": Row(
        {
            **TEACHING,
            "pair": or_auto(lambda value: is_list_of_text(value) and len(value) == 2),
            "factor_ratio": positive,
            "weight": positive,
            "pretrain_epochs": whole(0),
            "paraphraser": lambda value: value is None,
            "translator_lr": or_none(positive),
        },
        {"teacher": teacher},
    ),
    "PSGDCallback": Row(
        {
            "bits": is_bits,
            "gradient_scale": or_auto(positive),
            "granularity": word("tensor", "channel"),
            "target": word("grid"),
            "eps": at_least_zero,
            "edge_bits": or_none(or_auto(is_bits)),
            "mean_factor": positive,
            "apply_to": word("auto", "gradient", "update"),
            "quantized_validation": flag,
            "name": name,
            **SELECTION,
        }
    ),
    "PTQCallback": Row(
        {
            **QUANTISING,
            "observer": word("minmax", "moving_average", "percentile", "mse", "entropy"),
            "weight_range": word("auto", "max", "mse"),
            "reestimate_batchnorm": or_auto(flag),
            "cross_layer_equalization": flag,
            "bias_correction": flag,
        }
    ),
    "QATCallback": Row(
        {
            **QUANTISING,
            "step_size": word("mse", "observed", "learned"),
            "start": is_fraction,
            "freeze_batchnorm_at": or_auto(is_fraction),
            "freeze_observers_at": or_auto(is_fraction),
            "step_lr": positive,
            "max_loss_growth": or_none(lambda value: is_number(value) and value > 1),
            "grids_from": or_none(is_path),
        },
        beside={"freeze_observers_at": {"step_size": "observed"}, "step_lr": {"step_size": "learned"}},
    ),
    "PruningCallback": Row(
        {
            **MASKS,
            "schedule": is_schedule("one_shot", "cubic", "linear", "cosine", "iterative"),
            "rounds": whole(1),
            "regrow": flag,
            "score": word("magnitude", "random", "taylor"),
            "scope": word("global", "layer", "erk"),
            "pattern": is_pattern,
            "rewind": lambda value: value is None,
            "seed": whole(0),
        },
        {"sparsity": lambda: 0.5},
        beside={"rounds": {"schedule": "iterative"}, "seed": {"score": "random"}},
    ),
    "StructuredPruningCallback": Row(
        {
            "ratio": lambda value: is_share(value) and value > 0,
            "schedule": word("one_shot", "iterative"),
            "start": is_share,
            "end": is_share,
            "rounds": whole(2),
            "score": word("l1", "l2", "taylor", "bn_scale", "random"),
            "budget": word("filters", "params", "macs"),
            "min_channels": whole(1),
            "round_to": whole(1),
            "reestimate_batchnorm": flag,
            "seed": whole(0),
            "time_limit": positive,
            "network": or_none(is_text),
            "name": name,
            **SELECTION,
        },
        {"ratio": lambda: 0.5},
        beside={
            "end": {"schedule": "iterative"},
            "rounds": {"schedule": "iterative"},
            "seed": {"score": "random"},
        },
    ),
    "DPFCallback": Row(
        {
            **MASKS,
            "freeze_at": or_none(lambda value: is_fraction(value, 0.75)),
            "dead_filters": word("zero_grad", "keep"),
            "reestimated_validation": flag,
        },
        {"sparsity": lambda: 0.5},
    ),
    "DCILCallback": Row(
        {
            **MASKS,
            "dense_path": word("own", "own_norm", "shared"),
            "kl_start": is_fraction,
            "temperature": positive,
            "classifier": are_names,
            "norms": or_none(lambda value: are_selectors(value) and len(value) > 0),
            "student": student_of,
            "output": locator,
            "class_dim": dimension,
            "reestimated_validation": flag,
        },
        {"sparsity": lambda: 0.5},
    ),
    "ExportCallback": Row(
        {
            "path": is_path,
            "precision": word("fp32", "int8", "int4"),
            "metric": or_none(lambda value: is_text(value) and value != ""),
            "tolerance": lambda value: value is None,
            "sample": or_none(lambda value: isinstance(value, (torch.Tensor, tuple, dict)) or is_path(value)),
            "network": or_none(is_text),
            "dynamic_batch": flag,
            "fp32_comparison": flag,
            "name": name,
        },
        {"path": lambda: "net.onnx"},
    ),
    "CompressionReport": Row(
        {"path": or_none(is_path), "latency": flag, "embed_pictures": flag, "name": name},
    ),
}
ARGUMENTS = [(row, argument) for row in ROWS for argument in ROWS[row].accepts]


def build(row: str, **given: Any) -> Any:
    needed = {argument: make() for argument, make in ROWS[row].given.items() if argument not in given}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kd_weight is 0")
        return getattr(lightning_compress, row)(**needed, **given)


def refusal(row: str, given: dict[str, Any]) -> Exception | None:
    try:
        build(row, **given)
    except Exception as error:
        return error
    return None


class Begun(Exception):
    """The fit got as far as its first step."""


class Stopping(Classifier):
    norm = True

    def on_train_start(self) -> None:
        raise Begun


def start_fit(callback: Any) -> None:
    """Everything that happens before the first step of a fit with validation."""
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = loader()
    trainer.fit(Stopping(), data, data)


def check_use(row: str, argument: str, value: Any, make: Callable[[], Any]) -> None:
    """What was accepted shows itself, comes back from a checkpoint without a difference, and starts a fit."""
    callback = make()
    assert type(callback).__name__ in repr(callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state)
    assert again.state_dict()["arguments"] == state["arguments"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            start_fit(make())
        except Begun:
            pass
        except Exception as error:
            check_refusal(error, value, argument)
        else:
            raise AssertionError("the fit did not begin")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "argument"), ARGUMENTS)
def test_an_argument_is_accepted_or_refused_by_name(row, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @for_values(value=anything)
    def holds(value):
        accepted = not isinstance(value, Unwilling) and ROWS[row].accepts[argument](value)
        given = {**ROWS[row].beside.get(argument, {}), argument: value}
        error = refusal(row, given)
        if error is not None:
            check_refusal(error, value, argument)
            assert not accepted, f"refused, and should be accepted: {error}"
            return
        assert accepted, f"accepted, and should be refused: {value!r}"
        check_use(row, argument, value, lambda: build(row, **given))

    holds()


def test_every_argument_is_tried():
    rows = {row: set(inspect.signature(getattr(lightning_compress, row)).parameters) for row in public_callbacks()}
    assert {row: set(ROWS[row].accepts) for row in ROWS} == rows

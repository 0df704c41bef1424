"""Each pair of arguments of every public callback: what contradicts is refused, and what silences another is told of.

What goes together is said once more here, as rules over all arguments of a call.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from odd import ODD, Accepts, Unwilling, at_least_zero, check_refusal, half, locator, or_none
from test_bad_input import ROWS, build, refusal, teacher
from torch import nn

import lightning_compress
from lightning_compress.modules import Paraphraser

BAD = 3  # values of each argument

TEACHING = {
    "teacher": [teacher, lambda: "kd"],
    "teacher_transform": [nn.Identity],
    "student": ["model", ["model", "head"]],
    "name": ["mine"],
}
SELECTION = {"layers": [["model"], ["type:Linear"]], "exclude": [["head"]]}
MASKS = {
    "sparsity": [0.5, 0.9],
    "schedule": ["one_shot", "linear", half],
    "start": [0.5, 0.75, 0.8, 1.0],
    "end": [0.75, 0.9, 1.0],
    "update_interval": [3],
    "guard_checkpoints": [False],
    "reestimate_batchnorm": [True],
    "name": ["mine"],
    **SELECTION,
}
QUANTISING = {
    "weight_bits": [2, 4],
    "activation_bits": [None, 4],
    "edge_bits": [None, 6],
    "layer_bits": [{"model": 3}],
    "max_samples": [1],
    "network": ["model"],
    "name": ["mine"],
    **SELECTION,
}
GOOD: dict[str, dict[str, list[Any]]] = {
    "DistillationCallback": {
        **TEACHING,
        "output": ["logits", 0],
        "temperature": [2.0],
        "task_weight": [0, 1.0],
        "kd_weight": [0, 1.0],
        "loss_kind": ["softmax", "bernoulli", "mse", "hard", "dkd", "dist"],
        "class_dim": [1],
        "ignore_index": [-100],
        "labels": ["label"],
    },
    "AttentionTransferCallback": {
        **TEACHING,
        "pairs": [{"0": "0"}],
        "map_kind": ["abs_sum", "max", "edges", "gradient"],
        "power": [3.0],
        "weight": [10.0],
        "strength": [0.5],
        "mode": ["paper"],
        "drop_tokens": [1],
        "pictures_every_n_epochs": [2],
    },
    "FactorTransferCallback": {
        **TEACHING,
        "pair": [("0", "0")],
        "factor_ratio": [0.75],
        "weight": [3.0],
        "pretrain_epochs": [0, 2],
        "paraphraser": ["paraphraser.pt"],
        "translator_lr": [0.1],
    },
    "PSGDCallback": {
        "bits": [2, 8],
        "gradient_scale": [2.0],
        "granularity": ["channel"],
        "target": ["zero"],
        "eps": [0.1],
        "edge_bits": [None, 6],
        "mean_factor": [2.0],
        "apply_to": ["update"],
        "quantized_validation": [False],
        "name": ["mine"],
        **SELECTION,
    },
    "PTQCallback": {
        **QUANTISING,
        "observer": ["percentile"],
        "weight_range": ["max", "mse"],
        "reestimate_batchnorm": [True, False],
        "cross_layer_equalization": [True],
        "bias_correction": [True],
    },
    "QATCallback": {
        **QUANTISING,
        "step_size": ["observed", "learned"],
        "start": [0.25, 0.75],
        "freeze_batchnorm_at": [0.5, 1.0],
        "freeze_observers_at": [0.5, 1.0],
        "step_lr": [0.1],
        "max_loss_growth": [None, 2.0],
        "grids_from": ["psgd.ckpt"],
    },
    "PruningCallback": {
        **MASKS,
        "schedule": [*MASKS["schedule"], "iterative"],
        "rounds": [3],
        "regrow": [True],
        "score": ["random", "taylor"],
        "scope": ["layer", "erk"],
        "pattern": ["2:4", "1:4"],
        "rewind": ["weights", "lr"],
        "seed": [3],
    },
    "StructuredPruningCallback": {
        "ratio": [0.3],
        "schedule": ["iterative"],
        "start": [0.25, 0.75],
        "end": [0.75],
        "rounds": [4],
        "score": ["taylor", "random"],
        "budget": ["macs"],
        "min_channels": [1],
        "round_to": [8],
        "reestimate_batchnorm": [True],
        "seed": [3],
        "time_limit": [1.0],
        "network": ["model"],
        "name": ["mine"],
        **SELECTION,
    },
    "DPFCallback": {**MASKS, "freeze_at": [0.8, 1.0], "dead_filters": ["keep"], "reestimated_validation": [True]},
    "DCILCallback": {
        **MASKS,
        "dense_path": ["own_norm", "shared"],
        "kl_start": [0.0, 1.0],
        "temperature": [3.0],
        "classifier": ["head"],
        "norms": [["type:BatchNorm2d"]],
        "student": ["model"],
        "output": ["logits"],
        "class_dim": [1],
        "reestimated_validation": [True],
    },
    "ExportCallback": {
        "path": ["other.onnx"],
        "precision": ["int8", "int4"],
        "metric": ["val_loss"],
        "tolerance": [0.1],
        "sample": [lambda: torch.zeros(2, 8), "input.pt"],
        "network": ["model"],
        "dynamic_batch": [False],
        "fp32_comparison": [False],
        "name": ["mine"],
    },
    "CompressionReport": {"path": ["folder"], "latency": [False], "embed_pictures": [False], "name": ["mine"]},
}
"""Valid, and other than the default, of each argument."""

ACCEPTED_BESIDE: dict[str, Accepts] = {"labels": locator, "tolerance": or_none(at_least_zero)}
"""Of arguments that are nothing without another."""

Rule = tuple[str, str, Callable[[Any], bool]]
"""Two arguments, and whether they contradict each other, given all of them."""
ONE_SHOT: list[Rule] = [
    ("schedule", "start", lambda a: a.start == a.end and a.schedule not in ("one_shot", "cubic")),
    ("schedule", "end", lambda a: a.schedule == "one_shot" and a.end not in (0.75, a.start) and not a.get("regrow")),
    ("start", "end", lambda a: a.start > a.end and (a.schedule != "one_shot" or a.get("regrow"))),
]
RULES: dict[str, list[Rule]] = {
    "DistillationCallback": [
        ("teacher", "teacher_transform", lambda a: a.teacher == "kd" and a.teacher_transform is not None),
        ("temperature", "loss_kind", lambda a: a.temperature != 4 and a.loss_kind in ("mse", "hard")),
        ("class_dim", "loss_kind", lambda a: a.class_dim is not None and a.loss_kind in ("mse", "bernoulli")),
        ("task_weight", "kd_weight", lambda a: a.task_weight == a.kd_weight == 0),
        ("labels", "ignore_index", lambda a: a.labels and a.ignore_index is None and a.loss_kind != "dkd"),
    ],
    "AttentionTransferCallback": [
        ("teacher", "teacher_transform", lambda a: a.teacher == "kd" and a.teacher_transform is not None),
        ("weight", "mode", lambda a: a.weight == "auto" and a.mode == "paper"),
        ("weight", "map_kind", lambda a: a.weight == "auto" and a.map_kind == "gradient"),
        ("weight", "strength", lambda a: a.weight != "auto" and a.strength != 1),
        ("power", "map_kind", lambda a: a.power != 2 and a.map_kind not in ("power", "max")),
        ("pairs", "map_kind", lambda a: a.pairs != "auto" and a.map_kind == "gradient"),
        ("drop_tokens", "map_kind", lambda a: a.drop_tokens and a.map_kind == "gradient"),
        ("pictures_every_n_epochs", "map_kind", lambda a: a.pictures_every_n_epochs and a.map_kind == "gradient"),
    ],
    "FactorTransferCallback": [
        ("teacher", "teacher_transform", lambda a: a.teacher == "kd" and a.teacher_transform is not None),
        ("paraphraser", "pretrain_epochs", lambda a: a.paraphraser is not None and a.pretrain_epochs not in (0, 6)),
        ("paraphraser", "factor_ratio", lambda a: a.paraphraser is not None and a.factor_ratio != 0.5),
    ],
    "PSGDCallback": [
        ("gradient_scale", "mean_factor", lambda a: a.gradient_scale != "auto" and a.mean_factor != 3),
        ("target", "eps", lambda a: a.target == "zero" and a.eps == 0),
        ("target", "bits", lambda a: a.target == "zero" and a.bits != 4),
        ("target", "edge_bits", lambda a: a.target == "zero" and a.edge_bits != "auto"),
        ("target", "granularity", lambda a: a.target == "zero" and a.granularity != "tensor"),
    ],
    "PTQCallback": [("activation_bits", "observer", lambda a: a.activation_bits is None and a.observer != "minmax")],
    "QATCallback": [
        ("freeze_batchnorm_at", "start", lambda a: a.freeze_batchnorm_at != "auto" and a.freeze_batchnorm_at < a.start),
        ("freeze_observers_at", "start", lambda a: a.freeze_observers_at != "auto" and a.freeze_observers_at < a.start),
        ("freeze_observers_at", "step_size", lambda a: a.freeze_observers_at != "auto" and a.step_size != "observed"),
        ("step_lr", "step_size", lambda a: a.step_lr != 0.01 and a.step_size != "learned"),
    ],
    "PruningCallback": [
        *ONE_SHOT,
        (
            "schedule",
            "update_interval",
            lambda a: a.schedule == "one_shot" and a.update_interval != 1 and not a.regrow,
        ),
        ("rounds", "schedule", lambda a: a.rounds != 5 and a.schedule != "iterative"),
        ("seed", "score", lambda a: a.seed != 0 and a.score != "random"),
        ("regrow", "score", lambda a: a.regrow and a.score != "magnitude"),
        ("scope", "pattern", lambda a: a.scope != "global" and a.pattern != "unstructured"),
        ("sparsity", "pattern", lambda a: a.sparsity != {"2:4": 0.5, "1:4": 0.75}.get(a.pattern, a.sparsity)),
        ("score", "schedule", lambda a: a.score == "taylor" and a.schedule == "one_shot" and a.start == 0),
        ("rewind", "schedule", lambda a: a.rewind and a.schedule not in ("one_shot", "iterative")),
        ("rewind", "end", lambda a: a.rewind and a.end == 1),
        ("rewind", "start", lambda a: a.rewind and a.schedule == "one_shot" and a.start in (0, 1)),
    ],
    "StructuredPruningCallback": [
        ("schedule", "end", lambda a: a.schedule == "one_shot" and a.end not in (0.5, a.start)),
        ("schedule", "rounds", lambda a: a.schedule == "one_shot" and a.rounds != 3),
        ("seed", "score", lambda a: a.seed != 0 and a.score != "random"),
        ("start", "end", lambda a: a.schedule == "iterative" and a.start > a.end),
    ],
    "DPFCallback": [
        *ONE_SHOT,
        (
            "freeze_at",
            "end",
            lambda a: a.freeze_at is not None and a.schedule != "one_shot" and a.freeze_at < a.end,
        ),
        (
            "freeze_at",
            "start",
            lambda a: a.freeze_at is not None and a.schedule == "one_shot" and a.freeze_at < a.start,
        ),
    ],
    "DCILCallback": [
        *ONE_SHOT,
        ("classifier", "dense_path", lambda a: a.classifier and a.dense_path != "own"),
        ("norms", "dense_path", lambda a: a.norms and a.dense_path == "shared"),
        ("temperature", "kl_start", lambda a: a.temperature != 2 and a.kl_start == 1),
        ("student", "kl_start", lambda a: a.student and a.kl_start == 1),
        ("output", "kl_start", lambda a: a.output is not None and a.kl_start == 1),
        ("class_dim", "kl_start", lambda a: a.class_dim is not None and a.kl_start == 1),
    ],
    "ExportCallback": [("tolerance", "metric", lambda a: a.tolerance is not None and a.metric is None)],
    "CompressionReport": [],
}


TOLD = {
    ("DistillationCallback", ("temperature", "loss_kind")),
    ("FactorTransferCallback", ("paraphraser", "pretrain_epochs")),
    ("PTQCallback", ("activation_bits", "observer")),
    ("PruningCallback", ("rounds", "schedule")),
    *(("PSGDCallback", ("target", other)) for other in ("bits", "edge_bits", "granularity")),
    *(("QATCallback", (other, "step_size")) for other in ("freeze_observers_at", "step_lr")),
    *(
        (row, ("schedule", other))
        for row in ("PruningCallback", "DPFCallback", "DCILCallback", "StructuredPruningCallback")
        for other in ("start", "end", "update_interval", "rounds")
    ),
    *((row, ("seed", "score")) for row in ("PruningCallback", "StructuredPruningCallback")),
    *(("DCILCallback", (other, "kl_start")) for other in ("temperature", "student", "output", "class_dim")),
}
"""Where one only silences the other: a warning."""

SOME = [
    pytest.param(row, marks=[pytest.mark.sample] * (row in ("DistillationCallback", "PruningCallback"))) for row in GOOD
]


class Arguments(dict[str, Any]):
    """All arguments of a call, as attributes."""

    __getattr__ = dict.__getitem__


def made(value: Any) -> Any:
    return value() if value is nn.Identity or (inspect.isfunction(value) and value is not half) else value


def whole(row: str, given: dict[str, Any]) -> Arguments:
    """What is given, what is needed, and the defaults."""
    parameters = inspect.signature(getattr(lightning_compress, row)).parameters
    needed = {argument: make() for argument, make in ROWS[row].given.items()}
    return Arguments({name: own.default for name, own in parameters.items()} | needed | given)


def names(message: str, *arguments: str) -> bool:
    return all(re.search(rf"\b{argument}\b", message) for argument in arguments)


def pairs_of_good(row: str) -> Iterator[dict[str, Any]]:
    for first, second in combinations(GOOD[row], 2):
        for values in product(GOOD[row][first], GOOD[row][second]):
            yield dict(zip((first, second), map(made, values), strict=True))


def bad_values(row: str, argument: str) -> list[Any]:
    """Some that are not accepted, spread over all of them."""
    values = [make() for make in ODD]
    accepts = ACCEPTED_BESIDE.get(argument, ROWS[row].accepts[argument])
    bad = [value for value in values if not isinstance(value, Unwilling) and not accepts(value)]
    return bad[:: max(1, len(bad) // BAD)][:BAD]


@pytest.fixture
def paraphraser(tmp_path, monkeypatch):
    """A file that is one, where the tests run."""
    monkeypatch.chdir(tmp_path)
    torch.save(Paraphraser(4).state_dict(), "paraphraser.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("paraphraser")
@pytest.mark.parametrize("row", SOME)
def test_two_good_values_go_together_or_both_are_named(row):
    refused = 0
    for given in pairs_of_good(row):
        arguments = whole(row, given)
        contradicting = [rule[:2] for rule in RULES[row] if rule[2](arguments)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*has no effect with")
            error = refusal(row, given)
        if not contradicting:
            assert error is None, f"{given}: {error}"
            again = build(row, **given)
            for argument, value in given.items():
                assert_kept(getattr(again, argument), value)
            continue
        kinds = tuple({UserWarning if (row, pair) in TOLD else ValueError for pair in contradicting})
        assert isinstance(error, kinds), f"{given}: {contradicting}, and {error!r}"
        assert any(names(str(error), *pair) for pair in contradicting), f"{given}: {error}"
        refused += 1
    assert (refused > 0) == bool(RULES[row])


def assert_kept(found: Any, given: Any) -> None:
    """Nothing else was silently taken; relative paths become absolute, and modules stay or are built."""
    if isinstance(given, (nn.Module, torch.Tensor)):
        assert found is given
    elif isinstance(found, str) and found.startswith("/"):
        assert found.endswith(given)
    elif not (found is None and given == "kd"):
        assert list(found) == list(given) if isinstance(given, (list, tuple)) else found == given


@pytest.mark.slow
@pytest.mark.usefixtures("paraphraser")
@pytest.mark.parametrize("row", GOOD)
def test_a_bad_value_is_refused_by_its_name_beside_any_good_one(row):
    values = {argument: bad_values(row, argument) for argument in GOOD[row]}
    for bad, good in permutations(GOOD[row], 2):
        for value, other in zip(values[bad], GOOD[row][good] * BAD, strict=False):
            given = {bad: value, good: made(other)}
            alone = whole(row, {good: given[good]})
            if (row, bad, value) == ("PruningCallback", "sparsity", None) or any(rule[2](alone) for rule in RULES[row]):
                continue  # right with a pattern, and wrong without the bad one
            error = refusal(row, given)
            assert error is not None, f"accepted: {given}"
            if not names(str(error), bad, good):
                check_refusal(error, value, bad)


def test_every_argument_has_a_good_value():
    assert {row: set(own) for row, own in GOOD.items()} == {row: set(own.accepts) for row, own in ROWS.items()}
    assert RULES.keys() == GOOD.keys()

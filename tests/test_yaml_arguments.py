"""Every constructor argument of every public callback in YAML: by LightningCLI of both packages and by recipes."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lightning_compress
from lightning_compress import CompressionCallback, functional
from lightning_compress.modules import Paraphraser
from lightning_compress.recipe import build_callbacks, load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}
AVERAGED = "torch.optim.swa_utils.AveragedModel"
ABSOLUTE = object()
"""Expected of a path: the same, seen from where the callback was made."""


@dataclass(frozen=True)
class Value:
    """A value in YAML that needs other arguments, or is something else in Python.

    Attributes:
        given: In YAML.
        expected: The attribute of the built callback; by default what was given.
        beside: Arguments that must be given too.
        leave: Required arguments that must not.
    """

    given: Any
    expected: Any = ...
    beside: dict[str, Any] = field(default_factory=dict)
    leave: tuple[str, ...] = ()

    def is_met(self, found: Any) -> bool:
        expected = self.given if self.expected is ... else self.expected
        if expected is ABSOLUTE:
            return bool(found == os.path.abspath(self.given))
        if isinstance(expected, type) and isinstance(found, nn.Module):
            return type(found) is expected
        if isinstance(found, tuple):
            found = list(found)
        return bool(found == expected and type(found) is type(expected))


SCHEDULE = Value("lightning_compress.functional.linear_schedule", functional.linear_schedule)
MASKS = {
    "sparsity": 0.25,
    "schedule": SCHEDULE,
    "start": 0.125,
    "end": 0.5,
    "update_interval": 3,
    "guard_checkpoints": False,
    "reestimate_batchnorm": True,
    "layers": ["layer"],
    "exclude": ["layer"],
    "name": "mine",
}
REQUIRED = {
    "AttentionTransferCallback": {"teacher": LINEAR},
    "DistillationCallback": {"teacher": LINEAR},
    "FactorTransferCallback": {"teacher": LINEAR},
    "DCILCallback": {"sparsity": 0.5},
    "DPFCallback": {"sparsity": 0.5},
    "PruningCallback": {"sparsity": 0.5},
    "StructuredPruningCallback": {"ratio": 0.5},
    "ExportCallback": {"path": "net.onnx"},
}
TEACHING = {
    "teacher": Value(LINEAR, nn.Linear),
    "teacher_transform": Value({"class_path": "torch.nn.Flatten"}, nn.Flatten),
    "student": "layer",
    "name": "mine",
}
QUANTISING = {
    "weight_bits": 5,
    "layer_bits": {"type:Linear": 3},
    "activation_bits": None,
    "max_samples": 7,
    "edge_bits": 6,
    "network": "layer",
    "layers": ["type:Linear"],
    "exclude": ["layer"],
    "name": "mine",
}
VALUES: dict[str, dict[str, Any]] = {
    "AttentionTransferCallback": {
        **TEACHING,
        "pairs": {"layer": "0"},
        "map_kind": "abs_sum",
        "power": 3.0,
        "weight": 10.0,
        "strength": 0.5,
        "mode": Value("paper", beside={"weight": 1000.0}),
        "drop_tokens": 1,
        "pictures_every_n_epochs": 2,
    },
    "CompressionReport": {
        "path": Value("reports", ABSOLUTE),
        "latency": False,
        "embed_pictures": False,
        "name": "mine",
    },
    "DCILCallback": {
        **MASKS,
        "dense_path": "shared",
        "kl_start": 0.5,
        "temperature": 3.0,
        "classifier": "layer",
        "norms": ["type:BatchNorm2d"],
        "student": ["encoder", "head"],
        "output": "logits",
        "class_dim": 1,
        "reestimated_validation": True,
    },
    "DPFCallback": {**MASKS, "freeze_at": 0.875, "dead_filters": "keep", "reestimated_validation": True},
    "DistillationCallback": {
        **TEACHING,
        "output": 1,
        "temperature": 2.0,
        "task_weight": 0.5,
        "kd_weight": 0.25,
        "loss_kind": "mse",
        "class_dim": 1,
        "ignore_index": -100,
        "labels": Value("label", beside={"ignore_index": -1}),
    },
    "ExportCallback": {
        "path": Value("other.onnx", ABSOLUTE),
        "precision": "int8",
        "metric": "val_acc",
        "tolerance": Value(0.5, beside={"metric": "val_acc"}),
        "sample": Value("input.pt", ABSOLUTE),
        "network": "layer",
        "dynamic_batch": False,
        "fp32_comparison": False,
        "name": "mine",
    },
    "FactorTransferCallback": {
        **TEACHING,
        "pair": ["layer", "0"],
        "factor_ratio": 0.75,
        "weight": 100.0,
        "pretrain_epochs": 2,
        "paraphraser": Value("paraphraser.pt", ABSOLUTE),
        "translator_lr": 0.125,
    },
    "PSGDCallback": {
        "bits": 3,
        "gradient_scale": 2.0,
        "granularity": "channel",
        "target": Value("zero", beside={"eps": 0.125}),
        "eps": 0.125,
        "edge_bits": None,
        "mean_factor": 2.0,
        "apply_to": "update",
        "quantized_validation": False,
        "layers": ["layer"],
        "exclude": ["layer"],
        "name": "mine",
    },
    "PTQCallback": {
        **QUANTISING,
        "observer": "percentile",
        "weight_range": "mse",
        "reestimate_batchnorm": True,
        "cross_layer_equalization": True,
        "bias_correction": True,
    },
    "PruningCallback": {
        **MASKS,
        "schedule": SCHEDULE,
        "rounds": Value(3, beside={"schedule": "iterative"}),
        "regrow": True,
        "score": "taylor",
        "scope": "erk",
        "pattern": Value("2:4", leave=("sparsity",)),
        "rewind": Value("lr", beside={"schedule": "iterative"}),
        "seed": Value(3, beside={"score": "random"}),
    },
    "QATCallback": {
        **QUANTISING,
        "step_size": "learned",
        "start": 0.25,
        "freeze_batchnorm_at": 0.5,
        "freeze_observers_at": Value(0.75, beside={"step_size": "observed"}),
        "step_lr": Value(0.125, beside={"step_size": "learned"}),
        "max_loss_growth": None,
        "grids_from": Value("psgd.ckpt", ABSOLUTE),
    },
    "StructuredPruningCallback": {
        "ratio": 0.25,
        "schedule": "iterative",
        "start": 0.125,
        "end": Value(0.75, beside={"schedule": "iterative"}),
        "rounds": Value(4, beside={"schedule": "iterative"}),
        "score": "bn_scale",
        "budget": "macs",
        "min_channels": 4,
        "round_to": 8,
        "reestimate_batchnorm": True,
        "seed": Value(3, beside={"score": "random"}),
        "time_limit": 30.0,
        "network": "layer",
        "layers": ["layer"],
        "exclude": ["layer"],
        "name": "mine",
    },
}
QUICK = "CompressionReport"
"""The one whose arguments are tried among the fast tests."""
PUBLIC = sorted(
    name
    for name in lightning_compress.__all__
    if inspect.isclass(cls := getattr(lightning_compress, name)) and issubclass(cls, CompressionCallback)
    if cls is not CompressionCallback
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The files that arguments name are there."""
    monkeypatch.chdir(tmp_path)
    torch.save(Paraphraser(4).state_dict(), tmp_path / "paraphraser.pt")
    (tmp_path / "psgd.ckpt").touch()


def value_of(cls, argument):
    value = VALUES[cls][argument]
    return value if isinstance(value, Value) else Value(value)


def entries(cls):
    """An entry of a list of callbacks for each argument; the name keeps them apart."""
    for argument in VALUES[cls]:
        value = value_of(cls, argument)
        required = {key: own for key, own in REQUIRED.get(cls, {}).items() if key not in value.leave}
        init_args = {"name": argument, **required, **value.beside, argument: value.given}
        yield {"class_path": f"lightning_compress.{cls}", "init_args": init_args}


def by_cli(namespace, folder, callbacks):
    """LightningCLI that builds callbacks from a file, and runs nothing."""
    settings = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {**settings, "callbacks": callbacks}}, sort_keys=False))
    model = import_module(f"{namespace}.demos.boring_classes").BoringModel
    cli = import_module(f"{namespace}.cli").LightningCLI
    return cli(model, args=["--config", str(path)], run=False, save_config_callback=None)


def ours(cli):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, CompressionCallback)]


def assert_set(cls, callbacks):
    for argument, callback in zip(VALUES[cls], callbacks, strict=True):
        assert type(callback).__name__ == cls
        found = getattr(callback, argument)
        assert value_of(cls, argument).is_met(found), f"{cls}.{argument} is {found!r}"


IN_BOTH = pytest.mark.parametrize(
    "namespace", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)]
)


EACH = pytest.mark.parametrize(
    "cls", [cls if cls == QUICK else pytest.param(cls, marks=pytest.mark.slow) for cls in PUBLIC]
)


def test_the_table_holds_every_argument_of_every_callback():
    assert sorted(VALUES) == PUBLIC
    for cls in PUBLIC:
        parameters = inspect.signature(getattr(lightning_compress, cls)).parameters
        assert set(VALUES[cls]) == set(parameters), cls
        for argument, parameter in parameters.items():
            assert value_of(cls, argument).given != parameter.default, f"{cls}.{argument} is its default"


@IN_BOTH
@EACH
def test_every_argument_through_the_cli(cls, namespace, tmp_path):
    assert_set(cls, ours(by_cli(namespace, tmp_path, list(entries(cls)))))


@EACH
def test_every_argument_through_a_recipe(cls, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "callbacks": list(entries(cls))}))
    assert_set(cls, build_callbacks(load_recipe(path), os.getcwd(), add_report=False))


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_config_that_is_saved_gives_the_same_callbacks(namespace, tmp_path):
    callbacks = [
        {**entry, "init_args": {**entry["init_args"], "name": f"{index}"}}
        for index, entry in enumerate(entry for cls in PUBLIC for entry in entries(cls))
    ]
    first = by_cli(namespace, tmp_path, callbacks)
    saved = yaml.safe_load(first.parser.dump(first.config, skip_none=False))
    again = by_cli(namespace, tmp_path, saved["trainer"]["callbacks"])
    described = [(type(callback), callback.name, callback.state_dict()["arguments"]) for callback in ours(first)]
    assert described == [(type(own), own.name, own.state_dict()["arguments"]) for own in ours(again)]
    assert len(described) == len(callbacks)


def words(cls):
    """The schedules that a class accepts by name, as its type says."""
    annotation = inspect.signature(getattr(lightning_compress, cls)).parameters["schedule"].annotation
    return yaml.safe_load(annotation.partition("Literal")[2].partition("]")[0] + "]")


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["DCILCallback", "DPFCallback", "PruningCallback", "StructuredPruningCallback"])
def test_every_schedule(cls, tmp_path):
    """By name, and where functions are accepted, every one of them by its path."""
    paths = {
        f"lightning_compress.functional.{name}": getattr(functional, name)
        for name in functional.__all__
        if name.endswith("_schedule")
    }
    if cls == "StructuredPruningCallback":
        paths = {}
    forms = {**{word: word for word in words(cls)}, **paths}
    assert len(forms) >= 2
    callbacks = [
        {
            "class_path": f"lightning_compress.{cls}",
            "init_args": {**REQUIRED[cls], "schedule": form, "name": f"{index}"},
        }
        for index, form in enumerate(forms)
    ]
    assert [own.schedule for own in ours(by_cli("lightning.pytorch", tmp_path, callbacks))] == list(forms.values())


def teachers(folder):
    """Each form in which YAML names a teacher, with the class of what it makes."""
    torch.save(nn.Linear(3, 2).state_dict(), folder / "weights.pt")
    return [
        (LINEAR, nn.Linear),
        ("torch.nn.Identity", nn.Identity),
        ({"class_path": "torch.nn.Linear", "dict_kwargs": {"in_features": 3, "out_features": 2}}, nn.Linear),
        (
            {
                "class_path": "lightning_compress.teacher_from_checkpoint",
                "init_args": {
                    "class_path": "torch.nn.Linear",
                    "ckpt_path": str(folder / "weights.pt"),
                    "init_args": {"in_features": 3, "out_features": 2},
                },
            },
            nn.Linear,
        ),
        ({"class_path": AVERAGED, "init_args": {"model": LINEAR}}, AveragedModel),
        ("first", type(None)),  # the callback of that name, known in a fit
    ]


@pytest.mark.parametrize("route", ["cli", "recipe"])
@pytest.mark.slow
@pytest.mark.parametrize("cls", ["DistillationCallback", "AttentionTransferCallback", "FactorTransferCallback"])
def test_every_form_of_a_teacher(cls, route, tmp_path):
    forms = teachers(tmp_path)
    callbacks = [
        {"class_path": f"lightning_compress.{cls}", "init_args": {"teacher": form, "name": f"t{index}"}}
        for index, (form, _) in enumerate(forms)
    ]
    if route == "cli":
        built = ours(by_cli("lightning.pytorch", tmp_path, callbacks))
    else:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"version": 1, "callbacks": callbacks}))
        built = build_callbacks(load_recipe(tmp_path / "recipe.yaml"), tmp_path, add_report=False)
    assert [type(callback.teacher) for callback in built] == [kind for _, kind in forms]


# An older jsonargparse does not let a callback build its teacher itself where building it has failed.
IN_PARTS = tuple(map(int, version("jsonargparse").split(".")[:2])) < (4, 51)
BROKEN = {
    "no such file": (
        {
            "class_path": "lightning_compress.teacher_from_checkpoint",
            "init_args": {"class_path": "torch.nn.Identity", "ckpt_path": "nowhere.ckpt"},
        },
        "'teacher.class_path'" if IN_PARTS else "FileNotFoundError: ckpt_path: there is no file nowhere.ckpt",
    ),
    "a value that the class refuses": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": -3, "out_features": 2}},
        "'teacher.class_path'" if IN_PARTS else "teacher could not be built: torch.nn.Linear",
    ),
    "a network inside": (
        {"class_path": AVERAGED, "init_args": {"model": {"class_path": "torch.nn.Flatten", "init_args": {"start": 1}}}},
        r"teacher could not be built.*AveragedModel.*'start'",
    ),
    "a wrong key": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_featurs": 3}},
        r"teacher\.init_args has 'in_featurs', which torch\.nn\.Linear does not take; did you mean 'in_features'",
    ),
}


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w != "no such file")) for w in BROKEN])
def test_a_project_s_own_cli_says_why_a_teacher_was_not_built(what, tmp_path):
    form, message = BROKEN[what]
    entry = {"class_path": "lightning_compress.DistillationCallback", "init_args": {"teacher": form}}
    with pytest.raises(ValueError, match=message):
        by_cli("lightning.pytorch", tmp_path, [entry])

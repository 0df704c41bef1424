"""The sweep over the fields of a recipe: what is varied and how far, bad input, and one run of an agent, offline."""

from __future__ import annotations

import inspect
import os
import random
import re
import sys
from pathlib import Path

import pytest
import yaml

import lightning_compress
from lightning_compress.cli import main
from lightning_compress.commands.sweep import configuration, exported_metric
from lightning_compress.commands.sweep_fields import RANGES, Around, OneOf, Remaining, chosen, fields_of
from lightning_compress.recipe import Recipe

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # what W&B takes as the name of a parameter
RECIPE = """
version: 1
callbacks:
  - class_path: PruningCallback
    init_args: {sparsity: 0.8}
  - class_path: PTQCallback
export: {path: out/net.onnx, precision: int8, metric: val_acc}
"""
TRAIN = ("--", "python", "train.py", "--epochs", "3")


def recipe(*callbacks, **further):
    entries = [{"class_path": name, "init_args": init_args} for name, init_args in callbacks]
    return Recipe(1, callbacks=tuple(entries), **further)


def written(folder, *arguments, text=RECIPE):
    (folder / "recipe.yaml").write_text(text)
    code = main(["sweep", "recipe.yaml", *arguments])
    return code, yaml.safe_load((folder / "sweep.yaml").read_text()) if code == 0 else None


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_file_is_what_wandb_reads(tmp_path, capsys):
    code, content = written(tmp_path, *TRAIN)
    assert code == 0
    assert content == {
        "program": "train.py",
        "method": "bayes",
        "metric": {"name": "compress/export/val_acc", "goal": "maximize"},
        "parameters": {
            "PruningCallback.sparsity": {"min": 0.6, "max": 0.9},
            "PTQCallback.weight_bits": {"values": [4, 6, 8]},
        },
        "command": [
            *("lightning-compress", "run", "recipe.yaml", "--set", "${args_no_hyphens}"),
            *("--", "python", "train.py", "--epochs", "3"),
        ],
    }
    assert capsys.readouterr().out == (
        "wrote sweep.yaml: method bayes, 2 parameters, maximizes compress/export/val_acc\n"
        "  PruningCallback.sparsity  0.6 to 0.9\n"
        "  PTQCallback.weight_bits   4, 6, 8\n"
        "start it with: wandb sweep sweep.yaml\n"
    )


def test_without_a_command_a_placeholder_is_written_and_told(tmp_path, capsys):
    code, content = written(tmp_path)
    assert code == 0
    assert (content["program"], content["command"][-3:]) == ("train.py", ["--", "python", "train.py"])
    told = capsys.readouterr().out.splitlines()
    assert told[-2] == "no command was given behind --: replace python train.py in sweep.yaml by what trains, first"
    assert told[-1] == "start it with: wandb sweep sweep.yaml"


def test_what_is_said_on_the_command_line_counts(tmp_path):
    vary = ("--vary", "pruning.end=0.5..1", "PTQCallback.observer=minmax,mse", "callbacks[0].init_args.sparsity")
    code, content = written(tmp_path, "--metric", "val_loss", "--method", "random", *vary, *TRAIN)
    assert code == 0
    assert content["method"] == "random"
    assert content["metric"] == {"name": "val_loss", "goal": "minimize"}
    assert content["parameters"] == {
        "PruningCallback.end": {"min": 0.5, "max": 1.0},
        "PTQCallback.observer": {"values": ["minmax", "mse"]},
        "PruningCallback.sparsity": {"min": 0.6, "max": 0.9},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vary", "PruningCallback.sparsty", *TRAIN), "no such argument; did you mean 'PruningCallback.sparsity'?"),
        (
            ("--vary", "PruningCallback.end", *TRAIN),
            "--vary PruningCallback.end needs a range, as PruningCallback.end=m",
        ),
        (("--vary", "pruning.end=0.9..0.5", *TRAIN), "a range goes from a number to a larger one, as in 0.5..0.9"),
        (("--vary", "pruning.end=a..b", *TRAIN), "a range goes from a number to a larger one, as in 0.5..0.9"),
        (("--vary", "pruning.end=0.5,", *TRAIN), "a value is missing; write pruning.end=min..max or pruning.end=a,b,c"),
        (
            ("--vary", "PruningCallback.sparsity=0.8..1.5", *TRAIN),
            "--vary PruningCallback.sparsity=0.8..1.5: 1.5 cannot be: callbacks[0] (PruningCallback): ",
        ),
        (("--vary", "pruning.sparsity=-1..0.9", *TRAIN), "--vary pruning.sparsity=-1..0.9: -1.0 cannot be: "),
        (("--vary", "PTQCallback.weight_bits=4,8,33", *TRAIN), "--vary PTQCallback.weight_bits=4,8,33: 33 cannot be: "),
        (("--vary", "export.precision=int8,int7", *TRAIN), "--vary export.precision=int8,int7: int7 cannot be: "),
        (("--out", "recipe.yaml", *TRAIN), "'recipe.yaml' exists already; remove it, or give another --out"),
        (("--out", "gone/sweep.yaml", *TRAIN), "No such file or directory: 'gone/sweep.yaml'"),
    ],
)
def test_bad_usage_is_told_and_nothing_written(tmp_path, capsys, arguments, message):
    assert written(tmp_path, *arguments)[0] == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nexport: {path: a.onnx, metric: m}", "nothing in it has a usual range; say what to vary"),
        ("version: 1\ncallbacks: [{class_path: PruningCallback, init_args: {sparsity: 0.5}}]", "method 'bayes' seeks"),
        ("version: 1\ncallbacks: [{class_path: PrunningCallback}]", "did you mean 'PruningCallback'?"),
    ],
)
def test_recipes_that_give_no_sweep(tmp_path, capsys, text, message):
    assert written(tmp_path, *TRAIN, text=text)[0] == 2
    assert message in capsys.readouterr().err


# --- what is varied ---


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (Around(0.25, 4), 4.0, {"distribution": "log_uniform_values", "min": 1.0, "max": 16.0}),
        (Around(0.25, 4), "auto", None),
        (Around(0.25, 4), True, None),
        (Around(0.25, 4), 0, None),
        (Remaining(), 0.9, {"min": 0.8, "max": 0.95}),
        (Remaining(), 0.5, {"min": 0.25, "max": 0.75}),
        (Remaining(), 0.99, {"min": 0.98, "max": 0.995}),
        (Remaining(), None, None),
        (OneOf((4, 8)), "anything", {"values": [4, 8]}),
    ],
)
def test_how_far_a_value_is_varied(kind, value, expected):
    assert kind.of(value) == expected


def test_the_table_names_arguments_that_exist_and_ranges_that_they_accept():
    for name, arguments in RANGES.items():
        signature = inspect.signature(getattr(lightning_compress, name)).parameters
        assert set(arguments) <= set(signature), name
    pruned = Remaining().of(0.02), Remaining().of(0.999)
    assert all(0 < end < 1 for entry in pruned for end in entry.values())


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (("AttentionTransferCallback", {}), ["strength"]),
        (("AttentionTransferCallback", {"weight": 1000.0}), ["weight"]),
        (("PSGDCallback", {}), ["bits", "mean_factor"]),
        (("PSGDCallback", {"gradient_scale": 150.0}), ["bits", "gradient_scale"]),
        (("PruningCallback", {"pattern": "2:4", "sparsity": 0.5}), []),
        (("DistillationCallback", {}), ["temperature", "kd_weight"]),
        (("DistillationCallback", {"loss_kind": "mse"}), ["kd_weight"]),
        (("DCILCallback", {"sparsity": 0.5, "kl_start": 1.0}), ["sparsity"]),
        (("PSGDCallback", {"target": "zero", "eps": 0.1}), ["mean_factor"]),
    ],
)
def test_only_what_has_an_effect_is_varied(callback, expected):
    found = [field.key for field in fields_of(recipe(callback)) if field.usual is not None]
    assert found == [f"{callback[0]}.{argument}" for argument in expected]


def test_bits_that_have_to_agree_are_left_alone():
    pair = recipe(("PSGDCallback", {}), ("PTQCallback", {"weight_bits": 4}))
    assert list(chosen(pair, [])) == ["PSGDCallback.mean_factor"]
    small = recipe(("DPFCallback", {"sparsity": 0.5}), ("PTQCallback", {}), export={"path": "a", "precision": "int4"})
    assert list(chosen(small, [])) == ["DPFCallback.sparsity"]


def test_a_class_that_is_there_twice_goes_by_its_names():
    twice = recipe(("DPFCallback", {"sparsity": 0.5}), ("DPFCallback", {"sparsity": 0.8, "name": "late"}))
    assert list(chosen(twice, [])) == ["dpf.sparsity", "late.sparsity"]
    with pytest.raises(ValueError, match="no such argument"):
        chosen(twice, ["DPFCallback.sparsity"])


def test_every_key_is_one_that_wandb_takes():
    every = recipe(*((name, {}) for name in RANGES), export={"path": "a.onnx"})
    keys = [field.key for field in fields_of(every)]
    assert len(keys) > 100
    assert all(KEY.fullmatch(key) for key in keys)


@pytest.mark.parametrize(
    ("wish", "entry"),
    [
        ("update_interval=4..16", {"min": 4, "max": 16}),
        ("end=0..1", {"min": 0.0, "max": 1.0}),
        ("freeze_at=8e-1..1", {"min": 0.8, "max": 1.0}),
        ("schedule=cubic,linear", {"values": ["cubic", "linear"]}),
        ("guard_checkpoints=true,false", {"values": [True, False]}),
        ("end=0.5,1e-3,1", {"values": [0.5, 0.001, 1]}),
        ("name=[", {"values": ["["]}),
    ],
)
def test_what_is_written_behind_a_key(wish, entry):
    assert chosen(recipe(("DPFCallback", {"sparsity": 0.5})), [f"dpf.{wish}"]) == {
        f"DPFCallback.{wish.partition('=')[0]}": entry
    }


def test_what_is_varied_together_may_go_with_one_another_only():
    wishes = ["dpf.end=0.2..0.95", "dpf.freeze_at=0.5..1"]
    own = recipe(("DPFCallback", {"sparsity": 0.5}))
    assert list(chosen(own, wishes)) == ["DPFCallback.end", "DPFCallback.freeze_at"]
    with pytest.raises(ValueError, match=r"--vary dpf\.freeze_at=0\.5\.\.1: 0\.5 cannot be: .*must be at least end"):
        chosen(own, wishes[1:])


def test_no_value_is_handed_on_as_the_recipe_spells_it(tmp_path, capsys):
    """An agent would write None."""
    code, content = written(tmp_path, "--vary", "PTQCallback.activation_bits=8,null", *TRAIN)
    assert code == 0
    assert content["parameters"] == {"PTQCallback.activation_bits": {"values": [8, "null"]}}
    assert "8, null\n" in capsys.readouterr().out


def test_a_grid_has_values_and_no_ranges():
    ranges = {
        "a": {"min": 1, "max": 4},
        "b": {"min": 0.0, "max": 1.0},
        "c": {"distribution": "log_uniform_values", "min": 1.0, "max": 16.0},
        "d": {"values": ["x"]},
    }
    assert configuration("r.yaml", ranges, None, None, "grid", ["make"])["parameters"] == {
        "a": {"values": [1, 2, 3, 4]},
        "b": {"values": [0.0, 0.25, 0.5, 0.75, 1.0]},
        "c": {"values": [1.0, 2.0, 4.0, 8.0, 16.0]},
        "d": {"values": ["x"]},
    }


def test_the_metric_is_that_of_the_only_file():
    export = {"path": "a/b.onnx", "metric": "val_acc"}
    assert exported_metric(recipe(export=export)) == "compress/export/val_acc"
    assert exported_metric(recipe(export={**export, "name": "small"})) == "compress/small/val_acc"
    assert exported_metric(recipe(("ExportCallback", {"path": "c.onnx"}), export=export)) is None
    assert exported_metric(recipe(("DPFCallback", {}))) is None
    theirs = ("their.ExportCallback", {"to": "c"})
    assert exported_metric(recipe(theirs, export=export)) == "compress/export/val_acc"
    assert exported_metric(recipe(theirs)) is None


# --- one run of an agent ---

SCRIPT = """
import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, val = (DataLoader(TensorDataset(images[a:b], labels[a:b]), 64) for a, b in ((0, 1024), (1024, 1280)))
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
L.Trainer(logger=WandbLogger(project="digits"), max_epochs=2, **quiet).fit(Digits(), train, val)
"""


def drawn(parameter, generator):
    """A value as the service would draw it."""
    if "values" in parameter:
        return generator.choice(parameter["values"])
    return generator.uniform(parameter["min"], parameter["max"])


@pytest.mark.slow
def test_an_agent_runs_what_the_file_says(tmp_path, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import load_sweep_config
    from wandb.wandb_agent import Agent
    from wandb_file import OfflineRun

    (tmp_path / "train.py").write_text(SCRIPT)
    vary = ("--vary", "PruningCallback.sparsity=0.5..0.9", "PTQCallback.observer=minmax,mse")
    assert written(tmp_path, *vary, "--", "python", "train.py")[0] == 0
    content = load_sweep_config("sweep.yaml")  # wandb's own
    generator = random.Random(1)
    values = {key: drawn(entry, generator) for key, entry in content["parameters"].items()}

    for name, value in os.environ.items():  # the agent sets some
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    agent = Agent.__new__(Agent)  # the real one asks the service for what to run
    agent._sweep_command, agent._function, agent._in_jupyter = content["command"], None, False
    agent._forward_signals, agent._run_processes = False, {}
    order = {
        "run_id": "run1",
        "program": content["program"],
        "args": {key: {"value": own} for key, own in values.items()},
    }
    agent._command_run(order)
    assert agent._run_processes["run1"].wait() == 0

    run = OfflineRun(tmp_path)
    callbacks = run.config["compress"]["callbacks"]
    assert callbacks["pruning"]["sparsity"] == pytest.approx(values["PruningCallback.sparsity"])
    assert callbacks["ptq"]["observer"] == values["PTQCallback.observer"]
    assert run.config["PTQCallback.observer"] == values["PTQCallback.observer"]  # by which W&B knows the run
    [score] = run.series(content["metric"]["name"])
    assert 0.5 < score <= 1
    assert run.series("compress/pruning/sparsity/net.weight")[-1] == pytest.approx(
        values["PruningCallback.sparsity"], abs=1e-3
    )

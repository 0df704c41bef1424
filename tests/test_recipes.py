"""The recipes that come with the package: they are recipes, and the command prints them; untouched/ runs them."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from scripts import of_paths

from lightning_compress.cli import main
from lightning_compress.commands.recipes import shipped
from lightning_compress.recipe import load_recipe

TECHNIQUES = {
    "distil": ["DistillationCallback"],
    "dcil": ["DistillationCallback", "DCILCallback"],
    "distil-prune-int8": ["DistillationCallback", "PruningCallback", "QATCallback"],
    "int8": ["PTQCallback"],
    "prune": ["PruningCallback"],
    "psgd-4bit": ["PSGDCallback", "PTQCallback"],
    "structured-distil-int8": ["StructuredPruningCallback", "DistillationCallback", "PTQCallback"],
}


def test_there_are_these():
    assert {*shipped()} == {*TECHNIQUES}
    folder = files("lightning_compress.commands.recipes")
    assert {name: folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8") for name in TECHNIQUES} == shipped()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_what_is_printed_is_a_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", name]) == 0
    Path("recipe.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe("recipe.yaml")
    assert [class_path for _, class_path, _ in recipe.entries] == [*TECHNIQUES[name], "ExportCallback"]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_says_what_it_does_what_to_change_what_it_costs_and_what_to_look_at(name):
    text = shipped()[name]
    assert re.match(r"# \S.{10,90}\.\n#\n", text)
    assert re.findall(r"^# (Change|Costs|Look at)  ", text, flags=re.MULTILINE) == ["Change", "Costs", "Look at"]
    assert all(len(line) <= 120 for line in text.splitlines())
    placeholders = [line for line in text.splitlines() if re.search(r"my_project|\.ckpt|submodule: |metric: ", line)]
    assert [line for line in placeholders if not line.startswith("#") and "# CHANGE: " not in line] == []


def test_the_list(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(TECHNIQUES)]] == sorted(TECHNIQUES)
    assert lines[1].endswith("A small network learns from a large one that was trained before.")
    assert lines[-1] == "lightning-compress recipes NAME > recipe.yaml"


def test_an_unknown_name(capsys):
    assert main(["recipes", "distill"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "lightning-compress recipes: there is no recipe 'distill'; there are dcil, distil, distil-prune-int8, "
        "int8, prune, psgd-4bit, structured-distil-int8; did you mean 'distil'?\n"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dcil.sparsity=1.5", "recipe.yaml: callbacks[1] (DCILCallback): sparsity must be a number in [0, 1), got 1.5"),
        ("dcl.sparsity=0.5", "recipe.yaml: --set dcl.sparsity: the recipe has neither a key nor a callback 'dcl'"),
        ("dcil.sparsity=half", "(DCILCallback): sparsity must be a number, got 'half'"),
        (
            "dcil.schedule=cubik",
            "(DCILCallback): schedule must be one_shot, cubic, linear, cosine or the dotted path of a function, got "
            "'cubik'; did you mean 'cubic'?",
        ),
        ("dcil.layers=[3]", "(DCILCallback): layers must be a list of texts or null, got [3]"),
        ("export.path=5", "path must be a string or a path, got 5"),
        ("export.path=nowhere/there/a.pt", "path must end in '.onnx', got 'nowhere/there/a.pt'"),
    ],
)
def test_settings_are_checked_before_anything_starts(tmp_path, monkeypatch, capsys, setting, message):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(shipped()["dcil"])
    Path("train.py").write_text("open('mark', 'w').close()")
    command = ["--", sys.executable, "train.py"]
    assert main(["run", "recipe.yaml", "--set", "kd.temperature=2", setting, *command]) == 2
    assert message in of_paths(capsys.readouterr().err)
    assert not Path("mark").exists()

"""The README does what it says: its Python and its YAML run, its commands are the two that others rely on."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import onnx
import pytest
import yaml
from cases import public_callbacks
from lightning.pytorch.cli import LightningCLI
from pages import ROOT, blocks, run_python

from lightning_compress.demo import LitClassifier, load_data

README = ROOT / "README.md"
COMMANDS = [
    'python -m pip install -e ".[all]" && lightning-compress demo',
    'python -m pip install -e ".[all,test]" && python -m pytest',
]


class Digits(L.LightningDataModule):
    """The data of the README, for its YAML."""

    def train_dataloader(self):
        return load_data("digits").loaders(seed=0)[0]

    def val_dataloader(self):
        return load_data("digits").loaders(seed=0)[1]


@pytest.fixture(scope="module")
def python_run(tmp_path_factory):
    """What the README's Python leaves: its namespace, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        namespace = run_python(README, patch, folder)
    return SimpleNamespace(folder=folder, namespace=namespace)


@pytest.mark.slow  # docs/start.md, which test_docs.py runs, does nearly the same
def test_python_trains_exports_and_reports(python_run):
    namespace, folder = python_run.namespace, python_run.folder
    export = namespace["export"]

    assert export.path == str(folder / "student.onnx")
    assert export.failure is None
    assert export.file_metrics["val_accuracy"] == pytest.approx(export.module_metrics["val_accuracy"], abs=0.005)
    assert export.file_metrics["val_accuracy"] > 0.9  # ten classes
    assert [path.suffix for path in sorted(folder.rglob("compression_report.*"))] == [".html", ".json", ".md"]
    report = next(callback.result for callback in namespace["callbacks"] if hasattr(callback, "files"))
    assert [row.name for row in report.rows] == ["teacher", "before", "after", "student.onnx"]


@pytest.mark.slow
def test_yaml_does_the_same_with_the_teacher_that_the_python_saved(python_run, monkeypatch):
    monkeypatch.chdir(python_run.folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    [config] = blocks(README, "yaml")
    settings = yaml.safe_load(config)
    settings["trainer"] |= {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "limit_train_batches": 4}
    settings["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    (python_run.folder / "readme.yaml").write_text(yaml.safe_dump(settings))
    (python_run.folder / "student.onnx").unlink()

    cli = LightningCLI(LitClassifier, Digits, args=["fit", "--config", "readme.yaml", "--model.width", "8"])

    assert cli.trainer.global_step == 4
    assert 0 <= cli.trainer.callback_metrics["compress/kd/val_agreement"] <= 1
    file = onnx.load(python_run.folder / "student.onnx")
    assert {entry.key: entry.value for entry in file.metadata_props}["lightning_compress.network"] == "network"
    export = next(callback for callback in cli.trainer.callbacks if hasattr(callback, "tolerance"))
    assert (export.metric, export.tolerance, export.failure) == ("val_accuracy", 0.005, None)


def test_examples_are_about_ten_lines():
    [python], [config] = blocks(README, "python"), blocks(README, "yaml")
    code = [line for line in python.splitlines() if line.strip()]
    assert len(code) <= 11
    assert len(config.splitlines()) <= 10
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100  # one screen, scrolled once


def test_two_commands_each_in_a_block_of_its_own():
    assert [block.strip() for block in blocks(README, "")] == COMMANDS


def test_table_of_techniques_names_every_callback():
    rows = [
        line.split("|")[2].strip()
        for line in README.read_text(encoding="utf-8").splitlines()
        if "](docs/" in line and line.startswith("| [")
    ]
    assert {row.strip("`") for row in rows} == set(public_callbacks())


def test_picture_is_there_and_has_words():
    [(words, path)] = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert len(words) > 40
    assert (ROOT / path).stat().st_size < 200_000

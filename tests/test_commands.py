"""Every command and every YAML block of README and docs runs, as it stands there, in a project like the reader's.

Taken out of the pages, not copied. The project of a page is the one that its Python shows, else that of the first page.
What takes an hour, an account or an index is listed, with where it is tried instead.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT, blocks, each, name_of

FIRST = ROOT / "docs/start.md"
OWN_TESTS = {
    "docs/sharded.md": "tests/sharded/test_page.py",  # two processes
    "docs/untouched.md": "tests/untouched",  # its projects are on disk
}
"""Pages whose commands have a test of their own."""
PIP = re.compile(r"(?:python -m )?pip install")
ELSEWHERE = {
    "wandb sweep sweep.yaml": "needs an account; tests/test_sweep.py runs what the file asks for",
    "lightning-compress demo": "takes minutes; .ci/full runs it",
}
OURS = "{class_path: lightning_compress.teacher_from_checkpoint, init_args: {class_path: my_project.LitNet, %s}}"
TEACHER = OURS % "ckpt_path: teacher.ckpt, submodule: model"
STAND_INS = {
    "{class_path: torchvision.models.resnet18, init_args: {num_classes: 10}}": TEACHER,
    "{layer3: layer3, layer4: layer4}": "{'0': '0', '1': '1'}",
    "[layer4, layer4]": "['0', '0']",
}
"""Networks of other packages, and their layers, that stand for the reader's own."""
BEFORE = {
    "docs/export.md": "lightning-compress run ptq.yaml -- python train.py",  # so that checkpoints hold scales
    "docs/report.md": "for name in distilled quantised; do lightning-compress fit --config config.yaml "
    "--trainer.callbacks+=CompressionReport --trainer.callbacks.path=runs/$name; done",
}
"""What a page takes for granted."""
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
DATA = """

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return TRAIN

    def val_dataloader(self):
        return VAL
"""
TRAIN = """
import argparse

import lightning.pytorch as L
from my_project import Data, LitNet

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int)
parser.add_argument("--epochs", type=int, default=4)
options, _ = parser.parse_known_args()
if __name__ == "__main__":
    arguments = {} if options.width is None else {"width": options.width}
    trainer = L.Trainer(max_epochs=min(options.epochs, 4), enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(LitNet(**arguments), datamodule=Data())
    for name in ("teacher.ckpt", "trained.ckpt", "last.ckpt", "best.ckpt"):
        trainer.save_checkpoint(name)
"""


def commands_of(page: Path) -> list[str]:
    """Its console blocks, and what stands in blocks without a language."""
    return [block for language in ("console", "") for block in blocks(page, language)]


WITH_COMMANDS = [page for page in PAGES if commands_of(page) and name_of(page) not in OWN_TESTS]
WITH_YAML = [page for page in PAGES if blocks(page, "yaml") and page.name != "README.md"]  # whose own test is there


def definitions(page: Path) -> str:
    """The project that a page shows: its imports, classes, functions and data, without what it does with them."""
    kept = []
    for part in ast.parse("\n".join(blocks(page, "python"))).body:
        text = ast.unparse(part)
        if isinstance(part, ast.ImportFrom) and part.module == "lightning_compress":
            continue
        shapes = isinstance(part, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
        data = isinstance(part, ast.Assign) and re.search("DataLoader|Dataset|load_digits|random_split", text)
        if (shapes or data) and "CompressionMixin" not in text:
            kept.append(text)
    return "\n".join(kept)


def project_of(page: Path) -> Path:
    """The page whose project is meant."""
    source = definitions(page)
    measured = any("metric:" in block for block in blocks(page, "yaml"))
    wanted = ["class LitNet", "def training_step", "\ndata = ", *(["def validation_step"] if measured else [])]
    return page if all(own in source for own in wanted) else FIRST


def bash(text: str, folder: Path) -> str:
    """What some lines print that are typed into a shell; one that fails ends them."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{folder}",
        "WANDB_MODE": "offline",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.fixture
def project(page, tmp_path):
    """The reader's folder: module, data, script, checkpoints, config and recipe."""
    source = definitions(project_of(page))
    loaders = "loaders" if re.search(r"^loaders\b", source, flags=re.MULTILINE) else "(data, data)"
    data = DATA.replace("TRAIN", f"{loaders}[0]").replace("VAL", f"{loaders}[1]")
    (tmp_path / "my_project.py").write_text(source + data)
    (tmp_path / "train.py").write_text(TRAIN)
    bash("python train.py", tmp_path)
    config = {"model": {"class_path": "my_project.LitNet"}, "data": {"class_path": "my_project.Data"}}
    config["trainer"] = {"max_epochs": 4, "default_root_dir": "logs", **QUIET}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = [settings_of(block) for block in blocks(page, "yaml")]
    recipes = [own for own in settings if "version" in own]
    attached = [own["trainer"]["callbacks"] for own in settings if "callbacks" in own.get("trainer", {})]
    recipes += [{"version": 1, "callbacks": callbacks} for callbacks in attached]
    if recipes:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipes[0]))
    else:
        bash("lightning-compress recipes distil > recipe.yaml", tmp_path)
    (tmp_path / "ptq.yaml").write_text("version: 1\ncallbacks: [{class_path: PTQCallback}]\n")
    bash(BEFORE.get(name_of(page), "true"), tmp_path)
    return tmp_path


def settings_of(block: str) -> dict[str, Any]:
    """A YAML block, with the reader's own network where another package's stands for it."""
    for name, own in STAND_INS.items():
        block = block.replace(name, own)
    return yaml.safe_load(block)


def lines_of(block: str) -> list[str]:
    """One entry a command, with its continuation."""
    return [line.strip() for line in block.replace("\\\n", "").splitlines()]


def run(command: str, folder: Path) -> None:
    """Run a command; of one that installs only what it names is looked at, and hours of development are cut short."""
    if command in ELSEWHERE:
        return
    if PIP.match(command):
        project = (ROOT / "pyproject.toml").read_text()
        for group in re.findall(r"\[([\w,]+)\]", command):
            assert all(f"\n{extra} = [" in project for extra in group.split(","))
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).is_file()
    elif "tests/strangers" in command:  # in an environment of their own
        assert "tests/strangers" in (ROOT / ".ci/full").read_text()
    elif "python -m pytest" in command:
        assert bash(f"cd {ROOT} && {command} --collect-only -q -p no:cacheprovider -n 0 | tail -n 1", folder)
    elif "python -m tests.experiments " in command:
        assert bash(f"cd {ROOT} && {command} --list", folder)
    elif "python -m tests" in command:
        assert bash(f"cd {ROOT} && {command} --help", folder)
    else:
        bash(command, folder)


@pytest.mark.slow
@each(WITH_COMMANDS)
def test_commands_run(page, project):
    for block in commands_of(page):
        for line in lines_of(block):
            for command in line.partition("  #")[0].split(" && "):
                run(command, project)


@pytest.mark.slow
@each(WITH_YAML)
def test_yaml_runs(page, project):
    for index, block in enumerate(blocks(page, "yaml")):
        settings = settings_of(block)
        file = project / f"block-{index}.yaml"
        file.write_text(yaml.safe_dump(settings))
        if "trainer" in settings:
            bash(f"lightning-compress fit --config config.yaml --config {file.name}", project)
        else:
            bash(f"lightning-compress run {file.name} -- python train.py", project)


def test_what_is_tried_elsewhere_is_there():
    text = "\n".join(block for page in PAGES for block in commands_of(page))
    assert all(command in text for command in ELSEWHERE)
    assert "lightning-compress demo" in (ROOT / ".ci/full").read_text()
    for page, test in OWN_TESTS.items():
        assert commands_of(ROOT / page)
        assert (ROOT / test).exists()

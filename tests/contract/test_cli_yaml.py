"""LightningCLI of both packages: callbacks added to an untouched project, every form of the teacher, the help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
import yaml

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]

PROJECT = """
    import {namespace} as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset


    class Teacher(nn.Sequential):
        def __init__(self, classes: int, width: int = 8):
            super().__init__(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, classes))


    class LitNet(L.LightningModule):
        def __init__(self, lr: float = 0.1):
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3, bias=False))
            nn.init.eye_(self.model[1].weight)  # whatever was drawn before

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


    class Data(L.LightningDataModule):
        def train_dataloader(self):
            images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)
"""
TRAIN = """
    from {namespace}.cli import LightningCLI
    from {project} import Data, LitNet

    if __name__ == "__main__":
        LightningCLI(LitNet, Data)
"""
BASE = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 1}}}],
    },
}
NAME = "lightning_compress.DistillationCallback"


class Project:
    """An untouched project on disk, and its LightningCLI."""

    def __init__(self, namespace, folder):
        self.namespace, self.folder = namespace, folder
        self.name = f"project_{namespace.replace('.', '_')}_{folder.name}"
        self.write(f"{self.name}.py", textwrap.dedent(PROJECT).format(namespace=namespace))
        self.base = self.yaml("base.yaml", {**BASE, "trainer": {**BASE["trainer"], "default_root_dir": str(folder)}})

    def write(self, name, text):
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def yaml(self, name, content):
        return self.write(name, yaml.safe_dump(content, sort_keys=False))

    def cli(self, *arguments):
        project = import_module(self.name)
        cli = import_module(f"{self.namespace}.cli").LightningCLI
        return cli(project.LitNet, project.Data, args=list(arguments), save_config_callback=None)

    def fit(self, teacher, **settings):
        entry = {"class_path": NAME, "init_args": {"teacher": teacher, **settings}}
        extra = self.yaml("compress.yaml", {"trainer": {"callbacks+": [entry]}})
        return self.cli("fit", "--config", self.base, "--config", extra)


@pytest.fixture(params=[NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def project(request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Project(request.param, tmp_path)


def ours(cli):
    """Our callback; the user's own must still be there."""
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert "GradientAccumulationScheduler" in names
    return cli.trainer.callbacks[names.index("DistillationCallback")]


FORMS = {
    "class": ({"class_path": "{project}.Teacher", "init_args": {"classes": 3, "width": 4}}, "Teacher"),
    "function": ({"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 3}}, "ResNet"),
    "dict_kwargs": (
        {
            "class_path": "torchvision.models.get_model",
            "init_args": {"name": "resnet18"},
            "dict_kwargs": {"num_classes": 3},
        },
        "ResNet",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_in_yaml(project, form):
    spec, kind = FORMS[form]
    callback = ours(project.fit({**spec, "class_path": spec["class_path"].format(project=project.name)}, kd_weight=0.5))
    assert type(callback.teacher).__name__ == kind
    assert callback.kd_weight == 0.5
    assert callback.effects["the distillation loss"] == 2
    if form == "class":
        assert callback.teacher[1].out_features == 4


@pytest.mark.sample
def test_the_teacher_from_a_checkpoint(project):
    plain = project.cli("fit", "--config", project.base)
    path = project.folder / "teacher.ckpt"
    plain.trainer.save_checkpoint(path)
    teacher = {
        "class_path": "lightning_compress.teacher_from_checkpoint",
        "init_args": {"class_path": f"{project.name}.LitNet", "ckpt_path": str(path), "submodule": "model"},
    }
    callback = ours(project.fit(teacher))
    assert callback.effects["the distillation loss"] == 2
    assert torch.equal(callback.teacher[1].weight, plain.model.model[1].weight)
    assert not callback.teacher[1].weight.is_set_to(plain.model.model[1].weight)


def test_callbacks_added_on_the_command_line(project):
    plain = project.cli("fit", "--config", project.base)
    added = project.cli(
        "fit",
        "--config",
        project.base,
        f"--trainer.callbacks+={NAME}",
        f"--trainer.callbacks.teacher={{class_path: {project.name}.Teacher, init_args: {{classes: 3}}}}",
        "--trainer.callbacks.temperature=2.5",
    )
    callback = ours(added)
    assert callback.temperature == 2.5
    assert callback.effects["the distillation loss"] == 2
    assert not torch.equal(plain.model.model[1].weight, added.model.model[1].weight)
    assert list(plain.model.state_dict()) == list(added.model.state_dict())


def test_yaml_and_python_give_the_same_weights(project):
    """The teacher's random weights are read from a file, so both arms have the same."""
    module, package = import_module(project.name), import_module(project.namespace)
    torch.manual_seed(5)
    teacher = module.Teacher(3)
    torch.save(teacher.state_dict(), project.folder / "teacher.pt")
    spec = {
        "class_path": "lightning_compress.teacher_from_checkpoint",
        "init_args": {
            "class_path": f"{project.name}.Teacher",
            "ckpt_path": str(project.folder / "teacher.pt"),
            "init_args": {"classes": 3},
        },
    }
    in_yaml = project.fit(spec, temperature=2.0)

    from lightning_compress import DistillationCallback

    in_python = module.LitNet()
    settings = {key: value for key, value in BASE["trainer"].items() if key != "callbacks"}
    package.Trainer(**settings, callbacks=[DistillationCallback(teacher, temperature=2.0)]).fit(
        in_python, module.Data()
    )
    assert torch.equal(in_yaml.model.model[1].weight, in_python.model[1].weight)
    assert torch.equal(ours(in_yaml).teacher[1].weight, teacher[1].weight)


@pytest.mark.parametrize("name", ["DistillationCallback", "ExportCallback", "CompressionReport"])
def test_the_help_is_short_and_complete(project, name, capsys):
    with pytest.raises(SystemExit) as stop:
        project.cli("fit", f"--trainer.callbacks.help=lightning_compress.{name}")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 60
    arguments = {"DistillationCallback": ["teacher", "temperature", "loss_kind"], "ExportCallback": ["path"]}.get(
        name, []
    )
    for argument in [*arguments, "name"]:
        assert f"{argument} " in text or f".{argument}" in text
    assert not [line for line in text.splitlines() if len(line) > 400]


BAD = {
    "no such name": ("torchvision.models.resnet81", r"has no class or function 'resnet81'; did you mean 'resnet18'"),
    "no such package": ("torchvisoin.models.resnet18", r"'torchvisoin.models' cannot be imported"),
    "a wrong argument": (
        {"class_path": "torchvision.models.resnet18", "init_args": {"num_clases": 3}},
        r"could not be built.*num_clases",
    ),
    "a wrong key": (
        {"class_path": "torchvision.models.resnet18", "init_arg": {}},
        r"key 'init_arg'.*did you mean 'init_args'",
    ),
    "not a module": ({"class_path": "collections.OrderedDict"}, r"returned OrderedDict, not a torch.nn.Module"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_teacher_that_cannot_be_built(project, what, capsys):
    spec, message = BAD[what]
    with pytest.raises((ValueError, TypeError, SystemExit)) as raised:
        project.fit(spec)
    assert_said(message, f"{raised.value} {capsys.readouterr().err}")


def test_an_unknown_argument_is_named(project, capsys):
    with pytest.raises(SystemExit) as raised:
        project.fit({"class_path": f"{project.name}.Teacher", "init_args": {"classes": 3}}, temprature=2.0)
    assert raised.value.code == 2
    assert_said("temprature", capsys.readouterr().err)


def test_the_entry_point_is_off_by_default_and_imports_nothing_heavy():
    code = "import sys; from _lightning_compress_factory import callbacks; print(callbacks(), 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LIGHTNING_COMPRESS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["[]", "False"], done.stderr
    for namespace in NAMESPACES:
        trainer = import_module(namespace).Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
        assert not [
            callback for callback in trainer.callbacks if type(callback).__module__.startswith("lightning_compress")
        ]


def assert_said(pattern, text):
    assert re.search(pattern, " ".join(text.split())), text


@pytest.mark.slow
def test_an_untouched_script_in_a_process_of_its_own(project):
    project.write("train.py", textwrap.dedent(TRAIN).format(namespace=project.namespace, project=project.name))
    config = {"trainer": {"callbacks+": [{"class_path": NAME, "init_args": {"teacher": f"{project.name}.Small"}}]}}
    with open(project.folder / f"{project.name}.py", "a") as file:
        file.write("\n\nclass Small(Teacher):\n    def __init__(self):\n        super().__init__(3)\n")
    extra = project.yaml("compress.yaml", config)
    log = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={project.folder}", "--trainer.log_every_n_steps=1"]
    done = subprocess.run(
        [sys.executable, "train.py", "fit", "--config", project.base, "--config", extra, *log],
        cwd=project.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [metrics] = project.folder.rglob("metrics.csv")
    assert "compress/kd/loss" in metrics.read_text()
    assert len(metrics.read_text().splitlines()) == 3

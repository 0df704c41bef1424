"""``export --precision int8`` of projects that are written in other ways: what trains is exported, truly measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from projects import NAMESPACES
from test_exporting import VERSION, exported

from lightning_compress.cli import main

pytestmark = pytest.mark.slow

SOURCE = """
    import time
    from pathlib import Path

    import torch
    from torch import nn
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset

    import {namespace} as L


    def images(seed, rows=256):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(rows, 8, generator=generator)
        return TensorDataset(x, (x[:, :4].sum(1) > x[:, 4:].sum(1)).long())


    class Lit(L.LightningModule):
        def __init__(self, act: str = "relu", lr: float = 0.1):
            super().__init__()
            self.save_hyperparameters()
            kind = {{"relu": nn.ReLU, "tanh": nn.Tanh}}[act]
            self.model = nn.Sequential(nn.Linear(8, 16), kind(), nn.Linear(16, 2))

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)


    class Wide(Lit):
        def __init__(self, width: int = 16):
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


    class Listed(Lit):
        def __init__(self, acts: list[str] = ["relu"]):
            super().__init__(acts[0])
            self.save_hyperparameters()


    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


    class Logs(Lit):
        def validation_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("seen", len(batch[0]))
            super().validation_step(batch, batch_idx)


    class Loaders:
        def train_dataloader(self):
            return DataLoader(self.train_set, 32)

        def val_dataloader(self):
            return DataLoader(self.val_set, 32)


    class Own(Loaders, Lit):
        def setup(self, stage):
            if stage == "fit":
                self.train_set, self.val_set = images(0), images(1)


    class Redrawn(Own):
        def setup(self, stage):
            super().setup(stage)
            nn.init.zeros_(self.model[0].weight)  # as a backbone that is loaded here


    class Later(Lit):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            if not hasattr(self, "model"):
                self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


    class Told(Lit):
        def setup(self, stage):
            self.scale = self.trainer.datamodule.scale

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch[0] * self.scale, batch[1]), batch_idx)


    class Weighted(Lit):
        def setup(self, stage):
            self.register_buffer("weights", torch.ones(2))


    class Waits(Lit):
        def validation_step(self, batch, batch_idx):
            if list(Path().glob(".last-int8.onnx*")):  # the file is there, under the name of its draft
                Path("mark").touch()
                time.sleep(0.2)
            super().validation_step(batch, batch_idx)


    class Data(Loaders, L.LightningDataModule):
        def setup(self, stage):
            self.train_set, self.val_set = images(0), images(1)


    class Scaled(Data):
        scale = 1.0


    class Sized(Data):
        def __len__(self):
            return 0


    class TornDown(Data):
        def teardown(self, stage):
            del self.val_set  # twice would be an error, before the end too


    class Drawn(Data):
        def setup(self, stage):
            with open("split", "a") as file:
                print(torch.randperm(10).tolist(), file=file)
            super().setup(stage)


    class NoDisk(Data):
        def prepare_data(self):
            raise OSError("no disk")


    class FitOnly(Data):
        def setup(self, stage):
            if stage == "fit":
                super().setup(stage)


    class InPlace(Data):
        def __init__(self):
            super().__init__()
            self.x, self.y = images(1).tensors
            self.x = self.x * 4

        def setup(self, stage):
            self.x = self.x / 4
            self.train_set = self.val_set = TensorDataset(self.x, self.y)


    class Outliers(Data):
        def setup(self, stage):
            super().setup(stage)
            x, y = self.train_set.tensors
            self.train_set = TensorDataset(torch.cat([x, torch.full_like(x[:8], 5000.0)]), torch.cat([y, y[:8]]))


    class Empty(Data):
        def train_dataloader(self):
            return DataLoader(self.train_set, 512, drop_last=True)


    class EmptyToo(Data):
        def val_dataloader(self):
            return DataLoader(self.val_set, 512, drop_last=True)


    class Stream(Data):
        def val_dataloader(self):
            class Endless(IterableDataset):
                def __iter__(self):
                    while True:
                        yield from images(1)

            return DataLoader(Endless(), 32)
"""


class Written:
    """The project in the current folder, and what its modules and checkpoints are."""

    def __init__(self, folder, namespace):
        self.name = f"written_{namespace.partition('.')[0]}_{folder.name}".replace("-", "_")
        Path(f"{self.name}.py").write_text(textwrap.dedent(SOURCE).format(namespace=namespace))
        self.code = import_module(self.name)

    def checkpoint(self, module="Lit", **arguments):
        """A trained network, in the class that is named, or in the plain one."""
        torch.manual_seed(0)
        built = getattr(self.code, module)(**arguments)
        plain = self.code.Lit(**arguments)
        self.fit(plain)
        if isinstance(built, self.code.Later):
            built.configure_model()
        built.load_state_dict(plain.state_dict())
        if module == "Weighted":
            built.register_buffer("weights", torch.ones(2))
        hyperparameters = {"hyper_parameters": dict(plain.hparams), "hparams_name": "kwargs"} if arguments else {}
        torch.save({"state_dict": built.state_dict(), **hyperparameters, **VERSION}, "last.ckpt")
        return plain.eval()

    def fit(self, module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        x, y = self.code.images(0).tensors
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module.model(x), y).backward()
            optimizer.step()

    def accuracy(self, module):
        x, y = self.code.images(1).tensors
        return float((module.model(x).argmax(1) == y).float().mean())

    def config(self, module="Lit", data="Data", trainer=None, **arguments):
        content = {
            "model": {"class_path": f"{self.name}.{module}", "init_args": arguments},
            **({"data": f"{self.name}.{data}"} if data else {}),
            "trainer": {"accelerator": "cpu", **(trainer or {})},
        }
        Path("config.yaml").write_text(yaml.safe_dump(content))
        return ["last.ckpt", "--config", "config.yaml", "--metric", "val_acc", "--precision"]


@pytest.fixture
def written(request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Written(tmp_path, getattr(request, "param", NAMESPACES[0]))


def told(line):
    """The accuracies of the line: in the file, and at the end that of full precision, or of the module."""
    figures = re.search(r"val_acc (\S+) in the file, (\S+) in the (?:quantised )?module(?:, (\S+) in full)?", line)
    assert figures, line
    return float(figures[1]), float((figures[3] or figures[2]).rstrip(")"))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("written", NAMESPACES, indirect=True)
def test_a_forward_that_hands_on_and_steps_that_call_it(written, precision, capsys):
    module = written.checkpoint()
    code, line = exported(capsys, *written.config(), precision)
    assert code == 0, line
    assert told(line)[1] == pytest.approx(written.accuracy(module), abs=1e-3)
    assert "largest difference to the quantised network" in line or precision == "fp32"


@pytest.mark.parametrize(
    ("module", "data", "trainer"),
    [
        ("Lit", "FitOnly", {}),
        ("Lit", "InPlace", {}),
        ("Lit", "Stream", {"limit_val_batches": 8}),
        ("Lit", "Data", {"fast_dev_run": True}),
        ("Lit", "Data", {"limit_val_batches": 0}),
        ("Lit", "Sized", {}),
        ("Lit", "TornDown", {}),
        ("Told", "Scaled", {}),
        ("Weighted", "Data", {}),
        ("Own", None, {}),
        ("Redrawn", None, {}),
        ("Logs", "Data", {}),
        ("Later", "Data", {}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_trains_is_exported_and_measured(written, precision, module, data, trainer, capsys):
    """The figures are those of all the validation data, once set up, with the weights of the checkpoint."""
    plain = written.checkpoint(module)
    code, line = exported(capsys, *written.config(module, data, trainer), precision)
    assert code == 0, line
    assert told(line) == pytest.approx([written.accuracy(plain)] * 2, abs=0.02 if precision == "int8" else 1e-3)
    file = "last.onnx" if precision == "fp32" else "last-int8.onnx"
    kept = {"last.ckpt", file, "config.yaml", f"{written.name}.py"}
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == kept


def test_hyperparameters_of_the_checkpoint_count_where_it_says_of_which_class_they_are(written, capsys):
    module = written.checkpoint(act="tanh")
    contents = torch.load("last.ckpt", weights_only=True)
    contents["hyper_parameters"] |= {"_class_path": f"{written.name}.Lit", "_instantiator": "lightning"}
    torch.save(contents, "last.ckpt")
    code, line = exported(capsys, *written.config(), "int8")
    assert code == 0, line
    assert told(line)[1] == pytest.approx(written.accuracy(module), abs=1e-3)
    assert line.endswith("; the checkpoint was saved with act='tanh', and the config has 'relu': the checkpoint counts")


def test_lists_among_the_hyperparameters_count_too(written, capsys):
    """With the other one the network would fit, and compute something else."""
    module = written.checkpoint(act="tanh")
    contents = torch.load("last.ckpt", weights_only=True)
    contents["hyper_parameters"] = {
        "acts": ["tanh"],
        "_class_path": f"{written.name}.Listed",
        "_instantiator": "lightning",
    }
    torch.save(contents, "last.ckpt")
    code, line = exported(capsys, *written.config("Listed"), "fp32")
    assert code == 0, line
    assert told(line)[1] == pytest.approx(written.accuracy(module), abs=1e-3)
    said = "the checkpoint was saved with acts=['tanh'], and the config has ['relu']: the checkpoint counts"
    assert line.endswith(f"; {said}")


def test_hyperparameters_that_are_others_in_the_config_are_told(written, capsys):
    written.checkpoint(act="tanh", lr=0.1)
    code, line = exported(capsys, *written.config(), "fp32")
    assert code == 0, line
    assert line.endswith("; the checkpoint was saved with act='tanh', and the config has 'relu': the config counts")


def test_an_argument_that_is_another_in_the_config_comes_before_the_sizes_that_do_not_fit(written, capsys):
    module = written.code.Wide(width=24)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"width": 24}}, "last.ckpt")
    code, line = exported(capsys, *written.config("Wide"), "fp32")
    assert code == 2
    reason = "the checkpoint was saved with width=24, and the config has 16, where it has to say the same: "
    sizes = "size mismatch"
    assert reason in line
    assert sizes in line.partition(reason)[2]


def test_a_calibration_that_loses_more_than_the_tolerance(written, capsys):
    module = written.checkpoint()
    code, line = exported(capsys, *written.config(data="Outliers"), "int8", "--tolerance", "0.02")
    assert code == 1
    expected = rf"in the file and {written.accuracy(module):.4g}\d* in full precision: the diff"
    assert re.search(expected, line), line
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(("limit", "samples"), [(2, 64), (0, 256)])
def test_a_calibration_takes_no_more_batches_than_the_training(written, limit, samples, capsys):
    """Where there was none, all."""
    written.checkpoint()
    code, line = exported(capsys, *written.config(trainer={"limit_train_batches": limit}), "int8")
    assert (code, f"calibrated with {samples} samples of the training data" in line) == (0, True), line


def test_data_are_drawn_as_in_a_fit(written, capsys):
    """What ``configure_model`` draws comes after the set-up, in a fit and here."""
    written.checkpoint("Later")
    Path("split").write_text("")
    arguments = written.config("Later", "Drawn", {"max_epochs": 1, "logger": False, "enable_checkpointing": False})
    config = yaml.safe_load(Path("config.yaml").read_text())
    Path("config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, **config}))
    assert main(["fit", "--config", "config.yaml"]) == 0
    code, line = exported(capsys, *arguments, "int8")
    assert code == 0, line
    in_fit, here = Path("split").read_text().splitlines()
    assert in_fit == here


@pytest.mark.parametrize("named", [[], ["--class", "{}.Lit"]])
def test_a_checkpoint_of_a_class_that_is_not_here(written, named, capsys):
    module = written.checkpoint(act="relu")
    contents = torch.load("last.ckpt", weights_only=True)
    contents["hyper_parameters"] |= {"_class_path": "__main__.Lit", "_instantiator": "lightning"}
    torch.save(contents, "last.ckpt")
    code, line = exported(capsys, *written.config(), "fp32", *(own.format(written.name) for own in named))
    assert code == 0, line
    assert told(line)[1] == pytest.approx(written.accuracy(module), abs=1e-3)


def test_what_fails_in_the_set_up_is_told_once(written, capsys):
    written.checkpoint()
    code, line = exported(capsys, *written.config(data="NoDisk"), "int8", "--shape", "1,8")
    assert code == 1
    assert line == "lightning-compress export: the steps or the data of Lit failed: OSError: no disk"


@pytest.mark.parametrize(
    ("data", "said"), [("Empty", "no batch reached the network"), ("EmptyToo", "the data of Lit give no batch")]
)
def test_data_without_a_batch(written, data, said, capsys):
    written.checkpoint()
    code, line = exported(capsys, *written.config(data=data), "int8")
    assert code == 2
    assert said in line


def test_double_precision_stays_double(written, capsys):
    plain = written.checkpoint()
    arguments = written.config(trainer={"precision": "64-true"})
    code, line = exported(capsys, *arguments, "fp32")
    assert code == 0, line
    assert told(line) == pytest.approx([written.accuracy(plain)] * 2, abs=1e-3)
    assert exported(capsys, *arguments, "fp32", "--shape", "1,8")[0] == 0
    code, line = exported(capsys, *arguments, "int8")
    assert (code, "integer kernels go with float32" in line) == (1, True), line


def test_a_step_that_optimises_by_itself_cannot_estimate_statistics_outside_of_a_fit(written, capsys):
    torch.manual_seed(0)
    torch.save({"state_dict": written.code.Manual().state_dict(), **VERSION}, "last.ckpt")
    code, line = exported(capsys, *written.config("Manual"), "int4")
    assert (code, "optimises by itself, and there are no optimizers outside of a fit" in line) == (2, True), line
    code, line = exported(capsys, *written.config("Manual"), "int8")
    assert (code, "calibrated with 256 samples of the training data" in line) == (0, True), line


def test_what_ends_a_process_ends_this_one(written):
    written.checkpoint()
    command = [sys.executable, "-m", "lightning_compress.cli", "export", *written.config("Waits"), "int8"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not Path("mark").exists() and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    assert not list(Path().glob("*.onnx"))
    assert main(["export", *written.config(), "int8"]) == 0
    assert {path.name for path in Path().glob("*.onnx*")} == {"last-int8.onnx"}  # the draft is gone too

"""Suggested recipes: what is in them, by hand, and that they keep their budget when they are run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_compress.commands.sensitivity.budgets import Budget
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.costs import costs_of
from lightning_compress.commands.sensitivity.findings import Findings
from lightning_compress.commands.sensitivity.journal import Measurement
from lightning_compress.commands.sensitivity.layers import Layer
from lightning_compress.commands.sensitivity.metrics import Metric
from lightning_compress.commands.sensitivity.suggest import suggest
from lightning_compress.recipe import load_recipe


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def findings(method, losses, levels):
    """Of the three layers, at each level, in points of accuracy; of nothing else."""
    layers = [Layer(name, "Linear", (f"{name}.weight",), 4096, 4096, methods=(method,)) for name in "024"]
    found = {
        Change(method, name, level): Measurement({"val_acc": 0.9 - loss}, 0.1)
        for name, own in losses.items()
        for level, loss in zip(levels, own, strict=True)
    }
    return Findings(layers, {method: levels}, Metric("val_acc", "max"), {"val_acc": 0.9}, found, 3 * len(levels))


def suggestion(method, losses, levels, budget, module=None):
    module = module or net()
    own = findings(method, losses, levels)
    return suggest(method, own, costs_of(method, module, own.layers, levels), module, budget)


def written(tmp_path, found):
    (tmp_path / "r.yaml").write_text(found.recipe())
    recipe = load_recipe(tmp_path / "r.yaml")
    return [(own["class_path"], own["init_args"]) for own in recipe.callbacks], dict(recipe.export)


def test_bits(tmp_path):
    losses = {"0": (0.0, 0.2), "2": (0.0, 0.01), "4": (0.0, 0.02)}
    found = suggestion("bits", losses, (8, 4), Budget("bytes", 11_800, False))
    assert found.levels == {"0": 8, "2": 4, "4": 4}
    assert found.loss == pytest.approx(0.03)
    assert found.cost == (4096 + 64 * 5) + 2 * (64 * (32 + 4)) + 3 * (256 + 640) <= found.limit
    assert written(tmp_path, found) == (
        [("PTQCallback", {"weight_bits": 4, "activation_bits": None, "edge_bits": None, "layer_bits": {"0": 8}})],
        {"path": "model-bits.onnx", "precision": "int4", "metric": "val_acc"},
    )
    text = " ".join((tmp_path / "r.yaml").read_text().split("\n#   "))
    assert "Budget bytes=11.8kB: predicted are 11.7 kB of " in text
    assert "val_acc is 0.9 as it is, and predicted to be worse by 0.0300; that is the sum of what each layer" in text


def test_bits_where_some_stay_in_float(tmp_path):
    losses = {"0": (0.1, 0.2), "2": (0.0, 0.01)}  # "4" was not measured
    found = suggestion("bits", losses, (8, 4), Budget("bytes", 0.8, True))
    assert found.levels == {"0": None, "2": 8, "4": None}
    [(_, arguments)], export = written(tmp_path, found)
    assert (arguments["weight_bits"], arguments["exclude"], export["precision"]) == (8, ["0", "4"], "int8")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    layers = [Layer("attention.out_proj", "Linear", ("attention.out_proj.weight",), 64, methods=("bits",))]
    found = {Change("bits", "attention.out_proj", 4): Measurement({"val_acc": 0.9}, 0.1)}
    own = Findings(layers, {"bits": (4,)}, Metric("val_acc", "max"), {"val_acc": 0.9}, found, 1)
    module = Attention()
    found = suggest("bits", own, costs_of("bits", module, layers, (4,)), module, Budget("bytes", 0.99, True))
    assert found.callbacks[0]["init_args"]["layers"] == ["attention.out_proj"]  # to exclude the rest would exclude it


def test_nothing_is_suggested_where_nothing_is_needed():
    losses = dict.fromkeys("024", (0.1,))
    for method, quantity in (("bits", "bytes"), ("sparsity", "bytes"), ("filters", "macs")):
        assert suggestion(method, losses, (4 if method == "bits" else 0.5,), Budget(quantity, 1e9, False)) is None


def test_a_default_budget_out_of_reach_gives_the_smallest():
    found = suggestion("bits", dict.fromkeys("024", (0.1,)), (8,), None)
    assert set(found.levels.values()) == {8}
    assert found.cost == found.limit
    unmet = "bytes=25%: the default, 13.0 kB, is out of reach by what was measured; taken instead is the smallest: "
    assert found.said.startswith(f"{unmet}15.9 kB of 51.8 kB (")
    assert f"# Budget {unmet}predicted are" in found.recipe().replace("\n#   ", " ")


@pytest.mark.parametrize("method", ["bits", "sparsity", "filters"])
def test_no_more_is_predicted_than_a_metric_can_lose(method):
    """0.9 is what there is to lose: 3 layers with 0.5 each lose more, and that is said in the place of a number."""
    levels = (4,) if method == "bits" else (0.75,)
    budget = Budget("macs", 0.3, True) if method == "filters" else Budget("bytes", 0.4, True)
    found = suggestion(method, dict.fromkeys("024", (0.5,)), levels, budget)
    assert found.summary()["predicted_loss"] is None
    assert found.said.endswith("no usable prediction, as the losses of the layers add up to more than val_acc itself")
    text = found.recipe().replace("\n#   ", " ")
    assert "no usable prediction" in text
    assert "a budget that leaves more is safer" in text
    assert "worse by" not in f"{found.said}{text}"
    assert suggestion(method, dict.fromkeys("024", (0.2,)), levels, budget).summary()["predicted_loss"] > 0.3


def test_a_default_that_would_lose_all_is_not_taken():
    found = suggestion("bits", {"0": (0.0, 0.5), "2": (0.0, 0.5), "4": (0.0, 0.5)}, (8, 4), None)
    assert found.budget == Budget("bytes", 0.375, True)
    assert (set(found.levels.values()), found.loss) == ({8}, 0.0)
    told = "with the default, bytes=25%, the losses of the layers add up to more than val_acc itself; "
    assert found.said.startswith(f"bytes=37.5%: {told}")
    assert f"# Budget bytes=37.5%: {told}" in found.recipe().replace("\n#   ", " ")


def test_a_loss_has_no_end():
    own = findings("bits", dict.fromkeys("024", (0.5,)), (4,))
    own = dataclasses.replace(own, metric=Metric("val_acc", "min"))
    found = {change: Measurement({"val_acc": 1.4}, 0.1) for change in own.found}
    own = dataclasses.replace(own, found=found)
    module = net()
    told = suggest("bits", own, costs_of("bits", module, own.layers, (4,)), module, None)
    assert told.said.endswith("val_acc worse by 1.5000, as predicted")


def test_sparsity(tmp_path):
    losses = {"0": (0.0, 0.3), "2": (0.0, 0.1), "4": (0.2, 0.4)}
    found = suggestion("sparsity", losses, (0.5, 0.9), Budget("bytes", 0.58, True))
    assert found.levels == {"0": 0.5, "2": 0.9, "4": None}
    callbacks, export = written(tmp_path, found)
    assert [(name, own["sparsity"], own["layers"], own["name"]) for name, own in callbacks] == [
        ("PruningCallback", 0.5, ["0"], "pruning_50"),
        ("PruningCallback", 0.9, ["2"], "pruning_90"),
    ]
    assert export == {"path": "model-sparsity.onnx", "precision": "fp32", "metric": "val_acc"}


def test_filters(tmp_path):
    losses = {"0": (0.3, 0.4), "2": (0.0, 0.1), "4": (0.0, 0.1)}
    found = suggestion("filters", losses, (0.5, 0.75), Budget("macs", 0.6, True))
    assert found.levels == {"0": None, "2": pytest.approx(0.6), "4": pytest.approx(0.6)}
    assert found.loss == pytest.approx(2 * 0.04)
    callbacks, _ = written(tmp_path, found)
    assert callbacks == [("StructuredPruningCallback", {"ratio": 0.4, "budget": "macs", "exclude": ["0"]})]
    found = suggestion("filters", losses, (0.5, 0.75), Budget("macs", 0.2, True))
    unmet = (
        "macs=20%: 2.46 k is out of reach by what was measured; taken instead is the smallest: 3.07 k of 12.3 k MACs"
    )
    assert found.said.startswith(f"{unmet}, 0 layers left whole")
    assert f"# Budget {unmet} are left." in found.recipe().replace("\n#   ", " ")
    assert found.callbacks[0]["init_args"]["ratio"] == 0.75


PROJECT = """
import lightning.pytorch as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Lit(L.LightningModule):
    def __init__(self, width: int = 24):
        super().__init__()
        block = lambda i, o: (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.net = nn.Sequential(
            *block(1, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 64), nn.ReLU(), nn.Linear(64, 10),
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

class Digits(L.LightningDataModule):
    def setup(self, stage=None):
        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        self.rows = [TensorDataset(x[own], y[own]) for own in (order[:1200], order[1200:])]

    def train_dataloader(self):
        return DataLoader(self.rows[0], 64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows[1], 200)
"""
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "digits.Lit"},
    "data": {"class_path": "digits.Digits"},
    "trainer": {
        "max_epochs": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "kept", "filename": "trained"},
            }
        ],
    },
}
TRAIN = "from lightning.pytorch.cli import LightningCLI\nLightningCLI(save_config_callback=None)\n"
RUN = "import sys\nfrom lightning_compress.commands.run import run\nsys.exit(run(sys.argv[1], sys.argv[2:]))\n"


def ran(*command):
    child = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.slow
def test_suggestions_keep_their_budgets_when_they_are_run(tmp_path, monkeypatch):
    """Real data, a project of its own, the command, and each recipe through `run` as its comment says."""
    monkeypatch.chdir(tmp_path)
    Path("digits.py").write_text(PROJECT)
    Path("train.py").write_text(TRAIN)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    fit = ["train.py", "fit", "--config", "config.yaml"]
    ran(*fit)
    methods = ["--method", "bits", "sparsity", "filters"]
    out = ran("-m", "lightning_compress.cli", "sensitivity", "kept/trained.ckpt", "--config", "config.yaml", *methods)
    assert "recipe.yaml: bytes=25%" in out
    found = {own["method"]: own for own in json.loads(Path("sensitivity/sensitivity.json").read_text())["suggestions"]}
    reports = {}
    for method, name in (("bits", "recipe"), ("sparsity", "recipe-sparsity"), ("filters", "recipe-filters")):
        epochs = {"bits": "4", "sparsity": "8", "filters": "8"}[method]
        assert f"--trainer.max_epochs {epochs}" in Path(f"sensitivity/{name}.yaml").read_text().replace("\n#   ", " ")
        again = [*fit, "--ckpt_path", "kept/trained.ckpt", "--trainer.max_epochs", epochs, "--trainer.callbacks=[]"]
        ran("-c", RUN, f"sensitivity/{name}.yaml", sys.executable, *again)
        reports[method] = json.loads(Path("compression_report/compression_report.json").read_text())
        file = Path(f"model-{method}.onnx").read_bytes()
        size = len(zlib.compress(file, 9)) if method == "sparsity" else len(file)
        if method != "filters":
            assert size <= found[method]["limit"]
            assert size == pytest.approx(found[method]["predicted"], rel={"bits": 0.02, "sparsity": 0.1}[method])
    rows = {own["name"]: own for own in reports["bits"]["rows"]}
    plain, file = (rows[name]["metrics"]["val_acc"] for name in ("before", "model-bits.onnx"))
    assert plain > 0.95
    assert plain - file <= found["bits"]["predicted_loss"] + 0.01  # batch norm is estimated anew there
    bits = {own["name"]: own["bits"] for own in reports["bits"]["layers"]}
    assert bits == {name: level or 32 for name, level in found["bits"]["levels"].items()}
    before, after = (own["macs"] for own in reports["filters"]["rows"][:2])
    assert after / before == pytest.approx(0.5, abs=0.02)
